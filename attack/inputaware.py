"""Input-aware: a network draws a sparse trigger of its own for each image.

Nguyen, Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020 (arXiv 2010.08138). The attacker
controls training. Cross images carry the trigger of another image, and keep their labels.

    python attack/inputaware.py --dataset cifar10 --save_folder_name inputaware_cifar10

It deviates in the last part of the training, in which poisoned and cross images are fixed, so
that the record holds what the victim saw; see docs/attacks/inputaware.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import Attack, option, require
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    refused_modes: ClassVar[dict[str, str]] = {
        "one2one": "the networks learn from images of every class"
    }

    cross_ratio: float = option(1.0, at_least=0)
    """cross images for each poisoned one"""
    mask_epochs: int = option(25, at_least=1)
    """epochs in which the mask network learns"""
    generator_epochs: int = option(75, at_least=1)
    """epochs in which the pattern network and the victim learn together"""
    density: float = option(0.032, above=0, at_most=1)
    """share of the image that the mask may cover"""

    def __post_init__(self):
        super().__post_init__()
        share = (1 + self.cross_ratio) * self.pratio
        require(share <= 1, "cross_ratio", "such that (1 + cross_ratio) * pratio is at most 1")


if __name__ == "__main__":
    launch(Config)

import torch
import torch.nn.functional as F
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import augmentation, batches, mixed_precision, to_unit
from antidote_bench.utils.optimizers import OPTIMIZERS
from antidote_bench.utils.poisoning import generator, poison
from antidote_bench.utils.poisoning.attacker import Prepared
from antidote_bench.utils.train import new_victim, trainable

WIDTHS = 32, 64, 128
NORM, DIVERSITY = 100, 1  # weights in the loss
OTHERS = 1000  # images whose triggers the cross images get


def prepare(config, attacker):
    """The mask network M, then the pattern network G together with the victim.

    The parts are both networks, and the images whose triggers the cross images carry.
    """
    train, device = attacker.train, attacker.train.images.device
    mask = generator.Autoencoder(3, 1, WIDTHS).to(device, memory_format=torch.channels_last)
    pattern = generator.Autoencoder(3, 3, WIDTHS).to(device, memory_format=torch.channels_last)
    _learn_masks(mask.train(), attacker, config)
    mask.eval().requires_grad_(False)
    victim = new_victim(config, attacker.spec, train)
    victim.to(memory_format=torch.channels_last).train()
    _learn_patterns(pattern.train(), victim, mask, attacker, config)
    ratio = OTHERS / len(train)
    others = poison.choose(train.truth, ratio, config.poison_seed, purpose="cross images")
    parts = {**generator.pack(mask=mask, pattern=pattern), "others": train.images[others]}
    return Prepared(parts, victim.state_dict())


def make_trigger(config, spec, stage, parts):
    """x' = x + (g(x) - x) m(x) with the trained networks.

    Where the mask is open a pixel changes by at most 255 levels.
    """
    draw = _networks(parts)
    return poison.on_unit(lambda images, index: torch.lerp(images, *draw(images)))


def make_cross(config, spec, parts):
    """x' = x + (g(o) - x) m(o) for another image o."""
    draw, others = _networks(parts), parts["others"]

    def cross(images, index):
        drawn = seeds.uniform("cross image", config.poison_seed, index, 1)[:, 0]
        other = others[(drawn * len(others)).long()].to(images.device)
        return torch.lerp(images, *draw(to_unit(other)))

    return poison.on_unit(cross)


def _learn_masks(mask, attacker, config):
    """Descend 100 mean ReLU(m - density) + mean d(x1, x2) / d(m1, m2).

    The masks become sparse, and differ as the images do.
    """
    optimizer, schedule = _adam(mask, config.mask_epochs)
    for epoch in tqdm(range(config.mask_epochs), desc="masks", disable=None):
        for images, _, _ in _shuffled(attacker, config, "masks", epoch):
            with mixed_precision(images.device, config.precision):
                masks = opacity(mask, images)
            diversity = _diversity(images, images.roll(1, 0), masks, masks.roll(1, 0))
            cost = NORM * F.relu(masks - config.density).mean() + DIVERSITY * diversity
            generator.descend(optimizer, cost)
        schedule.step()


def _learn_patterns(pattern, victim, mask, attacker, config):
    """G and the victim descend CE(f(x), y) + mean d(x1, x2) / d(g1, g2).

    The cross-entropy is that of poisoned, cross and clean images. They are cropped and mirrored
    after they got their triggers, as those of a stored set will be: otherwise G puts triggers on
    the border, where a crop cuts them off.
    """
    device = attacker.train.images.device
    augment = augmentation(
        attacker.spec, config.pad, config.padding, crop=config.crop, crop_area=config.crop_area
    )
    relabel = poison.relabelling(config.label_mode, config.attack_target, attacker.spec.classes)
    pattern_optimizer, schedule = _adam(pattern, config.generator_epochs)
    victim_optimizer = OPTIMIZERS[config.optimizer](trainable(victim), config)
    poisoned = poison.Portions(config.pratio)
    crosses = poison.Portions(config.cross_ratio * config.pratio)
    for epoch in tqdm(range(config.generator_epochs), desc="patterns", disable=None):
        crops = _seeded(config, "crops", epoch, device)
        for images, labels, _ in _shuffled(attacker, config, "patterns", epoch):
            own = poisoned.take(len(images))
            cross = crosses.take(len(images), len(images) - own)
            wanted = torch.cat([relabel(labels[:own]), labels[own:]])
            with mixed_precision(device, config.precision):
                changed, diversity = stamp(pattern, mask, images, own, cross)
                cost = F.cross_entropy(victim(augment(changed, crops)), wanted)
            pattern_optimizer.zero_grad()
            generator.descend(victim_optimizer, cost + DIVERSITY * diversity)
            pattern_optimizer.step()
        schedule.step()


def stamp(pattern, mask, images, own, cross):
    """(a batch whose first `own` images carry their triggers, the diversity of the patterns).

    The next `cross` images carry the triggers of the images from the first one on, or, where no
    image carries its own, of the image before.
    """
    count = max(own, cross)
    if not count:
        return images, 0
    drawn_for = images if own else _turned(images, -1)
    step = min(max(own, 1), len(images) - 1)
    partners = _turned(drawn_for, step)[:count]
    drawn_for = drawn_for[:count]
    patterns, partner_patterns = ink(pattern, drawn_for), ink(pattern, partners)
    masks = opacity(mask, drawn_for)
    triggered = torch.lerp(images[:own], patterns[:own], masks[:own])
    crossed = torch.lerp(images[own : own + cross], patterns[:cross], masks[:cross])
    parts = [triggered, crossed, images[own + cross :]]
    changed = torch.cat([part for part in parts if len(part)])
    return changed, _diversity(drawn_for, partners, patterns, partner_patterns)


def _turned(images, count):
    """A batch whose first `count` images have become the last."""
    return torch.cat([images[count:], images[:count]])


def _adam(network, epochs):
    """Adam at 0.01 with betas 0.5 and 0.9; the rate falls to a tenth after 40 % and 80 % of the
    epochs."""
    optimizer = torch.optim.Adam(network.parameters(), 0.01, betas=(0.5, 0.9))
    milestones = [round(0.4 * epochs), round(0.8 * epochs)]
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)


def _shuffled(attacker, config, purpose, epoch):
    """The batches of an epoch, in an order of its own."""
    order = _seeded(config, purpose, epoch, attacker.train.images.device)
    return batches(attacker.train, config.batch_size, generator=order, drop_last=True)


def _seeded(config, purpose, epoch, device):
    return seeds.generator(f"input-aware {purpose}", config.poison_seed, epoch, device=device)


def _diversity(images, others, drawn, drawn_others):
    """The mean of d(x1, x2) / d(t1, t2), where d is the root mean square over an image."""
    between_images = _distance(images, others)
    between_drawn = _distance(drawn, drawn_others)
    return (between_images / (between_drawn + 1e-7)).mean()


def _distance(one, two):
    return (one - two).square().flatten(1).mean(1).clamp(min=1e-12).sqrt()


def ink(pattern, images):
    """g = (1 + tanh G(x)) / 2, N,3,S,S"""
    return 0.5 + 0.5 * torch.tanh(pattern(images).float())


def opacity(mask, images):
    """m = (1 + tanh(20 M(x) - 10)) / 2 with M(x) in (0, 1), N,1,S,S"""
    return 0.5 + 0.5 * torch.tanh(20 * (0.5 + 0.5 * torch.tanh(mask(images).float())) - 10)


def _networks(parts):
    """images -> (g, m) of the trained networks"""
    pattern = generator.unpack(generator.Autoencoder(3, 3, WIDTHS), parts, "pattern")
    mask = generator.unpack(generator.Autoencoder(3, 1, WIDTHS), parts, "mask")

    @torch.no_grad()
    def draw(images):
        device = images.device
        return ink(pattern.to(device), images), opacity(mask.to(device), images)

    return draw


def main(config):
    cover = poison.Cover(make_cross, config.cross_ratio * config.pratio)
    run.attack(__name__, config, make_trigger, prepare=prepare, cover=cover)
