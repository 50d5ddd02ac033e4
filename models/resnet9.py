"""ResNet-9: eight convolutions and a linear layer, the network of the fast CIFAR-10 training
records.

Page, "How to Train Your ResNet", Myrtle.ai 2018 (DAWNBench), after He et al.,
https://arxiv.org/abs/1512.03385 Form: prep, layer1 with a residual pair, layer2, layer3 with a
residual pair, every convolution followed by batch norm and ReLU; 2x2 max pool in the three layers,
global max pool, linear layer (with bias, unlike the record runs), logits scaled by 1/8. Without
that scale SGD with momentum is slow or fails at learning rates of 0.03 and above.
"""

from collections import OrderedDict

from torch import nn

from antidote_bench.models.layers import GlobalMaxPool, Scale

LOGIT_SCALE = 0.125  # the global maxima are large; this keeps the first losses and gradients small


class Residual(nn.Module):
    """x + two convolution layers of x; N,C,H,W -> N,C,H,W."""

    def __init__(self, channels):
        super().__init__()
        self.first = convolution(channels, channels)
        self.second = convolution(channels, channels)

    def forward(self, x):
        return x + self.second(self.first(x))


def convolution(inputs, outputs):
    """3x3 convolution, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs), relu=nn.ReLU()))


def layer(inputs, outputs, residual):
    """A convolution layer and a 2x2 max pool, followed by a residual pair where `residual` is
    true."""
    modules = OrderedDict(convolution(inputs, outputs).named_children(), pool=nn.MaxPool2d(2))
    if residual:
        modules["residual"] = Residual(outputs)
    return nn.Sequential(modules)


def build(classes, width):
    """The network with `width` channels after the first convolution: float N,3,H,W -> logits
    N,classes."""
    return nn.Sequential(
        OrderedDict(
            prep=convolution(3, width),
            layer1=layer(width, 2 * width, residual=True),
            layer2=layer(2 * width, 4 * width, residual=False),
            layer3=layer(4 * width, 8 * width, residual=True),
            pool=GlobalMaxPool(),
            linear=nn.Linear(8 * width, classes),
            scale=Scale(LOGIT_SCALE),
        )
    )
