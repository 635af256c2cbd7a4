import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor

import pandas as pd
import psutil
import pytest
import torch

import cem_nb.store as store
import cem_nb.sweep
from cem_nb.backends import BACKENDS, Here
from cem_nb.cem import CEM, CEMS
from cem_nb.core import runs_dir
from cem_nb.data import DataError
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import Experiment
from cem_nb.gan import GAN
from cem_nb.loop import Progress
from cem_nb.oracle import Oracle
from cem_nb.parameters import TableParameters, table_rows
from cem_nb.store import SCHEMA, RunError
from cem_nb.sweep import Pool, experiments, sweep

DECODER = DecoderAttack(width=8, blocks=0, n_epochs=2, batch_size=64)
ATTACKS = DECODER, GAN(width=8, blocks=0, n_epochs=2, batch_size=64, critic_width=4), Oracle(n_images=20)
TINY = Experiment(attacks=(DECODER,)).replace(n_train=256, width=0.125, epochs=2, batch_size=64, lr=0.02)
TIMES = ['seconds_train', 'seconds_decoder', 'resumed_train', 'resumed_decoder', 'date', 'hardware']


def test_axes_are_multiplied_with_rows():
    points = experiments(TINY, [dict(defense='Dropout'), dict(defense='DistCorr', lam=2.0)], noise_std=[0.01, 0.1], seed=range(3))
    assert len(points) == 12 and len({e.model_dump_json() for _, e in points}) == 12
    assert [e.row for _, e in points[:3]] == ['Dropout', 'DistCorr+CEM', 'Dropout']
    for varied, e in points: assert (e.model.noise_std, e.seed) == (varied['noise_std'], varied['seed'])
    with pytest.raises(ValueError, match='noise'): experiments(TINY, nosie_std=[0.1])
    with pytest.raises(ValueError, match='lam is an axis and in the rows'): experiments(TINY, [dict(lam=1.0)], lam=[2.0])
    assert len(experiments(TINY, (dict(defense=d) for d in ('Dropout', 'DistCorr')), seed=range(2))) == 4


def test_a_table_has_every_row_and_leads_back_to_its_source():
    frame = sweep(TINY.replace(attacks=ATTACKS), table_rows(TableParameters()))
    assert len(frame) == 15 and len(set(zip(frame.defense, frame.cem))) == 15
    for a in ATTACKS:
        columns = [f'{m}_{p}_{a.name}' for m in a.metrics for p in ('train', 'val', 'test')]
        assert frame[columns].notna().all().all(), a.name  # the oracle under dropout too
    assert frame[['acc_test', 'hardware', 'torch', 'date', 'run', 'arch', 'noise_std']].notna().all().all()
    assert (frame.schema == SCHEMA).all() and (frame.lam > 0).equals(frame.cem)
    for r in frame.itertuples():
        stored = json.loads((runs_dir()/r.run/'result.json').read_text())
        assert stored['accuracy']['test']*100 == r.acc_test
        assert (json.loads((runs_dir()/r.run/'config.json').read_text())['experiment']['cem'] is not None) == r.cem
    again = sweep(TINY.replace(attacks=ATTACKS[1:2]), table_rows(TableParameters(methods='Noise_ARL')), seed=[0])
    assert again.iloc[0].mse_test_gan == frame[frame.defense == 'Noise_ARL'].iloc[0].mse_test_gan


def test_it_does_not_matter_where_a_run_is_computed(capsys):
    seen = []
    def elsewhere(e):
        seen.append(e)
        return store.run(e)
    a, b = sweep(TINY, compute=elsewhere, seed=[0, 1]), sweep(TINY, seed=[0, 1])
    pd.testing.assert_frame_equal(a, b)
    assert [e.seed for e in seen] == [0, 1] and capsys.readouterr().out.count('stored') == 2


def test_a_diverged_run_does_not_take_the_others_with_it(monkeypatch, capsys):
    real = store.train
    def failing(e, *a, **k):
        if e.row == 'DistCorr': raise cem_nb.sweep.DivergedError('the loss is nan')
        return real(e, *a, **k)
    monkeypatch.setattr(store, 'train', failing)
    frame = sweep(TINY, defense=['DistCorr', 'Bottleneck'])
    assert math.isnan(frame.acc_test[0]) and frame.acc_test[1] > 0 and 'diverged' in capsys.readouterr().out


def test_what_cannot_be_computed_stops_before_the_first_run(monkeypatch):
    def never(*args, **kwargs): raise AssertionError
    monkeypatch.setattr(store, 'train', never)
    with pytest.raises(DataError): sweep(TINY, dataset=['digits', 'folder:/nowhere'])
    with pytest.raises(ValueError, match='cut'): sweep(TINY, cut=[2, 0])
    with pytest.raises(RunError, match='mps'): sweep(TINY, device='mps')
    with pytest.raises(ValueError, match='validation'): sweep(TINY, test=False, val_frac=[0.0])
    assert not list(runs_dir().glob('*.part'))


SCRIPT = '''
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import Experiment
from cem_nb.sweep import sweep
base = Experiment(attacks=(DecoderAttack(width=8, blocks=0, n_epochs=2, batch_size=64),)).replace(
    n_train=256, width=0.125, epochs=5, batch_size=32, lr=0.02)
sweep(base, cem=[False, True]).to_json('out.json')
'''


@pytest.mark.parametrize('file', ['digests.json', 'result.json', 'decoder*/result.json', 'weights.safetensors'])
def test_what_is_damaged_in_the_store_is_said_before_the_first_run(file, monkeypatch):
    sweep(TINY, seed=[1])
    path = next(runs_dir().glob(f'Bottleneck-s1-*/{file}'))
    path.write_bytes(path.read_bytes()[:-3])
    monkeypatch.setattr(store, 'train', lambda *a, **k: pytest.fail('a training began'))
    also = TINY.replace(attacks=(DECODER, Oracle(n_images=20)))  # which needs the weights
    with pytest.raises(RunError, match=rf'{path.name} .*remove .* and start again'): sweep(also, seed=[0, 1])


def test_a_file_where_a_run_belongs_is_said_before_the_first_run(monkeypatch):
    sweep(TINY.replace(attacks=()), seed=[1])
    path = next(runs_dir().glob('Bottleneck-s1-*'))
    shutil.rmtree(path), path.write_text('x')
    monkeypatch.setattr(store, 'train', lambda *a, **k: pytest.fail('a training began'))
    with pytest.raises(RunError, match=f'{path.name} is no folder'): sweep(TINY, seed=[0, 1])


@pytest.mark.slow
def test_a_killed_process_loses_no_finished_run_and_ends_with_the_same_table(tmp_path):
    def start(where):
        (tmp_path/where).mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, '-c', SCRIPT], cwd=tmp_path/where, stdout=subprocess.PIPE, text=True,
                                env=os.environ | dict(CEM_RUNS=str(tmp_path/where/'runs')))
    assert start('whole').wait(240) == 0
    process = start('killed')
    runs, deadline = tmp_path/'killed'/'runs', time.time() + 240
    while not list(runs.glob('Bottleneck+CEM*.part/checkpoint.pt')):  # the second of two runs is in its epochs
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {p: p.stat().st_mtime_ns for p in runs.glob('Bottleneck-s0-*/**/*.json')}
    assert len(finished) == 6  # of the training and of the attack: settings, result, digests
    again = start('killed')
    assert again.wait(240) == 0 and 'stored' in again.stdout.read()
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    a, b = (pd.read_json(tmp_path/s/'out.json').drop(columns=TIMES) for s in ('whole', 'killed'))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert not list(runs.glob('*.part'))


def test_where_something_is_chosen_no_test_score_is_shown(capsys):
    frame = sweep(TINY, test=False)
    assert not [c for c in frame if 'test' in c] and frame.mse_val_decoder.notna().all()
    assert 'val accuracy' in capsys.readouterr().out


@pytest.mark.slow
def test_workers_give_what_one_process_gives(monkeypatch):
    a = sweep(TINY, n_jobs=2, seed=[0, 1], cem=[False, True], decoder__width=[8, 4])  # two attacks on each training
    monkeypatch.setenv('CEM_RUNS', os.environ['CEM_RUNS'] + '2')
    b = sweep(TINY, seed=[0, 1], cem=[False, True], decoder__width=[8, 4])
    pd.testing.assert_frame_equal(a.drop(columns=TIMES), b.drop(columns=TIMES), check_exact=True)


def test_what_a_worker_cannot_import_is_run_here(monkeypatch):
    "A worker would not know a variant of CEM that is registered outside the package."
    class Mine(CEM): pass
    monkeypatch.setitem(CEMS, 'mine', Mine)
    monkeypatch.setitem(BACKENDS, 'loky', None)  # would be a TypeError
    assert sweep(TINY, [dict(lam=16.0, variant='mine')], n_jobs=2, seed=[0, 1]).acc_test.notna().all()


def dying(e): os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_dies_is_a_clear_error():
    with pytest.raises(RunError, match='fewer jobs'): sweep(TINY, compute=dying, n_jobs=2, seed=[0, 1])


def test_what_waits_when_a_worker_dies_is_told_so_too(monkeypatch):
    class Broken(Here):
        def submit(self, *args): raise BrokenExecutor('a worker died')
    monkeypatch.setitem(BACKENDS, 'loky', lambda *a: Broken(1))
    pool = Pool(store.run, [TINY, TINY.replace(seed=1)], 2)
    for e in TINY, TINY.replace(seed=1):
        with pytest.raises(RunError, match='fewer jobs'): pool.outcome(e)


def chatty(e):
    "A run of a thousand stages that nobody listens to."
    for n in range(3000): [tell(f'stage {n}', 1) for tell in Progress.listeners]
    raise RunError('done')


def workers():
    "How many there are; the tracker of their resources stays, and is none."
    def is_one(process):
        try: return 'LokyProcess' in ' '.join(process.cmdline())
        except psutil.Error: return False  # it is ending
    return sum(map(is_one, psutil.Process().children(recursive=True)))


def test_a_worker_that_nobody_listens_to_ends():
    before = workers()
    pool = Pool(chatty, [TINY], 1)
    with pytest.raises(RunError, match='done'): pool.outcome(TINY)
    assert workers() > before
    pool.stop()
    deadline = time.time() + 20
    while workers() > before: assert time.time() < deadline


def test_epochs_are_counted_and_a_stopped_pool_says_so():
    pool = Pool(store.run, [TINY, TINY.replace(seed=1), TINY.replace(seed=2)], 1)
    pool.outcome(TINY)
    seen = pool.epochs()
    pool.stop()
    assert seen >= TINY.training.epochs
    with pytest.raises(RunError, match='stopped|died'): pool.outcome(TINY.replace(seed=2))


def test_axes_without_values_are_refused():
    for bad in (dict(seed=3), dict(arch='vgg11')):
        with pytest.raises(ValueError, match='give its values in a list'): experiments(Experiment(), **bad)


def test_validation_images_that_come_to_nothing_are_noticed_before_the_first_run(monkeypatch):
    monkeypatch.setattr('cem_nb.sweep.Pool', None)
    with pytest.raises(ValueError, match='there are no validation images'): sweep(TINY.replace(n_train=10, val_frac=0.0), test=False)


def test_what_is_handed_to_workers_can_be_pickled(monkeypatch):
    handed = []
    class Caught(Exception): pass
    def pool(compute, *rest): handed.append(compute); raise Caught
    monkeypatch.setattr('cem_nb.sweep.Pool', pool)
    with pytest.raises(Caught): sweep(TINY, n_jobs=2)
    assert pickle.loads(pickle.dumps(handed[0])).keywords == handed[0].keywords


@pytest.mark.parametrize('backend, n_jobs, want', [('loky', 3, ('loky', 3)), ('loky', 1, ('here', 1)), ('here', 3, ('here', 1))])
def test_runs_share_a_gpu_as_they_share_cores(backend, n_jobs, want, monkeypatch):
    class Asked(Exception): pass
    def pool(compute, todo, n_jobs, backend, gpu): raise Asked(backend, n_jobs, gpu)
    monkeypatch.setattr(cem_nb.sweep, 'Pool', pool)
    monkeypatch.setattr(cem_nb.sweep, 'pick_device', lambda name: torch.device('cuda', 0))  # none of this needs one
    with pytest.raises(Asked) as asked: sweep(Experiment(), backend=backend, n_jobs=n_jobs)
    assert asked.value.args == (*want, True)


def test_too_little_memory_on_a_gpu_is_said_with_what_to_do():
    def compute(e): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')
    pool = Pool(compute, [Experiment()], 1, 'here', gpu=True)
    with pytest.raises(RunError, match='too little memory.*Tried to allocate 2 GiB.*fewer jobs'): pool.outcome(Experiment())
