"""Wide ResNet 16-1 in the form of Trap and Replace: leaky ReLU and convolutions with a bias.

Wang et al., "Trap and Replace", NeurIPS 2022, https://arxiv.org/abs/2210.06428, after Zagoruyko and
Komodakis, "Wide Residual Networks", BMVC 2016, https://arxiv.org/abs/1605.07146. As `wrn16_1`,
175,626 parameters with 10 classes. Convolutions start from He's normal initialisation, the linear
layer from Glorot's.

It is the paper's architecture, and not the released code's to the last layer: there the two blocks
that change the shape (group2.0 and group3.0) hold their first batch norm and leaky ReLU and never
use them. Here they use them, as the Wide ResNet paper has it. Number and names of the parameters
are the same, the outputs are not: on the same weights, images and draws the first loss of stage 1
of Trap and Replace differs (3.268 and 3.438). There is no model of the released form.
"""

from collections import OrderedDict

from torch import nn
from torch.nn import functional as F

SLOPE = 0.1  # of the leaky ReLU below zero


class Block(nn.Module):
    """Two 3x3 convolutions, each after its batch norm and leaky ReLU; N,inputs,H,W ->
    N,outputs,H/stride,W/stride."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        same_shape = inputs == outputs and stride == 1
        self.shortcut = None if same_shape else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        active = F.leaky_relu(self.bn1(x), SLOPE)
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out = self.conv1(active)
        out = self.conv2(F.leaky_relu(self.bn2(out), SLOPE))
        return out + shortcut


def build(classes):
    """The network: float N,3,H,W -> logits N,classes."""
    groups = {
        f"group{number}": nn.Sequential(Block(inputs, outputs, stride), Block(outputs, outputs, 1))
        for number, (inputs, outputs, stride) in enumerate(
            [(16, 16, 1), (16, 32, 2), (32, 64, 2)], 1
        )
    }
    network = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 16, 3, padding=1),
            **groups,
            bn=nn.BatchNorm2d(64),
            relu=nn.LeakyReLU(SLOPE),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(64, classes),
        )
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return network
