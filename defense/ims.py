"""IMS: learn a mask that switches the backdoor off, and whose inverse keeps the backdoor alone.

Dunnett, Arablouei, Miller, Dedeoglu, Jurdak, "Backdoor Mitigation via Invertible Pruning Masks",
NeurIPS 2025 (arXiv 2509.15497). Every channel has a share in the mask and one in what both the
clean task and the backdoor need. Perturbations of clean images that the inverse mask agrees with
stand for the trigger. No label is used.

    python defense/ims.py --result_file badnet_cifar10

Deviates in that perturbed images stay in [0, 1] and in how the mask is applied; see
docs/defenses/ims.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import Defense, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    adds: ClassVar[dict[str, str]] = {
        "mask.safetensors": "by convolution the `factors` of its channels, which the network now "
        "has in its weights, and those of the `inverse` mask"
    }

    rounds: int = option(200, at_least=0)
    """most rounds of the second and of the third stage; the first has at most half as many"""
    batch_size: int = option(256, at_least=1, unit="images")
    """images of a round, drawn without replacement"""
    steps: int = option(20, at_least=0)
    """steps of a round in which the images are perturbed"""
    perturbation_lr: float = option(1e-3, above=0)
    """learning rate of AdamW on the perturbations, in [0, 1] pixels"""
    mask_lr: float = option(0.02, above=0)
    """learning rate of AdamW on the mask and on the selection"""
    sharpness: float = option(20.0, above=0)
    """how fast the mask goes from 0 to 1 at one half"""
    penalty: float = option(10.0, at_least=0)
    """weight of the mean share of channels that are not selected for both tasks, in the first and
    in the third stage"""
    patience: int = option(25, at_least=0)
    """rounds in a row without a better loss after which a stage ends"""
    improvement: float = option(0.98, above=0, at_most=1)
    """a loss is better below this share of the best one so far"""


if __name__ == "__main__":
    launch(Config)

import copy
import sys
from functools import partial

import torch
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.checkpoint import load, save
from antidote_bench.utils.data.loader import (
    Passes,
    evaluating,
    forward_all,
    gradient_batch,
    mixed_precision,
    to_unit,
)
from antidote_bench.utils.repair.layers import convolutions, frozen, require_convolutions

EPSILON = 1e-8  # within the logarithms
GROUP = 10  # rounds after which there is a checkpoint, and after which a stage may end


def repair(model, record, config):
    model.to(memory_format=torch.channels_last)
    masks = Masks(model, convolutions(model), config.sharpness)
    with evaluating(model), frozen(model):
        answers = forward_all(
            model, record.clean, lambda images, *_: chances(model(images)), config.precision
        ).clone()
        for stage in (1, 2, 3):
            learn(masks, answers, record, config, stage)
    record.keep("mask.safetensors", masks.bake(model))
    record.report("masked", model)
    return model


class Masks(nn.Module):
    """A mask of the channels of all convolutions of a network, and its inverse, all in one row.

    Both come from two learned shares of [0, 1] for every channel, which begin at 1. The others
    tell how a stage goes: its `best` loss, the rounds `waited` since, and whether it has `ended`.
    """

    def __init__(self, model, layers, sharpness):
        super().__init__()
        self._model = [model]  # in a list: no part of this module, whose state a checkpoint keeps
        self._layers, self._sharpness = layers, sharpness
        self._sizes = [layer.out_channels for layer in layers.values()]
        ones = torch.ones(sum(self._sizes), device=next(model.parameters()).device)
        ones = ones.to(next(iter(layers.values())).weight.dtype)
        self.kept, self.selected = nn.Parameter(ones), nn.Parameter(ones.clone())
        for name in ("best", "waited", "ended"):
            self.register_buffer(name, ones[0].clone())
        self.begin()

    @property
    def model(self):
        return self._model[0]

    def begin(self):
        """Forget how the last stage went."""
        for buffer, value in ((self.best, torch.inf), (self.waited, 0), (self.ended, 0)):
            buffer.fill_(value)

    def factors(self, inverse=False):
        """The factors of all channels, in one row of [0, 1]."""
        kept = 1 - self.kept if inverse else self.kept
        gate = (self._sharpness * (kept - 0.5)).sigmoid()
        return gate + self.selected * (1 - gate)

    def weights(self, inverse=False):
        """{name: filters or biases} of the convolutions, whose outputs so have the factors."""
        found = {}
        for name, part in self.split(self.factors(inverse)).items():
            layer = self._layers[name]
            found[f"{name}.weight"] = layer.weight * part.view(-1, 1, 1, 1)
            if layer.bias is not None:
                found[f"{name}.bias"] = layer.bias * part
        return found

    def split(self, row):
        """{convolution: its values} of a row of values for all channels."""
        return dict(zip(self._layers, row.split(self._sizes), strict=True))

    def chances(self, images, weights=None):
        """`chances` of the network with such `weights`, or without a mask."""
        return chances(functional_call(self.model, weights or {}, (images,)))

    @torch.no_grad()
    def after_step(self, old, loss, config):
        """Keep the shares within [0, 1], or as they were before where the stage has ended.

        `old` are the shares before, `loss` is the one that led to the step.
        """
        for share, before in zip(self.parameters(), old, strict=True):
            share.copy_(torch.where(self.ended > 0, before, share.clamp(0, 1)))
        better = loss < config.improvement * self.best
        self.waited.copy_(torch.where(better, 0, self.waited + 1))
        self.best.copy_(torch.where(better, loss, self.best))
        self.ended.copy_(torch.maximum(self.ended, (self.waited > config.patience).to(self.ended)))

    @torch.no_grad()
    def bake(self, model):
        """Multiply the convolutions of `model`, the network or a copy, by the factors.

        {convolution/factors: those of it, convolution/inverse: those of the inverse}.
        """
        for name, weight in self.weights().items():
            model.get_parameter(name).copy_(weight)
        kept = {f"{name}/factors": part for name, part in self.split(self.factors()).items()}
        inverse = self.split(self.factors(inverse=True)).items()
        return kept | {f"{name}/inverse": part for name, part in inverse}


def learn(masks, answers, record, config, stage):
    """Learn the masks through a stage, 1 to 3; `answers` are the chances of the clean images."""
    images, rounds = record.clean.images, -(-config.rounds // 2) if stage == 1 else config.rounds
    optimizer = torch.optim.AdamW(masks.parameters(), config.mask_lr, fused=True)
    path = record.state / f"mask_{stage}.safetensors"
    size = min(config.batch_size, len(images))
    passes = Passes(gradient_batch(masks.model, images, size))
    masks.begin()
    done = load(path, masks, optimizer)
    with tqdm(
        total=rounds, initial=done, desc=f"stage {stage}", unit=" rounds", disable=None
    ) as bar:
        while done < rounds and not masks.ended:
            for number in range(done, min(done + GROUP, rounds)):
                index = drawn(len(images), size, config, stage, number, images.device)
                play(
                    masks, to_unit(images[index]), answers[index], config, stage, optimizer, passes
                )
                bar.update()
            done = min(done + GROUP, rounds)
            save(path, masks, optimizer, done)
            report(masks, record, stage, done)
    count = int((masks.factors() < 0.5).sum())
    print(f"stage {stage}: {count} of {len(masks.kept)} factors are below 0.5", file=sys.stderr)


def drawn(count, size, config, stage, number, device):
    """The positions of the images of a round."""
    draws = seeds.generator("ims", config.random_seed, stage, number, device=device)
    return torch.randperm(count, generator=draws, device=device)[:size]


def play(masks, images, answers, config, stage, optimizer, passes):
    """One round: perturb images n,3,S,S, whose chances are `answers`, and take a step."""
    old = [share.detach().clone() for share in masks.parameters()]
    loss = passes.run(partial(slopes, masks, images, answers, config, stage))
    optimizer.step()
    masks.after_step(old, loss, config)


def report(masks, record, stage, done):
    """Have the evaluator measure the network with the mask as it is."""
    masked = copy.deepcopy(masks.model)
    masks.bake(masked)
    record.report(f"stage {stage}", masked, epoch=done)


def slopes(masks, images, answers, config, stage, most):
    """Set the gradients of the shares for images n,3,S,S, and return the loss.

    A pass has `most` images. `answers` are the chances of the images.
    """
    for share in masks.parameters():
        share.grad = None
    total = 0
    for shown, said in zip(images.split(most), answers.split(most), strict=True):
        with mixed_precision(images.device, config.precision):
            changed = None if stage == 1 else perturbed(masks, shown, said, len(images), config)
            loss = losses(masks, shown, changed, said).sum() / len(images)
        loss.backward()
        total = total + loss.detach()
    if stage != 2:
        loss = config.penalty * (1 - masks.selected).mean()
        loss.backward()
        total = total + loss.detach()
    return total


def perturbed(masks, images, answers, count, config):
    """Images n,3,S,S, changed so that the inverse mask agrees with the network, and the network no
    longer with its `answers`.

    `count` is the number of images that the loss is a mean over. Pixels stay in [0, 1].
    """
    change = torch.zeros_like(images, requires_grad=True)
    optimizer = torch.optim.AdamW([change], config.perturbation_lr)
    weights = {name: weight.detach() for name, weight in masks.weights(inverse=True).items()}
    for _ in range(config.steps):
        seen = images + change
        own = masks.chances(seen)
        loss = agreement(masks.chances(seen, weights), own) + disagreement(own, answers)
        (change.grad,) = torch.autograd.grad(loss.sum() / count, change)
        optimizer.step()
        with torch.no_grad():
            change.copy_((images + change).clamp(0, 1) - images)
    return (images + change).detach()


def losses(masks, images, changed, answers):
    """What the shares are to lower, for each of the images n,3,S,S; `changed` is None in the first
    stage, which knows no perturbed images."""
    weights, inverse = masks.weights(), masks.weights(inverse=True)
    loss = agreement(masks.chances(images, weights), answers)
    loss = loss + disagreement(masks.chances(images, inverse), answers)
    if changed is None:
        return loss
    with torch.no_grad():
        own = masks.chances(changed)
    backdoor = masks.chances(changed, inverse)
    loss = loss + agreement(masks.chances(changed, weights), answers)
    return loss + agreement(backdoor, own) + disagreement(backdoor, answers)


def chances(logits):
    """The probabilities n,K of logits, in float64: what is left of 1 counts."""
    return logits.double().softmax(1)


def agreement(one, other):
    """Low where two rows of probabilities n,K mean the same class; n values."""
    return -((one * other).sum(1) + EPSILON).log()


def disagreement(one, other):
    """Low where two rows of probabilities n,K mean different classes; n values."""
    return -(1 - (one * other).sum(1) + EPSILON).log()


def main(config):
    run.defend(__name__, config, repair, check=require_convolutions)
