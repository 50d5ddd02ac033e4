"""COMBAT: a network learns the trigger while a surrogate learns the poisoned set; labels stay true.

Huynh, Nguyen, Pham, Tran, "COMBAT: Alternated Training for Effective Clean-Label Backdoor Attacks",
AAAI 2024. The attacker poisons data only, images of the target class. The noise has no high
frequencies, and a clean model must still see the true class.

    python attack/combat.py --dataset cifar10 --save_folder_name combat_cifar10

The blur has a fixed width, and the generator is small: see docs/attacks/combat.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import CleanRecordOptions


@dataclass(frozen=True, kw_only=True)
class Config(CleanRecordOptions):
    clean_label: ClassVar[bool] = True

    pratio: float = 0.05
    """poisoned share of the whole training set; all of it is of the target class"""
    strength: float = option(10.2, above=0, at_most=255, unit="grey levels")
    """of the noise, before it loses its high frequencies"""
    low_pass: float = option(0.65, above=0, at_most=1)
    """share of the rows and of the columns of the cosine transform that the noise keeps"""
    blur: float = option(0.5, above=0, at_most=10, unit="pixels")
    """standard deviation of the blur of a triggered image"""
    clean_weight: float = option(0.8, at_least=0)
    """weight of the loss of the clean model, which shall see the true classes"""
    generator_epochs: int = option(200, at_least=1)
    """in which generator and surrogate learn by turns"""
    joint_lr: float = option(0.01, above=0)
    """learning rate of both (SGD)"""


if __name__ == "__main__":
    launch(Config)

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import augmentation, batches, clipped, mixed_precision
from antidote_bench.utils.poisoning import generator, poison
from antidote_bench.utils.poisoning.attacker import Prepared
from antidote_bench.utils.train import new_victim, trainable

WIDTHS = 16, 32, 64
VISIBLE = 0.02  # weight of the mean squared change, pixels in [-1, 1]
RANGE = 2  # their range


def prepare(config, attacker):
    """The generator g, which learned by turns with a surrogate f of the victim.

    In every batch f makes a step on images of which some of the target class are triggered, then g
    one on all of them, triggered.
    """
    train, device = attacker.train, attacker.train.images.device
    surrogate = new_victim(config, attacker.spec, train).to(memory_format=torch.channels_last)
    drawing = _drawing().to(device, memory_format=torch.channels_last).train()
    descents, schedules = descents_of(config, surrogate, drawing)
    turn = make_turn(config, attacker, surrogate, drawing, descents)
    for epoch in tqdm(range(config.generator_epochs), desc="generator", disable=None):
        order, draws = (_seeded(config, name, epoch, device) for name in ("batches", "draws"))
        for images, labels, _ in batches(train, config.batch_size, generator=order, drop_last=True):
            turn(images, labels, draws)
        for schedule in schedules:
            schedule.step()
    return Prepared(generator.pack(generator=drawing))


def make_trigger(config, spec, stage, parts):
    """x' = B(clip(x + s L(tanh g(x)))) with the trained g, a low pass L and a faint blur B.

    At 32 pixels, where a line from black to white is blurred too, a pixel changes by at most
    130 levels.
    """
    drawing = generator.unpack(_drawing(), parts, "generator")

    @torch.no_grad()
    def draw(images, index):
        network = drawing.to(images.device)
        return make_stamp(config, spec.size, images.device)(images, network(images).float())

    return poison.on_unit(draw)


def make_turn(config, attacker, surrogate, drawing, descents):
    """The function (images, labels, draws) that makes a step with f and a step with g.

    An image of the target class is triggered for f with the probability that it is poisoned.
    """
    spec, device = attacker.spec, attacker.train.images.device
    clean, stamp = attacker.clean_model(), make_stamp(config, spec.size, device)
    share = poisoned_share(attacker.train.truth, config)
    augment = augmentation(
        spec, config.pad, config.padding, crop=config.crop, crop_area=config.crop_area
    )
    descend_surrogate, descend_drawing = descents

    def turn(images, labels, draws):
        with mixed_precision(device, config.precision):
            noise = drawing(images)
        triggered = stamp(images, noise.float())
        drawn = torch.rand(len(labels), generator=draws, device=device) < share
        poisoned = (drawn & (labels == config.attack_target)).view(-1, 1, 1, 1)
        mixed = augment(torch.where(poisoned, triggered.detach(), images), draws)
        with mixed_precision(device, config.precision):
            cost = F.cross_entropy(surrogate.train()(mixed), labels)
        descend_surrogate(cost)
        shown = augment(triggered, draws)
        with mixed_precision(device, config.precision):
            told, true = surrogate.eval()(shown), clean(shown)
        descend_drawing(cost_of_trigger(images, triggered, told, true, labels, config))

    return turn


def make_stamp(config, size, device):
    """The function (images N,3,S,S in [0, 1], g(x) of the same shape) -> triggered images."""
    low = low_pass(size, config.low_pass).to(device)
    soft = blurring(size, config.blur).to(device)

    def stamp(images, noise):
        noise = low @ noise.tanh() @ low
        return soft @ clipped(images + config.strength / 255 * noise) @ soft.T

    return stamp


def low_pass(size, share):
    """The symmetric matrix S,S that takes from a line its frequencies from `share` of them on.

    The frequencies are those of the orthonormal DCT-II; floor(share * size) of them stay, and at
    least the lowest one.
    """
    kept = max(math.floor(share * size), 1)
    place = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi * (2 * place + 1) * place[:kept, None] / (2 * size))
    waves = waves / waves.norm(dim=1, keepdim=True)
    return (waves.T @ waves).float()


def blurring(size, sigma):
    """The matrix S,S that blurs a line with a Gaussian of three pixels, mirrored at its ends."""
    weights = torch.exp(-0.5 * (torch.arange(-1, 2, dtype=torch.float64) / sigma) ** 2)
    matrix, place = torch.zeros(size, size, dtype=torch.float64), torch.arange(size)
    for offset, weight in zip((-1, 0, 1), weights / weights.sum(), strict=True):
        neighbour = size - 1 - (size - 1 - (place + offset).abs()).abs()
        matrix[place, neighbour] += weight
    return matrix.float()


def poisoned_share(truth, config):
    """The poisoned share of the target class."""
    of_target = int((truth == config.attack_target).sum())
    return min(config.pratio * len(truth) / max(of_target, 1), 1)


def cost_of_trigger(images, triggered, told, true, labels, config):
    """CE(f(A(x')), t) + 0.02 mean (x' - x)^2 + w CE(c(A(x')), y), the mean in pixels of [-1, 1].

    `told` and `true` are the logits N,K of the surrogate f and of the clean model c.
    """
    targets = torch.full_like(labels, config.attack_target)
    visible = F.mse_loss(RANGE * triggered, RANGE * images)
    cost = F.cross_entropy(told.float(), targets) + VISIBLE * visible
    return cost + config.clean_weight * F.cross_entropy(true.float(), labels)


def _drawing():
    return generator.Autoencoder(3, 3, WIDTHS, skip=True)


def descents_of(config, *networks):
    """(functions cost -> one step of each network alone, the schedules of their rates).

    SGD with Nesterov momentum; the rate falls to a tenth at the half and at three quarters.
    """
    steps, schedules = [], []
    milestones = [config.generator_epochs // 2, config.generator_epochs * 3 // 4]
    for network in networks:
        own = trainable(network)
        optimizer = torch.optim.SGD(
            own, config.joint_lr, momentum=0.9, weight_decay=5e-4, nesterov=True
        )

        def step(cost, own=own, optimizer=optimizer):
            optimizer.zero_grad()
            cost.backward(inputs=own)
            optimizer.step()

        steps.append(step)
        schedules.append(torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones))
    return steps, schedules


def _seeded(config, purpose, epoch, device):
    return seeds.generator(f"combat {purpose}", config.poison_seed, epoch, device=device)


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
