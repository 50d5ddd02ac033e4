"""Wide ResNet 16-1: a very small residual network (16 layers, 16 to 64 channels), for quick or
weak-capacity runs.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, https://arxiv.org/abs/1605.07146 Form:
the paper's, depth 16 = 6 * 2 + 4 and widening factor 1. A 3x3 stem, three groups of two
pre-activation blocks with 16, 32 and 64 channels, batch norm, ReLU, average pool over the whole map
(8x8 at 32 pixels), linear layer. Convolutions start from He's normal initialisation, as in the
paper's code.
"""

from collections import OrderedDict

from torch import nn

from antidote_bench.models.preactresnet18 import stage


def build(classes):
    """The network: float N,3,H,W -> logits N,classes."""
    network = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 16, 3, padding=1, bias=False),
            group1=stage(16, 16, stride=1),
            group2=stage(16, 32, stride=2),
            group3=stage(32, 64, stride=2),
            bn=nn.BatchNorm2d(64),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(64, classes),
        )
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
