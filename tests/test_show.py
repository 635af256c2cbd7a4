import csv
import math
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import cem_nb.store as ex
from cem_nb.data import figures_dir, project_dir
from cem_nb.store import TableConfig, run_table
from cem_nb.stats import (ParameterError, averages, errata_table, gain_table, gains, headline_table, load_results,
                           mean_interval, notebook_config, paper_numbers, plot_examples, plot_gains, save_results,
                           score_table, verdict)

matplotlib.use('Agg')
DEFENCES = ['Bottleneck', 'DistCorr', 'Dropout', 'PATROL', 'ResSFL', 'Noise_Nopeek', 'Noise_ARL']
MSE_TABLES, SSIM_TABLES = (1, 2, 3, 8), (4, 5, 6, 7)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


def printed(table):
    "(method, with CEM, column of the scores) to the text that the paper prints, read with nothing but csv."
    cells = {}
    with (project_dir()/'data'/'paper'/'tables_1_to_8.csv').open() as f:
        for r in csv.DictReader(f):
            if r['table'] != str(table): continue
            metric = {'accuracy': 'acc_test', 'ssim': 'ssim_infer', 'psnr': 'psnr_infer'}.get(r['metric'], r['metric'])
            cells[r['method'], r['cem'] == '1', '_'.join(filter(None, (metric, r['attack'])))] = r['value']
    return cells


def as_run(table):
    "The paper's rows as if they were a run of ours, and the parameters of that run."
    rows = {}
    for (method, cem, column), text in printed(table).items():
        if method != 'Average': rows.setdefault((method, cem), {})[column] = float(text)
    scores = pd.DataFrame([dict(method=m, cem=c, seed=0) | r for (m, c), r in rows.items()])
    return TableConfig(methods=list(scores.method.unique())), scores


def made(n_seeds=2, methods=('Bottleneck', 'Dropout'), attacks=('decoder', 'gan')):
    "Scores of a made-up run; CEM doubles every MSE, takes 0.1 of SSIM and 2 dB, and costs half a point."
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(n_seeds):
        for m in methods:
            base = {f'{k}_{part}_{a}': rng.uniform(low, high) for a in attacks for part in ('train', 'infer')
                    for k, low, high in (('mse', 0.01, 0.03), ('ssim', 0.5, 0.7), ('psnr', 15, 20))}
            for cem in (False, True):
                if m == 'No_defense' and cem: continue
                change = lambda k, v: v*(1 + cem) if k[:3] == 'mse' else v - 0.1*cem if k[:4] == 'ssim' else v - 2*cem
                rows.append(dict(method=m, cem=cem, seed=seed, lam=16.0*cem, dataset='digits', preset='quick',
                                 noise_std=0.025, reading='paper', arch='vgg11', acc_test=90 - 0.5*cem)
                            | {k: change(k, v) for k, v in base.items()})
    return pd.DataFrame(rows)


def diverge(scores, method, cem, seeds=(0,), columns=None):
    "Scores with lost runs: nothing is known of them but that they were tried."
    lost = (scores.method == method) & (scores.cem == cem) & scores.seed.isin(seeds)
    columns = columns or ['acc_test'] + [c for c in scores if c[:3] in ('mse', 'ssi', 'psn')]
    return scores.assign(**{c: scores[c].where(~lost) for c in columns})


@pytest.mark.parametrize('namespace, name', [
    (dict(lam='abc'), 'lam'), (dict(lam=-1), 'lam'), (dict(lam=math.inf), 'lam'), (dict(lam=True), 'lam'),
    (dict(preset='huge'), 'preset'), (dict(methods='Bottleneck,Nopeek'), 'methods'), (dict(methods=''), 'methods'),
    (dict(seeds='1.5'), 'seeds'), (dict(seeds=-1), 'seeds'), (dict(noise_std='x'), 'noise_std'),
    (dict(dataset=3), 'dataset'), (dict(noise_std=0.0), 'noise'), (dict(attacks='oracle'), 'decoder'),
    (dict(attacks='gun'), 'attacks'),
    (dict(arch='vgg12'), 'arch'), (dict(image_size='x'), 'image_size'), (dict(methods='No_defense'), 'No_defense'),
    (dict(In=['import x', '# Parameters\nlma = 3\nlam = 2\n']), 'lma')])
def test_bad_parameters_are_one_line_with_the_name(namespace, name):
    with pytest.raises(ParameterError) as e: notebook_config(namespace)
    assert name in str(e.value) and '\n' not in str(e.value)


def test_good_parameters_in_every_shape():
    c = notebook_config(dict(lam=8, seeds='0,2', methods='Dropout, Bottleneck', x=1,
                             In=['# Parameters\nlam = 8\n', 'x = 1']))
    assert (c.lam, c.seeds, c.methods) == (8.0, (0, 2), ('Dropout', 'Bottleneck'))
    assert notebook_config(dict(seeds=[1, 1, 3])).seeds == (1, 3) and notebook_config({}) == TableConfig()
    c = notebook_config(dict(attacks='gan', arch='resnet20', image_size=48))
    assert (c.attacks, c.arch, c.image_size) == (('gan',), 'resnet20', 48)


def test_the_papers_numbers_as_printed():
    t = paper_numbers(1)
    assert len(t) == 1 + 7*2 + 2 and t.loc[('ResSFL', True), 'mse_infer_gan'] == 0.0273
    assert paper_numbers(5).loc[('Noise_ARL', True), 'psnr_gan'] == 14.40  # an erratum stays as printed
    g = 100*(t.loc[('Average', True)]/t.loc[('Average', False)] - 1)
    assert g[['mse_train_decoder', 'mse_train_gan']].mean() == pytest.approx(24.0, abs=0.1)  # of the rounded averages
    for bad in (0, 9, '1', None):
        with pytest.raises(ValueError, match='choose one of 1, 2'): paper_numbers(bad)


@pytest.mark.parametrize('table', range(1, 9))
def test_the_papers_rows_come_out_as_printed(table):
    "As text beside ours and as numbers through our formats; averages to the last digit, but for the errata."
    text, (config, scores) = printed(table), as_run(table)
    t = score_table(config, scores, table).data
    ours, theirs = t['this run'], t[[c for c in t if c[0].startswith('paper')]].droplevel(0, axis=1)
    assert set(ours) == set(theirs) and len(t) == len(scores) + 2
    labels = {('', 'Acc. ↑'): 'acc_test'} | {
        (a, f'{m} {part} {arrow}'): f'{m.lower()}_{part}_{a.lower()}' for a in ('decoder', 'GAN')
        for part in ('train', 'infer') for m, arrow in (('MSE', '↑'), ('SSIM', '↓'), ('PSNR', '↓'))}
    off = set()
    for row in t.index:
        method, cem = row.replace('+CEM', '').split(' ')[0], 'w/ CEM' in row or row.endswith('+CEM')
        for column in ours:
            as_printed, mine = text[method, cem, labels[column]], ours.loc[row, column]
            assert theirs.loc[row, column] == as_printed
            if method != 'Average': assert mine == as_printed
            else:
                unit = 10.0**-len(mine.split('.')[1])
                if abs(float(mine) - float(as_printed)) > 1.001*unit: off.add((row, labels[column], mine))
    listed = {2: 0, 3: 1, 6: 1, 8: 2}.get(table, 0)
    e = errata_table(table).data
    assert len(off) == listed == e['where'].str.startswith('Average').sum()
    for row, _, mine in off:
        assert any(w.startswith(row) and f.startswith(mine) for w, f in zip(e['where'], e["from the paper's rows"]))


@pytest.mark.parametrize('table', MSE_TABLES)
def test_errata_of_the_headlines_follow_from_the_rows(table):
    text, e = printed(table), errata_table(table).data
    for images, part in (('training', 'train'), ('test', 'infer')):
        value = lambda cem, a: np.array([float(text[m, cem, f'mse_{part}_{a}']) for m in DEFENCES])
        of_averages = np.mean([value(True, a).mean()/value(False, a).mean() for a in ('decoder', 'gan')])
        of_ratios = np.mean([(value(True, a)/value(False, a)).mean() for a in ('decoder', 'gan')])
        row = e[e['where'].str.contains(f'MSE on {images} images')].iloc[0]
        numbers = [float(v) for v in re.findall(r'([\d.]+) %', row["from the paper's rows"])]
        assert numbers == [round(100*(of_averages - 1), 1), round(100*(of_ratios - 1), 1)]
        h = headline_table(*as_run(table), table).data.loc[f'MSE {part}']
        assert h['paper, as printed'] == f'+{row["printed"]}'
        assert h['paper, from its rows'] == h['this run'] == f'+{numbers[0]} % (+{numbers[1]} %)'


@pytest.mark.parametrize('table', SSIM_TABLES)
def test_errata_of_the_averages_follow_from_the_rows(table):
    text, e = printed(table), errata_table(table).data
    for metric, digits in (('SSIM', 3), ('PSNR', 2)):
        mean = [np.mean([float(text[m, cem, f'{metric.lower()}_infer_{a}'])
                         for m in DEFENCES for a in ('decoder', 'gan')]) for cem in (False, True)]
        row = e[e['where'] == f'Section 10, averages: {metric}'].iloc[0]
        half = 0.501*10.0**-digits  # 18.095 may be rounded either way
        numbers = lambda s: [float(v) for v in re.findall(r'\d+\.\d+', s)]
        assert numbers(row["from the paper's rows"]) == pytest.approx(mean, abs=half)
        h = headline_table(*as_run(table), table).data.loc[f'{metric} infer']
        assert h['paper, as printed'] == row['printed'].replace('to', '→')
        assert h['paper, from its rows'] == h['this run'] and numbers(h['this run']) == pytest.approx(mean, abs=half)


def test_the_other_errata():
    def says(table, where): return errata_table(table).data.set_index('where').loc[where, "from the paper's rows"]

    for attack, label in (('decoder', 'decoder'), ('gan', 'GAN')):
        mse = float(printed(8)['Noise_ARL', True, f'mse_infer_{attack}'])
        assert says(5, f'Noise_ARL+CEM, {label}, PSNR').startswith(f'{-10*math.log10(mse):.2f} ')
    assert printed(6)['Bottleneck', True, 'acc_test'] in says(2, 'Bottleneck+CEM, accuracy')
    assert printed(2)['Bottleneck', True, 'acc_test'] in says(6, 'Bottleneck+CEM, accuracy')
    assert errata_table(9).data['printed'].tolist() == ['9.78M']


def test_interval_against_scipy():
    v = np.random.default_rng(0).normal(size=5)
    mean, half = mean_interval(v)
    assert (mean - half, mean + half) == pytest.approx(stats.t.interval(0.95, 4, v.mean(), stats.sem(v)))
    assert math.isnan(mean_interval([1.0])[1])


def test_gains_are_paired_by_seed_for_every_metric_and_attack():
    g = gains(made()[::-1])
    assert len(g) == 4 and np.allclose(g.acc_test, -0.5)
    for attack in ('decoder', 'gan'):
        for part in ('train', 'infer'):
            assert np.allclose(g[[f'{m}_{part}_{attack}' for m in ('mse', 'ssim', 'psnr')]], [100, -0.1, -2])
    zero = made(1, ['Bottleneck']).assign(mse_train_decoder=[0.0, 0.1])
    assert gains(zero).mse_train_decoder.isna().all()  # no percentage of nothing


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.lists(st.floats(0.1, 9), min_size=12, max_size=12), st.permutations(range(12)))
def test_averages_by_hand(values, order):
    "Three defences, two seeds; the order of rows does not matter, and No_defense does not count."
    rows = [dict(method=m, seed=s, cem=c) for m in DEFENCES[:3] for s in (0, 1) for c in (False, True)]
    scores = pd.DataFrame([r | dict(acc_test=v, ssim_infer_gan=v) for r, v in zip(rows, values)]).iloc[list(order)]
    extra = pd.DataFrame([dict(method='No_defense', seed=s, cem=False, acc_test=1e6, ssim_infer_gan=1e6)
                          for s in (0, 1)])
    a = averages(pd.concat([extra, scores])).set_index(['seed', 'cem'])
    v = np.array(values).reshape(3, 2, 2)
    for s in (0, 1):
        for c in (0, 1): assert a.loc[(s, bool(c)), 'ssim_infer_gan'] == pytest.approx(v[:, s, c].mean())
    g = gains(a.reset_index()).set_index('seed').ssim_infer_gan
    assert g.to_numpy() == pytest.approx(gains(scores).groupby('seed').ssim_infer_gan.mean().to_numpy())


def test_averages_keep_pairs_together():
    s = diverge(made(), 'Dropout', True)
    a = averages(s).set_index(['seed', 'cem']).mse_infer_gan
    full = made().set_index(['method', 'seed', 'cem']).mse_infer_gan
    assert a[0, False] == full['Bottleneck', 0, False]  # Dropout without CEM finished, its partner did not
    assert a[1, False] == pytest.approx((full['Bottleneck', 1, False] + full['Dropout', 1, False])/2)


@pytest.mark.parametrize('table, word', [(1, 'raises'), (4, 'lowers')])
def test_verdict_counts(table, word):
    "One gains for free, one for exactly one point, one for two points; one loses."
    change = {'Bottleneck': (1.5, 0), 'DistCorr': (1.1, 1.0), 'Dropout': (2.0, 2.0), 'PATROL': (0.9, -1)}
    rows = [dict(method=m, cem=c, seed=0, acc_test=91.1 - cost*c, mse_infer_decoder=0.01*(k if c else 1),
                 ssim_infer_decoder=0.8/(k if c else 1)) for m, (k, cost) in change.items() for c in (False, True)]
    lines = verdict(pd.DataFrame(rows), table).split('\n')
    assert len(lines) == 1 and word in lines[0] and 'for 3 of 4 methods, for 2 of them' in lines[0]
    assert 'has 7 and 7 of 7' in lines[0]


@pytest.mark.parametrize('table', range(1, 9))
def test_verdict_on_the_papers_own_rows(table):
    text, (_, scores) = printed(table), as_run(table)
    for line in verdict(scores, table).split('\n'):
        metric, attack = re.search(r'the (\w+) of the (\w+)', line).groups()
        sign = 1 if metric == 'MSE' else -1
        value = lambda m, cem: float(text[m, cem, f'{metric.lower()}_infer_{attack.lower()}'])
        n = sum(sign*(value(m, True) - value(m, False)) > 0 for m in DEFENCES)
        assert f'for {n} of 7 methods, for {n} of them' in line and f'has {n} and {n} of 7' in line
        assert n == (6 if (table, metric, attack) == (5, 'PSNR', 'decoder') else 7)


def test_tables_of_several_seeds_and_attacks():
    config, s = TableConfig(methods='Bottleneck,Dropout', seeds='0,1'), made()
    mean, half = mean_interval(s[(s.method == 'Dropout') & ~s.cem].mse_infer_gan)
    t = score_table(config, s, 1).data['this run']
    assert t.loc['Dropout', ('GAN', 'MSE infer ↑')] == f'{mean:.4f} ± {half:.4f}'
    assert list(t.index) == ['Bottleneck', 'Bottleneck+CEM', 'Dropout', 'Dropout+CEM', 'Average w/o CEM',
                             'Average w/ CEM']
    g = gain_table(config, s, 4).data
    assert (g['this run', 'GAN', 'PSNR infer, dB'] == '-2.00 ± 0.00').all()
    assert g['paper, CIFAR-10', 'decoder', 'SSIM infer'].to_list() == ['-0.050', '-0.047', '-0.048']
    caption = score_table(config.model_copy(update=dict(image_size=48, arch='resnet20')), s, 1).caption
    for words in ('at 48 pixels', 'resnet20', '2 seeds', 'over its 2 defences'): assert words in caption


def test_only_what_was_run_is_shown():
    "No GAN, and an oracle that has no SSIM and, under dropout, no score."
    s = made(attacks=('decoder',))
    s['mse_infer_oracle'] = s['mse_train_oracle'] = np.where(s.method == 'Dropout', math.nan, 0.001)
    config = TableConfig(methods='Bottleneck,Dropout', seeds='0,1', attacks='decoder,oracle')
    t = score_table(config, s, 1).data
    assert {c[0] for c in t['this run']} == {'', 'decoder', 'oracle'}
    assert {c[0] for c in t['paper, CIFAR-10']} == {'', 'decoder'}
    assert t.loc['Dropout', ('this run', 'oracle', 'MSE infer ↑')] == 'none'
    assert t.loc['Average w/o CEM', ('this run', 'oracle', 'MSE infer ↑')].startswith('0.0010')
    assert {c[0] for c in score_table(config, s, 4).data['this run']} == {'', 'decoder'}
    assert headline_table(config, s, 1).data.loc['MSE infer', 'this run'].startswith('+100.0')
    assert 'of the oracle on test images for 0 of 1 methods' in verdict(s, 1) and 'diverged' not in verdict(s, 1)
    plot_gains(s, 1)


def test_lost_runs_are_shown_as_lost():
    config = TableConfig(methods='Bottleneck,Dropout', seeds='0,1')
    s = diverge(diverge(made(), 'Dropout', True, (0, 1)), 'Bottleneck', True, (1,))
    s = diverge(s, 'Bottleneck', False, (0,), ['mse_infer_gan', 'ssim_infer_gan'])  # the attack alone
    t = score_table(config, s, 1).data['this run']
    assert (t.loc['Dropout+CEM'] == 'diverged').all()
    assert t.loc['Bottleneck+CEM', ('', 'Acc. ↑')] == '89.50 (1 diverged)'
    assert t.loc['Bottleneck', ('GAN', 'MSE infer ↑')].endswith('(1 diverged)')
    assert t.loc['Bottleneck', ('', 'Acc. ↑')] == '90.00 ± 0.00'
    g = gain_table(config, s, 1).data['this run']
    assert (g.loc['Dropout'] == 'diverged').all()
    assert g.loc['Bottleneck', ('decoder', 'MSE train, %')] == '+100.0 (1 diverged)'
    assert g.loc['Bottleneck', ('GAN', 'MSE infer, %')] == 'diverged'
    assert 'for 1 of 1 methods' in verdict(s, 1) and 'diverged for Bottleneck, Dropout' in verdict(s, 1)
    assert headline_table(config, s, 1).data.loc['MSE train', 'this run'].startswith('+100.0')
    for table in (1, 4):
        labels = [t.get_text() for t in plot_gains(s, table).axes[0].get_yticklabels()]
        assert labels == ['Bottleneck', 'Dropout (diverged)']


def test_nothing_left():
    "As `run_table` gives it if every run diverged."
    config, s = TableConfig(methods='Bottleneck'), made(1, ['Bottleneck'])
    s = s.drop(columns=[c for c in s if c[:3] in ('mse', 'ssi', 'psn')]).assign(acc_test=math.nan)
    for table in (1, 4):
        t = score_table(config, s, table).data['this run', '', 'Acc. ↑']
        assert t.to_dict() == {'Bottleneck': 'diverged', 'Bottleneck+CEM': 'diverged', 'Average w/o CEM': 'none',
                               'Average w/ CEM': 'none'}
        assert (gain_table(config, s, table).data['this run'] == 'diverged').all(axis=None)
        assert (headline_table(config, s, table).data['this run'] == 'none').all()
        assert verdict(s, table) == 'Runs or attacks diverged for Bottleneck.'
    with pytest.raises(ValueError, match='run_table'): plot_examples({})


@pytest.mark.parametrize('table', [1, 4, 8])
def test_the_picture_of_gains(table):
    config, scores = as_run(table)
    fig = plot_gains(scores, table)
    shown = [ax for ax in fig.axes if ax.axison]
    assert len(shown) == (4 if table in MSE_TABLES else 7)
    g = gains(scores).set_index('method')
    key = 'mse_infer' if table in MSE_TABLES else 'ssim_infer'
    ours, paper = ([c for c in shown[2].collections if c.get_label() == f'{who}, GAN'][0].get_offsets()
                   for who in ('change', 'paper'))
    assert np.allclose(ours[:, 0], g.loc[scores.method[scores.cem].unique(), f'{key}_gan']) and np.allclose(ours, paper)
    (low, high), change = shown[2].get_xlim(), g[[f'{key}_gan', f'{key}_decoder']]
    assert low < change.min(axis=None) and high > change.max(axis=None)
    assert (shown[2].get_xscale() == 'function') == (table == 8)


@pytest.mark.parametrize('config', [
    TableConfig(),
    TableConfig(methods='Dropout', seeds='2,0', lam=600, noise_std=0.1, preset='small', dataset='cifar10',
                reading='release', attacks='gan,oracle', restarts=2, arch='resnet20_wide', image_size=24),
    TableConfig(lam=0, noise_std=0, methods='No_defense,PATROL')])
def test_a_saved_table_comes_back(config):
    same = {k: getattr(config, k) for k in ('preset', 'dataset', 'noise_std', 'reading', 'restarts', 'arch')}
    scores = pd.DataFrame([dict(method=m, cem=c, seed=s, lam=config.lam*c) | same | dict(acc_test=90.123)
                           | {f'mse_{p}_{a}': 0.0123456 for a in config.attacks for p in ('train', 'infer')}
                           for s in config.seeds for m, c in config.rows()])
    path, = save_results('t', config, scores)
    back, rows = load_results(path)
    assert back == config and len(rows) == len(scores) and np.allclose(rows.mse_infer_gan, 0.0123456)
    if config == TableConfig(): assert path.name == 't_digits_quick.csv'
    for word in ('lam-600', 'noise_std-0.1', 'methods-Dropout', 'seeds-2-0', 'arch-resnet20_wide', 'reading-release',
                 'attacks-gan-oracle', 'restarts-2', 'image_size-24'): assert (word in path.name) == (config.lam == 600)


def test_a_folder_is_not_saved_as_the_data_set_of_its_name():
    names = [save_results('t', TableConfig(dataset=d), pd.DataFrame({'x': [0]}))[0].name for d in ('cifar10', 'folder:a/cifar10')]
    assert names == ['t_cifar10_quick.csv', 't_folder-cifar10_quick.csv']


def test_tables_figures_and_files(monkeypatch):
    "From training to files, with both attacks."
    tiny = dict(width=8, blocks=0, n_epochs=1, batch_size=64)
    train = dict(width=0.125, epochs=1, batch_size=64)
    monkeypatch.setitem(ex.PRESETS, 'quick', dict(data=dict(n_train=256), train=train, decoder=tiny,
                                                  gan=tiny | dict(critic_width=4)))
    config = TableConfig(methods='No_defense,Bottleneck', seeds='0,1')
    scores, runs = run_table(config)
    html = score_table(config, scores, 1).to_html()
    assert '90.87' in html and '0.0041' in html and '±' in html and 'preset quick, data digits' in html
    s = scores[(scores.method == 'Bottleneck') & scores.cem]
    assert f'{s.mse_infer_decoder.mean():.4f}' in html and f'{s.mse_infer_gan.mean():.4f}' in html
    html = gain_table(config, scores, 1).to_html()
    assert f'{100*(0.0058/0.0041 - 1):+.1f}' in html and f'{gains(scores).mse_infer_decoder.mean():+.1f}' in html
    examples = plot_examples(runs, 3)
    assert len(examples.axes) == 4*(3 + 1 + 3)  # original and three rows; two attacks and a gap
    last = lambda name: runs['Bottleneck', True].examples(3, attack=name)[1][-1, 0].clamp(0, 1).numpy()
    assert np.allclose(examples.axes[-1].images[0].get_array(), last('gan'))
    assert np.allclose(examples.axes[-5].images[0].get_array(), last('decoder'))
    paths = save_results('table1', config, scores, gains=plot_gains(scores, 1), examples=examples)
    assert [p.parent for p in paths] == [figures_dir()]*3 and all(p.stat().st_size for p in paths)
    back = pd.read_csv(paths[0])
    assert len(back) == len(scores) == 6 and np.allclose(back.mse_infer_decoder, scores.mse_infer_decoder, rtol=1e-5)
    config2, scores2 = load_results(paths[0])
    assert config2 == config
    for table in (1, 4):
        assert score_table(config2, scores2, table).data.equals(score_table(config, scores, table).data)
    assert 'methods-No_defense-Bottleneck_seeds-0-1' in paths[0].name
    assert save_results('table1', TableConfig(), scores)[0].name == 'table1_digits_quick.csv'
