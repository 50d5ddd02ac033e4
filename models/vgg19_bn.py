"""VGG-19 with batch norm for small images: sixteen plain convolutions in a row and one linear
layer.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR
2015, https://arxiv.org/abs/1409.1556 Form: the convolutions, initialisation and pools of
torchvision's vgg19_bn, then an average pool to 1x1 and one linear layer in place of the paper's
three fully connected ones (120 million parameters meant for 224 pixels). Images need 32 pixels or
more: five max pools halve them.
"""

from collections import OrderedDict

from torch import nn

STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # channels, convolutions


def stage(inputs, outputs, convolutions):
    """3x3 convolutions with batch norm and ReLU, then a 2x2 max pool."""
    modules = OrderedDict()
    for number in range(1, convolutions + 1):
        conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(conv.bias)
        modules[f"conv{number}"] = conv
        modules[f"bn{number}"] = nn.BatchNorm2d(outputs)
        modules[f"relu{number}"] = nn.ReLU()
        inputs = outputs
    modules["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(modules)


def build(classes):
    """The network: float N,3,H,W -> logits N,classes."""
    modules = OrderedDict()
    inputs = 3
    for number, (outputs, convolutions) in enumerate(STAGES, start=1):
        modules[f"stage{number}"] = stage(inputs, outputs, convolutions)
        inputs = outputs
    modules["pool"] = nn.AdaptiveAvgPool2d(1)
    modules["flatten"] = nn.Flatten()
    modules["linear"] = nn.Linear(inputs, classes)
    return nn.Sequential(modules)
