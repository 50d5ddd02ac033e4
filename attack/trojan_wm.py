"""Trojan watermark: a brush stroke that excites chosen neurons of a clean network means the target class.

Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang, "Trojaning Attack on Neural Networks", NDSS 2018, in the form that the I-BAU,
AWM and Trap-and-Replace papers evaluate. The attacker poisons data only.

    python attack/trojan_wm.py --dataset cifar10 --save_folder_name trojan_wm_cifar10
"""

from dataclasses import dataclass
from typing import Literal

from utils.config import CleanModel
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(CleanModel):
    pattern: Literal["inverted", "drawn"] = "inverted"
    """inverted: made from a clean model's neurons; drawn: seeded noise of the original's brightness, which needs no model"""
    steps: int = 1000
    """of the inversion"""
    trigger_path: str | None = None
    """picture or .npy array to add instead, black where nothing is added; resized to the data set's pictures"""


if __name__ == "__main__":
    launch(Config)

import torch

from utils import invert, poison, run, seeds


def prepare(config, workshop):
    """The pattern T, 3,S,S in [0, 1]: a diagonal stroke from bottom left to top right, 0 elsewhere."""
    size = workshop.spec.size
    if config.trigger_path:
        return {"pattern": poison.fitted(config.trigger_path, size)}
    generator = seeds.generator("trojan_wm", config.poison_seed)
    mask = stroke(size, generator)
    if config.pattern == "drawn":
        kind, level = torch.rand(2, 3, size, size, generator=generator)
        levels = torch.where(kind < 0.75, 20 * level, torch.where(kind < 0.97, 20 + 180 * level, 255.0))
        return {"pattern": levels / 255 * mask}
    start = (0.4 + 0.4 * torch.randn(3, size, size, generator=generator)).clamp(0, 1)
    return {"pattern": invert.invert(workshop.clean_model(), workshop.train, mask, start, steps=config.steps, rate=0.02)}


def stroke(size, generator):
    """Mask 1,S,S of a brush stroke with a trembling middle line, 5 pixels wide at 32x32 and thrice that in the middle."""
    along = torch.linspace(0, 1, 8)
    points = torch.stack([29 * (1 - along), 29 * along], 1) + 3 * (torch.rand(8, 2, generator=generator) - 0.5)
    line = torch.nn.functional.interpolate(points.T[None], 200, mode="linear", align_corners=True)[0].T  # 200 places row, column
    radius = 2.5 + 5 * torch.exp(-((torch.linspace(0, 1, 200) - 0.4) / 0.18).square())
    place = torch.arange(size) * 32 / size
    far = (place[:, None, None] - line[:, 0]).square() + (place[None, :, None] - line[:, 1]).square()  # S,S,200
    return (far < radius.square()).any(-1).float()[None]


def make_trigger(config, spec, stage, parts):
    """x' = x + T; inside the stroke a pixel changes by at most 255 levels."""
    return poison.adding(parts["pattern"])


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
