"cem_nb.logdet against dense algebra and finite differences."
import pytest
import torch
from hypothesis import given, strategies as st
from laws import NAN, mixture, rng, some

from cem_nb.bounds import mutual_information_bound
from cem_nb.logdet import logdet_gram, logdet_update


@some
@given(n=st.integers(1, 8), m=st.integers(1, 8), s2=st.floats(1e-3, 10), seed=st.integers(0, 999))
def test_logdet_gram_matches_dense(n, m, s2, seed):
    X = torch.randn(2, n, m, generator=rng(seed), dtype=torch.float64)
    want = torch.linalg.slogdet(torch.eye(m).double() + X.mT @ X/(n*s2))[1]
    assert torch.allclose(logdet_gram(X, s2), want, rtol=1e-9, atol=1e-9)
    assert logdet_gram(X[0], s2).item() == pytest.approx(want[0].item(), abs=1e-9)
    padded = torch.cat([X, X.new_zeros(2, 3, m)], 1)
    assert torch.allclose(logdet_gram(padded, s2, n=n), want, rtol=1e-9, atol=1e-9)


@some
@given(n=st.integers(1, 8), m=st.integers(1, 6), w=st.sampled_from([0., 1e-3, 0.5, 20.]), seed=st.integers(0, 999))
def test_logdet_update_matches_dense(n, m, w, seed):
    A = mixture(3, m, 'full', seed)[2]
    X = torch.randn(3, n, m, generator=rng(seed), dtype=torch.float64)
    want = torch.linalg.slogdet(A + w*X.mT @ X)[1]
    assert torch.allclose(logdet_update(torch.linalg.cholesky(A), X, w), want, rtol=1e-9, atol=1e-9)
    ws = torch.tensor([0., w, 2*w + 1], dtype=torch.float64)  # a weight per cluster
    want = torch.linalg.slogdet(A + ws[:, None, None]*X.mT @ X)[1]
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
    slow, = torch.autograd.grad(torch.logdet(torch.eye(m).double() + X.mT @ X/(n*0.3)).sum(), X)
    assert torch.allclose(gram, slow, atol=1e-10)
    up, = torch.autograd.grad(logdet_update(L.expand(*shape[:-2], m, m), X, 0.7).sum(), X)
    slow, = torch.autograd.grad(torch.logdet(L @ L.T + 0.7*X.mT @ X).sum(), X)
    assert torch.allclose(up, slow, atol=1e-10)


def test_logdet_gram_is_the_full_covariance_term_of_theorem_2():
    X = torch.randn(16, 512, generator=rng(0))
    X = X - X.mean(0)
    got = logdet_gram(X, 0.025**2)
    s = (X.double().T @ X.double()/16)[None]
    want = mutual_information_bound(torch.ones(1).double(), torch.zeros(1, 512).double(), s, 0.025)
    assert got.dtype == torch.float32 and got.item()/2 == pytest.approx(want.item(), rel=1e-6)
    assert want < mutual_information_bound(torch.ones(1).double(), torch.zeros(1, 512).double(),
                                           s.diagonal(dim1=1, dim2=2), 0.025)  # Hadamard: the diagonal overstates


@pytest.mark.parametrize('call, match', [
    (lambda: logdet_gram(torch.zeros(4), 1.), r'shape \[4\]'),
    (lambda: logdet_gram(NAN, 1.), 'NaN or inf'),
    (lambda: logdet_gram(torch.zeros(4, 2), 0.), '> 0'),
    (lambda: logdet_gram(torch.zeros(4, 2), 1., n=0), '> 0'),
    (lambda: logdet_update(torch.eye(2), torch.zeros(4, 2), -1.), 'w must be'),
    (lambda: logdet_update(torch.zeros(2, 2), torch.zeros(4, 2), 1.), 'no Cholesky factor'),
    (lambda: logdet_update(torch.eye(3), torch.zeros(4, 2), 1.), 'wide'),
    (lambda: logdet_update(torch.tensor([[1., 0.], [torch.nan, 1.]]), torch.ones(4, 2), 1.), 'NaN in chol_A.*holds NaN or inf'),
    (lambda: logdet_update(torch.tensor([[torch.inf, 0.], [0., 1.]]), torch.ones(4, 2), 1.), 'no Cholesky factor'),
])
def test_bad_input_says_what_to_do(call, match):
    with pytest.raises(ValueError, match=match): call()


@pytest.mark.parametrize('call', [
    lambda: logdet_gram(torch.zeros(4, 2, dtype=torch.int), 1.),
])
def test_wrong_types(call):
    with pytest.raises(TypeError, match='torch tensor'): call()
