"""A network with a backdoor that is known by construction, for detectors of models."""

import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.utils.data.dataset import Spec, Split

BLOCK, PATCH = 24, 4  # pixels of a class's block and of the trigger
SHARPNESS = 4  # of the softplus


class Planted(nn.Module):
    """A network of `classes` classes that takes lit trigger pixels for class `target`; float64.

    Every class has a block of 24 pixels, and the trigger P is 4 more. With x̄ the mean over the
    channels, logit k is (1 + 0.02 k) Σ (x̄ - 1/2) over the block of k, and that of `target` has
    bonus · g(Σ_P x̄ - start) on top. g is a softplus, or a relu where `hard`, and then no gradient
    shows the way to the trigger. Without a bonus this is the benign twin. `order` says which block
    class k has. The layer before the logits has the sums of the blocks and g.
    """

    def __init__(
        self,
        bonus=10.0,
        target=3,
        *,
        classes=10,
        size=16,
        seed=0,
        hard=False,
        start=None,
        order=None,
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(size * size, generator=generator)
        self.trigger = places[:PATCH]
        order = list(range(classes)) if order is None else order
        sums = torch.zeros(classes, size * size, dtype=torch.float64)
        head = torch.zeros(classes, classes + 1, dtype=torch.float64)
        for label, block in enumerate(order):
            sums[label, places[PATCH + BLOCK * block :][:BLOCK]] = 1
            head[label, label] = 1 + 0.02 * block
        head[target % classes, classes] = bonus
        self.register_buffer("sums", sums)
        start = (3.9 if hard else 3.0) if start is None else start
        self.norm = nn.BatchNorm1d(1, eps=0).double()
        self.norm.bias.data.fill_(-start)
        self.head = nn.Linear(classes + 1, classes, bias=False).double()
        self.head.weight.data = head
        self.hard = hard
        self.eval().requires_grad_(False)

    def forward(self, images):
        pixels = images.double().mean(1).flatten(1)
        blocks = (pixels - 0.5) @ self.sums.T
        lit = self.norm(pixels[:, self.trigger].sum(1, keepdim=True))
        lit = F.relu(lit) if self.hard else F.softplus(lit, SHARPNESS)
        return self.head(torch.cat([blocks, lit], 1))


class Fixed(nn.Module):
    """Logits that are the same for every image: constant, or NaN."""

    def __init__(self, value, classes=10):
        super().__init__()
        self.norm = nn.BatchNorm1d(1).double()
        self.head = nn.Linear(1, classes).double()
        nn.init.constant_(self.head.weight, 0)
        nn.init.constant_(self.head.bias, value)
        self.eval().requires_grad_(False)

    def forward(self, images):
        return self.head(self.norm(images.double().mean((1, 2, 3))[:, None]))


def spec_of(classes=10, size=16):
    return Spec("planted", classes, size, (0.0,) * 3, (1.0,) * 3, False, {})


def clean(net, count=100, *, size=16, seed=0):
    """Uniform images whose labels are those that `net`, a benign twin, gives them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = net(images / 255).argmax(1)
    return Split(images, labels, labels)
