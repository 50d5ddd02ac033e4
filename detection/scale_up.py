"""SCALE-UP: a triggered image keeps its prediction when its pixels are multiplied.

Guo, Li, Chen, Guo, Sun, Liu, "SCALE-UP: An Efficient Black-box Input-level Backdoor Detection via
Analyzing Scaled Prediction Consistency", ICLR 2023 (arXiv 2302.03251). Pixels are multiplied by
several factors and cut off at white. The score is the share of these images that get the prediction
of the original.

    python detection/scale_up.py --result_file badnet_cifar10

Deviates in how it breaks ties; see docs/detection/scale_up.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import InputOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(InputOptions):
    variant: Literal["data_free", "data_limited"] = "data_free"
    """data_limited: the share less the mean of clean images with the same prediction, over their
    standard deviation"""
    limit: float = option(0.5, at_least=0, at_most=1)
    """share above which the paper's own rule flags an input (data_free only)"""

    @property
    def uses_reference(self):
        return self.variant == "data_limited"


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import forward_all
from antidote_bench.utils.detection.inspector import Scored

FACTORS = (3, 5, 7, 9, 11)
TIE = 1e-6  # weight of the mean probability: it decides between equal scores only
LEAST = 2  # reference images of a prediction, for a mean and a deviation of their own


def score(model, record, config):
    found = consistency(model, record.suspects, config.precision)
    share, certain, predicted = found[:, 0], found[:, 1], found[:, 2].long()
    if config.variant == "data_free":
        return Scored(share + TIE * certain, share > config.limit)
    known = consistency(model, record.reference, config.precision)
    mean, deviation = statistics(known[:, 0], known[:, 2].long(), record.spec.classes)
    return Scored((share - mean[predicted]) / deviation[predicted] + TIE * certain)


def consistency(model, split, precision):
    """Of every image, float64 N,3: the share of the scaled images that keep its prediction, their
    mean probability of that prediction, and the prediction."""

    def of_batch(images, *_):
        predicted = model(images).argmax(1)
        kept, certain = 0, 0
        for factor in FACTORS:
            logits = model((factor * images).clamp(max=1))
            kept = kept + (logits.argmax(1) == predicted)
            probability = logits.double().softmax(1)
            certain = certain + probability.gather(1, predicted[:, None]).squeeze(1)
        kept, certain = kept.double() / len(FACTORS), certain / len(FACTORS)
        return torch.stack([kept, certain, predicted.double()], 1)

    return forward_all(model, split, of_batch, precision)


def statistics(values, predicted, classes):
    """(mean, standard deviation) of the values of each predicted class, float64 classes.

    A class with fewer than LEAST of them, or with equal ones, has those of all values.
    """
    mean = values.mean().expand(classes).clone()
    deviation = values.std().clamp(min=1e-3).expand(classes).clone()
    for label in range(classes):
        own = values[predicted == label]
        if len(own) >= LEAST and (own != own[0]).any():
            mean[label], deviation[label] = own.mean(), own.std()
    return mean, deviation


def main(config):
    run.detect(__name__, config, score)
