import math

import numpy as np
import pytest
import torch

from cem_nb.bounds import mutual_information_bound
from cem_nb.cem import CEM, N_REF

SIGMA = 0.1


def features(n=120, m=6, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centre = torch.randn(classes, m, generator=g, dtype=torch.float64)
    return centre[y] + 0.3*torch.randn(n, m, generator=g, dtype=torch.float64), y


def fitted(**kwargs):
    z, y = features()
    return CEM(noise_std=SIGMA, n_classes=3, **kwargs).fit(z, y), z, y


def dense_step(cem, z, big_n):
    "Eq. 5, 6 and 7 with loops and dense matrices: value, new weights and new diagonal covariances."
    pi, mu, var = (t.numpy().copy() for t in (cem.weights, cem.means, cem.variances))
    z = z.detach().numpy()
    label = [int(np.argmin([np.sum((v - c)**2) for c in mu])) for v in z]
    loss, m = 0.0, z.shape[1]
    for j in range(len(mu)):
        mine = [v for v, l in zip(z, label) if l == j]
        pi[j] = (pi[j]*(big_n - len(z)) + len(mine))/big_n
        if mine:
            delta = np.diag(np.diag(sum(np.outer(v - mu[j], v - mu[j]) for v in mine)/len(mine)))
            a = min(1, len(mine)/(pi[j]*big_n))
            var[j] = np.diag((1 - a)*np.diag(var[j]) + a*delta)
        noise = SIGMA**2*np.eye(m)
        logdet = np.linalg.slogdet(np.diag(var[j]) + noise)[1] - np.linalg.slogdet(noise)[1]
        loss += pi[j]*(-math.log(pi[j]) + 0.5*logdet) if pi[j] > 0 else 0
    return loss, pi, var


def test_batches_follow_equations_5_to_7():
    cem, z, y = fitted(scale='sum')
    for i in range(0, 120, 24):
        batch = z[i:i + 24]
        want, pi, var = dense_step(cem, batch, 120)
        assert cem(batch, y[i:i + 24]).item() == pytest.approx(want, rel=1e-9)
        assert np.allclose(cem.weights, pi) and np.allclose(cem.variances, var)


def test_loss_is_theorem_2_of_the_fitted_mixture():
    "With the whole data set as one batch, in one cluster, L_C is the bound of Eq. 16 exactly."
    z, y = features()
    cem = CEM(noise_std=SIGMA, n_classes=3, n_components=1, scale='sum').fit(z, y)
    want = mutual_information_bound(torch.ones(1), z.mean(0, keepdim=True), z.var(0, correction=0)[None], SIGMA)
    assert cem(z, y).item() == pytest.approx(want.item(), rel=1e-4)


def test_gradient_is_that_of_the_dense_loss():
    cem, z, y = fitted(scale='sum')
    state = cem.get_extra_state()
    batch = z[:12].clone().requires_grad_()
    cem(batch, y[:12]).backward()
    for i, d in ((0, 0), (3, 2), (11, 5)):
        step = torch.zeros_like(z[:12]); step[i, d] = 1e-5
        values = []
        for sign in (1, -1):
            cem.set_extra_state(state)
            values.append(dense_step(cem, z[:12] + sign*step, 120)[0])
        assert batch.grad[i, d].item() == pytest.approx((values[0] - values[1])/2e-5, rel=1e-4)


def test_scales():
    z, y = features()
    loss, weight = {}, {}
    for scale in ('sum', 'mean', 'normalized'):
        cem = CEM(noise_std=SIGMA, n_classes=3, lam=16.0, scale=scale).fit(z, y)
        loss[scale], weight[scale] = cem(z[:30], y[:30]).item(), cem.weight
    assert loss['mean'] == loss['normalized'] == pytest.approx(loss['sum']/6)
    assert weight == {'sum': 16, 'mean': 16, 'normalized': pytest.approx(16*120/N_REF)}


def test_minimising_it_tightens_the_clusters():
    z, y = features()
    cem = CEM(noise_std=SIGMA, n_classes=3, scale='sum')
    p = z.clone().requires_grad_()
    opt = torch.optim.SGD([p], 0.05)
    first = None
    for _ in range(150):
        cem.fit(p.detach(), y)
        loss = cem(p, y)
        first = first or loss.item()
        opt.zero_grad(); loss.backward(); opt.step()
    assert loss.item() < 0.8*first
    assert p.detach().var(0).sum() > 0.5*z.var(0).sum()  # the means stay apart


def test_release_reading():
    "Against the release's formula as the notebook states it, with loops."
    cem, z, y = fitted(reading='release')
    mu, pi, var = cem.means.numpy().copy(), cem.weights.numpy().copy(), cem.variances.numpy().copy()
    batch, labels = z[:30], y[:30]
    per_class = []
    for c in labels.unique().tolist():
        total = 0.0
        for j in range(c*5, c*5 + 5):
            mine = [v for v, l in zip(batch.numpy(), labels.tolist()) if l == c
                    and np.argmin(((v - mu[c*5:c*5 + 5])**2).sum(1)) == j - c*5]
            if not mine: continue
            a = min(0.99, 10*len(mine)/(pi[j]*120/3))
            v = a*np.mean([np.mean((f - mu[j])**2) for f in mine]) + (1 - a)*var[j, 0]
            total += pi[j]*max(0.0, math.log(v + 0.01) - math.log(0.125*SIGMA**2 + 0.01))
        per_class.append(total)
    assert cem.n_components == 15 and cem(batch, labels).item() == pytest.approx(np.mean(per_class), rel=1e-9)
    assert cem.weights.view(3, 5).sum(1).numpy() == pytest.approx(1)


@pytest.mark.parametrize('reading', ['paper', 'release'])
def test_state_survives_and_global_randomness_is_left_alone(reading):
    z, y = features()
    torch.manual_seed(5)
    want = torch.rand(1); torch.manual_seed(5)
    cem = CEM(noise_std=SIGMA, n_classes=3, reading=reading).fit(z, y)
    cem(z[:20], y[:20])
    assert torch.equal(torch.rand(1), want)
    twin = CEM(noise_std=SIGMA, n_classes=3, reading=reading)
    twin.load_state_dict(cem.state_dict())
    for c in (cem, twin): c.fit(z + 0.1, y)
    assert torch.equal(cem(z[20:50], y[20:50]), twin(z[20:50], y[20:50]))


@pytest.mark.parametrize('covariance, bound', [('diag', 'pairwise'), ('full', 'paper'), ('full', 'pairwise')])
def test_full_and_pairwise_against_dense(covariance, bound):
    "Value and gradient, from the batch's definition with dense matrices and the bounds of the entropy chapter."
    cem, z, y = fitted(scale='sum', covariance=covariance, bound=bound)
    old, w = (cem.covariances if covariance == 'full' else torch.diag_embed(cem.variances)).clone(), cem.weights.clone()
    batch = z[:30].clone().requires_grad_()
    loss = cem(batch, y[:30])
    grad, = torch.autograd.grad(loss, batch)
    label = torch.cdist(batch.detach(), cem.means).argmin(1)
    n = label.bincount(minlength=9)
    w = (w*90 + n)/120
    new = []
    for j in range(9):
        d = batch[label == j] - cem.means[j]
        a = min(1.0, n[j].item()/(w[j].item()*120))
        delta = d.T @ d/max(1, len(d))
        if covariance == 'diag': delta = torch.diag(torch.diag(delta))
        new.append((1 - a)*old[j] + a*delta)
    want = mutual_information_bound(w, cem.means, torch.stack(new), SIGMA, 'huber' if bound == 'paper' else bound)
    want_grad, = torch.autograd.grad(want, batch)
    assert torch.allclose(loss, want) and torch.allclose(grad, want_grad, atol=1e-8)
    if covariance == 'full': assert torch.allclose(cem.covariances, torch.stack(new).detach())


def test_bad_input():
    for bad in (dict(noise_std=0.0), dict(noise_std=-1.0), dict(lam=-1.0), dict(lam=math.nan), dict(scale='total'),
                dict(reading='mine'), dict(covariance='tied'), dict(bound='tight'), dict(reading='release', covariance='full'), dict(n_components=0), dict(reading='release', n_components=4)):
        with pytest.raises(ValueError): CEM(**(dict(noise_std=SIGMA, n_classes=3) | bad))
    z, y = features()
    with pytest.raises(RuntimeError, match='fit'): CEM(noise_std=SIGMA, n_classes=3)(z, y)
    cem, *_ = fitted()
    for poison in (math.nan, math.inf):
        broken = z[:10].clone(); broken[3, 2] = poison
        with pytest.raises(ValueError): cem(broken, y[:10])
    with pytest.raises(ValueError, match='class 1'): CEM(noise_std=SIGMA, n_classes=3, reading='release').fit(z[:6], y[:6]*0)


def test_features_that_come_to_coincide_can_be_fitted_again():
    z, y = features()
    cem = CEM(noise_std=SIGMA, n_classes=3, n_components=3).fit(z, y)
    together = cem.means[torch.cdist(z, cem.means).argmin(1)]
    cem(together, y)  # the whole data set as one batch: every variance is now 0
    assert cem.variances.max() == 0
    assert cem.fit(together, y)(together[:10], y[:10]).isfinite()


def test_one_sample_a_cluster_and_coincident_features_stay_finite():
    cem, z, y = fitted()
    one = z[:1].clone().requires_grad_()
    cem(one, y[:1]).backward()
    assert one.grad.isfinite().all()
    same = torch.zeros(40, 6)
    flat = CEM(noise_std=SIGMA, n_classes=3).fit(same, torch.arange(40) % 3)
    assert flat(same[:8], torch.arange(8) % 3).isfinite()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('bound', ['paper', 'pairwise'])
def test_half_precision_features_are_only_rounded(dtype, bound):
    "More images than float16 can count, in one cluster; then an epoch of batches whose weights must still sum to 1."
    one = torch.rand(70_000, 1).to(dtype)
    assert CEM(noise_std=SIGMA, n_classes=1, n_components=1).fit(one, None)(one[:64], None).isfinite()
    z, y = features()
    half = CEM(noise_std=SIGMA, n_classes=3, bound=bound).fit(z.to(dtype), y)
    wide = CEM(noise_std=SIGMA, n_classes=3, bound=bound).fit(z.to(dtype).float(), y)
    for i in range(0, 120, 12):
        batch = z[i:i + 12].to(dtype).requires_grad_()
        loss, want = half(batch, y[i:i + 12]), wide(batch.detach().float(), y[i:i + 12])
        assert loss.item() == want.item()
        loss.backward()
        assert batch.grad.dtype == dtype and batch.grad.isfinite().all()
    assert half.weights.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('kwargs', [{}, dict(reading='release'), dict(covariance='full'), dict(bound='pairwise')])
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_features_that_are_no_numbers_are_refused_and_leave_the_mixture_alone(kwargs, bad):
    cem, z, y = fitted(**kwargs)
    before = [t.clone() for t in (cem.weights, cem.means, cem.variances)]
    batch = z[:12].clone(); batch[3, 2] = bad
    with pytest.raises(ValueError, match='NaN or inf'): cem(batch, y[:12])
    assert all(torch.equal(a, b) for a, b in zip(before, (cem.weights, cem.means, cem.variances)))


@pytest.mark.parametrize('bound', ['paper', 'pairwise'])
def test_full_covariances_of_wide_features_in_float32(bound):
    "512 dimensions of rank 8, spread a thousand times wider than the noise: float32 gives what float64 gives."
    g = torch.Generator().manual_seed(0)
    z = 30*torch.randn(300, 8, generator=g) @ torch.randn(8, 512, generator=g)/8**0.5
    y, losses = torch.arange(300) % 2, []
    for dtype in (torch.float32, torch.float64):
        cem = CEM(noise_std=0.025, n_classes=2, n_components=2, covariance='full', bound=bound).fit(z.to(dtype), y)
        losses.append(cem(z[:64].to(dtype), y[:64]).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
