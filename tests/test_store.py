import json
import math
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

import cem_nb.store as ex
from cem_nb.data import DataError, runs_dir
from cem_nb.store import (DataConfig, DecoderConfig, GANConfig, OracleConfig, RunError, TableConfig, pick_device, run,
                                run_table)
from cem_nb.attack import AttackDivergedError
from cem_nb.training import CEMConfig, TrainConfig

TRAIN = dict(width=0.125, epochs=2, batch_size=64, lr=0.02)
DECODER = dict(width=8, blocks=0, n_epochs=2, batch_size=64)
GAN = dict(DECODER, critic_width=4)
TIMES = ['seconds_train', 'seconds_decoder', 'seconds_gan', 'date']


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(ex.PRESETS, 'quick', dict(data=dict(n_train=256), train=TRAIN, decoder=DECODER, gan=GAN))


def one(**kwargs): return run(TrainConfig(**TRAIN, **kwargs), DataConfig(n_train=256), (DecoderConfig(**DECODER),))


def test_a_run_that_exists_is_not_run_again(monkeypatch):
    first = one()
    monkeypatch.setattr(ex, 'train', None)
    monkeypatch.setattr(ex, 'train_decoder', None)
    again = one()
    assert first.new and not again.new and again.result == first.result and again.attack() == first.attack()


def test_a_second_attack_does_not_train_the_model_again(monkeypatch):
    first = one()
    monkeypatch.setattr(ex, 'train', None)
    both = run(first.config, first.data_config, (DecoderConfig(**DECODER), OracleConfig(n_images=20)))
    assert both.attack('oracle')['scores']['train']['mse'] < both.attack()['scores']['train']['mse']
    assert both.attack() == first.attack()


def test_runs_differ_when_configuration_or_pixels_do(monkeypatch):
    paths = {one(**k).path.name for k in (dict(), dict(seed=1), dict(noise_std=0.1), dict(cem=CEMConfig()))}
    assert len(paths) == 4 and sum(p.startswith('Bottleneck+CEM-s0-') for p in paths) == 1
    real = ex.load_data
    def altered(**k):
        d = real(**k); d.train.x[0, 0, 0, 0] += 1
        return d
    ex._data_on.cache_clear()
    monkeypatch.setattr(ex, 'load_data', altered)
    assert one().path.name not in paths


def test_stored_weights_are_those_that_were_scored():
    r = one()
    data = ex.load_data('digits', n_train=256)
    assert ex.accuracy(r.model(), data.test, seed=0) == r.result['accuracy']['test']
    assert ex.score_attack(r.model(), r.attacker(), data.test, seed=0) == r.attack()['scores']['test']


def test_damaged_weights_are_named():
    r = one()
    (r.path/'weights.safetensors').write_bytes(b'nothing')
    with pytest.raises(RunError, match='remove'): r.model()
    (r.path/'result.json').write_text('{')
    with pytest.raises(RunError, match='remove'): r.result


def test_full_disk_is_a_clear_error_and_costs_nothing(monkeypatch):
    def full(*a, **k): raise ex.SafetensorError('I/O error: No space left on device')
    with monkeypatch.context() as m:
        m.setattr(ex, 'save_file', full)
        with pytest.raises(RunError, match='free some space'): one()
    calls, real = [], ex.train
    def spying(*a, **k):
        calls.append(k['checkpoint'].is_file())
        return real(*a, **k)
    monkeypatch.setattr(ex, 'train', spying)
    assert one().new and calls == [True]  # from its checkpoint


def test_a_run_under_way_elsewhere_is_left_alone():
    config = TrainConfig(**TRAIN)
    _, fingerprint = ex._data_on(DataConfig(n_train=256), torch.device('cpu'))
    path = runs_dir()/f'{config.method}-s0-{ex._key(config.model_dump(mode="json"), fingerprint)}'
    (runs_dir()/'.locks').mkdir(parents=True)
    with ex.FileLock(runs_dir()/'.locks'/f'{path.name}.lock'):
        with pytest.raises(RunError, match='another process'): one()


def test_devices():
    assert pick_device('cpu').type == 'cpu'
    for bad in ('gpu', 'mps', *([] if torch.cuda.is_available() else ['cuda'])):
        with pytest.raises(RunError): pick_device(bad)


def test_table_has_every_row_and_its_provenance(tiny):
    scores, runs = run_table(TableConfig(attacks='decoder,gan,oracle'))
    assert len(scores) == len(runs) == 15
    assert set(zip(scores.method, scores.cem)) == set(runs) and ('No_defense', True) not in runs
    for a in ('decoder', 'gan'):
        assert scores[[f'{m}_{p}_{a}' for m in ('mse', 'ssim', 'psnr') for p in ('train', 'val', 'infer')]].notna().all().all()
    assert scores[scores.method != 'Dropout'].mse_train_oracle.notna().all()
    assert scores[['acc_test', 'hardware', 'torch', 'date', 'run', 'arch']].notna().all().all()
    for r in scores.itertuples():  # from the table back to the source
        stored = json.loads((runs_dir()/r.run/'result.json').read_text())
        assert stored['accuracy']['test']*100 == r.acc_test
        assert (json.loads((runs_dir()/r.run/'config.json').read_text())['train']['cem'] is not None) == r.cem
    again, _ = run_table(TableConfig(seeds='0,1', methods='Noise_ARL', attacks='gan'))
    assert len(again) == 4 and again.iloc[0].mse_infer_gan == scores[scores.method == 'Noise_ARL'].iloc[0].mse_infer_gan


def test_the_strongest_of_several_restarts_counts_and_validation_images_say_which(monkeypatch):
    real, seen = ex.score_attack, []
    def spying(model, attacker, images, **k):
        seen.append(len(images))
        return real(model, attacker, images, **k)
    monkeypatch.setattr(ex, 'score_attack', spying)
    r = run(TrainConfig(**TRAIN), DataConfig(n_train=256), (DecoderConfig(**DECODER, restarts=3),))
    record, data = r.attack(), ex.load_data('digits', n_train=256)
    mses = [x['mse'] for x in record['restarts']]
    assert len(set(mses)) == 3 and seen[:3] == [len(data.val)]*3
    assert record['scores']['val']['mse'] == min(mses) and record['chosen_on'] == 'val'
    assert one().attack()['scores']['val']['mse'] == mses[0]  # the first restart is the attack without restarts


def test_without_validation_images_the_attacker_chooses_on_its_own(monkeypatch):
    r = run(TrainConfig(**TRAIN), DataConfig(n_train=256, val_frac=0.0), (DecoderConfig(**DECODER, restarts=2),))
    record = r.attack()
    assert record['chosen_on'] == 'train' and 'val' not in record['scores']
    assert record['scores']['train']['mse'] == min(x['mse'] for x in record['restarts'])


def test_a_restart_without_a_finite_error_never_counts(monkeypatch):
    errors = iter([math.nan, 0.02, 0.01, math.inf])
    real = ex.score_attack
    def scored(model, attacker, images, **k):
        return dict(mse=next(errors, None)) if len(seen) < 4 and not seen.append(0) else real(model, attacker, images, **k)
    seen = []
    monkeypatch.setattr(ex, 'score_attack', scored)
    record = run(TrainConfig(**TRAIN), DataConfig(n_train=256), (DecoderConfig(**DECODER, restarts=4),)).attack()
    first, second, third, fourth = record['restarts']
    assert 'nan' in first['diverged'] and 'inf' in fourth['diverged'] and (second, third) == (dict(mse=0.02), dict(mse=0.01))
    assert record['scores']['test']['mse'] > 0


def test_a_decoder_attack_that_diverges_says_so():
    model = one().model()
    with pytest.raises(AttackDivergedError, match='decoder: not a number in epoch 1 .*lower lr'):
        ex.train_decoder(model, ex.load_data('digits', n_train=256).train, **(DECODER | dict(lr=1e30)))


def test_restarts_reach_the_trained_attacks_alone():
    _, _, attacks = TableConfig(restarts=3, attacks='decoder,gan,oracle').configs('Bottleneck', False, 0)
    assert [getattr(a, 'restarts', None) for a in attacks] == [3, 3, None]


def test_an_attack_that_diverges_is_a_result_and_the_other_restarts_count(monkeypatch, tiny):
    real, calls = ex.train_gan, []
    def failing(*a, **k):
        calls.append(k['seed'])
        if len(calls) in (1, 3, 4): raise AttackDivergedError('not a number in epoch 1')
        return real(*a, **k)
    monkeypatch.setattr(ex, 'train_gan', failing)
    args = TrainConfig(**TRAIN), DataConfig(n_train=256)
    r = run(*args, (GANConfig(**GAN, restarts=2),))
    first, second = r.attack('gan')['restarts']
    assert 'not a number' in first['diverged'] and second['mse'] == r.attack('gan')['scores']['val']['mse']
    assert ex.score_attack(r.model(), r.attacker('gan'), ex.load_data('digits', n_train=256).test, seed=0) == (
        r.attack('gan')['scores']['test'])
    s, runs = run_table(TableConfig(methods='Bottleneck', lam=0))  # this one has a single start, and it fails
    assert s.mse_infer_gan.isna().all() and s.ssim_infer_gan.isna().all() and s.mse_infer_decoder.notna().all()
    n = len(calls)
    run_table(TableConfig(methods='Bottleneck', lam=0))
    assert len(calls) == n  # it is in the store


def test_each_dataset_has_the_papers_schedule():
    def trained(**k):
        c, d, _ = TableConfig(preset='paper', **k).configs('Bottleneck', True, 0)
        return c.arch, c.epochs, c.batch_size, d.image_size
    assert trained(dataset='cifar10') == ('vgg11', 240, 128, None)
    assert trained(dataset='tinyimagenet', arch='resnet20') == ('resnet20', 120, 256, None)
    assert trained(dataset='facescrub') == ('vgg11', 240, 256, None)
    assert trained(dataset='folder:x', arch='resnet20_wide') == ('resnet20_wide', 120, 128, None)
    assert TableConfig(dataset='facescrub').configs('Bottleneck', True, 0)[0].epochs == ex.PRESETS['quick']['train']['epochs'] < 120
    assert trained(dataset='folder:x', image_size=48)[3] == 48
    gan, = TableConfig(preset='paper', attacks='gan').configs('Bottleneck', False, 0)[2]
    assert (gan.n_epochs, gan.lr, gan.penalty, gan.width, gan.blocks) == (150, 0.005, 10.0, 64, 8)


def test_lam_zero_gives_the_same_row_twice(tiny):
    s, _ = run_table(TableConfig(lam=0, methods='Bottleneck'))
    assert s.acc_test.nunique() == 1 and s.mse_infer_decoder.nunique() == 1


def test_a_diverged_row_does_not_take_the_others_with_it(tiny, monkeypatch):
    real = ex.train
    def failing(c, *a, **k):
        if c.method == 'DistCorr': raise ex.DivergedError('the loss is nan')
        return real(c, *a, **k)
    monkeypatch.setattr(ex, 'train', failing)
    s, runs = run_table(TableConfig(methods='DistCorr,Bottleneck'))
    assert len(runs) == 3 and s[(s.method == 'DistCorr') & ~s.cem].acc_test.isna().all() and s.acc_test.notna().sum() == 3


def test_bad_data_stops_before_training(tiny, monkeypatch):
    monkeypatch.setattr(ex, 'train', None)
    with pytest.raises(DataError): run_table(TableConfig(dataset='folder:/nowhere'))


SCRIPT = '''
import cem_nb.store as ex
ex.PRESETS['quick'] = dict(data=dict(n_train=256), train=dict(width=0.125, epochs=5, batch_size=32, lr=0.02),
                           decoder=dict(width=8, blocks=0, n_epochs=2, batch_size=64),
                           gan=dict(width=8, blocks=0, n_epochs=2, batch_size=64, critic_width=4))
scores, _ = ex.run_table(ex.TableConfig(methods='Bottleneck', lam=16))
scores.to_json('out.json')
'''


@pytest.mark.slow
def test_a_killed_process_loses_no_finished_run_and_ends_with_the_same_table(tmp_path):
    def start(store):
        (tmp_path/store).mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, '-c', SCRIPT], cwd=tmp_path/store, stdout=subprocess.PIPE, text=True,
                                env=os.environ | dict(CEM_RUNS=str(tmp_path/store/'runs')))
    assert start('whole').wait(240) == 0
    process = start('killed')
    runs, deadline = tmp_path/'killed'/'runs', time.time() + 240
    while not list(runs.glob('Bottleneck+CEM*.part/checkpoint.pt')):  # the second of two runs is in its epochs
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {p: p.stat().st_mtime_ns for p in runs.glob('Bottleneck-s0-*/**/*.json')}
    assert len(finished) == 6
    again = start('killed')
    assert again.wait(240) == 0 and 'stored' in again.stdout.read()
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    a, b = (pd.read_json(tmp_path/s/'out.json').drop(columns=TIMES) for s in ('whole', 'killed'))
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert not list(runs.glob('*.part'))
