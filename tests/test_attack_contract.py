"What every attack must do. An attack joins by being registered; settings that make it quick may be added to QUICK."
import json
import math

import pytest
import torch
from torch import nn

import cem_nb.decoder, cem_nb.gan, cem_nb.oracle  # each registers its attack
from cem_nb.attack import (ATTACKS, Attack, attack_from, best_of_restarts, reconstruct, register_attack,
                           train_attack)
from cem_nb.core import seeded
from cem_nb.data import Split, to_float
from cem_nb.datasets import load_data
from cem_nb.models import evaluating, feature_shape, split_model
from cem_nb.oracle import Oracle

QUICK = {'decoder': dict(width=8, blocks=0, n_epochs=3, batch_size=64), 'oracle': dict(n_images=40),
         'gan': dict(width=8, blocks=0, n_epochs=3, batch_size=64, critic_width=4)}


class MeanImage(nn.Module):
    def __init__(self, image):
        super().__init__()
        self.register_buffer('image', image)

    def forward(self, z): return self.image.expand(len(z), -1, -1, -1)


class Toy(Attack):
    "Answers with the mean of the training images, scaled."
    scale: float = 1.0

    def attacker(self, model, train): return MeanImage(torch.rand(train.x.shape[1:]))

    def fit(self, attacker, model, train, *, seed, checkpoint=None, label=None):
        attacker.image.copy_(self.scale*to_float(train.x).mean(0))
        return [dict(scale=self.scale)]


NAMES = [*ATTACKS, 'toy']


@pytest.fixture(autouse=True)
def toy():
    "An attack more, for as long as a test of this file runs."
    register_attack('toy', label='mean image', marker='x')(Toy)
    yield
    del ATTACKS['toy']


class Killed(BaseException): pass


@pytest.fixture(scope='module')
def digits(): return load_data('digits', n_train=256)


def victim(noise_std=0.025, drop=0.0, arch='vgg11', channels=1):
    torch.manual_seed(0)
    return split_model(arch, in_channels=channels, image_size=16, width=0.25, noise_std=noise_std, drop=drop)


def colours(grey):
    shares = torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None]
    return Split(grey.x.repeat(1, 3, 1, 1)//shares, grey.y)


def states(module): return {k: v.clone() for k, v in module.state_dict().items()}


def equal(a, b): return list(a) == list(b) and all(map(torch.equal, a.values(), b.values()))


@pytest.mark.parametrize('name', NAMES)
class TestContract:
    @pytest.fixture
    def attack(self, name): return attack_from(dict(name=name, **QUICK.get(name, {})))

    def test_it_is_rebuilt_from_its_record(self, attack, name):
        record = json.loads(json.dumps(attack.record()))
        again = attack_from(record)
        assert record['name'] == attack.name == name and type(again) is ATTACKS[name]
        assert again == attack and again.record() == attack.record() and hash(again) == hash(attack)
        assert attack_from(dict(name=name)).record() == ATTACKS[name]().record()

    def test_it_has_a_label_a_marker_and_the_metrics_of_the_tables(self, attack):
        assert attack.label and attack.marker and {'mse', 'ssim', 'psnr'} <= set(attack.metrics)

    @pytest.mark.parametrize('bad', [dict(restarts=0), dict(restarts='2'), dict(no_such_setting=1)])
    def test_bad_settings_are_refused(self, name, bad):
        with pytest.raises(ValueError, match=next(iter(bad))): attack_from(dict(name=name) | bad)

    @pytest.mark.parametrize('arch, channels', [('vgg11', 3), ('resnet20', 1), ('resnet20', 3)])
    def test_an_attacker_turns_smashed_features_into_images(self, attack, digits, arch, channels):
        model, train = victim(arch=arch, channels=channels), digits.val if channels == 1 else colours(digits.val)
        with seeded(0): attacker = attack.attacker(model, train)
        z = torch.rand(3, *feature_shape(model, tuple(train.x.shape[1:])))
        with evaluating(attacker), torch.no_grad(): assert attacker(z).shape == (3, channels, 16, 16)

    def test_it_sees_what_the_server_receives(self, attack, digits, name):
        for drop in (0.0, 0.3):
            model, sent, seen = victim(0.1, drop), [], []
            send = model.send
            def spying(z_hat):
                sent.append((z_hat.detach(), send(z_hat)))
                return sent[-1][1]
            model.send = spying
            with seeded(0, name, 'init'): attacker = attack.attacker(model, digits.train)
            attacker.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
            attack.fit(attacker, model, digits.train, seed=0)
            n_fitted = len(seen)
            attack.score(attacker, model, digits.val, seed=0)
            assert len(sent) == len(seen) > n_fitted and all(torch.equal(z, s) for (_, z), s in zip(sent, seen))
            noise = [(z - z_hat)[z != 0] for z_hat, z in sent]
            assert len({n.sum().item() for n in noise}) == len(noise)  # fresh in every batch
            for n, (_, z) in zip(noise, sent):
                assert n.std().item() == pytest.approx(0.1, rel=0.1)
                assert (z == 0).float().mean().item() == pytest.approx(drop, abs=0.05)

    def test_training_resumes_in_the_middle_with_the_same_bits(self, attack, digits, tmp_path, name):
        model, calls, smash = victim(), [], victim().smash
        def counted(x):
            calls.append(0)
            if len(calls) == stop: raise Killed
            return smash(x)
        model.smash, stop = counted, math.inf
        whole, curves = train_attack(attack, model, digits.train, seed=5)
        n, stop = len(calls), 0
        if n:
            calls.clear()
            stop = round(0.6*n)
            with pytest.raises(Killed): train_attack(attack, model, digits.train, seed=5, checkpoint=tmp_path/'c.pt')
            calls.clear()
            stop = 0
        torch.rand(7)  # the caller's random numbers must not matter
        resumed, again = train_attack(attack, model, digits.train, seed=5, checkpoint=tmp_path/'c.pt')
        assert equal(states(whole), states(resumed)) and curves == again and (not n or 0 < len(calls) < n)
        if n: assert not equal(states(whole), states(train_attack(attack, model, digits.train, seed=6)[0]))

    def test_a_stored_attacker_is_the_same_attacker(self, attack, digits):
        model = victim()
        attacker, _ = train_attack(attack, model, digits.train)
        other = attack_from(attack.record()).attacker(model, digits.train)
        other.load_state_dict(states(attacker))
        rebuilt = []
        for a in (attacker, other):
            with seeded(3): rebuilt.append(reconstruct(model, a, to_float(digits.test.x[:20])))
        assert torch.equal(*rebuilt)

    def test_the_victim_and_the_callers_random_numbers_are_left_alone(self, attack, digits):
        model = victim(drop=0.0).train()
        model.server.eval()
        before, modes, rng = states(model), [m.training for m in model.modules()], torch.get_rng_state()
        attacker, _ = train_attack(attack, model, digits.train)
        attack.score(attacker, model, digits.val, seed=0)
        assert equal(states(model), before) and [m.training for m in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), rng)
        assert not any(m.training for m in attacker.modules())

    def test_the_same_seed_gives_the_same_numbers(self, attack, digits):
        model, runs = victim(), []
        for _ in range(2):
            attacker, record = best_of_restarts(attack, model, digits.train, digits.val, seed=1)
            runs.append((record, attack.score(attacker, model, digits.test, seed=1)))
        assert runs[0] == runs[1]
        mse = attack.score(attacker, model, digits.val, seed=1)['mse']
        assert record['chosen_on'] == 'val' and record['restarts'] == [dict(mse=mse)]

    def test_only_the_given_images_are_looked_at(self, attack, digits):
        "The features that are computed, one by one, are those of training images; in a score, of the images scored."
        model, seen = victim(), []
        model.encoder.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        def all_from(images):
            x = torch.cat(seen).flatten(1)
            x = x[x.any(1)]  # a black image asks for the feature's shape
            seen.clear()
            gap = torch.cdist(x, to_float(images.x).flatten(1), compute_mode='donot_use_mm_for_euclid_dist')
            return gap.amin(1).eq(0).all()
        attacker, _ = train_attack(attack, model, digits.train)
        assert not seen or all_from(digits.train)
        attack.score(attacker, model, digits.test, seed=0)
        assert all_from(digits.test)

    def test_every_metric_is_there_and_finite(self, attack, digits, name):
        for drop in (0.0, 0.3):
            model = victim(drop=drop)
            attacker, _ = train_attack(attack, model, digits.train)
            scores = attack.score(attacker, model, digits.test, seed=0)
            assert set(attack.metrics) <= set(scores) and all(map(math.isfinite, scores.values()))
            assert 0 <= scores['mse'] <= 1 and -1 <= scores['ssim'] <= 1
            assert scores['psnr'] == pytest.approx(-10*math.log10(scores['mse']), abs=1e-3)

    def test_nothing_beats_the_posterior_mean_on_its_own_prior(self, attack, digits):
        "Proposition 1: on training images the oracle's error is the least, within the noise of its estimate."
        model, oracle = victim(0.05), Oracle(n_images=256, draws=4)
        least = oracle.score(oracle.attacker(model, digits.train), model, digits.train, seed=9)
        assert 1e-3 < least['mse']
        attacker, _ = train_attack(attack, model, digits.train)
        assert attack.score(attacker, model, digits.train, seed=0)['mse'] > least['mse'] - 4*least['se']

    def test_a_victim_that_sends_nothing_but_noise_gives_the_mean_image_at_best(self, attack, digits):
        model = victim(1e3)
        attacker, _ = train_attack(attack, model, digits.train)
        variance = to_float(digits.train.x).var(0, correction=0).mean().item()
        mse = attack.score(attacker, model, digits.train, seed=0)['mse']
        assert mse > 0.8*variance  # the oracle scores a sample

    def test_there_must_be_images_and_they_must_be_bytes(self, attack, digits):
        model, none = victim(), Split(digits.val.x[:0], digits.val.y[:0])
        floats = Split(to_float(digits.val.x), digits.val.y)
        attacker, _ = train_attack(attack, model, digits.train)
        for images, error, cause in ((none, ValueError, 'no images'), (floats, TypeError, 'uint8')):
            with pytest.raises(error, match=cause): train_attack(attack, model, images)
            with pytest.raises(error, match=cause): attack.score(attacker, model, images, seed=0)


def test_the_three_of_the_tables_are_registered():
    assert {'decoder', 'gan', 'oracle'} <= set(ATTACKS)
    assert len({a.marker for a in ATTACKS.values()}) == len({a.label for a in ATTACKS.values()}) == len(ATTACKS)
