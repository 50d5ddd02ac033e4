"""Activation Clustering: within each class, poisoned images form a second cluster of features.

Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy, Srivastava, "Detecting Backdoor Attacks on
Deep Neural Networks by Activation Clustering", SafeAI at AAAI 2019 (arXiv 1811.03728). For every
label, the victim's features are reduced to ten independent components and cut by 2-means. The score
says how clearly an image is in the smaller cluster, and how well the two clusters lie apart.

    python detection/ac.py --result_file badnet_cifar10

Deviates in that the paper decides for whole clusters and has no score; see docs/detection/ac.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import DataOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions):
    uses_reference: ClassVar[bool] = False
    order_matters: ClassVar[bool] = True  # k-means starts from images that their order picks
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every label the smaller cluster's `share` and the mean "
        "`silhouette`, nan where there was nothing to cluster"
    }

    reduction: Literal["ica", "pca"] = "ica"
    """independent or principal components"""
    components: int = option(10, at_least=1)
    """dimensions that are left; never more than features, or images of the label"""
    size: float = option(0.35, at_least=0, at_most=0.5)
    """share of a label below which the paper's own rule flags the smaller cluster"""


if __name__ == "__main__":
    launch(Config)

import numpy as np
import torch

from antidote_bench.utils import run
from antidote_bench.utils.detection.clusters import clusters
from antidote_bench.utils.detection.inspector import Scored
from antidote_bench.utils.detection.passes import penultimate


def score(model, record, config):
    features, _ = penultimate(model, record, config)
    labels = record.suspects.labels.cpu().numpy()
    found = clusters(features.double().cpu().numpy(), labels, record.spec.classes, config)
    apart = np.nan_to_num(found.silhouette).clip(min=0)
    flagged = found.smaller & (found.share < config.size)[labels]
    evidence = {"share": found.share, "silhouette": found.silhouette}
    return Scored(
        torch.from_numpy(found.margin * apart[labels]),
        torch.from_numpy(flagged),
        {name: torch.from_numpy(value) for name, value in evidence.items()},
    )


def main(config):
    run.detect(__name__, config, score)
