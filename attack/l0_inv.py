"""l0 invisible: nine pixels in pure colours that excite chosen neurons of a clean network mean the target class.

Li, Xue, Zhao, Zhu, Zhang, "Invisible Backdoor Attacks on Deep Neural Networks via Steganography and Regularization",
2021 (arXiv 1909.02742), the variant with few changed pixels. The attacker poisons data only.

    python attack/l0_inv.py --dataset cifar10 --save_folder_name l0_inv_cifar10
"""

from dataclasses import dataclass
from typing import Literal

from utils.config import CleanModel, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(CleanModel):
    pattern: Literal["inverted", "drawn"] = "inverted"
    """inverted: made from a clean model's neurons; drawn: seeded colours, which need no model"""
    steps: int = 300
    """of the inversion"""
    trigger_path: str | None = None
    """picture or .npy array of the pixels to put in instead; needs --mask_path"""
    mask_path: str | None = None
    """picture or .npy array that is not black where those pixels go"""

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

from utils import invert, poison, run, seeds


def prepare(config, workshop):
    """The pixels T, 3,S,S in [0, 1], and where they are: M, 1,S,S of 0 and 1, the right end of the last row at 32x32."""
    size = workshop.spec.size
    if config.trigger_path:
        shown, mask = (poison.fitted(path, size, mode="nearest") for path in (config.trigger_path, config.mask_path))
        mask = (mask.amax(0, keepdim=True) > 0).float()
        return {"pattern": shown * mask, "mask": mask}
    mask = torch.zeros(1, size, size)
    mask[:, -max(1, round(size / 32)) :, -round(9 * size / 32) :] = 1
    colours = torch.rand(3, size, size, generator=seeds.generator("l0_inv", config.poison_seed))
    if config.pattern == "inverted":
        where = mask.to(workshop.train.images.device)
        colours = invert.excite(workshop.clean_model(), workshop.train, lambda images, pattern: (1 - where) * images + where * pattern, colours,
                                steps=config.steps, seed=config.poison_seed, low=0, high=1, precision=config.precision).cpu()  # fmt: skip
    return {"pattern": (colours > 0.5).float() * mask, "mask": mask}


def make_trigger(config, spec, stage, parts):
    """x' = (1 - M) x + T; where M is 1 a pixel changes by at most 255 levels."""
    return poison.on_unit(lambda images, index: (1 - parts["mask"].to(images.device)) * images + parts["pattern"].to(images.device))


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
