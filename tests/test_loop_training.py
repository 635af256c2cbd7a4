import math

import pytest
import torch
from pydantic import ValidationError

import cem_nb.training as training
from cem_nb.attack import score_attack, score_oracle, train_decoder
from cem_nb.data import ImageData, Split, load_data, to_float
from cem_nb.loop import epochs, stage_seed
from cem_nb.training import CEMConfig, DivergedError, TrainConfig, accuracy, build, lr_at, ramp_at, train

TINY = dict(width=0.125, epochs=3, batch_size=64, lr=0.02)


@pytest.fixture
def digits():
    d = load_data('digits', n_train=256)
    return ImageData(d.name, d.classes, d.train, d.val, Split(d.test.x[:64], d.test.y[:64]), d.augment)


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Killed(BaseException): pass


def interrupted(fn, n, module, monkeypatch):
    "Run `fn` until `n` epochs of `module`'s loop are saved, then stop as a kill would: no clean-up of our own."
    def dying(*args, **kwargs):
        for i, e in enumerate(epochs(*args, **kwargs)):
            if i == n: raise Killed
            yield e
    with monkeypatch.context() as m:
        m.setattr(module, 'epochs', dying)
        with pytest.raises(Killed): fn()


@pytest.mark.parametrize('config', [dict(), dict(cem=CEMConfig()), dict(cem=CEMConfig(reading='release')),
                                    dict(defense='DistCorr', cem=CEMConfig(covariance='full')), dict(defense='Dropout')])
def test_resumed_training_is_the_uninterrupted_one(config, digits, tmp_path, monkeypatch):
    c = TrainConfig(**TINY, **config)
    whole, curves = train(c, digits)
    interrupted(lambda: train(c, digits, checkpoint=tmp_path/'c.pt'), 2, training, monkeypatch)
    assert (tmp_path/'c.pt').is_file()
    torch.rand(7)  # the caller's random numbers must not matter
    resumed, curves2 = train(c, digits, checkpoint=tmp_path/'c.pt')
    assert same(whole, resumed) and curves == curves2 and len(curves) == 3


def test_resumed_attack_is_the_uninterrupted_one(digits, tmp_path, monkeypatch):
    import cem_nb.attack as attacks
    model = build(TrainConfig(**TINY), digits)[1]
    fit = lambda **k: train_decoder(model, digits.train, width=8, blocks=0, n_epochs=3, batch_size=64, **k)
    whole, curves = fit()
    interrupted(lambda: fit(checkpoint=tmp_path/'a.pt'), 1, attacks, monkeypatch)
    resumed, curves2 = fit(checkpoint=tmp_path/'a.pt')
    assert same(whole, resumed) and curves == curves2


def test_damaged_checkpoint_costs_time_only(digits, tmp_path):
    c = TrainConfig(**TINY)
    (tmp_path/'c.pt').write_bytes(b'half a checkpoint')
    with pytest.warns(UserWarning, match='first epoch'): model, _ = train(c, digits, checkpoint=tmp_path/'c.pt')
    assert same(model, train(c, digits)[0])


def test_checkpoints_that_cannot_be_written_cost_nothing(digits, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.warns(UserWarning, match='no checkpoint'):
        model, _ = train(TrainConfig(**TINY), digits, checkpoint=tmp_path/'file'/'c.pt')
    assert same(model, train(TrainConfig(**TINY), digits)[0])


def test_pairs_start_alike_and_a_weight_of_zero_is_the_bottleneck_run(digits):
    plain, curves = train(TrainConfig(**TINY), digits)
    for other in (dict(defense='DistCorr', params={'alpha': 0.0}), dict(defense='Dropout', params={'p': 0.0})):
        model, curves2 = train(TrainConfig(**TINY, **other), digits)
        assert same(plain, model) and curves == curves2
    assert same(build(TrainConfig(**TINY), digits)[1], build(TrainConfig(cem=CEMConfig(), **TINY), digits)[1])
    assert not same(plain, train(TrainConfig(cem=CEMConfig(), **TINY), digits)[0])
    assert not same(plain, train(TrainConfig(seed=1, **TINY), digits)[0])


def test_cem_and_its_twin_see_the_same_images(digits, monkeypatch):
    "All that the encoder is shown in training mode, with and without CEM."
    seen = {}
    for name, cem in (('plain', None), ('cem', CEMConfig())):
        inputs, real = [], training.build
        def spying(*args):
            defense, model = real(*args)
            model.encoder.register_forward_pre_hook(lambda m, a: inputs.append(a[0].sum().item()) if m.training else None)
            return defense, model
        with monkeypatch.context() as m:
            m.setattr(training, 'build', spying)
            train(TrainConfig(cem=cem, **TINY), digits)
        seen[name] = inputs
    assert len(seen['plain']) == 12 and seen['plain'] == seen['cem']


def test_test_images_are_never_looked_at(digits):
    poisoned = ImageData(digits.name, digits.classes, digits.train, digits.val, None, digits.augment)
    assert same(train(TrainConfig(**TINY), poisoned)[0], train(TrainConfig(**TINY), digits)[0])


def test_schedules_of_the_paper():
    c = TrainConfig(cem=CEMConfig(reading='release'))
    assert [lr_at(c, e) for e in (0, 60, 120, 180, 210)] == pytest.approx([0.05*0.2**i for i in range(5)])
    assert [ramp_at(c, e) for e in (0, 1, 60, 120, 180, 239)] == pytest.approx([0, 0.02, 0.1, 0.5, 1, 1])
    short = TrainConfig(cem=CEMConfig(reading='release'), lr=0.02, epochs=12)
    assert max(ramp_at(short, e) for e in range(12)) == 1
    assert [ramp_at(TrainConfig(cem=CEMConfig()), e) for e in (0, 1, 239)] == [0, 1, 1]


@pytest.mark.parametrize('bad', [dict(lr=1e12), dict(lr=1e12, cem=CEMConfig()), dict(cem=CEMConfig(lam=1e30))])
def test_divergence_has_a_name(digits, bad):
    with pytest.raises(DivergedError, match='lower lr'): train(TrainConfig(**(TINY | bad)), digits)


def test_cem_waits_for_an_epoch_and_then_describes_the_features(digits, monkeypatch):
    "A fresh network's running statistics are not the data's. Later the spread about the means is below the variance."
    ratios = {}
    class Spying(training.CEM):
        def forward(self, z_hat, y):
            z = z_hat.detach().flatten(1)
            near = torch.cdist(z, self.means).min(1).values.square().mean()
            ratios.setdefault(self.n_fits, []).append((near/z.var(0).sum()).item())
            return super().forward(z_hat, y)
    monkeypatch.setattr(training, 'CEM', Spying)
    _, history = train(TrainConfig(cem=CEMConfig(), width=0.125, epochs=4, batch_size=16, lr=0.02), digits)
    assert [h['l_c'] > 0 for h in history] == [False, True, True, True]
    assert list(ratios) == [1, 2, 3] and sum(ratios[3])/len(ratios[3]) < 1


@pytest.mark.parametrize('bad', [dict(epochs=0), dict(lr='0.1'), dict(lr=math.inf), dict(noise_std=-0.1), dict(wdith=1.0),
                                 dict(noise_std=0.0, cem=CEMConfig()), dict(params={'alpha': 1.0}), dict(seed=-1)])
def test_bad_configurations(bad):
    with pytest.raises(ValidationError): TrainConfig(**bad)


def test_accuracy_against_counting(digits):
    model, _ = train(TrainConfig(**(TINY | dict(noise_std=0.0))), digits)
    want = (model(to_float(digits.test.x)).argmax(1) == digits.test.y).float().mean().item()
    assert accuracy(model, digits.test, batch_size=7) == pytest.approx(want)


def test_scores_against_the_definition(digits):
    model = build(TrainConfig(**(TINY | dict(noise_std=0.0))), digits)[1].eval()
    class Grey(torch.nn.Module):
        def forward(self, z): return torch.full((len(z), 1, 16, 16), 0.25)
    s = score_attack(model, Grey(), digits.test, batch_size=7)
    want = (to_float(digits.test.x) - 0.25).square().mean().item()
    assert s['mse'] == pytest.approx(want, rel=1e-5) and s['psnr'] == pytest.approx(-10*math.log10(want), abs=1e-4)
    with pytest.raises(ValueError): score_attack(model, Grey(), Split(digits.test.x[:0], digits.test.y[:0]))


def test_oracle_recovers_what_little_noise_hides(digits):
    model = build(TrainConfig(**(TINY | dict(noise_std=1e-4))), digits)[1]
    assert score_oracle(model, digits.train, digits.train, n_images=40)['mse'] < 1e-6
    model.noise_std = 1e3  # nothing gets through: the mean image is all that is left
    x = to_float(digits.train.x)
    want = (x[torch.linspace(0, len(x) - 1, 40).long()] - x.mean(0)).square().mean().item()
    assert score_oracle(model, digits.train, digits.train, n_images=40)['mse'] == pytest.approx(want, rel=0.02)
    order = digits.train.y.argsort(stable=True)  # class by class, as folders list them
    seen = []
    model.encoder.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    score_oracle(model, digits.train, Split(digits.train.x[order], digits.train.y[order]), n_images=40)
    labels = digits.train.y[(seen[-1][:, None] == to_float(digits.train.x)[None]).flatten(2).all(2).int().argmax(1)]
    assert len(labels.unique()) == 10
    model.drop = 0.2
    assert math.isnan(score_oracle(model, digits.train, digits.train)['mse'])


def test_seeds_do_not_collide():
    assert len({stage_seed(s, w, e) for s in range(5) for w in ('train', 'decoder') for e in range(240)}) == 2400
