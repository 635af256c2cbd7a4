"Guards and seeds."
import math

import numpy as np
import pytest
import torch

from cem_nb.core import number, stage_seed, whole

NO_NUMBERS = [math.inf, math.nan, None, '1', True, np.True_, torch.tensor(True), np.ones(2), torch.ones(2), [1]]


@pytest.mark.parametrize('bad', [*NO_NUMBERS, 1.5, -1])
def test_what_is_no_whole_number_is_refused_by_the_settings_name(bad):
    with pytest.raises(ValueError, match='n is .*give a whole number >= 0'): whole(n=bad, least=0)


@pytest.mark.parametrize('bad', [*NO_NUMBERS, -0.1])
def test_what_is_no_number_is_refused_by_the_settings_name(bad):
    with pytest.raises(ValueError, match='s is .*give a finite number >= 0'): number(s=bad)


def test_numbers_of_any_kind_are_taken():
    for three in (3, 3.0, np.int64(3), np.float32(3), torch.tensor(3), torch.tensor(3.0)):
        assert whole(n=three) == 3 and type(whole(n=three)) is int and number(s=three) == 3


def test_a_seed_is_the_same_however_its_number_comes():
    assert len({stage_seed(s, 'x', e) for s in (0, np.int64(0), 0.0, torch.tensor(0)) for e in (3, np.int32(3))}) == 1
    assert stage_seed(0, 'x', 3) == 4762066322245803458  # stored runs depend on it
    for bad in (-1, 0.5, False, None, 'a'):
        with pytest.raises(ValueError, match='seed is'): stage_seed(bad, 'x')
