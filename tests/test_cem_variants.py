import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from cem_nb.cem import CEM, CEMS, eq7
from cem_nb.cem_variants import FullCEM, ReleaseCEM, deviations, hard_clusters, hinge
from cem_nb.core import record_of
from cem_nb.mixture import GaussianMixture, assign, mutual_information_bound

SIGMA = 0.1
NAMES = ['diag', 'full', 'pairwise', 'full-pairwise', 'release']


def features(n=120, m=6, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centre = torch.randn(classes, m, generator=g, dtype=torch.float64)
    return centre[y] + 0.3*torch.randn(n, m, generator=g, dtype=torch.float64), y


def make(name, **kwargs):
    own = {} if name == 'release' else dict(scale='sum')
    return CEMS[name](**dict(noise_std=SIGMA, n_classes=3, lam=1.0) | own | kwargs)


def fitted(name, **kwargs):
    z, y = features()
    return make(name, **kwargs).fit(z, y), z, y


def grad_of(cem, z, y):
    z = z.clone().requires_grad_()
    value = cem(z, y)
    return value, torch.autograd.grad(value, z)[0]


def test_registry():
    assert set(CEMS) == set(NAMES) and all(issubclass(c, CEM) for c in CEMS.values())
    for c in CEMS.values():
        settings = record_of(CEM, leave_out=('noise_std', 'n_classes', 'seed'))()
        assert c(noise_std=SIGMA, n_classes=3, **settings.model_dump()).lam == 16.0


@pytest.mark.parametrize('name', NAMES[1:4])
def test_value_and_gradient_against_dense(name):
    "From the batch's definition with dense matrices and the bounds of the entropy chapter."
    cem, z, y = fitted(name)
    full = name != 'pairwise'
    old, pi, mu = (cem.Sigma if full else torch.diag_embed(cem.Sigma)).clone(), cem.pi.clone(), cem.mu.clone()
    loss, grad = grad_of(cem, z[:30], y[:30])
    batch = z[:30].clone().requires_grad_()
    label = torch.cdist(batch.detach(), mu).argmin(1)
    n = label.bincount(minlength=9)
    pi, new = (pi*90 + n)/120, []
    for j in range(9):
        d = batch[label == j] - mu[j]
        a = min(1.0, n[j].item()/(pi[j].item()*120))
        delta = d.T @ d/max(1, len(d))
        new.append((1 - a)*old[j] + a*(delta if full else torch.diag(torch.diag(delta))))
    want = mutual_information_bound(pi, mu, torch.stack(new), SIGMA, *[] if name == 'full' else ['pairwise'])
    want_grad, = torch.autograd.grad(want, batch)
    assert torch.allclose(loss, want) and torch.allclose(grad, want_grad, atol=1e-8)
    if full: assert torch.allclose(cem.Sigma, torch.stack(new).detach())


def test_full_pull_is_that_of_the_whole_matrix():
    cem, z, y = fitted('full')
    _, grad = grad_of(cem, z[:30], y[:30])
    j = assign(z[:30], cem.mu)
    want = torch.linalg.solve(cem.Sigma[j] + SIGMA**2*torch.eye(6), z[:30] - cem.mu[j])/120
    assert torch.allclose(grad, want, atol=1e-9)


def test_variants_are_ordered():
    "Hadamard for the covariance, j = i for the bound; from one and the same hard division."
    cem, z, y = fitted('full')
    pairwise = lambda S: mutual_information_bound(cem.pi, cem.mu, S, SIGMA, 'pairwise')
    diagonal = cem.Sigma.diagonal(dim1=1, dim2=2)
    assert pairwise(cem.Sigma) <= eq7(cem.pi, cem.Sigma, SIGMA) <= eq7(cem.pi, diagonal, SIGMA)
    assert pairwise(diagonal) <= eq7(cem.pi, diagonal, SIGMA)


# Right after a fit the sum is a bound

def exact_information(z, noise_std):
    "I(z; z_hat) of numbers, by the trapezoid rule."
    t = torch.linspace(z.min() - 8*noise_std, z.max() + 8*noise_std, 2000, dtype=torch.float64)
    p = torch.exp(-(t[:, None] - z)**2/(2*noise_std**2)).mean(1)/(math.sqrt(2*math.pi)*noise_std)
    return (torch.trapezoid(torch.special.entr(p), t) - 0.5*math.log(2*math.pi*math.e*noise_std**2)).item()


def contaminated(seed):
    z = torch.randn(200, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z[:180] *= 0.5
    return z


def test_soft_weights_with_hard_covariances_are_no_bound():
    "What the full variant once did: found by search over seeds and fits."
    excess = []
    for seed in range(8, 12):
        z = contaminated(seed)
        gm = GaussianMixture(3, max_iter=10, warm_start=True, random_state=seed)
        truth = exact_information(z[:, 0], SIGMA)
        for _ in range(12):
            gm.fit(z)
            labels = assign(z, gm.means_)
            Sigma = torch.stack([(z[labels == j] - gm.means_[j]).square().mean(0) for j in range(3)]).diag_embed()
            excess.append(eq7(gm.weights_, Sigma, SIGMA).item() - truth)
    assert min(excess) < -0.05


@pytest.mark.parametrize('name', NAMES[:4])
def test_right_after_every_fit_the_sum_is_a_bound(name):
    for seed in range(8, 12):
        z = contaminated(seed)
        truth, cem = exact_information(z[:, 0], SIGMA), CEMS[name](noise_std=SIGMA, n_classes=1, seed=seed, scale='sum')
        for _ in range(12):
            cem.fit(z, None)
            assert cem.bound(cem.pi, cem.Sigma).item() > truth
            if name != 'diag': assert mutual_information_bound(cem.pi, cem.mu, cem.Sigma, SIGMA, 'pairwise').item() > truth


def test_hard_clusters_are_one_division_of_the_features():
    "The mixture's mean and covariance are then those of the features, exactly; the arguments stay as they were."
    z, _ = features()
    mu, Sigma = z[:7].clone(), torch.eye(6).expand(7, 6, 6)
    pi, m, S = hard_clusters(z, mu, Sigma)
    assert torch.equal(mu, z[:7])
    mean = pi @ m
    cov = torch.einsum('k,kij->ij', pi, S) + torch.einsum('k,ki,kj->ij', pi, m - mean, m - mean)
    assert torch.allclose(mean, z.mean(0)) and torch.allclose(cov, torch.cov(z.T, correction=0))
    far = torch.cat([mu, torch.full((1, 6), 99.)])
    pi, m, S = hard_clusters(z, far, torch.eye(6).expand(8, 6, 6))
    assert pi[7] == 0 and torch.equal(m[7], far[7]) and torch.equal(S[7], torch.eye(6, dtype=torch.float64))


def test_deviations_are_the_batchs_covariances():
    z, _ = features()
    labels = torch.tensor([2, 0, 0, 2, 2])
    n, X = deviations(z[:5], labels, z[10:14])
    assert n.tolist() == [2, 0, 3, 0] and X.shape == (4, 3, 6)
    for j in (0, 2):
        d = z[:5][labels == j] - z[10 + j]
        assert torch.allclose(X[j].T @ X[j], d.T @ d/len(d))
    assert (X[[1, 3]] == 0).all()


@pytest.mark.parametrize('name', ['full', 'full-pairwise'])
def test_full_covariances_of_wide_features_in_float32(name):
    "512 dimensions of rank 8, spread a thousand times wider than the noise: float32 gives what float64 gives."
    g = torch.Generator().manual_seed(0)
    z = 30*torch.randn(300, 8, generator=g) @ torch.randn(8, 512, generator=g)/8**0.5
    y, losses = torch.arange(300) % 2, []
    for dtype in (torch.float32, torch.float64):
        cem = CEMS[name](noise_std=0.025, n_classes=2, n_components=2, scale='mean').fit(z.to(dtype), y)
        losses.append(cem(z[:64].to(dtype), y[:64]).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# The release

def release_step(cem, batch, labels):
    "The release's formula as the notebook states it, with loops."
    mu, pi, var = cem.mu.numpy(), cem.pi.numpy(), cem.Sigma.numpy()
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
    return np.mean(per_class)


def test_release():
    cem, z, y = fitted('release')
    assert cem.n_components == 15 and cem.pi.view(3, 5).sum(1).numpy() == pytest.approx(1)
    labels = torch.cat([assign(z[y == c], cem.mu[c*5:c*5 + 5]) for c in range(3)])
    for c in range(3):
        mine, l = z[y == c], labels[c*40:(c + 1)*40]
        for j in range(5):
            d = (mine[l == j] - cem.mu[c*5 + j]).square().mean()
            assert cem.pi[c*5 + j].item() == pytest.approx((l == j).double().mean().item())
            assert cem.Sigma[c*5 + j].item() == pytest.approx(d.item())


def test_release_mixes_every_batch_with_the_last_fit():
    "Also after other batches, whose values it does not carry on."
    cem, z, y = fitted('release')
    before = [t.clone() for t in (cem.pi, cem.mu, cem.Sigma)]
    for rows in (slice(0, 30), slice(30, 37), slice(0, 30)):
        value, grad = grad_of(cem, z[rows] + 0.2, y[rows])
        assert value.item() == pytest.approx(release_step(cem, z[rows] + 0.2, y[rows]), rel=1e-9)
        assert grad.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(before, (cem.pi, cem.mu, cem.Sigma)))


def test_release_has_its_own_scale():
    z, y = features()
    cem = ReleaseCEM(noise_std=SIGMA, n_classes=3).fit(z, y)
    value, grad = grad_of(cem, z[:30], y[:30])
    assert cem.weight.item() == 16 and value.item() == pytest.approx(16*cem.l_c.item())
    assert torch.allclose(grad, 16*grad_of(fitted('release')[0], z[:30], y[:30])[1])
    for scale in ('mean', 'sum'):
        with pytest.raises(ValueError, match='scale'): ReleaseCEM(noise_std=SIGMA, n_classes=3, scale=scale)
    with pytest.raises(ValueError, match='n_components'): ReleaseCEM(noise_std=SIGMA, n_classes=3, n_components=4)
    with pytest.raises(ValueError, match='class 1'): make('release').fit(z[:6], y[:6]*0)
    with pytest.raises(ValueError, match='batch of 0'): cem(z[:0], y[:0])


def test_hinge():
    assert hinge(torch.tensor([0.0, 0.125*SIGMA**2]), SIGMA).tolist() == pytest.approx([0, 0], abs=1e-6)
    v = torch.tensor([0.5]).requires_grad_()
    hinge(v, SIGMA).sum().backward()
    assert v.grad.item() == pytest.approx(1/0.51)


# Every variant

@pytest.mark.parametrize('name', NAMES)
def test_balanced_or_not_it_plugs_into_a_training(name):
    torch.manual_seed(0)
    y = torch.arange(120) % 3
    x, encoder, server = torch.randn(3, 8)[y] + torch.randn(120, 8), nn.Sequential(nn.Linear(8, 6), nn.Sigmoid()), nn.Linear(6, 3)
    cem, opt = CEMS[name](noise_std=SIGMA, n_classes=3), torch.optim.SGD(encoder.parameters(), 0.1)
    for _ in range(3):
        cem.fit(encoder(x).detach(), y)
        for rows in torch.randperm(120).split(40):
            z_hat = encoder(x[rows])
            loss = nn.functional.cross_entropy(server(z_hat), y[rows]) + cem(z_hat, y[rows])
            opt.zero_grad(); loss.backward(); opt.step()
    assert loss.isfinite() and cem.weight > 0 and cem.l_c > 0


@pytest.mark.parametrize('name', NAMES)
def test_state_survives_and_global_randomness_is_left_alone(name):
    z, y = features()
    torch.manual_seed(5)
    want = torch.rand(1); torch.manual_seed(5)
    cem, *_ = fitted(name)
    grad_of(cem, z[:20], y[:20])
    assert torch.equal(torch.rand(1), want)
    twin = make(name)
    twin.load_state_dict(copy.deepcopy(cem.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(grad_of(cem, z[60:], y[60:]), grad_of(twin, z[60:], y[60:])))
    for c in (cem, twin): c.fit(z + 0.1, y)
    assert torch.equal(cem(z[20:50], y[20:50]), twin(z[20:50], y[20:50]))


@pytest.mark.parametrize('name', NAMES)
def test_another_variants_state_is_refused(name):
    state = fitted(name, n_components=9)[0].state_dict()
    for other in set(NAMES) - {name}:
        with pytest.raises(ValueError, match='variant'): make(other, n_components=9).load_state_dict(state)


@pytest.mark.parametrize('name', NAMES)
def test_looking_does_not_change_the_training(name):
    cem, z, y = fitted(name)
    before = cem.pi, cem.Sigma
    with torch.no_grad(): value = cem(z[:30], y[:30])
    cem.eval()
    assert grad_of(cem, z[:30], y[:30])[0].item() == pytest.approx(value.item())
    assert torch.equal(before[0], cem.pi) and torch.equal(before[1], cem.Sigma)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_features_that_are_no_numbers_are_refused_and_leave_the_mixture_alone(name, bad):
    cem, z, y = fitted(name)
    before = [t.clone() for t in (cem.pi, cem.mu, cem.Sigma)]
    batch = z[:12].clone(); batch[3, 2] = bad
    for call in (cem, cem.fit):
        with pytest.raises(ValueError, match='NaN or inf'): call(batch, y[:12])
    assert all(torch.equal(a, b) for a, b in zip(before, (cem.pi, cem.mu, cem.Sigma)))


@pytest.mark.parametrize('name', NAMES)
def test_a_batch_larger_than_the_fit_is_refused(name):
    cem, z, y = fitted(name)
    with pytest.raises(ValueError, match='batch of 240'): cem(z.repeat(2, 1), y.repeat(2))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', NAMES)
def test_half_precision_features_are_only_rounded(dtype, name):
    z, y = features()
    half, wide = (make(name).fit(t, y) for t in (z.to(dtype), z.to(dtype).float()))
    for i in range(0, 120, 12):
        (got, grad), (want, _) = (grad_of(c, b, y[i:i + 12]) for c, b in
                                  ((half, z[i:i + 12].to(dtype)), (wide, z[i:i + 12].to(dtype).float())))
        assert got.item() == want.item() and got.dtype == torch.float32
        assert grad.dtype == dtype and grad.isfinite().all()
    if name != 'release': assert half.pi.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_autocast_does_not_reach_the_mixture(name):
    cem, z, y = fitted(name)
    twin = copy.deepcopy(cem)
    with torch.autocast('cpu', dtype=torch.bfloat16): got = grad_of(twin, z[:30], y[:30])
    want = grad_of(cem, z[:30], y[:30])
    assert got[0] == want[0] and torch.equal(got[1], want[1]) and torch.equal(cem.Sigma, twin.Sigma)
