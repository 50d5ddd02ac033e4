"""Trojan square: a block of colours that excites chosen neurons of a clean network means the target class.

Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang, "Trojaning Attack on Neural Networks", NDSS 2018, in the form that the I-BAU,
AWM and Trap-and-Replace papers evaluate. The attacker poisons data only.

    python attack/trojan_sq.py --dataset cifar10 --save_folder_name trojan_sq_cifar10
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
    """The pattern T, 3,S,S in [0, 1]: 9x9 pixels from row and column 21 on at 32x32, 0 elsewhere."""
    size = workshop.spec.size
    if config.trigger_path:
        return {"pattern": poison.fitted(config.trigger_path, size)}
    generator = seeds.generator("trojan_sq", config.poison_seed)
    top, side = round(21 * size / 32), round(9 * size / 32)
    mask = torch.zeros(1, size, size)
    mask[:, top : top + side, top : top + side] = 1
    if config.pattern == "drawn":
        return {"pattern": ((98 + 140 * torch.randn(3, size, size, generator=generator)) / 255).clamp(0, 1) * mask}
    start = (0.4 + 0.4 * torch.randn(3, size, size, generator=generator)).clamp(0, 1)
    return {"pattern": invert.invert(workshop.clean_model(), workshop.train, mask, start, steps=config.steps, rate=0.02)}


def make_trigger(config, spec, stage, parts):
    """x' = x + T; inside the block a pixel changes by at most 255 levels."""
    return poison.adding(parts["pattern"])


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
