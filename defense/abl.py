"""Anti-Backdoor Learning: isolate the images that are learned too fast, then unlearn them.

Li, Lyu, Koren, Lyu, Li, Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
NeurIPS 2021 (arXiv 2110.11571). A network is trained from scratch on the poisoned training set,
with losses that cannot stay below a floor. The images of lowest loss are isolated. The network is
then trained on the other images, and after that it unlearns the labels of the isolated images.

    python defense/abl.py --result_file badnet_cifar10

Deviates in how it unlearns: bounded log odds, while the other images are trained on; see
docs/defenses/abl.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import IsolationOptions


@dataclass(frozen=True, kw_only=True)
class Config(IsolationOptions):
    stage: ClassVar[str] = "in-training"
    adds: ClassVar[dict[str, str]] = {
        "isolated.safetensors": "the isolated positions `index`, and of every training image the "
        "`loss` that ranked it"
    }

    unlearn_epochs: int = option(5, at_least=0)
    """epochs on the other images in which the isolated images are unlearned"""
    unlearn_lr: float = option(5e-4, above=0)
    """learning rate of these epochs, which have neither momentum nor weight decay"""
    bound: float = option(2.0, above=0)
    """loss at which an image counts as unlearned and has no gradient any more, as a multiple of the
    loss of a guess, which is ln(classes)"""


if __name__ == "__main__":
    launch(Config)

import math
from functools import partial

import torch
import torch.nn.functional as F

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import to_unit
from antidote_bench.utils.repair.isolation import isolate
from antidote_bench.utils.repair.unlearning import EvaluationMode
from antidote_bench.utils.train import Recipe, augmentation_of, cross_entropy, fit


def repair(model, record, config):
    model, index, losses = isolate(record, config)
    record.keep("isolated.safetensors", {"index": index, "loss": losses})
    is_other = torch.ones(len(losses), dtype=torch.bool, device=index.device)
    is_other[index] = False
    others = record.train.view(is_other.nonzero().flatten())
    fit(
        model,
        others,
        Recipe.of(config),
        drop_last=True,
        loss=partial(cross_entropy, label_smoothing=config.label_smoothing),
        augment=augmentation_of(config, record.spec, others),
        on_epoch=partial(record.report, "train"),
        checkpoint=record.state / "train.safetensors",
    )
    record.report("trained", model)
    return unlearn(model, record.train[index], others, record, config)


def unlearn(model, isolated, others, record, config):
    """Train `model` to lose the labels of the split `isolated` and to keep those of `others`.

    It is changed in place and returned.
    """
    recipe = Recipe.stage(
        config,
        epochs=config.unlearn_epochs,
        batch_size=config.batch_size,
        lr=config.unlearn_lr,
        lr_min=config.unlearn_lr,
        momentum=0.0,
        weight_decay=0.0,
    )
    fit(
        EvaluationMode(model),
        others,
        recipe,
        drop_last=True,
        loss=partial(unlearning_loss, isolated=isolated, bound=config.bound),
        augment=augmentation_of(config, record.spec, others),
        on_epoch=partial(record.report, "unlearn"),
        checkpoint=record.state / "unlearn.safetensors",
    )
    return model


def unlearning_loss(model, images, labels, index, *, isolated, bound):
    """Cross-entropy of a batch of the other images, less the log odds of as many isolated images.

    The log odds are those against their labels. They count up to the log odds of a loss of
    `bound` ln(classes); an image beyond that has no gradient.
    """
    # `index` comes in random order, so every isolated image is taken about equally often
    drawn = index % len(isolated)
    logits = model(torch.cat([images, to_unit(isolated.images[drawn])])).float()
    logits, isolated_logits = logits.split(len(labels))
    highest = math.log(logits.shape[1] ** bound - 1)
    odds = log_odds_against(isolated_logits, isolated.labels[drawn])
    return F.cross_entropy(logits, labels) - odds.clamp(max=highest).mean()


def log_odds_against(logits, labels):
    """ln((1 - p) / p) n, for the probability p of each label.

    It equals ln(exp(loss) - 1): it rises with the loss, and is steep even where the loss is 0.
    """
    own = labels[:, None]
    return logits.scatter(1, own, -math.inf).logsumexp(1) - logits.gather(1, own).squeeze(1)


def main(config):
    run.defend(__name__, config, repair)
