"""Triggers that are a small patch in the image, as options.PatchOptions describe it."""

import torch
import torch.nn.functional as F

from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.poisoning import poison

# read from the corner: white black white, black white black, white black black
GRID = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])


def pasting(config, size, disturb=None):
    """The trigger x' = (1 - M) x + M P for images of `size` pixels, with a patch P of opacity M.

    `disturb(patch, index)` gives each image a patch of its own, N,3,h,w, by default all have P,
    3,h,w.
    """
    patch, opacity = _patch(config, size)
    height, width = patch.shape[1:]
    top = _first_pixel(config.patch_row, height, size, "row")
    left = _first_pixel(config.patch_column, width, size, "column")

    def paste(images, index):
        mask, colours = opacity.to(images.device), patch.to(images.device)
        if disturb:
            colours = disturb(colours, index)
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
