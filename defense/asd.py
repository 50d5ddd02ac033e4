"""ASD: split the training set into labels to believe and images without labels, in three phases.

Gao, Bai, Gu, Yang, Xia, "Backdoor Defense via Adaptively Splitting Poisoned Dataset", CVPR 2023
(arXiv 2303.12993). A network is trained from scratch by MixMatch. The pool of images whose labels
it believes begins with a few clean images. It grows by the images of lowest loss: first of every
class, then of the whole set, at last by how much a copy's loss falls in an epoch on all labels.

    python defense/asd.py --result_file badnet_cifar10

Deviates in where the clean images come from and in how images are mixed; see docs/defenses/asd.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import SemiSupervisedOptions


@dataclass(frozen=True, kw_only=True)
class Config(SemiSupervisedOptions):
    stage: ClassVar[str] = "in-training"
    adds: ClassVar[dict[str, str]] = {
        "pool.safetensors": "of every image of the training set whether it is `believed` after the "
        "last epoch, and the `score` that decides, of which the lowest are believed"
    }

    seeds: int = option(10, at_least=1, unit="images")
    """clean images of every class that the pool begins with, as far as the defender holds them"""
    class_epochs: int = option(60, at_least=1)
    """epochs of the first phase, which believes the clean images and the lowest losses of every
    class"""
    grow_every: int = option(5, at_least=1, unit="epochs")
    """after so many epochs of the first phase each, the pool grows"""
    grow_by: int = option(10, at_least=0, unit="images")
    """images of every class by which it grows"""
    overall_epochs: int = option(30, at_least=0)
    """epochs of the second phase, which believes the lowest losses of the whole set"""
    virtual_epochs: int = option(30, at_least=0)
    """epochs of the third phase, before each of which a copy of the network is trained for an epoch
    on all labels, and those are believed whose loss falls least"""
    virtual_lr: float = option(0.015, above=0)
    """learning rate of Adam for that copy"""
    virtual_batch_size: int = option(128, at_least=1, unit="images")
    """images per step of that copy"""

    def effort(self, clean, classes):
        total = self.class_epochs + self.overall_epochs + self.virtual_epochs
        images = total * self.steps * 3 * self.batch_size
        return (
            f"mixes    {3 * self.batch_size} images in each of {total * self.steps} steps, "
            f"{images / 1e6:.3g} million in all, of which two thirds pass the network twice; a "
            f"copy is trained for {self.virtual_epochs} epochs beside it"
        )


if __name__ == "__main__":
    launch(Config)

import copy
import sys
from dataclasses import replace
from functools import partial

import torch

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.loader import augmentation
from antidote_bench.utils.data.memmap import joined, replaced
from antidote_bench.utils.optimizers import adam
from antidote_bench.utils.repair.semi_supervised import losses_of, split_by_loss, train_mixmatch
from antidote_bench.utils.train import Recipe, fit, victim_architecture


def repair(model, record, config):
    split, is_seed = with_seeds(record, config)
    choose = partial(choose_pool, split=split, is_seed=is_seed, record=record, config=config)
    total = config.class_epochs + config.overall_epochs + config.virtual_epochs
    network = victim_architecture(record, "asd", config)
    train_mixmatch(
        network, split, lambda network, epoch: choose(network, epoch)[:2], total, record, config
    )
    known, _, scores = choose(network, total)
    believed = torch.zeros(len(split), dtype=torch.bool, device=known.device)
    believed[known] = True
    count = len(record.train)  # clean images of another source come after them
    record.keep("pool.safetensors", {"believed": believed[:count], "score": scores[:count]})
    return network


def with_seeds(record, config):
    """(the training set with some clean images in it, which images those are: bool N).

    They are config.seeds of every class, the first that the defender holds. They take the places of
    what the training set has there, or come after it where they are from another source.
    """
    clean, train = record.clean, record.train
    alike = torch.zeros(len(clean), device=clean.labels.device)
    chosen = lowest_of_classes(alike, clean.labels, config.seeds).nonzero().flatten()
    short = config.seeds * record.spec.classes - len(chosen)
    if short:
        print(f"note: the pool begins with {short} clean images fewer than asked", file=sys.stderr)
    clean = clean[chosen]
    if len(record.clean_index):
        index = record.clean_index[chosen]
        images, labels = replaced(train.images, index, clean.images), train.labels.clone()
        labels[index] = clean.labels
    else:
        index = len(train) + torch.arange(len(clean), device=clean.labels.device)
        images, labels = joined(train.images, clean.images), torch.cat([train.labels, clean.labels])
    is_seed = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    is_seed[index] = True
    return Split(images, labels, labels), is_seed


def choose_pool(network, epoch, *, split, is_seed, record, config):
    """(positions that are believed in `epoch`, counted from 0, the other positions, the scores).

    Of the scores, float32 N, the lowest are believed.
    """
    scores = losses_of(network, split, config)
    first, second = config.class_epochs, config.class_epochs + config.overall_epochs
    if epoch < first:
        count = config.grow_by * (epoch // config.grow_every)
        parts = split_by_class(scores, split.labels, is_seed, count)
    else:
        if epoch >= second and config.virtual_epochs:
            virtual = virtual_copy(network, split, epoch, record, config)
            scores = scores - losses_of(virtual, split, config)
        parts = split_by_loss(scores, torch.zeros_like(split.labels), config.labelled)
    # what is mixed in an epoch does not depend on the training of a copy
    torch.manual_seed(seeds.number("asd mixture", config.random_seed, epoch))
    return *parts, scores


def split_by_class(losses, labels, is_seed, count):
    """(positions of the seeds and of the `count` lowest other losses of every label, the others).

    Neither part is empty: where the first would have all, it lacks an image of highest loss.
    """
    lowest = lowest_of_classes(losses.masked_fill(is_seed, torch.inf), labels, count)
    known = lowest | is_seed
    if known.all():
        known[losses.masked_fill(is_seed, -torch.inf).argmax()] = False
    return known.nonzero().flatten(), (~known).nonzero().flatten()


def lowest_of_classes(values, labels, count):
    """Which images, bool N, have the `count` lowest values of their label; of equals the first."""
    order = values.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]  # by label, and by value within a label
    counts = labels.bincount()
    starts = (counts.cumsum(0) - counts)[labels[order]]
    is_low = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    is_low[order] = torch.arange(len(labels), device=labels.device) - starts < count
    return is_low


def virtual_copy(network, split, epoch, record, config):
    """A copy of `network` whose deeper half is trained for an epoch on all labels of `split`."""
    virtual = copy.deepcopy(network)
    freeze_first_half(virtual)
    recipe = Recipe.stage(
        config,
        epochs=1,
        batch_size=config.virtual_batch_size,
        lr=config.virtual_lr,
        lr_min=config.virtual_lr,
        weight_decay=0.0,
    )
    # another order of the images in every epoch
    recipe = replace(recipe, random_seed=seeds.number("asd copy", config.random_seed, epoch))
    return fit(virtual, split, recipe, optimizer=adam, augment=augmentation(record.spec))


def freeze_first_half(network):
    """Freeze the parameters before the deeper half of the layers with a matrix of weights.

    In ResNet-18 the layers that stay are layer3, layer4 and the linear one, as in the paper.
    """
    parameters = list(network.parameters())
    places = [place for place, parameter in enumerate(parameters) if parameter.ndim > 1]
    for parameter in parameters[: places[len(places) // 2]]:
        parameter.requires_grad_(False)


def main(config):
    run.defend(__name__, config, repair)
