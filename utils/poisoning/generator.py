"""Small image-to-image networks that draw a trigger for each image, and how a record keeps them."""

import torch
import torch.nn.functional as F
from torch import nn


class Autoencoder(nn.Module):
    """N,inputs,H,W -> N,outputs,H,W: down the `widths` by max pools, up again by interpolation.

    Every stage is two 3x3 convolutions with batch norm and ReLU. With `skip` the way up sees the
    maps of the way down.
    """

    def __init__(self, inputs, outputs, widths, *, skip=False):
        super().__init__()
        self.skip = skip
        self.down = nn.ModuleList(
            stage(before, after) for before, after in zip((inputs, *widths), widths, strict=False)
        )
        self.middle = stage(widths[-1], widths[-1])
        backwards = (*reversed(widths), widths[0])
        self.up = nn.ModuleList(
            stage(before * (2 if skip else 1), after)
            for before, after in zip(backwards[:-1], backwards[1:], strict=True)
        )
        self.last = nn.Conv2d(widths[0], outputs, 3, padding=1)

    def forward(self, x):
        down_maps = []
        for block in self.down:
            down_maps.append(block(x))
            x = F.max_pool2d(down_maps[-1], 2)
        x = self.middle(x)
        for block in self.up:
            maps = down_maps.pop()
            x = F.interpolate(x, maps.shape[2:], mode="bilinear")
            x = block(torch.cat([x, maps], 1) if self.skip else x)
        return self.last(x)


def stage(inputs, outputs):
    """Two convolutions with batch norm and ReLU."""
    layers = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs, momentum=0.05),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def descend(optimizer, cost):
    """One step of `optimizer` down the gradient of `cost`."""
    optimizer.zero_grad()
    cost.backward()
    optimizer.step()


def pack(**networks):
    """The tensors of several networks as one dict: `name/parameter`."""
    return {
        f"{name}/{key}": value
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }


def unpack(network, parts, name):
    """`network` with the tensors that are kept under `name`, frozen and in evaluation mode."""
    prefix = f"{name}/"
    weights = {
        key.removeprefix(prefix): value for key, value in parts.items() if key.startswith(prefix)
    }
    network.load_state_dict(weights)
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
