"""Training with the labels that a defender believes, and with the other images as unlabelled ones.

MixMatch: Berthelot et al., "MixMatch: A Holistic Approach to Semi-Supervised Learning", NeurIPS
2019 (arXiv 1905.02249). Which labels are believed is chosen by their loss, again before every
epoch: defense/dbd.py and defense/asd.py do it in different ways.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.utils.data.loader import augmentation, forward_all
from antidote_bench.utils.optimizers import adam
from antidote_bench.utils.train import Recipe, fit

# probability that the reverse cross-entropy gives to all labels but the given one: its logarithm
# must be finite
FLOOR = 1e-4


def train_mixmatch(network, split, choose, epochs, record, config):
    """`network`, trained as a whole on `split`, in place, for `epochs` of config.steps steps.

    Before every epoch choose(network, epoch), counted from 0, gives the positions whose labels are
    believed and the others, neither of them empty. `config` are SemiSupervisedOptions.
    """
    loss = MixMatch(config, record.spec.classes, epochs)

    def order(network, generator):
        known, unknown = choose(network, int(loss.step) // config.steps)
        return epoch_positions(known, unknown, config.steps, config.batch_size, generator)

    return fit(
        network,
        split,
        Recipe.stage(
            config,
            epochs=epochs,
            epoch_steps=config.steps,
            batch_size=3 * config.batch_size,
            lr=config.mixmatch_lr,
            lr_min=config.mixmatch_lr,
            weight_decay=0.0,
        ),
        loss=loss,
        optimizer=adam,
        augment=augmentation(record.spec),
        order=order,
        on_epoch=partial(record.report, "mixmatch"),
        checkpoint=record.state / "mixmatch.safetensors",
    )


# which labels are believed


def symmetric_cross_entropy(logits, labels, alpha, beta):
    """alpha times the cross-entropy plus beta times the reverse cross-entropy, float32 n.

    Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019 (arXiv
    1908.06112). The reverse cross-entropy is -sum_k p_k log q_k, where q is 1 for the given label
    and FLOOR for the others: it is -log FLOOR times the probability that is not the label's.
    """
    logs = -F.cross_entropy(logits.float(), labels, reduction="none")
    return -alpha * logs - beta * math.log(FLOOR) * (1 - logs.exp())


def losses_of(network, split, config):
    """The symmetric cross-entropy of every image of `split`, float32 N.

    In evaluation mode, without augmentation.
    """

    def loss(images, labels, _index):
        return symmetric_cross_entropy(network(images), labels, config.alpha, config.beta)

    return forward_all(network, split, loss, config.precision)


def split_by_loss(losses, groups, share):
    """(positions of the `share` of lowest losses within every group, positions of the others).

    `groups` N are numbers from 0 on. Neither part is empty. Of equal losses the first is lower.
    """
    order = losses.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]  # by group, and by loss within it
    counts = groups.bincount()
    starts = (counts.cumsum(0) - counts)[groups[order]]
    rank = torch.arange(len(groups), device=groups.device) - starts
    order = order[((rank + 0.5).double() / counts[groups[order]]).argsort(stable=True)]
    count = min(max(int(share * len(losses) + 1e-9), 1), len(losses) - 1)
    return order[:count], order[count:]


def epoch_positions(known, unknown, steps, size, generator):
    """The positions of an epoch, steps * 3 * size.

    Every step has `size` of the known ones, and twice the same `size` of the unknown ones. Each of
    the two is shuffled, and shuffled again when all of it was taken.
    """

    def drawn(positions):
        repeats = -(-steps * size // len(positions))
        shuffled = [
            positions[torch.randperm(len(positions), generator=generator, device=positions.device)]
            for _ in range(repeats)
        ]
        return torch.cat(shuffled)[: steps * size].view(steps, size)

    known, unknown = drawn(known), drawn(unknown)
    return torch.cat([known, unknown, unknown], 1).flatten()


# the loss


class MixMatch(nn.Module):
    """The loss of a batch: its first third is labelled, the others are two views of unlabelled
    images.

    It counts its steps, because the weight of the unlabelled images rises with them, up to the last
    step of `epochs`.
    """

    def __init__(self, config, classes, epochs):
        super().__init__()
        self.config = config
        self.classes = classes
        self.last = max(epochs * config.steps - 1, 1)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, model, images, labels, index):
        config, count = self.config, len(images) // 3
        with torch.no_grad():
            guess = guess_labels(model(images[count:]).float(), config.sharpening)
        # otherwise some versions of torch would train with the bfloat16 weights of this forward
        # pass, which have no gradient
        torch.clear_autocast_cache()
        aims = torch.cat([F.one_hot(labels[:count], self.classes).float(), guess, guess])
        shares, partners = draw_mixture(len(images), config.mixing, images.device)
        logits = model(mix(images, shares, partners)).float()
        weight = config.unlabelled_weight * self.step / self.last
        self.step += 1
        return semi_supervised(logits, mix(aims, shares, partners), count, weight)


def guess_labels(logits, temperature):
    """Labels n,K of n images: the mean of two views' probabilities, sharpened.

    logits 2n,K: a first view of each image, and then a second. A label is in proportion to the mean
    to the power of 1 / temperature.
    """
    mean = logits.softmax(1).view(2, -1, logits.shape[1]).mean(0)
    return (mean.log() / temperature).softmax(1)


def draw_mixture(count, mixing, device):
    """(shares N, positions N of the images that each image is mixed with).

    An image keeps a share of at least 1/2 of itself. Both come from the global generator.
    """
    concentration = torch.full((2,), mixing, device=device)
    beta = torch.distributions.Beta(*concentration, validate_args=False).sample((count,))
    return torch.maximum(beta, 1 - beta), torch.randperm(count, device=device)


def mix(values, shares, partners):
    """The share of each of values N,..., plus the rest of its partner."""
    return torch.lerp(values[partners], values, shares.view(-1, *[1] * (values.ndim - 1)))


def semi_supervised(logits, aims, count, weight):
    """Cross-entropy of the first `count` images, plus `weight` times the squared error of the rest.

    It is the mean square of the difference between their probabilities and aims, both N,K.
    """
    known = F.cross_entropy(logits[:count], aims[:count])
    return known + weight * F.mse_loss(logits[count:].softmax(1), aims[count:])
