"""Isolate the images that a network learns too easily: those of lowest loss after a short training.

That training keeps the loss of every image from staying below a floor. Anti-Backdoor Learning
(defense/abl.py) and Non-Adversarial Backdoor (defense/nab.py) find poison in this way.
"""

import sys
from functools import partial

import torch
import torch.nn.functional as F

from antidote_bench.utils.data.loader import forward_all
from antidote_bench.utils.device import exact
from antidote_bench.utils.train import Recipe, augmentation_of, fit, victim_architecture


def isolate(record, config):
    """(the network, the isolated positions in order, the plain loss of every training image).

    The network is the victim's architecture, trained from scratch with floored losses for
    config.isolate_epochs, and otherwise as `config`, IsolationOptions, says. It has not converged,
    and is not meant to. The losses are float32 N.
    """
    model = victim_architecture(record, "isolate", config)
    rate = config.isolate_lr or config.lr
    fit(
        model,
        record.train,
        Recipe.of(config, epochs=config.isolate_epochs, lr=rate, lr_min=rate),
        drop_last=True,
        loss=partial(floored_cross_entropy, gamma=config.gamma, floor=config.floor),
        augment=augmentation_of(config, record.spec, record.train),
        on_epoch=partial(record.report, "isolate"),
        checkpoint=record.state / "isolate.safetensors",
    )
    losses = losses_of(model, record.train)
    index = lowest(losses, config.isolated)
    limit = losses[index].max()
    print(
        f"isolating {len(index)} of {len(losses)} images, of loss {limit:.3g} and less",
        file=sys.stderr,
    )
    return model, index, losses


def floored_cross_entropy(model, images, labels, index, *, gamma, floor):
    """The loss of a batch, with the floor under the loss of every image."""
    return floored(F.cross_entropy(model(images), labels, reduction="none"), gamma, floor).mean()


def floored(losses, gamma, floor):
    """Losses n that training brings down to `gamma` and no further.

    lga: sign(l - gamma) l; flooding: |l - gamma| + gamma. Both have the gradient sign(l - gamma)
    times that of l (0 at gamma itself), so that below gamma it points the other way. The training
    is the same, and only the value that it shows differs. A floor under the mean of a batch would
    be another training.
    """
    return (losses - gamma).sign() * losses if floor == "lga" else (losses - gamma).abs() + gamma


def logits(model, split):
    """The logits of `model` for every image of `split`, float32 N,classes, in order.

    In evaluation mode and without augmentation. They are float32 because in bfloat16 many low
    losses are equal. The model stays as it was.
    """
    with exact():
        return forward_all(model, split, lambda images, *_: model(images))


def losses_of(model, split):
    """The cross-entropy of every image of `split` and its label, float32 N, in evaluation mode."""
    return F.cross_entropy(logits(model, split), split.labels, reduction="none")


def lowest(losses, share):
    """Sorted positions of the floor(share N) lowest losses, at least one; of equals the first."""
    count = max(int(share * len(losses) + 1e-9), 1)
    return losses.argsort(stable=True)[:count].sort().values


def highest(scores, labels, classes, share):
    """Which images, bool N, have the floor(share x count) highest scores of their label.

    Of equal scores the first ones count.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[labels[order].argsort(stable=True)]  # by label, and by score within a label
    counts = labels.bincount(minlength=classes)
    starts = counts.cumsum(0) - counts  # of the labels, in `order`
    rank = torch.arange(len(labels), device=labels.device) - starts[labels[order]]
    flagged = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    flagged[order] = rank < (share * counts + 1e-9).floor()[labels[order]]
    return flagged
