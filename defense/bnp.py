"""BNP: prune channels whose statistics on clean images differ from those in their batch norm.

Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022. A batch
norm stores mean and variance of every channel over the training set, triggered images included.
Only these activate a channel of the backdoor, so that it has another mean and variance on clean
images. The score of a channel is the Kullback-Leibler divergence between the two normal
distributions. Scores above mean + u * standard deviation of their layer are pruned.

    python defense/bnp.py --result_file badnet_cifar10

Deviates in the batch norm's eps, which is added to both variances: see docs/defenses/bnp.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import Defense, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    adds: ClassVar[dict[str, str]] = {
        "scores.safetensors": "by batch norm, the `score` of every channel, of which high ones are "
        "suspicious, and which channels were `pruned`"
    }

    u: float = option(3.0, above=0)
    """standard deviations above its layer's mean from which on a channel is pruned"""
    prune_shift: bool = False
    """set the shift of a pruned channel to zero as well as its scale"""


if __name__ == "__main__":
    launch(Config)

from antidote_bench.utils import run
from antidote_bench.utils.repair.layers import (
    Moments,
    batch_norms,
    prune_outliers,
    require_batch_norms,
    watch_norms,
)


def repair(model, record, config):
    scores = divergences(model, record.clean)
    prune_outliers(model, record, scores, config.u, shifts=config.prune_shift)
    return model


def divergences(model, clean):
    """{batch norm: KL(clean images || stored statistics), float64 C}, in nats."""
    moments = watch_norms(model, clean, lambda _name: Moments())
    scores = {}
    for name, norm in batch_norms(model).items():
        found = moments.get(name, Moments())
        clean_variance = found.variance + norm.eps
        stored_variance = norm.running_var.double() + norm.eps
        shift = found.mean - norm.running_mean.double()
        ratio = (clean_variance + shift.square()) / stored_variance
        scores[name] = ((stored_variance / clean_variance).log() + ratio - 1) / 2
    return scores


def main(config):
    run.defend(__name__, config, repair, check=require_batch_norms)
