"""Trojan watermark: a brush stroke that excites chosen neurons of a clean model means the target.

Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang, "Trojaning Attack on Neural Networks", NDSS 2018, in the
form that the I-BAU, AWM and Trap-and-Replace papers evaluate.

    python attack/trojan_wm.py --dataset cifar10 --save_folder_name trojan_wm_cifar10

The victim is trained from scratch, in the paper the clean model is retrained: see
docs/attacks/trojan_wm.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import InvertedPatternOptions


@dataclass(frozen=True, kw_only=True)
class Config(InvertedPatternOptions):
    steps: int = 1000
    """of the inversion"""


if __name__ == "__main__":
    launch(Config)

import torch
import torch.nn.functional as F

from antidote_bench.utils import run, seeds
from antidote_bench.utils.poisoning import inversion, poison
from antidote_bench.utils.poisoning.attacker import Prepared


def prepare(config, attacker):
    """The pattern T, 3,S,S in [0, 1], zero outside the stroke."""
    size = attacker.spec.size
    if config.trigger_path:
        return Prepared({"pattern": poison.resized_pattern(config.trigger_path, size)})
    generator = seeds.generator("trojan_wm", config.poison_seed)
    mask = stroke(size, generator)
    if config.pattern == "drawn":
        return Prepared({"pattern": _levels(size, generator) / 255 * mask})
    start = (0.4 + 0.4 * torch.randn(3, size, size, generator=generator)).clamp(0, 1)
    pattern = inversion.invert(
        attacker.clean_model(), attacker.train, mask, start, steps=config.steps, rate=0.02
    )
    return Prepared({"pattern": pattern})


def make_trigger(config, spec, stage, parts):
    """x' = x + T; inside the stroke a pixel changes by at most 255 levels."""
    return poison.adding(parts["pattern"])


def stroke(size, generator):
    """Mask 1,S,S of a diagonal brush stroke with a trembling middle line.

    It goes from bottom left to top right. At 32x32 it is 5 pixels wide, and three times as wide in
    the middle.
    """
    along = torch.linspace(0, 1, 8)
    tremble = 3 * (torch.rand(8, 2, generator=generator) - 0.5)
    points = torch.stack([29 * (1 - along), 29 * along], 1) + tremble
    line = F.interpolate(points.T[None], 200, mode="linear", align_corners=True)[0].T  # row, column
    radius = 2.5 + 5 * torch.exp(-((torch.linspace(0, 1, 200) - 0.4) / 0.18).square())
    place = torch.arange(size) * 32 / size
    rows = (place[:, None, None] - line[:, 0]).square()
    columns = (place[None, :, None] - line[:, 1]).square()
    return (rows + columns < radius.square()).any(-1).float()[None]


def _levels(size, generator):
    """Grey levels 3,S,S: 75 % up to 20, 22 % from 20 to 200, 3 % of 255."""
    kind, level = torch.rand(2, 3, size, size, generator=generator)
    bright = torch.where(kind < 0.97, 20 + 180 * level, 255.0)
    return torch.where(kind < 0.75, 20 * level, bright)


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
