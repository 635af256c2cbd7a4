import numpy as np
import pytest
import torch
from PIL import Image

from cem_nb.core import data_dir, project_dir, runs_dir
from cem_nb.data import Augment, DataError, Split, augment_batch, batches, load_data, split_train, to_float


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
    load_data.cache_clear()
    assert load_data(f'folder:{folder}').fingerprint == before
    write_image(folder/'train'/'cat'/'00.png', (20, 99, 0))
    load_data.cache_clear()
    changed = load_data(f'folder:{folder}')
    assert changed.fingerprint != before
    assert 99 in torch.cat([changed.train.x, changed.val.x])[:, 1, 0, 0].tolist()


def test_damaged_cache_is_decoded_again(folder):
    before = load_data(f'folder:{folder}').fingerprint
    next((data_dir()/'cache').glob('*.npy')).write_bytes(b'half')
    load_data.cache_clear()
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
    (lambda f: (f/'test'/'dog').rename(f/'test'/'fox'), r'fox has no namesake'),
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


@pytest.mark.parametrize('name', ['cifar-10', 'folder:/nowhere', ''])
def test_unknown_data(name):
    with pytest.raises(DataError): load_data(name)


def test_facescrub_says_where_to_ask():
    with pytest.raises(DataError, match='ask for it'): load_data('facescrub')


def test_tinyimagenet_layout(tmp_path):
    root = data_dir()/'tiny-imagenet-200'
    for w in ('n01', 'n02'):
        for i in range(5): write_image(root/'train'/w/'images'/f'{w}_{i}.JPEG'.replace('JPEG', 'jpeg'), i, (64, 64))
    for i in range(4): write_image(root/'val'/'images'/f'val_{i}.jpeg', 50 + i, (64, 64))
    lines = [f'val_{i}.jpeg\tn0{1 + i % 2}\t0\t0\t1\t1' for i in range(4)]
    (root/'val'/'val_annotations.txt').write_text('\n'.join(lines))
    (root/'words.txt').write_text('n01\tgoldfish, Carassius\nn02\tsalamander')
    d = load_data('tinyimagenet', val_frac=0)
    assert d.classes == ('goldfish', 'salamander') and d.shape[1:] == (64, 64)
    assert d.test.y.tolist() == [0, 1, 0, 1] and len(d.train) == 10
    (root/'val'/'images'/'val_2.jpeg').unlink()
    load_data.cache_clear()
    with pytest.raises(DataError, match='val_2'): load_data('tinyimagenet', val_frac=0)


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
    monkeypatch.delenv('CEM_RUNS')
    assert runs_dir() == project_dir()/'runs'
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 1]
