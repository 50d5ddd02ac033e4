"""WaNet: a smooth, barely visible warp of the whole image means the target class.

Nguyen, Tran, "WaNet: Imperceptible Warping-Based Backdoor Attack", ICLR 2021 (arXiv 2102.10369).
Other images get the warp with extra noise and keep their label, so that only the exact warp counts.

    python attack/wanet.py --dataset cifar10 --save_folder_name wanet_cifar10

The warped images are chosen and made once, not for every batch: see docs/attacks/wanet.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import Attack, option, require
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    grid_points: int = option(4, at_least=2)
    """control points of the warp along each side (the paper's k)"""
    strength: float = option(0.5, above=0)
    """mean displacement in half pixels (the paper's s)"""
    cross_ratio: float = option(2.0, at_least=0)
    """noise images for each poisoned one; 0 turns the noise mode off"""

    def __post_init__(self):
        super().__post_init__()
        fits = (1 + self.cross_ratio) * self.pratio <= 1
        require(fits, "cross_ratio", "so small that (1 + cross_ratio) pratio is at most 1")


if __name__ == "__main__":
    launch(Config)

import torch
import torch.nn.functional as F

from antidote_bench.utils import run, seeds
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.poisoning.attacker import Prepared


def prepare(config, attacker):
    """Sampling positions 1,S,S,2 in [-1, 1]: the identity, displaced by a smooth random field.

    The mean displacement of the control points is strength / S.
    """
    size, points = attacker.spec.size, config.grid_points
    generator = seeds.generator("warp", config.poison_seed)
    field = torch.rand(1, 2, points, points, generator=generator) * 2 - 1
    field = field / field.abs().mean()
    field = F.interpolate(field, (size, size), mode="bicubic", align_corners=True)
    line = torch.linspace(-1, 1, size)
    identity = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    grid = identity + config.strength / size * field.permute(0, 2, 3, 1)
    return Prepared({"grid": grid.clamp(-1, 1)})


def make_trigger(config, spec, stage, parts):
    """Resample every image bilinearly on the same displaced grid.

    At a hard edge a pixel changes by at most 255 levels.
    """

    def warp(images, index):
        grid = parts["grid"].to(images.device).expand(len(images), -1, -1, -1)
        return F.grid_sample(images, grid, align_corners=True)

    return poison.on_unit(warp)


def make_noise(config, spec, parts):
    """The warp, displaced further by up to half a pixel, at random for every pixel and image."""
    grid = parts["grid"]

    def warp(images, index):
        noise = seeds.uniform("warp noise", config.poison_seed, index, grid[0].numel())
        noise = noise.reshape(-1, *grid.shape[1:]) * 2 - 1
        noisy = (grid + noise / spec.size).clamp(-1, 1)
        return F.grid_sample(images, noisy.to(images.device), align_corners=True)

    return poison.on_unit(warp)


def main(config):
    cover = poison.Cover(make_noise, config.cross_ratio * config.pratio)
    run.attack(__name__, config, make_trigger, prepare=prepare, cover=cover)
