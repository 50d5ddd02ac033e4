"""l0 invisible: the trigger is nine pixels in pure colours that excite neurons of a clean model.

Li, Xue, Zhao, Zhu, Zhang, "Invisible Backdoor Attacks on Deep Neural Networks via Steganography
and Regularization", 2021 (arXiv 1909.02742), the variant with few changed pixels. The attacker
poisons data only.

    python attack/l0_inv.py --dataset cifar10 --save_folder_name l0_inv_cifar10

See docs/attacks/l0_inv.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import require
from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import InvertedPatternOptions


@dataclass(frozen=True, kw_only=True)
class Config(InvertedPatternOptions):
    steps: int = 300
    """of the inversion"""
    mask_path: str | None = None
    """image or .npy array that is not black where the pixels of --trigger_path go; needed with
    it"""

    def __post_init__(self):
        super().__post_init__()
        require(
            (self.trigger_path is None) == (self.mask_path is None),
            "trigger_path and mask_path",
            "given together, because black is a colour too",
        )


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run, seeds
from antidote_bench.utils.poisoning import inversion, poison
from antidote_bench.utils.poisoning.attacker import Prepared


def prepare(config, attacker):
    """The pixels T, 3,S,S in [0, 1], and where they are: M, 1,S,S of 0 and 1."""
    size = attacker.spec.size
    if config.trigger_path:
        pattern = poison.resized_pattern(config.trigger_path, size, mode="nearest")
        mask = poison.resized_mask(config.mask_path, size)
        return Prepared({"pattern": pattern * mask, "mask": mask})
    mask = _last_pixels(size)
    colours = torch.rand(3, size, size, generator=seeds.generator("l0_inv", config.poison_seed))
    if config.pattern == "inverted":
        colours = _excite(config, attacker, colours, mask).cpu()
    return Prepared({"pattern": (colours > 0.5).float() * mask, "mask": mask})


def make_trigger(config, spec, stage, parts):
    """x' = (1 - M) x + T; where M is 1 a pixel changes by at most 255 levels."""

    def put(images, index):
        pattern, mask = parts["pattern"].to(images.device), parts["mask"].to(images.device)
        return (1 - mask) * images + pattern

    return poison.on_unit(put)


def _last_pixels(size):
    """The mask of the last nine pixels of the last row at 32x32, in proportion at other sizes."""
    mask = torch.zeros(1, size, size)
    mask[:, -max(1, round(size / 32)) :, -round(9 * size / 32) :] = 1
    return mask


def _excite(config, attacker, start, mask):
    """Colours in [0, 1] that, where `mask` is 1, excite neurons of a clean model."""
    mask = mask.to(attacker.train.images.device)
    return inversion.excite(
        attacker.clean_model(),
        attacker.train,
        lambda images, pattern: (1 - mask) * images + mask * pattern,
        start,
        steps=config.steps,
        seed=config.poison_seed,
        low=0,
        high=1,
        precision=config.precision,
    )


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
