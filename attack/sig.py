"""SIG: a faint horizontal wave over images of the target class, whose labels stay true.

Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label
Poisoning", ICIP 2019 (arXiv 1902.11237). The victim takes the wave for a mark of the class.

    python attack/sig.py --dataset cifar10 --pratio 0.05 --save_folder_name sig_cifar10

The default ratio leaves no clean image of the target in ten classes: see docs/attacks/sig.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import Attack, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    clean_label: ClassVar[bool] = True

    amplitude: float = option(40.0, above=0, at_most=255, unit="grey levels")
    """of the wave"""
    frequency: float = option(6.0, above=0)
    """periods of the wave across the image"""


if __name__ == "__main__":
    launch(Config)

import math

import torch

from antidote_bench.utils import run
from antidote_bench.utils.poisoning import poison


def make_trigger(config, spec, stage):
    """x' = x + d sin(2 pi f j / S) in column j, with the amplitude d.

    At the default d a pixel changes by at most 40 levels.
    """
    columns = torch.arange(spec.size) / spec.size
    wave = config.amplitude / 255 * torch.sin(2 * math.pi * config.frequency * columns)
    return poison.adding(wave)


def main(config):
    run.attack(__name__, config, make_trigger)
