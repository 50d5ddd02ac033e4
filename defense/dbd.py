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

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import SemiSupervisedOptions


@dataclass(frozen=True, kw_only=True)
class Config(SemiSupervisedOptions):
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
    among: Literal["all", "label"] = "all"
    """all: the lowest losses of the whole training set, as in the paper; label: the lowest losses
    of every label, so that no class loses all of its labels"""
    epochs: int = option(100, at_least=0)
    """epochs of MixMatch (the paper: 190); before each, that share is chosen again"""


if __name__ == "__main__":
    launch(Config)

import math

import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import augmentation
from antidote_bench.utils.features import features_of, last_linear
from antidote_bench.utils.optimizers import adam
from antidote_bench.utils.repair.contrastive import pairs, views
from antidote_bench.utils.repair.layers import require_features
from antidote_bench.utils.repair.semi_supervised import (
    losses_of,
    split_by_loss,
    symmetric_cross_entropy,
    train_mixmatch,
)
from antidote_bench.utils.repair.unlearning import linear_probe
from antidote_bench.utils.train import Recipe, fit, victim_architecture

CODE = 128  # length of the code of a view


def repair(model, record, config):
    network = victim_architecture(record, "dbd", config)
    train_backbone(network, record, config)
    train_head(network, record, config)
    record.report("decoupled", network)
    return believe(network, record, config)


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


# third stage: MixMatch


def believe(network, record, config):
    """`network`, trained by MixMatch as a whole, in place; before every epoch it is chosen again
    which labels are believed."""
    labels = record.train.labels
    groups = labels if config.among == "label" else torch.zeros_like(labels)

    def choose(network, _epoch):
        return split_by_loss(losses_of(network, record.train, config), groups, config.labelled)

    return train_mixmatch(network, record.train, choose, config.epochs, record, config)


def main(config):
    run.defend(__name__, config, repair, check=require_features)
