"""How well scores tell positives from negatives, and the threshold that clean scores set.

A score is higher the more suspicious its image is. scikit-learn and
scipy are loaded when they are needed.
"""

import math

import numpy as np

from antidote_bench.utils.errors import ConfigError

RATES = {"tpr_at_1": 0.01, "tpr_at_5": 0.05, "tpr_at_10": 0.10}


def least_calibration(rate):
    """The number of clean scores from which on `threshold` is finite at this rate."""
    return math.ceil(1 / rate - 1 - 1e-9)


def threshold(clean, rate):
    """The score above which an image is flagged, from the scores `clean` of n clean images.

    It is the ceil((1 - rate)(n + 1))-th smallest of them: a further clean image, drawn like these,
    is above it with a probability of at most `rate` (split conformal prediction). Raises
    ConfigError (exit 2) where n is too small for that.
    """
    place = math.ceil((1 - rate) * (len(clean) + 1) - 1e-9)
    if place > len(clean):
        raise ConfigError(
            f"{len(clean)} clean images are too few to set a threshold at nominal_fpr {rate:g}: "
            f"it takes {least_calibration(rate)} that the method does not see; raise --clean_count"
        )
    return float(np.sort(clean)[place - 1])


def ranking(scores, positive):
    """{auroc, tpr_at_1, tpr_at_5, tpr_at_10} of scores N; None without both kinds.

    `positive` is bool N. The TPR at an FPR is the largest one that a threshold reaches whose FPR is
    not above it.
    """
    if not positive.any() or positive.all():
        return dict.fromkeys(["auroc", *RATES])
    from sklearn.metrics import roc_auc_score, roc_curve

    fpr, tpr, _ = roc_curve(positive, scores, drop_intermediate=False)
    found = {name: float(tpr[fpr <= rate].max()) for name, rate in RATES.items()}
    return {"auroc": float(roc_auc_score(positive, scores)), **found}


def rates(flagged, positive):
    """{fpr, tpr, ppv, f1} of a decision, bool N, as papers define them; None where undefined.

    ppv is the positive predictive value, which papers call precision.
    """
    hits = int((flagged & positive).sum())
    alarms = int((flagged & ~positive).sum())
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    return {
        "fpr": alarms / n_negative if n_negative else None,
        "tpr": hits / n_positive if n_positive else None,
        "ppv": hits / (hits + alarms) if n_positive and hits + alarms else None,
        "f1": 2 * hits / (hits + alarms + n_positive) if n_positive else None,
    }


def rank(values, place):
    """The rank of the value at a place among K values, from 1 for the largest one.

    Equal values share the mean of their ranks.
    """
    from scipy.stats import rankdata

    return float(rankdata(-values)[place])
