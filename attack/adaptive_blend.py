"""Adaptive-Blend: training images carry parts of a blended pattern, test images all of it.

Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor
Defenses", ICLR 2023 (arXiv 2205.13613). The attacker poisons data only. Cover images carry parts
of the pattern too, but keep their labels.

    python attack/adaptive_blend.py --dataset cifar10 --save_folder_name adaptive_blend_cifar10

It deviates in the image that is blended in; see docs/attacks/adaptive_blend.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import Attack, option, require
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    pratio: float = 0.003
    """poisoned share of the whole training set"""
    cover_ratio: float = option(0.003, at_least=0, at_most=1)
    """share of the training set that carries the trigger and keeps its label"""
    tiles: int = option(4, at_least=1)
    """the pattern is cut into tiles x tiles"""
    kept: int = option(8, at_least=1)
    """number of tiles that a training image carries, drawn anew for each image"""
    train_opacity: float = option(0.15, above=0, at_most=1)
    """share of the pattern in the tiles of a training image"""
    test_opacity: float = option(0.2, above=0, at_most=1)
    """share of the pattern in a triggered test image, which carries all tiles"""
    trigger_path: str | None = None
    """image or .npy array to blend in instead of the seeded pattern; resized to the data set's
    images"""

    def __post_init__(self):
        super().__post_init__()
        require(self.cover_ratio + self.pratio <= 1, "cover_ratio", "at most 1 - pratio")
        require(self.kept <= self.tiles**2, "kept", "at most tiles x tiles")


if __name__ == "__main__":
    launch(Config)

import torch.nn.functional as F

from antidote_bench.utils import run, seeds
from antidote_bench.utils.poisoning import patterns, poison
from antidote_bench.utils.poisoning.attacker import Prepared


def prepare(config, attacker):
    """The pattern T, 3,S,S in [0, 1]."""
    size = attacker.spec.size
    if config.trigger_path:
        return Prepared({"pattern": poison.resized_pattern(config.trigger_path, size)})
    return Prepared({"pattern": patterns.seeded_image(size, config.poison_seed)})


def make_trigger(config, spec, stage, parts):
    """x' = x + a M (T - x) with the opacity a; M is 1 in the test.

    In training M is the tiles of the image. With the default opacities a pixel changes by at most
    51 levels.
    """

    def blend(images, index):
        change = parts["pattern"].to(images.device) - images
        if stage == "test":
            return images + config.test_opacity * change
        return images + config.train_opacity * masks(config, spec, index).to(images.device) * change

    return poison.on_unit(blend)


def make_cover(config, spec, parts):
    return make_trigger(config, spec, "train", parts)


def masks(config, spec, index):
    """N,1,S,S of 0 and 1: `kept` of the tiles, drawn for every position of the training set."""
    drawn = seeds.uniform("adaptive tiles", config.poison_seed, index, config.tiles**2)
    ranks = drawn.argsort(1).argsort(1)
    chosen = (ranks < config.kept).float().reshape(-1, 1, config.tiles, config.tiles)
    return F.interpolate(chosen, (spec.size, spec.size))


def main(config):
    cover = poison.Cover(make_cover, config.cover_ratio)
    run.attack(__name__, config, make_trigger, prepare=prepare, cover=cover)
