"""STRIP: a triggered image keeps its prediction when other images are laid over it.

Gao, Xu, Wang, Chen, Ranasinghe, Nepal, "STRIP: A Defence Against Trojan Attacks on Deep Neural
Networks", ACSAC 2019 (arXiv 1902.06531). Clean images are laid over each input. The score is minus
the mean entropy of the predictions: a backdoor that is still seen makes them certain.

    python detection/strip.py --result_file badnet_cifar10

Deviates in that the same clean images are laid over every input; see docs/detection/strip.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import InputOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(InputOptions):
    overlays: int = option(100, at_least=1, unit="images")
    """clean images that are laid over each input, as far as there are as many"""
    blend: Literal["add", "mean"] = "add"
    """add: the sum of both images, cut off at white; mean: their mean"""


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import EVALUATION_BATCH, forward_all, to_unit
from antidote_bench.utils.detection.passes import logits_of


def score(model, record, config):
    overlays = record.draw(config.overlays, "strip", config.random_seed)
    overlays = to_unit(overlays.images)
    at_once = max(EVALUATION_BATCH // len(overlays), 1)

    def certainty(images, *_):
        return torch.cat(
            [-mean_entropy(model, part, overlays, config.blend) for part in images.split(at_once)]
        )

    return forward_all(model, record.suspects, certainty, config.precision)


def mean_entropy(model, images, overlays, blend):
    """The entropy of the predictions, in nats, averaged over the overlays; float64 n.

    `images` are n,3,S,S and `overlays` k,3,S,S, both in [0, 1].
    """
    mixed = images[:, None] + overlays[None]  # n,k,3,S,S
    mixed = mixed.clamp(max=1) if blend == "add" else mixed / 2
    log_p = logits_of(model, mixed.flatten(0, 1)).double().log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return entropy.view(len(images), len(overlays)).mean(1)


def main(config):
    run.detect(__name__, config, score)
