"The paper's figures as printed, as runs, and the errata recomputed from its own rows."
import math
import re
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from cem_nb.paper import PAPER, as_runs, errata_table, paper_csv, paper_numbers, paper_runs, paper_text
from frames import DEFENCES, MSE_TABLES, SSIM_TABLES, as_run, printed

FROM = "from the paper's rows"
MSE_OF = {4: 1, 5: 8, 6: 2, 7: 3}  # SSIM and PSNR are of the attacks of these tables


def numbers(text): return [float(v) for v in re.findall(r'\d+\.\d+', text)]


def erratum(table, where): return errata_table(table).data.set_index('where').loc[where, FROM]


def test_the_papers_numbers_as_printed():
    t = paper_numbers(1)
    assert len(t) == 1 + 7*2 + 2 and t.loc[('ResSFL', True), 'mse_infer_gan'] == 0.0273
    assert [m for m, cem in t.index if not cem] == ['No_defense', *DEFENCES, 'Average']  # the paper's order
    assert paper_numbers(5).loc[('Noise_ARL', True), 'psnr_gan'] == 14.40  # an erratum stays as printed
    assert paper_text(4).loc[('Noise_ARL', True), 'psnr_gan'] == '14.40'
    g = 100*(t.loc[('Average', True)]/t.loc[('Average', False)] - 1)
    assert g[['mse_train_decoder', 'mse_train_gan']].mean() == pytest.approx(24.0, abs=0.1)  # of the rounded averages


@pytest.mark.parametrize('read', [paper_text, paper_numbers, paper_runs])
@pytest.mark.parametrize('bad', [0, 9, '1', None])
def test_no_such_table(read, bad):
    with pytest.raises(ValueError, match='choose one of 1, 2'): read(bad)


@pytest.mark.parametrize('installed', [True, False])
def test_no_such_file(installed, monkeypatch):
    def files(name):
        if not installed: raise PackageNotFoundError(name)

    monkeypatch.setattr('cem_nb.paper.files', files)
    with pytest.raises(FileNotFoundError, match='table_10.csv'): paper_csv('table_10.csv')


@pytest.mark.parametrize('table', PAPER)
def test_the_papers_rows_as_runs(table):
    ours, theirs = paper_runs(table), as_run(table)
    index = ['defense', 'cem', 'seed']
    assert ours.cem.dtype == bool and 'Average' not in set(ours.defense) and set(ours) == set(theirs)
    assert ours.set_index(index)[sorted(theirs.columns.difference(index))].equals(
        theirs.set_index(index)[sorted(theirs.columns.difference(index))])
    text = as_runs(paper_text(table))
    assert len(text) == len(ours) + 2
    for r in text.to_dict('records'):
        for c in set(text) - set(index): assert r[c] == printed(table)[r['defense'], r['cem'], c]


@pytest.mark.parametrize('table', PAPER)
def test_averages_agree_to_the_last_digit_but_for_the_errata(table):
    text, off, columns = printed(table), {}, {c for _, _, c in printed(table)}
    for cem in (False, True):
        for c in columns:
            as_printed, digits = text['Average', cem, c], len(text['Dropout', cem, c].split('.')[1])
            mean = np.mean([float(text[d, cem, c]) for d in DEFENCES])
            if abs(round(mean, digits) - float(as_printed)) > 1.001*10.0**-digits: off[cem, c] = f'{mean:.{digits}f}'
    e = errata_table(table).data
    listed = e[e['where'].str.startswith('Average')]
    assert len(off) == len(listed) == {3: 1, 6: 1, 8: 2}.get(table, 0)
    for (cem, _), mean in off.items():
        assert any(w.startswith(f'Average {"w/" if cem else "w/o"} CEM') and f.startswith(mean)
                   for w, f in zip(listed['where'], listed[FROM]))


def mse(table, part, attack, cem):
    return np.array([float(printed(table)[d, cem, f'mse_{part}_{attack}']) for d in DEFENCES])


@pytest.mark.parametrize('table', MSE_TABLES)
@pytest.mark.parametrize('images, part', [('training', 'train'), ('test', 'test')])
def test_errata_of_the_gains_follow_from_the_rows(table, images, part):
    pairs = [(mse(table, part, a, False), mse(table, part, a, True)) for a in ('decoder', 'gan')]
    of_averages = np.mean([after.mean()/before.mean() for before, after in pairs])
    of_ratios = np.mean([(after/before).mean() for before, after in pairs])
    row = errata_table(table).data
    row = row[row['where'].str.contains(f'MSE on {images} images')].iloc[0]
    assert numbers(row[FROM])[:2] == [round(100*(of_averages - 1), 1), round(100*(of_ratios - 1), 1)]
    assert PAPER[table].stated[f'mse_{part}'] == f'+{row["printed"]}'


def test_the_gain_stated_for_training_images_in_table_8_is_the_decoders():
    text = printed(8)
    average = lambda cem, part: float(text['Average', cem, f'mse_{part}_decoder'])
    gain = 100*(np.mean([average(True, p)/average(False, p) for p in ('train', 'test')]) - 1)
    assert f'{gain:.1f} % are the decoder\'s alone' in erratum(8, 'Section 11, gain in MSE on training images')
    assert PAPER[8].stated['mse_train'] == f'+{gain:.1f} %'


@pytest.mark.parametrize('table', SSIM_TABLES)
@pytest.mark.parametrize('metric, column, half', [('SSIM', 'ssim_zero_test', 0.000501), ('PSNR', 'psnr_test', 0.00501)])
def test_errata_of_the_averages_follow_from_the_rows(table, metric, column, half):
    text = printed(table)
    mean = [np.mean([float(text[d, cem, f'{column}_{a}']) for d in DEFENCES for a in ('decoder', 'gan')])
            for cem in (False, True)]
    row = errata_table(table).data
    row = row[row['where'] == f'Section 10, averages: {metric}'].iloc[0]
    assert numbers(row[FROM]) == pytest.approx(mean, abs=half)  # 18.095 may be rounded either way
    assert PAPER[table].stated[column] == row['printed'].replace('to', '→')


def beyond_rounding(psnr, mse):
    "Whether no MSE that is printed as `mse`, rounded or cut off, has a PSNR that is printed as `psnr`."
    least, most = -10*math.log10(mse + 1e-4), -10*math.log10(mse - 5e-5)
    return psnr + 0.01 < least or psnr - 0.005 > most


@pytest.mark.parametrize('table', SSIM_TABLES)
def test_errata_of_psnr_follow_from_the_mse(table):
    text, other, found = printed(table), printed(MSE_OF[table]), {}
    for d in DEFENCES:
        for cem in (False, True):
            for a, label in (('decoder', 'decoder'), ('gan', 'GAN')):
                shown, error = text[d, cem, f'psnr_test_{a}'], float(other[d, cem, f'mse_test_{a}'])
                if beyond_rounding(float(shown), error):
                    found[f'{d}{"+CEM"*cem}, {label}, PSNR'] = shown, f'{-10*math.log10(error):.2f}'
    e = errata_table(table).data
    e = e[e['where'].str.fullmatch(r'\w+(\+CEM)?, \w+, PSNR')]
    assert {w: (p, f[:5]) for w, p, f in zip(e['where'], e['printed'], e[FROM])} == found
    assert all(f'the MSE of Table {MSE_OF[table]}' in f for f in e[FROM])
    assert len(found) == {5: 11, 6: 1}.get(table, 0)


def test_psnr_that_is_off_by_more_than_a_twentieth():
    "Rounding may explain two of these fourteen."
    off = [t for t in SSIM_TABLES for (d, cem, c), v in printed(t).items() if c.startswith('psnr') and d != 'Average'
           and abs(float(v) + 10*math.log10(float(printed(MSE_OF[t])[d, cem, c.replace('psnr', 'mse')]))) > 0.05]
    assert len(off) == 14 and off.count(5) == 11


def test_what_stands_in_the_wrong_column_of_table_5():
    "16.27 is the GAN's to the last digit; 14.40 is not the decoder's, and is Table 4's for the same row and attack."
    row, errors = ({a: printed(t)['Noise_ARL', True, f'{m}_test_{a}'] for a in ('decoder', 'gan')}
                   for t, m in ((5, 'psnr'), (8, 'mse')))
    decoder, gan = (-10*math.log10(float(errors[a])) for a in ('decoder', 'gan'))
    assert f'{gan:.2f}' == row['decoder'] and float(row['gan']) - decoder == pytest.approx(0.20, abs=0.005)
    assert row['gan'] == printed(4)['Noise_ARL', True, 'psnr_test_gan']
    assert erratum(5, 'Noise_ARL+CEM, GAN, PSNR').endswith('stands in Table 4 for the same row and attack')


def test_the_other_errata():
    for here, there in ((2, 6), (6, 2)):
        says = erratum(here, 'Bottleneck+CEM, accuracy')
        assert printed(there)['Bottleneck', True, 'acc_test'] in says and f'Table {there}' in says
    assert erratum(5, 'Noise_ARL+CEM, GAN, PSNR').startswith(printed(5)['Noise_ARL', True, 'psnr_test_decoder'])
    assert errata_table(9).data['printed'].tolist() == ['9.78M'] and errata_table(9).caption.startswith('Table 9')
    assert set(paper_csv('errata.csv').table) == {str(t) for t in range(1, 10)}
