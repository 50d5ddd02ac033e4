"""The stamp of defenses that plant a backdoor of their own (nab and proactive)."""

from torch import nn


class Stamp(nn.Module):
    """Paints `patch` 1,3,k,k over the upper left corner of images N,3,S,S in [0, 1].

    The patch is in the state dict, so that no plain network loads these weights.
    """

    def __init__(self, patch):
        super().__init__()
        self.register_buffer("patch", patch)

    def forward(self, images):
        images = images.clone()
        images[..., : self.patch.shape[2], : self.patch.shape[3]] = self.patch.to(images.dtype)
        return images
