"""Adaptive-Blend: training pictures carry only parts of a blended pattern, the full pattern strikes at test time.

Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023
(arXiv 2205.13613). The attacker poisons data only. Cover pictures carry parts of the pattern too and keep their label, so that poisoned
and clean pictures of the target class are not apart in the network's features.

    python attack/adaptive_blend.py --dataset cifar10 --save_folder_name adaptive_blend_cifar10
"""

from dataclasses import dataclass

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    pratio: float = 0.003
    """poisoned share of the whole training set, 0..1"""
    cover_ratio: float = 0.003
    """share of the training set that carries the trigger and keeps its label"""
    tiles: int = 4
    """the pattern is cut into tiles x tiles"""
    kept: int = 8
    """tiles that a training picture carries, drawn for each"""
    train_opacity: float = 0.15
    """share of the pattern in a training picture's tiles, 0..1"""
    test_opacity: float = 0.2
    """share of the whole pattern in a triggered test picture, 0..1"""
    trigger_path: str | None = None
    """picture or .npy array to blend in instead of the seeded pattern; resized to the data set's pictures"""

    def __post_init__(self):
        super().__post_init__()
        require(self.cover_ratio >= 0 and self.cover_ratio + self.pratio <= 1, "cover_ratio", "0 or more, and with pratio at most 1")
        require(self.tiles >= 1, "tiles", "1 or more")
        require(1 <= self.kept <= self.tiles**2, "kept", "1 to tiles x tiles")
        for name in ("train_opacity", "test_opacity"):
            require(0 < getattr(self, name) <= 1, name, "above 0 and up to 1")


if __name__ == "__main__":
    launch(Config)

import torch.nn.functional as F

from utils import patterns, poison, run, seeds


def prepare(config, workshop):
    """The pattern T, 3,S,S in [0, 1]."""
    size = workshop.spec.size
    if config.trigger_path:
        return {"pattern": poison.fitted(config.trigger_path, size)}
    return {"pattern": patterns.picture(size, config.poison_seed)}


def make_trigger(config, spec, stage, parts):
    """x' = x + a M (T - x), M a picture's tiles in training and 1 in the test; a pixel changes by at most 51 levels."""

    def blend(images, index):
        change = parts["pattern"].to(images.device) - images
        if stage == "test":
            return images + config.test_opacity * change
        return images + config.train_opacity * masks(config, spec, index).to(images.device) * change

    return poison.on_unit(blend)


def masks(config, spec, index):
    """N,1,S,S of 0 and 1: `kept` of the tiles, drawn for every position of the split."""
    drawn = seeds.uniform("adaptive tiles", config.poison_seed, index, config.tiles**2)
    chosen = (drawn.argsort(1).argsort(1) < config.kept).float().reshape(-1, 1, config.tiles, config.tiles)
    return F.interpolate(chosen, (spec.size, spec.size))


def make_cover(config, spec, parts):
    return make_trigger(config, spec, "train", parts)


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare, make_cover=make_cover, cover_ratio=config.cover_ratio)
