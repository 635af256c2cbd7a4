import json
import math
import os
import runpy
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image

import cem_nb.files
import cem_nb.store as store
import cem_nb.training as training
from cem_nb.attack import ATTACKS, AttackDivergedError, score_attack
from cem_nb.core import provenance, runs_dir
from cem_nb.data import DataError
from cem_nb.datasets import load_data
from cem_nb.decoder import DecoderAttack
from cem_nb.defense import DEFENSES, Method
from cem_nb.engine import pick_device
from cem_nb.experiment import Experiment
from cem_nb.files import write_sealed
from cem_nb.gan import GAN
from cem_nb.models import NETWORKS, Network
from cem_nb.oracle import Oracle
from cem_nb.runs import verify
from cem_nb.store import RunError, open_run, run, run_path
from cem_nb.sweep import measured
from cem_nb.training import DivergedError

DECODER = DecoderAttack(width=8, blocks=0, n_epochs=2, batch_size=64)
TINY = Experiment(attacks=(DECODER,)).replace(n_train=256, width=0.125, epochs=2, batch_size=64, lr=0.02)


def one(**settings): return run(TINY.replace(**settings))


def never(*args, **kwargs): raise AssertionError('computed again')


def test_a_run_that_exists_is_not_run_again(monkeypatch):
    first = one()
    for name in ('train', 'best_of_restarts'): monkeypatch.setattr(store, name, never)
    again = one()
    assert first.new and not again.new and again.result == first.result and again.attack('decoder') == first.attack('decoder')


def test_a_second_attack_does_not_train_the_model_again(monkeypatch):
    first = one()
    monkeypatch.setattr(store, 'train', never)
    both = one(attacks=(DECODER, Oracle(n_images=20)))
    assert both.attack('oracle')['scores']['train']['mse'] < both.attack('decoder')['scores']['train']['mse']
    assert both.attack('decoder') == first.attack('decoder') and both.new


def test_runs_differ_when_settings_or_pixels_do(monkeypatch):
    paths = {one(**k).path.name for k in (dict(), dict(seed=1), dict(noise_std=0.1), dict(cem=True))}
    assert len(paths) == 4 and sum(p.startswith('Bottleneck+CEM-s0-') for p in paths) == 1
    assert one(decoder__width=4).path.name in paths  # an attack has no part in it
    real = store.shared_data
    def altered(**k):
        d = real(**k)
        x = d.train.x.clone(); x[0, 0, 0, 0] += 1
        return replace(d, train=replace(d.train, x=x))
    monkeypatch.setattr(store, 'shared_data', altered)
    assert one().path.name not in paths


def test_stored_weights_are_those_that_were_scored():
    r, data = one(attacks=(DECODER, Oracle(n_images=20))), load_data('digits', n_train=256)
    assert store.accuracy(r.model(), data.test, seed=0) == r.result['accuracy']['test']
    assert score_attack(r.model(), r.attacker('decoder'), data.test, seed=0) == r.attack('decoder')['scores']['test']
    assert Oracle(n_images=20).score(r.attacker('oracle'), r.model(), data.test, seed=0) == r.attack('oracle')['scores']['test']


def test_a_run_is_found_by_its_name():
    r = one(attacks=(DECODER, Oracle(n_images=20)), cem=True)
    again = open_run(r.path.name)
    assert set(again.experiment.attacks) == set(r.experiment.attacks)
    assert again.experiment.replace(attacks=()) == r.experiment.replace(attacks=()) and again.result == r.result
    x, rebuilt = again.examples(5)
    assert set(rebuilt) == {'decoder', 'oracle'} and all(v.shape == x.shape == (5, 1, 16, 16) for v in rebuilt.values())
    with pytest.raises(RunError, match='compute it first'): open_run('Bottleneck-s0-0')
    with pytest.raises(RunError, match="by 'gan'"): again.attack('gan')


@pytest.mark.parametrize('name', ['', '.', '..', '../runs', '.locks', 'x.part', 'x'*999, '\0'])
def test_what_is_no_run_is_not_said_to_be_damaged(name):
    "Or the remedy would be to remove the whole store."
    one()
    (runs_dir()/'x.part').mkdir()
    for read in (open_run, lambda n: verify([n])):
        with pytest.raises(RunError, match='there is no run') as e: read(name)
        assert 'remove' not in str(e.value)


def test_a_folder_that_some_program_keeps_beside_the_attacks_is_none_of_them():
    "As Jupyter does for files that were looked at."
    r = one()
    (r.path/'.ipynb_checkpoints').mkdir()
    assert open_run(r.path.name).attack('decoder') == r.attack('decoder') and verify() == {}


def test_a_run_of_a_defence_that_is_not_imported_says_so_in_a_line(monkeypatch):
    r = one()
    monkeypatch.delitem(DEFENSES, 'Bottleneck')
    with pytest.raises(RunError, match="no defence 'Bottleneck'; .*import what registers them") as e: open_run(r.path.name)
    assert '\n' not in str(e.value)


def test_a_run_that_was_attacked_twice_is_opened_with_the_attack_that_is_asked_for():
    one(attacks=(DECODER, Oracle(n_images=20)))
    r = one(decoder__width=4)
    assert {a.name for a in open_run(r.path.name).experiment.attacks} == {'decoder', 'oracle'}
    first = open_run(r.path.name, (DECODER,))
    assert first.experiment.attacks == (DECODER,) and first.attack('decoder') != r.attack('decoder')


def test_damaged_files_are_named():
    r = one()
    (r.path/'weights.safetensors').write_bytes(b'nothing')
    with pytest.raises(RunError, match='remove'): r.model()
    (r.path/'result.json').write_text('{')
    with pytest.raises(RunError, match='remove'): r.result


@pytest.mark.parametrize('harm, message', [
    (lambda a, b: replaced_by(a.path, b.path), 'holds Bottleneck[+]CEM-s0'),
    (lambda a, b: rewritten(a.path/'config.json', lambda c: c['experiment']['training'].update(lr=0.05)), 'holds Bottleneck-s0'),
    (lambda a, b: rewritten(a.path/'config.json', lambda c: c.update(fingerprint='0')), 'holds Bottleneck-s0'),
    (lambda a, b: rewritten(a.path/'config.json', lambda c: c.pop('experiment')), 'this version cannot read'),
    (lambda a, b: rewritten(a.path/'config.json', lambda c: c.update(experiment=[])), 'this version cannot read'),
    (lambda a, b: rewritten(attacked(a)/'config.json', lambda c: c.pop('victim')), 'on other weights'),
    (lambda a, b: (a.path/'config.json').unlink(), 'config.json is missing'),
    (lambda a, b: (a.path/'digests.json').unlink(), 'digests.json is missing'),
    (lambda a, b: instead_of(a.path/'digests.json', Path.mkdir), 'digests.json is not as it was written'),
    (lambda a, b: instead_of(a.path/'result.json', os.mkfifo), 'result.json is no file'),
    (lambda a, b: edited(a.path/'result.json', '"test": 0', '"test": 0.9'), 'result.json is not as it was written'),
    (lambda a, b: edited(attacked(a)/'result.json', '"mse": 0', '"mse": -0'), 'result.json is not as it was written'),
    (lambda a, b: edited(attacked(a)/'config.json', '"width": 8', '"width": 16'), 'config.json is not as it was written'),
    (lambda a, b: replaced_by(attacked(a), attacked(b)), 'on other weights'),
    (lambda a, b: attacked(a).rename(attacked(a).with_name('decoder-000000000000')), None),
])
def test_the_store_believes_nothing(harm, message):
    a, b = one(), one(cem=True)
    want = measured(a)
    harm(a, b)
    if message is None: assert one().new  # not where it belongs, so it is not there
    else:
        with pytest.raises(RunError, match=message) as e: measured(one())
        assert 'remove' in str(e.value) and '\n' not in str(e.value)
        shutil.rmtree(a.path)
        again = measured(one())
        assert {k: v for k, v in again.items() if 'seconds' not in k} == {k: v for k, v in want.items() if 'seconds' not in k}


def attacked(r): return next(r.path.glob('decoder-*'))


def instead_of(path, make):
    path.unlink()
    make(path)


def replaced_by(path, other):
    shutil.rmtree(path)
    shutil.copytree(other, path)


def edited(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def rewritten(path, change):
    "As a program would that knows of the digests."
    files = {p.name: p.read_bytes() for p in path.parent.iterdir() if p.is_file() and p.name != 'digests.json'}
    content = json.loads(files[path.name])
    change(content)
    write_sealed(path.parent, files | {path.name: json.dumps(content).encode()})


def test_what_cannot_be_read_just_now_is_not_to_be_removed(monkeypatch):
    r = one()
    def busy(*a): raise OSError(24, 'Too many open files')
    for module in (cem_nb.files, store): monkeypatch.setattr(module, 'read_sealed', busy)
    for read in (lambda: r.result, lambda: r.attack('decoder'), r.model, one):
        with pytest.raises(RunError, match='start again: nothing is wrong') as e: read()
        assert 'remove' not in str(e.value)


def test_images_that_changed_are_not_taken_for_those_of_the_run(tmp_path):
    shades = torch.Generator().manual_seed(0)
    for part in ('train', 'test'):
        for c in 'ab':
            (tmp_path/'f'/part/c).mkdir(parents=True)
            for i in range(24):
                x = torch.randint(0, 256, (16, 16), dtype=torch.uint8, generator=shades).numpy()
                Image.fromarray(x).save(tmp_path/'f'/part/c/f'{i}.png')
    settings = dict(dataset=f'folder:{tmp_path}/f', n_train=None, batch_size=16, epochs=1)
    r = one(**settings)
    r.model()
    Image.new('L', (16, 16), 3).save(tmp_path/'f'/'train'/'a'/'0.png')
    for read in (r.model, r.examples, lambda: r.attacker('decoder')):
        with pytest.raises(RunError, match='computed on other images'): read()
    assert one(**settings).path != r.path


def test_divergence_is_a_result_too(monkeypatch):
    lost = dict(lr=1e30, batch_size=4096)
    with pytest.raises(DivergedError, match='lower lr'): one(**lost)
    monkeypatch.setattr(store, 'train', never)
    for attacks in ((DECODER,), ()):
        with pytest.raises(DivergedError, match='lower lr') as e: one(**lost, attacks=attacks)
    assert not list(runs_dir().glob('*.part'))
    found = open_run(next(runs_dir().glob('Bottleneck-*')).name)
    for read in (lambda: found.result, found.model):
        with pytest.raises(DivergedError): read()


def test_a_last_rename_that_fails_loses_no_epoch(monkeypatch):
    want, calls, replace_ = measured(one()), [], os.replace
    shutil.rmtree(runs_dir())
    def failing(a, b):
        if str(a).endswith('.part') and os.path.isdir(a): raise OSError(5, 'Input/output error')
        replace_(a, b)
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', failing)
        with pytest.raises(RunError, match='free some space'): one()
    real = training.train_epoch
    monkeypatch.setattr(training, 'train_epoch', lambda *a: (calls.append(1), real(*a))[1])
    got = measured(one())
    assert not calls and got['resumed_train'] and not got['resumed_decoder'] and not list(runs_dir().rglob('checkpoint*'))
    assert all(got[k] == want[k] for k in want if 'seconds' not in k and 'resumed' not in k)


def test_a_file_where_a_run_belongs_is_said_before_the_training(monkeypatch):
    path = one(attacks=()).path
    shutil.rmtree(path)
    path.write_text('x')
    monkeypatch.setattr(store, 'train', never)
    with pytest.raises(RunError, match='is no folder'): one()


def test_seconds_hardware_and_versions_of_a_resumed_run_are_those_of_all_sessions(monkeypatch):
    class Stop(Exception): pass
    def first_epoch_only(*a, **k):
        if k.get('epoch', a[-1]): raise Stop
        time.sleep(0.5)
        return real(*a, **k)
    real, elsewhere = training.train_epoch, dict(hardware='another machine', torch='2.11.0', cem_nb='0.1.9')
    with monkeypatch.context() as m:
        m.setattr(training, 'train_epoch', first_epoch_only)
        m.setattr('cem_nb.engine.provenance', lambda device: provenance(device) | elsewhere)
        with pytest.raises(Stop): one()
    done = one()
    here = provenance(torch.device('cpu'))
    assert all(done.result[k].split('; ') == [v, here[k]] for k, v in elsewhere.items())
    assert done.result['python'] == here['python']
    row = measured(done)
    assert row['resumed_train'] and not row['resumed_decoder'] and row['seconds_train'] >= 0.5
    assert all(row[k] == done.result[k] for k in elsewhere)  # the decoder's, which is one of the two, is not said again


def test_full_disk_is_a_clear_error_and_costs_nothing(monkeypatch):
    def full(*a, **k): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(store, 'write_sealed', full)
        with pytest.raises(RunError, match='free some space'): one()
    calls, real = [], store.train
    def spying(*a, **k):
        calls.append(k['checkpoint'].is_file())
        return real(*a, **k)
    monkeypatch.setattr(store, 'train', spying)
    assert one().new and calls == [True]  # from its checkpoint


def test_a_run_under_way_elsewhere_is_left_alone():
    path = run_path(TINY, store.data_on(TINY.data, torch.device('cpu'))[1])
    (runs_dir()/'.locks').mkdir(parents=True)
    with FileLock(runs_dir()/'.locks'/f'{path.name}.lock'):
        with pytest.raises(RunError, match='another process'): one()


def test_sizes_that_do_not_fit_stop_before_the_training(monkeypatch):
    monkeypatch.setattr(store, 'train', never)
    with pytest.raises(ValueError, match='power of 2'): one(image_size=20, cut=4)


def test_devices():
    assert pick_device('cpu').type == 'cpu'
    for bad in ('gpu', 'mps', *([] if torch.cuda.is_available() else ['cuda'])):
        with pytest.raises(RunError): pick_device(bad)


def test_the_best_of_several_restarts_counts_and_is_what_is_stored():
    r = one(decoder__restarts=3)
    record = r.attack('decoder')
    mses = [x['mse'] for x in record['restarts']]
    assert len(set(mses)) == 3 and record['scores']['val']['mse'] == min(mses) and record['chosen_on'] == 'val'
    assert one().attack('decoder')['scores']['val']['mse'] == mses[0]  # the first restart is the attack without restarts
    assert score_attack(r.model(), r.attacker('decoder'), load_data('digits', n_train=256).val, seed=0)['mse'] == min(mses)


def test_without_validation_images_the_attacker_chooses_on_its_own():
    record = one(val_frac=0.0, decoder__restarts=2).attack('decoder')
    assert record['chosen_on'] == 'train' and 'val' not in record['scores']
    assert record['scores']['train']['mse'] == min(x['mse'] for x in record['restarts'])


def test_an_attack_that_diverges_is_a_result(monkeypatch):
    def lost(self, *args, **kwargs): raise AttackDivergedError('not a number in epoch 1')
    monkeypatch.setattr(GAN, 'fit', lost)
    attacks = DECODER, GAN(width=8, blocks=0, n_epochs=2, batch_size=64, critic_width=4)
    r = one(attacks=attacks)
    assert not r.attack('gan')['finished'] and all(map(math.isnan, r.attack('gan')['scores']['test'].values()))
    assert 'not a number' in r.attack('gan')['restarts'][0]['diverged'] and set(r.examples(2)[1]) == {'decoder'}
    monkeypatch.setattr(store, 'best_of_restarts', never)
    assert not one(attacks=attacks).new  # it is in the store


def test_what_is_stored_says_what_it_is():
    r = one(cem=True)
    config = json.loads((r.path/'config.json').read_text())
    assert config['experiment']['cem']['lam'] == r.experiment.cem.lam and config['experiment']['seed'] == 0
    assert {'hardware', 'python', 'torch', 'cem_nb', 'date', 'seconds', 'curves'} <= set(r.result)
    assert not list(runs_dir().glob('**/*.part')) and os.listdir(r.path/'..')


MINE = """
from functools import cached_property
import torch
from torch import nn
from cem_nb.defense import Defense
class Mine(Defense):
    {0}
    def loss(self, x, y, z_hat, z, logits): return {1}*z_hat.square().mean()
"""


def test_code_of_ones_own_is_part_of_a_runs_name(tmp_path, monkeypatch):
    fingerprint, paths = store.data_on(TINY.data, torch.device('cpu'))[1], []
    for i, (attribute, weight) in enumerate([
            ('a = 1', 0.1), ('a = 1', 0.1), ('a = 1', 0.2), ('a = 2', 0.1), ('bottleneck = None', 0.1), ('a = [1, 2]', 0.1),
            ('a = [1, 3]', 0.1), ('a = {2: {3, 4}}', 0.1), ('class a: b = 1', 0.1), ('class a: b = 2', 0.1),
            ('a = nn.ReLU', 0.1), ('a = nn.GELU', 0.1), ('a = torch.relu', 0.1), ('a = torch.sigmoid', 0.1),
            ('a = cached_property(lambda self: 1)', 0.1), ('a = cached_property(lambda self: 2)', 0.1)]):
        file = tmp_path/f'mine{i}.py'
        file.write_text(MINE.format(attribute, weight))
        monkeypatch.setitem(DEFENSES, 'Mine', Method(runpy.run_path(str(file))['Mine'], {}))
        paths.append(run_path(TINY.replace(defense='Mine'), fingerprint))
    assert paths[0] == paths[1] and len(set(paths)) == len(paths) - 1


def test_what_a_network_was_registered_with_is_part_of_a_runs_name(monkeypatch):
    half, paths = NETWORKS['resnet20'].halves, []
    for cut, channels in ((1, (8, 8, 8)), (1, (8, 8, 8)), (2, (8, 8, 8)), (1, (8, 8, 16))):
        monkeypatch.setitem(NETWORKS, 'mine', Network(partial(half.func, channels=channels), cut))
        paths.append(run_path(TINY.replace(arch='mine'), 'f'))
    assert paths[0] == paths[1] and len(set(paths)) == 3


def test_an_error_of_ones_own_is_not_taken_for_a_full_disk(monkeypatch):
    def fit(*args, **kwargs): open('/nowhere/prior.pt')
    monkeypatch.setattr(DecoderAttack, 'fit', fit)
    with pytest.raises(FileNotFoundError, match='prior.pt'): one()


def test_an_attack_that_is_not_registered_any_more_has_a_name(monkeypatch):
    found = one()
    monkeypatch.delitem(ATTACKS, 'decoder')
    with pytest.raises(RunError, match='attacked by decoder'): open_run(found.path.name)


def test_a_run_says_where_its_attacks_were_computed(monkeypatch):
    one(attacks=())
    monkeypatch.setattr('cem_nb.engine.provenance', lambda device: provenance(device) | dict(hardware='another machine'))
    here, there = measured(one())['hardware'].split('; ')
    assert there == 'another machine' and here == provenance(torch.device('cpu'))['hardware']


def test_code_that_cannot_be_read_is_warned_of(monkeypatch):
    space = {}
    exec(MINE.format('a = 1', 0.1), space)
    monkeypatch.setitem(DEFENSES, 'Mine', Method(space['Mine'], {}))
    with pytest.warns(UserWarning, match='would go unnoticed'): run_path(TINY.replace(defense='Mine'), 'f')


def test_what_a_kill_right_after_the_rename_leaves_is_removed_by_the_next_start():
    run = one()
    strays = [run.path/'checkpoint.pt', run.path/'checkpoint.pt.0123.tmp', attacked(run)/'checkpoint-0.pt']
    for p in strays: p.write_bytes(b'x')
    assert not one().new and not any(p.exists() for p in strays)


def stopped(at, **settings):
    "The folder of a run that was stopped after so many epochs."
    class Stop(Exception): pass
    def dying(label, n):
        if n == at: raise Stop
    from cem_nb.loop import Progress
    Progress.listeners.append(dying)
    try:
        with pytest.raises(Stop): one(**settings)
    finally: Progress.listeners.remove(dying)
    return max(runs_dir().glob('*.part'), key=lambda p: p.stat().st_mtime)


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_begun_again(monkeypatch):
    import cem_nb.loop as loop
    part = stopped(3, epochs=4)
    def busy(path): raise OSError(24, 'Too many open files')
    with monkeypatch.context() as m:
        m.setattr(loop, 'read_stamped', busy)
        with pytest.raises(RunError, match='cannot be read just now.*nothing is wrong'): one(epochs=4)
    assert loop.epochs_in(part/'checkpoint.pt') == 3
    resumed = one(epochs=4)
    assert resumed.result['resumed'] and len(resumed.result['curves']) == 4


def test_a_checkpoint_of_another_run_is_not_gone_on_from():
    theirs = stopped(2, epochs=4, lr=0.05)
    data = store.data_on(TINY.data, torch.device('cpu'))[1]
    mine = run_path(TINY.replace(epochs=4, seed=1, attacks=()), data)
    theirs.rename(mine.with_name(mine.name + '.part'))
    again = lambda: one(epochs=4, seed=1, attacks=()).model().state_dict()
    with pytest.warns(UserWarning, match='of another training.*starting from the first epoch'): got = again()
    shutil.rmtree(mine)
    clean = again()
    assert all(torch.equal(got[k], clean[k]) for k in clean)


def test_a_damaged_checkpoint_is_put_aside(monkeypatch):
    part = stopped(1, epochs=3, attacks=())
    with (part/'checkpoint.pt').open('ab') as f: f.write(b'x')
    with pytest.warns(UserWarning, match='starting from the first epoch'): stopped(2, epochs=3, attacks=())
    assert (part/'checkpoint.bad').is_file()
    assert not [*one(epochs=3, attacks=()).path.glob('checkpoint*')]


def test_weights_that_memory_lacks_are_not_said_to_misfit(monkeypatch):
    r = one()
    def full(data): raise MemoryError('Unable to allocate 123 MiB')
    monkeypatch.setattr(store.safetensors, 'load', full)
    with pytest.raises(MemoryError): r.model()


def test_a_run_is_opened_where_its_images_are_now(tmp_path, monkeypatch):
    for part, c, i in ((p, c, i) for p in ('train', 'test') for c in 'ab' for i in range(12)):
        path = tmp_path/'first'/part/c/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (16, 16), (9*i, 50*(c == 'a'), 100*(part == 'test'))).save(path)
    e = Experiment(attacks=(DECODER,)).replace(dataset=f'folder:{tmp_path}/first', width=0.125, epochs=1, batch_size=8, lr=0.02)
    name = run(e).path.name
    (tmp_path/'first').rename(tmp_path/'second')
    moved = e.replace(dataset=f'folder:{tmp_path}/second')
    assert not run(moved).new
    with pytest.raises(DataError, match='first does not exist'): open_run(name, e.attacks).examples(2)
    assert open_run(name, e.attacks, moved.data).examples(2)[0].shape == (2, 3, 16, 16)


def test_data_that_change_while_a_sweep_runs_stop_it():
    with pytest.raises(DataError, match='changed since the sweep began'): run(TINY, expected='another')


@pytest.mark.parametrize('variant, message', [('diag', '20 images for a mixture of 30 components'),
                                              ('release', 'class . has . images for 5 clusters')])
def test_too_few_images_for_the_mixture_are_noticed_before_anything_is_trained(variant, message, monkeypatch):
    monkeypatch.setattr(store, 'train', never)
    with pytest.raises(ValueError, match=message): one(n_train=20, val_frac=0.0, cem=True, variant=variant)


def test_a_file_where_an_attack_belongs_is_noticed_before_the_sweep():
    r = one()
    attack, = store.attack_folders(r.path)
    shutil.rmtree(attack)
    attack.write_text('')
    data = store.data_on(TINY.data, torch.device('cpu'))[1]
    with pytest.raises(RunError, match='is no folder'): store.check_stored(TINY, data)


@pytest.mark.parametrize('name', ['Noise/Mine', 'Bottleneck+CEM', '.hidden', 'a'*61, '', 'é'])
def test_names_that_files_cannot_have_are_refused_where_they_are_given(name):
    with pytest.raises(ValueError, match='cannot be called'): DEFENSES[name] = DEFENSES['Bottleneck']
    assert name not in DEFENSES


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert pick_device('cuda:1').index == 1
    with pytest.raises(RunError, match='there are 2 CUDA devices'): pick_device('cuda:7')
