"""Trojan square: a block of colours that excites chosen neurons of a clean model means the target.

Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang, "Trojaning Attack on Neural Networks", NDSS 2018, in the
form that the I-BAU, AWM and Trap-and-Replace papers evaluate.

    python attack/trojan_sq.py --dataset cifar10 --save_folder_name trojan_sq_cifar10

The victim is trained from scratch, in the paper the clean model is retrained: see
docs/attacks/trojan_sq.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import InvertedPatternOptions


@dataclass(frozen=True, kw_only=True)
class Config(InvertedPatternOptions):
    steps: int = 1000
    """of the inversion"""


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run, seeds
from antidote_bench.utils.poisoning import inversion, poison
from antidote_bench.utils.poisoning.attacker import Prepared


def prepare(config, attacker):
    """The pattern T, 3,S,S in [0, 1], zero outside the block."""
    size = attacker.spec.size
    if config.trigger_path:
        return Prepared({"pattern": poison.resized_pattern(config.trigger_path, size)})
    generator = seeds.generator("trojan_sq", config.poison_seed)
    mask = block(size)
    noise = torch.randn(3, size, size, generator=generator)
    if config.pattern == "drawn":
        return Prepared({"pattern": ((98 + 140 * noise) / 255).clamp(0, 1) * mask})
    start = (0.4 + 0.4 * noise).clamp(0, 1)
    pattern = inversion.invert(
        attacker.clean_model(), attacker.train, mask, start, steps=config.steps, rate=0.02
    )
    return Prepared({"pattern": pattern})


def make_trigger(config, spec, stage, parts):
    """x' = x + T; inside the block a pixel changes by at most 255 levels."""
    return poison.adding(parts["pattern"])


def block(size):
    """Mask 1,S,S of 9x9 pixels from row and column 21 on at 32x32, and in proportion elsewhere."""
    top, side = round(21 * size / 32), round(9 * size / 32)
    mask = torch.zeros(1, size, size)
    mask[:, top : top + side, top : top + side] = 1
    return mask


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
