"""ASSET: a network that is made wrong about what looks poisoned, and unsure of all else.

Pan, Zeng, Lyu, Lin, Jia, "ASSET: Robust Backdoor Data Detection Across a Multiplicity of Deep
Learning Paradigms", USENIX Security 2023 (arXiv 2302.11408). A new network is trained to give flat
logits for clean images, and large losses for images that a second, small network tells from clean
ones by the victim's features. The score is the loss.

    python detection/asset.py --result_file badnet_cifar10

Deviates in the features, which are computed once in evaluation mode; see docs/detection/asset.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import DataOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions):
    order_matters: ClassVar[bool] = True  # it is trained on in batches

    epochs: int = option(1, at_least=1)
    """epochs of the new network on the training set"""
    batch_size: int = option(512, at_least=4, unit="images")
    """images of the training set, and clean ones at most, in a batch"""
    steps: int = option(100, at_least=1)
    """steps of the small network on every batch, each one up and one down"""
    step_size: float = option(1e-4, above=0)
    """learning rate of Adam, for both networks"""
    limit: float = option(2.0, above=0)
    """adjusted outlyingness above which an image of a batch gets a larger loss"""


if __name__ == "__main__":
    launch(Config)

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data import loader
from antidote_bench.utils.detection.inspector import Scored
from antidote_bench.utils.detection.passes import penultimate
from antidote_bench.utils.detection.skewed import adjusted_outlyingness
from antidote_bench.utils.train import victim_architecture

HIDDEN = 128  # units in each of two layers of the small network
DENSITY = 1e-6  # of the normal fitted to clean scores, at the threshold of the paper's own rule


def score(model, record, config):
    features, _ = penultimate(model, record, config)
    scorer = victim_architecture(record, "asset", config)
    train(scorer, features, record, config)

    def losses(images, labels, _):
        return F.cross_entropy(scorer(images).double(), labels, reduction="none")

    scores = loader.forward_all(scorer, record.suspects, losses, config.precision)
    return Scored(scores, scores > own_threshold(scores.cpu().numpy()))


def train(scorer, features, record, config):
    """Train the new network `scorer` in place, on all suspects and the clean images of the
    reference; `features` N,D are the victim's, of all suspects."""
    device = features.device
    flatten = torch.optim.Adam(scorer.parameters(), config.step_size)
    raise_loss = torch.optim.Adam(scorer.parameters(), config.step_size)
    generator = seeds.generator("asset", config.random_seed, device=device)
    torch.manual_seed(seeds.number("asset networks", config.random_seed))
    scorer.train()
    for epoch in range(1, config.epochs + 1):
        batches = loader.batches(record.suspects, config.batch_size, generator=generator)
        total = len(loader.batch_sizes(len(record.suspects), config.batch_size))
        raised = []
        for images, labels, index in tqdm(batches, "asset", total, unit=" batches", disable=None):
            order = torch.randperm(len(record.reference), generator=generator, device=device)
            chosen = order[: config.batch_size]
            clean = loader.to_unit(record.reference.images[chosen])
            with loader.mixed_precision(device, config.precision):
                descend(flatten, scorer(clean).float().var(1).mean())
            known = features[record.reference_index[chosen]]
            told = tell_apart(features[index], known, config)
            outlying = adjusted_outlyingness(told.cpu().numpy()) > config.limit
            bad = torch.from_numpy(outlying).nonzero().flatten().to(device)
            if len(bad) > 1:  # batch normalisation cannot train on one image
                with loader.mixed_precision(device, config.precision):
                    loss = F.cross_entropy(scorer(images[bad]), labels[bad])
                descend(raise_loss, -loss)
                raised.append(loss.item())
        mean = round(sum(raised) / len(raised), 6) if raised else 0.0
        record.report("asset", scorer, epoch=epoch, loss=mean, lr=config.step_size)


def tell_apart(suspects, clean, config):
    """What a new small network says of the features `suspects` n,D after it has learned to tell
    them from the features `clean` m,D: near 1 for those that it can tell, float32 n."""
    network = nn.Sequential(
        nn.Linear(suspects.shape[1], HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, 1),
        nn.Sigmoid(),
    ).to(suspects.device)
    up, down = (torch.optim.Adam(network.parameters(), config.step_size) for _ in range(2))
    for _ in range(config.steps):
        descend(up, (network(suspects) - 1).square().mean())
        descend(down, network(clean).square().mean())
    with torch.no_grad():
        return network(suspects).squeeze(1)


def descend(optimizer, loss):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def own_threshold(scores):
    """The score at which the density of a normal distribution falls to DENSITY, above its mean.

    It is fitted to the lower half of the scores. Where its density is lower everywhere, the
    threshold is its mean.
    """
    lower = np.sort(scores)[: max(len(scores) // 2, 1)]
    mean, deviation = lower.mean(), lower.std()
    if deviation == 0:
        return mean
    drop = -2 * math.log(DENSITY * deviation * math.sqrt(2 * math.pi))
    return mean + deviation * math.sqrt(max(drop, 0))


def main(config):
    run.detect(__name__, config, score)
