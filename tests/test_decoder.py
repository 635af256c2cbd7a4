"The decoder attack; what all attacks share is in test_attack_contract.py."
import math

import pytest
import torch
from pydantic import ValidationError

from cem_nb.attack import AttackDivergedError, score_attack, train_attack
from cem_nb.core import stage_seed
from cem_nb.data import Split, batches
from cem_nb.datasets import load_data
from cem_nb.decoder import DecoderAttack, check_finite, epoch_means
from cem_nb.loop import cosine, set_rates
from cem_nb.models import Decoder, feature_shape, split_model

TINY = dict(width=8, blocks=0, n_epochs=2, batch_size=64)


@pytest.fixture(scope='module')
def digits(): return load_data('digits', n_train=256)


def victim(noise_std=0.025, side=16, **kwargs):
    torch.manual_seed(0)
    return split_model(in_channels=1, image_size=side, width=0.25, noise_std=noise_std, **kwargs)


def test_the_defaults_are_the_papers():
    assert DecoderAttack().record() == dict(name='decoder', restarts=1, width=64, blocks=8, n_epochs=50, batch_size=256,
                                            lr=0.005, weight_decay=1e-4)


@pytest.mark.parametrize('bad', [dict(width=0), dict(blocks=-1), dict(n_epochs=0), dict(batch_size=1), dict(lr=0.0),
                                 dict(lr=math.inf), dict(lr='0.1'), dict(weight_decay=-1e-4), dict(wdith=8)])
def test_bad_settings(bad):
    with pytest.raises(ValidationError, match=next(iter(bad))): DecoderAttack(**bad)


def test_a_plain_loop_gives_the_same_bits(digits):
    model = victim(0.1).eval()
    attacker, history = train_attack(DecoderAttack(**TINY), model, digits.train, seed=3)
    torch.manual_seed(stage_seed(3, 'decoder', 'init'))
    net = Decoder(feature_shape(model, (1, 16, 16)), (1, 16, 16), 8, 0).to(memory_format=torch.channels_last)
    opt = torch.optim.Adam(net.parameters(), 0.005, weight_decay=1e-4, fused=True)
    for epoch in range(2):
        torch.manual_seed(stage_seed(3, 'decoder', epoch))
        opt.param_groups[0]['lr'] = cosine(0.005, 1e-5, epoch/2)
        errors = []
        for x, _ in batches(digits.train, 64, shuffle=True):
            z = model.encode(x).detach()
            loss = torch.nn.functional.mse_loss(net(z + 0.1*torch.randn_like(z)), x)
            opt.zero_grad(); loss.backward(); opt.step()
            errors.append(loss.item())
        assert history[epoch]['mse'] == pytest.approx(sum(errors)/len(errors), rel=1e-6)
    assert all(map(torch.equal, net.state_dict().values(), attacker.state_dict().values()))


def test_sizes_that_do_not_fit_are_refused_before_any_training():
    model, train = victim(side=12), Split(torch.zeros(8, 1, 12, 12, dtype=torch.uint8), torch.zeros(8).long())
    z = torch.rand(2, *feature_shape(model, (1, 12, 12)))
    assert DecoderAttack(**TINY).attacker(model, train)(z).shape == (2, 1, 12, 12)
    odd = Split(torch.zeros(8, 1, 20, 20, dtype=torch.uint8), torch.zeros(8).long())
    model.encoder.append(torch.nn.AdaptiveAvgPool2d(3))
    with pytest.raises(ValueError, match='power of 2'): DecoderAttack(**TINY).attacker(model, odd)


def test_it_learns(digits):
    model = victim(0.002)
    attacks = (DecoderAttack(**(TINY | dict(n_epochs=n, width=16))) for n in (1, 12))
    short, long = (train_attack(a, model, digits.train) for a in attacks)
    assert [len(h) for _, h in (short, long)] == [1, 12] and long[1][-1]['mse'] < 0.5*long[1][0]['mse']
    assert score_attack(model, long[0], digits.test)['mse'] < 0.7*score_attack(model, short[0], digits.test)['mse']


def test_the_rate_falls_along_a_cosine_and_is_set_everywhere(digits, tmp_path):
    assert [cosine(1, 0, t) for t in (0, 1/3, 0.5, 1)] == pytest.approx([1, 0.75, 0.5, 0])
    opts = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0) for _ in range(2)]
    set_rates(dict(a=opts[0], net=torch.nn.Linear(1, 1), b=opts[1]), 0.25)
    assert [o.param_groups[0]['lr'] for o in opts] == [0.25, 0.25]
    train_attack(DecoderAttack(**TINY, lr=0.004), victim(), digits.train, checkpoint=tmp_path/'c.pt')
    group, = torch.load(tmp_path/'c.pt', weights_only=True)['state']['opt']['param_groups']
    assert group['lr'] == pytest.approx(cosine(0.004, 1e-5, 1/2)) and group['weight_decay'] == 1e-4


def test_divergence_has_a_name_and_leaves_no_checkpoint(digits, tmp_path):
    attack = DecoderAttack(**(TINY | dict(lr=1e30)))
    with pytest.raises(AttackDivergedError, match='row: decoder: not a number in epoch 1 .*lower lr') as e:
        train_attack(attack, victim(), digits.train, checkpoint=tmp_path/'c.pt', label='row: decoder')
    assert '\n' not in str(e.value) and not (tmp_path/'c.pt').exists()


def test_finite_means_and_weights():
    net = torch.nn.Linear(1, 1)
    assert check_finite('a', 0, dict(mse=0.1), net) == dict(mse=0.1)
    for entry in (dict(mse=math.nan), dict(mse=0.1, penalty=math.inf)):
        with pytest.raises(AttackDivergedError, match='a: not a number in epoch 3'): check_finite('a', 2, entry, net)
    with torch.no_grad(): net.weight.fill_(math.inf)
    with pytest.raises(AttackDivergedError, match='grow less'): check_finite('a', 0, dict(mse=0.1), net, 'grow less')


def test_means_of_an_epoch_are_over_its_batches(digits):
    seen = []
    def step(x, z):
        seen.append(len(x))
        return dict(mean=x.mean(), n=torch.tensor(float(len(x))))
    means = epoch_means(step, victim().eval(), digits.train, 50)
    assert seen == [50]*5 and means['n'] == 50 and 0 < means['mean'] < 1
