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

import torch

from antidote_bench.utils import run
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.repair.layers import paired_norms, prune_outliers


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


@torch.no_grad()
def lipschitz_bounds(model):
    """{batch norm: bounds, float64 C}.

    A bound is the largest factor by which a channel, the filter and the batch norm together, can
    amplify a change of its input.
    """
    bounds = {}
    for convolution, name in paired_norms(model).items():
        norm = model.get_submodule(name)
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bounds[name] = spectral_norms(model.get_submodule(convolution).weight) * scale.abs()
    return bounds


def spectral_norms(kernel):
    """The largest singular value of every filter of a kernel O,I,h,w, as a matrix I by h*w.

    float64 O. Computed from the eigenvalues of the smaller Gram matrix: 512 of 9 by 9 are faster
    than 512 decompositions of 512 by 9.
    """
    filters = kernel.double().flatten(2)
    gram = filters @ filters.mT if filters.shape[1] < filters.shape[2] else filters.mT @ filters
    return torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0).sqrt()


def main(config):
    run.defend(__name__, config, repair, check=check)
