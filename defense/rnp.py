"""Reconstructive Neuron Pruning: unlearn the clean task, relearn it by a mask, prune the rest.

Li, Lyu, Ma, Koren, Lyu, Li, Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023
(arXiv 2305.14876). A copy of the victim is trained to be wrong on clean images. Then a factor in
[0, 1] on the scale of each of its batch norm channels is trained to make it right again. Channels
whose factor ends at or below a threshold were not needed for that: they are pruned in the victim.

    python defense/rnp.py --result_file badnet_cifar10

Deviates in how the threshold is chosen: by held-out clean images; see docs/defenses/rnp.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import SelectionOptions


@dataclass(frozen=True, kw_only=True)
class Config(SelectionOptions):
    relative_rates: ClassVar[tuple[str, ...]] = ("lr",)
    adds: ClassVar[dict[str, str]] = {
        "mask.safetensors": "by batch norm the `factors` of its channels, and which were `pruned`",
        "choice.csv": "the thresholds that were measured, and which one was taken",
    }

    selection: Literal["val", "fixed", "oracle"] = "val"
    """val: choose the threshold by a fifth of the clean images, which are held out for that; fixed:
    take --threshold; oracle: choose it by the test set, and be marked for it in every table"""
    threshold: float = option(0.7, at_least=0, at_most=1)
    """largest factor of a pruned channel with --selection fixed"""
    epochs: int = option(20, at_least=0)
    """epochs on the clean images in which they are unlearned, at most"""
    forgotten: float = option(0.2, at_least=0, at_most=1)
    """accuracy at or below which they count as unlearned"""
    lr: float = option(0.01, above=0)
    """learning rate of the unlearning, a tenth of it in the second half; by default relative to the
    victim's learning rate, as in ft"""
    clip: float = option(20.0, above=0)
    """largest norm of its gradient"""
    mask_epochs: int = option(20, at_least=0)
    """epochs on the clean images in which the mask is learned"""
    mask_lr: float = option(0.2, above=0)
    """learning rate of the mask"""
    alpha: float = option(0.2, above=0)
    """factor of the mask's loss"""
    batch_size: int = option(128, at_least=1, unit="images")
    """images per step"""


if __name__ == "__main__":
    launch(Config)

import copy
from functools import partial

import torch
import torch.nn.functional as F

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import augmentation, batches, mixed_precision
from antidote_bench.utils.repair import masks, selection
from antidote_bench.utils.repair.layers import batch_norms


def check(model, record, config):
    batch_norms(model)


def repair(model, record, config):
    batch_norms(model)  # raises where the model has none, before anything is trained
    work, held_out = selection.hold_out(record.clean, config)
    copied = forget(copy.deepcopy(model), work, augmentation(record.spec), config)
    record.report("forgotten", copied)
    mask = masks.Mask(copied, batch_norms(copied))
    objective = partial(loss, alpha=config.alpha)
    epochs = config.mask_epochs
    factors = masks.learn(mask, copied, work, objective, record, config, epochs=epochs)
    masks.prune(model, factors, held_out, record, config)
    record.report("pruned", model)
    return model


def forget(model, split, augment, config):
    """Train `model` in place to be wrong on `split`, until few enough images are right in an epoch.

    It is short, so that an interrupted run repeats all of it.
    """
    training, device = model.training, split.labels.device
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, momentum=0.9, weight_decay=5e-4, fused=True
    )
    model.to(memory_format=torch.channels_last).train()
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = config.lr * (1 if epoch < config.epochs / 2 else 0.1)
        torch.manual_seed(seeds.number("dropout", config.random_seed, epoch))
        generator = seeds.generator("forget", config.random_seed, epoch, device=device)
        hits = 0
        for images, labels, _ in batches(
            split, config.batch_size, generator=generator, augment=augment
        ):
            hits += ascend(model, images, labels, optimizer, config)
        if hits <= config.forgotten * len(split):
            break
    return model.train(training)


def ascend(model, images, labels, optimizer, config):
    """One step that raises the loss of a batch; how many of its images were right before it."""
    with mixed_precision(labels.device, config.precision):
        logits = model(images)
        value = -F.cross_entropy(logits, labels)
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    return (logits.detach().argmax(1) == labels).sum()


def loss(mask, images, labels, index, *, alpha):
    return alpha * F.cross_entropy(mask.logits(images, mask.factors), labels)


def main(config):
    run.defend(__name__, config, repair, check=check)
