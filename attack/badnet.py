"""BadNets: the trigger is a small patch in the image.

Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply
Chain", 2017 (arXiv 1708.06733). The attacker poisons data only.

    python attack/badnet.py --dataset cifar10 --save_folder_name badnet_cifar10

The patch is a white square in the bottom right corner; for others see docs/attacks/badnet.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.config import Attack, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    patch: Literal["square", "grid"] = option("square", needs={"trigger_path": None})
    """square of one grey level, or 3x3 grid of black and white"""
    patch_size: int | None = option(None, needs={"trigger_path": None}, at_least=1, unit="pixels")
    """side of the patch in pixels; by default 3 at 32x32 and in proportion at other sizes"""
    patch_value: int = option(
        255, needs={"patch": "square", "trigger_path": None}, at_least=0, at_most=255
    )
    """grey level of the square; 0 is black, 255 white"""
    patch_row: int | None = None
    """top row of the patch, negative from the bottom; by default it touches the bottom"""
    patch_column: int | None = None
    """left column of the patch, negative from the right; by default it touches the right"""
    trigger_path: str | None = None
    """image or .npy array to paste instead of the square; an alpha channel is its opacity"""


if __name__ == "__main__":
    launch(Config)

import torch
import torch.nn.functional as F

from antidote_bench.utils import run
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.poisoning import poison

# read from the corner: white black white, black white black, white black black
GRID = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])


def make_trigger(config, spec, stage):
    """x' = (1 - M) x + M P with a patch P of opacity M.

    Inside the patch a pixel changes by at most 255 levels.
    """
    patch, opacity = _patch(config, spec.size)
    height, width = patch.shape[1:]
    top = _first_pixel(config.patch_row, height, spec.size, "row")
    left = _first_pixel(config.patch_column, width, spec.size, "column")

    def paste(images, index):
        mask, colours = opacity.to(images.device), patch.to(images.device)
        images = images.clone()
        window = images[:, :, top : top + height, left : left + width]
        window.copy_((1 - mask) * window + mask * colours)
        return images

    return poison.on_unit(paste)


def _patch(config, size):
    """(the patch 3,h,w in [0, 1], its opacity 1,h,w)"""
    if config.trigger_path is not None:
        return _loaded_patch(config.trigger_path, size)
    side = config.patch_size or round(3 * size / 32)
    if config.patch == "grid":
        patch = F.interpolate(GRID.expand(1, 3, 3, 3), (side, side))[0]
    else:
        patch = torch.full((3, side, side), config.patch_value / 255)
    return patch, torch.ones(1, side, side)


def _loaded_patch(path, size):
    """The same from a file, at its own size."""
    pattern = poison.read_pattern(path)
    if len(pattern) == 4:
        return pattern[:3], pattern[3:]
    if pattern.shape[1:] == (size, size):
        raise ConfigError(
            f"the patch {path} covers the whole image: give it an alpha channel or crop it"
        )
    return pattern, torch.ones(1, *pattern.shape[1:])


def _first_pixel(start, length, size, axis):
    """The row or column where a patch of `length` pixels begins; by default it ends at the edge."""
    if start is None:
        start = size - length
    elif start < 0:
        start += size
    if not 0 <= start <= size - length:
        raise ConfigError(
            f"the patch does not fit: {length} pixels from {axis} {start} in an image of {size}; "
            f"change --patch_size or --patch_{axis}"
        )
    return start


def main(config):
    run.attack(__name__, config, make_trigger)
