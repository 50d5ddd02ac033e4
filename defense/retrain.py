"""Retraining: train a new network on the training set, without what a detector has flagged.

A baseline: it shows what a detector of poisoned training images is worth. With nothing flagged it
trains the victim again, with other random weights.

    python defense/retrain.py --result_file badnet_cifar10 --flagged spectral
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import RetrainingOptions


@dataclass(frozen=True, kw_only=True)
class Config(RetrainingOptions):
    stage: ClassVar[str] = "in-training"


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run
from antidote_bench.utils.train import retrain


def repair(model, record, config):
    # what was flagged is not in the training set any more
    flagged = torch.zeros_like(record.train.labels, dtype=torch.bool)
    return retrain(record, flagged, config)


def main(config):
    run.defend(__name__, config, repair)
