"In which precision networks run, and what does not depend on it."
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cem_nb import engine as engine_module
from cem_nb.attack import score_attack, train_attack
from cem_nb.cem import CEM
from cem_nb.data import batches
from cem_nb.datasets import load_data
from cem_nb.decoder import DecoderAttack
from cem_nb.defense import make_defense
from cem_nb.engine import EngineSettings, can_compile, engine, has_bf16, in_words, networks, using
from cem_nb.experiment import Experiment
from cem_nb.gan import GAN
from cem_nb.loop import epochs, one_cycle
from cem_nb.models import split_model
from cem_nb.store import run, run_path
from cem_nb.training import accuracy, lr_at, train

BF16 = EngineSettings(precision='bf16')
CPU, HAS_BF16 = torch.device('cpu'), has_bf16
TINY = Experiment().replace(width=0.125, epochs=3, batch_size=64, lr=0.02)


@pytest.fixture(autouse=True)
def bf16_everywhere(monkeypatch):  # put together from other instructions where the processor has none
    monkeypatch.setattr(engine_module, 'has_bf16', lambda kind: True)


@pytest.fixture(scope='module')
def digits(): return load_data('digits', n_train=512)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))


def test_networks_run_in_the_precision_that_is_set_where_a_gradient_is_taken_and_nowhere_else():
    net, x, seen = small_net(), torch.rand(2, 3, 8, 8), []
    net[0].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    exact = net(x)
    with using(BF16), engine(net, device=CPU):
        fast = net(x)
        with torch.no_grad(): assert torch.equal(net(x), exact)
    assert seen == [torch.float32, torch.bfloat16, torch.float32] and fast.dtype == torch.float32
    assert 1e-4 < ((fast - exact).norm()/exact.norm()).item() < 2e-2
    assert torch.equal(net(x), exact) and 'forward' not in vars(net)


def test_nothing_is_left_of_it_after_an_error_or_an_interrupt():
    net, x = small_net(), torch.rand(2, 3, 8, 8)
    with pytest.raises(KeyboardInterrupt), using(BF16), engine(net, device=CPU): raise KeyboardInterrupt
    assert 'forward' not in vars(net) and net(x).dtype == torch.float32
    for _ in epochs(2, state=dict(net=net), history=[], seed=0, stage='s'): break  # a loop that is left in the middle
    with engine(net, device=CPU): assert 'forward' not in vars(net)  # `using` is over


def test_a_split_model_is_two_networks_and_the_noise_between_them_is_float32():
    model, x, sent = split_model(width=0.125), torch.rand(4, 3, 32, 32), []
    model.server.register_forward_pre_hook(lambda m, args: sent.append(args[0].dtype))
    with using(BF16), engine(model, device=CPU): z_hat = model.encode(x); model.server(model.send(z_hat))
    assert z_hat.dtype == torch.float32 and sent == [torch.float32]
    assert networks(model) == (model.encoder, model.server)
    assert networks(CEM(noise_std=0.1, n_classes=2, n_epochs=1)) == ()


@pytest.mark.parametrize('name', ['PATROL', 'ResSFL', 'Bottleneck'])
def test_a_defence_runs_its_proxies_as_set(name):
    defense = make_defense(name)
    defense.model('vgg11', 10, noise_std=0.025, width=0.125)
    assert networks(defense) == tuple(defense.children()) and (len(networks(defense)) > 0) == (name != 'Bottleneck')


@pytest.mark.parametrize('settings', [dict(cem=True), dict(defense='PATROL', cem=True), dict(variant='full')])
def test_training_in_bf16_follows_that_in_float32(settings, digits):
    e = TINY.replace(**settings)
    (exact, curves), (fast, curves16) = train(e, digits), train(e.replace(precision='bf16'), digits)
    assert not all(map(torch.equal, exact.parameters(), fast.parameters()))
    for a, b in zip(curves, curves16): assert b['loss'] == pytest.approx(a['loss'], rel=0.1)
    assert abs(accuracy(exact, digits.val) - accuracy(fast, digits.val)) < 0.15
    assert all(p.dtype == torch.float32 for p in fast.parameters())


@pytest.mark.parametrize('attack', [DecoderAttack(width=8, blocks=0, n_epochs=4, batch_size=64),
                                    GAN(width=8, blocks=0, critic_width=4, n_epochs=3, batch_size=64)])
def test_an_attack_in_bf16_reaches_the_error_of_float32(attack, digits):
    model = train(TINY, digits)[0]
    scores = []
    for settings in (EngineSettings(), BF16):
        with using(settings): attacker, curves = train_attack(attack, model, digits.train)
        scores.append(score_attack(model, attacker, digits.val)['mse'])
        assert len(curves) == attack.n_epochs and 'forward' not in vars(attacker)
    assert scores[1] != scores[0] and scores[1] == pytest.approx(scores[0], rel=0.1)


def test_resume_is_exact_in_bf16(digits, tmp_path):
    e = TINY.replace(precision='bf16', cem=True, schedule='onecycle', nesterov=True)
    whole, curves = train(e, digits)
    class Killed(Exception): pass
    def dying(label, n):
        if n == 2: raise Killed
    from cem_nb.loop import Progress
    Progress.listeners.append(dying)
    try:
        with pytest.raises(Killed): train(e, digits, checkpoint=tmp_path/'c.pt')
    finally: Progress.listeners.remove(dying)
    resumed, curves2 = train(e, digits, checkpoint=tmp_path/'c.pt')
    assert curves == curves2 and all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_settings_that_came_later_leave_old_names_alone():
    e = Experiment()
    assert 'engine' not in e.model_dump() and 'schedule' not in e.model_dump()['training']
    names = {run_path(e.replace(**s), 'f').name for s in (dict(), dict(precision='bf16'), dict(compile=True), dict(schedule='onecycle'),
                                                          dict(nesterov=True))}
    assert len(names) == 5
    f = e.replace(precision='bf16', schedule='onecycle')
    assert Experiment.model_validate_json(f.model_dump_json()) == f and f.settings()['precision'] == 'bf16'
    assert 'schedule' not in DecoderAttack().record() and DecoderAttack(schedule='onecycle').record()['schedule'] == 'onecycle'


def test_the_one_cycle_rate_goes_up_and_down_once_and_steps_are_as_they_were():
    t = TINY.replace(epochs=8, lr=0.4, schedule='onecycle').training
    rates = [lr_at(t, i/10) for i in range(81)]
    assert rates[0] == 0 and max(rates) == rates[20] == pytest.approx(0.4) and rates[-1] == pytest.approx(0)
    assert all(b > a for a, b in zip(rates[:20], rates[1:21])) and all(b < a for a, b in zip(rates[20:], rates[21:]))
    assert one_cycle(0.5) == pytest.approx(2/3)
    steps = TINY.replace(epochs=8).training
    assert all(lr_at(steps, e + 0.9) == lr_at(steps, e) for e in range(8)) and lr_at(steps, 7) == pytest.approx(0.02*0.2**4)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match='nesterov needs momentum'): TINY.replace(nesterov=True, momentum=0.0)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile('cpu'), reason='torch.compile finds no compiler here')
def test_a_compiled_training_follows_the_eager_one(digits):
    (eager, curves), (compiled, curves2) = train(TINY, digits), train(TINY.replace(compile=True), digits)
    for a, b in zip(curves, curves2): assert b['loss'] == pytest.approx(a['loss'], rel=0.02)


def test_where_nothing_can_be_compiled_a_warning_says_so_and_the_numbers_are_the_eager_ones(digits, monkeypatch):
    def missing(*args, **kwargs): raise RuntimeError('no C++ compiler')
    can_compile.cache_clear()
    monkeypatch.setattr(torch, 'compile', missing)
    with pytest.warns(UserWarning, match='not compiled.*no C'): model, _ = train(TINY.replace(compile=True), digits)
    can_compile.cache_clear()
    monkeypatch.undo()
    assert all(map(torch.equal, model.parameters(), train(TINY, digits)[0].parameters()))


def test_where_bfloat16_is_missing_a_warning_says_so_and_the_run_keeps_that_it_was_float32(digits, monkeypatch):
    monkeypatch.setattr(engine_module, 'has_bf16', HAS_BF16.__wrapped__)
    monkeypatch.setattr(engine_module, 'PROCESSOR', Path('/dev/null'))
    with pytest.warns(UserWarning, match='float32, for no instructions for bfloat16 were found on this cpu'):
        model, _ = train(TINY.replace(precision='bf16'), digits)
    assert all(map(torch.equal, model.parameters(), train(TINY, digits)[0].parameters()))
    assert in_words(BF16, CPU) == ', float32 for want of bf16' and in_words(EngineSettings(), CPU) == ''


def test_a_processor_that_says_bfloat16_is_believed(tmp_path, monkeypatch):
    for flags, has in (('fma avx2 avx512_bf16 sha', True), ('fphp asimdhp bf16', True), ('avx512f avx512_bf16x', False)):
        (tmp_path/'cpuinfo').write_text(f'model name : x\nflags : {flags}\n')
        monkeypatch.setattr(engine_module, 'PROCESSOR', tmp_path/'cpuinfo')
        assert HAS_BF16.__wrapped__('cpu') == has


def test_a_run_keeps_the_precision_that_it_was_computed_in(digits, tmp_path, monkeypatch):
    monkeypatch.setenv('CEM_RUNS', str(tmp_path))
    e = TINY.replace(epochs=1, n_train=256, attacks=())
    exact, fast = (run(e.replace(precision=p)).result['hardware'] for p in ('float32', 'bf16'))
    assert fast == exact + ', bf16'


def test_training_images_are_rotated_by_what_the_settings_say(digits, monkeypatch):
    seen = []
    monkeypatch.setattr('cem_nb.training.batches', lambda s, n, augment=None, **how: seen.append(augment) or batches(s, n, augment, **how))
    train(TINY.replace(epochs=1), digits), train(TINY.replace(epochs=1, degrees=3.0), digits)
    usual, changed = [a for a in seen if a]
    assert usual == digits.augment and changed == replace(usual, degrees=3.0) and usual.degrees not in (0, 3)
