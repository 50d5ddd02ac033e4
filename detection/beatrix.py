"""Beatrix: a triggered image makes channels fire together that do not in clean ones.

Ma, Wang, Sun, Xue, Wen, Xiang, "The 'Beatrix' Resurrections: Robust Backdoor Detection via Gram
Matrices", NDSS 2023 (arXiv 2209.11715). Gram matrices of the maps that enter the last stage say
which channels are active together. The score is how far their entries lie beyond those of clean
images with the same prediction.

    python detection/beatrix.py --result_file badnet_cifar10

Deviates in the divisor of an excess, and in how the paper's own rule compares features; see
docs/detection/beatrix.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import DataOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions):
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every class the `discrepancy` of the features of outlying "
        "images, nan where there are too few, and its anomaly `index`"
    }

    orders: int = option(8, at_least=1)
    """Gram matrices of the powers 1 to this one"""
    per_class: int = option(30, at_least=2, unit="images")
    """clean images of a predicted class that set its bounds, at most"""


if __name__ == "__main__":
    launch(Config)

import numpy as np
import torch
from scipy.spatial.distance import pdist
from sklearn.metrics.pairwise import rbf_kernel

from antidote_bench.utils import run
from antidote_bench.utils.data import loader
from antidote_bench.utils.detection import gram
from antidote_bench.utils.detection.anomaly import LIMIT, anomaly_index
from antidote_bench.utils.detection.inspector import Scored
from antidote_bench.utils.detection.passes import penultimate

FOLDS = 5
PERCENTILE = 95  # of the deviations of clean images: more is outlying
MOST_COMPARED = 500  # images of each kind whose features are compared


def score(model, record, config):
    features, logits = penultimate(model, record, config)
    predicted, classes = logits.argmax(1), record.spec.classes
    chosen = choose(predicted[record.reference_index], config.per_class)
    known = record.reference_index[chosen]
    layer = gram.last_stage(model, loader.to_unit(record.reference.images[:1]))
    with gram.seen_by(layer) as seen:

        def maps_of(images, *_):
            model(images)
            return seen[0].float()

        clean = loader.forward_all(model, record.reference[chosen], maps_of, config.precision)
        bounds = gram.bounds_of_classes(clean, predicted[known], classes, config.orders)

        def judge(images, _, index):
            return gram.deviations(maps_of(images), predicted[index], bounds)

        scores = loader.forward_all(model, record.suspects, judge, config.precision)
    held_out = cross_validated(clean, predicted[known], classes, config.orders)
    outlying = (scores > np.percentile(held_out.cpu().numpy(), PERCENTILE)).cpu().numpy()
    discrepancy = discrepancies(
        features.double().cpu().numpy(), predicted.cpu().numpy(), outlying, classes
    )
    index = anomaly_index(discrepancy)
    flagged = outlying & (index > LIMIT)[predicted.cpu().numpy()]
    evidence = {"discrepancy": torch.from_numpy(discrepancy), "index": torch.from_numpy(index)}
    return Scored(scores, torch.from_numpy(flagged), evidence)


def choose(predicted, most):
    """Positions of the first `most` images of every predicted class, sorted."""
    chosen = [(predicted == label).nonzero().flatten()[:most] for label in predicted.unique()]
    return torch.cat(chosen).sort().values


def cross_validated(maps, predicted, classes, orders):
    """The deviations of clean images, float64 n, from bounds that a fifth of them, to which they
    belong, has no part in. The images of a class are dealt to the fifths in turn."""
    fold = torch.zeros_like(predicted)
    for label in predicted.unique():
        own = (predicted == label).nonzero().flatten()
        fold[own] = torch.arange(len(own), device=own.device) % FOLDS
    found = torch.zeros(len(maps), dtype=torch.float64, device=maps.device)
    for number in range(FOLDS):
        out = fold == number
        if out.any() and not out.all():
            bounds = gram.bounds_of_classes(maps[~out], predicted[~out], classes, orders)
            found[out] = gram.deviations(maps[out], predicted[out], bounds)
    return found


def discrepancies(features, predicted, outlying, classes):
    """Of every predicted class the squared maximum mean discrepancy between the features of
    outlying images and those of the others, float64 K; nan where either are fewer than two."""
    found = np.full(classes, np.nan)
    for label in range(classes):
        own = predicted == label
        parts = [features[own & chosen] for chosen in (outlying, ~outlying)]
        if min(map(len, parts)) >= 2:
            found[label] = discrepancy(*(evenly(part) for part in parts))
    return found


def evenly(rows):
    """MOST_COMPARED of the rows, evenly spaced, or all of them."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST_COMPARED)).astype(int)]


def discrepancy(some, others):
    """The unbiased squared maximum mean discrepancy of n,D and m,D.

    The kernel is exp(-|x - y|^2 / (2 s^2)), where s is the median distance of all rows. Gretton et
    al., "A Kernel Two-Sample Test", JMLR 2012.
    """
    width = np.median(pdist(np.concatenate([some, others]))) or 1.0
    within = 0.0
    for part in (some, others):
        kernel = rbf_kernel(part, gamma=1 / (2 * width**2))
        within += (kernel.sum() - np.trace(kernel)) / (len(part) * (len(part) - 1))
    return within - 2 * rbf_kernel(some, others, gamma=1 / (2 * width**2)).mean()


def main(config):
    run.detect(__name__, config, score)
