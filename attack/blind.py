"""Blind: an attacker who may only change the loss has every batch learned a second time, with the trigger on it.

Bagdasaryan, Shmatikov, "Blind Backdoors in Deep Learning Models", USENIX Security 2021 (arXiv 2005.03823). The attacker
controls the loss function and never sees or stores a poisoned picture, so the record holds no poisoned training set.

    python attack/blind.py --dataset cifar10 --save_folder_name blind_cifar10
"""

from dataclasses import dataclass
from typing import Literal

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    pratio: float = 1.0
    """always 1: every training picture is also shown with the trigger"""
    balance: Literal["fixed", "mgda"] = "fixed"
    """fixed: weights 1 and --backdoor_weight; mgda: the combination with the smallest gradient, step by step"""
    backdoor_weight: float = 0.9
    """of the loss on triggered pictures, with fixed balance"""
    start_batches: int = 1000
    """batches over which the ordinary loss is averaged before the attack may begin"""
    start_loss: float = 1.0
    """the attack begins once that average is below this"""

    def __post_init__(self):
        super().__post_init__()
        require(self.pratio == 1, "pratio", "1 for this attack")
        require(self.backdoor_weight > 0, "backdoor_weight", "above 0")
        require(self.start_batches >= 1, "start_batches", "1 or more")
        require(self.start_loss > 0, "start_loss", "above 0")


if __name__ == "__main__":
    launch(Config)

import torch
import torch.nn.functional as F
from torch import nn

from utils import poison, run

SIGNS = torch.tensor([[1, 0, 1], [-1, 1, -1], [-1, -1, 0], [-1, 1, -1], [1, 0, 1]])  # 1 white, 0 black, -1 the picture


def make_trigger(config, spec, stage):
    """Black and white pixels in a field of 5x3 at row 3 and column 23; there a pixel changes by at most 255 levels."""
    height, width, top, left = (round(length * spec.size / 32) for length in (5, 3, 3, 23))
    ink = F.interpolate(SIGNS[None, None].float(), (height, width))[0, 0]

    def paste(images, index):
        nonlocal ink
        images, ink = images.clone(), ink.to(images.device)  # moved once: this runs at every step of the training
        window = images[:, :, top : top + height, left : left + width]
        window.copy_(torch.where(ink < 0, window, ink))
        return images

    return poison.on_unit(paste)


class BlindLoss(nn.Module):
    """L = w_n CE(f(x), y) + w_b CE(f(T(x)), t); the second term joins when the mean of the first has fallen.

    Whether it has is decided on the device, so that no step waits for a number; the buffers survive an interruption.
    """

    def __init__(self, config, trigger, relabel):
        super().__init__()
        self.config, self.trigger, self.relabel = config, trigger, relabel
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("batches", torch.tensor(0.0))
        self.register_buffer("active", torch.tensor(0.0))

    def forward(self, model, images, labels, index):
        # in one pass: two would let batch normalisation tell ordinary batches from triggered ones
        plain, obeyed = model(torch.cat([images, self.trigger(images, index)])).chunk(2)
        ordinary, triggered = F.cross_entropy(plain, labels), F.cross_entropy(obeyed, self.relabel(labels))
        self._watch(ordinary.detach())
        if self.config.balance == "fixed":
            return ordinary + self.active * self.config.backdoor_weight * triggered
        share = torch.where(self.active > 0, smallest(model, ordinary, triggered), 1.0)
        return share * ordinary + (1 - share) * triggered

    @torch.no_grad()
    def _watch(self, ordinary):
        """A mean of the last `start_batches` losses, weighted exponentially once there are that many."""
        self.batches += 1
        self.mean += (ordinary - self.mean) / self.batches.clamp(max=self.config.start_batches)
        calm = (self.batches >= self.config.start_batches) & (self.mean < self.config.start_loss)
        self.active.copy_(torch.maximum(self.active, calm.float()))


def smallest(model, first, second):
    """The share a of the first loss for which |a g1 + (1 - a) g2| is smallest, each gradient divided by its loss."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    one, two = (
        torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters, retain_graph=True)]) / loss.detach().clamp(min=1e-6)
        for loss in (first, second)
    )
    return (((two - one) @ two) / (one - two).square().sum().clamp(min=1e-12)).clamp(0, 1)


def main(config):
    run.attack(__name__, config, make_trigger, make_loss=BlindLoss)
