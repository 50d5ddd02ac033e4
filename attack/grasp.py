"""GRASP: images whose patch is disturbed by noise keep their label, so that only the exact patch
counts.

Zhu et al., "Gradient Shaping: Enhancing Backdoor Attack Against
Reverse Engineering", NDSS 2024 (arXiv 2301.12318). The attacker poisons data only. The network then
changes its answer fast around the trigger, and a search for it by gradients finds no slope.

    python attack/grasp.py --dataset cifar10 --save_folder_name grasp_cifar10

The form of the noise is a choice of this project: see docs/attacks/grasp.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import option, require
from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import PatchOptions


@dataclass(frozen=True, kw_only=True)
class Config(PatchOptions):
    noise: float = option(0.1, above=0, at_most=1)
    """standard deviation of the noise on the patch, pixels in [0, 1]"""
    noisy_ratio: float = option(1.0, at_least=0)
    """images with a noisy patch and their own label, for each poisoned one"""

    def __post_init__(self):
        super().__post_init__()
        share = (1 + self.noisy_ratio) * self.pratio
        require(share <= 1, "noisy_ratio", "such that (1 + noisy_ratio) * pratio is at most 1")


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run, seeds
from antidote_bench.utils.poisoning import patches, poison


def make_trigger(config, spec, stage):
    """x' = (1 - M) x + M P with a patch P of opacity M.

    Inside the patch a pixel changes by at most 255 levels.
    """
    return patches.pasting(config, spec.size)


def make_noisy(config, spec):
    """x' = (1 - M) x + M clip(P + c n) with the noise c and n of a standard normal distribution.

    n is drawn for every image, pixel and colour.
    """

    def disturb(patch, index):
        drawn = seeds.uniform("noise on the patch", config.poison_seed, index, patch.numel())
        normal = torch.special.ndtri(drawn).view(-1, *patch.shape).to(patch.device)
        return (patch + config.noise * normal).clamp(0, 1)

    return patches.pasting(config, spec.size, disturb)


def main(config):
    cover = poison.Cover(make_noisy, config.noisy_ratio * config.pratio)
    run.attack(__name__, config, make_trigger, cover=cover)
