"""TeCo: corruptions of different kinds break the trigger at different severities.

Liu, Li, Wang, Hu, Ye, Jin, Wu, Xiao, "Detecting Backdoors During the Inference Stage Based on
Corruption Robustness Consistency", CVPR 2023 (arXiv 2303.18191). Each kind of corruption is made
more and more severe until the prediction changes. A clean image is about as robust to one kind as
to another one. The score is the standard deviation of these severities over the kinds.

    python detection/teco.py --result_file badnet_cifar10

Deviates in that frost is missing, and in what some severities mean; see docs/detection/teco.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import InputOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(InputOptions):
    uses_reference: ClassVar[bool] = False
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every kind of corruption the severity `onset` at which the "
        "prediction of each image changes, and one more than the largest severity if it never does"
    }

    steps: int = option(5, at_least=1, at_most=5)
    """severities of each kind of corruption, from the mildest one"""


if __name__ == "__main__":
    launch(Config)

import torch
from tqdm import tqdm

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import forward_all
from antidote_bench.utils.detection.corruptions import KINDS, corrupt
from antidote_bench.utils.detection.inspector import Scored


def score(model, record, config):
    shown = tqdm(KINDS, desc="corrupting", unit=" kinds", disable=None)
    onset = torch.stack(
        [
            forward_all(
                model,
                record.suspects,
                lambda images, *_, kind=kind: onsets(model, images, kind, config),
                config.precision,
            )
            for kind in shown
        ],
        1,
    )
    scores = onset.double().std(1, correction=0)
    evidence = {kind: onset[:, place].contiguous() for place, kind in enumerate(KINDS)}
    return Scored(scores, evidence={f"onset.{kind}": found for kind, found in evidence.items()})


def onsets(model, images, kind, config):
    """The first severity, int64 n from 1, at which the prediction of an image changes.

    It is one more than the largest severity where the prediction never changes.
    """
    predicted = model(images).argmax(1)
    found = torch.full_like(predicted, config.steps + 1)
    left = torch.arange(len(images), device=images.device)
    for severity in range(1, config.steps + 1):
        shown = corrupt(kind, images[left], severity, config.random_seed)
        changed = model(shown).argmax(1) != predicted[left]
        found[left[changed]] = severity
        left = left[~changed]
        if not len(left):
            break
    return found


def main(config):
    run.detect(__name__, config, score)
