"""NFT: learn a mask on the batch norms' scales with mixed images, and let deep layers change most.

Karim, Al Arafat, Khalid, Guo, Rahnavard, "Augmented Neural Fine-Tuning for Efficient Backdoor
Purification", ECCV 2024 (arXiv 2407.10052). A soft mask has few values, so that few clean images
are enough. Mixed pairs of images (MixUp) make up for the images that are not there.

    python defense/nft.py --result_file badnet_cifar10

Deviates in how the learning rate falls; the batch norms' statistics move in training, and an option
keeps them: see docs/defenses/nft.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import Defense, option, require
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    adds: ClassVar[dict[str, str]] = {
        "mask.safetensors": "by batch norm the `factors` of its channels"
    }

    statistics: Literal["moving", "frozen"] = "moving"
    """of batch norms. moving: images are normalised by their batch, and the statistics that the
    model keeps follow, as published; frozen: they stay, and the images are normalised by them"""
    steps: int = option(1000, at_least=0)
    """of the mask; more than 50 are rounded up to whole groups of equal size"""
    batch_size: int = option(128, at_least=2, unit="images")
    """images per step, drawn with replacement"""
    mask_lr: float = option(0.05, above=0)
    """highest learning rate of the mask"""
    mask_lr_min: float = option(0.02, at_least=0)
    """learning rate that the cosine falls to, at most the highest"""
    momentum: float = option(0.95, at_least=0, below=1)
    """of SGD"""
    penalty: float = option(1e-3, at_least=0)
    """weight of the mask's distance from 1, times the number of classes over that of the clean
    images"""
    lowest: float = option(0.8, at_least=0, at_most=1)
    """the factors of batch norm l, counted from 1, are at least this times exp(-decay l)"""
    decay: float = option(0.5, at_least=0)
    """how fast that falls with the depth"""

    def __post_init__(self):
        super().__post_init__()
        require(self.mask_lr_min <= self.mask_lr, "mask_lr_min", "at most mask_lr")

    @property
    def variant(self):
        """What tables call the run by, beside the method."""
        return None if self.statistics == "moving" else "frozen_bn"


if __name__ == "__main__":
    launch(Config)

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import augmentation
from antidote_bench.utils.repair.layers import batch_norms, frozen, require_batch_norms
from antidote_bench.utils.repair.unlearning import EvaluationMode
from antidote_bench.utils.train import Recipe, fit

GROUP = 50  # steps at one learning rate, after which there is a checkpoint


def repair(model, record, config):
    training, count = model.training, len(record.clean)
    masked = Masked(model, batch_norms(model), config)
    recipe = recipe_of(config)

    def order(_model, generator):
        size = (recipe.epoch_steps * recipe.batch_size,)
        return torch.randint(count, size, generator=generator, device=generator.device)

    with frozen(model):
        fit(
            EvaluationMode(masked) if config.statistics == "frozen" else masked,
            record.clean,
            recipe,
            loss=partial(mixed_loss, masked=masked, images_per_class=count / record.spec.classes),
            augment=augmentation(record.spec),
            order=order,
            after_step=masked.clamp,
            on_epoch=partial(record.report, "mask"),
            checkpoint=record.state / "mask.safetensors",
        )
    record.keep("mask.safetensors", masked.bake())
    record.report("masked", model)
    return model.train(training)


def recipe_of(config):
    """The training of the mask, in groups of equally many steps; an epoch is such a group."""
    groups = math.ceil(config.steps / GROUP)
    return Recipe.stage(
        config,
        epochs=groups,
        epoch_steps=math.ceil(config.steps / groups) if groups else 0,
        batch_size=config.batch_size,
        lr=config.mask_lr,
        lr_min=config.mask_lr_min,
        momentum=config.momentum,
        weight_decay=0.0,
    )


class Masked(nn.Module):
    """A network whose batch norms' scales are multiplied by learned factors, all in one row.

    The factors begin at 1 and stay within [lowest exp(-decay l), 1] for batch norm l of `norms`,
    {name: batch norm}, which is counted from 1.
    """

    def __init__(self, model, norms, config):
        super().__init__()
        self.model = model
        self._names = list(norms)
        self._sizes = [norm.num_features for norm in norms.values()]
        self._scales = torch.cat([norm.weight.detach() for norm in norms.values()])
        limits = [
            torch.full_like(norm.weight, config.lowest * math.exp(-config.decay * depth))
            for depth, norm in enumerate(norms.values(), start=1)
        ]
        self.lowest, self.penalty = torch.cat(limits).detach(), config.penalty
        self.factors = nn.Parameter(torch.ones_like(self._scales))

    def forward(self, images):
        scales = self.split(self._scales * self.factors)
        weights = {f"{name}.weight": scale for name, scale in scales.items()}
        return functional_call(self.model, weights, (images,))

    def split(self, row):
        """{batch norm: its values} of a row of values for all channels."""
        return dict(zip(self._names, row.split(self._sizes), strict=True))

    @torch.no_grad()
    def clamp(self):
        self.factors.clamp_(self.lowest, torch.ones_like(self.lowest))

    @torch.no_grad()
    def bake(self):
        """Multiply the scales of the network by the factors; {batch norm/factors: those of it}."""
        factors = self.split(self.factors.detach())
        for name, part in factors.items():
            self.model.get_submodule(name).weight.mul_(part)
        return {f"{name}/factors": part.clone() for name, part in factors.items()}


def mixed_loss(model, images, labels, index, *, masked, images_per_class):
    """The cross-entropy of mixed images, images n,3,S,S, and the penalty on the mask.

    Image i becomes λ x_i + (1 - λ) x_j with j drawn without replacement and one λ, uniform on
    [0, 1], for the batch: MixUp with Beta(1, 1). The labels' losses have the same weights.
    """
    # `fit` seeds the global generator
    share = torch.rand((), device=images.device)
    other = torch.randperm(len(images), device=images.device)
    logits = model(share * images + (1 - share) * images[other])
    loss = share * F.cross_entropy(logits, labels)
    loss = loss + (1 - share) * F.cross_entropy(logits, labels[other])
    distance = (1 - masked.factors).abs().sum()
    return loss + masked.penalty / images_per_class * distance


def main(config):
    run.defend(__name__, config, repair, check=require_batch_norms)
