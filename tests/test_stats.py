"Means, gains, averages, and the rule by which a change counts."
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cem_nb.stats import (METRICS, Metric, Tally, attacks_in, averages, counting_rule, direction, gains, mean_gains,
                          mean_interval, paired, row_name, score_columns, tally)
from frames import DEFENCES, as_run, diverge, made, printed


def test_score_columns():
    f = pd.DataFrame(columns=['acc_test', 'seconds_train', 'seconds_gan', 'mse_test_gan', 'ssim_zero_val_decoder', 'ssim_train_my_attack',
                              'lpips_test_gan', 'mse_infer_gan', 'mse_test', 'run'])
    assert {c: tuple(s) for c, s in score_columns(f).items()} == {
        'mse_test_gan': ('mse', 'test', 'gan'), 'ssim_zero_val_decoder': ('ssim_zero', 'val', 'decoder'),
        'ssim_train_my_attack': ('ssim', 'train', 'my_attack')}
    assert attacks_in(f) == ['gan', 'decoder', 'my_attack']
    assert score_columns(f)['ssim_zero_val_decoder'].about.label == 'SSIM, zero-padded'


def test_a_metric_of_your_own(monkeypatch):
    monkeypatch.setitem(METRICS, 'lpips', Metric('LPIPS', '↑', 3, '', 3, margin=0.1))
    f = pd.DataFrame([dict(defense='A', cem=c, seed=0, acc_test=90.0, lpips_test_gan=0.2 + 0.15*c) for c in (False, True)])
    assert gains(f).lpips_test_gan.item() == pytest.approx(0.15) and tally(f, 'lpips_test_gan') == Tally(1, 1, 0, 1)


def test_interval_against_scipy():
    v = np.random.default_rng(0).normal(size=5)
    mean, half = mean_interval(v)
    assert (mean - half, mean + half) == pytest.approx(stats.t.interval(0.95, 4, v.mean(), stats.sem(v)))
    assert mean_interval([1.0])[0] == 1 and math.isnan(mean_interval([1.0])[1])


def test_gains_are_paired_by_seed_for_every_metric_and_attack():
    g = gains(made()[::-1])
    assert len(g) == 4 and np.allclose(g.acc_test, -0.5)
    for attack in ('decoder', 'gan'):
        for part in ('train', 'val', 'test'):
            assert np.allclose(g[[f'{m}_{part}_{attack}' for m in METRICS]], [100, -0.1, -0.1, -2])
    zero = made(1, ['Bottleneck']).assign(mse_train_decoder=[0.0, 0.1])
    assert gains(zero).mse_train_decoder.isna().all()  # no percentage of nothing


def test_partners_are_read_off_the_frame():
    "A row has a gain if the frame has its partner in the same seed, whatever its name."
    f = made(2, ['No_defense', 'Bottleneck', 'Dropout', 'Mine'])
    f = f[~((f.defense == 'Dropout') & ~f.cem)]
    f = f[~((f.defense == 'Mine') & f.cem & (f.seed == 1))]
    assert paired(f) == ['Bottleneck', 'Mine']
    assert gains(f)[['defense', 'seed']].values.tolist() == [['Bottleneck', 0], ['Mine', 0], ['Bottleneck', 1]]
    assert np.allclose(averages(f).set_index(['seed', 'cem']).mse_test_gan[1, False],
                       f.set_index(['defense', 'seed', 'cem']).mse_test_gan['Bottleneck', 1, False])
    alone = f[~f.cem]
    assert paired(alone) == [] and len(gains(alone)) == 0 and len(averages(alone)) == 0


def test_two_runs_of_a_row_and_seed_are_refused():
    f = pd.concat([made(), made(1).assign(lam=8.0)])
    for of in (gains, averages):
        with pytest.raises(ValueError, match='Bottleneck has two runs of seed 0; choose'): of(f)


def test_names_of_rows(): assert (row_name('A', False), row_name('A', np.True_)) == ('A', 'A+CEM')


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.lists(st.floats(0.1, 9), min_size=12, max_size=12), st.permutations(range(12)))
def test_averages_by_hand(values, order):
    "Three defences, two seeds; the order of rows does not matter, and a row without a partner does not count."
    rows = [dict(defense=d, seed=s, cem=c) for d in DEFENCES[:3] for s in (0, 1) for c in (False, True)]
    frame = pd.DataFrame([r | dict(acc_test=v, ssim_test_gan=v) for r, v in zip(rows, values)]).iloc[list(order)]
    extra = pd.DataFrame([dict(defense='No_defense', seed=s, cem=False, acc_test=1e6, ssim_test_gan=1e6) for s in (0, 1)])
    a = averages(pd.concat([extra, frame])).set_index(['seed', 'cem'])
    v = np.array(values).reshape(3, 2, 2)
    for s in (0, 1):
        for c in (0, 1): assert a.loc[(s, bool(c)), 'ssim_test_gan'] == pytest.approx(v[:, s, c].mean())
    g = gains(a.reset_index()).set_index('seed').ssim_test_gan
    assert g.to_numpy() == pytest.approx(gains(frame).groupby('seed').ssim_test_gan.mean().to_numpy())


def test_averages_keep_pairs_together():
    a = averages(diverge(made(), 'Dropout', True)).set_index(['seed', 'cem']).mse_test_gan
    full = made().set_index(['defense', 'seed', 'cem']).mse_test_gan
    # Dropout without CEM finished in seed 0, its partner did not: out of both, and out of seed 1, whose mean compares with it
    for seed in (0, 1): assert a[seed, False] == full['Bottleneck', seed, False]


def test_a_mean_has_the_same_defences_in_every_seed():
    frame = made()
    frame['mse_test_gan'] = frame.defense.map({'Bottleneck': 0.01, 'Dropout': 0.1})*(1 + frame.cem)
    for f in (frame, diverge(frame, 'Dropout', True)):
        means = averages(f).groupby('cem').mse_test_gan
        assert (means.max() == means.min()).all() and set(mean_gains(gains(f)).mse_test_gan.round(9)) == {100}


@pytest.mark.parametrize('name', METRICS)
def test_one_seed_counts_beyond_the_margin(name):
    m = METRICS[name]
    for factor, expected in ((0, 0), (0.9, 0), (1.1, 1), (-0.9, 0), (-1.1, -1)):
        assert direction([factor*m.sign*m.margin], m) == expected
        assert direction([math.nan, factor*m.sign*m.margin], m) == expected  # the other seed diverged
    assert direction([], m) == direction([math.nan], m) == 0


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.integers(-999, 999), min_size=2, max_size=6), st.sampled_from(list(METRICS)))
def test_several_seeds_count_as_a_t_test_says(values, name):
    v, m = np.array(values)/10, METRICS[name]
    d = direction(v, m)
    if np.ptp(v) > 0:
        p = stats.ttest_1samp(v, 0).pvalue
        assert (d != 0) == (p < 0.05) or abs(p - 0.05) < 1e-9
    if d: assert d == m.sign*np.sign(v.mean())


def test_margins_of_mse_and_psnr_agree():
    assert METRICS['psnr'].margin == pytest.approx(10*math.log10(1 + METRICS['mse'].margin/100), abs=0.02)


@pytest.mark.parametrize('column', ['mse_test_decoder', 'ssim_test_decoder'])
def test_tally_by_hand(column):
    "Gains for free, for exactly one point, for two points; a change that is too small; a loss; no pair."
    change = {'Bottleneck': (1.5, 0), 'DistCorr': (1.1, 1.0), 'Dropout': (2.0, 2.0), 'ResSFL': (1.004, 0), 'PATROL': (0.9, -1)}
    rows = [dict(defense=d, cem=c, seed=0, acc_test=91.1 - cost*c, mse_test_decoder=0.01*(k if c else 1),
                 ssim_test_decoder=0.8/(k if c else 1)) for d, (k, cost) in change.items() for c in (False, True)]
    f = pd.DataFrame([*rows, dict(defense='No_defense', cem=False, seed=0, acc_test=95.0, mse_test_decoder=0.001, ssim_test_decoder=0.9)])
    assert tally(f, column) == Tally(harder=3, cheap=2, easier=1, total=5)
    assert tally(f, column, cost=2.0).cheap == 3 and tally(f, column, cost=0.5).cheap == 1
    assert tally(diverge(f, 'Dropout', True), column) == Tally(2, 2, 1, 4)


def test_seeds_decide_where_there_are_several():
    f = made(3, ['Bottleneck'])
    sure = f.assign(mse_test_gan=np.where(f.cem, 1.004, 1.0)*0.01*(1 + f.seed))   # always the same 0.4 %
    unsure = f.assign(mse_test_gan=0.01*np.where(f.cem, [1, 1.9, 1, 0.8, 1, 1.1], 1.0))
    assert tally(sure, 'mse_test_gan') == Tally(1, 1, 0, 1) and tally(sure[sure.seed == 0], 'mse_test_gan') == Tally(0, 0, 0, 1)
    assert tally(unsure, 'mse_test_gan') == Tally(0, 0, 0, 1)


@pytest.mark.parametrize('table', range(1, 9))
def test_the_papers_own_rows(table):
    text, frame = printed(table), as_run(table)
    for column, s in score_columns(frame).items():
        value = lambda d, cem: float(text[d, cem, column])
        change = [100*(value(d, True)/value(d, False) - 1) if s.metric == 'mse' else value(d, True) - value(d, False) for d in DEFENCES]
        n, worse = (sum(way*s.about.sign*v > s.about.margin for v in change) for way in (1, -1))
        assert tally(frame, column) == Tally(n, n, worse, 7)  # no accuracy falls by more than a point
    if table == 5: assert tally(frame, 'psnr_test_decoder') == Tally(6, 6, 1, 7)  # Noise_ARL: one figure in the wrong column


def test_the_rule_in_words():
    text = counting_rule([METRICS['mse'], METRICS['ssim'], METRICS['psnr']])
    for m in ('5 % (MSE)', '0.01 (SSIM)', '0.2 dB (PSNR)', '95 % interval'): assert m in text
