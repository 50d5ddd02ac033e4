"""Features as the mean of a class plus noise, and whether a class has two means.

Tang, Wang, Tang, Zhang, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor
Contamination Detection", USENIX Security 2021 (arXiv 1908.00686).
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import cholesky, solve, solve_triangular
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

MOST_STEPS = 100  # of the EM algorithm
SETTLED = 1e-5  # relative change of the covariances at which it ends
RIDGE = 1e-8  # of the mean variance, so that a covariance can be inverted
RESTARTS = 10  # of the search for two groups
LEAST_IMAGES = 4  # of a label: fewer are not divided


class Model(NamedTuple):
    """Features are mean + u + e, with u of covariance `between` and e of covariance `within`."""

    mean: np.ndarray  # float64 d
    between: np.ndarray  # float64 d,d
    within: np.ndarray  # float64 d,d


def reduced(features, known, classes, components):
    """N,D -> N,d: the first principal components of all features.

    d is at most `components`, and at most half of the degrees of freedom with which `known` clean
    images of so many classes determine the covariance within a class, so that it can be inverted.
    """
    count = min(components, *features.shape, max((known - classes) // 2, 1))
    return PCA(count, svd_solver="covariance_eigh").fit_transform(features)


def fit_model(features, labels):
    """The `Model` of clean features n,d with labels n, by the EM algorithm.

    The mean of a class is normal with covariance `between`, and a feature is normal about it with
    covariance `within`. A step never lowers the likelihood of this model.
    """
    mean = features.mean(0)
    groups = [features[labels == label] - mean for label in np.unique(labels)]
    counts = np.array([len(group) for group in groups])
    means = np.stack([group.mean(0) for group in groups])
    scatter = sum(
        (group - centre).T @ (group - centre) for group, centre in zip(groups, means, strict=True)
    )
    within, between = _ridged(scatter / counts.sum()), _ridged(means.T @ means / len(means))
    for _ in range(MOST_STEPS):
        before = between, within
        between, within = em_step(between, within, counts, means, scatter)
        change = max(
            np.abs(new - old).max() / np.abs(old).max()
            for new, old in zip((between, within), before, strict=True)
        )
        if change < SETTLED:
            break
    return Model(mean, between, within)


def em_step(between, within, counts, means, scatter):
    """(between, within) after one step.

    K classes have `counts` K images and `means` K,d; `scatter` d,d is the sum of the outer products
    of all images about the mean of their class.
    """
    new_between, new_within = np.zeros_like(between), scatter.copy()
    for count in np.unique(counts):
        own = means[counts == count]
        matrix = posterior(between, within, count)
        spread = len(own) * (between - matrix @ between)
        expected = own @ matrix.T
        rest = own - expected
        new_between += expected.T @ expected + spread
        new_within += count * (rest.T @ rest + spread)
    return _ridged(new_between / len(means)), _ridged(new_within / counts.sum())


def posterior(between, within, count):
    """The matrix d,d that makes the expected mean of a class from that of `count` of its images."""
    return solve(between + within / count, between, assume_a="pos").T


def _ridged(covariance):
    """A symmetric matrix that can be inverted."""
    size = len(covariance)
    return (covariance + covariance.T) / 2 + RIDGE * np.trace(covariance) / size * np.eye(size)


class Groups(NamedTuple):
    """The two groups of the images of one label."""

    second: np.ndarray  # bool n
    statistic: float  # twice the log-likelihood ratio of two means against one, over n
    distances: np.ndarray  # float64 n,2: of every image to the mean of each group


def divide(features, model, seed):
    """The `Groups` of the features n,d of one label; None where they are too few or all equal.

    An image belongs to the group whose mean is nearer in the metric of `model.within`, as in a
    linear discriminant analysis of two groups: that is 2-means in coordinates in which the noise is
    white. `seed` draws the starts.
    """
    root = cholesky(model.within, lower=True)
    white = solve_triangular(root, (features - model.mean).T, lower=True).T
    if len(white) < LEAST_IMAGES or not np.ptp(white, axis=0).any():
        return None
    found = KMeans(2, n_init=RESTARTS, init="random", random_state=seed).fit(white)
    distances = found.transform(white)
    prior = posterior(model.between, model.within, len(features))
    one = solve_triangular(root, prior @ (features - model.mean).mean(0), lower=True)
    to_one = np.square(white - one).sum(1)
    statistic = (to_one - np.square(distances.min(1))).mean()
    return Groups(found.labels_ == 1, statistic, distances)
