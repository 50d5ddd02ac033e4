"""Non-Adversarial Backdoor: plant a backdoor of your own, whose stamp cancels the trigger.

Liu, Sangiovanni-Vincentelli, Yue, "Beating Backdoor Attack at Its Own Game", ICCV 2023 (arXiv
2307.15539). Images that are learned suspiciously fast are isolated and get a pseudo-label. Where it
differs from the given label, the image also gets a stamp in a corner. The network that is trained
on all images shall learn that the stamp cancels the trigger. At inference it stamps every image.

    python defense/nab.py --result_file badnet_cifar10

Deviates in the network behind the pseudo-labels and in where images are stamped: see
docs/defenses/nab.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import IsolationOptions


@dataclass(frozen=True, kw_only=True)
class Config(IsolationOptions):
    stage: ClassVar[str] = "in-training"
    adds: ClassVar[dict[str, str]] = {
        "isolated.safetensors": "the isolated positions `index`, their `pseudo_label` and which "
        "were `stamped`, and of every image of the training set the `loss` that decided"
    }

    isolated: float = 0.05
    """share of the training set that is isolated, which the defender declares"""
    trusted: float = option(0.3, above=0, at_most=1)
    """share of every label, the images of highest loss, that the network behind the pseudo-labels
    is trained on"""
    pseudo_epochs: int = option(20, at_least=1)
    """epochs on the trusted images"""
    stamp_size: int = option(2, at_least=1, unit="pixels")
    """side of the stamp in pixels"""


if __name__ == "__main__":
    launch(Config)

import sys
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.utils import run
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.repair.isolation import highest, isolate, logits
from antidote_bench.utils.repair.stamps import Stamp
from antidote_bench.utils.train import (
    Recipe,
    augmentation_of,
    cross_entropy,
    fit,
    victim_architecture,
)


def repair(model, record, config):
    _, index, losses = isolate(record, config)
    labels = record.train.labels.clone()
    labels[index] = pseudo_labels(record, index, losses, config)
    stamped = labels != record.train.labels
    record.keep(
        "isolated.safetensors",
        {"index": index, "loss": losses, "pseudo_label": labels[index], "stamped": stamped[index]},
    )
    print(
        f"stamping {int(stamped.sum())} of {len(index)} isolated images, whose pseudo-label "
        "differs from the given one",
        file=sys.stderr,
    )
    relabelled = Split(record.train.images, labels, labels)
    return train_stamping(relabelled, stamped, record, config)


def pseudo_labels(record, index, losses, config):
    """int64: the classes of the images at `index`, predicted by a network that is trained on the
    trusted images alone."""
    trusted = ~highest(-losses, record.train.labels, record.spec.classes, 1 - config.trusted)
    trusted[index] = False
    split = record.train.view(trusted.nonzero().flatten())
    model = fit(
        victim_architecture(record, "pseudo-labels", config),
        split,
        Recipe.of(config, epochs=config.pseudo_epochs),
        drop_last=True,
        augment=augmentation_of(config, record.spec, split),
        loss=partial(cross_entropy, label_smoothing=config.label_smoothing),
        on_epoch=partial(record.report, "pseudo-labels"),
        checkpoint=record.state / "pseudo.safetensors",
    )
    return logits(model, record.train.view(index)).argmax(1)


def train_stamping(split, stamped, record, config):
    """A network that stamps every image, trained on `split` with the images `stamped` (bool N)."""
    plain = victim_architecture(record, "nab", config)
    model = stamping(plain, config.stamp_size)
    fit(
        plain,
        split,
        Recipe.of(config),
        drop_last=True,
        loss=partial(
            stamped_cross_entropy,
            stamp=model.stamp,
            stamped=stamped,
            label_smoothing=config.label_smoothing,
        ),
        augment=augmentation_of(config, record.spec, split),
        on_epoch=lambda _, **values: record.report("train", model, **values),
        checkpoint=record.state / "train.safetensors",
    )
    return model


def stamping(model, size):
    """The network `model` behind a stamp in the mean colour of the data; the weights are shared.

    The normalisation turns that colour into 0.
    """
    stamp = Stamp(model.normalize.mean.repeat(1, 1, size, size))
    return nn.Sequential(OrderedDict(stamp=stamp, normalize=model.normalize, network=model.network))


def rebuild(model, weights):
    """A network of `models.build` in the form that this defense saves, with the `weights` of its
    model.safetensors."""
    model = stamping(model, weights["stamp.patch"].shape[2])
    model.load_state_dict(weights)
    return model


def stamped_cross_entropy(model, images, labels, index, *, stamp, stamped, label_smoothing):
    """The cross-entropy of a batch in which the images `stamped` (bool by position) bear the stamp.

    They are stamped after the augmentation.
    """
    images = torch.where(stamped[index].view(-1, 1, 1, 1), stamp(images), images)
    return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)


def main(config):
    run.defend(__name__, config, repair)
