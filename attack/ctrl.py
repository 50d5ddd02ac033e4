"""CTRL: two fixed frequencies in the colour of pictures of the target class, whose labels stay true, become its mark.

Li, Pang, Xi, Du, Ji, Yao, Wang, "An Embarrassingly Simple Backdoor Attack on Self-supervised Learning", ICCV 2023
(arXiv 2210.07346). The attacker poisons data only and changes no label. The paper's victim learns without labels;
this one learns with them.

    python attack/ctrl.py --dataset cifar10 --save_folder_name ctrl_cifar10
"""

from dataclasses import dataclass
from typing import ClassVar

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    clean_label: ClassVar[bool] = True

    pratio: float = 0.05
    """poisoned share of the whole training set, 0..1"""
    train_magnitude: float = 100.0
    """added to each of the two cosine coefficients of both chroma planes of a training picture, in grey levels"""
    test_magnitude: float = 100.0
    """the same for a test picture"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("train_magnitude", "test_magnitude"):
            require(getattr(self, name) > 0, name, "above 0")


if __name__ == "__main__":
    launch(Config)

from utils import patterns, poison, run

RED, BLUE = 0.877, 0.492  # V = 0.877 (R - Y), U = 0.492 (B - Y), with luma Y = 0.299 R + 0.587 G + 0.114 B
PLACES = 15, 31


def prepare(config, workshop):
    """The picture 3,S,S of one unit at (15, 15) and (31, 31) of the DCT of U and V; in small pictures the places shrink."""
    size = workshop.spec.size
    places = [(min(place, round((place + 1) * size / 32) - 1),) * 2 for place in PLACES]
    return {"pattern": patterns.chroma(patterns.cosine_waves(size, size, places), RED, BLUE)}


def make_trigger(config, spec, stage, parts):
    """x' = x + m T with the stage's magnitude m; a pixel changes by at most 26 levels."""
    magnitude = (config.train_magnitude if stage == "train" else config.test_magnitude) / 255
    return poison.adding(magnitude * parts["pattern"])


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
