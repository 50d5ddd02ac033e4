"""EP: prune the channels whose answers to the found training set fall into two groups, as those to triggered pictures do.

Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022. Over many pictures the strongest
answer of an ordinary channel is spread about like a normal distribution, which of all distributions with one variance has the
highest entropy. A channel of the backdoor answers a few pictures, the triggered ones, quite differently, and
has a lower one. Channels whose entropy is below the mean - u * standard deviation of their layer are switched off.

    python defense/ep.py --result_file badnet_cifar10              # u = 3, the paper's; on Tiny ImageNet u = 4
    python defense/ep.py --result_file badnet_cifar10 --bin_width 0.1         # the histograms of a known port

It repairs the victim and sees the found training set, poisoned pictures included, without its labels; it holds no
clean picture. A record that stores no training set is refused. All its pictures count, unaugmented; that port
lets one augmented batch decide, and its bins leave out their own edges. Per channel and picture the maximum over
the map that enters the batch norm is taken, standardised over the set, and counted in bins of --bin_width; the entropy is that
of the shares of the bins, in nats. The set is passed twice, for the moments and for the histograms, so that memory does not grow
with it: 8 KB a channel, 27 MB in preactresnet18 and 0.9 GB in densenet161. As in the authors' code only the scale of a pruned channel becomes zero, which leaves its shift.

Our own: what lies more than 10 standard deviations out counts as 10; a channel that is the same for all pictures has no score.
u and the bins are constants; nothing is swept. The standard deviation has C - 1 degrees of freedom, so that with
u = 3 a layer of 10 channels or fewer never loses one.

On the built-in digits (resnet9 of width 16, 1,297 pictures, of which 130 are poisoned, one seed) the ASR of BadNets stays at 99 % at u = 3, that
of a blended trigger falls from 100 to 80 % at an ACC of 99.6 %; with u = 2 they are 77 % at 99.8 % and 1 % at 92.0 %. So few pictures leave most bins
of 0.01 with one or two; with --bin_width 0.1 and u = 2 the ASR is 13 % and 0 %, the ACC 99.8 and 99.4 %, a clean model's 98.2 %.
"""

from dataclasses import dataclass
from typing import ClassVar

from utils.config import Defense, require
from utils.launch import launch

REACH = 10  # standard deviations that a histogram covers on either side
STILL = 1e-5  # a standard deviation below this share of the mean is rounding


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    holds_clean: ClassVar[bool] = False

    u: float = 3.0
    """standard deviations below its layer's mean from which on a channel goes, above 0"""
    bin_width: float = 0.01
    """width of a histogram's bins, in standard deviations of the channel, 0.001..1"""
    prune_shift: bool = False
    """set the shift of a pruned channel to zero as well as its scale"""

    def __post_init__(self):
        super().__post_init__()
        require(self.u > 0, "u", "above 0")
        require(0.001 <= self.bin_width <= 1, "bin_width", "0.001 to 1")

    def work(self, clean, found):
        return f"nothing: two passes over the {found} pictures of the training set"


if __name__ == "__main__":
    launch(Config)

import math
from collections import defaultdict

import torch

from utils import run
from utils.channels import Moments, prune_outliers, watch_norms


def repair(model, record, config):
    found = entropies(model, record.train, config.bin_width)
    prune_outliers(model, record, {name: -values for name, values in found.items()}, config.u, shifts=config.prune_shift)
    return model


def entropies(model, split, width):
    """{batch norm: entropy in nats of the channels' standardised maxima over `split`, float64 C; NaN where they never vary}."""
    moments, counts = defaultdict(Moments), {}
    watch_norms(model, split, lambda name, values: moments[name].add(values.amax((2, 3))))
    bins = math.ceil(2 * REACH / width)

    def count(name, values):
        maxima = (values.amax((2, 3)).double() - moments[name].mean) / moments[name].variance.sqrt()  # n,C
        place = ((maxima.nan_to_num().clamp(-REACH, REACH) + REACH) / width).long().clamp(max=bins - 1)
        if name not in counts:
            counts[name] = torch.zeros(maxima.shape[1], bins, dtype=torch.int32, device=maxima.device)
        counts[name].scatter_add_(1, place.T, torch.ones_like(place.T, dtype=torch.int32))

    watch_norms(model, split, count)
    found = {}
    for name, histogram in counts.items():
        entropy = torch.special.entr(histogram.double() / len(split)).sum(1)
        varies = moments[name].variance > (STILL * moments[name].mean).square()
        found[name] = entropy.where(varies, torch.nan)
    return found


def main(config):
    run.defend(__name__, config, repair, needs_found=True)
