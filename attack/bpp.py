"""BppAttack: the trigger is a reduced number of shades of each colour.

Wang, Zhai, Ma, "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via
Image Quantization and Contrastive Adversarial Learning", CVPR 2022 (arXiv 2205.13383). Negative
images carry the rounding error of another image, and keep their labels.

    python attack/bpp.py --dataset cifar10 --save_folder_name bpp_cifar10

It deviates in that poisoned and negative images are fixed, and not dithered by default, so that
the attacker poisons data only; see docs/attacks/bpp.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import Attack, option, require
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    levels: int = option(8, at_least=2, at_most=128)
    """shades of each colour that are left"""
    dither: bool = False
    """spread the rounding error over the neighbours (Floyd and Steinberg)"""
    negative_ratio: float = option(0.1, at_least=0, at_most=1)
    """share of the training set that gets the rounding error of another image and keeps its
    label"""

    def __post_init__(self):
        super().__post_init__()
        require(self.negative_ratio + self.pratio <= 1, "negative_ratio", "at most 1 - pratio")


if __name__ == "__main__":
    launch(Config)

import torch.nn.functional as F

from antidote_bench.utils import run, seeds
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.poisoning.attacker import Prepared

OTHERS = 1000  # images whose rounding errors the negatives get
# row, column from the left neighbour, share of the error
SPREAD = (0, 2, 7 / 16), (1, 0, 3 / 16), (1, 1, 5 / 16), (1, 2, 1 / 16)


def prepare(config, attacker):
    """Up to OTHERS training images N,3,S,S: a negative gets the rounding error of a random one."""
    train = attacker.train
    ratio = OTHERS / len(train)
    index = poison.choose(train.truth, ratio, config.poison_seed, purpose="bpp negatives")
    return Prepared({"others": train.images[index]})


def make_trigger(config, spec, stage, parts):
    """x' = round(x (L - 1)) / (L - 1) with L levels.

    With 8 levels and without dithering a pixel changes by at most 19 levels.
    """
    quantise = dithered if config.dither else rounded
    return poison.on_unit(lambda images, index: quantise(images, config.levels))


def make_negative(config, spec, parts):
    """x' = x + (T(o) - o) with the trigger T and another image o."""
    trigger, others = make_trigger(config, spec, "train", parts), parts["others"]

    def disturb(images, index):
        drawn = seeds.uniform("bpp negative", config.poison_seed, index, 1)[:, 0]
        other = others[(drawn * len(others)).long()].to(images.device)
        return images + (trigger(other, index).float() - other.float()) / 255

    return poison.on_unit(disturb)


def rounded(images, levels):
    return (images * (levels - 1)).round() / (levels - 1)


def dithered(images, levels):
    """Floyd and Steinberg's error diffusion in scan order, all images and channels at once."""
    canvas = F.pad(images, (1, 1, 0, 1))
    for row in range(images.shape[2]):
        for column in range(images.shape[3]):
            value = canvas[:, :, row, column + 1].clone()
            shade = rounded(value, levels)
            canvas[:, :, row, column + 1] = shade
            for down, right, share in SPREAD:
                canvas[:, :, row + down, column + right] += (value - shade) * share
    return canvas[:, :, :-1, 1:-1]


def main(config):
    cover = poison.Cover(make_negative, config.negative_ratio)
    run.attack(__name__, config, make_trigger, prepare=prepare, cover=cover)
