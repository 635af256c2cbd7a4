"The GAN attack; what all attacks share is in test_attack_contract.py."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError
from torch import nn

from cem_nb.attack import AttackDivergedError, train_attack
from cem_nb.core import stage_seed
from cem_nb.data import Split, batches
from cem_nb.datasets import load_data
from cem_nb.decoder import DecoderAttack
from cem_nb.gan import GAN, Critic, critic_step, generator_step, gradient_penalty
from cem_nb.loop import cosine
from cem_nb.models import Decoder, feature_shape, n_params, split_model

TINY = dict(width=8, blocks=0, critic_width=4, n_epochs=3, batch_size=64)
sampled = settings(deadline=None, max_examples=15, derandomize=True)


@pytest.fixture
def digits(): return load_data('digits', n_train=256)


def victim(noise_std=0.025):
    torch.manual_seed(0)
    return split_model(in_channels=1, image_size=16, width=0.25, noise_std=noise_std)


def fit(model, train, checkpoint=None, label=None, **settings):
    return train_attack(GAN(**settings), model, train, checkpoint=checkpoint, label=label)


def same(a, b): return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


class Linear(nn.Module):
    "D(x) = a·x: its slope is the norm of a."
    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, x): return (self.a*x).flatten(1).sum(1)


@sampled
@given(norm=st.floats(0.01, 50), shape=st.sampled_from([(1, 8, 8), (3, 12, 12)]), seed=st.integers(0, 99))
def test_penalty_of_a_linear_critic(norm, shape, seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    a = draw(*shape)
    critic = Linear(norm*a/a.norm())
    p = gradient_penalty(critic, draw(5, *shape), draw(5, *shape))
    assert p.shape == () and p.item() == pytest.approx((norm - 1)**2, rel=1e-9, abs=1e-12)
    p.backward()  # dP/da = 2 (|a| - 1) a/|a|
    torch.testing.assert_close(critic.a.grad, 2*(norm - 1)*a/a.norm())


def test_points_lie_between_image_and_reconstruction_with_one_u_an_image():
    "D(x) = |x|²/2 has the slope |x|. From an image of norm r to a black one that is u·r: E(u r - 1)² = r²/3 - r + 1."
    n, r = 20_000, 3.0
    real = torch.full((n, 1, 4, 4), r/4, dtype=torch.float64)
    p = gradient_penalty(lambda x: x.flatten(1).square().sum(1)/2, real, torch.zeros_like(real)).item()
    spread = math.sqrt((r**4/5 - r**3 + 2*r**2 - 2*r + 1) - (r**2/3 - r + 1)**2)
    assert abs(p - (r**2/3 - r + 1)) < 4*spread/math.sqrt(n)


def test_penalty_against_gradients_image_by_image():
    torch.manual_seed(0)
    critic = Critic((3, 16, 16), 4).double()
    x = torch.rand(6, 3, 16, 16, dtype=torch.float64)
    params = dict(critic.named_parameters())
    score = lambda xi: torch.func.functional_call(critic, params, (xi[None],))[0]
    slopes = torch.stack([torch.func.grad(score)(xi).norm() for xi in x])
    assert slopes.std() > 1e-3
    # with the image as its own reconstruction every u gives the same point
    torch.testing.assert_close(gradient_penalty(critic, x, x), (slopes - 1).square().mean())


def test_penalty_gradients_against_finite_differences():
    torch.manual_seed(0)
    critic = Critic((1, 16, 16), 3).double()
    real, fake = torch.rand(2, 4, 1, 16, 16, dtype=torch.float64)
    fake.requires_grad_()
    def penalty():
        torch.manual_seed(7)
        return gradient_penalty(critic, real, fake)
    penalty().backward()
    assert fake.grad is None
    step = 1e-6
    for name, p in critic.named_parameters():
        direction = torch.randn_like(p)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                p += sign*step*direction
                with torch.enable_grad(): values.append(penalty().item())
                p -= sign*step*direction
        want = (values[0] - values[1])/(2*step)
        got = 0.0 if p.grad is None else (p.grad*direction).sum().item()  # the last bias moves no slope
        assert got == pytest.approx(want, rel=1e-5, abs=1e-8), name
    assert max(p.grad.abs().max() for p in critic.parameters() if p.grad is not None) > 1e-2


def test_a_flat_critic_has_a_penalty_and_no_nan():
    critic = Linear(torch.zeros(1, 8, 8))
    p = gradient_penalty(critic, *torch.rand(2, 3, 1, 8, 8))
    p.backward()
    assert p.item() == 1 and critic.a.grad.isfinite().all()


@pytest.mark.parametrize('side', [8, 16, 32, 48, 64])
@pytest.mark.parametrize('channels', [1, 3])
def test_critic_scores_each_image_by_itself(side, channels):
    torch.manual_seed(0)
    critic = Critic((channels, side, side), 4)
    x = torch.rand(5, channels, side, side)
    scores = critic(x)
    assert scores.shape == (5,) and scores.std() > 1e-4
    other = torch.cat([x[:1], 1 - x[1:]])
    torch.testing.assert_close(critic(other)[0], scores[0])
    assert Critic((channels, side, side), 8)(x).shape == (5,)
    assert gradient_penalty(critic, x, other).isfinite()


@pytest.mark.parametrize('bad, cause', [(((1, 4, 4), 8), 'at least 8'), (((1, 16, 8), 8), '16x8'),
                                        (((1, 16, 16), 0), 'width of 0')])
def test_bad_critics(bad, cause):
    with pytest.raises(ValueError, match=cause): Critic(*bad)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match='give both'):
        gradient_penalty(Linear(torch.ones(1, 8, 8)), torch.rand(2, 1, 8, 8), torch.rand(1, 1, 8, 8))


@pytest.mark.parametrize('bad', [dict(critic_steps=0), dict(critic_width=0), dict(mse_weight=-1.0),
                                 dict(mse_weight=math.nan), dict(mse_weight=math.inf), dict(penalty=-0.1),
                                 dict(batch_size=1)])
def test_bad_settings(bad):
    with pytest.raises(ValidationError, match=next(iter(bad))): GAN(**(TINY | bad))


def test_the_defaults_are_the_papers_and_where_it_is_silent_ours():
    assert GAN().record() == DecoderAttack().record() | dict(name='gan', n_epochs=150, critic_width=64, critic_steps=1,
                                                             mse_weight=1500.0, penalty=10.0)


@pytest.mark.parametrize('shape', [(1, 4, 4), (1, 16, 8)])
def test_images_that_no_critic_can_see_are_refused_before_any_training(shape):
    split = Split(torch.zeros(8, *shape, dtype=torch.uint8), torch.zeros(8).long())
    with pytest.raises(ValueError, match='pixels'): GAN(**TINY).attacker(victim(), split)


def test_the_generator_is_the_decoder_attacks_network(digits):
    model = victim()
    generator, history = fit(model, digits.train, **(TINY | dict(n_epochs=1)))
    decoder, _ = train_attack(DecoderAttack(width=8, blocks=0, n_epochs=1, batch_size=64), model, digits.train)
    assert type(generator) is Decoder and not generator.training and n_params(generator) == n_params(decoder)
    assert [p.shape for p in generator.parameters()] == [p.shape for p in decoder.parameters()]
    assert set(history[0]) == {'mse', 'wasserstein', 'penalty'}


def test_each_network_steps_down_its_own_loss_and_leaves_the_other_alone():
    torch.manual_seed(0)
    generator, critic = nn.Conv2d(2, 1, 1), Critic((1, 8, 8), 4)
    x, z = torch.rand(16, 1, 8, 8), torch.rand(16, 2, 8, 8)
    opt, critic_opt = (torch.optim.SGD(net.parameters(), 1e-4) for net in (generator, critic))
    state = lambda net: torch.cat([p.detach().flatten().clone() for p in net.parameters()])
    before = state(generator), state(critic)
    w, p = critic_step(critic, critic_opt, x, generator(z).detach(), 10.0)
    assert torch.equal(state(generator), before[0]) and not torch.equal(state(critic), before[1])
    assert w.item() != 0 and p.item() > 0 and not (w.requires_grad or p.requires_grad)
    after = state(critic)
    loss = lambda: (100*(generator(z) - x).square().mean() - critic(generator(z)).mean()).item()
    high = loss()
    mse = generator_step(generator, critic, opt, x, generator(z), 100.0)
    assert loss() < high and torch.equal(state(critic), after) and mse.item() > 0


def test_steps_and_schedule_of_both_networks(digits, tmp_path):
    fit(victim(), digits.train, **TINY, critic_steps=2, lr=0.004, checkpoint=tmp_path/'g.pt')
    state = torch.load(tmp_path/'g.pt', weights_only=True)['state']
    n = 3*(256//64)
    for name, steps, decay in (('opt', n, 1e-4), ('critic_opt', 2*n, 0)):
        assert {s['step'].item() for s in state[name]['state'].values()} == {steps}
        group, = state[name]['param_groups']
        assert group['lr'] == pytest.approx(cosine(0.004, 1e-5, 2/3)) and group['weight_decay'] == decay


def test_fresh_noise_in_every_batch(digits):
    model, sent = victim(), []
    send = model.send
    def spying(z_hat):
        z = send(z_hat)
        sent.append((z - z_hat).std().item())
        return z
    model.send = spying
    fit(model, digits.train, **(TINY | dict(n_epochs=2)))
    assert len(set(sent)) == len(sent) == 2*(256//64)
    assert all(s == pytest.approx(0.025, rel=0.1) for s in sent)


@pytest.mark.parametrize('bad', [dict(lr=1e12), dict(lr=1e38, n_epochs=1, batch_size=256)])
def test_divergence_has_a_name_and_leaves_no_checkpoint(bad, digits, tmp_path):
    "With the second, all the losses of the only step are numbers, but the weights after it are not."
    with pytest.raises(AttackDivergedError, match='lower lr or raise mse_weight') as e:
        fit(victim(), digits.train, **(TINY | bad), checkpoint=tmp_path/'g.pt', label='Bottleneck: gan')
    assert isinstance(e.value, RuntimeError) and '\n' not in str(e.value) and str(e.value).startswith('Bottleneck: gan')
    assert not (tmp_path/'g.pt').exists()


def test_the_weight_trades_squared_error_for_looks(digits):
    """Under a huge weight the generator is that of a plain loop on the squared error, with the same start, batches and
    optimiser. Under a light one its error is higher, and the critic tells its images from real ones less well."""
    model, train, settings = victim(noise_std=0.0).eval(), digits.train, TINY | dict(n_epochs=6, batch_size=32)
    huge, light = (fit(model, train, **settings, mse_weight=w)[1] for w in (1e7, 20.0))
    torch.manual_seed(stage_seed(0, 'gan', 'init'))
    net = Decoder(feature_shape(model, (1, 16, 16)), (1, 16, 16), 8, 0).to(memory_format=torch.channels_last)
    opt = torch.optim.Adam(net.parameters(), 0.005, (0.5, 0.9))
    for epoch in range(6):
        torch.manual_seed(stage_seed(0, 'gan', epoch))
        opt.param_groups[0]['lr'] = cosine(0.005, 1e-5, epoch/6)
        errors = []
        for x, _ in batches(train, 32, shuffle=True):
            mse = (net(model.encode(x).detach()) - x).square().mean()
            opt.zero_grad(); mse.backward(); opt.step()
            errors.append(mse.item())
        assert huge[epoch]['mse'] == pytest.approx(sum(errors)/len(errors), rel=0.01)
    assert light[-1]['mse'] > 2*huge[-1]['mse'] and light[-1]['wasserstein'] < huge[-1]['wasserstein']
    assert huge[-1]['wasserstein'] > 0
