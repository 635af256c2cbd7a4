"On a GPU: every row of Table 1 trains, is attacked and is stored there, repeats to the last digit, and agrees with the CPU."
from contextlib import contextmanager

import pytest
import torch

from cem_nb import training
from cem_nb.attack import ATTACKS, attack_from
from cem_nb.cem import CEM
from cem_nb.data import batches
from cem_nb.datasets import load_data
from cem_nb.engine import EngineSettings, all_digits, in_words
from cem_nb.experiment import preset
from cem_nb.kmeans import BLOCK_ON_GPU, LARGE
from cem_nb.mixture import GaussianMixture
from cem_nb.parameters import TableParameters, table_rows
from cem_nb.store import data_on, run
from cem_nb.sweep import sweep
from test_waits import ROWS, TRAINED, step_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
CUDA = torch.device('cuda', 0)
TINY = dict(n_train=300, epochs=2, width=0.125, decoder__n_epochs=1, gan__n_epochs=1)


def tiny(**settings): return preset('quick', **TINY | settings)


ENGINES = [dict(), dict(precision='bf16'), dict(precision='bf16', compile=True)]
COMPILED = [('Bottleneck', True), ('ResSFL', False), ('Noise_ARL', False)]  # to compile takes minutes
CASES = [(row, s) for s in ENGINES for row in table_rows(TableParameters())
         if 'compile' not in s or (row['defense'], 'lam' in row) in COMPILED]


def computed_anew(folder, monkeypatch):
    "Nothing is found that was computed, or compiled, before."
    monkeypatch.setenv('CEM_RUNS', str(folder/'runs'))
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(folder/'kernels'))
    torch._dynamo.reset()


@pytest.mark.parametrize(('row', 'settings'), CASES, ids=lambda v: '-'.join(map(str, v.values())) or 'float32')
def test_every_row(row, settings, tmp_path, monkeypatch):
    first = sweep(tiny(**settings), [row], device='cuda')
    assert first.filter(regex='acc_|mse_').notna().all(axis=None)
    assert first.hardware[0] == torch.cuda.get_device_name() + in_words(EngineSettings(**settings), CUDA)
    computed_anew(tmp_path, monkeypatch)
    again = sweep(tiny(**settings), [row], device='cuda')
    measured = [c for c in first if c.startswith(('acc_', 'mse_', 'ssim_', 'psnr_', 'l_'))]
    assert measured and (first[measured] == again[measured]).all(axis=None)


@pytest.mark.parametrize('settings', ENGINES, ids=lambda v: '-'.join(map(str, v.values())) or 'float32')
def test_resumed(settings, tmp_path, monkeypatch):
    e = tiny(lam=16.0, epochs=3, **settings)
    whole = run(e, CUDA)
    computed_anew(tmp_path, monkeypatch)
    honest, seen = training.train_epoch, []
    def cut(*args):
        if args[-1] == 2 and not seen: seen.append(1); raise KeyboardInterrupt
        return honest(*args)
    monkeypatch.setattr(training, 'train_epoch', cut)
    with pytest.raises(KeyboardInterrupt): run(e, CUDA)
    resumed = run(e, CUDA)
    assert seen and resumed.result['resumed'] and not whole.result['resumed']
    assert resumed.result['accuracy'] == whole.result['accuracy']
    assert resumed.attack('decoder')['scores'] == whole.attack('decoder')['scores']


@pytest.mark.parametrize('name', ATTACKS)
def test_scored_as_on_the_cpu(name):
    "The same weights and images, and noise of the same law: scores agree within its spread."
    attack = attack_from(dict(name=name) | (dict(width=16, blocks=1, n_epochs=1) if ATTACKS[name].trained else {}))
    found = run(preset('quick', (attack,), **{k: v for k, v in TINY.items() if '__' not in k}), CUDA)
    data, _ = data_on(found.experiment.data, torch.device('cpu'))
    model = found.model('cpu')
    cpu = attack.score(found.attacker(name, model), model, data.test, seed=0)
    gpu = found.attack(name)['scores']['test']
    assert cpu['mse'] == pytest.approx(gpu['mse'], rel=0.02) and cpu['ssim'] == pytest.approx(gpu['ssim'], abs=0.02)


def test_regulariser():
    "L_C, its gradient and the mixture on the GPU are those of the CPU."
    torch.manual_seed(0)
    z, y = torch.randn(512, 8, 4, 4), torch.arange(512) % 4
    found = []
    for device in ('cpu', 'cuda'):
        cem = CEM(noise_std=0.1, n_classes=4, n_epochs=5).to(device)
        x = z.to(device).clone().requires_grad_()
        cem.fit_encoder(lambda t: t, [(x.detach(), y.to(device))])
        cem(x, y.to(device)).backward()
        found.append((cem.l_c.cpu(), x.grad.cpu()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0.05, atol=0.05)
    assert torch.cosine_similarity(found[0][1].flatten(), found[1][1].flatten(), 0) > 0.95


@contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode('error')
    try: yield
    finally: torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize(('name', 'variant'), ROWS, ids=lambda s: s or 'alone')
def test_a_step_does_not_wait(name, variant):
    step, _ = step_of(load_data('digits'), name, variant, CUDA)
    for _ in range(3): step()  # cuDNN looks around first
    with waiting_is_an_error(): step()


@pytest.mark.parametrize('name', TRAINED)
def test_a_step_of_an_attack_does_not_wait(name):
    data, attack = load_data('digits'), attack_from(dict(name=name, width=8, blocks=1))
    model, train = training.build(preset('quick', width=0.125), data)[1].eval().to(CUDA), data.train.to(CUDA)
    _, step = attack.training(attack.attacker(model, train), model, train, 0)
    found = batches(train, 64, data.augment, shuffle=True)
    x, _ = next(found)
    for _ in range(3): step(x, model.smash(x).detach())
    with waiting_is_an_error():
        x, _ = next(found)
        step(x, model.smash(x).detach())


@pytest.mark.parametrize('settings', [dict(precision='bf16'), dict(compile=True), dict(precision='bf16', compile=True)])
def test_a_run_as_the_engine_is_set(settings):
    "It says how it was computed, and its first epoch, which noise and rounding have not led astray yet, is that of float32."
    plain, other = run(tiny(lam=16.0), CUDA), run(tiny(lam=16.0, **settings), CUDA)
    assert other.result['hardware'] == torch.cuda.get_device_name() + in_words(EngineSettings(**settings), CUDA) != plain.result['hardware']
    a, b = (r.result['curves'][0]['loss'] for r in (plain, other))
    assert a != b and b == pytest.approx(a, rel=0.05)


def test_convolutions_keep_all_digits_in_scores():
    net, x = torch.nn.Conv2d(256, 256, 3, device=CUDA), torch.rand(8, 256, 16, 16, device=CUDA)
    with torch.no_grad():
        with all_digits(CUDA): got = net(x)
        assert (got - net.double()(x.double())).abs().max() < 5e-5


def test_a_fit_of_large_features_is_that_of_the_cpu():
    "Of more than a GPU takes at a time, and more than float64 is used for."
    assert 200_000*64 > 2*max(LARGE, BLOCK_ON_GPU)
    centres = 2*torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x = centres.repeat(40_000, 1) + torch.randn(200_000, 64, generator=torch.Generator().manual_seed(1))
    cpu, gpu = (GaussianMixture(5, max_iter=10, random_state=0).fit(x.to(d)) for d in ('cpu', CUDA))
    torch.testing.assert_close(gpu.means_.cpu(), cpu.means_, rtol=0, atol=1e-5)
    torch.testing.assert_close(gpu.covariances_.cpu(), cpu.covariances_, rtol=1e-4, atol=0)
    assert gpu.lower_bound_ == pytest.approx(cpu.lower_bound_, abs=1e-4)


def test_two_runs_share_the_gpu():
    points = [dict(), dict(lam=16.0)]
    one, two = (sweep(tiny(seed=seed), points, device='cuda', n_jobs=n) for seed, n in ((0, 1), (1, 2)))
    assert two.acc_test.notna().all() and (two.hardware == one.hardware).all()
