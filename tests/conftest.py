import os

# one thread: small tensors gain nothing from more, and sums keep their order
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: runs whole notebooks or processes; deselect with -m "not slow"')
    config.addinivalue_line('markers', 'faults: kills, full disks, power cuts, lost machines; run by -m faults only')


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    "A store, a data folder and a figures folder of the test's own."
    for name in ('DATA', 'RUNS', 'RESULTS'): monkeypatch.setenv(f'CEM_{name}', str(tmp_path/name.lower()))
    torch.manual_seed(0)
    return tmp_path
