"""cem_nb.theorem1 against independent references: scipy, torch.distributions, dense algebra, Monte Carlo."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import distributions as D

from cem_nb.theorem1 import LinearGaussian, gaussian_entropy, proof_chain, round_entropy, theorem1_bound
from theory import dims, few, random_cov, random_gaussian, se, seeds, stds


# ---- Theorem 1 and Gaussian entropy

@few
@given(seeds, dims)
def test_entropy_is_scipys(seed, d):
    cov = random_cov(np.random.default_rng(seed), d)
    assert np.isclose(gaussian_entropy(cov), stats.multivariate_normal(cov=cov).entropy())
    assert np.allclose(gaussian_entropy(np.stack([cov, 4*cov])), gaussian_entropy(cov) + [0, d*math.log(2)])


@few
@given(dims, st.floats(1e-6, 1e6))
def test_bound_is_exact_for_white_gaussians(d, v):
    h = stats.multivariate_normal(cov=v*np.eye(d)).entropy()
    assert math.isclose(theorem1_bound(h, d), v, rel_tol=1e-9)


@few
@given(dims, st.floats(1e-6, 1e6))
def test_round_entropy_is_scipys(d, v):
    assert math.isclose(round_entropy(v, d), stats.multivariate_normal(cov=v*np.eye(d)).entropy(), abs_tol=1e-9)
    assert np.allclose(round_entropy([v, 4*v], d), round_entropy(v, d) + [0, d*math.log(2)])


def test_bound_of_known_entropies():
    # uniform on an interval of width 1: variance 1/12, entropy 0; the bound is 1/(2 pi e)
    assert math.isclose(theorem1_bound(0., 1), 1/(2*math.pi*math.e)) and theorem1_bound(0., 1) < 1/12
    for dist in (stats.laplace(), stats.logistic(), stats.uniform(), stats.expon(), stats.gamma(3)):
        assert theorem1_bound(float(dist.entropy()), 1) < dist.var()
    assert theorem1_bound(-math.inf, 7) == 0
    out = theorem1_bound([[0., -math.inf], [1., 2.]], 2)
    assert out.shape == (2, 2) and out[0, 1] == 0 and np.isclose(out[1, 1]/out[1, 0], math.e)


@pytest.mark.parametrize('h, d', [(math.nan, 2), ([0, math.nan], 2), (math.inf, 2), (1e6, 2), (0, 0), (0, -1), (0, 2.5),
                                  (0, math.nan)])
def test_bound_refuses(h, d):
    with pytest.raises(ValueError): theorem1_bound(h, d)


@pytest.mark.parametrize('cov', [np.zeros((2, 2)), -np.eye(3), -np.eye(2), np.array([[1, 5], [0, 1]]), np.ones((2, 2)),
                                 np.full((2, 2), math.nan), np.ones((2, 3)), 1.0])
def test_entropy_refuses(cov):
    with pytest.raises(ValueError): gaussian_entropy(cov)


# ---- Gaussian source, linear encoder

@few
@given(seeds, dims, dims, dims, stds)
def test_linear_gaussian_against_the_joint_covariance(seed, d, d_z, rank, noise_std):
    "Condition the joint Gaussian of (x, z) by its Schur complement; entropies by determinants."
    g = random_gaussian(np.random.default_rng(seed), d, d_z, noise_std, rank)
    S_xz, S_z = g.prior_cov @ g.W.T, g.W @ g.prior_cov @ g.W.T + noise_std**2*np.eye(d_z)
    gain = np.linalg.solve(S_z, S_xz.T).T
    post = g.prior_cov - gain @ S_xz.T
    scale = np.abs(g.prior_cov).max()
    assert np.allclose(g.posterior_cov, post, atol=1e-7*scale)
    assert np.allclose(g.gain @ S_z, S_xz, atol=1e-8*np.abs(S_xz).max() + 1e-12)
    assert math.isclose(g.min_mse, np.trace(post)/d, rel_tol=1e-5, abs_tol=1e-8*scale)
    joint = np.block([[g.prior_cov, S_xz], [S_xz.T, S_z]])
    h_joint, h_z = gaussian_entropy(joint), stats.multivariate_normal(cov=S_z).entropy()
    assert math.isclose(g.h_x, stats.multivariate_normal(cov=g.prior_cov).entropy(), abs_tol=1e-8)
    assert math.isclose(g.h_z, h_z, abs_tol=1e-8)
    h_noise = stats.multivariate_normal(cov=noise_std**2*np.eye(d_z)).entropy()
    assert math.isclose(g.h_z_given_z_hat, h_noise, abs_tol=1e-8)
    # chain rule, with no posterior in it
    assert math.isclose(g.h_x_given_z, h_joint - h_z, abs_tol=1e-4)


@few
@given(seeds, dims, dims, stds)
def test_proposition_2_and_theorem_1_on_gaussians(seed, d, d_z, noise_std):
    g = random_gaussian(np.random.default_rng(seed), d, d_z, noise_std)
    assert math.isclose(gaussian_entropy(g.posterior_cov), g.h_x - g.h_z + g.h_z_given_z_hat, abs_tol=1e-6)
    joint_kl = D.kl_divergence(  # I(x; z) = KL(p(x|z) p(z) || p(x) p(z)), averaged over z, in closed form per z
        D.MultivariateNormal(torch.zeros(d).double(), torch.tensor(g.posterior_cov)),
        D.MultivariateNormal(torch.zeros(d).double(), torch.tensor(g.prior_cov))).item()
    S_mean = g.prior_cov - g.posterior_cov  # covariance of the posterior mean
    joint_kl += np.trace(np.linalg.solve(g.prior_cov, S_mean))/2
    assert math.isclose(g.mutual_information, joint_kl, abs_tol=1e-6)
    assert theorem1_bound(g.h_x_given_z, d) <= g.min_mse*(1 + 1e-9)


@few
@given(seeds, dims, stds)
def test_equality_for_round_posteriors_only(seed, d, noise_std):
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    g = LinearGaussian(3*Q, 0.5*np.eye(d), noise_std)
    assert math.isclose(theorem1_bound(g.h_x_given_z, d), g.min_mse, rel_tol=1e-9)
    if d > 1:
        g = LinearGaussian(np.diag([3., *np.full(d - 1, 0.01)]) @ Q, 0.5*np.eye(d), 0.1)
        assert theorem1_bound(g.h_x_given_z, d) < 0.9*g.min_mse


@pytest.mark.parametrize('noise_std', [1e-12, 1e-8, 1e8, 1e12])
def test_extreme_noise_on_gaussians(noise_std):
    g = LinearGaussian([[1., 2, 0], [0, 1, 1]], np.diag([1., 2, 3]), noise_std)
    assert np.isfinite(g.posterior_cov).all() and np.isfinite([g.h_x_given_z, g.min_mse]).all()
    if noise_std > 1: assert np.allclose(g.posterior_cov, g.prior_cov) and 0 <= g.mutual_information < 1e-12
    else:  # one direction, the null space of W, is left, conditioned on the other two
        n = np.array([2., -1, 1])
        assert np.allclose(g.posterior_cov, np.outer(n, n)/(n @ np.diag([1, 1/2, 1/3]) @ n))
        assert theorem1_bound(g.h_x_given_z, 3) < 1e-9 < g.min_mse


@few
@given(seeds, dims, dims)
def test_no_linear_attack_beats_the_gain(seed, d, d_z):
    "The error of x_hat = G z in closed form, at the gain and around it."
    rng = np.random.default_rng(seed)
    g = random_gaussian(rng, d, d_z, 0.5)
    S_z = g.W @ g.prior_cov @ g.W.T + 0.25*np.eye(d_z)
    err = lambda G: np.trace(g.prior_cov - 2*G @ g.W @ g.prior_cov + G @ S_z @ G.T)/d
    assert math.isclose(err(g.gain), g.min_mse, rel_tol=1e-8)
    for eps in (1e-3, 1e-1, 1): assert err(g.gain + eps*rng.standard_normal((d, d_z))) > g.min_mse


def test_gaussian_samples_have_the_stated_moments():
    g = random_gaussian(np.random.default_rng(3), 3, 2, 0.7)
    x, z = g.sample(200_000, np.random.default_rng(4))
    joint = np.block([[g.prior_cov, g.prior_cov @ g.W.T], [g.W @ g.prior_cov, g.W @ g.prior_cov @ g.W.T + 0.49*np.eye(2)]])
    assert np.allclose(np.cov(np.hstack([x, z]).T), joint, atol=0.03*np.abs(joint).max())
    residual = ((x - z @ g.gain.T)**2).mean(1)
    assert abs(residual.mean() - g.min_mse) < 4*se(residual)


@pytest.mark.parametrize('W, cov, noise_std, message', [
    (np.eye(2), np.eye(3), 1, 'columns'), (np.eye(2), np.diag([1., 0]), 1, 'positive definite'),
    (np.eye(2), [[1., .5], [0, 1]], 1, 'symmetric'), (np.eye(2), np.eye(2), 0, 'noise_std'),
    (np.eye(2), np.eye(2), -1, 'noise_std'), (np.eye(2), np.eye(2), math.nan, 'noise_std'),
    (np.diag([1, math.inf]), np.eye(2), 1, 'infinity'), (np.ones(2), np.eye(2), 1, 'axes'),
    (np.eye(2), np.ones((2, 3)), 1, 'square'), (np.zeros((0, 2)), np.eye(2), 1, 'empty')])
def test_linear_gaussian_refuses(W, cov, noise_std, message):
    with pytest.raises(ValueError, match=message): LinearGaussian(W, cov, noise_std)


# ---- the chain itself

@few
@given(seeds, st.integers(1, 5), st.integers(1, 8))
def test_chain_links_by_eigenvalues(seed, d, S):
    rng = np.random.default_rng(seed)
    covs, w = np.stack([random_cov(rng, d, 2) for _ in range(S)]), rng.uniform(0.1, 1, S)
    w /= w.sum()
    h = np.array([stats.multivariate_normal(cov=c).entropy() for c in covs]) - rng.uniform(0, 1, S)
    c = proof_chain(h, covs, w*7)
    lam = np.linalg.eigvalsh(covs)
    const = math.log(2*math.pi*math.e)
    assert np.isclose(c.eq9, w @ (np.log(lam).sum(1) + d*const)/2)
    assert np.isclose(c.eq11, w @ (d/2*(np.log(lam.mean(1)) + const)))
    assert np.isclose(c.eq12, d/2*(np.log(w @ lam.mean(1)) + const)) and np.isclose(c.xi, w @ lam.mean(1))
    assert c.h <= c.eq9 + 1e-9 and c.eq9 <= c.eq11 + 1e-9 and c.eq11 <= c.eq12 + 1e-9
    assert np.isclose(proof_chain(w @ h, covs, w).h, c.h) and c.gap_se == (0, 0, 0)


@pytest.mark.parametrize('args', [
    (0., np.eye(2)), (np.zeros(3), np.stack([np.eye(2)]*2)), (0., np.zeros((1, 2, 2))), (math.nan, np.eye(2)[None]),
    (0., np.eye(2)[None], [0.]), (0., np.eye(2)[None], [-1.]), (0., np.eye(2)[None], [1., 1]),
    (-math.inf, np.eye(2)[None]), (np.zeros((1, 1)), np.eye(2)[None])])
def test_chain_refuses(args):
    with pytest.raises(ValueError): proof_chain(*args)
