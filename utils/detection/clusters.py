"""The images of every label, cut into two clusters by their features.

Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", SafeAI
at AAAI 2019 (arXiv 1811.03728).
"""

import warnings
from typing import NamedTuple

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score
from tqdm import tqdm

from antidote_bench.utils import seeds

RESTARTS = 10  # of k-means
MIN_IMAGES = 4  # of a label: fewer are not clustered


class Clusters(NamedTuple):
    """The two clusters of every label; nan where there was nothing to cluster."""

    smaller: np.ndarray  # bool N: whether an image is in the smaller cluster of its label
    share: np.ndarray  # of each label, float64: the share of the smaller cluster
    silhouette: np.ndarray  # of each label, float64: the mean silhouette
    # float64 N, from -1 to 1: (distance to the centre of the larger cluster - distance to that of
    # the smaller one) over their sum; 0 where there was nothing to cluster
    margin: np.ndarray


def clusters(features, labels, classes, config):
    """The `Clusters` of features (float64 N,D) with their labels (N).

    A label with fewer than MIN_IMAGES images, or with the same image many times, is not clustered.
    `config` has the options reduction, components and random_seed.
    """
    found = Clusters(
        np.zeros(len(labels), bool),
        np.full(classes, np.nan),
        np.full(classes, np.nan),
        np.zeros(len(labels)),
    )
    for label in tqdm(range(classes), desc="clustering", unit=" labels", disable=None):
        index = np.flatnonzero(labels == label)
        if len(index) < MIN_IMAGES or not np.ptp(features[index], axis=0).any():
            continue
        seed = seeds.number("ac", config.random_seed, label) % 2**32
        reduced = reduce(features[index], config, seed)
        means = KMeans(2, n_init=RESTARTS, random_state=seed).fit(reduced)
        second = means.labels_ == 1
        small = int(second.mean() <= 0.5)
        found.smaller[index] = means.labels_ == small
        found.share[label] = found.smaller[index].mean()
        found.silhouette[label] = silhouette_score(reduced, second)
        distances = means.transform(reduced)
        to_small, to_large = distances[:, small], distances[:, 1 - small]
        found.margin[index] = (to_large - to_small) / (to_large + to_small)
    return found


def reduce(features, config, seed):
    """n,D -> n,k: the independent components, each of variance 1, or the principal ones."""
    centred = features - features.mean(0)
    count = min(config.components, np.linalg.matrix_rank(centred))
    principal = PCA(count, random_state=seed).fit_transform(centred)
    if config.reduction == "pca":
        return principal
    with warnings.catch_warnings():
        # components that have not converged still tell clusters apart
        warnings.simplefilter("ignore", ConvergenceWarning)
        return FastICA(count, whiten="unit-variance", random_state=seed).fit_transform(principal)
