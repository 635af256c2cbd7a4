"Every notebook runs top to bottom; Table 1's also from other folders and with bad parameters."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import papermill as pm
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
TABLE1 = ROOT/'nbs'/'04_table1.ipynb'
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the project: the notebooks' last cells export, and must not mend here what another test looks at."
    root = tmp_path_factory.mktemp('project')
    for name in ('nbs', 'cem_nb', 'data/paper', 'figures'): shutil.copytree(ROOT/name, root/name)
    shutil.copy(ROOT/'settings.ini', root)
    return root


@pytest.mark.parametrize('name', [p.stem for p in NOTEBOOKS])
def test_notebook_runs(name, copy, tmp_path):
    path = copy/'nbs'/f'{name}.ipynb'
    parameters = dict(methods='No_defense,Bottleneck') if name == TABLE1.stem else {}
    pm.execute_notebook(path, tmp_path/'out.ipynb', parameters=parameters, cwd=path.parent, progress_bar=False,
                        kernel_name='python3', log_output=False)


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
    done = papermill('out.ipynb', '-p', 'methods', 'Bottleneck', '-p', 'seeds', '0,1', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    nb = json.loads((tmp_path/'out.ipynb').read_text())
    text = ''.join(''.join(o.get('text', '')) for c in nb['cells'] for o in c.get('outputs', []))
    assert text.count('Bottleneck+CEM') == 2 and 'saved table1_digits_quick' in text
    assert sum('image/png' in o.get('data', {}) for c in nb['cells'] for o in c.get('outputs', [])) == 2
    assert len(list((tmp_path/'figures').iterdir())) == 3
