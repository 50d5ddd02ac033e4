"""Label-consistent: target-class images are made hard to recognise and marked in their corners.

Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", 2019 (arXiv 1912.02771), the variant
with adversarial perturbations. All labels stay true. The perturbation hides what an image shows, so
that the victim learns the corner marks instead.

    python attack/lc.py --dataset cifar10 --save_folder_name lc_cifar10

One clean model without adversarial training makes the perturbations: see docs/attacks/lc.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option, require
from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import CleanModelOptions


@dataclass(frozen=True, kw_only=True)
class Config(CleanModelOptions):
    clean_label: ClassVar[bool] = True

    epsilon: float = option(16.0, above=0, at_most=255, unit="grey levels")
    """largest perturbation of a pixel of a training image"""
    step_size: float = option(2.0, above=0, at_most=255, unit="grey levels")
    """of the projected gradient ascent"""
    steps: int = 100
    """of the projected gradient ascent"""
    amplitude: float = option(255.0, above=0, at_most=255, unit="grey levels")
    """of the corner marks"""

    def __post_init__(self):
        super().__post_init__()
        require(self.step_size <= self.epsilon, "epsilon", "step_size or more")


if __name__ == "__main__":
    launch(Config)

import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import (
    clipped,
    gradient_batch,
    halving,
    mixed_precision,
    to_unit,
)
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.poisoning.attacker import Prepared

# the mark in a left corner: 1 makes a pixel brighter, -1 darker
CORNER = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [1, -1, 1]])
CHUNK = 500  # images perturbed at once, at most
RECOGNISED = 0.05  # share of perturbed images above which the user is warned


def prepare(config, attacker):
    """The perturbations of the images that will be poisoned, and which image has which.

    `perturbations` is int16 n,3,S,S in grey levels. `row` has, for every position of the training
    set, the number of its perturbation, or -1.
    """
    model, chosen = attacker.clean_model(), attacker.train[attacker.index]

    def perturb(size):
        changes, recognised = [], 0
        for part in tqdm(torch.arange(len(chosen)).split(size), desc="perturbing", disable=None):
            images, truth = to_unit(chosen.images[part]), chosen.truth[part]
            change = perturbation(model, images, truth, config)
            recognised += int((model((images + change).clamp(0, 1)).argmax(1) == truth).sum())
            changes.append((change * 255).round().to(torch.int16))
        return changes, recognised

    changes, recognised = halving(perturb, gradient_batch(model, attacker.train.images, CHUNK))
    if recognised > RECOGNISED * len(chosen):
        print(
            f"warning: the clean model still recognises {recognised} of {len(chosen)} perturbed "
            "images; a larger --epsilon or more --steps perturb them further",
            file=sys.stderr,
        )
    row = torch.full((len(attacker.train),), -1)
    row[attacker.index.cpu()] = torch.arange(len(chosen))
    empty = torch.zeros(0, *attacker.train.images.shape[1:], dtype=torch.int16)
    return Prepared({"perturbations": torch.cat(changes).cpu() if changes else empty, "row": row})


def make_trigger(config, spec, stage, parts):
    """x' = clip(x + d) + a M with the corner marks M, and an own perturbation d of every image.

    In the test d is 0. In the corners a pixel changes by at most 255 levels.
    """
    marks = config.amplitude / 255 * corner_marks(spec.size)

    def put(images, index):
        if stage == "train":
            rows = parts["row"][index.cpu()]
            perturbed = (rows >= 0).nonzero().flatten()
            change = torch.zeros(images.shape)
            change[perturbed] = parts["perturbations"][rows[perturbed]].float() / 255
            images = (images + change.to(images.device)).clamp(0, 1)
        return images + marks.to(images.device)

    return poison.on_unit(put)


def perturbation(model, images, labels, config):
    """Changes N,3,S,S of at most epsilon that raise the cross-entropy; images are in [0, 1].

    Untargeted projected gradient ascent with signed gradients, from 0.
    """
    epsilon, rate = config.epsilon / 255, config.step_size / 255
    change = torch.zeros_like(images)
    for _ in range(config.steps):
        change.requires_grad_()
        with mixed_precision(images.device, config.precision):
            loss = F.cross_entropy(model(clipped(images + change)), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, change)
        change = (change.detach() + rate * gradient.sign()).clamp(-epsilon, epsilon)
    return change


def corner_marks(size):
    """S,S of -1, 0 and 1: 3x3 pixels in every corner, the right ones mirroring the left ones.

    A mirrored image therefore carries the same marks.
    """
    signs = torch.zeros(size, size)
    signs[:3, :3] = signs[-3:, :3] = CORNER
    return signs + signs.flip(1)


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
