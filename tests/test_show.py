"Tables and the verdict of a frame of runs, beside the paper's rows."
import math
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cem_nb.paper import PAPER, errata_table, paper_runs
from cem_nb.show import (attack_label, caption, gain_table, headline_table, lost_scores, score_table,
                         verdict)
from cem_nb.stats import Tally, mean_interval, tally
from cem_nb.style import COLORS
from frames import DEFENCES, MSE_TABLES, SSIM_TABLES, as_run, diverge, made, printed

METRIC_LABELS = {'mse': 'MSE', 'ssim_zero': 'SSIM, zero-padded', 'psnr': 'PSNR'}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    "The attacks that the paper has, and the oracle, whatever is registered besides."
    import cem_nb.show as show
    known = {'decoder': ('decoder', 'o'), 'gan': ('GAN', 's'), 'oracle': ('oracle', '^')}
    monkeypatch.setattr(show, 'ATTACKS', {k: SimpleNamespace(label=l, marker=m) for k, (l, m) in known.items()})


def columns_of(t, heading): return t[[c for c in t if c[0].startswith(heading)]].droplevel(0, axis=1)


@pytest.mark.parametrize('table', range(1, 9))
def test_the_papers_rows_come_out_as_printed(table):
    "As text beside ours, and as numbers through our formats."
    text, frame = printed(table), as_run(table)
    t = score_table(frame, table).data
    ours, theirs = columns_of(t, 'this run'), columns_of(t, f'paper, {PAPER[table].data}')
    assert set(ours) == set(theirs) and len(t) == len(frame) + 2
    assert list(t.index[:-2]) == [d + '+CEM'*c for d, c in zip(frame.defense, frame.cem)]
    labels = {('', 'Acc. ↑'): 'acc_test'} | {
        (a, f'{label}, {part} {"↑" if m == "mse" else "↓"}'): f'{m}_{part}_{a.lower()}' for a in ('decoder', 'GAN')
        for part in ('train', 'test') for m, label in METRIC_LABELS.items()}
    for row in t.index:
        defense, cem = row.replace('+CEM', '').split(' ')[0], 'w/ CEM' in row or row.endswith('+CEM')
        for column in ours:
            as_printed, mine = text[defense, cem, labels[column]], ours.loc[row, column]
            assert theirs.loc[row, column] == as_printed
            if defense != 'Average': assert mine == as_printed
            elif row not in ' '.join(errata_table(table).data['where']):
                assert abs(float(mine) - float(as_printed)) < 1.001*10.0**-len(mine.split('.')[1])


@pytest.mark.parametrize('table', MSE_TABLES)
def test_headline_of_the_mse(table):
    h, e = headline_table(as_run(table), table).data, errata_table(table).data
    for part, images in (('train', 'training'), ('test', 'test')):
        row = e[e['where'].str.contains(f'MSE on {images} images')].iloc[0]
        first, second = re.findall(r'([\d.]+) %', row["from the paper's rows"])[:2]
        assert h.loc[f'MSE, {part}', 'paper, as printed'] == f'+{row["printed"]}'
        assert h.loc[f'MSE, {part}', 'paper, from its rows'] == h.loc[f'MSE, {part}', 'this run'] == f'+{first} % (+{second} %)'


@pytest.mark.parametrize('table', SSIM_TABLES)
def test_headline_of_ssim_and_psnr(table):
    h, text = headline_table(as_run(table), table).data, printed(table)
    for metric, half in (('ssim_zero', 0.000501), ('psnr', 0.00501)):
        row = h.loc[f'{METRIC_LABELS[metric]}, test']
        mean = [np.mean([float(text[d, cem, f'{metric}_test_{a}']) for d in DEFENCES for a in ('decoder', 'gan')])
                for cem in (False, True)]
        assert row['paper, from its rows'] == row['this run']
        assert [float(v) for v in row['this run'].split(' → ')] == pytest.approx(mean, abs=half)


def test_ssim_is_compared_as_the_paper_computes_it():
    f = made(1)
    f['ssim_test_decoder'] -= 0.3
    t, h = score_table(f, 4).data, headline_table(f, 4).data
    assert {m for _, m in columns_of(t, 'this run')} >= {'SSIM, test ↓', 'SSIM, zero-padded, test ↓', 'PSNR, test ↓'}
    assert 'SSIM, test ↓' not in {m for _, m in columns_of(t, 'paper')}
    assert h.loc['SSIM, test', ['paper, as printed', 'paper, from its rows']].tolist() == ['none', 'none']
    v = verdict(f, 4)
    assert set(v.ours) == {f'{m}_test_{a}' for m in ('ssim', 'ssim_zero', 'psnr') for a in ('decoder', 'gan')}
    assert set(v.paper) == {c for c in v.ours if not c.startswith('ssim_test')}
    only = f[[c for c in f if 'ssim_zero' not in c]]  # an older table
    assert 'SSIM, test ↓' in {m for _, m in columns_of(score_table(only, 4).data, 'this run')}
    assert headline_table(only, 4).data.loc['SSIM, zero-padded, test', 'this run'] == 'none'


def test_tables_of_several_seeds_and_attacks():
    f = made()
    mean, half = mean_interval(f[(f.defense == 'Dropout') & ~f.cem].mse_test_gan)
    t = score_table(f, 1)
    assert t.data.loc['Dropout', ('this run', 'GAN', 'MSE, test ↑')] == f'{mean:.4f} ± {half:.4f}'
    assert list(t.data.index) == ['Bottleneck', 'Bottleneck+CEM', 'Dropout', 'Dropout+CEM', 'Average w/o CEM', 'Average w/ CEM']
    g = gain_table(f, 4).data
    assert (g['this run', 'GAN', 'PSNR, test, dB'] == '-2.00 ± 0.00').all()
    assert g['paper, CIFAR-10', 'decoder', 'SSIM, zero-padded, test'].to_list() == ['-0.050', '-0.047', '-0.048']
    html = t.to_html()
    for words in ('over its 2 defences', '90.87', '0.0041', '±', COLORS['with CEM'], 'Infer'): assert words in html


def test_caption_says_what_was_run():
    f = made()
    for table in (score_table, gain_table): assert caption(f) in table(f, 1).caption
    assert caption(f) == ('preset quick, data digits, vgg11, width 0.25, λ = 16, noise_std = 0.025, variant diag, 2 seeds, '
                          'on 1 CPU thread, a CPU, 2026-01-01')
    changed = f.assign(image_size=48.0, arch='resnet20', noise_std=[0.1]*4 + [0.2]*4, lam=np.where(f.cem, 2.5, 0))
    for words in ('48 pixels', 'resnet20', 'λ = 2.5', 'noise_std = 0.1, 0.2'): assert words in caption(changed)
    assert 'λ' not in caption(f[~f.cem]) and '1 seed,' in caption(f[f.seed == 0])
    resumed = f.assign(hardware=['a CPU; a GPU', *['a GPU']*7], date=['2026-01-01', '2026-01-01; 2026-01-02', *['2026-01-02']*6])
    assert caption(resumed).endswith('2 seeds, on a CPU, a GPU, 2026-01-01, 2026-01-02')
    assert caption(as_run(1)) == '1 seed'  # a frame that says nothing of itself


@pytest.mark.parametrize('cem', [True, False])
def test_without_pairs_the_table_of_changes_says_so(cem):
    f = made(defenses=('Bottleneck',))
    t = gain_table(f[f.cem == cem], 1)
    assert t.data.empty and t.caption.startswith('No defence has a row with CEM and one without')


def test_only_what_was_run_is_shown():
    "No GAN, and an oracle that has no SSIM and was not run on the row of dropout."
    f = made(attacks=('decoder',))
    f['mse_test_oracle'] = f['mse_train_oracle'] = np.where(f.defense == 'Dropout', math.nan, 0.001)
    f['finished_oracle'] = np.where(f.defense == 'Dropout', None, True)
    t = score_table(f, 1).data
    assert {c[1] for c in t if c[0] == 'this run'} == {'', 'decoder', 'oracle'}
    assert {c[1] for c in t if c[0].startswith('paper')} == {'', 'decoder'}
    assert t.loc['Dropout', ('this run', 'oracle', 'MSE, test ↑')] == 'none'
    assert t.loc['Average w/o CEM', ('this run', 'oracle', 'MSE, test ↑')].startswith('0.0010')
    assert {c[1] for c in score_table(f, 4).data if c[0] == 'this run'} == {'', 'decoder'}
    h = headline_table(f, 1)
    assert h.data.loc['MSE, test', 'this run'].startswith('+100.0') and h.caption.endswith('this run: decoder')
    v = verdict(f, 1)
    assert 'of the oracle on test images for 0 of 1 defences' in str(v) and v.lost == () and 'mse_test_oracle' not in v.paper
    assert gain_table(f, 1).data.loc['Dropout', ('this run', 'oracle', 'MSE, test, %')] == 'none'
    f['finished_oracle'] = True  # it was run, and gave nothing
    assert score_table(f, 1).data.loc['Dropout', ('this run', 'oracle', 'MSE, test ↑')] == 'diverged'


def test_a_defence_and_an_attack_that_nobody_registered():
    f = made(1, ['Bottleneck', 'Mine'], attacks=('decoder', 'my_attack'))
    assert attack_label('my_attack') == 'my_attack' and attack_label('gan') == 'GAN'
    t = score_table(f, 1).data
    assert t.loc['Mine+CEM', ('this run', 'my_attack', 'MSE, test ↑')] != 'none'
    assert (t.loc['Mine', [c for c in t if c[0].startswith('paper')]] == '').all()
    assert 'of the my_attack on test images for 2 of 2 defences' in str(verdict(f, 1))


def test_lost_runs_are_shown_as_lost():
    f = diverge(diverge(made(), 'Dropout', True, (0, 1)), 'Bottleneck', True, (1,))
    f = diverge(f, 'Bottleneck', False, (0,), 'gan')  # the attack alone
    assert lost_scores(f).acc_test.sum() == 3 and lost_scores(f).mse_test_gan.sum() == 4
    t = score_table(f, 1).data['this run']
    assert (t.loc['Dropout+CEM'] == 'diverged').all()
    assert t.loc['Bottleneck+CEM', ('', 'Acc. ↑')] == '89.50 (1 diverged)'
    assert t.loc['Bottleneck', ('GAN', 'MSE, test ↑')].endswith('(1 diverged)')
    assert t.loc['Bottleneck', ('', 'Acc. ↑')] == '90.00 ± 0.00'
    g = gain_table(f, 1).data['this run']
    assert (g.loc['Dropout'] == 'diverged').all()
    assert g.loc['Bottleneck', ('decoder', 'MSE, train, %')] == '+100.0 (1 diverged)'
    assert g.loc['Bottleneck', ('GAN', 'MSE, test, %')] == 'diverged'
    v = verdict(f, 1)
    assert v.ours['mse_test_decoder'] == Tally(1, 1, 0, 1) and v.lost == ('Bottleneck', 'Dropout')
    assert 'diverged for Bottleneck, Dropout' in str(v)
    assert headline_table(f, 1).data.loc['MSE, train', 'this run'] == 'none'  # no defence is there in both seeds


@pytest.mark.parametrize('with_columns', [False, True])
def test_nothing_left(with_columns):
    "Every run diverged."
    f = diverge(diverge(made(1, ['Bottleneck']), 'Bottleneck', True), 'Bottleneck', False)
    if not with_columns: f = f.drop(columns=[c for c in f if c[:3] in ('mse', 'ssi', 'psn')])
    for table in (1, 4):
        t = score_table(f, table).data['this run', '', 'Acc. ↑']
        assert t.to_dict() == {'Bottleneck': 'diverged', 'Bottleneck+CEM': 'diverged', 'Average w/o CEM': 'none',
                               'Average w/ CEM': 'none'}
        assert (gain_table(f, table).data['this run'].loc['Bottleneck'] == 'diverged').all()
        assert set(headline_table(f, table).data['this run']) <= {'none', 'none → none', 'none % (none %)'}
        v = verdict(f, table)
        assert v.lost == ('Bottleneck',) and 'Runs or attacks diverged for Bottleneck.' in str(v)


@pytest.mark.parametrize('table, word', [(1, 'raises'), (4, 'lowers')])
def test_verdict_states_counts_and_rule(table, word):
    "One gains for free, one for exactly one point, one for two points; one too little; one loses."
    change = {'Bottleneck': (1.5, 0), 'DistCorr': (1.1, 1.0), 'Dropout': (2.0, 2.0), 'ResSFL': (1.004, 0), 'PATROL': (0.9, -1)}
    f = pd.DataFrame([dict(defense=d, cem=c, seed=0, acc_test=91.1 - cost*c, mse_test_decoder=0.01*(k if c else 1),
                           ssim_zero_test_decoder=0.8/(k if c else 1)) for d, (k, cost) in change.items() for c in (False, True)])
    v = verdict(f, table)
    lines = str(v).split('\n')
    assert len(lines) == 2 and word in lines[0] and 'for 3 of 5 defences, for 2 of them at a cost of at most 1 point of' in lines[0]
    assert ('it lowers it for 1' if word == 'raises' else 'it raises it for 1') in lines[0]
    column, = v.ours
    assert v.ours[column] == Tally(3, 2, 1, 5) == tally(f, column) and v.paper[column] == tally(paper_runs(table), column)
    p = v.paper[column]
    assert f'the paper, so counted, has {p.harder} and {p.cheap} of 7' in lines[0]
    assert lines[1].startswith('Rule:') and ('5 % (MSE)' if table == 1 else '0.01 (SSIM, zero-padded)') in lines[1]
    assert 'at most 2 points' in str(verdict(f, table, cost=2)) and verdict(f, table, cost=2).ours[column].cheap == 3


@pytest.mark.parametrize('table', range(1, 9))
def test_verdict_on_the_papers_own_rows(table):
    v = verdict(as_run(table), table)
    assert v.ours == v.paper and len(v.ours) == (2 if table in MSE_TABLES else 4) and not v.lost
    assert all(t.total == 7 and t.cheap == t.harder for t in v.ours.values())
    if table == 1: assert v.paper['mse_test_decoder'] == Tally(6, 6, 0, 7)  # ResSFL gains 4.6 %
