"""CBD: train a network on the images that an early-stopped network has not learned.

Zhang, Liu, Wang, Lu, Hu, "Backdoor Defense via Deconfounded Representation Learning", CVPR 2023
(arXiv 2303.06818). A first network is trained on the poisoned training set for a few epochs, in
which it learns the backdoor. A second one is trained on the same set. Images on which the first
network has a low loss have a low weight.

    python defense/cbd.py --result_file badnet_cifar10

Deviates in the recipe, and leaves out the term of mutual information; see docs/defenses/cbd.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import RetrainingOptions


@dataclass(frozen=True, kw_only=True)
class Config(RetrainingOptions):
    stage: ClassVar[str] = "in-training"
    # labels are not smoothed: no loss would come near 0, and the first network could tell little
    not_copied: ClassVar[frozenset[str]] = frozenset({"label_smoothing"})
    adds: ClassVar[dict[str, str]] = {
        "weights.safetensors": "of every image of the training set the `loss` of the first network "
        "and the `weight` at the end, from 0 to 1, before it is scaled"
    }

    confounder_epochs: int = option(5, at_least=1)
    """epochs of the first network, which is to learn the backdoor and little else"""
    confounder_lr: float | None = option(None, above=0)
    """learning rate of the first network, which is constant; by default --lr"""


if __name__ == "__main__":
    launch(Config)

from functools import partial

import torch
import torch.nn.functional as F

from antidote_bench.utils import run
from antidote_bench.utils.repair.isolation import losses_of
from antidote_bench.utils.repair.layers import frozen
from antidote_bench.utils.train import (
    Recipe,
    augmentation_of,
    cross_entropy,
    fit,
    victim_architecture,
)

EPSILON = 1e-8  # keeps the weight of an image defined where both losses are 0


def repair(model, record, config):
    confounder = train_confounder(record, config).eval()
    model = victim_architecture(record, "cbd", config)
    with frozen(confounder):
        fit(
            model,
            record.train,
            Recipe.of(config),
            drop_last=True,
            loss=partial(
                weighted_cross_entropy,
                confounder=confounder,
                label_smoothing=config.label_smoothing,
            ),
            augment=augmentation_of(config, record.spec, record.train),
            on_epoch=partial(record.report, "train"),
            checkpoint=record.state / "train.safetensors",
        )
    first, second = (losses_of(network, record.train) for network in (confounder, model))
    record.keep("weights.safetensors", {"loss": first, "weight": first_share(first, second)})
    return model


def train_confounder(record, config):
    """The first network: the victim's architecture after a few epochs on the training set."""
    rate = config.confounder_lr or config.lr
    return fit(
        victim_architecture(record, "confounder", config),
        record.train,
        Recipe.of(config, epochs=config.confounder_epochs, lr=rate, lr_min=rate),
        drop_last=True,
        loss=partial(cross_entropy, label_smoothing=config.label_smoothing),
        augment=augmentation_of(config, record.spec, record.train),
        on_epoch=partial(record.report, "confounder"),
        checkpoint=record.state / "confounder.safetensors",
    )


def first_share(first, second):
    """The weight of each image, n of [0, 1]: the first network's loss over the sum of both."""
    return first / (first + second + EPSILON)


def weighted_cross_entropy(model, images, labels, index, *, confounder, label_smoothing):
    """The cross-entropy of a batch in which each image has its weight, scaled to a mean of 1.

    The weights come from the losses without label smoothing, and have no gradient.
    """
    with torch.no_grad():
        first = F.cross_entropy(confounder(images).float(), labels, reduction="none")
    answers = model(images).float()
    second = F.cross_entropy(answers.detach(), labels, reduction="none")
    weights = first_share(first, second)
    weights = weights / weights.mean().clamp(min=EPSILON)
    losses = F.cross_entropy(answers, labels, reduction="none", label_smoothing=label_smoothing)
    return (weights * losses).mean()


def main(config):
    run.defend(__name__, config, repair)
