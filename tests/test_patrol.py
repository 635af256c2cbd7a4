import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from cem_nb.methods import make_defense
from cem_nb.models import n_params, split_model
from cem_nb.patrol import PATROL, PrunableEncoder, spectral_gradient


@settings(deadline=None, max_examples=12, derandomize=True)
@given(arch=st.sampled_from(['vgg11', 'resnet20', 'resnet20_wide']), width=st.sampled_from([0.25, 0.5, 1.0]),
       cut=st.sampled_from([1, 3, 5]))
def test_pruning_reaches_the_size_and_no_larger_share_would(arch, width, cut):
    plain = n_params(split_model(arch, 10, width=width, cut=cut, noise_std=0.025).encoder)
    long = dict(width=width, cut=cut, extra=16, noise_std=0.025)
    build = lambda limit: PrunableEncoder(split_model(arch, 10, **long).encoder, limit)
    try: e = build(plain)
    except ValueError as error:
        assert 'deeper cut' in str(error)
        return
    kept, sizes = e.kept, [c.out_channels for c, _, _ in e.groups()]
    e.prune([torch.rand(s) for s in sizes])
    assert n_params(e) <= plain and e.pruned and e.eval()(torch.rand(2, 3, 32, 32)).shape[1] == 8
    # the least larger share is the one that gives some group one channel more
    share = min((k + 1)/s for k, s in zip(kept, sizes))
    more = [max(k, int(s*share + 1e-9)) for k, s in zip(kept, sizes)]
    if share <= 1 and more != kept:
        bigger = build(plain); bigger.kept = more
        bigger.prune([torch.rand(s) for s in sizes])
        assert n_params(bigger) > plain


def test_pruning_at_full_width_is_table_9s():
    model = make_defense('PATROL').model('vgg11', 10, noise_std=0.025)
    model.encoder.prune([torch.rand(c.out_channels) for c, _, _ in model.encoder.groups()])
    assert n_params(model.encoder) == 83_723
    assert [m.out_channels for m in model.encoder if isinstance(m, nn.Conv2d)] == [16, 60, 121, 8]


@pytest.mark.parametrize('arch', ['vgg11', 'resnet20'])
def test_pruned_channels_are_the_ones_with_the_lowest_scores_and_the_rest_computes_on(arch):
    torch.manual_seed(0)
    model = PATROL(alpha=1.0, t=0.5).model(arch, 10, width=0.5, noise_std=0.025)
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


def test_the_lipschitz_gradient_is_that_of_the_mean_squared_spectral_norm():
    d = PATROL(alpha=0.0, t=0.5, lipschitz=0.3)
    model = d.model('vgg11', 10, width=0.125, noise_std=0.025).double()
    weights = [m.weight for m in model.encoder if isinstance(m, nn.Conv2d)]
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    d.after_backward(model)
    penalty = 0.3*torch.stack([torch.linalg.matrix_norm(w.flatten(1), 2)**2 for w in weights]).mean()
    for w, g in zip(weights, torch.autograd.grad(penalty, weights)): assert torch.allclose(w.grad, g, atol=1e-10)


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
def test_an_encoder_that_diverged_has_a_nan_gradient_and_no_error_of_its_own(bad):
    w = torch.randn(6, 4, 3, 3)
    w[0, 0, 0, 0] = bad
    assert spectral_gradient(w).isnan().all()


def test_weights_saved_after_pruning_load_into_a_fresh_encoder():
    sizes = dict(in_channels=1, image_size=16, width=0.5, noise_std=0.025)
    build = lambda: PATROL(alpha=1.0, t=0.5).model('vgg11', 10, **sizes)
    saved, fresh = (build().to(memory_format=torch.channels_last) for _ in range(2))
    saved.encoder.prune([torch.rand(c.out_channels) for c, _, _ in saved.encoder.groups()])
    fresh.load_state_dict(saved.state_dict())
    x = torch.rand(3, 1, 16, 16)
    assert fresh.encoder.pruned and torch.equal(fresh.eval().encode(x), saved.eval().encode(x))


def test_without_its_weight_the_proxy_is_left_alone():
    d = make_defense('PATROL', dict(alpha=0.0))
    d.model('vgg11', 10, in_channels=1, image_size=16, width=0.125, noise_std=0.025)
    before = copy.deepcopy(d.proxy.state_dict())
    d.step(torch.rand(8, 1, 16, 16), torch.rand(8, 8, 4, 4))
    assert all(torch.equal(v, before[k]) for k, v in d.proxy.state_dict().items())
