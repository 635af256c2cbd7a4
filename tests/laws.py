"Mixtures and other laws that several tests draw from."
import torch
from hypothesis import settings
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

TYPES = ['spherical', 'diag', 'full']
some = settings(deadline=None, max_examples=25, derandomize=True)
NAN = torch.full((4, 2), torch.nan)
OK = (torch.full((2,), 0.5), torch.zeros(2, 3), torch.ones(2, 3))  # a mixture with nothing wrong


def rng(seed): return torch.Generator().manual_seed(seed)


def blobs(n=300, m=4, k=3, gap=6., seed=0):
    g = rng(seed)
    label = torch.arange(n) % k
    mu = gap*torch.randn(k, m, generator=g, dtype=torch.float64)
    scale = 0.5 + torch.rand(k, m, generator=g, dtype=torch.float64)
    return mu[label] + scale[label]*torch.randn(n, m, generator=g, dtype=torch.float64), label


def mixture(k, m, form, seed, gap=2.):
    "Random weights, means and covariances of the asked form."
    g = rng(seed)
    w = torch.rand(k, generator=g, dtype=torch.float64) + 0.05
    mu = gap*torch.randn(k, m, generator=g, dtype=torch.float64)
    if form == 'spherical': s = 0.1 + torch.rand(k, generator=g, dtype=torch.float64)
    elif form == 'diag': s = 0.1 + torch.rand(k, m, generator=g, dtype=torch.float64)
    else:
        a = torch.randn(k, m, m, generator=g, dtype=torch.float64)
        s = a @ a.mT/m + 0.1*torch.eye(m, dtype=torch.float64)
    return w/w.sum(), mu, s


def dense(s, m):
    "Any form of covariances as full matrices."
    return s if s.ndim == 3 else torch.diag_embed(s if s.ndim == 2 else s[:, None].expand(-1, m))


def twin(w, mu, s):
    "The same mixture in torch.distributions."
    return MixtureSameFamily(Categorical(w), MultivariateNormal(mu, dense(s, mu.shape[1])))


def law(kind, n, m, seed):
    "n equally likely points [n, m] from a law that is no Gaussian mixture."
    g = rng(seed)
    x = torch.randn(n, m, generator=g, dtype=torch.float64)
    if kind == 'heavy tails': return x/torch.rand(n, 1, generator=g, dtype=torch.float64)
    if kind == 'shell': return x/x.norm(dim=1, keepdim=True)
    if kind == 'corners': return x.sign()
    if kind == 'cube': return torch.rand(n, m, generator=g, dtype=torch.float64)
    return x[:1].expand(n, m)*torch.linspace(-1, 1, n, dtype=torch.float64)[:, None].pow(3)  # a crooked line


def soft_moments(x, r, form, reg_covar=0.):
    "pi, mu, Sigma of the clusters that the responsibilities r [n, k] make of x, written out."
    size = r.sum(0)
    mu = r.T @ x/size[:, None]
    full = torch.stack([(r[:, i, None]*(x - mu[i])).T @ (x - mu[i])/size[i] for i in range(len(size))])
    full = full + reg_covar*torch.eye(x.shape[1]).double()
    diag = full.diagonal(dim1=1, dim2=2)
    return size/len(x), mu, {'full': full, 'diag': diag, 'spherical': diag.mean(1)}[form]


def truth_mc(x, std, draws, seed):
    "I(z; z_hat) of n equally likely points and its error: log n less the mean entropy of which point it was."
    x = x.unique(dim=0, return_inverse=True, return_counts=True)
    points, counts = x[0], x[2].double()
    prior = counts/counts.sum()
    c = torch.multinomial(prior, draws, replacement=True, generator=rng(seed))
    z = points[c] + std*torch.randn(draws, points.shape[1], generator=rng(seed + 1), dtype=torch.float64)
    d2 = (z[:, None] - points).square().sum(2)
    post = (prior.log() - d2/(2*std**2)).softmax(1)
    doubt = torch.special.entr(post).sum(1)
    return Categorical(prior).entropy().item() - doubt.mean().item(), doubt.std().item()/draws**0.5
