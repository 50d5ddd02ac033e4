"""CTRL: the trigger is two fixed frequencies in the colour of the image; labels stay true.

Li, Pang, Xi, Du, Ji, Yao, Wang, "An Embarrassingly Simple Backdoor Attack on Self-supervised
Learning", ICCV 2023 (arXiv 2210.07346). The attacker poisons data only, images of the target class.

    python attack/ctrl.py --dataset cifar10 --save_folder_name ctrl_cifar10

It deviates in the victim, which learns with labels; see docs/attacks/ctrl.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import Attack, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    clean_label: ClassVar[bool] = True

    pratio: float = 0.05
    """poisoned share of the whole training set"""
    train_magnitude: float = option(100.0, above=0)
    """added to each of the two cosine coefficients of both chroma planes of a training image, in
    grey levels"""
    test_magnitude: float = option(100.0, above=0)
    """the same for a test image"""


if __name__ == "__main__":
    launch(Config)

from antidote_bench.utils import run
from antidote_bench.utils.poisoning import patterns, poison
from antidote_bench.utils.poisoning.attacker import Prepared

# V = 0.877 (R - Y), U = 0.492 (B - Y), with luma Y = 0.299 R + 0.587 G + 0.114 B
RED, BLUE = 0.877, 0.492
PLACES = 15, 31  # row and column of the two coefficients at 32x32


def prepare(config, attacker):
    """The image 3,S,S of one unit at (15, 15) and (31, 31) of the DCT of U and V.

    It is the DCT of the whole image. In images below 32 pixels the places shrink with it.
    """
    size = attacker.spec.size
    places = [(min(place, round((place + 1) * size / 32) - 1),) * 2 for place in PLACES]
    wave = patterns.cosine_waves(size, size, places)
    return Prepared({"pattern": patterns.chroma(wave, RED, BLUE)})


def make_trigger(config, spec, stage, parts):
    """x' = x + m T with the stage's magnitude m.

    With the default magnitudes a pixel changes by at most 26 levels.
    """
    magnitude = (config.train_magnitude if stage == "train" else config.test_magnitude) / 255
    return poison.adding(magnitude * parts["pattern"])


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
