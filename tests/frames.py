"Frames of runs for the tests: made up, lost in part, and the paper's own as read with nothing but csv."
import csv

import numpy as np
import pandas as pd

from cem_nb.core import project_dir

DEFENCES = ['Bottleneck', 'DistCorr', 'Dropout', 'PATROL', 'ResSFL', 'Noise_Nopeek', 'Noise_ARL']
MSE_TABLES, SSIM_TABLES = (1, 2, 3, 8), (4, 5, 6, 7)
WORDS = {'accuracy': 'acc_test', 'mse_train': 'mse_train', 'mse_infer': 'mse_test', 'ssim': 'ssim_zero_test', 'psnr': 'psnr_test'}


def printed(table):
    "(defence, with CEM, our column) to the text that the paper prints."
    cells = {}
    with (project_dir()/'data'/'paper'/'tables_1_to_8.csv').open() as f:
        for r in csv.DictReader(f):
            if r['table'] != str(table): continue
            cells[r['method'], r['cem'] == '1', '_'.join(filter(None, (WORDS[r['metric']], r['attack'])))] = r['value']
    return cells


def as_run(table):
    "The paper's rows, without its averages, as if they were runs of ours."
    rows = {}
    for (defense, cem, column), text in printed(table).items():
        if defense != 'Average': rows.setdefault((defense, cem), {})[column] = float(text)
    return pd.DataFrame([dict(defense=d, cem=c, seed=0) | r for (d, c), r in rows.items()])


def made(n_seeds=2, defenses=('Bottleneck', 'Dropout'), attacks=('decoder', 'gan'), metrics=('mse', 'ssim', 'ssim_zero', 'psnr')):
    "Runs in which CEM doubles every MSE, takes 0.1 of SSIM and 2 dB, and costs half a point."
    rng, rows = np.random.default_rng(0), []
    ranges = {'mse': (0.01, 0.03), 'ssim': (0.5, 0.7), 'ssim_zero': (0.5, 0.7), 'psnr': (15, 20)}
    for seed in range(n_seeds):
        for d in defenses:
            base = {(k, p, a): rng.uniform(*ranges[k]) for a in attacks for p in ('train', 'val', 'test') for k in metrics}
            for cem in (False, True):
                if d == 'No_defense' and cem: continue
                change = {'mse': lambda v: v*(1 + cem), 'psnr': lambda v: v - 2*cem}
                scores = {'_'.join(k): change.get(k[0], lambda v: v - 0.1*cem)(v) for k, v in base.items()}
                rows.append(dict(defense=d, cem=cem, seed=seed, preset='quick', dataset='digits', image_size=np.nan,
                                 arch='vgg11', width=0.25, noise_std=0.025, lam=16.0*cem, variant='diag' if cem else None,
                                 acc_test=90 - 0.5*cem) | scores | {f'finished_{a}': True for a in attacks}
                            | dict(run=f'{d}-{cem}-{seed}', schema=3, hardware='1 CPU thread, a CPU',
                                   python='3.11', torch='2.15', cem_nb='0.1', date='2026-01-01'))
    return pd.DataFrame(rows)


def diverge(frame, defense, cem, seeds=(0,), attack=None):
    "The frame with lost runs, of which nothing is known but that they were tried; or with one lost attack."
    lost = (frame.defense == defense) & (frame.cem == cem) & frame.seed.isin(seeds)
    scores = [c for c in frame if c.startswith(('mse', 'ssim', 'psnr')) and (attack is None or c.endswith(f'_{attack}'))]
    if attack is None: scores += ['acc_test', *(c for c in frame if c.startswith('finished'))]
    return frame.assign(**{c: frame[c].where(~lost) for c in scores})
