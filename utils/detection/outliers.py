"""How far the value of one class stands out from those of the others."""

import numpy as np
import torch

LEAST_CLASSES = 5  # fewer values have no outlier
FARTHEST = 1e6  # an outlyingness is never farther from 0


def outlyingness(values):
    """(value - median of the others) / (1.4826 MAD of the others) of each of K values, float64 K.

    The MAD is the median absolute deviation, and 1.4826 makes it the standard deviation of normal
    values. Where the others are all equal, a value is 0 if it equals them too, and otherwise
    FARTHEST or minus that.
    """
    from scipy import stats  # slow to import, and every script comes by here

    values = values.detach().double().cpu().numpy()
    found = np.zeros_like(values)
    for place, value in enumerate(values):
        others = np.delete(values, place)
        distance = value - np.median(others)
        spread = stats.median_abs_deviation(others, scale="normal")
        if distance:
            found[place] = distance / spread if spread else np.copysign(FARTHEST, distance)
    return torch.from_numpy(found.clip(-FARTHEST, FARTHEST))
