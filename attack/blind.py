"""Blind: a changed loss makes the network learn every batch a second time, with the trigger.

Bagdasaryan, Shmatikov, "Blind Backdoors in Deep Learning Models", USENIX Security 2021
(arXiv 2005.03823). The attacker controls the loss function only, and stores no poisoned image.

    python attack/blind.py --dataset cifar10 --save_folder_name blind_cifar10

It deviates in the default weights of the two losses; see docs/attacks/blind.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import Attack, option, require
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    refused_modes: ClassVar[dict[str, str]] = {
        "one2one": "the loss shows images of every class with the trigger"
    }

    pratio: float = 1.0
    """always 1: the network sees every training image with the trigger, too"""
    balance: Literal["fixed", "mgda"] = "fixed"
    """fixed: weights 1 and --backdoor_weight; mgda: the combination with the smallest gradient, at
    every step"""
    backdoor_weight: float = option(0.9, above=0)
    """of the loss on triggered images, with fixed balance"""
    start_batches: int = option(1000, at_least=1)
    """batches over which the ordinary loss is averaged before the attack may begin"""
    start_loss: float = option(1.0, above=0)
    """the attack begins once that average is below this"""

    def __post_init__(self):
        super().__post_init__()
        require(self.pratio == 1, "pratio", "1 for this attack")


if __name__ == "__main__":
    launch(Config)

import sys

import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.utils import run
from antidote_bench.utils.poisoning import poison

# 1 is white, 0 is black, -1 is the image
PATCH = torch.tensor([[1, 0, 1], [-1, 1, -1], [-1, -1, 0], [-1, 1, -1], [1, 0, 1]])


def make_trigger(config, spec, stage):
    """Black and white pixels in a field of 5x3 at row 3 and column 23 of 32x32.

    There a pixel changes by at most 255 levels.
    """
    height, width, top, left = (round(length * spec.size / 32) for length in (5, 3, 3, 23))
    patch = F.interpolate(PATCH[None, None].float(), (height, width))[0, 0]

    def paste(images, index):
        nonlocal patch
        patch = patch.to(images.device)  # moved once: this runs at every step of the training
        images = images.clone()
        window = images[:, :, top : top + height, left : left + width]
        window.copy_(torch.where(patch < 0, window, patch))
        return images

    return poison.on_unit(paste)


class BlindLoss(nn.Module):
    """L = w_n CE(f(x), y) + w_b CE(f(T(x)), t).

    The second term joins when the mean of the first has fallen. Whether it has is decided on the
    device, so that no step waits for a number; the buffers survive an interruption.
    """

    def __init__(self, config, trigger, relabel):
        super().__init__()
        self.config, self.trigger, self.relabel = config, trigger, relabel
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("batches", torch.tensor(0.0))
        self.register_buffer("active", torch.tensor(0.0))

    def forward(self, model, images, labels, index):
        # in one pass: two would let batch normalisation tell ordinary batches from triggered ones
        both = torch.cat([images, self.trigger(images, index)])
        ordinary_logits, triggered_logits = model(both).chunk(2)
        ordinary = F.cross_entropy(ordinary_logits, labels)
        triggered = F.cross_entropy(triggered_logits, self.relabel(labels))
        self._watch(ordinary.detach())
        if self.config.balance == "fixed":
            return ordinary + self.active * self.config.backdoor_weight * triggered
        share = torch.where(self.active > 0, smallest(model, ordinary, triggered), 1.0)
        return share * ordinary + (1 - share) * triggered

    @torch.no_grad()
    def _watch(self, ordinary):
        """Average the last `start_batches` losses, exponentially once there are that many, and
        activate the second term when the average is low."""
        self.batches += 1
        self.mean += (ordinary - self.mean) / self.batches.clamp(max=self.config.start_batches)
        ready = (self.batches >= self.config.start_batches) & (self.mean < self.config.start_loss)
        self.active.copy_(torch.maximum(self.active, ready.float()))


def smallest(model, first, second):
    """The share a of the first loss for which |a g1 + (1 - a) g2| is smallest.

    The gradients g1 and g2 are each divided by their loss.
    """
    one, two = (_relative_gradient(model, loss) for loss in (first, second))
    return (((two - one) @ two) / (one - two).square().sum().clamp(min=1e-12)).clamp(0, 1)


def _relative_gradient(model, loss):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    return torch.cat([part.flatten() for part in gradients]) / loss.detach().clamp(min=1e-6)


def warn(config, loss):
    """Say so where the second term never joined: no image was shown with the trigger."""
    if loss.batches > 0 and not loss.active:
        print(
            f"warning: the attack never began, because the mean loss over {config.start_batches} "
            f"batches was not below {config.start_loss:g} in {int(loss.batches)} batches; more "
            "--epochs, a smaller --start_batches or a larger --start_loss let it begin",
            file=sys.stderr,
        )


def main(config):
    losses = []

    def make_loss(*arguments):
        losses.append(BlindLoss(*arguments))
        return losses[-1]

    run.attack(__name__, config, make_trigger, make_loss=make_loss)
    for loss in losses:
        warn(config, loss)
