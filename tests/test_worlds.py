"""cem_nb.worlds against independent references: scipy, torch.distributions, quadrature, Monte Carlo."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import distributions as D

from cem_nb.theorem1 import LinearGaussian, proof_chain
from cem_nb.worlds import LinearMixture, cell_posterior, grid_posterior
from theory import dims, few, random_cov, random_gaussian, random_mixture, reference, se, seeds, stds


# ---- mixture source

@few
@given(seeds, st.integers(1, 4), dims)
def test_source_draws_have_the_stated_moments(seed, k, d):
    "Mean and covariance of a mixture in closed form, against draws in units of their spread."
    gm = random_mixture(np.random.default_rng(seed), k, d, 1, 1.)
    x, w = gm.x.sample(4000, np.random.default_rng(seed)), gm.x.weights
    mean = w @ gm.x.means
    cov = np.tensordot(w, gm.x.covs, 1) + (w*(gm.x.means - mean).T) @ (gm.x.means - mean)
    white = np.linalg.solve(np.linalg.cholesky(cov), (x - mean).T)
    assert np.abs(white.mean(1)).max() < 6/math.sqrt(4000)
    assert np.abs(np.cov(white) - np.eye(d)).max() < 0.3


@few
@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.floats(0.05, 5))
def test_mixture_densities_are_torchs(seed, k, d, d_z, noise_std):
    gm = random_mixture(np.random.default_rng(seed), k, d, d_z, noise_std)
    x, z = gm.sample(50, np.random.default_rng(seed))
    ref = reference(gm)
    S_z = torch.tensor(gm.W @ gm.x.covs @ gm.W.T + noise_std**2*np.eye(d_z))
    ref_z = D.MixtureSameFamily(D.Categorical(torch.tensor(gm.x.weights)),
                                D.MultivariateNormal(torch.tensor(gm.x.means @ gm.W.T), S_z))
    noise = D.Independent(D.Normal(torch.tensor(x @ gm.W.T), noise_std), 1)
    want = ref_z.log_prob(torch.tensor(z)) - ref.log_prob(torch.tensor(x)) - noise.log_prob(torch.tensor(z))
    assert np.allclose(gm.x.log_prob(x), ref.log_prob(torch.tensor(x)))
    assert np.allclose(gm.neg_log_posterior(x, z), want, atol=1e-6)


@few
@given(seeds, st.integers(1, 3), st.floats(0.3, 3))
def test_mixture_posterior_by_quadrature(seed, k, noise_std):
    "In one dimension scipy integrates p(x) p(z|x) for the mass, mean and variance."
    gm = random_mixture(np.random.default_rng(seed), k, 1, 2, noise_std)
    _, z = gm.sample(2, np.random.default_rng(seed))
    mean, cov = gm.posterior(z)
    ref = [stats.norm(m, math.sqrt(c)) for m, c in zip(gm.x.means[:, 0], gm.x.covs[:, 0, 0])]
    for m, v, zi in zip(mean[:, 0], cov[:, 0, 0], z):
        x = np.linspace(m - 12*math.sqrt(v), m + 12*math.sqrt(v), 4001)
        p = sum(w*r.pdf(x) for w, r in zip(gm.x.weights, ref))
        p = p*stats.norm.pdf(zi[:, None], gm.W*x, noise_std).prod(0)
        p /= integrate.simpson(p, x=x)
        want = integrate.simpson(p*x, x=x)
        assert math.isclose(want, m, abs_tol=1e-6)
        assert math.isclose(integrate.simpson(p*(x - want)**2, x=x), v, rel_tol=1e-5)


@few
@given(seeds, st.integers(2, 4), st.integers(1, 3), st.integers(1, 3), st.floats(0.1, 3))
def test_every_inequality_on_mixtures(seed, k, d, d_z, noise_std):
    gm = random_mixture(np.random.default_rng(seed), k, d, d_z, noise_std)
    c = gm.chain(2000, np.random.default_rng(seed))
    assert c.gaps['not Gaussian'] > -4*c.gap_se[0]
    assert c.eq9 <= c.eq11 + 1e-9 and c.eq11 <= c.eq12 + 1e-9
    assert math.isclose(c.bound*math.prod(c.factors.values()), c.xi, rel_tol=1e-9)
    assert c.bound < c.xi*math.exp(8*c.gap_se[0]/d)


def test_proposition_1_and_2_on_a_mixture():
    gm = random_mixture(np.random.default_rng(1), 4, 3, 2, 0.5)
    x, z = gm.sample(100_000, np.random.default_rng(2))
    mean, cov = gm.posterior(z)
    paired = ((x - mean)**2).sum(1) - np.trace(cov, axis1=1, axis2=2)
    assert abs(paired.mean()) < 4*se(paired)  # Eq. 1
    S = np.cov(np.hstack([z, x]).T)
    linear = x.mean(0) + (z - z.mean(0)) @ np.linalg.solve(S[:2, :2], S[:2, 2:])
    for rival in (linear, mean + 0.05, 0.9*mean, np.broadcast_to(x.mean(0), x.shape)):
        lead = ((rival - x)**2).sum(1) - ((mean - x)**2).sum(1)
        assert lead.mean() > 4*se(lead)
        pythagoras = lead - ((rival - mean)**2).sum(1)
        assert abs(pythagoras.mean()) < 4*se(pythagoras)
    h = gm.neg_log_posterior(x, z)
    x2, z2 = gm.sample(100_000, np.random.default_rng(5))
    parts = [-reference(gm).log_prob(torch.tensor(x2)).numpy(), gm.z.log_prob(z2)]
    right = sum(p.mean() for p in parts) + math.log(2*math.pi*math.e*0.25)
    assert abs(h.mean() - right) < 4*math.hypot(se(h), math.hypot(*map(se, parts)))


@few
@given(seeds, dims, dims, stds)
def test_mixture_of_one_is_the_gaussian(seed, d, d_z, noise_std):
    rng = np.random.default_rng(seed)
    g = random_gaussian(rng, d, d_z, noise_std)
    gm = LinearMixture([1.], np.ones((1, d)), g.prior_cov[None], g.W, noise_std)
    z = rng.standard_normal((4, d_z))
    mean, cov = gm.posterior(z)
    assert np.allclose(cov, g.posterior_cov) and np.allclose(mean, 1 + (z - g.W.sum(1)) @ g.gain.T)


def test_far_away_features_have_a_posterior():
    gm = random_mixture(np.random.default_rng(0), 3, 2, 2, 0.3)
    mean, cov = gm.posterior([[1e6, -1e6], [0, 0]])
    assert np.isfinite(mean).all() and np.isfinite(cov).all() and (np.linalg.eigvalsh(cov) > 0).all()


@pytest.mark.parametrize('change, message', [
    (dict(weights=[.5, .6]), 'sum to 1'), (dict(weights=[1., 0]), 'above 0'), (dict(weights=[1.]), 'one of each'),
    (dict(means=np.zeros((2, 3))), 'dimensions'), (dict(means=np.full((2, 2), math.nan)), 'NaN'),
    (dict(covs=np.zeros((2, 2, 2))), 'positive definite'), (dict(noise_std=0), 'noise_std'),
    (dict(W=np.ones((3, 2)), noise_std=1e-12), 'lost')])
def test_mixture_refuses(change, message):
    good = dict(weights=[.5, .5], means=np.zeros((2, 2)), covs=np.stack([np.eye(2)]*2), W=np.eye(2), noise_std=1.)
    with pytest.raises(ValueError, match=message): LinearMixture(**good | change)


def test_mixture_methods_refuse():
    gm = random_mixture(np.random.default_rng(0), 2, 3, 2, 1.)
    for call in (lambda: gm.posterior(np.zeros((4, 1))), lambda: gm.posterior([[0, math.nan]]),
                 lambda: gm.x.log_prob(np.zeros((4, 1))), lambda: gm.z.log_prob(np.zeros(2)),
                 lambda: gm.neg_log_posterior(np.zeros((4, 3)), np.zeros((1, 2))),
                 lambda: gm.chain(1, np.random.default_rng(0))):
        with pytest.raises(ValueError): call()


def test_chain_standard_errors_cover():
    "Over repeated runs, the spread of each estimate is what one run says it is."
    gm = random_mixture(np.random.default_rng(2), 3, 2, 1, 0.5)
    runs = [gm.chain(400, np.random.default_rng(i)) for i in range(150)]
    said = np.mean([[*r.gap_se, r.xi_se] for r in runs], 0)
    seen = np.std([[*r.gaps.values(), r.xi] for r in runs], axis=0, ddof=1)
    assert np.allclose(seen/said, 1, atol=0.3)  # 150 runs pin a spread to about 6 %; bias of the spread adds to it


# ---- any encoder, on a grid

@pytest.mark.parametrize('eps', [0.05, 0.1, 0.3, 0.5, 0.75, 1, 2, 5])
def test_uniform_noise_has_its_published_mutual_information(eps, n=1000):
    "Czyz et al. 2023: X ~ U(0, 1), N ~ U(-eps, eps); I(X; X + N) = 1 / (4 eps) for eps > 1/2, else eps - ln(2 eps)."
    x, z = (np.arange(n) + 0.5)/n, np.linspace(-eps, 1 + eps, 2*n + 1)[1:-1]
    post = cell_posterior(np.where(abs(z[:, None] - x) < eps, -math.log(2*eps*n), -math.inf), x[:, None], 1/n)
    p_z = np.exp(post.log_p_z)*(z[1] - z[0])
    assert math.isclose(p_z.sum(), 1, abs_tol=5e-3)
    want = 1/(4*eps) if eps > 0.5 else eps - math.log(2*eps)
    assert math.isclose(-np.average(post.h, weights=p_z), want, abs_tol=3e-3)  # H(X) = 0
    # given z, x is uniform on an interval: its mean and variance are known
    lo, hi = np.maximum(0, z - eps), np.minimum(1, z + eps)
    wide = hi - lo > 0.05
    assert np.allclose(post.mean[wide, 0], ((lo + hi)/2)[wide], atol=1/n)
    assert np.allclose(post.cov[wide, 0, 0], ((hi - lo)**2/12)[wide], atol=1/n)
    assert np.allclose(post.top[wide], 1/n/(hi - lo)[wide], rtol=0.05)


def grid(lo, hi, n, d):
    t = lo + (hi - lo)/n*(np.arange(n) + 0.5)
    return np.stack(np.meshgrid(*[t]*d, indexing='ij'), -1).reshape(-1, d), ((hi - lo)/n)**d


@few
@given(seeds, st.integers(1, 3), st.floats(0.3, 2))
def test_grid_matches_the_mixture(seed, d_z, noise_std):
    rng = np.random.default_rng(seed)
    gm = LinearMixture([.4, .6], rng.uniform(-1, 1, (2, 2)), np.stack([0.4*np.eye(2), [[0.5, 0.2], [0.2, 0.3]]]),
                       rng.standard_normal((d_z, 2)), noise_std)
    x, cell = grid(-5, 5, 110, 2)
    _, z = gm.sample(5, rng)
    post = grid_posterior(x, gm.x.log_prob(x) + 3, x @ gm.W.T, cell, z, noise_std)
    mean, cov = gm.posterior(z)
    assert np.allclose(post.mean, mean, atol=1e-3) and np.allclose(post.cov, cov, atol=1e-3)
    assert np.allclose(post.log_p_z, gm.z.log_prob(z), atol=1e-3)


@settings(few, max_examples=16)
@given(st.floats(0.15, 3), st.sampled_from(['tanh', 'square', 'relu', 'abs']))
def test_theorem_1_and_proposition_2_for_nonlinear_encoders(noise_std, name):
    "A scalar Gaussian through an encoder; H(z) comes from a separate integration of its density."
    f = {'tanh': np.tanh, 'square': np.square, 'relu': lambda x: np.maximum(x, 0), 'abs': np.abs}[name]
    x, cell = grid(-7, 7, 1400, 1)
    z = np.linspace(f(x).min() - 6*noise_std, min(f(x).max(), 20) + 6*noise_std, 500)
    post = grid_posterior(x, -x[:, 0]**2/2, f(x), cell, z[:, None], noise_std)
    p = np.exp(post.log_p_z)
    c = proof_chain(post.h, post.cov, p)
    assert c.h <= c.eq9 + 1e-6 and c.eq9 <= c.eq11 + 1e-9 and c.eq11 <= c.eq12 + 1e-9
    assert c.bound <= c.xi*(1 + 1e-6)
    t = np.linspace(-9, 9, 4001)
    p_z = stats.norm.pdf(z[:, None] - f(t), scale=noise_std) @ stats.norm.pdf(t)*(t[1] - t[0])
    h_z = integrate.simpson(-p_z*np.log(p_z + 1e-300), x=z)
    h_noise, h_x = stats.norm(scale=noise_std).entropy(), stats.norm().entropy()
    assert math.isclose(c.h, h_x - h_z + h_noise, abs_tol=2e-3)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(seeds, st.integers(1, 2), st.floats(0.3, 1.5))
def test_all_three_results_for_random_tanh_networks_in_two_dimensions(seed, d_z, noise_std):
    "Quadrature gives xi and H(x|z); exact draws from a mixture source, and scipy's densities, give the other sides."
    rng = np.random.default_rng(seed)
    covs = np.stack([random_cov(rng, 2, 0.3)*0.4 for _ in range(2)])
    source = LinearMixture([.4, .6], rng.uniform(-1.2, 1.2, (2, 2)), covs, np.eye(2), 1.)
    A, b, B = rng.standard_normal((2, 8)), rng.standard_normal(8), rng.standard_normal((8, d_z))/math.sqrt(8)
    net = lambda x: 1.5*np.tanh(x @ A + b) @ B
    x, cell = grid(-5, 5, 80, 2)
    log_p = source.x.log_prob(x)
    assert abs(np.exp(log_p).sum()*cell - 1) < 1e-3
    axes = [np.linspace(v.min() - 5*noise_std, v.max() + 5*noise_std, 121 if d_z == 1 else 31) for v in net(x).T]
    z = np.stack(np.meshgrid(*axes, indexing='ij'), -1).reshape(-1, d_z)
    post = grid_posterior(x, log_p, net(x), cell, z, noise_std)
    c = proof_chain(post.h, post.cov, np.exp(post.log_p_z))
    assert c.h <= c.eq9 + 1e-6 and c.eq9 <= c.eq11 + 1e-9 and c.eq11 <= c.eq12 + 1e-9  # Theorem 1, link by link
    assert c.bound <= c.xi*(1 + 1e-6)
    xs = source.sample(1500, rng)[0]
    zs = net(xs) + noise_std*rng.standard_normal((1500, d_z))
    mean = grid_posterior(x, log_p, net(x), cell, zs, noise_std).mean
    error = ((mean - xs)**2).mean(1)
    assert abs(error.mean() - c.xi) < 5*se(error) + cell/12  # Proposition 1; a cell's own variance is cell / 12
    for rival in (mean + 0.05, 0.9*mean, np.broadcast_to(xs.mean(0), xs.shape)):
        lead = ((rival - xs)**2).mean(1) - error
        assert lead.mean() > -3*se(lead)
    many = net(source.sample(2500, rng)[0])  # the density of z by a mean over fresh draws of x: no grid at all
    p_z = np.exp(-((zs[:, None] - many)**2).sum(2)/(2*noise_std**2)).mean(1)/(2*math.pi*noise_std**2)**(d_z/2)
    h_x = float(-(np.exp(log_p)*log_p).sum()*cell)
    h_noise = d_z*stats.norm(scale=noise_std).entropy()
    want = h_x + np.log(p_z).mean() + h_noise
    assert abs(c.h - want) < 5*se(np.log(p_z)) + 0.01*d_z  # Proposition 2


def test_folding_costs_log_2_and_hides_the_sign():
    x, cell = grid(-8, 8, 4000, 1)
    z = np.linspace(-0.3, 8.3, 2000)
    post = grid_posterior(x, -x[:, 0]**2/2, np.abs(x), cell, z[:, None], 0.05)
    c = proof_chain(post.h, post.cov, np.exp(post.log_p_z))
    plain = LinearGaussian([[1.]], [[1.]], 0.05)
    assert math.isclose(c.xi, 1, rel_tol=1e-3) and math.isclose(c.h - plain.h_x_given_z, math.log(2), abs_tol=0.05)
    assert c.bound < 0.02


@pytest.mark.parametrize('change, message', [
    (dict(noise_std=0), 'noise_std'), (dict(noise_std=1e-3), 'refine'), (dict(cell=0), 'cell'),
    (dict(z=np.zeros((1, 2))), 'columns'),
    (dict(log_prior=np.zeros(3)), 'per cell'), (dict(z_hat=np.full((100, 1), math.nan)), 'NaN')])
def test_grid_refuses(change, message):
    x, cell = grid(-3, 3, 100, 1)
    good = dict(x=x, log_prior=-x[:, 0]**2/2, z_hat=x, cell=cell, z=np.zeros((1, 1)), noise_std=0.5)
    with pytest.raises(ValueError, match=message): grid_posterior(**good | change)
