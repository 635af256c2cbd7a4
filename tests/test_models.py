import pytest
import torch
from hypothesis import given, settings, strategies as st

from cem_nb.models import Decoder, feature_shape, n_params, split_model


def test_counts_of_table_9():
    m = split_model()
    assert n_params(m.encoder) == 85_256 and n_params(m) == 9_774_994
    assert n_params(Decoder((8, 8, 8), (3, 32, 32))) == 711_539


@settings(deadline=None, max_examples=12, derandomize=True)
@given(arch=st.sampled_from(['vgg11', 'resnet20', 'resnet20_wide']), size=st.sampled_from([8, 16, 32, 48, 64]),
       cut=st.sampled_from([1, 3, 5]), channels=st.sampled_from([1, 3]), bottleneck=st.sampled_from([None, 8]))
def test_any_cut_classifies_and_is_smashed_into_0_1(arch, size, cut, channels, bottleneck):
    m = split_model(arch, 7, in_channels=channels, image_size=size, width=0.125, cut=cut, bottleneck=bottleneck).eval()
    x = torch.rand(2, channels, size, size)
    assert m(x).shape == (2, 7)
    z_hat = m.encode(x)
    assert z_hat.shape[1:] == feature_shape(m, (channels, size, size))
    assert 0 <= z_hat.min() and z_hat.max() <= 1
    assert bottleneck is None or z_hat.shape[1] == 8


def test_the_cut_does_not_change_the_network():
    "Without bottleneck the same layers stand before and behind the cut, whatever it is."
    assert len({n_params(split_model(cut=c, bottleneck=None)) for c in range(1, 8)}) == 1


def test_noise_and_dropout_stay_on_in_eval():
    m = split_model(width=0.125, noise_std=0.1, drop=0.5).eval()
    z_hat = torch.full((400, 8, 4, 4), 0.5)
    z = m.send(z_hat)
    kept = z[z != 0]
    assert abs(len(kept)/z.numel() - 0.5) < 0.01
    assert abs(kept.mean() - 0.5) < 0.002 and abs(kept.std() - 0.1) < 0.002
    assert torch.equal(split_model(width=0.125, noise_std=0.0).send(z_hat), z_hat)


@pytest.mark.parametrize('bad', [dict(arch='vgg19'), dict(cut=0), dict(cut=8), dict(arch='resnet20', cut=2),
                                 dict(noise_std=-1.0), dict(noise_std=float('nan')), dict(drop=1.0)])
def test_bad_models(bad):
    with pytest.raises(ValueError): split_model(**bad)


def test_decoder_needs_a_power_of_two():
    for image in ((3, 48, 48), (3, 32, 64)):
        with pytest.raises(ValueError, match='power of 2'): Decoder((8, 8, 8), image)
