"""The anomaly index of the classes of a model, as SCAn, Beatrix and AGPD use it."""

import math

import numpy as np
from scipy import stats

from antidote_bench.utils.detection.outliers import LEAST_CLASSES

LIMIT = math.e**2  # an index above it makes a class a target
GUARD = 1e-6  # added to the MAD, against a division by 0


def anomaly_index(values):
    """(value - median) / (1.4826 (MAD + GUARD)) of each of K values, float64 K.

    The MAD is the median absolute deviation. The index is one-sided where it is compared with
    LIMIT: only large values make a target. A value that is nan counts for nothing, and its index is
    0; so are all indices where fewer than LEAST_CLASSES values are left.
    """
    found = np.zeros(len(values))
    known = ~np.isnan(values)
    if known.sum() < LEAST_CLASSES:
        return found
    spread = stats.median_abs_deviation(values[known]) + GUARD
    found[known] = (values[known] - np.median(values[known])) / (1.4826 * spread)
    return found
