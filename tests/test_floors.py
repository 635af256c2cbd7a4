"Floors of a trained encoder against closed forms of linear encoders; what is kept beside a run; and the fits."
import math
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import torch as safetensors
from scipy import stats
from torch import nn

import cem_nb.floors as module
from cem_nb.cem import CEM
from cem_nb.data import Split, to_float
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import Experiment
from cem_nb.files import read_stamped, stamped
from cem_nb.floors import (FLOORS, KEPT, Floors, entropy_of, fit_exponential, fit_floors, fit_table, floor_of, floors_from, floors_of,
                           plot_errors, plot_floors, with_floors)
from cem_nb.mixture import GaussianMixture
from cem_nb.models import SplitModel
from cem_nb.store import RunError, open_run, run
from cem_nb.style import COLORS

matplotlib.use('Agg')
NOISES = 0.05, 0.1, 0.3, 1.0
TINY = Experiment(attacks=(DecoderAttack(width=8, blocks=0, n_epochs=1, batch_size=64),)).replace(
    n_train=256, width=0.125, epochs=2, batch_size=64, lr=0.02)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


def gaussian_images(n=600, side=4, seed=0):
    "Bytes: independent normal pixels, each with a mean and a width of its own."
    rng = np.random.default_rng(seed)
    mean, std = rng.uniform(100, 150, (1, side, side)), rng.uniform(8, 25, (1, side, side))
    x = rng.normal(mean, std, (n, 1, side, side)).round().clip(0, 255).astype(np.uint8)
    return Split(torch.from_numpy(x), torch.arange(n) % 2)


def linear_model(side=4, seed=0):
    "A convolution with stride 2, without anything that is not linear."
    torch.manual_seed(seed)
    return SplitModel(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Identity(), 0.1).eval()


def jacobian(model, x):
    "Dense, [features, pixels], column by column."
    with torch.no_grad():
        zero = model.encode(torch.zeros_like(x))
        columns = [model.encode(e.reshape(x.shape)) - zero for e in torch.eye(x.numel())]
    return torch.cat([c.flatten()[:, None] for c in columns], 1).double().numpy()


@pytest.fixture(scope='module')
def linear():
    images, model = gaussian_images(), linear_model()
    return images, model, fit_floors(model, images, 2)


def test_one_gaussian_is_the_channel_of_a_linear_encoder(linear):
    "I = log det(I + S/s^2)/2 of the features' covariance, and the floor is Theorem 1's of what is left of H(x)."
    images, model, floors = linear
    x = to_float(images.x)
    with torch.no_grad(): z = model.encode(x).flatten(1).double().numpy()
    S, J = np.cov(z.T, bias=True), jacobian(model, x[:1])
    assert np.allclose(S, J @ np.cov(x.flatten(1).double().numpy().T, bias=True) @ J.T, atol=1e-6)
    variances = x.flatten(1).double().numpy().var(0, ddof=1)
    for s in NOISES:
        nats = np.linalg.slogdet(np.eye(len(S)) + S/s**2)[1]/2
        assert math.isclose(floors.nats('full', s), nats, rel_tol=2e-3)
        h = 0.5*np.log(2*np.pi*np.e*variances).sum() - nats
        assert math.isclose(floors.entropy('full', s), h, abs_tol=2e-3*nats)
        assert math.isclose(floors.mse('full', s), math.exp(2*h/16)/(2*math.pi*math.e), rel_tol=2e-3)


def test_van_trees_floor_of_a_constant_jacobian(linear):
    images, model, floors = linear
    x = to_float(images.x)
    info = np.square(jacobian(model, x[:1])).sum(0)
    assert floors.information.shape == (8, 1, 4, 4)
    assert torch.allclose(floors.information.flatten(1), torch.tensor(info).expand(8, -1), rtol=1e-5)
    variances = x.flatten(1).double().numpy().var(0, ddof=1)
    for s in NOISES: assert math.isclose(floors.mse('fisher', s), np.mean(1/(info/s**2 + 1/variances)), rel_tol=1e-5)


def test_floors_stay_below_a_linear_attacker(linear):
    "The best linear estimate of x from z, of fresh images of the same law."
    images, model, floors = linear
    x = to_float(images.x).flatten(1).double().numpy()
    J, V = jacobian(model, to_float(images.x[:1])), np.diag(x.var(0, ddof=1))
    for s in NOISES:
        best = np.trace(V - V @ J.T @ np.linalg.inv(J @ V @ J.T + s**2*np.eye(len(J))) @ J @ V)/len(V)
        table = floors.table([s]).loc[s]
        assert (table[['huber', 'pairwise', 'full', 'fisher']] <= best*1.01).all()


def test_order_and_direction(linear):
    table = linear[2].table(NOISES)
    assert list(table) == [*FLOORS] and table.index.name == 'noise_std' and list(table.index) == [*NOISES]
    assert (table.huber <= table.pairwise*(1 + 1e-6)).all() and (table.pairwise <= table.mc*1.01).all()
    assert (table.diff().dropna() > 0).all(axis=None) and (table > 0).all(axis=None)
    variance = linear[2].prior.var.mean().item()
    late = linear[2].table([1e3]).iloc[0]
    assert math.isclose(late.fisher, variance, rel_tol=1e-4)
    assert math.isclose(late.full, linear[2].prior.var.log().mean().exp().item(), rel_tol=1e-4)
    assert linear[2].d == 16 and list(linear[2].table([0.1], ['mc', 'full'])) == ['mc', 'full']


def test_a_table_of_any_iterable(linear):
    assert linear[2].table(iter([0.1, 0.2]), iter(['full', 'fisher'])).equals(linear[2].table([0.1, 0.2], ['full', 'fisher']))


def test_one_component_leaves_nothing_to_bound(linear):
    "Huber's bound and the pairwise one are then the entropy of the Gaussian itself."
    images, model, floors = linear
    with torch.no_grad(): z = model.encode(to_float(images.x)).flatten(1)
    one = GaussianMixture(1).fit(z).params()
    single = Floors(floors.prior, one, floors.gaussian, floors.information)
    var = z.double().numpy().var(0)
    for s in NOISES:
        nats = 0.5*np.log1p(var/s**2).sum()
        for name in ('huber', 'pairwise'): assert math.isclose(single.nats(name, s), nats, rel_tol=2e-3)
        assert math.isclose(single.nats('mc', s), nats, rel_tol=0.02)
        assert floors.nats('full', s) <= single.nats('huber', s)  # correlated features tell less


def test_the_components_are_cems(linear):
    "As many a class, fitted to all images; the estimate repeats."
    images, model, floors = linear
    assert len(floors.mixture[0]) == 2*CEM.per_class and len(fit_floors(model, images, 3).mixture[0]) == 3*CEM.per_class
    again = fit_floors(model, images, 2)
    for name, t in floors.tensors().items(): assert torch.equal(t, again.tensors()[name]), name
    assert floors.nats('mc', 0.1) == floors.nats('mc', 0.1)
    assert fit_floors(model, images, 2, n_jacobians=5).information.shape[0] == 5


def test_what_cannot_be_fitted(linear):
    images, model, floors = linear
    few = Split(images.x[:1], images.y[:1])
    with pytest.raises(ValueError): fit_floors(model, few, 2)
    for bad in (dict(n_classes=0), dict(n_classes=2, n_jacobians=1)):
        with pytest.raises(ValueError): fit_floors(model, images, **bad)
    for name in FLOORS:
        if name != 'fisher':
            with pytest.raises(ValueError, match='noise_std'): floors.mse(name, 0.0)
    with pytest.raises(ValueError): floors.nats('nonsense', 0.1)


def test_a_model_in_training_is_left_as_it_was():
    model = SplitModel(nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3)), nn.Identity(), 0.1).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit_floors(model, gaussian_images(200), 1)
    assert all(layer.training for layer in model.modules()) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tensors_there_and_back(linear):
    tensors = linear[2].tensors()
    assert floors_from(tensors).table([0.1]).equals(linear[2].table([0.1]))
    for name in tensors:
        with pytest.raises(KeyError, match=name): floors_from({k: v for k, v in tensors.items() if k != name})


# beside a run

def never(*a, **k): raise AssertionError('fitted again')


@pytest.fixture
def one(): return run(TINY)


def kept(r): return r.path/KEPT.format(r.weights[:12])


def test_floors_of_other_weights_are_not_taken(one):
    other = run(TINY.replace(seed=1))
    want = floors_of(one).table(NOISES)
    (other.path/kept(one).name).write_bytes(kept(one).read_bytes())
    assert not floors_of(other).table(NOISES).equals(want)


def test_floors_are_fitted_once_and_kept_beside_the_run(one, monkeypatch, recwarn):
    first = floors_of(one)
    assert kept(one).is_file() and not [*one.path.glob('*.part')]
    monkeypatch.setattr(module, 'fit_floors', never)
    assert floors_of(open_run(one.path.name)).table(NOISES).equals(first.table(NOISES)) and not recwarn.list
    assert open_run(one.path.name).attack('decoder')['finished']  # what lies there is no attack


@pytest.mark.parametrize('damage', ['cut', 'text', 'empty', 'a tensor less', 'a bit'])
def test_a_damaged_file_is_fitted_again(one, damage):
    first, path = floors_of(one).table(NOISES), kept(one)
    tensors, whole = safetensors.load(read_stamped(path)), path.read_bytes()
    less = stamped(safetensors.save({k: v for k, v in tensors.items() if k != 'information'}))
    path.write_bytes({'cut': whole[:-100], 'text': b'no tensors at all', 'empty': b'', 'a tensor less': less,
                      'a bit': whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]}[damage])
    with pytest.warns(UserWarning, match='fitted again'): assert floors_of(one).table(NOISES).equals(first)
    assert floors_from(safetensors.load(read_stamped(path))).table(NOISES).equals(first)


def test_a_full_disk_is_a_warning(one, monkeypatch):
    def full(path, write):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(module, 'write_whole', full)
    with pytest.warns(UserWarning, match='could not be written'): floors = floors_of(one)
    assert len(floors.table([0.1])) == 1 and not [*one.path.glob('*.part')] and not kept(one).exists()


def test_something_in_the_way_is_a_warning(one):
    kept(one).mkdir()
    with pytest.warns(UserWarning, match='could not be written'): floors_of(one)
    assert not [*one.path.glob('*.part')]


def frame_of(*rows): return pd.DataFrame([dict(defense=d, params='{}', noise_std=s, run=r, acc_test=a) for d, s, r, a in rows])


def test_every_run_has_its_floors_at_its_own_noise(linear, monkeypatch):
    monkeypatch.setattr(module, 'floors_of', lambda r: linear[2])
    frame = frame_of(('Bottleneck', 0.1, 'a', 90), ('Noise_ARL', 0.1, 'b', 80)).set_index(pd.Index([5, 2]))
    found = with_floors(frame, lambda name: SimpleNamespace(name=name))
    assert found.sigma.to_dict() == {5: 0.1, 2: 0.4} and frame.columns.tolist() == found.columns.tolist()[:5]
    for i, s in found.sigma.items():
        for name in FLOORS: assert math.isclose(found.loc[i, f'floor_{name}'], linear[2].mse(name, s), rel_tol=1e-12)


def test_a_run_that_diverged_has_none(linear, monkeypatch):
    monkeypatch.setattr(module, 'floors_of', lambda r: linear[2])
    lost, kept = ('Bottleneck', 0.1, math.nan, math.nan), ('Bottleneck', 0.2, 'a', 90)
    found = with_floors(frame_of(lost, kept), str)
    floors = [f'floor_{n}' for n in FLOORS]
    assert found.sigma.notna().all() and found[floors].isna().all(axis=1).tolist() == [True, False]
    for frame in (frame_of(lost, lost), frame_of(lost).drop(columns='run')):
        assert with_floors(frame, str)[floors].isna().all(axis=None)


def test_a_run_that_diverged_after_one_that_did_not(linear, monkeypatch):
    monkeypatch.setattr(module, 'floors_of', lambda r: linear[2])
    found = with_floors(frame_of(('Bottleneck', 0.2, 'a', 90), ('Bottleneck', 0.1, math.nan, math.nan)), str)
    assert found[[f'floor_{n}' for n in FLOORS]].isna().all(axis=1).tolist() == [False, True]


def test_a_run_that_is_gone(places):
    with pytest.raises(RunError, match='no run'): with_floors(frame_of(('Bottleneck', 0.1, 'nowhere', 90)), open_run)


# fits

def test_a_fit_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    x = np.exp(rng.normal(-5, 1, 12))
    y = 0.3*x**0.7*np.exp(rng.normal(0, 0.2, 12))
    fit = fit_exponential(x, y)
    (b, a), cov = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert np.allclose([fit.a, fit.b], [a, b]) and math.isclose(fit.b_half, stats.t.ppf(0.975, 10)*math.sqrt(cov[0, 0]))
    r = stats.pearsonr(np.log(x), np.log(y))
    assert math.isclose(fit.r, r.statistic) and np.allclose([fit.r_low, fit.r_high], r.confidence_interval(0.95)) and fit.n == 12
    assert np.allclose(fit.mse(x), np.exp(np.polyval([b, a], np.log(x))))
    assert fit_exponential(pd.Series(x, index=range(5, 17)), list(y)) == fit


def test_intervals_cover_the_truth():
    rng, inside = np.random.default_rng(1), []
    rho = 0.8
    for _ in range(1500):
        u, v = rng.normal(size=(2, 15))
        x, y = u, rho*u + math.sqrt(1 - rho**2)*v
        fit = fit_exponential(np.exp(x), np.exp(y))
        inside.append((abs(fit.b - rho) <= fit.b_half, fit.r_low <= rho <= fit.r_high))
    assert np.allclose(np.mean(inside, 0), 0.95, atol=0.02)


def test_few_points_and_exact_ones():
    two, three = fit_exponential([1, 2], [1, 4]), fit_exponential([1, 2, 4], [1, 3, 4])
    assert math.isclose(two.b, 2) and math.isnan(two.b_half) and math.isnan(two.r_low)
    assert math.isfinite(three.b_half) and math.isnan(three.r_low) and math.isnan(three.r_high)
    exact = fit_exponential([1, 2, 4, 8], [3, 6, 12, 24])
    assert np.allclose([exact.b, exact.b_half, exact.r_low, exact.r_high], [1, 0, 1, 1], atol=1e-6)


@pytest.mark.parametrize('floor, mse', [([1, 2], [1]), ([1, 1], [1, 2]), ([0, 1], [1, 2]), ([1, 2], [-1, 2]), ([1, math.nan], [1, 2]),
                                        ([], []), ([1], [1]), ([1, 2], [1, math.inf])])
def test_what_has_no_fit(floor, mse):
    with pytest.raises(ValueError): fit_exponential(floor, mse)


# pictures

def test_entropy_and_floor_are_inverse():
    h = np.linspace(-4, 1, 7)
    assert np.allclose(entropy_of(floor_of(h)), h) and math.isclose(floor_of(0.0), 1/(2*math.pi*math.e))


def runs_on(curves=('with CEM', 'without CEM'), slope=0.5, n=5, seed=0):
    rng = np.random.default_rng(seed)
    floors = lambda e: {f'floor_{f}': (k + 1)*e for k, f in enumerate(FLOORS)}
    return pd.DataFrame([dict(curve=c, seed=0, sigma=10*e, mse_test_decoder=0.2*e**slope*math.exp(rng.normal(0, 0.1)), **floors(e))
                         for c in curves for e in np.geomspace(1e-3, 1e-2, n)])


def test_errors_over_the_floors():
    frame = runs_on()
    lost = pd.concat([frame, frame[:1].assign(mse_test_decoder=math.nan, **{f'floor_{f}': math.nan for f in FLOORS})])
    fig, fits = plot_errors(lost)
    for ax, (name, label) in zip(fig.axes, FLOORS.items()):
        lines, floor = {line.get_label(): line for line in ax.lines}, f'floor_{name}'
        for curve in ('with CEM', 'without CEM'):
            of = frame[frame.curve == curve]
            assert np.allclose(floor_of(lines[curve].get_xdata()), of[floor]) and np.allclose(lines[curve].get_ydata(), of.mse_test_decoder)
            assert lines[curve].get_color() == COLORS[curve] and lines[curve].get_linestyle() == 'None'
        of = frame[frame.curve == 'with CEM']
        assert np.allclose(fits[name], fit_exponential(of[floor], of.mse_test_decoder))
        h, error = lines['fitted'].get_data()
        assert np.allclose(error, fits[name].mse(floor_of(h))) and np.allclose(floor_of(h), [of[floor].min(), of[floor].max()])
        h, error = lines['slope of Theorem 1'].get_data()
        middle = np.exp(np.log(of[floor]).mean())
        assert np.allclose(error/floor_of(h), fits[name].mse(middle)/middle)
        h, error = lines['error = floor'].get_data()
        assert np.allclose(error, floor_of(h))
        assert ax.get_title().startswith(f'{label}:\n{fits[name].b:.2f} ± ') and ax.get_yscale() == 'log'
        fig.canvas.draw()
        top = ax.child_axes[0]
        assert np.allclose(top.get_xlim(), floor_of(np.array(ax.get_xlim())))
    words = [t.get_text() for t in fig.axes[5].get_legend().get_texts()]
    assert set(words) == {'with CEM', 'without CEM', 'fitted', 'slope of Theorem 1', 'error = floor'}
    table, of = fit_table(lost), frame[frame.curve == 'with CEM']
    assert list(table.index) == [*FLOORS.values(), 'no floor: the noise σ']
    assert table.loc['pairwise', 'errors under the floor'] == f'{(of.mse_test_decoder < of.floor_pairwise).sum()} of 5'
    assert table.iloc[-1]['correlation of the logs'] == f'{np.corrcoef(np.log(of.sigma), np.log(of.mse_test_decoder))[0, 1]:.3f}'
    assert table.loc['Eq. 3', 'times the slope of Theorem 1'] == f'{fits["huber"].b:.2f} ± {fits["huber"].b_half:.2f}'
    assert (table['seeds averaged'] == 1).all()


def test_seeds_of_one_noise_are_one_point():
    "So runs that say the same twice make no interval narrower."
    one = runs_on()
    two = pd.concat([one, one.assign(seed=1)])
    assert np.allclose(plot_errors(one)[1]['huber'], plot_errors(two)[1]['huber'])
    apart = pd.concat([one.assign(mse_test_decoder=one.mse_test_decoder/2), one.assign(seed=1, mse_test_decoder=2*one.mse_test_decoder)])
    assert np.allclose(plot_errors(one)[1]['huber'], plot_errors(apart)[1]['huber'])
    plt.close('all')


def test_errors_with_cem_alone(): assert plot_errors(runs_on(['with CEM']))[1]['mc'].n == 5


def test_floors_that_lie_close_together():
    frame = pd.DataFrame([dict(curve='with CEM', seed=0, sigma=1.0 + i, mse_test_decoder=0.01*(1 + i), **{f'floor_{f}': e for f in FLOORS})
                          for i, e in enumerate((0.0025, 0.003, 0.004))])
    assert plot_errors(frame)[1]['huber'].n == 3


def test_floors_over_the_noise(linear):
    ax, table = plt.figure().add_subplot(), linear[2].table(NOISES)
    plot_floors(ax, table)
    assert [line.get_label() for line in ax.lines] == [*FLOORS.values()] and len({str(line.get_linestyle()) for line in ax.lines}) >= 4
    for line, name in zip(ax.lines, table): assert np.allclose(line.get_xydata(), np.column_stack([NOISES, table[name]]))
    assert (ax.get_xscale(), ax.get_yscale()) == ('log', 'log')
