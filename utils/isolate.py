"""Pictures that a network learns too easily: those of lowest loss after a short training that holds every loss up at a floor.

Anti-Backdoor Learning (defense/abl.py) and Non-Adversarial Backdoor (defense/nab.py) find poison that way.
"""

import dataclasses
import sys
from functools import partial

import torch
import torch.nn.functional as F

from utils.batch import look
from utils.device import exact
from utils.train import augmentation_of, fit, fresh


def isolate(record, config):
    """(the network, the isolated positions in order, the plain loss of every picture of the found set, float32 N).

    The network is the victim's with new random weights, trained on the found set for config.isolate_epochs with floored
    losses, and otherwise as `config`, a config.Isolating, says; it has not converged, and is not meant to.
    """
    model = fresh(record, "isolate", config)
    rate = config.isolate_lr or config.lr
    fit(model, record.train, dataclasses.replace(config, epochs=config.isolate_epochs, lr=rate, lr_min=rate), drop_last=True,
        loss=partial(floored_cross_entropy, gamma=config.gamma, floor=config.floor), augment=augmentation_of(config, record.spec, record.train),
        on_epoch=partial(record.report, "isolate"), checkpoint=record.state / "isolate.safetensors")  # fmt: skip
    losses = F.cross_entropy(logits(model, record.train), record.train.labels, reduction="none")
    index = lowest(losses, config.isolated)
    print(f"isolating {len(index)} of {len(losses)} pictures, of loss {losses[index].max():.3g} and less", file=sys.stderr)
    return model, index, losses


def floored(losses, gamma, floor):
    """Losses n that training brings down to `gamma` and no further: below it, their gradient points the other way.

    lga: sign(l - gamma) l; flooding: |l - gamma| + gamma. Both have the gradient sign(l - gamma) times that of l (0 at gamma
    itself): the training is the same, and only the value that it shows differs. That of a batch's mean would be another.
    """
    return (losses - gamma).sign() * losses if floor == "lga" else (losses - gamma).abs() + gamma


def floored_cross_entropy(model, images, labels, index, *, gamma, floor):
    """The loss of a batch, with the floor under every picture."""
    return floored(F.cross_entropy(model(images), labels, reduction="none"), gamma, floor).mean()


def logits(model, split):
    """What `model` answers to every picture of `split`, float32 N,classes, in order.

    In evaluation mode and without augmentation; in float32, because in bfloat16 many low losses are equal. Leaves the model as it was.
    """
    with exact():
        return look(model, split, lambda images, *_: model(images))


def lowest(losses, share):
    """Sorted positions of the floor(share N) lowest losses, at least one; of equal ones the first."""
    count = max(int(share * len(losses) + 1e-9), 1)
    return losses.argsort(stable=True)[:count].sort().values


def highest(scores, labels, classes, share):
    """bool N: of every label the floor(share x count) pictures of highest score; of equal ones the first."""
    order = scores.argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]  # by label, and by score within
    counts = labels.bincount(minlength=classes)
    rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
    flagged = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    flagged[order] = rank < (share * counts + 1e-9).floor()[labels[order]]
    return flagged
