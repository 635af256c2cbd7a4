"""What happens to input that makes no sense: one exception type for each kind, with the cause and the remedy in one line.

The cases are data: a name, a call, the exception, and words that its message must have. What is sensible elsewhere and not here (a
file's content, a run's) is tested beside the module that reads it."""
import math

import numpy as np
import pytest
import torch

import cem_nb.floors
from cem_nb import (bounds, core, cost, distcorr, fisher, images, kmeans, logdet, mixture, models, posterior, ssim, theorem1,
                    worlds)
from cem_nb.attack import attack_from, reconstruct, register_attack, score_attack
from cem_nb.cem import CEMS
from cem_nb.data import DataError, Split, batches, split_train, to_float
from cem_nb.datasets import load_data
from cem_nb.decoder import Decoder, DecoderAttack
from cem_nb.defense import make_defense
from cem_nb.experiment import Experiment, preset
from cem_nb.files import RunError
from cem_nb.figure4 import Figure4Parameters
from cem_nb.oracle import Oracle
from cem_nb.parameters import ParameterError, TableParameters, read_parameters
from cem_nb.rebuilt import picked
from cem_nb.stats import mean_interval
from cem_nb.engine import pick_device
from cem_nb.store import open_run, run
from cem_nb.sweep import experiments, sweep
from cem_nb.tradeoff import advantage, noise_rows
from cem_nb.training import accuracy

NAN, INF = math.nan, math.inf
Z, Y = torch.rand(60, 8), torch.arange(60) % 3
BAD = Z.clone()
BAD[3, 3] = NAN
W, MU, S = torch.ones(2)/2, torch.zeros(2, 3), torch.ones(2, 3)
X = torch.rand(2, 1, 16, 16)
BYTES = (255*X).byte()
DECODER = DecoderAttack(width=8, blocks=0, n_epochs=2, batch_size=64)
E = Experiment(attacks=(DECODER,)).replace(n_train=256, width=0.125, epochs=2, batch_size=64)


def regulariser(variant='diag', **k): return CEMS[variant](**dict(noise_std=0.1, n_classes=3, n_epochs=5) | k)
def fitted(**k): return regulariser(**k).fit(Z, Y)
def model(**k): return models.split_model(**dict(n_classes=3, in_channels=1, image_size=16, width=0.125) | k).eval()
def attacker(): return Decoder(models.feature_shape(model(), (1, 16, 16)), (1, 16, 16), 8, 0)
def asked(line):
    "What a notebook says to a line that papermill injects."
    exec(line, space := {})
    return read_parameters(dict(space, In=[f'# Parameters\n{line}']))


CASES = [
    # the mixture and its bounds
    ('weights that do not sum to 1', lambda: bounds.entropy_huber(W*2, MU, S), ValueError, 'sum'),
    ('a negative weight', lambda: bounds.entropy_huber(torch.tensor([1.5, -0.5]), MU, S), ValueError, 'weights'),
    ('a weight too few', lambda: bounds.entropy_huber(W[:1], MU, S), ValueError, 'weights'),
    ('means of another width', lambda: bounds.entropy_huber(W, MU[:, :2], S), ValueError, 'means|covariances'),
    ('a covariance of NaN', lambda: bounds.entropy_huber(W, MU, S*NAN), ValueError, 'NaN'),
    ('a covariance of 0', lambda: bounds.entropy_huber(W, MU, S*0), ValueError, 'positive|add noise'),
    ('whole numbers for means', lambda: bounds.entropy_huber(W, MU.long(), S), TypeError, 'floating'),
    ('a kind that does not exist', lambda: bounds.entropy_pairwise(W, MU, S, kind='uper'), ValueError, 'choose'),
    ('no samples', lambda: bounds.entropy_mc(W, MU, S, n_samples=0), ValueError, 'n_samples'),
    ('quadrature in three dimensions', lambda: bounds.entropy_quadrature(W, MU, S), ValueError, 'dimension|one'),
    ('no noise', lambda: bounds.mutual_information_bound(W, MU, S, 0.0), ValueError, 'noise_std'),
    ('noise of NaN', lambda: bounds.mutual_information_bound(W, MU, S, NAN), ValueError, 'noise_std'),
    ('a bound that does not exist', lambda: bounds.mutual_information_bound(W, MU, S, 0.1, bound='hubber'), ValueError, 'choose'),
    ('features of NaN', lambda: mixture.GaussianMixture(2).fit(BAD), ValueError, 'NaN'),
    ('fewer features than components', lambda: mixture.GaussianMixture(9).fit(Z[:4]), ValueError, '9|component'),
    ('no components', lambda: mixture.GaussianMixture(0), ValueError, 'n_components'),
    ('a covariance type that does not exist', lambda: mixture.GaussianMixture(2, covariance_type='tied').fit(Z), ValueError, 'choose'),
    ('labels for features', lambda: mixture.GaussianMixture(2).fit(Y), TypeError, 'floating'),
    ('one axis', lambda: mixture.GaussianMixture(2).fit(Z[:, 0]), ValueError, 'shape'),
    ('clusters of NaN', lambda: kmeans.kmeans(BAD, 2), ValueError, 'NaN'),
    ('more clusters than points', lambda: kmeans.kmeans(Z[:3], 4), ValueError, '4|cluster|component'),
    ('centres of another width', lambda: kmeans.assign(Z, torch.rand(2, 5)), ValueError, 'wide|width|shape'),
    ('a determinant of no positive noise', lambda: logdet.logdet_gram(Z, 0.0), ValueError, 's2|> 0|positive'),
    # Theorem 1 and worlds
    ('an entropy of NaN', lambda: theorem1.theorem1_bound(NAN, 3), ValueError, 'NaN|finite'),
    ('an entropy of infinity', lambda: theorem1.theorem1_bound(INF, 3), ValueError, 'give nats'),
    ('no dimensions', lambda: theorem1.theorem1_bound(0.0, 0), ValueError, 'd|dimension'),
    ('a covariance that is none', lambda: theorem1.gaussian_entropy(-np.eye(2)), ValueError, 'positive'),
    ('a covariance that is not square', lambda: theorem1.gaussian_entropy(np.ones((2, 3))), ValueError, 'square|shape|axes'),
    ('shares that do not sum to 1', lambda: worlds.check_mixture(np.ones(2), np.zeros((2, 1)), np.ones((2, 1, 1))), ValueError, 'sum'),
    # Fisher information
    ('Fisher without noise', lambda: fisher.fisher_diag(lambda x: x, X, 0.0), ValueError, 'noise_std'),
    ('Fisher of images of NaN', lambda: fisher.fisher_diag(lambda x: x, X*NAN, 0.1), ValueError, 'NaN'),
    ('Fisher of bytes', lambda: fisher.fisher_diag(lambda x: x, BYTES, 0.1), TypeError, 'floating'),
    ('no probes', lambda: fisher.fisher_trace_mc(lambda x: x, X, 0.1, 0), ValueError, 'n_probes'),
    ('a prior of one image', lambda: fisher.fit_prior(X[:1], 0.0), ValueError, 'image|floor'),
    ('an exponential through one point', lambda: cem_nb.floors.fit_exponential([1.0], [1.0]), ValueError, 'two'),
    ('an exponential through an error of 0', lambda: cem_nb.floors.fit_exponential([1.0, 2.0], [0.0, 1.0]), ValueError, 'above 0'),
    # the oracle
    ('oracle of noise of NaN', lambda: posterior.oracle_mse(Z, Z, NAN), ValueError, 'noise_std'),
    ('features and images of other numbers', lambda: posterior.oracle_mse(Z, Z[:5], 0.1), ValueError, '60|5'),
    ('oracle of NaN', lambda: posterior.oracle_mse(BAD, Z, 0.1), ValueError, 'NaN'),
    ('drop of 1', lambda: posterior.oracle_mse(Z, Z, 0.1, drop=1.0), ValueError, 'drop'),
    ('no block', lambda: posterior.oracle_attack(Z, Z, Z, 0.1, block=0), ValueError, 'block'),
    ('no images of an oracle', lambda: Oracle(n_images=0), ValueError, 'n_images'),
    # the regulariser
    ('CEM without noise', lambda: regulariser(noise_std=0.0), ValueError, 'noise_std'),
    ('CEM with noise of NaN', lambda: regulariser(noise_std=NAN), ValueError, 'noise_std'),
    ('a negative lam', lambda: regulariser(lam=-1.0), ValueError, 'lam'),
    ('no classes', lambda: regulariser(n_classes=0), ValueError, 'n_classes'),
    ('half an epoch', lambda: regulariser(n_epochs=0.5), ValueError, 'n_epochs'),
    ('a batch before the fit', lambda: regulariser()(Z, Y), RuntimeError, 'fit'),
    ('a fit of NaN', lambda: regulariser().fit(BAD, Y), ValueError, 'NaN'),
    ('a batch of NaN', lambda: fitted()(BAD, Y), ValueError, 'NaN'),
    ('a batch of infinity', lambda: fitted()(Z*INF, Y), ValueError, 'NaN|inf'),
    ('an empty batch', lambda: fitted()(Z[:0], Y[:0]), ValueError, 'batch'),
    ('a batch larger than the fit', lambda: fitted()(torch.rand(61, 8), None), ValueError, '61'),
    ('a batch of another width', lambda: fitted()(torch.rand(6, 9), Y[:6]), ValueError, '9 wide'),
    ('a batch of bytes', lambda: fitted()((255*Z).byte(), Y), TypeError, 'floating'),
    ('too few features for the components', lambda: regulariser().fit(Z[:4], Y[:4]), ValueError, 'component|4'),
    ('labels beyond the classes', lambda: regulariser('release').fit(Z, Y + 1), ValueError, 'label'),
    ('negative labels', lambda: regulariser('release').fit(Z, Y - 1), ValueError, 'label'),
    ('labels of another number', lambda: regulariser('release').fit(Z, Y[:5]), ValueError, 'label'),
    ('labels that are none', lambda: regulariser('release').fit(Z, None), ValueError, 'label'),
    ('an empty loader', lambda: regulariser().fit_encoder(lambda x: x, []), ValueError, 'loader'),
    ('a loader of triples', lambda: regulariser().fit_encoder(lambda x: x, [(Z, Y, Y)]), ValueError, 'loader'),
    ('a foreign state', lambda: fitted().set_extra_state(dict(variant='x')), ValueError, 'variant'),
    ('a state that is none', lambda: fitted().set_extra_state([1]), ValueError, 'saved CEM'),
    # defences
    ('a defence that does not exist', lambda: make_defense('NoPeek'), ValueError, 'choose'),
    ('a setting that does not exist', lambda: make_defense('DistCorr', dict(alhpa=1.0)), ValueError, 'alhpa'),
    ('a setting out of range', lambda: make_defense('DistCorr', dict(alpha=-1.0)), ValueError, 'alpha'),
    ('a setting of NaN', lambda: make_defense('DistCorr', dict(alpha=NAN)), ValueError, 'alpha'),
    ('distance correlation of one row', lambda: distcorr.distance_correlation(Z[:1], Z[:1]), ValueError, 'at least 2'),
    ('distance correlation of other numbers', lambda: distcorr.distance_correlation(Z, Z[:5]), ValueError, 'same number'),
    ('distance correlation of bytes', lambda: distcorr.distance_correlation(BYTES, Z[:2]), TypeError, 'floating'),
    # networks
    ('a network that does not exist', lambda: model(arch='vgg12'), ValueError, 'choose'),
    ('a cut beyond the network', lambda: model(cut=99), ValueError, 'cut'),
    ('a cut before it', lambda: model(cut=0), ValueError, 'cut'),
    ('no width', lambda: model(width=0.0), ValueError, 'width'),
    ('negative noise', lambda: model(noise_std=-0.1), ValueError, 'noise_std'),
    ('no class', lambda: model(n_classes=0), ValueError, 'n_classes'),
    # images and data
    ('SSIM of other shapes', lambda: ssim.ssim(X, X[..., :8]), ValueError, 'shapes'),
    ('SSIM of tiny images', lambda: ssim.ssim(X[..., :4, :4], X[..., :4, :4]), ValueError, '6x6'),
    ('SSIM of bytes', lambda: ssim.ssim(BYTES, BYTES), TypeError, 'floating'),
    ('numbers for bytes', lambda: to_float(X), TypeError, 'bytes'),
    ('batches of -1', lambda: next(batches(load_data().test, -1)), ValueError, 'batch_size'),
    ('a data set that does not exist', lambda: load_data('cifar11'), DataError, 'choose'),
    ('an empty name', lambda: load_data(''), DataError, 'choose'),
    ('a folder that does not exist', lambda: load_data('folder:/nowhere'), DataError, 'does not exist'),
    ('a folder without parts', lambda: load_data('folder:/proc'), DataError, 'train/'),
    ('more images than there are classes for', lambda: load_data(n_train=5), DataError, 'n_train'),
    ('no training images', lambda: load_data(n_train=0), DataError, 'n_train'),
    ('half of the images and more for validation', lambda: load_data(val_frac=0.6), DataError, 'val_frac'),
    ('a negative share', lambda: load_data(val_frac=-0.1), DataError, 'val_frac'),
    ('an odd image size', lambda: load_data(image_size=18), DataError, 'multiple of 4'),
    ('a split of nothing', lambda: split_train(load_data().test, 3, 0.0), DataError, 'stratified'),
    ('a picture of nothing', lambda: images.decode_picture(b'', 1, 16), DataError, 'picture'),
    ('a picture that is text', lambda: images.decode_picture(b'hello', 3, 16), DataError, 'neither JPEG nor PNG'),
    ('a picture of two channels', lambda: images.decode_picture(b'', 2, 16), ValueError, 'channels'),
    # attacks
    ('an attack that does not exist', lambda: attack_from(dict(name='decodr')), ValueError, 'choose'),
    ('an attack without a name', lambda: attack_from({}), ValueError, 'choose'),
    ('a setting that an attack does not have', lambda: attack_from(dict(name='decoder', widht=3)), ValueError, 'widht'),
    ('restarts of what is not trained', lambda: Oracle(restarts=2), ValueError, 'restarts'),
    ('a name that no column can have', lambda: register_attack('My attack', label='', marker=''), ValueError, 'small letters'),
    ('no images to attack', lambda: score_attack(model(), attacker(), Split(BYTES[:0], Y[:0])), ValueError, 'no images'),
    ('an attack on numbers', lambda: score_attack(model(), attacker(), Split(X, Y[:2])), TypeError, 'bytes'),
    ('an attack in batches of 0', lambda: score_attack(model(), attacker(), Split(BYTES, Y[:2]), batch_size=0), ValueError, 'batch_size'),
    ('an attack on NaN', lambda: reconstruct(model(), attacker(), X*NAN), ValueError, 'NaN'),
    ('an accuracy in batches of -1', lambda: accuracy(model(), Split(BYTES, Y[:2]), batch_size=-1), ValueError, 'batch_size'),
    ('an accuracy of nothing', lambda: accuracy(model(), Split(BYTES[:0], Y[:0])), ValueError, 'no images'),
    # experiments and sweeps
    ('a preset that does not exist', lambda: preset('tiny'), ValueError, 'choose'),
    ('a setting that no experiment has', lambda: E.replace(nosie_std=0.1), ValueError, 'nosie_std'),
    ('a learning rate of 0', lambda: E.replace(lr=0.0), ValueError, 'lr'),
    ('a learning rate in words', lambda: E.replace(lr='fast'), ValueError, 'lr'),
    ('CEM in one epoch', lambda: E.replace(epochs=1, cem=True), ValueError, '2 epochs'),
    ('CEM and no noise', lambda: E.replace(cem=True, noise_std=0.0), ValueError, 'noise'),
    ('CEM where there is no such row', lambda: E.replace(defense='No_defense', cem=True), ValueError, 'no row with CEM'),
    ('an attack twice', lambda: E.replace(attacks=(DecoderAttack(), DecoderAttack())), ValueError, 'once'),
    ('an axis that is in the rows', lambda: experiments(E, [dict(lam=1.0)], lam=[2.0]), ValueError, 'axis'),
    ('no jobs', lambda: sweep(E, n_jobs=0), ValueError, 'n_jobs'),
    ('half a job', lambda: sweep(E, n_jobs=1.5), ValueError, 'n_jobs'),
    ('a backend that does not exist', lambda: sweep(E, backend='rya'), ValueError, 'choose'),
    ('a device that does not exist', lambda: sweep(E, device='tpu'), RunError, 'choose'),
    ('a choice without validation images', lambda: sweep(E.replace(val_frac=0.0), test=False), ValueError, 'val_frac'),
    ('a cut that does not fit', lambda: run(E.replace(cut=99)), ValueError, 'cut'),
    ('a run that is not there', lambda: open_run('Bottleneck-s0-0'), RunError, 'compute it first'),
    ('a run outside the store', lambda: open_run('../runs'), RunError, 'no run'),
    ('a device of another kind', lambda: pick_device('mps'), RunError, 'choose'),
    # parameters of notebooks
    ('a misspelt parameter', lambda: asked('lamb = 3'), ParameterError, "did you mean 'lam'"),
    ('a lam of NaN', lambda: asked('lam = float("nan")'), ParameterError, 'lam'),
    ('a negative parameter', lambda: asked('lam = -1'), ParameterError, 'lam'),
    ('seeds in words', lambda: asked("seeds = 'a,b'"), ParameterError, 'seeds'),
    ('no seeds', lambda: asked("seeds = ''"), ParameterError, 'seeds'),
    ('no methods', lambda: asked("methods = ''"), ParameterError, 'methods'),
    ('methods that do not exist', lambda: asked("methods = 'Dropuot'"), ParameterError, 'methods'),
    ('no jobs for a notebook', lambda: asked('n_jobs = 0'), ParameterError, 'n_jobs'),
    ('a backend in words', lambda: asked("backend = 'cluster'"), ParameterError, 'backend'),
    ('CEM without noise in a notebook', lambda: asked('noise_std = 0.0'), ParameterError, 'noise'),
    ('a panel that does not exist', lambda: Figure4Parameters(panels='e'), ValueError, 'panels'),
    ('noise of 0 on an axis', lambda: Figure4Parameters(noise_stds='0'), ValueError, 'noise_stds'),
    # statistics
    ('an interval of nothing', lambda: mean_interval([]), ValueError, 'at least one'),
    ('an advantage of nothing', lambda: advantage(np.empty((0, 2)), np.ones((2, 2))), ValueError, 'empty|at least'),
    ('noise below 0', lambda: noise_rows(['Bottleneck'], [-0.1]), ValueError, 'noise'),
    ('pictures of no errors', lambda: picked([]), ValueError, 'axes'),
    ('time without repeats', lambda: cost.time_inference(torch.nn.Identity(), X, repeats=0), ValueError, 'repeats'),
    ('a size in words', lambda: core.whole(size='3'), ValueError, 'size'),
    ('a truth value for a number', lambda: core.whole(size=True), ValueError, 'size'),
]


def test_there_are_many(): assert len(CASES) >= 80 and len({name for name, *_ in CASES}) == len(CASES)


@pytest.mark.parametrize('call, error, words', [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_bad_input_is_refused_in_words(call, error, words):
    with pytest.raises(error, match=words): call()
