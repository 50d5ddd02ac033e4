"""FTrojan: two fixed frequencies, added to the colour of the whole picture, mean the target class.

Wang, Yao, Xu, An, Tong, Wang, "An Invisible Black-Box Backdoor Attack Through Frequency Domain", ECCV 2022
(arXiv 2111.10991). The attacker poisons data only.

    python attack/ftrojan.py --dataset cifar10 --save_folder_name ftrojan_cifar10

Colour conversion and cosine transform are linear, so the trigger is one picture that is added to every other.
"""

from dataclasses import dataclass

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    magnitude: float = 30.0
    """added to each of the two cosine coefficients of both chroma planes, in grey levels"""

    def __post_init__(self):
        super().__post_init__()
        require(self.magnitude > 0, "magnitude", "above 0")


if __name__ == "__main__":
    launch(Config)

from utils import patterns, poison, run

RED, BLUE = 0.713, 0.564  # Cr = 0.713 (R - Y), Cb = 0.564 (B - Y), with luma Y = 0.299 R + 0.587 G + 0.114 B


def prepare(config, workshop):
    """The picture 3,S,S that adding `magnitude` at two places of Cr and Cb of every 32x32 block amounts to, pixels in [0, 1].

    The places are (15, 15) and (31, 31); pictures below 32 pixels are one block, and the places shrink with it.
    """
    size = workshop.spec.size
    window = min(size, 32)
    wave = patterns.cosine_waves(size, window, [(window // 2 - 1,) * 2, (window - 1,) * 2])
    return {"pattern": patterns.chroma(wave * config.magnitude / 255, RED, BLUE)}


def make_trigger(config, spec, stage, parts):
    """x' = x + T; a pixel changes by at most 7 levels."""
    return poison.adding(parts["pattern"])


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
