import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.spatial.distance import cdist

from cem_nb.defense import distance_correlation
from cem_nb.methods import make_defense


def dcor_dense(x, z):
    "Székely et al. 2007, with loops over the definition."
    def centred(v):
        d = cdist(v, v)
        return np.array([[d[i, j] - d[i].mean() - d[:, j].mean() + d.mean() for j in range(len(d))] for i in range(len(d))])
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
    assert distance_correlation(x, 5*x@q + 2).item() == pytest.approx(1)
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
    args = x, torch.zeros(16), z, z, torch.zeros(16, 10)
    assert make_defense('DistCorr', {'alpha': 2.0}).loss(*args) == pytest.approx(2*distance_correlation(x, z).item())
    assert make_defense('Bottleneck').loss(*args) == 0
