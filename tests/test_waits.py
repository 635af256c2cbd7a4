"""The host does not wait for a GPU inside an epoch: steps run on the device `meta`, whose tensors have no values to read.

What needs a value (`item`, a truth value, `nonzero`, sizes of clusters) raises there; copies that block, and factorisations that
are asked whether they worked, are counted. `test_gpu` has the same steps on a GPU."""
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cem_nb import cem, decoder, gan
from cem_nb.attack import ATTACKS, attack_from
from cem_nb.cem import CEMS
from cem_nb.data import batches
from cem_nb.datasets import load_data
from cem_nb.experiment import preset
from cem_nb.methods import DEFENSES
from cem_nb.training import build, build_cem, optimizer, train_step

META = torch.device('meta')
ROWS = [(name, v) for name, d in DEFENSES.items() for v in (None, *(['diag'] if d.cls.cem else []))]
ROWS += [('Bottleneck', v) for v in ('letter', 'balanced', 'release')]
WAIT = ('full', 'full-pairwise', 'pairwise')  # as their docstrings say
TRAINED = [name for name in ATTACKS if ATTACKS[name].trained]
aten = torch.ops.aten


class _Dispatched(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        tensors = [t for a in (*args, out) for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, torch.Tensor)]
        mixed = len({t.device for t in tensors}) > 1
        blocks = not (kwargs or {}).get('non_blocking') and not any(a is True for a in args[2:])
        if func in (aten._to_copy.default, aten.copy_.default) and mixed and blocks: self.seen.append(func)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and mixed: self.seen.append(func)
        if func.name().split('.')[0] in ('aten::_linalg_check_errors', 'aten::_linalg_svd'): self.seen.append(func)
        return out


class _Called(TorchFunctionMode):
    "What makes a tensor of Python's numbers copies them, and no operation shows it."
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        made = func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and out.device.type != 'cpu'
        if made and out is not args[0]: self.seen.append(func)
        return out


@contextmanager
def waits():
    "A list of what a GPU's host would have waited for inside."
    seen = []
    with _Called(seen), _Dispatched(seen): yield seen


@pytest.fixture(scope='module')
def digits(): return load_data('digits')


def on_meta(digits): return replace(digits, train=digits.train.to('meta'))


def step_of(digits, name, variant, device='meta'):
    e = preset('quick', width=0.125, defense=name, **dict(cem=True, variant=variant) if variant else {})
    defense, model = build(e, digits)
    reg = build_cem(e, model, digits)
    if reg: reg.fit_encoder(model.eval().encode, batches(digits.train, 500))
    for part in (defense, model.train(), *([reg] if reg else [])): part.to(device)
    # torch's optimisers in one kernel are not for meta
    opt = torch.optim.SGD(model.parameters(), 0.1) if torch.device(device) == META else optimizer(e.training, model)
    x, y = torch.rand(32, *digits.shape, device=device), torch.zeros(32, dtype=torch.int64, device=device)
    if variant == 'balanced': reg.balance.answers = 2  # it looks once, at its second batch
    x = x.contiguous(memory_format=torch.channels_last)
    return lambda: train_step(model, defense, reg, opt, x, y, 1.0 if variant else 0.0), defense


WAITS = dict(number=lambda x: torch.as_tensor(0.0, device=x.device), numbers=lambda x: x.new_tensor([1.0]),
             copy=lambda x: torch.ones(2).to(x), index=lambda x: x[torch.arange(2)], cholesky=torch.linalg.cholesky, svd=torch.linalg.svd)


@pytest.mark.parametrize('wait', WAITS.values(), ids=WAITS)
def test_what_waits_is_seen(wait):
    with waits() as seen: wait(torch.ones(3, 3, device=META))
    assert seen


@pytest.mark.parametrize('read', [lambda x: x.item(), lambda x: bool(x > 0), torch.nonzero, lambda x: x[x > 0], lambda x: x.tolist()])
def test_what_is_read_raises(read):
    with pytest.raises((RuntimeError, NotImplementedError), match='meta|Meta'): read(torch.ones((), device=META))


@pytest.mark.parametrize(('name', 'variant'), ROWS, ids=lambda s: s or 'alone')
def test_a_step_of_the_training_reads_nothing(digits, name, variant):
    step, _ = step_of(digits, name, variant)
    step()  # SSIM's windows are made once
    with waits() as seen: assert step().device == META
    assert not seen


@pytest.mark.parametrize('name', ['ResSFL', 'PATROL', 'Noise_ARL'])
def test_a_step_after_resuming_reads_nothing(digits, name, monkeypatch):
    "A checkpoint is read onto the device, Adam's count of steps with it."
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda t: torch.ones(t.shape, dtype=t.dtype))  # what has no values brings some
    step, defense = step_of(digits, name, None)
    step()
    state = defense.get_extra_state()
    for s in state['state'].values(): s['step'] = s['step'].to('meta')
    defense.set_extra_state(state)
    with waits() as seen: step()
    assert not seen


@pytest.mark.parametrize('variant', WAIT)
def test_those_that_wait_are_known(digits, variant):
    assert set(CEMS) == {*WAIT, *(v for _, v in ROWS if v)} and 'host waits' in CEMS[variant].__doc__
    with pytest.raises((RuntimeError, NotImplementedError), match='meta'): step_of(digits, 'Bottleneck', variant)[0]()


@pytest.mark.parametrize('name', TRAINED)
def test_a_step_of_an_attack_reads_nothing(digits, name, monkeypatch):
    plain = lambda kind, net, *args, **settings: kind(net.parameters(), *args, **settings)
    for module in (decoder, gan): monkeypatch.setattr(module, 'fused', plain)
    attack = attack_from(dict(name=name, width=8, blocks=1))
    _, model = build(preset('quick', width=0.125), digits)
    model.eval().to('meta')
    train = on_meta(digits).train
    state, step = attack.training(attack.attacker(model, train), model, train, 0)
    assert all(p.device == META for m in state.values() if isinstance(m, torch.nn.Module) for p in m.parameters())
    x = torch.rand(32, *digits.shape, device='meta')
    step(x, model.smash(x).detach())
    with waits() as seen: means = step(x, model.smash(x).detach())
    assert means['mse'].device == META and not seen


def test_an_epoch_of_batches_copies_one_order(digits):
    data = on_meta(digits)
    with waits() as seen: n = sum(1 for _ in batches(data.train, 64, data.augment, shuffle=True))
    assert n > 10 and len(seen) == 1


@pytest.mark.parametrize('k', [1, 3])
@pytest.mark.parametrize('variant', ['diag', 'letter', 'balanced', 'release'])
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_where_nobody_looks_the_loss_is_not_finite_and_the_mixture_stays(variant, bad, k, monkeypatch):
    "As on a GPU."
    monkeypatch.setattr(cem, 'finite_tensor', cem.shaped_tensor)
    z, y = torch.rand(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % k
    reg = CEMS[variant](noise_std=0.1, n_classes=k, n_epochs=2, n_components=k).fit(z, y)
    before, batch = [t.clone() for t in (reg.pi, reg.Sigma)], z[:12].clone()
    batch[3, 2] = bad
    assert not reg(batch.requires_grad_(), y[:12]).isfinite() and not reg.l_c.isfinite()
    assert all(map(torch.equal, before, (reg.pi, reg.Sigma)))
    assert reg(z[12:24].requires_grad_(), y[12:24]).isfinite()


def test_the_release_does_not_leave_out_a_label_that_it_has_not_looked_at(monkeypatch):
    y = torch.arange(60) % 3
    reg = CEMS['release'](noise_std=0.1, n_classes=3, n_epochs=2, n_components=3).fit(z := torch.rand(60, 4), y)
    labelled = type(reg).labelled
    monkeypatch.setattr(type(reg), 'labelled', lambda self, z, y, look: labelled(self, z, y, look=False))
    assert reg(z[:12].clone().requires_grad_(), y[:12]).isfinite()
    assert reg(z[:12].clone().requires_grad_(), y[:12].where(y[:12] > 0, -1)).isnan()
