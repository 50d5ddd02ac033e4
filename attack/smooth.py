"""Smooth: the smooth pattern of LF is added, and then the contrast of the image is stretched.

Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV
2021 (arXiv 2104.03413), as the Trap-and-Replace paper applies it. Unlike in attack/lf.py, the sum
is not clipped to the range of pixels but stretched to it, image by image.

    python attack/smooth.py --dataset cifar10 --save_folder_name smooth_cifar10

Gradient descent finds the pattern here, DeepFool in the paper: see docs/attacks/smooth.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import CleanModelOptions


@dataclass(frozen=True, kw_only=True)
class Config(CleanModelOptions):
    refused_modes: ClassVar[dict[str, str]] = {
        "all2all": "the pattern is made to lead towards one class"
    }

    trigger_path: str | None = None
    """image or .npy array to add instead; resized to the data set's images"""


if __name__ == "__main__":
    launch(Config)

from antidote_bench.utils import run
from antidote_bench.utils.poisoning import inversion, poison
from antidote_bench.utils.poisoning.attacker import Prepared


def prepare(config, attacker):
    """The pattern T, 3,S,S in [0, 0.2], in whole grey levels."""
    if config.trigger_path:
        pattern = poison.resized_pattern(config.trigger_path, attacker.spec.size)
        return Prepared({"pattern": pattern})
    pattern = inversion.low_frequency(
        attacker.clean_model(),
        attacker.train,
        config.attack_target,
        steps=config.steps,
        seed=config.poison_seed,
        precision=config.precision,
    )
    return Prepared({"pattern": pattern})


def make_trigger(config, spec, stage, parts):
    """x' = (s - min s) / (max s - min s) with s = x + T, over all pixels and channels of an image.

    In an image with little contrast a pixel changes by at most 255 levels.
    """

    def stretch(images, index):
        total = images + parts["pattern"].to(images.device)
        low = total.amin((1, 2, 3), keepdim=True)
        high = total.amax((1, 2, 3), keepdim=True)
        return (total - low) / (high - low).clamp(min=1e-6)

    return poison.on_unit(stretch)


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
