import pytest
import torch

from cem_nb.core import stage_seed
from cem_nb.loop import epochs


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


def test_an_epoch_that_keeps_nothing_is_an_error():
    with pytest.raises(RuntimeError, match='append'): list(epochs(2, state={}, history=[], seed=0, stage='x'))


def test_seeds_do_not_collide():
    assert len({stage_seed(s, w, e) for s in range(5) for w in ('train', 'decoder') for e in range(240)}) == 2400
