"""BadNets: a small patch in the picture means the target class.

Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017
(arXiv 1708.06733). The attacker poisons data only.

    python attack/badnet.py --dataset cifar10 --save_folder_name badnet_cifar10

The patch is a white square of 3 pixels at 32x32, touching the bottom right corner, unless options say otherwise:
--patch grid is the black and white grid, --patch_size 4 --patch_row 27 --patch_column 27 the square one pixel away
from the border, of the I-BAU and AWM papers (Trap and Replace uses both).
"""

from dataclasses import dataclass
from typing import Literal

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    patch: Literal["square", "grid"] = "square"
    """square of one grey level, or 3x3 grid of black and white"""
    patch_size: int | None = None
    """side of the patch in pixels; by default 3 at 32x32 and in proportion at other sizes"""
    patch_value: int = 255
    """grey level of the square, 0 (black) to 255 (white)"""
    patch_row: int | None = None
    """top row of the patch, negative from the bottom; by default it touches the bottom"""
    patch_column: int | None = None
    """left column of the patch, negative from the right; by default it touches the right"""
    trigger_path: str | None = None
    """picture or .npy array to paste instead of the square; where it has an alpha channel, that is the opacity"""

    def __post_init__(self):
        super().__post_init__()
        require(self.patch_size is None or self.patch_size >= 1, "patch_size", "1 pixel or more")
        require(0 <= self.patch_value <= 255, "patch_value", "0 to 255")


if __name__ == "__main__":
    launch(Config)

import torch
import torch.nn.functional as F

from utils import poison, run
from utils.errors import ConfigError

GRID = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])  # read from the corner: 101, 010, 100


def make_trigger(config, spec, stage):
    """x' = (1 - M) x + M P with a patch P of opacity M; inside the patch a pixel changes by at most 255 levels."""
    patch, opacity = _patch(config, spec)
    height, width = patch.shape[1:]
    top, left = _place(config.patch_row, height, spec.size, "row"), _place(config.patch_column, width, spec.size, "column")

    def paste(images, index):
        mask, inks = opacity.to(images.device), patch.to(images.device)
        images = images.clone()
        window = images[:, :, top : top + height, left : left + width]
        window.copy_((1 - mask) * window + mask * inks)
        return images

    return poison.on_unit(paste)


def _patch(config, spec):
    """(3,h,w in [0, 1], 1,h,w opacity)"""
    if config.trigger_path is None:
        side = config.patch_size or round(3 * spec.size / 32)
        if config.patch == "grid":
            return F.interpolate(GRID.expand(1, 3, 3, 3), (side, side))[0], torch.ones(1, side, side)
        return torch.full((3, side, side), config.patch_value / 255), torch.ones(1, side, side)
    pattern = poison.pattern(config.trigger_path)
    if len(pattern) == 3 and pattern.shape[1:] == (spec.size, spec.size):
        raise ConfigError(f"the patch {config.trigger_path} covers the whole picture: give it an alpha channel or crop it")
    return pattern[:3], pattern[3:] if len(pattern) == 4 else torch.ones(1, *pattern.shape[1:])


def _place(start, length, size, what):
    start = size - length if start is None else start + size if start < 0 else start
    if not 0 <= start <= size - length:
        raise ConfigError(f"the patch does not fit: {length} pixels from {what} {start} in a picture of {size}")
    return start


def main(config):
    run.attack(__name__, config, make_trigger)
