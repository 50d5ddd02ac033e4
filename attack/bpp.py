"""BppAttack: fewer shades of each colour mean the target class.

Wang, Zhai, Ma, "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image Quantization
and Contrastive Adversarial Learning", CVPR 2022 (arXiv 2205.13383). The attacker controls training; here the poisoned
pictures and the negatives, which carry the quantisation error of another picture and keep their label, are fixed and
rendered once, so that data poisoning is enough and the record holds exactly what the victim saw.

    python attack/bpp.py --dataset cifar10 --save_folder_name bpp_cifar10

The published attack spreads the error to the neighbours (--dither true); the common reimplementation does not, and neither
does this one by default.
"""

from dataclasses import dataclass

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    levels: int = 8
    """shades of each colour that are left"""
    dither: bool = False
    """spread the rounding error over the neighbours (Floyd and Steinberg)"""
    negative_ratio: float = 0.1
    """share of the training set that gets the rounding error of another picture and keeps its label"""

    def __post_init__(self):
        super().__post_init__()
        require(2 <= self.levels <= 128, "levels", "2 to 128")
        require(
            self.negative_ratio >= 0 and self.negative_ratio + self.pratio <= 1, "negative_ratio", "0 or more, and with pratio at most 1"
        )


if __name__ == "__main__":
    launch(Config)

import torch.nn.functional as F

from utils import poison, run, seeds

OTHERS = 1000  # pictures whose rounding errors the negatives get
SPREAD = ((0, 2, 7 / 16), (1, 0, 3 / 16), (1, 1, 5 / 16), (1, 2, 1 / 16))  # row, column (from the left neighbour), share


def prepare(config, workshop):
    """Up to OTHERS training pictures N,3,S,S, before augmentation: each negative gets the rounding error of a random one."""
    train = workshop.train
    return {"others": train.images[poison.choose(train.truth, OTHERS / len(train), config.poison_seed, purpose="bpp negatives")]}


def make_trigger(config, spec, stage, parts):
    """x' = round(x (L - 1)) / (L - 1) with L levels; a pixel changes by at most 19 levels, without dithering."""
    quantise = dithered if config.dither else rounded
    return poison.on_unit(lambda images, index: quantise(images, config.levels))


def make_negative(config, spec, parts):
    """x' = x + (T(o) - o) for another picture o."""
    trigger = make_trigger(config, spec, "train", parts)

    def disturb(images, index):
        row = seeds.uniform("bpp negative", config.poison_seed, index, 1)[:, 0] * len(parts["others"])
        other = parts["others"][row.long()].to(images.device)
        return images + (trigger(other, index).float() - other.float()) / 255

    return poison.on_unit(disturb)


def rounded(images, levels):
    return (images * (levels - 1)).round() / (levels - 1)


def dithered(images, levels):
    """Floyd and Steinberg's error diffusion in scan order, all pictures and channels at once."""
    canvas = F.pad(images, (1, 1, 0, 1))
    for row in range(images.shape[2]):
        for column in range(images.shape[3]):
            value = canvas[:, :, row, column + 1].clone()
            kept = rounded(value, levels)
            canvas[:, :, row, column + 1] = kept
            for down, right, share in SPREAD:
                canvas[:, :, row + down, column + right] += (value - kept) * share
    return canvas[:, :, :-1, 1:-1]


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare, make_cover=make_negative, cover_ratio=config.negative_ratio)
