"""SCAn: the features of a class with poison have two means instead of one.

Tang, Wang, Tang, Zhang, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor
Contamination Detection", USENIX Security 2021 (arXiv 1908.00686). Clean images tell how features
vary within a class. By this measure the images of every label are divided into two groups, and a
likelihood ratio says how much better two means explain them than one.

    python detection/scan.py --result_file badnet_cifar10

Deviates in that the paper decides for whole groups and has no score; see docs/detection/scan.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import DataOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions):
    order_matters: ClassVar[bool] = True  # the search for groups starts from random images
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every label the `statistic`, nan where there was nothing to "
        "divide, its anomaly `index`, and the `share` of the suspected group"
    }

    components: int = option(64, at_least=1)
    """principal components of the features; fewer where few clean images are known"""


if __name__ == "__main__":
    launch(Config)

import numpy as np
import torch

from antidote_bench.utils import run, seeds
from antidote_bench.utils.detection import decomposition
from antidote_bench.utils.detection.anomaly import LIMIT, anomaly_index
from antidote_bench.utils.detection.inspector import Scored
from antidote_bench.utils.detection.passes import penultimate


def score(model, record, config):
    features, _ = penultimate(model, record, config)
    labels, classes = record.suspects.labels.cpu().numpy(), record.spec.classes
    known = np.zeros(len(labels), bool)
    known[record.reference_index.cpu().numpy()] = True
    space = decomposition.reduced(
        features.double().cpu().numpy(), known.sum(), classes, config.components
    )
    variation = decomposition.fit_model(space[known], labels[known])
    margin, suspected = np.zeros(len(labels)), np.zeros(len(labels), bool)
    statistic, share = np.full(classes, np.nan), np.full(classes, np.nan)
    for label in range(classes):
        index = np.flatnonzero(labels == label)
        seed = seeds.number("scan", config.random_seed, label) % 2**32
        groups = decomposition.divide(space[index], variation, seed)
        if groups is not None:
            bad = suspect(groups.second, known[index])
            statistic[label] = groups.statistic
            margin[index] = margins(groups.distances, bad)
            suspected[index] = groups.second == bad
            share[label] = suspected[index].mean()
    found = anomaly_index(statistic)
    flagged = suspected & (found > LIMIT)[labels]
    evidence = {"statistic": statistic, "index": found, "share": share}
    return Scored(
        torch.from_numpy(margin * found.clip(min=0)[labels]),
        torch.from_numpy(flagged),
        {name: torch.from_numpy(value) for name, value in evidence.items()},
    )


def suspect(second, known):
    """Which group of a label, 0 or 1, is suspected: the one with fewer clean images.

    `second` (bool n) says which images are in group 1, and `known` (bool n) which are clean. Where
    both have as many, the smaller group is suspected.
    """
    first_count, second_count = (~second & known).sum(), (second & known).sum()
    if first_count == second_count:
        return int(second.mean() <= 0.5)
    return int(second_count < first_count)


def margins(distances, bad):
    """From -1 to 1, float64 n: how much nearer an image is to the suspected group than to the
    other one; `distances` are n,2."""
    to_bad, to_good = distances[:, bad], distances[:, 1 - bad]
    return (to_good - to_bad) / (to_good + to_bad)


def main(config):
    run.detect(__name__, config, score)
