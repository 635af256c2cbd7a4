import os

import pytest

from cem_nb.core import NonNegative, Record
from cem_nb.defense import Bottleneck, defense
from cem_nb.experiment import Experiment, preset
from cem_nb.methods import DEFENSES
from cem_nb.parameters import ParameterError, TableParameters, as_items, changed, read_parameters, table_base, table_rows


def test_papermills_shapes_mean_the_same():
    for v in ('0,1', '[0, 1]', [0, 1], (0, 1), '0, 1, 0'): assert TableParameters(seeds=v).seeds == (0, 1)
    assert TableParameters(seeds=3).seeds == (3,) and TableParameters(methods='all').methods == tuple(DEFENSES)
    assert as_items('') == ()


@pytest.mark.parametrize('bad, cause', [
    (dict(lam='abc'), "lam is 'abc'"), (dict(lam=-1.0), 'lam is -1'), (dict(lam=float('nan')), 'lam is nan'),
    (dict(methods='Dropuot'), "no defence 'Dropuot'"), (dict(methods=''), 'methods'), (dict(seeds='a'), 'seeds'),
    (dict(attacks='gna'), "no attack 'gna'"), (dict(preset='quik'), "no preset 'quik'"), (dict(arch='vgg'), "no network 'vgg'"),
    (dict(noise_std=0.0), 'needs noise'), (dict(methods='No_defense'), 'no row with CEM'), (dict(restarts=0), 'restarts is 0'),
    (dict(In=['# Parameters\nlma = 3']), "did you mean 'lam'?"), (dict(In=['# Parameters\nfoo = 3']), 'It has preset')])
def test_bad_parameters_are_named(bad, cause):
    with pytest.raises(ParameterError) as e: read_parameters(bad)
    assert cause in str(e.value) and len(str(e.value).splitlines()) == 1


def test_what_a_notebook_does_not_list_has_its_default():
    class Own(Record):
        sigma: NonNegative = 0.5
    assert read_parameters(dict(lam=2.0, other=3)).lam == 2.0 and read_parameters({}, Own).sigma == 0.5
    assert read_parameters(dict(sigma=0.1, In=['x = 1', '# Parameters\nsigma = 0.1']), Own).sigma == 0.1


def test_defaults_are_those_of_the_experiment():
    p, e = TableParameters(), Experiment().replace(cem=True)
    assert (p.lam, p.noise_std, p.arch, p.variant) == (e.cem.lam, e.model.noise_std, e.model.arch, e.cem.variant)
    assert changed(p) == {} and changed(TableParameters(lam=8.0, device='cpu'), but=('device',)) == dict(lam=8.0)


def test_all_methods_are_those_that_are_registered_now():
    class Mine(Bottleneck): pass
    defense('Mine')(Mine)
    assert TableParameters().methods == TableParameters(methods='all').methods == tuple(DEFENSES) and 'Mine' in DEFENSES
    assert changed(TableParameters()) == {} and changed(TableParameters(methods='Mine')) == dict(methods=('Mine',))


def test_rows_are_the_papers_and_lam_zero_leaves_those_without_cem():
    rows = table_rows(TableParameters())
    assert len(rows) == 15 and sum('lam' in r for r in rows) == 7 and rows[0] == dict(defense='No_defense', cem=False)
    assert all(r['cem'] is False for r in table_rows(TableParameters(lam=0.0, noise_std=0.0)))
    base = table_base(TableParameters(attacks='decoder,oracle', restarts=3, dataset='folder:x', image_size=48, noise_std=0.1))
    assert [(a.name, a.restarts) for a in base.attacks] == [('decoder', 3), ('oracle', 1)]
    assert (base.data.dataset, base.data.image_size, base.model.noise_std, base.preset) == ('folder:x', 48, 0.1, 'quick')
    assert {base.replace(**r).row for r in rows} >= {'No_defense', 'PATROL+CEM'}
    assert table_base(TableParameters(preset='fast')).engine.precision == 'bf16' and base.engine.precision == 'float32'
    wide = table_base(TableParameters(preset='fast', width=1, precision='float32'))
    assert wide.model.width == 1 and wide.engine.precision == 'float32' and wide.training == preset('fast').training
    with pytest.raises(ParameterError, match='precision'): read_parameters(dict(precision='half'))
    with pytest.raises(ParameterError, match='width'): read_parameters(dict(width=0.0))


@pytest.mark.parametrize('bad', [dict(seeds=[[0, 1]]), dict(methods=[['Bottleneck']]), dict(seeds={'a': 1}), dict(seeds='0_1'),
                                 dict(seeds=2**63), dict(seeds=True)])
def test_values_in_values_and_numbers_as_python_writes_them_are_refused(bad):
    with pytest.raises(ParameterError, match=next(iter(bad))) as e: read_parameters(bad)
    assert len(str(e.value).splitlines()) == 1


def test_where_results_cannot_be_saved_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    for place in (tmp_path/'file', tmp_path/'file'/'below'):
        monkeypatch.setenv('CEM_RESULTS', str(place))
        with pytest.raises(ParameterError, match='results cannot be saved.*set CEM_RESULTS'): read_parameters({})
    monkeypatch.setenv('CEM_RESULTS', str(tmp_path/'new'/'folder'))
    assert read_parameters({}) == TableParameters() and not (tmp_path/'new').exists()
    monkeypatch.setattr(os, 'access', lambda *a: False)
    with pytest.raises(ParameterError, match='cannot be written to'): read_parameters({})
