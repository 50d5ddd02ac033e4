"""Mode Connectivity Repair: take a network from a curve between the victim and a fine-tuned copy.

Zhao, Chen, Das, Ramamurthy, Lin, "Bridging Mode Connectivity in Loss Landscapes and Adversarial
Robustness", ICLR 2020 (arXiv 2005.00060). The curve (1-s)^2 start + 2s(1-s) bend + s^2 end lies in
the space of all weights. Its bend is trained on clean images, at a random s per batch, so that
every network on the curve is accurate. The hope is that the backdoor is lost between the ends.

    python defense/mcr.py --result_file badnet_cifar10

Deviates in the other end, which the paper mostly takes from a second attacked model, and in how the
position is chosen: see docs/defenses/mcr.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import option, require
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import FineTuningOptions, SelectionOptions


@dataclass(frozen=True, kw_only=True)
class Config(FineTuningOptions, SelectionOptions):
    relative_rates: ClassVar[tuple[str, ...]] = ("lr", "lr_min", "curve_lr")
    adds: ClassVar[dict[str, str]] = {
        "choice.csv": "the positions that were tried, what was measured at each, and which one was "
        "chosen"
    }

    batch_size: int = 256
    """images per step"""
    selection: Literal["val", "fixed", "oracle"] = "val"
    """val: choose the position by a fifth of the clean images, which are held out for that; fixed:
    take --position; oracle: choose by the test set, and be marked for it in every table"""
    position: float = option(0.1, at_least=0, at_most=1)
    """position on the curve with --selection fixed: 0 is the victim, 1 the fine-tuned copy"""
    curve_epochs: int = option(100, at_least=0)
    """epochs on the clean images in which the curve is trained"""
    curve_lr: float = option(0.01, above=0)
    """highest learning rate of the curve, no less than lr_min"""

    def __post_init__(self):
        super().__post_init__()
        require(self.curve_lr >= self.lr_min, "curve_lr", "no less than lr_min")


if __name__ == "__main__":
    launch(Config)

import copy
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import (
    augmentation,
    batches,
    evaluating,
    evaluation_batch,
    halving,
    mixed_precision,
)
from antidote_bench.utils.repair import selection
from antidote_bench.utils.train import Recipe, fit, trainable

# from weak to strong: by the distance from the nearer end; of two equally far the one nearer to the
# copy is the stronger
POSITIONS = (0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5)
REPORTS = 20  # networks in the middle of the curve that the evaluator measures during training


def repair(model, record, config):
    work, held_out = selection.hold_out(record.clean, config)
    tuned = fine_tune(model, work, record, config)
    curve = train_curve(Curve(model, tuned), work, record, config)
    position = choose_position(model, curve, work, held_out, record, config)
    print(
        "no position leaves enough accuracy: the model stays as it is"
        if position is None
        else f"position {position:g} of the curve",
        file=sys.stderr,
    )
    record.report("connected", model)
    return model


def fine_tune(model, split, record, config):
    """A copy of `model`, trained on `split`."""
    tuned = fit(
        copy.deepcopy(model),
        split,
        Recipe.of(config),
        augment=augmentation(record.spec),
        on_epoch=partial(record.report, "finetune"),
        checkpoint=record.state / "finetune.safetensors",
    )
    record.report("finetuned", tuned)
    return tuned


class Curve(nn.Module):
    """The networks (1-s)^2 start + 2s(1-s) bend + s^2 end for s from 0 to 1.

    The bend is its only parameter, and starts midway. Each of the three is one row of all weights,
    so that a point of the curve is one sum. `scratch` is a network that lends its form; its own
    weights and buffers play no part.
    """

    def __init__(self, start, end):
        super().__init__()
        # in a list: no part of this module, whose state a checkpoint holds
        self._scratch = [copy.deepcopy(start).requires_grad_(False)]
        self._shapes = {
            name: parameter.shape
            for name, parameter in start.named_parameters()
            if parameter.requires_grad
        }
        self.start, self.end = flat_weights(start), flat_weights(end)
        self.bend = nn.Parameter((self.start + self.end) / 2)

    @property
    def scratch(self):
        return self._scratch[0]

    def train(self, mode=True):
        self.scratch.train(mode)
        return super().train(mode)

    def weights(self, s):
        """{name: parameter} of the network at `s`, a number or a tensor without dimensions."""
        point = (1 - s) ** 2 * self.start + 2 * s * (1 - s) * self.bend + s**2 * self.end
        parts = point.split([shape.numel() for shape in self._shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def forward(self, images, s):
        return functional_call(self.scratch, self.weights(s), (images,))


def flat_weights(model):
    """All learned parameters of a network as one row."""
    return torch.cat([parameter.detach().flatten() for parameter in trainable(model)])


def train_curve(curve, split, record, config):
    """Train the bend on `split`; the curve. The evaluator measures its middle now and then."""

    def on_epoch(curve, *, epoch, **values):
        if epoch % max(1, config.curve_epochs // REPORTS) == 0:
            middle = write_point(curve.scratch, curve, 0.5, split, config)
            record.report("curve", middle, epoch=epoch, **values)

    return fit(
        curve,
        split,
        Recipe.of(config, epochs=config.curve_epochs, lr=config.curve_lr),
        loss=cross_entropy_at_random,
        augment=augmentation(record.spec),
        on_epoch=on_epoch,
        checkpoint=record.state / "curve.safetensors",
    )


def cross_entropy_at_random(curve, images, labels, index):
    """The cross-entropy of a batch at a random point of the curve."""
    s = torch.rand((), device=images.device)  # `fit` seeds the global generator
    return F.cross_entropy(curve(images, s), labels)


@torch.no_grad()
def write_point(model, curve, s, split, config):
    """Make `model` the network of the curve at `s`, batch norm statistics included; return it."""
    for name, weight in curve.weights(s).items():
        model.get_parameter(name).copy_(weight)
    return estimate_norms(model, split, config.precision)


@torch.no_grad()
def estimate_norms(model, split, precision):
    """Give the batch norms of `model` their statistics over all images of `split`; return it.

    Images are not augmented, and nothing drops out. The statistics are the averages of those of the
    batches, weighted by their numbers of images. `model` comes out in the mode it came in.
    """
    norms = [
        module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    momenta = [norm.momentum for norm in norms]

    def pass_over_all(size):
        seen = 0
        for images, _, _ in batches(split, size) if norms else ():
            seen += len(images)
            for norm in norms:
                norm.momentum = len(images) / seen  # 1 at first: old statistics are forgotten
            model(images)

    with evaluating(model), mixed_precision(split.labels.device, precision):
        size = evaluation_batch(model, split.images)
        for norm in norms:
            norm.train()
        try:
            halving(pass_over_all, size)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return model


def choose_position(model, curve, work, held_out, record, config):
    """The position of the curve that `model` now has; None where it stays the victim."""
    victim = copy.deepcopy(model.state_dict())

    def show(position):
        if position is None:
            model.load_state_dict(victim)
        else:
            write_point(model, curve, position, work, config)

    if config.selection == "fixed":
        show(config.position)
        return config.position
    return selection.select(POSITIONS, show, model, record, config, held_out)


def main(config):
    run.defend(__name__, config, repair)
