"""FTrojan: the trigger is two fixed frequencies, added to the colour of every block of the image.

Wang, Yao, Xu, An, Tong, Wang, "An Invisible Black-Box Backdoor Attack Through Frequency Domain",
ECCV 2022 (arXiv 2111.10991). The attacker poisons data only.

    python attack/ftrojan.py --dataset cifar10 --save_folder_name ftrojan_cifar10

The conversions are linear, so one image is added to every other; see docs/attacks/ftrojan.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import Attack, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    magnitude: float = option(30.0, above=0)
    """added to each of the two cosine coefficients of both chroma planes, in grey levels"""


if __name__ == "__main__":
    launch(Config)

from antidote_bench.utils import run
from antidote_bench.utils.poisoning import patterns, poison
from antidote_bench.utils.poisoning.attacker import Prepared

# Cr = 0.713 (R - Y), Cb = 0.564 (B - Y), with luma Y = 0.299 R + 0.587 G + 0.114 B
RED, BLUE = 0.713, 0.564


def prepare(config, attacker):
    """The image T, 3,S,S: `magnitude` at (15, 15) and (31, 31) of the DCT of Cr and Cb.

    The DCT is that of every 32x32 block. An image below 32 pixels is one block, and the places
    shrink with it.
    """
    size = attacker.spec.size
    block = min(size, 32)
    wave = patterns.cosine_waves(size, block, [(block // 2 - 1,) * 2, (block - 1,) * 2])
    return Prepared({"pattern": patterns.chroma(wave * config.magnitude / 255, RED, BLUE)})


def make_trigger(config, spec, stage, parts):
    """x' = x + T; with the default magnitude a pixel changes by at most 7 levels."""
    return poison.adding(parts["pattern"])


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
