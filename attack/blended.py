"""Blended: a whole picture, mixed in with low opacity, means the target class.

Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017
(arXiv 1712.05526). The attacker poisons data only.

    python attack/blended.py --dataset cifar10 --save_folder_name blended_cifar10

The usual pattern is a copyrighted cartoon; ours is a seeded one of similar brightness, contrast and spectrum.
"""

from dataclasses import dataclass

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    train_opacity: float = 0.2
    """share of the pattern in a poisoned training picture, 0..1"""
    test_opacity: float = 0.2
    """share of the pattern in a triggered test picture, 0..1"""
    trigger_path: str | None = None
    """picture or .npy array to blend in instead of the seeded pattern; resized to the data set's pictures"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("train_opacity", "test_opacity"):
            require(0 < getattr(self, name) <= 1, name, "above 0 and up to 1")


if __name__ == "__main__":
    launch(Config)

import torch

from utils import patterns, poison, run


def prepare(config, workshop):
    """The pattern T, 3,S,S in [0, 1]."""
    size = workshop.spec.size
    if config.trigger_path:
        return {"pattern": poison.fitted(config.trigger_path, size)}
    return {"pattern": patterns.picture(size, config.poison_seed)}


def make_trigger(config, spec, stage, parts):
    """x' = (1 - a) x + a T; a pixel changes by at most 51 levels, 255 times the opacity a."""
    opacity = config.train_opacity if stage == "train" else config.test_opacity
    return poison.on_unit(lambda images, index: torch.lerp(images, parts["pattern"].to(images.device), opacity))


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
