"Images: what is taken comes out exactly, what is not has a name, a cause and a remedy, and no cache is believed unseen."
import os
import struct
import time
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageOps

import cem_nb.images as images
from cem_nb.core import data_dir
from cem_nb.images import DataError, decode, decode_all, decode_picture, file_bytes, image_files, subfolders

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (48, 48, 3), dtype=np.uint8)
GREY = NOISE[..., 0]


def file_of(array, form='PNG', mode=None, **how):
    "The bytes of a file that holds `array`, converted to `mode`."
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(out := BytesIO(), form, **how)
    return out.getvalue()


def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(w, h, bits, colour, rows, *extra):
    "A PNG file by hand: `rows` are the bytes of its rows, each with its filter."
    head = struct.pack('>IIBBBBB', w, h, bits, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + b''.join(extra) + chunk(b'IDAT', zlib.compress(rows, 9)) + chunk(b'IEND', b'')


def flipped(data, at): return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]


def pixels(data, size=None, channels=3): return decode(data, 'it', size, channels).transpose(1, 2, 0)


def covered(image, size):
    "Independent of the module: Pillow alone, as the stored results have been computed."
    if image.size == (size, size): return np.asarray(image)
    r = size/min(image.size)
    w, h = (max(size, round(s*r)) for s in image.size)
    left, top = (w - size)//2, (h - size)//2
    return np.asarray(image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size)))


# what is taken

@given(arrays(np.uint8, st.tuples(st.integers(1, 24), st.integers(1, 24), st.just(3))))
@settings(max_examples=60, deadline=None)
def test_a_png_comes_back_exactly(x):
    assert (pixels(file_of(x)) == x).all()
    grey = np.ascontiguousarray(x[..., 0])
    assert (pixels(file_of(grey)) == grey[..., None]).all() and (pixels(file_of(grey), channels=1)[..., 0] == grey).all()


@pytest.mark.parametrize('form, how', [('PNG', {}), ('JPEG', dict(quality=90)), ('JPEG', dict(progressive=True, quality=60))])
@pytest.mark.parametrize('shape', [(48, 48), (30, 71), (97, 33), (200, 210)])
@pytest.mark.parametrize('size', [None, 8, 32, 64])
def test_pixels_are_those_of_pillow(form, how, shape, size):
    for x in (RNG.integers(0, 256, (*shape, 3), dtype=np.uint8), RNG.integers(0, 256, shape, dtype=np.uint8)):
        data = file_of(x, form, **how)
        image = Image.open(BytesIO(data)).convert('RGB')
        assert (pixels(data, size) == (covered(image, size) if size else np.asarray(image))).all()


PALETTE = chunk(b'PLTE', bytes([1, 2, 3, 9, 8, 7]))


def rgba(alpha): return np.dstack([NOISE, np.broadcast_to(np.uint8(alpha), NOISE.shape[:2])])


@pytest.mark.parametrize('data, expected', [
    (file_of(NOISE//64, mode='P'), lambda d: np.asarray(Image.open(BytesIO(d)).convert('RGB'))),
    (png(2, 1, 8, 3, b'\0\1\0', PALETTE), lambda d: [[[9, 8, 7], [1, 2, 3]]]),
    (png(2, 1, 8, 3, b'\0\1\0', PALETTE, chunk(b'tRNS', b'\xff\xff')), lambda d: [[[9, 8, 7], [1, 2, 3]]]),
    (png(4, 1, 1, 0, b'\0\xa0'), lambda d: [[[255]*3, [0]*3, [255]*3, [0]*3]]),
    (png(4, 1, 2, 0, b'\0\x1b'), lambda d: [[[v]*3 for v in (0, 85, 170, 255)]]),
    (png(2, 1, 4, 0, b'\0\x3f'), lambda d: [[[51]*3, [255]*3]]),
    (file_of(GREY > 99), lambda d: np.repeat((GREY > 99)[..., None]*np.uint8(255), 3, 2)),
    (file_of(np.dstack([GREY, np.full_like(GREY, 255)])), lambda d: np.repeat(GREY[..., None], 3, 2)),
    (file_of(rgba(255)), lambda d: NOISE),
    (file_of(NOISE, icc_profile=b'no profile'), lambda d: NOISE),
], ids=['palette', 'palette of 2', 'opaque palette', '1 bit', '2 bits', '4 bits', 'mode 1', 'grey + opaque', 'RGB + opaque', 'profile'])
def test_kinds_of_colours(data, expected, recwarn):
    assert (pixels(data) == np.asarray(expected(data))).all()
    assert not len(recwarn)


@pytest.mark.parametrize('way', range(10))
@pytest.mark.parametrize('form', ['PNG', 'JPEG'])
def test_orientation_is_applied(way, form):
    exif = Image.Exif(); exif[0x0112] = way
    data = file_of(NOISE[:20], form, exif=exif)
    image = Image.open(BytesIO(data))
    for size in (None, 16):
        upright = ImageOps.exif_transpose(image).convert('RGB')
        assert (pixels(data, size) == (covered(upright, size) if size else np.asarray(upright))).all()
    plain = np.asarray(image.convert('RGB'))
    by_hand = {3: plain[::-1, ::-1], 6: np.rot90(plain, -1), 8: np.rot90(plain)}.get(way)
    if by_hand is not None: assert (pixels(data) == by_hand).all()


def test_further_pictures_in_a_jpeg_are_left_out():
    first, second = Image.fromarray(NOISE), Image.fromarray(255 - NOISE)
    first.save(out := BytesIO(), 'MPO', save_all=True, append_images=[second])
    image = Image.open(BytesIO(out.getvalue()))
    assert image.n_frames == 2 and (pixels(out.getvalue()) == np.asarray(image.convert('RGB'))).all()


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('kind', [bytes, bytearray, memoryview])
def test_one_picture(channels, kind):
    data = file_of(NOISE[:30], 'JPEG')
    x = decode_picture(kind(data), channels, 16)
    image = Image.open(BytesIO(data)).convert('L' if channels == 1 else 'RGB')
    assert x.dtype == torch.uint8 and x.shape == (channels, 16, 16) and x.is_contiguous()
    assert (x.permute(1, 2, 0).numpy() == covered(image, 16).reshape(16, 16, channels)).all()
    x += 1  # the caller's own


def test_a_grey_picture_is_the_same_in_one_channel_and_in_three():
    data = file_of(GREY)
    assert (decode_picture(data, 1, 20) == decode_picture(data, 3, 20)).all()


@pytest.mark.parametrize('channels, size', [(2, 16), (4, 16), (3, 0), (3, 1.5)])
def test_settings_of_one_picture(channels, size):
    with pytest.raises(ValueError, match='give'): decode_picture(file_of(NOISE), channels, size)


# what is refused

def scans(n):
    data = file_of(NOISE, 'JPEG', progressive=True)
    last = data.rfind(b'\xff\xda')
    return data[:-2] + data[last:-2]*n + data[-2:]


REFUSED = {
    'grey of 16 bits': (file_of(GREY.astype(np.uint16)*257), '16 bits', 'convert it to 8'),
    'RGB of 16 bits': (png(1, 1, 16, 2, bytes(7)), '16 bits', 'convert it to 8'),
    'grey + alpha of 16 bits': (png(1, 1, 16, 4, b'\0\0\0\xff\xff'), '16 bits', 'convert it to 8'),
    'RGBA of 16 bits': (png(1, 1, 16, 6, b'\0' + b'\xff'*8), '16 bits', 'convert it to 8'),
    'CMYK': (file_of(NOISE, 'JPEG', 'CMYK'), 'CMYK', 'convert it to RGB'),
    'one clear pixel': (file_of(rgba(np.where(np.arange(48*48).reshape(48, 48) == 7, 254, 255))), 'transparent', 'opaque background'),
    'clear': (file_of(rgba(0)), 'transparent', 'opaque background'),
    'grey + half clear': (file_of(np.dstack([GREY, GREY])), 'transparent', 'opaque background'),
    'clear colour': (file_of(NOISE, transparency=(1, 2, 3)), 'transparent', 'opaque background'),
    'clear grey of 2 bits': (png(4, 1, 2, 0, b'\0\x1b', chunk(b'tRNS', b'\0\1')), 'transparent', 'opaque background'),
    'clear palette': (file_of(NOISE//64, mode='P', transparency=bytes(256)), 'transparent', 'opaque background'),
    'animated PNG': (file_of(NOISE, save_all=True, append_images=[Image.fromarray(255 - NOISE)]), '2 frames', 'save one'),
    'EPS': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n', 'neither JPEG nor PNG', 'replace'),
    'GIF': (file_of(NOISE, 'GIF'), 'neither JPEG nor PNG', 'replace'),
    'TIFF of floats': (file_of(GREY.astype(np.float32), 'TIFF'), 'neither JPEG nor PNG', 'replace'),
    'BMP': (file_of(NOISE, 'BMP'), 'neither JPEG nor PNG', 'replace'),
    'text': (b'<html>404', 'neither JPEG nor PNG', 'replace'),
    'nothing': (b'', '0 bytes', 'replace'),
    'cut JPEG': (file_of(NOISE, 'JPEG')[:1500], 'truncated', 'replace'),
    'cut PNG': (file_of(NOISE)[:3000], 'Truncated', 'replace'),
    'PNG without its end': (file_of(NOISE)[:-12], 'truncated', 'replace'),
    'flipped bit in a PNG': (flipped(file_of(NOISE), 4000), 'cannot be read', 'replace'),
    'bomb': (png(20000, 20000, 1, 0, b''), 'more than 33,554,432', 'make it smaller'),
    'above the bound': (png(5793, 5793, 1, 0, b''), '5793 x 5793 pixels, more than', 'make it smaller'),
    'thin': (file_of(np.zeros((60000, 2), np.uint8)), '64 x 1920000', 'crop it'),
    'many scans': (scans(200), 'scans', 'ordinary JPEG'),
}


@pytest.mark.parametrize('name', REFUSED)
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_what_is_refused_is_named_with_cause_and_remedy(name, tmp_path):
    data, cause, remedy = REFUSED[name]
    (path := tmp_path/'odd.png').write_bytes(data)
    with pytest.raises(DataError) as folder: decode_all([path], 64)
    with pytest.raises(DataError) as upload: decode_picture(data, 3, 64)
    for who, said in ((str(path), str(folder.value)), ('the picture', str(upload.value))):
        told, do = said.split('; ')
        assert told.startswith(who + ' ') and cause in told and remedy in do and '\n' not in said and 'BytesIO' not in said
    assert not list(tmp_path.glob('data/cache/*'))


def test_too_many_bytes_are_refused_before_they_are_read(tmp_path, monkeypatch):
    with open(path := tmp_path/'a.png', 'wb') as f: f.truncate(images.MAX_BYTES + 1)  # a hole: no disk is taken
    monkeypatch.setattr(os, 'read', None)
    with pytest.raises(DataError, match=r'a\.png has 33,554,433 bytes, more than .*; make it smaller'): file_bytes(path)
    with pytest.raises(DataError, match='the picture has 33,554,433 bytes'): decode_picture(bytes(images.MAX_BYTES + 1), 3, 16)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs pipes with names')
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(path := tmp_path/'a.png')
    with pytest.raises(DataError, match=r'a\.png is no regular file; '): decode_all([path], 16)


@pytest.mark.parametrize('make', [lambda p: p.mkdir(), lambda p: None, lambda p: p.symlink_to('nowhere'), lambda p: p.symlink_to(p)],
                         ids=['folder', 'missing', 'dangling', 'circle'])
def test_what_is_no_file(make, tmp_path):
    make(path := tmp_path/'a.png')
    with pytest.raises(DataError, match=r'a\.png cannot be read \(.*\); see that it is a file'): decode_all([path], 16)


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_what_may_not_be_read_is_not_to_be_replaced(tmp_path):
    (path := tmp_path/'a.png').write_bytes(file_of(NOISE))
    path.chmod(0)
    with pytest.raises(DataError, match='Permission denied.*; see that') as e: decode_all([path], 16)
    assert 'replace' not in str(e.value)


@pytest.mark.skipif(os.name == 'nt', reason='needs a shell')
def test_no_other_program_is_started(tmp_path, monkeypatch):
    "Pillow hands EPS to `gs`, whatever the file is called."
    (gs := tmp_path/'bin'/'gs').parent.mkdir()
    gs.write_text(f'#!/bin/sh\ntouch {tmp_path}/started\n'); gs.chmod(0o755)
    monkeypatch.setenv('PATH', str(gs.parent), prepend=os.pathsep)
    with pytest.raises(DataError): decode_picture(REFUSED['EPS'][0], 3, 16)
    assert not (tmp_path/'started').exists()


BASES = [file_of(NOISE[:12, :12], 'JPEG'), file_of(NOISE[:12, :12], 'JPEG', progressive=True), file_of(NOISE[:12, :12]),
         file_of(NOISE//64, mode='P'), file_of(rgba(255)[:9])]


def array_or_error(data):
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: x = decode(data, 'it', 16)
        except DataError as e: assert str(e).startswith('it ') and '; ' in str(e)
        else: assert x.shape == (3, 16, 16) and x.dtype == np.uint8
    assert time.perf_counter() - start < 10


@given(st.binary(max_size=300), st.sampled_from([b'', b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n', BASES[0][:200], BASES[2][:33]]))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_an_array_or_an_error(data, head): array_or_error(head + data)


@given(st.sampled_from(BASES), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
       st.floats(0.5, 1))
@settings(max_examples=250, deadline=None)
def test_damaged_images_are_an_array_or_an_error(data, harm, keep):
    data = bytearray(data[:int(len(data)*keep)])
    for at, value in harm: data[int(at*len(data))] = value
    array_or_error(bytes(data))


@given(st.integers(33, 10**9), st.integers(1, 255))
@settings(max_examples=40, deadline=None)
def test_a_png_with_a_wrong_byte_is_never_an_image(at, change):
    data = bytearray(BASES[2])
    data[8 + at % (len(data) - 12 - 8)] ^= change  # anywhere but in the signature and the last chunk
    with pytest.raises(DataError): decode(bytes(data), 'it', None)


# folders

def test_what_is_left_out_is_said(tmp_path):
    for name in ('b.png', 'a.JPG', 'c.webp', 'd.WEBP', 'e.tif', 'README', '.DS_Store', '._a.jpg'): (tmp_path/name).write_bytes(b'')
    (tmp_path/'face').mkdir()
    with pytest.warns(UserWarning) as said: files = image_files(tmp_path)
    assert [p.name for p in files] == ['a.JPG', 'b.png']
    assert f'{tmp_path}: 5 left out (1 x folder, 1 x no ending, 1 x .tif, 2 x .webp)' in str(said[0].message)


def test_a_folder_of_images_alone_is_read_without_a_word(tmp_path, recwarn):
    for c in 'ab':
        (tmp_path/c).mkdir()
        (tmp_path/c/'x.jpeg').write_bytes(b'')
    assert [image_files(p)[0].parent.name for p in subfolders(tmp_path, 'class')] == ['a', 'b'] and not len(recwarn)


def test_files_beside_the_classes_are_said(tmp_path):
    for c in 'ab': (tmp_path/c).mkdir()
    (tmp_path/'x.png').write_bytes(b'')
    with pytest.warns(UserWarning, match=r'1 left out \(1 x \.png\), for images lie in class folders'): subfolders(tmp_path, 'class')


def test_a_class_of_folders_alone_is_an_error_that_counts_them(tmp_path):
    (tmp_path/'face').mkdir()
    with pytest.raises(DataError, match=r'holds no \.jpg or \.png image \(but 1 x folder\)'): image_files(tmp_path)


@pytest.mark.parametrize('find', [image_files, lambda p: subfolders(p, 'class')])
def test_a_folder_that_cannot_be_listed(find, tmp_path):
    with pytest.raises(DataError, match='cannot be listed .*; see that it is a folder'): find(tmp_path/'missing')
    (tmp_path/'file').write_bytes(b'')
    with pytest.raises(DataError, match='cannot be listed'): find(tmp_path/'file')


@pytest.fixture
def files(tmp_path):
    "40 noisy images of 16 x 16 pixels."
    (tmp_path/'set').mkdir()
    made = [tmp_path/'set'/f'{i:02d}.png' for i in range(40)]
    for p in made: p.write_bytes(file_of(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)))
    return made


def expected(files, size=None):
    return np.stack([covered(Image.open(p).convert('RGB'), size or 16).transpose(2, 0, 1) for p in files])


def test_all_images_in_their_order(files):
    for chosen in (files, files[::-1], files[:1]):
        for size in (None, 8, 24): assert (decode_all(chosen, size).numpy() == expected(chosen, size)).all()


def test_channels_and_common_size(files):
    grey = files[:5]
    for p in grey: p.write_bytes(file_of(RNG.integers(0, 256, (16, 16), dtype=np.uint8)))
    assert decode_all(grey, None).shape == (5, 1, 16, 16) and decode_all(files, None).shape == (40, 3, 16, 16)
    files[0].write_bytes(file_of(GREY[:16, :20]))
    assert decode_all(grey, None).shape == (5, 1, 64, 64)
    assert decode_all(grey[:1], 4).shape == (1, 1, 4, 4)
    for p in grey: p.write_bytes(file_of(GREY[:18, :18]))  # 18 is halved once only
    assert decode_all(grey, None).shape == (5, 1, 64, 64)


def test_the_first_bad_file_is_the_one_that_is_named(files):
    for i in (31, 7, 12): files[i].write_bytes(b'no image')
    with pytest.raises(DataError, match='07.png cannot be read'): decode_all(files, 16)
    with pytest.raises(DataError, match='07.png cannot be read'): decode_all(files, None)


def test_the_memory_of_a_data_set_is_bounded(files, monkeypatch):
    monkeypatch.setattr(np, 'empty', None)
    with pytest.raises(DataError, match=r'40 images of 40000 x 40000 pixels .*00\.png.* take 178\.8 GiB, more than 8; give a smaller'):
        decode_all(files, 40000)


# the cache

def the_cache():
    cache, = (data_dir()/'cache').iterdir()
    return cache


def foreign(x):
    "A whole file of numpy's, as another version of this module left it."
    np.save(out := BytesIO(), x)
    return out.getvalue()


def of_other_key(good):
    "A sealed file of other images, moved here."
    x = np.load(BytesIO(good))
    return foreign(x*0) + images.seal('another key', x*0)


@pytest.mark.parametrize('harm', [
    lambda b: flipped(b, 0), lambda b: flipped(b, 30), lambda b: flipped(b, 130), lambda b: flipped(b, len(b)//2),
    lambda b: flipped(b, len(b) - 100), lambda b: flipped(b, len(b) - 1),
    lambda b: b.replace(b'(40, 3, 16, 16)', b'(39, 3, 16, 16)'), lambda b: b.replace(b'(40, 3, 16, 16)', b'(40, 3, 8, 32) '),
    lambda b: b.replace(b"'|u1'", b"'|i1'"), lambda b: b.replace(b'(40, 3, 16, 16)', b'(4000000000000,)'),
    lambda b: b'', lambda b: b'half', lambda b: b[:-1], lambda b: b[:-64], lambda b: b + b'\0', lambda b: b[:5000],
    lambda b: foreign(np.load(BytesIO(b))), lambda b: foreign(np.zeros((40, 3, 16, 16), np.uint8)), of_other_key, lambda b: b'PK\3\4',
    lambda b: b'\x80\4N.',
], ids=['magic', 'header', 'first pixel', 'body', 'last pixels', 'seal', 'rows', 'shape', 'dtype', 'huge', 'empty', 'other', 'cut',
        'no seal', 'longer', 'half', 'older', 'zeros', 'other key', 'zip', 'pickle'])
def test_a_damaged_or_foreign_cache_is_decoded_again(harm, files):
    before = decode_all(files, None)
    good = the_cache().read_bytes()
    bad = harm(good)
    assert bad != good
    the_cache().write_bytes(bad)
    assert torch.equal(decode_all(files, None), before)
    assert the_cache().read_bytes() == good


def test_a_whole_cache_is_used(files, monkeypatch):
    before = decode_all(files, None)
    monkeypatch.setattr(images, 'decode_files', None)
    assert torch.equal(decode_all(files, None), before)
    decode_all(files, None)[:] = 0  # the caller's own
    assert torch.equal(decode_all(files, None), before)


@pytest.mark.parametrize('what', ['CACHE_VERSION', 'PIL.__version__'])
def test_another_version_decodes_again(what, files, monkeypatch):
    decode_all(files, None)
    monkeypatch.setattr(f'cem_nb.images.{what}', 'other')
    decode_all(files, None)
    assert len(list((data_dir()/'cache').iterdir())) == 2


def test_content_is_what_counts(files):
    "Same name, size and time: another image. Other names and times: the same ones."
    decode_all(files, None)
    was = files[3].stat()
    new = file_of(np.zeros((16, 16, 3), np.uint8))
    files[3].write_bytes(new + bytes(was.st_size - len(new)))
    os.utime(files[3], ns=(was.st_atime_ns, was.st_mtime_ns))
    assert files[3].stat().st_size == was.st_size and files[3].stat().st_mtime_ns == was.st_mtime_ns
    x = decode_all(files, None)
    assert (x[3] == 0).all() and (x.numpy() == expected(files)).all()
    n = len(list((data_dir()/'cache').iterdir()))
    moved = [p.rename(p.with_name('new' + p.name)) for p in files]
    os.utime(moved[0])
    assert torch.equal(decode_all(moved, None), x) and len(list((data_dir()/'cache').iterdir())) == n


def test_a_file_that_changes_meanwhile_stops_the_run(files, monkeypatch):
    real = images.decode_files
    def late(*a):
        files[5].write_bytes(file_of(NOISE[:16, :16]))
        return real(*a)
    monkeypatch.setattr(images, 'decode_files', late)
    for size in (None, 16):
        files[5].write_bytes(file_of(NOISE[16:32, 16:32]))
        with pytest.raises(DataError, match='05.png changed .*; run it again'): decode_all(files, size)
    assert not (data_dir()/'cache').exists()


def test_a_place_that_cannot_be_written_is_a_warning(files, monkeypatch, tmp_path):
    (tmp_path/'file').write_bytes(b'')
    monkeypatch.setenv('CEM_DATA', str(tmp_path/'file'/'data'))
    with pytest.warns(UserWarning, match='CEM_DATA'): x = decode_all(files, None)
    assert (x.numpy() == expected(files)).all()


def test_half_a_cache_is_not_left_behind(files, monkeypatch):
    def full(f, x): f.write(b'half'); raise OSError(28, 'No space left on device')
    monkeypatch.setattr(np, 'save', full)
    with pytest.warns(UserWarning, match='No space left'): decode_all(files, None)
    assert not list((data_dir()/'cache').iterdir())


def segment(marker, body): return b'\xff' + bytes([marker]) + struct.pack('>H', len(body) + 2) + body


def with_parts(data, *parts):
    "A JPEG or PNG with further parts after its first one."
    at = 2 if data.startswith(b'\xff\xd8') else 8 + 25
    return data[:at] + b''.join(parts) + data[at:]


JPEG, PNG = (file_of(NOISE, form) for form in ('JPEG', 'PNG'))


@pytest.mark.parametrize('data', [
    with_parts(JPEG, *[segment(0xe1, b'Exif\0\0' + b'x'*10)]*200_000), with_parts(JPEG, *[b'\xff\xe5\0\2']*200_000),
    with_parts(JPEG, b'\xff'*300_000), with_parts(PNG, *[chunk(b'prVt', b'')]*100_000), with_parts(PNG, *[chunk(b'IDAT', b'')]*100_000),
], ids=['EXIF', 'APP5', 'padding', 'private', 'IDAT'])
def test_a_file_of_very_many_parts_is_refused_at_once(data):
    began = time.process_time()
    with pytest.raises(DataError, match='more than 20,000 parts'): decode_picture(data, 3, 16)
    assert time.process_time() - began < 1


def exif_of(entry, order='<', entries=1):
    return {'<': b'II*\0', '>': b'MM\0*'}[order] + struct.pack(order + 'IH', 8, entries) + entry


JUNK = [b'', b'xx', b'MM\0', b'x'*40, exif_of(b''), exif_of(struct.pack('<HHII', 0x0112, 99, 1, 6)), exif_of(b'', entries=65535),
        exif_of(struct.pack('<HHII', 0x0112, 3, 1, 77))]


@pytest.mark.parametrize('junk', JUNK)
@pytest.mark.parametrize('dpi', [None, (72, 72)])
def test_metadata_that_cannot_be_read_are_none(junk, dpi):
    plain = file_of(NOISE, 'JPEG', **dict(dpi=dpi) if dpi else {})
    for with_junk, alone in ((with_parts(plain, segment(0xe1, b'Exif\0\0' + junk)), plain), (with_parts(PNG, chunk(b'eXIf', junk)), PNG)):
        assert np.array_equal(decode(with_junk, 'x', None), decode(alone, 'x', None))


def test_texts_and_profiles_that_unpack_to_megabytes_are_not_unpacked():
    bomb = zlib.compress(bytes(2**26))
    data = with_parts(PNG, chunk(b'zTXt', b'note\0\0' + bomb), chunk(b'iCCP', b'p\0\0' + bomb),
                      chunk(b'zTXt', b'Raw profile type exif\0\0' + bomb), chunk(b'iTXt', b'XML:com.adobe.xmp\0\1\0\0\0' + bomb))
    began = time.process_time()
    assert np.array_equal(decode(data, 'x', None), decode(PNG, 'x', None)) and time.process_time() - began < 1


@pytest.mark.parametrize('text', [b'tiff:Orientation="6"', b"tiff:Orientation='6'", b'tiff:Orientation = "6"',
                                  b'<tiff:Orientation>6</tiff:Orientation>'])
def test_the_orientation_of_xmp_counts_where_exif_has_none(text):
    want = decode(with_parts(PNG, chunk(b'eXIf', exif_of(struct.pack('<HHII', 0x0112, 3, 1, 6)))), 'x', None)
    assert not np.array_equal(want, decode(PNG, 'x', None))
    bodies = b'\0\0\0\0' + text, b'\1\0\0\0' + zlib.compress(text)
    packed = [chunk(b'iTXt', b'XML:com.adobe.xmp\0' + body) for body in bodies]
    for part in packed: assert np.array_equal(decode(with_parts(PNG, part), 'x', None), want)
    raw = b'\nexif\n      26\n' + (b'Exif\0\0' + exif_of(struct.pack('<HHII', 0x0112, 3, 1, 6))).hex().encode()
    for part in (chunk(b'tEXt', b'Raw profile type exif\0' + raw), chunk(b'zTXt', b'Raw profile type exif\0\0' + zlib.compress(raw))):
        assert np.array_equal(decode(with_parts(PNG, part), 'x', None), want)
    jpeg = with_parts(JPEG, segment(0xe1, b'http://ns.adobe.com/xap/1.0/\0' + text))
    assert np.array_equal(decode(jpeg, 'x', None), np.rot90(decode(JPEG, 'x', None), -1, (1, 2)))
    upright = segment(0xe1, b'Exif\0\0' + exif_of(struct.pack('>HHIHH', 0x0112, 3, 1, 1, 0), '>'))
    assert np.array_equal(decode(with_parts(jpeg, upright), 'x', None), decode(JPEG, 'x', None))  # EXIF comes first


def test_an_image_that_ends_early_is_refused_whatever_pillow_is_told(tmp_path, monkeypatch):
    from PIL import ImageFile
    path = tmp_path/'cut.jpg'
    path.write_bytes(JPEG[:len(JPEG)//2])
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    monkeypatch.setenv('CEM_DATA', str(tmp_path))
    with pytest.raises(DataError, match='LOAD_TRUNCATED_IMAGES to False'): decode_all([path], None)
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', False)
    with pytest.raises(DataError, match='truncated'): decode_all([path], None)


def test_headers_that_are_no_headers():
    at = JPEG.index(b'\xff\xc0')
    flat = JPEG[:at + 5] + b'\0\0' + JPEG[at + 7:]
    no_width = PNG[:16] + b'\0\0\0\0' + PNG[20:29] + struct.pack('>I', zlib.crc32(PNG[12:16] + b'\0\0\0\0' + PNG[20:29])) + PNG[33:]
    for data in (flat, no_width):
        with pytest.raises(DataError, match='a side has 0 pixels'): decode(data, 'x', None)
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4, 'P')
    image.putpalette([0, 0, 0, 9, 9, 9, 99, 99, 99, 255, 0, 0])
    image.save(file := BytesIO(), 'PNG')
    data = file.getvalue()
    start = data.index(b'PLTE') - 4
    size = struct.unpack('>I', data[start:start + 4])[0]
    cut = data[:start] + chunk(b'PLTE', data[start + 8:start + 8 + 6]) + data[start + 12 + size:]
    assert decode(data, 'x', None).max() == 255
    with pytest.raises(DataError, match='a pixel of colour 3 and 2 colours'): decode(cut, 'x', None)
    with pytest.raises(DataError, match='colour 3 and 0 colours'): decode(data[:start] + data[start + 12 + size:], 'x', None)
