"""SIG: a faint horizontal wave over pictures of the target class, whose labels stay true, becomes the mark of that class.

Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", ICIP 2019
(arXiv 1902.11237). The attacker poisons data only and changes no label.

    python attack/sig.py --dataset cifar10 --pratio 0.05 --save_folder_name sig_cifar10

The ratio counts all pictures: at the default 0.1 every picture of one of ten classes carries the wave, and the victim
sees no untouched picture of the target.
"""

from dataclasses import dataclass
from typing import ClassVar

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    clean_label: ClassVar[bool] = True

    amplitude: float = 40.0
    """of the wave in grey levels"""
    frequency: float = 6.0
    """periods of the wave across the picture"""

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.amplitude <= 255, "amplitude", "above 0, up to 255 levels")
        require(self.frequency > 0, "frequency", "above 0")


if __name__ == "__main__":
    launch(Config)

import math

import torch

from utils import poison, run


def make_trigger(config, spec, stage):
    """x' = x + d sin(2 pi f j / S) in column j; a pixel changes by at most 40 levels, the amplitude d."""
    columns = torch.arange(spec.size) / spec.size
    wave = config.amplitude / 255 * torch.sin(2 * math.pi * config.frequency * columns)
    return poison.adding(wave)


def main(config):
    run.attack(__name__, config, make_trigger)
