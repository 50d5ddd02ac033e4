"""Directions of gradients within a class: two of them where some of its images are poisoned.

Yuan, Zhang, Wei, Liu, Wu, "Activation Gradient based Poisoned Sample Detection Against Backdoor
Attacks", ICLR 2025 (arXiv 2312.06230).
"""

from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import jensenshannon

BINS = 99  # of the histogram of ratios
WINDOW = 10  # steps over which the histograms must have settled
SPREAD = 5.0  # weight of the standard deviation in a window
FARTHEST = 1e-12  # of the sum of two distances: less is 0


def unit(rows):
    """Rows n,C of length 1; a row of zeros stays one."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


def gap(gradients, known):
    """(distance, i): how differently the gradients n,C of one label lie about two directions.

    `known` C is the direction of clean images, and i is the image whose gradient is least similar
    to it. The distance is the root of the mean squared difference between the cosines to `known`
    and to gradient i, over all images but i. It is 0 for fewer than two images.
    """
    rows, direction = unit(gradients), unit(known[None])[0]
    to_known = rows @ direction
    first = int(to_known.argmin())
    if len(rows) < 2:
        return 0.0, first
    others = np.arange(len(rows)) != first
    difference = (to_known - rows @ rows[first])[others]
    # the sum has one term less than images, and the paper divides by the images
    return float(np.sqrt(np.square(difference).sum() / len(rows))), first


def distances(rows, direction):
    """1 - the cosine of rows n,C of length 1 to a direction C: float64 n."""
    return 1 - rows @ unit(direction[None])[0]


def ratios(to_bad, to_known):
    """The distance to the bad direction over its sum with that to the known one, each n: float64 n
    in [0, 1]. Where both are 0, the ratio is 1/2."""
    total = to_bad + to_known
    ratio = to_bad / np.where(total > FARTHEST, total, 1)
    return np.where(total > FARTHEST, ratio, 0.5).clip(0, 1)


class Division(NamedTuple):
    """The images of one label that are taken for poisoned, and how near every image is to them."""

    bad: np.ndarray  # bool n
    ratio: np.ndarray  # float64 n, in [0, 1]: low where the gradient is like that of the bad ones


def grow(gradients, known, first, step):
    """The `Division` of the gradients n,C of one label.

    It begins with the image `first`. In each step the images whose ratio, scaled to [0, 1] over
    those that are left, is at most `step` join the bad ones, whose mean gradient then is the bad
    direction. When all have joined, the division is the one before the window of steps in which
    the histogram of the ratios that are left changes least.
    """
    rows = unit(gradients)
    to_known = distances(rows, known)
    joined = np.full(len(rows), len(rows))  # the step in which an image became bad
    joined[first] = 0
    left, total, changes = np.flatnonzero(joined), gradients[first].copy(), []
    before = None
    for number in range(1, len(rows)):
        if not len(left):
            break
        ratio = ratios(distances(rows, total), to_known)[left]
        if before is None:
            before = histogram(ratio)
        is_new = scale(ratio) <= step
        joined[left[is_new]] = number
        total += gradients[left[is_new]].sum(0)
        left, after = left[~is_new], histogram(ratio[~is_new])
        changes.append(jensenshannon(before, after) if len(left) else 1.0)
        before = after
    bad = joined < max(settled(changes), 1)
    return Division(bad, ratios(distances(rows, gradients[bad].sum(0)), to_known))


def histogram(ratio):
    """How many ratios lie in each of BINS equal parts of [0, 1]."""
    return np.histogram(ratio, BINS, (0, 1))[0]


def scale(values):
    """Values n scaled to [0, 1]; all 0 where they are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def settled(changes):
    """The number of steps before the calmest window of changes: the one of the least mean plus
    SPREAD standard deviations, and the first of equals.

    A window holds WINDOW changes, or half of them where they are fewer than twice as many.
    """
    size = min(WINDOW, -(-len(changes) // 2))
    if not size:
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(changes), size)
    return int((windows.mean(1) + SPREAD * windows.std(1)).argmin())
