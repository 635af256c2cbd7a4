import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchmetrics.functional.image import structural_similarity_index_measure

from cem_nb.core import seeded
from cem_nb.data import load_data
from cem_nb.ressfl import ResSFL, gaussian_blur_matrix, ssim


@settings(deadline=None, max_examples=20, derandomize=True)
@given(h=st.integers(6, 40), w=st.integers(6, 40), c=st.sampled_from([1, 3]), noise=st.floats(0, 1),
       seed=st.integers(0, 10**6))
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


@pytest.mark.parametrize('ambient', ['autocast bfloat16', 'autocast float16', 'default bfloat16', 'default float64'])
def test_ssim_and_its_gradient_do_not_depend_on_the_ambient_precision(ambient):
    "Bright smooth images: all digits of their variances are in the last bits."
    x = torch.full((4, 3, 32, 32), 0.8)
    y = x + 0.002*torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def value_and_gradient():
        at = y.clone().requires_grad_()
        s = ssim(at, x)
        return s.detach(), torch.autograd.grad(s, at)[0]

    want, slope = value_and_gradient()
    kind, dtype = ambient.split()
    dtype = getattr(torch, dtype)
    if kind == 'autocast':
        with torch.autocast('cpu', dtype=dtype): got, got_slope = value_and_gradient()
    else:
        try:
            torch.set_default_dtype(dtype)
            gaussian_blur_matrix.cache_clear()
            got, got_slope = value_and_gradient()
        finally: torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want) and torch.equal(got_slope, slope) and want <= 1


def test_ssim_widens_half_precision_refuses_bytes_and_lets_nan_through():
    x = torch.rand(2, 3, 16, 16)
    assert ssim(x.half(), x.half()).dtype == torch.float32
    with pytest.raises(TypeError, match='uint8'): ssim((255*x).byte(), (255*x).byte())
    assert ssim(x, x.where(x != x[0, 0, 0, 0], torch.nan)).isnan()


def test_the_blur_is_made_once_and_serves_training_wherever_it_was_made():
    gaussian_blur_matrix.cache_clear()
    x = torch.rand(2, 1, 12, 12)
    with torch.inference_mode(): ssim(x, x)
    with torch.device('meta'): ssim(x, x)
    y = torch.rand(2, 1, 12, 12, requires_grad=True)
    ssim(y, x).backward()
    assert y.grad.isfinite().all() and gaussian_blur_matrix.cache_info().misses == 1


def test_images_that_are_too_small_are_refused_before_training():
    with pytest.raises(ValueError, match='4 pixels'):
        ResSFL(alpha=1.0, t=0.3).model('vgg11', 10, image_size=4, width=0.125, noise_std=0.025)


def test_the_hinge_is_alpha_times_what_exceeds_the_threshold():
    torch.manual_seed(0)
    x = torch.rand(8, 1, 16, 16)
    d = ResSFL(alpha=2.0, t=0.0)
    z = d.model('vgg11', 10, in_channels=1, image_size=16, width=0.125, noise_std=0.025).smash(x).detach()
    for _ in range(60): d.step(x, z)
    s = structural_similarity_index_measure(d.proxy.eval()(z), x, data_range=1.0).item()
    args = x, None, None, z, None
    assert s > 0.05 and d.loss(*args).item() == pytest.approx(2*s, rel=1e-3)
    d.t = s/2
    assert d.loss(*args).item() == pytest.approx(s, rel=1e-3)
    d.t = s + 0.01
    assert d.loss(*args) == 0


def test_the_proxy_and_the_model_learn_apart():
    d = ResSFL(alpha=1.0, t=0.0)
    model = d.model('vgg11', 10, in_channels=1, image_size=16, width=0.125, noise_std=0.025)
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


def test_an_adversarial_defence_lowers_the_proxys_ssim():
    "The same proxy, trained along with an encoder that heeds it and with one that does not."
    def last_ssim(alpha):
        d = ResSFL(alpha=1.0, t=0.0)
        torch.manual_seed(0)
        model = d.model('vgg11', 10, in_channels=1, image_size=16, width=0.125, noise_std=0.025)
        opt = torch.optim.SGD(model.parameters(), 0.05)
        x = load_data('digits', n_train=256).train.x[:48].float()/255
        for _ in range(40):
            z = model.smash(x)
            d.step(x, z.detach())
            loss = alpha*d.loss(x, None, None, z, None)
            opt.zero_grad(); loss.backward(); opt.step()
        return ssim(d.proxy.eval()(model.smash(x)), x).item()
    free, heeded = last_ssim(0.0), last_ssim(5.0)
    assert heeded < free - 0.05, (free, heeded)


def test_the_proxys_optimiser_follows_it_to_another_precision():
    d = ResSFL(alpha=1.0, t=0.0)
    x = torch.rand(8, 1, 16, 16)
    z = d.model('vgg11', 10, in_channels=1, image_size=16, width=0.125, noise_std=0.025).smash(x).detach()
    d.step(x, z)
    moments = [s['exp_avg'].clone() for s in d.proxy_opt.state.values()]
    before = copy.deepcopy(d.proxy.state_dict())
    d.double()
    assert all(torch.equal(s['exp_avg'], m.double()) for s, m in zip(d.proxy_opt.state.values(), moments, strict=True))
    d.step(x.double(), z.double())
    assert not torch.equal(d.proxy[0].body[2].weight, before['0.body.2.weight'].double())


def test_sizes_come_from_the_network():
    "What is left out of the call is the default of the network, said there."
    d = ResSFL(alpha=1.0, t=0.0)
    with seeded(0, 'init'): z = d.model('vgg11', 10, noise_std=0.025).smash(torch.rand(1, 3, 32, 32))
    assert d.proxy(z.expand(2, -1, -1, -1)).shape == (2, 3, 32, 32)
