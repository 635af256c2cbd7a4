"Every notebook runs top to bottom; those of the tables also from other folders and with bad parameters."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import papermill as pm
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TABLES = {p.stem: int(m[1]) for p in NOTEBOOKS if (m := re.search(r'_table([1-8])$', p.stem))}
TABLE1 = ROOT/'nbs'/'04_table1.ipynb'
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the project: the notebooks' last cells export, and must not mend here what another test looks at."
    root = tmp_path_factory.mktemp('project')
    for name in ('nbs', 'cem_nb', 'data/paper', 'figures'): shutil.copytree(ROOT/name, root/name)
    shutil.copy(ROOT/'settings.ini', root)
    return root


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "One run store for the notebooks of the tables, which share their runs."
    return tmp_path_factory.mktemp('store')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "A folder of two classes of 16-pixel images, bright above or bright on the left: a table takes a minute of it."
    root, rng, slope = tmp_path_factory.mktemp('images'), np.random.default_rng(0), np.linspace(0, 120, 16)
    for part, n in (('train', 40), ('test', 12)):
        for c in ('above', 'left'):
            (root/part/c).mkdir(parents=True)
            for i in range(n):
                x = (slope[::-1, None] if c == 'above' else slope[None, ::-1]) + rng.uniform(0, 100, (1, 1))
                Image.fromarray((x + rng.uniform(0, 30, (16, 16))).astype(np.uint8)).save(root/part/c/f'{i}.png')
    return root


def outputs(path):
    "Printed text, and the number of pictures, of an executed notebook."
    found = [o for c in json.loads(Path(path).read_text())['cells'] for o in c.get('outputs', [])]
    return ''.join(''.join(o.get('text', '')) for o in found), sum('image/png' in o.get('data', {}) for o in found)


@pytest.mark.parametrize('name', [p.stem for p in NOTEBOOKS if p.stem not in TABLES])
def test_notebook_runs(name, copy, tmp_path):
    path = copy/'nbs'/f'{name}.ipynb'
    pm.execute_notebook(path, tmp_path/'out.ipynb', cwd=path.parent, progress_bar=False, kernel_name='python3',
                        log_output=False)


@pytest.mark.parametrize('name', TABLES)
def test_table_runs(name, copy, store, images, tmp_path, monkeypatch):
    "With two methods; what a table before has trained, a later one of the same network finds."
    monkeypatch.setenv('CEM_RUNS', str(store))
    path, before = copy/'nbs'/f'{name}.ipynb', len(list(store.glob('*/*/result.json')))
    pm.execute_notebook(path, tmp_path/'out.ipynb', dict(methods='No_defense,Bottleneck', dataset=f'folder:{images}'),
                        cwd=path.parent, progress_bar=False, kernel_name='python3', log_output=False)
    text, pictures = outputs(tmp_path/'out.ipynb')
    table = TABLES[name]
    assert f'saved table{table}_folder-{images.name}_quick' in text and re.search('for [01] of 1 methods', text)
    assert pictures == (2 if table in (1, 2, 3, 8) else 1)
    saved = [p.name for p in (tmp_path/'figures').iterdir()]
    assert len(saved) == pictures + 1 and all(('arch-resnet20' in n) == (table in (2, 6)) for n in saved)
    added = len(list(store.glob('*/*/result.json'))) - before
    computed = len(re.findall(r' {3}\d+ s$', text, re.M))  # rows that end in their seconds, not in 'stored'
    assert added == computed*2 and added in (0, 6)  # two attacks on each of three runs, or all of it stored


def test_every_table_has_a_notebook_that_says_what_it_is_not():
    assert sorted(TABLES.values()) == list(range(1, 9))
    for name in TABLES:
        cells = json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text())['cells']
        opening, sources = ''.join(cells[0]['source']), [''.join(c['source']) for c in cells]
        assert 'By default this is not' in opening and opening.count(f'papermill nbs/{name}.ipynb') == 2
        for call in ('notebook_config(globals())', 'run_table(config)'): assert sum(call in s for s in sources) == 1


def papermill(*args, cwd=ROOT):
    return subprocess.run([Path(sys.executable).with_name('papermill'), '--no-progress-bar', TABLE1, *args], cwd=cwd,
                          capture_output=True, text=True, env=os.environ)


@pytest.mark.parametrize('args, cause', [(('-p', 'lma', '3'), "did you mean 'lam'?"), (('-p', 'lam', 'abc'), "lam is 'abc'"),
                                         (('-p', 'lam', '-1'), 'lam is -1'),
                                         (('-p', 'dataset', 'folder:/nowhere'), 'folder:/nowhere does not exist')])
def test_bad_parameters_stop_before_training(args, cause, tmp_path):
    done = papermill(tmp_path/'out.ipynb', *args)
    assert done.returncode != 0
    assert cause in done.stderr.strip().splitlines()[-1], done.stderr[-500:]
    assert not (tmp_path/'runs').exists()


def test_table_from_outside_the_repository(tmp_path):
    "On the digits, with two seeds and one attack."
    done = papermill('out.ipynb', '-p', 'methods', 'Bottleneck', '-p', 'seeds', '0,1', '-p', 'attacks', 'decoder',
                     cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    text, pictures = outputs(tmp_path/'out.ipynb')
    assert text.count('Bottleneck+CEM') == 2 and 'saved table1_digits_quick' in text
    assert pictures == 2
    assert len(list((tmp_path/'figures').iterdir())) == 3
