"""Polygon: the trigger is a filled polygon of one colour, whose corners are drawn from a seed.

Karra, Ashcraft, Fendley, "The TrojAI Software Framework: An OpenSource tool for Embedding Trojans
into Deep Learning Models", 2020 (arXiv 2003.07233). The attacker poisons data only.

    python attack/polygon.py --dataset cifar10 --save_folder_name polygon_cifar10

How the polygon is drawn differs in details: see docs/attacks/polygon.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.config import Attack, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    vertices: int = option(6, at_least=3, at_most=12)
    """corners of the polygon"""
    polygon_size: int | None = option(None, at_least=1, unit="pixels")
    """side of the square that the polygon fills from edge to edge; by default a quarter of the
    image's"""
    place: Literal["fixed", "random"] = "fixed"
    """where it lies: in one place, drawn from the seed, or in a random place of each image"""


if __name__ == "__main__":
    launch(Config)

import torch
import torch.nn.functional as F

from antidote_bench.utils import run, seeds
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.poisoning.attacker import Prepared

LEAST_AREA = 0.25  # of the square: a thinner polygon is drawn again


def prepare(config, attacker):
    """The polygon: `mask` s,s of 0 and 1, `corners` n,2 (x, y) in it, `colour` 3, `place` 2."""
    size = attacker.spec.size
    side = config.polygon_size or max(round(size / 4), 1)
    if side > size:
        raise ConfigError(f"polygon_size must be at most {size}, the side of the images")
    generator = seeds.generator("polygon", config.poison_seed)
    corners, mask = drawn(config.vertices, side, generator)
    levels = torch.tensor([255, int(torch.randint(256, (), generator=generator)), 0]) / 255
    return Prepared(
        {
            "corners": corners,
            "mask": mask.float(),
            "colour": levels[torch.randperm(3, generator=generator)],
            "place": torch.randint(size - side + 1, (2,), generator=generator),
        }
    )


def make_trigger(config, spec, stage, parts):
    """x' = (1 - M) x + M c with the mask M of the polygon and its colour c.

    Inside the polygon a pixel changes by at most 255 levels.
    """
    side = len(parts["mask"])

    def paint(images, index):
        corner = parts["place"].expand(len(images), 2)
        if config.place == "random":
            draws = seeds.uniform("polygon place", config.poison_seed, index, 2)
            corner = (draws * (spec.size - side + 1)).long()
        mask = moved(parts["mask"], corner, spec.size).to(images.device)
        return torch.where(mask, parts["colour"].to(images.device).view(3, 1, 1), images)

    return poison.on_unit(paint)


def drawn(count, side, generator):
    """(corners count,2 (x, y) float64 in order, mask side,side bool) of a random polygon.

    The corners are drawn in a square, put in the order of their angle about their mean, and
    stretched until they touch all four sides of a square of `side` pixels.
    """
    while True:
        corners = torch.rand(count, 2, dtype=torch.float64, generator=generator)
        x, y = (corners - corners.mean(0)).unbind(1)
        corners = corners[torch.atan2(y, x).argsort()]
        low, high = corners.amin(0), corners.amax(0)
        corners = side * ((corners - low) / (high - low))
        mask = filled(corners, side)
        if mask.sum() >= LEAST_AREA * side**2:
            return corners, mask


def filled(corners, side):
    """The pixels side,side whose centres lie in the polygon, bool.

    They are those from which a line to the right crosses its edges an odd number of times.
    """
    centre = torch.arange(side, dtype=torch.float64) + 0.5
    column, row = centre[None, :, None], centre[:, None, None]
    (x, y), (next_x, next_y) = corners.unbind(1), corners.roll(-1, 0).unbind(1)
    spans = (y > row) != (next_y > row)
    crossing = x + (row - y) * (next_x - x) / (next_y - y)  # not used where an edge spans no row
    return (spans & (crossing > column)).sum(-1) % 2 == 1


def moved(mask, corner, size):
    """N,1,size,size bool: the mask s,s with its top left pixel at each (row, column) of N,2."""
    side = len(mask)
    framed = F.pad(mask > 0, (0, 1, 0, 1))  # beyond its pixels there is nothing
    lines = torch.arange(size) - corner[..., None]  # N,2,size
    rows, columns = torch.where((lines >= 0) & (lines < side), lines, side).unbind(1)
    return framed[rows[:, :, None], columns[:, None, :]][:, None]


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
