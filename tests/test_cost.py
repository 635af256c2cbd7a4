"What a network costs: counts against the closed form, timing by a clock that the test holds, never by a real one."
import statistics
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from cem_nb import cost
from cem_nb.cost import cost_table, macs, paper_cost, plot_cost, show_cost, time_inference
from cem_nb.methods import DEFENSES, make_defense
from cem_nb.models import NETWORKS, Decoder, SplitModel, n_params, split_model


def closed_form(module, shape):
    "MACs of convolutions and linear layers from the shapes that forward hooks see."
    total = 0

    def count(m, args, out):
        nonlocal total
        x = args[0]
        if isinstance(m, nn.Linear): total += x.numel()*m.out_features
        else:
            k = m.kernel_size[0]*m.kernel_size[1]
            transposed = isinstance(m, nn.ConvTranspose2d)
            # each input pixel of a transposed convolution is spread over a kernel for every output channel of its group
            total += (x.numel()*m.out_channels if transposed else out.numel()*m.in_channels)//m.groups*k

    hooks = [m.register_forward_hook(count) for m in module.modules()
             if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    with torch.no_grad(): module.eval()(torch.zeros(1, *shape))
    for h in hooks: h.remove()
    return total


@settings(deadline=None, max_examples=25, derandomize=True)
@given(groups=st.sampled_from([1, 2, 4]), kernel=st.sampled_from([1, 3, (3, 5)]), stride=st.integers(1, 2),
       dilation=st.integers(1, 2), bias=st.booleans(), transposed=st.booleans(), side=st.sampled_from([11, 16]))
def test_macs_of_single_layers(groups, kernel, stride, dilation, bias, transposed, side):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(4, 8, kernel, stride, 1, groups=groups, dilation=dilation, bias=bias)
    net = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                        nn.Linear(32, 5, bias=bias), nn.Sigmoid())
    assert macs(net, (4, side, side)) == closed_form(net, (4, side, side)) > 0


@pytest.mark.parametrize('arch', NETWORKS)
@pytest.mark.parametrize('size', [16, 64])
def test_macs_of_the_networks(arch, size):
    m = split_model(arch, 7, image_size=size, width=0.5)
    z = m.eval().encode(torch.zeros(1, 3, size, size)).shape[1:]
    assert macs(m.encoder, (3, size, size)) == closed_form(m.encoder, (3, size, size))
    assert macs(m.server, z) == closed_form(m.server, z)
    assert macs(m, (3, size, size)) == macs(m.encoder, (3, size, size)) + macs(m.server, z)


def test_macs_of_the_attack():
    "The arithmetic of a transposed convolution goes by its input; counters that go by the output have four times it."
    decoder = Decoder((8, 8, 8), (3, 32, 32))
    assert macs(decoder, (8, 8, 8)) == closed_form(decoder, (8, 8, 8)) == 54_281_216


def test_counts_of_table_9():
    "The paper's figures, which hold a little more than convolutions and linear layers."
    others, patrol = (make_defense(name).model('vgg11', 10, noise_std=0.025) for name in ('Bottleneck', 'PATROL'))
    patrol.encoder.prune([torch.rand(conv.out_channels) for conv, _, _ in patrol.encoder.groups()])
    assert n_params(others.encoder) == 85_256 and n_params(patrol.encoder) == 83_723
    assert n_params(others.server) == n_params(patrol.server) == 9_689_738
    image, paper = (3, 32, 32), paper_cost()
    for m, name in ((others, 'OTHERS'), (patrol, 'PATROL')):
        printed = 1e6*float(paper.loc[(name, 'encoder'), 'macs'].removesuffix('M'))
        assert 0.96 < macs(m.encoder, image)/printed < 1
    printed = 1e6*float(paper.loc[('OTHERS', 'server'), 'macs'].removesuffix('M'))
    assert 0.99 < macs(others.server, (8, 8, 8))/printed < 1


def test_all_methods_but_two_have_one_network():
    shapes = {name: {k: v.shape for k, v in make_defense(name).model('vgg11', 10, width=0.125, noise_std=0.025).state_dict().items()}
              for name in DEFENSES}
    assert {name for name in DEFENSES if shapes[name] != shapes['Bottleneck']} == {'PATROL', 'No_defense'}


class Clock:
    "Time passes only when a layer of this clock is called."
    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(cost, 'time', SimpleNamespace(perf_counter=lambda: self.now))

    def layer(self, name, took, n_in=4, n_out=4):
        "A linear layer that logs its calls; the i-th takes `took(i)` seconds."
        clock = self

        class Layer(nn.Linear):
            calls = 0

            def forward(self, x):
                clock.log.append((name, self.training, torch.is_grad_enabled()))
                clock.now += took(Layer.calls)
                Layer.calls += 1
                return super().forward(x)

        return Layer(n_in, n_out)


@pytest.mark.parametrize('warmup, repeats', [(0, 1), (2, 4), (3, 7)])
def test_time_inference_counts_calls_and_takes_quartiles(monkeypatch, warmup, repeats):
    clock = Clock(monkeypatch)
    took = [100.0]*warmup + [float(v) for v in np.random.default_rng(repeats).permutation(repeats)**2 + 1]
    layer = clock.layer('a', lambda i: took[i])
    t = time_inference(layer, torch.rand(3, 4), warmup=warmup, repeats=repeats)
    assert clock.log == [('a', False, False)]*(warmup + repeats)
    counted = took[warmup:]
    assert t.median == statistics.median(counted) and t.mean == pytest.approx(statistics.mean(counted))
    if repeats > 1:
        low, _, high = statistics.quantiles(counted, n=4, method='inclusive')
        assert (t.q25, t.q75) == pytest.approx((low, high))
    assert t.q25 <= t.median <= t.q75


def mixed():
    "In training, with a batch norm frozen."
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Dropout(0.5)))
    net[1].eval()
    return net


def test_modes_statistics_and_gradients_are_left_alone():
    net = mixed()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    time_inference(net, torch.rand(3, 4), warmup=1, repeats=1)
    macs(net, (4,))
    with pytest.raises(ValueError): macs(net, (5,))
    with pytest.raises(RuntimeError): time_inference(net, torch.rand(3, 5))
    model, state = SplitModel(net, mixed(), 0.0), torch.get_rng_state()
    cost_table({'a': model}, (4,), batch_size=2, repeats=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes == [m.training for m in model.server.modules()]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.is_grad_enabled() and all(p.grad is None for p in net.parameters())


def test_rounds_are_interleaved_and_sides_add_up(monkeypatch):
    clock, warmup, repeats = Clock(monkeypatch), 2, 6
    # of the encoder: one call to count and one to make the feature; of the server: one to count
    rise, fall = lambda i: float(i - 2 - warmup), lambda i: float(repeats - (i - 1 - warmup))
    models = {name: SplitModel(clock.layer(name + ' encoder', rise), clock.layer(name + ' server', fall, 4, 3), 0.0)
              for name in ('a', 'b', 'c')}
    t = cost_table(models, (4,), batch_size=2, warmup=warmup, repeats=repeats)
    log = [name for name, *_ in clock.log[-6*(warmup + repeats):]]
    rounds = [log[i:i + 6] for i in range(0, len(log), 6)]
    assert len(clock.log) == 3*3 + len(log) and all(sorted(r) == sorted(set(log)) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1  # shuffled: no method always follows the same one
    assert not any(training or grad for _, training, grad in clock.log)
    t = t.set_index(['method', 'side'])
    counted = 1000*np.arange(repeats)
    for name in models:
        assert t.loc[(name, 'encoder'), 'ms'] == np.median(counted)
        assert t.loc[(name, 'encoder'), 'ms_q75'] == np.quantile(counted, 0.75)
        assert t.loc[(name, 'encoder'), 'ms_100'] == pytest.approx(100*counted.mean())
        # long encoder calls meet short server calls, so the sum of a repetition is the same in all of them
        assert t.loc[(name, 'whole'), ['ms', 'ms_q25', 'ms_q75']].tolist() == [6000.0]*3
        assert t.loc[(name, 'whole'), 'params'] == 20 + 15 and t.loc[(name, 'whole'), 'macs'] == 16 + 12


def test_a_gpu_is_timed_by_its_events(monkeypatch):
    "A stand-in for CUDA's events, which count in milliseconds and are read only when they have happened."
    now, ready = [0.0], set()

    class Event:
        def __init__(self, enable_timing): assert enable_timing
        def record(self, stream): self.at = now[0]; assert stream == 'stream of cuda:0'
        def synchronize(self): ready.add(self)
        def elapsed_time(self, end): assert end in ready; return end.at - self.at

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda d: f'stream of {d}')
    def call(): now[0] += 250.0
    assert cost.side_by_side([call, call], torch.device('cuda', 0), 1, 3).tolist() == [[0.25, 0.25]]*3


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    t = cost_table({'a': split_model(width=0.125).cuda()}, (3, 32, 32), batch_size=4, repeats=3)
    assert (t.ms > 0).all() and t.hardware[0] == torch.cuda.get_device_name()


@pytest.fixture(scope='module')
def table():
    nets = {name: make_defense(name).model('vgg11', 10, width=0.125, noise_std=0.025).to(memory_format=torch.channels_last)
            for name in ('PATROL', 'Bottleneck', 'No_defense')}
    return cost_table(nets, (3, 32, 32), batch_size=2, repeats=2)


def test_table_has_its_fields(table):
    assert list(table) == ['method', 'side', 'params', 'macs', 'ms', 'ms_q25', 'ms_q75', 'ms_100', 'batch_size',
                           'repeats', 'hardware', 'python', 'torch', 'cem_nb', 'date']
    assert list(table.method) == [m for m in ('PATROL', 'Bottleneck', 'No_defense') for _ in range(3)]
    assert list(table.side) == ['encoder', 'server', 'whole']*3
    assert (table.ms_q25 <= table.ms).all() and (table.ms <= table.ms_q75).all()
    assert (table.batch_size == 2).all() and (table.repeats == 2).all()


def test_shown_beside_the_paper(table):
    shown = show_cost(table, paper_cost()).data
    theirs = shown['paper: RTX 4090, batches of 128']
    assert theirs.loc[('PATROL', 'encoder')].tolist() == ['0.083M', '27.3M', '65.61']
    assert theirs.loc[('Bottleneck', 'server')].tolist() == ['9.78M', '133.59M', '169.87']  # as printed
    assert (theirs.loc['No_defense'] == '').all(axis=None)
    b = table.set_index(['method', 'side']).loc[('Bottleneck', 'server')]
    assert shown.loc[('Bottleneck', 'server'), ('this run', 'parameters')] == f'{b.params:,}'
    assert list(show_cost(table).data.columns.levels[0]) == ['this run']
    assert b.hardware in show_cost(table).caption


def test_plot_shows_medians_and_quartiles(table):
    fig = plot_cost(table)
    for ax, side in zip(fig.axes, ('encoder', 'server')):
        rows = table[table.side == side]
        lines, dots = ax.collections
        assert np.allclose(dots.get_offsets()[:, 0], rows.ms)
        assert np.allclose([seg[:, 0] for seg in lines.get_segments()], rows[['ms_q25', 'ms_q75']])
        assert side in ax.get_xlabel() and ax.get_xlim()[0] == 0
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['PATROL', 'Bottleneck', 'No_defense']
    plt.close(fig)


@pytest.mark.parametrize('bad, why', [(dict(repeats=0), 'repeats is 0'), (dict(repeats=-3), 'repeats is -3'),
                                      (dict(repeats=2.5), 'repeats is 2.5'), (dict(warmup=-1), 'warmup is -1'),
                                      (dict(x=torch.zeros(0, 4)), 'empty'), (dict(x=[[1.0]*4]), 'no tensor'),
                                      (dict(x=torch.full((2, 4), float('nan'))), 'x holds NaN'),
                                      (dict(x=torch.zeros(2, 4, device='meta')), 'x is on meta')])
def test_bad_timing(bad, why):
    with pytest.raises(ValueError, match=why): time_inference(nn.Linear(4, 2), **dict(x=torch.zeros(2, 4)) | bad)


@pytest.mark.parametrize('shape', [(), (3, 0, 8), (3, -8, 8), (3, 8.0, 8), (1, 3, 8, 8), (4, 8, 8)])
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match='input'): macs(nn.Conv2d(3, 2, 3), shape) if len(shape) < 4 else macs(
        split_model(width=0.125), shape)


@pytest.mark.parametrize('models, kwargs, why', [
    (dict, {}, 'no network'), (lambda: dict(a=split_model(width=0.125)), dict(batch_size=0), 'batch_size is 0'),
    (lambda: dict(a=split_model(width=0.125)), dict(repeats=0), 'repeats is 0'),
    (lambda: dict(a=split_model(width=0.125, in_channels=1)), {}, 'cannot take'),
    (lambda: dict(a=split_model(width=0.125), b=split_model(width=0.125).double()), {}, '2 combinations'),
    (lambda: dict(a=split_model(width=0.125), b=split_model(width=0.125).to('meta')), {}, '2 combinations'),
    (lambda: dict(a=split_model(width=0.125), b=split_model(width=0.125).to(memory_format=torch.channels_last)), {},
     'channels_last')])
def test_bad_tables(models, kwargs, why):
    with pytest.raises(ValueError, match=why): cost_table(models(), (3, 32, 32), **kwargs)


def test_attention_is_counted_in_full_and_what_cannot_be_counted_is_refused():
    t, d, ff = 10, 8, 16
    layer = torch.nn.TransformerEncoderLayer(d, 2, ff, batch_first=True)
    assert macs(layer, (t, d)) == t*d*3*d + 2*t*t*d + t*d*d + 2*t*d*ff  # projections, scores and sums, output, feed-forward
    with pytest.raises(ValueError, match='not known, so it would count as nothing'): macs(torch.nn.LSTM(4, 6), (10, 4))
    assert macs(torch.nn.Linear(4, 3), np.array([4])) == 12
