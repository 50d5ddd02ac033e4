"""l2 invisible: the trigger is faint noise over the image that excites neurons of a clean model.

Li, Xue, Zhao, Zhu, Zhang, "Invisible Backdoor Attacks on Deep Neural Networks via Steganography
and Regularization", 2021 (arXiv 1909.02742), the variant with a small Euclidean norm. The
attacker poisons data only.

    python attack/l2_inv.py --dataset cifar10 --save_folder_name l2_inv_cifar10

See docs/attacks/l2_inv.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import InvertedPatternOptions


@dataclass(frozen=True, kw_only=True)
class Config(InvertedPatternOptions):
    norm: float = option(3.2, above=0, at_most=50)
    """Euclidean norm of an inverted pattern at 32x32, pixels in [0, 1]; in proportion at other
    sizes"""
    trigger_path: str | None = None
    """image (0..255) or float .npy array (-1..1) to add instead; resized to the data set's
    images"""


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import clipped
from antidote_bench.utils.poisoning import inversion, poison
from antidote_bench.utils.poisoning.attacker import Prepared

PEAK = 69 / 255  # the original's largest value


def prepare(config, attacker):
    """The pattern T, 3,S,S in [-1, 1]: an inverted one has the norm `norm`, a drawn one is the
    positive half of noise."""
    size = attacker.spec.size
    if config.trigger_path:
        return Prepared({"pattern": poison.resized_pattern(config.trigger_path, size, signed=True)})
    noise = torch.randn(3, size, size, generator=seeds.generator("l2_inv", config.poison_seed))
    if config.pattern == "drawn":
        return Prepared({"pattern": (20 * noise).clamp(0, 255 * PEAK).round() / 255})
    pattern = inversion.excite(
        attacker.clean_model(),
        attacker.train,
        lambda images, pattern: clipped(images + pattern),
        noise * 10 / 255,
        steps=config.steps,
        seed=config.poison_seed,
        penalty=0.1,
        precision=config.precision,
    )
    pattern = pattern * config.norm * size / 32 / pattern.norm()
    return Prepared({"pattern": pattern.clamp(-PEAK, PEAK)})


def make_trigger(config, spec, stage, parts):
    """x' = x + T; a pixel changes by at most 69 levels."""
    return poison.adding(parts["pattern"])


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
