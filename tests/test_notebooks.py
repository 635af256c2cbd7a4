"Every notebook runs top to bottom; those of the tables also on images, from other folders and with bad parameters."
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
NOTEBOOKS = sorted(p.relative_to(ROOT) for p in (ROOT/'nbs').rglob('*.ipynb')
                   if '.ipynb_checkpoints' not in p.parts and not p.stem.startswith('out'))
TABLES = {int(m[1]): p for p in NOTEBOOKS if (m := re.search(r'_table([1-9])$', p.stem))}
# papermill of the README runs Table 1 as it is; here it and one other run on a folder of images, and so do the studies
PARAMETERS = {'12_table9': dict(methods='PATROL,Bottleneck', width=0.25, batch_size=8, repeats=1),
              '13_figure3': dict(noise_stds='0.05,0.2', seeds='0'),
              '14_figure4': dict(panels='a,b,c,d', alone='0.05,0.2', strengths='0,16', cuts='1,2', lams='0,8'),
              '15_figure5': dict(methods='Bottleneck'), '16_playground': dict(lams='0,16', cuts='2'),
              '21_lambda': dict(settings='', seeds='0', lams='16,64', balances='3,10'),
              '22_schedule': dict(methods='Bottleneck', decoders='2x64', long=4),
              '17_benchmark': dict(width=0.125, rounds=1, images=2000, seeds=1),
              '18_at_scale': dict(methods='Bottleneck', lengths='2,16'),
              '19_settings': {}}
ON_IMAGES = '13_figure3', '14_figure4', '15_figure5', '16_playground', '21_lambda', '18_at_scale', '19_settings', '22_schedule'
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the project: the notebooks' last cells export, and must not mend here what another test looks at."
    root = tmp_path_factory.mktemp('project')
    for name in ('nbs', 'cem_nb', 'data/paper', 'figures'): shutil.copytree(ROOT/name, root/name)
    shutil.copy(ROOT/'settings.ini', root)
    return root


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


def execute(path, out, **parameters):
    "Printed text, and the number of pictures, of a notebook run in its folder."
    pm.execute_notebook(path, out, parameters, cwd=path.parent, progress_bar=False, kernel_name='python3', log_output=False)
    return outputs(out)


def outputs(path):
    found = [o for c in json.loads(Path(path).read_text())['cells'] for o in c.get('outputs', [])]
    return ''.join(''.join(o.get('text', '')) for o in found), sum('image/png' in o.get('data', {}) for o in found)


@pytest.mark.parametrize('name', [p for p in NOTEBOOKS if p != TABLES[1]], ids=lambda p: p.stem)
def test_notebook_runs(name, copy, images, tmp_path):
    before, small = {p.name for p in (copy/'figures').iterdir()}, dict(dataset=f'folder:{images}') if name.stem in ON_IMAGES else {}
    execute(copy/name, tmp_path/'out.ipynb', **PARAMETERS.get(name.stem, {}), **small)
    assert {p.name for p in (copy/'figures').iterdir()} == before


@pytest.mark.parametrize('table', [1, 2])
def test_a_table_of_images(table, copy, images, tmp_path):
    "Two methods: what is saved lands among the results, and a second run finds every run in the store."
    parameters = dict(methods='No_defense,Bottleneck', dataset=f'folder:{images}', preset='quick')
    text, pictures = execute(copy/TABLES[table], tmp_path/'out.ipynb', **parameters)
    assert re.search(rf'saved table{table}_folder-{images.name}-[0-9a-f]{{6}}_quick', text) and re.search('for [01] of 1 defences', text)
    saved = {p.name for p in (tmp_path/'results').iterdir()}
    assert {Path(n).suffix for n in saved} == {'.csv', '.png'} and len(saved) == 3
    assert all(('arch-resnet20' in n) == (table == 2) for n in saved) and pictures >= 3
    assert not any(images.name in p.name for p in (copy/'figures').iterdir())
    assert len(re.findall(r' {3}\d+ s$', text, re.M)) == 3 and len(list((tmp_path/'runs').glob('*/*/result.json'))) == 6
    if table == 2: assert execute(copy/TABLES[2], tmp_path/'again.ipynb', **parameters)[0].count(' stored\n') == 3


@pytest.mark.parametrize('table', range(2, 9))
def test_a_table_opens_with_what_the_paper_claims_and_has_a_lesson_of_its_own(table):
    cells = [''.join(c['source']) for c in json.loads((ROOT/TABLES[table]).read_text())['cells']]
    assert '(Xia et al. 2025' in cells[0] and any(f'papermill {TABLES[table]}' in s for s in cells)
    lessons = [s for s in cells if '## What this table teaches' in s]
    others = {''.join(c['source']) for t in range(2, 9) if t != table for c in json.loads((ROOT/TABLES[t]).read_text())['cells']}
    assert len(lessons) == 1 and not {lessons[0], cells[0], cells[-1]} & others


def papermill(*args, notebook=TABLES[1].stem, cwd=ROOT):
    return subprocess.run([Path(sys.executable).with_name('papermill'), '--no-progress-bar', ROOT/'nbs'/f'{notebook}.ipynb', *args],
                          cwd=cwd, capture_output=True, text=True, env=os.environ)


@pytest.mark.parametrize('notebook, args, cause', [
    ('04_table1', ('lma', '3'), "did you mean 'lam'?"), ('04_table1', ('lam', 'abc'), "lam is 'abc'"),
    ('04_table1', ('lam', '-1'), 'lam is -1'), ('04_table1', ('dataset', 'folder:/nowhere'), 'folder:/nowhere does not exist'),
    ('06_table3', ('preset', 'tiny'), "no preset 'tiny'"), ('13_figure3', ('noise_stds', '0.1,0'), 'noise_stds'),
    ('13_figure3', ('noise_std', '0.1'), "did you mean 'noise_stds'?"), ('14_figure4', ('panels', 'a,e'), 'panels'),
    ('14_figure4', ('cuts', '9'), 'cut is 9'), ('15_figure5', ('methods', 'Dropuot'), "no defence 'Dropuot'"),
    ('16_playground', ('lams', 'all'), 'lams'), ('16_playground', ('cuts', '8'), 'cut is 8')])
def test_bad_parameters_stop_before_training(notebook, args, cause, tmp_path):
    done = papermill(tmp_path/'out.ipynb', '-p', *args, notebook=notebook)
    assert done.returncode != 0
    assert cause in done.stderr.strip().splitlines()[-1], done.stderr[-500:]
    assert not (tmp_path/'runs').exists()


def test_table_from_outside_the_repository(tmp_path):
    "On the digits, with two seeds and one attack."
    done = papermill('out.ipynb', '-p', 'methods', 'Bottleneck', '-p', 'seeds', '0,1', '-p', 'attacks', 'decoder', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    text, pictures = outputs(tmp_path/'out.ipynb')
    assert len(re.findall(r'^Bottleneck\+CEM ', text, re.M)) == 2 and 'saved table1_digits_quick' in text
    assert pictures >= 2
    assert len(list((tmp_path/'results').iterdir())) == 3
