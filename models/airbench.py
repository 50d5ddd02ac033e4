"""Airbench: the network of the fastest CIFAR-10 training, seven convolutions behind a whitened
first layer.

Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024, https://arxiv.org/abs/2404.00498
Form: a 2x2 convolution that whitens image patches and is never trained; three groups of two 3x3
convolutions with batch norm and GELU, and a 2x2 max pool in each; global max pool; linear layer
without bias; logits times 1/9. The scale of every batch norm is fixed at 1. Convolutions start as
the identity on their first channels. `--recipe airbench` trains it. Deviations: the first layer's
bias is 0, where the paper trains it for three epochs; the largest value of each last map is taken
whatever its size, which on 32 pixels is the paper's 3x3 max pool.
"""

from collections import OrderedDict

import torch
from torch import nn

from antidote_bench.models.layers import GlobalMaxPool, Scale

PATCH = 2  # side in pixels of the patches that the first layer whitens
EPSILON = 5e-4  # added to the variance of a patch direction, so that noise is not blown up
LOGIT_SCALE = 1 / 9
IMAGES_AT_ONCE = 500  # while the covariance of patches is summed


class Group(nn.Module):
    """Convolution, 2x2 max pool, batch norm, GELU, convolution, batch norm, GELU; N,inputs,H,W ->
    N,outputs,H/2,W/2."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = convolution(inputs, outputs)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = batch_norm(outputs)
        self.conv2 = convolution(outputs, outputs)
        self.norm2 = batch_norm(outputs)
        self.activation = nn.GELU()

    def forward(self, x):
        x = self.activation(self.norm1(self.pool(self.conv1(x))))
        return self.activation(self.norm2(self.conv2(x)))


class Network(nn.Sequential):
    """The layers in a row, of which the first is made from training images and not learned."""

    @torch.no_grad()
    def fit_to(self, images):
        """Make the first layer's filters from normalised training images N,3,S,S.

        They are the 12 directions in which 2x2 patches vary, each divided by its standard
        deviation, the largest first, and then the negatives of all of them.
        """
        kernel = self.whiten.weight
        size = kernel[0].numel()
        total, count = torch.zeros(size, size, dtype=torch.float64, device=images.device), 0
        for part in images.split(IMAGES_AT_ONCE):
            patches = nn.functional.unfold(part, PATCH).movedim(1, 2).reshape(-1, size).double()
            total += patches.T @ patches
            count += len(patches)
        values, vectors = torch.linalg.eigh(total / count)
        filters = (vectors / (values + EPSILON).sqrt()).T.flip(0)
        kernel.copy_(torch.cat([filters, -filters]).view_as(kernel))


def convolution(inputs, outputs):
    """3x3 convolution without bias whose first `inputs` outputs are its inputs before training."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(conv.weight[:inputs])
    return conv


def batch_norm(channels):
    """Batch norm with a trained shift and a scale that stays 1; its running statistics forget
    fast."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


def build(classes, width):
    """The network with `width`, 4 width and 4 width channels in its groups: float N,3,H,W -> logits
    N,classes."""
    whiten = nn.Conv2d(3, 2 * 3 * PATCH**2, PATCH).requires_grad_(False)
    nn.init.zeros_(whiten.bias)
    return Network(
        OrderedDict(
            whiten=whiten,
            activation=nn.GELU(),
            group1=Group(whiten.out_channels, width),
            group2=Group(width, 4 * width),
            group3=Group(4 * width, 4 * width),
            pool=GlobalMaxPool(),
            linear=nn.Linear(4 * width, classes, bias=False),
            scale=Scale(LOGIT_SCALE),
        )
    )
