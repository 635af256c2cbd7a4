"In which precision networks run, and what does not depend on it."
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from cem_nb import engine as engine_module
from cem_nb.attack import score_attack, train_attack
from cem_nb.cem import CEM
from cem_nb.data import batches
from cem_nb.datasets import load_data
from cem_nb.decoder import DecoderAttack
from cem_nb.defense import make_defense
from cem_nb.engine import EngineSettings, all_digits, can_compile, engine, full_precision, has_bf16, in_words, networks, using
from cem_nb.experiment import Experiment
from cem_nb.files import RunError
from cem_nb.gan import GAN
from cem_nb.loop import epochs, one_cycle
from cem_nb.models import split_model
from cem_nb.store import run, run_path
from cem_nb.training import accuracy, lr_at, train

BF16 = EngineSettings(precision='bf16')
CPU, HAS_BF16 = torch.device('cpu'), has_bf16
TINY = Experiment().replace(width=0.125, epochs=3, batch_size=64, lr=0.02)


@pytest.fixture(autouse=True)
def bf16_everywhere(monkeypatch):  # put together from other instructions where the processor has none
    monkeypatch.setattr(engine_module, 'has_bf16', lambda kind: True)


@pytest.fixture(scope='module')
def digits(): return load_data('digits', n_train=512)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))


def test_networks_run_in_the_precision_that_is_set_where_a_gradient_is_taken_and_nowhere_else():
    net, x, seen = small_net(), torch.rand(2, 3, 8, 8), []
    net[0].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    exact = net(x)
    with using(BF16), engine(net, device=CPU):
        fast = net(x)
        with torch.no_grad(): assert torch.equal(net(x), exact)
    assert seen == [torch.float32, torch.bfloat16, torch.float32] and fast.dtype == torch.float32
    assert 1e-4 < ((fast - exact).norm()/exact.norm()).item() < 2e-2
    assert torch.equal(net(x), exact) and 'forward' not in vars(net)


def test_nothing_is_left_of_it_after_an_error_or_an_interrupt():
    net, x = small_net(), torch.rand(2, 3, 8, 8)
    with pytest.raises(KeyboardInterrupt), using(BF16), engine(net, device=CPU): raise KeyboardInterrupt
    assert 'forward' not in vars(net) and net(x).dtype == torch.float32
    with using(BF16):
        for _ in epochs(2, state=dict(net=net), history=[], seed=0, stage='s'):
            assert 'forward' in vars(net)
            break  # a loop that is left in the middle
        assert 'forward' not in vars(net)
    with engine(net, device=CPU): assert 'forward' not in vars(net)  # `using` is over


def test_a_split_model_is_two_networks_and_the_noise_between_them_is_float32():
    model, x, sent = split_model(width=0.125), torch.rand(4, 3, 32, 32), []
    model.server.register_forward_pre_hook(lambda m, args: sent.append(args[0].dtype))
    with using(BF16), engine(model, device=CPU): z_hat = model.encode(x); model.server(model.send(z_hat))
    assert z_hat.dtype == torch.float32 and sent == [torch.float32]
    assert networks(model) == (model.encoder, model.server)
    assert networks(CEM(noise_std=0.1, n_classes=2, n_epochs=1)) == ()


@pytest.mark.parametrize('name', ['PATROL', 'ResSFL', 'Bottleneck'])
def test_a_defence_runs_its_proxies_as_set(name):
    defense = make_defense(name)
    defense.model('vgg11', 10, noise_std=0.025, width=0.125)
    assert networks(defense) == tuple(defense.children()) and (len(networks(defense)) > 0) == (name != 'Bottleneck')


@pytest.mark.parametrize('settings', [dict(cem=True), dict(defense='PATROL', cem=True), dict(variant='full')])
def test_training_in_bf16_follows_that_in_float32(settings, digits):
    e = TINY.replace(**settings)
    (exact, curves), (fast, curves16) = train(e, digits), train(e.replace(precision='bf16'), digits)
    assert not all(map(torch.equal, exact.parameters(), fast.parameters()))
    for a, b in zip(curves, curves16): assert b['loss'] == pytest.approx(a['loss'], rel=0.1)
    assert all(p.dtype == torch.float32 for p in fast.parameters())


@pytest.mark.slow
def test_what_is_learned_in_bf16_is_what_is_learned_in_float32_as_far_as_seeds_tell(digits):
    "Losses, from the second epoch on, and accuracies of three seeds: means apart by at most four standard errors."
    e = Experiment().replace(width=0.125, epochs=8, lr=0.05, batch_size=32, schedule='onecycle', nesterov=True, degrees=0.0)
    found = []
    for precision in ('float32', 'bf16'):
        runs = [train(e.replace(seed=seed, precision=precision), digits) for seed in range(3)]
        found.append(torch.tensor([[c['loss'] for c in curves[1:]] + [accuracy(model, digits.train)] for model, curves in runs]))
    a, b = found
    assert a[:, -1].mean() > 0.8 and b[:, -1].mean() > 0.8 and not a.equal(b)
    assert ((a.mean(0) - b.mean(0)).abs() < 4*((a.var(0) + b.var(0))/3).sqrt()).all()


@pytest.mark.parametrize('attack', [DecoderAttack(width=8, blocks=0, n_epochs=4, batch_size=64),
                                    GAN(width=8, blocks=0, critic_width=4, n_epochs=3, batch_size=64)])
def test_an_attack_in_bf16_reaches_the_error_of_float32(attack, digits):
    model = train(TINY, digits)[0]
    scores = []
    for settings in (EngineSettings(), BF16):
        with using(settings): attacker, curves = train_attack(attack, model, digits.train)
        scores.append(score_attack(model, attacker, digits.val)['mse'])
        assert len(curves) == attack.n_epochs and 'forward' not in vars(attacker)
    assert scores[1] != scores[0] and scores[1] == pytest.approx(scores[0], rel=0.1)


def test_resume_is_exact_in_bf16(digits, tmp_path):
    e = TINY.replace(precision='bf16', cem=True, schedule='onecycle', nesterov=True)
    whole, curves = train(e, digits)
    class Killed(Exception): pass
    def dying(label, n):
        if n == 2: raise Killed
    from cem_nb.loop import Progress
    Progress.listeners.append(dying)
    try:
        with pytest.raises(Killed): train(e, digits, checkpoint=tmp_path/'c.pt')
    finally: Progress.listeners.remove(dying)
    resumed, curves2 = train(e, digits, checkpoint=tmp_path/'c.pt')
    assert curves == curves2 and all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_settings_that_came_later_leave_old_names_alone():
    e = Experiment()
    assert 'engine' not in e.model_dump() and 'schedule' not in e.model_dump()['training']
    names = {run_path(e.replace(**s), 'f').name for s in (dict(), dict(precision='bf16'), dict(compile=True), dict(schedule='onecycle'),
                                                          dict(nesterov=True))}
    assert len(names) == 5
    f = e.replace(precision='bf16', schedule='onecycle')
    assert Experiment.model_validate_json(f.model_dump_json()) == f and f.settings()['precision'] == 'bf16'
    assert 'schedule' not in DecoderAttack().record() and DecoderAttack(schedule='onecycle').record()['schedule'] == 'onecycle'


def test_the_one_cycle_rate_goes_up_and_down_once_and_steps_are_as_they_were():
    t = TINY.replace(epochs=8, lr=0.4, schedule='onecycle').training
    rates = [lr_at(t, i/10) for i in range(81)]
    assert rates[0] == 0 and max(rates) == rates[20] == pytest.approx(0.4) and rates[-1] == pytest.approx(0)
    assert all(b > a for a, b in zip(rates[:20], rates[1:21])) and all(b < a for a, b in zip(rates[20:], rates[21:]))
    assert one_cycle(0.5) == pytest.approx(2/3)
    steps = TINY.replace(epochs=8).training
    assert all(lr_at(steps, e + 0.9) == lr_at(steps, e) for e in range(8)) and lr_at(steps, 7) == pytest.approx(0.02*0.2**4)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match='nesterov needs momentum'): TINY.replace(nesterov=True, momentum=0.0)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile('cpu'), reason='torch.compile finds no compiler here')
def test_a_compiled_training_follows_the_eager_one(digits):
    before = counters['stats']['unique_graphs']
    (eager, curves), (compiled, curves2) = train(TINY, digits), train(TINY.replace(compile=True), digits)
    assert counters['stats']['unique_graphs'] >= before + 2  # encoder and server
    for a, b in zip(curves, curves2): assert b['loss'] == pytest.approx(a['loss'], rel=0.02)


@pytest.mark.parametrize('precision', ['float32', 'bf16'])
def test_the_twelfth_network_is_compiled_as_the_first_is(precision, monkeypatch):
    compiled = []
    def backend(graph, inputs, options):
        compiled.append([type(x) for x in inputs])
        return graph.forward
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=backend))
    monkeypatch.setattr(engine_module, 'can_compile', lambda device: True)
    for width in range(1, 13):
        net, x = nn.Sequential(nn.Linear(3 + width, width), nn.ReLU()), torch.rand(2 + width, 3 + width)
        want = net(x)
        with using(EngineSettings(precision=precision, compile=True)), engine(net, device=CPU):
            got = net(x)
        assert torch.allclose(got, want, atol=0.02) and got.dtype == torch.float32 and len(compiled) == width
    assert not any(int in types or torch.SymInt in types for types in compiled)  # for its own shapes, whatever came before


@pytest.mark.parametrize('pass_', ['fw', 'bw'])
def test_a_network_that_cannot_be_compiled_says_what_to_do(pass_, monkeypatch):
    def failing(graph, inputs): raise ArithmeticError('out of registers')
    backend = aot_autograd(**dict(fw_compiler=lambda graph, inputs: graph.forward) | {f'{pass_}_compiler': failing})
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=backend))
    monkeypatch.setattr(engine_module, 'can_compile', lambda device: True)
    net = nn.Linear(3, 2)
    with using(EngineSettings(compile=True)), engine(net, device=CPU):
        with pytest.raises(RunError, match='cannot be compiled here .*out of registers.*; give compile False'):
            net(torch.rand(2, 3))


@pytest.mark.skipif(not can_compile('cpu'), reason='torch.compile finds no compiler here')
def test_no_kernel_is_chosen_by_the_time_it_takes(tmp_path, monkeypatch):
    "Both passes are compiled where the forward pass is first made, in the mode in which inductor measures nothing."
    from torch._inductor import compile_fx, config as inductor  # takes seconds
    honest, seen = compile_fx.fx_codegen_and_compile, []
    def watched(*args, **how):
        seen.append((how.get('is_backward', False), inductor.deterministic))
        return honest(*args, **how)
    monkeypatch.setattr(compile_fx, 'fx_codegen_and_compile', watched)
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))  # nothing was compiled before
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with using(EngineSettings(compile=True)), engine(net, device=CPU): net(torch.rand(2, 3))
    assert sorted(seen) == [(False, True), (True, True)] and not inductor.deterministic


@pytest.mark.parametrize('said', ['', 'no C++ compiler\nand more'])
def test_why_nothing_can_be_compiled_is_said_in_one_line(said, monkeypatch):
    def missing(*args, **kwargs): raise RuntimeError(said)
    monkeypatch.setattr(torch, 'compile', missing)
    with pytest.warns(UserWarning) as warned: assert not can_compile.__wrapped__('cpu')
    assert str(warned[0].message).endswith(f'fails on cpu ({"no C++ compiler" if said else "RuntimeError"})')


def products(): return [p.fp32_precision for p in engine_module._PRODUCTS]


SWITCHES = {'all': torch.backends,
            'cudnn': torch.backends.cudnn, 'mkldnn': torch.backends.mkldnn, 'cuda.matmul': torch.backends.cuda.matmul,
            'cudnn.conv': torch.backends.cudnn.conv, 'cudnn.rnn': torch.backends.cudnn.rnn, 'mkldnn.matmul': torch.backends.mkldnn.matmul,
            'mkldnn.conv': torch.backends.mkldnn.conv, 'mkldnn.rnn': torch.backends.mkldnn.rnn}
SET = [('older name', 'high'), ('older name', 'medium'), *((s, 'tf32') for s in SWITCHES),
       *((s, 'bf16') for s in SWITCHES if 'cu' not in s)]


@pytest.fixture
def switches():
    "What every switch for the precision of products says; all are put back afterwards."
    read = lambda: [s.fp32_precision for s in SWITCHES.values()]
    before = read()
    yield read
    torch.set_float32_matmul_precision('highest')
    for s, was in zip(SWITCHES.values(), before): s.fp32_precision = was


@pytest.mark.parametrize(('switch', 'value'), SET)
def test_products_keep_all_digits_where_they_must_whatever_is_set_around_them(switch, value, switches):
    x, seen = torch.rand(3, 3, requires_grad=True), []
    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): seen.append(products()); return x.clone()
        @staticmethod
        def backward(ctx, slope): seen.append(products()); return slope
    usual = switches()
    if switch in SWITCHES: SWITCHES[switch].fp32_precision = value
    else: torch.set_float32_matmul_precision(value)
    before = switches()
    full_precision(lambda x: Watch.apply(x).sum())(x).backward()
    with pytest.raises(KeyError), all_digits(CPU):
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32  # torch answers
        assert torch.get_float32_matmul_precision() == 'highest'
        seen.append(products())
        raise KeyError
    all_digits()(lambda: seen.append(products()))()
    assert switches() == before and seen == [['ieee']*len(engine_module._PRODUCTS)]*4
    if switch not in SWITCHES: assert torch.get_float32_matmul_precision() == value and before != usual


@pytest.mark.parametrize('switch', ['all', 'mkldnn'])
def test_a_common_switch_reaches_its_products_afterwards(switch, switches):
    "What a product had from its common switch is not made its own."
    SWITCHES[switch].fp32_precision = 'tf32'
    with all_digits(): pass
    assert 'tf32' in products()
    SWITCHES[switch].fp32_precision = 'ieee'
    assert not {s.fp32_precision for name, s in SWITCHES.items() if name.startswith('mkldnn') or switch == 'all'} - {'ieee'}


def test_scores_mixtures_and_accuracies_are_taken_with_all_digits(digits):
    model = split_model(width=0.125, in_channels=1, image_size=16).eval()
    cem, seen = CEM(noise_std=0.1, n_classes=10, n_epochs=1), []
    model.encoder.register_forward_pre_hook(lambda m, args: seen.append(products()))
    accuracy(model, digits.val), score_attack(model, nn.Sequential(nn.Conv2d(8, 1, 1), nn.Upsample((16, 16))), digits.val)
    cem.fit_encoder(model.encode, batches(digits.val, 51))
    assert len(seen) == 3 and all(set(p) == {'ieee'} for p in seen)


def test_where_nothing_can_be_compiled_a_warning_says_so_and_the_numbers_are_the_eager_ones(digits, monkeypatch):
    def missing(*args, **kwargs): raise RuntimeError('no C++ compiler')
    can_compile.cache_clear()
    monkeypatch.setattr(torch, 'compile', missing)
    with pytest.warns(UserWarning, match='not compiled.*no C'): model, _ = train(TINY.replace(compile=True), digits)
    can_compile.cache_clear()
    monkeypatch.undo()
    assert all(map(torch.equal, model.parameters(), train(TINY, digits)[0].parameters()))


def test_where_bfloat16_is_missing_a_warning_says_so_and_the_run_keeps_that_it_was_float32(digits, monkeypatch):
    monkeypatch.setattr(engine_module, 'has_bf16', HAS_BF16.__wrapped__)
    monkeypatch.setattr(engine_module, 'PROCESSOR', Path('/dev/null'))
    with pytest.warns(UserWarning, match='float32, for no instructions for bfloat16 were found on this cpu'):
        model, _ = train(TINY.replace(precision='bf16'), digits)
    assert all(map(torch.equal, model.parameters(), train(TINY, digits)[0].parameters()))
    assert in_words(BF16, CPU) == ', float32 for want of bf16' and in_words(EngineSettings(), CPU) == ''


def test_a_processor_that_says_bfloat16_is_believed(tmp_path, monkeypatch):
    for flags, has in (('fma avx2 avx512_bf16 sha', True), ('fphp asimdhp bf16', True), ('avx512f avx512_bf16x', False)):
        (tmp_path/'cpuinfo').write_text(f'model name : x\nflags : {flags}\n')
        monkeypatch.setattr(engine_module, 'PROCESSOR', tmp_path/'cpuinfo')
        assert HAS_BF16.__wrapped__('cpu') == has


def test_a_run_keeps_the_precision_that_it_was_computed_in(digits, tmp_path, monkeypatch):
    monkeypatch.setenv('CEM_RUNS', str(tmp_path))
    e = TINY.replace(epochs=1, n_train=256, attacks=())
    exact, fast = (run(e.replace(precision=p)).result['hardware'] for p in ('float32', 'bf16'))
    assert fast == exact + ', bf16'


def test_training_images_are_rotated_by_what_the_settings_say(digits, monkeypatch):
    seen = []
    monkeypatch.setattr('cem_nb.training.batches', lambda s, n, augment=None, **how: seen.append(augment) or batches(s, n, augment, **how))
    train(TINY.replace(epochs=1), digits), train(TINY.replace(epochs=1, degrees=3.0), digits)
    usual, changed = [a for a in seen if a]
    assert usual == digits.augment and changed == replace(usual, degrees=3.0) and usual.degrees not in (0, 3)
