"""Reconstructive Neuron Pruning: make a copy forget the clean task, relearn it with switches alone, and prune what was not needed again.

Li, Lyu, Ma, Koren, Lyu, Li, Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023 (arXiv 2305.14876). The
copy is trained to be wrong on clean pictures until at most a fifth of them is right. Then a factor in [0, 1] on the scale
of each of its batch norm channels is trained to make it right again. The clean task needs a channel whose factor rises or stays; those
that end at or below a threshold are pruned in the victim itself, of which nothing else changes.

    python defense/rnp.py --result_file badnet_cifar10
    python defense/rnp.py --result_file badnet_cifar10 --clean_count 500 --selection fixed --save_folder_name rnp_fixed   # as published
    python defense/rnp.py --result_file badnet_cifar10 --selection oracle --save_folder_name rnp_oracle

It sees the clean pictures: four fifths forget and relearn, and by one fifth the highest threshold of 0, 0.05 ... 0.9 is chosen that
keeps the accuracy; fixed and oracle use all for both. The usual threshold is a constant, 0.7; other code can also take the one of least
test ASR, which is --selection oracle. Not copied from other code: a gradient that is clipped before it is computed (so never), and a seed
that is set by an import.

On the built-in digits (resnet9 of width 16, 64 clean pictures, seeds 0) the ASR of badnet falls from 99.3 to 0.0 % at an ACC of 88.0,
that of blended from 100 to 0.0 at 88.4; a clean model, in which there is nothing to find, goes from an ACC of 99.8 to 90.6. --selection
fixed leaves badnet at an ACC of 79.0, oracle at 97.6, both at an ASR of 0.0: the threshold decides what it costs.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from utils.config import Choosing, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Choosing):
    relative_rates: ClassVar = ("lr",)

    selection: Literal["val", "fixed", "oracle"] = "val"
    """val: choose the threshold by a fifth of the clean pictures, held back for that; fixed: take --threshold; oracle: by the test set,
    which every table here marks"""
    threshold: float = 0.7
    """largest factor of a pruned channel with --selection fixed, 0..1"""
    epochs: int = 20
    """passes over the clean pictures in which they are forgotten, at most"""
    forgotten: float = 0.2
    """accuracy at or below which they count as forgotten, 0..1"""
    lr: float = 0.01
    """learning rate of forgetting, a tenth of it in its second half; where it is not given, relative to the victim's as in ft"""
    clip: float = 20.0
    """largest norm of its gradient"""
    mask_epochs: int = 20
    """passes over them in which the mask is learned"""
    mask_lr: float = 0.2
    """learning rate of the mask"""
    alpha: float = 0.2
    """factor of the mask's loss"""
    batch_size: int = 128
    """images per step"""

    def __post_init__(self):
        super().__post_init__()
        require(self.epochs >= 0 and self.mask_epochs >= 0, "epochs and mask_epochs", "0 or more")
        require(min(self.lr, self.mask_lr, self.clip) > 0, "lr, mask_lr and clip", "positive")
        require(0 <= self.forgotten <= 1 and 0 <= self.threshold <= 1, "forgotten and threshold", "0 to 1")
        require(self.alpha > 0 and self.batch_size >= 1, "alpha and batch_size", "positive")

    def work(self, clean, found):
        return f"at most {self.epochs} epochs of forgetting and {self.mask_epochs} of a mask on {clean} pictures"


if __name__ == "__main__":
    launch(Config)

import copy
from functools import partial

import torch
import torch.nn.functional as F

from utils import choice, masks, run, seeds
from utils.batch import augmentation, batches, mixed_precision
from utils.channels import batch_norms


def repair(model, record, config):
    batch_norms(model)
    work, held = choice.divide(record.clean, config)
    twin = forget(copy.deepcopy(model), work, augmentation(record.spec), config)
    record.report("forgotten", twin)
    mask = masks.Mask(twin, batch_norms(twin))
    factors = masks.learn(mask, twin, work, partial(loss, alpha=config.alpha), record, config, epochs=config.mask_epochs)
    masks.prune(model, factors, held, record, config)
    record.report("pruned", model)
    return model


def loss(mask, images, labels, index, *, alpha):
    return alpha * F.cross_entropy(mask.logits(images, mask.factors), labels)


def forget(model, split, augment, config):
    """Train `model` uphill, in place, until it is right on few enough pictures of a pass; short enough to be repeated whole."""
    training, device = model.training, split.labels.device
    optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum=0.9, weight_decay=5e-4, fused=True)
    model.to(memory_format=torch.channels_last).train()
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = config.lr * (1 if epoch < config.epochs / 2 else 0.1)
        torch.manual_seed(seeds.number("dropout", config.random_seed, epoch))
        generator, hits = seeds.generator("forget", config.random_seed, epoch, device=device), 0
        for images, labels, _ in batches(split, config.batch_size, generator=generator, augment=augment):
            with mixed_precision(device, config.precision):
                logits = model(images)
                value = -F.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            hits += (logits.detach().argmax(1) == labels).sum()
        if hits <= config.forgotten * len(split):
            break
    return model.train(training)


def main(config):
    run.defend(__name__, config, repair, selection=config.selection)
