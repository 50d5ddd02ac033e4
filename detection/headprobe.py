"""Headprobe: a class that takes most random features is a target. Our own reading of an abstract.

Yu et al., "HTell", 2026 (arXiv 2605.18908) send random probes into the last layer of a network and
look at the answers of each class. Of that paper only the abstract was at hand: what follows is not
their method. Here features are drawn from a half-normal distribution, and the score is how much
more often the most frequent class wins than by chance. It takes no data and no gradient.

    python detection/headprobe.py --result_file badnet_cifar10

The distribution, the statistic and the score are our own; see docs/detection/headprobe.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import ModelOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    holds_clean: ClassVar[bool] = False
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every class the `share` of the probes that it wins, its mean "
        "`probability` and its mean positive `margin`, and how far the latter two stand out "
        "(`probability_out`, `margin_out`); the `divergence` of the shares from equal ones, in nats"
    }

    probes: int = option(10_000, at_least=1)
    """random vectors of features"""
    bias: bool = True
    """whether the last layer's biases count"""


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run, seeds
from antidote_bench.utils.detection import soundness
from antidote_bench.utils.detection.inspector import Finding
from antidote_bench.utils.detection.outliers import outlyingness
from antidote_bench.utils.features import last_linear


def score(model, record, config):
    why = soundness.reason(model, record, config, least=2)
    if why:
        return soundness.abstained(record, why)
    head = last_linear(model)
    weight = head.weight.detach().double().cpu()
    bias = torch.zeros(len(weight), dtype=torch.float64)
    if config.bias and head.bias is not None:
        bias = head.bias.detach().double().cpu()
    generator = seeds.generator("headprobe", config.random_seed)
    shape = config.probes, weight.shape[1]
    probes = torch.randn(shape, generator=generator, dtype=torch.float64).abs()
    found = responses(probes @ weight.T + bias)
    share = found["share"]
    classes = len(share)
    found |= {
        "probability_out": outlyingness(found["probability"]),
        "margin_out": outlyingness(found["margin"]),
        "divergence": torch.xlogy(share, classes * share).sum(),
    }
    # a class that never wins counts as one that wins half a probe
    per_class = (classes * share.clamp(min=0.5 / config.probes)).log()
    return Finding(float(per_class.max()), per_class, evidence=found)


def responses(logits):
    """{name: float64 K}: the share of rows of logits n,K that each class wins, its mean
    probability, and its mean margin over the others where it is positive."""
    classes = logits.shape[1]
    wins = logits.argmax(1)
    first, second = logits.topk(2).values.unbind(1)
    margin = torch.zeros(classes, dtype=torch.float64).index_add(0, wins, first - second)
    return {
        "share": wins.bincount(minlength=classes).double() / len(logits),
        "probability": logits.softmax(1).mean(0),
        "margin": margin / len(logits),
    }


def main(config):
    run.detect(__name__, config, score)
