"""PreAct-ResNet-18 for small images: the residual network most backdoor papers report on.

He, Zhang, Ren and Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016,
https://arxiv.org/abs/1603.05027 Form: the one of the backdoor literature for CIFAR. A 3x3 stem of
stride 1, four stages of two basic blocks with 64, 128, 256 and 512 channels (at the default width),
average pool, linear layer. Unlike the paper it has no batch norm after the last block. 20
convolutions with 4,800 output channels together.
"""

from collections import OrderedDict

from torch import nn
from torch.nn import functional as F


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after its batch norm and ReLU; N,inputs,H,W ->
    N,outputs,H/stride,W/stride."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same_shape = inputs == outputs and stride == 1
        self.shortcut = None if same_shape else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        active = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out = self.conv1(active)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut  # a new tensor: defenses read the convolution's output from a hook


def stage(inputs, outputs, stride):
    """Two blocks, the first of which changes the shape."""
    return nn.Sequential(
        PreActBlock(inputs, outputs, stride), PreActBlock(outputs, outputs, stride=1)
    )


def build(classes, width):
    """The network with `width` channels in the first stage: float N,3,H,W -> logits N,classes. The
    paper's width is 64."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, width, 3, padding=1, bias=False),
            layer1=stage(width, width, stride=1),
            layer2=stage(width, 2 * width, stride=2),
            layer3=stage(2 * width, 4 * width, stride=2),
            layer4=stage(4 * width, 8 * width, stride=2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(8 * width, classes),
        )
    )
