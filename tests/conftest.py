import os

# one thread: small tensors gain nothing from more, and sums keep their order
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch

import cem_nb.decoder, cem_nb.gan, cem_nb.oracle  # each registers its attack
from cem_nb.attack import ATTACKS
from cem_nb.methods import DEFENSES


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: runs whole notebooks or processes; deselect with -m "not slow"')
    config.addinivalue_line('markers', 'faults: kills, full disks, power cuts, lost machines; run by -m faults only')


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    "A store, a data folder and a figures folder of the test's own."
    for name in ('DATA', 'RUNS', 'RESULTS'): monkeypatch.setenv(f'CEM_{name}', str(tmp_path/name.lower()))
    torch.manual_seed(0)
    return tmp_path


@pytest.fixture(autouse=True)
def registries():
    "What a test adds is gone afterwards, and what it takes out is back in its place: their order is that of the tables."
    before = [(registry, dict(registry)) for registry in (ATTACKS, DEFENSES)]
    yield
    for registry, things in before:
        registry.clear()
        registry.update(things)
