"""SPECTRE: whitened by a robust covariance, poisoned images stand out within their class.

Hayase, Kong, Somani, Oh, "SPECTRE: Defending Against Backdoor Attacks Using Robust Statistics",
ICML 2021 (arXiv 2104.11315). The features of every label are whitened by a covariance that poison
has little part in. The score is the squared length of the whitened features, weighted towards the
directions in which they still vary too much (quantum entropy).

    python detection/spectre.py --result_file badnet_cifar10

Deviates in comparing the scores of all classes with one threshold, and in the rounds of the robust
covariance; see docs/detection/spectre.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import DataOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions):
    uses_reference: ClassVar[bool] = False
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every label the number of `components` that was taken, and the "
        "`value` by which the label to clean is chosen"
    }

    epsilon: float = option(0.1, at_least=0, at_most=0.4)
    """poisoned share of a label that the defender expects; the paper's own rule flags 1.5 times as
    much of one label"""

    @property
    def prior(self):
        return f"rate={self.epsilon}"


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run
from antidote_bench.utils.detection import robust
from antidote_bench.utils.detection.inspector import Scored
from antidote_bench.utils.detection.passes import penultimate
from antidote_bench.utils.repair.isolation import highest

LEAST_IMAGES = 4  # of a label: fewer have the score 0


def score(model, record, config):
    features, _ = penultimate(model, record, config)
    labels, classes = record.suspects.labels.cpu(), record.spec.classes
    scores = torch.zeros(len(labels), dtype=torch.float64)
    components = torch.zeros(classes, dtype=torch.int64)
    values = torch.zeros(classes, dtype=torch.float64)
    for label in range(classes):
        index = (labels == label).nonzero().flatten()
        own = features[index.to(features.device)].double().cpu()
        if len(own) < LEAST_IMAGES or (own == own[0]).all():
            continue
        found = robust.entropy_scores(own.numpy(), config.epsilon)
        scores[index] = torch.from_numpy(found.scores)
        components[label], values[label] = found.components, found.value
    flagged = highest(scores, labels, classes, robust.FLAGGED * config.epsilon)
    flagged &= labels == int(values.argmax())
    return Scored(scores, flagged, {"components": components, "value": values})


def main(config):
    run.detect(__name__, config, score)
