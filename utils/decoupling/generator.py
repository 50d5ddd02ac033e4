"""A network that changes images a little: a small U-Net, Ronneberger, Fischer, Brox, "U-Net:
Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015 (arXiv 1505.04597)."""

import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.utils.data.loader import clipped

LEVELS = 4
SMALL = 0.1  # of the usual weights, in the last layer of a new one


class UNet(nn.Module):
    """Images n,3,S,S in [0, 1] to such images; a new one changes little.

    What is added to an image is between -1 and 1, and the sum is cut to [0, 1]. The four levels
    have `width`, 2 `width`, 4 `width` and 8 `width` channels.
    """

    def __init__(self, width):
        super().__init__()
        channels = [width * 2**level for level in range(LEVELS)]
        self.down = nn.ModuleList(
            _block(before, after) for before, after in zip([3, *channels], channels, strict=False)
        )
        self.up = nn.ModuleList(
            _block(below + here, here)
            for below, here in zip(channels[:0:-1], channels[-2::-1], strict=True)
        )
        self.last = nn.Conv2d(width, 3, 1)
        self.last.weight.data *= SMALL
        nn.init.zeros_(self.last.bias)

    def forward(self, images):
        maps, seen = 2 * images - 1, []
        for level, block in enumerate(self.down):
            maps = block(maps if level == 0 else F.avg_pool2d(maps, 2, ceil_mode=True))
            seen.append(maps)
        for block, skipped in zip(self.up, seen[-2::-1], strict=True):
            maps = F.interpolate(maps, skipped.shape[-2:])
            maps = block(torch.cat([maps, skipped], 1))
        return clipped(images + self.last(maps).tanh())


def _block(before, after):
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(1, after), nn.ReLU())
