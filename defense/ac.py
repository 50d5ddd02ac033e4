"""Activation Clustering: cut the features of each class into two clusters, and remove a small one.

Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy, Srivastava, "Detecting Backdoor Attacks on
Deep Neural Networks by Activation Clustering", SafeAI at AAAI 2019 (arXiv 1811.03728). For every
label, the victim's features are reduced to ten independent components and cut by 2-means. A cluster
that holds less than 35 % of the label is taken for poison. The network is retrained without it.

    python defense/ac.py --result_file badnet_cifar10

Deviates in what it leaves out: the paper's other ways to decide; see docs/defenses/ac.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import RetrainingOptions


@dataclass(frozen=True, kw_only=True)
class Config(RetrainingOptions):
    stage: ClassVar[str] = "in-training"
    adds: ClassVar[dict[str, str]] = {
        "clusters.safetensors": "of every training image its `label` and whether it is in the "
        "`smaller` cluster, the positions `removed`, and of every label the smaller cluster's "
        "`share` and the mean `silhouette`, nan where there was nothing to cluster"
    }

    reduction: Literal["ica", "pca"] = "ica"
    """independent or principal components"""
    components: int = option(10, at_least=1)
    """dimensions that are left; never more than features, or images of the label"""
    criterion: Literal["size", "silhouette"] = "size"
    """when the smaller cluster is taken for poison; size: when its share of the label is small;
    silhouette: when the two clusters lie well apart"""
    size: float = option(0.35, at_least=0, at_most=0.5)
    """for --criterion size: share of the label below which the smaller cluster is poison"""
    silhouette: float = option(0.15, at_least=-1, at_most=1)
    """for --criterion silhouette: mean silhouette from which on the smaller cluster is poison"""


if __name__ == "__main__":
    launch(Config)

import sys

import numpy as np
import torch

from antidote_bench.utils import run
from antidote_bench.utils.detection.clusters import clusters
from antidote_bench.utils.features import last_features
from antidote_bench.utils.repair.layers import require_features
from antidote_bench.utils.train import retrain


def repair(model, record, config):
    features = last_features(model, record.train, config.precision).double().cpu().numpy()
    labels = record.train.labels.cpu().numpy()
    smaller, share, silhouette, _ = clusters(features, labels, record.spec.classes, config)
    if config.criterion == "size":
        poisoned = share < config.size
    else:
        poisoned = silhouette >= config.silhouette
    print(f"small clusters in the labels {np.flatnonzero(poisoned).tolist()}", file=sys.stderr)
    flagged = torch.from_numpy(smaller & poisoned[labels])
    evidence = {
        "label": torch.from_numpy(labels),
        "smaller": torch.from_numpy(smaller),
        "removed": flagged.nonzero().flatten(),
        "share": torch.from_numpy(share),
        "silhouette": torch.from_numpy(silhouette),
    }
    record.keep("clusters.safetensors", evidence)
    return retrain(record, flagged.to(record.train.labels.device), config)


def main(config):
    run.defend(__name__, config, repair, check=require_features)
