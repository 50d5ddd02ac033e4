"""A covariance that outliers cannot inflate, and scores by quantum entropy.

Hayase, Kong, Somani, Oh, "SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics",
ICML 2021 (arXiv 2104.11315); the filter is that of Diakonikolas, Kamath, Kane, Li, Moitra, Stewart,
"Being Robust (in High Dimensions) Can Be Practical", ICML 2017 (arXiv 1703.00893).
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh, expm

ALPHA = 4.0  # weight of the directions of large variance
ROUNDS = 5  # of the filter
POWER_STEPS = 10  # to find the direction of the largest fourth moment
SLACK = 10.0  # weight of epsilon in the limit of that moment
REMOVED = 2.0  # most images that the filter leaves out, in shares epsilon
FLAGGED = 1.5  # images that the rule flags, in shares epsilon
FLOOR = 1e-9  # of a variance, relative to the largest one
MOST_COMPONENTS = 64
SIZES = 8  # numbers of components that are tried


class Entropy(NamedTuple):
    """What the best number of components says about the images of one label."""

    scores: np.ndarray  # float64 n: x' Q x / tr Q of the whitened features x
    components: int
    value: float  # tr(S Q) / tr Q of all images, whitened by those that are left


def entropy_scores(features, epsilon):
    """The `Entropy` of the features n,d of one label, of which a share `epsilon` is expected bad.

    Several numbers of components are tried. Each leaves out the FLAGGED x epsilon images of the
    highest scores. The one whose images stand out most from the rest is taken.
    """
    components = principal(features)
    best = None
    for count in sizes(components.shape[1]):
        scores = quantum(whitened(components[:, :count], epsilon))[0]
        kept = np.ones(len(scores), bool)
        kept[np.argsort(-scores, kind="stable")[: int(FLAGGED * epsilon * len(scores) + 1e-9)]] = 0
        _, value = quantum(white_by(components, components[kept]))
        if best is None or value > best.value:
            best = Entropy(scores, count, value)
    return best


def principal(features):
    """n,D -> n,d: the first principal components, centred; d is at most MOST_COMPONENTS, at most
    a quarter of n, and no more than there are directions in which the features vary."""
    centred = features - features.mean(0)
    values, vectors = eigh(centred.T @ centred)
    count = int((values > FLOOR * values[-1]).sum())
    count = max(min(count, MOST_COMPONENTS, len(features) // 4), 1)
    return centred @ vectors[:, ::-1][:, :count]


def sizes(most):
    """Up to SIZES different numbers of components from 1 to `most`, evenly spaced roots."""
    return np.unique(np.square(np.linspace(1, np.sqrt(most), SIZES)).round().astype(int)).tolist()


def whitened(features, epsilon):
    """The features n,k, centred, times the root of the inverse of their robust covariance."""
    kept = undisturbed(features, epsilon) if features.shape[1] > 1 else slice(None)
    return white_by(features, features[kept])


def white_by(features, some):
    """The features n,k in coordinates in which `some` of them have mean 0 and covariance 1."""
    centre = some.mean(0)
    values, vectors = eigh((some - centre).T @ (some - centre) / len(some))
    values = values.clip(min=FLOOR * values[-1])
    return (features - centre) @ vectors / np.sqrt(values)


def undisturbed(features, epsilon):
    """Which of the features n,k the filter keeps, bool n: all but REMOVED x epsilon at most.

    In whitened coordinates y the covariance of y y' over the symmetric matrices is 2 for normal
    features. While it is above 1 + SLACK epsilon log(1 / epsilon)^2 in one direction V, the images
    whose y' V y is farthest from the median are left out, a part in each round.
    """
    kept = np.ones(len(features), bool)
    each = int(REMOVED * epsilon * len(features) / ROUNDS)
    if not each:
        return kept
    limit = 1 + SLACK * epsilon * np.log(1 / epsilon) ** 2
    for _ in range(ROUNDS):
        white = white_by(features[kept], features[kept])
        direction, moment = fourth_moment(white)
        if moment <= limit:
            break
        values = ((white @ direction) * white).sum(1)
        far = np.abs(values - np.median(values))
        kept[np.flatnonzero(kept)[np.argsort(-far, kind="stable")[:each]]] = False
    return kept


def fourth_moment(white):
    """(V k,k symmetric of norm 1, variance of y' V y): where it is largest, by power iteration.

    `white` n,k has the whitened features y. The first V is the one that a step makes of the
    identity.
    """
    direction = np.eye(white.shape[1])
    moment = 0.0
    for _ in range(POWER_STEPS):
        values = ((white @ direction) * white).sum(1)
        image = (white * values[:, None]).T @ white / len(white)
        image -= np.trace(direction) * np.eye(len(direction))
        moment = np.linalg.norm(image)
        if moment == 0:
            return direction, 0.0
        direction = image / moment
    return direction, moment


def quantum(white):
    """(x' Q x / tr Q of every row x of `white` n,k, tr(S Q) / tr Q), with their covariance S.

    Q is the matrix exponential of ALPHA (S - 1) / (the largest eigenvalue of S - 1).
    """
    centred = white - white.mean(0)
    covariance = centred.T @ centred / len(white)
    excess = np.linalg.norm(covariance, 2) - 1
    weights = np.eye(len(covariance))
    if excess > FLOOR:
        weights = expm(ALPHA * (covariance - weights) / excess)
    weights /= np.trace(weights)
    return ((white @ weights) * white).sum(1), float((covariance * weights).sum())
