"""SAU: find perturbations that fool the victim and its copy in the same way, and unlearn them.

Wei, Zhang, Zha, Wu, "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared
Adversarial Examples", NeurIPS 2023 (arXiv 2307.10562). A trigger fools the victim. A copy that is
fooled in another way, or not at all, has lost the backdoor.

    python defense/sau.py --result_file badnet_cifar10

Deviates in batch size, weight decay and the form of two loss terms: see docs/defenses/sau.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.config import Defense, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    epochs: int = option(100, at_least=0)
    """epochs on the clean images"""
    batch_size: int = option(256, at_least=1, unit="images")
    """images per step"""
    unlearn_lr: float = option(1e-4, above=0)
    """learning rate of Adam on the weights"""
    weight_decay: float = option(0.0, at_least=0)
    """L2 penalty on all weights"""
    radius: float = option(0.2, at_least=0, at_most=1)
    """largest change of a pixel, in [0, 1] pixels"""
    steps: int = option(5, at_least=0)
    """of the search for an image's perturbation"""
    step_size: float = option(0.2, above=0)
    """change of a pixel in each of them"""
    fooled: Literal["label", "own"] = "label"
    """when the search takes a network for fooled: label: it predicts another class than the image's
    label, as in the paper; own: another class than it predicts itself for the unchanged image, as
    in the released search"""
    clip: bool = False
    """cut perturbed images to [0, 1]"""
    beta1: float = option(0.01, at_least=0)
    """weight, in the search, of fooling either network"""
    beta2: float = option(1.0, at_least=0)
    """weight, in the search, of fooling both in the same way"""
    lambda1: float = option(1.0, at_least=0)
    """weight, in a step of Adam, of the clean images' cross-entropy"""
    lambda2: float = option(0.0, at_least=0)
    """weight of the perturbed images' cross-entropy"""
    lambda3: float = option(1.0, at_least=0)
    """weight of what the copy shares with the victim"""


if __name__ == "__main__":
    launch(Config)

import copy
import math
from functools import partial

import torch
import torch.nn.functional as F

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import evaluating
from antidote_bench.utils.optimizers import adam
from antidote_bench.utils.repair.unlearning import EvaluationMode, at_least_float32, unlikelihood
from antidote_bench.utils.train import Recipe, fit


def repair(model, record, config):
    victim = copy.deepcopy(model).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    recipe = Recipe.stage(
        config,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.unlearn_lr,
        lr_min=config.unlearn_lr,
        weight_decay=config.weight_decay,
    )

    def loss(copied, images, labels, index):
        change = perturbation(copied, victim, images, labels, config)
        return unlearning(copied, victim, images, labels, change, config)

    with evaluating(model):
        fit(
            EvaluationMode(model),
            record.clean,
            recipe,
            loss=loss,
            optimizer=adam,
            on_epoch=partial(record.report, "unlearn"),
            checkpoint=record.state / "unlearn.safetensors",
        )
    return model


def perturbation(model, victim, images, labels, config):
    """The change n,3,S,S, each pixel within config.radius, that fools both networks alike.

    images n,3,S,S in [0, 1], labels n. The change of an image depends on no other image. The
    weights get no gradient.
    """
    right = right_answers(model, victim, images, labels, config)
    change = within(torch.full_like(images, config.radius), images, config)
    for _ in range(config.steps):
        change.requires_grad_()
        logits, victim_logits = model(images + change), victim(images + change)
        loss = fooling(logits, victim_logits, labels, config.beta1, config.beta2, right)
        (gradient,) = torch.autograd.grad(loss.sum(), change)
        change = within(change.detach() - config.step_size * gradient.sign(), images, config)
    return change


def right_answers(model, victim, images, labels, config):
    """The classes n, of each of the two networks, that a network must leave to be fooled."""
    if config.fooled == "label":
        return labels, labels
    with torch.no_grad():
        return model(images).argmax(1), victim(images).argmax(1)


def within(change, images, config):
    """The change cut to the radius and, with config.clip, to what keeps the images in [0, 1]."""
    change = change.clamp(-config.radius, config.radius)
    return (images + change).clamp(0, 1) - images if config.clip else change


def fooling(logits, victim_logits, labels, beta1, beta2, right=None):
    """The loss of the search, n values, from the logits n,C of both networks.

    It is beta1 * -(CE of the copy + CE of the victim)/2, each only where that network is not
    fooled, plus beta2 * their divergence, except where both are fooled and predict the same class.
    A network is fooled where it predicts another class than `right` says, two rows of n classes,
    by default the labels.
    """
    predicted, by_victim = logits.argmax(1), victim_logits.argmax(1)
    own_right, victims_right = right or (labels, labels)
    fooled, victim_fooled = predicted != own_right, by_victim != victims_right
    shared = fooled & victim_fooled & (predicted == by_victim)
    own, victims = (
        F.cross_entropy(at_least_float32(part), labels, reduction="none")
        for part in (logits, victim_logits)
    )
    correct = own.masked_fill(fooled, 0) + victims.masked_fill(victim_fooled, 0)
    return beta2 * divergence(logits, victim_logits).masked_fill(shared, 0) - beta1 / 2 * correct


def divergence(one, other):
    """Jensen-Shannon divergence, in nats, of the distributions of two sets of logits n,C."""
    logs = [at_least_float32(logits).log_softmax(1) for logits in (one, other)]
    middle = torch.logaddexp(*logs) - math.log(2)
    return sum((part.exp() * (part - middle)).sum(1) for part in logs) / 2


def unlearning(model, victim, images, labels, change, config):
    """The loss of a step of Adam: the mean over images of the three weighted terms."""
    changed = images + change
    with torch.no_grad():
        predicted = victim(changed).argmax(1)
    # one pass over both: in evaluation mode no image depends on the others
    clean, perturbed = model(torch.cat([images, changed])).chunk(2)
    shared = unlikelihood(perturbed, predicted).masked_fill(predicted == labels, 0)
    return (
        config.lambda1 * F.cross_entropy(clean, labels)
        + config.lambda2 * F.cross_entropy(perturbed, labels)
        + config.lambda3 * shared.mean()
    )


def main(config):
    run.defend(__name__, config, repair)
