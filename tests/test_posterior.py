"""cem_nb.posterior against independent references: torch's softmax, scipy's densities, enumeration, quadrature."""
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from cem_nb.models import SplitModel
from cem_nb.posterior import oracle_attack, oracle_mse, send_feature
from cem_nb.worlds import LinearMixture
from theory import few, se, seeds


# ---- the oracle attack

def dense_oracle(z, keys, images, noise_std):
    "Every pair at once, through torch's own softmax, in float64."
    dist = (z.double().flatten(1)[:, None] - keys.double().flatten(1)).square().sum(2)
    p = torch.softmax(-dist/(2*noise_std**2), 1)
    return (p @ images.double().flatten(1)).reshape(len(z), *images.shape[1:])


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
    got = oracle_mse(keys, images, s, draws=2000)
    assert abs(got.mse - xi) < 4*got.se and got.se < 0.03*xi


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


# ---- dropout: the posterior over what arrived

def looped_oracle(z, keys, images, noise_std, arrived):
    "Bayes' rule for one query, image by image and entry by entry, with scipy's densities."
    log_p = [sum(stats.norm.logpdf(a, b, noise_std) for a, b, m in zip(z, k, arrived) if m) for k in keys]
    p = np.exp(np.array(log_p) - max(log_p))
    return p @ images/p.sum()


@few
@given(seeds, st.integers(1, 6), st.integers(1, 12), st.integers(1, 6), st.floats(-1.5, 1), st.floats(0, 1),
       st.integers(1, 14))
def test_oracle_under_dropout_is_bayes_rule_in_a_loop(seed, Q, N, m, log_noise, drop, block):
    g = torch.Generator().manual_seed(seed % 2**31)
    keys, images = torch.rand(N, m, generator=g).double(), torch.rand(N, 3, generator=g).double()
    s, arrived = 10**log_noise, torch.rand(Q, m, generator=g) >= drop
    z = (keys[torch.randint(N, (Q,), generator=g)] + s*torch.randn(Q, m, generator=g).double())*arrived
    got = oracle_attack(z, keys, images, s, arrived=arrived, block=block)
    want = [looped_oracle(*map(np.asarray, (z[q], keys, images)), s, arrived[q]) for q in range(Q)]
    assert np.allclose(got, want, atol=1e-9)
    assert torch.equal(got, oracle_attack(z, keys, images, s, arrived=z != 0, block=block))  # a 0 was dropped
    other = torch.where(arrived, z, torch.randn(Q, m, generator=g).double())
    torch.testing.assert_close(got, oracle_attack(other, keys, images, s, arrived=arrived))  # what it was is forgotten


@few
@given(seeds, shapes, shapes, st.sampled_from([0., 1e-200, 1e-6, 1e-3, 0.3, 1e100]), st.integers(1, 40),
       st.sampled_from([torch.float32, torch.float64]))
def test_all_arrived_is_no_dropout(seed, zs, xs, noise_std, block, dtype):
    g = torch.Generator().manual_seed(seed % 2**31)
    keys, images = torch.rand(20, *zs, generator=g, dtype=dtype), torch.rand(20, *xs, generator=g, dtype=dtype)
    z = keys[:9] + min(noise_std, 1)*torch.randn(9, *zs, generator=g, dtype=dtype)
    got = oracle_attack(z, keys, images, noise_std, arrived=torch.ones_like(z, dtype=torch.bool), block=block)
    torch.testing.assert_close(got, oracle_attack(z, keys, images, noise_std))


@pytest.mark.parametrize('noise_std', [0, 1e-200, 1e-12])
@pytest.mark.parametrize('block', [1, 2, 100])
def test_without_noise_images_that_agree_where_it_arrived_are_averaged(noise_std, block):
    keys = torch.tensor([[0.2, 0.3], [0.2, 0.7], [0.9, 0.3], [0.5, 0.5]])
    images = torch.tensor([[0.], [10], [20], [30]])
    z, arrived = keys[[0, 0, 0, 0]], torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    got = oracle_attack(z*arrived, keys, images, noise_std, arrived=arrived, block=block)
    torch.testing.assert_close(got, torch.tensor([[0.], [5], [10], [15]]))


def test_dropped_entries_far_from_the_origin_keep_the_digits_of_the_others():
    keys = torch.tensor([[0., 3e4], [1e-5, -7e4]], dtype=torch.float64) + 1e4
    images = torch.tensor([[0.], [1.]], dtype=torch.float64)
    z = torch.tensor([[1e4 + 4e-6, 0]], dtype=torch.float64)
    gap = ((1e-5 - 4e-6)**2 - 4e-6**2)/(2*5e-6**2)
    got = oracle_attack(z, keys, images, 5e-6, arrived=z != 0)
    assert math.isclose(got.item(), 1/(1 + math.exp(gap)), rel_tol=1e-5)


def test_xi_under_dropout_is_a_mean_over_what_arrives():
    "Which entries arrive is chosen before the noise: xi is the mean over the 2^m choices of xi with those entries alone."
    torch.manual_seed(0)
    keys, images, s, p = torch.rand(25, 3).double(), torch.rand(25, 4).double(), 0.2, 0.3
    nothing = (images - images.mean(0)).square().mean().item()
    want, var = 0, 0
    for kept in itertools.product((False, True), repeat=3):
        share = (1 - p)**sum(kept)*p**(3 - sum(kept))
        part = oracle_mse(keys[:, list(kept)], images, s, draws=400) if any(kept) else (nothing, 0)
        want, var = want + share*part[0], var + (share*part[1])**2
    got = oracle_mse(keys, images, s, drop=p, draws=1200, seed=1)
    assert abs(got.mse - want) < 4*math.hypot(got.se, math.sqrt(var)) and got.se < 0.01*got.mse


def test_oracle_is_minimal_under_dropout():
    "Not knowing of it, guessing the lost entries, another temperature and shrinking all do worse on average."
    torch.manual_seed(0)
    keys, images = torch.rand(60, 6).double(), torch.rand(60, 8).double()
    s, errors, gen = 0.2, {}, torch.Generator().manual_seed(0)
    for _ in range(60):
        z, arrived = send_feature(keys, s, 0.4, gen)
        best = oracle_attack(z, keys, images, s, arrived=arrived)
        filled = torch.where(arrived, z, keys.mean(0))
        rivals = {'overlooks': oracle_attack(z, keys, images, s), 'fills in': oracle_attack(filled, keys, images, s),
                  'cold': oracle_attack(z, keys, images, s/2, arrived=arrived), 'shrunk': 0.6*best + 0.4*images.mean(0)}
        for name, r in rivals.items():
            errors.setdefault(name, []).append(((r - images)**2 - (best - images)**2).mean().item())
    for name, lead in errors.items(): assert np.mean(lead) > 4*se(lead), name


def test_oracle_mse_is_the_error_on_what_a_split_model_sends():
    torch.manual_seed(0)
    keys, images = 0.1 + torch.rand(80, 2, 4), torch.rand(80, 3)
    model = SplitModel(torch.nn.Identity(), torch.nn.Identity(), noise_std=0.3, drop=0.35)
    runs = []
    for _ in range(300):
        z = model.send(keys)
        runs.append((oracle_attack(z, keys, images, 0.3, arrived=z != 0) - images).square().mean().item())
    got = oracle_mse(keys, images, 0.3, drop=0.35, draws=300)
    assert abs(got.mse - np.mean(runs)) < 4*math.hypot(got.se, se(runs)) and math.isclose(got.se, se(runs), rel_tol=0.2)


def test_features_are_sent_as_a_split_model_sends_them():
    z_hat = torch.full((200, 500), 0.4)
    z, arrived = send_feature(z_hat, 0.1, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(z != 0, arrived) and abs(arrived.double().mean() - 0.7) < 4*math.sqrt(0.21/1e5)
    assert abs(z[arrived].mean() - 0.4) < 0.002 and abs(z[arrived].std() - 0.1) < 0.002  # not rescaled
    plain, everything = send_feature(z_hat, 0.1, 0, torch.Generator().manual_seed(0))
    assert everything is None and torch.equal(plain[arrived], z[arrived])


def test_more_dropout_is_more_error_up_to_the_mean_image():
    torch.manual_seed(0)
    keys, images = torch.rand(50, 6), torch.rand(50, 4)
    curve = [oracle_mse(keys, images, 0.1, drop=p, draws=30).mse for p in (0, 0.2, 0.4, 0.6, 0.8, 1 - 1e-9)]
    assert all(a < b for a, b in zip(curve, curve[1:]))
    assert math.isclose(curve[-1], (images - images.mean(0)).square().mean(), rel_tol=1e-6)
    state = torch.get_rng_state()
    assert oracle_mse(keys, images, 0.1, drop=0.4, draws=30).mse == curve[2] and torch.equal(state, torch.get_rng_state())


# ---- what is refused

K, X = torch.rand(4, 3), torch.rand(4, 2)


@pytest.mark.parametrize('args, error, message', [
    ((K, K, X, -1.), ValueError, 'noise_std'), ((K, K, X, math.nan), ValueError, 'noise_std'),
    ((K, K, X, math.inf), ValueError, 'noise_std'), ((K[:, :2], K, X, 1.), ValueError, 'axes'),
    ((K, K, X[:3], 1.), ValueError, 'one each'), ((K, K[:0], X[:0], 1.), ValueError, 'row'),
    ((K, K, (X*255).byte(), 1.), TypeError, 'bytes'), ((K, K.numpy(), X, 1.), TypeError, 'floating point'),
    ((K.numpy(), K, X, 1.), TypeError, 'tensor'), ((K.long(), K, X, 1.), TypeError, 'float'),
    ((K*math.nan, K, X, 1.), ValueError, 'NaN'), ((K, K/0, X, 1.), ValueError, 'inf'),
    ((K, K, X*math.nan, 1.), ValueError, 'NaN'), ((K[:, 0], K[:, 0], X, 1.), ValueError, 'shape'),
    ((K[:, :0], K[:, :0], X, 1.), ValueError, 'shape')])
def test_oracle_attack_refuses(args, error, message):
    with pytest.raises(error, match=message): oracle_attack(*args)


@pytest.mark.parametrize('kw, message', [
    (dict(block=0), 'block'), (dict(block=1.5), 'block'), (dict(arrived=torch.ones(4, 2).bool()), 'arrived'),
    (dict(arrived=torch.ones(4, 3)), 'bool')])
def test_oracle_attack_refuses_settings(kw, message):
    with pytest.raises(ValueError, match=message): oracle_attack(K, K, X, 1., **kw)


@pytest.mark.parametrize('kw, error, message', [
    (dict(noise_std=-1.), ValueError, 'noise_std'), (dict(draws=1), ValueError, 'draws'),
    (dict(draws=2.5), ValueError, 'draws'), (dict(queries=(K, X[:2])), ValueError, 'one each'),
    (dict(queries=(K, torch.rand(4, 3))), ValueError, 'sizes'), (dict(queries=(K[:1], X[:1])), ValueError, 'needs 2'),
    (dict(queries=(K[:, :2], X)), ValueError, 'axes'), (dict(queries=(K, X.long())), TypeError, 'float'),
    (dict(block=0), ValueError, 'block'), (dict(drop=1), ValueError, 'drop'), (dict(drop=-0.1), ValueError, 'drop'),
    (dict(drop=math.nan), ValueError, 'drop')])
def test_oracle_mse_refuses(kw, error, message):
    with pytest.raises(error, match=message): oracle_mse(K, X, **dict(noise_std=1.) | kw)


def test_shrinking_components_lose_the_bound_and_keep_the_error():
    means = np.array([[0., 0], [2, 0], [0, 2]])
    runs = [LinearMixture(np.full(3, 1/3), means, np.full((3, 1, 1), s**2)*np.eye(2), np.eye(2), 1.).chain(
        4000, np.random.default_rng(0)) for s in (1e-1, 1e-3, 1e-5)]
    points = oracle_mse(torch.tensor(means), torch.tensor(means), 1., draws=3000)
    assert [c.bound < b for c, b in zip(runs, (1e-1, 1e-4, 1e-8))] == [True]*3
    assert abs(runs[-1].xi - points.mse) < 4*math.hypot(runs[-1].xi_se, points.se)
    assert np.isclose(runs[1].h - runs[2].h, 2*math.log(100), atol=0.2)
