"""Laws of the data and of the store, on inputs that nobody thought of: what is read is what was written, or an error that says so.

Each has a twin that knows nothing of the module: a PNG written by hand, a dictionary for a folder, a second store for a stored number."""
import itertools
import os
import re
import shutil
import struct
import sys
import time
import warnings
import zlib
from io import BytesIO

import fuzz
import numpy as np
import pytest
import torch
from fuzz import png_chunk
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from PIL import Image
from torch import nn

import cem_nb.files as files
import cem_nb.store as store
from cem_nb.attack import ATTACKS, Attack
from cem_nb.cem import CEMS
from cem_nb.core import data_dir, runs_dir, seeded
from cem_nb.data import Augment, DataError, ImageData, Split, batches, split_train
from cem_nb.datasets import load_data
from cem_nb.decoder import DecoderAttack
from cem_nb.experiment import Experiment
from cem_nb.files import RunError
from cem_nb.gan import GAN
from cem_nb.images import decode
from cem_nb.loop import epochs
from cem_nb.methods import DEFENSES
from cem_nb.models import NETWORKS
from cem_nb.oracle import Oracle
from cem_nb.runs import prunable, prune, stored_runs, verify
from cem_nb.store import attack_path, open_run, run, run_path


def some(n): return settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


# a picture

ADAM7 = (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)  # first row, column; steps


def filtered(x, bits, kinds):
    "Rows of samples [h, w, c] as a PNG has them, each with one of the five filters."
    rows = np.packbits((x.reshape(len(x), -1)[..., None] >> np.arange(bits)[::-1] & 1).reshape(len(x), -1), axis=1).astype(int)
    step, before, out = max(1, x.shape[2]*bits//8), np.zeros_like(rows[:1])[0], b''
    for row, kind in zip(rows, kinds):
        a, c = (np.concatenate([np.zeros(step, int), r])[:len(r)] for r in (row, before))
        da, db, dc = abs(before - c), abs(a - c), abs(a + before - 2*c)
        paeth = np.where((da <= db) & (da <= dc), a, np.where(db <= dc, before, c))
        out += bytes([kind]) + ((row - (0, a, before, (a + before)//2, paeth)[kind]) % 256).astype(np.uint8).tobytes()
        before = row
    return out


def png(x, bits=8, colour=0, interlaced=False, kinds=(0,), early=b'', late=b''):
    kinds = itertools.cycle(kinds)
    parts = [p for i, j, di, dj in ADAM7 if (p := x[i::di, j::dj]).size] if interlaced else [x]
    head = struct.pack('>IIBBBBB', x.shape[1], x.shape[0], bits, colour, 0, 0, interlaced)
    body = zlib.compress(b''.join(filtered(p, bits, kinds) for p in parts))
    return b'\x89PNG\r\n\x1a\n' + png_chunk(b'IHDR', head) + early + png_chunk(b'IDAT', body) + late + png_chunk(b'IEND', b'')


def exif(way): return b'II*\0' + struct.pack('<IHHHIII', 8, 1, 0x0112, 3, 1, way, 0)


UPRIGHT = {2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1),
           6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: np.rot90}  # EXIF 2.3, table 4.6.4 A


@st.composite
def pngs(draw):
    "A file by hand, of any kind that is taken, and the colours that stand in it [h, w, 3]."
    h, w, kind = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.sampled_from('grey RGB palette grey+alpha RGBA'.split()))
    bits = draw(st.sampled_from([1, 2, 4, 8])) if kind in ('grey', 'palette') else 8
    n, early = 1 << bits, b''
    x = draw(arrays(np.uint8, (h, w, 3 if 'RGB' in kind else 1), elements=st.integers(0, n - 1)))
    colours = np.broadcast_to(x*np.uint8(255//(n - 1)), (h, w, 3))
    if kind == 'palette':
        table = draw(arrays(np.uint8, (n, 3)))
        colours, early = table[x[..., 0]], png_chunk(b'PLTE', table.tobytes())
        if draw(st.booleans()): early += png_chunk(b'tRNS', b'\xff'*draw(st.integers(1, n)))
    if kind in ('grey+alpha', 'RGBA'): x = np.concatenate([x, np.full((h, w, 1), 255, np.uint8)], 2)
    way, late, turn = draw(st.integers(0, 9)), draw(st.booleans()), draw(st.booleans())
    places = {'late' if late else 'early': png_chunk(b'eXIf', exif(way))} if turn else {}
    data = png(x, bits, dict(zip('grey RGB palette grey+alpha RGBA'.split(), (0, 2, 3, 4, 6)))[kind], draw(st.booleans()),
               draw(st.lists(st.integers(0, 4), min_size=1, max_size=6)), early + places.get('early', b''), places.get('late', b''))
    return data, UPRIGHT[way](colours) if turn and way in UPRIGHT else colours


@st.composite
def jpegs(draw):
    "A file of Pillow's, and what Pillow makes of it, upright by hand."
    x = draw(arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]))))
    how = dict(quality=draw(st.integers(1, 100)), progressive=draw(st.booleans()), optimize=draw(st.booleans()))
    if x.shape[2] == 3: how['subsampling'] = draw(st.integers(0, 2))
    way = draw(st.integers(0, 9))
    Image.fromarray(x.squeeze(2) if x.shape[2] == 1 else x).save(out := BytesIO(), 'JPEG', exif=b'Exif\0\0' + exif(way), **how)
    colours = np.asarray(Image.open(out).convert('RGB'))
    return out.getvalue(), UPRIGHT[way](colours) if way in UPRIGHT else colours


def tents(n, m):
    "Weights of n pixels for each of m: a triangle as wide as a new pixel, or an old one if that is wider."
    centre, reach = (np.arange(m)[:, None] + 0.5)*n/m, max(n/m, 1)
    w = np.maximum(0, 1 - abs(np.arange(n) + 0.5 - centre)/reach)
    return w/w.sum(1, keepdims=True)


def covering(x, size):
    h, w = x.shape[:2]
    r = size/min(h, w)
    high, wide = max(size, round(h*r)), max(size, round(w*r))
    y = np.einsum('ih,hwc,jw->ijc', tents(h, high), x.astype(float), tents(w, wide))
    return y[(high - size)//2:, (wide - size)//2:][:size, :size]


@some(200)
@given(st.one_of(pngs(), jpegs()), st.integers(4, 24))
def test_any_picture_is_what_its_file_says_upright_and_in_the_middle_of_the_square(picture, size):
    data, want = picture
    assert np.array_equal(decode(data, 'it', None).transpose(1, 2, 0), want)
    grey = decode(data, 'it', None, 1)[0]
    assert abs(grey - want @ [0.299, 0.587, 0.114]).max() <= 1 and ((want != want[..., :1]).any(2) | (grey == want[..., 0])).all()
    assert abs(decode(data, 'it', size).transpose(1, 2, 0) - covering(want, size)).max() <= 1.01  # rounded after either axis


# a folder

def flat(v): return png(np.full((8, 8, 1), v, np.uint8))


CLASSES = st.sampled_from(['a', 'C', 'd', '.git', 'é', 'a b'])
PARTS = st.sampled_from(['train', 'test'])
NAMES = st.builds(str.__add__, st.text('aB.0é _-', max_size=3),
                  st.sampled_from(['.png', '.PNG', '.jpg', '.Jpeg', '.webp', '.txt', '', '.png.x'])).filter(lambda n: n.strip('.'))
SHADES = st.dictionaries(NAMES, st.integers(0, 255), min_size=1, max_size=5)
TREES = st.dictionaries(st.tuples(PARTS, CLASSES), SHADES, min_size=2, max_size=10)


def hidden(name): return name.startswith('.')
def is_image(name): return not hidden(name) and name.lower().endswith(('.png', '.jpg', '.jpeg'))


def as_listed(tree):
    "What a dictionary (part, class) -> name -> shade is as a data set: classes, shades and labels of each part; or None."
    has = {part: sorted(c for p, c in tree if p == part and not hidden(c)) for part in ('train', 'test')}
    if min(map(len, has.values())) < 2 or has['test'] != has['train']: return None
    lists = {p: [(tree[p, c][n], has['train'].index(c)) for c in has[p] for n in sorted(tree[p, c]) if is_image(n)] for p in has}
    if any(not any(map(is_image, tree[p, c])) for p in has for c in has[p]): return None
    return has['train'], lists['train'], lists['test']


def listed(d):
    "Of pictures of one shade: classes, shades and labels."
    shade = lambda x: x[0, 0, 0].item() if (x == x[0, 0, 0]).all() else 'spoilt'
    return list(d.classes), *([(shade(x), y.item()) for x, y in zip(s.x, s.y)] for s in (d.train, d.test))


@some(40)
@given(TREES, st.randoms(use_true_random=False))
def test_a_folder_is_read_whole_in_order_of_names_and_the_rest_is_counted(tmp_path_factory, tree, rng):
    if as_listed(tree) is None:  # mostly too few classes; one that has all is as likely
        tree = {(p, c): {'0.png': 1} | tree.get((p, c), {}) for p in ('train', 'test') for c in {c for _, c in tree} | {'a', 'b'}}
    made = []
    for _ in range(2):  # in two orders of writing
        root = tmp_path_factory.mktemp('set')
        todo = [(p, c, n, v) for (p, c), names in tree.items() for n, v in names.items()]
        rng.shuffle(todo)
        for p, c, n, v in todo:
            (root/p/c).mkdir(parents=True, exist_ok=True)
            (root/p/c/n).write_bytes(flat(v))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            made.append(load_data(f'folder:{root}', val_frac=0))
        told = {m[1]: int(m[2]) for w in said if (m := re.match(r'(.*): (\d+) left out \(', str(w.message)))}
        beside = {str(root/p/c): sum(not is_image(n) and not hidden(n) for n in names) for (p, c), names in tree.items() if not hidden(c)}
        assert told == {k: n for k, n in beside.items() if n}
    assert made[0].fingerprint == made[1].fingerprint and listed(made[0]) == as_listed(tree)


@some(120)
@given(st.lists(st.integers(0, 4), min_size=8, max_size=150), st.one_of(st.none(), st.integers(1, 200)), st.floats(0, 0.5),
       st.integers(1, 60), st.integers(0, 9))
def test_training_and_validation_are_parts_by_class_and_epochs_visit_each_image(labels, n_train, val_frac, batch_size, seed):
    n, y = len(labels), torch.tensor(labels)
    full = Split(torch.arange(n, dtype=torch.uint8)[:, None, None, None], y)
    before = torch.get_rng_state()
    try: train, val = split_train(full, n_train, val_frac, seed)
    except DataError: assume(False)
    assert torch.equal(torch.get_rng_state(), before)
    ids = [s.x.flatten().tolist() for s in (train, val)]
    wanted = n if n_train is None else min(n_train, n)
    assert len(val) == round(val_frac*wanted) and len(train) == min(wanted, n - len(val)) and not set(ids[0]) & set(ids[1])
    for s, own in zip((train, val), ids): assert own == sorted(set(own)) and s.y.tolist() == [labels[i] for i in own]
    if len(val): assert (y.bincount()*len(val)/n - val.y.bincount(minlength=len(y.bincount()))).abs().max() <= 1
    seen = [(round(255*x.item()), c.item()) for xs, ys in batches(train, batch_size) for x, c in zip(xs, ys)]
    assert seen == list(zip(ids[0], train.y.tolist()))
    drawn = [(round(255*x.item()), c.item()) for xs, ys in batches(train, batch_size, shuffle=True) for x, c in zip(xs, ys)]
    left = len(train) % batch_size if len(train) > batch_size else 0
    assert len(drawn) == len(set(drawn)) == len(train) - left and set(drawn) <= set(seen)


class AFolder(RuleBasedStateMachine):
    "A folder of images that changes under a running kernel, beside a dictionary of what is in it."
    root, tree, n = None, None, 0
    names = st.sampled_from(['0.png', '1.png', 'x.jpg', 'note.txt'])
    classes = st.sampled_from(['a', 'b', 'c'])
    shades = st.integers(0, 3)

    @initialize()
    def begin(self):
        AFolder.n += 1
        shutil.rmtree(data_dir()/'cache', ignore_errors=True)
        self.root, self.tree = data_dir().with_name(f'folder{AFolder.n}'), {}
        for p, c, v in itertools.product(('train', 'test'), 'ab', (0, 1)): self.put(p, c, f'{v}.png', v, False, False)

    @rule(p=PARTS, c=classes, name=names, v=shades, moved=st.booleans(), dated_back=st.booleans())
    def put(self, p, c, name, v, moved, dated_back):
        "Written in its place, or beside it and moved there; perhaps with the times of the one before."
        (self.root/p/c).mkdir(parents=True, exist_ok=True)
        path, times = self.root/p/c/name, None
        if path.exists(): times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        (self.root/'new' if moved else path).write_bytes(flat(v))
        if moved: (self.root/'new').rename(path)
        if dated_back and times: os.utime(path, ns=times)
        self.tree.setdefault((p, c), {})[name] = v

    @rule(p=PARTS, c=classes, name=names)
    def delete(self, p, c, name):
        if self.tree.get((p, c), {}).pop(name, None) is not None: (self.root/p/c/name).unlink()

    @rule(p=PARTS, c=classes)
    def drop(self, p, c):
        if self.tree.pop((p, c), None) is not None: shutil.rmtree(self.root/p/c)

    @rule(old=classes, new=classes)
    def rename(self, old, new):
        for p in ('train', 'test'):
            if (p, old) in self.tree and (p, new) not in self.tree:
                (self.root/p/old).rename(self.root/p/new)
                self.tree[p, new] = self.tree.pop((p, old))

    @rule(p=PARTS, c=classes)
    def exchange(self, p, c):
        names = self.tree.get((p, c), {})
        if not {'0.png', '1.png'} <= set(names): return
        for a, b in (('0.png', 't'), ('1.png', '0.png'), ('t', '1.png')): (self.root/p/c/a).rename(self.root/p/c/b)
        names['0.png'], names['1.png'] = names['1.png'], names['0.png']

    @rule()
    def move(self):
        AFolder.n += 1
        self.root = self.root.rename(self.root.with_name(f'folder{AFolder.n}'))

    @rule(at=st.sampled_from([0, 30, 130, 200, 500, -70, -1]), bit=st.integers(0, 7), cut=st.booleans())
    def spoil(self, at, bit, cut):
        "Numpy's header, a pixel or the seal of what is cached; and then the folder is another one, of the same pictures."
        for path in (data_dir()/'cache').glob('*.npy'):
            data = bytearray(path.read_bytes() or b' ')
            data[at % len(data)] ^= 1 << bit
            path.write_bytes(data[:at % len(data)] if cut else data)
        self.move()

    def reads(self, want):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try: assert listed(load_data(f'folder:{self.root}', val_frac=0)) == want
            except DataError: assert want is None

    @invariant()
    def what_is_read_is_what_is_there(self):
        "Then what lacks is put there, and it is read once more when its files are old enough to be believed."
        if self.tree is None: return
        self.reads(want := as_listed(self.tree))
        if want is None:
            classes = {c for _, c in self.tree} | {'a', 'b'}
            for p, c in itertools.product(('train', 'test'), classes): self.put(p, c, '0.png', 2, False, False)
        time.sleep(0.045)
        self.reads(as_listed(self.tree))


def test_a_folder_that_changes_is_read_as_it_is(monkeypatch):
    "From whatever cache: none of them outlives a change, and each is used."
    monkeypatch.setattr(files, 'FRESH', 4*10**7)  # nanoseconds, some ticks of a disk's clock
    hits = load_data.__globals__['_loaded'].cache_info().hits
    run_state_machine_as_test(AFolder, settings=settings(some(20), stateful_step_count=20))
    assert load_data.__globals__['_loaded'].cache_info().hits > hits + 20


# names

def numbers(low, high): return st.one_of(st.floats(low, high, exclude_min=True).map(abs), st.integers(1, max(1, high)))


DECODERS = st.builds(DecoderAttack, width=st.integers(1, 64), n_epochs=st.integers(1, 9), restarts=st.integers(1, 3))
CHANGES = dict(
    seed=st.integers(0, 2**40), n_train=st.one_of(st.none(), st.integers(1, 999)), val_frac=st.floats(0, 0.5).map(abs),
    dataset=st.text(max_size=5), arch=st.sampled_from(list(NETWORKS)), width=numbers(0, 2), cut=st.one_of(st.none(), st.integers(1, 9)),
    noise_std=numbers(0.001, 3), defense=st.sampled_from([d for d in DEFENSES if DEFENSES[d].cls.cem]), lam=numbers(0, 99),
    variant=st.sampled_from(list(CEMS)), epochs=st.integers(2, 400), batch_size=st.integers(2, 999), lr=numbers(0, 3),
    momentum=st.floats(0, 1, exclude_max=True).map(abs), weight_decay=numbers(0, 1), gamma=numbers(0, 2),
    drops=st.lists(st.floats(0, 1, exclude_max=True).map(abs), max_size=4).map(tuple), cem=st.booleans(),
    preset=st.sampled_from(['', 'quick', 'mine']),
    attacks=st.lists(st.one_of(DECODERS, st.builds(GAN, penalty=numbers(0, 20)), st.builds(Oracle, n_images=st.integers(2, 99))),
                     max_size=3, unique_by=lambda a: a.name))
EXPERIMENTS = st.fixed_dictionaries({}, optional=CHANGES).map(lambda k: Experiment().replace(**k))


def what_counts(e): return {k: v for k, v in e.model_dump().items() if k not in ('data', 'attacks', 'preset')}


@some(150)
@given(EXPERIMENTS, EXPERIMENTS, st.sampled_from(sorted(CHANGES)), st.data())
def test_a_run_has_one_name_and_no_other_run_has_it(a, b, field, data):
    nearly = a.replace(**{field: data.draw(CHANGES[field])})  # but for one setting
    for e in (a, b):
        again = Experiment.model_validate_json(e.model_dump_json())
        assert again == e == e.replace(**e.settings()) and run_path(again, 'f') == run_path(e, 'f') != run_path(e, 'g')
        assert re.fullmatch(r'[\w+]+-s\d+-[0-9a-f]{12}', run_path(e, 'f').name) and run_path(e, 'f').parent == runs_dir()
    for x, y in ((a, b), (a, nearly)):
        assert (run_path(x, 'f') == run_path(y, 'f')) == (what_counts(x) == what_counts(y))
        for s, t in itertools.product(x.attacks, y.attacks): assert (attack_path(runs_dir(), s) == attack_path(runs_dir(), t)) == (s == t)


# stored numbers

@pytest.fixture(scope='module')
def two_runs(tmp_path_factory):
    "A place with two finished runs, each with an attack; their names, and all that is read from them."
    with pytest.MonkeyPatch.context() as m:
        place = tmp_path_factory.mktemp('two')
        for k in ('DATA', 'RUNS'): m.setenv(f'CEM_{k}', str(place/k.lower()))
        return place/'whole', *fuzz.filled(place)


HARMS = {'flip': lambda x: bytes(v ^ 1 for v in x), 'remove': lambda x: b'', 'zero': lambda x: bytes(len(x)), 'double': lambda x: x*2}


@some(70)
@given(which=st.integers(0, 15), at=st.floats(0, 1, exclude_max=True), n=st.one_of(st.integers(1, 40), st.integers(1, 40_000)),
       harm=st.sampled_from(list(HARMS)))
def test_no_part_of_a_finished_run_changes_unnoticed(two_runs, which, at, n, harm):
    "Whatever becomes of some bytes of a file: verify says so, or all that is read is what it was."
    whole, names, truth = two_runs
    shutil.rmtree(runs_dir(), ignore_errors=True)
    shutil.copytree(whole, runs_dir())
    path = sorted(p for p in runs_dir().rglob('*') if p.is_file() and '.locks' not in p.parts)[which]
    data = path.read_bytes()
    i = int(at*len(data))
    path.write_bytes(changed := data[:i] + HARMS[harm](data[i:i + n]) + data[i + n:])
    if path.name != files.DIGESTS and changed != data: assert list(verify()) == [str(path.parent.relative_to(runs_dir()))]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fuzz.believed(names, truth)


class Small(nn.Module):
    "Stands for a network: it is trained in no time, and every number of its run depends on every step."
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(2, 2)

    def trained(self, stage, seed, checkpoint):
        history = []
        for _ in epochs(2, state=dict(it=self), history=history, seed=seed, stage=stage, checkpoint=checkpoint):
            with torch.no_grad(): self.encoder.weight.mul_(0.5).add_(torch.rand(2, 2))
            history.append(dict(loss=self.encoder.weight.sum().item()))
        return history


class SmallAttack(Attack):
    name, label, marker = 'small', 'small', 'v'
    width: int = 1

    def attacker(self, model, train): return Small()
    def fit(self, attacker, model, train, *, seed, checkpoint=None, label=None): return attacker.trained(self.width, seed, checkpoint)
    def score(self, attacker, model, images, *, seed): return dict(mse=(attacker.encoder.weight.sum() + model.encoder.weight.sum()).item())


def stubs(m):
    "The store with training that takes no time; all that it writes, names, locks and reads is as it is."
    def build(e, data):
        with seeded(e.seed, 'init'): return None, Small()
    def train(e, data, *, checkpoint, label):
        model = build(e, data)[1]
        return model, model.trained('train', e.seed, checkpoint)
    x = Split(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.arange(2))
    data = ImageData('small', ('a', 'b'), x, x, x, Augment())
    m.setitem(ATTACKS, 'small', SmallAttack)
    for name, it in dict(build=build, train=train, data_on=lambda settings, device: (data, 'f'), feature_shape=lambda *a: (1, 1, 1),
                         accuracy=lambda model, s, seed: model.encoder.weight.sum().item()).items(): m.setattr(store, name, it)
    m.setattr(os, 'fsync', lambda fd: None)  # that bytes reach the disk before names is asked for elsewhere


def an(i, width): return Experiment(seed=i, attacks=(SmallAttack(width=width),))


def numbers_of(r): return {k: v for k, v in r.result.items() if k in ('accuracy', 'curves')}, r.attack('small')['scores'], r.weights


def dies_at(step, what):
    "Run `what` in a process that dies at its n-th change of the disk, without a word to anybody."
    if pid := os.fork(): return os.waitpid(pid, 0)[1]
    left = itertools.count(step, -1)
    def hook(event, args):
        if event in fuzz.CHANGES or event == 'open' and isinstance(args[0], str) and args[2] & fuzz.WRITES:
            if '.locks' not in os.fspath(args[0]) and next(left) <= 0: os._exit(9)
    sys.addaudithook(hook)
    try: what()
    finally: os._exit(0)


SEEDS, WIDTHS = st.integers(0, 1), st.integers(1, 2)


class AStore(RuleBasedStateMachine):
    "A store in which runs are computed, killed, spoilt and pruned, beside a list of what is damaged."
    truth, deaths = {}, 0

    @initialize()
    def begin(self):
        shutil.rmtree(runs_dir(), ignore_errors=True)
        self.bad = set()
        self.compute(0, 1), self.compute(0, 2)

    def places(self): return [p for p in (*runs_dir().glob('Bottleneck*'), *runs_dir().glob('*/small-*')) if '.part' not in str(p)]

    @rule(i=SEEDS, width=WIDTHS)
    def compute(self, i, width):
        e = an(i, width)
        path = run_path(e, 'f')
        touched = {path, attack_path(path, *e.attacks)} & self.bad
        try: assert numbers_of(run(e)) == AStore.truth[i, width]
        except RunError as error: assert touched and str(error).count('remove') == 1

    @rule(i=SEEDS, width=WIDTHS, step=st.integers(0, 40), anew=st.booleans())
    def kill(self, i, width, step, anew):
        if anew: shutil.rmtree(run_path(an(i, width), 'f'), ignore_errors=True)
        self.bad = {p for p in self.bad if p.is_dir()}
        AStore.deaths += dies_at(step, lambda: run(an(i, width))) != 0

    @precondition(lambda self: self.places())
    @rule(which=st.integers(0), name=st.sampled_from(store.SEALED), at=st.floats(0, 1, exclude_max=True), found=st.booleans())
    def damage(self, which, name, at, found):
        folder = sorted(self.places())[which % len(self.places())]
        data = bytearray((folder/name).read_bytes())
        data[int(at*len(data))] ^= 1
        (folder/name).write_bytes(data)
        if folder in self.bad: shutil.rmtree(folder)  # or it would be whole again
        self.bad = {p for p in self.bad | {folder} if p.is_dir()}
        if found: self.make_room('damaged')

    @rule(state=st.sampled_from(['damaged', 'damaged', 'stopped', 'diverged']))
    def make_room(self, state):
        before = set(self.places())
        prune(prunable([state]))
        gone = {p for p in before if state == 'damaged' and ({p, *p.parents} & self.bad)}
        assert set(self.places()) == before - gone
        if state == 'stopped': assert not list(runs_dir().rglob('*.part')) and not list(runs_dir().rglob('checkpoint*.part'))
        self.bad -= gone

    @rule(i=SEEDS)
    def look(self, i):
        path = run_path(an(i, 1), 'f')
        if path.is_dir() and path not in self.bad: assert open_run(path.name, ()).result['curves'] == AStore.truth[i, 1][0]['curves']

    @invariant()
    def what_is_damaged_is_said_and_nothing_else(self):
        assert {runs_dir()/p for p in verify()} == self.bad
        assert set(stored_runs().state) <= {'finished', 'damaged', 'stopped'}


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs processes that can be killed')
def test_a_store_under_kills_and_damage_has_the_numbers_of_one_that_was_left_alone(monkeypatch):
    stubs(monkeypatch)
    for i, width in itertools.product((0, 1), (1, 2)):
        AStore.truth[i, width] = numbers_of(run(an(i, width)))
        shutil.rmtree(runs_dir())
    run_state_machine_as_test(AStore, settings=settings(some(20), stateful_step_count=12))
    assert AStore.deaths > 10


# the fuzzer's targets, for some inputs each

@pytest.mark.parametrize('target', fuzz.TARGETS)
def test_a_short_search_finds_nothing(target, tmp_path):
    assert fuzz.at_random(target, tmp_path, seed=0, inputs=20) == 20
