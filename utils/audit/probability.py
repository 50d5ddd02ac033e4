"""How likely a backdoor is, learned from the scores of benign and of backdoored models.

It holds for attacks like the known ones. The p-value, and with it the verdict, needs no backdoored
model and does not use it. Imports no torch.
"""

from statistics import median
from typing import NamedTuple

import numpy as np

LEAST = 20  # backdoored models from which on something can be learned
LOW, HIGH = -3, 12  # standardised scores are cut there, so that no single one decides everything
NORMAL = 1.4826  # times the median absolute deviation is the standard deviation of normal numbers
STRENGTH = 1.0  # of the penalty on the weights, half of their squared norm


class Learned(NamedTuple):
    """What a model's scores are worth."""

    value: float  # the probability of a backdoor, from even odds
    models: int  # backdoored ones that it was learned from
    attacks: int  # of which they are, as far as that is known


def learned(scores, calibration):
    """The `Learned` probability of a model with these scores, {detector: score or None}.

    None where the calibration has fewer than LEAST backdoored models.
    """
    backdoored = list(calibration.backdoored.values())
    if len(backdoored) < LEAST:
        return None
    names = list(scores)
    benign = calibration.scores_of(names)
    rows = [*benign, *(each["scores"] for each in backdoored)]
    truth = np.repeat([0, 1], [len(benign), len(backdoored)])
    standard = [standardised(name, benign) for name in names]

    def inputs(models):
        return np.array(
            [
                [of(model[name]) for of, name in zip(standard, names, strict=True)]
                for model in models
            ]
        )

    found = regression(inputs(rows), truth).predict_proba(inputs([scores]))[0, 1]
    attacks = {each["attack"] for each in backdoored} - {""}
    return Learned(float(found), len(backdoored), len(attacks))


def standardised(name, benign):
    """The function of a detector's score, or None, to a number in [LOW, HIGH].

    It is the distance from the median of the benign models in their standard deviations, as
    the median absolute deviation has them, and 0 for an abstention.
    """
    known = [scores[name] for scores in benign if scores[name] is not None]
    middle = median(known) if known else 0.0
    spread = NORMAL * median([abs(score - middle) for score in known]) if known else 0.0
    spread = spread or float(np.std(known or [0.0])) or 1.0

    def of(score):
        return 0.0 if score is None else min(max((score - middle) / spread, LOW), HIGH)

    return of


def regression(inputs, truth):
    """Logistic regression on inputs N,D with truth 0 or 1, both of which count as half of all."""
    from sklearn.linear_model import LogisticRegression  # heavy

    fit = LogisticRegression(C=1 / STRENGTH, class_weight="balanced", tol=1e-8, max_iter=1000)
    return fit.fit(inputs, truth)
