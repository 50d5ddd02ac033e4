"""Activation Clustering: the network's features of every class are cut into two clusters; where one is small, it is taken for poison and left out.

Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy, Srivastava, "Detecting Backdoor Attacks on Deep Neural Networks
by Activation Clustering", SafeAI at AAAI 2019 (arXiv 1811.03728). The defender sees the poisoned training set and the
attacked model. Of all pictures with one given label the features are centred, reduced to ten independent components
and cut by 2-means; a smaller cluster of less than 35 % is removed, and the network is trained anew.

    python defense/ac.py --result_file badnet_cifar10
    python defense/ac.py --result_file badnet_cifar10 --reduction pca --criterion silhouette

The features are the input of the last linear layer, in evaluation mode and without augmentation. All pictures of a label are clustered at
once and removed by their position in the set; a known port clusters batch by batch and removes the positions of another shuffle. That port
also removes the smaller cluster of every label; here a label whose clusters fail the criterion loses nothing. Relabelling and
the comparison of models without a cluster, the paper's other ways to decide, are left out. It holds no clean picture: the
found set is clustered and trained on whole. The network is the victim's, with new random weights, and so is its training, unless options say otherwise.

The smaller cluster is taken for poison, which fails where poison is half of a label. On the digits (BadNets, resnet9, seed 0) at 10 % the ASR stays at 99.8 %
and the ACC falls from 100 to 94.8 %; at 3 % (width 8) 20 of 39 poisoned pictures go, with --reduction pca 38, and the ASR falls from 95.6 to 0.7 and 0 %.
Classes of so few pictures have small clusters anyway: of a clean set 218 of 1,297 pictures are removed, and the ACC falls from 99.8 to 97.2 %.
"""

from dataclasses import dataclass
from typing import Literal

from utils.config import Retraining, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Retraining):
    reduction: Literal["ica", "pca"] = "ica"
    """independent or principal components"""
    components: int = 10
    """dimensions that are left; never more than features, or pictures of the label"""
    criterion: Literal["size", "silhouette"] = "size"
    """when the smaller cluster is poison: below a share of its label, or where both clusters lie well apart"""
    size: float = 0.35
    """for size: share of the label below which a cluster is poison, 0..0.5"""
    silhouette: float = 0.15
    """for silhouette: mean silhouette from which on the smaller cluster is poison, -1..1"""

    def __post_init__(self):
        super().__post_init__()
        require(self.components >= 1, "components", "1 or more")
        require(0 <= self.size <= 0.5, "size", "a share from 0 to 0.5")
        require(-1 <= self.silhouette <= 1, "silhouette", "-1 to 1")

    def work(self, clean, found):
        return f"the victim's network anew, {self.epochs} epochs on {found} pictures less the small clusters"


if __name__ == "__main__":
    launch(Config)

import sys
import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score
from tqdm import tqdm

from utils import run, seeds
from utils.channels import last_features
from utils.train import retrain

RESTARTS = 10  # of k-means
LEAST = 4  # pictures of a label below which there is nothing to cluster


def repair(model, record, config):
    features, labels = last_features(model, record.train, config.precision).double().cpu().numpy(), record.train.labels.cpu().numpy()
    smaller, share, silhouette = clusters(features, labels, record.spec.classes, config)
    poisoned = share < config.size if config.criterion == "size" else silhouette >= config.silhouette
    flagged = torch.from_numpy(smaller & poisoned[labels])
    print(f"small clusters in the labels {np.flatnonzero(poisoned).tolist()}", file=sys.stderr)
    kept = {"label": torch.from_numpy(labels), "smaller": torch.from_numpy(smaller), "removed": flagged.nonzero().flatten(),
            "share": torch.from_numpy(share), "silhouette": torch.from_numpy(silhouette)}  # fmt: skip
    record.keep("clusters.safetensors", kept)
    return retrain(record, flagged.to(record.train.labels.device), config)


def clusters(features, labels, classes, config):
    """(in the smaller cluster of its label: bool N, the smaller cluster's share of every label, the mean silhouette of every label).

    features float64 N,D. Share and silhouette are nan for a label with too few pictures, or with one picture many times.
    """
    smaller, share, silhouette = np.zeros(len(labels), bool), np.full(classes, np.nan), np.full(classes, np.nan)
    for label in tqdm(range(classes), desc="clustering", unit=" labels", disable=None):
        index = np.flatnonzero(labels == label)
        if len(index) < LEAST or not np.ptp(features[index], axis=0).any():
            continue
        seed = seeds.number("ac", config.random_seed, label) % 2**32
        reduced = reduce(features[index], config, seed)
        second = KMeans(2, n_init=RESTARTS, random_state=seed).fit(reduced).labels_ == 1
        smaller[index] = second if second.mean() <= 0.5 else ~second
        share[label] = smaller[index].mean()
        silhouette[label] = silhouette_score(reduced, second)
    return smaller, share, silhouette


def reduce(features, config, seed):
    """n,D -> n,k: the independent components, each of variance 1, or the principal ones."""
    centred = features - features.mean(0)
    count = min(config.components, np.linalg.matrix_rank(centred))
    principal = PCA(count, random_state=seed).fit_transform(centred)
    if config.reduction == "pca":
        return principal
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what is found after the last round still tells clusters apart
        return FastICA(count, whiten="unit-variance", random_state=seed).fit_transform(principal)


def main(config):
    run.defend(__name__, config, repair, stage="in-training")
