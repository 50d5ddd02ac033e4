"""D-ST: learn features contrastively, using only the labels of images that look clean.

Chen, Wu, Wang, "Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples", NeurIPS
2022. An image looks clean if its features barely change under rotation and translation. A new
network learns features from all images. Then its last layer learns the labels of the images that
look clean, and unlearns those of the images that look poisoned.

    python defense/d_st.py --result_file badnet_cifar10

Deviates in which pairs of images attract each other, and more; see docs/defenses/d_st.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option, require
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import SensitivityOptions


@dataclass(frozen=True, kw_only=True)
class Config(SensitivityOptions):
    stage: ClassVar[str] = "in-training"

    epochs: int = option(200, at_least=0)
    """epochs on the training set that train the extractor"""
    contrastive_batch: int = option(512, at_least=1, unit="images")
    """images per step of extractor and classifier, each in two views for the extractor"""
    contrastive_lr: float = option(0.5, above=0)
    """highest learning rate of the extractor, which falls along half a cosine"""
    warm_share: float = option(0.05, at_least=0, at_most=1)
    """share of the extractor's epochs in which the rate first rises in a straight line"""
    temperature: float = option(0.1, above=0)
    """divisor of the cosines in the contrastive loss"""
    head_epochs: int = option(10, at_least=0)
    """epochs on the images taken for clean or for poisoned that train the classifier"""
    classifier_lr: float = option(5.0, above=0)
    """highest learning rate of the classifier, which falls along half a cosine"""
    poison_weight: float = option(0.001, at_least=0)
    """weight of the loss of images taken for poisoned, which the classifier maximises"""
    bound: float = option(2.0, above=0)
    """loss at which such an image has no gradient any more, as a multiple of the loss of a guess,
    which is ln(classes)"""

    def __post_init__(self):
        super().__post_init__()
        require(
            self.alpha_c > 0,
            "alpha_c",
            "above 0, because the classifier learns from the images taken for clean",
        )


if __name__ == "__main__":
    launch(Config)

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import augmentation
from antidote_bench.utils.features import features_of, last_linear
from antidote_bench.utils.repair.contrastive import pairs, views
from antidote_bench.utils.repair.layers import require_features
from antidote_bench.utils.repair.sensitivity import CLEAN, UNKNOWN, bounded, distinguish
from antidote_bench.utils.repair.unlearning import linear_probe
from antidote_bench.utils.train import Recipe, fit, victim_architecture

PROJECTED = 128  # dimensions in which views are compared
DECAY = 1e-4  # L2 penalty on the weights of the extractor; the classifier has none


def repair(model, record, config):
    kinds = distinguish(record, config)
    network = victim_architecture(record, "extractor", config)
    extract(network, kinds, record, config)
    record.report("extracted", network)
    classify(network, kinds, record, config)
    return network.train(model.training)


def extract(network, kinds, record, config):
    """Train all but the last linear layer of `network`, in place, on two views of every image.

    The rate rises in the first epochs, and falls along half a cosine in the others.
    """
    warm = round(config.warm_share * config.epochs)
    train = partial(
        fit,
        Projected(network),
        record.train,
        loss=partial(contrastive_loss, clean=kinds == CLEAN, temperature=config.temperature),
        augment=pairs(views(record.spec, blurred=0)),
        drop_last=True,
    )
    recipe = Recipe.stage(
        config,
        epochs=config.epochs - warm,
        batch_size=config.contrastive_batch,
        lr=config.contrastive_lr,
        weight_decay=DECAY,
    )
    train(
        recipe=dataclasses.replace(
            recipe,
            epochs=warm,
            schedule="one_cycle",
            warmup=1.0,
            random_seed=seeds.number("warm", config.random_seed),
        ),
        on_epoch=lambda _, **values: record.report("warm", network, **values),
        checkpoint=record.state / "warm.safetensors",
    )
    train(
        recipe=recipe,
        on_epoch=lambda _, **values: record.report("extractor", network, **values),
        checkpoint=record.state / "extractor.safetensors",
    )


class Projected(nn.Module):
    """The features of a network through a projection for the contrastive loss.

    The output is rows of L2 norm 1 in float32. The network's last linear layer takes no part.
    """

    def __init__(self, network):
        super().__init__()
        linear = last_linear(network).requires_grad_(False)  # it gets no gradient here
        wide = linear.in_features
        self.network = network
        self.projection = nn.Sequential(
            nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, PROJECTED)
        ).to(linear.weight.device)

    def forward(self, images):
        return F.normalize(self.projection(features_of(self.network, images)).float())


def contrastive_loss(model, images, labels, index, *, clean, temperature):
    """`contrastive` of 2n images: a first view of n images, then a second view of them.

    `clean` is a bool for every image of the training set.
    """
    return contrastive(model(images), labels, clean[index], temperature)


def contrastive(vectors, labels, clean, temperature):
    """Mean over 2n vectors of minus the log of the share that their positives have, on average,
    among all other vectors.

    vectors 2n,d have length 1. The positives of a vector are the other view of its image and, for
    an image that is `clean` (bool n), both views of all clean images with its label.
    """
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    both = clean[:, None] & clean & (labels[:, None] == labels)
    itself = torch.eye(len(vectors), dtype=torch.bool, device=labels.device)
    positive = (own | both).repeat(2, 2) & ~itself
    with torch.autocast(labels.device.type, enabled=False):
        similar = vectors @ vectors.T / temperature
    log_share = similar - similar.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    return -((log_share * positive).sum(1) / positive.sum(1)).mean()


def classify(network, kinds, record, config):
    """Train the last linear layer of `network`, in place, on the images that are not UNKNOWN."""
    known = (kinds != UNKNOWN).nonzero().flatten()
    recipe = Recipe.stage(
        config,
        epochs=config.head_epochs,
        batch_size=config.contrastive_batch,
        lr=config.classifier_lr,
        weight_decay=0.0,
    )
    with linear_probe(network) as probe:
        fit(
            probe,
            record.train.view(known),
            recipe,
            loss=partial(
                mixed_loss,
                clean=kinds[known] == CLEAN,
                weight=config.poison_weight,
                bound=config.bound,
            ),
            augment=augmentation(record.spec),
            on_epoch=partial(record.report, "classifier"),
            checkpoint=record.state / "classifier.safetensors",
        )


def mixed_loss(model, images, labels, index, *, clean, weight, bound):
    """Mean cross-entropy of the clean images, less `weight` times the bounded one of the others.

    `clean` is a bool for every image of the split.
    """
    logits = model(images)
    losses = F.cross_entropy(logits, labels, reduction="none")
    is_clean = clean[index]
    unlearned = mean_where(bounded(losses, bound, logits.shape[1]), ~is_clean)
    return mean_where(losses, is_clean) - weight * unlearned


def mean_where(values, mask):
    """The mean of those of n values where `mask` is true; 0 where it is nowhere true."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def main(config):
    run.defend(__name__, config, repair, check=require_features)
