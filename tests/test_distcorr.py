import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from precision import AMBIENT, precision_around, value_and_slope
from scipy.spatial.distance import cdist

from cem_nb.engine import full_precision
from cem_nb.distcorr import DistCorr, distance_correlation, double_centred, pairwise_distances


def dcor_dense(x, z):
    "Székely et al. 2007, with loops over the definition."
    def centred(v):
        d = cdist(v, v)
        n = range(len(d))
        return np.array([[d[i, j] - d[i].mean() - d[:, j].mean() + d.mean() for j in n] for i in n])
    a, b = centred(x), centred(z)
    return np.sqrt((a*b).mean()/np.sqrt((a*a).mean()*(b*b).mean()))


@settings(deadline=None, max_examples=25, derandomize=True)
@given(n=st.integers(2, 20), p=st.integers(1, 6), q=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_distance_correlation_against_its_definition(n, p, q, seed):
    rng = np.random.default_rng(seed)
    x, z = rng.normal(size=(n, p)), rng.normal(size=(n, q))
    z[:, 0] += x[:, 0]**2
    got = distance_correlation(torch.tensor(x), torch.tensor(z)).item()
    assert got == pytest.approx(dcor_dense(x, z), abs=1e-6)


def test_distance_correlation_of_tight_clusters_in_float32():
    "Features of a trained encoder lie close together, far from zero."
    rng = np.random.default_rng(0)
    x, z = rng.random((64, 20)), 0.5 + 1e-3*rng.normal(size=(64, 512))
    got = distance_correlation(torch.tensor(x).float(), torch.tensor(z).float()).item()
    assert got == pytest.approx(dcor_dense(x.astype('f4').astype('f8'), z.astype('f4').astype('f8')), abs=1e-4)


def test_distance_correlation_properties():
    x = torch.randn(30, 4, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    assert distance_correlation(x, 5*x @ q + 2).item() == pytest.approx(1)
    assert distance_correlation(x, torch.ones(30, 2)) == 0
    z = torch.rand(30, 8, 2, 2)
    assert distance_correlation(x.float(), z) == pytest.approx(distance_correlation(z, x.float()).item(), abs=1e-5)
    with pytest.raises(ValueError): distance_correlation(x, x[:5])


def test_distance_correlation_gradient():
    x = torch.randn(8, 3, dtype=torch.float64)
    z = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: distance_correlation(x, z), z)
    twins = torch.randn(4, 3)[[0, 0, 1, 2]].requires_grad_()  # a distance of exactly zero off the diagonal
    distance_correlation(torch.randn(4, 5), twins).backward()
    assert twins.grad.isfinite().all() and twins.grad.abs().sum() > 0


def test_distcorr_adds_its_weight_times_the_correlation():
    x, z = torch.rand(16, 3, 8, 8), torch.rand(16, 8, 2, 2)
    args = x, torch.zeros(16), z, z + 1, torch.zeros(16, 10)
    assert DistCorr(alpha=2.0).loss(*args).item() == pytest.approx(2*distance_correlation(x, z).item())


def test_distance_correlation_of_a_published_example():
    x, y = (torch.tensor(v, dtype=torch.float64)[:, None] for v in ((1, 2, 3, 4, 5, 6), (1, 7, 5, 5, 6, 2)))
    assert distance_correlation(x, y).item() == pytest.approx(0.553724, abs=1e-6)
    assert distance_correlation(x, y).item()**2 == pytest.approx(0.3066099, abs=1e-7)


@pytest.mark.parametrize('spoil', [lambda z: z.index_fill(0, torch.tensor([0]), torch.nan), lambda z: z*torch.nan,
                                   lambda z: z/0, lambda z: -z/0])
def test_nan_is_not_independence(spoil):
    x = torch.rand(64, 8)
    assert distance_correlation(x, spoil(x)).isnan() and distance_correlation(spoil(x), x).isnan()


@pytest.mark.parametrize('scale', [1e-30, 1e-12, 1e12, 1e25, 1e37])
def test_distance_correlation_does_not_change_with_the_unit(scale):
    x = torch.rand(64, 8)
    z = (x[:, :3]**2).requires_grad_()
    want = distance_correlation(x, z)
    got = distance_correlation(x, z*scale)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    want, got = (torch.autograd.grad(v, z)[0] for v in (want, got))
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('value', [0.0, 0.3, 1e-20, 1e20])
def test_constant_features_have_no_correlation_and_no_gradient(value):
    x, z = torch.rand(64, 8), torch.full((64, 500), value, requires_grad=True)
    d = distance_correlation(x, z)
    d.backward()
    assert d == 0 and (z.grad == 0).all()


@pytest.mark.parametrize('shape', [(512,), (8, 8, 8)])
@pytest.mark.parametrize('ambient', AMBIENT)
def test_values_and_gradients_do_not_depend_on_the_ambient_precision(ambient, shape):
    g = torch.Generator().manual_seed(0)
    x, noise = torch.rand(64, 3, 8, 8, generator=g), torch.randn(64, *shape, generator=g)
    z = 0.5 + 1e-3*noise  # tight clusters, as a trained encoder has them
    want, slope = value_and_slope(lambda at: distance_correlation(x, at), z)
    with precision_around(ambient): got, got_slope = value_and_slope(lambda at: distance_correlation(x, at), z)
    assert torch.equal(got, want) and torch.equal(got_slope, slope)


def test_half_precision_is_widened_and_whole_numbers_are_refused():
    x = torch.rand(32, 6)
    for dtype in (torch.float16, torch.bfloat16):
        got = distance_correlation(x, x.to(dtype))
        assert got.dtype == torch.float32 and got == distance_correlation(x, x.to(dtype).float())
    with pytest.raises(TypeError, match='uint8'): distance_correlation((255*x).byte(), x)


def test_full_precision_keeps_a_function_s_name_and_widens_its_tensors_only():
    @full_precision
    def product(a, b): return a @ b.T
    a = torch.rand(3, 3)
    assert product.__name__ == 'product'
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.allclose(product(a, a).double(), a.double() @ a.T.double())
        assert product(a, a).dtype == torch.float32
        assert product(a.half(), a).dtype == torch.float32 and product(a.double(), a.double()).dtype == torch.float64
        assert (a @ a).dtype == torch.bfloat16


def test_distances_are_those_of_the_definition():
    x = torch.randn(7, 3, 2, dtype=torch.float64)
    d = pairwise_distances(x)
    want = torch.tensor(cdist(x.flatten(1), x.flatten(1)))
    assert torch.allclose(d/d.max(), want/want.max(), atol=1e-12) and (d.diagonal() == 0).all()
    c = double_centred(d)
    assert c.sum(0).abs().max() < 1e-12 and c.sum(1).abs().max() < 1e-12


def test_independent_data_in_high_dimension_reads_as_dependence():
    "The bias of the batch: Székely and Rizzo 2013."
    g = torch.Generator().manual_seed(0)
    low, high = (distance_correlation(torch.randn(128, p, generator=g), torch.randn(128, q, generator=g)).item()
                 for p, q in ((5, 5), (3072, 512)))
    assert low == pytest.approx(0.35, abs=0.08) and high == pytest.approx(0.98, abs=0.01)


def test_more_noise_is_a_factor():
    assert DistCorr(0.1, 4.0).model('vgg11', 10, noise_std=0.1, width=0.125).noise_std == pytest.approx(0.4)
    assert DistCorr(0.0).loss(None, None, None, None, None) == 0
