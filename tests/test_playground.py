"The playground without a browser: what it can show, what it says, and the trainings beside it."
import base64
import io
import re
import threading
import time
from datetime import datetime

import numpy as np
import pytest
import torch
from PIL import Image

from cem_nb.attack import score_attack
from cem_nb.bench import Victim
from cem_nb.core import seeded
from cem_nb.data import to_float
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import preset
from cem_nb.oracle import Oracle
from cem_nb.posterior import oracle_attack
from cem_nb.playground import Playground, Trainer, numbers_text, still, training
from cem_nb.shelf import Chart, PlaygroundParameters, Shelf, channels, in_two, pixels, png, reach_of
from cem_nb.ssim import ssim_zero
from cem_nb.store import RunError, missing_parts, run, write_then_rename
from cem_nb.training import accuracy

CPU = torch.device('cpu')


def tiny(**settings):
    return preset('quick', (DecoderAttack(n_epochs=1), Oracle()), epochs=2, n_train=150, **settings)


def victim(**settings): return Victim(run(tiny(**settings)))


@pytest.fixture
def shelf(monkeypatch):
    "A shelf whose runs take a second."
    found = Shelf(PlaygroundParameters(lams='0,16', cuts='2'))
    object.__setattr__(found, 'base', found.base.replace(epochs=2, n_train=150))
    from cem_nb.store import data_on
    found.data, found.fingerprint = data_on(found.base.data, CPU)
    found.attacks['decoder'] = DecoderAttack(n_epochs=1, width=32, blocks=2, batch_size=64)
    return found


def decoded(src): return np.asarray(Image.open(io.BytesIO(base64.b64decode(src.removeprefix('data:image/png;base64,')))))


# ---- a victim under another noise ----

def test_a_victim_agrees_with_the_module_and_stays_as_it_is():
    v = victim()
    before = {k: t.clone() for k, t in v.model.state_dict().items()}
    for s in (v.sigma, 0.3):
        model = v.run.model()
        model.noise_std = s
        assert v.accuracy(s) == pytest.approx(100*accuracy(model, v.sample))
        assert v.error(s, 'decoder') == pytest.approx(score_attack(model, v.run.attacker('decoder'), v.attacked)['mse'])
    assert v.model.noise_std == v.sigma == 0.025
    assert all(t.equal(v.model.state_dict()[k]) for k, t in before.items())


def test_a_look_repeats_and_its_scores_are_those_of_its_pictures():
    v = victim()
    x = v.data.test.x[3]
    a, b = v.look(x, 0.1, 'decoder'), v.look(x, 0.1, 'decoder')
    assert a.z.equal(b.z) and a.x_hat.equal(b.x_hat) and a.x.equal(to_float(x))
    error = ((a.x_hat - a.x).double()**2).mean().item()
    assert a.mse == pytest.approx(error) and a.psnr == pytest.approx(-10*np.log10(error))
    assert a.ssim == pytest.approx(ssim_zero(a.x_hat[None], a.x[None]).item())
    assert not v.look(x, 0.2, 'decoder').z.equal(a.z)


def test_the_noise_is_the_same_at_another_strength():
    v = victim()
    x, z_hat = v.data.test.x[0], v.model.encode(to_float(v.data.test.x[:1]))[0]
    one, two = (v.look(x, s, 'decoder').z - z_hat for s in (0.1, 0.2))
    assert torch.allclose(two, 2*one, atol=1e-6)


def test_the_oracle_is_told_the_noise():
    v = victim()
    x, oracle = v.data.test.x[0], v.attacker('oracle')
    look = v.look(x, 0.3, 'oracle')
    assert torch.allclose(look.x_hat, oracle_attack(look.z[None], oracle.z_hat, oracle.x, 0.3)[0])
    assert oracle.noise_std == v.sigma


def test_the_random_numbers_of_others_are_left_alone():
    v = victim()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    v.look(v.data.test.x[0], 0.1, 'decoder'), v.accuracy(0.1), v.error(0.1, 'decoder')
    assert torch.rand(3).equal(expected)


@pytest.mark.parametrize('bad', [-0.1, float('nan'), 'loud'])
def test_a_noise_that_is_none(bad):
    v = victim()
    with pytest.raises((ValueError, TypeError)): v.accuracy(bad)
    assert v.model.noise_std == v.sigma


# ---- pictures ----

def test_a_png_shows_every_pixel_as_a_square():
    x = torch.arange(16).reshape(1, 4, 4)/15
    shown = decoded(png(pixels(x), 40))
    assert shown.shape == (40, 40) and (shown[5::10, 5::10] == (255*x[0]).round().numpy()).all()
    assert decoded(png(pixels(torch.rand(3, 4, 4)), 8)).shape == (8, 8, 3)
    assert (decoded(png(np.array([[np.nan, -1.0, 2.0]]), 3)) == [[255, 0, 255]]).all()


@pytest.mark.parametrize('c', [1, 4, 5, 8])
def test_all_channels_are_shown_apart(c):
    z = torch.rand(c, 3, 3)*0.9
    grid = channels(z)
    assert grid.shape == (5*-(-c//4), 20)
    for i in range(c):
        top, left = 5*(i//4) + 1, 5*(i % 4) + 1
        assert np.allclose(grid[top:top + 3, left:left + 3], z[i])


def test_marks_stand_where_the_points_are():
    chart = Chart(lambda ax: ax.set(xlim=(0, 10), ylim=(1e-3, 1e-1), yscale='log'), 'empty')
    corners = np.array([chart.place(x, y) for x, y in ((0, 1e-3), (10, 1e-1))])
    assert np.allclose(chart.place(5, 1e-2), corners.mean(0))
    number = lambda text, name: float(re.search(rf'{name}:([-\d.]+)%', text)[1])
    beyond = chart.mark(20, 1e-2, 'now')
    assert number(beyond, 'left') == pytest.approx(corners[1, 0], abs=0.01) and 'beyond the edge' in beyond and 'data-x="20"' in beyond
    assert 'beyond' not in chart.mark(5, 1e-2, 'now')
    line = chart.line(5)
    assert number(line, 'left') == pytest.approx(corners[:, 0].mean(), abs=0.01)
    assert number(line, 'top') + number(line, 'height') == pytest.approx(corners[0, 1], abs=0.02)


@pytest.mark.parametrize('aspect', ['auto', 'equal'])
@pytest.mark.parametrize('x, y', [(-0.7, 0.4), (0.0, 0.0), (0.9, -0.9)])
def test_a_mark_is_over_its_point_in_the_picture(x, y, aspect):
    def draw(ax):
        ax.plot(x, y, 's', color='red', ms=4)
        ax.set(xlim=(-1, 1), ylim=(-1, 1), aspect=aspect, xlabel='a long label', title='a title')
    chart = Chart(draw, 'a point', 3.6)
    picture = decoded(chart.src)[..., :3].astype(int)
    rows, columns = np.nonzero((picture[..., 0] > 200) & (picture[..., 1:].max(2) < 60))
    at = 100*np.array([(columns.mean() + 0.5)/picture.shape[1], (rows.mean() + 0.5)/picture.shape[0]])
    assert len(rows) > 10 and np.allclose(chart.place(x, y), at, atol=0.3)


def test_the_mixture_in_two_dimensions_keeps_the_first_two_moments():
    floors = victim().floors
    w, mu, s = floors.mixture
    w2, mu2, s2 = in_two(floors)
    P = torch.linalg.eigh(floors.gaussian[2][0]).eigenvectors[:, [-1, -2]]
    for k in (0, 5): assert torch.allclose(s2[k], P.T @ s[k].diag() @ P)
    assert torch.allclose((mu2 - (w2 @ mu2)) @ torch.eye(2).double(), (mu - w @ mu) @ P)
    reach = reach_of(floors)
    angles = torch.linspace(0, 6.3, 100).double()
    for m, c in zip(mu2, s2):
        edge = m + 2*torch.stack([angles.cos(), angles.sin()], 1) @ torch.linalg.cholesky(c).T
        assert edge.norm(dim=1).max() <= reach + 1e-6


# ---- the page ----

def test_every_combination_is_an_experiment_or_says_why_not(shelf):
    play = Playground(shelf)
    play.defense.value = 'No_defense'
    play.lam.value = 16.0
    assert 'no row with CEM' in play.said.value and not play.numbers.value
    play.lam.value = 0.0
    assert 'not trained yet' in play.said.value and not play.train.disabled


def test_prepared_moved_and_wrong(shelf):
    play = Playground(shelf)
    play.prepare()
    assert 'all that was asked for is trained' in play.trainer.said.value and not any(map(shelf.missing, shelf.at_first()))
    e = play.experiment()
    v = play.victim(e)

    def agrees():
        look = play.look(v, e.attacks[0].name)
        told = numbers_text(e, v, look, play.noise.value, v.accuracy(play.noise.value), v.error(play.noise.value, 'decoder'))
        assert told in play.numbers.value
    agrees()
    first = play.numbers.value
    play.noise.value = 0.2
    assert play.numbers.value != first
    agrees()
    play.image.value = 7
    agrees()
    file = io.BytesIO()
    Image.fromarray(np.eye(20, dtype=np.uint8)*255).save(file, 'PNG')
    send = lambda name, data: play.upload.set_trait('value', (
        dict(name=name, type='', size=len(data), content=memoryview(data), last_modified=datetime.now()),))
    shown = play.pictures.value
    send('<b>.png', b'no picture')
    assert '&lt;b&gt;.png: the picture' in play.said.value and play.pictures.value == shown
    send('mine.png', file.getvalue())
    assert 'your own picture' in play.said.value and play.pictures.value != shown
    agrees()
    play.image.value = 8
    assert play.own is None and 'test image 8' in play.said.value
    assert len(still(play).axes) >= 6


def test_a_still_needs_its_run(shelf):
    with pytest.raises(RunError, match='prepare'): still(Playground(shelf))


def test_a_training_can_be_stopped_and_goes_on(shelf):
    e = shelf.base.replace(epochs=400, attacks=(), cem=False)
    trainer = Trainer(1)
    for _ in training(trainer, [e]):
        if 0 < trainer.bar.value < 1: trainer.stop()
        time.sleep(0.05)
    assert 'stopped' in trainer.said.value and not trainer.busy and missing_parts(e, shelf.fingerprint)
    for _ in training(trainer, [e]): time.sleep(0.05)
    assert not missing_parts(e, shelf.fingerprint) and trainer.bar.value == 1
    assert run(e).result['resumed']


def test_a_run_of_another_process_is_waited_for(shelf):
    from cem_nb.store import run_path
    e = shelf.base.replace(attacks=(), cem=False)
    trainer, other = Trainer(1), write_then_rename(run_path(e, shelf.fingerprint))
    other.__enter__()
    waited = 0
    for _ in training(trainer, [e]):
        if 'another process' in trainer.said.value and not waited:
            waited = 1
            other.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)  # it gave up
        time.sleep(0.05)
    assert waited and not missing_parts(e, shelf.fingerprint)


def test_nothing_missing_is_no_training(shelf):
    e = shelf.base.replace(attacks=(), cem=False)
    run(e)
    assert list(training(trainer := Trainer(1), [e])) == [] and trainer.pool is None


def test_a_failure_of_any_kind_is_said_and_the_page_lives(shelf, monkeypatch):
    "A worker that raises what nobody expected, for two runs: said once each, and the button is there again."
    import cem_nb.playground
    monkeypatch.setattr(cem_nb.playground, 'run', failing)
    play = Playground(shelf)
    play.start()
    deadline = time.monotonic() + 60
    while play.trainer.busy or 'odd' not in play.trainer.said.value:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert 'Bottleneck: odd' in play.trainer.said.value and play.trainer.bar.value < 1
    while play.train.disabled: time.sleep(0.05)


def failing(e, device): raise ZeroDivisionError('odd')


def test_one_training_at_a_time(shelf):
    e = shelf.base.replace(attacks=(), cem=False)
    trainer = Trainer(1)
    first = training(trainer, [e])
    next(first)
    assert list(training(trainer, [e])) == [] and 'under way' in trainer.said.value
    for _ in first: time.sleep(0.05)
    assert not trainer.busy and not missing_parts(e, shelf.fingerprint)


def test_two_threads_see_their_own_noise():
    v, wrong = victim(), []
    right = {s: (v.accuracy(s), v.error(s, 'decoder')) for s in (0.025, 0.5)}

    def look_at(s): wrong.extend(s for _ in range(5) if (v.accuracy(s), v.error(s, 'decoder')) != right[s])
    threads = [threading.Thread(target=look_at, args=(s,)) for s in right]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong


def test_a_diverged_attack_is_said(monkeypatch):
    v = victim()
    monkeypatch.setattr(type(v.run), 'attack', lambda self, name: dict(finished=False))
    with pytest.raises(RunError, match='diverged'): v.attacker('decoder')
