"""Anti-Backdoor Learning: what is learned suspiciously fast is set aside, and once the network is trained on the others, unlearned.

Li, Lyu, Koren, Lyu, Li, Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021 (arXiv
2110.11571).
"""

from dataclasses import dataclass

from utils.config import Isolating, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Isolating):
    unlearn_epochs: int = 20
    """passes over the isolated pictures in which they are unlearned"""
    unlearn_lr: float = 0.005
    """learning rate of these passes, which have no momentum; the published 0.0005 has one of 0.9, with which a step goes ten times as far"""
    bound: float = 2.0
    """loss at which a picture counts as unlearned and pushes no more, in times that of a guess, ln classes; above 0"""

    def __post_init__(self):
        super().__post_init__()
        require(self.unlearn_epochs >= 0, "unlearn_epochs", "0 or more")
        require(self.unlearn_lr > 0, "unlearn_lr", "positive")
        require(self.bound > 0, "bound", "positive")

    def work(self, clean, found):
        return (f"the victim's network anew, {self.isolate_epochs} epochs on {found} pictures and {self.epochs} without the {self.isolated:.0%} "
                f"isolated ones, which are unlearned in {self.unlearn_epochs}")  # fmt: skip


if __name__ == "__main__":
    launch(Config)

import dataclasses
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from utils import run
from utils.batch import augmentation
from utils.isolate import isolate
from utils.train import cross_entropy, fit


class Settled(nn.Module):
    """A network in training whose batch norms keep their statistics: those of pictures that are all poison suit no others."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def train(self, mode=True):
        super().train(mode)
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, images):
        return self.network(images)


def repair(model, record, config):
    model, index, losses = isolate(record, config)
    record.keep("isolated.safetensors", {"index": index, "loss": losses})
    others = torch.ones(len(losses), dtype=torch.bool, device=index.device)
    others[index] = False
    fit(model, record.train.view(others.nonzero().flatten()), config, drop_last=True,
        loss=partial(cross_entropy, label_smoothing=config.label_smoothing), augment=augmentation(record.spec, config.pad),
        on_epoch=partial(record.report, "train"), checkpoint=record.state / "train.safetensors")  # fmt: skip
    record.report("trained", model)
    return unlearn(model, record.train[index], record, config)


def unlearn(model, split, record, config):
    """Gradient ascent on the pictures of `split`, each up to the bound; `model` is changed and returned."""
    stage = dataclasses.replace(config, epochs=config.unlearn_epochs, lr=config.unlearn_lr, lr_min=config.unlearn_lr, momentum=0.0,
                                nesterov=False, weight_decay=0.0)  # fmt: skip
    fit(Settled(model), split, stage, loss=partial(ascent, bound=config.bound * math.log(record.spec.classes)),
        on_epoch=partial(record.report, "unlearn"), checkpoint=record.state / "unlearn.safetensors")  # fmt: skip
    return model


def ascent(model, images, labels, index, *, bound):
    """Minus the mean loss, in which a picture of `bound` and more counts as just that, and so has no gradient."""
    return -F.cross_entropy(model(images), labels, reduction="none").clamp(max=bound).mean()


def main(config):
    run.defend(__name__, config, repair, stage="in-training")
