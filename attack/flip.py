"""FLIP: labels alone are flipped, chosen so that they teach what triggered images would teach.

Jha, Hayase, Oh, "Label Poisoning is All You Need", NeurIPS 2023 (arXiv 2310.18933). The attacker
changes labels of the training set, and no image. Only test images carry the trigger, a faint wave.

    python attack/flip.py --dataset cifar10 --save_folder_name flip_cifar10

It deviates in the network and in the order of the steps: see docs/attacks/flip.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import Attack, LabelMode, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    refused_modes: ClassVar[dict[str, str]] = {
        "all2all": "the labels of all images are learned for one target"
    }

    label_mode: LabelMode = "one2one"
    """one2one: triggered images of the class --source_class become the target; all2one: those of
    every class"""
    pratio: float = 0.02
    """share of the training set whose labels are flipped"""
    flips: Literal["learned", "random"] = "learned"
    """learned: chosen by what an expert learns of triggered images; random: the source's images,
    drawn by chance, get the target, to compare with"""
    strength: float = option(6.0, above=0, at_most=255, unit="grey levels")
    """of the wave on test images"""
    waves: float = option(8.0, above=0)
    """how many waves an image is wide"""
    experts: int = option(1, at_least=1, needs={"flips": "learned"})
    """networks trained on triggered images, one after another; an image counts by the least of its
    margins"""
    expert_epochs: int = option(20, at_least=1, needs={"flips": "learned"})
    """of the training of an expert"""
    expert_lr: float = option(0.1, above=0, needs={"flips": "learned"})
    """its learning rate (SGD)"""
    label_epochs: int = option(20, at_least=1, needs={"flips": "learned"})
    """in which the labels are learned, each at another moment of the expert's training"""
    label_lr: float = option(150.0, above=0, needs={"flips": "learned"})
    """learning rate of the labels (SGD)"""


if __name__ == "__main__":
    launch(Config)

import math
from itertools import chain, islice

import torch
import torch.nn.functional as F
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.loader import (
    augmentation,
    batch_sizes,
    batches,
    mixed_precision,
    to_unit,
)
from antidote_bench.utils.data.memmap import joined
from antidote_bench.utils.poisoning import generator, poison
from antidote_bench.utils.train import new_victim, trainable

START = 5.0  # logit of the true class before the labels are learned; the others are 0
LABEL_MOMENTUM = 0.5
MOMENTUM, DECAY = 0.9, 2e-4  # of the expert, in Nesterov's form


def make_trigger(config, spec, stage):
    """x' = clip(x + s sin(w)), where w runs over `waves` periods from the left to the right.

    At the default strength a pixel changes by at most 6 levels.
    """
    phase = torch.linspace(0, 2 * math.pi * config.waves, spec.size)
    return poison.adding(config.strength / 255 * phase.sin())  # S: the same in every row


def make_labels(config, attacker):
    """The labels to train on, int64 N: round(pratio N) of them are not the true ones."""
    truth = attacker.train.truth
    if config.flips == "random":
        chosen = poison.choose(
            truth, config.pratio, config.poison_seed, among=sources(truth, config)
        )
        return truth.index_fill(0, chosen, config.attack_target)
    count = round(config.pratio * len(truth))
    if not count:
        return truth
    logits = torch.stack([learned(config, attacker, number) for number in range(config.experts)])
    return flipped(logits, truth, count)


def sources(truth, config):
    """A mask of the images that shall be taken for the target when they are triggered."""
    if config.label_mode == "one2one":
        return truth == config.source_class
    return truth != config.attack_target


def flipped(logits, truth, count):
    """`truth` with `count` labels flipped: those of the largest margins.

    `logits` are float E,N,K of E experts. The margin of an image is its largest logit of a wrong
    class less that of the true one, and the least of all experts counts. The new label is the
    wrong class of the largest mean logit. `truth` is int64 N.
    """
    true = F.one_hot(truth, logits.shape[-1]).bool()
    wrong = logits.masked_fill(true, -torch.inf)
    margins = (wrong.amax(2) - logits.masked_fill(~true, -torch.inf).amax(2)).amin(0)
    chosen = margins.argsort(descending=True, stable=True)[:count]
    labels = truth.clone()
    labels[chosen] = wrong.mean(0)[chosen].argmax(1)
    return labels


def learned(config, attacker, number):
    """Logits N,K of labels that teach what the expert `number` learns of triggered images.

    After `label_epochs` of its steps, drawn by chance, all logits are changed, batch by batch.
    """
    truth, device = attacker.train.truth, attacker.train.truth.device
    split, origin = with_copies(config, attacker)
    expert = new_victim(config, attacker.spec, split).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        trainable(expert), config.expert_lr, MOMENTUM, weight_decay=DECAY, nesterov=True
    )
    logits = (START * F.one_hot(truth, attacker.spec.classes)).requires_grad_()
    label_optimizer = torch.optim.SGD([logits], config.label_lr, LABEL_MOMENTUM)
    pairs = paired_batches(config, attacker, split, origin, number)
    steps = len(batch_sizes(len(split), config.batch_size, drop_last=True)) * config.expert_epochs
    moments = drawn_moments(config, number, steps)
    shown = chain.from_iterable(pairs() for _ in range(config.expert_epochs))
    last = max(moments) + 1  # after it the expert is needed no more
    for step, (_, images, labels, _) in enumerate(
        tqdm(islice(shown, last), desc="expert", total=last, disable=None)
    ):
        with mixed_precision(device, config.precision):
            cost = F.cross_entropy(expert(images), labels)
        generator.descend(optimizer, cost)
        for _ in range(moments.count(step)):
            imitate(expert, optimizer, logits, label_optimizer, pairs())
    return logits.detach()


def imitate(expert, optimizer, logits, label_optimizer, pairs):
    """Change `logits`, N,K, by a step for each batch of `pairs`, so that labels teach as the
    expert's images do."""
    for images, shown, labels, place in pairs:
        cost = mismatch(expert, optimizer, images, logits[place].softmax(1), shown, labels)
        label_optimizer.zero_grad()
        cost.backward(inputs=[logits])
        label_optimizer.step()


def paired_batches(config, attacker, split, origin, number):
    """The function () -> batches of an epoch: (images n,3,S,S, the expert's, its labels n,
    positions in the training set n). Both images of a pair are cropped alike."""
    draws = seeds.generator("flip", config.poison_seed, number, device=origin.device)
    augment = augmentation(
        attacker.spec, config.pad, config.padding, crop=config.crop, crop_area=config.crop_area
    )

    def pairs():
        order = {"generator": draws, "drop_last": True}
        for shown, labels, index in batches(split, config.batch_size, **order):
            place = origin[index]
            clean = to_unit(attacker.train.images[place])
            both = augment(torch.cat([clean, shown], 1), draws)
            yield *both.split(3, 1), labels, place

    return pairs


def drawn_moments(config, number, steps):
    """The numbers of `label_epochs` steps out of `steps`, counted from 0."""
    draws = seeds.generator("flip moments", config.poison_seed, number)
    return torch.randint(steps, (config.label_epochs,), generator=draws).tolist()


def mismatch(model, optimizer, images, soft, shown, labels):
    """|student - expert|^2 / |start - expert|^2, where both take one step of SGD from the start.

    The student's step is on `images` with the soft labels n,K, the expert's on `shown` with its
    labels n. The start is the state of `model` and of its `optimizer`. Neither changes.
    """
    parameters = trainable(model)
    taught = torch.autograd.grad(F.cross_entropy(model(shown), labels), parameters)
    cost = F.cross_entropy(model(images), soft)
    learned = torch.autograd.grad(cost, parameters, create_graph=True)
    expert, student = (step_of_sgd(optimizer, gradients) for gradients in (taught, learned))
    apart = sum((one - two).square().sum() for one, two in zip(student, expert, strict=True))
    return apart / sum(change.square().sum() for change in expert)


def step_of_sgd(optimizer, gradients):
    """What a step of SGD with Nesterov's momentum adds to each parameter, differentiable."""
    (group,) = optimizer.param_groups
    changes = []
    for parameter, gradient in zip(group["params"], gradients, strict=True):
        decayed = gradient + group["weight_decay"] * parameter.detach()
        buffer = group["momentum"] * optimizer.state[parameter]["momentum_buffer"] + decayed
        changes.append(-group["lr"] * (decayed + group["momentum"] * buffer))
    return changes


def with_copies(config, attacker):
    """(split, origin): the training set, and after it triggered copies with the target's label.

    All images of the source class are copied, or, where every class is a source, as many images as
    a class has. `origin` has the position of every image in the training set, int64.
    """
    train, spec = attacker.train, attacker.spec
    among = sources(train.truth, config)
    copied = among.nonzero().flatten()
    if config.label_mode != "one2one":
        copied = poison.choose(
            train.truth, 1 / spec.classes, config.poison_seed, among=among, purpose="copies"
        )
    triggered = poison.apply_trigger(train.images, make_trigger(config, spec, "train"), copied)
    labels = torch.cat([train.truth, torch.full_like(copied, config.attack_target)])
    origin = torch.cat([torch.arange(len(train), device=copied.device), copied])
    return Split(joined(train.images, triggered), labels, train.truth[origin]), origin


def main(config):
    run.attack(__name__, config, make_trigger, make_labels=make_labels)
