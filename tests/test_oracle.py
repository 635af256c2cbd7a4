"The oracle as an attack; what all attacks share is in test_attack_contract.py."
import math

import pytest
import torch
from pydantic import ValidationError

from cem_nb.attack import best_of_restarts, score_attack, train_attack
from cem_nb.core import seeded
from cem_nb.data import Split, to_float
from cem_nb.datasets import load_data
from cem_nb.models import split_model
from cem_nb.oracle import Oracle, encoded, even_places, evenly_spaced, oracle_attack


@pytest.fixture(scope='module')
def digits(): return load_data('digits', n_train=256)


def victim(noise_std=0.025, drop=0.0):
    torch.manual_seed(0)
    return split_model(in_channels=1, image_size=16, width=0.125, noise_std=noise_std, drop=drop)


def scores(model, prior, images, **settings):
    attack = Oracle(**settings)
    return attack.score(attack.attacker(model, prior), model, images, seed=0)


@pytest.mark.parametrize('bad', [dict(n_images=1), dict(n_images=0), dict(draws=1), dict(draws=2.5), dict(restarts=2)])
def test_bad_settings(bad):
    with pytest.raises(ValidationError, match=next(iter(bad))): Oracle(**bad)


def test_it_recovers_what_little_noise_hides(digits):
    s = scores(victim(1e-4), digits.train, digits.train, n_images=40)
    assert s['mse'] < 1e-6 and s['ssim'] > 0.999 and s['ssim_zero'] > 0.999 and s['psnr'] > 60


def test_when_nothing_gets_through_the_mean_image_is_all_that_is_left(digits):
    x = to_float(digits.train.x)
    want = (x[torch.linspace(0, len(x) - 1, 40).long()] - x.mean(0)).square().mean().item()
    assert scores(victim(1e3), digits.train, digits.train, n_images=40)['mse'] == pytest.approx(want, rel=0.02)


def test_images_that_are_attacked_are_evenly_spaced(digits):
    "Class by class, as folders list them, every class has its share."
    order = digits.train.y.argsort(stable=True)
    some = evenly_spaced(Split(digits.train.x[order], digits.train.y[order]), 40)
    assert len(some) == 40 and len(some.y.unique()) == 10
    all_of_them = evenly_spaced(digits.train, 10**6)
    assert torch.equal(all_of_them.x, digits.train.x)
    assert torch.equal(evenly_spaced(digits.train, 2).x, digits.train.x[[0, -1]])


def test_standard_error_is_the_spread_between_seeds(digits):
    "Of samples of one image set each: here the images are drawn anew, and the prior is the same."
    model, attack = victim(0.05), Oracle(n_images=24)
    attacker, g = attack.attacker(model, digits.train), torch.Generator().manual_seed(0)
    found = []
    for seed in range(40):
        at = torch.randint(0, len(digits.test), (24,), generator=g)
        found.append(attack.score(attacker, model, Split(digits.test.x[at], digits.test.y[at]), seed=seed))
    spread = torch.tensor([s['mse'] for s in found]).std().item()
    stated = sum(s['se'] for s in found)/len(found)
    assert stated == pytest.approx(spread, rel=0.35)


def test_more_draws_are_more_precise_about_the_same_number(digits):
    two, many = (scores(victim(0.05), digits.train, digits.test, n_images=50, draws=n) for n in (2, 12))
    assert many['se'] < two['se'] and many['mse'] == pytest.approx(two['mse'], abs=3*two['se'])


def test_a_single_image_has_a_score_without_an_error(digits):
    s = scores(victim(), digits.train, Split(digits.test.x[:1], digits.test.y[:1]))
    assert math.isfinite(s['mse']) and math.isnan(s['se'])


def test_its_state_is_empty_and_it_moves_with_its_prior(digits):
    attacker = Oracle().attacker(victim().train(), digits.train)
    assert attacker.state_dict() == {} and not list(attacker.parameters())
    assert attacker.double().z_hat.dtype == torch.float64 and len(attacker.x) == len(digits.train)


def test_the_prior_is_what_an_untouched_victim_encodes(digits):
    model = victim()
    want = model.eval().encode(to_float(digits.train.x)).detach()
    torch.testing.assert_close(encoded(model.train(), digits.train), want)
    torch.testing.assert_close(encoded(model, digits.train), want)  # the statistics are as they were


def test_posterior_mean_against_the_formula(digits):
    model = victim(0.05).eval()
    attacker = Oracle().attacker(model, digits.train)
    with torch.no_grad(): z = model.smash(to_float(digits.test.x[:9]))
    w = (-(z[:, None] - attacker.z_hat).double().square().flatten(2).sum(2)/(2*0.05**2)).softmax(1)
    assert 1.5 < (1/w.square().sum(1)).max()  # images share the weight
    want = (w @ attacker.x.double().flatten(1)).reshape(9, 1, 16, 16).float()
    torch.testing.assert_close(attacker(z), want)


def test_dropped_entries_tell_nothing(digits):
    model = victim(0.05, drop=0.4).eval()
    attacker = Oracle().attacker(model, digits.train)
    with torch.no_grad(), seeded(0): z = model.smash(to_float(digits.test.x[:9]))
    arrived = z != 0
    assert arrived.float().mean().item() == pytest.approx(0.6, abs=0.03)
    gap = ((z[:, None] - attacker.z_hat)*arrived[:, None]).double().square().flatten(2).sum(2)
    w = (-gap/(2*0.05**2)).softmax(1)
    torch.testing.assert_close(attacker(z), (w @ attacker.x.double().flatten(1)).reshape(9, 1, 16, 16).float())
    # to take the zeros at face value is a worse attack
    blind = oracle_attack(z, attacker.z_hat, attacker.x, 0.05)
    x = to_float(digits.test.x[:9])
    assert (attacker(z) - x).square().mean() < (blind - x).square().mean()


def test_under_dropout_it_still_recovers_what_little_noise_hides(digits):
    assert scores(victim(1e-4, drop=0.3), digits.train, digits.train, n_images=40)['mse'] < 1e-6


def test_its_score_is_that_of_any_attacker_on_the_same_images(digits):
    "Two draws of the noise; with next to no noise they are alike."
    model, attack = victim(1e-6), Oracle(n_images=30)
    attacker, record = best_of_restarts(attack, model, digits.train, digits.val, seed=0)
    s = attack.score(attacker, model, digits.test, seed=0)
    plain = score_attack(model, attacker, evenly_spaced(digits.test, 30))
    assert {k: s[k] for k in plain} == pytest.approx(plain, rel=1e-5) and record['curves'] == []


def test_an_oracle_that_is_made_under_autocast_is_the_same(digits):
    model = split_model(n_classes=10, in_channels=1, image_size=16, width=.125, noise_std=.005).eval()
    some = Split(digits.train.x[:100], digits.train.y[:100])
    oracle = Oracle(n_images=50)
    want = oracle.score(train_attack(oracle, model, some)[0], model, some, seed=0)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert oracle.score(train_attack(oracle, model, some)[0], model, some, seed=0) == want


def test_even_places_do_not_depend_on_the_default_precision():
    torch.set_default_dtype(torch.bfloat16)
    try: places = even_places(1437, 500)
    finally: torch.set_default_dtype(torch.float32)
    assert len(places.unique()) == 500 and places[0] == 0 and places[-1] == 1436
