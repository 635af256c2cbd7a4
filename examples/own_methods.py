"A defence and an attack of your own, as rows and a column of Table 1: python examples/own_methods.py"
import math

import torch
from torch import nn

from cem_nb.attack import Attack, register_attack
from cem_nb.core import seeded
from cem_nb.data import batches
from cem_nb.defense import Defense, defense
from cem_nb.models import evaluating, feature_shape
from cem_nb.parameters import TableParameters, table_base, table_rows
from cem_nb.show import score_table
from cem_nb.sweep import sweep


@defense('Shrink', alpha=0.1)
class Shrink(Defense):
    "Adds alpha times the variance of the noise-free feature over the batch to the loss."
    def __init__(self, alpha: float):  # weight, >= 0
        super().__init__()
        self.alpha = alpha

    def loss(self, x, y, z_hat, z, logits): return self.alpha*z_hat.var(0).mean()


@register_attack('linear', label='linear', marker='v')
class Linear(Attack):
    "Ridge regression from smashed features to pixels."
    ridge: float = 1.0

    def attacker(self, model, train):
        shape = train.x.shape[1:]
        width = math.prod(feature_shape(model, shape))
        return nn.Sequential(nn.Flatten(), nn.Linear(width, shape.numel()), nn.Unflatten(1, shape)).to(train.x.device)

    @torch.no_grad()
    def fit(self, attacker, model, train, *, seed, checkpoint=None, label=None):
        with seeded(seed, 'linear', device=train.x.device), evaluating(model):
            pairs = [(model.smash(x).flatten(1).double(), x.flatten(1).double()) for x, _ in batches(train, 500)]
        z, x = map(torch.cat, zip(*pairs))
        zc, xc = z - z.mean(0), x - x.mean(0)
        w = torch.linalg.solve(zc.T @ zc + self.ridge*torch.eye(z.shape[1], device=z.device).double(), zc.T @ xc)
        attacker[1].weight.copy_(w.T)
        attacker[1].bias.copy_(x.mean(0) - z.mean(0) @ w)
        return [dict(mse=(zc @ w - xc).square().mean().item())]


if __name__ == '__main__':
    p = TableParameters(methods='Bottleneck,Shrink', attacks='linear')
    print(score_table(sweep(table_base(p), table_rows(p)), 1).to_string())
