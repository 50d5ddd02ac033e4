"""BaDExpert: a copy of the victim that has forgotten its task still knows the backdoor.

Xie, Qi, He, Li, Wang, Mittal, "BaDExpert: Extracting Backdoor Functionality for Accurate Backdoor
Input Detection", ICLR 2024 (arXiv 2308.12439). The expert is trained on clean images with wrong
labels, until it has lost the task. A second copy is fine-tuned on clean images, which weakens the
backdoor. An image is suspicious if the expert agrees with the victim and the second copy does not.

    python detection/badexpert.py --result_file badnet_cifar10

Deviates in when the expert's training ends and in a schedule; see docs/detection/badexpert.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import InputOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(InputOptions):
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "the probability of the victim's prediction by the `expert` and "
        "the `finetuned` network, and the expert's `accuracy` on clean images that it has not seen"
    }

    expert_lr: float = option(1e-4, above=0)
    """learning rate of the expert's Adam"""
    expert_batch: int = option(128, at_least=1, unit="images")
    """images per step of the expert"""
    expert_epochs: int = option(30, at_least=1)
    """most epochs of the expert"""
    forgotten: float = option(0.2, above=0, below=1)
    """accuracy on clean images down to which the expert is trained"""
    finetune_lr: float = option(0.1, above=0)
    """learning rate of the second copy"""
    finetune_batch: int = option(64, at_least=1, unit="images")
    """images per step of the second copy"""
    finetune_epochs: int = option(10, at_least=1)
    """epochs of the second copy"""
    slope: float = option(2.0, above=1)
    """the score is minus the smaller one of slope a / b and (1 - b) / (1 / slope - a), where b is
    the expert's probability and a the second copy's; the paper has 2 for ResNet, 2.5 for VGG, 5 for
    MobileNet"""


if __name__ == "__main__":
    launch(Config)

import sys
from copy import deepcopy
from functools import partial

import torch

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data import loader
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.detection.inspector import Scored
from antidote_bench.utils.optimizers import adam
from antidote_bench.utils.train import Recipe, fit

HELD_OUT = 0.2  # share of the reference that says whether the expert has forgotten the task
LEAST = 1e-8  # a denominator is never smaller
DECAY = 1e-4  # weight decay of the second copy


def score(model, record, config):
    expert, accuracy = train_expert(model, record, config)
    finetuned = finetune(model, record, config)

    def of_batch(images, *_):
        predicted = model(images).argmax(1, keepdim=True)
        both = [
            network(images).double().softmax(1).gather(1, predicted)
            for network in (expert, finetuned)
        ]
        return torch.cat(both, 1)

    found = loader.forward_all(model, record.suspects, of_batch, config.precision)
    evidence = {
        "expert": found[:, 0].contiguous(),
        "finetuned": found[:, 1].contiguous(),
        "accuracy": torch.tensor(accuracy, dtype=torch.float64),
    }
    return Scored(combined(found[:, 0], found[:, 1], config.slope), evidence=evidence)


def combined(expert, finetuned, slope):
    """Minus min(slope a / b, (1 - b) / (1 / slope - a)), float64 N.

    `expert` has the probabilities b and `finetuned` the probabilities a.
    """
    ratio = slope * finetuned / expert.clamp(min=LEAST)
    rest = (1 - expert) / (1 / slope - finetuned).clamp(min=LEAST)
    return -torch.minimum(ratio, rest)


def train_expert(model, record, config):
    """(the expert in evaluation mode, its accuracy on images that are held out).

    It learns label + 1 on clean images, until its accuracy on the others is config.forgotten.
    """
    held_out, shown = parted(record.reference, config)
    wrong = (shown.labels + 1) % record.spec.classes
    shown = Split(shown.images, wrong, wrong)
    expert = copy_of(model)
    optimizer = adam(expert.parameters(), expert_recipe(config, 0))
    for epoch in range(1, config.expert_epochs + 1):
        recipe = expert_recipe(config, epoch)
        fit(expert, shown, recipe, optimizer=lambda *_: optimizer)
        accuracy = accuracy_of(expert, held_out, config)
        record.report("expert", expert, epoch=epoch, lr=config.expert_lr)
        if accuracy <= config.forgotten:
            break
    else:
        print(
            f"warning: after {config.expert_epochs} epochs the expert still classifies "
            f"{accuracy:.0%} of the clean images correctly: raise --expert_epochs or --expert_lr",
            file=sys.stderr,
        )
    return expert, accuracy


def expert_recipe(config, epoch):
    """One epoch at a constant learning rate, in an order of its own."""
    return Recipe(
        epochs=1,
        batch_size=config.expert_batch,
        lr=config.expert_lr,
        lr_min=config.expert_lr,
        random_seed=seeds.number("badexpert", config.random_seed, epoch),
        precision=config.precision,
        weight_decay=0.0,
    )


def finetune(model, record, config):
    """The second copy, fine-tuned on the reference, in evaluation mode."""
    recipe = Recipe.stage(
        config,
        epochs=config.finetune_epochs,
        batch_size=config.finetune_batch,
        lr=config.finetune_lr,
        nesterov=True,
        weight_decay=DECAY,
    )
    return fit(
        copy_of(model),
        record.reference,
        recipe,
        augment=loader.augmentation(record.spec),
        on_epoch=partial(record.report, "finetune"),
        checkpoint=record.state / "finetune.safetensors",
    )


def copy_of(model):
    """A copy of `model` whose parameters need gradients, in evaluation mode like `model`."""
    return deepcopy(model).requires_grad_(True)


def parted(reference, config):
    """(HELD_OUT of the reference, the rest), drawn by the seed."""
    generator = seeds.generator("badexpert held out", config.random_seed)
    order = torch.randperm(len(reference), generator=generator).to(reference.labels.device)
    count = max(round(HELD_OUT * len(reference)), 1)
    return reference[order[:count]], reference[order[count:]]


def accuracy_of(network, split, config):
    """The share of `split` that `network` classifies correctly."""
    right = loader.forward_all(
        network,
        split,
        lambda images, labels, _: network(images).argmax(1) == labels,
        config.precision,
    )
    return float(right.double().mean())


def main(config):
    run.detect(__name__, config, score)
