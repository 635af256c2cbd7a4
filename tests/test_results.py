import matplotlib.pyplot as plt
import pandas as pd
import pytest

from cem_nb.core import results_dir
from cem_nb.parameters import ParameterError, TableParameters
from cem_nb.results import committed, read_result, save, stem, table_result
from cem_nb.store import SCHEMA, RunError

FRAME = pd.DataFrame(dict(defense=['Bottleneck', 'Bottleneck'], cem=[False, True], seed=[0, 0], acc_test=[50.0, float('nan')],
                          date=['2026-11-25']*2, hardware=['a CPU']*2, torch=['2.11.0']*2, seconds_train=[3.5, 4.25]))


def test_a_name_has_what_differs_from_the_defaults():
    assert stem('table1', TableParameters()) == 'table1_digits_quick'
    assert stem('table1', TableParameters(dataset='folder:data/faces/', device='cpu')) == 'table1_folder-faces_quick'
    assert stem('table1', TableParameters(lam=1e-5)) == 'table1_digits_quick_lam-1e-05'
    assert stem('table2', TableParameters(lam=0.5, seeds='0,1', arch='resnet20')) == 'table2_digits_quick_lam-0.5_seeds-0-1_arch-resnet20'


def test_what_differs_differs_in_the_name(tmp_path, monkeypatch):
    for place in ('one', 'two'): (tmp_path/place/'imgs').mkdir(parents=True)
    monkeypatch.chdir(tmp_path/'one'); here = stem('table1', TableParameters(dataset='folder:imgs'))
    monkeypatch.chdir(tmp_path/'two'); there = stem('table1', TableParameters(dataset='folder:imgs'))
    places = '/siteA/faces', '/siteB/faces', '.', '/', 'data/faces', '/a b/x', '/a-b/x', 'data/a b', 'data/a-b'
    asked = [dict(dataset=f'folder:{place}') for place in places]
    asked += [dict(lam=v) for v in (1000001.0, 1000002.0, 0.1, 0.1 + 1e-12)] + [dict(seeds=[*range(n)]) for n in (2, 100, 101)]
    names = [here, there, *(stem('table1', TableParameters(**k)) for k in asked)]
    assert len(set(names)) == len(names) and max(map(len, names)) <= 160
    path = save('table1', TableParameters(seeds=[*range(100)]), FRAME)[0]
    assert len(read_result(path)) == 2


def test_what_is_saved_is_read_back(tmp_path):
    fig = plt.figure()
    paths = save('table1', TableParameters(), FRAME, gains=fig)
    assert [p.name for p in paths] == ['table1_digits_quick.csv', 'table1_digits_quick_gains.png']
    assert paths[1].read_bytes()[:4] == b'\x89PNG'
    pd.testing.assert_frame_equal(read_result(paths[0]), FRAME.assign(schema=SCHEMA))
    assert not list(results_dir().glob('*.part'))
    plt.close(fig)


def test_a_result_is_whole_or_absent(monkeypatch):
    save('table1', TableParameters(), FRAME)
    def full(self, f, **k):
        open(f, 'w').write('half')
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(pd.DataFrame, 'to_csv', full)
        with pytest.raises(RunError, match='free some space'): save('table1', TableParameters(), FRAME)
    pd.testing.assert_frame_equal(read_result(results_dir()/'table1_digits_quick.csv'), FRAME.assign(schema=SCHEMA))


def test_what_was_committed_says_where_it_comes_from(monkeypatch, tmp_path, capsys):
    import cem_nb.results as results
    monkeypatch.setattr(results, 'committed_dir', lambda: tmp_path)
    assert committed('table1_x') is None and 'no result table1_x' in capsys.readouterr().out
    frame = FRAME.assign(schema=SCHEMA)
    frame.to_csv(tmp_path/'table1_x.csv', index=False)
    pd.testing.assert_frame_equal(committed('table1_x'), frame)
    line = capsys.readouterr().out
    assert all(word in line for word in ('a CPU', '2.11', '2026-11-25', 'seeds 0', 'train 4 s'))
    assert table_result('table1', TableParameters(dataset='committed'), 'table1_x').equals(frame)
    assert table_result('table1', TableParameters(dataset='committed', lam=4.0), 'table1_x') is None  # not what was asked


def test_a_result_of_another_schema_is_not_shown(monkeypatch, tmp_path, capsys):
    import cem_nb.results as results
    monkeypatch.setattr(results, 'committed_dir', lambda: tmp_path)
    for old in (FRAME, FRAME.assign(schema=SCHEMA - 1)):
        old.to_csv(tmp_path/'table1_x.csv', index=False)
        assert committed('table1_x') is None and 'not shown' in capsys.readouterr().out
    FRAME.assign(schema=SCHEMA).to_csv(tmp_path/'table1_x.csv', index=False)
    assert committed('table1_x') is not None


def test_a_name_is_cut_by_bytes_and_what_cannot_be_written_says_why(monkeypatch):
    p = TableParameters(dataset='folder:/x/' + '数据'*20, seeds=[*range(60)], lam=4.0)
    name = stem('table1', p)
    assert len(name.encode()) <= 160 and '\ufffd' not in name
    assert save('table1', p, FRAME)[0].is_file()
    import cem_nb.results as results
    def refuse(number):
        def write(*a): raise OSError(number, 'what the system says')
        return write
    for number, remedy in ((28, 'free some space'), (36, 'choose shorter names'), (13, 'see that you may'), (30, 'see that you may')):
        monkeypatch.setattr(results, 'write_whole', refuse(number))
        with pytest.raises(RunError, match=remedy): save('table1', TableParameters(), FRAME)


def test_what_was_not_committed_is_asked_for_in_vain_at_once():
    p = TableParameters(dataset='committed')
    with pytest.raises(ParameterError, match='no result of this notebook came with'): table_result('table1', p)
