import random
from io import BytesIO

import pytest
import torch

from cem_nb.core import stage_seed
from cem_nb.files import read_stamped, stamped
from cem_nb.engine import computed_with
from cem_nb.loop import epochs, fused, made_in, seconds_in


def fit(n, path, stop=None):
    torch.manual_seed(1)
    net = torch.nn.Linear(3, 1)
    opt, history = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), []
    for epoch in epochs(n, state=dict(net=net, opt=opt), history=history, seed=0, stage='demo', checkpoint=path):
        if epoch == stop: break
        loss = (net(torch.randn(16, 3)) - 1).square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
        history.append(dict(loss=loss.item()))
    return net.weight.detach(), history, torch.rand(1)


@pytest.mark.parametrize('stop', [1, 3, 5])
def test_a_stopped_loop_goes_on_as_if_nothing_had_happened(tmp_path, stop):
    whole = fit(6, None)
    fit(6, tmp_path/'c.pt', stop)
    resumed = fit(6, tmp_path/'c.pt')
    assert torch.equal(whole[0], resumed[0]) and whole[1] == resumed[1] and torch.equal(whole[2], resumed[2])


def test_damaged_and_unwritable_checkpoints_cost_time_only(tmp_path):
    (tmp_path/'c.pt').write_bytes(b'half a checkpoint')
    with pytest.warns(UserWarning, match='first epoch'): assert fit(3, tmp_path/'c.pt')[1] == fit(3, None)[1]
    (tmp_path/'file').write_text('')
    with pytest.warns(UserWarning, match='no checkpoint'): assert fit(3, tmp_path/'file'/'c.pt')[1] == fit(3, None)[1]


def saved_after(tmp_path, stop=3):
    fit(6, tmp_path/'c.pt', stop)
    return tmp_path/'c.pt'


def contents(path): return torch.load(BytesIO(read_stamped(path)), weights_only=True)


def put(path, content):
    torch.save(content, file := BytesIO())
    path.write_bytes(stamped(file.getvalue()))


def test_no_bit_of_a_checkpoint_may_turn(tmp_path):
    path, want, rng = saved_after(tmp_path), fit(6, None), random.Random(5)
    good = path.read_bytes()
    for _ in range(20):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match='not as it was written'): found = fit(6, path)
        assert torch.equal(found[0], want[0]) and found[1] == want[1]


@pytest.mark.parametrize('change', [
    lambda d: [1],
    lambda d: {},
    lambda d: d | dict(state=dict(net=d['state']['net'])),
    lambda d: d | dict(state=d['state'] | dict(net={})),
    lambda d: d | dict(state=d['state'] | dict(net=torch.nn.Linear(5, 1).state_dict())),
    lambda d: d | dict(state=d['state'] | dict(net=torch.nn.Linear(3, 1).state_dict(), opt=dict(param_groups=[]))),
    lambda d: d | dict(state=d['state'] | dict(more={})),
    lambda d: d | dict(history=d['history']*3),
    lambda d: d | dict(history=[]),
    lambda d: {k: v for k, v in d.items() if k != 'history'},
])
def test_a_checkpoint_of_something_else_costs_time_only(tmp_path, change):
    path, want = saved_after(tmp_path), fit(6, None)
    put(path, change(contents(path)))
    with pytest.warns(UserWarning, match='starting from the first epoch'): found = fit(6, path)
    assert torch.equal(found[0], want[0]) and found[1] == want[1]


def test_seconds_are_those_of_all_sessions(tmp_path):
    assert seconds_in(tmp_path/'c.pt') == 0
    path = saved_after(tmp_path)
    put(path, contents(path) | dict(seconds=1000.0))
    fit(6, path)
    assert 1000 < seconds_in(path) < 1010
    path.write_bytes(b'half')
    assert seconds_in(path) == 0


@pytest.mark.parametrize('kind, settings', [(torch.optim.Adam, dict(lr=0.1)), (torch.optim.SGD, dict(lr=0.1, momentum=0.9))])
def test_a_fused_step_takes_gradients_of_any_layout(kind, settings):
    nets = [torch.nn.Conv2d(4, 4, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    opts = fused(kind, nets[0], **settings), kind(nets[1].parameters(), **settings)
    for step in range(3):
        slope = torch.randn(4, 4, 3, 3).contiguous(memory_format=torch.channels_last)
        for net, opt in zip(nets, opts):
            net.weight.grad = slope.clone()
            opt.step()
    assert torch.allclose(nets[0].weight, nets[1].weight, atol=1e-6)


@pytest.mark.parametrize('kind, settings', [(torch.optim.Adam, dict(lr=0.1)), (torch.optim.SGD, dict(lr=0.1, momentum=0.9))])
def test_a_fused_step_takes_a_state_of_any_layout(kind, settings):
    "As of a training whose weights lay in channels_last."
    nets = [torch.nn.Conv2d(4, 4, 3) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    opts = fused(kind, nets[0], **settings), kind(nets[1].parameters(), **settings)
    for step in range(3):
        slope = torch.randn(4, 4, 3, 3)
        for net, opt in zip(nets, opts):
            net.weight.grad = slope.clone()
            opt.step()
        saved = opts[0].state_dict()
        for kept in saved['state'].values():
            kept |= {k: v.contiguous(memory_format=torch.channels_last) for k, v in kept.items() if torch.is_tensor(v) and v.ndim == 4}
        opts[0].load_state_dict(saved)
        assert any(v.stride() != nets[0].weight.stride() for v in opts[0].state[nets[0].weight].values() if torch.is_tensor(v) and v.ndim)
    assert torch.allclose(nets[0].weight, nets[1].weight, atol=1e-6)


def test_what_was_begun_elsewhere_or_with_other_versions_says_so(tmp_path):
    path = saved_after(tmp_path)
    here, = made_in(path)
    assert here == computed_with(torch.device('cpu'))
    put(path, contents(path) | dict(made=[here | dict(hardware='another machine, bf16'), here | dict(torch='1.0')]))
    fit(6, path)
    assert made_in(path) == [here | dict(hardware='another machine, bf16'), here | dict(torch='1.0'), here]
    put(path, {k: v for k, v in contents(path).items() if k != 'made'} | dict(hardware=['another machine']))  # as it was before 0.2.1
    assert made_in(path) == [dict(hardware='another machine')]
    put(path, {k: v for k, v in contents(path).items() if k != 'hardware'})  # and before that
    assert made_in(path) == made_in(tmp_path/'none.pt') == []


def test_an_epoch_that_keeps_nothing_is_an_error():
    with pytest.raises(RuntimeError, match='append'): list(epochs(2, state={}, history=[], seed=0, stage='x'))


def test_seeds_do_not_collide():
    assert len({stage_seed(s, w, e) for s in range(5) for w in ('train', 'decoder') for e in range(240)}) == 2400
