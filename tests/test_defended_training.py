"""Defences inside the training loop."""
import pytest
import torch

from cem_nb.datasets import load_data
from cem_nb.methods import make_defense
from cem_nb.models import n_params, split_model
from cem_nb.experiment import Experiment
from cem_nb.training import DivergedError, train

TINY = Experiment().replace(width=0.125, epochs=4, batch_size=64, lr=0.02)


@pytest.fixture(scope='module')
def digits(): return load_data('digits', n_train=256)


def test_more_noise_reaches_the_regulariser(digits, monkeypatch):
    "CEM must bound the entropy of the noise that is really sent."
    import cem_nb.training as tr
    seen, real = [], tr.build_cem
    def spying(*args):
        seen.append(real(*args).noise_std)
        return real(*args)
    monkeypatch.setattr(tr, 'build_cem', spying)
    train(TINY.replace(defense='Noise_Nopeek', params=dict(noise_factor=3.0), cem=True, epochs=2), digits)
    assert seen == [pytest.approx(0.075)]


def test_patrol_prunes_once_goes_on_training_and_its_weights_load(digits):
    model, history = train(TINY.replace(defense='PATROL'), digits)
    assert model.encoder.pruned and len(history) == 4
    fresh = make_defense('PATROL').model('vgg11', 10, in_channels=1, image_size=16, width=0.125, noise_std=0.025)
    assert not fresh.encoder.pruned
    fresh.to(memory_format=torch.channels_last).load_state_dict(model.state_dict())
    x = torch.rand(3, 1, 16, 16)
    assert torch.equal(fresh.eval().encode(x), model.encode(x))
    plain = split_model('vgg11', 10, in_channels=1, image_size=16, width=0.125, noise_std=0.025)
    assert n_params(fresh.encoder) <= n_params(plain.encoder)


@pytest.mark.parametrize('defense, stop', [('ResSFL', 2), ('PATROL', 2), ('PATROL', 3)])
def test_an_adversarial_run_resumes_bit_for_bit(defense, stop, digits, tmp_path, monkeypatch):
    "Before and after the pruning, which comes when 3 of 4 epochs are done."
    import cem_nb.training as tr
    config, file = TINY.replace(defense=defense, cem=True), tmp_path/'c.pt'
    whole, history = train(config, digits)
    real = tr.ramp_at
    def killed(e, epoch):
        if epoch == stop: raise KeyboardInterrupt
        return real(e, epoch)
    with monkeypatch.context() as m:
        m.setattr(tr, 'ramp_at', killed)
        with pytest.raises(KeyboardInterrupt): train(config, digits, checkpoint=file)
    again, resumed = train(config, digits, checkpoint=file)
    assert resumed == history
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_curves_say_whether_a_defence_was_at_work(digits):
    "A hinge that never opens is a row of the table under another name; the record must show it."
    curve = lambda **k: [e['l_d'] for e in train(TINY.replace(epochs=2, **k), digits)[1]]
    assert curve() == [0, 0] and curve(defense='ResSFL', params=dict(t=1.0)) == [0, 0]
    assert min(curve(defense='ResSFL', params=dict(t=0.0))) > 1e-3 and min(curve(defense='DistCorr')) > 1e-3


def test_patrol_without_its_loss_is_a_longer_pruned_encoder_alone(digits):
    off = TINY.replace(defense='PATROL', params=dict(alpha=0.0))
    model, history = train(off, digits)
    assert [e['l_d'] for e in history] == [0]*4 and model.encoder.pruned


@pytest.mark.parametrize('row', [dict(defense='PATROL', params=dict(lipschitz=0.1)), dict(defense='DistCorr')])
def test_a_defence_that_diverges_is_a_divergence(row, digits):
    "Not an error of the singular value decomposition, which would take a whole table with it, nor a loss of 0."
    with pytest.raises(DivergedError): train(TINY.replace(epochs=1, lr=1e30, **row), digits)
