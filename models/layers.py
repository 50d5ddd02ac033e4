"""Small layers that several networks share."""

from torch import nn


class GlobalMaxPool(nn.Module):
    """The largest value of each map, N,C,H,W -> N,C; AdaptiveMaxPool2d has no deterministic
    gradient on CUDA."""

    def forward(self, x):
        return x.amax((2, 3))


class Scale(nn.Module):
    """x times a constant."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def without_inplace(network):
    """`network`, whose activations from now on work on a copy, so that a forward hook can keep the
    output of any layer."""
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return network
