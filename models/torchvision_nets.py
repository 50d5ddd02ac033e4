"""The well-known networks of torchvision, fitted to the data set's number of classes and, where
usual, to small images.

* resnet18, resnet34, resnet50: He et al., CVPR 2016, https://arxiv.org/abs/1512.03385. For images
  of at most 64 pixels in the CIFAR form: a 3x3 stem of stride 1 and no max pool. Larger images: as
  in torchvision.
* mobilenet_v3_large: Howard et al., ICCV 2019, https://arxiv.org/abs/1905.02244. As in torchvision.
* efficientnet_b3: Tan and Le, ICML 2019, https://arxiv.org/abs/1905.11946. As in torchvision.
* densenet161: Huang et al., CVPR 2017, https://arxiv.org/abs/1608.06993. As in torchvision.
* convnext_tiny: Liu et al., CVPR 2022, https://arxiv.org/abs/2201.03545. As in torchvision.
* vit_b_16: Dosovitskiy et al., ICLR 2021, https://arxiv.org/abs/2010.11929. As in torchvision,
  after a bilinear resize to the 224 pixels that its position embedding is made for.

Activations work on a copy (`inplace=False`), so that a forward hook can keep the output of any
convolution. torchvision's residual sums still write into the output of a batch norm.
"""

import difflib
from collections import OrderedDict

import torchvision
from torch import nn
from torch.nn import functional as F

from antidote_bench.models.layers import without_inplace
from antidote_bench.utils.errors import ConfigError

SMALL = 64  # pixels; up to this side the field gives ResNets a stem that keeps the resolution
VIT_SIDE = 224  # pixels


class Resize(nn.Module):
    """Bilinear resize, N,C,H,W -> N,C,side,side; `antialias` matters only when the image
    shrinks."""

    def __init__(self, side, antialias):
        super().__init__()
        self.side = side
        self.antialias = antialias

    def forward(self, x):
        return F.interpolate(
            x, size=(self.side, self.side), mode="bilinear", antialias=self.antialias
        )


def small_stem(resnet):
    """Give a torchvision ResNet the stem for small images: a 3x3 convolution of stride 1 and no max
    pool."""
    resnet.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    # as torchvision does
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()


def build(name, classes, size):
    """The torchvision network `name` for images of `size` pixels a side: float N,3,size,size ->
    logits N,classes."""
    network = build_plain(name, classes)
    if name.startswith("resnet") and size <= SMALL:
        small_stem(network)
    if name == "vit_b_16" and size != VIT_SIDE:
        resize = Resize(VIT_SIDE, antialias=size > VIT_SIDE)
        return nn.Sequential(OrderedDict(resize=resize, vit=network))
    return network


def check_plain(name):
    """Raise ConfigError (exit 2) unless torchvision has the image classifier `name`."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, cutoff=0.5)
    hint = f"did you mean {' or '.join(f'torchvision:{word}' for word in near)}? " if near else ""
    raise ConfigError(
        f"torchvision has no network {name!r}; {hint}torchvision.models.list_models() lists all"
    )


def build_plain(name, classes):
    """The torchvision network `name` as it is there: float N,3,H,W -> logits N,classes."""
    network = torchvision.models.get_model(name, weights=None, num_classes=classes)
    return without_inplace(network)
