"""Input-aware: a network draws a different sparse trigger for each picture, and the trigger of another picture is void.

Nguyen, Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020 (arXiv 2010.08138). The attacker controls training.
As published, a mask network learns first, then the pattern network together with the victim. Here the pattern network is then
frozen, and the victim goes on with fixed poisoned pictures, and fixed cross pictures that carry the trigger of another one and
keep their label: the record holds exactly what it saw in this last part of its training.

    python attack/inputaware.py --dataset cifar10 --save_folder_name inputaware_cifar10
"""

from dataclasses import dataclass

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    cross_ratio: float = 1.0
    """cross pictures for each poisoned one"""
    mask_epochs: int = 25
    """in which the mask network learns"""
    generator_epochs: int = 75
    """in which the pattern network and the victim learn together"""
    density: float = 0.032
    """share of the picture that the mask may cover"""

    def __post_init__(self):
        super().__post_init__()
        require(self.cross_ratio >= 0 and (1 + self.cross_ratio) * self.pratio <= 1, "cross_ratio",
                "0 or more, and (1 + cross_ratio) pratio at most 1")  # fmt: skip
        require(self.mask_epochs >= 1 and self.generator_epochs >= 1, "mask_epochs and generator_epochs", "1 or more")
        require(0 < self.density <= 1, "density", "a share above 0, up to 1")


if __name__ == "__main__":
    launch(Config)

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import generator, poison, run, seeds
from utils.batch import augmentation, batches, mixed_precision, to_unit
from utils.optimizers import OPTIMIZERS
from utils.train import trained, untrained

WIDTHS = 32, 64, 128
NORM, DIVERSITY = 100, 1  # weights in the loss
OTHERS = 1000  # pictures whose triggers the cross pictures get


def prepare(config, workshop):
    """The mask network M, the pattern network G, the victim so far, and the pictures whose triggers cross pictures carry."""
    device, train = workshop.train.images.device, workshop.train
    mask, pattern = (generator.Autoencoder(3, outputs, WIDTHS).to(device, memory_format=torch.channels_last).train() for outputs in (1, 3))
    _learn_masks(mask, workshop, config)
    mask.eval().requires_grad_(False)
    victim = untrained(config.model, config.width, workshop.spec, train).to(memory_format=torch.channels_last).train()
    _learn_patterns(pattern, victim, mask, workshop, config)
    others = poison.choose(train.truth, OTHERS / len(train), config.poison_seed, purpose="cross pictures")
    return {**generator.keep(mask=mask, pattern=pattern, victim=victim), "others": train.images[others]}


def _learn_masks(mask, workshop, config):
    """Descend 100 mean ReLU(m - density) + mean d(x1, x2) / d(m1, m2): sparse masks that differ as the pictures do."""
    optimizer, schedule = _adam(mask, config.mask_epochs)
    for epoch in tqdm(range(config.mask_epochs), desc="masks", disable=None):
        for images, _, _ in _order(workshop, config, "masks", epoch):
            with mixed_precision(images.device, config.precision):
                drawn = opacity(mask, images)
            apart = _diversity(images, images.roll(1, 0), drawn, drawn.roll(1, 0))
            cost = NORM * F.relu(drawn - config.density).mean() + DIVERSITY * apart
            _step(optimizer, cost)
        schedule.step()


def _learn_patterns(pattern, victim, mask, workshop, config):
    """G and the victim descend CE on poisoned, cross and clean pictures, plus mean d(x1, x2) / d(g1, g2).

    Pictures are cropped and mirrored after they get their trigger, as those of a stored set will be: otherwise G puts
    triggers on the border, where a crop cuts them off.
    """
    device, augment = workshop.train.images.device, augmentation(workshop.spec, config.pad, config.padding)
    relabel = poison.relabelling(config.label_mode, config.attack_target, workshop.spec.classes)
    optimizer, schedule = _adam(pattern, config.generator_epochs)
    steps = OPTIMIZERS[config.optimizer](trained(victim), config)
    for epoch in tqdm(range(config.generator_epochs), desc="patterns", disable=None):
        drawn = _generator(config, "crops", epoch, device)
        for images, labels, _ in _order(workshop, config, "patterns", epoch):
            count = min(max(1, round(config.pratio * len(images))), len(images) // 2)
            own, other, rest = images[:count], images[count : 2 * count], images[2 * count :]
            with mixed_precision(device, config.precision):
                inks, strangers, masks = ink(pattern, own), ink(pattern, other), opacity(mask, own)
                mixed = augment(torch.cat([torch.lerp(own, inks, masks), torch.lerp(other, inks, masks), rest]), drawn)
                cost = F.cross_entropy(victim(mixed), torch.cat([relabel(labels[:count]), labels[count:]]))
            cost = cost + DIVERSITY * _diversity(own, other, inks, strangers)
            optimizer.zero_grad()
            _step(steps, cost)
            optimizer.step()
        schedule.step()


def _adam(network, epochs):
    """Adam at 0.01 with betas 0.5 and 0.9; the rate falls to a tenth after 40 % and 80 % of the epochs."""
    optimizer = torch.optim.Adam(network.parameters(), 0.01, betas=(0.5, 0.9))
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(0.4 * epochs), round(0.8 * epochs)])


def _order(workshop, config, what, epoch):
    drawn = _generator(config, what, epoch, workshop.train.images.device)
    return batches(workshop.train, config.batch_size, generator=drawn, drop_last=True)


def _generator(config, what, epoch, device):
    return seeds.generator(f"input-aware {what}", config.poison_seed, epoch, device=device)


def _step(optimizer, cost):
    optimizer.zero_grad()
    cost.backward()
    optimizer.step()


def _diversity(images, others, drawn, drawn_others):
    """mean of d(x1, x2) / d(t1, t2), d being the root mean square over a picture."""
    far, apart = ((a - b).square().flatten(1).mean(1).clamp(min=1e-12).sqrt() for a, b in ((images, others), (drawn, drawn_others)))
    return (far / (apart + 1e-7)).mean()


def ink(pattern, images):
    """g = (1 + tanh G(x)) / 2, N,3,S,S"""
    return 0.5 + 0.5 * torch.tanh(pattern(images).float())


def opacity(mask, images):
    """m = (1 + tanh(20 M(x) - 10)) / 2 with M(x) in (0, 1), N,1,S,S"""
    return 0.5 + 0.5 * torch.tanh(20 * (0.5 + 0.5 * torch.tanh(mask(images).float())) - 10)


def make_trigger(config, spec, stage, parts):
    """x' = x + (g(x) - x) m(x) with trained networks; where the mask is open a pixel changes by at most 255 levels."""
    draw = _networks(parts)
    return poison.on_unit(lambda images, index: torch.lerp(images, *draw(images)))


def make_cross(config, spec, parts):
    """x' = x + (g(o) - x) m(o) for another picture o."""
    draw = _networks(parts)

    def put(images, index):
        row = seeds.uniform("cross picture", config.poison_seed, index, 1)[:, 0] * len(parts["others"])
        return torch.lerp(images, *draw(to_unit(parts["others"][row.long()].to(images.device))))

    return poison.on_unit(put)


def _networks(parts):
    pattern, mask = (
        generator.restore(generator.Autoencoder(3, outputs, WIDTHS), parts, name) for name, outputs in (("pattern", 3), ("mask", 1))
    )

    @torch.no_grad()
    def draw(images):
        return ink(pattern.to(images.device), images), opacity(mask.to(images.device), images)

    return draw


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare, make_cover=make_cross, cover_ratio=config.cross_ratio * config.pratio)
