"cem_nb.kmeans against scikit-learn and its own definition."
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from laws import NAN, blobs, rng, some
from scipy import stats
from sklearn.cluster import KMeans, kmeans_plusplus

from cem_nb.kmeans import assign, kmeans, lloyd


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
    ours_after_one = [cost(*kmeans(x, 12, max_iter=1, generator=rng(s))) for s in range(60)]
    theirs = [-KMeans(12, init=kmeans_plusplus(x.numpy(), 12, random_state=s)[0], n_init=1, max_iter=1).fit(x.numpy())
              .score(x.numpy()) for s in range(60)]
    plain = [cost(*kmeans(x, 12, max_iter=0, init=x[torch.randperm(600, generator=rng(s))[:12]])) for s in range(60)]
    assert stats.ttest_ind(ours, plain, alternative='less').pvalue < 1e-6
    assert np.mean(ours_after_one) < 1.05*np.mean(theirs)  # both after one round
    started = [cost(*kmeans(x, 12, generator=rng(s))) for s in range(60)]
    sk = [KMeans(12, n_init=1, random_state=s).fit(x.numpy()).inertia_ for s in range(60)]
    assert stats.ttest_ind(started, sk).pvalue > 1e-3 and abs(np.mean(started)/np.mean(sk) - 1) < 0.03


def test_seeding_takes_every_distinct_point_before_a_duplicate():
    x = torch.tensor([[0.]]*50 + [[1.], [2.], [1e3]], dtype=torch.float64)
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


def all_rows_and_all_centres(x, centers, max_iter):
    "Lloyd's algorithm as it is told: nothing is carried from round to round."
    near = lambda: torch.cdist(x, centers.to(x.dtype), compute_mode='donot_use_mm_for_euclid_dist').min(1)
    d, labels = near()
    for _ in range(max_iter):
        for i in range(len(centers)):
            if (labels == i).any(): centers[i] = x[labels == i].double().mean(0)
        empty = [i for i in range(len(centers)) if not (labels == i).any()]
        if empty: centers[empty] = x[near()[0].topk(len(empty)).indices].double()
        before, (d, labels) = labels, near()
        if labels.equal(before): break
    return centers, labels


@some
@given(n=st.integers(5, 300), m=st.integers(1, 5), k=st.integers(1, 9), seed=st.integers(0, 99),
       max_iter=st.sampled_from([0, 1, 3, 4, 100]), dtype=st.sampled_from([torch.float32, torch.float64]),
       apart=st.sampled_from([0., 1., 30.]))
def test_bounds_change_nothing(n, m, k, seed, max_iter, dtype, apart):
    g, k = rng(seed), min(k, n)
    x = torch.randn(n, m, generator=g) + apart*torch.randn(k, m, generator=g)[torch.arange(n) % k]
    x = (x - x.mean(0)).to(dtype)
    start = x[torch.randperm(n, generator=g)[:k]].double()
    (a, la), (b, lb) = lloyd(x, start.clone(), max_iter), all_rows_and_all_centres(x, start.clone(), max_iter)
    assert torch.equal(la, lb) and torch.allclose(a, b, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize('far', [1e4, 1e6, 1e8])
def test_rows_far_from_all_centres_are_told_apart_in_float32(far):
    centers, x = torch.randn(30, 64, generator=rng(0)), far*torch.randn(500, 64, generator=rng(1))
    want = (centers.double().square().sum(1) - 2*x.double() @ centers.double().T).argmin(1)
    assert (lloyd(x, centers.double(), 0)[1] == want).double().mean() > 0.999


@pytest.mark.parametrize('rounds', [2, 3, 100])
def test_a_row_that_has_left_a_cluster_leaves_no_rounding_there(rounds):
    "The outlier begins in the cluster of the small rows, for its centre is in the middle."
    x = torch.cat([1e-3*torch.randn(200, 2, generator=rng(0)).double(), torch.full((1, 2), 1e14)])
    centers, labels = lloyd(x, torch.tensor([[4e13, 4e13], [-1e14, -1e14]]).double(), rounds)
    small = labels[0]
    assert (labels[:200] == small).all() and labels[200] != small
    assert torch.allclose(centers[small], x[:200].mean(0), rtol=1e-9, atol=1e-18)


def test_an_empty_cluster_restarts_at_the_farthest_point():
    x = torch.tensor([[0.], [.1], [.2], [9.]])
    _, labels = kmeans(x, 2, init=torch.tensor([[.1], [1e3]]))
    assert labels[3] not in labels[:3]


def test_more_clusters_than_distinct_points():
    x = torch.tensor([[1., 2.], [1., 2.], [3., 4.]])
    centers, labels = kmeans(x, 3, generator=rng(0))
    assert torch.equal(centers[labels], x) and centers.isfinite().all()


def test_ambient_autocast_changes_nothing(monkeypatch):
    monkeypatch.setattr('cem_nb.kmeans.LARGE', 1)
    x = blobs(500, 6, 5, gap=1.)[0].float()
    want = kmeans(x, 5, generator=rng(0))
    with torch.autocast('cpu', torch.bfloat16): assert all(map(torch.equal, kmeans(x, 5, generator=rng(0)), want))


def test_kmeans_warm_start_repeats_and_seed_repeats():
    x, _ = blobs(300, 3, 5, gap=1.)
    c, l = kmeans(x, 5, generator=rng(3))
    assert torch.equal(kmeans(x, 5, generator=rng(3))[0], c)
    again, l2 = kmeans(x, 5, init=c, max_iter=1)
    assert torch.allclose(again, c, atol=1e-12) and torch.equal(l2, l)


def test_assign_survives_a_common_offset():
    g = rng(0)
    x, mu = torch.randn(500, 8, generator=g), torch.randn(6, 8, generator=g)
    want = torch.cdist(x.double(), mu.double(), compute_mode='donot_use_mm_for_euclid_dist').argmin(1)
    assert torch.equal(assign(x, mu), want)
    assert torch.equal(assign(x.double() + 1e6, mu.double() + 1e6), want)


@pytest.mark.parametrize('call, match', [
    (lambda: kmeans(NAN, 2), 'NaN or inf'),
    (lambda: kmeans(NAN*0 + torch.inf, 2), 'NaN or inf'),
    (lambda: kmeans(torch.zeros(4), 2), r'shape \[4\]'),
    (lambda: kmeans(torch.zeros(0, 3), 1), 'for 0 rows'),
    (lambda: kmeans(torch.zeros(4, 0), 1), 'none of them empty'),
    (lambda: kmeans(torch.zeros(4, 2), 5), 'give 1 to 4'),
    (lambda: kmeans(torch.zeros(4, 2), 0), 'n_components is 0'),
    (lambda: kmeans(torch.zeros(4, 2), 2, max_iter=-3), 'max_iter is -3'),
    (lambda: kmeans(torch.zeros(4, 2), 2, init=torch.zeros(3, 2)), 'init has shape'),
    (lambda: kmeans(torch.zeros(4, 2), 2, init=torch.zeros(2, 3)), 'init'),
    (lambda: kmeans(torch.zeros(4, 2), 2, init=NAN[:2]), 'init holds NaN'),
    (lambda: assign(NAN, torch.zeros(2, 2)), 'NaN or inf'),
    (lambda: assign(torch.zeros(4, 2), NAN), 'means holds NaN'),
    (lambda: assign(torch.zeros(4, 2), torch.zeros(2, 3)), 'match them'),
])
def test_bad_input_says_what_to_do(call, match):
    with pytest.raises(ValueError, match=match): call()


@pytest.mark.parametrize('call', [
    lambda: kmeans(np.zeros((4, 2)), 2), lambda: kmeans(torch.zeros(4, 2, dtype=torch.long), 2),
    lambda: assign(torch.zeros(4, 2), [[1., 2.]]),
])
def test_wrong_types(call):
    with pytest.raises(TypeError, match='torch tensor'): call()


def test_large_float32_features_give_the_clusters_of_float64(monkeypatch):
    monkeypatch.setattr('cem_nb.kmeans.LARGE', 1)
    x = blobs(2000, 6, 5, gap=1.)[0].float() + 1e3
    (a, la), (b, lb) = (kmeans(v, 5, generator=rng(0)) for v in (x, x.double()))
    assert a.dtype == torch.float32 and torch.allclose(a.double(), b, atol=1e-3) and (la == lb).double().mean() > 0.999
    cost = lambda c, l: (x.double() - c.double()[l]).square().sum().item()
    assert cost(a, la) == pytest.approx(cost(b, lb), rel=1e-5)
