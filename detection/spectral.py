"""Spectral Signatures: images that stand out along their class's main direction are poisoned.

Tran, Li, Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018 (arXiv 1811.00636). Poison
shifts the features of the class that it is labelled as, so that the first singular vector of the
centred features points to it. The score of an image is its squared length along that vector.

    python detection/spectral.py --result_file badnet_cifar10

Deviates in comparing the scores of all classes with one threshold; see docs/detection/spectral.md.
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
        "evidence.safetensors": "of every label `top`, the largest singular value over the root of "
        "its number of images"
    }

    epsilon: float = option(0.1, at_least=0, at_most=0.66)
    """poisoned share of a label that the defender expects; the paper's own rule flags 1.5 times as
    much of every label"""

    @property
    def prior(self):
        return f"rate={self.epsilon}"


if __name__ == "__main__":
    launch(Config)

from antidote_bench.utils import run
from antidote_bench.utils.detection.inspector import Scored
from antidote_bench.utils.detection.passes import penultimate
from antidote_bench.utils.detection.signatures import signatures
from antidote_bench.utils.repair.isolation import highest


def score(model, record, config):
    features, _ = penultimate(model, record, config)
    labels, classes = record.suspects.labels, record.spec.classes
    scores, tops = signatures(features, labels, classes)
    flagged = highest(scores, labels, classes, 1.5 * config.epsilon)
    return Scored(scores, flagged, {"top": tops})


def main(config):
    run.detect(__name__, config, score)
