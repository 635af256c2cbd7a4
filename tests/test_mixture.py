"cem_nb.mixture against scikit-learn, torch.distributions, dense algebra, quadrature and finite differences."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import integrate, stats
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.mixture import GaussianMixture as SkMixture
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from cem_nb.mixture import (GaussianMixture, _bhattacharyya, _kl, add_noise, assign, cluster_posterior,
                            component_log_prob, conditional_entropy_bound, entropy_huber, entropy_mc, entropy_pairwise,
                            expected_posterior, kmeans, logdet_gram, logdet_update, mutual_information_bound)

TYPES = ['spherical', 'diag', 'full']
ENTROPY_2PIE = math.log(2 * math.pi * math.e)
some = settings(deadline=None, max_examples=25, derandomize=True)


def rng(seed): return torch.Generator().manual_seed(seed)


def blobs(n=300, m=4, k=3, gap=6., seed=0):
    g = rng(seed)
    label = torch.arange(n) % k
    mu = gap * torch.randn(k, m, generator=g, dtype=torch.float64)
    scale = 0.5 + torch.rand(k, m, generator=g, dtype=torch.float64)
    return mu[label] + scale[label] * torch.randn(n, m, generator=g, dtype=torch.float64), label


def mixture(k, m, form, seed, gap=2.):
    "Random weights, means and covariances of the asked form."
    g = rng(seed)
    w = torch.rand(k, generator=g, dtype=torch.float64) + 0.05
    mu = gap * torch.randn(k, m, generator=g, dtype=torch.float64)
    if form == 'spherical': s = 0.1 + torch.rand(k, generator=g, dtype=torch.float64)
    elif form == 'diag': s = 0.1 + torch.rand(k, m, generator=g, dtype=torch.float64)
    else:
        a = torch.randn(k, m, m, generator=g, dtype=torch.float64)
        s = a @ a.mT / m + 0.1 * torch.eye(m, dtype=torch.float64)
    return w / w.sum(), mu, s


def dense(s, m):
    "Any form of covariances as full matrices."
    return s if s.ndim == 3 else torch.diag_embed(s if s.ndim == 2 else s[:, None].expand(-1, m))


def twin(w, mu, s):
    "The same mixture in torch.distributions."
    return MixtureSameFamily(Categorical(w), MultivariateNormal(mu, dense(s, mu.shape[1])))


# k-means

def test_kmeans_reaches_scikit_learns_optimum_from_the_same_start():
    x, _ = blobs(400, 5, 4, gap=1.5)
    init = x[torch.tensor([0, 7, 50, 90])]
    centers, labels = kmeans(x, 4, init=init, max_iter=300)
    sk = KMeans(4, init=init.numpy(), n_init=1, max_iter=300, tol=0, algorithm='lloyd').fit(x.numpy())
    np.testing.assert_allclose(centers, sk.cluster_centers_, rtol=1e-9)
    np.testing.assert_array_equal(labels, sk.labels_)


def test_kmeans_seeding_is_as_good_as_scikit_learns():
    x, _ = blobs(600, 8, 12, gap=1.)
    cost = lambda c, l: (x - c[l]).square().sum().item()
    ours = [cost(*kmeans(x, 12, max_iter=0, generator=rng(s))) for s in range(60)]
    theirs = [-KMeans(12, init=kmeans_plusplus(x.numpy(), 12, random_state=s)[0], n_init=1, max_iter=1).fit(x.numpy())
              .score(x.numpy()) for s in range(60)]
    plain = [cost(*kmeans(x, 12, max_iter=0, init=x[torch.randperm(600, generator=rng(s))[:12]])) for s in range(60)]
    assert stats.ttest_ind(ours, plain, alternative='less').pvalue < 1e-6
    assert np.mean(theirs) * 0.95 < np.mean(ours)  # one Lloyd round ahead of us, so below
    started = [cost(*kmeans(x, 12, generator=rng(s))) for s in range(60)]
    sk = [KMeans(12, n_init=1, random_state=s).fit(x.numpy()).inertia_ for s in range(60)]
    assert stats.ttest_ind(started, sk).pvalue > 1e-3 and abs(np.mean(started) / np.mean(sk) - 1) < 0.03


def test_seeding_takes_every_distinct_point_before_a_duplicate():
    x = torch.tensor([[0.]] * 50 + [[1.], [2.], [1e3]], dtype=torch.float64)
    for s in range(20):
        c, _ = kmeans(x, 4, max_iter=0, generator=rng(s))
        assert sorted(c[:, 0].tolist()) == [0., 1., 2., 1e3]
    for s in range(60):
        x = torch.randn(12, 5, generator=rng(s))
        assert kmeans(x, 12, max_iter=0, generator=rng(s))[1].unique().numel() == 12


def test_the_first_centre_is_drawn_evenly():
    x = torch.arange(5, dtype=torch.float64)[:, None]
    first = [int(kmeans(x, 1, max_iter=0, generator=rng(s))[0].item()) for s in range(500)]
    assert stats.chisquare(np.bincount(first, minlength=5)).pvalue > 1e-3


@some
@given(n=st.integers(1, 40), m=st.integers(1, 6), k=st.integers(1, 8), offset=st.sampled_from([0., 1e8]),
       seed=st.integers(0, 99))
def test_kmeans_labels_are_nearest_and_centres_are_means(n, m, k, offset, seed):
    k = min(k, n)
    x = torch.randn(n, m, generator=rng(seed), dtype=torch.float64) + offset
    centers, labels = kmeans(x, k, generator=rng(seed))
    d = torch.cdist(x, centers, compute_mode='donot_use_mm_for_euclid_dist')
    assert torch.allclose(d.gather(1, labels[:, None])[:, 0], d.min(1).values, atol=1e-7)
    assert set(labels.tolist()) == set(range(k))  # distinct points: no cluster stays empty
    for i in range(k): assert torch.allclose(centers[i], x[labels == i].mean(0), atol=1e-7)


def test_an_empty_cluster_restarts_at_the_farthest_point():
    x = torch.tensor([[0.], [.1], [.2], [9.]])
    _, labels = kmeans(x, 2, init=torch.tensor([[.1], [1e3]]))
    assert labels[3] not in labels[:3]


def test_more_clusters_than_distinct_points():
    x = torch.tensor([[1., 2.], [1., 2.], [3., 4.]])
    centers, labels = kmeans(x, 3, generator=rng(0))
    assert torch.equal(centers[labels], x) and centers.isfinite().all()


def test_kmeans_warm_start_repeats_and_seed_repeats():
    x, _ = blobs(300, 3, 5, gap=1.)
    c, l = kmeans(x, 5, generator=rng(3))
    assert torch.equal(kmeans(x, 5, generator=rng(3))[0], c)
    again, l2 = kmeans(x, 5, init=c, max_iter=1)
    assert torch.allclose(again, c, atol=1e-12) and torch.equal(l2, l)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_features_are_upcast(dtype):
    x = blobs(200, 3, 3)[0].to(dtype)
    c, l = kmeans(x, 3, generator=rng(0))
    want = kmeans(x.double(), 3, generator=rng(0))
    assert c.dtype == torch.float32 and torch.equal(l, want[1]) and torch.allclose(c.double(), want[0], rtol=1e-6)
    a, b = (GaussianMixture(3, random_state=0).fit(v) for v in (x, x.double()))
    assert torch.equal(a.covariances_, b.covariances_) and torch.equal(assign(x, c), l)


def test_assign_survives_a_common_offset():
    g = rng(0)
    x, mu = torch.randn(500, 8, generator=g), torch.randn(6, 8, generator=g)
    want = torch.cdist(x.double(), mu.double(), compute_mode='donot_use_mm_for_euclid_dist').argmin(1)
    assert torch.equal(assign(x, mu), want)
    assert torch.equal(assign(x.double() + 1e6, mu.double() + 1e6), want)


def test_blocks_change_nothing(monkeypatch):
    import cem_nb.mixture as E
    x, _ = blobs(257, 7, 4, gap=1.)
    fits = []
    for block in (1, 64, 2 ** 19):
        monkeypatch.setattr(E, '_BLOCK', block)
        gm = GaussianMixture(4, tol=0, max_iter=5, random_state=0).fit(x)
        fits.append(torch.cat([gm.means_, gm.covariances_, gm.weights_[:, None]], 1))
    assert torch.allclose(fits[0], fits[2], rtol=1e-10) and torch.allclose(fits[1], fits[2], rtol=1e-10)


# EM

@pytest.mark.parametrize('form', TYPES)
@pytest.mark.parametrize('steps', [1, 2, 7])
def test_em_steps_match_scikit_learn(form, steps):
    x, _ = blobs(400, 4, 3, gap=1.)
    w, mu, s = mixture(3, 4, form, 5, gap=1.)
    ours = GaussianMixture(3, covariance_type=form, tol=0, max_iter=steps, warm_start=True)
    ours.weights_, ours.means_, ours.covariances_ = w, mu, s
    ours.fit(x)
    precision = 1 / s if form != 'full' else torch.linalg.inv(s)
    sk = SkMixture(3, covariance_type=form, tol=0, max_iter=steps, weights_init=w.numpy(), means_init=mu.numpy(),
                   precisions_init=precision.numpy())
    with pytest.warns(Warning): sk.fit(x.numpy())  # not converged: the steps are counted on purpose
    for name in ('weights_', 'means_', 'covariances_'):
        np.testing.assert_allclose(getattr(ours, name), getattr(sk, name), rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(ours.predict_proba(x), sk.predict_proba(x.numpy()), atol=1e-8)
    np.testing.assert_allclose(ours.score_samples(x), sk.score_samples(x.numpy()), rtol=1e-9)
    assert ours.lower_bound_ == pytest.approx(sk.lower_bound_, rel=1e-10) and ours.n_iter_ == sk.n_iter_ == steps
    assert ours.score(x) == pytest.approx(sk.score(x.numpy())) and not ours.converged_
    np.testing.assert_array_equal(ours.predict(x), sk.predict(x.numpy()))


@pytest.mark.parametrize('form', TYPES)
def test_fit_finds_scikit_learns_mixture_on_separated_blobs(form):
    x, label = blobs(600, 4, 3)
    ours = GaussianMixture(3, covariance_type=form, random_state=0, n_init=3).fit(x)
    sk = SkMixture(3, covariance_type=form, random_state=0, n_init=3).fit(x.numpy())
    assert ours.converged_ and ours.lower_bound_ == pytest.approx(sk.lower_bound_, abs=1e-6)
    order = [ours.predict(x)[label == i].mode().values.item() for i in range(3)]
    assert sorted(order) == [0, 1, 2]
    for i, j in enumerate(order):
        part = x[label == i]
        assert torch.allclose(ours.means_[j], part.mean(0), atol=1e-3)
        if form == 'full': assert torch.allclose(ours.covariances_[j], part.T.cov(correction=0), atol=1e-2)


@pytest.mark.parametrize('form', TYPES)
def test_em_never_lowers_the_likelihood(form):
    x, _ = blobs(300, 3, 5, gap=1.)
    gm = GaussianMixture(4, covariance_type=form, tol=0, max_iter=1, warm_start=True, random_state=1, reg_covar=0.)
    bounds = [gm.fit(x).lower_bound_ for _ in range(12)]
    assert (np.diff(bounds) > -1e-12).all() and bounds[-1] > bounds[0] + 1e-3


def test_n_init_keeps_the_best_and_seeds_repeat():
    x, _ = blobs(300, 2, 8, gap=1.)
    g = rng(0)
    singles = [GaussianMixture(8, random_state=g).fit(x).lower_bound_ for _ in range(5)]
    many = GaussianMixture(8, n_init=5, random_state=rng(0)).fit(x)
    assert many.lower_bound_ == max(singles) > min(singles)
    a, b = (GaussianMixture(8, random_state=4).fit(x).means_ for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize('form', TYPES)
def test_float32_variances_stay_positive_far_from_the_origin(form):
    # scikit-learn issue 30382: E[x^2] - E[x]^2 in float32 is negative here
    x = 1e3 + 1e-2 * torch.randn(500, 3, generator=rng(0))
    x[:, 2] = 1e3
    gm = GaussianMixture(2, covariance_type=form, reg_covar=1e-9, random_state=0).fit(x)
    s = dense(gm.covariances_, 3)
    assert torch.linalg.eigvalsh(s).min() > 0
    w, gap = gm.weights_, gm.means_ - gm.weights_ @ gm.means_
    total = (w[:, None, None] * s).sum(0).diagonal() + w @ gap.square()
    want = x.double().var(0, correction=0)
    if form != 'spherical': assert torch.allclose(total, want + 1e-9, rtol=1e-6, atol=1e-12)
    else: assert torch.allclose(total.sum(), want.sum() + 3e-9, rtol=1e-6)


@pytest.mark.parametrize('form', TYPES)
def test_rounding_never_takes_a_variance_below_reg_covar(form):
    for seed in range(20):  # two clusters of no width at all, far apart
        x = (1e3 * torch.randn(2, 3, generator=rng(seed))).repeat_interleave(7, 0)
        s = GaussianMixture(2, covariance_type=form, reg_covar=1e-12, random_state=0).fit(x).covariances_
        assert torch.linalg.eigvalsh(dense(s, 3)).min() >= 0.99e-12


@pytest.mark.parametrize('form', TYPES)
@pytest.mark.parametrize('far', [1e4, 1e8, 1e10])
def test_one_far_outlier_spoils_no_variance(form, far):
    x = 0.1 * torch.randn(300, 2, generator=rng(0), dtype=torch.float64)
    gm = GaussianMixture(2, covariance_type=form, random_state=0, reg_covar=1e-6)
    gm.fit(torch.cat([x, torch.full((1, 2), far, dtype=torch.float64)]))
    near = gm.means_[:, 0].argmin()
    want = {'full': x.T.cov(correction=0) + 1e-6 * torch.eye(2), 'diag': x.var(0, correction=0) + 1e-6,
            'spherical': x.var(0, correction=0).mean() + 1e-6}[form]
    assert torch.allclose(gm.covariances_[near], want.double(), rtol=1e-4, atol=1e-12)  # 1e10 + x itself rounds by 1e-6
    lone = dense(gm.covariances_, 2)[1 - near]
    assert torch.allclose(lone, 1e-6 * torch.eye(2).double(), rtol=1e-9, atol=1e-9 if form == 'full' else 1e-15)
    assert gm.weights_[near].item() == pytest.approx(300 / 301)


def test_the_second_pass_agrees_with_the_first_where_both_are_accurate():
    from cem_nb.mixture import _m_step, _variances
    x = torch.randn(200, 5, generator=rng(0), dtype=torch.float64)
    resp = torch.randn(200, 3, generator=rng(1), dtype=torch.float64).softmax(1)
    resp[:50, 0] = 0
    _, mu, s = _m_step(x, resp, 'diag', 0.)
    for i in range(3):
        for off in (0., 0.1): assert torch.allclose(_variances(x, resp[:, i], mu[i] + off), s[i], rtol=1e-12)


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


def test_rank_one_cluster_has_a_rank_one_covariance():
    d = torch.tensor([1., 2., 2.], dtype=torch.float64) / 3
    x = torch.randn(50, 1, generator=rng(0), dtype=torch.float64) * d
    gm = GaussianMixture(1, covariance_type='full', reg_covar=1e-8).fit(x)
    values = torch.linalg.eigvalsh(gm.covariances_[0])
    assert torch.allclose(values[:2], torch.full((2,), 1e-8).double(), rtol=1e-5)
    assert values[2].item() == pytest.approx((x @ d).var(correction=0).item() + 1e-8)


def test_512_dimensions_in_float32():
    g = rng(0)
    mu = torch.randn(4, 512, generator=g)
    label = torch.arange(400) % 4
    x = mu[label] + 0.1 * torch.randn(400, 512, generator=g)
    gm = GaussianMixture(4, random_state=0, n_init=3).fit(x)
    assert (gm.predict_proba(x).max(1).values > 0.999).all()
    w, m, s = (t.float() for t in (gm.weights_, gm.means_, gm.covariances_))
    wide = entropy_huber(w.double(), m.double(), s.double()).item()
    assert entropy_huber(w, m, s).item() == pytest.approx(wide, rel=1e-6)
    assert mutual_information_bound(w, m, s, 0.025).item() == pytest.approx(
        math.log(4) + 0.5 * (torch.log1p(s / 0.025 ** 2).sum(1).mean()).item(), rel=1e-5)


@pytest.mark.parametrize('form', TYPES)
def test_samples_follow_the_mixture(form):
    gm = GaussianMixture(3, covariance_type=form)
    gm.weights_, gm.means_, gm.covariances_ = w, mu, s = mixture(3, 2, form, 7)
    x, label = gm.sample(40_000, generator=rng(0))
    share = label.bincount(minlength=3) / 40_000
    assert ((share - w).abs() < 5 * (w * (1 - w) / 40_000).sqrt()).all()
    assert stats.chisquare(label.bincount(minlength=3), 40_000 * w).pvalue > 1e-3
    for i in range(3): assert torch.allclose(x[label == i].T.cov(), dense(s, 2)[i], atol=0.08)
    assert torch.equal(gm.sample(5, generator=rng(1))[0], gm.sample(5, generator=rng(1))[0])


# densities

@some
@given(k=st.integers(1, 5), m=st.integers(1, 6), form=st.sampled_from(TYPES), seed=st.integers(0, 999))
def test_densities_match_torch_distributions(k, m, form, seed):
    w, mu, s = mixture(k, m, form, seed)
    x = 3 * torch.randn(20, m, generator=rng(seed), dtype=torch.float64)
    want = MultivariateNormal(mu, dense(s, m)).log_prob(x[:, None])
    assert torch.allclose(component_log_prob(x, mu, s), want, rtol=1e-8, atol=1e-8)
    gm = GaussianMixture(k, covariance_type=form)
    gm.weights_, gm.means_, gm.covariances_ = w, mu, s
    assert torch.allclose(gm.score_samples(x), twin(w, mu, s).log_prob(x), rtol=1e-8, atol=1e-8)
    post = (want + w.log()).softmax(1)
    assert torch.allclose(cluster_posterior(x, w, mu, s), post, atol=1e-8)


def test_diagonal_density_matches_a_product_of_normals_at_512_dimensions():
    w, mu, s = mixture(6, 512, 'diag', 0)
    x = torch.randn(50, 512, generator=rng(1), dtype=torch.float64) + 100
    p = MixtureSameFamily(Categorical(w), Independent(Normal(mu + 100, s.sqrt()), 1))
    gm = GaussianMixture(6)
    gm.weights_, gm.means_, gm.covariances_ = w, mu + 100, s
    assert torch.allclose(gm.score_samples(x), p.log_prob(x), rtol=1e-10)


@pytest.mark.parametrize('form', TYPES)
def test_density_and_bounds_beside_a_component_far_away(form):
    def unit(far):
        s = {'spherical': torch.ones(3), 'diag': torch.ones(3, 1), 'full': torch.ones(3, 1, 1)}[form].double()
        return torch.ones(3).double() / 3, torch.tensor([[0.], [1.], [far]]).double(), s
    x = torch.tensor([[-1.], [0.3], [2.], [1e9], [1e9 + 1]]).double()
    want = Normal(unit(1e9)[1][:, 0], 1.).log_prob(x)
    assert torch.allclose(component_log_prob(x, *unit(1e9)[1:]), want, rtol=1e-12, atol=1e-12)
    for f in (entropy_pairwise, lambda *p: entropy_pairwise(*p, 'lower'), lambda *p: entropy_mc(*p, 900, rng(0))[0]):
        assert f(*unit(1e9)).item() == pytest.approx(f(*unit(1e3)).item(), abs=1e-7)
    w, mu, s = unit(1e9)
    leaf = mu.clone().requires_grad_()
    grad, = torch.autograd.grad(component_log_prob(x[:3], leaf, s)[:, :2].sum(), leaf)
    assert torch.allclose(grad[:2, 0], (x[:3] - mu[:2, 0]).sum(0))


# bounds

@some
@given(k=st.integers(1, 4), m=st.integers(1, 5), form=st.sampled_from(TYPES), gap=st.sampled_from([0.1, 1., 5.]),
       offset=st.sampled_from([0., 1e4]), seed=st.integers(0, 999))
def test_pairwise_distances_match_independent_formulas(k, m, form, gap, offset, seed):
    w, mu, s = mixture(k, m, form, seed, gap)
    mu = mu + offset
    p = [MultivariateNormal(mu[i], dense(s, m)[i]) for i in range(k)]
    kl = torch.stack([torch.stack([torch.distributions.kl_divergence(a, b) for b in p]) for a in p])
    assert torch.allclose(_kl(mu, s), kl, rtol=1e-8, atol=1e-8)
    C, want = dense(s, m).numpy(), np.zeros((k, k))
    for i in range(k):
        for j in range(k):
            mid, d = (C[i] + C[j]) / 2, (mu[i] - mu[j]).numpy()
            dets = [np.linalg.det(c) for c in (mid, C[i], C[j])]
            want[i, j] = d @ np.linalg.inv(mid) @ d / 8 + 0.5 * math.log(dets[0] / math.sqrt(dets[1] * dets[2]))
    np.testing.assert_allclose(_bhattacharyya(mu, s), want, rtol=1e-7, atol=1e-8)
    for kind, D in (('upper', kl.numpy()), ('lower', want)):  # Kolchinsky and Tracey, term by term
        overlap = [sum(w[j].item() * math.exp(-D[i, j]) for j in range(k)) for i in range(k)]
        h = sum(w[i].item() * (p[i].entropy().item() - math.log(overlap[i])) for i in range(k))
        assert entropy_pairwise(w, mu, s, kind).item() == pytest.approx(h, abs=1e-7)


@pytest.mark.parametrize('form', TYPES)
@pytest.mark.parametrize('m', [1, 2])
def test_pairwise_distances_by_quadrature(form, m):
    _, mu, s = mixture(3, m, form, 8, gap=0.8)
    p = [stats.multivariate_normal(mu[i].numpy(), dense(s, m)[i].numpy()) for i in range(3)]
    t = np.linspace(-12, 12, 1201)
    z = np.stack(np.meshgrid(*[t] * m, indexing='ij'), -1)
    log_p, cell = [q.logpdf(z) for q in p], (t[1] - t[0]) ** m
    for i in range(3):
        for j in range(3):
            kl = (np.exp(log_p[i]) * (log_p[i] - log_p[j])).sum() * cell
            b = -math.log(np.exp((log_p[i] + log_p[j]) / 2).sum() * cell)
            assert _kl(mu, s)[i, j].item() == pytest.approx(kl, abs=1e-6)
            assert _bhattacharyya(mu, s)[i, j].item() == pytest.approx(b, abs=1e-6)


@some
@given(k=st.integers(1, 6), m=st.integers(1, 6), form=st.sampled_from(TYPES), gap=st.sampled_from([0.1, 0.7, 2., 10.]),
       seed=st.integers(0, 999))
def test_the_ladder_of_bounds(k, m, form, gap, seed):
    w, mu, s = mixture(k, m, form, seed, gap)
    mc, error = entropy_mc(w, mu, s, 4000, generator=rng(seed))
    slack = 5 * error + 1e-9
    assert entropy_pairwise(w, mu, s, 'lower') <= mc + slack
    assert mc - slack <= entropy_pairwise(w, mu, s, 'upper')
    assert entropy_pairwise(w, mu, s, 'upper') <= entropy_huber(w, mu, s) + 1e-9
    z = twin(w, mu, s).sample((4000,))
    plain = -twin(w, mu, s).log_prob(z)
    assert abs(mc - plain.mean()) < 5 * (error ** 2 + plain.var() / 4000).sqrt() + 1e-9


def test_mc_and_bounds_bracket_the_entropy_by_quadrature():
    w, mu, s = mixture(3, 1, 'diag', 3, gap=1.)
    p = twin(w, mu, s)

    def integrand(v):
        l = p.log_prob(torch.tensor([v], dtype=torch.float64)).item()
        return -math.exp(l) * l
    exact = integrate.quad(integrand, -12, 12, limit=200)[0]
    mc, error = entropy_mc(w, mu, s, 60_000, generator=rng(0))
    assert abs(mc - exact) < 4 * error and error < 5e-3
    assert entropy_pairwise(w, mu, s, 'lower') < exact < entropy_pairwise(w, mu, s) < entropy_huber(w, mu, s)


def test_the_mc_error_bar_covers():
    w, mu, s = mixture(4, 3, 'diag', 2, gap=0.8)
    truth, _ = entropy_mc(w, mu, s, 400_000, generator=rng(10_000))
    runs = torch.tensor([[v.item() for v in entropy_mc(w, mu, s, 400, generator=rng(i))] for i in range(200)])
    z = (runs[:, 0] - truth.item()) / runs[:, 1]
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
    want = (w * MultivariateNormal(mu, dense(s, 3)).entropy()).sum() + Categorical(w).entropy()
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
], ids=['huber', 'upper', 'lower', 'mc', 'mi paper', 'mi pairwise', 'utility'])
def test_gradients_match_finite_differences(form, f):
    w, mu, s = mixture(3, 2, form, 11, gap=0.7)
    root = s.sqrt() if form != 'full' else torch.linalg.cholesky(s)  # steps stay inside the covariances
    cov = (lambda r: r ** 2) if form != 'full' else (lambda r: r @ r.mT)
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
        for bound, want in (('paper', math.log(2)), ('pairwise', 0.), ('lower', 0.)):
            assert mutual_information_bound(w, mu, s, 0.025, bound).item() == pytest.approx(want, abs=1e-6)
    one = w / w.sum()
    for f in (entropy_huber, entropy_pairwise, lambda *p: entropy_mc(*p, 20, rng(0))[0]):
        assert f(w, mu, mu + 1).item() == pytest.approx(f(one, mu, mu + 1).item(), rel=1e-14)


def test_bfloat16_weights_tell_at_most_log_k():
    for seed in range(20):
        w = torch.rand(30, generator=rng(seed)).add(0.5)
        for even in (w / w.sum(), torch.full((30,), 1 / 30)):  # thirty times 1/30 is 1.0034 in bfloat16
            leak = mutual_information_bound(even.bfloat16(), torch.zeros(30, 512), torch.zeros(30, 512), 0.025)
            assert 0 < leak <= math.log(30) + 1e-6


def test_gradients_of_the_weights_stay_on_the_simplex():
    w, mu, s = mixture(3, 2, 'diag', 0)
    leaf = w.clone().requires_grad_()
    for f in (entropy_huber, entropy_pairwise):
        grad, = torch.autograd.grad(f(leaf, mu, s), leaf)
        assert abs(grad @ w) < 1e-12 and torch.autograd.gradcheck(lambda v: f(v, mu, s), leaf)


# mutual information

@some
@given(k=st.integers(1, 5), m=st.integers(1, 5), form=st.sampled_from(TYPES), std=st.floats(0.05, 3),
       seed=st.integers(0, 99))
def test_paper_bound_is_eq_16_and_the_order_holds(k, m, form, std, seed):
    w, mu, s = mixture(k, m, form, seed)
    eye = torch.eye(m, dtype=torch.float64)
    ratio = torch.linalg.slogdet(dense(s, m) + std ** 2 * eye)[1] - m * math.log(std ** 2)
    want = (w * (-w.log() + ratio / 2)).sum().item()
    paper, pair, low = (mutual_information_bound(w, mu, s, std, b).item() for b in ('paper', 'pairwise', 'lower'))
    assert paper == pytest.approx(want, abs=1e-9) and -1e-9 <= low <= pair + 1e-9 <= paper + 2e-9
    assert conditional_entropy_bound(7., w, mu, s, std).item() == pytest.approx(7 - want, abs=1e-9)


@pytest.mark.parametrize('form', TYPES)
def test_monte_carlo_rung(form):
    w, mu, s = mixture(3, 4, form, 3, gap=0.6)
    value, error = mutual_information_bound(w, mu, s, 0.4, 'mc', n_samples=20_000, generator=rng(0))
    z = twin(w, mu, add_noise(s, 0.4))
    torch.manual_seed(0)
    plain = -z.log_prob(z.sample((20_000,))) - 4 * (ENTROPY_2PIE / 2 + math.log(0.4))
    assert abs(value - plain.mean()) < 5 * (error ** 2 + plain.var() / 20_000).sqrt() and 0 < error < 0.02
    low, up = (mutual_information_bound(w, mu, s, 0.4, b) for b in ('lower', 'pairwise'))
    assert low < value + 5 * error and value - 5 * error < up
    h, h_error = conditional_entropy_bound(3., w, mu, s, 0.4, 'mc', n_samples=20_000, generator=rng(0))
    assert h.item() == pytest.approx(3 - value.item()) and h_error == error
    half = mutual_information_bound(w.float(), mu.float(), s.float(), 0.4, 'mc', n_samples=20)
    assert [t.dtype for t in half] == [torch.float32] * 2
    leaf = mu.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: mutual_information_bound(w, v, s, 0.4, 'mc', 12, rng(0))[0], leaf)


# any law at all, not only a mixture

def law(kind, n, m, seed):
    "n equally likely points [n, m] from a law that is no Gaussian mixture."
    g = rng(seed)
    x = torch.randn(n, m, generator=g, dtype=torch.float64)
    if kind == 'heavy tails': return x / torch.rand(n, 1, generator=g, dtype=torch.float64)
    if kind == 'shell': return x / x.norm(dim=1, keepdim=True)
    if kind == 'corners': return x.sign()
    if kind == 'cube': return torch.rand(n, m, generator=g, dtype=torch.float64)
    return x[:1].expand(n, m) * torch.linspace(-1, 1, n, dtype=torch.float64)[:, None].pow(3)  # a crooked line


def soft_moments(x, r, form, reg_covar=0.):
    "pi, mu, Sigma of the clusters that the responsibilities r [n, k] make of x, written out."
    size = r.sum(0)
    mu = r.T @ x / size[:, None]
    full = torch.stack([(r[:, i, None] * (x - mu[i])).T @ (x - mu[i]) / size[i] for i in range(len(size))])
    full = full + reg_covar * torch.eye(x.shape[1]).double()
    diag = full.diagonal(dim1=1, dim2=2)
    return size / len(x), mu, {'full': full, 'diag': diag, 'spherical': diag.mean(1)}[form]


def truth_mc(x, std, draws, seed):
    "I(z; z_hat) of n equally likely points and its error: log n less the mean entropy of which point it was."
    x = x.unique(dim=0, return_inverse=True, return_counts=True)
    points, counts = x[0], x[2].double()
    prior = counts / counts.sum()
    c = torch.multinomial(prior, draws, replacement=True, generator=rng(seed))
    z = points[c] + std * torch.randn(draws, points.shape[1], generator=rng(seed + 1), dtype=torch.float64)
    d2 = (z[:, None] - points).square().sum(2)
    post = (prior.log() - d2 / (2 * std ** 2)).softmax(1)
    doubt = torch.special.entr(post).sum(1)
    return Categorical(prior).entropy().item() - doubt.mean().item(), doubt.std().item() / draws ** 0.5


@some
@given(kind=st.sampled_from(['heavy tails', 'shell', 'corners', 'cube', 'line']), n=st.integers(2, 40),
       m=st.integers(1, 4), k=st.integers(1, 6), form=st.sampled_from(TYPES), std=st.floats(0.05, 2),
       sharp=st.sampled_from([0., 1., 30.]), reg=st.sampled_from([0., 0.1]), seed=st.integers(0, 999))
def test_upper_bounds_hold_without_a_mixture(kind, n, m, k, form, std, sharp, reg, seed):
    x = law(kind, n, m, seed)
    r = (sharp * torch.randn(n, k, generator=rng(seed + 1), dtype=torch.float64)).softmax(1)
    w, mu, s = soft_moments(x, r, form, reg)
    exact, error = truth_mc(x, std, 1500, seed)
    paper, pair = (mutual_information_bound(w, mu, s, std, b).item() for b in ('paper', 'pairwise'))
    assert exact - 5 * error - 1e-6 <= pair <= paper + 1e-9
    # the link between: the cross-entropy of the noisy law against the mixture with these moments
    z = x[torch.arange(6000) % n] + std * torch.randn(6000, m, generator=rng(seed + 2), dtype=torch.float64)
    cross = -twin(w, mu, add_noise(s, std)).log_prob(z) - m * (ENTROPY_2PIE / 2 + math.log(std))
    slack = 5 * cross.std().item() / 6000 ** 0.5 + 1e-6
    assert exact - 5 * error - slack <= cross.mean().item() <= pair + slack


def test_upper_bounds_without_a_mixture_by_quadrature():
    x = torch.tensor([-2., -1.9, 0., 0.3, 5.]).double()[:, None]
    t = np.linspace(-12, 15, 20_001)
    for std in (0.05, 0.3, 1.5):
        p = stats.norm.pdf(t[:, None], x[:, 0], std).mean(1)
        exact = integrate.simpson(-p * np.log(p + 1e-300), x=t) - stats.norm(scale=std).entropy()
        for seed in range(10):
            r = torch.randn(5, 3, generator=rng(seed)).double().softmax(1)
            for b in ('paper', 'pairwise'):
                for form in TYPES: assert mutual_information_bound(*soft_moments(x, r, form), std, b) >= exact - 1e-9
        assert truth_mc(x, std, 40_000, 0)[0] == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize('form', TYPES)
def test_upper_bounds_hold_for_the_data_after_any_number_of_em_steps(form):
    x = law('heavy tails', 60, 3, 4).clamp(-9, 9)
    for steps in (1, 2, 5):
        gm = GaussianMixture(5, covariance_type=form, tol=0, max_iter=steps, random_state=0).fit(x)
        for std in (0.1, 0.5, 2.):
            exact, error = truth_mc(x, std, 3000, 0)
            pair, paper = (mutual_information_bound(gm.weights_, gm.means_, gm.covariances_, std, b).item()
                           for b in ('pairwise', 'paper'))
            assert exact - 5 * error <= pair <= paper + 1e-9


def test_the_lower_bound_needs_the_mixture():
    x = torch.tensor([[-1.], [1.]]).double()  # one bit; one Gaussian of the same moments carries more
    w, mu, s = soft_moments(x, torch.ones(2, 1).double(), 'diag')
    assert mutual_information_bound(w, mu, s, 0.1, 'lower') > math.log(2) > truth_mc(x, 0.1, 500, 0)[0] - 1e-9


def test_linear_gaussian_mutual_information_is_exact():
    # one component: I = 1/2 log|I + Sigma / noise^2| whatever the bound
    _, mu, s = mixture(1, 4, 'full', 0)
    want = 0.5 * torch.linalg.slogdet(torch.eye(4).double() + s[0] / 0.3 ** 2)[1].item()
    for b in ('paper', 'pairwise', 'lower'):
        assert mutual_information_bound(torch.ones(1).double(), mu, s, 0.3, b).item() == pytest.approx(want, abs=1e-9)


def test_point_clusters_tell_at_most_their_label():
    # singular covariances: z_hat is one of k points, I(z; z_hat) = H(c) - H(c|z) <= log k
    w, mu, _ = mixture(4, 3, 'diag', 0, gap=1.)
    for s in (torch.zeros(4).double(), torch.zeros(4, 3).double(), torch.zeros(4, 3, 3).double()):
        h_c = Categorical(w).entropy().item()
        assert mutual_information_bound(w, mu, s, 0.5).item() == pytest.approx(h_c, abs=1e-9)
        low, pair = (mutual_information_bound(w, mu, s, 0.5, b) for b in ('lower', 'pairwise'))
        assert low < pair < h_c


# logdets

@some
@given(n=st.integers(1, 8), m=st.integers(1, 8), s2=st.floats(1e-3, 10), seed=st.integers(0, 999))
def test_logdet_gram_matches_dense(n, m, s2, seed):
    X = torch.randn(2, n, m, generator=rng(seed), dtype=torch.float64)
    want = torch.linalg.slogdet(torch.eye(m).double() + X.mT @ X / (n * s2))[1]
    assert torch.allclose(logdet_gram(X, s2), want, rtol=1e-9, atol=1e-9)
    assert logdet_gram(X[0], s2).item() == pytest.approx(want[0].item(), abs=1e-9)
    padded = torch.cat([X, X.new_zeros(2, 3, m)], 1)
    assert torch.allclose(logdet_gram(padded, s2, n=n), want, rtol=1e-9, atol=1e-9)


@some
@given(n=st.integers(1, 8), m=st.integers(1, 6), w=st.sampled_from([0., 1e-3, 0.5, 20.]), seed=st.integers(0, 999))
def test_logdet_update_matches_dense(n, m, w, seed):
    A = mixture(3, m, 'full', seed)[2]
    X = torch.randn(3, n, m, generator=rng(seed), dtype=torch.float64)
    want = torch.linalg.slogdet(A + w * X.mT @ X)[1]
    assert torch.allclose(logdet_update(torch.linalg.cholesky(A), X, w), want, rtol=1e-9, atol=1e-9)
    ws = torch.tensor([0., w, 2 * w + 1], dtype=torch.float64)  # a weight per cluster
    want = torch.linalg.slogdet(A + ws[:, None, None] * X.mT @ X)[1]
    assert torch.allclose(logdet_update(torch.linalg.cholesky(A), X, ws), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('shape', [(2, 3, 5), (2, 5, 3), (1, 4)])
def test_logdet_gradients(shape):
    X = torch.randn(*shape, generator=rng(0), dtype=torch.float64, requires_grad=True)
    m = shape[-1]
    L = torch.linalg.cholesky(mixture(1, m, 'full', 0)[2][0])
    assert torch.autograd.gradcheck(lambda v: logdet_gram(v, 0.3), X)
    assert torch.autograd.gradcheck(lambda v: logdet_update(L.expand(*shape[:-2], m, m), v, 0.7), X)
    gram, = torch.autograd.grad(logdet_gram(X, 0.3).sum(), X)
    n = shape[-2]
    slow, = torch.autograd.grad(torch.logdet(torch.eye(m).double() + X.mT @ X / (n * 0.3)).sum(), X)
    assert torch.allclose(gram, slow, atol=1e-10)
    up, = torch.autograd.grad(logdet_update(L.expand(*shape[:-2], m, m), X, 0.7).sum(), X)
    slow, = torch.autograd.grad(torch.logdet(L @ L.T + 0.7 * X.mT @ X).sum(), X)
    assert torch.allclose(up, slow, atol=1e-10)


def test_logdet_gram_is_the_full_covariance_term_of_theorem_2():
    X = torch.randn(16, 512, generator=rng(0))
    X = X - X.mean(0)
    got = logdet_gram(X, 0.025 ** 2)
    s = (X.double().T @ X.double() / 16)[None]
    want = mutual_information_bound(torch.ones(1).double(), torch.zeros(1, 512).double(), s, 0.025)
    assert got.dtype == torch.float32 and got.item() / 2 == pytest.approx(want.item(), rel=1e-6)
    assert want < mutual_information_bound(torch.ones(1).double(), torch.zeros(1, 512).double(),
                                           s.diagonal(dim1=1, dim2=2), 0.025)  # Hadamard: the diagonal overstates


# utility

def test_expected_posterior_of_two_clusters_by_quadrature():
    w, mu, s = (torch.tensor(t, dtype=torch.float64) for t in ([0.3, 0.7], [[-1.], [1.]], [0.2, 0.5]))
    std = 0.6
    p = [stats.norm(mu[i, 0].item(), math.sqrt(s[i].item() + std ** 2)) for i in range(2)]

    def integrand(v):
        joint = [w[i].item() * p[i].pdf(v) for i in range(2)]
        return sum(j * j for j in joint) / sum(joint)
    exact = integrate.quad(integrand, -12, 12, limit=200)[0]
    value, error = expected_posterior(w, mu, s, std, 40_000, rng(0))
    assert abs(value - exact) < 4 * error and error < 3e-3


def test_expected_posterior_limits():
    w, mu, s = mixture(4, 3, 'diag', 0, gap=100.)
    assert expected_posterior(w, mu, s, 0., 400, rng(0))[0].item() == pytest.approx(1)
    assert expected_posterior(w, mu, s, 1e6, 400, rng(0))[0].item() == pytest.approx(w.square().sum().item(), abs=1e-3)


# bad input

NAN = torch.full((4, 2), math.nan)
OK = (torch.full((2,), 0.5), torch.zeros(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize('call, match', [
    (lambda: kmeans(NAN, 2), 'NaN or inf'),
    (lambda: kmeans(NAN * 0 + math.inf, 2), 'NaN or inf'),
    (lambda: kmeans(torch.zeros(4), 2), r'shape \[4\]'),
    (lambda: kmeans(torch.zeros(0, 3), 1), 'N, m > 0'),
    (lambda: kmeans(torch.zeros(4, 2), 5), 'choose 1 to 4'),
    (lambda: kmeans(torch.zeros(4, 2), 0), 'choose 1 to 4'),
    (lambda: kmeans(torch.zeros(4, 2), 2, init=torch.zeros(3, 2)), 'init has shape'),
    (lambda: kmeans(torch.zeros(4, 2), 2, init=torch.zeros(2, 3)), 'init'),
    (lambda: assign(NAN, torch.zeros(2, 2)), 'NaN or inf'),
    (lambda: assign(torch.zeros(4, 2), NAN), 'means holds NaN'),
    (lambda: assign(torch.zeros(4, 2), torch.zeros(2, 3)), 'match them'),
    (lambda: GaussianMixture(2).fit(NAN), 'NaN or inf'),
    (lambda: GaussianMixture(5).fit(torch.zeros(4, 2)), 'more rows or fewer'),
    (lambda: GaussianMixture(2, covariance_type='tied'), 'choose'),
    (lambda: GaussianMixture(2, reg_covar=-1.), 'reg_covar'),
    (lambda: GaussianMixture(0), 'start at 1'),
    (lambda: GaussianMixture(2).predict(torch.zeros(4, 2)), 'call fit first'),
    (lambda: GaussianMixture(2).sample(3), 'call fit first'),
    (lambda: GaussianMixture(1).fit(torch.randn(4, 2)).predict(torch.zeros(4, 3)), 'match them'),
    (lambda: GaussianMixture(1).fit(torch.randn(4, 2)).score(NAN), 'NaN or inf'),
    (lambda: GaussianMixture(1, reg_covar=0., covariance_type='full').fit(torch.ones(4, 2)), 'not positive definite'),
    (lambda: GaussianMixture(1, reg_covar=0.).fit(torch.ones(4, 2)), 'reg_covar'),
    (lambda: entropy_huber(OK[0], OK[1], torch.ones(2, 4)), r'want \[k, m\]'),
    (lambda: entropy_huber(OK[0], OK[1], torch.zeros(2, 3)), '-inf'),
    (lambda: entropy_huber(OK[0], OK[1], -torch.ones(2)), '-inf'),
    (lambda: entropy_huber(OK[0], OK[1], torch.ones(2, 3, 3)), 'covariance 0 is not positive definite'),
    (lambda: entropy_huber(OK[0], OK[1], torch.eye(3).expand(2, 3, 3) + torch.ones(3, 3).triu(1)), 'not symmetric'),
    (lambda: entropy_huber(OK[0] * 3, *OK[1:]), 'sum to 1'),
    (lambda: entropy_huber(torch.tensor([1.5, -0.5]), *OK[1:]), '>= 0'),
    (lambda: entropy_huber(torch.tensor([math.nan, 1.]), *OK[1:]), 'sum to 1'),
    (lambda: entropy_huber(torch.ones(3) / 3, *OK[1:]), r'make it \[2\]'),
    (lambda: entropy_pairwise(OK[0], OK[1] * math.nan, OK[2]), 'NaN or inf'),
    (lambda: entropy_pairwise(*OK, kind='both'), 'choose'),
    (lambda: entropy_mc(OK[0], OK[1], OK[2] * math.inf), 'NaN or inf'),
    (lambda: mutual_information_bound(*OK, 0.), 'infinite'),
    (lambda: mutual_information_bound(*OK, -1.), 'noise_std'),
    (lambda: mutual_information_bound(*OK, math.nan), 'noise_std'),
    (lambda: mutual_information_bound(*OK, 1., 'best'), 'choose'),
    (lambda: conditional_entropy_bound(math.nan, *OK, 1.), 'h_x'),
    (lambda: add_noise(OK[2], -1.), 'noise_std'),
    (lambda: expected_posterior(OK[0], OK[1], OK[2] * 0, 0.), '-inf'),
    (lambda: component_log_prob(torch.zeros(4, 2), *OK[1:]), 'match them'),
    (lambda: logdet_gram(torch.zeros(4), 1.), r'\[..., n, m\]'),
    (lambda: logdet_gram(NAN, 1.), 'NaN or inf'),
    (lambda: logdet_gram(torch.zeros(4, 2), 0.), '> 0'),
    (lambda: logdet_gram(torch.zeros(4, 2), 1., n=0), '> 0'),
    (lambda: logdet_update(torch.eye(2), torch.zeros(4, 2), -1.), 'w must be'),
    (lambda: logdet_update(torch.zeros(2, 2), torch.zeros(4, 2), 1.), 'no Cholesky factor'),
    (lambda: logdet_update(torch.eye(3), torch.zeros(4, 2), 1.), 'wide'),
])
def test_bad_input_says_what_to_do(call, match):
    with pytest.raises(ValueError, match=match): call()


@pytest.mark.parametrize('call', [
    lambda: kmeans(np.zeros((4, 2)), 2), lambda: kmeans(torch.zeros(4, 2, dtype=torch.long), 2),
    lambda: GaussianMixture(2).fit([[1., 2.]]), lambda: entropy_huber(OK[0], OK[1].long(), OK[2]),
    lambda: entropy_huber(OK[0], OK[1], 1.), lambda: logdet_gram(torch.zeros(4, 2, dtype=torch.int), 1.),
    lambda: mutual_information_bound(OK[0], OK[1], 1., 1.), lambda: add_noise(1., 1.),
])
def test_wrong_types(call):
    with pytest.raises(TypeError, match='torch tensor|floating'): call()


def test_a_failed_refit_leaves_the_mixture_as_it_was():
    gm = GaussianMixture(1, reg_covar=0., warm_start=True).fit(torch.randn(20, 2, generator=rng(0)) + 5)
    before = gm.means_.clone()
    with pytest.raises(ValueError): gm.fit(torch.ones(4, 2))
    assert torch.equal(gm.means_, before)
