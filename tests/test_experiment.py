import pytest
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError

from cem_nb.datasets import load_data
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import PRESETS, CEMSettings, DataSettings, Experiment, ModelSettings, TrainSettings, preset
from cem_nb.gan import GAN
from cem_nb.methods import DEFENSES
from cem_nb.oracle import Oracle


def test_a_part_has_the_defaults_of_the_function_it_is_made_of():
    assert load_data(**dict(DataSettings())).fingerprint == load_data().fingerprint
    assert Experiment().model.noise_std == 0.025 and Experiment().training.epochs == 240


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.fixed_dictionaries({}, optional=dict(
    noise_std=st.floats(0.001, 1), lam=st.floats(0, 100), cut=st.integers(1, 7), width=st.floats(0.1, 2), lr=st.floats(1e-4, 1),
    seed=st.integers(0, 9), n_train=st.integers(1, 999), decoder__width=st.integers(1, 64), epochs=st.integers(2, 300),
    defense=st.sampled_from([d for d in DEFENSES if DEFENSES[d].cls.cem]), variant=st.sampled_from(['diag', 'full', 'release']))))
def test_what_is_replaced_is_what_settings_say_and_nothing_else_moves(changes):
    base = preset('quick', lam=4.0)
    got, was = base.replace(**changes).settings(), base.settings()
    if changes.get('lam') == 0:
        assert got['cem'] is False and got['lam'] == 0
        changes = {k: v for k, v in changes.items() if k not in ('lam', 'variant')}
        for s in (got, was):
            for k in ('cem', 'lam', 'variant', 'n_components'): s.pop(k)
    own = ('params',) if 'defense' in changes else ()  # another defence has settings of its own
    assert {k: v for k, v in got.items() if k not in own} == {k: v for k, v in (was | changes).items() if k not in own}


def test_a_whole_part_can_be_replaced_and_settings_beside_it_win():
    parts = dict(training=TrainSettings(epochs=3, lr=0.1), model=ModelSettings(arch='resnet20'), data=DataSettings(n_train=99))
    got = Experiment().replace(**parts, lr=0.2)
    assert (got.model, got.data, got.training) == (parts['model'], parts['data'], TrainSettings(epochs=3, lr=0.2))
    assert Experiment().replace(cem=CEMSettings(lam=4.0)).cem.lam == 4
    with pytest.raises(ValueError, match='give True or False'): Experiment().replace(cem=dict(lam=4.0))


def test_attacks_that_are_given_keep_what_they_were_given():
    mine = preset('quick', (DecoderAttack(n_epochs=50, width=64), GAN())).attacks
    alone = preset('quick').attacks
    assert (mine[0].n_epochs, mine[0].width, mine[0].blocks) == (50, 64, alone[0].blocks) and mine[1] == alone[1]


def test_a_whole_number_is_the_same_setting_however_it_comes(monkeypatch):
    monkeypatch.setitem(DEFENSES, 'Mine', DEFENSES['DistCorr']._replace(settings=dict(alpha=1, noise_factor=1.0)))
    e = Experiment(defense='Mine')
    for same in (Experiment.model_validate_json(e.model_dump_json()), e.replace(params=dict(alpha=1)), e.replace(params=dict(alpha=1.0))):
        assert same.model_dump_json() == e.model_dump_json()


def test_cem_is_on_off_or_as_it_was():
    base = Experiment()
    with_cem = base.replace(lam=2.0, variant='full')
    assert base.replace(cem=True).cem == CEMSettings() and with_cem.replace(cem=True) == with_cem
    assert with_cem.replace(cem=False) == base == with_cem.replace(lam=0) and with_cem.replace(lam=3.0).cem.variant == 'full'
    assert (base.row, with_cem.row) == ('Bottleneck', 'Bottleneck+CEM')


def test_a_weight_of_zero_is_no_cem_and_cem_takes_two_epochs():
    assert Experiment(cem=CEMSettings(lam=0.0)) == Experiment() and Experiment(cem=CEMSettings(lam=0.0)).row == 'Bottleneck'
    with pytest.raises(ValueError, match='second epoch'): Experiment().replace(cem=True, epochs=1)


def test_the_papers_preset_is_made_for_its_network_and_data():
    e = preset('paper', arch='resnet20')
    assert e.replace(arch='resnet20', lam=4.0).training.epochs == 120
    for other in (dict(arch='vgg11'), dict(dataset='facescrub')):
        with pytest.raises(ValueError, match="preset\\('paper'"): e.replace(**other)


def test_another_defence_does_not_inherit_settings():
    e = Experiment(defense='DistCorr', params=dict(alpha=0.7))
    assert e.replace(defense='DistCorr', cem=True).params['alpha'] == 0.7
    assert e.replace(defense='Dropout').params == DEFENSES['Dropout'].settings and e.replace(lr=0.1).params['alpha'] == 0.7


@pytest.mark.parametrize('bad', [dict(epochs=0), dict(lr='0.1'), dict(lr=float('inf')), dict(noise_std=-0.1), dict(wdith=1.0),
                                 dict(noise_std=0.0, lam=1.0), dict(params={'alpha': 1.0}), dict(seed=-1), dict(decoder__widht=3),
                                 dict(oracle__draws=3), dict(defense='Dropuot'), dict(defense='No_defense', lam=1.0), dict(lam=-1.0),
                                 dict(attacks=(DecoderAttack(), DecoderAttack(width=8)))])
def test_bad_settings(bad):
    with pytest.raises(ValueError): Experiment().replace(**bad)


def test_a_record_survives_json():
    e = preset('small', (DecoderAttack(), GAN(), Oracle()), lam=2.0, defense='PATROL')
    assert Experiment.model_validate_json(e.model_dump_json()) == e
    with pytest.raises(ValidationError): Experiment.model_validate_json(e.model_dump_json().replace('"decoder"', '"decodre"'))


def test_each_data_set_has_the_papers_schedule():
    def trained(**settings):
        e = preset('paper', **settings)
        return e.model.arch, e.training.epochs, e.training.batch_size, e.data.image_size
    assert trained(dataset='cifar10') == ('vgg11', 240, 128, None)
    assert trained(dataset='tinyimagenet', arch='resnet20') == ('resnet20', 120, 256, None)
    assert trained(dataset='facescrub') == ('vgg11', 240, 256, None)
    assert trained(dataset='folder:x', arch='resnet20_wide', image_size=48) == ('resnet20_wide', 120, 128, 48)
    assert preset('quick', dataset='facescrub').training.epochs == PRESETS['quick']['epochs'] < 120
    gan, = preset('paper', (GAN(),)).attacks
    assert (gan.n_epochs, gan.lr, gan.penalty, gan.width, gan.blocks) == (150, 0.005, 10.0, 64, 8)
    with pytest.raises(ValueError, match='quick'): preset('quik')


def test_zero_has_one_name():
    "-0.0 computes the same as 0.0, so it must not be stored as another run."
    minus = dict(weight_decay=-0.0, momentum=-0.0, drops=(-0.0, 0.5), noise_std=-0.0, decoder__weight_decay=-0.0)
    plus = {k: (0.0, 0.5) if k == 'drops' else 0.0 for k in minus}
    assert Experiment().replace(**minus).model_dump_json() == Experiment().replace(**plus).model_dump_json()
    twin = [Experiment(defense='DistCorr', params=dict(alpha=v)).model_dump_json() for v in (-0.0, 0.0, 0)]
    assert len(set(twin)) == 1
