"Scores against independent references, the registry, and the choice among restarts."
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure
from twins import numpy_ssim

from cem_nb.attack import (ATTACKS, Attack, AttackDivergedError, attack_from, best_of_restarts, reconstruct,
                           register_attack, score_attack, scored, train_attack)
from cem_nb.core import stage_seed
from cem_nb.data import Split, to_float
from cem_nb.datasets import load_data
from cem_nb.models import evaluating, split_model


class Constant(nn.Module):
    def __init__(self, image):
        super().__init__()
        self.register_buffer('image', image)

    def forward(self, z): return self.image.expand(len(z), -1, -1, -1)


@pytest.fixture(scope='module')
def digits(): return load_data('digits', n_train=256)


def victim(noise_std=0.025, side=16, channels=1):
    torch.manual_seed(0)
    return split_model(in_channels=channels, image_size=side, width=0.125, noise_std=noise_std)


def images(n=12, channels=1, side=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=g)
    return Split(x, torch.zeros(n).long())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_changes_no_score(dtype):
    "SSIM of nearly flat images is lost in half precision; and what the victim sends is not the caller's to round."
    split = Split(torch.full((8, 3, 16, 16), 200, dtype=torch.uint8), torch.zeros(8).long())
    model, attacker = victim(channels=3), nn.Sequential(nn.Conv2d(8, 3, 1), nn.Upsample((16, 16)), nn.Sigmoid())
    want = score_attack(model, attacker, split)
    with torch.autocast('cpu', dtype=dtype): assert score_attack(model, attacker, split) == want


def test_scores_against_the_definition():
    split = images(20)
    s = score_attack(victim(0.0), Constant(torch.full((1, 16, 16), 0.25)), split, batch_size=7)
    x = to_float(split.x).double()
    want = (x - 0.25).square().mean().item()
    assert list(s) == list(Attack.metrics) and s['mse'] == pytest.approx(want, rel=1e-6)
    assert s['psnr'] == pytest.approx(-10*math.log10(want), abs=1e-4)
    grey = torch.full_like(x, 0.25)
    want = np.mean([numpy_ssim(a, b) for a, b in zip(grey.numpy(), x.numpy())])
    assert s['ssim_zero'] == pytest.approx(want, rel=1e-6)
    assert s['ssim'] == pytest.approx(structural_similarity_index_measure(grey, x, data_range=1.0).item(), abs=1e-5)


def test_draws_are_independent_and_the_first_is_the_score_of_one():
    model, split = victim(0.1), images()
    attacker = nn.Sequential(nn.Conv2d(8, 1, 1), nn.Upsample((16, 16)))
    one, three = (scored(model, attacker, split, seed=4, draws=n) for n in (1, 3))
    errors = torch.cat(three.errors).reshape(3, -1)
    assert torch.equal(errors[0], torch.cat(one.errors)) and len({e.sum().item() for e in errors}) == 3
    assert three.means()['mse'] == pytest.approx(errors.mean().item())


@pytest.mark.parametrize('bad', [dict(batch_size=0), dict(batch_size=-1), dict(batch_size=2.5)])
def test_batch_sizes(bad):
    args = victim(), Constant(torch.zeros(1, 16, 16)), images()
    with pytest.raises(ValueError, match='batch_size'): score_attack(*args, **bad)
    with pytest.raises(ValueError, match='draws'): scored(*args, seed=0, draws=0)


def test_images_that_are_not_numbers():
    model, attacker, x = victim(), Constant(torch.zeros(1, 16, 16)), to_float(images().x)
    x[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match='NaN'): reconstruct(model, attacker, x)
    with pytest.raises(TypeError, match='bytes'): reconstruct(model, attacker, images().x)


def test_reconstructions_that_are_not_numbers_are_no_success():
    s = score_attack(victim(), Constant(torch.full((1, 16, 16), math.nan)), images())
    assert all(map(math.isnan, s.values()))


def test_images_too_small_for_a_mirror_have_the_other_scores():
    split = images(side=4)
    with pytest.warns(UserWarning, match='6x6'): s = score_attack(victim(side=4), Constant(torch.zeros(1, 4, 4)), split)
    assert math.isnan(s['ssim']) and all(math.isfinite(s[k]) for k in ('mse', 'ssim_zero', 'psnr'))


def test_modes_of_all_layers_are_put_back_even_after_an_error():
    model = victim().train()
    model.server.eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert [m.training for m in model.modules()] == modes and any(modes) and not all(modes)


def test_a_reconstruction_does_not_depend_on_its_company():
    "The victim may be in training mode; its batch norms are used, and kept, as they are."
    model, x = victim(0.0).train(), to_float(images().x)
    attacker = nn.Sequential(nn.Conv2d(8, 1, 1), nn.BatchNorm2d(1), nn.Upsample((16, 16)))
    torch.testing.assert_close(reconstruct(model, attacker, x)[:1], reconstruct(model, attacker, x[:1]))
    assert model.training and attacker.training


# an attack whose restarts are better and worse, or fail, as their seeds say


@pytest.fixture
def walk():
    outcomes, calls = {}, []

    class Walk(Attack):
        def attacker(self, model, train): return Constant(torch.rand(1, 16, 16))

        def fit(self, attacker, model, train, *, seed, checkpoint=None, label=None):
            calls.append((seed, checkpoint, label))
            outcome = outcomes.get(len(calls), 0.1*len(calls))
            if outcome == 'diverged': raise AttackDivergedError(f'{label}: not a number in epoch 1')
            attacker.image.fill_(outcome)
            return [dict(outcome=outcome)]

    register_attack('walk', label='walk', marker='.')(Walk)
    return Walk, outcomes, calls


BLACK = Split(torch.zeros(6, 1, 16, 16, dtype=torch.uint8), torch.zeros(6).long())
GREY = Split(torch.full((6, 1, 16, 16), 51, dtype=torch.uint8), torch.zeros(6).long())  # 0.2
NONE = Split(BLACK.x[:0], BLACK.y[:0])


def test_the_best_restart_counts_and_validation_images_say_which(walk):
    Walk, outcomes, calls = walk
    attacker, record = best_of_restarts(Walk(restarts=3), victim(), BLACK, GREY, seed=5, label='row: walk',
                                        checkpoint_of=lambda r: f'c{r}.pt')
    assert [r['mse'] for r in record['restarts']] == pytest.approx([0.01, 0, 0.01], abs=1e-6)
    assert record['chosen_on'] == 'val' and record['curves'] == [dict(outcome=0.2)]
    assert attacker.image.mean() == pytest.approx(0.2)
    assert calls == [(5, 'c0.pt', 'row: walk 1/3'), (stage_seed(5, 'restart', 1), 'c1.pt', 'row: walk 2/3'),
                     (stage_seed(5, 'restart', 2), 'c2.pt', 'row: walk 3/3')]


def test_without_validation_images_the_attacker_chooses_on_its_own(walk):
    Walk, outcomes, calls = walk
    attacker, record = best_of_restarts(Walk(restarts=3), victim(), BLACK, NONE, seed=5)
    assert record['chosen_on'] == 'train' and record['restarts'][0]['mse'] == pytest.approx(0.01)
    assert attacker.image.mean() == pytest.approx(0.1) and calls[0][1:] == (None, 'walk 1/3')


def test_a_restart_that_fails_is_recorded_and_never_counts(walk):
    Walk, outcomes, calls = walk
    outcomes.update({1: 'diverged', 2: math.nan, 3: 0.5, 4: math.inf, 5: 0.2})
    attacker, record = best_of_restarts(Walk(restarts=5), victim(), BLACK, GREY, seed=0)
    first, second, third, fourth, fifth = record['restarts']
    assert 'not a number in epoch 1' in first['diverged']
    assert 'nan' in second['diverged'] and 'inf' in fourth['diverged']
    assert third['mse'] == pytest.approx(0.09) and fifth['mse'] < 1e-9 and record['curves'] == [dict(outcome=0.2)]


def test_if_all_restarts_fail_there_is_no_attacker(walk):
    Walk, outcomes, calls = walk
    outcomes.update({1: 'diverged', 2: 'diverged'})
    attacker, record = best_of_restarts(Walk(restarts=2), victim(), BLACK, GREY, seed=0)
    assert attacker is None and record['curves'] == [] and all('diverged' in r for r in record['restarts'])


def test_initial_weights_depend_on_seed_and_name_alone(walk):
    Walk, *_ = walk
    class Still(Walk):
        def fit(self, *args, **kwargs): return []
    register_attack('still', label='still', marker=',')(Still)
    try:
        made = (Still(), 0), (Still(restarts=4), 0), (Still(), 1)
        starts = [train_attack(a, victim(), BLACK, seed=s)[0].image for a, s in made]
        assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
        assert Walk.name == 'walk' and Still.name == 'still'
    finally: del ATTACKS['still']


def test_names_of_attacks(walk):
    Walk, *_ = walk
    other = type('Other', (Attack,), dict(__module__=__name__))
    with pytest.raises(ValueError, match='already'): register_attack('walk', label='other', marker='.')(other)
    for unknown in (dict(name='no_such_attack'), dict()):
        with pytest.raises(ValueError, match='no attack .*choose one of'): attack_from(unknown)
    with pytest.raises(ValidationError, match='restarts'): attack_from(dict(name='walk', restarts=0))
    settings = dict(name='walk', restarts=2)
    assert attack_from(settings) == Walk(restarts=2) and settings == dict(name='walk', restarts=2)


def test_an_attack_that_does_not_say_what_it_is(walk):
    Empty = register_attack('empty', label='e', marker='.')(type('Empty', (Attack,), dict(__module__=__name__)))
    with pytest.raises(NotImplementedError, match='attacker'): train_attack(Empty(), victim(), BLACK)
    del ATTACKS['empty']
