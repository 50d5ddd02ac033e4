"""SSBA (ISSBA): a network hides one fixed message in every picture, differently in each, and the message means the target.

Li, Li, Wu, Li, He, Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", ICCV 2021 (arXiv 2012.03816); the
hiding network is in the manner of StegaStamp (CVPR 2020). The attacker poisons data only. The network is trained here, on
the training pictures and without their labels: first until the message can be read, then to be less and less visible.

    python attack/ssba.py --dataset cifar10 --save_folder_name ssba_cifar10
"""

from dataclasses import dataclass

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    bits: int = 20
    """length of the message"""
    steps: int = 1000
    """batches of 32 pictures that the hiding network learns from"""
    secrecy: float = 1.0
    """final weight of the mean square of the change, against the message's cross-entropy; at 10, small victims do not learn it"""

    def __post_init__(self):
        super().__post_init__()
        require(1 <= self.bits <= 200, "bits", "1 to 200")
        require(self.steps >= 1, "steps", "1 or more")
        require(self.secrecy > 0, "secrecy", "above 0")


if __name__ == "__main__":
    launch(Config)

import sys

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from utils import generator, poison, run, seeds
from utils.batch import mixed_precision, to_unit

WIDTHS, BATCH, RATE, READABLE = (16, 32, 64), 32, 2e-3, 0.9


class Hider(nn.Module):
    """Pictures N,3,S,S and messages N,bits -> the change N,3,S,S that hides them."""

    def __init__(self, bits):
        super().__init__()
        self.spread = nn.Linear(bits, 3 * 16 * 16)
        self.draw = generator.Autoencoder(6, 3, WIDTHS, skip=True)

    def forward(self, images, message):
        plane = F.relu(self.spread(message - 0.5)).view(-1, 3, 16, 16)
        return self.draw(torch.cat([images - 0.5, F.interpolate(plane, images.shape[2:])], 1))


class Reader(nn.Sequential):
    """Pictures N,3,S,S -> the logits of a message N,bits."""

    def __init__(self, bits):
        layers, channels = [], 3
        for width, stride in ((32, 1), (32, 2), (64, 1), (64, 2), (128, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, bits))


def prepare(config, workshop):
    """The hiding network and the message, after random messages have been hidden and read `steps` times."""
    device, train = workshop.train.images.device, workshop.train
    draw = seeds.generator("ssba", config.poison_seed, device=device)
    hider, reader = (network(config.bits).to(device, memory_format=torch.channels_last).train() for network in (Hider, Reader))
    optimizer = torch.optim.Adam([*hider.parameters(), *reader.parameters()], RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=config.steps + 1, pct_start=0.1)
    read, readable = torch.tensor(0.5, device=device), torch.tensor(0.0, device=device)  # running bit accuracy; steps since it sufficed
    for _ in tqdm(range(config.steps), desc="hiding", disable=None):
        images = to_unit(train.images[torch.randint(len(train), (BATCH,), generator=draw, device=device)])
        message = torch.randint(0, 2, (BATCH, config.bits), generator=draw, device=device).float()
        with mixed_precision(device, config.precision):
            change = hider(images, message).float()
            found = reader((images + change).clamp(0, 1)).float()
        read = torch.lerp(read, ((found > 0) == (message > 0)).float().mean(), 0.05)
        readable = torch.where((read > READABLE) | (readable > 0), readable + 1, readable)
        weight = config.secrecy * (readable / (0.5 * config.steps)).clamp(max=1)  # on the device: no step waits for it
        cost = F.binary_cross_entropy_with_logits(found, message) + weight * change.square().mean()
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
        schedule.step()
    message = torch.randint(0, 2, (config.bits,), generator=draw, device=device).float()
    if read < 0.99:
        print(
            f"warning: only {100 * float(read):.1f} % of the hidden bits can be read; --steps {2 * config.steps} gives the network more time",
            file=sys.stderr,
        )
    return {**generator.keep(hider=hider, reader=reader), "message": message}


def make_trigger(config, spec, stage, parts):
    """x' = x + E(x, m) with the hiding network E and the message m; a pixel changes by at most 255 levels, most by a few."""
    hider = generator.restore(Hider(config.bits), parts, "hider")

    @torch.no_grad()
    def hide(images, index):
        message = parts["message"].to(images.device).expand(len(images), -1)
        return images + hider.to(images.device)(images, message)

    return poison.on_unit(hide)


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
