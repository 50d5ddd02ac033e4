"""Adversarial Neuron Pruning: perturb all channels adversarially, and prune the sensitive ones.

Wu, Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021 (arXiv
2110.14430). Every batch norm channel has a factor m in [0, 1] on its scale. Each step perturbs all
scales and shifts so that the loss rises, and then lowers alpha CE(m) + (1 - alpha) CE(m, perturbed)
by m. Channels whose m ends at or below a threshold are pruned.

    python defense/anp.py --result_file badnet_cifar10

Deviates in how the threshold is chosen: by held-out clean images; see docs/defenses/anp.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import SelectionOptions


@dataclass(frozen=True, kw_only=True)
class Config(SelectionOptions):
    adds: ClassVar[dict[str, str]] = {
        "mask.safetensors": "by batch norm the `factors` of its channels, and which were `pruned`",
        "choice.csv": "the thresholds that were measured, and which one was taken",
    }

    selection: Literal["val", "fixed", "oracle"] = "val"
    """val: choose the threshold by a fifth of the clean images, which are held out for that; fixed:
    take --threshold; oracle: choose it by the test set, as published tables did, and be marked for
    it in every table"""
    threshold: float = option(0.2, at_least=0, at_most=1)
    """largest factor of a pruned channel with --selection fixed"""
    steps: int = option(2000, at_least=0)
    """of the mask, rounded up to whole epochs on the clean images"""
    batch_size: int = option(128, at_least=1, unit="images")
    """images per step"""
    mask_lr: float = option(0.2, above=0)
    """learning rate of the mask"""
    alpha: float = option(0.2, at_least=0, at_most=1)
    """weight of the loss without perturbation; that of the other is 1 - alpha"""
    epsilon: float = option(0.4, at_least=0)
    """size of the random start, and of the way uphill from there, as a share of every scale and
    shift"""
    ascents: int = option(1, at_least=0)
    """gradient steps uphill, of epsilon / ascents each"""
    project: bool = False
    """cut the perturbations to [-epsilon, epsilon]; otherwise they reach twice that"""
    prune_shift: bool = False
    """set the shifts of pruned channels to zero too"""


if __name__ == "__main__":
    launch(Config)

import math
from functools import partial

import torch
import torch.nn.functional as F

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import batch_sizes
from antidote_bench.utils.repair import masks, selection
from antidote_bench.utils.repair.layers import batch_norms


def check(model, record, config):
    batch_norms(model)


def repair(model, record, config):
    mask = masks.Mask(model, batch_norms(model))
    work, held_out = selection.hold_out(record.clean, config)
    epochs = math.ceil(config.steps / len(batch_sizes(len(work), config.batch_size)))
    objective = partial(loss, config=config)
    factors = masks.learn(mask, model, work, objective, record, config, epochs=epochs)
    masks.prune(model, factors, held_out, record, config, shifts=config.prune_shift)
    record.report("pruned", model)
    return model


def loss(mask, images, labels, index, *, config):
    """alpha CE(m) + (1 - alpha) CE(m, perturbed) of a batch, on which the perturbation is found."""
    delta, xi = perturbation(mask, images, labels, config)
    perturbed = F.cross_entropy(mask.logits(images, mask.factors + delta, 1 + xi), labels)
    plain = F.cross_entropy(mask.logits(images, mask.factors), labels)
    return config.alpha * plain + (1 - config.alpha) * perturbed


def perturbation(mask, images, labels, config):
    """What is added to the factors of all scales and all shifts, 2,C: a random start led uphill."""
    factors = mask.factors.detach()
    # `fit` seeds the global generator
    start = 2 * torch.rand(2, len(factors), device=factors.device) - 1
    noise = start * config.epsilon
    for _ in range(config.ascents):
        noise.requires_grad_()
        value = F.cross_entropy(mask.logits(images, factors + noise[0], 1 + noise[1]), labels)
        (gradient,) = torch.autograd.grad(value, noise)
        noise = noise.detach() + config.epsilon / config.ascents * gradient.sign()
        if config.project:
            noise = noise.clamp(-config.epsilon, config.epsilon)
    return noise


def main(config):
    run.defend(__name__, config, repair, check=check)
