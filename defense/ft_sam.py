"""FT-SAM: fine-tune with sharpness-aware minimization, which shrinks the backdoor's large weights.

Zhu, Wei, Shen, Fan, Wu, "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
Minimization", ICCV 2023 (arXiv 2304.11823). Every step takes the gradient at weights that were
moved uphill on the loss. Larger weights are moved further.

    python defense/ft_sam.py --result_file badnet_cifar10

Deviates from the authors' code in the learning rate schedule and in what batch norms learn from;
see docs/defenses/ft_sam.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.config import option, require
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import FineTuningOptions


@dataclass(frozen=True, kw_only=True)
class Config(FineTuningOptions):
    batch_size: int = 256
    """images per step"""
    rho: float = option(2.0, at_least=0)
    """radius of the ball in which the weights are moved, in units of their own size; 0 is plain
    fine-tuning"""
    label_smoothing: float = option(0.1, at_least=0, below=1)
    """share of a label that is spread over other classes"""
    smoothing: Literal["others", "all"] = option("others", absent="all")
    """others: over the classes other than the label, as published; all: over all of them"""


if __name__ == "__main__":
    launch(Config)

from functools import partial

import torch
from torch.func import functional_call

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import augmentation
from antidote_bench.utils.train import Recipe, cross_entropy, fit


def check(model, record, config):
    over_all_classes(config, record.spec.classes)


def repair(model, record, config):
    smoothing = over_all_classes(config, record.spec.classes)
    loss = partial(sharpness_aware, rho=config.rho, label_smoothing=smoothing)
    return fit(
        model,
        record.clean,
        Recipe.of(config),
        loss=loss,
        augment=augmentation(record.spec),
        on_epoch=partial(record.report, "finetune"),
        checkpoint=record.state / "finetune.safetensors",
    )


def over_all_classes(config, classes):
    """The label smoothing as a share that is spread over all classes, the label among them.

    A share s over the K - 1 others is s K / (K - 1) over all K.
    """
    if config.smoothing == "all":
        return config.label_smoothing
    limit = 1 - 1 / classes  # here all classes are equally likely
    words = f"at most {limit:g} with {classes} classes, unless --smoothing is all"
    require(config.label_smoothing <= limit, "label_smoothing", words)
    return min(config.label_smoothing / limit, 1.0)


def sharpness_aware(model, images, labels, index, *, rho, label_smoothing=0.0):
    """The cross-entropy at w + e; images n,3,S,S, labels n.

    Its gradient with respect to w is the gradient at w + e, because e is a constant. The first
    forward pass, which finds e, updates the model's buffers; the second works on copies of them.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss = cross_entropy(model, images, labels, index, label_smoothing)
    with torch.autocast(images.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    moves = uphill([weight.detach() for weight in weights.values()], gradients, rho)
    moved = {
        name: weight + move for (name, weight), move in zip(weights.items(), moves, strict=True)
    }
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    moved_model = partial(functional_call, model, {**moved, **buffers})
    return cross_entropy(moved_model, images, labels, index, label_smoothing)


def uphill(weights, gradients, rho):
    """e = rho w^2 g / || |w| g || for every tensor, where the norm is that of all of them together.

    It is 0 where the gradient is 0.
    """
    scaled = torch._foreach_mul(weights, gradients)
    length = torch.stack(torch._foreach_norm(scaled)).norm().clamp(min=1e-12)
    return [weight * part * (rho / length) for weight, part in zip(weights, scaled, strict=True)]


def main(config):
    run.defend(__name__, config, repair, check=check)
