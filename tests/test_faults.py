"""Kills at random points, a full disk, a power cut, a machine that is lost: real ones. `pytest -m faults` runs them, in some minutes.

Every one ends in the table that an undisturbed run gives, to the last digit."""
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest

from cem_nb.core import runs_dir
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import Experiment
from cem_nb.runs import verify
from cem_nb.sweep import sweep

pytestmark = [pytest.mark.slow, pytest.mark.faults]
ATTACK = DecoderAttack(width=8, blocks=0, n_epochs=8, batch_size=64)
SMALL = Experiment(attacks=(ATTACK,)).replace(n_train=512, width=0.125, epochs=8, batch_size=64, lr=0.02)

SCRIPT = '''
import sys
from pathlib import Path
import pandas as pd
from cem_nb.experiment import Experiment
from cem_nb.sweep import sweep
base = Experiment.model_validate_json(sys.argv[1])
print('imported', flush=True)
Path(sys.argv[2]).write_text(sweep(base, seed=[0, 1], device='cpu').to_json(double_precision=15))
'''


def numbers(frame): return frame.drop(columns=[c for c in frame if c.startswith(('seconds', 'resumed')) or c in ('date', 'hardware')])


def start(runs, out, base=SMALL):
    "A process that computes two runs, from the moment on when it begins with them: to import torch takes some seconds."
    process = subprocess.Popen([sys.executable, '-c', SCRIPT, base.model_dump_json(), str(out)], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | dict(CEM_RUNS=str(runs)))
    assert process.stdout.readline() == 'imported\n', process.stderr.read()
    return process


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    place = tmp_path_factory.mktemp('whole')
    process = start(place/'runs', place/'table.json')
    assert process.wait(300) == 0, process.stderr.read()
    return numbers(pd.read_json(place/'table.json'))


def same(path, undisturbed): pd.testing.assert_frame_equal(numbers(pd.read_json(path)), undisturbed, check_exact=True)


@pytest.mark.parametrize('seed', range(2))
def test_kills_at_random_points(tmp_path, undisturbed, seed):
    rng, kills = random.Random(seed), 0
    while kills < 30:
        process = start(tmp_path/'r', tmp_path/'r.json')
        try:
            process.wait(rng.uniform(0.2, 5))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert process.returncode == 0 and kills, process.stderr.read()
    same(tmp_path/'r.json', undisturbed)
    assert not list((tmp_path/'r').rglob('*.part')) and not list((tmp_path/'r').rglob('checkpoint*'))


def mounted(kind, where, *options):
    where.mkdir()
    done = subprocess.run(['mount', *kind, str(where), *options], capture_output=True, text=True)
    if done.returncode: pytest.skip(f'no file system can be mounted here: {done.stderr.strip()}')
    return where


@pytest.mark.parametrize('kilobytes', [60, 300, 600])
def test_a_full_disk(tmp_path, undisturbed, kilobytes):
    disk = mounted(['-t', 'tmpfs', '-o', f'size={kilobytes}k', 'none'], tmp_path/'disk')
    try:
        process = start(disk/'runs', tmp_path/'r.json')
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 1 and 'free some space or set CEM_RUNS' in said, said
        subprocess.run(['mount', '-o', 'remount,size=50m', str(disk)], check=True)
        assert start(disk/'runs', tmp_path/'r.json').wait(300) == 0
        same(tmp_path/'r.json', undisturbed)
    finally: subprocess.run(['umount', '-l', str(disk)])


@pytest.mark.parametrize('seed', range(3))
def test_a_power_cut(tmp_path, undisturbed, seed, monkeypatch):
    "The disk as it is at some moment, copied without waiting for what the system has still to write."
    image, cut = tmp_path/'image', tmp_path/'cut'
    with image.open('wb') as f: f.truncate(64*2**20)
    if not shutil.which('mkfs.ext4'): pytest.skip('there is no mkfs.ext4 here')
    subprocess.run(['mkfs.ext4', '-q', str(image)], check=True)
    before = mounted(['-o', 'loop', str(image)], tmp_path/'before')
    try:
        process = start(before/'runs', tmp_path/'r.json')
        try: process.wait(random.Random(seed).uniform(0.2, 4))
        except subprocess.TimeoutExpired: pass
        shutil.copyfile(image, cut)
        process.kill()
        process.wait()
    finally: subprocess.run(['umount', '-l', str(before)])
    after = mounted(['-o', 'loop', str(cut)], tmp_path/'after')
    try:
        monkeypatch.setenv('CEM_RUNS', str(after/'runs'))
        assert verify() == {}  # what has its final name is whole
        assert start(after/'runs', tmp_path/'r.json').wait(300) == 0
        same(tmp_path/'r.json', undisturbed)
    finally: subprocess.run(['umount', '-l', str(after)])


def test_a_node_of_a_ray_cluster_is_lost(tmp_path, monkeypatch):
    "Of two nodes with a run each one is killed: the run goes to the other one, from its last epoch."
    ray = pytest.importorskip('ray')
    from ray.cluster_utils import Cluster
    long = SMALL.replace(epochs=60)
    monkeypatch.setenv('CEM_RUNS', str(tmp_path/'here'))
    want = numbers(sweep(long, seed=[0, 1, 2], device='cpu'))
    monkeypatch.setenv('CEM_RUNS', str(tmp_path/'there'))
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0))
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        monkeypatch.setenv('RAY_ADDRESS', cluster.address)
        killed = []
        def kill():
            while len(list(runs_dir().glob('*.part/checkpoint.pt'))) < 2: time.sleep(0.2)
            cluster.remove_node(nodes[0], allow_graceful=False)
            killed.append(nodes[0])
        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        found = sweep(long, seed=[0, 1, 2], device='cpu', backend='ray', n_jobs=2)
    finally:
        if ray.is_initialized(): ray.shutdown()
        cluster.shutdown()
    assert killed and found.resumed_train.sum() == 1
    pd.testing.assert_frame_equal(numbers(found), want, check_exact=True)
    assert verify() == {} and not list(runs_dir().glob('*.part'))
