"""DBD: learn features without labels, then train with only those labels that fit the features.

Huang, Li, Wu, Qin, Ren, "Backdoor Defense via Decoupling the Training Process", ICLR 2022 (arXiv
2202.03423). A new network has three stages on the poisoned training set: SimCLR on its features, a
linear layer with a loss that tolerates wrong labels, and MixMatch, which believes the labels of
lowest loss and takes the other images as unlabelled.

    python defense/dbd.py --result_file badnet_cifar10

Deviates in the number of epochs, in augmentation and in how images are mixed; see
docs/defenses/dbd.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import Defense, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    stage: ClassVar[str] = "in-training"
    holds_clean: ClassVar[bool] = False

    ssl_epochs: int = option(100, at_least=0)
    """epochs of SimCLR on the training set (the paper: 1000)"""
    ssl_batch_size: int = option(512, at_least=2, unit="images")
    """images per step of SimCLR, each in two views"""
    ssl_lr: float = option(0.4, above=0)
    """highest learning rate of SGD in SimCLR, which falls to 0 along half a cosine"""
    ssl_weight_decay: float = option(1e-4, at_least=0)
    """L2 penalty on all weights in SimCLR"""
    temperature: float = option(0.5, above=0)
    """divisor of the similarities of views"""
    head_epochs: int = option(10, at_least=0)
    """epochs that train the linear layer on the frozen backbone"""
    head_batch_size: int = option(128, at_least=1, unit="images")
    """images per step of these epochs"""
    head_lr: float = option(0.002, above=0)
    """learning rate of Adam for the linear layer; resnet9 divides its logits by 8 and may need
    more"""
    alpha: float = option(0.1, at_least=0)
    """weight of the cross-entropy in the symmetric cross-entropy"""
    beta: float = option(1.0, at_least=0)
    """weight of the reverse cross-entropy in it"""
    labelled: float = option(0.5, above=0, below=1)
    """share of the training set, of lowest loss, whose labels MixMatch believes"""
    among: Literal["all", "label"] = "all"
    """all: the lowest losses of the whole training set, as in the paper; label: the lowest losses
    of every label, so that no class loses all of its labels"""
    epochs: int = option(100, at_least=0)
    """epochs of MixMatch (the paper: 190); before each, that share is chosen again"""
    steps: int = option(1024, at_least=1)
    """steps of MixMatch per epoch"""
    mixmatch_lr: float = option(0.002, above=0)
    """learning rate of Adam in MixMatch"""
    batch_size: int = option(64, at_least=1, unit="images")
    """labelled images per step of MixMatch, and as many unlabelled ones in two views"""
    sharpening: float = option(0.5, above=0)
    """temperature that sharpens guessed labels; 1 leaves them as they are"""
    mixing: float = option(0.75, above=0)
    """parameter of the Beta distribution of the share in which images are mixed"""
    unlabelled_weight: float = option(15.0, at_least=0)
    """weight of the unlabelled images at the end, to which it rises from 0 step by step"""

    @property
    def prior(self):
        return f"labelled={self.labelled}"


if __name__ == "__main__":
    launch(Config)

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import augmentation, forward_all
from antidote_bench.utils.features import features_of, last_linear
from antidote_bench.utils.optimizers import adam
from antidote_bench.utils.repair.contrastive import pairs, views
from antidote_bench.utils.repair.layers import require_features
from antidote_bench.utils.repair.unlearning import linear_probe
from antidote_bench.utils.train import Recipe, fit, victim_architecture

CODE = 128  # length of the code of a view
# probability that the reverse cross-entropy gives to all labels but the given one: its logarithm
# must be finite
FLOOR = 1e-4


def repair(model, record, config):
    network = victim_architecture(record, "dbd", config)
    train_backbone(network, record, config)
    train_head(network, record, config)
    record.report("decoupled", network)
    return train_mixmatch(network, record, config)


# first stage: SimCLR


def train_backbone(network, record, config):
    """Train all of `network` but its last linear layer, in place, without labels.

    Two views of an image shall be similar, and views of different images shall not.
    """

    def loss(contrast, images, labels, index):
        return nt_xent(contrast(images), config.temperature)

    fit(
        Contrast(network).to(record.train.labels.device),
        record.train,
        Recipe.stage(
            config,
            epochs=config.ssl_epochs,
            batch_size=config.ssl_batch_size,
            lr=config.ssl_lr,
            weight_decay=config.ssl_weight_decay,
        ),
        loss=loss,
        augment=pairs(views(record.spec)),
        drop_last=True,
        checkpoint=record.state / "contrast.safetensors",
        on_epoch=lambda _contrast, **values: record.report("contrast", network, **values),
    )


class Contrast(nn.Module):
    """The codes n,128 of images: two layers on what the last linear layer of `network` gets.

    That layer itself takes no part.
    """

    def __init__(self, network):
        super().__init__()
        wide = last_linear(network).in_features
        self.network = network
        self.projection = nn.Sequential(
            nn.Linear(wide, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Linear(wide, CODE)
        )

    def forward(self, images):
        return self.projection(features_of(self.network, images))


def nt_xent(codes, temperature):
    """The normalised temperature-scaled cross-entropy of Chen et al. 2020, equation 1.

    codes 2n,D: a first view of each image, then a second one in the same order. For each code it is
    -log softmax at the other view, of the cosines with all other codes over the temperature. The
    result is the mean over all 2n codes.
    """
    with torch.autocast(codes.device.type, enabled=False):  # bfloat16 has two digits of a cosine
        codes = F.normalize(codes.float())
        similar = codes @ codes.T / temperature
    places = torch.arange(len(codes), device=codes.device)
    others = similar.masked_fill(places == places[:, None], -math.inf)
    return F.cross_entropy(others, places.roll(len(codes) // 2))


# second stage: a linear layer


def train_head(network, record, config):
    """Train the last linear layer of `network`, in place, with the symmetric cross-entropy."""

    def loss(model, images, labels, index):
        return symmetric_cross_entropy(model(images), labels, config.alpha, config.beta).mean()

    recipe = Recipe.stage(
        config,
        epochs=config.head_epochs,
        batch_size=config.head_batch_size,
        lr=config.head_lr,
        lr_min=config.head_lr,
        weight_decay=0.0,
    )
    with linear_probe(network) as probe:
        fit(
            probe,
            record.train,
            recipe,
            loss=loss,
            optimizer=adam,
            augment=augmentation(record.spec),
            on_epoch=lambda _model, **values: record.report("head", network, **values),
            checkpoint=record.state / "head.safetensors",
        )


def symmetric_cross_entropy(logits, labels, alpha, beta):
    """alpha times the cross-entropy plus beta times the reverse cross-entropy, float32 n.

    Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019 (arXiv
    1908.06112). The reverse cross-entropy is -sum_k p_k log q_k, where q is 1 for the given label
    and FLOOR for the others: it is -log FLOOR times the probability that is not the label's.
    """
    logs = -F.cross_entropy(logits.float(), labels, reduction="none")
    return -alpha * logs - beta * math.log(FLOOR) * (1 - logs.exp())


# third stage: MixMatch


def train_mixmatch(network, record, config):
    """`network`, trained as a whole, in place; before every epoch it is chosen again which labels
    are believed."""
    labels = record.train.labels
    groups = labels if config.among == "label" else torch.zeros_like(labels)

    def order(network, generator):
        losses = losses_of(network, record.train, config)
        known, unknown = split_by_loss(losses, groups, config.labelled)
        return epoch_positions(known, unknown, config.steps, config.batch_size, generator)

    return fit(
        network,
        record.train,
        Recipe.stage(
            config,
            epochs=config.epochs,
            epoch_steps=config.steps,
            batch_size=3 * config.batch_size,
            lr=config.mixmatch_lr,
            lr_min=config.mixmatch_lr,
            weight_decay=0.0,
        ),
        loss=MixMatch(config, record.spec.classes),
        optimizer=adam,
        augment=augmentation(record.spec),
        order=order,
        on_epoch=partial(record.report, "mixmatch"),
        checkpoint=record.state / "mixmatch.safetensors",
    )


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


class MixMatch(nn.Module):
    """The loss of a batch: its first third is labelled, the others are two views of unlabelled
    images.

    Berthelot et al., "MixMatch: A Holistic Approach to Semi-Supervised Learning", NeurIPS 2019
    (arXiv 1905.02249). It counts its steps, because the weight of the unlabelled images rises with
    them.
    """

    def __init__(self, config, classes):
        super().__init__()
        self.config = config
        self.classes = classes
        self.last = max(config.epochs * config.steps - 1, 1)
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


def main(config):
    run.defend(__name__, config, repair, check=require_features)
