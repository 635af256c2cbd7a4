"What CONTRIBUTING shows: a defence and an attack defined in one file outside the package become rows and a column of Table 1."
import runpy
from pathlib import Path

import pytest

from cem_nb.attack import ATTACKS
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import PRESETS
from cem_nb.parameters import TableParameters, table_base, table_rows
from cem_nb.show import score_table
from cem_nb.sweep import sweep

SCRIPT = Path(__file__).resolve().parent.parent/'examples'/'own_methods.py'


@pytest.fixture
def own():
    return runpy.run_path(str(SCRIPT), run_name='own_methods')


def test_a_toy_is_a_row_and_a_column_of_table_1(own, monkeypatch):
    assert own['Linear'].label == 'linear'
    monkeypatch.setitem(PRESETS, 'quick', dict(width=0.125, epochs=3, batch_size=64, lr=0.02, n_train=256,
                                               decoder__width=8, decoder__blocks=0, decoder__n_epochs=2))
    p = TableParameters(methods='Bottleneck,Shrink', attacks='decoder,linear')
    frame = sweep(table_base(p), table_rows(p))
    assert list(frame.defense) == ['Bottleneck']*2 + ['Shrink']*2 and frame.mse_test_linear.notna().all()
    html = score_table(frame, 1).to_html()
    assert 'Shrink+CEM' in html and 'linear' in html
    assert (frame.mse_test_linear < frame.mse_test_linear.max()*2).all() and DecoderAttack.name in ATTACKS


def test_each_is_at_most_30_lines():
    import ast
    classes = [n for n in ast.parse(SCRIPT.read_text()).body if isinstance(n, ast.ClassDef)]
    assert len(classes) == 2 and all(n.end_lineno - n.lineno + 1 + len(n.decorator_list) <= 30 for n in classes)
