"Rebuilt images: the rule that picks them, the numbers under them, what is left out, and that the picture repeats."
import math
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cem_nb.rebuilt as module
from cem_nb.core import committed_dir, stage_seed
from cem_nb.data import Split
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import Experiment, preset
from cem_nb.methods import DEFENSES
from cem_nb.models import SplitModel
from cem_nb.oracle import Oracle
from cem_nb.parameters import ParameterError, TableParameters, read_parameters, table_base, table_rows
from cem_nb.rebuilt import (RULES, Attacked, Figure5Parameters, Rebuilt, attacked_rows, change_table, figure5, figure5_base, figure5_rows,
                            figure5_runs, picked, plot_rebuilt, rebuild, with_runs)
from cem_nb.results import provenance_line, read_result, save, stem
from cem_nb.store import data_on, open_run

matplotlib.use('Agg')
BLUR = nn.AvgPool2d(3, 1, 1)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


@pytest.mark.parametrize('n', [1, 2, 3, 10, 11])
def test_the_rule_is_that_of_sorting(n):
    errors = np.random.default_rng(n).random((4, n))
    ranked = sorted(range(n), key=lambda i: sum(errors[r][i] for r in range(4)))
    assert picked(errors) == dict(lowest=ranked[0], median=ranked[(n - 1)//2], highest=ranked[-1]) and list(picked(errors)) == list(RULES)


def test_the_rule_takes_the_first_of_equals_and_refuses_nan():
    assert picked([[2, 1, 1, 1]]) == dict(lowest=1, median=2, highest=0)
    assert picked([[0, 4, 2], [4, 4, 2]])['lowest'] == 0  # 2 on average, as the last
    for bad in ([[1, math.nan]], [], [[]], [1, 2]):
        with pytest.raises(ValueError): picked(bad)


def images(n=20, channels=3, side=12, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n, channels, side, side))*rng.uniform(0.1, 1, (n, 1, 1, 1))  # some with more contrast
    return Split(torch.from_numpy(x.astype(np.uint8)), torch.arange(n))


def attacked(noise_std=0.1, seed=0, attacker=BLUR): return Attacked(SplitModel(nn.Identity(), nn.Identity(), noise_std), attacker, seed)


def by_hand(split, noise_std, seed, size):
    "Reconstructions of all images by noise from the seed of each batch."
    x, out = split.x.float()/255, []
    for i in range(0, len(x), size):
        torch.manual_seed(stage_seed(seed, 'rebuilt', i//size))
        out.append(F.avg_pool2d(x[i:i + size] + noise_std*torch.randn(x[i:i + size].shape), 3, 1, 1))
    return x, torch.cat(out)


def ssim_by_convolution(x, y):
    "Of one image: pytorch-ssim's formula, a window of 11 with zeros around the image."
    g = torch.exp(-(torch.arange(11.) - 5).double()**2/4.5)
    window = torch.outer(g/g.sum(), g/g.sum())[None, None].expand(len(x), 1, 11, 11)
    mean = lambda t: F.conv2d(t[None].double(), window, padding=5, groups=len(x))[0]
    x, y = x.double(), y.double()
    mx, my = mean(x), mean(y)
    top = (2*mx*my + 1e-4)*(2*(mean(x*y) - mx*my) + 9e-4)
    return (top/((mx**2 + my**2 + 1e-4)*(mean(x*x) - mx**2 + mean(y*y) - my**2 + 9e-4))).mean().item()


@pytest.mark.parametrize('size', [7, 20, 250])
def test_errors_are_those_of_every_image_under_seeded_noise(size, monkeypatch):
    monkeypatch.setattr(module, 'BATCH', size)
    split, a = images(), attacked(seed=3)
    x, x_hat = by_hand(split, 0.1, 3, size)
    errors = a.errors(split)
    assert errors.dtype == np.float64 and np.allclose(errors, ((x_hat - x)**2).mean(dim=(1, 2, 3)))
    for at in (0, 6, 7, 19):
        original, rebuilt = a.one(split, at)
        assert torch.allclose(original, x[at]) and torch.allclose(rebuilt, x_hat[at], atol=1e-6)


def test_the_mean_error_of_an_image_is_over_many_draws(monkeypatch):
    "Noise of variance s^2 under a window of 9 pixels adds s^2/9, or less beside the border: there the zeros have no noise."
    split = images()
    x = split.x[4].float()/255
    blurred = F.avg_pool2d(x, 3, 1, 1)
    noise = F.avg_pool2d(torch.ones_like(x), 3, 1, 1)*0.2**2/9
    expected = ((blurred - x)**2 + noise).mean().item()
    assert math.isclose(attacked(0.2).mean_mse(split, 4), expected, rel_tol=0.02)
    assert attacked(0.2).mean_mse(split, 4) == attacked(0.2).mean_mse(split, 4) != attacked(0.2, seed=1).mean_mse(split, 4)
    monkeypatch.setattr(module, 'DRAWS', 5000)
    assert math.isclose(attacked(0.2).mean_mse(split, 4), expected, rel_tol=0.003)


def test_noise_is_drawn_under_the_seed_and_from_nothing_else():
    split = images()
    first, state = attacked().errors(split), torch.get_rng_state()
    torch.rand(5)
    assert np.array_equal(attacked().errors(split), first) and not np.allclose(attacked(seed=1).errors(split), first)
    torch.set_rng_state(state)
    attacked().errors(split)
    assert torch.equal(torch.get_rng_state(), state)


def rows():
    return {('Bottleneck', False): attacked(0.02), ('Bottleneck', True): attacked(0.3), ('No_defense', False): attacked(0.1)}


def test_three_images_and_their_numbers():
    split = images(40)
    found = rebuild(rows(), split)
    whole = {row: by_hand(split, a.model.noise_std, 0, 250) for row, a in rows().items()}
    errors = np.stack([((x_hat - x)**2).mean(dim=(1, 2, 3)).numpy() for x, x_hat in whole.values()])
    ranked = np.argsort(errors.mean(0))
    at = dict(lowest=ranked[0], median=ranked[19], highest=ranked[39])
    assert len(found.table) == 9 and not found.table.duplicated(['defense', 'cem', 'rule']).any()
    for r in found.table.itertuples():
        x, x_hat = (t[at[r.rule]] for t in whole[r.defense, r.cem])
        assert r.image == at[r.rule] and torch.equal(found.originals[r.rule], x)
        assert torch.allclose(found.images[(r.defense, r.cem), r.rule], x_hat, atol=1e-6)
        assert math.isclose(r.mse, ((x_hat - x)**2).mean().item(), rel_tol=1e-4, abs_tol=1e-12)
        assert math.isclose(r.ssim_zero, ssim_by_convolution(x_hat, x), abs_tol=1e-4)
        assert r.mse_draws == rows()[r.defense, r.cem].mean_mse(split, r.image)
        assert math.isclose(r.mse_images, errors[list(whole).index((r.defense, r.cem))].mean(), rel_tol=1e-5, abs_tol=1e-12)


@pytest.mark.parametrize('channels', [1, 3])
def test_the_picture_shows_images_and_numbers_in_their_places(channels):
    found = rebuild(rows(), images(channels=channels))
    fig = plot_rebuilt(found, 'decoder')
    shown = [ax for ax in fig.axes if ax.images]
    assert len(shown) == 3 + 9 and len(fig.axes) == 3 + 2*6
    expected = {}
    for rule in RULES: expected[f'image {found.table[found.table.rule == rule].image.iloc[0]}'] = found.originals[rule]
    for r in found.table.itertuples(): expected.setdefault(f'{r.mse:.4f}   {r.ssim_zero:.2f}', found.images[(r.defense, r.cem), r.rule])
    assert len(expected) == 12
    for ax in shown:
        image = expected[ax.texts[0].get_text()]
        assert np.allclose(ax.images[0].get_array(), image.clamp(0, 1).permute(1, 2, 0).squeeze(-1))
    tops = [ax for ax in fig.axes if ax.get_title() in RULES.values()]
    assert [ax.get_title() for ax in tops] == [*RULES.values()]
    fig.canvas.draw()
    place = {ax: ax.get_position() for ax in fig.axes}
    names = {ax.texts[-1].get_text(): place[ax] for ax in fig.axes if ax.texts and ax.texts[-1].get_text() in DEFENSES}
    assert list(names) == ['Bottleneck', 'No_defense'] and names['Bottleneck'].y0 > names['No_defense'].y0
    for top, (rule, _) in zip(tops, RULES.items()):
        for (d, cem), a in rows().items():
            r = found.table[(found.table.defense == d) & (found.table.cem == cem) & (found.table.rule == rule)].iloc[0]
            text = f'{r.mse:.4f}   {r.ssim_zero:.2f}'
            mine = [ax for ax in shown if ax.texts[0].get_text() == text]
            middle = (place[top].x0 + place[top].x1)/2
            assert any(abs(place[ax].y0 - names[d].y0) < 1e-6 and (place[ax].x0 > middle - 0.02) == cem
                       and place[top].x0 - 0.2 < place[ax].x0 < place[top].x1 + 0.2 for ax in mine)
    assert 'MSE, SSIM' in fig.axes[0].texts[-1].get_text() and 'decoder' in fig.axes[0].texts[-1].get_text()


def test_what_cem_changes():
    table = pd.DataFrame([dict(defense=d, cem=c, rule=rule, mse=m, mse_draws=m*(1 + c*k), mse_images=0.5*(1 + c)) for d in ('B', 'A')
                          for c in (False, True) for rule, m, k in zip(RULES, (0.1, 0.2, 0.4), (0.5, -0.25, 1))])
    alone = table[:3].assign(defense='No_defense')
    change = change_table(pd.concat([alone, table]))
    assert list(change.index) == ['B', 'A'] and list(change) == [*RULES.values(), 'all images']
    assert np.allclose(change, [[50, -25, 100, 100]]*2)
    assert change_table(alone).empty


class FakeRun:
    def __init__(self, defense, cem, finished=True):
        self.experiment = Experiment(attacks=(DecoderAttack(),), defense=defense).replace(**(dict(lam=4.0) if cem else {}))
        self.finished = finished

    def attack(self, name): return dict(finished=self.finished)

    def model(self, device): return SplitModel(nn.Identity(), nn.Identity(), 0.1)

    def attacker(self, name, model, device):
        assert self.finished, 'of an attack that diverged there is none'
        return BLUR


def test_what_diverged_is_left_out_with_a_line(capsys):
    frame = pd.DataFrame(dict(defense=['Bottleneck', 'Bottleneck', 'Dropout', 'Dropout'], cem=[False, True]*2, run=['a', None, 'b', 'c'],
                              acc_test=[90, math.nan, 80, 80]))
    runs = dict(a=FakeRun('Bottleneck', False), b=FakeRun('Dropout', False, finished=False), c=FakeRun('Dropout', True))
    found = attacked_rows(frame, runs.__getitem__, 'decoder')
    assert list(found) == [('Bottleneck', False), ('Dropout', True)]
    assert capsys.readouterr().out == 'Bottleneck+CEM: the training diverged; left out\nDropout: the decoder diverged; left out\n'
    fig = plot_rebuilt(rebuild(found, images()), 'decoder')
    assert sum(bool(ax.images) for ax in fig.axes) == 3 + 6 and len(fig.axes) == 3 + 2*6  # their places stay blank
    for lost in (frame.assign(acc_test=math.nan), frame[frame.run == 'b']):
        with pytest.raises(ValueError, match='no run was attacked to the end'): attacked_rows(lost, runs.__getitem__, 'decoder')


TINY = dict(n_train=256, width=0.125, epochs=2, batch_size=64, lr=0.02)


@pytest.fixture
def tiny(monkeypatch):
    "Figure 5 of small runs."
    attacks = dict(decoder=DecoderAttack(width=8, blocks=0, n_epochs=1, batch_size=64), oracle=Oracle(n_images=20))
    monkeypatch.setattr(module, 'figure5_base', lambda p: Experiment(attacks=(attacks[p.attack],)).replace(dataset=p.dataset, **TINY))


def test_figure_5_of_trained_runs(tiny, tmp_path):
    p = Figure5Parameters(methods='No_defense,Dropout', lam=4.0, seed=1, n_images=90, n_jobs=1)
    frame = figure5_runs(p)
    assert list(zip(frame.defense, frame.cem, frame.seed)) == [('No_defense', False, 1), ('Dropout', False, 1), ('Dropout', True, 1)]
    table, fig = figure5(p, frame)
    test = data_on(module.figure5_base(p).data, torch.device('cpu'))[0].test
    places = [i*359//89 for i in range(90)]
    errors, rebuilt = [], {}
    for name in frame.run:
        run = open_run(name)
        model, x = run.model(), test.x[places].float()/255
        attacker = run.attacker('decoder', model)
        torch.manual_seed(stage_seed(1, 'rebuilt', 0))
        with torch.no_grad(): rebuilt[name] = attacker(model.smash(x))
        errors.append(((rebuilt[name] - x)**2).mean(dim=(1, 2, 3)).numpy())
    ranked = np.argsort(np.mean(errors, 0))
    at = dict(lowest=ranked[0], median=ranked[44], highest=ranked[89])
    assert len(table) == 9 and (table.n_images == 90).all()
    for r in table.itertuples():
        assert r.image == places[at[r.rule]]
        own = errors[list(frame.run).index(r.run)]
        assert math.isclose(r.mse, own[at[r.rule]], rel_tol=1e-4) and math.isclose(r.mse_images, own.mean(), rel_tol=1e-4)
        assert math.isclose(r.ssim_zero, ssim_by_convolution(rebuilt[r.run][at[r.rule]], x[at[r.rule]]), abs_tol=1e-4)
    again, _ = figure5(p, figure5_runs(p))
    pd.testing.assert_frame_equal(again.drop(columns='date', errors='ignore'), table.drop(columns='date', errors='ignore'))
    assert table.merge(frame[['run', 'acc_test']], on='run').eval('acc_test_x == acc_test_y').all()
    saved = save('figure5', p, table, rebuilt=fig)
    assert [s.name for s in saved] == [f'{stem("figure5", p)}.csv', f'{stem("figure5", p)}_rebuilt.png']
    assert 'seeds 1; median of a run: train' in provenance_line(read_result(saved[0]))


def test_all_images_are_looked_at_unless_there_are_more_than_asked(tiny):
    p = Figure5Parameters(methods='Bottleneck', attack='oracle', n_jobs=1)
    frame = figure5_runs(p)
    table, fig = figure5(p, frame)
    assert (table.n_images == 360).all() and any('oracle' in t.get_text() for ax in fig.axes for t in ax.texts)
    few, _ = figure5(Figure5Parameters(methods='Bottleneck', attack='oracle', n_images=1, n_jobs=1), frame)
    assert set(few.image) == {0} and (few.groupby(['defense', 'cem']).mse.nunique() == 1).all()


def test_the_table_is_told_of_its_runs():
    frame = pd.DataFrame([dict(defense='A', cem=False, seed=0, acc_test=math.nan, run=None, seconds_train=1.0, other=1),
                          dict(defense='A', cem=False, seed=1, acc_test=70.0, run='a', seconds_train=2.0, other=1)])
    found = Rebuilt(pd.DataFrame([dict(defense='A', cem=False, rule=r, mse=1.0) for r in RULES]), {}, {})
    table = with_runs(found, frame)
    assert len(table) == 3 and (table.run == 'a').all() and (table.seconds_train == 2).all() and 'other' not in table


# parameters

def test_rows_are_those_of_table_1():
    p, t = Figure5Parameters(methods='all'), TableParameters(attacks='decoder')
    ours = [figure5_base(p).replace(**r).model_dump_json() for r in figure5_rows(p)]
    assert len(ours) == 15 and ours == [table_base(t).replace(**r).model_dump_json() for r in table_rows(t)]
    assert figure5_base(Figure5Parameters(attack='oracle', preset='small')) == preset('small', (Oracle(),))


def test_names_of_files():
    assert stem('figure5', Figure5Parameters()) == 'figure5_digits_quick'
    p = Figure5Parameters(methods='all', dataset='folder:data/cifar10', preset='small')
    assert stem('figure5', p) == 'figure5_folder-cifar10_small_methods-all'


@pytest.mark.parametrize('given, cause', [
    (dict(methods='Botleneck'), "no defence 'Botleneck'"), (dict(methods='all,Bottleneck'), "no defence 'all'"),
    (dict(methods=''), 'methods'), (dict(methods=3), 'methods'), (dict(lam=0.0), 'greater than 0'), (dict(lam='abc'), 'lam'),
    (dict(seed=-1), 'seed'), (dict(seed='0,1'), 'seed'), (dict(attack='decodr'), "no attack 'decodr'"),
    (dict(preset='tiny'), "no preset 'tiny'"), (dict(n_images=0), 'n_images'), (dict(n_jobs=0), 'n_jobs')])
def test_what_cannot_be_asked(given, cause):
    with pytest.raises(ParameterError) as e: read_parameters(given, Figure5Parameters)
    assert cause in str(e.value) and next(iter(given)) in str(e.value) and '\n' not in str(e.value)


def test_what_is_misspelt():
    cell = '# Parameters\nmetods = "all"\n'
    with pytest.raises(ParameterError, match="did you mean 'methods'"): read_parameters(dict(In=[cell], metods='all'), Figure5Parameters)
    assert Figure5Parameters(methods="['Bottleneck', 'Dropout', 'Bottleneck']").methods == ('Bottleneck', 'Dropout')


def test_the_committed_figure_holds_to_the_rule():
    "One image a rule, the same under every row; its errors those that the rule orders; all images together as in Table 1."
    table = read_result(committed_dir()/'figure5_folder-cifar10_small_methods-all.csv')
    assert len(table) == 45 and (table.groupby('rule').image.nunique() == 1).all() and (table.n_images == 10_000).all()
    mean = table.groupby('rule').mse.mean()
    assert mean.lowest < mean['median'] < mean.highest
    one = pd.read_csv(committed_dir()/'table1_folder-cifar10_small.csv').set_index('run')
    by_run = table.drop_duplicates('run').set_index('run')
    assert set(by_run.index) == set(one.index)
    assert np.allclose(by_run.mse_images, one.mse_test_decoder[by_run.index], rtol=0.01)
    assert (by_run.acc_test == one.acc_test[by_run.index]).all()
    change = change_table(table)
    assert (change.iloc[:, :3] > 0).to_numpy().sum() == 18 and change['all images'].between(9.5, 50.5).all()  # as 15_figure5 says
