"""AGPD: the gradients of a class with poison point in two directions.

Yuan, Zhang, Wei, Liu, Wu, "Activation Gradient based Poisoned Sample Detection Against Backdoor
Attacks", ICLR 2025 (arXiv 2312.06230). The gradient of the label's logit with respect to the maps
of a layer says which channels an image owes its label to. Poisoned images owe it to others than
clean images do. The score is how near an image's gradient is to the poisoned direction.

    python detection/agpd.py --result_file badnet_cifar10

Deviates in that the paper has no score, and in the clean images it needs; see
docs/detection/agpd.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import DataOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions):
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every layer and label the `gap` between two directions and its "
        "anomaly `index`; the number of the `layer` that was taken, and the `targets`, bool"
    }

    step: float = option(0.05, at_least=0, at_most=1)
    """images whose ratio of distances, scaled to [0, 1] over those that are left, is at most this
    join the poisoned ones in a step"""
    per_class: int = option(10, at_least=1, unit="images")
    """clean images of a class that set its clean direction, at most"""


if __name__ == "__main__":
    launch(Config)

import numpy as np
import torch
from torch import nn

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import forward_all
from antidote_bench.utils.detection import directions
from antidote_bench.utils.detection.anomaly import LIMIT, anomaly_index
from antidote_bench.utils.detection.inspector import Scored
from antidote_bench.utils.detection.passes import gradients
from antidote_bench.utils.errors import ConfigError

LARGE_GAP = 0.3  # without any outlying class, a class above it is a target
LATE = 3  # layers before the last one that are looked at then


def score(model, record, config):
    names = layers_of(model)
    found = gradients(model, record, config)
    labels, classes = record.suspects.labels.cpu().numpy(), record.spec.classes
    clean = clean_images(model, record, config)
    members = [np.flatnonzero(labels == label) for label in range(classes)]
    gaps = np.full((len(names), classes), np.nan)
    firsts = np.zeros((len(names), classes), int)
    for row, name in enumerate(names):
        values = found[name].double().cpu().numpy()
        for label, known in clean.items():
            gaps[row, label], firsts[row, label] = directions.gap(
                values[members[label]], values[known].mean(0)
            )
    indices = np.stack([anomaly_index(row).clip(min=0) for row in gaps])
    row, targets = choose(gaps, indices)
    values = found[names[row]].double().cpu().numpy()
    scores, flagged = np.full(len(labels), -2.0), np.zeros(len(labels), bool)
    for label, known in clean.items():
        own = members[label]
        division = directions.grow(
            values[own], values[known].mean(0), firsts[row, label], config.step
        )
        scores[own] = -division.ratio - (not targets[label])
        flagged[own] = division.bad & targets[label]
    evidence = {"gap": gaps, "index": indices, "layer": np.array([row]), "targets": targets}
    return Scored(
        torch.from_numpy(scores),
        torch.from_numpy(flagged),
        {name: torch.from_numpy(value) for name, value in evidence.items()},
    )


def layers_of(model):
    """The names of the convolutions that are looked at, in the order in which the model holds them:
    all that see more than a point, but the first one; ConfigError (exit 2) where there is none."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    ][1:]
    if not names:
        raise ConfigError(
            "agpd needs a model with at least two convolutions: choose another --model for the "
            "attack"
        )
    return names


def clean_images(model, record, config):
    """{label: positions of its clean images}: the first ones that are classified correctly, or any
    where none is. A label without a clean image is not in it, and is not judged."""
    predicted = forward_all(
        model, record.reference, lambda images, *_: model(images).argmax(1), config.precision
    )
    labels, index = record.reference.labels, record.reference_index
    found = {}
    for label in range(record.spec.classes):
        own, right = (
            index[chosen].cpu().numpy()
            for chosen in (labels == label, (labels == label) & (predicted == label))
        )
        if len(own):
            found[label] = (right if len(right) else own)[: config.per_class]
    return found


def choose(gaps, indices):
    """(row, which classes are targets, bool K), from gaps and anomaly indices of layers and classes
    L,K.

    The layer with the largest index is taken, and the targets are the classes above LIMIT in it. If
    there are none, it is the one with the most gaps above LARGE_GAP, among the last layers without
    the last one.
    """
    row = int(indices.max(1).argmax())
    targets = indices[row] > LIMIT
    if targets.any():
        return row, targets
    rows = range(len(gaps))[-LATE - 1 : -1] or range(len(gaps))
    row = max(rows, key=lambda number: (gaps[number] > LARGE_GAP).sum())
    return row, gaps[row] > LARGE_GAP


def main(config):
    run.detect(__name__, config, score)
