import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cem_nb.cem_variants  # registers them
from cem_nb.cem import CEM, CEMS, DOSE, batch_moments, eq5, eq6, eq7, logdet_ratio
from cem_nb.core import record_of
from cem_nb.bounds import mutual_information_bound
from cem_nb.kmeans import assign

SIGMA = 0.1
NATS = dict(n_epochs=1, lam=6/DOSE)  # weight 6: with the 6 dimensions below a value is L_C in nats


def features(n=120, m=6, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centre = torch.randn(classes, m, generator=g, dtype=torch.float64)
    return centre[y] + 0.3*torch.randn(n, m, generator=g, dtype=torch.float64), y


def fitted(**kwargs):
    z, y = features()
    return CEM(**dict(noise_std=SIGMA, n_classes=3) | NATS | kwargs).fit(z, y), z, y


def grad_of(cem, z, y, autocast=None):
    "Value and gradient of a batch."
    z = z.clone().requires_grad_()
    with torch.autocast('cpu', dtype=autocast or torch.bfloat16, enabled=autocast is not None): value = cem(z, y)
    return value, torch.autograd.grad(value, z)[0]


def dense_step(cem, z, big_n):
    "Eq. 5, 6 and 7 with loops and dense matrices: value, new weights and new diagonal covariances."
    pi, mu, var = (t.numpy().copy() for t in (cem.pi, cem.mu, cem.Sigma))
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


# The equations

def random_mixture(k=5, m=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    R = torch.randn(k, m, m, generator=g, dtype=torch.float64)
    return torch.rand(k, generator=g, dtype=torch.float64).softmax(0), R @ R.mT/m


def test_eq5_keeps_the_sum_and_gives_a_full_batch_all():
    pi, _ = random_mixture()
    n = torch.tensor([3., 0., 1., 6., 0.], dtype=torch.float64)
    assert eq5(pi, n, 40).tolist() == pytest.approx([(p*30 + c)/40 for p, c in zip(pi.tolist(), n.tolist())])
    assert eq5(pi, n, 40).sum().item() == pytest.approx(1)
    assert torch.equal(eq5(pi, n, 10), n/10)


@pytest.mark.parametrize('full', [False, True])
def test_eq6_is_the_mixing_of_two_matrices(full):
    pi, Sigma = random_mixture()
    _, dSigma = random_mixture(seed=1)
    n = torch.tensor([3., 0., 1., 6., 0.], dtype=torch.float64)
    pi = eq5(pi, n, 40)
    want = [(1 - a)*S + a*D for a, S, D in zip((n/(pi*40)).tolist(), Sigma.numpy(), dSigma.numpy())]
    form = (lambda t: t) if full else (lambda t: t.diagonal(dim1=1, dim2=2))
    assert np.allclose(eq6(pi, form(Sigma), n, 40, form(dSigma)), form(torch.tensor(np.array(want))))


@pytest.mark.parametrize('full', [False, True])
def test_eq7_is_the_dense_sum(full):
    pi, Sigma = random_mixture()
    if not full: Sigma = Sigma.diagonal(dim1=1, dim2=2)
    dense = Sigma.numpy() if full else [np.diag(s) for s in Sigma.numpy()]
    det = lambda S: np.linalg.det(S)
    want = sum(p*(-math.log(p) + 0.5*math.log(det(S + SIGMA**2*np.eye(4))/det(SIGMA**2*np.eye(4))))
               for p, S in zip(pi.tolist(), dense))
    assert eq7(pi, Sigma, SIGMA).item() == pytest.approx(want, rel=1e-9)
    assert mutual_information_bound(pi, torch.zeros(5, 4), Sigma, SIGMA).item() == pytest.approx(want, rel=1e-6)


def test_eq7_of_an_empty_cluster_and_of_the_papers_512_dimensions_is_finite():
    pi = torch.tensor([1., 0.]).requires_grad_()
    Sigma = torch.rand(2, 512)
    value = eq7(pi, Sigma, 0.025)
    assert value.item() == pytest.approx(0.5*logdet_ratio(Sigma, 0.025)[0].item())
    assert torch.allclose(logdet_ratio(Sigma.double(), 0.025), logdet_ratio(Sigma.double().diag_embed(), 0.025))


def test_batch_moments_against_loops():
    cem, z, _ = fitted()
    labels = assign(z[:25], cem.mu)
    n, spread = batch_moments(z[:25], labels, cem.mu)
    for j in range(9):
        mine = z[:25][labels == j]
        assert n[j] == len(mine)
        if len(mine): assert torch.allclose(spread[j], (mine - cem.mu[j]).square().mean(0))
        else: assert (spread[j] == 0).all()


def test_pull_is_the_distance_to_the_mean_over_n_times_the_noisy_covariance():
    cem, z, y = fitted()
    _, grad = grad_of(cem, z[:30], y[:30])
    labels = assign(z[:30], cem.mu)
    assert torch.allclose(grad, (z[:30] - cem.mu[labels])/(120*(cem.Sigma[labels] + SIGMA**2)))


def test_moving_averages_are_the_moments_of_the_weighted_past():
    "Three batches of different sizes, against weights on every feature seen."
    cem, z, y = fitted()
    pi, second = cem.pi.clone(), cem.pi[:, None]*cem.Sigma
    seen, weight, fit = [], [], 1.0
    for rows in (slice(0, 40), slice(40, 47), slice(30, 90)):
        batch = z[rows] + 0.1
        rho = len(batch)/120
        weight, fit = [w*(1 - rho) for w in weight] + [1/120]*len(batch), fit*(1 - rho)
        seen += list(batch)
        grad_of(cem, batch, y[rows])
    x, w = torch.stack(seen), torch.tensor(weight, dtype=torch.float64)
    hot = nn.functional.one_hot(assign(x, cem.mu), 9).double()*w[:, None]
    assert torch.allclose(cem.pi, fit*pi + hot.sum(0))
    want = fit*second + torch.stack([(hot[:, j, None]*(x - cem.mu[j]).square()).sum(0) for j in range(9)])
    assert torch.allclose(cem.pi[:, None]*cem.Sigma, want)


def exact_information(z, weights, noise_std):
    "I(z; z_hat) of a weighted set of numbers, by the trapezoid rule."
    t = torch.linspace(z.min() - 8*noise_std, z.max() + 8*noise_std, 3000, dtype=torch.float64)
    p = torch.exp(-(t[:, None] - z)**2/(2*noise_std**2)) @ weights/(math.sqrt(2*math.pi)*noise_std)
    return (torch.trapezoid(torch.special.entr(p), t) - 0.5*math.log(2*math.pi*math.e*noise_std**2)).item()


def test_carried_sum_bounds_the_information_of_the_weighted_past():
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(100, 1, generator=g, dtype=torch.float64)*torch.rand(1, generator=g)
        cem = CEM(noise_std=SIGMA, n_classes=1, n_epochs=1, lam=1/DOSE).fit(z, None)
        seen, w = z[:, 0], torch.full((100,), 0.01, dtype=torch.float64)
        assert eq7(cem.pi, cem.Sigma, SIGMA).item() >= exact_information(seen, w, SIGMA)
        for _ in range(8):
            batch = z[torch.randperm(100, generator=g)[:25]]*(0.5 + torch.rand(1, generator=g))
            value, _ = grad_of(cem, batch, None)
            seen, w = torch.cat([seen, batch[:, 0]]), torch.cat([0.75*w, torch.full((25,), 0.01, dtype=torch.float64)])
            assert value.item() >= exact_information(seen, w, SIGMA)


# The class

def test_batches_follow_equations_5_to_7():
    cem, z, y = fitted()
    for i in range(0, 120, 24):
        batch = z[i:i + 24]
        want, pi, var = dense_step(cem, batch, 120)
        assert grad_of(cem, batch, y[i:i + 24])[0].item() == pytest.approx(want, rel=1e-9)
        assert np.allclose(cem.pi, pi) and np.allclose(cem.Sigma, var)


def test_loss_is_theorem_2_of_the_fitted_mixture():
    "With the whole data set as one batch, in one cluster, L_C is the bound of Eq. 16 exactly."
    cem, z, y = fitted(n_components=1)
    want = mutual_information_bound(torch.ones(1), z.mean(0, keepdim=True), z.var(0, correction=0)[None], SIGMA)
    assert cem(z, y).item() == pytest.approx(want.item(), rel=1e-4)


def test_gradient_is_that_of_the_dense_loss():
    cem, z, y = fitted()
    state = cem.get_extra_state()
    grad = grad_of(cem, z[:12], y[:12])[1]
    for i, d in ((0, 0), (3, 2), (11, 5)):
        step = torch.zeros_like(z[:12]); step[i, d] = 1e-5
        values = []
        for sign in (1, -1):
            cem.set_extra_state(state)
            values.append(dense_step(cem, z[:12] + sign*step, 120)[0])
        assert grad[i, d].item() == pytest.approx((values[0] - values[1])/2e-5, rel=1e-4)


def test_images_of_features_are_flattened():
    cem, z, y = fitted()
    twin = copy.deepcopy(cem)
    image = z[:12].view(12, 3, 2, 1).contiguous(memory_format=torch.channels_last)
    (a, ga), (b, gb) = grad_of(cem, z[:12], y[:12]), grad_of(twin, image, y[:12])
    assert a == b and torch.equal(ga, gb.flatten(1))


def test_weight_is_the_dose_over_the_epochs():
    z, y = features()
    for lam, n_epochs in ((16.0, 1), (16.0, 240), (4.0, 50), (0.0, 3)):
        cem, nats = CEM(noise_std=SIGMA, n_classes=3, n_epochs=n_epochs, lam=lam).fit(z, y), fitted()[0]
        (value, grad), (plain, plain_grad) = (grad_of(c, z[:30], y[:30]) for c in (cem, nats))
        assert type(cem.weight) is float and cem.weight == pytest.approx(lam*DOSE/n_epochs)
        assert cem.l_c.item() == pytest.approx(plain.item()/6) and not cem.l_c.requires_grad
        assert value.item() == pytest.approx(cem.weight*plain.item()/6)
        assert torch.allclose(grad, cem.weight*plain_grad/6)
    assert CEM(noise_std=SIGMA, n_classes=3, n_epochs=2).ramped is False


def test_total_pull_of_a_training_does_not_depend_on_images_batches_or_epochs():
    "lam*DOSE/m times the mean of |z - mu|/(Sigma + sigma^2): exactly for one batch an epoch, nearly for several."
    z, _ = features()
    z = z - z.mean(0)
    want = 16*DOSE/6*(z/(z.var(0, correction=0) + SIGMA**2)).norm(dim=1).mean().item()
    cases = ((1, 120, 1, 1e-6), (3, 360, 1, 1e-6), (1, 120, 4, 1e-6), (1, 40, 2, 0.05), (3, 30, 1, 0.05))
    for copies, batch, n_epochs, rel in cases:
        x, total = z.repeat(copies, 1), 0
        cem = CEM(noise_std=SIGMA, n_classes=1, n_components=1, n_epochs=n_epochs)
        for _ in range(n_epochs):
            cem.fit(x, None)
            for rows in torch.randperm(len(x)).split(batch):
                total += grad_of(cem, x[rows], None)[1].norm(dim=1).sum().item()
        assert total == pytest.approx(want, rel=rel)


def test_gradient_goes_on_through_the_encoder():
    torch.manual_seed(0)
    encoder, x, y = nn.Linear(4, 6).double(), torch.rand(60, 4, dtype=torch.float64), None
    cem = CEM(noise_std=SIGMA, n_classes=3, n_epochs=1).fit(encoder(x).detach(), y)
    cem(encoder(x[:20]), y).backward()
    z = encoder(x[:20])
    j = assign(z.detach(), cem.mu)
    pull = cem.weight*(z - cem.mu[j])/(60*6*(cem.Sigma[j] + SIGMA**2))
    want, = torch.autograd.grad((pull.detach()*z).sum(), encoder.weight)
    assert torch.allclose(encoder.weight.grad, want)


def test_minimising_it_tightens_the_clusters():
    cem, z, y = fitted()
    p = z.clone().requires_grad_()
    opt = torch.optim.SGD([p], 0.1)
    first = None
    for _ in range(40):
        cem.fit(p.detach(), y)
        loss = cem(p, y)
        first = first or loss.item()
        opt.zero_grad(); loss.backward(); opt.step()
    assert loss.item() < 0.8*first
    assert p.detach().var(0).sum() > 0.5*z.var(0).sum()  # the means stay apart


# What must not move, and what must be refused

def test_looking_does_not_change_the_training():
    z, y = features()
    cem = CEM(noise_std=SIGMA, n_classes=3, n_epochs=2).fit(z, y)
    grad_of(cem, z[:20], y[:20])
    before = cem.get_extra_state()
    with torch.no_grad(): value = cem(z[20:60], y[20:60])
    assert not value.requires_grad and value.item() == pytest.approx(cem.weight*cem.l_c.item())
    with torch.inference_mode(): assert cem(z[20:60], y[20:60]).item() == value.item()
    cem(z[20:60], y[20:60])  # needs no gradient
    cem.eval()
    assert grad_of(cem, z[20:60], y[20:60])[0].item() == pytest.approx(value.item())
    for key in ('pi', 'mu', 'Sigma'): assert torch.equal(before[key], cem.get_extra_state()[key])


def checkpointed(reentrant): return partial(checkpoint, use_reentrant=reentrant)


@pytest.mark.parametrize('variant', sorted({*CEMS} - {'balanced'}))  # which weighs itself against a loss of the same tensor
@pytest.mark.parametrize('how', [checkpointed(False), checkpointed(True)], ids=['plain', 'reentrant'])
def test_a_batch_that_is_computed_twice_counts_once(how, variant):
    "Two batches: the second has the state that the first has left."
    def trained(call):
        z, y = features()
        cem, grads = CEMS[variant](noise_std=SIGMA, n_classes=3, n_epochs=2).fit(z, y), []
        for i in (0, 20):
            x = z[i:i + 20].clone().requires_grad_()
            call(lambda x, cem=cem, y=y[i:i + 20]: cem(2*x, y), x).backward()
            grads.append(x.grad)
        return [*grads, cem.pi, cem.Sigma]
    for got, want in zip(trained(how), trained(lambda f, x: f(x))): torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_batch_of_long_ago_is_not_computed_again():
    cem, z, y = fitted()
    again = [checkpointed(False)(cem, z[i:i + 20].clone().requires_grad_(), y[i:i + 20]) for i in (0, 20, 40)]
    with pytest.raises(RuntimeError, match='call backward after every batch'): sum(again).backward()


def test_state_survives_and_global_randomness_is_left_alone():
    z, y = features()
    torch.manual_seed(5)
    want = torch.rand(1); torch.manual_seed(5)
    cem, *_ = fitted()
    grad_of(cem, z[:20], y[:20])
    assert torch.equal(torch.rand(1), want)
    twin = CEM(noise_std=SIGMA, n_classes=3, **NATS)
    twin.load_state_dict(cem.state_dict())
    for c in (cem, twin): c.fit(z + 0.1, y)
    assert torch.equal(cem(z[20:50], y[20:50]), twin(z[20:50], y[20:50]))


def test_state_can_be_saved_as_plain_tensors(tmp_path):
    cem, z, y = fitted()
    torch.save(cem.state_dict(), tmp_path/'state.pt')
    twin = CEM(noise_std=SIGMA, n_classes=3, **NATS)
    twin.load_state_dict(torch.load(tmp_path/'state.pt', weights_only=True))
    assert torch.equal(cem(z, y), twin(z, y))


def test_foreign_states_are_refused_and_change_nothing():
    cem, z, y = fitted()
    for kwargs in (dict(n_components=4), dict(n_classes=4, n_components=9)):
        other = CEM(**dict(noise_std=SIGMA, n_classes=3, n_epochs=1) | kwargs)
        with pytest.raises(ValueError, match=next(iter(kwargs))): other.load_state_dict(cem.state_dict())
        assert other.n_fits == 0 and other.pi is None
    with pytest.raises(ValueError, match='variant'):
        CEM(noise_std=SIGMA, n_classes=3, n_epochs=1).set_extra_state(dict(n_fits=1, weights=cem.pi))
    state = CEM(noise_std=SIGMA, n_classes=3, n_epochs=1).state_dict()
    cem.load_state_dict(state)  # of one that was never fitted
    with pytest.raises(RuntimeError, match='fit'): cem(z, y)


def test_state_goes_to_the_device_of_the_module():
    cem, *_ = fitted()
    for on in (fitted()[0].to('meta'), CEM(noise_std=SIGMA, n_classes=3, n_epochs=1).to('meta')):
        on.set_extra_state(cem.get_extra_state())
        assert on.mu.device.type == 'meta'


def test_bad_input():
    for bad in (dict(noise_std=0.0), dict(noise_std=-1.0), dict(noise_std=math.inf), dict(lam=-1.0), dict(lam=math.nan),
                dict(n_components=0), dict(n_components=1.5), dict(n_classes=0), dict(n_epochs=0), dict(n_epochs=1.5)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            CEM(**dict(noise_std=SIGMA, n_classes=3, n_epochs=1) | bad)
    with pytest.raises(TypeError, match='n_epochs'): CEM(noise_std=SIGMA, n_classes=3)
    z, y = features()
    with pytest.raises(RuntimeError, match='fit'): CEM(noise_std=SIGMA, n_classes=3, n_epochs=1)(z, y)
    cem, *_ = fitted()
    for poison in (math.nan, math.inf):
        broken = z[:10].clone(); broken[3, 2] = poison
        with pytest.raises(ValueError): cem(broken, y[:10])
        with pytest.raises(ValueError): cem.fit(broken, y[:10])
    with pytest.raises(ValueError, match='rows'): cem.fit(z[:5], y[:5])


def test_a_batch_larger_than_the_fit_is_refused():
    z, y = features()
    for n, b in ((100, 120), (119, 120), (100, 0)):
        cem = CEM(noise_std=SIGMA, n_classes=3, n_epochs=1).fit(z[:n], y[:n])
        with pytest.raises(ValueError, match=f'batch of {b}'): cem(z[:b], y[:b])
    assert cem(z[:100], y[:100]).isfinite() and cem.pi.min() >= 0


def test_settings_record_is_made_from_the_signature():
    Settings = record_of(CEM, leave_out=('noise_std', 'n_classes', 'n_epochs', 'seed'))
    assert Settings().model_dump() == dict(lam=16.0, n_components=None)
    for wrong in (dict(lam=-1.0), dict(n_components=0), dict(scale='sum'), dict(reading='paper')):
        with pytest.raises(ValueError): Settings(**wrong)
    assert CEM(noise_std=SIGMA, n_classes=3, n_epochs=1, **Settings(n_components=4).model_dump()).n_components == 4
    assert CEMS['diag'] is CEM
    with pytest.raises(ValueError, match='variant of CEM'): CEMS['tied']


def test_features_that_come_to_coincide_can_be_fitted_again():
    cem, z, y = fitted(n_components=3)
    together = cem.mu[torch.cdist(z, cem.mu).argmin(1)]
    grad_of(cem, together, y)  # the whole data set as one batch: every variance is now 0
    assert cem.Sigma.max() == 0
    assert cem.fit(together, y)(together[:10], y[:10]).isfinite()


def test_one_sample_a_cluster_and_coincident_features_stay_finite():
    cem, z, y = fitted()
    assert grad_of(cem, z[:1], y[:1])[1].isfinite().all()
    same = torch.zeros(40, 6)
    flat = CEM(noise_std=SIGMA, n_classes=3, n_epochs=1).fit(same, torch.arange(40) % 3)
    for _ in range(3):  # no pull at all from CEM
        p = same[:8].clone().requires_grad_()
        loss = flat(p, torch.arange(8) % 3) + p.sum()
        loss.backward()
        assert loss.isfinite() and torch.equal(p.grad, torch.ones_like(p))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_features_are_only_rounded(dtype):
    "More images than float16 can count, in one cluster; then an epoch of batches whose weights must still sum to 1."
    one = torch.rand(70_000, 1).to(dtype)
    assert CEM(noise_std=SIGMA, n_classes=1, n_components=1, n_epochs=1).fit(one, None)(one[:64], None).isfinite()
    z, y = features()
    half, wide = (CEM(noise_std=SIGMA, n_classes=3, n_epochs=1).fit(t, y) for t in (z.to(dtype), z.to(dtype).float()))
    for i in range(0, 120, 12):
        (got, grad), (want, _) = (grad_of(c, b, y[i:i + 12]) for c, b in
                                  ((half, z[i:i + 12].to(dtype)), (wide, z[i:i + 12].to(dtype).float())))
        assert got.item() == want.item() and got.dtype == torch.float32
        assert grad.dtype == dtype and grad.isfinite().all()
    assert half.pi.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_does_not_reach_the_mixture(dtype):
    z, y = torch.rand(600, 64, generator=torch.Generator().manual_seed(0))*255, torch.arange(600) % 3
    a, b = (CEM(noise_std=0.025, n_classes=3, n_components=1, **NATS).fit(z, y) for _ in range(2))
    want = grad_of(a, z[:128], y[:128])
    got = grad_of(b, z[:128], y[:128], autocast=dtype)
    assert got[0] == want[0] and torch.equal(got[1], want[1])
    assert torch.equal(a.Sigma, b.Sigma) and torch.equal(a.pi, b.pi)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_features_that_are_no_numbers_are_refused_and_leave_the_mixture_alone(bad):
    cem, z, y = fitted()
    before = [t.clone() for t in (cem.pi, cem.mu, cem.Sigma)]
    batch = z[:12].clone().requires_grad_()
    with torch.no_grad(): batch[3, 2] = bad
    with pytest.raises(ValueError, match='NaN or inf'): cem(batch, y[:12])
    assert all(torch.equal(a, b) for a, b in zip(before, (cem.pi, cem.mu, cem.Sigma)))


@pytest.mark.parametrize('variant', ['diag', 'pairwise', 'full', 'full-pairwise', 'letter'])
def test_a_batch_that_is_computed_again_in_eval_mode_or_after_another_finds_its_own_state(variant):
    z, y = torch.rand(200, 8, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 3
    cem = CEMS[variant](noise_std=.1, n_classes=3, n_epochs=5).fit(z, y)
    step = lambda: (cem(q := z[:30].clone().requires_grad_(), y[:30]).backward(), q.grad)[1]
    for _ in range(3): step()
    again = lambda z, y: (checkpoint(lambda q: cem(q*1, y), q := z.clone().requires_grad_(), use_reentrant=False).backward(), q.grad)[1]
    cem.eval()
    for part in (slice(0, 30), slice(50, 80)):
        q = z[part].clone().requires_grad_()
        cem(q, y[part]).backward()
        assert torch.allclose(again(z[part], y[part]), q.grad, atol=1e-7)
    cem.train()  # a log without gradients between a batch and its backward pass
    q, twin = z[:30].clone().requires_grad_(), copy.deepcopy(cem)
    loss = checkpoint(lambda q: cem(q*1, y[:30]), q, use_reentrant=False)
    with torch.no_grad(): cem(z[:30], y[:30])
    loss.backward()
    p = z[:30].clone().requires_grad_()
    twin(p, y[:30]).backward()
    assert torch.allclose(q.grad, p.grad, atol=1e-7)


def test_a_mixture_in_float64_takes_batches_in_float32():
    z, y = torch.rand(200, 8, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 3
    for variant in CEMS:
        cem = CEMS[variant](noise_std=.1, n_classes=3, n_epochs=5).fit(z.double(), y)
        assert cem(z[:30], y[:30]).isfinite(), variant
