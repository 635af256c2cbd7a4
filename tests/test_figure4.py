"The four panels of Figure 4: their curves, the runs behind them, the comparisons and the picture."
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

import cem_nb.figure4 as module
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import Experiment, ModelSettings, preset
from cem_nb.figure4 import TITLES, Figure4Parameters, advantage_table, figure4_curves, figure4_runs, plot_figure4
from cem_nb.methods import DEFENSES, make_defense
from cem_nb.models import NETWORKS
from cem_nb.parameters import ParameterError, TableParameters, read_parameters, table_base, table_rows
from cem_nb.style import COLORS
from cem_nb.sweep import sweep
from cem_nb.tradeoff import advantage
from test_tradeoff import Computed

matplotlib.use('Agg')
BASE = preset('quick', (DecoderAttack(),), dataset='digits')
PARAMETERS = [Figure4Parameters(panels='a,b,c,d'), Figure4Parameters(panels='b', lams='4', defense='Noise_ARL'),
              Figure4Parameters(panels='c,d', cuts='2,5', strengths='16'),
              Figure4Parameters(panels='a,b,c,d', noise_stds='0.05,0.1,0.2', lam=8.0, lams='0,8', alone='0.1,0.4', seeds='0,1')]


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


def frame_of(p, monkeypatch, capsys):
    "The runs of Figure 4, measured by what their settings say."
    compute = Computed()
    with monkeypatch.context() as m:
        m.setattr('cem_nb.tradeoff.sweep', lambda base, rows, device, backend, n_jobs, **axes: sweep(base, rows, compute=compute, **axes))
        frame = figure4_runs(BASE, p)
    return frame, compute, capsys.readouterr().out


@pytest.mark.parametrize('p', PARAMETERS, ids=str)
def test_curves_can_be_run_and_compared(p):
    curves = figure4_curves(p)
    assert list(dict.fromkeys(c.panel for c in curves)) == list(p.panels)
    by = {(c.panel, c.label): c for c in curves}
    assert len(by) == len(curves)
    for c in curves:
        experiments = [BASE.replace(**row) for row in c.rows]
        assert len({e.model_dump_json() for e in experiments}) == len(c.rows)
        if not c.against: continue
        other = by[c.panel, c.against]
        assert not other.against and {r['defense'] for r in other.rows} == {r['defense'] for r in c.rows}
        assert all(e.cem for e in experiments if c.panel != 'd') and not any(BASE.replace(**r).cem for r in other.rows)
        turned = lambda rows: [{k: v for k, v in r.items() if k != 'lam'} for r in rows]
        if c.panel != 'd': assert turned(c.rows) == turned(other.rows)  # they differ in λ alone


def test_what_the_panels_turn():
    p = PARAMETERS[3]
    by = {f'{c.panel}: {c.label}': c for c in figure4_curves(p)}
    on_feature = lambda c: [r['noise_std']*make_defense(r['defense']).noise_factor for r in c.rows]
    for name, c in by.items():
        assert c.knob == ('lam' if name == 'd: CEM at σ = 0.1' else 'sigma')
        if c.panel in 'abc': assert np.allclose(on_feature(c), p.noise_stds)
    assert np.allclose(on_feature(by['d: noise alone']), p.alone) and np.allclose(on_feature(by['d: CEM at σ = 0.1']), p.alone[0])
    assert [r['lam'] for r in by['d: CEM at σ = 0.1'].rows] == list(p.strengths)
    assert {r['lam'] for r in by['a: Noise_ARL+CEM'].rows} == {r['lam'] for r in by['c: cut 1+CEM'].rows} == {8.0}
    assert {k: by[k].against for k in by if by[k].against} == {
        'a: Noise_Nopeek+CEM': 'Noise_Nopeek', 'a: Noise_ARL+CEM': 'Noise_ARL', 'b: λ = 8': 'λ = 0', 'c: cut 1+CEM': 'cut 1',
        'c: cut 2+CEM': 'cut 2', 'c: cut 3+CEM': 'cut 3', 'd: CEM at σ = 0.1': 'noise alone'}
    assert not [c for c in figure4_curves(PARAMETERS[1]) if c.against]  # no λ of 0 to compare with


def test_the_default_cut_is_left_as_it_is():
    "So its runs are those of the other panels, and of Table 1."
    cut = NETWORKS[ModelSettings().arch].cut
    by = {f'{c.panel}: {c.label}': c for c in figure4_curves(Figure4Parameters(panels='a,b,c,d', lams='0,16', noise_stds='0.1,0.2'))}
    assert by[f'c: cut {cut}'].rows == by['a: Noise_Nopeek'].rows and by[f'c: cut {cut}+CEM'].rows == by['b: λ = 16'].rows
    assert [{r.get('cut') for r in by[f'c: cut {c}'].rows} for c in (1, 2, 3)] == [{c if c != cut else None} for c in (1, 2, 3)]
    t = TableParameters(preset='quick', attacks='decoder', noise_std=0.025)
    table = {e.model_dump_json() for e in (table_base(t).replace(**r) for r in table_rows(t))}
    assert {BASE.replace(**r).model_dump_json() for r in by[f'c: cut {cut}'].rows[:1] + by[f'c: cut {cut}+CEM'].rows[:1]} <= table


def test_runs_are_computed_once_and_marked(monkeypatch, capsys):
    p = PARAMETERS[3]
    frame, compute, printed = frame_of(p, monkeypatch, capsys)
    curves, asked = figure4_curves(p), [e.model_dump_json() for e in compute.asked]
    distinct = {BASE.replace(**r).replace(seed=s).model_dump_json() for c in curves for r in c.rows for s in p.seeds}
    assert len(asked) == len(set(asked)) and set(asked) == distinct and printed.count('\n') == len(asked)
    assert len(frame) == 2*sum(len(c.rows) for c in curves)
    groups = dict(list(frame.groupby(['panel', 'curve'], sort=False)))
    assert list(groups) == [(c.panel, c.label) for c in curves]
    for c in curves:
        of = groups[c.panel, c.label]
        assert (of.knob == c.knob).all() and (of.against == c.against).all()
        for s in p.seeds:
            have = [(r.defense, r.noise_std, r.lam, None if pd.isna(r.cut) else int(r.cut)) for r in of[of.seed == s].itertuples()]
            assert sorted(have, key=str) == sorted(((r['defense'], r['noise_std'], r['lam'], r.get('cut')) for r in c.rows), key=str)
    assert np.allclose(frame.acc_test, 100*(frame.seed + frame.lam/100))  # each row is of its own settings


def made_up(p=PARAMETERS[3], worth=2.0, attacks=('test_decoder', 'train_oracle')):
    "CEM is worth some points at every error."
    rows = []
    for c in figure4_curves(p):
        for r in c.rows:
            for s in p.seeds:
                sigma = r['noise_std']*make_defense(r['defense']).noise_factor
                error = 0.01*math.exp(2*sigma + r['lam']/30)
                rows.append(dict(panel=c.panel, curve=c.label, knob=c.knob, against=c.against, defense=r['defense'],
                                 cem=r['lam'] > 0, lam=r['lam'], sigma=sigma, seed=s,
                                 acc_test=90 - 10*math.log(error/0.01) + worth*(r['lam'] > 0) + s/10,
                                 **{f'mse_{a}': error for a in attacks}))
    return pd.DataFrame(rows)


def test_advantages_are_told_for_each_comparison(tmp_path):
    frame = made_up()
    table = advantage_table(frame)
    both = ['decoder, test images', 'oracle, training images']
    assert list(table) == [c for name in both for c in (name, f'{name}: points of the first seed')]
    compared = [f'{c.panel}: {c.label} over {c.against}' for c in figure4_curves(PARAMETERS[3]) if c.against]
    assert list(table.index) == compared and len(compared) == 7
    assert (table.loc[compared[:6], both] == '+2.0 ± 0.0').all(axis=None)
    panel = frame[(frame.panel == 'd') & (frame.seed == 0)]
    d = advantage(*(panel.loc[panel.curve == c, ['mse_test_decoder', 'acc_test']] for c in ('noise alone', 'CEM at σ = 0.1')))
    assert table.iloc[6, 0] == f'{d:+.1f} ± 0.0'
    frame.to_csv(tmp_path/'read.csv', index=False)  # where what is compared with nothing is read as nan
    assert advantage_table(pd.read_csv(tmp_path/'read.csv')).equals(table)
    assert list(advantage_table(frame.drop(columns='mse_train_oracle'))) == [*table][:2]
    assert list(advantage_table(frame, ['mse_train_oracle'])) == [*table][2:]
    one = advantage_table(frame[frame.seed == 0])
    assert (one.loc[compared[:6], both] == '+2.0').all(axis=None)


def test_curves_of_one_panel_are_not_those_of_another():
    frame = made_up()
    frame.loc[frame.panel == 'c', 'acc_test'] -= 7*frame.cem
    table = advantage_table(frame)['decoder, test images']
    assert table['c: cut 2+CEM over cut 2'] == '-5.0 ± 0.0' and table['a: Noise_Nopeek+CEM over Noise_Nopeek'] == '+2.0 ± 0.0'


def test_runs_that_diverged():
    frame = made_up()
    frame.loc[(frame.panel == 'b') & (frame.curve == 'λ = 8'), 'mse_test_decoder'] = math.nan
    table = advantage_table(frame)
    assert table.loc['b: λ = 8 over λ = 0'][::2].tolist() == ['diverged', '+2.0 ± 0.0']
    assert table.loc['b: λ = 8 over λ = 0', 'decoder, test images: points of the first seed'] == '0 and 0'
    planes = [ax for ax in plot_figure4(frame).axes if ax.get_title().startswith('b')]
    assert [t.get_text() for t in planes[0].get_legend().get_texts()] == ['λ = 0']


@pytest.mark.parametrize('panels', ['a', 'b,d', 'a,b,c', 'a,b,c,d'])
def test_every_panel_shows_every_run_of_its_curves(panels):
    p = Figure4Parameters(panels=panels, seeds='0,1,2')
    frame = made_up(p)
    fig = plot_figure4(frame)
    axes = [ax for ax in fig.axes if ax.axison]
    assert len(axes) == len(p.panels)
    for ax, panel in zip(axes, p.panels):
        of = frame[frame.panel == panel]
        assert ax.get_title().startswith(TITLES[panel]) and (panel == 'a' or of.defense.iloc[0] in ax.get_title())
        curves = [c for c in figure4_curves(p) if c.panel == panel]
        assert [t.get_text() for t in ax.get_legend().get_texts()] == [c.label for c in curves]
        named = {line.get_label(): line for line in ax.lines if not line.get_label().startswith('_')}
        marks = [line for line in ax.lines if line.get_linestyle() == 'None']
        assert sum(len(line.get_xdata()) for line in marks) == len(of)
        for c in curves:
            runs = of[of.curve == c.label]
            mean = runs.groupby(c.knob)[['acc_test', 'mse_test_decoder']].mean()
            assert np.allclose(named[c.label].get_xydata(), mean)
            if panel != 'b': assert named[c.label].get_color() == COLORS['with CEM' if runs.cem.any() else 'without CEM']
        assert len({(str(line.get_color()), line.get_marker()) for line in named.values()}) == len(curves)
    words = {t.get_text() for t in axes[-1].texts}
    if p.panels[-1] == 'd': assert {'σ 0.025 (σ² 0.000625)', 'σ 0.3 (σ² 0.09)', 'λ 64'} == words


def test_another_error_is_drawn():
    frame = made_up().assign(mse_test_gan=0.5)
    assert all(np.allclose(line.get_ydata(), 0.5) for ax in plot_figure4(frame, 'mse_test_gan').axes for line in ax.lines)


@pytest.mark.parametrize('given', [
    dict(panels='e'), dict(panels=''), dict(lam=0.0), dict(lam=-1.0), dict(noise_stds='0'), dict(noise_stds=''), dict(cuts='0'),
    dict(cuts='1.5'), dict(alone='x'), dict(strengths='-1'), dict(defense='Nobody'), dict(seeds='-1'), dict(preset='tiny'),
    dict(n_jobs=0), dict(panel='a')])
def test_what_cannot_be_asked(given):
    with pytest.raises(ValidationError): Figure4Parameters(**given)
    if 'panel' not in given:
        with pytest.raises(ParameterError) as e: read_parameters(given, Figure4Parameters)
        assert next(iter(given)) in str(e.value) and '\n' not in str(e.value)


def test_a_cut_that_cannot_be_is_refused_though_its_panel_is_not_asked_for():
    with pytest.raises(ValidationError, match='cut is 9; VGG11 can be cut after 1 to 7'): Figure4Parameters(panels='b,d', cuts='9')


def test_a_run_that_cannot_be_stops_before_the_first():
    with pytest.raises(ValueError, match='VGG11 can be cut after 1 to 7'): figure4_runs(BASE, Figure4Parameters(panels='c', cuts='2,8'))
    without = next(d for d in DEFENSES if not DEFENSES[d].cls.cem)
    with pytest.raises(ValueError, match='no row with CEM'): figure4_runs(BASE, Figure4Parameters(panels='b', defense=without))


def test_a_number_that_is_written_in_two_ways_is_one():
    p = Figure4Parameters(panels='b', lams='0,0.0,16,16.0', noise_stds='0.1,0.10,0.2')
    assert p.lams == (0.0, 16.0) and p.noise_stds == (0.1, 0.2)
    with pytest.raises(ValidationError, match='at least 2'): Figure4Parameters(noise_stds='0.1,0.10')


def test_settings_go_to_sweep(monkeypatch):
    given = {}
    def curves(base, rows, seeds, **how):
        given.update(how, seeds=seeds, names=[*rows])
        return pd.DataFrame(dict(curve=[*rows]))
    monkeypatch.setattr(module, 'sweep_curves', curves)
    p = Figure4Parameters(panels='d', seeds='3', device='cpu', backend='ray', n_jobs=5)
    frame = figure4_runs(Experiment(), p)
    assert given == dict(seeds=(3,), device='cpu', backend='ray', n_jobs=5, names=['d: noise alone', 'd: CEM at σ = 0.025'])
    assert list(frame.curve) == ['noise alone', 'CEM at σ = 0.025'] and list(frame.panel) == ['d', 'd']


def test_values_that_print_alike_are_two_curves():
    curves = figure4_curves(Figure4Parameters(panels='b', lams='16,16.0000001'))
    assert len({c.label for c in curves}) == 2 and curves[0].label == 'λ = 16'
