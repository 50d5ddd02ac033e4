"""Headstat: a class whose weights in the last layer stand out is a target. Our own reading.

Yu et al., "DFBScanner", 2026 (arXiv 2605.18907) combine several indicators of the last layer's
parameters. Of that paper only the abstract was at hand: what follows is not their method. Here
seven statistics of the weights of each class are compared over the classes, and the score is the
largest mean distance. It takes no data and no gradient.

    python detection/headstat.py --result_file badnet_cifar10

The statistics and how they are combined are our own; see docs/detection/headstat.md.
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
        "evidence.safetensors": "each statistic of every class, and under its name with `_out` how "
        "far it stands out from those of the other classes"
    }

    farthest: float = option(20.0, above=0)
    """largest distance that one statistic counts with"""


if __name__ == "__main__":
    launch(Config)

import torch
from scipy import stats

from antidote_bench.utils import run
from antidote_bench.utils.detection import soundness
from antidote_bench.utils.detection.inspector import Finding
from antidote_bench.utils.detection.outliers import outlyingness
from antidote_bench.utils.features import last_linear

DIGITS = 9  # differences beyond these, relative to the largest value, are rounding
RANK = 1e-10  # directions of the other rows that are shorter, relative to the longest, are none


def score(model, record, config):
    why = soundness.reason(model, record, config)
    if why:
        return soundness.abstained(record, why)
    head = last_linear(model)
    known = statistics(head.weight.detach(), None if head.bias is None else head.bias.detach())
    out = {name: outlyingness(rounded(values)) for name, values in known.items()}
    distances = torch.stack([value.abs().clamp(max=config.farthest) for value in out.values()])
    per_class = distances.mean(0)
    evidence = known | {f"{name}_out": value for name, value in out.items()}
    return Finding(float(per_class.max()), per_class, evidence=evidence)


def statistics(weight, bias):
    """{name: float64 K} of the rows of a last layer's weights K,D and its biases K, or None.

    None of how far they stand out from each other changes where all are multiplied by one number.
    """
    weight = weight.double().cpu()
    rows = weight / weight.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    cosines = (rows @ rows.T).fill_diagonal_(0).sum(1) / (len(rows) - 1)
    found = {
        "norm": weight.norm(dim=1),
        "mean": weight.mean(1),
        "largest": weight.amax(1),
        "skew": torch.from_numpy(stats.skew(weight.numpy(), axis=1)).nan_to_num(0.0),
        "kurtosis": torch.from_numpy(stats.kurtosis(weight.numpy(), axis=1)).nan_to_num(0.0),
        "cosine": cosines,
        "alone": torch.stack([outside(rows, row) for row in range(len(rows))]),
    }
    return found if bias is None else found | {"bias": bias.double().cpu()}


def outside(rows, row):
    """The share of the squared length of one of K rows that is outside the span of the others."""
    others = torch.cat([rows[:row], rows[row + 1 :]])
    fitted = torch.linalg.lstsq(others.T, rows[row][:, None], rcond=RANK, driver="gelsd").solution
    return (rows[row] - (others.T @ fitted)[:, 0]).square().sum()


def rounded(values):
    """The values without differences that come from rounding."""
    scale = float(values.abs().max()) or 1.0
    return (values / scale).round(decimals=DIGITS)


def main(config):
    run.detect(__name__, config, score)
