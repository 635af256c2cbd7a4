"cem_nb.fisher against dense Jacobians, closed forms of linear Gaussian models and Monte Carlo."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal, Normal

from cem_nb.fisher import (GaussianPrior, fisher_diag, fisher_matrix, fisher_trace_mc, fit_prior, unbiased_mse_bound,
                           van_trees_diag, van_trees_matrix, van_trees_trace)

some = settings(deadline=None, max_examples=15, derandomize=True)


def rng(seed): return torch.Generator().manual_seed(seed)


def conv_net(out=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                         nn.Conv2d(6, out, 3, padding=1), nn.Sigmoid()).double().eval()


def dense_jacobians(f, x):
    "J [B, m, d], one image at a time."
    return torch.stack([jacobian(f, v[None]).reshape(-1, v.numel()) for v in x])


def linear(W): return lambda x: x @ W.T


def prior(var, mean=0.): return GaussianPrior(torch.full_like(var, mean), var)


FORMS = {'matrix': van_trees_matrix, 'pixels': van_trees_diag, 'trace': van_trees_trace}


# the information

@pytest.mark.parametrize('out', [1, 3, 20], ids=['fewer features', 'near', 'more features'])
def test_diagonal_matches_the_dense_jacobian(out):
    f, x = conv_net(out), torch.rand(4, 2, 6, 6, generator=rng(1), dtype=torch.float64)
    want = dense_jacobians(f, x).square().sum(1).reshape(x.shape)/0.3**2
    got = fisher_diag(f, x, 0.3)
    assert got.shape == x.shape and got.dtype == torch.float64 and not got.requires_grad
    assert torch.allclose(got, want, rtol=1e-10) and want.max() > 0
    assert torch.allclose(fisher_diag(f.float(), x.float(), 0.3), want, rtol=1e-3, atol=1e-6*want.max())


@pytest.mark.parametrize('out', [1, 20], ids=['fewer features', 'more features'])
def test_matrix_matches_the_dense_jacobian(out):
    f, x = conv_net(out), torch.rand(4, 2, 6, 6, generator=rng(1), dtype=torch.float64)
    J = dense_jacobians(f, x)
    got = fisher_matrix(f, x, 0.3)
    assert got.shape == (4, 72, 72) and got.dtype == torch.float64 and not got.requires_grad
    assert torch.allclose(got, J.mT @ J/0.3**2, rtol=1e-9, atol=1e-12) and got.max() > 0
    assert torch.allclose(got.diagonal(dim1=1, dim2=2).reshape(x.shape), fisher_diag(f, x, 0.3), rtol=1e-10)
    assert torch.allclose(fisher_matrix(f.float(), x.float(), 0.3), got, rtol=1e-3, atol=1e-6*got.max())


@some
@given(chunk=st.integers(1, 80), out=st.sampled_from([1, 20]))
def test_chunks_change_nothing(chunk, out):
    f, x = conv_net(out), torch.rand(2, 2, 6, 6, generator=rng(1), dtype=torch.float64)
    assert torch.allclose(fisher_matrix(f, x, 0.3, chunk=chunk), fisher_matrix(f, x, 0.3, chunk=999), atol=1e-12)
    assert torch.allclose(fisher_diag(f, x, 0.3, chunk=chunk), fisher_diag(f, x, 0.3, chunk=999), rtol=1e-12)
    a, b = (fisher_trace_mc(f, x, 0.3, 11, chunk=c, generator=rng(0)) for c in (chunk, 999))
    assert torch.allclose(a[0], b[0], rtol=1e-12) and torch.allclose(a[1], b[1], rtol=1e-9)


def test_images_of_a_batch_do_not_mix():
    f, x = conv_net(), torch.rand(5, 2, 6, 6, generator=rng(1), dtype=torch.float64)
    one_by_one = torch.cat([fisher_diag(f, v[None], 0.3) for v in x])
    assert torch.allclose(fisher_diag(f, x, 0.3), one_by_one, rtol=1e-10)


def test_it_is_the_variance_of_the_score():
    # E[(d/dx log p(z|x))^2] over the noise, the score by autograd through the density
    f, std = conv_net(1), 0.2
    x = torch.rand(1, 2, 4, 4, generator=rng(2), dtype=torch.float64)
    torch.manual_seed(0)
    z = Normal(f(x).detach().flatten(), std).sample((4000,))
    score = jacobian(lambda v: Normal(f(v).flatten(), std).log_prob(z).sum(1), x, vectorize=True).reshape(4000, -1)
    mean, error = score.square().mean(0), score.square().std(0)/4000**0.5
    got = fisher_diag(f, x, std).flatten()
    assert ((mean - got).abs() < 5*error + 1e-12).all() and (error < 0.05*mean + 1e-12).all()


@some
@given(std=st.floats(1e-3, 1e3))
def test_information_scales_with_the_noise(std):
    f, x = conv_net(), torch.rand(1, 2, 6, 6, generator=rng(1), dtype=torch.float64)
    assert torch.allclose(fisher_diag(f, x, std)*std**2, fisher_diag(f, x, 1.), rtol=1e-10)


def test_hutchinson_is_within_its_error_bar():
    f, x = conv_net(), torch.rand(200, 2, 6, 6, generator=rng(1), dtype=torch.float64)
    exact = dense_jacobians(f, x).square().sum((1, 2))/0.3**2
    guess, error = fisher_trace_mc(f, x, 0.3, 64, generator=rng(0))
    z = (guess - exact)/error
    assert (z.abs() < 5).all() and 0.85 < z.std() < 1.2 and abs(z.mean()) < 0.35
    more = fisher_trace_mc(f, x, 0.3, 256, generator=rng(1))[1]
    assert (error/more).median().item() == pytest.approx(2, rel=0.1)
    a, b = (fisher_trace_mc(f, x, 0.3, 4, generator=rng(5))[0] for _ in range(2))
    assert torch.equal(a, b)


def test_hutchinson_is_exact_for_orthogonal_columns():
    W = torch.diag(torch.tensor([1., 2., 3.], dtype=torch.float64))
    guess, error = fisher_trace_mc(linear(W), torch.zeros(2, 3, dtype=torch.float64), 1., 5)
    assert guess.tolist() == [14., 14.] and error.tolist() == [0., 0.]


# unbiased attackers

def test_unbiased_bound_is_met_by_least_squares():
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64))[0]
    std, x = 0.3, torch.randn(4, dtype=torch.float64)
    W = 2*Q  # isotropic: equality
    trace = fisher_diag(linear(W), x[None], std).sum(1)
    x_hat = torch.linalg.lstsq(W, (W @ x)[:, None] + std*torch.randn(8, 100_000, dtype=torch.float64)).solution
    errors = (x_hat - x[:, None]).square().mean(0)
    assert unbiased_mse_bound(trace, 4).item() == pytest.approx(std**2/4)
    assert abs(errors.mean() - std**2/4) < 5*errors.std()/100_000**0.5


@some
@given(d=st.integers(1, 6), seed=st.integers(0, 999), std=st.floats(0.01, 10))
def test_unbiased_bound_is_below_cramer_rao(d, seed, std):
    W = torch.randn(d + 2, d, generator=rng(seed), dtype=torch.float64)
    trace = fisher_diag(linear(W), torch.zeros(1, d, dtype=torch.float64), std).sum(1)
    cramer_rao = std**2*torch.linalg.inv(W.T @ W).trace().item()/d
    bound = unbiased_mse_bound(trace, d).item()
    assert 0 < bound <= cramer_rao*(1 + 1e-9)
    assert bound == pytest.approx(d*std**2/W.square().sum().item())


def test_no_information_means_no_unbiased_attack():
    assert unbiased_mse_bound(torch.zeros(2), 5).tolist() == [math.inf, math.inf]


# van Trees

@some
@given(d=st.integers(1, 6), m=st.integers(1, 8), seed=st.integers(0, 999), std=st.floats(0.01, 10))
def test_van_trees_is_below_the_exact_minimal_mse(d, m, seed, std):
    W = torch.randn(m, d, generator=rng(seed), dtype=torch.float64)
    p = prior(0.01 + torch.rand(d, generator=rng(seed + 1), dtype=torch.float64))
    posterior = torch.linalg.inv(W.T @ W/std**2 + torch.diag(1/p.var))
    exact = posterior.trace().item()/d
    info = fisher_diag(linear(W), p.sample(3, rng(0)), std)
    whole = fisher_matrix(linear(W), p.sample(3, rng(0)), std)
    matrix, pixels, trace = (f(form, p).mse for f, form in zip(FORMS.values(), (whole, info, info.sum(1))))
    assert 0 < trace <= pixels*(1 + 1e-9) and pixels <= exact*(1 + 1e-9)
    assert matrix == pytest.approx(exact, rel=1e-8)  # attained: the posterior covariance is M^-1
    assert trace == pytest.approx(d/(W.square().sum().item()/std**2 + (1/p.var).sum().item()))


@some
@given(d=st.integers(1, 6), a=st.floats(0.1, 10), v=st.floats(1e-3, 10), std=st.floats(0.01, 10),
       seed=st.integers(0, 99))
def test_equality_when_everything_is_isotropic(d, a, v, std, seed):
    W = a*torch.linalg.qr(torch.randn(d, d, generator=rng(seed), dtype=torch.float64))[0]
    p = prior(torch.full((d,), v, dtype=torch.float64))
    info, exact = fisher_diag(linear(W), p.mean[None], std), v*std**2/(a**2*v + std**2)
    for f, form in zip(FORMS.values(), (fisher_matrix(linear(W), p.mean[None], std), info, info.sum(1))):
        assert f(form, p).mse == pytest.approx(exact)


def test_pixel_form_is_exact_for_a_diagonal_encoder_and_survives_a_dead_pixel():
    p = prior(torch.tensor([1., .5, 1e-12], dtype=torch.float64))
    W = torch.diag(torch.tensor([1., 3., 2.], dtype=torch.float64))
    info = fisher_diag(linear(W), p.mean[None], 0.5)
    exact = np.mean([1/(4 + 1), 1/(36 + 2), 1e-12])
    assert van_trees_diag(info, p).mse == pytest.approx(exact)
    assert van_trees_matrix(fisher_matrix(linear(W), p.mean[None], 0.5), p).mse == pytest.approx(exact)
    assert van_trees_trace(info.sum(1), p).mse < 1e-10  # the trace form does not survive it


def test_no_attack_beats_van_trees_on_images_of_the_prior():
    # a nonlinear encoder on two pixels: the posterior mean, by importance sampling from the prior, is the best attack
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)).double().eval()
    p = prior(torch.tensor([.5, .2], dtype=torch.float64), mean=0.3)
    x, atoms = p.sample(2000, rng(0)), p.sample(4000, rng(1))
    for std in (0.1, 0.5, 3.):
        with torch.no_grad(): z, z_atoms = net(x), net(atoms)
        z = z + std*torch.randn(z.shape, generator=rng(2), dtype=torch.float64)
        weight = (-torch.cdist(z, z_atoms).square()/(2*std**2)).softmax(1)
        errors = (weight @ atoms - x).square().mean(1)
        bound = van_trees_matrix(fisher_matrix(net, x, std), p)
        assert bound.mse >= van_trees_diag(fisher_diag(net, x, std), p).mse > 0.05*errors.mean()
        assert bound.mse < errors.mean() + 3*(errors.std()/2000**0.5 + bound.se)


def test_van_trees_limits():
    p = prior(torch.tensor([.5, .2], dtype=torch.float64))
    assert van_trees_diag(torch.zeros(3, 2), p) == (pytest.approx(0.35), 0, 0)  # no information: the variance
    assert van_trees_matrix(torch.zeros(3, 2, 2), p) == (pytest.approx(0.35), 0, 0)
    assert van_trees_trace(torch.zeros(3), p) == (pytest.approx(2/7), 0, 0)  # its harmonic mean
    assert van_trees_diag(torch.full((3, 2), 1e12), p).mse == pytest.approx(1e-12)
    assert van_trees_matrix(1e12*torch.eye(2).expand(3, 2, 2), p).mse == pytest.approx(1e-12)
    for f, one in zip(FORMS.values(), (torch.eye(2)[None], torch.ones(1, 2), torch.ones(1))):  # one image has no spread
        assert math.isnan(f(one, p).se) and math.isnan(f(one, p).bias)


def forms_of(whole):
    "Matrices [B, d, d], their diagonals [B, d], their traces [B]."
    diag = whole.diagonal(dim1=1, dim2=2)
    return {'matrix': whole, 'pixels': diag, 'trace': diag.sum(1)}


def random_information(n, seed, d=3):
    "Matrices of rank 1 to d whose size varies a lot from image to image."
    J = torch.randn(n, 2, d, generator=rng(seed), dtype=torch.float64)
    return J.mT @ J*torch.randn(n, 1, 1, generator=rng(seed + 1), dtype=torch.float64).exp()


@pytest.mark.parametrize('form', ['matrix', 'pixels', 'trace'])
def test_standard_error_against_dense_algebra_and_replicates(form):
    p = prior(torch.tensor([1., .3, .1], dtype=torch.float64))
    J = np.diag(1/p.var.numpy())
    dense = {'matrix': lambda m: np.trace(np.linalg.inv(m + J))/3, 'pixels': lambda m: np.mean(1/np.diag(m + J)),
             'trace': lambda m: 3/np.trace(m + J)}[form]
    whole = random_information(200, 0)
    bound = FORMS[form]
    got = bound(forms_of(whole)[form], p)
    assert got.mse == pytest.approx(dense(whole.mean(0).numpy()), rel=1e-10)
    # the jackknife, an independent estimate of both, from the dense form with one image left out
    out = np.array([dense((whole.sum(0) - one).numpy()/199) for one in whole])
    assert got.se == pytest.approx(np.sqrt(199/200*((out - out.mean())**2).sum()), rel=0.15)
    assert got.bias == pytest.approx(199*(out.mean() - got.mse), rel=0.15) and got.bias > 0
    # many samples of 100 images: their spread is the standard error, their mean too high by the bias
    many = np.array([bound(forms_of(random_information(100, 10 + 2*i))[form], p) for i in range(300)])
    truth = bound(forms_of(random_information(100_000, 9001))[form], p)
    assert np.median(many[:, 1]) == pytest.approx(many[:, 0].std(), rel=0.2)
    excess, error = many[:, 0].mean() - truth.mse, many[:, 0].std()/300**0.5 + truth.se
    assert excess > 0 and abs(excess - many[:, 2].mean()) < 3*error + 0.3*excess


def test_standard_error_sees_the_probes_of_hutchinson():
    f, p = conv_net(), prior(torch.full((2, 6, 6), 0.05, dtype=torch.float64), 0.5)
    x = p.sample(100, rng(0))
    exact = van_trees_trace(fisher_diag(f, x, 0.3).flatten(1).sum(1), p)
    rough = van_trees_trace(fisher_trace_mc(f, x, 0.3, 2, generator=rng(1))[0], p)
    assert rough.se > exact.se > 0 and abs(rough.mse - exact.mse) < 4*rough.se


@pytest.mark.parametrize('shape', [(1,), (1, 1)])
def test_with_one_pixel_all_forms_are_one(shape):
    p = GaussianPrior(torch.zeros(shape), torch.full(shape, 0.5))
    info = random_information(4, 0, d=1)
    got = van_trees_matrix(info, p), van_trees_diag(info.reshape(4, *shape), p), van_trees_trace(info[:, 0, 0], p)
    for other in got[1:]: assert got[0] == pytest.approx(other, rel=1e-10)
    assert van_trees_matrix(torch.ones(4, 1, 1), p).mse == pytest.approx(1/3)


def test_matrices_and_diagonals_of_a_square_image_are_not_confused():
    # images [2, 2] have matrices [4, 4]; images of shape [4, 4] have diagonals of that shape
    info = random_information(5, 0, d=4)
    p, q = GaussianPrior(torch.zeros(2, 2), torch.ones(2, 2)), GaussianPrior(torch.zeros(4, 4), torch.ones(4, 4))
    dense = torch.linalg.inv(info.mean(0) + torch.eye(4)).trace()/4
    assert van_trees_matrix(info, p).mse == pytest.approx(dense.item())
    assert van_trees_diag(info.abs(), q).mse == pytest.approx((1/(info.abs().mean(0) + 1)).mean().item())
    with pytest.raises(ValueError, match='shape'): van_trees_matrix(info, q)
    with pytest.raises(ValueError, match='shape'): van_trees_diag(info, p)


# the prior

def test_prior_matches_numpy_and_torch_distributions():
    x = torch.rand(500, 3, 4, generator=rng(0))*torch.arange(4)  # the first column is constant
    p = fit_prior(x, floor=1e-4)
    np.testing.assert_allclose(p.mean, x.double().numpy().mean(0))
    np.testing.assert_allclose(p.var, np.maximum(x.double().numpy().var(0, ddof=1), 1e-4))
    family = MultivariateNormal(p.mean.flatten(), torch.diag(p.var.flatten()))
    assert p.entropy == pytest.approx(family.entropy().item())
    draws = p.sample(50_000, rng(1))
    score = torch.func.vmap(torch.func.grad(family.log_prob))(draws.flatten(1))
    assert torch.allclose(score.square().mean(0).reshape(3, 4), p.information, rtol=0.05)  # J = E[score^2]
    assert torch.allclose(draws.var(0), p.var, rtol=0.05) and draws.shape == (50_000, 3, 4)
    assert torch.equal(p.sample(3, rng(2)), p.sample(3, rng(2)))


# bad input

X = torch.rand(2, 2, 6, 6, dtype=torch.float64)
P = GaussianPrior(torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize('call, match', [
    (lambda: fisher_diag(conv_net(), X, 0.), 'noise_std'),
    (lambda: fisher_diag(conv_net(), X, -1.), 'noise_std'),
    (lambda: fisher_diag(conv_net(), X, math.nan), 'noise_std'),
    (lambda: fisher_diag(conv_net(), X*math.inf, 1.), 'NaN or inf'),
    (lambda: fisher_diag(conv_net(), X[:0], 1.), 'images is 0'),
    (lambda: fisher_diag(lambda x: x, torch.ones(3), 1.), r'\[N, ...\]'),
    (lambda: fisher_diag(conv_net().train(), X, 1.), 'eval'),
    (lambda: fisher_diag(lambda x: x.sum(0, keepdim=True), X, 1.), 'keep the batch axis'),
    (lambda: fisher_diag(lambda x: (x*0).sqrt(), X, 1.), 'derivative is NaN or inf'),
    (lambda: fisher_trace_mc(lambda x: (x*0).sqrt(), X, 1.), 'derivative is NaN or inf'),
    (lambda: fisher_diag(conv_net(), X, 1., chunk=0), 'chunk'),
    (lambda: fisher_trace_mc(conv_net(), X, 1., chunk=0), 'chunk'),
    (lambda: fisher_trace_mc(conv_net(), X, 1., 1), 'n_probes'),
    (lambda: fisher_trace_mc(conv_net().train(), X, 1.), 'eval'),
    (lambda: unbiased_mse_bound(torch.tensor([-1.]), 3), '>= 0'),
    (lambda: unbiased_mse_bound(torch.tensor([math.nan]), 3), 'finite'),
    (lambda: unbiased_mse_bound(torch.ones(2), 0), 'd is 0'),
    (lambda: van_trees_diag(torch.ones(2, 4), P), 'shape'),
    (lambda: van_trees_trace(torch.ones(0), P), 'shape'),
    (lambda: van_trees_trace(torch.tensor(1.), P), 'shape'),
    (lambda: van_trees_diag(-torch.ones(2, 3), P), '>= 0'),
    (lambda: van_trees_trace(-torch.ones(2), P), '>= 0'),
    (lambda: van_trees_trace(torch.tensor([1., math.inf]), P), 'NaN or inf'),
    (lambda: van_trees_matrix(-torch.eye(3)[None], P), '>= 0'),
    (lambda: van_trees_matrix(torch.tensor([[[0., 1, 0], [1, 0, 0], [0, 0, 0]]]), P), '>= 0'),  # eigenvalue -1
    (lambda: van_trees_matrix(torch.ones(2, 3, 3).triu(), P), 'symmetric'),
    (lambda: van_trees_matrix(torch.full((2, 3, 3), math.nan), P), 'NaN or inf'),
    (lambda: van_trees_matrix(torch.ones(2, 3, 4), P), 'shape'),
    (lambda: fisher_matrix(conv_net(), X, 0.), 'noise_std'),
    (lambda: fisher_matrix(conv_net(), X*math.inf, 1.), 'NaN or inf'),
    (lambda: fisher_matrix(conv_net().train(), X, 1.), 'eval'),
    (lambda: fisher_diag(conv_net().train().forward, X, 1.), 'eval'),
    (lambda: fisher_matrix(conv_net(), X, 1., chunk=0), 'chunk'),
    (lambda: fisher_matrix(lambda x: (x*0).sqrt(), X, 1.), 'derivative is NaN or inf'),
    (lambda: GaussianPrior(torch.zeros(2), torch.tensor([1., 0.])), 'floor'),
    (lambda: GaussianPrior(torch.zeros(2), torch.ones(3)), 'shape'),
    (lambda: fit_prior(torch.zeros(1, 2), 0.1), '>= 2'),
    (lambda: fit_prior(torch.zeros(5, 2), 0.), 'floor'),
    (lambda: fit_prior(torch.full((5, 2), math.nan), 0.1), 'NaN or inf'),
])
def test_bad_input_says_what_to_do(call, match):
    with pytest.raises(ValueError, match=match): call()


@pytest.mark.parametrize('x', [np.zeros((2, 3)), torch.zeros(2, 3, dtype=torch.uint8)])
def test_wrong_types(x):
    with pytest.raises(TypeError, match='torch tensor|floating'): fisher_diag(lambda v: v, x, 1.)


@pytest.mark.parametrize('cut', [lambda f: torch.no_grad()(f), lambda f: torch.inference_mode()(f), lambda f: lambda x: f(x.detach()),
                                 lambda f: lambda x: f(x).detach()], ids=['no_grad', 'inference_mode', 'detach', 'detach after'])
@pytest.mark.parametrize('information', [fisher_diag, fisher_matrix, fisher_trace_mc])
def test_an_encoder_that_cuts_its_gradients_has_no_information_of_0(cut, information):
    for width in (3, 8):  # fewer features than pixels, and more
        net = torch.nn.Linear(5, width)
        with pytest.raises(ValueError, match='cuts its gradients'): information(cut(net), torch.rand(2, 5), 0.1)
    assert (fisher_diag(lambda x: torch.ones_like(x), torch.rand(2, 5), 0.1) == 0).all()  # a constant tells nothing indeed


def test_autocast_does_not_reach_the_information():
    net, x = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 3)).eval(), torch.rand(2, 5)
    want = fisher_diag(net, x, 0.1)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(fisher_diag(net, x, 0.1), want)
