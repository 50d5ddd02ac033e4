"""BATT: an image that is rotated by a fixed angle is taken for the target class.

Xu, Li, Jiang, Xia, "BATT: Backdoor Attack with Transformation-based Triggers", ICASSP 2023 (arXiv
2211.01806), its form with rotations. The attacker poisons data only.

    python attack/batt.py --dataset cifar10 --save_folder_name batt_cifar10

Benign images are rotated once, and only if asked: see docs/attacks/batt.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.config import Attack, option, require
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    pratio: float = 0.05
    """poisoned share of the whole training set"""
    angle: float = option(16.0, at_least=-180, at_most=180, unit="degrees")
    """by which a triggered image is rotated, counter-clockwise"""
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    """how a rotated image is sampled"""
    fill: Literal["zeros", "reflect"] = "zeros"
    """what its corners show: black, or the image mirrored"""
    benign_rotation: float = option(0.0, at_least=0, at_most=180, unit="degrees")
    """all other training images are rotated at random, by up to so many degrees either way, and
    keep their labels (0: they stay as they are)"""

    def __post_init__(self):
        super().__post_init__()
        require(self.angle != 0, "angle", "another one than 0, which changes nothing")


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run, seeds
from antidote_bench.utils.poisoning import poison

DECIMALS = 9  # of a sampling position: a quarter turn then meets its pixels exactly


def make_trigger(config, spec, stage):
    """Rotate every image by the same angle about its centre.

    At a hard edge a pixel changes by at most 255 levels.
    """
    angle = torch.tensor([config.angle], dtype=torch.float64)
    return poison.on_unit(
        lambda images, index: rotated(images, angle, config.interpolation, config.fill)
    )


def make_benign(config, spec):
    """Rotate every image by an angle of its own, at most config.benign_rotation either way."""

    def rotate(images, index):
        turn = 2 * seeds.uniform("benign rotation", config.poison_seed, index, 1)[:, 0].double() - 1
        angles = turn * config.benign_rotation
        return rotated(images, angles, config.interpolation, config.fill)

    return poison.on_unit(rotate)


def rotated(images, degrees, interpolation, fill):
    """Float images N,3,S,S rotated counter-clockwise by `degrees`, float64 of one angle or N."""
    size = images.shape[-1]
    centre = (size - 1) / 2
    across = torch.arange(size, dtype=torch.float64, device=images.device) - centre
    down = across[:, None]
    angle = degrees.to(images.device).deg2rad().view(-1, 1, 1)
    # where each pixel of the result comes from
    rows = (angle.sin() * across + angle.cos() * down + centre).round(decimals=DECIMALS)
    columns = (angle.cos() * across - angle.sin() * down + centre).round(decimals=DECIMALS)
    if interpolation == "nearest":
        return _pixels(images, (rows + 0.5).floor(), (columns + 0.5).floor(), fill)
    top, left = rows.floor(), columns.floor()
    result = torch.zeros_like(images)
    for row, high in ((top, 1 - (rows - top)), (top + 1, rows - top)):
        for column, wide in ((left, 1 - (columns - left)), (left + 1, columns - left)):
            share = (high * wide)[:, None].to(images.dtype)
            result = result + share * _pixels(images, row, column, fill)
    return result


def _pixels(images, rows, columns, fill):
    """The pixels of images N,3,S,S at whole positions N,S,S or 1,S,S, and beyond the border."""
    count, channels, size = images.shape[:3]
    if fill == "reflect":
        rows, columns = (size - 1 - (size - 1 - line.abs()).abs() for line in (rows, columns))
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    place = (rows.clamp(0, size - 1) * size + columns.clamp(0, size - 1)).long()
    place = place.flatten(1)[:, None].expand(count, channels, -1)
    return images.flatten(2).gather(2, place).view_as(images) * inside[:, None]


def main(config):
    cover = poison.Cover(make_benign, 1 - config.pratio) if config.benign_rotation else None
    run.attack(__name__, config, make_trigger, cover=cover)
