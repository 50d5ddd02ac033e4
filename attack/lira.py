"""LIRA: a network learns to draw an almost invisible change for each picture, together with the victim that obeys it.

Doan, Lao, Zhao, Li, "LIRA: Learnable, Imperceptible and Robust Backdoor Attacks", ICCV 2021. The attacker controls
training: first a generator and the victim learn together, then the generator is frozen and the victim goes on with every
picture, with and without its change. No set of poisoned pictures is stored.

    python attack/lira.py --dataset cifar10 --save_folder_name lira_cifar10

The paper's bound of 0.01 is in the network's input units, a fraction of a grey level; here it is in pixels of [0, 1], so
that a triggered picture, rounded to whole levels, still carries its trigger.
"""

from dataclasses import dataclass

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    pratio: float = 1.0
    """always 1: every training picture is also shown with the trigger"""
    epsilon: float = 0.01
    """largest change of a pixel, pixels in [0, 1]"""
    alpha: float = 0.5
    """weight of the ordinary loss; the rest is that of the triggered pictures"""
    generator_epochs: int = 50
    """in which generator and victim learn together"""
    generator_lr: float = 1e-4
    """learning rate of the generator (Adam)"""

    def __post_init__(self):
        super().__post_init__()
        require(self.pratio == 1, "pratio", "1 for this attack")
        require(1 / 255 <= self.epsilon <= 1, "epsilon", "1/255 (a grey level) to 1")
        require(0 < self.alpha < 1, "alpha", "between 0 and 1")
        require(self.generator_epochs >= 1, "generator_epochs", "1 or more")
        require(self.generator_lr > 0, "generator_lr", "above 0")


if __name__ == "__main__":
    launch(Config)

import copy

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import generator, poison, run, seeds
from utils.batch import augmentation, batches, mixed_precision
from utils.optimizers import OPTIMIZERS
from utils.train import trained, untrained

WIDTHS = 16, 32, 64, 128


def prepare(config, workshop):
    """The generator g, trained with the victim f and frozen copies of itself from the epoch before.

    Each batch g descends CE(f(T(x)), t), then f descends alpha CE(f(x), y) + (1 - alpha) CE(f(T_old(x)), t).
    """
    train, device = workshop.train, workshop.train.images.device
    relabel = poison.relabelling(config.label_mode, config.attack_target, workshop.spec.classes)
    victim = untrained(config.model, config.width, workshop.spec, train).to(memory_format=torch.channels_last).train()
    drawing = generator.Autoencoder(3, 3, WIDTHS).to(device, memory_format=torch.channels_last).train()
    steps = OPTIMIZERS[config.optimizer](trained(victim), config)
    strokes = torch.optim.Adam(drawing.parameters(), config.generator_lr)
    for epoch in tqdm(range(config.generator_epochs), desc="generator", disable=None):
        old = copy.deepcopy(drawing).eval().requires_grad_(False)
        order = batches(train, config.batch_size, generator=seeds.generator("lira", config.poison_seed, epoch, device=device),
                        augment=augmentation(workshop.spec, config.pad, config.padding), drop_last=True)  # fmt: skip
        for images, labels, _ in order:
            with mixed_precision(device, config.precision):
                cost = F.cross_entropy(victim(changed(drawing, images, config.epsilon)), relabel(labels))
            _step(strokes, cost)
            with mixed_precision(device, config.precision):
                cost = weighed(config.alpha, victim, images, labels, changed(old, images, config.epsilon), relabel(labels))
            _step(steps, cost)
    return generator.keep(generator=drawing, victim=victim)


def weighed(alpha, victim, images, labels, triggered, told):
    """alpha CE(f(x), y) + (1 - alpha) CE(f(T(x)), t), in one pass: two would let batch normalisation tell them apart."""
    plain, obeyed = victim(torch.cat([images, triggered])).chunk(2)
    return alpha * F.cross_entropy(plain, labels) + (1 - alpha) * F.cross_entropy(obeyed, told)


def _step(optimizer, cost):
    optimizer.zero_grad()
    cost.backward()
    optimizer.step()


def changed(drawing, images, epsilon):
    """T(x) = clip(x + epsilon tanh g(x))"""
    return (images + epsilon * torch.tanh(drawing(images).float())).clamp(0, 1)


def make_trigger(config, spec, stage, parts):
    """x' = x + 0.01 tanh(g(x)) with the trained network g; a pixel changes by at most 3 levels."""
    drawing = generator.restore(generator.Autoencoder(3, 3, WIDTHS), parts, "generator")

    @torch.no_grad()
    def draw(images, index):
        return changed(drawing.to(images.device), images, config.epsilon)

    return poison.on_unit(draw)


def make_loss(config, trigger, relabel):
    """alpha CE(f(x), y) + (1 - alpha) CE(f(T(x)), t), T(x) in whole grey levels as it would be handed over."""

    def loss(model, images, labels, index):
        return weighed(config.alpha, model, images, labels, (trigger(images, index) * 255).round() / 255, relabel(labels))

    return loss


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare, make_loss=make_loss)
