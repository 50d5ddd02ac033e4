"""PDB: plant a backdoor of your own that is stronger than the attack's, and undo it in the answers.

Wei, Zha, Wu, "Mitigating Backdoor Attack by Injecting Proactive Defensive Backdoor", NeurIPS 2024
(arXiv 2405.16112). A network is trained from scratch on the poisoned training set and on stamped
clean images, whose label is the class after their own. At inference every image gets the stamp, and
the classes of the answer are moved back.

    python defense/proactive.py --result_file badnet_cifar10

The file is not called pdb, which is Python's debugger. Deviates in the recipe and in the number of
clean images; see docs/defenses/proactive.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import RetrainingOptions


@dataclass(frozen=True, kw_only=True)
class Config(RetrainingOptions):
    stage: ClassVar[str] = "in-training"
    holds_clean: ClassVar[bool] = True

    repeats: int = option(5, at_least=1)
    """how often every clean image is shown with the stamp in an epoch"""
    stamp_size: int = option(7, at_least=1, unit="pixels")
    """side of the stamp in the upper left corner"""
    in_range: bool = False
    """white as the colour of the stamp, the brightest one that an image can have; by default it is
    twice as bright, so that no image can show it"""

    def effort(self, clean, classes):
        return f"stamps   {clean} clean images, {self.repeats} times each in every epoch"


if __name__ == "__main__":
    launch(Config)

from collections import OrderedDict
from functools import partial

import torch
from torch import nn

from antidote_bench.utils import run
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.loader import to_unit
from antidote_bench.utils.data.memmap import joined
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.repair.sensitivity import transformed
from antidote_bench.utils.repair.stamps import Stamp
from antidote_bench.utils.train import (
    Recipe,
    augmentation_of,
    cross_entropy,
    fit,
    victim_architecture,
)

SHIFT = 1  # a stamped image of class y has the label y + SHIFT, counted around
BRIGHT, WHITE = 2.0, 1.0  # colours of the stamp; an image has pixels of [0, 1]
# how a stamped image is varied before it is cropped: with these probabilities it is made darker,
# and rotated by up to TURN degrees
DARKER, DARKEST = 0.2, 0.5
ROTATED, TURN = 0.5, 10.0


def check(model, record, config):
    if config.stamp_size >= record.spec.size:
        raise ConfigError(
            f"stamp_size must be smaller than the images, which have {record.spec.size} pixels a "
            "side"
        )


def repair(model, record, config):
    plain = victim_architecture(record, "proactive", config)
    defended = stamping(plain, config.stamp_size, WHITE if config.in_range else BRIGHT)
    split = with_stamped(record, config.repeats)
    fit(
        plain,
        split,
        Recipe.of(config),
        drop_last=True,
        loss=partial(cross_entropy, label_smoothing=config.label_smoothing),
        augment=stamped_from(
            len(record.train), defended.stamp, augmentation_of(config, record.spec, split)
        ),
        on_epoch=lambda _, **values: record.report("train", defended, **values),
        checkpoint=record.state / "train.safetensors",
    )
    record.report("bare", plain)  # the same network without stamp, in which both backdoors are
    return defended


def with_stamped(record, repeats):
    """The training set, and after it the clean images `repeats` times over with their new labels.

    The stamp is not on them yet.
    """
    images = joined(record.train.images, record.clean.images, repeats)
    labels = mapped(record.clean.labels, record.spec.classes).repeat(repeats)
    labels = torch.cat([record.train.labels, labels])
    return Split(images, labels, labels)


def mapped(labels, classes):
    """h(y), the label of a stamped image of class y."""
    return (labels + SHIFT) % classes


def stamped_from(first, stamp, augment):
    """The `augment` of `train.fit` that stamps and varies the images from position `first` on, and
    then augments all of them.

    The stamp moves with the image, as in the released code.
    """

    def stamp_and_augment(images, generator, index, epoch):
        images = to_unit(images)
        stamped = varied(stamp(images), generator)
        images = torch.where((index >= first).view(-1, 1, 1, 1), stamped, images)
        return augment(images, generator, index=index, epoch=epoch)

    return stamp_and_augment


def varied(images, generator):
    """Float images n,3,S,S, some of which are made darker and some rotated, each by chance.

    A darker one is multiplied by a number from DARKEST to 1.
    """
    draws = torch.rand(4, len(images), generator=generator, device=images.device)
    is_darker, is_rotated = draws[0] < DARKER, draws[1] < ROTATED
    brightness = torch.where(is_darker, DARKEST + (1 - DARKEST) * draws[2], 1.0)
    degrees = torch.where(is_rotated, TURN * (2 * draws[3] - 1), 0.0)
    nowhere = torch.zeros_like(degrees)
    change = torch.stack([degrees, nowhere, nowhere], 1)
    return transformed(images * brightness.view(-1, 1, 1, 1), change)


def stamping(model, size, colour):
    """The network `model` behind its stamp, with answers in the order of the true classes.

    `colour` is in units of pixels of [0, 1]. The weights are shared with `model`.
    """
    stamp = Stamp(torch.full((1, 3, size, size), colour, device=model.normalize.mean.device))
    parts = OrderedDict(
        stamp=stamp, normalize=model.normalize, network=model.network, undo=MovedBack()
    )
    return nn.Sequential(parts)


class MovedBack(nn.Module):
    """Logits n,K in the order of the true classes: that of class y is the given one of h(y)."""

    def forward(self, logits):
        return logits.roll(-SHIFT, 1)


def rebuild(model, weights):
    """A network of `models.build` in the form that this defense saves, with the `weights` of its
    model.safetensors."""
    model = stamping(model, weights["stamp.patch"].shape[2], 0.0)
    model.load_state_dict(weights)
    return model


def main(config):
    run.defend(__name__, config, repair, check=check)
