"""Two targets of a fuzzer, `images` and `store`: whatever is done to images or to stored runs, they are read right or refused in words.

`python tests/fuzz.py images --seconds 60 --seed 0` looks for what breaks that: guided by coverage where atheris is installed, else at
random. An input that broke it is printed as hexadecimal digits, and `python tests/fuzz.py images --input DIGITS` is that one again."""
import argparse
import faulthandler
import hashlib
import json
import math
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zlib
from contextlib import nullcontext
from functools import cache
from io import BytesIO
from pathlib import Path

try: import atheris
except ImportError: atheris = None

with atheris.instrument_imports(include=['PIL', 'cem_nb']) if atheris and __name__ == '__main__' else nullcontext():
    import PIL.JpegImagePlugin
    import PIL.MpoImagePlugin
    import PIL.PngImagePlugin
    from PIL import Image

    from cem_nb.core import data_dir, runs_dir
    from cem_nb.data import DataError
    from cem_nb.datasets import load_data
    from cem_nb.decoder import DecoderAttack
    from cem_nb.experiment import Experiment
    from cem_nb.files import RunError
    from cem_nb.images import decode, decode_files, digest, image_files
    from cem_nb.runs import prunable, run_table, stored_runs, verify
    from cem_nb.store import attack_path, open_run, run

import numpy as np
import torch

SECONDS = 10      # that an input may take
MEMORY = 2**21    # kilobytes that all of them may take beyond what the process had


class Finding(AssertionError): pass


class Choices:
    "A stream of bytes as a stream of decisions; at its end each is the first one, and `more` is False."
    def __init__(self, data): self.data, self.at = data, 0

    def below(self, n):
        k = 1 if n <= 256 else 2 if n <= 65536 else 4
        got = int.from_bytes(self.data[self.at:self.at + k], 'little')
        self.at += k
        return got % n

    def of(self, things): return things[self.below(len(things))]

    @property
    def more(self): return self.at < len(self.data)

    def range(self, n):
        "Beginning and end of a part of n bytes, short ones as often as any."
        a = self.below(n + 1)
        return a, min(n, a + (self.below(8) if self.below(2) else self.below(n + 1)))


# what no reading may do

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
STARTS = {'subprocess.Popen', 'os.system', 'os.exec', 'os.fork', 'os.forkpty', 'os.posix_spawn', 'os.spawn', 'socket.connect',
          'pickle.find_class'}
CHANGES = {'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.link', 'os.symlink', 'os.truncate', 'os.chmod', 'os.utime'}
_watched = None  # the folders that may be written to, and what was done outside them


def _hook(event, args):
    if _watched is None: return
    allowed, seen = _watched
    if event in STARTS: seen.append(f'{event} {args}')
    path = args[0] if event in CHANGES or event == 'open' and args[2] & WRITES else None
    if isinstance(path, str | bytes | os.PathLike):
        path = os.path.abspath(os.fsdecode(path))
        if not any(Path(path).is_relative_to(a) for a in allowed) and path != os.devnull: seen.append(f'{event} {args}')


class Watch:
    "Time, memory, processes, the net and files outside `allowed`."
    hooked, peak = False, None

    def __init__(self, *allowed): self.allowed = [Path(os.path.abspath(a)) for a in allowed]

    def __enter__(self):
        global _watched
        if not Watch.hooked: sys.addaudithook(_hook)
        Watch.hooked, self.seen = True, []
        if Watch.peak is None: Watch.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.start, _watched = time.perf_counter(), (self.allowed, self.seen)

    def __exit__(self, kind, *_):
        global _watched
        _watched = None
        if kind: return
        if self.seen: raise Finding(f'reading did {self.seen[:3]}')
        if (took := time.perf_counter() - self.start) > SECONDS: raise Finding(f'{took:.1f} seconds')
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - Watch.peak
        if more > MEMORY: raise Finding(f'{more/2**20:.1f} GiB of memory')


def in_words(e, *names):
    "An error of the project's own, if it is one line, has a remedy and names the file; else a finding."
    said = str(e)
    if '\n' in said or '; ' not in said: raise Finding(f'{type(e).__name__} of more than a line, or without a remedy: {said!r}')
    if not any(n in said for n in names): raise Finding(f'{type(e).__name__} names none of {names[:3]}: {said!r}')
    return said


# pictures

def png_chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png_chunks(data):
    "Kind and content of each."
    found, at = [], 8
    while at + 8 <= len(data):
        n = int.from_bytes(data[at:at + 4], 'big')
        found.append((data[at + 4:at + 8], data[at + 8:at + 8 + n]))
        at += 12 + n
    return found


def jpeg_segments(data):
    "What lies between markers; the last holds the scans."
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xff and data[at + 1] != 0xda:
        n = 2 + int.from_bytes(data[at + 2:at + 4], 'big')
        found.append(data[at:at + n])
        at += n
    return [*found, data[at:]]


@cache
def seeds():
    "Pictures of each kind that is taken, and of some that are not."
    rng, made = np.random.default_rng(0), []
    noise = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    exif, xmp = Image.Exif(), b'<x tiff:Orientation="5"/>'
    exif[0x0112], exif[0x010e] = 6, 'a scene'
    def add(x, form='PNG', mode=None, **how):
        image = Image.fromarray(x) if isinstance(x, np.ndarray) else x
        (image.convert(mode) if mode else image).save(out := BytesIO(), form, **how)
        made.append(out.getvalue())
    opaque = np.dstack([noise, np.full((12, 16), 255, np.uint8)])
    for x in (noise, noise[..., 0], noise[..., 0] > 99, opaque, opaque[..., 2:]): add(x)
    for bits in (1, 2, 4, 8): add(noise//64, mode='P', bits=bits)
    add(noise//64, mode='P', transparency=bytes([255]*200)), add(noise, transparency=(1, 2, 3)), add(noise, exif=exif)
    add(noise, save_all=True, append_images=[Image.fromarray(255 - noise)]), add(noise[..., 0].astype(np.uint16)*257)
    add(noise, 'JPEG'), add(noise, 'JPEG', progressive=True), add(noise[..., 0], 'JPEG', exif=exif), add(noise, 'JPEG', exif=exif, xmp=xmp)
    add(noise, 'JPEG', 'CMYK'), add(noise, 'JPEG', subsampling=2, optimize=True, comment=b'c', icc_profile=bytes(200))
    add(noise, 'JPEG', restart_marker_blocks=1), add(noise, 'MPO', save_all=True, append_images=[Image.fromarray(noise)])
    add(noise, 'GIF'), add(noise, 'BMP'), add(noise, 'TIFF')
    return made


def edited(data, c):
    "Some bytes changed, taken out, put in, copied or cut off."
    if not data: return bytes(c.below(256) for _ in range(c.below(40)))
    a, b = c.range(len(data))
    piece = data[a:b]
    new = c.of([lambda: bytes(v ^ (1 << c.below(8)) for v in piece), lambda: b'', lambda: bytes(c.below(256) for _ in range(c.below(9))),
                lambda: piece + piece, lambda: bytes(len(piece)), lambda: b'\xff'*len(piece), lambda: data[::-1][a:b]])()
    return data[:a] if c.below(16) == 15 else data[:a] + new + data[b:]


KINDS = [b'tRNS', b'PLTE', b'eXIf', b'iTXt', b'tEXt', b'zTXt', b'iCCP', b'acTL', b'fcTL', b'fdAT', b'gAMA', b'pHYs', b'sRGB', b'IDAT',
         b'IHDR']


def edited_parts(parts, c, remake):
    "A part changed, taken out, doubled or moved."
    i, j = c.below(len(parts)), c.below(len(parts))
    how = c.below(5)
    if how == 0: parts[i] = remake(parts[i])
    elif how == 1: parts.pop(i)
    elif how == 2: parts.insert(j, parts[i])
    elif how == 3: parts[i], parts[j] = parts[j], parts[i]
    else: parts.insert(j, remake(parts[i]))
    return parts


def harmed(data, c):
    "The file with changes; those of a PNG's chunks have right checksums, so that decoding sees them."
    for _ in range(1 + c.below(4)):
        if c.below(3) == 0: data = edited(data, c)
        elif data.startswith(b'\x89PNG') and (parts := png_chunks(data)):
            def remake(part): return c.of([part[0], *KINDS]), edited(part[1], c)
            def inflated(part):
                try: return part[0], zlib.compress(edited(zlib.decompress(part[1]), c))
                except zlib.error: return part
            data = data[:8] + b''.join(png_chunk(*p) for p in edited_parts(parts, c, c.of([remake, inflated])))
        elif data.startswith(b'\xff\xd8'):
            def length(s): return s[:2] + struct.pack('>H', (len(s) - 2) % 65536) + s[4:]
            def marker(s): return s[:1] + bytes([0xc0 + c.below(64)]) + s[2:]
            def remake(s): return c.of([lambda: length(s[:4] + edited(s[4:], c)), lambda: marker(s), lambda: edited(s, c)])()
            data = data[:2] + b''.join(edited_parts(jpeg_segments(data), c, remake))
        else: data = edited(data, c)
    return data


def picture(c):
    data = c.of(seeds())
    how = c.below(8)
    if how == 7: data = data[:c.below(len(data))] + c.of(seeds())[c.below(99):]
    return harmed(data, c) if how else data


def decoded(data, c):
    "One picture, twice."
    size, channels = c.of([None, 8, 16, 64]), c.of([3, 1])
    try: x = decode(data, 'it.png', size, channels)
    except DataError as e: return in_words(e, 'it.png')
    want = (channels, size, size) if size else (channels, *x.shape[1:])
    if x.dtype != np.uint8 or x.shape != want or not x.size: raise Finding(f'{x.dtype} {x.shape}, not {want}')
    if not (decode(data, 'it.png', size, channels) == x).all(): raise Finding('the same bytes are another picture')


# folders of images

NAMES = ['0.png', '1.JPG', 'a.jpeg', 'b.webp', 'README', '.hidden.png', '.png', 'é.png', 'e\u0301.png', 'x\udcff.png', ' .png', '-rf.png',
         '%s.png', '{}.png', 'a;b.png', 'x'*200 + '.png', 'c.PNG', 'c.png', '.DS_Store', 'dir.png', '\u202e.jpg', 'nul', "'.png", '*.png']
CLASSES = ['a', 'b', 'c', '.git', 'B', '\udcfe', ' ', 'x'*250, 'ä']


@cache
def good():
    "Four pictures that belong in a folder."
    return [s for s in seeds() if s[:4] == b'\x89PNG'][:2] + [s for s in seeds() if s[:2] == b'\xff\xd8'][:2]


def grown(root, c):
    "A folder of two classes, in which some things are not as they should be."
    for part in ('train', 'test'):
        for name in ('a', 'b'):
            (root/part/name).mkdir(parents=True)
            for i in range(2): (root/part/name/f'{i}.png').write_bytes(good()[i])
    def at(): return root/c.of(['train', 'test'])/c.of(CLASSES)
    for _ in range(c.below(6)):
        place = at()
        path = place/c.of(NAMES) if c.below(8) else place
        how = c.below(14)
        try:
            if how < 5: place.mkdir(exist_ok=True), path.write_bytes(picture(c))
            elif how < 8: place.mkdir(exist_ok=True), path.write_bytes(c.of(good()))
            elif how == 8: path.mkdir(parents=True)
            elif how == 9: path.symlink_to(c.of(['nowhere', root, '.', root/'train'/'a'/'0.png', '0.png']))
            elif how == 10: os.mkfifo(path)
            elif how == 11: shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            elif how == 12: path.rename(at()/c.of(NAMES))
            else: path.write_bytes(b'')
        except OSError: pass  # what cannot be done is no harm


def counts_of(root, said):
    "How many images of each part were read or, by the warnings, left out, and how many there are."
    for folder in sorted({p for part in ('train', 'test') for p in (root/part).iterdir() if p.is_dir() and not p.name.startswith('.')}):
        there = [p for p in folder.iterdir() if not p.name.startswith('.')]
        read = [p for p in there if p.suffix.lower() in ('.png', '.jpg', '.jpeg')]
        if len(there) > len(read) and not any(s.startswith(f'{folder}: {len(there) - len(read)} left out') for s in said):
            raise Finding(f'{len(there) - len(read)} files of {folder} were left out without a word')
        yield folder.parent.name, len(read)


def loaded(root, c):
    "The folder, read, read from the cache, and decoded once more."
    settings = dict(val_frac=c.of([0.0, 0.25]), image_size=c.of([None, 8, 16]), n_train=c.of([None, 2, 3]))
    def read():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            return load_data(f'folder:{root}', **settings), [str(w.message) for w in said if str(w.message).startswith(str(root))]
    try: d, said = read()
    except DataError as e: return in_words(e, str(root), 'n_train')
    n = dict(train=0, test=0)
    for part, k in counts_of(root, said): n[part] += k
    if len(d.test) != n['test'] or settings['n_train'] is None and len(d.train) + len(d.val) != n['train']:
        raise Finding(f'{n} files are {len(d.train)} + {len(d.val)} and {len(d.test)} images')
    for s in (d.train, d.val, d.test):
        if s.x.dtype != torch.uint8 or s.x.ndim != 4 or s.x.shape[1:] != d.shape or s.x.shape[1] not in (1, 3) or len(s.x) != len(s.y):
            raise Finding(f'images {s.x.dtype} {list(s.x.shape)} and {len(s.y)} labels')
        if len(s.y) and not 0 <= s.y.min() <= s.y.max() < d.n_classes: raise Finding(f'labels {s.y.tolist()}')
    again, said_again = read()
    if (again.fingerprint, said_again) != (d.fingerprint, said): raise Finding('read again, it is another data set')
    if len({p.name for p in (root/'train').iterdir() if not p.name.startswith('.')}) == d.n_classes:
        files = [f for k in d.classes if (root/'test'/k).is_dir() for f in quietly(image_files, root/'test'/k)]
        x = decode_files(files, [digest(f.read_bytes()) for f in files], d.shape[-1])
        if not (x == d.test.x.numpy()).all(): raise Finding('the cache lies')


def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return function(*args)


def images(data, place):
    "A picture, or a folder of them."
    c = Choices(data)
    if c.below(2):
        one = picture(c)
        with Watch(): quietly(decoded, one, c)
        return
    root = place/'set'
    shutil.rmtree(root, ignore_errors=True), shutil.rmtree(data_dir(), ignore_errors=True)
    grown(root, c)
    with Watch(data_dir()): quietly(loaded, root, c)


# the store

TINY = Experiment(attacks=(DecoderAttack(width=2, blocks=0, n_epochs=1, batch_size=64),)).replace(
    n_train=100, width=0.02, epochs=1, batch_size=64, lr=0.02)


@cache
def filled(place):
    "A copy of a store of two runs, each with an attack; their names, and what is read from them."
    for s in (0, 1): run(TINY.replace(seed=s))
    shutil.copytree(runs_dir(), place/'whole')
    names = sorted(p.name for p in (place/'whole').iterdir() if not p.name.startswith('.'))
    return names, {n: {k: f() for k, f in readings(n).items()} for n in names}


def hashed(module): return digest(b''.join(k.encode() + v.numpy().tobytes() for k, v in module.state_dict().items()))


def readings(name):
    "All that can be asked of a run; the settings of its attacks are known."
    opened = cache(lambda: open_run(name, TINY.attacks))
    return dict(result=lambda: opened().result, attack=lambda: opened().attack('decoder'), weights=lambda: opened().weights,
                model=lambda: hashed(opened().model()), attacker=lambda: hashed(opened().attacker('decoder')),
                all=lambda: {a.name for a in open_run(name).experiment.attacks})


ODD = [None, [], {}, '', 0, -1, 1e400, True, 'x', ['x'], {'x': 1}, '\ud800', '\0', '../x', 'é'*99]


def edited_json(content, c):
    "A value changed, taken out, put in or moved, anywhere."
    place = content
    for _ in range(c.below(4)):
        inner = [v for v in (place.values() if isinstance(place, dict) else place) if isinstance(v, dict | list) and v]
        if not inner: break
        place = c.of(inner)
    if not place: return c.of(ODD)
    k = c.of(list(place) if isinstance(place, dict) else range(len(place)))
    how = c.below(5)
    if how == 0: place.pop(k)
    elif how == 1: place[k] = c.of(ODD)
    elif how == 2 and isinstance(place, dict): place[str(c.of(ODD))] = place.pop(k)
    elif how == 3 and isinstance(place, dict): place[str(c.of(ODD))] = c.of(ODD)
    elif how == 4: return c.of([content, c.of(ODD), [content]])
    return content


def written(content, c):
    "In one of several spellings."
    text = json.dumps(content, indent=c.of([1, None]))
    return c.of([text.encode(), text.encode('utf-16'), b'\xef\xbb\xbf' + text.encode(), b'['*9999, text.encode() + b' ', text.encode()*2])


def harm_store(c, names):
    "Something that a disk, a person or another program may do to stored runs."
    runs = [runs_dir()/n for n in names]
    folders = [*runs, *(next(r.glob('decoder-*'), r) for r in runs)]
    folder, other = c.of(folders), c.of(folders)
    files = ['result.json', 'config.json', 'digests.json', 'weights.safetensors']
    path, place = folder/c.of(files), other/c.of(files)
    how = c.below(12)
    if how < 3: path.write_bytes(edited(path.read_bytes(), c))
    elif how == 3: (folder/'digests.json').write_bytes(written(edited_json(json.loads((folder/'digests.json').read_bytes()), c), c))
    elif how == 4:  # by a program that knows of the digests; what it says of the settings is all that can be held against it
        config = json.dumps(edited_json(json.loads((folder/'config.json').read_bytes()), c)).encode()
        (folder/'config.json').write_bytes(config)
        digests = json.loads((folder/'digests.json').read_bytes()) | {'config.json': hashlib.sha256(config).hexdigest()}
        (folder/'digests.json').write_text(json.dumps(digests))
    elif how == 5: shutil.copyfile(path, place)
    elif how == 6: [shutil.move(a, b) for a, b in ((path, runs_dir()/'.t'), (place, path), (runs_dir()/'.t', place))]
    elif how == 7: path.unlink()
    elif how == 8: path.unlink(), c.of([path.mkdir, lambda: path.symlink_to(place), lambda: path.symlink_to('nowhere'), path.touch])()
    elif how == 9:
        elsewhere = folder.with_name(c.of(['x', '.x', 'decoder', folder.name + '.part']))
        folder.rename(c.of([elsewhere, other/folder.name, runs_dir()/'y']))
    elif how == 10: shutil.rmtree(folder)
    else:
        new = c.of([folder, runs_dir()])/c.of(['.ipynb_checkpoints', 'new', 'new.part', '.DS_Store', '-'])
        c.of([new.mkdir, new.touch])()


OF_DATA = 'data set', 'folder:', 'image_size', 'n_train'  # what an error of the data that settings ask for names


def got(read, name):
    try: return read(), None
    except RunError as e: return None, in_words(e, name, str(runs_dir()))
    except DataError as e: return None, in_words(e, *OF_DATA)


def store(data, place):
    names, truth = filled(place)
    assert runs_dir().is_relative_to(place), 'this is not the store of a fuzzer'
    shutil.rmtree(runs_dir())
    shutil.copytree(place/'whole', runs_dir())
    c = Choices(data)
    for _ in range(1 + c.below(2)):
        try: harm_store(c, names)
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError): pass  # what cannot be done is no harm
    with Watch(runs_dir()/'.locks'): quietly(believed, names, truth)


NO_DAMAGE = 'of schema', 'not known here', 'other images', *OF_DATA  # but settings that this program cannot follow


def believed(names, truth):
    "What is read is what was written, or said to be damaged; what is said to be well can be read."
    said, listed, table = verify(), stored_runs(), run_table()
    prunable(['stopped', 'diverged', 'damaged'])
    for p in said.values(): [in_words(ValueError(f'{line}; '), str(runs_dir())) for line in p]
    for row in table.to_dict('records'):
        if row['run'] not in truth: raise Finding(f'a row of {row["run"]}')
        if row['acc_test'] != 100*truth[row['run']]['result']['accuracy']['test']: raise Finding('another number in the table')
    for name in names:
        path = runs_dir()/name
        attack = attack_path(path, *TINY.attacks).is_dir()
        found = {k: got(read, name) for k, read in readings(name).items()}
        places = {p for p in said if p.split('/')[0] == name}
        for k, (value, error) in found.items():
            if error or k == 'all' or k == 'weights' and name in places: continue  # a digest that is wrong itself
            if value != truth[name][k]: raise Finding(f'{k} of {name} is {value}, not {truth[name][k]}')
        failed = [e for k, (_, e) in found.items() if e and (k in ('result', 'model') and path.is_dir() or attack)]
        failed = [e for e in failed if not any(w in e for w in NO_DAMAGE)]
        if failed and not places: raise Finding(f'all is well, says verify, and yet {failed[0]}')
        if name in places and not any(error for _, error in found.values()): raise Finding(f'all is read, and verify says {said[name]}')
        if path.is_dir() and not any(listed.run == name): raise Finding(f'{name} is not listed')


# the search

TARGETS = dict(images=images, store=store)


def places(place):
    "A store and a data folder of the fuzzer's own."
    os.environ |= {f'CEM_{k}': str(place/k.lower()) for k in ('DATA', 'RUNS', 'RESULTS')}
    torch.set_num_threads(1)


def tried(target, data, place):
    try: TARGETS[target](data, place)
    except Exception:
        print(f'python tests/fuzz.py {target} --input {data.hex()}', file=sys.stderr)
        raise


def at_random(target, place, seed, seconds=math.inf, inputs=math.inf):
    "Inputs until the time is over, or so many; how many there were."
    rng, end, n = random.Random(seed), time.monotonic() + seconds, 0
    while time.monotonic() < end and n < inputs:
        tried(target, rng.randbytes(rng.randrange(4, 80)), place)
        n += 1
    return n


def guided(target, place, seconds, seed):
    "In a process of its own, for the fuzzer ends the one that it is in."
    if pid := os.fork(): sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    def one(data):
        faulthandler.dump_traceback_later(6*SECONDS, exit=True)
        tried(target, data, place)
    atheris.Setup([sys.argv[0], f'-max_total_time={seconds}', f'-seed={seed + 1}', '-max_len=200', '-len_control=0', '-print_final_stats=1',
                   f'-artifact_prefix={place}/'], one)
    atheris.Fuzz()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('target', choices=TARGETS)
    parser.add_argument('--seconds', type=int, default=60)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--input', help='hexadecimal digits: this input and no other')
    parser.add_argument('--random', action='store_true', help='at random, though atheris is installed')
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        places(place := Path(place))
        if a.input is not None: tried(a.target, bytes.fromhex(a.input), place)
        elif atheris and not a.random: guided(a.target, place, a.seconds, a.seed)
        else:
            faulthandler.dump_traceback_later(a.seconds + 6*SECONDS, exit=True)
            print(f'{at_random(a.target, place, a.seed, a.seconds):,} inputs, and none that breaks the rules')


if __name__ == '__main__': main()
