import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import cem_nb.experiments as ex
from cem_nb.data import figures_dir
from cem_nb.experiments import TableConfig, run_table
from cem_nb.report import (ParameterError, gain_table, gains, load_results, mean_interval, mse_table, notebook_config,
                           paper_numbers, plot_examples, plot_gains, save_results)

matplotlib.use('Agg')


@pytest.mark.parametrize('namespace, name', [
    (dict(lam='abc'), 'lam'), (dict(lam=-1), 'lam'), (dict(lam=math.inf), 'lam'), (dict(lam=True), 'lam'),
    (dict(preset='huge'), 'preset'), (dict(methods='Bottleneck,Nopeek'), 'methods'), (dict(methods=''), 'methods'),
    (dict(seeds='1.5'), 'seeds'), (dict(seeds=-1), 'seeds'), (dict(noise_std='x'), 'noise_std'), (dict(dataset=3), 'dataset'), (dict(noise_std=0.0), 'noise'), (dict(attacks='oracle'), 'decoder'),
    (dict(methods='No_defense'), 'No_defense'),
    (dict(In=['import x', '# Parameters\nlma = 3\nlam = 2\n']), 'lma')])
def test_bad_parameters_are_one_line_with_the_name(namespace, name):
    with pytest.raises(ParameterError) as e: notebook_config(namespace)
    assert name in str(e.value) and '\n' not in str(e.value)


def test_good_parameters_in_every_shape():
    c = notebook_config(dict(lam=8, seeds='0,2', methods='Dropout, Bottleneck', x=1, In=['# Parameters\nlam = 8\n', 'x = 1']))
    assert (c.lam, c.seeds, c.methods) == (8.0, (0, 2), ('Dropout', 'Bottleneck'))
    assert notebook_config(dict(seeds=[1, 1, 3])).seeds == (1, 3) and notebook_config({}) == TableConfig()


def test_the_papers_numbers_as_printed():
    t = paper_numbers(1)
    assert len(t) == 1 + 7*2 + 2 and t.loc[('ResSFL', True), 'mse_infer_gan'] == 0.0273
    assert paper_numbers(5).loc[('Noise_ARL', True), 'psnr_gan'] == 14.40  # an erratum stays as printed
    g = 100*(t.loc[('Average', True)]/t.loc[('Average', False)] - 1)
    assert g[['mse_train_decoder', 'mse_train_gan']].mean() == pytest.approx(24.0, abs=0.1)  # of the rounded averages


def test_interval_against_scipy():
    v = np.random.default_rng(0).normal(size=5)
    mean, half = mean_interval(v)
    assert (mean - half, mean + half) == pytest.approx(stats.t.interval(0.95, 4, v.mean(), stats.sem(v)))
    assert math.isnan(mean_interval([1.0])[1])


def test_gains_are_paired_by_seed():
    rows = [dict(method='A', cem=c, seed=s, acc_test=80 + 5*s - 2*c, mse_train_decoder=0.01*(1 + s)*(1 + c),
                 mse_infer_decoder=0.02*(1 + s)*(1 + 0.1*c)) for s in (0, 1) for c in (False, True)]
    g = gains(pd.DataFrame(rows[::-1]))
    assert np.allclose(g[['acc', 'mse_train', 'mse_infer']], [[-2, 100, 10]]*2)


def test_tables_figures_and_files(monkeypatch):
    monkeypatch.setitem(ex.PRESETS, 'quick', dict(data=dict(n_train=256), train=dict(width=0.125, epochs=1, batch_size=64),
                                                  decoder=dict(width=8, blocks=0, n_epochs=1, batch_size=64)))
    config = TableConfig(methods='No_defense,Bottleneck', seeds='0,1')
    scores, runs = run_table(config)
    paper = paper_numbers(1)
    html = mse_table(config, scores, paper, 'CIFAR-10').to_html()
    assert '90.87' in html and '0.0041' in html and '±' in html and 'preset quick, data digits' in html
    s = scores[(scores.method == 'Bottleneck') & scores.cem]
    assert f'{s.mse_infer_decoder.mean():.4f}' in html
    html = gain_table(config, scores, paper).to_html()
    assert f'{100*(0.0058/0.0041 - 1):+.1f}' in html and f'{gains(scores).mse_infer.mean():+.1f}' in html
    paths = save_results('table1', config, scores, gains=plot_gains(scores, paper, 'CIFAR-10'), examples=plot_examples(runs, 3))
    assert [p.parent for p in paths] == [figures_dir()]*3 and all(p.stat().st_size for p in paths)
    back = pd.read_csv(paths[0])
    assert len(back) == len(scores) == 6 and np.allclose(back.mse_infer_decoder, scores.mse_infer_decoder, rtol=1e-5)
    config2, scores2 = load_results(paths[0])
    assert config2 == config and mse_table(config2, scores2, paper, 'CIFAR-10').data.equals(
        mse_table(config, scores, paper, 'CIFAR-10').data)
    assert 'methods-No_defense-Bottleneck_seeds-0-1' in paths[0].name
    assert save_results('table1', TableConfig(), scores)[0].name == 'table1_digits_quick.csv'
