"""Weights: statistics of the weights alone, for comparisons with other models.

A baseline after entries of the TrojAI competition and Huster et al., 2024 (arXiv 2411.03445), who
train a classifier on the weights of many models. What a single model's statistics mean, only
benign models of the same network and recipe can say. With their records the score is by how much
the statistics deviate from theirs. Without, this keeps the statistics and abstains from a verdict.

    python detection/weights.py --result_file badnet_cifar10 --reference benign_0,benign_1,...

The statistics and the score are our own; see docs/detection/weights.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import CHANGED, option
from antidote_bench.utils.detection.options import ModelOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    holds_clean: ClassVar[bool] = False
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every layer with weights, under its name, 22 statistics: ten "
        "quantiles of its singular values over their sum, ten of its weights over their standard "
        "deviation, and the logarithms of its norm and of its largest singular value; with "
        "`--reference` also the `reference_scores` and the `p_value`"
    }

    reference: str | None = option(None, identity=CHANGED)
    """records of benign models of the same network and recipe, which the weights are compared with:
    names or folders, with commas, or a folder of such records"""


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run
from antidote_bench.utils.detection import references
from antidote_bench.utils.detection.inspector import Finding
from antidote_bench.utils.detection.outliers import outlyingness

SPECTRUM = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)  # quantiles of the singular values
SHARES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)  # quantiles of the weights
LEAST_REFERENCES = 5  # fewer say little about a deviation
MOST_OF_ONE = 10.0  # deviations that one statistic counts for, at most


def score(model, record, config):
    nothing = torch.zeros(record.spec.classes, dtype=torch.float64)
    found = {
        name: statistics(parameter.detach())
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.isfinite().all()
    }
    if not found:
        return Finding(None, nothing, abstained="no layer has weights that are finite numbers")
    if config.reference is None:
        why = "the statistics of the weights mean something beside those of other models only"
        return Finding(None, nothing, abstained=why, evidence=found)
    parameters = dict(model.named_parameters())
    others = references.read(
        config, {name: parameters[name].shape for name in found}, LEAST_REFERENCES
    )
    tables = [{name: statistics(other.tensors[name]) for name in found} for other in others]
    scores = deviations(torch.stack([torch.cat(list(row.values())) for row in (found, *tables)]))
    p_value = (scores >= scores[0]).double().mean()
    evidence = {"reference_scores": scores[1:], "p_value": p_value}
    return Finding(float(scores[0]), nothing, evidence=found | evidence)


def deviations(rows):
    """By how much each of N models deviates from the others, float64 N, of statistics N,M.

    It is the mean over the statistics of |value - median| / (1.4826 MAD), with the median and the
    median absolute deviation of the other models. One statistic counts for MOST_OF_ONE at most.
    """
    away = torch.stack([outlyingness(column) for column in rows.T], 1)
    return away.abs().clamp(max=MOST_OF_ONE).mean(1)


def statistics(weight):
    """22 numbers, float64, of the weights O,... of a layer.

    None of them changes where outputs or inputs are put in another order. A layer of zeros has
    zeros, and the logarithms are of numbers of at least the smallest normal one.
    """
    weight = weight.double().cpu().flatten(1)
    tiny = torch.finfo(torch.float64).tiny
    singular = torch.linalg.svdvals(weight)
    spectrum = quantiles(singular / singular.sum().clamp(min=tiny), SPECTRUM)
    values = quantiles(weight.flatten() / weight.std(correction=0).clamp(min=tiny), SHARES)
    sizes = torch.stack([weight.norm(), singular[0]]).clamp(min=tiny).log()
    return torch.cat([spectrum, values, sizes])


def quantiles(values, shares):
    """The quantiles of n values at `shares`: the value at that rank, without interpolation."""
    ranks = [round(share * (len(values) - 1)) for share in shares]
    return values.sort().values[ranks]


def main(config):
    if config.reference is not None:  # a mistake in it is told before the run begins
        references.places(config, LEAST_REFERENCES)
    run.detect(__name__, config, score)
