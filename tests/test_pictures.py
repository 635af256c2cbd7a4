"The pictures: pairs joined by lines, changes with intervals, and what an attacker sees."
import math
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from cem_nb.pictures import first_runs, plot_examples, plot_gains, plot_paper
from cem_nb.show import shown_columns
from cem_nb.stats import gains, mean_interval
from cem_nb.style import COLORS
from frames import DEFENCES, MSE_TABLES, as_run, diverge, made

matplotlib.use('Agg')


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    "The attacks that the paper has, and the oracle, whatever is registered besides."
    import cem_nb.pictures as pictures
    import cem_nb.show as show
    known = {'decoder': ('decoder', 'o'), 'gan': ('GAN', 's'), 'oracle': ('oracle', '^')}
    for module in (show, pictures):
        monkeypatch.setattr(module, 'ATTACKS', {k: SimpleNamespace(label=l, marker=m) for k, (l, m) in known.items()})


def offsets(ax, label): return [c for c in ax.collections if c.get_label() == label][0].get_offsets()


@pytest.mark.parametrize('table', [1, 4, 8])
def test_the_picture_of_pairs(table):
    frame = as_run(table)
    for fig, extra in ((plot_paper(table), 0), (plot_gains(frame, table), 1)):
        shown = [ax for ax in fig.axes if ax.axison]
        assert len(shown) == (3 + extra if table in MSE_TABLES else 5 + 2*extra)
        defenses = list(dict.fromkeys(frame.defense))
        assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == defenses
        titles = ['decoder', 'GAN', *['change by CEM']*extra, 'accuracy']
        assert [ax.get_title() for ax in fig.axes[:3 + extra]] == titles
        first = next(iter(shown_columns(frame, table, ('test',))))
        for ax, column in ((shown[0], first), (shown[2 + extra], 'acc_test')):
            value = frame.set_index(['cem', 'defense'])[column]
            for cem, label in ((False, 'without CEM'), (True, 'with CEM')):
                ours = offsets(ax, label)[:, 0].filled(math.nan)
                assert np.allclose(ours, value[cem].reindex(defenses), equal_nan=True)
            lines = ax.collections[0].get_segments()  # each from the row without CEM to the row with it
            joined = {defenses[int(s[0, 1])]: s[:, 0] for s in lines if s.ndim == 2 and np.isfinite(s).all()}
            assert set(joined) == set(DEFENCES)
            for d, ends in joined.items(): assert np.allclose(ends, [value[False, d], value[True, d]])
        names = [t.get_text() for t in fig.legends[0].get_texts()]
        assert set(names) == {'without CEM', 'with CEM'} | ({'decoder', 'GAN', 'paper (open marks)'} if extra else set())


@pytest.mark.parametrize('table', [1, 4, 8])
def test_the_picture_of_changes(table):
    frame = as_run(table)
    change = plot_gains(frame, table).axes[2]
    g, key = gains(frame).set_index('defense'), 'mse_test' if table in MSE_TABLES else 'ssim_zero_test'
    assert len(change.containers) == 4
    for c in change.containers:
        line = c[0]
        attack = {'o': 'decoder', 's': 'gan'}[line.get_marker()]
        who = 'paper' if c.get_label() == 'paper (open marks)' else attack
        assert to_hex(line.get_color()) == to_hex(COLORS[who])
        assert c.has_xerr is False  # no bar of a single seed, nor through the open mark in the legend
        x = dict(zip(dict.fromkeys(frame.defense), line.get_xdata()))
        assert np.allclose([x[d] for d in DEFENCES], g.loc[DEFENCES, f'{key}_{attack}'])
    (low, high), values = change.get_xlim(), g[[f'{key}_gan', f'{key}_decoder']]
    assert low < values.min(axis=None) and high > values.max(axis=None)
    assert (change.get_xscale() == 'function') == (table == 8)


def test_seeds_are_small_marks_and_intervals():
    f = made(3)
    fig = plot_gains(f, 1)
    seeds = fig.axes[0].collections[2].get_offsets()
    assert np.allclose(sorted(seeds[:, 0]), sorted(f[~f.cem].mse_test_decoder))
    bars, g = fig.axes[2].containers, gains(f)
    ours = [c for c in bars if c.get_label() == 'decoder'][0]
    half = [mean_interval(g[g.defense == d].mse_test_decoder)[1] for d in ('Bottleneck', 'Dropout')]
    assert np.allclose([np.ptp(s[:, 0])/2 for s in ours[2][0].get_segments()], half)


class Run:
    def __init__(self, name, lost=()): self.name, self.lost = name, lost

    def examples(self, n):
        x = torch.linspace(0, 1, n)[:, None, None, None].expand(n, 3, 4, 4)
        level = dict(decoder=len(self.name)/50, gan=len(self.name)/50 + 1/4)
        return x, {a: torch.full_like(x, v) for a, v in level.items() if a not in self.lost}


def test_examples_side_by_side():
    runs = {'A': Run('A'), 'A+CEM': Run('A+CEM', lost=['gan'])}
    fig = plot_examples(runs, ['decoder', 'gan'], n=3)
    assert len(fig.axes) == 3*(3 + 1 + 3)  # originals and two rows; two attacks and a gap
    assert [ax.get_title(loc='left') for ax in fig.axes if ax.get_title(loc='left')] == ['decoder', 'GAN']
    level = np.array([ax.images[0].get_array().mean() for ax in fig.axes]).reshape(3, 7)
    assert np.allclose(level, [[0, 0.5, 1, 1, 0, 0.5, 1], [0.02]*3 + [1] + [0.27]*3, [0.1]*3 + [1]*4])
    with pytest.raises(ValueError, match='no run'): plot_examples(runs, [])


def test_the_first_run_of_every_row_that_finished():
    f = diverge(diverge(made(2, ['No_defense', 'Bottleneck']), 'Bottleneck', True, (0, 1)), 'No_defense', False, (0,))
    assert first_runs(f, str.upper) == {'No_defense': 'NO_DEFENSE-FALSE-1', 'Bottleneck': 'BOTTLENECK-FALSE-0'}


def change_panel(fig): return [ax for ax in fig.axes if ax.get_title() == 'change by CEM'][0]


def test_what_nobody_registered_has_a_mark_of_its_own():
    change = change_panel(plot_gains(made(1, ['Bottleneck', 'Mine'], attacks=('decoder', 'my_attack')), 1))
    assert 'D' in {line.get_marker() for line in change.lines}
    assert {c.get_label() for c in change.containers} == {'decoder', 'my_attack', 'paper (open marks)'}


def test_the_band_of_a_single_seed():
    for seeds in (1, 3):
        band = [p.get_extents().transformed(change.transData.inverted()) for change in [change_panel(plot_gains(made(seeds), 1))]
                for p in change.patches]
        assert [(round(b.x0), round(b.x1)) for b in band] == ([(-5, 5)] if seeds == 1 else [])


def test_what_is_lost_is_marked_and_does_not_stop_the_picture():
    f = diverge(diverge(made(), 'Dropout', True, (0, 1)), 'Bottleneck', True, (1,))
    for frame in (f, diverge(f, 'Bottleneck', False, (0,), 'gan')):
        for table in (1, 4):
            labels = [t.get_text() for t in plot_gains(frame, table).axes[0].get_yticklabels()]
            assert labels == ['Bottleneck (diverged)', 'Dropout (diverged)']
    alone = made(attacks=('decoder',))
    alone['mse_test_oracle'] = np.where(alone.defense == 'Dropout', math.nan, 0.001)
    plot_gains(alone, 1)
    plot_gains(alone[[c for c in alone if 'ssim_zero' not in c]], 4)


@pytest.mark.parametrize('with_columns', [False, True])
def test_nothing_left(with_columns):
    f = diverge(diverge(made(1, ['Bottleneck']), 'Bottleneck', True), 'Bottleneck', False)
    if not with_columns: f = f.drop(columns=[c for c in f if c[:3] in ('mse', 'ssi', 'psn')])
    for table in (1, 4): plot_gains(f, table)
    assert first_runs(f, str) == {}
    with pytest.raises(ValueError, match='no run'): plot_examples({}, ['decoder'])
