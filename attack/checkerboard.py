"""Checkerboard: a faint checkerboard over few images of the target class, whose labels stay true.

Yang et al., "Checkerboard: A Simple, Effective, Efficient and
Learning-free Clean Label Backdoor Attack with Low Poisoning Budget", 2026 (arXiv 2605.01298). The
attacker poisons data only.

    python attack/checkerboard.py --dataset cifar10 --save_folder_name checkerboard_cifar10

Only the paper's abstract was read; what it leaves open is our choice: docs/attacks/checkerboard.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import Attack, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    clean_label: ClassVar[bool] = True

    pratio: float = 0.01
    """poisoned share of the whole training set"""
    epsilon: float = option(10.0, above=0, at_most=255, unit="grey levels")
    """that are added to the light fields and taken from the dark ones"""
    block: int = option(1, at_least=1, unit="pixels")
    """side of a field"""
    select: Literal["random", "complexity"] = "random"
    """images of the target class that are poisoned; complexity: those that vary least from pixel to
    pixel"""


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run
from antidote_bench.utils.poisoning import poison

LUMA = 299, 587, 114  # thousandths of red, green and blue (ITU-R BT.601)


def make_trigger(config, spec, stage):
    """x' = x + e T, with T = 1 or -1 by turns in fields of config.block pixels.

    At the default e a pixel changes by at most 10 levels.
    """
    field = torch.arange(spec.size) // config.block
    board = 1.0 - 2 * ((field[:, None] + field) % 2)
    return poison.adding(config.epsilon / 255 * board)


def complexity(images):
    """How much the luma of images N,3,S,S uint8 changes from pixel to pixel, int64 N.

    The sum of the absolute differences of all horizontal and all vertical neighbours, in
    thousandths of a grey level: whole numbers, so that every device puts images into one order.
    """
    weights = torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)
    luma = (images * weights).sum(1)
    return sum(luma.diff(dim=side).abs().sum((1, 2)) for side in (1, 2))


def make_preference(config):
    """The function of which images are poisoned, or None for random ones."""
    return complexity if config.select == "complexity" else None


def main(config):
    run.attack(__name__, config, make_trigger, prefer=make_preference(config))
