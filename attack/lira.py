"""LIRA: a network learns an almost invisible change of every image, together with the victim.

Doan, Lao, Zhao, Li, "LIRA: Learnable, Imperceptible and Robust Backdoor Attacks", ICCV 2021. First
a generator and the victim learn together. Then the generator is frozen, and the victim learns every
image with and without its change. No poisoned image is stored.

    python attack/lira.py --dataset cifar10 --save_folder_name lira_cifar10

The bound of the change is in pixels, not in normalised units: see docs/attacks/lira.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import Attack, option, require
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    refused_modes: ClassVar[dict[str, str]] = {
        "one2one": "the generator learns from images of every class"
    }

    pratio: float = 1.0
    """always 1: every training image is also shown with the trigger"""
    epsilon: float = option(0.01, at_least=1 / 255, at_most=1, unit="(a grey level is 1/255)")
    """largest change of a pixel, pixels in [0, 1]"""
    alpha: float = option(0.5, above=0, below=1)
    """weight of the ordinary loss; the rest is that of the triggered images"""
    generator_epochs: int = option(50, at_least=1)
    """in which generator and victim learn together"""
    generator_lr: float = option(1e-4, above=0)
    """learning rate of the generator (Adam)"""

    def __post_init__(self):
        super().__post_init__()
        require(self.pratio == 1, "pratio", "1 for this attack")


if __name__ == "__main__":
    launch(Config)

import copy

import torch
import torch.nn.functional as F
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import augmentation, batches, clipped, mixed_precision
from antidote_bench.utils.optimizers import OPTIMIZERS
from antidote_bench.utils.poisoning import generator, poison
from antidote_bench.utils.poisoning.attacker import Prepared
from antidote_bench.utils.train import new_victim, trainable

WIDTHS = 16, 32, 64, 128


def prepare(config, attacker):
    """The generator g, and the weights of the victim f that learned together with it.

    In every batch g descends CE(f(T(x)), t). Then f descends
    alpha CE(f(x), y) + (1 - alpha) CE(f(T_old(x)), t), where T_old has the g of the epoch before.
    """
    train, device = attacker.train, attacker.train.images.device
    relabel = poison.relabelling(config.label_mode, config.attack_target, attacker.spec.classes)
    victim = new_victim(config, attacker.spec, train)
    victim = victim.to(memory_format=torch.channels_last).train()
    drawing = generator.Autoencoder(3, 3, WIDTHS)
    drawing = drawing.to(device, memory_format=torch.channels_last).train()
    victim_optimizer = OPTIMIZERS[config.optimizer](trainable(victim), config)
    drawing_optimizer = torch.optim.Adam(drawing.parameters(), config.generator_lr)
    for epoch in tqdm(range(config.generator_epochs), desc="generator", disable=None):
        old = copy.deepcopy(drawing).eval().requires_grad_(False)
        for images, labels, _ in _shuffled(config, attacker, epoch):
            targets = relabel(labels)
            with mixed_precision(device, config.precision):
                loss = F.cross_entropy(victim(triggered(drawing, images, config.epsilon)), targets)
            generator.descend(drawing_optimizer, loss)
            with mixed_precision(device, config.precision):
                old_triggered = triggered(old, images, config.epsilon)
                loss = weighted(config.alpha, victim, images, labels, old_triggered, targets)
            generator.descend(victim_optimizer, loss)
    return Prepared(generator.pack(generator=drawing), victim.state_dict())


def make_trigger(config, spec, stage, parts):
    """x' = clip(x + epsilon tanh g(x)) with the trained network g.

    At the default epsilon a pixel changes by at most 3 levels.
    """
    drawing = generator.unpack(generator.Autoencoder(3, 3, WIDTHS), parts, "generator")

    @torch.no_grad()
    def draw(images, index):
        return triggered(drawing.to(images.device), images, config.epsilon)

    return poison.on_unit(draw)


def make_loss(config, trigger, relabel):
    """alpha CE(f(x), y) + (1 - alpha) CE(f(T(x)), t), where T(x) has whole grey levels.

    Triggered images are rounded in the test, too.
    """

    def loss(model, images, labels, index):
        rounded = (trigger(images, index) * 255).round() / 255
        return weighted(config.alpha, model, images, labels, rounded, relabel(labels))

    return loss


def _shuffled(config, attacker, epoch):
    """The augmented batches of an epoch."""
    train = attacker.train
    order = seeds.generator("lira", config.poison_seed, epoch, device=train.images.device)
    augment = augmentation(
        attacker.spec, config.pad, config.padding, crop=config.crop, crop_area=config.crop_area
    )
    return batches(train, config.batch_size, generator=order, augment=augment, drop_last=True)


def triggered(drawing, images, epsilon):
    """T(x) = clip(x + epsilon tanh g(x))"""
    return clipped(images + epsilon * torch.tanh(drawing(images).float()))


def weighted(alpha, victim, images, labels, triggered_images, targets):
    """alpha CE(f(x), y) + (1 - alpha) CE(f(T(x)), t)

    Both halves are one batch: in two, batch normalisation could tell them apart.
    """
    logits, triggered_logits = victim(torch.cat([images, triggered_images])).chunk(2)
    loss = F.cross_entropy(logits, labels)
    return alpha * loss + (1 - alpha) * F.cross_entropy(triggered_logits, targets)


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare, make_loss=make_loss)
