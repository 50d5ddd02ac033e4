"""TRODO: a tiny step makes foreign images look familiar to a network with a backdoor.

Mirzaei et al., "Scanning Trojaned Models Using Out-of-Distribution Samples", NeurIPS 2024 (arXiv
2501.17151). Clean images are distorted until they belong to no class. The score is the rise of the
network's largest probability when each is changed a little to raise it.

    python detection/trodo.py --result_file badnet_cifar10

Deviates in fixing the size of the step; see docs/detection/trodo.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import ModelOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "the mean largest probability `before` and `after` the steps, and "
        "the mean rise of the `margin` of the largest logit over the second"
    }

    foreign: int = option(500, at_least=1, unit="images")
    """distorted images"""
    epsilon: float = option(2.0, above=0, at_most=255)
    """how far a pixel may move, in units of 1/255"""
    steps: int = option(10, at_least=1)
    """steps that raise the largest probability"""
    stretch: float = option(2.5, above=0)
    """length of all steps together, in units of epsilon"""


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import batch_slices, gradient_batch, halving, to_unit
from antidote_bench.utils.detection import foreign, soundness
from antidote_bench.utils.detection.inspector import Finding
from antidote_bench.utils.detection.passes import logits_of

BATCH = 250  # images whose steps are made together, at most


def score(model, record, config):
    why = soundness.reason(model, record, config, least=2)
    if why:
        return soundness.abstained(record, why)
    generator = seeds.generator("trodo", config.random_seed)
    known = to_unit(record.reference.images[: config.foreign])
    images = foreign.distorted(known, config.foreign, generator)
    noise = 2 * torch.rand(images.shape, generator=generator).to(images.device) - 1

    def climb_all(size):
        return [
            climbed(model, images[part], noise[part], config)
            for part in batch_slices(len(images), size)
        ]

    moved = torch.cat(halving(climb_all, gradient_batch(model, images, min(BATCH, len(images)))))
    before, after = (logits_of(model, some).double() for some in (images, moved))
    ends = after.argmax(1).bincount(minlength=record.spec.classes).double() / len(after)
    first, last = largest(before), largest(after)
    evidence = {"before": first, "after": last, "margin": margin(after) - margin(before)}
    return Finding(float(last - first), ends.cpu(), evidence=evidence)


def largest(logits):
    """The mean largest probability of logits n,K."""
    return logits.softmax(1).amax(1).mean()


def margin(logits):
    """The mean distance of the largest logit from the second, of logits n,K."""
    first, second = logits.topk(2).values.unbind(1)
    return (first - second).mean()


def climbed(model, images, noise, config):
    """`images` n,3,S,S in [0, 1] moved so that their largest probabilities rise.

    They start at `noise`, in [-1, 1], times epsilon, and stay within epsilon of where they were.
    """
    limit = config.epsilon / 255
    step = config.stretch * limit / config.steps
    moved = (images + limit * noise).clamp(0, 1)
    for _ in range(config.steps):
        moved.requires_grad_()
        largest = model(moved).softmax(1).amax(1).sum()
        (slope,) = torch.autograd.grad(largest, moved)
        moved = (moved + step * slope.sign()).detach()
        moved = images + (moved - images).clamp(-limit, limit)
        moved = moved.clamp(0, 1)
    return moved


def main(config):
    run.detect(__name__, config, score)
