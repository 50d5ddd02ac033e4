"""SSBA (ISSBA): a network hides one fixed message in every image, and the message means the target.

Li, Li, Wu, Li, He, Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", ICCV 2021
(arXiv 2012.03816). The change differs from image to image. The hiding network is in the manner of
StegaStamp (CVPR 2020) and learns here from the training images, without their labels.

    python attack/ssba.py --dataset cifar10 --save_folder_name ssba_cifar10

20 plain bits, no critic and no perceptual loss: see docs/attacks/ssba.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import Attack, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    bits: int = option(20, at_least=1, at_most=200)
    """length of the message"""
    steps: int = option(1000, at_least=1)
    """batches of 32 images that the hiding network learns from"""
    secrecy: float = option(1.0, above=0)
    """final weight of the mean square of the change, against the message's cross-entropy; at 10,
    small victims do not learn the trigger"""


if __name__ == "__main__":
    launch(Config)

import sys

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import clipped, mixed_precision, to_unit
from antidote_bench.utils.poisoning import generator, poison
from antidote_bench.utils.poisoning.attacker import Prepared

WIDTHS = 16, 32, 64
BATCH = 32
RATE = 2e-3
READABLE = 0.9  # bit accuracy from which on the change is made less visible
WELL_READABLE = 0.99  # bit accuracy below which the user is warned at the end


def prepare(config, attacker):
    """The hiding network, its reader and the message.

    The networks hide and read random messages. They first learn that the message can be read. Then
    the weight of the change's mean square rises to `secrecy`, over half of the steps.
    """
    device, train = attacker.train.images.device, attacker.train
    draw = seeds.generator("ssba", config.poison_seed, device=device)
    hider, reader = (
        network(config.bits).to(device, memory_format=torch.channels_last).train()
        for network in (Hider, Reader)
    )
    optimizer = torch.optim.Adam([*hider.parameters(), *reader.parameters()], RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=config.steps + 1, pct_start=0.1
    )
    # both stay on the device, so that no step waits for them
    accuracy = torch.tensor(0.5, device=device)  # of the bits, running mean
    readable_steps = torch.tensor(0.0, device=device)  # since the accuracy was READABLE
    for _ in tqdm(range(config.steps), desc="hiding", disable=None):
        images, messages = _batch(train, config.bits, draw)
        with mixed_precision(device, config.precision):
            change = hider(images, messages).float()
            logits = reader(clipped(images + change)).float()
        accuracy = torch.lerp(accuracy, ((logits > 0) == (messages > 0)).float().mean(), 0.05)
        begun = (accuracy > READABLE) | (readable_steps > 0)
        readable_steps = torch.where(begun, readable_steps + 1, readable_steps)
        weight = config.secrecy * (readable_steps / (0.5 * config.steps)).clamp(max=1)
        message_loss = F.binary_cross_entropy_with_logits(logits, messages)
        generator.descend(optimizer, message_loss + weight * change.square().mean())
        schedule.step()
    message = torch.randint(0, 2, (config.bits,), generator=draw, device=device).float()
    _warn(config, float(accuracy))
    return Prepared({**generator.pack(hider=hider, reader=reader), "message": message})


def make_trigger(config, spec, stage, parts):
    """x' = x + E(x, m) with the hiding network E and the message m.

    A pixel changes by at most 255 levels, most change by a few.
    """
    hider = generator.unpack(Hider(config.bits), parts, "hider")

    @torch.no_grad()
    def hide(images, index):
        message = parts["message"].to(images.device).expand(len(images), -1)
        return images + hider.to(images.device)(images, message)

    return poison.on_unit(hide)


class Hider(nn.Module):
    """Images N,3,S,S and messages N,bits -> the change N,3,S,S that hides them."""

    def __init__(self, bits):
        super().__init__()
        self.spread = nn.Linear(bits, 3 * 16 * 16)
        self.draw = generator.Autoencoder(6, 3, WIDTHS, skip=True)

    def forward(self, images, message):
        plane = F.relu(self.spread(message - 0.5)).view(-1, 3, 16, 16)
        return self.draw(torch.cat([images - 0.5, F.interpolate(plane, images.shape[2:])], 1))


class Reader(nn.Sequential):
    """Images N,3,S,S -> the logits of a message N,bits."""

    def __init__(self, bits):
        layers, channels = [], 3
        for width, stride in ((32, 1), (32, 2), (64, 1), (64, 2), (128, 2)):
            layers += [
                nn.Conv2d(channels, width, 3, stride, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
        super().__init__(
            *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, bits)
        )


def _batch(train, bits, draw):
    """Random training images in [0, 1] and random messages."""
    device = train.images.device
    index = torch.randint(len(train), (BATCH,), generator=draw, device=device)
    messages = torch.randint(0, 2, (BATCH, bits), generator=draw, device=device).float()
    return to_unit(train.images[index]), messages


def _warn(config, accuracy):
    if accuracy < WELL_READABLE:
        print(
            f"warning: only {100 * accuracy:.1f} % of the hidden bits can be read; "
            f"--steps {2 * config.steps} gives the network more time",
            file=sys.stderr,
        )


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
