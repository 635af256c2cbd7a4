"cem_nb.bounds against torch.distributions, quadrature, finite differences, and laws that are no mixtures."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from laws import OK, TYPES, dense, law, mixture, rng, soft_moments, some, truth_mc, twin
from scipy import integrate, stats
from torch.distributions import Categorical, MultivariateNormal, Normal

from cem_nb.bounds import (add_noise, bhattacharyya_distances, cluster_posterior, conditional_entropy_bound,
                           entropy_huber, entropy_mc, entropy_pairwise, entropy_quadrature, expected_posterior,
                           kl_divergences, mutual_information_bound)
from cem_nb.mixture import GaussianMixture, component_log_prob

ENTROPY_2PIE = math.log(2*math.pi*math.e)


@pytest.mark.parametrize('form', TYPES)
def test_hard_fits_stay_finite(form):
    same = torch.ones(6, 4)
    one = torch.cat([torch.randn(20, 4, generator=rng(0)), torch.full((1, 4), 50.)])
    line = torch.randn(40, 1, generator=rng(1)) @ torch.ones(1, 4)
    for x, k in ((same, 3), (one, 2), (line, 2), (torch.randn(3, 4, generator=rng(2)), 3), (torch.zeros(1, 4), 1)):
        gm = GaussianMixture(k, covariance_type=form, random_state=0).fit(x)
        assert all(t.isfinite().all() for t in (gm.weights_, gm.means_, gm.covariances_, gm.score_samples(x)))
        assert gm.weights_.sum().item() == pytest.approx(1)
        assert gm.predict_proba(x).sum(1).numpy() == pytest.approx(1)
        bounds = [entropy_pairwise(gm.weights_, gm.means_, gm.covariances_, 'lower'),
                  entropy_pairwise(gm.weights_, gm.means_, gm.covariances_),
                  entropy_huber(gm.weights_, gm.means_, gm.covariances_)]
        assert bounds[0] - 1e-6 <= bounds[1] <= bounds[2] + 1e-6


def test_512_dimensions_in_float32():
    g = rng(0)
    mu = torch.randn(4, 512, generator=g)
    label = torch.arange(400) % 4
    x = mu[label] + 0.1*torch.randn(400, 512, generator=g)
    gm = GaussianMixture(4, random_state=0, n_init=3).fit(x)
    assert (gm.predict_proba(x).max(1).values > 0.999).all()
    w, m, s = (t.float() for t in (gm.weights_, gm.means_, gm.covariances_))
    wide = entropy_huber(w.double(), m.double(), s.double()).item()
    assert entropy_huber(w, m, s).item() == pytest.approx(wide, rel=1e-6)
    assert mutual_information_bound(w, m, s, 0.025).item() == pytest.approx(
        math.log(4) + 0.5*(torch.log1p(s/0.025**2).sum(1).mean()).item(), rel=1e-5)


@some
@given(k=st.integers(1, 5), m=st.integers(1, 6), form=st.sampled_from(TYPES), seed=st.integers(0, 999))
def test_densities_match_torch_distributions(k, m, form, seed):
    w, mu, s = mixture(k, m, form, seed)
    x = 3*torch.randn(20, m, generator=rng(seed), dtype=torch.float64)
    want = MultivariateNormal(mu, dense(s, m)).log_prob(x[:, None])
    assert torch.allclose(component_log_prob(x, mu, s), want, rtol=1e-8, atol=1e-8)
    gm = GaussianMixture(k, covariance_type=form)
    gm.weights_, gm.means_, gm.covariances_ = w, mu, s
    assert torch.allclose(gm.score_samples(x), twin(w, mu, s).log_prob(x), rtol=1e-8, atol=1e-8)
    post = (want + w.log()).softmax(1)
    assert torch.allclose(cluster_posterior(x, w, mu, s), post, atol=1e-8)


@pytest.mark.parametrize('form', TYPES)
def test_density_and_bounds_beside_a_component_far_away(form):
    def unit(far):
        s = {'spherical': torch.ones(3), 'diag': torch.ones(3, 1), 'full': torch.ones(3, 1, 1)}[form].double()
        return torch.ones(3).double()/3, torch.tensor([[0.], [1.], [far]]).double(), s
    x = torch.tensor([[-1.], [0.3], [2.], [1e9], [1e9 + 1]]).double()
    want = Normal(unit(1e9)[1][:, 0], 1.).log_prob(x)
    assert torch.allclose(component_log_prob(x, *unit(1e9)[1:]), want, rtol=1e-12, atol=1e-12)
    for f in (entropy_pairwise, lambda *p: entropy_pairwise(*p, 'lower'), lambda *p: entropy_mc(*p, 900, rng(0))[0]):
        assert f(*unit(1e9)).item() == pytest.approx(f(*unit(1e3)).item(), abs=1e-7)
    w, mu, s = unit(1e9)
    leaf = mu.clone().requires_grad_()
    grad, = torch.autograd.grad(component_log_prob(x[:3], leaf, s)[:, :2].sum(), leaf)
    assert torch.allclose(grad[:2, 0], (x[:3] - mu[:2, 0]).sum(0))


@some
@given(k=st.integers(1, 4), m=st.integers(1, 5), form=st.sampled_from(TYPES), gap=st.sampled_from([0.1, 1., 5.]),
       offset=st.sampled_from([0., 1e4]), seed=st.integers(0, 999))
def test_pairwise_distances_match_independent_formulas(k, m, form, gap, offset, seed):
    w, mu, s = mixture(k, m, form, seed, gap)
    mu = mu + offset
    p = [MultivariateNormal(mu[i], dense(s, m)[i]) for i in range(k)]
    kl = torch.stack([torch.stack([torch.distributions.kl_divergence(a, b) for b in p]) for a in p])
    assert torch.allclose(kl_divergences(mu, s), kl, rtol=1e-8, atol=1e-8)
    C, want = dense(s, m).numpy(), np.zeros((k, k))
    for i in range(k):
        for j in range(k):
            mid, d = (C[i] + C[j])/2, (mu[i] - mu[j]).numpy()
            dets = [np.linalg.det(c) for c in (mid, C[i], C[j])]
            want[i, j] = d @ np.linalg.inv(mid) @ d/8 + 0.5*math.log(dets[0]/math.sqrt(dets[1]*dets[2]))
    np.testing.assert_allclose(bhattacharyya_distances(mu, s), want, rtol=1e-7, atol=1e-8)
    for kind, D in (('upper', kl.numpy()), ('lower', want)):  # Kolchinsky and Tracey, term by term
        overlap = [sum(w[j].item()*math.exp(-D[i, j]) for j in range(k)) for i in range(k)]
        h = sum(w[i].item()*(p[i].entropy().item() - math.log(overlap[i])) for i in range(k))
        assert entropy_pairwise(w, mu, s, kind).item() == pytest.approx(h, abs=1e-7)


@pytest.mark.parametrize('form', TYPES)
@pytest.mark.parametrize('m', [1, 2])
def test_pairwise_distances_by_quadrature(form, m):
    _, mu, s = mixture(3, m, form, 8, gap=0.8)
    p = [stats.multivariate_normal(mu[i].numpy(), dense(s, m)[i].numpy()) for i in range(3)]
    t = np.linspace(-12, 12, 1201)
    z = np.stack(np.meshgrid(*[t]*m, indexing='ij'), -1)
    log_p, cell = [q.logpdf(z) for q in p], (t[1] - t[0])**m
    for i in range(3):
        for j in range(3):
            kl = (np.exp(log_p[i])*(log_p[i] - log_p[j])).sum()*cell
            b = -math.log(np.exp((log_p[i] + log_p[j])/2).sum()*cell)
            assert kl_divergences(mu, s)[i, j].item() == pytest.approx(kl, abs=1e-6)
            assert bhattacharyya_distances(mu, s)[i, j].item() == pytest.approx(b, abs=1e-6)


@some
@given(k=st.integers(1, 6), m=st.integers(1, 6), form=st.sampled_from(TYPES), gap=st.sampled_from([0.1, 0.7, 2., 10.]),
       seed=st.integers(0, 999))
def test_the_ladder_of_bounds(k, m, form, gap, seed):
    w, mu, s = mixture(k, m, form, seed, gap)
    mc, error = entropy_mc(w, mu, s, 4000, generator=rng(seed))
    slack = 5*error + 1e-9
    assert entropy_pairwise(w, mu, s, 'lower') <= mc + slack
    assert mc - slack <= entropy_pairwise(w, mu, s, 'upper')
    assert entropy_pairwise(w, mu, s, 'upper') <= entropy_huber(w, mu, s) + 1e-9
    z = twin(w, mu, s).sample((4000,))
    plain = -twin(w, mu, s).log_prob(z)
    assert abs(mc - plain.mean()) < 5*(error**2 + plain.var()/4000).sqrt() + 1e-9


def test_mc_and_bounds_bracket_the_entropy_by_quadrature():
    w, mu, s = mixture(3, 1, 'diag', 3, gap=1.)
    p = twin(w, mu, s)

    def integrand(v):
        l = p.log_prob(torch.tensor([v], dtype=torch.float64)).item()
        return -math.exp(l)*l
    exact = integrate.quad(integrand, -12, 12, limit=200)[0]
    mc, error = entropy_mc(w, mu, s, 60_000, generator=rng(0))
    assert abs(mc - exact) < 4*error and error < 5e-3
    assert entropy_pairwise(w, mu, s, 'lower') < exact < entropy_pairwise(w, mu, s) < entropy_huber(w, mu, s)


def test_the_mc_error_bar_covers():
    w, mu, s = mixture(4, 3, 'diag', 2, gap=0.8)
    truth, _ = entropy_mc(w, mu, s, 400_000, generator=rng(10_000))
    runs = torch.tensor([[v.item() for v in entropy_mc(w, mu, s, 400, generator=rng(i))] for i in range(200)])
    z = (runs[:, 0] - truth.item())/runs[:, 1]
    assert abs(z.std() - 1) < 0.2 and abs(z.mean()) < 0.3


@pytest.mark.parametrize('form', TYPES)
def test_one_component_is_exact(form):
    w, mu, s = mixture(1, 5, form, 0)
    want = MultivariateNormal(mu[0], dense(s, 5)[0]).entropy()
    mc, error = entropy_mc(w, mu, s, 100)
    for h in (entropy_huber(w, mu, s), entropy_pairwise(w, mu, s), entropy_pairwise(w, mu, s, 'lower'), mc):
        assert h.item() == pytest.approx(want.item(), abs=1e-9)
    assert error == 0


@pytest.mark.parametrize('form', TYPES)
def test_coincident_components_huber_is_off_by_the_entropy_of_the_weights(form):
    w, mu, s = mixture(4, 3, form, 1)
    mu, s = mu[:1].expand(4, -1), s[:1].expand(4, *s.shape[1:])
    truth = MultivariateNormal(mu[0], dense(s, 3)[0]).entropy().item()
    for kind in ('upper', 'lower'): assert entropy_pairwise(w, mu, s, kind).item() == pytest.approx(truth, abs=1e-9)
    assert entropy_huber(w, mu, s).item() - truth == pytest.approx(Categorical(w).entropy().item(), abs=1e-9)
    assert entropy_mc(w, mu, s, 100)[0].item() == pytest.approx(truth, abs=1e-9)


@pytest.mark.parametrize('form', TYPES)
def test_separated_components_all_agree(form):
    w, mu, s = mixture(4, 3, form, 1, gap=1e3)
    want = (w*MultivariateNormal(mu, dense(s, 3)).entropy()).sum() + Categorical(w).entropy()
    for h in (entropy_huber(w, mu, s), entropy_pairwise(w, mu, s), entropy_pairwise(w, mu, s, 'lower'),
              entropy_mc(w, mu, s, 100)[0]): assert h.item() == pytest.approx(want.item(), abs=1e-9)


@some
@given(k=st.integers(2, 5), m=st.integers(1, 4), seed=st.integers(0, 999))
def test_the_three_forms_agree(k, m, seed):
    w, mu, s = mixture(k, m, 'spherical', seed)
    forms = [s, s[:, None].expand(k, m), torch.diag_embed(s[:, None].expand(k, m))]
    for f in (entropy_huber, entropy_pairwise, lambda *p: entropy_pairwise(*p, 'lower'),
              lambda *p: entropy_mc(*p, 200, generator=rng(0))[0],
              lambda *p: expected_posterior(*p, 0.3, 200, rng(0))[0],
              lambda *p: mutual_information_bound(*p, 0.3, 'pairwise')):
        a, b, c = (f(w, mu, form).item() for form in forms)
        assert a == pytest.approx(b, abs=1e-9) and a == pytest.approx(c, abs=1e-9)


@pytest.mark.parametrize('form', TYPES)
def test_an_unused_component_changes_nothing_and_keeps_gradients_finite(form):
    w, mu, s = mixture(3, 2, form, 4)
    w0, mu0, s0 = torch.cat([w, w.new_zeros(1)]), torch.cat([mu, mu[:1] + 1]), torch.cat([s, s[:1]])
    for f in (entropy_huber, entropy_pairwise, lambda *p: entropy_pairwise(*p, 'lower')):
        assert f(w0, mu0, s0).item() == pytest.approx(f(w, mu, s).item(), abs=1e-9)
        leaves = [t.clone().requires_grad_() for t in (w0, mu0, s0)]
        assert all(g is None or g.isfinite().all() for g in torch.autograd.grad(f(*leaves), leaves, allow_unused=True))


@pytest.mark.parametrize('form', TYPES)
@pytest.mark.parametrize('f', [
    entropy_huber, entropy_pairwise, lambda *p: entropy_pairwise(*p, 'lower'),
    lambda *p: entropy_mc(*p, 12, generator=rng(0))[0], lambda *p: mutual_information_bound(*p, 0.2),
    lambda *p: mutual_information_bound(*p, 0.2, 'pairwise'), lambda *p: expected_posterior(*p, 0.2, 12, rng(0))[0],
], ids=['huber', 'upper', 'lower', 'mc', 'mi huber', 'mi pairwise', 'utility'])
def test_gradients_match_finite_differences(form, f):
    w, mu, s = mixture(3, 2, form, 11, gap=0.7)
    root = s.sqrt() if form != 'full' else torch.linalg.cholesky(s)  # steps stay inside the covariances
    cov = (lambda r: r**2) if form != 'full' else (lambda r: r @ r.mT)
    args = [t.clone().requires_grad_() for t in (w.log(), mu, root)]
    assert torch.autograd.gradcheck(lambda a, b, c: f(a.softmax(0), b, cov(c)), args)


def test_float32_in_float32_out():
    p = [t.float() for t in mixture(3, 8, 'diag', 0)]
    for f in (entropy_huber, entropy_pairwise, lambda *q: entropy_pairwise(*q, 'lower'),
              lambda *q: entropy_mc(*q, 30)[0], lambda *q: mutual_information_bound(*q, 0.1),
              lambda *q: conditional_entropy_bound(3., *q, 0.1)):
        leaves = [t.clone().requires_grad_() for t in p]
        h = f(*leaves)
        h.backward()
        assert h.dtype == torch.float32 and leaves[2].grad.dtype == torch.float32 and leaves[2].grad.isfinite().all()


@pytest.mark.parametrize('sum_to', [1.0008, 0.9993])
def test_weights_that_were_rounded_cost_no_nats(sum_to):
    # m/2 log(2 pi e s) multiplies the sum of the weights: at m = 512, 8e-4 too much used to be a nat
    w, mu = torch.tensor([.5, sum_to - .5]).double(), torch.zeros(2, 512).double()
    for s in (torch.zeros(2).double(), torch.zeros(2, 512).double()):
        for bound, want in (('huber', math.log(2)), ('pairwise', 0.), ('lower', 0.)):
            assert mutual_information_bound(w, mu, s, 0.025, bound).item() == pytest.approx(want, abs=1e-6)
    one = w/w.sum()
    for f in (entropy_huber, entropy_pairwise, lambda *p: entropy_mc(*p, 20, rng(0))[0]):
        assert f(w, mu, mu + 1).item() == pytest.approx(f(one, mu, mu + 1).item(), rel=1e-14)


def test_bfloat16_weights_tell_at_most_log_k():
    for seed in range(20):
        w = torch.rand(30, generator=rng(seed)).add(0.5)
        for even in (w/w.sum(), torch.full((30,), 1/30)):  # thirty times 1/30 is 1.0034 in bfloat16
            leak = mutual_information_bound(even.bfloat16(), torch.zeros(30, 512), torch.zeros(30, 512), 0.025)
            assert 0 < leak <= math.log(30) + 1e-6


def test_gradients_of_the_weights_stay_on_the_simplex():
    w, mu, s = mixture(3, 2, 'diag', 0)
    leaf = w.clone().requires_grad_()
    for f in (entropy_huber, entropy_pairwise):
        grad, = torch.autograd.grad(f(leaf, mu, s), leaf)
        assert abs(grad @ w) < 1e-12 and torch.autograd.gradcheck(lambda v: f(v, mu, s), leaf)


@some
@given(k=st.integers(1, 5), m=st.integers(1, 5), form=st.sampled_from(TYPES), std=st.floats(0.05, 3),
       seed=st.integers(0, 99))
def test_hubers_bound_is_eq_16_and_the_order_holds(k, m, form, std, seed):
    w, mu, s = mixture(k, m, form, seed)
    eye = torch.eye(m, dtype=torch.float64)
    ratio = torch.linalg.slogdet(dense(s, m) + std**2*eye)[1] - m*math.log(std**2)
    want = (w*(-w.log() + ratio/2)).sum().item()
    huber, pair, low = (mutual_information_bound(w, mu, s, std, b).item() for b in ('huber', 'pairwise', 'lower'))
    assert huber == pytest.approx(want, abs=1e-9) and -1e-9 <= low <= pair + 1e-9 <= huber + 2e-9
    assert conditional_entropy_bound(7., w, mu, s, std).item() == pytest.approx(7 - want, abs=1e-9)


@pytest.mark.parametrize('form', TYPES)
def test_monte_carlo_rung(form):
    w, mu, s = mixture(3, 4, form, 3, gap=0.6)
    value, error = mutual_information_bound(w, mu, s, 0.4, 'mc', n_samples=20_000, generator=rng(0))
    z = twin(w, mu, add_noise(s, 0.4))
    torch.manual_seed(0)
    plain = -z.log_prob(z.sample((20_000,))) - 4*(ENTROPY_2PIE/2 + math.log(0.4))
    assert abs(value - plain.mean()) < 5*(error**2 + plain.var()/20_000).sqrt() and 0 < error < 0.02
    low, up = (mutual_information_bound(w, mu, s, 0.4, b) for b in ('lower', 'pairwise'))
    assert low < value + 5*error and value - 5*error < up
    h, h_error = conditional_entropy_bound(3., w, mu, s, 0.4, 'mc', n_samples=20_000, generator=rng(0))
    assert h.item() == pytest.approx(3 - value.item()) and h_error == error
    half = mutual_information_bound(w.float(), mu.float(), s.float(), 0.4, 'mc', n_samples=20)
    assert [t.dtype for t in half] == [torch.float32]*2
    leaf = mu.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: mutual_information_bound(w, v, s, 0.4, 'mc', 12, rng(0))[0], leaf)


@some
@given(kind=st.sampled_from(['heavy tails', 'shell', 'corners', 'cube', 'line']), n=st.integers(2, 40),
       m=st.integers(1, 4), k=st.integers(1, 6), form=st.sampled_from(TYPES), std=st.floats(0.05, 2),
       sharp=st.sampled_from([0., 1., 30.]), reg=st.sampled_from([0., 0.1]), seed=st.integers(0, 999))
def test_upper_bounds_hold_without_a_mixture(kind, n, m, k, form, std, sharp, reg, seed):
    x = law(kind, n, m, seed)
    r = (sharp*torch.randn(n, k, generator=rng(seed + 1), dtype=torch.float64)).softmax(1)
    w, mu, s = soft_moments(x, r, form, reg)
    exact, error = truth_mc(x, std, 1500, seed)
    huber, pair = (mutual_information_bound(w, mu, s, std, b).item() for b in ('huber', 'pairwise'))
    assert exact - 5*error - 1e-6 <= pair <= huber + 1e-9
    # the link between: the cross-entropy of the noisy law against the mixture with these moments
    z = x[torch.arange(6000) % n] + std*torch.randn(6000, m, generator=rng(seed + 2), dtype=torch.float64)
    cross = -twin(w, mu, add_noise(s, std)).log_prob(z) - m*(ENTROPY_2PIE/2 + math.log(std))
    slack = 5*cross.std().item()/6000**0.5 + 1e-6
    assert exact - 5*error - slack <= cross.mean().item() <= pair + slack


def test_upper_bounds_without_a_mixture_by_quadrature():
    x = torch.tensor([-2., -1.9, 0., 0.3, 5.]).double()[:, None]
    t = np.linspace(-12, 15, 20_001)
    for std in (0.05, 0.3, 1.5):
        p = stats.norm.pdf(t[:, None], x[:, 0], std).mean(1)
        exact = integrate.simpson(-p*np.log(p + 1e-300), x=t) - stats.norm(scale=std).entropy()
        for seed in range(10):
            r = torch.randn(5, 3, generator=rng(seed)).double().softmax(1)
            for b in ('huber', 'pairwise'):
                for form in TYPES: assert mutual_information_bound(*soft_moments(x, r, form), std, b) >= exact - 1e-9
        assert truth_mc(x, std, 40_000, 0)[0] == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize('form', TYPES)
def test_upper_bounds_hold_for_the_data_after_any_number_of_em_steps(form):
    x = law('heavy tails', 60, 3, 4).clamp(-9, 9)
    for steps in (1, 2, 5):
        gm = GaussianMixture(5, covariance_type=form, tol=0, max_iter=steps, random_state=0).fit(x)
        for std in (0.1, 0.5, 2.):
            exact, error = truth_mc(x, std, 3000, 0)
            pair, huber = (mutual_information_bound(gm.weights_, gm.means_, gm.covariances_, std, b).item()
                           for b in ('pairwise', 'huber'))
            assert exact - 5*error <= pair <= huber + 1e-9


def test_the_lower_bound_needs_the_mixture():
    x = torch.tensor([[-1.], [1.]]).double()  # one bit; one Gaussian of the same moments carries more
    w, mu, s = soft_moments(x, torch.ones(2, 1).double(), 'diag')
    assert mutual_information_bound(w, mu, s, 0.1, 'lower') > math.log(2) > truth_mc(x, 0.1, 500, 0)[0] - 1e-9


def test_linear_gaussian_mutual_information_is_exact():
    # one component: I = 1/2 log|I + Sigma / noise^2| whatever the bound
    _, mu, s = mixture(1, 4, 'full', 0)
    want = 0.5*torch.linalg.slogdet(torch.eye(4).double() + s[0]/0.3**2)[1].item()
    for b in ('huber', 'pairwise', 'lower'):
        assert mutual_information_bound(torch.ones(1).double(), mu, s, 0.3, b).item() == pytest.approx(want, abs=1e-9)


def test_point_clusters_tell_at_most_their_label():
    # singular covariances: z_hat is one of k points, I(z; z_hat) = H(c) - H(c|z) <= log k
    w, mu, _ = mixture(4, 3, 'diag', 0, gap=1.)
    for s in (torch.zeros(4).double(), torch.zeros(4, 3).double(), torch.zeros(4, 3, 3).double()):
        h_c = Categorical(w).entropy().item()
        assert mutual_information_bound(w, mu, s, 0.5).item() == pytest.approx(h_c, abs=1e-9)
        low, pair = (mutual_information_bound(w, mu, s, 0.5, b) for b in ('lower', 'pairwise'))
        assert low < pair < h_c


def test_expected_posterior_of_two_clusters_by_quadrature():
    w, mu, s = (torch.tensor(t, dtype=torch.float64) for t in ([0.3, 0.7], [[-1.], [1.]], [0.2, 0.5]))
    std = 0.6
    p = [stats.norm(mu[i, 0].item(), math.sqrt(s[i].item() + std**2)) for i in range(2)]

    def integrand(v):
        joint = [w[i].item()*p[i].pdf(v) for i in range(2)]
        return sum(j*j for j in joint)/sum(joint)
    exact = integrate.quad(integrand, -12, 12, limit=200)[0]
    value, error = expected_posterior(w, mu, s, std, 40_000, rng(0))
    assert abs(value - exact) < 4*error and error < 3e-3


def test_expected_posterior_limits():
    w, mu, s = mixture(4, 3, 'diag', 0, gap=100.)
    assert expected_posterior(w, mu, s, 0., 400, rng(0))[0].item() == pytest.approx(1)
    assert expected_posterior(w, mu, s, 1e6, 400, rng(0))[0].item() == pytest.approx(w.square().sum().item(), abs=1e-3)


# the error of the estimate where overlaps are rare

@pytest.mark.parametrize('weights', [(0.5, 0.5), (0.05, 0.95)])
@pytest.mark.parametrize('variances', [(1., 1.), (1., 0.05)])
@pytest.mark.parametrize('gap', [4., 7., 10.])
def test_two_errors_cover_the_truth_where_components_hardly_overlap(weights, variances, gap):
    p = torch.tensor(weights).double(), torch.tensor([[0.], [gap]]).double(), torch.tensor(variances).double()
    exact = entropy_quadrature(*p, points=100_001)
    runs = torch.tensor([[v.item() for v in entropy_mc(*p, 1000, rng(i))] for i in range(60)]).double()
    assert ((runs[:, 0] - exact).abs() <= 2*runs[:, 1]).double().mean() >= 0.9
    # utility is a mean of rare events too
    t = torch.linspace(-15, gap + 15, 100_001).double()[:, None]
    joint = (component_log_prob(t, *p[1:]) + p[0].log()).exp()
    right = torch.trapezoid(joint.square().sum(1)/joint.sum(1).clamp_min(1e-300), t[:, 0])
    runs = torch.tensor([[v.item() for v in expected_posterior(*p, 0., 1000, rng(i))] for i in range(60)]).double()
    assert ((runs[:, 0] - right).abs() <= 2*runs[:, 1]).double().mean() >= 0.9


def test_the_allowance_for_rare_events_fades():
    p = mixture(3, 2, 'diag', 0, gap=1.)
    few, many = (entropy_mc(*p, n, rng(0))[1] for n in (3000, 300_000))
    assert many.item() == pytest.approx(few.item()/10, rel=0.05)  # as a standard error does, not as 1/n


@some
@given(k=st.integers(1, 5), form=st.sampled_from(TYPES), gap=st.sampled_from([0.1, 1., 10.]), seed=st.integers(0, 99))
def test_quadrature_is_the_entropy(k, form, gap, seed):
    w, mu, s = mixture(k, 1, form, seed, gap)
    exact = entropy_quadrature(w, mu, s).item()
    p, reach = twin(w, mu, s), 15 + mu.abs().max().item()
    t = torch.linspace(-reach, reach, 40_001).double()
    log_p = p.log_prob(t[:, None])
    assert exact == pytest.approx(-integrate.simpson((log_p.exp()*log_p).numpy(), x=t.numpy()), abs=1e-8)


# covariances that are larger than the clusters' own

HALF, CENTRE = torch.tensor([.5, .5]).double(), torch.zeros(2, 1).double()


def test_wider_components_may_lower_the_pairwise_bound_and_never_hubers():
    narrow, wide = torch.tensor([.1, .5]).double(), torch.tensor([.2, .5]).double()
    before, after = (entropy_pairwise(HALF, CENTRE, s).item() for s in (narrow, wide))
    assert before == pytest.approx(0.975, abs=5e-4) and after == pytest.approx(0.949, abs=5e-4)
    assert after > entropy_quadrature(HALF, CENTRE, narrow)
    assert entropy_huber(HALF, CENTRE, wide) > entropy_huber(HALF, CENTRE, narrow)


@some
@given(kind=st.sampled_from(['heavy tails', 'shell', 'corners', 'cube', 'line']), n=st.integers(2, 30),
       m=st.integers(1, 3), k=st.integers(1, 5), form=st.sampled_from(TYPES), std=st.floats(0.1, 1),
       factor=st.sampled_from([0.01, 1., 30.]), seed=st.integers(0, 999))
def test_upper_bounds_hold_with_covariances_that_are_too_large(kind, n, m, k, form, std, factor, seed):
    x = law(kind, n, m, seed)
    w, mu, s = soft_moments(x, (5*torch.randn(n, k, generator=rng(seed), dtype=torch.float64)).softmax(1), form)
    some_of_them = (torch.rand(k, generator=rng(seed)) < 0.5).double().reshape(k, *[1]*(s.ndim - 1))
    extra = factor*some_of_them*mixture(k, m, form, seed + 1)[2]
    own, wide = (mutual_information_bound(w, mu, v, std, 'huber').item() for v in (s, s + extra))
    assert own <= wide + 1e-9
    exact, error = truth_mc(x, std, 1500, seed)
    assert exact - 5*error - 1e-6 <= mutual_information_bound(w, mu, s + extra, std, 'pairwise').item() <= wide + 1e-9
    # the inequality of the proof, exactly: the trace is taken with the clusters' own covariances
    own_s, wide_s, d = dense(add_noise(s, std), m), dense(add_noise(s + extra, std), m), mu[:, None] - mu
    precision = torch.linalg.inv(wide_s)
    trace = torch.einsum('jab,iba->ij', precision, own_s) + torch.einsum('ija,jab,ijb->ij', d, precision, d)
    mean_log_g = -0.5*(m*math.log(2*math.pi) + torch.logdet(wide_s) + trace)
    code = -(w*(w.log() + mean_log_g).logsumexp(1)).sum().item()
    assert code <= entropy_pairwise(w, mu, add_noise(s + extra, std)).item() + 1e-6*max(1, abs(code))


@pytest.mark.parametrize('eps', [0.02, 0.1, 0.3, 0.5, 0.7, 2., 5.])
def test_uniform_signal_in_uniform_noise(eps):
    "The closed form of I(x; x + noise), x ~ U(0, 1), noise ~ U(-eps, eps), and the bounds above it."
    exact = 1/(4*eps) if eps > 0.5 else eps - math.log(2*eps)
    t = np.linspace(-eps, 1 + eps, 200_001)
    p = (np.minimum(t + eps, 1) - np.maximum(t - eps, 0)).clip(1e-300)/(2*eps)
    assert -integrate.trapezoid(p*np.log(p), t) - math.log(2*eps) == pytest.approx(exact, abs=1e-6)
    for k in (1, 2, 5, 20):  # equal pieces of the interval
        mu = (torch.arange(k).double()[:, None] + 0.5)/k
        s = torch.full((k,), 1/(12*k**2) + eps**2/3).double()
        w = torch.full((k,), 1/k)
        pair, huber = (h(w, mu, s).item() - math.log(2*eps) for h in (entropy_pairwise, entropy_huber))
        assert exact < pair <= huber + 1e-9


@pytest.mark.parametrize('call, match', [
    (lambda: entropy_huber(OK[0], OK[1], torch.ones(2, 4)), r'want \[k, m\]'),
    (lambda: entropy_huber(OK[0], OK[1], torch.zeros(2, 3)), '-inf'),
    (lambda: entropy_huber(OK[0], OK[1], -torch.ones(2)), '-inf'),
    (lambda: entropy_huber(OK[0], OK[1], torch.ones(2, 3, 3)), 'covariance 0 is not positive definite'),
    (lambda: entropy_huber(OK[0], OK[1], torch.eye(3).expand(2, 3, 3) + torch.ones(3, 3).triu(1)), 'not symmetric'),
    (lambda: entropy_huber(OK[0]*3, *OK[1:]), 'sum to 1'),
    (lambda: entropy_huber(torch.tensor([1.5, -0.5]), *OK[1:]), '>= 0'),
    (lambda: entropy_huber(torch.tensor([math.nan, 1.]), *OK[1:]), 'weights holds NaN'),
    (lambda: entropy_huber(torch.ones(3)/3, *OK[1:]), r'make it \[2\]'),
    (lambda: entropy_pairwise(OK[0], OK[1]*math.nan, OK[2]), 'NaN or inf'),
    (lambda: entropy_pairwise(*OK, kind='both'), 'choose'),
    (lambda: entropy_mc(OK[0], OK[1], OK[2]*math.inf), 'NaN or inf'),
    (lambda: mutual_information_bound(*OK, 0.), 'noise_std is 0.0; give a finite number > 0'),
    (lambda: mutual_information_bound(*OK, -1.), 'noise_std'),
    (lambda: mutual_information_bound(*OK, math.nan), 'noise_std'),
    (lambda: mutual_information_bound(*OK, 1., 'best'), 'choose'),
    (lambda: mutual_information_bound(*OK, 1., 'paper'), 'choose one of huber, pairwise, lower, mc'),
    (lambda: conditional_entropy_bound(math.nan, *OK, 1.), 'h_x'),
    (lambda: conditional_entropy_bound(-math.inf, *OK, 1.), 'h_x'),
    (lambda: add_noise(OK[2], -1.), 'noise_std'),
    (lambda: add_noise(OK[2] - 2, 1.), 'negative'),
    (lambda: add_noise(torch.tensor([[[1., 3.], [3., 1.]]]), 1.5), 'no covariance'),
    (lambda: entropy_mc(*OK, n_samples=0), 'n_samples is 0'),
    (lambda: expected_posterior(*OK, 1., n_samples=2.5), 'n_samples is 2.5'),
    (lambda: expected_posterior(OK[0], OK[1], OK[2]*0, 0.), '-inf'),
    (lambda: cluster_posterior(torch.zeros(4, 2), *OK), 'match them'),
])
def test_bad_input_says_what_to_do(call, match):
    with pytest.raises(ValueError, match=match): call()


def test_a_little_noise_counts_beside_float32_variances():
    w, mu, s = torch.tensor([0.5, 0.5]), torch.tensor([[0., 0.], [1., 1.]]), torch.ones(2, 2, 2)
    assert torch.equal(add_noise(s, 1e-4), add_noise(s.double(), 1e-4))
    one, wide = (expected_posterior(*(t.to(d) for t in (w, mu, s)), 1e-4, generator=rng(0)) for d in (torch.float32, torch.float64))
    assert one[0].item() == pytest.approx(wide[0].item(), rel=1e-5) and one[0].dtype == torch.float32


@pytest.mark.parametrize('call', [
    lambda: entropy_huber(OK[0], OK[1].long(), OK[2]), lambda: entropy_huber(OK[0], OK[1], 1.),
    lambda: mutual_information_bound(OK[0], OK[1], 1., 1.), lambda: add_noise(1., 1.),
])
def test_wrong_types(call):
    with pytest.raises(TypeError, match='torch tensor'): call()


def test_quadrature_knows_no_offset_and_refuses_a_grid_that_is_too_coarse():
    w, mu, s = torch.tensor([.5, .5]).double(), torch.tensor([[0.], [.05]]).double(), torch.tensor([1e-4, 1e-4]).double()
    want = entropy_quadrature(w, mu, s)
    for shift in (1e5, 1e6): assert entropy_quadrature(w, mu + shift, s).item() == pytest.approx(want.item(), rel=1e-4)
    torch.set_default_dtype(torch.bfloat16)
    try: assert torch.equal(entropy_quadrature(w, mu, s), want)
    finally: torch.set_default_dtype(torch.float32)
    with pytest.raises(ValueError, match='points is 0'): entropy_quadrature(w, mu, s, 0)
    with pytest.raises(ValueError, match='2 points are too few'): entropy_quadrature(w, mu, s, 2)
    with pytest.raises(ValueError, match='narrow as 1e-07.*entropy_mc'):
        entropy_quadrature(w, torch.tensor([[0.], [1.]]), torch.tensor([1e-14, 1.]))


def test_noise_whose_square_is_0_is_refused_as_such():
    w, mu, s = torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match='noise_std is 1e-170, and its square 0'): mutual_information_bound(w, mu, s, 1e-170)
