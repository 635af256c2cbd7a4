import subprocess
import sys

import pytest
import torch

from cem_nb.defense import Bottleneck, Defense, Dropout, NoDefense, defense
from cem_nb.methods import CANDIDATES, DEFENSES, PAPER_ROWS, make_defense
from cem_nb.ressfl import ResSFL


def test_rows_and_their_settings():
    assert tuple(DEFENSES) == PAPER_ROWS and len(DEFENSES) == 8
    assert make_defense('Dropout', {'p': 0.4}).model('vgg11', 10, width=0.125, noise_std=0.025).drop == 0.4
    no = make_defense('No_defense').model('vgg11', 10, width=0.125, noise_std=0.025)
    assert no.encode(torch.rand(1, 3, 32, 32)).shape[1] == 16  # no bottleneck of 8
    for name in ('Noise_Nopeek', 'Noise_ARL'):
        factor = DEFENSES[name].settings['noise_factor']
        model = make_defense(name).model('vgg11', 10, noise_std=0.1, width=0.125)
        assert factor > 1 and model.noise_std == pytest.approx(0.1*factor)
    for name, params in (('Nodefense', {}), ('Bottleneck', {'alpha': 1.0}), ('DistCorr', {'alpha': -1.0}),
                         ('ResSFL', {'t': -0.1}),
                         ('Noise_ARL', {'noise_factor': 0.0}), ('PATROL', {'alpha': float('nan')}),
                         ('PATROL', {'lipschitz': float('inf')}), ('Dropout', {'p': 1.0})):
        with pytest.raises(ValueError): make_defense(name, params)


def test_one_row_alone_has_no_twin_with_cem():
    assert [name for name, m in DEFENSES.items() if not m.cls.cem] == ['No_defense']


def test_the_order_of_the_rows_does_not_depend_on_the_order_of_the_imports():
    code = """
from cem_nb.defense import Defense, defense
defense('Mine')(Defense)
import cem_nb.patrol, cem_nb.ressfl, cem_nb.distcorr
from cem_nb.methods import DEFENSES, PAPER_ROWS
defense('Later')(Defense)
assert tuple(DEFENSES) == (*PAPER_ROWS, 'Mine', 'Later'), list(DEFENSES)"""
    subprocess.run([sys.executable, '-c', code], check=True)


def test_every_setting_of_a_row_is_known_and_was_tried():
    assert all(make_defense(c['defense'], c['params']) for c in CANDIDATES)
    tried = {c['defense'] for c in CANDIDATES if DEFENSES[c['defense']].settings.items() >= c['params'].items()}
    assert tried == set(DEFENSES)
    assert DEFENSES['ResSFL'].settings == dict(alpha=0.3, t=0.3, noise_factor=1.0)  # with the constructor's default


def test_registering():
    with pytest.raises(ValueError, match='already'): defense('Dropout', alpha=0.1, t=0.1)(ResSFL)
    for wrong in (dict(alpha=0.1), dict(alpha=0.1, t=0.1, beta=1.0)):
        with pytest.raises(TypeError): defense('Own', **wrong)(ResSFL)
    assert 'Own' not in DEFENSES
    assert defense('Own', alpha=0.1, t=0.2)(ResSFL) is ResSFL and make_defense('Own', dict(t=0.4)).t == 0.4
    defense('Own', alpha=0.5, t=0.2)(ResSFL)  # a cell that is changed and run again
    assert make_defense('Own').alpha == 0.5 and list(DEFENSES)[-1] == 'Own'


def test_the_interface_does_nothing():
    x, y, z, logits = torch.rand(4, 1, 16, 16), torch.arange(4), torch.rand(4, 8, 4, 4), torch.rand(4, 10)
    for cls in (Defense, Bottleneck, NoDefense, lambda: Dropout(0.1)):
        d = cls()
        assert d.loss(x, y, z, z, logits) == 0 and not d.state_dict()
        assert d.step(x, z) is d.after_backward(None) is d.end_epoch(None, None, 1.0) is None
    with pytest.raises(TypeError): Defense().model('vgg11', 10)  # the noise is the table's, no default
