import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

import cem_nb.training as training
from cem_nb.core import runs_dir
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import Experiment
from cem_nb.oracle import Oracle
from cem_nb.runs import export_table, main, prunable, run_table, stored_runs, verify
from cem_nb.store import RunError, attack_folders, open_run, run, stored_attacks, write_then_rename
from cem_nb.sweep import sweep
from cem_nb.training import DivergedError

ATTACKS = DecoderAttack(width=8, blocks=0, n_epochs=2, batch_size=64), Oracle(n_images=20)
TINY = Experiment(attacks=ATTACKS).replace(n_train=256, width=0.125, epochs=3, batch_size=64, lr=0.02)


class Stop(Exception): pass


@pytest.fixture
def store(monkeypatch):
    "A finished run, one that was stopped after two epochs, one that diverged, and a damaged one; by name."
    names = dict(finished=run(TINY).path.name, damaged=run(TINY.replace(seed=1)).path.name)
    with (runs_dir()/names['damaged']/'result.json').open('a') as f: f.write(' ')
    with pytest.raises(DivergedError): run(TINY.replace(lr=1e30, batch_size=4096))
    real = training.train_epoch
    def two_epochs(*a):
        if a[-1] == 2: raise Stop
        return real(*a)
    with monkeypatch.context() as m:
        m.setattr(training, 'train_epoch', two_epochs)
        with pytest.raises(Stop): run(TINY.replace(seed=2))
    listed = stored_runs().set_index('state').run
    return names | dict(stopped=listed['stopped'], diverged=listed['diverged'])


def test_every_run_has_its_state(store):
    frame = stored_runs().set_index('run')
    assert {name: frame.state[name] for name in store.values()} == {v: k for k, v in store.items()} and len(frame) == 4
    assert frame.epochs[store['stopped']] == 2 and frame.attacks[store['finished']] == 'decoder, oracle'
    assert frame.seconds[store['finished']] > 0 and (frame.megabytes > 0).all()


def test_what_is_under_way_is_said(store):
    final = runs_dir()/store['stopped']
    with pytest.raises(Stop), write_then_rename(final):
        assert stored_runs().set_index('run').state[final.name] == 'running'
        with pytest.raises(RunError, match='another process'): main_or_raise('stopped')
        raise Stop
    attack = runs_dir()/store['finished']/'gan-000000000000'
    with pytest.raises(Stop), write_then_rename(attack):
        assert stored_runs().set_index('run').state[store['finished']] == 'running'
        raise Stop
    assert stored_runs().set_index('run').state[store['finished']] == 'finished'


def main_or_raise(state):
    "Prune what was stopped when it was looked at, though some process is at it now."
    from cem_nb.runs import prune
    prune([next(runs_dir().glob('*.part'))])


def test_a_method_that_is_not_imported_is_no_damage(store, monkeypatch):
    from cem_nb.defense import DEFENSES
    monkeypatch.delitem(DEFENSES, 'Bottleneck')
    assert set(stored_runs().state) == {'unknown', 'stopped'}


def harms():
    yield 'weights', lambda p: flip(p/'weights.safetensors')
    yield 'weights of an attack', lambda p: flip(next(p.glob('decoder-*'))/'weights.safetensors')
    yield 'a result', lambda p: flip(p/'result.json')
    yield 'digests', lambda p: (p/'digests.json').unlink()
    yield 'a line of the digests', lambda p: unlisted(p)
    yield 'a line of those of an attack', lambda p: unlisted(next(p.glob('decoder-*')))
    yield 'another name', lambda p: p.rename(p.with_name('Bottleneck-s0-0123456789ab'))
    yield 'an attack on others', lambda p: exchanged(p)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)


def unlisted(path):
    "Still a list of digests, and each of them is right."
    listed = json.loads((path/'digests.json').read_text())
    del listed['weights.safetensors']
    (path/'digests.json').write_text(json.dumps(listed))


def exchanged(path):
    other = run(TINY.replace(seed=5)).path
    mine, theirs = (next(p.glob('decoder-*')) for p in (path, other))
    shutil.rmtree(mine)
    shutil.copytree(theirs, path/theirs.name)


@pytest.mark.parametrize('what, harm', [*harms()])
def test_whatever_is_changed_is_found(what, harm):
    path = run(TINY).path
    assert verify() == {} and main(['runs', 'verify']) == 0
    harm(path)
    assert len(verify()) == 1 and main(['runs', 'verify']) == 1


def test_only_what_is_damaged_goes(store):
    "An attack by itself, and not a whole run, nor one of another version or on a disk that does not answer."
    path = runs_dir()/store['finished']
    flip(next(path.glob('decoder-*'))/'weights.safetensors')
    assert {p.relative_to(runs_dir()).parts[0] for p in prunable(['damaged'])} == {store['finished'], store['damaged']}
    assert main(['runs', 'prune', 'damaged', '--yes']) == 0
    assert [p.name.split('-')[0] for p in path.iterdir() if p.is_dir()] == ['oracle'] and (path/'result.json').is_file()
    assert run(TINY).new and verify() == {}


def test_what_was_left_of_an_attack_goes_too(store):
    path = runs_dir()/store['finished']/'gan-000000000000'
    with pytest.raises(Stop), write_then_rename(path): raise Stop
    assert path.with_name(path.name + '.part') in prunable(['stopped'])
    assert main(['runs', 'prune', 'stopped', '--yes']) == 0 and not path.with_name(path.name + '.part').exists()
    assert not run(TINY).new


def test_a_run_that_is_being_attacked_is_not_removed(store):
    from cem_nb.runs import prune
    attack = runs_dir()/store['finished']/'gan-000000000000'
    with pytest.raises(Stop), write_then_rename(attack):
        with pytest.raises(RunError, match='another process'): prune([attack.parent])
        raise Stop
    prune([runs_dir()/'gone'])  # by somebody else


@pytest.mark.parametrize('why', ['schema', 'disk'])
def test_what_is_whole_and_cannot_be_read_is_not_damaged(monkeypatch, why):
    import cem_nb.files, cem_nb.store
    name = run(TINY).path.name
    if why == 'schema': monkeypatch.setattr(cem_nb.store, 'SCHEMA', cem_nb.store.SCHEMA + 1)
    else:
        def busy(*a): raise OSError(24, 'Too many open files')
        for module in (cem_nb.files, cem_nb.store): monkeypatch.setattr(module, 'read_sealed', busy)
    assert list(stored_runs().state) == ['unknown'] and main(['runs', 'show', name]) == 1
    assert prunable(['damaged']) == []


def test_an_attack_that_is_not_imported_stops_nothing(store, monkeypatch):
    from cem_nb.attack import ATTACKS
    monkeypatch.delitem(ATTACKS, 'oracle')
    frame = run_table()
    assert list(frame.run) == [store['finished']] and 'mse_test_decoder' in frame and not frame.filter(like='oracle').size
    assert store['finished'] not in verify()


def test_a_table_for_other_programs(store, tmp_path):
    frame = run_table()
    want = sweep(TINY)
    pd.testing.assert_frame_equal(frame[want.columns.drop('preset')], want.drop(columns='preset'))
    export_table(tmp_path/'runs.csv')
    again = pd.read_csv(tmp_path/'runs.csv')
    assert list(again.run) == [store['finished']] and np.isclose(again.mse_test_decoder, frame.mse_test_decoder).all()
    with pytest.raises(ValueError, match='give .parquet or .csv'): export_table(tmp_path/'runs.xls')


def test_parquet_keeps_the_types(store, tmp_path):
    pytest.importorskip('pyarrow')
    export_table(tmp_path/'runs.parquet')
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path/'runs.parquet'), run_table())


def test_mlflow_has_every_run_once(store, tmp_path):
    mlflow = pytest.importorskip('mlflow')
    from cem_nb.runs import export_mlflow
    uri = f'sqlite:///{tmp_path}/m.db'
    assert export_mlflow(uri) == 1 and export_mlflow(uri) == 0
    client = mlflow.MlflowClient(uri)
    logged, = client.search_runs([client.get_experiment_by_name('cem_nb').experiment_id])
    want = run_table().iloc[0]
    assert logged.info.run_name == want.run and logged.data.metrics['mse_test_decoder'] == want.mse_test_decoder
    assert logged.data.params['lam'] == str(want.lam) and logged.info.status == 'FINISHED'


def test_room_is_made_for_what_was_asked_and_nothing_else(store, capsys):
    assert main(['runs', 'prune', 'stopped', 'damaged']) == 0
    assert 'would remove' in (said := capsys.readouterr().out) and '2 runs and attacks; nothing was removed' in said
    assert len(stored_runs()) == 4
    assert main(['runs', 'prune', 'stopped', 'damaged', '--yes']) == 0
    assert set(stored_runs().run) == {store['finished'], store['diverged']} and run(TINY).new is False
    with pytest.raises(ValueError, match='cannot be pruned'): prunable(['finished'])


def test_words_on_the_command_line(store, capsys):
    assert main(['runs', 'list']) == 0 and '4 in ' in capsys.readouterr().out
    assert main(['runs', 'list', 'diverged']) == 0 and store['diverged'] in (said := capsys.readouterr().out) and '1 in ' in said
    assert main(['runs', 'show', store['finished']]) == 0 and 'mse_test_decoder' in capsys.readouterr().out
    for name, message in (('none', 'there is no run none'), (store['damaged'], 'not as it was written'), (store['diverged'], 'lower lr')):
        assert main(['runs', 'show', name]) == 1
        said = capsys.readouterr().err
        assert message in said and said.count('\n') == 1
    assert main(['runs', 'verify', 'none']) == 1 and main(['runs', 'list', 'old']) == 1
    for bad in (['runs'], [], ['runs', 'prune'], ['runs', 'prune', 'finished']):
        with pytest.raises(SystemExit): main(bad)


def test_the_command_is_installed():
    done = subprocess.run([os.path.join(os.path.dirname(sys.executable), 'cem-nb'), '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and 'cem-nb runs verify' in done.stdout


def test_an_empty_store(capsys):
    assert main(['runs', 'list']) == 0 and 'no runs in' in capsys.readouterr().out
    for words in (['verify'], ['export', 'x.csv'], ['prune', 'damaged']):
        assert main(['runs', *words]) == 1 and 'there is no store at' in capsys.readouterr().err


def test_a_store_without_finished_runs_exports_nothing(tmp_path, capsys):
    runs_dir().mkdir(parents=True)
    (tmp_path/'last.csv').write_text('what was exported last')
    assert main(['runs', 'export', str(tmp_path/'last.csv')]) == 1 and 'no finished run' in capsys.readouterr().err
    assert (tmp_path/'last.csv').read_text() == 'what was exported last' and main(['runs', 'verify']) == 0
    assert '0 runs read in' in capsys.readouterr().out


def test_folders_of_others_are_left_alone(store):
    ours = runs_dir()/store['finished']
    for folder in (runs_dir()/'holiday_photos', ours/'my_notes', runs_dir()/'a-s1-notes'): (folder/'deep').mkdir(parents=True)
    assert not any('notes' in str(p) or 'photos' in str(p) for p in prunable(['damaged', 'stopped', 'diverged']))
    assert len(stored_runs()) == 4 and set(verify()) == {store['damaged']}
    assert open_run(store['finished']).result and store['finished'] in set(run_table().run)


def test_a_run_without_digests_may_be_of_an_earlier_version(store):
    (runs_dir()/store['finished']/'digests.json').unlink()
    assert store['finished'] in verify() and [p.name for p in prunable(['damaged'])] == [store['damaged']]


def test_a_foreign_attack_is_found_behind_a_newer_one_of_its_name():
    path = run(TINY).path
    exchanged(path)
    assert len(verify()) == 1
    run(TINY.replace(decoder__width=9))
    assert len(verify()) >= 1 and prunable(['damaged'])


def test_the_newest_attack_is_the_one_computed_last_whatever_a_copy_did_to_the_times():
    path = run(TINY).path
    time.sleep(1.1)
    run(TINY.replace(decoder__width=9))
    assert stored_attacks(path)['decoder']['width'] == 9
    old, = (p for p in attack_folders(path) if attack_width(p) == 8)
    os.utime(old, (time.time(), time.time() + 100))
    assert stored_attacks(path)['decoder']['width'] == 9


def attack_width(folder): return json.loads((folder/'config.json').read_text())['attack'].get('width')


def test_one_odd_result_stops_no_list(store):
    folder = runs_dir()/store['finished']
    from cem_nb.files import write_sealed
    files = {name: (folder/name).read_bytes() for name in ('weights.safetensors', 'config.json')}
    write_sealed(folder, files | {'result.json': b'[]'})
    assert list(stored_runs().state).count('damaged') == 2 and len(run_table()) == 0 and store['finished'] in verify()
