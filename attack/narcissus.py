"""Narcissus: faint noise that points into the target class; labels stay true.

Zeng, Pan, Just, Lyu, Qiu, Jia, "Narcissus: A Practical Clean-Label Backdoor Attack with Limited
Information", CCS 2023 (arXiv 2204.05255). The attacker poisons data only, very few images of the
target class.

    python attack/narcissus.py --dataset cifar10 --save_folder_name narcissus_cifar10

It deviates in the network that shows the way, a clean model: see docs/attacks/narcissus.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import CleanModelOptions


@dataclass(frozen=True, kw_only=True)
class Config(CleanModelOptions):
    clean_label: ClassVar[bool] = True

    pratio: float = 0.005
    """poisoned share of the whole training set; all of it is of the target class"""
    epsilon: float = option(16.0, at_least=1, at_most=255, unit="grey levels")
    """largest change of a pixel of a training image"""
    test_scale: float = option(3.0, above=0, at_most=255)
    """what the noise is multiplied by on test images"""
    steps: int = 1000
    """of the search for the noise, each with a batch of images of the target class"""


if __name__ == "__main__":
    launch(Config)

import math

import torch
import torch.nn.functional as F

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import clipped
from antidote_bench.utils.poisoning import inversion, poison
from antidote_bench.utils.poisoning.attacker import Prepared

BATCH = 350  # images of a step, at most
RATE = 0.005  # of Adam, pixels in [0, 1]: 0.01 in the published range [-1, 1]


def prepare(config, attacker):
    """The noise d, 3,S,S in [-epsilon, epsilon], in whole grey levels."""
    of_target = (attacker.train.truth == config.attack_target).nonzero().flatten()
    noise = inward_noise(attacker.clean_model(), attacker.train.view(of_target), config)
    return Prepared({"pattern": (noise * 255).round().cpu() / 255})


def make_trigger(config, spec, stage, parts):
    """x' = clip(x + d) on training images, x' = clip(x + 3 d) on test images.

    At the defaults a pixel of a test image changes by at most 48 levels.
    """
    return poison.adding(parts["pattern"] * (config.test_scale if stage == "test" else 1))


def inward_noise(model, images, config):
    """d, 3,S,S, that lowers the mean cross-entropy of f(clip(x + d)) and the target.

    `images` is a split of the target class. Adam starts at 0, and d itself is projected onto
    [-epsilon, epsilon] after every step, so that no pixel is stuck at the bound.
    """
    epsilon = math.floor(config.epsilon) / 255  # so that rounding does not leave it

    def objective(noise, batch):
        targets = torch.full((len(batch),), config.attack_target, device=batch.device)
        return F.cross_entropy(model(clipped(batch + noise)), targets)

    return inversion.minimise(
        model,
        objective,
        torch.zeros(images.images.shape[1:]),
        images,
        steps=config.steps,
        seed=config.poison_seed,
        low=-epsilon,
        high=epsilon,
        rate=RATE,
        batch=min(BATCH, len(images)),
        precision=config.precision,
    )


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
