"Curves in the plane of accuracy and error: the area between two of them, the runs that lie on them, and how they are drawn."
import json
import math
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

import cem_nb.sweep
import cem_nb.tradeoff as tradeoff
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import Experiment
from cem_nb.methods import DEFENSES
from cem_nb.tradeoff import (CEM_LOOKS, ROUNDING, advantage, advantage_text, advantages, comparable, curve_points, feature_noise,
                             noise_axis, noise_rows, plane, plot_curve, plot_over_noise, points_between, sweep_curves)
from cem_nb.training import DivergedError

matplotlib.use('Agg')
BASE = Experiment(attacks=(DecoderAttack(),))


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


def by_hand(curve):
    "A function of the log error: linear between points, found by a loop."
    points = sorted((math.log(e), a) for e, a in curve)
    def at(x):
        for (x0, y0), (x1, y1) in zip(points, points[1:]):
            if x0 <= x <= x1: return y0 + (y1 - y0)*(x - x0)/(x1 - x0)
        raise AssertionError('outside the curve')
    return at, points[0][0], points[-1][0]


def dense(a, b, n=20_001):
    "The mean difference by the midpoint rule."
    (fa, a0, a1), (fb, b0, b1) = by_hand(a), by_hand(b)
    low, high = max(a0, b0), min(a1, b1)
    return np.mean([fb(x) - fa(x) for x in low + (high - low)*(np.arange(n) + 0.5)/n])


def random_curve(rng, n):
    return np.column_stack([rng.permutation(np.geomspace(0.01, 0.1, n)*rng.uniform(0.8, 1.25, n)), rng.uniform(0, 100, n)])


@pytest.mark.parametrize('seed', range(6))
def test_the_advantage_is_the_integral(seed):
    rng = np.random.default_rng(seed)
    a, b = random_curve(rng, 3 + seed), random_curve(rng, 8 - seed)
    assert np.isclose(advantage(a, b), dense(a, b), atol=1e-3)


def test_closed_forms():
    # over x = log error in [0, 1]: a line against a constant, a triangle of height 6, and curves that share a part
    e = math.exp
    assert np.isclose(advantage([(1, 0), (e(1), 10)], [(1, 5), (e(1), 5)]), 0)
    assert np.isclose(advantage([(1, 0), (e(1), 0)], [(1, 0), (e(0.3), 6), (e(1), 0)]), 3)
    assert np.isclose(advantage([(1, 0), (e(2), 0)], [(e(1), 4), (e(3), 8)]), 5)  # from 4 to 6 over [1, 2]


curves = st.lists(st.tuples(st.floats(1e-4, 1.0), st.floats(0, 100)), min_size=2, max_size=7, unique_by=lambda p: round(math.log(p[0]), 2))


def shared(a, b):
    (a0, a1), (b0, b1) = ((min(e for e, _ in c), max(e for e, _ in c)) for c in (a, b))
    return math.log(min(a1, b1)/max(a0, b0))


@given(curves, curves, st.floats(-50, 50), st.floats(0.01, 100), st.randoms(use_true_random=False))
def test_what_the_advantage_depends_on(a, b, shift, scale, random):
    assume(shared(a, b) > 0.01)
    value, close = advantage(a, b), dict(rel_tol=1e-6, abs_tol=1e-6)
    assert math.isclose(advantage(b, a), -value, **close) and abs(advantage(a, a)) < 1e-9
    assert math.isclose(advantage(a, [(e, y + shift) for e, y in b]), value + shift, **close)
    assert math.isclose(advantage(*([(scale*e, y) for e, y in c] for c in (a, b))), value, **close)
    assert math.isclose(advantage(random.sample(a, len(a)), random.sample(b, len(b))), value, **close)
    lowest, highest = min(y for _, y in b) - max(y for _, y in a), max(y for _, y in b) - min(y for _, y in a)
    assert lowest - 1e-9 <= value <= highest + 1e-9


@pytest.mark.parametrize('a, b', [([(0.01, 1), (0.02, 2)], [(0.03, 1), (0.04, 2)]), ([(0.01, 1), (0.02, 2)], [(0.02, 1), (0.04, 2)]),
                                  ([(0.01, 1), (0.02, 2)], [(0.015, 1)]), ([(0.01, 1)], [(0.01, 2)])])
def test_curves_that_share_no_error_or_only_one(a, b): assert math.isnan(advantage(a, b)) and math.isnan(advantage(b, a))


@pytest.mark.parametrize('bad', [[(math.nan, 1), (0.2, 2)], [(0.1, math.nan), (0.2, 2)], [(0.0, 1), (0.2, 2)], [(-0.1, 1), (0.2, 2)],
                                 [(math.inf, 1), (0.2, 2)], [], [0.1, 0.2]])
def test_what_is_no_curve(bad):
    good = [(0.1, 1), (0.2, 2)]
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(ValueError): advantage(*pair)


def test_an_error_that_occurs_twice_has_the_mean_accuracy():
    flat = [(0.1, 0), (0.4, 0)]
    assert np.isclose(advantage(flat, [(0.1, 10), (0.4, 40), (0.1, 30)]), advantage(flat, [(0.1, 20), (0.4, 40)]))
    assert math.isnan(advantage(flat, [(0.2, 10), (0.2, 30)]))


def runs(curve, seed, points): return pd.DataFrame([dict(curve=curve, seed=seed, mse=e, acc_test=a) for e, a in points])


def test_advantages_by_seed():
    nan = math.nan
    a = [(0.1, 10), (0.2, 20), (0.4, 30)]
    frame = pd.concat([runs('a', s, a) for s in range(6)] + [
        runs('b', 0, [(e, y + 5) for e, y in a]),
        runs('b', 1, [(0.1, 15), (0.2, nan), (nan, 99), (0.4, 35)]),   # diverged in training, or in the attack
        runs('b', 2, [(0.0, 99), (0.1, 16), (0.4, 36)]),                # an error of 0 has no logarithm
        runs('b', 3, [(0.5, 1), (0.6, 2)]), runs('b', 4, [(nan, nan)])])  # and seed 5 has none
    found = advantages(frame.sample(frac=1, random_state=0), 'a', 'b', 'mse')
    assert list(found.index) == [*range(6)] and found.name == 'advantage'
    assert np.isclose(found[0], 5) and np.isnan(found[[3, 4, 5]]).all()
    assert np.isclose(found[1], dense(a, [(0.1, 15), (0.4, 35)]), atol=1e-3)
    assert np.isclose(found[2], dense(a, [(0.1, 16), (0.4, 36)]), atol=1e-3)
    known = found.dropna()
    half = stats.t.ppf(0.975, 2)*known.std(ddof=1)/math.sqrt(3)
    lost = '1 of 6 seeds: no shared error, 2 of 6 seeds: diverged, 1 of 6 seeds: some runs diverged'
    assert advantage_text(found) == f'{known.mean():+.1f} ± {half:.1f}, {lost}'
    assert [advantage_text(part) for part in (found[:1], found[3:], found[4:])] == ['+5.0', 'no shared error, diverged', 'diverged']
    for pair in (('a', 'c'), ('c', 'a')):
        with pytest.raises(ValueError, match="no curve 'c'; choose from a, b"): advantages(frame, *pair, 'mse')


def test_errors_under_rounding_are_one_point_and_carry_no_comparison():
    a = runs('a', 0, [(0.0, 50), (1e-9, 60), (0.1, 30), (0.2, 20)])
    assert sorted(curve_points(a, 'mse').tolist()) == [[ROUNDING, 60], [0.1, 30], [0.2, 20]]
    b = runs('b', 0, [(1e-12, 70), (0.0, 90), (0.15, 40)])
    found = advantages(pd.concat([a, b]), 'a', 'b', 'mse')
    assert np.isnan(found[0]) and advantage_text(found) == 'error under rounding'
    assert points_between(curve_points(a, 'mse'), curve_points(b, 'mse')) == (1, 1)
    more = advantages(pd.concat([a, b, runs('b', 0, [(0.05, 60)])]), 'a', 'b', 'mse')
    assert np.isfinite(more[0])


def test_points_of_a_curve_are_of_finished_runs():
    frame = runs('a', 0, [(0.2, 50), (0.0, 60), (math.nan, 70), (0.1, math.nan), (0.3, 0)])
    points = curve_points(frame, 'mse')
    assert points.dtype == float and points.tolist() == [[0.2, 50], [ROUNDING, 60], [0.3, 0]]  # 0 has no logarithm
    assert curve_points(frame[:0], 'mse').shape == (0, 2)


def test_rows_are_asked_for_by_the_noise_on_the_feature():
    rows = noise_rows(DEFENSES, [0.1, 0.3], lam=0.0)
    assert [(r['defense'], r['lam']) for r in rows] == [(d, 0.0) for d in DEFENSES for _ in range(2)]
    four, others = ([r['noise_std'] for r in rows if r['defense'].startswith('Noise') == noisy] for noisy in (True, False))
    assert np.allclose(four, [0.025, 0.075]*2) and others == [0.1, 0.3]*(len(DEFENSES) - 2)
    experiments = [BASE.replace(**r) for r in rows]
    frame = pd.DataFrame([e.settings() | dict(params='{}' if i % 2 else json.dumps(e.params)) for i, e in enumerate(experiments)])
    assert np.allclose(feature_noise(frame), [0.1, 0.3]*len(DEFENSES))
    own = pd.DataFrame(dict(defense=['Noise_Nopeek', 'Noise_Nopeek'], params=['{"noise_factor": 2.0}', '{}'], noise_std=0.1), index=[7, 3])
    assert feature_noise(own).to_dict() == {7: 0.2, 3: 0.4}
    assert list(noise_rows((d for d in ['Dropout']), (s for s in [0.1]))) == [dict(defense='Dropout', noise_std=0.1)]


def test_rows_with_a_noise_factor_of_their_own():
    rows = noise_rows(['Noise_Nopeek'], [0.1], params=dict(noise_factor=2.0))
    frame = pd.DataFrame([r | dict(params=json.dumps(r['params'])) for r in rows])
    assert np.allclose(feature_noise(frame), 0.1)


class Computed:
    "In place of the store: counts, and measures what the settings say."
    def __init__(self, lost=()): self.asked, self.lost = [], lost

    def __call__(self, e):
        self.asked.append(e)
        if (e.row, e.seed) in self.lost: raise DivergedError('lost')
        lam = e.cem.lam if e.cem else 0.0
        made = dict(resumed=False, seconds=0.0, **dict.fromkeys(('hardware', 'python', 'torch', 'cem_nb', 'date'), ''))
        result = dict(accuracy=dict(test=e.seed + lam/100, val=0), images=1, curves=[{}], **made)
        attack = dict(scores=dict(test=dict(mse=e.model.noise_std)), finished=True, **made)
        return SimpleNamespace(experiment=e, result=result, attack=lambda name: attack, path=SimpleNamespace(name=e.row), new=True)


CURVES = {'noise': noise_rows(['Bottleneck', 'Noise_ARL'], [0.1, 0.2], lam=0.0),
          'CEM': [r for lam in (0.0, 4.0, 16.0) for r in noise_rows(['Bottleneck'], [0.1], lam=lam)]}


def test_every_run_is_computed_once_and_told_on_each_of_its_curves(capsys):
    compute = Computed()
    frame = sweep_curves(BASE, CURVES, (s for s in (3, 1)), compute=compute)
    assert len(compute.asked) == len({e.model_dump_json() for e in compute.asked}) == 12  # 4 and 3 rows, one of them shared, 2 seeds
    assert len(frame) == 14 and 'row' not in frame and frame.index.equals(pd.RangeIndex(14))
    assert capsys.readouterr().out.count('\n') == 12
    for name, rows in CURVES.items():
        of = frame[frame.curve == name]
        for seed in (3, 1):
            have = sorted(zip(of[of.seed == seed].defense, of[of.seed == seed].noise_std, of[of.seed == seed].lam))
            assert have == sorted((r['defense'], r['noise_std'], r['lam']) for r in rows)
    assert np.allclose(frame.acc_test, 100*(frame.seed + frame.lam/100)) and np.allclose(frame.mse_test_decoder, frame.noise_std)
    assert np.allclose(frame.sigma, np.where(frame.defense == 'Noise_ARL', 4, 1)*frame.noise_std)
    assert np.allclose(sorted(frame.sigma.unique()), [0.1, 0.2])


def test_a_run_that_diverged_stays_a_row_of_its_curve():
    frame = sweep_curves(BASE, CURVES, [0], compute=Computed([('Bottleneck+CEM', 0)]))
    assert frame[frame.curve == 'CEM'].acc_test.isna().tolist() == [False, True, True]
    assert len(curve_points(frame[frame.curve == 'CEM'], 'mse_test_decoder')) == 1


def test_curves_go_through_sweep(monkeypatch):
    "With device and n_jobs as they were given."
    given = {}
    def swept(base, rows, **how):
        given.update(how)
        return cem_nb.sweep.sweep(base, rows, compute=Computed(), **{k: v for k, v in how.items() if k not in ('device', 'n_jobs')})
    monkeypatch.setattr(tradeoff, 'sweep', swept)
    sweep_curves(BASE, CURVES, (0,), device='cpu', n_jobs=3)
    assert (given['device'], given['n_jobs'], given['seed']) == ('cpu', 3, (0,))


def made(seeds=(0, 1)):
    return pd.DataFrame([dict(curve='with CEM', seed=s, knob=k, sigma=0.1*(k + 1), acc_test=90 - 10*k + s, mse=0.01*(k + 1)*(1 + s))
                         for s in seeds for k in (2, 0, 1)])


def test_a_curve_is_drawn_through_the_means_with_a_mark_for_every_run():
    ax = plt.figure().add_subplot()
    frame = made()
    lost = pd.concat([frame, frame[:1].assign(acc_test=math.nan), frame[:1].assign(mse=math.nan, acc_test=0)])
    plot_curve(ax, lost, 'mse', 'knob', 'λ', 'mine', **CEM_LOOKS['with CEM'])
    means, marks = ax.lines
    assert means.get_xdata().tolist() == [90.5, 80.5, 70.5] and np.allclose(means.get_ydata(), [0.015, 0.03, 0.045])
    assert sorted(zip(*marks.get_data())) == sorted(zip(frame.acc_test, frame.mse)) and marks.get_linestyle() == 'None'
    assert means.get_label() == 'mine' and means.get_color() == marks.get_color() == CEM_LOOKS['with CEM']['color']
    assert [(t.get_text(), t.xy[0]) for t in ax.texts] == [('λ 2', 70.5)]  # λ = 0 is no CEM, and says nothing


def test_a_curve_of_one_seed_one_run_or_none():
    ax = plt.figure().add_subplot()
    plot_curve(ax, made([0]), 'mse', 'knob', 'σ', 'one seed')
    assert len(ax.lines) == 1 and len(ax.texts) == 1
    plot_curve(ax, made([0])[:1], 'mse', 'knob', 'σ', 'one run')
    assert len(ax.lines) == 2 and len(ax.texts) == 2
    plot_curve(ax, made([0]).assign(mse=math.nan), 'mse', 'knob', 'σ', 'none')
    assert len(ax.lines) == 2


def test_the_plane_names_its_axes():
    ax = plt.figure().add_subplot()
    plot_curve(ax, made(), 'mse', 'knob', 'σ', 'mine')
    plane(ax, 'title', 'SSIM')
    ax.figure.canvas.draw()
    assert ax.get_yscale() == 'log' and (ax.get_title(), ax.get_ylabel()) == ('title', 'SSIM →') and 'accuracy' in ax.get_xlabel()
    low, high = ax.get_ylim()
    ticks = [t.get_text() for t in ax.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert ticks == ['0.01', '0.015', '0.02', '0.03', '0.05', '0.07']


def test_noise_has_two_scales():
    ax = plt.figure().add_subplot()
    ax.set_xlim(0.01, 0.5)
    top = noise_axis(ax)
    ax.figure.canvas.draw()
    assert ax.get_xscale() == 'log' and np.allclose(top.get_xlim(), np.square(ax.get_xlim()))
    assert 'σ²' in top.get_xlabel() and '²' not in ax.get_xlabel()


def test_accuracy_and_error_over_the_noise():
    frame = pd.concat([made(), made().assign(curve='without CEM', acc_test=50.0)])
    fig = plot_over_noise(frame, 'mse')
    for ax, column in zip(fig.axes, ('acc_test', 'mse')):
        for curve, bars in zip(CEM_LOOKS, ax.containers):
            by = frame[frame.curve == curve].groupby('sigma')[column]
            line, (caps_low, caps_high), _ = bars
            assert bars.get_label() == curve and np.allclose(line.get_xdata(), [*by.groups]) and np.allclose(line.get_ydata(), by.mean())
            assert np.allclose(caps_low.get_ydata(), by.min()) and np.allclose(caps_high.get_ydata(), by.max())
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == [*CEM_LOOKS] and fig.axes[1].get_yscale() == 'log'


def test_means_over_seeds_have_the_same_members_along_a_curve():
    "Seed 1, whose accuracy is lower and whose error higher, is lost at the higher noise: that must not make the curve fall."
    nan = math.nan
    both = pd.DataFrame([dict(seed=s, sigma=g, acc_test=a, mse=v) for s, g, a, v in
                         ((0, 0.1, 90, 0.02), (1, 0.1, 80, 0.06), (0, 0.4, 85, 0.03), (1, 0.4, nan, nan))])
    fig, ax = plt.subplots()
    plot_curve(ax, both, 'mse', 'sigma', 'σ', 'x')
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [(90, 0.02), (85, 0.03)])
    assert ax.lines[0].get_label() == 'x (1 of 2 seeds)'
    frame = both.dropna()
    assert comparable(frame, 'sigma').seed.unique().tolist() == [0]
    assert comparable(frame[frame.seed.eq(0) & frame.sigma.eq(0.1) | frame.seed.eq(1)], 'sigma').seed.nunique() == 2  # one noise is left
    crossed = pd.DataFrame([dict(seed=s, sigma=g) for s, g in ((0, 1), (0, 2), (1, 2), (1, 3))])
    assert comparable(crossed, 'sigma').sigma.tolist() == [2, 2]
    plt.close(fig)
