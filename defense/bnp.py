"""BNP: prune the channels whose clean pictures look unlike what their batch norm remembers of the poisoned training.

Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022. A batch norm keeps the mean and variance
of every channel over the training set, triggered pictures included. A channel of the backdoor is switched on by those alone, so that
on clean pictures its mean and variance are others. Channels whose Kullback-Leibler divergence, from what clean
pictures give to what is remembered, as of two normal distributions, is above the mean + u * standard deviation of their layer are
switched off.

    python defense/bnp.py --result_file badnet_cifar10             # u = 3, the paper's; on Tiny ImageNet u = 4
    python defense/bnp.py --result_file badnet_cifar10 --prune_shift true     # the shift of a pruned channel becomes zero too

It sees the clean pictures without their labels: all of them, unaugmented, in one pass in evaluation mode; one known port uses a
single batch, then overwrites its statistics with those of triggered pictures, and has variances where the
divergence has standard deviations. Every batch norm is scored, in any network. As in the authors' code only the scale of a pruned channel becomes
zero, which leaves its shift. Our own: the batch norm's eps is added to both variances, so that a channel that never varies gets a
score near zero and no division by it; clean pictures are not augmented though the remembered statistics are of
augmented ones, so that every channel differs somewhat. u is a constant; nothing is swept. The
standard deviation has C - 1 degrees of freedom, so that with u = 3 a layer of 10 channels or fewer never loses one.

On the built-in digits (resnet9 of width 16, 64 clean pictures, one seed) the ASR of BadNets falls from 99 to 25 % at an ACC of 99.6 %, that of a
blended trigger from 100 to 52 % at 98.8 %. A clean model's ACC falls from 99.8 to 97.6 %: some channel always stands out.
Three other BadNets victims, trained in bfloat16, keep an ASR of 78 to 98 %.
"""

from dataclasses import dataclass

from utils.config import Defense, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    u: float = 3.0
    """standard deviations above its layer's mean from which on a channel goes, above 0"""
    prune_shift: bool = False
    """set the shift of a pruned channel to zero as well as its scale"""

    def __post_init__(self):
        super().__post_init__()
        require(self.u > 0, "u", "above 0")

    def work(self, clean, found):
        return f"nothing: one pass over {clean} pictures"


if __name__ == "__main__":
    launch(Config)

from collections import defaultdict

from utils import run
from utils.channels import Moments, batch_norms, prune_outliers, watch_norms


def repair(model, record, config):
    prune_outliers(model, record, divergences(model, record.clean), config.u, shifts=config.prune_shift)
    return model


def divergences(model, clean):
    """{batch norm: KL(clean || remembered), float64 C}, in nats."""
    moments, found = defaultdict(Moments), {}
    watch_norms(model, clean, lambda name, values: moments[name].add(values))
    for name, norm in batch_norms(model).items():
        here, there = moments[name].variance + norm.eps, norm.running_var.double() + norm.eps
        shift = moments[name].mean - norm.running_mean.double()
        found[name] = ((there / here).log() + (here + shift.square()) / there - 1) / 2
    return found


def main(config):
    run.defend(__name__, config, repair)
