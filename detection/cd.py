"""Cognitive Distillation: a small part of a triggered image explains its prediction.

Huang, Ma, Erfani, Bailey, "Distilling Cognitive Backdoor Patterns within an Image", ICLR 2023
(arXiv 2301.10908). For every image, the smallest mask is found that leaves the logits as they are
when all else is replaced by random colours. The score is minus the size of the mask.

    python detection/cd.py --result_file badnet_cifar10
    python detection/cd.py --result_file badnet_cifar10 --sample 2000
    python detection/cd.py --result_file badnet_cifar10 --judges input

Deviates in that all images get the same colour in each step; see docs/detection/cd.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import InputOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(InputOptions):
    judges: Literal["data", "input"] = "data"
    """data: the images of the training set; input: test images"""
    inputs: int = option(1000, at_least=1, unit="images", needs={"judges": "input"})
    """how many clean test images are judged, and how many triggered ones"""
    sample: int | None = option(None, at_least=1, needs={"judges": "data"}, unit="images")
    """how many images of the training set are judged, drawn at random; all by default"""
    steps: int = option(100, at_least=1)
    """steps of Adam on each mask"""
    mask_lr: float = option(0.1, above=0)
    """learning rate of the masks"""
    gamma: float = option(0.01, at_least=0)
    """weight of a mask's size, the sum of its values"""
    beta: float = option(10.0, at_least=0)
    """weight of a mask's total variation"""


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data import loader
from antidote_bench.utils.detection.inspector import Scored

BETAS = (0.1, 0.1)  # of Adam


def score(model, record, config):
    sizes = mask_sizes(model, record.suspects, config)
    known = mask_sizes(model, record.reference, config)
    limit = known.mean() - known.std()
    return Scored(-sizes, sizes < limit)


def mask_sizes(model, split, config):
    """The sum of the values of every image's mask, float64 N."""
    generator = seeds.generator("cd", config.random_seed)
    colours = torch.rand(config.steps, 3, 1, 1, generator=generator).to(split.labels.device)

    def pass_over_all(size):
        return torch.cat(
            [
                masks(model, images, colours, config).double().sum((1, 2, 3))
                for images, _, _ in loader.batches(split, size)
            ]
        )

    size = loader.gradient_batch(model, split.images, loader.EVALUATION_BATCH)
    with loader.evaluating(model), loader.mixed_precision(split.labels.device, config.precision):
        return loader.halving(pass_over_all, size)


def masks(model, images, colours, config):
    """The mask n,1,S,S in [0, 1] of images n,3,S,S; `colours` has one for each step."""
    raw = torch.ones_like(images[:, :1]).requires_grad_()
    optimizer = torch.optim.Adam([raw], config.mask_lr, betas=BETAS)
    with torch.no_grad():
        wanted = model(images).float()
    for colour in colours:
        mask = (raw.tanh() + 1) / 2
        shown = images * mask + (1 - mask) * colour
        value = objective(model(shown).float(), wanted, mask, config)
        optimizer.zero_grad()
        value.sum().backward()
        optimizer.step()
    return ((raw.tanh() + 1) / 2).detach()


def objective(logits, wanted, mask, config):
    """What the mask of each image minimises: n."""
    change = (logits - wanted).abs().mean(1)
    return change + config.gamma * mask.sum((1, 2, 3)) + config.beta * total_variation(mask)


def total_variation(mask):
    """The squared differences of neighbours, down and across, over the number of pixels: n."""
    down = mask.diff(dim=2).square().sum((1, 2, 3))
    across = mask.diff(dim=3).square().sum((1, 2, 3))
    return (down + across) / mask[0].numel()


def main(config):
    run.detect(__name__, config, score)
