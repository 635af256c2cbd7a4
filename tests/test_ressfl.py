import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from cem_nb.ressfl import ResSFL, ssim
from cem_nb.data import load_data
from cem_nb.methods import DEFENSES, HYPERPARAMETERS, make_defense
from cem_nb.models import n_params, split_model
from cem_nb.patrol import PATROL, PrunableEncoder
from cem_nb.training import CEMConfig, TrainConfig, train

TRAIN = dict(width=0.125, epochs=4, batch_size=64, lr=0.02)


@pytest.fixture(scope='module')
def digits(): return load_data('digits', n_train=256)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(h=st.integers(6, 40), w=st.integers(6, 40), c=st.sampled_from([1, 3]), noise=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_ssim_against_torchmetrics(h, w, c, noise, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(3, c, h, w, generator=g)
    y = (x + noise*torch.randn(x.shape, generator=g)).clamp(0, 1).requires_grad_()
    theirs = structural_similarity_index_measure(y, x, data_range=1.0)
    assert ssim(y, x).item() == pytest.approx(theirs.item(), abs=2e-5)
    if 0.01 < noise:  # at noise 0 both gradients are rounding errors
        ours = torch.autograd.grad(ssim(y, x), y)[0]
        assert torch.allclose(ours, torch.autograd.grad(theirs, y)[0], rtol=1e-2, atol=1e-5)


def test_ssim_limits():
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    assert ssim(x, x) == pytest.approx(1) and ssim(x, 1 - x) < 0
    y = torch.rand(1, 1, 7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: ssim(y, x[:1, :1, :7, :6]), y)
    for bad in (x[:1], x[..., :5]):
        with pytest.raises(ValueError): ssim(bad, x if bad.shape[-1] == 16 else bad)


def test_the_hinge_is_alpha_times_what_exceeds_the_threshold():
    torch.manual_seed(0)
    x = torch.rand(8, 1, 16, 16)
    d = ResSFL(alpha=2.0, t=0.0)
    z = d.model('vgg11', 10, in_channels=1, image_size=16, width=0.125).smash(x).detach()
    for _ in range(60): d.step(x, z)
    s = structural_similarity_index_measure(d.proxy.eval()(z), x, data_range=1.0).item()
    args = x, None, None, z, None
    assert s > 0.05 and d.loss(*args).item() == pytest.approx(2*s, rel=1e-3)
    d.t = s/2
    assert d.loss(*args).item() == pytest.approx(s, rel=1e-3)
    d.t = s + 0.01
    assert d.loss(*args) == 0


def test_the_proxy_and_the_model_learn_apart(digits):
    d = ResSFL(alpha=1.0, t=0.0)
    model = d.model('vgg11', 10, in_channels=1, image_size=16, width=0.125)
    x = torch.rand(16, 1, 16, 16)
    z_hat = model.encode(x)
    z = model.send(z_hat)
    before = copy.deepcopy(d.proxy.state_dict())
    d.loss(x, None, z_hat, z, None).backward()
    assert all(p.grad is None for p in d.proxy.parameters()) and next(model.encoder.parameters()).grad.abs().sum() > 0
    assert all(torch.equal(v, before[k]) for k, v in d.proxy.state_dict().items())  # nor batch statistics
    weights = copy.deepcopy(model.state_dict())
    d.step(x, z.detach())
    assert any(not torch.equal(v, before[k]) for k, v in d.proxy.state_dict().items())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('name, off', [('DistCorr', dict(alpha=0.0)), ('Dropout', dict(p=0.0)), ('ResSFL', dict(alpha=0.0)),
                                       ('Noise_Nopeek', dict(alpha=0.0, noise_factor=1.0)),
                                       ('Noise_ARL', dict(alpha=0.0, noise_factor=1.0))])
def test_a_defence_that_is_switched_off_is_the_bottleneck_bit_for_bit(name, off, digits):
    config = dict(TRAIN, epochs=2)
    model, history = train(TrainConfig(defense=name, params=off, **config), digits)
    plain, plain_history = train(TrainConfig(**config), digits)
    assert history == plain_history and history[0]['loss'] > 0
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_an_adversarial_defence_lowers_the_proxys_ssim(digits):
    "The same proxy, trained along with an encoder that heeds it and with one that does not."
    def last_ssim(alpha):
        d = make_defense('ResSFL', dict(alpha=1.0, t=0.0))
        torch.manual_seed(0)
        model = d.model('vgg11', 10, in_channels=1, image_size=16, width=0.125)
        opt = torch.optim.SGD(model.parameters(), 0.05)
        x = digits.train.x[:64].float()/255
        for _ in range(50):
            z = model.smash(x)
            d.step(x, z.detach())
            loss = alpha*d.loss(x, None, None, z, None)
            opt.zero_grad(); loss.backward(); opt.step()
        return ssim(d.proxy.eval()(model.smash(x)), x).item()
    assert last_ssim(5.0) < last_ssim(0.0) - 0.05


def test_rows_and_their_settings():
    assert list(DEFENSES) == list(HYPERPARAMETERS) and len(DEFENSES) == 8
    assert make_defense('Dropout', {'p': 0.4}).model('vgg11', 10, width=0.125).drop == 0.4
    no = make_defense('No_defense').model('vgg11', 10, width=0.125)
    assert no.encode(torch.rand(1, 3, 32, 32)).shape[1] == 16  # no bottleneck of 8
    for name in ('Noise_Nopeek', 'Noise_ARL'):
        factor = HYPERPARAMETERS[name]['noise_factor']
        assert factor > 1 and make_defense(name).model('vgg11', 10, noise_std=0.1, width=0.125).noise_std == pytest.approx(0.1*factor)
    for name, params in (('Nodefense', {}), ('Bottleneck', {'alpha': 1.0}), ('DistCorr', {'alpha': -1.0}), ('ResSFL', {'t': -0.1}),
                         ('Noise_ARL', {'noise_factor': 0.0}), ('PATROL', {'alpha': float('nan')}),
                         ('PATROL', {'lipschitz': float('inf')}), ('Dropout', {'p': 1.0})):
        with pytest.raises(ValueError): make_defense(name, params).model('vgg11', 10, width=0.125)


def test_more_noise_reaches_the_regulariser(digits, monkeypatch):
    "CEM must bound the entropy of the noise that is really sent."
    import cem_nb.training as tr
    seen, real = [], tr.CEM
    monkeypatch.setattr(tr, 'CEM', lambda **k: seen.append(k['noise_std']) or real(**k))
    train(TrainConfig(defense='Noise_Nopeek', params=dict(noise_factor=3.0), cem=CEMConfig(), **dict(TRAIN, epochs=1)), digits)
    assert seen == [pytest.approx(0.075)]


@settings(deadline=None, max_examples=12, derandomize=True)
@given(arch=st.sampled_from(['vgg11', 'resnet20', 'resnet20_wide']), width=st.sampled_from([0.25, 0.5, 1.0]),
       cut=st.sampled_from([1, 3, 5]))
def test_pruning_reaches_the_size_and_no_larger_share_would(arch, width, cut):
    plain = n_params(split_model(arch, 10, width=width, cut=cut).encoder)
    build = lambda limit: PrunableEncoder(split_model(arch, 10, width=width, cut=cut, extra=16).encoder, limit)
    try: e = build(plain)
    except ValueError as error:
        assert 'deeper cut' in str(error)
        return
    kept, sizes = e.kept, [c.out_channels for c, _, _ in e.groups()]
    e.prune([torch.rand(s) for s in sizes])
    assert n_params(e) <= plain and e.pruned and e.eval()(torch.rand(2, 3, 32, 32)).shape[1] == 8
    # one channel more in the group that loses the largest share would be a larger share for all
    share = max((k + 1)/s for k, s in zip(kept, sizes))
    more = [max(k, int(s*share + 1e-9)) for k, s in zip(kept, sizes)]
    if share <= 1 and more != kept:
        bigger = build(plain); bigger.kept = more
        bigger.prune([torch.rand(s) for s in sizes])
        assert n_params(bigger) > plain


def test_pruning_at_full_width_is_table_9s():
    model = make_defense('PATROL').model('vgg11', 10)
    model.encoder.prune([torch.rand(c.out_channels) for c, _, _ in model.encoder.groups()])
    assert n_params(model.encoder) == 83_723
    assert [m.out_channels for m in model.encoder if isinstance(m, nn.Conv2d)] == [16, 60, 121, 8]


@pytest.mark.parametrize('arch', ['vgg11', 'resnet20'])
def test_pruned_channels_are_the_ones_with_the_lowest_scores_and_the_rest_computes_on(arch):
    torch.manual_seed(0)
    model = PATROL(alpha=1.0).model(arch, 10, width=0.5)
    e = model.encoder.eval()
    for m in e.modules():  # statistics and weights of a network that has been trained
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.running_mean, m.weight.data, m.bias.data): t.normal_()
            m.running_var.uniform_(0.5, 2)
    scores = [torch.rand(c.out_channels) for c, _, _ in e.groups()]
    dense = copy.deepcopy(e)
    for (_, norm, _), k, s in zip(dense.groups(), e.kept, scores):  # a channel that is always 0 behind its ReLU
        norm.weight.data[s.argsort()[:-k]] = 0; norm.bias.data[s.argsort()[:-k]] = 0
    x = torch.rand(4, 3, 32, 32)
    before = dense(x)
    opt = torch.optim.SGD(e.parameters(), 0.1, 0.9)
    e(x).sum().backward(); opt.step()
    momentum = [opt.state[norm.weight]['momentum_buffer'].clone() for _, norm, _ in e.groups()]
    e.load_state_dict(dense.state_dict())
    e.prune(scores, opt)
    assert torch.allclose(e(x), before, atol=1e-5)
    for (_, norm, after), s, m in zip(e.groups(), scores, momentum):
        keep = s.topk(len(norm.weight)).indices.sort().values
        assert torch.equal(opt.state[norm.weight]['momentum_buffer'], m[keep])
        assert opt.state[after.weight]['momentum_buffer'].shape == after.weight.shape
    e.train()(x).sum().backward(); opt.step()  # goes on training


def test_patrol_prunes_once_goes_on_training_and_its_weights_load(digits):
    model, history = train(TrainConfig(defense='PATROL', **TRAIN), digits)
    assert model.encoder.pruned and len(history) == 4
    fresh = make_defense('PATROL').model('vgg11', 10, in_channels=1, image_size=16, width=0.125)
    assert not fresh.encoder.pruned
    fresh.to(memory_format=torch.channels_last).load_state_dict(model.state_dict())
    x = torch.rand(3, 1, 16, 16)
    assert torch.equal(fresh.eval().encode(x), model.encode(x))
    assert n_params(fresh.encoder) <= n_params(split_model('vgg11', 10, in_channels=1, image_size=16, width=0.125).encoder)


@pytest.mark.parametrize('defense, stop', [('ResSFL', 2), ('PATROL', 2), ('PATROL', 3)])
def test_an_adversarial_run_resumes_bit_for_bit(defense, stop, digits, tmp_path, monkeypatch):
    "Before and after the pruning, which comes when 3 of 4 epochs are done."
    import cem_nb.training as tr
    config, file = TrainConfig(defense=defense, cem=CEMConfig(), **TRAIN), tmp_path/'c.pt'
    whole, history = train(config, digits)
    real, seen = tr.lr_at, []
    def killed(c, epoch):
        if epoch == stop: raise KeyboardInterrupt
        return real(c, epoch)
    with monkeypatch.context() as m:
        m.setattr(tr, 'lr_at', killed)
        with pytest.raises(KeyboardInterrupt): train(config, digits, checkpoint=file)
    again, resumed = train(config, digits, checkpoint=file)
    assert resumed == history
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_lipschitz_gradient_is_that_of_the_mean_squared_spectral_norm():
    d = PATROL(alpha=0.0, lipschitz=0.3)
    model = d.model('vgg11', 10, width=0.125).double()
    weights = [m.weight for m in model.encoder if isinstance(m, nn.Conv2d)]
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    d.after_backward(model)
    penalty = 0.3*torch.stack([torch.linalg.matrix_norm(w.flatten(1), 2)**2 for w in weights]).mean()
    for w, g in zip(weights, torch.autograd.grad(penalty, weights)): assert torch.allclose(w.grad, g, atol=1e-10)


def test_the_curves_say_whether_a_defence_was_at_work(digits):
    "A hinge that never opens is a row of the table under another name; the record must show it."
    curve = lambda **k: [e['l_d'] for e in train(TrainConfig(**dict(TRAIN, epochs=2), **k), digits)[1]]
    assert curve() == [0, 0] and curve(defense='ResSFL', params=dict(t=1.0)) == [0, 0]
    assert min(curve(defense='ResSFL', params=dict(t=0.0))) > 1e-3 and min(curve(defense='DistCorr')) > 1e-3


def test_patrol_without_its_loss_is_a_longer_pruned_encoder_alone(digits):
    off = TrainConfig(defense='PATROL', params=dict(alpha=0.0), **TRAIN)
    model, history = train(off, digits)
    assert [e['l_d'] for e in history] == [0]*4 and model.encoder.pruned
    d = make_defense('PATROL', dict(alpha=0.0))
    d.model('vgg11', 10, in_channels=1, image_size=16, width=0.125)
    before = copy.deepcopy(d.proxy.state_dict())
    d.step(digits.train.x[:8].float()/255, torch.rand(8, 8, 4, 4))
    assert all(torch.equal(v, before[k]) for k, v in d.proxy.state_dict().items())
