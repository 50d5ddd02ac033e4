"""Spectral Signatures: remove the images that stand out along their class's main direction.

Tran, Li, Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018 (arXiv 1811.00636). Poison
shifts the features of the class that it is labelled as, so that the first singular vector of the
centred features points to it. The score of an image is its squared length along that vector. The
1.5 epsilon of highest scores are removed from every label, and the network is retrained.

    python defense/spectral.py --result_file badnet_cifar10

Deviates from a known port, which does not centre the features; see docs/defenses/spectral.md.
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
        "signatures.safetensors": "of every training image its `label` and `score`, the positions "
        "`removed`, and of every label `top`, the largest singular value over the root of its "
        "number of images"
    }

    epsilon: float = option(0.1, at_least=0, at_most=0.66)
    """poisoned share of a label that the defender expects; 1.5 times as much is removed, which must
    be less than all"""
    classes: Literal["all", "outlying"] = "all"
    """labels to remove from: all, or those whose features vary much more along one direction than
    those of other labels do"""
    outlier: float = option(1.5, at_least=1)
    """for --classes outlying: how many times the median of all labels the largest singular value,
    over the root of the number of images, must be"""

    @property
    def prior(self):
        return f"rate={self.epsilon}"


if __name__ == "__main__":
    launch(Config)

import sys

import torch

from antidote_bench.utils import run
from antidote_bench.utils.detection.signatures import signatures
from antidote_bench.utils.features import last_features
from antidote_bench.utils.repair.isolation import highest
from antidote_bench.utils.repair.layers import require_features
from antidote_bench.utils.train import retrain


def repair(model, record, config):
    labels, classes = record.train.labels, record.spec.classes
    features = last_features(model, record.train, config.precision)
    scores, tops = signatures(features, labels, classes)
    if config.classes == "all":
        suspicious = torch.ones_like(tops, dtype=torch.bool)
    else:
        suspicious = tops > config.outlier * tops[tops > 0].median()
    print(f"removing from the labels {suspicious.nonzero().flatten().tolist()}", file=sys.stderr)
    flagged = highest(scores, labels, classes, 1.5 * config.epsilon) & suspicious[labels]
    evidence = {
        "score": scores,
        "label": labels,
        "removed": flagged.nonzero().flatten(),
        "top": tops,
    }
    record.keep("signatures.safetensors", evidence)
    return retrain(record, flagged, config)


def main(config):
    run.defend(__name__, config, repair, check=require_features)
