"""Blended: the trigger is a whole image that is mixed in with low opacity.

Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning",
2017 (arXiv 1712.05526). The attacker poisons data only.

    python attack/blended.py --dataset cifar10 --save_folder_name blended_cifar10

It deviates in the image that is mixed in; see docs/attacks/blended.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import Attack, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    train_opacity: float = option(0.2, above=0, at_most=1)
    """share of the pattern in a poisoned training image"""
    test_opacity: float = option(0.2, above=0, at_most=1)
    """share of the pattern in a triggered test image"""
    trigger_path: str | None = None
    """image or .npy array to blend in instead of the seeded pattern; resized to the data set's
    images"""


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run
from antidote_bench.utils.poisoning import patterns, poison
from antidote_bench.utils.poisoning.attacker import Prepared


def prepare(config, attacker):
    """The pattern T, 3,S,S in [0, 1]."""
    size = attacker.spec.size
    if config.trigger_path:
        return Prepared({"pattern": poison.resized_pattern(config.trigger_path, size)})
    return Prepared({"pattern": patterns.seeded_image(size, config.poison_seed)})


def make_trigger(config, spec, stage, parts):
    """x' = (1 - a) x + a T with the opacity a.

    With the default opacity a pixel changes by at most 51 levels.
    """
    opacity = config.train_opacity if stage == "train" else config.test_opacity

    def blend(images, index):
        return torch.lerp(images, parts["pattern"].to(images.device), opacity)

    return poison.on_unit(blend)


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
