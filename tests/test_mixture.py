"cem_nb.mixture against scikit-learn, torch.distributions and dense algebra."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from laws import NAN, TYPES, blobs, dense, mixture, rng, some, twin
from scipy import stats
from sklearn.mixture import GaussianMixture as SkMixture
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from cem_nb.kmeans import assign, kmeans
from cem_nb.mixture import GaussianMixture, _second_pass, component_log_prob, m_step


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_features_are_upcast(dtype):
    x = blobs(200, 3, 3)[0].to(dtype)
    c, l = kmeans(x, 3, generator=rng(0))
    want = kmeans(x.double(), 3, generator=rng(0))
    assert c.dtype == torch.float32 and torch.equal(l, want[1]) and torch.allclose(c.double(), want[0], rtol=1e-6)
    a, b = (GaussianMixture(3, random_state=0).fit(v) for v in (x, x.double()))
    assert torch.equal(a.covariances_, b.covariances_) and torch.equal(assign(x, c), l)


def test_blocks_change_nothing(monkeypatch):
    import cem_nb.kmeans as E
    x, _ = blobs(257, 7, 4, gap=1.)
    fits = []
    for block in (1, 64, 2**19):
        monkeypatch.setattr(E, 'BLOCK', block)
        gm = GaussianMixture(4, tol=0, max_iter=5, random_state=0).fit(x)
        fits.append(torch.cat([gm.means_, gm.covariances_, gm.weights_[:, None]], 1))
    assert torch.allclose(fits[0], fits[2], rtol=1e-10) and torch.allclose(fits[1], fits[2], rtol=1e-10)


@pytest.mark.parametrize('form', TYPES)
@pytest.mark.parametrize('steps', [1, 2, 7])
def test_em_steps_match_scikit_learn(form, steps):
    x, _ = blobs(400, 4, 3, gap=1.)
    w, mu, s = mixture(3, 4, form, 5, gap=1.)
    ours = GaussianMixture(3, covariance_type=form, tol=0, max_iter=steps, warm_start=True)
    ours.weights_, ours.means_, ours.covariances_ = w, mu, s
    ours.fit(x)
    precision = 1/s if form != 'full' else torch.linalg.inv(s)
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
    x = 1e3 + 1e-2*torch.randn(500, 3, generator=rng(0))
    x[:, 2] = 1e3
    gm = GaussianMixture(2, covariance_type=form, reg_covar=1e-9, random_state=0).fit(x)
    s = dense(gm.covariances_, 3)
    assert torch.linalg.eigvalsh(s).min() > 0
    w, gap = gm.weights_, gm.means_ - gm.weights_ @ gm.means_
    total = (w[:, None, None]*s).sum(0).diagonal() + w @ gap.square()
    want = x.double().var(0, correction=0)
    if form != 'spherical': assert torch.allclose(total, want + 1e-9, rtol=1e-6, atol=1e-12)
    else: assert torch.allclose(total.sum(), want.sum() + 3e-9, rtol=1e-6)


@pytest.mark.parametrize('form', TYPES)
def test_rounding_never_takes_a_variance_below_reg_covar(form):
    for seed in range(20):  # two clusters of no width at all, far apart
        x = (1e3*torch.randn(2, 3, generator=rng(seed))).repeat_interleave(7, 0)
        s = GaussianMixture(2, covariance_type=form, reg_covar=1e-12, random_state=0).fit(x).covariances_
        assert torch.linalg.eigvalsh(dense(s, 3)).min() >= 0.99e-12


@pytest.mark.parametrize('form', TYPES)
@pytest.mark.parametrize('far', [1e4, 1e8, 1e10])
def test_one_far_outlier_spoils_no_variance(form, far):
    x = 0.1*torch.randn(300, 2, generator=rng(0), dtype=torch.float64)
    gm = GaussianMixture(2, covariance_type=form, random_state=0, reg_covar=1e-6)
    gm.fit(torch.cat([x, torch.full((1, 2), far, dtype=torch.float64)]))
    near = gm.means_[:, 0].argmin()
    want = {'full': x.T.cov(correction=0) + 1e-6*torch.eye(2), 'diag': x.var(0, correction=0) + 1e-6,
            'spherical': x.var(0, correction=0).mean() + 1e-6}[form]
    assert torch.allclose(gm.covariances_[near], want.double(), rtol=1e-4, atol=1e-12)  # 1e10 + x itself rounds by 1e-6
    lone = dense(gm.covariances_, 2)[1 - near]
    assert torch.allclose(lone, 1e-6*torch.eye(2).double(), rtol=1e-9, atol=1e-9 if form == 'full' else 1e-15)
    assert gm.weights_[near].item() == pytest.approx(300/301)


def test_the_second_pass_agrees_with_the_first_where_both_are_accurate():
    x = torch.randn(200, 5, generator=rng(0), dtype=torch.float64)
    resp = torch.randn(200, 3, generator=rng(1), dtype=torch.float64).softmax(1)
    resp[:50, 0] = 0
    _, mu, s = m_step(x, resp, 'diag', 0.)
    for i in range(3):
        for off in (0., 0.1): assert torch.allclose(_second_pass(x, resp[:, i], mu[i] + off), s[i], rtol=1e-12)


def test_rank_one_cluster_has_a_rank_one_covariance():
    d = torch.tensor([1., 2., 2.], dtype=torch.float64)/3
    x = torch.randn(50, 1, generator=rng(0), dtype=torch.float64)*d
    gm = GaussianMixture(1, covariance_type='full', reg_covar=1e-8).fit(x)
    values = torch.linalg.eigvalsh(gm.covariances_[0])
    assert torch.allclose(values[:2], torch.full((2,), 1e-8).double(), rtol=1e-5)
    assert values[2].item() == pytest.approx((x @ d).var(correction=0).item() + 1e-8)


@pytest.mark.parametrize('form', TYPES)
def test_samples_follow_the_mixture(form):
    gm = GaussianMixture(3, covariance_type=form)
    gm.weights_, gm.means_, gm.covariances_ = w, mu, s = mixture(3, 2, form, 7)
    x, label = gm.sample(40_000, generator=rng(0))
    share = label.bincount(minlength=3)/40_000
    assert ((share - w).abs() < 5*(w*(1 - w)/40_000).sqrt()).all()
    assert stats.chisquare(label.bincount(minlength=3), 40_000*w).pvalue > 1e-3
    for i in range(3): assert torch.allclose(x[label == i].T.cov(), dense(s, 2)[i], atol=0.08)
    assert torch.equal(gm.sample(5, generator=rng(1))[0], gm.sample(5, generator=rng(1))[0])


def test_diagonal_density_matches_a_product_of_normals_at_512_dimensions():
    w, mu, s = mixture(6, 512, 'diag', 0)
    x = torch.randn(50, 512, generator=rng(1), dtype=torch.float64) + 100
    p = MixtureSameFamily(Categorical(w), Independent(Normal(mu + 100, s.sqrt()), 1))
    gm = GaussianMixture(6)
    gm.weights_, gm.means_, gm.covariances_ = w, mu + 100, s
    assert torch.allclose(gm.score_samples(x), p.log_prob(x), rtol=1e-10)


def test_a_failed_refit_leaves_the_mixture_as_it_was():
    gm = GaussianMixture(1, reg_covar=0., warm_start=True).fit(torch.randn(20, 2, generator=rng(0)) + 5)
    before = gm.means_.clone()
    with pytest.raises(ValueError): gm.fit(torch.ones(4, 2))
    assert torch.equal(gm.means_, before)


@pytest.mark.parametrize('call, match', [
    (lambda: GaussianMixture(2).fit(NAN), 'NaN or inf'),
    (lambda: GaussianMixture(5).fit(torch.zeros(4, 2)), 'more rows or fewer'),
    (lambda: GaussianMixture(2, covariance_type='tied'), 'choose'),
    (lambda: GaussianMixture(2, reg_covar=-1.), 'reg_covar'),
    (lambda: GaussianMixture(2, reg_covar=math.nan), 'reg_covar'),
    (lambda: GaussianMixture(0), 'n_components is 0'),
    (lambda: GaussianMixture(1, max_iter=0), 'max_iter is 0'),
    (lambda: GaussianMixture(1, n_init=1.5), 'n_init is 1.5'),
    (lambda: GaussianMixture(1, tol=math.nan), 'tol is nan'),
    (lambda: GaussianMixture(1, random_state=True), 'random_state is True'),
    (lambda: GaussianMixture(2).predict(torch.zeros(4, 2)), 'call fit first'),
    (lambda: GaussianMixture(2).sample(3), 'call fit first'),
    (lambda: GaussianMixture(1).fit(torch.randn(4, 2)).predict(torch.zeros(4, 3)), 'match them'),
    (lambda: GaussianMixture(1).fit(torch.randn(4, 2)).score(NAN), 'NaN or inf'),
    (lambda: GaussianMixture(1, warm_start=True).fit(torch.randn(4, 2)).fit(torch.randn(4, 3)), 'warm start'),
    (lambda: GaussianMixture(1, reg_covar=0., covariance_type='full').fit(torch.ones(4, 2)), 'not positive definite'),
    (lambda: GaussianMixture(1, reg_covar=0.).fit(torch.ones(4, 2)), 'reg_covar'),
    (lambda: component_log_prob(torch.zeros(4, 2), torch.zeros(2, 3), torch.ones(2, 3)), 'match them'),
])
def test_bad_input_says_what_to_do(call, match):
    with pytest.raises(ValueError, match=match): call()


def test_whole_numbers_of_any_kind_are_settings():
    x = torch.randn(40, 2, generator=rng(0))
    a, b = GaussianMixture(2, random_state=3).fit(x), GaussianMixture(2.0, random_state=np.int64(3)).fit(x)
    assert torch.equal(a.means_, b.means_)


@pytest.mark.parametrize('call', [
    lambda: GaussianMixture(2).fit([[1., 2.]]), lambda: component_log_prob(torch.zeros(4, 2), torch.zeros(2, 2), 1.),
])
def test_wrong_types(call):
    with pytest.raises(TypeError, match='torch tensor'): call()


# large float32 features, which stay in float32

@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr('cem_nb.kmeans.LARGE', 1)


def float32_blobs(n=3000, m=8, k=5, gap=1.): return blobs(n, m, k, gap=gap)[0].float()


@pytest.mark.parametrize('form', TYPES)
def test_a_fit_in_float32_is_that_in_float64(form, large):
    x = float32_blobs()
    a, b = (GaussianMixture(5, covariance_type=form, tol=0, max_iter=10, random_state=0).fit(v) for v in (x, x.double()))
    assert a.means_.dtype == a.covariances_.dtype == torch.float64
    assert torch.allclose(a.means_, b.means_, atol=1e-4) and torch.allclose(a.covariances_, b.covariances_, rtol=1e-3, atol=1e-5)
    assert a.lower_bound_ == pytest.approx(b.lower_bound_, abs=1e-4) and torch.allclose(a.weights_, b.weights_, atol=1e-4)


@pytest.mark.parametrize('far', [1e4, 1e8, 1e11])
def test_one_far_outlier_spoils_no_variance_in_float32(far, large):
    x = torch.cat([0.1*torch.randn(300, 2, generator=rng(0)), torch.full((1, 2), far)])
    a, b = (GaussianMixture(2, random_state=0).fit(v) for v in (x, x.double()))
    near = a.means_[:, 0].argmin()
    assert torch.allclose(a.covariances_[near], x[:300].double().var(0, correction=0) + 1e-6, rtol=1e-4)
    assert torch.allclose(a.means_, b.means_, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('offset', [0., 1e3, 1e6])
@pytest.mark.parametrize('width', [1e-3, 1., 30.])
def test_offsets_and_narrow_clusters_in_float32(offset, width, large):
    "Clusters up to a thousand of their own widths apart; what the offset has left of them is given."
    c = 10*torch.randn(4, 6, generator=rng(3))
    x = (c.repeat_interleave(500, 0) + width*torch.randn(2000, 6, generator=rng(4)) + offset).float()
    a, b = (GaussianMixture(4, tol=0, max_iter=5, random_state=0, reg_covar=1e-9).fit(v) for v in (x, x.double()))
    assert torch.allclose(a.covariances_, b.covariances_, rtol=2e-3, atol=1e-8)
    assert a.lower_bound_ == pytest.approx(b.lower_bound_, abs=2e-2)
    assert torch.allclose(a.means_, b.means_, atol=1e-5 + 1e-4*width)


def test_variances_of_nothing_stay_at_reg_covar_in_float32(large):
    x = (1e3*torch.randn(2, 3, generator=rng(0))).repeat_interleave(700, 0)
    s = GaussianMixture(2, reg_covar=1e-12, random_state=0).fit(x).covariances_
    assert torch.allclose(s, torch.full_like(s, 1e-12), rtol=1e-6)


def test_ambient_autocast_changes_no_fit(large):
    x = float32_blobs()
    fit = lambda: GaussianMixture(5, max_iter=5, tol=0, random_state=0).fit(x)
    want = fit()
    with torch.autocast('cpu', torch.bfloat16): got = fit()
    assert got.means_.equal(want.means_) and got.lower_bound_ == want.lower_bound_


@pytest.mark.parametrize('width', [1., 1e-3])
@pytest.mark.parametrize('far', [1e8, 1e12, 1e16])
@pytest.mark.parametrize('form', ['diag', 'full'])
def test_a_far_component_takes_no_digits_from_the_density_of_a_near_one(form, far, width):
    mu, x = torch.tensor([[0., 0.], [far, far]]).double(), width*torch.randn(5, 2, generator=rng(0)).double()
    s = torch.full((2, 2), width**2).double()
    want = torch.distributions.Normal(mu[0], width).log_prob(x).sum(1)
    assert torch.allclose(component_log_prob(x, mu, s if form == 'diag' else s.diag_embed())[:, 0], want, rtol=1e-9)
    gm = GaussianMixture(2)
    gm.weights_, gm.means_, gm.covariances_ = torch.tensor([0.5, 0.5]).double(), mu, s if form == 'diag' else s.diag_embed()
    assert torch.allclose(gm.score_samples(x), want - math.log(2), rtol=1e-9)


def test_rows_far_from_the_origin_and_from_all_components():
    gm = GaussianMixture(2, random_state=0).fit(torch.randn(50, 3, generator=rng(0)))
    score = gm.score_samples(torch.tensor([[0.]*3, [1e155]*3, [1e300]*3], dtype=torch.float64))
    assert score[0].isfinite() and (score[1:] == -math.inf).all()
    c = 1e6 + torch.randn(40, 3, generator=rng(1)).double()
    gm.fit(c)
    each = torch.distributions.MultivariateNormal(gm.means_, gm.covariances_.diag_embed()).log_prob(c[:, None])
    assert torch.allclose(component_log_prob(c, gm.means_, gm.covariances_), each, rtol=1e-7)
    assert torch.allclose(gm.score_samples(c), (each + gm.weights_.log()).logsumexp(1), rtol=1e-7)


def test_what_underflows_is_no_responsibility():
    "So that a second pass looks at the rows of its component alone."
    x = torch.cat([torch.randn(20, 4, generator=rng(0)), 200 + torch.randn(20, 4, generator=rng(1))]).double()
    gm = GaussianMixture(2, random_state=0).fit(x)
    assert ((gm.predict_proba(x) > 0).sum(1) == 1).all()


def test_a_start_from_a_sample_is_no_worse_than_scikit_learns(monkeypatch, large):
    monkeypatch.setattr('cem_nb.mixture.SAMPLE', 40)
    x = float32_blobs(4000, 6, 8)
    ours = [GaussianMixture(8, random_state=s).fit(x).lower_bound_ for s in range(5)]
    theirs = [SkMixture(8, covariance_type='diag', random_state=s).fit(x.numpy()).lower_bound_ for s in range(5)]
    assert np.mean(ours) > np.mean(theirs) - 0.01
