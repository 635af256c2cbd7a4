"""What every defence keeps, run over the registry: a new one is tested by being registered.

The idea is that of linear_operator's test case for operators."""
import copy
import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cem_nb.data
import cem_nb.datasets
from cem_nb.core import number, seeded
from cem_nb.datasets import load_data
from cem_nb.defense import ProxyDefense, defense
from cem_nb.methods import DEFENSES, make_defense
from cem_nb.models import feature_shape

OFF = dict(alpha=0.0, lipschitz=0.0, noise_factor=1.0, p=0.0)  # what switches a setting off; the others are not weights
ON = dict(t=0.0, lipschitz=0.01)                               # opens a hinge, and what is off by default
NETWORK = dict(in_channels=1, image_size=16, width=0.125, noise_std=0.025)


class Toy(ProxyDefense):
    "A defence with all there is: a loss, a statistic, a proxy with an optimiser, a gradient, the end of an epoch."
    drop = 0.1

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = number(alpha=alpha)
        if not alpha: self.drop = 0.0
        self.register_buffer('mean', torch.zeros(()))
        self.register_buffer('epochs', torch.zeros((), dtype=torch.long))

    def model(self, *args, **kwargs):
        model = super().model(*args, **kwargs)
        self.learn_along(nn.Linear(1, 1))
        return model

    def step(self, x, z):
        self.mean.lerp_(z.mean(), 0.1)
        self.proxy_opt.zero_grad()
        (self.proxy(z.mean().view(1, 1)) - x.mean()).square().mean().backward()
        self.proxy_opt.step()

    def loss(self, x, y, z_hat, z, logits):
        return self.alpha*((z - self.mean).square().mean() + self.proxy.weight.detach().square().mean())

    def end_epoch(self, model, opt, done): self.epochs += 1


NAMES = [*DEFENSES, 'Toy']


@pytest.fixture(scope='module', autouse=True)
def toy():
    defense('Toy', alpha=0.5)(Toy)
    yield
    del DEFENSES['Toy']


def build(name, arch='vgg11', params={}, seed=0, **network):
    with seeded(seed, 'init'):
        d = make_defense(name, {k: v for k, v in params.items() if k in DEFENSES[name].settings})
        model = d.model(arch, 10, **NETWORK | network)
    return d, model, torch.optim.SGD(model.parameters(), 0.05, 0.9)


def batch(n=16, channels=1, side=16, device='cpu', seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.rand(n, channels, side, side, generator=g), torch.arange(n) % 10
    return x.to(device), y.to(device)


def train_step(d, model, opt, x, y):
    "A batch, as training has it."
    model.train()
    z_hat = model.encode(x)
    z = model.send(z_hat)
    d.step(x, z.detach())
    logits = model.server(z)
    l_d = torch.as_tensor(d.loss(x, y, z_hat, z, logits), device=x.device)
    loss = F.cross_entropy(logits, y) + l_d
    opt.zero_grad()
    loss.backward()
    d.after_backward(model)
    opt.step()
    return loss.detach(), l_d.detach()


def train(d, model, opt, epochs, of=4):
    "Epochs of two batches; the random numbers of an epoch depend on its number alone."
    losses = []
    for epoch in epochs:
        with seeded(0, 'train', epoch):
            losses += [train_step(d, model, opt, *batch(seed=2*epoch + i))[0] for i in range(2)]
        d.end_epoch(model, opt, (epoch + 1)/of)
    return losses


def same(a, b):
    "Whether two states are equal, bit for bit, however they are nested."
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state_of(*things): return copy.deepcopy([t.state_dict() for t in things])


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize('name', NAMES)
class TestDefense:
    @pytest.mark.parametrize('channels, side', [(1, 16), (3, 32)])
    @pytest.mark.parametrize('arch', ['vgg11', 'resnet20'])
    def test_shapes_and_a_finite_loss(self, name, arch, channels, side):
        d, model, opt = build(name, arch, ON, in_channels=channels, image_size=side)
        x, y = batch(8, channels, side)
        z = model.smash(x)
        assert z.shape[1:] == feature_shape(model, (channels, side, side)) and model.server(z).shape == (8, 10)
        loss, l_d = train_step(d, model, opt, x, y)
        assert l_d.ndim == 0 and loss.isfinite() and l_d >= 0
        assert all(p.isfinite().all() for p in (*model.parameters(), *d.parameters()))

    def test_the_loss_has_the_gradient_of_its_values(self, name):
        d, model, opt = build(name, params=ON)
        for i in range(10): train_step(d, model, opt, *batch(seed=i))
        d.double(), model.double()
        x, y = batch()
        x = x.double()
        z_hat = model.encode(x).detach()
        way, noise = torch.randn_like(z_hat), 0.025*torch.randn_like(z_hat)
        def value(h):
            moved = z_hat + h*way
            return torch.as_tensor(d.loss(x, y, moved, moved + noise, model.server(moved + noise)))
        h = torch.zeros((), dtype=torch.float64, requires_grad=True)
        if not value(h).requires_grad: return  # a defence without a loss
        slope, = torch.autograd.grad(value(h), h)
        eps = 1e-8  # in float64, and so small that no ReLU has its kink in between
        assert slope.item() == pytest.approx(((value(eps) - value(-eps))/(2*eps)).item(), rel=1e-3, abs=1e-8)

    def test_building_depends_on_the_seed_alone(self, name):
        first = state_of(*build(name)[:2])
        torch.rand(7)
        assert same(first, state_of(*build(name)[:2])) and not same(first, state_of(*build(name, seed=1)[:2]))

    @pytest.mark.parametrize('arch', ['vgg11', 'resnet20'])
    def test_switched_off_it_is_the_bottleneck_bit_for_bit(self, name, arch):
        off = build(name, arch, OFF)
        plain = build('Bottleneck', arch)
        x, y = batch()
        with seeded(0, 'off'): loss, l_d = train_step(*off, x, y)
        assert l_d == 0, f'{name} has a loss when {OFF} are off; does it have a weight that is not among them?'
        shapes = [{k: v.shape for k, v in model.state_dict().items()} for _, model, _ in (off, plain)]
        if shapes[0] != shapes[1]:
            assert name in ('No_defense', 'PATROL')  # networks of their own
            return
        with seeded(0, 'off'): assert train_step(*plain, x, y)[0] == loss
        assert off[1].noise_std == plain[1].noise_std and off[1].drop == plain[1].drop
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(off[1].parameters(), plain[1].parameters(), strict=True))
        assert same(state_of(*off[1:]), state_of(*plain[1:]))

    @torch.no_grad()
    def test_an_attacker_sees_what_the_server_receives(self, name):
        _, model, _ = build(name, noise_std=0.1)
        received = []
        model.server.register_forward_pre_hook(lambda m, args: received.append(args[0]))
        x, _ = batch(64)
        for mode in (True, False):
            model.train(mode)
            with seeded(0, 'send'): model(x)
            with seeded(0, 'send'): assert torch.equal(model.smash(x), received[-1])
        z_hat, z = model.encode(x), model.smash(x)
        kept = z != 0
        factor = DEFENSES[name].settings.get('noise_factor', 1.0)
        assert (z - z_hat)[kept].std() == pytest.approx(0.1*factor, rel=0.1)
        assert (~kept).float().mean() == pytest.approx(model.drop, abs=0.02)

    def test_state_goes_through_a_file(self, name):
        d, model, opt = build(name, params=ON)
        train(d, model, opt, range(4))
        saved = state_of(d, model, opt)
        again = build(name, params=ON, seed=1)
        for thing, state in zip(again, through_a_file(saved), strict=True): thing.load_state_dict(state)
        assert same(state_of(*again), saved)

    @pytest.mark.parametrize('stop', [1, 3])
    def test_resumes_in_the_middle_bit_for_bit(self, name, stop):
        whole = build(name, params=ON)
        losses = train(*whole, range(4))
        first = build(name, params=ON)
        before = train(*first, range(stop))
        resumed = build(name, params=ON, seed=1)
        for thing, state in zip(resumed, through_a_file(state_of(*first)), strict=True): thing.load_state_dict(state)
        assert before + train(*resumed, range(stop, 4)) == losses
        assert same(state_of(*resumed), state_of(*whole))

    def test_moves_to_another_device(self, name):
        "To `meta`, where a tensor left behind and a value that is read are errors."
        d, model, opt = build(name, params=ON)
        d.to('meta'), model.to('meta')
        train_step(d, model, torch.optim.SGD(model.parameters(), 0.1), *batch(device='meta'))
        inside = [*d.parameters(), *d.buffers(), *model.parameters(), *model.buffers()]
        optimisers = [v for v in vars(d).values() if isinstance(v, torch.optim.Optimizer)]
        for o in optimisers:
            held = [p for g in o.param_groups for p in g['params']]
            assert {map(id, held)} and {*map(id, held)} <= {*map(id, d.parameters())}
            inside += held + [v for s in o.state.values() for k, v in s.items() if k != 'step']
        assert all(t.device.type == 'meta' for t in inside)

    def test_reads_no_data_but_the_batches(self, name, monkeypatch):
        def forbidden(*a, **k): raise AssertionError(f'{name} loads data')
        images, seen = load_data('digits', n_train=256).train, []
        monkeypatch.setattr(cem_nb.datasets, 'load_data', forbidden)
        monkeypatch.setattr(cem_nb.data, 'batches', forbidden)
        monkeypatch.setattr('builtins.open', forbidden)
        d, model, opt = build(name, params=ON)
        for method in ('step', 'loss'):
            real = getattr(d, method)
            monkeypatch.setattr(d, method, lambda *a, real=real: seen.append(a[0]) or real(*a))
        for i in range(2): train_step(d, model, opt, images.x[32*i:32*i + 32].float()/255, images.y[32*i:32*i + 32])
        d.end_epoch(model, opt, 1.0)
        held = [v for v in (*d.state_dict().values(), *vars(d).values()) if isinstance(v, torch.Tensor)]
        assert len(seen) == 4 and not any(v.shape[-3:] == images.x.shape[1:] for v in held)

    def test_nan_is_not_privacy(self, name):
        "A diverged encoder must not read as a loss of 0, nor stop the table by another error than training's own."
        d, model, opt = build(name, params=ON)
        x, y = batch()
        for p in model.encoder.parameters(): p.data.fill_(torch.nan)
        loss, _ = train_step(d, model, opt, x, y)
        assert loss.isnan()

    def test_wrong_settings_are_refused(self, name):
        for k in DEFENSES[name].settings:
            for wrong in (-1.0, float('nan'), float('inf')):
                with pytest.raises(ValueError, match=k): make_defense(name, {k: wrong})
        with pytest.raises(ValueError, match='no setting'): make_defense(name, {'no such setting': 1.0})
