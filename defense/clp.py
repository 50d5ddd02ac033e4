"""CLP: prune the channels that can amplify a small change of their input most, which needs no picture at all.

Zheng, Tang, Li, Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022 (arXiv 2208.03111). A
channel that a small trigger can switch on must react strongly to a small change. How strongly at most, is known from the
weights: the largest singular value of its filter, as a matrix of input channels by positions, times the factor by which
its batch norm scales. Channels above the mean + u * standard deviation of their layer are switched off.

    python defense/clp.py --result_file badnet_cifar10             # u = 3, the paper's; on Tiny ImageNet u = 5

It sees the victim's weights only, and holds no clean picture. A batch norm is scored where its
input is one convolution's output, which goes nowhere else; this is followed through the data flow. Released codes pair a
batch norm with the convolution that was defined before it: in pre-activation networks that is wrong for all batch norms
behind a residual sum, some of which they pair with a shortcut. Those have no bound of one filter and are left alone, as are
those behind densenet161's concatenations: 8 of 16 batch norms are scored in preactresnet18, 79 of 161 in densenet161.

Scale and shift of a pruned channel become zero, its filter stays. u is a constant; nothing is swept. The standard deviation has C - 1
degrees of freedom, so that with u = 3 a layer of 10 channels or fewer never loses one.

On the built-in digits (resnet9 of width 16, BadNets, one seed) u = 3 prunes 3 of 560 channels and changes nothing: the ASR stays at
99 %. With u = 2 it falls to 40 % at an ACC of 98 % (72 to 90 % with three other victims, trained in bfloat16); a blended trigger stays at 100 %.
"""

from dataclasses import dataclass
from typing import ClassVar

from utils.config import Defense, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    holds_clean: ClassVar[bool] = False

    u: float = 3.0
    """standard deviations above its layer's mean from which on a channel goes, above 0"""

    def __post_init__(self):
        super().__post_init__()
        require(self.u > 0, "u", "above 0")

    def work(self, clean, found):
        return "nothing: channels are pruned by the weights alone"


if __name__ == "__main__":
    launch(Config)

import torch

from utils import run
from utils.channels import paired_norms, prune_outliers
from utils.errors import ConfigError


def repair(model, record, config):
    scores = lipschitz_bounds(model)
    if not scores:
        raise ConfigError("clp does not apply: the model has no batch norm right behind a convolution; fp and ft need none")
    prune_outliers(model, record, scores, config.u, shifts=True)
    return model


@torch.no_grad()
def lipschitz_bounds(model):
    """{batch norm: the largest factor by which each of its channels and the filter before it stretch a change, float64 C}."""
    bounds = {}
    for convolution, name in paired_norms(model).items():
        norm = model.get_submodule(name)
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bounds[name] = spectral_norms(model.get_submodule(convolution).weight) * scale.abs()
    return bounds


def spectral_norms(kernel):
    """The largest singular value of every filter of a kernel O,I,h,w as a matrix I by h*w; float64 O.

    From the eigenvalues of the smaller Gram matrix: 512 of 9 by 9 are quicker than 512 decompositions of 512 by 9.
    """
    filters = kernel.double().flatten(2)
    gram = filters @ filters.mT if filters.shape[1] < filters.shape[2] else filters.mT @ filters
    return torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0).sqrt()


def main(config):
    run.defend(__name__, config, repair)
