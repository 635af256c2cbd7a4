"""cem_nb.theorem1 against independent references: scipy, torch.distributions, dense algebra, quadrature, Monte Carlo."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import distributions as D

from cem_nb.theorem1 import (LinearGaussian, LinearMixture, gaussian_entropy, grid_posterior, oracle_attack, oracle_mse,
                           proof_chain, theorem1_bound)

few = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
dims = st.integers(1, 6)
stds = st.floats(-2, 2).map(lambda e: 10.0**e)  # of the noise, log-uniform


def random_cov(rng, d, spread=1.0):
    "A covariance whose standard deviations lie within e^-spread and e^spread."
    Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    c = Q*np.exp(2*rng.uniform(-spread, spread, d))@Q.T
    return (c + c.T)/2


def random_gaussian(rng, d, d_z, noise_std, rank=None):
    r = min(d, d_z) if rank is None else rank
    W = rng.standard_normal((d_z, r))@rng.standard_normal((r, d))
    return LinearGaussian(W, random_cov(rng, d), noise_std)


def random_mixture(rng, k, d, d_z, noise_std):
    w = rng.dirichlet(np.full(k, 3.0)) + 1e-3
    covs = np.stack([random_cov(rng, d, 0.7) for _ in range(k)])
    return LinearMixture(w/w.sum(), 2*rng.standard_normal((k, d)), covs, rng.standard_normal((d_z, d)), noise_std)


def reference(gm):
    "The same mixture source in torch.distributions."
    comp = D.MultivariateNormal(torch.tensor(gm.means), torch.tensor(gm.covs))
    return D.MixtureSameFamily(D.Categorical(torch.tensor(gm.weights)), comp)


def se(v): return np.std(v, ddof=1)/math.sqrt(len(v))


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


@pytest.mark.parametrize('cov', [np.zeros((2, 2)), -np.eye(3), np.ones((2, 2)), np.full((2, 2), math.nan),
                                 np.ones((2, 3)), 1.0])
def test_entropy_refuses(cov):
    with pytest.raises(ValueError): gaussian_entropy(cov)


# ---- Gaussian source, linear encoder

@few
@given(seeds, dims, dims, dims, stds)
def test_linear_gaussian_against_the_joint_covariance(seed, d, d_z, rank, noise_std):
    "Condition the joint Gaussian of (x, z) by its Schur complement; entropies by determinants."
    g = random_gaussian(np.random.default_rng(seed), d, d_z, noise_std, rank)
    S_xz, S_z = g.prior_cov@g.W.T, g.W@g.prior_cov@g.W.T + noise_std**2*np.eye(d_z)
    gain = np.linalg.solve(S_z, S_xz.T).T
    post = g.prior_cov - gain@S_xz.T
    scale = np.abs(g.prior_cov).max()
    assert np.allclose(g.posterior_cov, post, atol=1e-7*scale)
    assert np.allclose(g.gain@S_z, S_xz, atol=1e-8*np.abs(S_xz).max() + 1e-12)
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
        g = LinearGaussian(np.diag([3., *np.full(d - 1, 0.01)])@Q, 0.5*np.eye(d), 0.1)
        assert theorem1_bound(g.h_x_given_z, d) < 0.9*g.min_mse


@pytest.mark.parametrize('noise_std', [1e-12, 1e-8, 1e8, 1e12])
def test_extreme_noise_on_gaussians(noise_std):
    g = LinearGaussian([[1., 2, 0], [0, 1, 1]], np.diag([1., 2, 3]), noise_std)
    assert np.isfinite(g.posterior_cov).all() and np.isfinite([g.h_x_given_z, g.min_mse]).all()
    if noise_std > 1: assert np.allclose(g.posterior_cov, g.prior_cov) and 0 <= g.mutual_information < 1e-12
    else:  # one direction, the null space of W, is left, conditioned on the other two
        n = np.array([2., -1, 1])
        assert np.allclose(g.posterior_cov, np.outer(n, n)/(n@np.diag([1, 1/2, 1/3])@n))
        assert theorem1_bound(g.h_x_given_z, 3) < 1e-9 < g.min_mse


@few
@given(seeds, dims, dims)
def test_no_linear_attack_beats_the_gain(seed, d, d_z):
    "The error of x_hat = G z in closed form, at the gain and around it."
    rng = np.random.default_rng(seed)
    g = random_gaussian(rng, d, d_z, 0.5)
    S_z = g.W@g.prior_cov@g.W.T + 0.25*np.eye(d_z)
    err = lambda G: np.trace(g.prior_cov - 2*G@g.W@g.prior_cov + G@S_z@G.T)/d
    assert math.isclose(err(g.gain), g.min_mse, rel_tol=1e-8)
    for eps in (1e-3, 1e-1, 1): assert err(g.gain + eps*rng.standard_normal((d, d_z))) > g.min_mse


def test_gaussian_samples_have_the_stated_moments():
    g = random_gaussian(np.random.default_rng(3), 3, 2, 0.7)
    x, z = g.sample(200_000, np.random.default_rng(4))
    joint = np.block([[g.prior_cov, g.prior_cov@g.W.T], [g.W@g.prior_cov, g.W@g.prior_cov@g.W.T + 0.49*np.eye(2)]])
    assert np.allclose(np.cov(np.hstack([x, z]).T), joint, atol=0.03*np.abs(joint).max())
    residual = ((x - z@g.gain.T)**2).mean(1)
    assert abs(residual.mean() - g.min_mse) < 4*se(residual)


@pytest.mark.parametrize('W, cov, noise_std, message', [
    (np.eye(2), np.eye(3), 1, 'columns'), (np.eye(2), np.diag([1., 0]), 1, 'positive definite'),
    (np.eye(2), [[1., .5], [0, 1]], 1, 'symmetric'), (np.eye(2), np.eye(2), 0, 'noise_std'),
    (np.eye(2), np.eye(2), -1, 'noise_std'), (np.eye(2), np.eye(2), math.nan, 'noise_std'),
    (np.diag([1, math.inf]), np.eye(2), 1, 'infinity'), (np.ones(2), np.eye(2), 1, 'axes'),
    (np.eye(2), np.ones((2, 3)), 1, 'square'), (np.zeros((0, 2)), np.eye(2), 1, 'empty')])
def test_linear_gaussian_refuses(W, cov, noise_std, message):
    with pytest.raises(ValueError, match=message): LinearGaussian(W, cov, noise_std)


# ---- mixture source

@few
@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.floats(0.05, 5))
def test_mixture_densities_are_torchs(seed, k, d, d_z, noise_std):
    gm = random_mixture(np.random.default_rng(seed), k, d, d_z, noise_std)
    x, z = gm.sample(50, np.random.default_rng(seed))
    ref = reference(gm)
    S_z = torch.tensor(gm.W@gm.covs@gm.W.T + noise_std**2*np.eye(d_z))
    ref_z = D.MixtureSameFamily(D.Categorical(torch.tensor(gm.weights)),
                                D.MultivariateNormal(torch.tensor(gm.means@gm.W.T), S_z))
    noise = D.Independent(D.Normal(torch.tensor(x@gm.W.T), noise_std), 1)
    want = ref_z.log_prob(torch.tensor(z)) - ref.log_prob(torch.tensor(x)) - noise.log_prob(torch.tensor(z))
    assert np.allclose(gm.log_prob_x(x), ref.log_prob(torch.tensor(x)))
    assert np.allclose(gm.neg_log_posterior(x, z), want, atol=1e-6)


@few
@given(seeds, st.integers(1, 3), st.floats(0.3, 3))
def test_mixture_posterior_by_quadrature(seed, k, noise_std):
    "In one dimension scipy integrates p(x) p(z|x) for the mass, mean and variance."
    gm = random_mixture(np.random.default_rng(seed), k, 1, 2, noise_std)
    _, z = gm.sample(2, np.random.default_rng(seed))
    mean, cov = gm.posterior(z)
    ref = [stats.norm(m, math.sqrt(c)) for m, c in zip(gm.means[:, 0], gm.covs[:, 0, 0])]
    for m, v, zi in zip(mean[:, 0], cov[:, 0, 0], z):
        x = np.linspace(m - 12*math.sqrt(v), m + 12*math.sqrt(v), 4001)
        p = sum(w*r.pdf(x) for w, r in zip(gm.weights, ref))
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
    linear = x.mean(0) + (z - z.mean(0))@np.linalg.solve(S[:2, :2], S[:2, 2:])
    for rival in (linear, mean + 0.05, 0.9*mean, np.broadcast_to(x.mean(0), x.shape)):
        lead = ((rival - x)**2).sum(1) - ((mean - x)**2).sum(1)
        assert lead.mean() > 4*se(lead)
        pythagoras = lead - ((rival - mean)**2).sum(1)
        assert abs(pythagoras.mean()) < 4*se(pythagoras)
    h = gm.neg_log_posterior(x, z)
    x2, z2 = gm.sample(100_000, np.random.default_rng(5))
    parts = [-reference(gm).log_prob(torch.tensor(x2)).numpy(), gm.log_prob_z(z2)]
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
    assert np.allclose(cov, g.posterior_cov) and np.allclose(mean, 1 + (z - g.W.sum(1))@g.gain.T)


def test_shrinking_components_lose_the_bound_and_keep_the_error():
    means = np.array([[0., 0], [2, 0], [0, 2]])
    runs = [LinearMixture(np.full(3, 1/3), means, np.full((3, 1, 1), s**2)*np.eye(2), np.eye(2), 1.).chain(
        4000, np.random.default_rng(0)) for s in (1e-1, 1e-3, 1e-5)]
    points = oracle_mse(torch.tensor(means), torch.tensor(means), 1., draws=3000)
    assert [c.bound < b for c, b in zip(runs, (1e-1, 1e-4, 1e-8))] == [True]*3
    assert abs(runs[-1].xi - points.mse) < 4*math.hypot(runs[-1].xi_se, points.se)
    assert np.isclose(runs[1].h - runs[2].h, 2*math.log(100), atol=0.2)


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
                 lambda: gm.log_prob_x(np.zeros((4, 1))), lambda: gm.log_prob_z(np.zeros(2)),
                 lambda: gm.neg_log_posterior(np.zeros((4, 3)), np.zeros((1, 2))),
                 lambda: gm.chain(1, np.random.default_rng(0))):
        with pytest.raises(ValueError): call()


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
    assert np.isclose(c.eq9, w@(np.log(lam).sum(1) + d*const)/2)
    assert np.isclose(c.eq11, w@(d/2*(np.log(lam.mean(1)) + const)))
    assert np.isclose(c.eq12, d/2*(np.log(w@lam.mean(1)) + const)) and np.isclose(c.xi, w@lam.mean(1))
    assert c.h <= c.eq9 + 1e-9 and c.eq9 <= c.eq11 + 1e-9 and c.eq11 <= c.eq12 + 1e-9
    assert np.isclose(proof_chain(w@h, covs, w).h, c.h) and c.gap_se == (0, 0, 0)


def test_chain_standard_errors_cover():
    "Over repeated runs, the spread of each estimate is what one run says it is."
    gm = random_mixture(np.random.default_rng(2), 3, 2, 1, 0.5)
    runs = [gm.chain(400, np.random.default_rng(i)) for i in range(150)]
    said = np.mean([[*r.gap_se, r.xi_se] for r in runs], 0)
    seen = np.std([[*r.gaps.values(), r.xi] for r in runs], axis=0, ddof=1)
    assert np.allclose(seen/said, 1, atol=0.3)  # 150 runs pin a spread to about 6 %; bias of the spread adds to it


@pytest.mark.parametrize('args', [
    (0., np.eye(2)), (np.zeros(3), np.stack([np.eye(2)]*2)), (0., np.zeros((1, 2, 2))), (math.nan, np.eye(2)[None]),
    (0., np.eye(2)[None], [0.]), (0., np.eye(2)[None], [-1.]), (0., np.eye(2)[None], [1., 1]),
    (-math.inf, np.eye(2)[None]), (np.zeros((1, 1)), np.eye(2)[None])])
def test_chain_refuses(args):
    with pytest.raises(ValueError): proof_chain(*args)


# ---- any encoder, on a grid

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
    post = grid_posterior(x, gm.log_prob_x(x) + 3, x@gm.W.T, cell, z, noise_std)
    mean, cov = gm.posterior(z)
    assert np.allclose(post.mean, mean, atol=1e-3) and np.allclose(post.cov, cov, atol=1e-3)
    assert np.allclose(post.log_p_z, gm.log_prob_z(z), atol=1e-3)


@few
@given(st.floats(0.15, 3), st.sampled_from(['tanh', 'square', 'relu', 'abs']))
def test_theorem_1_and_proposition_2_for_nonlinear_encoders(noise_std, name):
    "A scalar Gaussian through an encoder; H(z) comes from a separate integration of its density."
    f = {'tanh': np.tanh, 'square': np.square, 'relu': lambda x: np.maximum(x, 0), 'abs': np.abs}[name]
    x, cell = grid(-7, 7, 2000, 1)
    z = np.linspace(f(x).min() - 6*noise_std, min(f(x).max(), 20) + 6*noise_std, 800)
    post = grid_posterior(x, -x[:, 0]**2/2, f(x), cell, z[:, None], noise_std)
    p = np.exp(post.log_p_z)
    c = proof_chain(post.h, post.cov, p)
    assert c.h <= c.eq9 + 1e-6 and c.eq9 <= c.eq11 + 1e-9 and c.eq11 <= c.eq12 + 1e-9
    assert c.bound <= c.xi*(1 + 1e-6)
    t = np.linspace(-9, 9, 4001)
    p_z = stats.norm.pdf(z[:, None] - f(t), scale=noise_std)@stats.norm.pdf(t)*(t[1] - t[0])
    h_z = integrate.simpson(-p_z*np.log(p_z + 1e-300), x=z)
    h_noise, h_x = stats.norm(scale=noise_std).entropy(), stats.norm().entropy()
    assert math.isclose(c.h, h_x - h_z + h_noise, abs_tol=2e-3)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(seeds, st.integers(1, 2), st.floats(0.3, 1.5))
def test_all_three_results_for_random_tanh_networks_in_two_dimensions(seed, d_z, noise_std):
    "Quadrature gives xi and H(x|z); exact draws from a mixture source, and scipy's densities, give the other sides."
    rng = np.random.default_rng(seed)
    covs = np.stack([random_cov(rng, 2, 0.3)*0.4 for _ in range(2)])
    source = LinearMixture([.4, .6], rng.uniform(-1.2, 1.2, (2, 2)), covs, np.eye(2), 1.)
    A, b, B = rng.standard_normal((2, 8)), rng.standard_normal(8), rng.standard_normal((8, d_z))/math.sqrt(8)
    net = lambda x: 1.5*np.tanh(x@A + b)@B
    x, cell = grid(-5, 5, 80, 2)
    log_p = source.log_prob_x(x)
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
    many = net(source.sample(4000, rng)[0])  # the density of z by a mean over fresh draws of x: no grid at all
    p_z = np.exp(-((zs[:, None] - many)**2).sum(2)/(2*noise_std**2)).mean(1)/(2*math.pi*noise_std**2)**(d_z/2)
    h_x = float(-(np.exp(log_p)*log_p).sum()*cell)
    h_noise = d_z*stats.norm(scale=noise_std).entropy()
    want = h_x + np.log(p_z).mean() + h_noise
    assert abs(c.h - want) < 5*se(np.log(p_z)) + 0.01*d_z  # Proposition 2


def test_folding_costs_log_2_and_hides_the_sign():
    x, cell = grid(-8, 8, 8000, 1)
    z = np.linspace(-0.3, 8.3, 3000)
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


# ---- the oracle attack

def dense_oracle(z, keys, images, noise_std):
    "Every pair at once, through torch's own softmax, in float64."
    dist = (z.double().flatten(1)[:, None] - keys.double().flatten(1)).square().sum(2)
    p = torch.softmax(-dist/(2*noise_std**2), 1)
    return (p@images.double().flatten(1)).reshape(len(z), *images.shape[1:])


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@few
@given(seeds, st.integers(0, 9), st.integers(1, 20), shapes, shapes, st.floats(-2, 2), st.integers(1, 25),
       st.sampled_from([torch.float32, torch.float64]))
def test_oracle_is_the_dense_softmax(seed, Q, N, zs, xs, log_noise, block, dtype):
    g = torch.Generator().manual_seed(seed % 2**31)
    keys, images = torch.rand(N, *zs, generator=g, dtype=dtype), torch.rand(N, *xs, generator=g, dtype=dtype)
    z, s = torch.randn(Q, *zs, generator=g, dtype=dtype), 10**log_noise
    got = oracle_attack(z, keys, images, s, block=block)
    assert got.dtype == dtype and got.shape == (Q, *xs)
    tol = 1e-5 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(got.double(), dense_oracle(z, keys, images, s), atol=tol, rtol=0)


def test_oracle_by_enumeration():
    "Bayes' rule spelt out, one image at a time, with scipy's densities."
    rng = np.random.default_rng(0)
    keys, images, z = rng.uniform(size=(5, 3)), rng.uniform(size=(5, 2)), rng.uniform(size=(4, 3))
    got = oracle_attack(*map(torch.tensor, (z, keys, images)), 0.4).numpy()
    for i in range(4):
        like = [stats.multivariate_normal(k, 0.16*np.eye(3)).pdf(z[i]) for k in keys]
        assert np.allclose(got[i], sum(l*x for l, x in zip(like, images))/sum(like))


@few
@given(seeds, st.integers(1, 40), st.sampled_from([0., 1e-200, 1e-9, 1e-3, 0.2, 30.]))
def test_block_size_does_not_matter(seed, block, noise_std):
    g = torch.Generator().manual_seed(seed % 2**31)
    keys, images = torch.rand(33, 6, generator=g).double(), torch.rand(33, 4, generator=g).double()
    z = keys[:12] + min(noise_std, 1)*torch.randn(12, 6, generator=g).double()
    torch.testing.assert_close(oracle_attack(z, keys, images, noise_std, block=block),
                               oracle_attack(z, keys, images, noise_std), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('noise_std', [0, 1e-200, 1e-30, 1e-12])
@pytest.mark.parametrize('block', [1, 2, 3, 100])
def test_vanishing_noise_is_the_nearest_image_and_ties_are_averaged(noise_std, block):
    keys = torch.tensor([[0., 0], [1, 0], [0, 0], [3, 3], [1, 0], [0, 0]])
    images = torch.tensor([[0.], [10], [1], [20], [30], [5]])
    z = torch.tensor([[0., 0], [1, 0], [3, 3.0001], [0.4, 0.], [0.5, 0], [0.499, 0]])
    want = torch.tensor([[2.], [20], [20], [2], [9.2], [2]])  # the fifth is as near to three images as to two
    torch.testing.assert_close(oracle_attack(z, keys, images, noise_std, block=block), want)


def test_duplicates_are_ties_at_any_noise():
    torch.manual_seed(0)
    keys, images = torch.rand(40, 64).repeat(2, 1), torch.rand(80, 3)
    for s in (0, 1e-7, 1e-4, 1e-2):
        got = oracle_attack(keys[:40], keys, images, s, block=7)
        torch.testing.assert_close(got, (images[:40] + images[40:])/2)


def test_small_noise_keeps_its_digits_far_from_the_origin():
    "Expanding the square would lose the distances entirely here."
    keys = torch.tensor([[0.], [1e-5]], dtype=torch.float64) + 1e4
    images = torch.tensor([[0.], [1.]], dtype=torch.float64)
    got = oracle_attack(keys[:1] + 4e-6, keys, images, 5e-6)
    gap = ((1e-5 - 4e-6)**2 - 4e-6**2)/(2*5e-6**2)
    assert math.isclose(got.item(), 1/(1 + math.exp(gap)), rel_tol=1e-5)


def test_far_queries_and_huge_noise_are_finite():
    torch.manual_seed(0)
    keys, images = torch.rand(50, 4), torch.rand(50, 2, 3)
    for far in (1e3, 1e10, 1e30):
        got = oracle_attack(torch.full((3, 4), far), keys, images, 0.1)
        assert got.isfinite().all() and (got >= images.amin(0) - 1e-6).all() and (got <= images.amax(0) + 1e-6).all()
    for s in (1e6, 1e100, 1e154):
        torch.testing.assert_close(oracle_attack(keys, keys, images, s), images.mean(0).expand(50, 2, 3))
    with pytest.raises(ValueError, match='overflow'):
        oracle_attack(torch.full((1, 4), 1e200, dtype=torch.float64), keys.double(), images, 0.1)


def test_oracle_mse_of_the_prior_is_the_posterior_variance():
    "Two points: the posterior weight is logistic in one Gaussian variable, so xi is a one-dimensional integral."
    keys, images = torch.tensor([[0.], [1.]]), torch.tensor([[0., 0], [1, 0.5]])
    s = 0.6
    var = lambda z: np.prod([1/(1 + np.exp(c*(1 - 2*z)/(2*s**2))) for c in (1, -1)], axis=0)  # p (1 - p)
    p_z = lambda z: (stats.norm.pdf(z, 0, s) + stats.norm.pdf(z, 1, s))/2
    xi = integrate.quad(lambda z: var(z)*p_z(z), -6, 7)[0]*(1 + 0.25)/2
    got = oracle_mse(keys, images, s, draws=8000)
    assert abs(got.mse - xi) < 4*got.se and got.se < 0.02*xi


def test_oracle_is_minimal_for_its_prior():
    "No other temperature, no nearest neighbour and no shrinking of it does better on average."
    torch.manual_seed(0)
    keys, images = torch.rand(60, 5).double(), torch.rand(60, 8).double()
    s, errors = 0.25, {}
    for seed in range(60):
        z = keys + s*torch.randn(60, 5).double()
        best = oracle_attack(z, keys, images, s)
        rivals = {'cold': oracle_attack(z, keys, images, s/2), 'warm': oracle_attack(z, keys, images, 2*s),
                  'nearest': oracle_attack(z, keys, images, 0), 'shrunk': 0.6*best + 0.4*images.mean(0)}
        for name, r in rivals.items():
            errors.setdefault(name, []).append(((r - images)**2 - (best - images)**2).mean().item())
    for name, lead in errors.items(): assert np.mean(lead) > 4*se(lead), name


def test_oracle_mse_against_the_dense_attack():
    torch.manual_seed(0)
    keys, images = torch.rand(40, 3), torch.rand(40, 1, 2, 2)
    test = torch.rand(30, 3), torch.rand(30, 1, 2, 2)
    for queries in (None, test):
        q, x = queries or (keys, images)
        runs = torch.stack([dense_oracle(q + 0.2*torch.randn(q.shape), keys, images, 0.2) - x for _ in range(400)])
        runs = runs.square().flatten(2).mean(2)
        got = oracle_mse(keys, images, 0.2, queries, draws=400, block=16)
        per_draw = runs.mean(1).numpy()  # the images are fixed: only the noise differs between the two
        assert abs(got.mse - per_draw.mean()) < 4*math.sqrt(2)*se(per_draw)
        want = se(per_draw) if queries is None else se(runs.mean(0).numpy())
        assert math.isclose(got.se, want, rel_tol=0.15)


def test_oracle_mse_limits():
    torch.manual_seed(0)
    keys, images = torch.rand(50, 6), torch.rand(50, 4)
    assert oracle_mse(keys, images, 0) == (0, 0)
    ceiling = (images - images.mean(0)).square().mean().item()
    assert math.isclose(oracle_mse(keys, images, 1e5).mse, ceiling, rel_tol=1e-4)
    curve = [oracle_mse(keys, images, s, draws=30) for s in (0.05, 0.1, 0.2, 0.4, 0.8)]
    assert all(a.mse < b.mse for a, b in zip(curve, curve[1:])) and curve[-1].mse < ceiling


def test_oracle_mse_repeats_and_ignores_the_block():
    torch.manual_seed(0)
    keys, images = torch.rand(30, 6), torch.rand(30, 4)
    a = oracle_mse(keys, images, 0.3, seed=5)
    state = torch.get_rng_state()
    assert a == oracle_mse(keys, images, 0.3, seed=5) and torch.equal(state, torch.get_rng_state())
    assert np.allclose(a, oracle_mse(keys, images, 0.3, seed=5, block=7)) and a != oracle_mse(keys, images, 0.3, seed=6)


K, X = torch.rand(4, 3), torch.rand(4, 2)


@pytest.mark.parametrize('args, error, message', [
    ((K, K, X, -1.), ValueError, 'noise_std'), ((K, K, X, math.nan), ValueError, 'noise_std'),
    ((K, K, X, math.inf), ValueError, 'noise_std'), ((K[:, :2], K, X, 1.), ValueError, 'axes'),
    ((K, K, X[:3], 1.), ValueError, 'one each'), ((K, K[:0], X[:0], 1.), ValueError, 'row'),
    ((K, K, (X*255).byte(), 1.), TypeError, 'bytes'), ((K, K.numpy(), X, 1.), TypeError, 'float tensor'),
    ((K.numpy(), K, X, 1.), TypeError, 'tensor'), ((K.long(), K, X, 1.), TypeError, 'float'),
    ((K*math.nan, K, X, 1.), ValueError, 'NaN'), ((K, K/0, X, 1.), ValueError, 'infinity'),
    ((K, K, X*math.nan, 1.), ValueError, 'NaN'), ((K, K, X, 1., 0), ValueError, 'block'),
    ((K[:, 0], K[:, 0], X, 1.), ValueError, 'shape'), ((K[:, :0], K[:, :0], X, 1.), ValueError, 'shape')])
def test_oracle_attack_refuses(args, error, message):
    with pytest.raises(error, match=message): oracle_attack(*args)


@pytest.mark.parametrize('kw, error, message', [
    (dict(noise_std=-1.), ValueError, 'noise_std'), (dict(draws=1), ValueError, 'draws'),
    (dict(draws=2.5), ValueError, 'draws'), (dict(queries=(K, X[:2])), ValueError, 'one each'),
    (dict(queries=(K, torch.rand(4, 3))), ValueError, 'sizes'), (dict(queries=(K[:1], X[:1])), ValueError, 'needs 2'),
    (dict(queries=(K[:, :2], X)), ValueError, 'axes'), (dict(queries=(K, X.long())), TypeError, 'float'),
    (dict(block=0), ValueError, 'block')])
def test_oracle_mse_refuses(kw, error, message):
    with pytest.raises(error, match=message): oracle_mse(K, X, **dict(noise_std=1.) | kw)
