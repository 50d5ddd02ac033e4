"""CLP: prune the channels that can amplify a small change of their input most, without any image.

Zheng, Tang, Li, Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022 (arXiv
2208.03111). A channel that a small trigger activates must react strongly to a small change. The
weights bound how strongly: by the largest singular value of its filter, as a matrix of input
channels by positions, times the factor by which its batch norm scales. Channels above
mean + u * standard deviation of their layer are pruned.

    python defense/clp.py --result_file badnet_cifar10

Deviates from released codes in how batch norms are paired with convolutions: see
docs/defenses/clp.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import Defense, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    holds_clean: ClassVar[bool] = False
    adds: ClassVar[dict[str, str]] = {
        "scores.safetensors": "by batch norm, the `score` of every channel, of which high ones are "
        "suspicious, and which channels were `pruned`"
    }

    u: float = option(3.0, above=0)
    """standard deviations above its layer's mean from which on a channel is pruned"""


if __name__ == "__main__":
    launch(Config)

from antidote_bench.utils import run
from antidote_bench.utils.channels import lipschitz_bounds, paired_norms
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.repair.layers import prune_outliers


def check(model, record, config):
    if not paired_norms(model):
        raise ConfigError(
            "clp does not apply: the model has no batch norm right behind a convolution, or "
            "torch.fx cannot find it; fp and ft need none"
        )


def repair(model, record, config):
    scores = lipschitz_bounds(model)
    prune_outliers(model, record, scores, config.u, shifts=True)
    return model


def main(config):
    run.defend(__name__, config, repair, check=check)
