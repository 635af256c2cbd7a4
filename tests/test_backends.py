import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import cem_nb.backends as backends
from cem_nb.backends import BACKENDS, Here, MissingBackend
from cem_nb.core import runs_dir
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import Experiment
from cem_nb.store import data_on, run_path, write_then_rename
from cem_nb.sweep import sweep

TINY = Experiment(attacks=(DecoderAttack(width=8, blocks=0, n_epochs=2, batch_size=64),)).replace(
    n_train=256, width=0.125, epochs=2, batch_size=64, lr=0.02)
MODULES = dict(ray='ray', dask='distributed', slurm='submitit')


def table(**how):
    frame = sweep(TINY, seed=[0, 1, 2], device='cpu', **how)
    return frame.drop(columns=[c for c in frame if c.startswith(('seconds', 'resumed')) or c in ('date', 'hardware')])


def test_this_process_computes_at_once_in_one_thread():
    torch.set_num_threads(2)
    try:
        executor = Here(1)
        assert executor.submit(torch.get_num_threads).result() == 1 and torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError): executor.submit(lambda: 1/0).result()
        assert list(executor.told()) == [] and executor.stop() is None
        def interrupted(): raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt): executor.submit(interrupted)
    finally: torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['loky', 'ray', 'dask', 'slurm'])
def test_a_table_does_not_depend_on_where_it_was_computed(backend, monkeypatch):
    if backend in MODULES: pytest.importorskip(MODULES[backend])
    here = table(backend='here')
    monkeypatch.setenv('CEM_RUNS', os.environ['CEM_RUNS'] + '2')
    there = table(backend=backend, n_jobs=2)
    pd.testing.assert_frame_equal(here, there, check_exact=True)
    assert len([p for p in runs_dir().iterdir() if p.name.startswith('Bottleneck')]) == 3  # in the store that was asked for


@pytest.mark.parametrize('backend', MODULES)
def test_what_is_not_installed_says_how_to_install_it(backend, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULES[backend], None)
    with pytest.raises(MissingBackend, match=rf'pip install "cem_nb\[{backend}\]"'): sweep(TINY, backend=backend)
    with pytest.raises(ValueError, match='choose one of here, loky'): sweep(TINY, backend='rya')


SCRIPT = '''
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import Experiment
from cem_nb.sweep import sweep
base = Experiment(attacks=()).replace(n_train=256, width=0.125, epochs=2, batch_size=64, lr=0.02)
print(len(sweep(base, n_jobs=2, seed=[0, 1])), 'rows')
'''


@pytest.mark.slow
def test_a_script_needs_no_guard(tmp_path):
    (tmp_path/'script.py').write_text(SCRIPT)
    done = subprocess.run([sys.executable, tmp_path/'script.py'], capture_output=True, text=True, timeout=120)
    assert '2 rows' in done.stdout and done.returncode == 0, done.stderr


@pytest.mark.parametrize('ends', ['finished', 'given up'])
def test_a_run_of_another_process_is_waited_for_and_the_others_go_first(capsys, monkeypatch, ends):
    import cem_nb.sweep
    monkeypatch.setattr(cem_nb.sweep, 'AGAIN', 0.1)
    first = run_path(TINY.replace(seed=0), data_on(TINY.data, torch.device('cpu'))[1])
    want = sweep(TINY, seed=[0])
    os.rename(first, kept := first.with_name('kept'))
    other = write_then_rename(first)
    other.__enter__()
    def end():
        while 'seed 2' not in ''.join(said): said.append(capsys.readouterr().out); time.sleep(0.05)
        os.rename(kept, first) if ends == 'finished' else None
        other.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    said = []
    thread = threading.Thread(target=end)
    thread.start()
    frame = sweep(TINY, seed=[0, 1, 2])
    thread.join()
    text = ''.join(said) + capsys.readouterr().out
    assert 'another process is at it' in text and text.index('seed 1') < text.rindex('seed 0')
    assert list(frame.seed) == [0, 1, 2] and frame.mse_test_decoder[0] == want.mse_test_decoder[0]
    assert ('stored' in text) == (ends == 'finished')


def test_a_process_computes_one_at_a_time():
    "Threads of a worker would share its random numbers."
    at, most = [], []
    def work():
        at.append(1)
        most.append(len(at))
        time.sleep(0.05)
        at.pop()
    threads = [threading.Thread(target=backends.in_one_thread, args=(work,)) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert max(most) == 1 and len(most) == 4


def test_ray_shares_gpus_so_that_all_fit(monkeypatch):
    asked = {}
    class Task:
        def options(self, **k): asked.update(k)
    fake = SimpleNamespace(is_initialized=lambda: True, cluster_resources=lambda: dict(GPU=4.0), remote=lambda f: Task())
    monkeypatch.setitem(sys.modules, 'ray', fake)
    backends.RayTasks(6, gpu=True)
    assert asked['num_gpus'] == 1/2 and 4*int(1/asked['num_gpus']) >= 6
    fake.cluster_resources = lambda: {}
    with pytest.raises(MissingBackend, match='no GPU'): backends.RayTasks(6, gpu=True)


def test_slurm_cancels_what_is_under_way():
    pytest.importorskip('submitit')
    executor = backends.SlurmJobs(1)
    job = executor.submit(time.sleep, 60)
    executor.stop()
    deadline = time.time() + 30
    while not job.done(): assert time.time() < deadline


def test_backends_have_one_face():
    for executor in BACKENDS.values(): assert {'submit', 'stop', 'told'} <= set(dir(executor))
