import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cem_nb.core import data_dir, project_dir, runs_dir
import cem_nb.data
import cem_nb.datasets
import cem_nb.files
from cem_nb.data import Augment, DataError, Split, augment_batch, batches, split_train, to_float
from cem_nb.datasets import DATASETS, Source, load_data, shared_data


def write_image(path, value, size=(16, 16), mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def folder(tmp_path):
    "Two classes, told apart by colour; the file's number is in the green channel."
    for part, n in (('train', 10), ('test', 4)):
        for c, red in (('cat', 20), ('dog', 200)):
            for i in range(n): write_image(tmp_path/'pets'/part/c/f'{i:02d}.png', (red, i, 0))
    return tmp_path/'pets'


def test_folder_keeps_pixels_and_labels(folder):
    d = load_data(f'folder:{folder}', val_frac=0.2)
    assert d.classes == ('cat', 'dog') and d.shape == (3, 16, 16)
    assert (len(d.train), len(d.val), len(d.test)) == (16, 4, 8)
    for s in (d.train, d.val, d.test): assert torch.equal(s.x[:, 0, 0, 0] == 200, s.y == 1)
    seen = [(c, g) for s in (d.train, d.val) for c, g in zip(s.y.tolist(), s.x[:, 1, 0, 0].tolist())]
    assert sorted(seen) == [(c, g) for c in (0, 1) for g in range(10)]  # each training file once, in one part


def test_folder_is_found_from_other_working_directories(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert load_data('folder:pets').fingerprint == load_data(f'folder:{folder}').fingerprint


def test_decoded_images_are_cached_until_a_file_changes(folder):
    before = load_data(f'folder:{folder}').fingerprint
    assert len(list((data_dir()/'cache').glob('*.npy'))) == 1
    assert load_data(f'folder:{folder}').fingerprint == before
    write_image(folder/'train'/'cat'/'00.png', (20, 99, 0))
    changed = load_data(f'folder:{folder}')
    assert changed.fingerprint != before
    assert 99 in torch.cat([changed.train.x, changed.val.x])[:, 1, 0, 0].tolist()


def test_damaged_cache_is_decoded_again(folder):
    before = load_data(f'folder:{folder}').fingerprint
    next((data_dir()/'cache').glob('*.npy')).write_bytes(b'half')
    assert load_data(f'folder:{folder}').fingerprint == before


def test_unwritable_cache_is_a_warning_only(folder, monkeypatch):
    blocker = folder.parent/'file'
    blocker.write_text('')
    monkeypatch.setenv('CEM_DATA', str(blocker/'data'))
    with pytest.warns(UserWarning, match='CEM_DATA'): assert len(load_data(f'folder:{folder}').test) == 8


def test_mixed_sizes_and_grey_images(tmp_path):
    for part in ('train', 'test'):
        for c in ('a', 'b'):
            for i in range(4): write_image(tmp_path/'f'/part/c/f'{i}.jpg', 90 + i, (30 + i, 40), 'L')
    assert load_data(f'folder:{tmp_path}/f', val_frac=0).shape == (1, 64, 64)
    assert load_data(f'folder:{tmp_path}/f', val_frac=0, image_size=32).shape == (1, 32, 32)


@pytest.mark.parametrize('harm, message', [
    (lambda f: (f/'train'/'cat'/'03.png').write_bytes(b'no image'), r'03\.png cannot be read'),
    (lambda f: [p.unlink() for p in (f/'train'/'cat').iterdir()], r'cat holds no \.jpg or \.png'),
    (lambda f: (f/'test').rename(f/'tset'), r'has no folder test/'),
    (lambda f: (f/'test'/'dog').rename(f/'test'/'fox'), r'dog has no namesake under'),
    (lambda f: [p.rename(f/p.name) for p in [f/'train'/'dog']], r'1 class folders; at least 2'),
])
def test_broken_folders_are_named(folder, harm, message):
    harm(folder)
    with pytest.raises(DataError, match=message): load_data(f'folder:{folder}')


def test_truncated_jpeg_is_named(folder):
    path = folder/'train'/'cat'/'03.png'
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r'03\.png'): load_data(f'folder:{folder}')


@pytest.mark.parametrize('name', ['cifar-10', '', 'folder:/nowhere', 'folder:~nobody_here/x', 'folder:' + 'x'*999, 'folder:\0'])
def test_unknown_data(name):
    with pytest.raises(DataError): load_data(name)


def test_a_name_of_two_lines_is_said_in_one(folder):
    (folder/'train'/'cat'/'a\nb\udcff.png').write_text('no image')
    with pytest.raises(DataError, match=r'/a\\nb\\udcff\.png') as e: load_data(f'folder:{folder}')
    assert len(str(e.value).splitlines()) == 1 and str(e.value).isprintable()


def test_facescrub_says_where_to_ask():
    with pytest.raises(DataError, match='ask for it'): load_data('facescrub')


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(cem_nb.datasets, 'TINY', dict(classes=2, train=5, test=4))
    root = data_dir()/'tiny-imagenet-200'
    for w in ('n01', 'n02'):
        for i in range(5): write_image(root/'train'/w/'images'/f'{w}_{i}.JPEG'.replace('JPEG', 'jpeg'), i, (64, 64))
    for i in range(4): write_image(root/'val'/'images'/f'val_{i}.jpeg', 50 + i, (64, 64))
    lines = [f'val_{i}.jpeg\tn0{1 + i % 2}\t0\t0\t1\t1' for i in range(4)]
    (root/'val'/'val_annotations.txt').write_text('\n'.join(lines))
    (root/'words.txt').write_text('n01\tgoldfish, Carassius\nn02\tsalamander')
    return root


def test_tinyimagenet_layout(tiny):
    d = load_data('tinyimagenet', val_frac=0)
    assert d.classes == ('goldfish', 'salamander') and d.shape[1:] == (64, 64)
    assert d.test.y.tolist() == [0, 1, 0, 1] and len(d.train) == 10
    (tiny/'words.txt').write_bytes(b'n01\tcaf\xe9\n\nnothing\nn02\ty')
    assert load_data('tinyimagenet', val_frac=0).classes == ('caf\ufffd', 'y')


NOTES = 'val/val_annotations.txt'


@pytest.mark.parametrize('harm, message', [
    (lambda r: [p.unlink() for p in list((r/'train'/'n02'/'images').iterdir())[3:]], 'n02/images: 3 where'),
    (lambda r: shutil.rmtree(r/'train'/'n02'), '1 class folders'),
    (lambda r: (r/'train'/'n03').mkdir(), '3 where TinyImageNet has 2'),
    (lambda r: (r/NOTES).write_text((r/NOTES).read_text().splitlines()[0]), 'images listed in .*: 1 where'),
    (lambda r: (r/NOTES).write_text((r/NOTES).read_text()[:-18]), 'line "val_", which names no class'),
    (lambda r: (r/NOTES).write_text((r/NOTES).read_text().replace('val_3', 'val_2')), 'images listed in .*: 3 where'),
    (lambda r: (r/NOTES).unlink(), 'val_annotations.txt is missing'),
    (lambda r: (r/'val'/'images'/'val_2.jpeg').unlink(), 'val_2'),
])
def test_tinyimagenet_half_unpacked(tiny, harm, message):
    harm(tiny)
    with pytest.raises(DataError, match=message): load_data('tinyimagenet', val_frac=0)


def test_blanks_or_tabs(tiny):
    want = load_data('tinyimagenet', val_frac=0).fingerprint
    (tiny/NOTES).write_text((tiny/NOTES).read_text().replace('\t', ' '))
    assert load_data('tinyimagenet', val_frac=0).fingerprint == want


def test_a_kernel_sees_that_files_were_replaced(folder):
    before = load_data(f'folder:{folder}')
    path = folder/'train'/'cat'/'00.png'
    s = path.stat()
    Image.new('RGB', (16, 16), (20, 77, 0)).save(path)
    path.write_bytes(path.read_bytes() + bytes(max(0, s.st_size - path.stat().st_size)))
    os.utime(path, ns=(s.st_atime_ns, s.st_mtime_ns))
    after = load_data(f'folder:{folder}')
    assert after.fingerprint != before.fingerprint and 77 in torch.cat([after.train.x, after.val.x])[:, 1, 0, 0].tolist()
    for p in (folder/'train'/'cat').glob('0[1-5].png'): p.unlink()
    assert len(load_data(f'folder:{folder}', val_frac=0).train) == 15


def test_a_kernel_sees_that_it_stands_elsewhere(tmp_path, monkeypatch):
    for place, red in (('one', 10), ('two', 200)):
        for part in ('train', 'test'):
            for c in 'ab': write_image(tmp_path/place/'imgs'/part/c/'0.png', (red, 0, 0))
    seen = []
    for place in ('one', 'two', 'one'):
        monkeypatch.chdir(tmp_path/place)
        seen.append(load_data('folder:imgs', val_frac=0).train.x.max().item())
    assert seen == [10, 200, 10]


def test_what_does_not_change_is_loaded_once(folder, monkeypatch):
    monkeypatch.setattr(cem_nb.files, 'FRESH', -10**18)
    for name in (f'folder:{folder}', 'digits'): assert shared_data(name, None, 0.1, None) is shared_data(name, None, 0.1, None)


def test_a_loader_of_ones_own_is_asked_each_time_unless_it_names_its_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(cem_nb.files, 'FRESH', -10**18)
    asked = []
    def load(size):
        asked.append(size)
        s = Split(torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8), torch.arange(20) % 2)
        return ['a', 'b'], s, s
    monkeypatch.setitem(DATASETS, 'mine', Source(load, Augment(), None))
    assert load_data('mine').fingerprint != load_data('mine').fingerprint and len(asked) == 2
    monkeypatch.setitem(DATASETS, 'mine', Source(load, Augment(), lambda: tmp_path))
    assert load_data('mine').fingerprint == load_data('mine').fingerprint and len(asked) == 3
    (tmp_path/'new').write_text('')
    load_data('mine')
    assert len(asked) == 4


def test_a_loader_that_is_defined_again_is_another_one(monkeypatch, tmp_path):
    "As in a notebook cell that is run again; the address of the old one may be that of the new one."
    monkeypatch.setattr(cem_nb.files, 'FRESH', -10**18)
    for v in range(12):
        def load(size, v=v):
            s = Split(torch.full((20, 1, 8, 8), v, dtype=torch.uint8), torch.arange(20) % 2)
            return ['a', 'b'], s, s
        monkeypatch.setitem(DATASETS, 'mine', Source(load, Augment(pad=v), lambda: tmp_path))
        found = load_data('mine')
        assert found.train.x.unique().tolist() == [v] and found.augment.pad == v
        del load, DATASETS['mine']


@pytest.mark.parametrize('x, y, message', [
    (torch.rand(8, 1, 8, 8), torch.arange(8) % 2, 'images of torch.float32'),
    (torch.zeros(8, 8, 8, dtype=torch.uint8), torch.arange(8) % 2, 'C 1 or 3'),
    (torch.zeros(8, 8, 8, 3, dtype=torch.uint8), torch.arange(8) % 2, 'C 1 or 3'),
    (torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(7) % 2, 'one for each'),
    (torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.rand(8), 'labels of torch.float32'),
    (torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8), 'a label 2 and 2 classes'),
    (torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8) % 2 - 1, 'a label -1'),
    (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.arange(0), 'for 0 images'),
])
def test_a_loader_of_ones_own_is_checked(monkeypatch, x, y, message):
    monkeypatch.setitem(DATASETS, 'mine', Source(lambda size: (['a', 'b'], Split(x, y), Split(x, y)), Augment(), None))
    with pytest.raises(DataError, match=message): load_data('mine')


@pytest.mark.parametrize('size', [0, -1, 2.5])
def test_batches_have_a_size(size):
    with pytest.raises(ValueError, match='batch_size'): next(batches(load_data().test, size))


def test_numbers_are_not_taken_for_bytes():
    x = torch.rand(2, 1, 8, 8)
    before = x.clone()
    with pytest.raises(TypeError, match='give bytes'): to_float(x)
    assert torch.equal(x, before)


def test_split_is_stratified_disjoint_and_repeatable():
    full = Split(torch.arange(400, dtype=torch.int16).view(-1, 1, 1, 1), torch.arange(400) % 4)
    a, b = split_train(full, 200, 0.1), split_train(full, 200, 0.1)
    ids = [set(s.x.flatten().tolist()) for s in a]
    assert [len(i) for i in ids] == [200, 20] and not ids[0] & ids[1]
    assert all(torch.equal(s.x, t.x) for s, t in zip(a, b))
    assert all(s.y.bincount().max() == s.y.bincount().min() for s in a)
    assert len(split_train(full, 10**6, 0.1)[0]) == 360  # "at most"
    for bad in (dict(n_train=0, val_frac=0.1), dict(n_train=None, val_frac=0.7), dict(n_train=3, val_frac=0)):
        with pytest.raises(DataError): split_train(full, **bad)


def test_epoch_of_batches_visits_each_image_once():
    s = Split(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10))
    plain = torch.cat([x for x, _ in batches(s, 4)]).flatten()
    assert torch.allclose(plain*255, torch.arange(10.))
    ys = torch.cat([y for _, y in batches(s, 4, shuffle=True)])
    assert len(ys) == 8 == len(ys.unique())  # the last, smaller batch is dropped
    assert len(torch.cat([y for _, y in batches(s, 64, shuffle=True)])) == 10  # but never the only one


def test_rotation_against_pillow():
    "A rotation by the same angle, by an independent library."
    x = torch.zeros(1, 1, 33, 33); x[:, :, 8:25, 14:19] = 1
    aug = Augment(degrees=30)
    torch.manual_seed(3)
    angle = ((torch.rand(4, 1)[0]*2 - 1)*30).item()
    torch.manual_seed(3)
    ours = augment_batch(x, aug)[0, 0]
    im = Image.fromarray((x[0, 0]*255).byte().numpy())
    either = [torch.from_numpy(np.array(im.rotate(s*angle, Image.Resampling.BILINEAR))).float()/255 for s in (1, -1)]
    assert abs(angle) > 5 and min((ours - e).abs().mean() for e in either) < 0.01


def test_projects_places(monkeypatch, tmp_path):
    assert (project_dir()/'settings.ini').is_file()
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.setenv('CEM_DATA', '~/d')
    assert data_dir() == tmp_path/'d'
    monkeypatch.setenv('CEM_DATA', '~nobody_here/d')
    assert data_dir() == Path('~nobody_here/d')
    (tmp_path/'sub').mkdir(); monkeypatch.chdir(tmp_path/'sub')
    for text in ('[settings]\nowner = Ren\u00e9'.encode('latin-1'), '[settings]'.encode('utf-16')):
        (tmp_path/'settings.ini').write_bytes(text)  # of another program
        assert (project_dir()/'nbs').is_dir()
    monkeypatch.delenv('CEM_RUNS')
    assert runs_dir() == project_dir()/'runs'
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 1]


def test_who_changes_images_in_place_changes_his_own():
    from cem_nb.experiment import DataSettings
    from cem_nb.store import data_on
    before = data_on(DataSettings(), torch.device('cpu'))[1]
    mine = load_data()
    mine.train.x[:] = 255 - mine.train.x
    mine.test.y[:] = mine.test.y.flip(0)
    assert load_data().fingerprint == before == data_on(DataSettings(), torch.device('cpu'))[0].fingerprint != mine.fingerprint


def test_what_differs_in_case_or_encoding_only_is_named(tmp_path):
    for part in ('train', 'test'):
        for c in ('caf\u00e9', 'tea'): write_image(tmp_path/'set'/part/c/'0.png', (9, 9, len(c)))
    (tmp_path/'set'/'test'/'caf\u00e9').rename(tmp_path/'set'/'test'/'cafe\u0301')  # the same name for a reader
    with pytest.warns(UserWarning, match='among the training images'): d = load_data(f'folder:{tmp_path}/set', val_frac=0)
    assert d.test.y.tolist() == [0, 1] and d.classes == ('caf\u00e9', 'tea')
    write_image(tmp_path/'set'/'train'/'Tea'/'0.png', (1, 2, 3))
    with pytest.raises(DataError, match='differ in case'): load_data(f'folder:{tmp_path}/set', val_frac=0)


def test_what_a_half_unpacked_folder_lacks_and_what_lies_beside_is_said(folder):
    shutil.copytree(folder/'train', folder/'val')
    write_image(folder/'train.png', (0, 0, 0))
    said = r'2 left out \(1 x folder, 1 x .png\), for images lie in train/ and test/'
    with pytest.warns(UserWarning, match=said): load_data(f'folder:{folder}')
    for c in ('emu', 'fox'): shutil.copytree(folder/'train'/'dog', folder/'train'/c)
    said = r'emu has no namesake under .*test, nor have 1 others'
    with pytest.raises(DataError, match=said), pytest.warns(UserWarning): load_data(f'folder:{folder}')


def test_pictures_that_are_in_both_parts_or_in_two_classes_are_counted(tmp_path):
    for part, shift in (('train', 0), ('test', 100)):
        for c, red in (('a', 0), ('b', 50)):
            for i in range(6): write_image(tmp_path/'set'/part/c/f'{i}.png', (red + i + shift, 0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_data(f'folder:{tmp_path}/set', val_frac=0)
    shutil.copy(tmp_path/'set'/'train'/'a'/'0.png', tmp_path/'set'/'test'/'a'/'9.png')
    shutil.copy(tmp_path/'set'/'train'/'a'/'1.png', tmp_path/'set'/'train'/'b'/'9.png')
    with pytest.warns(UserWarning) as said: load_data(f'folder:{tmp_path}/set', val_frac=0)
    assert [str(w.message).split(',')[0] for w in said] == ['1 test images are among the training images', '1 images are under two labels']


@pytest.mark.parametrize('full, test, classes, message', [
    ((3, 16, 16), (3, 32, 32), 'ab', 'give one shape'), ((3, 16, 24), (3, 16, 24), 'ab', 'give square ones'),
    ((3, 4, 4), (3, 4, 4), 'ab', 'of 8 or more'), ((3, 16, 16), (1, 16, 16), 'ab', 'give one shape'),
    ((3, 16, 16), (3, 16, 16), 'aa', 'two classes of one name')])
def test_parts_that_do_not_fit_each_other(full, test, classes, message, monkeypatch):
    split = lambda shape: Split(torch.zeros(8, *shape, dtype=torch.uint8), torch.arange(8) % 2)
    monkeypatch.setitem(DATASETS, 'mine', Source(lambda size: ([*classes], split(full), split(test)), Augment(), None))
    with pytest.raises(DataError, match=message): load_data('mine')


def test_a_loader_of_tuples_or_without_test_images_of_a_class(monkeypatch):
    x, y = torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8) % 2
    monkeypatch.setitem(DATASETS, 'mine', Source(lambda size: (['a', 'b'], (x, y), (x, y)), Augment(), None))
    with pytest.raises(DataError, match='gives tuple; give class names and two Splits'): load_data('mine')
    monkeypatch.setitem(DATASETS, 'mine', Source(lambda size: (['a', 'b', 'c'], Split(x, y), Split(x, y)), Augment(), None))
    with pytest.warns(UserWarning, match='no test image of c; its scores'): load_data('mine', val_frac=0)


@pytest.mark.parametrize('bad', [dict(image_size=16.0), dict(image_size='16'), dict(image_size=True), dict(n_train='100'),
                                 dict(val_frac=None), dict(dataset=Path('digits')), dict(image_size=400_000)])
def test_arguments_of_a_wrong_kind(bad):
    with pytest.raises(ValueError, match=f'{"the data set" if "dataset" in bad else next(iter(bad))} is .*give '): load_data(**bad)


def test_files_are_seen_however_deep_they_lie(monkeypatch, tmp_path):
    monkeypatch.setattr(cem_nb.files, 'FRESH', -10**18)
    deep = tmp_path/'1'/'2'/'3'/'4'/'5'/'6'/'7'
    deep.mkdir(parents=True)
    (deep/'v').write_text('10')
    (deep/'up').symlink_to(tmp_path)
    before = cem_nb.files.state_of(tmp_path)
    (deep/'v').write_text('99')
    assert before and cem_nb.files.state_of(tmp_path) != before
