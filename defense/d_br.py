"""D-BR: unlearn the images that look poisoned, and relearn those that look clean, in turns.

Chen, Wu, Wang, "Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples", NeurIPS
2022. The features of a poisoned image change more under rotation and translation than those of a
clean one. The most sensitive images of the training set are taken for poisoned, the least sensitive
for clean.

    python defense/d_br.py --result_file badnet_cifar10

Deviates in bounding what is unlearned, and in keeping the last epoch; see docs/defenses/d_br.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import SensitivityOptions


@dataclass(frozen=True, kw_only=True)
class Config(SensitivityOptions):
    needs_train_set: ClassVar[bool] = True

    epochs: int = option(20, at_least=0)
    """rounds of one epoch of unlearning the images taken for poisoned, and one of learning those
    taken for clean"""
    repair_lr: float = option(1e-4, above=0)
    """learning rate of both"""
    bound: float = option(2.0, above=0)
    """loss at which an image counts as unlearned and has no gradient any more, as a multiple of the
    loss of a guess, which is ln(classes)"""


if __name__ == "__main__":
    launch(Config)

import math
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.checkpoint import load, save
from antidote_bench.utils.data.loader import augmentation, batch_sizes, batches
from antidote_bench.utils.errors import UserError
from antidote_bench.utils.optimizers import sgd
from antidote_bench.utils.repair.layers import require_features
from antidote_bench.utils.repair.sensitivity import CLEAN, POISONED, bounded, distinguish
from antidote_bench.utils.train import Recipe, cross_entropy, train_epoch


def repair(model, record, config):
    kinds = distinguish(record, config)
    poisoned, clean = (
        record.train.view((kinds == kind).nonzero().flatten()) for kind in (POISONED, CLEAN)
    )
    parts = [(poisoned, partial(unlearning, bound=config.bound)), (clean, cross_entropy)]
    parts = [(split, loss) for split, loss in parts if len(split) > 1]  # batch norms need two
    return alternate(model, parts, record, config)


def unlearning(model, images, labels, index, *, bound):
    """Minus the cross-entropy; an image whose loss is past the bound has no gradient."""
    logits = model(images)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return -bounded(losses, bound, logits.shape[1]).mean()


def alternate(model, parts, record, config):
    """`model`, trained in place: every round is one epoch on each of `parts`, [(split, loss)].

    The state after every round is kept, and an interrupted run goes on from there.
    """
    training = model.training
    model.to(memory_format=torch.channels_last)
    recipe = Recipe.stage(
        config, epochs=config.epochs, batch_size=config.batch_size, lr=config.repair_lr
    )
    optimizer = sgd(model.parameters(), recipe)
    checkpoint = record.state / "repair.safetensors"
    done = load(checkpoint, model, optimizer)
    steps = sum(len(batch_sizes(len(split), config.batch_size)) for split, _ in parts)
    with tqdm(
        total=config.epochs * steps,
        initial=done * steps,
        desc="repairing",
        unit=" steps",
        disable=None,
    ) as bar:
        for epoch in range(done, config.epochs):
            losses = train_round(model, parts, optimizer, epoch, record, config, bar)
            if not all(map(math.isfinite, losses)):
                raise UserError(
                    f"the loss is no longer a number after round {epoch + 1}: lower --repair_lr, "
                    f"which is {config.repair_lr}"
                )
            record.report(
                "repair", model, epoch=epoch + 1, loss=round(losses[-1], 6), lr=config.repair_lr
            )
            save(checkpoint, model, optimizer, epoch + 1)
    return model.train(training)


def train_round(model, parts, optimizer, epoch, record, config, bar):
    """One epoch on each of `parts`; their mean losses, [0.0] where there is no part."""
    device, augment, losses = record.train.labels.device, augmentation(record.spec), []
    for number, (split, loss) in enumerate(parts):
        torch.manual_seed(seeds.number("dropout", config.random_seed, epoch, number))
        generator = seeds.generator("repair", config.random_seed, epoch, number, device=device)
        shown = batches(split, config.batch_size, augment=augment, generator=generator)
        steps = len(batch_sizes(len(split), config.batch_size))
        rates, weights = [config.repair_lr] * steps, [1] * steps
        total, count = train_epoch(
            model, shown, rates, weights, loss, optimizer, config.precision, None, bar
        )
        losses.append(total / count)
    return torch.stack(losses).tolist() if losses else [0.0]


def main(config):
    run.defend(__name__, config, repair, check=require_features)
