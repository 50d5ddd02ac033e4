"""l2 invisible: faint noise over the whole picture that excites chosen neurons of a clean network means the target class.

Li, Xue, Zhao, Zhu, Zhang, "Invisible Backdoor Attacks on Deep Neural Networks via Steganography and Regularization",
2021 (arXiv 1909.02742), the variant with a small Euclidean norm. The attacker poisons data only.

    python attack/l2_inv.py --dataset cifar10 --save_folder_name l2_inv_cifar10
"""

from dataclasses import dataclass
from typing import Literal

from utils.config import CleanModel, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(CleanModel):
    pattern: Literal["inverted", "drawn"] = "inverted"
    """inverted: made from a clean model's neurons; drawn: the positive half of seeded noise, which needs no model"""
    norm: float = 3.2
    """Euclidean norm of an inverted pattern at 32x32, pixels in [0, 1]; in proportion at other sizes"""
    trigger_path: str | None = None
    """picture (0..255) or float .npy array (-1..1) to add instead; resized to the data set's pictures"""

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.norm <= 50, "norm", "above 0, up to 50")


if __name__ == "__main__":
    launch(Config)

import torch

from utils import invert, poison, run, seeds

PEAK = 69 / 255  # the original's largest value


def prepare(config, workshop):
    """The pattern T, 3,S,S in [-1, 1]."""
    size = workshop.spec.size
    if config.trigger_path:
        return {"pattern": poison.fitted(config.trigger_path, size, signed=True)}
    noise = torch.randn(3, size, size, generator=seeds.generator("l2_inv", config.poison_seed))
    if config.pattern == "drawn":
        return {"pattern": (20 * noise).clamp(0, 255 * PEAK).round() / 255}
    model = workshop.clean_model()
    found = invert.excite(model, workshop.train, lambda images, pattern: (images + pattern).clamp(0, 1), noise * 10 / 255,
                          steps=config.steps, seed=config.poison_seed, penalty=0.1, precision=config.precision)  # fmt: skip
    return {"pattern": (found * config.norm * size / 32 / found.norm()).clamp(-PEAK, PEAK)}


def make_trigger(config, spec, stage, parts):
    """x' = x + T; a pixel changes by at most 69 levels."""
    return poison.adding(parts["pattern"])


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
