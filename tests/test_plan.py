"What a sweep will cost: the law of the times found again, work against closed forms, and schedules against all there are."
import math
from itertools import product

import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cem_nb import plan
from cem_nb.cost import macs
from cem_nb.datasets import load_data
from cem_nb.decoder import Decoder, DecoderAttack
from cem_nb.experiment import preset
from cem_nb.gan import GAN
from cem_nb.methods import DEFENSES
from cem_nb.models import feature_shape
from cem_nb.oracle import Oracle
from cem_nb.plan import blank_data, epochs_of, estimate, makespan, pilot, work_of

BASE = preset('quick', (DecoderAttack(), Oracle()), n_train=256)
ROWS = [dict(defense='Bottleneck', cem=False), dict(defense='Bottleneck', lam=16.0), dict(defense='DistCorr', cem=False)]
LAW = {'train': {('Bottleneck', False): (2.0, 0.5), ('Bottleneck', True): (3.0, 0.7), ('DistCorr', False): (5.0, 0.0)}}


def times(e):
    "Seconds of a run under a law that the test knows."
    a, b = LAW['train'][e.defense, e.cem is not None]
    return dict(seconds_train=e.training.epochs*a + b, seconds_decoder=e.attacks[0].n_epochs*0.25 + 1, seconds_oracle=4.0,
                hardware='a machine', date='2026-11-30')


@pytest.fixture
def known(monkeypatch):
    def sweep(base, rows, **how):
        assert how == dict(device='cpu', backend='loky', n_jobs=2)
        return pd.DataFrame([times(base.replace(**r)) for r in rows])
    monkeypatch.setattr(plan, 'sweep', sweep)
    return pilot(BASE, ROWS, device='cpu', n_jobs=2)


def test_the_law_is_found_again_at_any_length(known):
    data = load_data(n_train=256)
    for row, n in product(ROWS, (2, 7, 240)):
        e = BASE.replace(**row, epochs=n, decoder__n_epochs=50)
        want = {k.removeprefix('seconds_'): v for k, v in times(e).items() if 'seconds' in k}
        assert estimate(known, e, data) == pytest.approx(want)
        assert all(type(v) is float for v in estimate(known, e, data).values())


def test_restarts_and_images_count(known):
    e, data, twice = BASE.replace(**ROWS[0]), load_data(n_train=256), blank_data(2*256, 16, 10, channels=1)
    assert len(data.train) == 256 and BASE.attacks[0].n_epochs == 8
    once, thrice = (estimate(known, e.replace(decoder__restarts=r), data)['decoder'] for r in (1, 3))
    assert (once, thrice) == pytest.approx((8*0.25 + 1, 24*0.25 + 1))
    assert estimate(known, e, twice) == pytest.approx({k: 2*v for k, v in estimate(known, e, data).items()})


@pytest.mark.parametrize('spoilt, cause', [
    (dict(seconds_train=[3.0, 2.0]), '6 epochs of Bottleneck: train took no longer than 2'),
    (dict(seconds_decoder=[3.0, 3.0]), 'Bottleneck: decoder took no longer'),
    (dict(seconds_train=[3.0, math.nan]), 'Bottleneck: train diverged within 6 epochs'),
    (dict(seconds_train=None), 'Bottleneck: train diverged'),
    (dict(hardware=['a machine', 'another']), 'on a machine and another; time all on one kind'),
    (dict(hardware=['a machine; another']*2), 'on a machine and another; time all on one kind')])
def test_times_that_give_no_line_are_refused(spoilt, cause, monkeypatch):
    def sweep(base, rows, **how):
        frame = pd.DataFrame([times(base.replace(**r)) for r in rows])
        for k, v in spoilt.items(): frame = frame.drop(columns=k) if v is None else frame.assign(**{k: v})
        return frame
    monkeypatch.setattr(plan, 'sweep', sweep)
    with pytest.raises(ValueError, match=cause): pilot(BASE, ROWS[:1])


def test_a_pilot_of_real_runs():
    "Of the paper's preset too, which has no validation images; and with restarts, which one attack of the pilot has none of."
    tiny = dict(n_train=200, width=0.05, batch_size=64, lr=0.02, decoder__width=4, decoder__blocks=0)
    base = preset('paper', (DecoderAttack(restarts=2), Oracle(n_images=10)), **tiny)
    found = pilot(base, [dict(defense='Bottleneck', cem=False, decoder__restarts=3)], lengths=(1, 8), device='cpu', backend='here')
    assert [*found.index] == [('Bottleneck', False, part) for part in ('train', 'decoder', 'oracle')]
    assert (found.epoch[:2] > 0).all() and found.epoch.iloc[2] == 0 and found.hardware.nunique() == found.date.nunique() == 1


def test_a_row_that_was_not_timed_is_refused(known):
    data = load_data(n_train=256)
    with pytest.raises(ValueError, match='PATROL.*time it too'): estimate(known, BASE.replace(defense='PATROL'), data)
    with pytest.raises(ValueError, match='gan.*time it too'): estimate(known, BASE.replace(attacks=(GAN(),)), data)


def test_what_could_not_be_told_apart_is_refused_before_it_is_run(monkeypatch):
    monkeypatch.setattr(plan, 'sweep', lambda *a, **k: pytest.fail('a run began'))
    for rows in ([], [*ROWS, dict(defense='Bottleneck', lam=2.0)]):
        with pytest.raises(ValueError, match='no rows, or .* twice'): pilot(BASE, rows)
    for lengths in ((6, 6), (6, 2), (2, 4, 6)):
        with pytest.raises(ValueError, match='the shorter first'): pilot(BASE, ROWS, lengths=lengths)


@pytest.mark.parametrize('defense', DEFENSES)
def test_work_is_what_the_networks_do_for_every_image(defense):
    e = preset('quick', (DecoderAttack(width=8, blocks=1), Oracle()), defense=defense)
    found = work_of(e, blank_data(1000, 16, 7))
    model = plan.build(e, blank_data(1, 16, 7))[1]
    z = feature_shape(model, (3, 16, 16))
    each = macs(model.encoder, (3, 16, 16)) + macs(model.server, z)
    assert found == dict(train=1000*each, decoder=1000*macs(Decoder(z, (3, 16, 16), 8, 1), z), oracle=1000*(z[0]*z[1]*z[2] + 3*16*16))


def test_blank_data_take_no_memory_and_look_like_data():
    data = blank_data(10**9, 64, 200)
    assert len(data.train) == 10**9 and data.shape == (3, 64, 64) and data.n_classes == 200
    assert data.train.x.untyped_storage().nbytes() == 1 and data.train.x.dtype == torch.uint8
    with pytest.raises(ValueError, match='images'): blank_data(0, 16, 10)


def test_epochs_of_what_is_not_trained_are_none():
    e = preset('small', (DecoderAttack(restarts=3), Oracle()))
    assert epochs_of(e) == dict(train=12, decoder=15, oracle=0)


def best(seconds, n):
    "Of all ways to deal runs out to workers."
    return min(max(sum(s for s, w in zip(seconds, to) if w == i) for i in range(n)) for to in product(range(n), repeat=len(seconds)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 3))
def test_a_schedule_is_no_better_than_the_best_and_within_grahams_bound(seconds, n):
    found = makespan(seconds, n)
    assert best(seconds, n) <= found <= (2 - 1/n)*best(seconds, n) + 1e-9
    assert found == sum(seconds) if n == 1 else found <= sum(seconds)


def test_no_runs_take_no_time():
    assert makespan([], 3) == 0
    with pytest.raises(ValueError, match='n_jobs'): makespan([1], 0)
