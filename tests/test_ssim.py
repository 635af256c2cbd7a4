"Both borders against independent references: torchmetrics, and NumPy window by window."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from precision import AMBIENT, precision_around, value_and_slope
from torchmetrics.functional.image import structural_similarity_index_measure
from twins import numpy_ssim

from cem_nb.ssim import _mirrored, mirrored_window, ssim, ssim_zero


@pytest.mark.parametrize('shape', [(1, 16, 16), (3, 32, 24), (1, 4, 4), (3, 1, 7)])
def test_zero_padded_ssim_against_numpy(shape):
    x, y = torch.rand(2, 5, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = [numpy_ssim(a.numpy(), b.numpy()) for a, b in zip(x, y)]
    np.testing.assert_allclose(ssim_zero(x, y), want, rtol=1e-10)
    torch.testing.assert_close(ssim_zero(x, y), ssim_zero(y, x))
    torch.testing.assert_close(ssim_zero(x, x), torch.ones(5, dtype=torch.float64))


def test_far_from_the_border_both_ssims_are_one():
    "Where two images differ only in the middle, what lies beyond the border does not matter."
    x = torch.full((2, 1, 64, 64), 0.5)
    y = x.clone()
    y[..., 24:40, 24:40] = torch.rand(2, 1, 16, 16)
    inside = structural_similarity_index_measure(y, x, data_range=1.0).item()
    assert ssim_zero(x, y).mean().item() == pytest.approx(inside, abs=1e-5)


def test_zero_padded_ssim_does_not_hide_nan_or_mend_shapes():
    x = torch.rand(3, 1, 8, 8)
    bad = x.clone()
    bad[1, 0, 2, 2] = math.nan
    assert ssim_zero(bad, x).isnan().tolist() == [False, True, False]
    for y in (x[:2], x[:, :, :4]):
        with pytest.raises(ValueError, match='shapes'): ssim_zero(x, y)


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


@pytest.mark.parametrize('ambient', AMBIENT)
def test_ssim_and_its_gradient_do_not_depend_on_the_ambient_precision(ambient):
    "Bright smooth images: all digits of their variances are in the last bits."
    x = torch.full((4, 3, 32, 32), 0.8)
    y = x + 0.002*torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    want, slope = value_and_slope(lambda at: ssim(at, x), y)
    _mirrored.cache_clear()
    with precision_around(ambient): got, got_slope = value_and_slope(lambda at: ssim(at, x), y)
    assert torch.equal(got, want) and torch.equal(got_slope, slope) and want <= 1


def test_ssim_widens_half_precision_refuses_bytes_and_lets_nan_through():
    x = torch.rand(2, 3, 16, 16)
    assert ssim(x.half(), x.half()).dtype == torch.float32
    for score in (ssim, ssim_zero):
        with pytest.raises(TypeError, match='uint8'): score((255*x).byte(), (255*x).byte())
        assert score(x, x.double().flip(3)).mean().item() == pytest.approx(score(x, x.flip(3)).mean().item(), abs=1e-6)
    assert ssim(x, x.where(x != x[0, 0, 0, 0], torch.nan)).isnan()


def test_the_window_is_made_once_and_serves_training_wherever_it_was_made():
    _mirrored.cache_clear()
    x = torch.rand(2, 1, 12, 12)
    with torch.inference_mode(): ssim(x, x)
    with torch.device('meta'): ssim(x, x)
    y = torch.rand(2, 1, 12, 12, requires_grad=True)
    ssim(y, x).backward()
    assert y.grad.isfinite().all() and _mirrored.cache_info().misses == 1


def test_who_changes_a_window_in_place_changes_his_own():
    x, y = torch.rand(2, 2, 1, 16, 16)
    before = ssim(x, y)
    mirrored_window(16, torch.float32, torch.device('cpu')).mul_(0.5)
    assert torch.equal(ssim(x, y), before)


def test_ssim_says_which_shapes_it_takes():
    for bad in (torch.rand(1, 16, 16), torch.rand(0, 1, 16, 16)):
        with pytest.raises(ValueError, match=r'give two batches \[B, C, H, W\]'): ssim(bad, bad)
    with pytest.raises(TypeError, match='torch tensor'): ssim(np.ones((1, 1, 8, 8)), np.ones((1, 1, 8, 8)))
