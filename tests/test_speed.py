"What is timed is what is run; how long it takes is nobody's business here."
import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_images
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import nn

from cem_nb import speed
from cem_nb.cem import CEMS
from cem_nb.data import batches
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import Experiment
from cem_nb.gan import GAN
from cem_nb.kmeans import kmeans
from cem_nb.mixture import GaussianMixture
from cem_nb.speed import (attack_step, cem_step, fit_memory, limits, photo_features, photo_patches, share_of_limit, textbook_step,
                          time_fits, time_steps, training_step)
from cem_nb.training import build, train_step

SMALL = Experiment().replace(width=0.125, batch_size=8, lr=0.01, momentum=0.0, weight_decay=0.0)


@pytest.fixture(scope='module')
def patches(): return photo_patches(64)


def test_patches_lie_in_the_photographs_and_their_labels_go_round(patches):
    photos = [torch.tensor(i).permute(2, 0, 1) for i in load_sample_images().images]
    windows = [p.unfold(1, 32, 1).unfold(2, 32, 1)[0] for p in photos]
    for x in patches.train.x[:3]: assert any((w == x[0]).flatten(2).all(2).any() for w in windows)
    assert patches.train.y.tolist() == [i % 10 for i in range(64)] and patches.n_classes == 10
    assert torch.equal(photo_patches(64).train.x, patches.train.x) and not torch.equal(photo_patches(64, seed=1).train.x, patches.train.x)
    with pytest.raises(ValueError, match='images'): photo_patches(0)


def trained(monkeypatch, make):
    "Weights of the model that a step was made for, after two steps."
    seen, real = [], speed.build
    monkeypatch.setattr(speed, 'build', lambda e, data: seen.append(real(e, data)) or seen[-1])
    make()
    return torch.cat([p.detach().flatten() for p in seen[-1][1].parameters()])


def test_the_textbook_step_is_sgd_on_cross_entropy(patches, monkeypatch):
    def twice():
        step = textbook_step(SMALL, patches)
        step(), step()
    model = build(SMALL, patches)[1].train()
    x, y = next(batches(patches.train, 8))
    for _ in range(2):
        loss = nn.functional.cross_entropy(model.server(model.encoder(x)), y)
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))): p.data -= 0.01*g
    want = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(trained(monkeypatch, twice), want, atol=1e-6)


@pytest.mark.parametrize('settings', [dict(), dict(cem=True), dict(defense='ResSFL'), dict(precision='bf16')])
def test_the_training_step_is_the_trainings(settings, patches, monkeypatch):
    monkeypatch.setattr('cem_nb.engine.has_bf16', lambda kind: True)
    calls, real = [], train_step
    def watched(model, *args):
        calls.append((model, args[-1], 'forward' in vars(model.encoder)))
        return real(model, *args)
    monkeypatch.setattr(speed, 'train_step', watched)
    with training_step(SMALL.replace(**settings), patches) as step:
        before = None
        for _ in range(2):
            assert torch.isfinite(step()).all()
            weights = torch.cat([p.detach().flatten() for p in calls[-1][0].parameters()])
            assert before is None or not weights.equal(before)
            before = weights
    model, ramp, changed = calls[-1]
    assert ramp == float('cem' in settings) and changed == ('precision' in settings) and 'forward' not in vars(model.encoder)


@pytest.mark.parametrize('attack', [DecoderAttack(width=8, blocks=0, batch_size=16), GAN(width=8, blocks=0, batch_size=16, critic_width=4)])
def test_the_attacks_step_is_the_attacks(attack, patches):
    torch.manual_seed(0)
    with attack_step(SMALL.replace(attacks=(attack,)), patches) as step: errors = [step()['mse'].item() for _ in range(20)]
    assert errors[-1] < errors[0]


@pytest.mark.parametrize('variant', CEMS)
def test_what_cem_adds_is_its_gradient_and_its_update(variant, patches, monkeypatch):
    seen, real = [], speed.build_cem
    monkeypatch.setattr(speed, 'build_cem', lambda *a: seen.append(real(*a)) or seen[-1])
    step = cem_step(SMALL.replace(variant=variant, n_components=10), patches)
    cem, = seen
    before = cem.Sigma.clone()
    for _ in range(3): slope, = step()
    assert slope.shape[0] == 8 and slope.isfinite().all() and slope.std() > 0 and (cem.Sigma.equal(before) == (variant == 'release'))


def test_steps_are_named_and_held_against_the_textbooks_in_their_own_round(patches, monkeypatch):
    rounds = np.array([[1., 2., 3., 4.], [10., 40., 10., 20.], [2., 2., 8., 1.]])
    monkeypatch.setattr(speed, 'side_by_side', lambda calls, device, warmup, n: rounds)
    attack = DecoderAttack(width=8, blocks=0, batch_size=16)
    found = time_steps(SMALL, dict(a=SMALL.replace(cem=True)), dict(b=SMALL.replace(attacks=(attack,))), patches)
    assert found.index.tolist() == ['textbook', 'a', 'b', 'a, by itself']
    assert found.seconds.tolist() == [2, 2, 8, 4] and found.ratio.tolist() == [1, 2, 3, 2]
    assert (found.q25 <= found.ratio).all() and (found.ratio <= found.q75).all()


def test_fits_stand_beside_scikit_learns_with_what_they_reach():
    z = photo_features(600)
    assert z.shape == (600, 512) and z.isfinite().all() and torch.equal(z, photo_features(600))
    found = time_fits(z, 4, steps=5, seeds=2)
    mixture = found.loc['mixture, 5 steps']
    ours = np.mean([GaussianMixture(4, max_iter=5, tol=0.0, random_state=s).fit(z).score(z) for s in (0, 1)])
    theirs = np.mean([SklearnMixture(4, covariance_type='diag', max_iter=5, tol=0.0, random_state=s).fit(z.numpy()).score(z.numpy())
                      for s in (0, 1)])
    assert mixture.quality == pytest.approx(ours, rel=1e-6) and mixture.quality_sklearn == pytest.approx(theirs, rel=1e-4)
    assert (found.rounds == 2).all()
    spread = []
    for seed in (0, 1):
        centers, labels = kmeans(z, 4, generator=torch.Generator().manual_seed(seed))
        spread.append((z - centers[labels]).double().square().sum(1).mean().item())
    theirs = [KMeans(4, n_init=1, random_state=s).fit(z.numpy()).inertia_/600 for s in (0, 1)]
    clusters = found.loc['k-means']
    assert clusters.quality == pytest.approx(-np.mean(spread)) and clusters.quality_sklearn == pytest.approx(-np.mean(theirs))
    assert clusters.better == sum(a <= 1.001*b for a, b in zip(spread, theirs))
    with pytest.raises(ValueError, match='seeds'): time_fits(z, 4, seeds=0)


def test_limits_are_measured_and_a_share_of_them_is_arithmetic(patches):
    found = limits(torch.device('cpu'))
    assert set(found) >= {'float32', 'copy'} and min(found.values()) > 0
    assert share_of_limit(SMALL, patches, 2.0, 10.0) == pytest.approx(share_of_limit(SMALL, patches, 1.0, 20.0))
    twice = share_of_limit(SMALL.replace(batch_size=16), patches, 1.0, 1.0)
    assert twice == pytest.approx(2*share_of_limit(SMALL, patches, 1.0, 1.0))


@pytest.mark.slow
def test_memory_is_that_of_a_fresh_process():
    few, many = fit_memory(2**12, 64, 4), fit_memory(2**16, 64, 4)
    assert set(few) == {'ours', 'scikit-learn'} and all(many[k] > few[k] >= 0 for k in few)
