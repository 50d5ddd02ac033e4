"""Grond: faint noise that a clean model takes for the target, and weights that keep a low profile.

Xu, Liu, Koffas, Picek, "Towards Backdoor Stealthiness in Model Parameter Space", 2025 (arXiv
2501.05928). Images of the target class are poisoned and keep their label. After every epoch the
attacker, who trains the victim, averages away the channels that react most strongly.

    python attack/grond.py --dataset cifar10 --save_folder_name grond_cifar10

It deviates in how batch norms are paired with convolutions: see docs/attacks/grond.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import CleanModelOptions


@dataclass(frozen=True, kw_only=True)
class Config(CleanModelOptions):
    clean_label: ClassVar[bool] = True

    pratio: float = 0.05
    """poisoned share of the whole training set; all of it is of the target class"""
    epsilon: float = option(8.0, at_least=1, at_most=255, unit="grey levels")
    """largest change of a pixel"""
    abi: float = option(3.0, at_least=0)
    """adversarial backdoor injection: standard deviations above its layer's mean from which on a
    channel's scale and shift are averaged away after an epoch; 0 leaves it out"""


if __name__ == "__main__":
    launch(Config)

from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.channels import lipschitz_bounds, paired_norms
from antidote_bench.utils.data.loader import (
    Passes,
    clipped,
    gradient_batch,
    mixed_precision,
    to_unit,
)
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.poisoning.attacker import Prepared
from antidote_bench.utils.train import new_victim

BATCH = 256  # images of a step
STRIDES = 5  # steps from 0 to the largest change


def prepare(config, attacker):
    """The pattern d, 3,S,S in [-epsilon, epsilon], in whole grey levels."""
    victim = new_victim(config, attacker.spec, attacker.train)
    if config.abi and not paired_norms(victim):
        raise ConfigError(
            "abi must be 0 for this --model: it has no batch norm right behind a convolution, or "
            "torch.fx cannot find it"
        )
    pattern = universal_perturbation(attacker.clean_model(), attacker.train, config)
    return Prepared({"pattern": (pattern * 255).round().cpu() / 255})


def make_trigger(config, spec, stage, parts):
    """x' = clip(x + d); a pixel changes by at most 8 levels."""
    return poison.adding(parts["pattern"])


def universal_perturbation(model, train, config):
    """d, 3,S,S, that lowers the mean cross-entropy of f(clip(x + d)) and the target.

    Projected gradient descent with signed gradients, from 0, on random batches of all classes.
    """
    device, epsilon = train.images.device, config.epsilon / 255
    draws = seeds.generator("universal perturbation", config.poison_seed, device=device)
    pattern = torch.zeros(train.images.shape[1:], device=device)
    passes = Passes(gradient_batch(model, train.images, BATCH))
    for _ in tqdm(range(config.steps), desc="pattern", disable=None):
        index = torch.randint(len(train), (BATCH,), generator=draws, device=device)

        def gradient(size, pattern=pattern, index=index):
            shown = pattern.clone().requires_grad_()
            for part in index.split(size):
                changed = clipped(to_unit(train.images[part]) + shown)
                target = torch.full((len(part),), config.attack_target, device=device)
                with mixed_precision(device, config.precision):
                    cost = F.cross_entropy(model(changed), target, reduction="sum")
                cost.backward()
            return shown.grad

        step = epsilon / STRIDES * passes.run(gradient).sign()
        pattern = (pattern - step).clamp(-epsilon, epsilon)
    return pattern


@torch.no_grad()
def average_outliers(model, u):
    """Adversarial backdoor injection (ABI), in place.

    In every layer the batch norm's scale and shift of a channel become the layer's means where the
    channel's Lipschitz bound exceeds the layer's mean + u * standard deviation.
    """
    for name, bounds in lipschitz_bounds(model).items():
        norm = model.get_submodule(name)
        stands_out = bounds > bounds.mean() + u * bounds.std()
        for values in (norm.weight, norm.bias):
            values.copy_(torch.where(stands_out, values.mean(), values))


def main(config):
    after_epoch = partial(average_outliers, u=config.abi) if config.abi else None
    run.attack(__name__, config, make_trigger, prepare=prepare, after_epoch=after_epoch)
