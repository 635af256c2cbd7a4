import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cem_nb import files
from cem_nb.core import runs_dir
from cem_nb.files import DIGESTS, DamagedError, in_short, read_sealed, read_stamped, stamped, state_of, write_sealed, write_whole

NO_FLOCK = """
import errno, fcntl, os, sys, warnings
def refuse(*args): raise OSError(errno.ENOSYS, 'Function not implemented')
if 'refuse' in sys.argv: fcntl.flock = refuse
warnings.simplefilter('ignore')
from pathlib import Path
from cem_nb.core import runs_dir
from cem_nb.files import BusyError, write_then_rename
writing = write_then_rename(runs_dir()/'r')
try: writing.__enter__()
except BusyError: os._exit(3)
print('at it', flush=True)
sys.stdin.read(1)  # until killed, or told to end
writing.__exit__(None, None, None)
"""


@pytest.mark.parametrize(('said', 'first', 'both'), [
    ('no compiler', 'no compiler', 'no compiler'), ('\nno compiler\r\nwas found\nanywhere', 'no compiler', 'no compiler was found'),
    ('', 'ValueError', 'ValueError'), (' \n', 'ValueError', 'ValueError')])
def test_an_error_in_short_is_one_line_that_says_something(said, first, both):
    assert in_short(ValueError(said)) == first and in_short(ValueError(said), 2) == both


@pytest.mark.slow
@pytest.mark.parametrize('flock', ['as it is', 'refuse'])
def test_never_two_writers_and_a_dead_one_lets_go(flock):
    "On a file system without flock too, as some network file systems are."
    start = lambda: subprocess.Popen([sys.executable, '-c', NO_FLOCK, flock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first = start()
    assert first.stdout.readline() == 'at it\n'
    second = start()
    assert second.wait(60) == 3 and not (runs_dir()/'r').exists()
    first.kill()
    first.wait()
    third = start()
    assert third.stdout.readline() == 'at it\n'
    third.communicate('.')
    assert third.returncode == 0 and (runs_dir()/'r').is_dir() and not (runs_dir()/'r.part').exists()


OLD = 10**18  # nanoseconds: long ago


def test_the_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    said, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: (said.append(os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))), sync(fd)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (said.append('replace'), replace(a, b)))
    write_whole(tmp_path/'x', lambda p: p.write_text('1'))
    assert [s.endswith('.part') for s in said] == [True, False, False] and said[1:] == ['replace', tmp_path.name]


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path/'x').write_text('old')
    def write(part):
        part.write_text('half')
        raise error
    with pytest.raises(type(error)): write_whole(tmp_path/'x', write)
    assert (tmp_path/'x').read_text() == 'old' and os.listdir(tmp_path) == ['x']


@given(data=st.binary(max_size=200), where=st.integers(0), bit=st.integers(0, 7))
@settings(deadline=None)
def test_every_bit_of_a_stamped_file_counts(tmp_path_factory, data, where, bit):
    path = tmp_path_factory.mktemp('s')/'x'
    path.write_bytes(stamped(data))
    assert read_stamped(path) == data
    bad = bytearray(stamped(data))
    bad[where % len(bad)] ^= 1 << bit
    path.write_bytes(bad)
    with pytest.raises(DamagedError, match='not as it was written'): read_stamped(path)


@given(data=st.binary(max_size=100), kept=st.integers(0, 200))
@settings(deadline=None)
def test_a_cut_file_is_noticed(tmp_path_factory, data, kept):
    path = tmp_path_factory.mktemp('s')/'x'
    whole = stamped(data)
    path.write_bytes(whole[:kept])
    if kept >= len(whole): assert read_stamped(path) == data
    else:
        with pytest.raises(DamagedError): read_stamped(path)


@pytest.fixture
def sealed(tmp_path):
    write_sealed(tmp_path/'a', {'result.json': b'{"mse": 0.02}', 'weights': bytes(100)})
    write_sealed(tmp_path/'b', {'result.json': b'{"mse": 0.03}', 'weights': bytes(100)})
    return tmp_path/'a'


@pytest.mark.parametrize('harm', [
    lambda a: (a/'result.json').write_bytes(b'{"mse": 0.01}'),
    lambda a: (a/'result.json').write_bytes(b''),
    lambda a: (a/'result.json').write_bytes((a.parent/'b'/'result.json').read_bytes()),
    lambda a: (a/'result.json').unlink(),
    lambda a: (a/DIGESTS).unlink(),
    lambda a: (a/DIGESTS).write_bytes(b''),
    lambda a: (a/DIGESTS).write_text('[]'),
    lambda a: (a/DIGESTS).write_text('{}'),
    lambda a: (a/DIGESTS).write_text('['*100_000),
    lambda a: (a/DIGESTS).write_bytes(b'\xff\xfe'),
    lambda a: (a/DIGESTS).write_bytes((a.parent/'b'/DIGESTS).read_bytes()),
])
def test_a_sealed_folder_that_was_touched(sealed, harm):
    assert json.loads(read_sealed(sealed/'result.json')) == dict(mse=0.02)
    harm(sealed)
    with pytest.raises(DamagedError, match='missing|not as it was written'): read_sealed(sealed/'result.json')


def test_what_cannot_be_read_just_now_is_not_called_damaged(sealed, monkeypatch):
    def busy(self): raise OSError(24, 'Too many open files')
    monkeypatch.setattr(files.Path, 'read_bytes', busy)
    with pytest.raises(OSError, match='Too many'): read_sealed(sealed/'result.json')


def tree(root):
    for name in ('a/x', 'a/y', 'b/z'):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_text(name)
    return root


def harms():
    def dated_back(r):
        s = (r/'a'/'x').stat()
        (r/'a'/'x').write_text('X/a')
        os.utime(r/'a'/'x', ns=(s.st_atime_ns, s.st_mtime_ns))
    yield 'another file of the same size, dated back', dated_back
    yield 'a file more', lambda r: (r/'b'/'new').write_text('')
    yield 'a file less', lambda r: (r/'a'/'y').unlink()
    yield 'a name', lambda r: (r/'a'/'y').rename(r/'a'/'w')
    yield 'a link to nowhere', lambda r: (r/'b'/'l').symlink_to('/nowhere')
    yield 'two files exchanged', lambda r: [(r/a).rename(r/b) for a, b in (('a/x', 't'), ('a/y', 'a/x'), ('t', 'a/y'))]


@pytest.mark.parametrize('what, harm', [*harms()])
def test_a_changed_folder_has_another_state(tmp_path, monkeypatch, what, harm):
    monkeypatch.setattr(files, 'FRESH', -OLD)  # not to wait for two seconds
    root = tree(tmp_path/'r')
    before = state_of(root)
    assert before == state_of(root)
    harm(root)
    assert state_of(root) not in (None, before)


def test_a_fresh_file_and_a_missing_folder_have_no_state(tmp_path):
    assert state_of(tree(tmp_path/'r')) is None and state_of(tmp_path/'none') is None


def test_the_same_files_elsewhere_are_another_state_and_loops_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'FRESH', -OLD)
    one, two = tree(tmp_path/'one'), tree(tmp_path/'two')
    (one/'a'/'up').symlink_to(one)
    assert state_of(one) != state_of(two)
