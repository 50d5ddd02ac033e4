"""BAN: noise on the neurons that hurts most wakes a backdoor, and then one class takes over.

Xu, Liu, Koffas, Yu, Picek, "BAN: Detecting Backdoors Activated by Adversarial Neuron Noise",
NeurIPS 2024 (arXiv 2405.19928). The scales and shifts of the batch norms are changed adversarially,
and the features that clean images need are masked away. The score is the share of the clean images
of other classes that the most frequent answer takes.

    python detection/ban.py --result_file badnet_cifar10

Deviates in the mask, which has one value for each feature; see docs/detection/ban.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import ModelOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every class the `share` of the images of other classes that it "
        "takes under noise and mask, and under `noise_only`; the `mask` of the features (D)"
    }

    mask_epochs: int = option(20, at_least=1)
    """epochs on the clean images in which the mask is learned"""
    mask_batch: int = option(128, at_least=1, unit="images")
    """images per step of the mask"""
    mask_lr: float = option(0.01, above=0)
    """learning rate of the mask"""
    sparsity: float = option(0.75, at_least=0)
    """lambda, weight of the mask's mean value"""
    epsilon: float = option(0.3, above=0)
    """largest relative change of a scale or shift"""
    steps: int = option(30, at_least=1)
    """steps of the noise"""
    collapse: float = option(0.9, above=0, at_most=1)
    """share from which a class is taken for a target"""


if __name__ == "__main__":
    launch(Config)

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import batches, evaluation_batch, gradient_batch, halving
from antidote_bench.utils.decoupling import split_head
from antidote_bench.utils.detection import soundness
from antidote_bench.utils.detection.inspector import Finding

BATCH = 250  # images per pass with a gradient, at most


def score(model, record, config):
    why = soundness.reason(model, record, config, least=2)
    norms = affine_norms(model)
    if not why and not norms:
        why = "the model has no batch norm whose scales and shifts could be changed"
    if why:
        return soundness.abstained(record, why)
    split, classes = record.reference, record.spec.classes
    mask = learn_mask(model, split, config)
    noise = adversarial_noise(model, norms, split, config)
    shares = {
        name: split_head.shares_of_others(answers(model, split, noise, kept), split.labels, classes)
        for name, kept in (("share", 1 - mask), ("noise_only", None))
    }
    per_class = shares["share"]
    suspects = (per_class >= config.collapse).nonzero().flatten().tolist()
    return Finding(float(per_class.max()), per_class, suspects, evidence={**shares, "mask": mask})


def affine_norms(model):
    """{name: tensor}: the scales and shifts of all batch norms of `model`."""
    return {
        f"{name}.{part}": getattr(module, part)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine
        for part in ("weight", "bias")
    }


def learn_mask(model, split, config):
    """The mask of the features that clean images need: D values of [0, 1]."""
    features, head = split_head.known_features(model, split, config)
    generator = seeds.generator("ban mask", config.random_seed)
    mask = torch.rand(features.shape[1], generator=generator).to(features).requires_grad_()
    optimizer = torch.optim.Adam([mask], config.mask_lr)
    for _ in range(config.mask_epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for rows in order.split(config.mask_batch):
            loss = split_head.mask_loss(head, features[rows], split.labels[rows], mask)
            loss = loss + config.sparsity * mask.mean()
            (mask.grad,) = torch.autograd.grad(loss, mask)
            optimizer.step()
            mask.data.clamp_(0, 1)
    return mask.detach()


def adversarial_noise(model, norms, split, config):
    """{name: relative change of [-epsilon, epsilon]} that raises the loss on the clean images."""
    generator = seeds.generator("ban noise", config.random_seed)
    noise = {
        name: (config.epsilon * (2 * torch.rand(value.shape, generator=generator) - 1)).to(value)
        for name, value in norms.items()
    }
    most = gradient_batch(model, split.images, min(BATCH, len(split)))
    for _ in range(config.steps):
        slopes = halving(partial(ascent, model, norms, noise, split), most)
        noise = {
            name: (value + config.epsilon / config.steps * slopes[name].sign()).clamp(
                -config.epsilon, config.epsilon
            )
            for name, value in noise.items()
        }
    return {name: norms[name] * (1 + value) for name, value in noise.items()}


def ascent(model, norms, noise, split, size):
    """{name: gradient of the summed cross-entropy with respect to the noise}, by passes of `size`
    images."""
    noise = {name: value.clone().requires_grad_() for name, value in noise.items()}
    total = [torch.zeros_like(value) for value in noise.values()]
    for images, labels, _ in batches(split, size):
        changed = {name: norms[name] * (1 + value) for name, value in noise.items()}
        logits = functional_call(model, changed, (images,))
        loss = F.cross_entropy(logits, labels, reduction="sum")
        slopes = torch.autograd.grad(loss, list(noise.values()))
        total = [one + other for one, other in zip(total, slopes, strict=True)]
    return dict(zip(noise, total, strict=True))


def answers(model, split, changed, factor):
    """The classes n that `model` gives the images with `changed` scales and shifts, and with its
    features times `factor` (D, or None)."""

    def pass_over_all(size):
        answers = [
            functional_call(model, changed, (images,)).argmax(1)
            for images, _, _ in batches(split, size)
        ]
        return torch.cat(answers)

    with split_head.features_times(model, factor), torch.no_grad():
        return halving(pass_over_all, evaluation_batch(model, split.images))


def main(config):
    run.detect(__name__, config, score)
