import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from cem_nb.bounds import mutual_information_bound
from cem_nb.cem import CEM, CEMS, DOSE, eq7
from cem_nb.cem_variants import BalancedCEM, ReleaseCEM, deviations, hard_clusters, hinge
from cem_nb.core import record_of
from cem_nb.kmeans import assign
from cem_nb.mixture import GaussianMixture

SIGMA = 0.1
NAMES = ['diag', 'full', 'pairwise', 'full-pairwise', 'letter', 'balanced', 'release']


def features(n=120, m=6, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centre = torch.randn(classes, m, generator=g, dtype=torch.float64)
    return centre[y] + 0.3*torch.randn(n, m, generator=g, dtype=torch.float64), y


def make(name, **kwargs):
    "With a value of L_C in nats: weight 6 for the 6 dimensions, or lam = 1 where lam is the weight."
    lam = 1.0 if name in ('letter', 'release') else 6/DOSE
    return CEMS[name](**dict(noise_std=SIGMA, n_classes=3, n_epochs=1, lam=lam) | kwargs)


def fitted(name, **kwargs):
    z, y = features()
    return make(name, **kwargs).fit(z, y), z, y


def grad_of(cem, z, y, autocast=None):
    z = z.clone().requires_grad_()
    with torch.autocast('cpu', dtype=autocast or torch.bfloat16, enabled=autocast is not None): value = cem(z, y)
    loss = value + z.sum() if isinstance(cem, BalancedCEM) else value  # something to be balanced against
    return value, torch.autograd.grad(loss, z)[0]


def test_registry():
    assert set(CEMS) == set(NAMES) and all(issubclass(c, CEM) for c in CEMS.values())
    assert list(CEMS) == NAMES and [n for n, c in CEMS.items() if c.ramped] == ['release']
    for c in CEMS.values():
        settings = record_of(CEM, leave_out=('noise_std', 'n_classes', 'n_epochs', 'seed'))()
        assert c(noise_std=SIGMA, n_classes=3, n_epochs=1, **settings.model_dump()).lam == 16.0


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
        truth, cem = exact_information(z[:, 0], SIGMA), CEMS[name](noise_std=SIGMA, n_classes=1, n_epochs=12, seed=seed)
        for _ in range(12):
            cem.fit(z, None)
            bound, kind = cem.bound(cem.pi, cem.Sigma).item(), 'pairwise' if 'pairwise' in name else 'huber'
            pairwise = mutual_information_bound(cem.pi, cem.mu, cem.Sigma, SIGMA, 'pairwise')
            assert bound > truth and (name == 'diag' or pairwise.item() > truth)
            assert bound == pytest.approx(mutual_information_bound(cem.pi, cem.mu, cem.Sigma, SIGMA, kind).item(), rel=1e-5)


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
        cem = CEMS[name](noise_std=0.025, n_classes=2, n_components=2, n_epochs=1).fit(z.to(dtype), y)
        losses.append(cem(z[:64].to(dtype), y[:64]).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_letter_is_eq7_with_weight_lam_whatever_the_training():
    z, y = features()
    a, b = (CEMS['letter'](noise_std=SIGMA, n_classes=3, n_epochs=n, lam=16.0).fit(z, y) for n in (1, 50))
    diag = fitted('diag')[0]
    (value, grad), (nats, plain) = (grad_of(c, z[:30], y[:30]) for c in (a, diag))
    assert a.weight == 16 and a.l_c.item() == pytest.approx(nats.item())
    assert value.item() == pytest.approx(16*nats.item()) == grad_of(b, z[:30], y[:30])[0].item()
    assert torch.allclose(grad, 16*plain)


# Balanced pulls

class Toy:
    "A split network in training; `step` returns the two pulls, each from a graph of its own."
    def __init__(self, width=16, lam=16.0, seed=0, **kwargs):
        torch.manual_seed(seed)
        self.y = torch.arange(240) % 3
        self.x = torch.randn(3, 8)[self.y] + 1.5*torch.randn(240, 8)
        self.encoder = nn.Sequential(nn.Linear(8, width), nn.Sigmoid())
        self.server = nn.Linear(width, 3)
        self.cem = BalancedCEM(noise_std=0.05, n_classes=3, n_epochs=1, lam=lam, **kwargs)
        self.cem.fit(self.encoder(self.x).detach(), self.y)
        self.opt = torch.optim.SGD([*self.encoder.parameters(), *self.server.parameters()], 0.05)

    def others(self, z_hat, y): return nn.functional.cross_entropy(self.server(z_hat), y) + 0.1*z_hat.square().mean()

    def pulls(self, rows):
        cem, (x, y), found = copy.deepcopy(self.cem).eval(), (self.x[rows], self.y[rows]), []
        for loss in (cem, self.others):
            z_hat = self.encoder(x)
            found.append(torch.autograd.grad(loss(z_hat, y), z_hat)[0].norm().item())
        return found

    def step(self, batch=40, ramp=1.0, scale=1.0):
        rows = torch.randint(240, (batch,))
        pulls = self.pulls(rows)
        z_hat = self.encoder(self.x[rows])
        loss = self.others(z_hat, self.y[rows]) + ramp*self.cem(z_hat, self.y[rows])
        self.opt.zero_grad(); (scale*loss).backward()
        for p in [*self.encoder.parameters(), *self.server.parameters()]: p.grad /= scale
        self.opt.step()
        return pulls

    def ratio(self, **kwargs):
        "Of the mean pulls, after ten steps to get used to."
        found = np.array([self.step(**kwargs) for _ in range(60)])[10:]
        return found[:, 0].sum()/found[:, 1].sum()


@pytest.mark.parametrize('width, batch, lam', [(16, 40, 16.0), (64, 40, 16.0), (16, 10, 16.0), (16, 40, 50.0)])
def test_balanced_pulls_by_lam_per_cent_of_all_else_whatever_width_and_batch(width, batch, lam):
    assert Toy(width, lam).ratio(batch=batch) == pytest.approx(lam/100, rel=0.1)


@pytest.mark.parametrize('kwargs', [dict(ramp=0.25), dict(scale=2.0**12)])
def test_balanced_knows_a_ramp_and_a_loss_scale(kwargs):
    "The weight that is measured does not depend on either: a ramp is then applied once, a scale not at all."
    assert Toy().ratio(**kwargs) == pytest.approx(0.16, rel=0.1)


def test_balanced_is_exact_after_one_measurement():
    toy = Toy()
    assert toy.cem.weight == 0  # nothing has been measured yet
    first = toy.step()
    assert first[0] == 0
    norms, weight = toy.cem.balance.norms.clone(), toy.cem.weight
    assert norms[0].item() == pytest.approx(0.1*first[1], rel=1e-5)
    assert weight.item() == pytest.approx(0.16*norms[0].item()/norms[1].item())
    assert toy.step()[0] > 0


def test_balanced_leaves_the_gradient_of_the_rest_alone():
    toy = Toy()
    for _ in range(3): toy.step()
    rows = torch.arange(40)
    toy.opt.zero_grad()
    z_hat, weight = toy.encoder(toy.x[rows]), toy.cem.weight
    (toy.others(z_hat, toy.y[rows]) + toy.cem(z_hat, toy.y[rows])).backward()
    got = toy.encoder[0].weight.grad.clone()
    cem = toy.cem
    z_hat = toy.encoder(toy.x[rows])
    j = assign(z_hat.detach(), cem.mu)
    pull = (z_hat - cem.mu[j])/(240*16*(cem.Sigma[j] + 0.05**2))
    toy.opt.zero_grad()
    (toy.others(z_hat, toy.y[rows]) + (weight*pull.detach()*z_hat).sum()).backward()
    assert torch.allclose(got, toy.encoder[0].weight.grad, atol=1e-7)


def test_balanced_value_is_weight_times_loss():
    toy = Toy()
    for _ in range(3): toy.step()
    z_hat = toy.encoder(toy.x[:40])
    value = toy.cem(z_hat, toy.y[:40])
    assert value.item() == pytest.approx(toy.cem.weight.item()*toy.cem.l_c.item()) and value.requires_grad


def test_lam_0_pulls_by_nothing():
    toy = Toy(lam=0.0)
    assert toy.ratio() == 0


def test_gradients_that_overflowed_are_not_counted():
    toy = Toy()
    for _ in range(2): toy.step()
    before = toy.cem.balance.norms.clone()
    z_hat = toy.encoder(toy.x[:40])
    ((toy.others(z_hat, toy.y[:40]) + toy.cem(z_hat, toy.y[:40]))*math.inf).backward()
    assert torch.equal(before, toy.cem.balance.norms)
    assert toy.cem.weight.isfinite() and toy.cem.weight > 0


def test_balanced_training_resumes_bit_for_bit():
    a, b = Toy(), Toy()
    for _ in range(5): a.step()
    b.cem.load_state_dict(copy.deepcopy(a.cem.state_dict()))
    for part in ('encoder', 'server'): getattr(b, part).load_state_dict(getattr(a, part).state_dict())
    weights = []
    for toy in (a, b):
        torch.manual_seed(3)
        toy.cem.fit(toy.encoder(toy.x).detach(), toy.y)
        for _ in range(3): toy.step()
        weights.append((toy.cem.weight.item(), toy.cem.l_c.item(), toy.encoder[0].weight.sum().item()))
    assert weights[0] == weights[1] and weights[0][0] > 0


def test_a_feature_whose_gradient_never_comes_is_an_error():
    toy = Toy()
    one = lambda z: toy.cem(z, toy.y[:40])
    z_hat = toy.encoder(toy.x[:40])
    one(z_hat); one(z_hat)  # a look at the loss is no error
    with pytest.raises(RuntimeError, match='backward'): one(z_hat)
    toy = Toy()
    for _ in range(2): toy.cem(toy.encoder(toy.x[:40]).detach(), toy.y[:40])
    with pytest.raises(RuntimeError, match='detached'): toy.cem(toy.encoder(toy.x[:40]).detach(), toy.y[:40])
    toy = Toy()
    for _ in range(4):
        toy.step()
        one(toy.encoder(toy.x[:40]))  # now and then is none either
    for _ in range(5):
        with torch.no_grad(): one(z_hat)
    toy.cem.eval()
    for _ in range(5): one(z_hat)


def test_a_view_that_no_other_loss_sees_is_an_error():
    toy = Toy()
    def step():
        z_hat = toy.encoder(toy.x[:40])
        (toy.others(z_hat, toy.y[:40]) + toy.cem(z_hat.flatten(1)*1, toy.y[:40])).backward()
    step()
    with pytest.raises(RuntimeError, match='very tensor'): step()


def test_looking_measures_nothing():
    z, y = features()
    cem = BalancedCEM(noise_std=SIGMA, n_classes=3, n_epochs=1).fit(z, y)
    (cem(p := z[:20].clone().requires_grad_(), y[:20]) + p.square().sum()).backward()
    before = copy.deepcopy(cem.state_dict())
    with torch.no_grad(): value = cem(z[20:60], y[20:60])
    assert not value.requires_grad and value.item() == pytest.approx(cem.weight.item()*cem.l_c.item())
    with torch.inference_mode(): assert cem(z[20:60], y[20:60]).item() == value.item()
    cem(z[20:60], y[20:60])  # needs no gradient
    cem.eval()
    assert grad_of(cem, z[20:60], y[20:60])[0].item() == pytest.approx(value.item())
    after = cem.state_dict()
    assert torch.equal(before['balance.norms'], after['balance.norms'])
    for key in ('pi', 'mu', 'Sigma'): assert torch.equal(before['_extra_state'][key], after['_extra_state'][key])


def test_balanced_images_of_features_in_half_precision_keep_small_pulls():
    "Of 1/N m each, too small for float16."
    z = torch.rand(3000, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    cems = [BalancedCEM(noise_std=SIGMA, n_classes=3, n_epochs=1).fit(t, None) for t in (z.half().float(), z.half())]
    for cem, t in zip(cems, (z.half().float(), z.half())):
        p = t[:64].clone().requires_grad_()
        (cem(p, None) + p.square().sum()).backward()
    a, b = (cem.balance.norms for cem in cems)
    assert torch.allclose(a, b, rtol=1e-3) and b[1] > 0


def test_balanced_pulls_by_nothing_where_features_coincide():
    same = torch.zeros(40, 6)
    flat = BalancedCEM(noise_std=SIGMA, n_classes=3, n_epochs=1).fit(same, torch.arange(40) % 3)
    for _ in range(3):
        p = same[:8].clone().requires_grad_()
        loss = flat(p, torch.arange(8) % 3) + p.sum()
        loss.backward()
        assert loss.isfinite() and torch.equal(p.grad, torch.ones_like(p))


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


def test_release_has_its_own_weight():
    z, y = features()
    cem = ReleaseCEM(noise_std=SIGMA, n_classes=3, n_epochs=7).fit(z, y)
    value, grad = grad_of(cem, z[:30], y[:30])
    assert cem.weight == 16 and value.item() == pytest.approx(16*cem.l_c.item())
    assert torch.allclose(grad, 16*grad_of(fitted('release')[0], z[:30], y[:30])[1])
    with pytest.raises(ValueError, match='n_components'): make('release', n_components=4)
    with pytest.raises(ValueError, match='class 1'): make('release').fit(z[:6], y[:6]*0)
    with pytest.raises(ValueError, match='batch of 0'): cem(z[:0], y[:0])
    for args in ((z[:9, :1], y[:9]), (z[:9], y[:1]), (z[:9], y[:9] + 1), (z[:9], y[:9] - 1)):
        with pytest.raises(ValueError, match='match them|give one for each'): cem(*args)
    with pytest.raises(ValueError, match='give one for each'): make('release').fit(z, y + 1)


def test_hinge():
    assert hinge(torch.tensor([0.0, 0.125*SIGMA**2]), SIGMA).tolist() == pytest.approx([0, 0], abs=1e-6)
    v = torch.tensor([0.5]).requires_grad_()
    hinge(v, SIGMA).sum().backward()
    assert v.grad.item() == pytest.approx(1/0.51)


# Every variant

@pytest.mark.parametrize('name', NAMES)
def test_every_variant_plugs_into_a_training(name):
    torch.manual_seed(0)
    y = torch.arange(120) % 3
    x = torch.randn(3, 8)[y] + torch.randn(120, 8)
    encoder, server = nn.Sequential(nn.Linear(8, 6), nn.Sigmoid()), nn.Linear(6, 3)
    cem, opt = CEMS[name](noise_std=SIGMA, n_classes=3, n_epochs=3), torch.optim.SGD(encoder.parameters(), 0.1)
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
        # the other losses' gradient, which is rounded, is part of what balanced measures
        assert got.item() == (pytest.approx(want.item(), rel=0.02) if name == 'balanced' else want.item())
        assert got.dtype == torch.float32
        assert grad.dtype == dtype and grad.isfinite().all()
    if name != 'release': assert half.pi.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_autocast_does_not_reach_the_mixture(name):
    cem, z, y = fitted(name)
    twin = copy.deepcopy(cem)
    got = grad_of(twin, z[:30], y[:30], autocast=torch.bfloat16)
    want = grad_of(cem, z[:30], y[:30])
    assert got[0] == want[0] and torch.equal(got[1], want[1]) and torch.equal(cem.Sigma, twin.Sigma)
    if name == 'balanced': assert torch.equal(cem.balance.norms, twin.balance.norms)
