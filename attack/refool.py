"""Refool: the reflection of another scene, as in a window pane, means the target class.

Liu, Ma, Bailey, Lu, "Reflection Backdoor: A Natural Backdoor Attack on Deep Neural Networks", ECCV
2020 (arXiv 2007.02343). The scenes are training images of other classes, or your own.

    python attack/refool.py --dataset cifar10 --save_folder_name refool_cifar10

Reflections are drawn at random, and labels change by default: see docs/attacks/refool.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import Attack, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    clean_label: bool = False
    """poison images of the target class only, which keep their label"""
    alpha: float | None = option(None, above=0, below=1)
    """weight of the image against the reflection; by default drawn from 0.55 to 0.95 for each
    image"""
    ghost_ratio: float = option(0.49, at_least=0, at_most=1)
    """share of images with a double reflection; the others have one out of focus"""
    scenes: int = option(200, at_least=1)
    """number of scenes that are reflected"""
    blend_size: int = option(64, at_least=8, at_most=1024, unit="pixels")
    """side at which images are mixed, rounded to a multiple of their own"""
    reflection_folder: str | None = None
    """folder of images to reflect instead"""


if __name__ == "__main__":
    launch(Config)

from pathlib import Path

import torch
import torch.nn.functional as F

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data import images as image_files
from antidote_bench.utils.data.loader import to_unit
from antidote_bench.utils.errors import MissingError
from antidote_bench.utils.poisoning import patterns, poison
from antidote_bench.utils.poisoning.attacker import Prepared

GAMMA = 2.2
PAPER_SIZE = 560  # side in pixels of the paper's images, for which its offsets and blur are given
CHUNK = 64  # images mixed at once
# the columns of the numbers that are drawn for every image
SCENE, KIND, RIGHT, DOWN, WHICH_SHARE, SHARE, SIGMA, ALPHA, ROW, COLUMN = range(10)


def prepare(config, attacker):
    """The scenes uint8 N,3,S,S."""
    if config.reflection_folder:
        return Prepared({"scenes": _read_scenes(config, attacker.spec.size)})
    train = attacker.train
    index = poison.choose(
        train.truth,
        config.scenes / len(train),
        config.poison_seed,
        among=train.truth != config.attack_target,
        purpose="refool scenes",
    )
    return Prepared({"scenes": train.images[index]})


def make_trigger(config, spec, stage, parts):
    """x' = (a x^g + R)^(1/g) with the reflection R of a scene and g = 2.2.

    A pixel changes by at most 255 levels.
    """
    side = spec.size * max(1, round(config.blend_size / spec.size))

    def reflect(images, index):
        # for every position of the split: all that is random about its reflection
        draws = seeds.uniform("refool", config.poison_seed, index, 10)
        which = (draws[:, SCENE] * len(parts["scenes"])).long().to(images.device)
        draws = draws.to(images.device)
        # enlarged once, because every scene is reflected many times
        scenes = to_light(to_unit(parts["scenes"].to(images.device)), side)
        mixed = [
            _mix(config, images[part], scenes[which[part]], draws[part], side)
            for part in torch.arange(len(images)).split(CHUNK)
        ]
        return torch.cat(mixed)

    return poison.on_unit(reflect)


def _read_scenes(config, size):
    """The first images of a folder; files whose names begin with a dot are none."""
    suffixes = {*image_files.extensions(), ".npy"}
    files = sorted(
        path
        for path in Path(config.reflection_folder).glob("[!.]*")
        if path.suffix.lower() in suffixes
    )
    if not files:
        raise MissingError(
            f"there are no images in {config.reflection_folder}; --reflection_folder must name a "
            "folder of images or .npy files"
        )
    scenes = [poison.resized_pattern(path, size) for path in files[: config.scenes]]
    return (torch.stack(scenes) * 255).round().to(torch.uint8)


def to_light(images, side):
    """Images enlarged to `side` pixels, as amounts of light instead of grey levels."""
    return F.interpolate(images, (side, side), mode="bilinear").clamp(0, 1) ** GAMMA


def _mix(config, images, scenes, draws, side):
    """Images N,3,S,S under the reflections of N scenes, which are given as light."""
    light = to_light(images, side)
    if config.alpha is None:
        alpha = 0.55 + 0.4 * draws[:, ALPHA]
    else:
        alpha = torch.full_like(draws[:, ALPHA], config.alpha)
    alpha = alpha.view(-1, 1, 1, 1)
    mixed = alpha * light
    double = draws[:, KIND] < config.ghost_ratio
    for of_this_kind, reflection in ((double, ghost), (~double, unfocused)):
        rows = of_this_kind.nonzero().flatten()
        if len(rows):
            mixed[rows] += reflection(scenes[rows], light[rows], alpha[rows], draws[rows])
    return F.interpolate(mixed.clamp(0, 1) ** (1 / GAMMA), images.shape[2:], mode="area")


def ghost(scenes, light, alpha, draws):
    """A double reflection: (1 - alpha) (s R + (1 - s) R shifted).

    The shift is 3 to 8 of 560 pixels to the right and down, with zeros coming in. s is u or
    |1 - u|, with u from 0.15 to 0.5.
    """
    share = 0.15 + 0.35 * draws[:, SHARE] - (draws[:, WHICH_SHARE] < 0.5).float()
    share = share.abs().view(-1, 1, 1, 1)
    # in the units of affine_grid, where the image is 2 wide
    shift = -2 * (3 + (6 * draws[:, [RIGHT, DOWN]]).floor()) / PAPER_SIZE
    moves = torch.eye(2, 3, device=scenes.device).repeat(len(scenes), 1, 1)
    moves[:, :, 2] = shift
    grid = F.affine_grid(moves, list(scenes.shape), align_corners=False)
    moved = F.grid_sample(scenes, grid, align_corners=False)
    return (1 - alpha) * (share * scenes + (1 - share) * moved)


def unfocused(scenes, light, alpha, draws):
    """A reflection out of focus: blurred, darkened where the sum would be too bright, vignetted.

    The blur is 1 to 5 of 560 pixels. The vignette is a Gaussian with a random centre.
    """
    side = scenes.shape[-1]
    sigma = (1 + 4 * draws[:, SIGMA]) * side / PAPER_SIZE
    soft = patterns.blur(scenes, sigma, radius=-(-15 * side // PAPER_SIZE))
    total = soft + light
    over = total > 1
    count = over.sum((2, 3), keepdim=True).clamp(min=1)
    excess = ((total - 1) * over).sum((2, 3), keepdim=True) / count
    line = torch.linspace(0, 1, side, device=scenes.device)
    row, column = (
        torch.exp(-0.5 * ((line - 0.25 - 0.5 * draws[:, centre, None]) * 6) ** 2)
        for centre in (ROW, COLUMN)
    )
    vignette = row[:, None, :, None] * column[:, None, None, :]
    return (soft - 1.1 * excess).clamp(0, 1) * vignette * (1 - alpha / 2)


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
