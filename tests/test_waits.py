"""A GPU does not wait for the host inside an epoch: steps run on the device `meta`, whose tensors have no values to read.

What needs a value (`item`, a truth value, `nonzero`, sizes of clusters) raises there, and copies that block are counted."""
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cem_nb import cem, decoder, gan
from cem_nb.attack import ATTACKS, attack_from
from cem_nb.cem import CEMS
from cem_nb.data import batches
from cem_nb.datasets import load_data
from cem_nb.experiment import preset
from cem_nb.methods import DEFENSES
from cem_nb.training import build, build_cem, train_step

META = torch.device('meta')
ROWS = [(name, v) for name, d in DEFENSES.items() for v in (None, *(['diag'] if d.cls.cem else []))]
ROWS += [('Bottleneck', v) for v in ('letter', 'balanced', 'release')]
WAIT = ('full', 'full-pairwise', 'pairwise')  # as their docstrings say


class Copies(TorchDispatchMode):
    "Counts what is copied from one device to another while the host waits."
    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {t.device for t in (*args, out) if isinstance(t, torch.Tensor)}
            self.n += len(devices) > 1 and not (kwargs or {}).get('non_blocking') and args[2:] != (True,)
        return out


@pytest.fixture(scope='module')
def digits(): return load_data('digits')


def on_meta(digits): return replace(digits, train=digits.train.to('meta'))


def step_of(digits, name, variant, device='meta'):
    e = preset('quick', width=0.125, defense=name, **dict(cem=True, variant=variant) if variant else {})
    defense, model = build(e, digits)
    reg = build_cem(e, model, digits)
    if reg: reg.fit_encoder(model.eval().encode, batches(digits.train, 500))
    for part in (defense, model.train(), *([reg] if reg else [])): part.to(device)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.rand(32, *digits.shape, device=device), torch.zeros(32, dtype=torch.int64, device=device)
    return lambda: train_step(model, defense, reg, opt, x, y, 1.0 if variant else 0.0)


@pytest.mark.parametrize(('name', 'variant'), ROWS, ids=lambda s: s or 'alone')
def test_a_step_of_the_training_reads_nothing(digits, name, variant):
    step = step_of(digits, name, variant)
    if variant != 'balanced': step()  # which looks once, at its second batch
    with Copies() as copies: assert step().device == META
    assert copies.n == 0


@pytest.mark.parametrize('variant', WAIT)
def test_those_that_wait_are_known(digits, variant):
    assert set(CEMS) == {*WAIT, *(v for _, v in ROWS if v)}
    with pytest.raises((RuntimeError, NotImplementedError), match='meta'): step_of(digits, 'Bottleneck', variant)()


@pytest.mark.parametrize('name', [name for name in ATTACKS if ATTACKS[name].trained])
def test_a_step_of_an_attack_reads_nothing(digits, name, monkeypatch):
    plain = lambda kind, net, *args, **settings: kind(net.parameters(), *args, **settings)  # one kernel is not for meta
    for module in (decoder, gan): monkeypatch.setattr(module, 'fused', plain)
    attack = attack_from(dict(name=name, width=8, blocks=1))
    _, model = build(preset('quick', width=0.125), digits)
    model.eval().to('meta')
    train = on_meta(digits).train
    state, step = attack.training(attack.attacker(model, train), model, train, 0)
    assert all(p.device == META for m in state.values() if isinstance(m, torch.nn.Module) for p in m.parameters())
    x = torch.rand(32, *digits.shape, device='meta')
    step(x, model.smash(x).detach())
    with Copies() as copies: means = step(x, model.smash(x).detach())
    assert means['mse'].device == META and copies.n == 0


def test_an_epoch_of_batches_copies_one_order(digits):
    data = on_meta(digits)
    with Copies() as copies: n = sum(1 for _ in batches(data.train, 64, data.augment, shuffle=True))
    assert n > 10 and copies.n == 1


@pytest.mark.parametrize('variant', ['diag', 'letter', 'balanced', 'release'])
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_where_nobody_looks_what_is_no_number_comes_out(variant, bad, monkeypatch):
    "As on a GPU: the loss is NaN, and the next fit refuses the features."
    monkeypatch.setattr(cem, 'finite_tensor', cem.shaped_tensor)
    z, y = torch.rand(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    reg = CEMS[variant](noise_std=0.1, n_classes=3, n_epochs=2, n_components=3).fit(z, y)
    batch = z[:12].clone()
    batch[3, 2] = bad
    assert reg(batch.requires_grad_(), y[:12]).isnan() and reg.l_c.isnan()
    monkeypatch.undo()
    with pytest.raises(ValueError, match='NaN or inf'): reg.fit(batch.detach().repeat(5, 1), y)
