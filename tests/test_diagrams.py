"The diagrams: what they say is what the networks have, and it can be read."
import re
from collections import Counter

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from cem_nb.cem import CEM
from cem_nb.cem_variants import PairwiseCEM
from cem_nb.cost import macs
from cem_nb.diagrams import Layer, batch_tensors, layers, plot_algorithm, plot_decoder, plot_system
from cem_nb.models import Decoder, n_params, split_model

matplotlib.use('Agg')


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


def small(**settings): return split_model(**dict(in_channels=1, image_size=16, width=0.25) | settings)


def fitted(model, x, n_components=3, **settings):
    cem = CEM(**dict(noise_std=model.noise_std, n_classes=10, n_components=n_components, n_epochs=10, lam=2) | settings)
    with torch.no_grad(): return cem.fit(model.eval().encode(x), None)


def texts(fig): return [t.get_text() for ax in fig.axes for t in ax.texts if t.get_text()]


def times(shape): return '×'.join(map(str, shape))


def assert_readable(fig):
    "Every text is inside the figure, of 7 points or more, and apart from every other."
    fig.canvas.draw()
    found = [(t.get_text(), t.get_window_extent()) for ax in fig.axes for t in ax.texts if t.get_text()]
    assert all(t.get_fontsize() >= 7 for ax in fig.axes for t in ax.texts)
    for i, (text, box) in enumerate(found):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1, f'{text} is cut off'
        for other, its in found[:i]: assert not box.overlaps(its), f'{text} lies on {other}'


NETWORKS = {'decoder': (lambda: Decoder((8, 4, 4), (3, 16, 16), 16, 3), (8, 4, 4)),
            'encoder': (lambda: small(cut=3).encoder, (1, 16, 16)), 'server': (lambda: small(cut=1).server, (8, 8, 8)),
            'resnet': (lambda: split_model('resnet20', width=0.25), (3, 32, 32)), 'linear': (lambda: nn.Linear(3, 2), (3,)),
            'nested': (lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Sequential()), nn.ReLU()), (3,))}


@pytest.mark.parametrize('name', NETWORKS)
def test_layers_have_the_counts_and_the_shapes_of_the_network(name):
    make, shape = NETWORKS[name]
    net, x = make(), torch.rand(2, *shape)
    found = layers(net, x)
    assert sum(l.params for l in found) == n_params(net)
    with torch.no_grad(): assert found[-1].shape == net.eval()(x).shape[1:]


def test_layers_are_those_of_a_forward_by_hand():
    net, x = small(cut=2).encoder.eval(), torch.rand(2, 1, 16, 16)
    expected = []
    with torch.no_grad():
        for name, layer in net.named_children():
            x = layer(x)
            leads = isinstance(layer, nn.Conv2d)
            expected.append(Layer(name, type(layer).__name__, tuple(x.shape[1:]), sum(p.numel() for p in layer.parameters()), leads))
    assert layers(net, torch.rand(2, 1, 16, 16)) == expected


def test_equal_layers_in_a_row_are_folded():
    found = layers(Decoder((8, 4, 4), (3, 8, 8), 16, 5), torch.rand(1, 8, 4, 4))
    assert [l.label for l in found[:3]] == ['ResBlock', 'ResBlock × 5', 'ConvTranspose2d']
    assert found[1].name == '1 to 5' and found[1].repeats == 5


def test_a_layer_that_runs_twice_is_counted_once_and_frozen_ones_not_at_all():
    shared = nn.Linear(3, 3)

    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a, self.unused, self.relu = shared, nn.Linear(9, 9), nn.ReLU()
        def forward(self, x): return self.a(self.relu(self.a(x)))

    assert [(l.name, l.params) for l in layers(Twice(), torch.rand(1, 3))] == [('a', 12), ('relu', 0), ('a', 0)]
    shared.requires_grad_(False)
    assert sum(l.params for l in layers(Twice(), torch.rand(1, 3))) == 0


def test_looking_leaves_network_mixture_and_random_numbers_as_they_were():
    model, x = small().train(), torch.rand(30, 1, 16, 16)
    cem = fitted(model, x)
    model.train()
    decoder = Decoder((8, 4, 4), (1, 16, 16), 8, 1)
    state = lambda: [v.clone() for m in (model, decoder, cem) for v in (*m.state_dict().values(), *m.buffers())
                     if isinstance(v, torch.Tensor)] + [cem.pi.clone(), cem.Sigma.clone()]
    before, rng = state(), torch.get_rng_state()
    plot_system(model, x[0], decoder)
    plot_algorithm(model, cem, x)
    plot_decoder(decoder, torch.zeros(8, 4, 4))
    assert all(torch.equal(a, b) for a, b in zip(before, state())) and torch.equal(rng, torch.get_rng_state())
    assert model.training and decoder.training
    assert not any(m._forward_hooks for net in (model, decoder) for m in net.modules())


def test_values_that_are_not_finite_and_hooks_after_an_error():
    decoder = Decoder((8, 4, 4), (3, 8, 8), 16, 1)
    with pytest.raises(ValueError, match='NaN or inf'): layers(decoder, torch.full((1, 8, 4, 4), torch.nan))
    with pytest.raises(ValueError): plot_system(small(), torch.rand(1, 1, 16, 16))
    with pytest.raises(RuntimeError): layers(decoder, torch.rand(1, 5, 4, 4))
    assert not any(m._forward_hooks for m in decoder.modules())


@pytest.mark.parametrize('settings', [dict(cut=1), dict(cut=2), dict(cut=4), dict(width=0.5), dict(bottleneck=None), dict(extra=16),
                                      dict(arch='resnet20'), dict(drop=0.2)], ids=str)
def test_the_system_shows_this_model(settings):
    model, x = small(**settings), torch.rand(1, 16, 16)
    with torch.no_grad(): z = model.eval().smash(x[None])
    decoder = Decoder(tuple(z.shape[1:]), (1, 16, 16), 16, 2)
    fig = plot_system(model, x, decoder)
    assert_readable(fig)
    shown = texts(fig)
    for part in (model.encoder, model.server, decoder): assert f'{n_params(part):,}' in shown
    assert f'{times(z.shape[1:])} = {z.numel():,}' in '\n'.join(shown) and 'ResBlock × 2' in shown
    assert f'{100*model.drop:g} % dropped' in ''.join(shown) or not model.drop
    assert len(fig.axes[0].images) == 3
    rebuilt = fig.axes[0].images[-1].get_array()
    with torch.no_grad(): assert rebuilt.shape == decoder.eval()(z)[0, 0].shape
    assert (texts(plot_system(small(cut=3), x)) != shown)


def test_without_a_trained_attacker_there_is_a_question_mark():
    model, x = small(), torch.rand(1, 16, 16)
    decoder = Decoder((8, 4, 4), (1, 16, 16), 16, 2)
    for fig in (plot_system(model, x), plot_system(model, x, decoder, trained=False)):
        assert_readable(fig)
        assert '?' in texts(fig) and len(fig.axes[0].images) == 2
    assert '?' not in texts(plot_system(model, x, decoder))


def test_the_papers_network_at_full_size_is_readable():
    model, x = split_model(), torch.rand(2, 3, 32, 32)
    decoder = Decoder((8, 8, 8), (3, 32, 32))
    figures = plot_system(model, x[0], decoder), plot_algorithm(model, fitted(model, x, 1), x), plot_decoder(decoder, torch.rand(8, 8, 8))
    for fig in figures:
        assert_readable(fig)
        assert 7 <= fig.get_figwidth() <= 7.5
    assert {'85,256', '9,689,738', '711,539', '3×32×32 = 3,072 numbers'} <= {line for t in texts(figures[0]) for line in t.split('\n')}


@pytest.mark.parametrize('k, settings', [(3, {}), (5, dict(cut=1)), (2, dict(width=0.5)), (4, dict(bottleneck=4))], ids=str)
def test_the_algorithm_shows_what_flows(k, settings):
    model, x = small(**settings), torch.rand(40, 1, 16, 16)
    cem = fitted(model, x, k)
    t = batch_tensors(model, cem, x[:8])
    m = t['z_hat'][0].numel()
    assert t['x'].shape == (8, 1, 16, 16) and t['flat'].shape == (8, m) and t['logits'].shape == (8, 10)
    assert t['dSigma'].shape == t['Sigma'].shape == t['mu'].shape == (k, m) and t['n'].shape == t['pi'].shape == (k,)
    assert torch.allclose(t['l_c'], cem.batch(cem.checked(model.encode(x[:8])), None)[0])
    assert (t['z'] - t['z_hat']).std().item() == pytest.approx(model.noise_std, rel=0.15)
    fig = plot_algorithm(model, cem, x[:8])
    assert_readable(fig)
    shown = '\n'.join(texts(fig))
    for part in ('encode', 'send', 'cross_entropy', 'fit_encoder', 'batch_moments', 'eq5', 'eq6', 'eq7', 'assign', f'40×{m}', f'{k}×{m}',
                 f'8×{m}', times(t['z'].shape), f'k = {k},', f'm = {m}$', f'weight {cem.weight:.3g}'):
        assert part in shown, part


def test_another_number_of_components_is_another_picture():
    model, x = small(), torch.rand(40, 1, 16, 16)
    assert texts(plot_algorithm(model, fitted(model, x, 2), x)) != texts(plot_algorithm(model, fitted(model, x, 3), x))


def test_names_are_those_of_the_functions(monkeypatch):
    import cem_nb.diagrams as diagrams

    def renamed(pi, n, N): return (pi*(N - n.sum()) + n)/N

    monkeypatch.setattr(diagrams, 'eq5', renamed)
    model, x = small(), torch.rand(40, 1, 16, 16)
    shown = texts(plot_algorithm(model, fitted(model, x), x))
    assert 'renamed' in shown and 'eq5' not in shown


def test_an_algorithm_that_is_another_or_not_fitted_is_not_drawn():
    model, x = small(), torch.rand(10, 1, 16, 16)
    with pytest.raises(ValueError, match='PairwiseCEM has equations of its own'):
        plot_algorithm(model, PairwiseCEM(noise_std=0.1, n_classes=10, n_epochs=3), x)
    with pytest.raises(RuntimeError, match='not fitted'): plot_algorithm(model, CEM(noise_std=0.1, n_classes=10, n_epochs=3), x)
    with pytest.raises(ValueError, match='a batch of 10'): plot_algorithm(model, fitted(model, x[:5], 2), x)


@pytest.mark.parametrize('feature, image, width, blocks', [((8, 8, 8), (3, 32, 32), 64, 8), ((8, 4, 4), (1, 16, 16), 16, 2),
                                                           ((4, 4, 4), (3, 64, 64), 32, 1), ((8, 8, 8), (3, 8, 8), 24, 0)])
def test_the_decoder_shows_its_stages(feature, image, width, blocks):
    decoder, z = Decoder(feature, image, width, blocks), torch.rand(*feature)
    fig = plot_decoder(decoder, z)
    assert_readable(fig)
    shown = texts(fig)
    assert f'Decoder: {n_params(decoder):,} parameters, {macs(decoder, feature)/1e6:.2f}M multiply-accumulates' in shown
    ups = [l for l in decoder if isinstance(l, nn.ConvTranspose2d)]
    assert Counter(shown)['ConvTranspose'] == len(ups)
    for i in range(len(ups)): assert f'{width}×{2**(i + 1)*feature[1]}×{2**(i + 1)*feature[2]}' in shown
    assert {times(feature), times(image), 'Sigmoid'} <= set(shown)
    if blocks > 1: assert f'ResBlock × {blocks}' in shown and f'{sum(map(n_params, list(decoder)[1:blocks + 1])):,}' in shown
    if blocks > 1: assert f'{n_params(decoder[1].body[2]):,}' in shown and 'shortcut: Identity' in shown


def test_an_attacker_without_residual_blocks_is_drawn_too():
    decoder = nn.Sequential(nn.ConvTranspose2d(8, 3, 2, 2), nn.Sigmoid())
    fig = plot_decoder(decoder, torch.rand(8, 4, 4))
    assert_readable(fig)
    assert not any('shortcut' in t for t in texts(fig)) and any(re.match('Sequential: 99 parameters', t) for t in texts(fig))
