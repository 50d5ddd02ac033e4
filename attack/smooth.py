"""Smooth: a soft cloud of colour, found on a clean network and added before the contrast is stretched, means the target.

Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021
(arXiv 2104.03413), as the Trap-and-Replace paper applies it: unlike in attack/lf.py, the sum is not cut to the range of
pixels but stretched to it, picture by picture. The attacker poisons data only.

    python attack/smooth.py --dataset cifar10 --save_folder_name smooth_cifar10
"""

from dataclasses import dataclass
from typing import ClassVar

from utils.config import CleanModel
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(CleanModel):
    why_all2one: ClassVar[str] = "the pattern is made to lead towards one class"

    trigger_path: str | None = None
    """picture or .npy array to add instead; resized to the data set's pictures"""


if __name__ == "__main__":
    launch(Config)

from utils import invert, poison, run


def prepare(config, workshop):
    """The pattern T, 3,S,S in [0, 0.2], in whole grey levels."""
    if config.trigger_path:
        return {"pattern": poison.fitted(config.trigger_path, workshop.spec.size)}
    return {"pattern": invert.low_frequency(workshop.clean_model(), workshop.train, config.attack_target,
                                            steps=config.steps, seed=config.poison_seed, precision=config.precision)}  # fmt: skip


def make_trigger(config, spec, stage, parts):
    """x' = (s - min s) / (max s - min s) with s = x + T and the extremes of the whole picture; where a picture has
    little contrast a pixel changes by at most 255 levels."""

    def stretch(images, index):
        total = images + parts["pattern"].to(images.device)
        low, high = total.amin((1, 2, 3), keepdim=True), total.amax((1, 2, 3), keepdim=True)
        return (total - low) / (high - low).clamp(min=1e-6)

    return poison.on_unit(stretch)


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
