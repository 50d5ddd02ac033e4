"""What several defenses have in common that hold a network, or most of it, still while something is learned or unlearned."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from utils.channels import frozen, last_linear


class Still(nn.Module):
    """A network that computes as in evaluation mode while it is trained: batch norms keep their statistics, nothing drops out.

    The modules `moving`, parts of it, train as usual.
    """

    def __init__(self, network, moving=()):
        super().__init__()
        self.network = network
        self._moving = tuple(moving)  # a tuple: no second name in the state

    def train(self, mode=True):
        super().train(mode)
        self.network.eval()
        for module in self._moving:
            module.train(mode)
        return self

    def forward(self, images):
        return self.network(images)


@contextmanager
def probe(network):
    """`network` with its last linear layer alone in training: all else is held still, and frozen inside the context."""
    with frozen(network):
        yield Still(network, [last_linear(network).requires_grad_(True)])


def unlikelihood(logits, classes):
    """-log(1 - p) of one class for each row of logits n,C; n values, in float32 at least.

    Without the difference, which is 0 as soon as p rounds to 1: 1 - p is the sigmoid of how far the others' logsumexp is above the class.
    """
    logits = precise(logits)
    others = logits.scatter(1, classes[:, None], -torch.inf).logsumexp(1)
    return F.softplus(logits.gather(1, classes[:, None])[:, 0] - others)


def precise(logits):
    """Logits in float32 at least, whatever precision the network computes in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
