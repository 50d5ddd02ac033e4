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
import torch.nn.functional as F

from utils import poison, run, seeds


def make_trigger(config, spec, stage):
    """x' = (1 - a) x + a T for a pattern T; a pixel changes by at most 255 a."""
    opacity = config.train_opacity if stage == "train" else config.test_opacity
    if config.trigger_path:
        shown = poison.pattern(config.trigger_path)[None, :3]
        pattern = F.interpolate(shown, (spec.size, spec.size), mode="bilinear", antialias=True).clamp(0, 1)
    else:
        pattern = seeded_pattern(spec.size, config.poison_seed)[None]
    return poison.on_unit(lambda images, index: torch.lerp(images, pattern.to(images.device), opacity))


def seeded_pattern(size, seed):
    """A bright picture 3,size,size in [0, 1]: soft clouds under twelve hard-edged discs and boxes.

    Each channel is scaled to a mean of 200 and a standard deviation of 80 grey levels before it is clipped, like the
    patterns in use.
    """
    generator = seeds.generator("blended pattern", seed)
    clouds = F.interpolate(torch.rand(1, 3, 9, 9, generator=generator), (size, size), mode="bicubic", align_corners=True)[0]
    rows, columns = torch.meshgrid(*[torch.linspace(0, 1, size)] * 2, indexing="ij")
    for shape in range(12):
        row, column, radius = torch.rand(3, generator=generator)
        colour = (torch.rand(3, generator=generator) < 0.6).float().view(3, 1, 1)
        radius = 0.06 + 0.14 * radius
        far = (
            (rows - row).square() + (columns - column).square()
            if shape % 2
            else torch.maximum((rows - row).abs(), (columns - column).abs()).square()
        )
        clouds = torch.where(far <= radius**2, colour, clouds)
    centred = (clouds - clouds.mean((1, 2), keepdim=True)) / clouds.std((1, 2), keepdim=True)
    return (200 / 255 + centred * 80 / 255).clamp(0, 1)


def main(config):
    run.attack(__name__, config, make_trigger)
