"""EP: prune the channels whose activations on the training set fall into two groups.

Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022. Over
many images the maximum of an ordinary channel is distributed nearly normally, and of all
distributions with one variance the normal one has the highest entropy. A channel of the backdoor
reacts quite differently to the few triggered images, so that its entropy is lower. Channels below
mean - u * standard deviation of their layer are pruned.

    python defense/ep.py --result_file badnet_cifar10

Deviates in values beyond the histogram and in channels that never vary: see docs/defenses/ep.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import Defense, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    needs_train_set: ClassVar[bool] = True
    holds_clean: ClassVar[bool] = False
    adds: ClassVar[dict[str, str]] = {
        "scores.safetensors": "by batch norm, the `score` of every channel, which is minus its "
        "entropy, and which channels were `pruned`"
    }

    u: float = option(3.0, above=0)
    """standard deviations below its layer's mean from which on a channel is pruned"""
    bin_width: float = option(0.01, at_least=0.001, at_most=1)
    """width of a histogram's bins, in standard deviations of the channel"""
    prune_shift: bool = False
    """set the shift of a pruned channel to zero as well as its scale"""


if __name__ == "__main__":
    launch(Config)

import math

import torch

from antidote_bench.utils import run
from antidote_bench.utils.repair.layers import (
    Moments,
    prune_outliers,
    require_batch_norms,
    watch_norms,
)

REACH = 10  # standard deviations that a histogram covers on either side
STILL = 1e-5  # a standard deviation below this share of the mean is rounding


def repair(model, record, config):
    scores = {
        name: -values for name, values in entropies(model, record.train, config.bin_width).items()
    }
    prune_outliers(model, record, scores, config.u, shifts=config.prune_shift)
    return model


def entropies(model, split, width):
    """{batch norm: entropy in nats, float64 C} of the channels' standardised maxima over `split`.

    NaN for channels that never vary. The images pass the model twice, for the moments and for the
    histograms, so that memory does not grow with their number.
    """
    moments = watch_norms(model, split, lambda _name: MomentsOfMaxima())
    histograms = watch_norms(model, split, lambda name: Histogram(moments[name], width))
    found = {}
    for name, histogram in histograms.items():
        entropy = torch.special.entr(histogram.counts.double() / len(split)).sum(1)
        varies = moments[name].variance > (STILL * moments[name].mean).square()
        found[name] = entropy.where(varies, torch.nan)
    return found


def maxima(values):
    """The maximum n,C of every map n,C,h,w."""
    return values.amax((2, 3))


class MomentsOfMaxima(Moments):
    """Those of the maxima of maps n,C,h,w."""

    def add(self, values):
        super().add(maxima(values))


class Histogram:
    """`counts`, int32 C,bins: the maxima of maps in bins of `width`, standardised by `moments`.

    The first and the last bin also hold what lies beyond REACH.
    """

    def __init__(self, moments, width):
        self._moments, self._width = moments, width
        self._bins = math.ceil(2 * REACH / width)
        shape = len(moments.mean), self._bins
        self.counts = torch.zeros(shape, dtype=torch.int32, device=moments.mean.device)

    def add(self, values):
        distance = maxima(values).double() - self._moments.mean
        standardised = distance / self._moments.variance.sqrt()
        inside = standardised.nan_to_num().clamp(-REACH, REACH)
        place = ((inside + REACH) / self._width).long().clamp(max=self._bins - 1).T
        self.counts.scatter_add_(1, place, torch.ones_like(place, dtype=torch.int32))


def main(config):
    run.defend(__name__, config, repair, check=require_batch_norms)
