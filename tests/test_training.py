import pytest
import torch
from precision import AMBIENT, precision_around

import cem_nb.training as training
from cem_nb.attack import score_attack, train_attack
from cem_nb.data import ImageData, Split, to_float
from cem_nb.datasets import load_data
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import Experiment, preset
from cem_nb.loop import epochs
from cem_nb.store import run
from cem_nb.training import DivergedError, accuracy, build, lr_at, ramp_at, train

TINY = Experiment().replace(width=0.125, epochs=3, batch_size=64, lr=0.02)


@pytest.fixture
def digits():
    d = load_data('digits', n_train=256)
    return ImageData(d.name, d.classes, d.train, d.val, Split(d.test.x[:64], d.test.y[:64]), d.augment)


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Killed(BaseException): pass


def interrupted(fn, n, monkeypatch):
    "Run `fn` until `n` epochs are saved, then stop as a kill would: no clean-up of our own."
    def dying(*args, **kwargs):
        for i, e in enumerate(epochs(*args, **kwargs)):
            if i == n: raise Killed
            yield e
    with monkeypatch.context() as m:
        m.setattr(training, 'epochs', dying)
        with pytest.raises(Killed): fn()


@pytest.mark.parametrize('settings', [dict(), dict(cem=True), dict(variant='release'), dict(defense='DistCorr', variant='full'),
                                      dict(defense='Dropout'), dict(defense='ResSFL', cem=True)])
def test_resumed_training_is_the_uninterrupted_one(settings, digits, tmp_path, monkeypatch):
    e = TINY.replace(**settings)
    whole, curves = train(e, digits)
    interrupted(lambda: train(e, digits, checkpoint=tmp_path/'c.pt'), 2, monkeypatch)
    assert (tmp_path/'c.pt').is_file()
    torch.rand(7)  # the caller's random numbers must not matter
    resumed, curves2 = train(e, digits, checkpoint=tmp_path/'c.pt')
    assert same(whole, resumed) and curves == curves2 and len(curves) == 3


def test_pairs_start_alike_and_a_weight_of_zero_is_the_bottleneck_run(digits):
    plain, curves = train(TINY, digits)
    for other in (dict(defense='DistCorr', params={'alpha': 0.0}), dict(defense='Dropout', params={'p': 0.0})):
        model, curves2 = train(TINY.replace(**other), digits)
        assert same(plain, model) and curves == curves2
    assert same(build(TINY, digits)[1], build(TINY.replace(cem=True), digits)[1])
    assert not same(plain, train(TINY.replace(cem=True), digits)[0])
    assert not same(plain, train(TINY.replace(seed=1), digits)[0])


def test_cem_and_its_twin_see_the_same_images(digits, monkeypatch):
    "All that the encoder is shown in training mode, with and without CEM."
    seen = {}
    for cem in (False, True):
        inputs, real = [], training.build
        def spying(*args):
            defense, model = real(*args)
            model.encoder.register_forward_pre_hook(lambda m, a: inputs.append(a[0].sum().item()) if m.training else None)
            return defense, model
        with monkeypatch.context() as m:
            m.setattr(training, 'build', spying)
            train(TINY.replace(cem=cem), digits)
        seen[cem] = inputs
    assert len(seen[False]) == 12 and seen[False] == seen[True]


def test_test_images_are_never_looked_at(digits):
    poisoned = ImageData(digits.name, digits.classes, digits.train, digits.val, None, digits.augment)
    assert same(train(TINY, poisoned)[0], train(TINY, digits)[0])


def test_schedules_of_the_paper():
    e = Experiment().replace(variant='release')
    assert [lr_at(e.training, i) for i in (0, 60, 120, 180, 210)] == pytest.approx([0.05*0.2**i for i in range(5)])
    assert [ramp_at(e, i) for i in (0, 1, 60, 120, 180, 239)] == pytest.approx([0, 0.02, 0.1, 0.5, 1, 1])
    assert max(ramp_at(e.replace(lr=0.02, epochs=12), i) for i in range(12)) == 1
    fast = [ramp_at(preset('fast', variant='release'), i) for i in range(24)]  # one cycle: the rate goes to 0, the ramp does not go back
    assert fast == sorted(fast) and (fast[0], fast[1], fast[-1]) == pytest.approx((0, 0.02, 1))
    assert [ramp_at(Experiment().replace(cem=True), i) for i in (0, 1, 239)] == [0, 1, 1]
    assert ramp_at(Experiment(), 5) == 0


@pytest.mark.parametrize('bad', [dict(lr=1e12), dict(lr=1e12, cem=True), dict(lam=1e30)])
def test_divergence_has_a_name(digits, bad):
    with pytest.raises(DivergedError, match='lower lr'): train(TINY.replace(**bad), digits)


def test_a_last_step_that_spoils_the_weights_is_no_run():
    e = TINY.replace(n_train=64, val_frac=0.0, epochs=1, lr=1e30)
    with pytest.raises(DivergedError, match='nan or inf'): run(e)


def test_cem_waits_for_an_epoch_and_then_describes_the_features(digits, monkeypatch):
    "A fresh network's running statistics are not the data's. Later the spread about the means is below the variance."
    ratios, real = {}, training.build_cem
    def spying(*args):
        cem = real(*args)
        def look(module, inputs):
            z = inputs[0].detach().flatten(1)
            near = torch.cdist(z, cem.mu).min(1).values.square().mean()
            ratios.setdefault(cem.n_fits, []).append((near/z.var(0).sum()).item())
        cem.register_forward_pre_hook(look)
        return cem
    monkeypatch.setattr(training, 'build_cem', spying)
    _, history = train(TINY.replace(cem=True, epochs=4, batch_size=16), digits)
    assert [h['l_c'] > 0 for h in history] == [False, True, True, True]
    assert list(ratios) == [1, 2, 3] and sum(ratios[3])/len(ratios[3]) < 1


def test_the_defences_share_is_kept(digits):
    _, history = train(TINY.replace(defense='DistCorr'), digits)
    assert all(0 < h['l_d'] < h['loss'] for h in history)


def test_accuracy_against_counting(digits):
    model, _ = train(TINY.replace(noise_std=0.0), digits)
    want = (model(to_float(digits.test.x)).argmax(1) == digits.test.y).float().mean().item()
    assert accuracy(model, digits.test, batch_size=7) == pytest.approx(want)


def test_accuracy_leaves_the_model_as_it_was(digits):
    model = build(TINY, digits)[1].train()
    model.server[0].eval()
    was = [m.training for m in model.modules()]
    accuracy(model, digits.val)
    assert [m.training for m in model.modules()] == was


@pytest.mark.parametrize('ambient', AMBIENT)
def test_a_run_does_not_depend_on_the_precision_around_it(digits, ambient):
    e = TINY.replace(cem=True, epochs=2)
    want, curves = train(e, digits)
    if ambient.startswith('autocast'):  # which is the reader's own wish; what is scored is not
        with precision_around(ambient): assert accuracy(want, digits.val) == curves[-1]['val_acc']
        return
    with precision_around(ambient):
        model, curves2 = train(e, digits)
        attacker, _ = train_attack(DecoderAttack(width=8, blocks=0, n_epochs=1, batch_size=64), want, digits.train)
        scores = score_attack(want, attacker, digits.val)
    assert curves == curves2 and same(model, want)
    assert score_attack(want, attacker, digits.val) == scores and all(p.dtype == torch.float32 for p in attacker.parameters())
