"""What defenses share that learn or unlearn something while most of the network stays as it is."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.utils.features import last_linear
from antidote_bench.utils.repair.layers import frozen


class EvaluationMode(nn.Module):
    """A network that computes as in evaluation mode while it is trained.

    Its batch norms keep their statistics, and nothing is dropped. The modules `moving`, which are
    parts of it, train as usual.
    """

    def __init__(self, network, moving=()):
        super().__init__()
        self.network = network
        self._moving = tuple(moving)  # in a tuple, the state does not hold them a second time

    def train(self, mode=True):
        super().train(mode)
        self.network.eval()
        for module in self._moving:
            module.train(mode)
        return self

    def forward(self, images):
        return self.network(images)


@contextmanager
def linear_probe(network):
    """`network` with only its last linear layer in training; all else is frozen inside."""
    with frozen(network):
        yield EvaluationMode(network, [last_linear(network).requires_grad_(True)])


def unlikelihood(logits, classes):
    """-log(1 - p) of one class for each row of logits n,C; n values, in float32 at least.

    1 - p is the sigmoid of (logsumexp of the other logits - logit of the class). The difference
    1 - p itself would be 0 as soon as p rounds to 1.
    """
    logits = at_least_float32(logits)
    others = logits.scatter(1, classes[:, None], -torch.inf).logsumexp(1)
    return F.softplus(logits.gather(1, classes[:, None])[:, 0] - others)


def at_least_float32(logits):
    """Logits in float32 at least, whatever the precision that the network computes in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
