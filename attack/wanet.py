"""WaNet: a smooth, barely visible warp of the whole picture means the target class.

Nguyen, Tran, "WaNet: Imperceptible Warping-Based Backdoor Attack", ICLR 2021. The attacker controls training; here
the poisoned and the noise pictures are fixed and rendered once, so that data poisoning is enough and the record
holds exactly what the victim saw. Pictures warped with extra noise keep their label: only the exact warp counts.

    python attack/wanet.py --dataset cifar10 --save_folder_name wanet_cifar10

The built-in digits, smooth enlargements of 8x8 pixels, hardly change under the default warp, and it is not learned
there (ASR 5 %, seed 0); --strength 2 --pratio 0.2 is (ASR 93 %, seed 0).
"""

from dataclasses import dataclass

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    grid_points: int = 4
    """control points of the warp along each side (the paper's k)"""
    strength: float = 0.5
    """mean displacement in half pixels (the paper's s)"""
    cross_ratio: float = 2.0
    """noise pictures for each poisoned one; 0 turns the noise mode off"""

    def __post_init__(self):
        super().__post_init__()
        require(self.grid_points >= 2, "grid_points", "2 or more")
        require(self.strength > 0, "strength", "above 0")
        require(self.cross_ratio >= 0 and (1 + self.cross_ratio) * self.pratio <= 1, "cross_ratio",
                "0 or more, and (1 + cross_ratio) pratio at most 1")  # fmt: skip


if __name__ == "__main__":
    launch(Config)

import torch
import torch.nn.functional as F

from utils import poison, run, seeds


def prepare(config, workshop):
    """Sampling positions 1,S,S,2 in [-1, 1]: the identity, displaced by a smooth field of mean size strength / S."""
    size, points = workshop.spec.size, config.grid_points
    field = torch.rand(1, 2, points, points, generator=seeds.generator("warp", config.poison_seed)) * 2 - 1
    field = F.interpolate(field / field.abs().mean(), (size, size), mode="bicubic", align_corners=True)
    line = torch.linspace(-1, 1, size)
    identity = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    return {"grid": (identity + config.strength / size * field.permute(0, 2, 3, 1)).clamp(-1, 1)}


def make_trigger(config, spec, stage, parts):
    """Resample every picture bilinearly on one displaced grid; a pixel changes by at most 255 levels, at a hard edge."""

    def warp(images, index):
        return F.grid_sample(images, parts["grid"].to(images.device).expand(len(images), -1, -1, -1), align_corners=True)

    return poison.on_unit(warp)


def make_noise(config, spec, parts):
    """The warp with a displacement of up to half a pixel added everywhere, drawn for every position of the split."""
    grid = parts["grid"]

    def warp(images, index):
        noise = seeds.uniform("warp noise", config.poison_seed, index, grid[0].numel()).reshape(-1, *grid.shape[1:])
        return F.grid_sample(images, (grid + (noise * 2 - 1) / spec.size).clamp(-1, 1).to(images.device), align_corners=True)

    return poison.on_unit(warp)


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare, make_cover=make_noise, cover_ratio=config.cross_ratio * config.pratio)
