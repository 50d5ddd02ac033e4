"""Outliers of skewed values: the medcouple and the adjusted outlyingness.

Brys, Hubert, Struyf, "A Robust Measure of Skewness", Journal of Computational and Graphical
Statistics 2004; Hubert, Van der Veeken, "Outlier Detection for Skewed Data", Journal of
Chemometrics 2008.
"""

import numpy as np


def medcouple(values):
    """The skewness of n values, from -1 to 1, by all pairs of values about the median.

    A pair of a value above the median and one below it gives the difference of their distances to
    the median over the sum; the medcouple is the median of that. Time and memory grow with n^2.
    """
    values = np.sort(np.asarray(values, np.float64)) - np.median(values)
    low, high = values[values <= 0], values[values >= 0]
    total = high[:, None] - low[None]
    kernel = (high[:, None] + low[None]) / np.where(total > 0, total, 1)
    # of k values that equal the median, pair (i, j) counts by the sign of k - 1 - i - j
    equal = int((values == 0).sum())
    if equal:
        order = np.arange(equal)
        kernel[:equal, len(low) - equal :] = np.sign(order[:, None] - order[::-1][None])
    return float(np.median(kernel))


def adjusted_outlyingness(values):
    """How far each of n values is from the median, in units of the whisker on its side; float64 n.

    The whiskers of a box plot are made longer on the side to which the values are skewed. All
    values are 0 where the quartiles are equal.
    """
    values = np.asarray(values, np.float64)
    lower, median, upper = np.percentile(values, [25, 50, 75])
    skewness = medcouple(values)
    down, up = (-4, 3) if skewness > 0 else (-3, 4)
    below = median - (lower - 1.5 * np.exp(down * skewness) * (upper - lower))
    above = upper + 1.5 * np.exp(up * skewness) * (upper - lower) - median
    if upper == lower:
        return np.zeros(len(values))
    return np.where(values > median, (values - median) / above, (median - values) / below)
