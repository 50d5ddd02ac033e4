"""The first layer of every model: pixels in [0, 1] become the standardised values a network learns
well from."""

import torch
from torch import nn


class Normalize(nn.Module):
    """(pixels - mean) / std per channel; `mean` and `std` are three floats each, in [0, 1] pixel
    units.

    The two constants move with the model but are not in its state dict, which holds learned things
    only.
    """

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer(
            "mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False
        )

    def forward(self, pixels):
        return (pixels - self.mean) / self.std
