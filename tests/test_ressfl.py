import copy

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from cem_nb.core import seeded
from cem_nb.datasets import load_data
from cem_nb.ressfl import ResSFL
from cem_nb.ssim import ssim


def test_images_that_are_too_small_are_refused_before_training():
    with pytest.raises(ValueError, match='4 pixels'):
        ResSFL(alpha=1.0, t=0.3).model('vgg11', 10, image_size=4, width=0.125, noise_std=0.025)


def test_its_state_can_be_asked_for_before_there_is_a_model():
    d = ResSFL(alpha=1.0, t=0.3)
    d.load_state_dict(d.state_dict())


def test_the_hinge_is_alpha_times_what_exceeds_the_threshold():
    torch.manual_seed(0)
    x = torch.rand(8, 1, 16, 16)
    d = ResSFL(alpha=2.0, t=0.0)
    z = d.model('vgg11', 10, in_channels=1, image_size=16, width=0.125, noise_std=0.025).smash(x).detach()
    for _ in range(60): d.step(x, z)
    s = structural_similarity_index_measure(d.proxy.eval()(z), x, data_range=1.0).item()
    args = x, None, None, z, None
    assert s > 0.05 and d.loss(*args).item() == pytest.approx(2*s, rel=1e-3)
    d.t = s/2
    assert d.loss(*args).item() == pytest.approx(s, rel=1e-3)
    d.t = s + 0.01
    assert d.loss(*args) == 0


def test_the_proxy_and_the_model_learn_apart():
    d = ResSFL(alpha=1.0, t=0.0)
    model = d.model('vgg11', 10, in_channels=1, image_size=16, width=0.125, noise_std=0.025)
    x = torch.rand(16, 1, 16, 16)
    z_hat = model.encode(x)
    z = model.send(z_hat)
    before = copy.deepcopy(d.proxy.state_dict())
    d.loss(x, None, z_hat, z, None).backward()
    assert all(p.grad is None for p in d.proxy.parameters()) and next(model.encoder.parameters()).grad.abs().sum() > 0
    assert all(torch.equal(v, before[k]) for k, v in d.proxy.state_dict().items())  # nor batch statistics
    weights = copy.deepcopy(model.state_dict())
    d.step(x, z.detach())
    assert any(not torch.equal(v, before[k]) for k, v in d.proxy.state_dict().items())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_an_adversarial_defence_lowers_the_proxys_ssim():
    "The same proxy, trained along with an encoder that heeds it and with one that does not."
    def last_ssim(alpha):
        d = ResSFL(alpha=1.0, t=0.0)
        torch.manual_seed(0)
        model = d.model('vgg11', 10, in_channels=1, image_size=16, width=0.125, noise_std=0.025)
        opt = torch.optim.SGD(model.parameters(), 0.05)
        x = load_data('digits', n_train=256).train.x[:48].float()/255
        for _ in range(40):
            z = model.smash(x)
            d.step(x, z.detach())
            loss = alpha*d.loss(x, None, None, z, None)
            opt.zero_grad(); loss.backward(); opt.step()
        return ssim(d.proxy.eval()(model.smash(x)), x).item()
    free, heeded = last_ssim(0.0), last_ssim(5.0)
    assert heeded < free - 0.05, (free, heeded)


def test_the_proxys_optimiser_follows_it_to_another_precision():
    d = ResSFL(alpha=1.0, t=0.0)
    x = torch.rand(8, 1, 16, 16)
    z = d.model('vgg11', 10, in_channels=1, image_size=16, width=0.125, noise_std=0.025).smash(x).detach()
    d.step(x, z)
    moments = [s['exp_avg'].clone() for s in d.proxy_opt.state.values()]
    before = copy.deepcopy(d.proxy.state_dict())
    d.double()
    assert all(torch.equal(s['exp_avg'], m.double()) for s, m in zip(d.proxy_opt.state.values(), moments, strict=True))
    d.step(x.double(), z.double())
    assert not torch.equal(d.proxy[0].body[2].weight, before['0.body.2.weight'].double())


def test_sizes_come_from_the_network():
    "What is left out of the call is the default of the network, said there."
    d = ResSFL(alpha=1.0, t=0.0)
    with seeded(0, 'init'): z = d.model('vgg11', 10, noise_std=0.025).smash(torch.rand(1, 3, 32, 32))
    assert d.proxy(z.expand(2, -1, -1, -1)).shape == (2, 3, 32, 32)
