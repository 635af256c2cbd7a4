"Sources that the tests of the theory draw at random, and what they share."
import math

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import distributions as D

from cem_nb.theorem1 import LinearGaussian
from cem_nb.worlds import LinearMixture

few = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
dims = st.integers(1, 6)
stds = st.floats(-2, 2).map(lambda e: 10.0**e)  # of the noise, log-uniform


def random_cov(rng, d, spread=1.0):
    "A covariance whose standard deviations lie within e^-spread and e^spread."
    Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    c = Q*np.exp(2*rng.uniform(-spread, spread, d)) @ Q.T
    return (c + c.T)/2


def random_gaussian(rng, d, d_z, noise_std, rank=None):
    r = min(d, d_z) if rank is None else rank
    W = rng.standard_normal((d_z, r)) @ rng.standard_normal((r, d))
    return LinearGaussian(W, random_cov(rng, d), noise_std)


def random_mixture(rng, k, d, d_z, noise_std):
    w = rng.dirichlet(np.full(k, 3.0)) + 1e-3
    covs = np.stack([random_cov(rng, d, 0.7) for _ in range(k)])
    return LinearMixture(w/w.sum(), 2*rng.standard_normal((k, d)), covs, rng.standard_normal((d_z, d)), noise_std)


def reference(gm):
    "The same mixture source in torch.distributions."
    comp = D.MultivariateNormal(torch.tensor(gm.x.means), torch.tensor(gm.x.covs))
    return D.MixtureSameFamily(D.Categorical(torch.tensor(gm.x.weights)), comp)


def se(v): return np.std(v, ddof=1)/math.sqrt(len(v))
