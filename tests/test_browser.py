"""The playground in a real browser: JupyterLab and Voilà, keyboard and mouse, one reader and two.

Set CEM_SCREENSHOT to a file to have the picture that README shows."""
import io
import json
import math
import os
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from browser import chromium, jupyterlab, open_lab, open_voila, reader, run_all, voila

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
SETTINGS = dict(lams='0,16', cuts='2')


def notebook(path, **parameters):
    "A copy of the playground with other parameters."
    nb = json.loads((ROOT/'nbs'/'16_playground.ipynb').read_text())
    for cell in nb['cells']:
        if cell['cell_type'] == 'code': cell['outputs'] = []
        if 'parameters' in cell['metadata'].get('tags', []): cell['source'] += [f'\n{k} = {v!r}' for k, v in parameters.items()]
    path.write_text(json.dumps(nb))


def places(tmp_path_factory):
    return {f'CEM_{name.upper()}': str(tmp_path_factory.mktemp(name)) for name in ('runs', 'data', 'results')} | {'OMP_NUM_THREADS': '1'}


@pytest.fixture(scope='module')
def store(tmp_path_factory): return places(tmp_path_factory)


@pytest.fixture(scope='module')
def empty_store(tmp_path_factory): return places(tmp_path_factory)


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp('pages')
    (root/'nbs').mkdir()
    notebook(root/'nbs'/'16_playground.ipynb', **SETTINGS)
    return root


@pytest.fixture(scope='module')
def lab(chromium, pages, store):
    with jupyterlab(pages, env=store) as server: yield server


@pytest.fixture(scope='module')
def dashboards(chromium, pages, empty_store):
    with voila(pages, '--progressive_rendering=True', env=empty_store) as server: yield server


@pytest.fixture
def expected(request, monkeypatch):
    "What the module says for settings of the knobs, from the store of the test's server."
    for k, v in request.getfixturevalue('empty_store' if 'voila' in request.node.name else 'store').items(): monkeypatch.setenv(k, v)
    from cem_nb.playground import Shown, numbers_text, pictures_html
    from cem_nb.shelf import PlaygroundParameters, Shelf
    shelf = Shelf(PlaygroundParameters(**SETTINGS))
    shown = Shown(shelf)

    def page(noise_std, lam=0.0, defense='Bottleneck', attack='decoder', image=0, picture=None):
        e = shelf.experiment(defense, lam, 2, attack)
        victim = shown.victim(e)
        look = victim.look(victim.data.test.x[image] if picture is None else picture, noise_std, attack)
        accuracy, error = victim.accuracy(noise_std), victim.error(noise_std, attack)
        return numbers_text(e, victim, look, noise_std, accuracy, error), pictures_html(look, attack), (accuracy, error)
    return page


def numbers(r): return r.text('.cem-numbers')


def noise(r):
    "The step of the slider that the floors' line stands at."
    told, start = float(r.page.locator('.cem-line').get_attribute('data-x')), math.log10(0.025)
    return 10**(start + round((math.log10(told) - start)/0.02)*0.02)


def ring(r):
    "Accuracy and error that the ring in the plane stands at, and where it is on the screen."
    mark = r.page.locator('.cem-plane .cem-mark')
    box = mark.bounding_box()
    return (float(mark.get_attribute('data-x')), float(mark.get_attribute('data-y'))), (box['x'], box['y'])


def agrees(r, expected, **settings):
    "The page shows the module's numbers, pictures and point for these settings."
    s = settings.pop('noise_std', None) or noise(r)
    text, pictures, point = expected(s, **settings)
    assert numbers(r) == text
    for name in ('the image on the device', f'what the {settings.get("attack", "decoder")} makes of it'): assert r.picture(name) in pictures
    assert np.allclose(ring(r)[0], point, rtol=1e-5)
    return True


def moves(r, expected):
    "Knobs by keyboard and by mouse; something is seen to change each time, and it is right."
    first, place, rebuilt = numbers(r), ring(r)[1], r.picture('what the decoder makes of it')
    agrees(r, expected, noise_std=0.025)
    r.press('noise σ', *['PageUp']*2)
    assert noise(r) > 0.03 and numbers(r) != first and ring(r)[1] != place and r.picture('what the decoder makes of it') != rebuilt
    agrees(r, expected)
    r.drag('noise σ', 0.9)
    assert noise(r) > 0.3 and agrees(r, expected)
    r.press('noise σ', 'Home')
    assert noise(r) < 0.001 and agrees(r, expected)
    place = ring(r)[1]
    r.press('λ', 'ArrowRight')
    assert r.reading('λ') == '16' and ring(r)[1] != place and agrees(r, expected, lam=16.0)
    r.click_track('λ', 0.0)
    assert r.reading('λ') == '0' and agrees(r, expected)
    r.press('test image', 'ArrowRight')
    assert agrees(r, expected, image=1)
    r.choose('attack', 'oracle')
    assert agrees(r, expected, image=1, attack='oracle')
    r.choose('attack', 'decoder')
    assert not r.errors, r.errors


def file_of(array, form='PNG', **how):
    file = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(file, form, **how)
    return file.getvalue()


def test_jupyterlab(chromium, lab, expected):
    "All cells run, on a fresh store; then a reader turns the knobs, and brings pictures, good and bad."
    with reader(chromium) as r:
        run_all(open_lab(r, lab, 'nbs/16_playground.ipynb'), seconds=600)
        assert 'all that was asked for is trained' in r.page.content()
        moves(r, expected)
        for handle in ('noise σ', 'λ', 'test image'): assert r.page.get_by_role('slider', name=handle).count() == 1
        assert r.page.get_by_role('slider', name='noise σ').get_attribute('aria-valuetext') == r.reading('noise σ')
        rng = np.random.default_rng(0)
        mine = rng.integers(0, 256, (40, 60), dtype=np.uint8)
        r.upload('your own picture', 'mine.png', file_of(mine))
        from cem_nb.images import decode_picture
        assert agrees(r, expected, picture=decode_picture(file_of(mine), 1, 16)) and 'your own picture' in r.text('.cem-said')
        kept = numbers(r)
        bad = {'notes.png': b'no picture', 'deep.png': file_of(rng.integers(0, 2**16, (8, 8), dtype=np.uint16)),
               'print.jpg': file_of(Image.new('CMYK', (8, 8)), 'JPEG'), 'huge.png': file_of(Image.new('1', (9000, 9000)))}
        for name, data in bad.items():
            r.upload('your own picture', name, data)
            assert r.text('.cem-said').startswith(f'{name}: the picture') and numbers(r) == kept
        assert not r.errors and not r.outside


def test_a_missing_run_is_trained_on_request_and_can_be_stopped(chromium, lab, expected):
    with reader(chromium) as r:
        run_all(open_lab(r, lab, 'nbs/16_playground.ipynb'), seconds=600)
        r.choose('defence', 'Dropout')
        assert 'not trained yet' in r.text('.cem-said') and r.page.locator('.cem-numbers').count() == 0
        r.click('train this run')
        r.until(lambda: re.search(r'1 runs, [1-9]', r.page.content()), 'the bar', 120)
        r.click('stop')
        r.until(lambda: 'stopped: what is finished is kept' in r.page.content(), 'the stop')
        r.click('train this run')
        r.until(lambda: r.page.locator('.cem-numbers').count(), 'the training', 300)
        assert agrees(r, expected, noise_std=0.025, defense='Dropout') and not r.errors


def test_voila_and_two_readers_at_once(chromium, dashboards, expected):
    "Both open the page where nothing is trained yet: one trains, can be stopped and goes on, and the other waits."
    with reader(chromium) as one, reader(chromium) as two:
        for r in (one, two): open_voila(r, dashboards, 'nbs/16_playground.ipynb', seconds=300)
        one.click('stop')
        one.until(lambda: 'stopped: what is finished is kept' in one.page.content(), 'the stop')
        if one.page.get_by_role('button', name='train this run').is_enabled(): one.click('train this run')
        for r in (one, two):
            r.until(lambda: r.page.locator('.cem-numbers').count(), 'the training', 400)
        two.until(lambda: 'all that was asked for is trained' in two.page.content(), 'all trainings', 400)
        for r in (one, two): r.drawn()
        assert not one.page.locator('.jp-InputArea-editor').count()
        two.press('λ', 'End')
        moves(one, expected)
        assert agrees(two, expected, noise_std=0.025, lam=16.0) and not two.errors
        if path := os.environ.get('CEM_SCREENSHOT'):
            one.page.set_viewport_size(dict(width=1660, height=1000))
            one.press('λ', 'End')
            one.drag('noise σ', 0.3)
            one.page.locator('.cem-playground').first.screenshot(path=path)


def test_nothing_is_served_without_the_token(lab, dashboards):
    for server, path in ((lab, '/lab'), (dashboards, '/voila/render/nbs/16_playground.ipynb')):
        with urllib.request.urlopen(server.url + path) as answer: assert '/login' in answer.url
        with urllib.request.urlopen(server.at('/lab' if server is lab else '/')) as answer: assert '/login' not in answer.url
