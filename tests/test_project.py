"The export, the README, the environments and the notebooks' metadata are in sync, and the module stands alone."
import configparser
import importlib.util
import io
import json
import keyword
import re
import statistics
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cem_nb.parameters import changed
from cem_nb.store import SCHEMA

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts and not p.stem.startswith('out'))
MODULES = sorted(p.stem for p in (ROOT/'cem_nb').glob('*.py') if not p.stem.startswith('_'))
pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason='needs a checkout')


def cells(path): return json.loads(path.read_text())['cells']


def sources(path): return [''.join(c['source']) for c in cells(path) if c['cell_type'] == 'code']


def order():
    "Module name to its place in the order of the chapters."
    names = [m[1] for p in NOTEBOOKS for s in sources(p) if (m := re.match(r'#\| default_exp (\w+)', s))]
    return {n: i for i, n in enumerate(names)}


def test_export_is_in_sync(tmp_path):
    "Export a copy of the notebooks and compare with what is committed."
    import shutil
    for name in ('settings.ini', 'nbs', 'cem_nb'):
        (shutil.copytree if (ROOT/name).is_dir() else shutil.copy)(ROOT/name, tmp_path/name)
    for p in (tmp_path/'cem_nb').glob('*.py'):
        if p.stem in MODULES: p.unlink()
    done = subprocess.run([Path(sys.executable).with_name('nbdev_export')], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(order()) == set(MODULES)
    for m in MODULES:
        assert (tmp_path/'cem_nb'/f'{m}.py').read_text() == (ROOT/'cem_nb'/f'{m}.py').read_text(), f'{m}: run nbdev_export'


def test_readme_is_rendered_from_the_index():
    spec = importlib.util.spec_from_file_location('readme', ROOT/'tools'/'readme.py')
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    text = (ROOT/'README.md').read_text()
    assert text == readme.render(), 'run python tools/readme.py'
    for link in re.findall(r'\]\((?!https?:|#)([^)]+)\)', text): assert (ROOT/link).exists(), link
    assert len(re.findall(r'```bash', text)) == 2


def test_modules_depend_in_the_order_of_the_notebooks():
    place = order()
    for m in MODULES:
        used = re.findall(r'^from (?:cem_nb)?\.(\w+) import', (ROOT/'cem_nb'/f'{m}.py').read_text(), re.M)
        for u in used: assert place[u] < place[m], f'{m} imports {u}'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_links_between_notebooks_lead_somewhere(path):
    for c in cells(path):
        if c['cell_type'] != 'markdown': continue
        for link in re.findall(r'\]\((?!https?:|#|attachment:)([^)\s]+)\)', ''.join(c['source'])):
            assert (path.parent/link.split('#')[0]).exists(), link


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_metadata_and_opening(path):
    nb = json.loads(path.read_text())
    assert set(nb['metadata']) <= {'kernelspec'} and nb['metadata']['kernelspec']['name'] == 'python3'
    assert nb['cells'][0]['cell_type'] == 'markdown'
    assert re.match(r'# .+\n\n> .+', ''.join(nb['cells'][0]['source'])), 'a title and one line on what it shows'
    for c in nb['cells']:
        assert c.get('execution_count') is None and set(c['metadata']) <= {'tags'}
        assert not any(o['output_type'] == 'error' for o in c.get('outputs', []))
    assert path.stat().st_size < 1_500_000


def test_a_chapter_is_short_and_its_cells_are_small():
    lines = [len(s.splitlines()) - 1 for p in NOTEBOOKS for s in sources(p) if s.startswith('#| export')]
    assert statistics.median(lines) <= 15
    for p in NOTEBOOKS: assert len(cells(p)) <= 60, p.name
    for m in MODULES: assert len((ROOT/'cem_nb'/f'{m}.py').read_text().splitlines()) <= 350, m


def misspelt_operators(source):
    "Lines in which `*`, `/`, `//` or `**` stands with spaces between its operands, or `@` without."
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline)
              if t.type not in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)]
    for before, t, after in zip(tokens, tokens[1:], tokens[2:]):
        operand = before.type in (tokenize.NAME, tokenize.NUMBER) and not keyword.iskeyword(before.string) or before.string in (')', ']')
        if t.type != tokenize.OP or not operand or before.end[0] != t.start[0] or t.end[0] != after.start[0]: continue
        if after.string in (',', ')') or after.type == tokenize.NEWLINE: continue
        gaps = t.start[1] - before.end[1], after.start[1] - t.end[1]
        if t.string in ('*', '/', '//', '**') and gaps != (0, 0) or t.string == '@' and gaps != (1, 1): yield t.line.strip()


def test_operators_have_one_spelling():
    assert list(misspelt_operators('x = a * b\ny = a@b\nz = a*b @ c\ndef f(a, *, b): print(*a, **b)')) == ['x = a * b', 'y = a@b']
    code = [s for p in NOTEBOOKS for s in sources(p) if not s.lstrip().startswith(('%', '!'))]
    for s in code + [p.read_text() for p in (*(ROOT/'tests').glob('*.py'), *(ROOT/'examples').glob('*.py'))]:
        assert not list(misspelt_operators(s))
        assert max(map(len, s.splitlines()), default=0) <= 140


def test_every_committed_result_has_code_that_writes_it_and_the_current_schema():
    saved = {m for p in NOTEBOOKS for s in sources(p) for m in re.findall(r"\bsave\('([\w-]+)'", s)}
    saved.add('playground')  # a picture that tests/test_browser.py takes
    for path in (ROOT/'figures').iterdir():
        assert path.stem.split('_')[0] in saved, f'no notebook writes {path.name}'
        if path.suffix == '.csv': assert (pd.read_csv(path).schema == SCHEMA).all(), path.name


def test_contributing_shows_the_example():
    text = (ROOT/'CONTRIBUTING.md').read_text()
    assert (ROOT/'examples'/'own_methods.py').read_text().strip() in text, 'CONTRIBUTING.md shows examples/own_methods.py'


def test_tables_have_their_parameters_tag():
    for path in NOTEBOOKS:
        if 'table' in path.stem: assert sum('parameters' in c['metadata'].get('tags', []) for c in cells(path)) == 1


ASKED = [p for p in NOTEBOOKS if any('read_parameters(globals()' in s for s in sources(p)) and p.parent.name == 'nbs']


@pytest.mark.parametrize('path', ASKED, ids=lambda p: p.stem)
def test_the_defaults_of_a_notebook_are_those_of_its_record(path, monkeypatch):
    "Those of Tables 2 to 8 but for what makes them other tables."
    monkeypatch.setenv('MPLBACKEND', 'agg')
    code = sources(path)
    last = next(i for i, s in enumerate(code) if 'read_parameters(globals()' in s)
    space = {}
    for s in code[:last + 1]: exec('\n'.join(line for line in s.splitlines() if not line.startswith('plot_')), space)
    other = {'dataset', 'preset', 'arch', 'n_jobs'} if re.search('_table[2-8]$', path.stem) else set()
    assert set(changed(space['p'])) <= other


def requirement(line):
    name, spec = re.match(r'([\w.-]+)\s*(.*)', line).groups()
    conda = {'pytorch': 'torch', 'python-safetensors': 'safetensors', 'playwright-python': 'playwright'}
    return conda.get(name, name).lower(), spec


def test_both_environments_are_one():
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    pip = dict(map(requirement, project['dependencies'] + project['optional-dependencies']['dev']))
    conda = dict(map(requirement, yaml.safe_load((ROOT/'environment.yml').read_text())['dependencies']))
    assert conda.pop('pip') == '' and conda.pop('python') == project['requires-python']
    assert pip == conda


def test_settings_agree_with_pyproject():
    s = configparser.ConfigParser(); s.read(ROOT/'settings.ini'); s = s['DEFAULT']
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    assert s['lib_name'] == project['name'] and s['description'] == project['description']
    assert '>=' + s['min_python'] == project['requires-python']
    assert f'__version__ = "{s["version"]}"' in (ROOT/'cem_nb'/'__init__.py').read_text()


def test_the_module_needs_no_jupyter():
    "But for the widgets."
    modules = [m for m in MODULES if m != 'playground']
    code = ('import sys\n'
            'for m in ("IPython", "ipykernel", "ipywidgets", "nbdev", "fastcore", "papermill", "jupyterlab"): sys.modules[m] = None\n'
            f'import importlib\nfor m in {modules}: importlib.import_module("cem_nb." + m)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_points_at_one_machine():
    for p in [*NOTEBOOKS, *ROOT.glob('*.md'), *(ROOT/'tests').glob('*.py'), *(ROOT/'figures').glob('*.csv')]:
        if p == Path(__file__).resolve(): continue
        assert not re.search(r'(?<![\w.])/(?:tmp|work|home|root|Users)/', p.read_text()), p.name


@pytest.mark.slow
@pytest.mark.parametrize('where', ['--prefix', '--target'])
def test_the_wheel_carries_the_papers_numbers(where, tmp_path):
    "Built from a copy, installed aside, used from a folder outside the repository."
    pytest.importorskip('setuptools')
    import shutil
    for name in ('pyproject.toml', 'README.md', 'LICENSE', 'cem_nb', 'data/paper'):
        (tmp_path/'src'/name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT/name).is_dir() else shutil.copy)(ROOT/name, tmp_path/'src'/name)
    pip = [sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check']
    subprocess.run([*pip, 'install', '--no-deps', '--no-build-isolation', '--ignore-installed',  # leave the checkout's
                    where, tmp_path/'env', tmp_path/'src'], check=True)
    site = next((tmp_path/'env').rglob('cem_nb/__init__.py')).parent.parent
    code = ('import cem_nb.paper as r\n'
            f'assert r.__file__.startswith({str(tmp_path)!r}), r.__file__\n'
            'assert r.paper_numbers(1).loc[("Bottleneck", False), "accuracy"] == 90.87')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                          env={'PATH': '/usr/bin', 'PYTHONPATH': str(site)})
    assert done.returncode == 0, done.stderr
