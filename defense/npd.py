"""Neural Polarizer: keep the victim, and insert one small linear layer that blocks triggers.

Zhu, Wei, Zha, Wu, "Neural Polarizer: A Lightweight and Effective Backdoor Defense via Purifying
Poisoned Features", NeurIPS 2023 (arXiv 2306.16697). The layer, a 1x1 convolution and a batch norm
before a late convolution, is all that is trained: on clean images, and on adversarial changes of
them towards another class, which stand for the unknown trigger.

    python defense/npd.py --result_file badnet_cifar10

Deviates in how the layer starts; the saved model has two layers more than the victim: see
docs/defenses/npd.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.config import Defense, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    layer: str | None = None
    """convolution before which the polarizer is inserted, by its name in the model; by default the
    last but one larger than 1x1"""
    start: Literal["victim", "released"] = "victim"
    """how the polarizer's batch norm begins; victim: with the statistics of the clean images and
    the scale and shift that undo them, so that no output changes; released: with mean 0, variance
    1, scale 1 and shift 0, and after the warm-up it keeps the statistics that it has then"""
    warmup_epochs: int = option(5, at_least=0)
    """epochs on the clean images with their cross-entropy alone"""
    warmup_lr: float = option(1e-4, above=0)
    """learning rate of SGD in them"""
    epochs: int = option(50, at_least=0)
    """epochs that then follow, with all terms"""
    polarizer_lr: float = option(0.01, above=0)
    """learning rate of SGD in them"""
    batch_size: int = option(128, at_least=1, unit="images")
    """images per step"""
    momentum: float = option(0.9, at_least=0, below=1)
    """of SGD"""
    weight_decay: float = option(5e-4, at_least=0)
    """L2 penalty on the polarizer"""
    radius: float = option(3.0, at_least=0)
    """largest L2 norm of an image's change, over all its values in [0, 1]"""
    steps: int = option(2, at_least=0)
    """of the search for it"""
    step_size: float = option(0.1, above=0)
    """change of a pixel in each of them"""
    targets: Literal["likely", "random"] = "likely"
    """class that an image is changed towards: its most likely wrong one, or one drawn for it
    beforehand"""
    lambda1: float = option(1.0, at_least=0)
    """weight of the clean images' cross-entropy"""
    lambda2: float = option(0.4, at_least=0)
    """weight of the changed images' cross-entropy with the class predicted for the clean ones"""
    lambda3: float = option(0.4, at_least=0)
    """weight of unlearning the most likely wrong class of a changed image"""
    lambda4: float = option(0.4, at_least=0)
    """weight of unlearning the class that it was changed towards"""


if __name__ == "__main__":
    launch(Config)

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import evaluating, to_unit
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.repair.layers import (
    Moments,
    convolutions,
    feature_maps,
    frozen,
    watch_norms,
)
from antidote_bench.utils.repair.unlearning import EvaluationMode, at_least_float32, unlikelihood
from antidote_bench.utils.train import Recipe, fit


def check(model, record, config):
    place(model, to_unit(record.clean.images[:1]), config.layer)


def repair(model, record, config):
    name = place(model, to_unit(record.clean.images[:1]), config.layer)
    with frozen(model):
        polarizer, norm = insert(model, name)
        with evaluating(model):
            if config.start == "victim":
                settle(norm, model, record.clean)
            record.report("inserted", model)
            train_polarizer(model, polarizer, norm, record, config)
    return model


def place(model, images, name=None):
    """The name of the convolution that the polarizer is inserted before.

    It is `name`, or the last but one larger than 1x1 of those that run. Raises ConfigError where
    there is no such convolution.
    """
    layers = convolutions(model)
    if name is not None:
        if name not in layers:
            last = f"the last ones are {', '.join(list(layers)[-3:])}" if layers else "it has none"
            raise ConfigError(
                f"layer must be a convolution of the model, and {name!r} is not one: {last}"
            )
        return name
    with torch.no_grad(), evaluating(model):
        in_order = feature_maps(model, images)
    large = [name for name in in_order if max(layers[name].kernel_size) > 1]
    if len(large) < 2:
        raise ConfigError(
            f"npd does not apply: the model has {len(large)} convolution(s) larger than 1x1, and "
            "the polarizer goes before the last but one; --layer names another place, or try ft_sam"
        )
    return large[-2]


def insert(model, name):
    """Insert a polarizer that is the identity before the convolution `name`; its two layers.

    In the model's state they are `name`.polarizer and `name`.norm, and the convolution is
    `name`.conv.
    """
    conv = model.get_submodule(name)
    like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    polarizer = nn.Conv2d(conv.in_channels, conv.in_channels, 1, bias=False, **like)
    norm = nn.BatchNorm2d(conv.in_channels, **like)
    nn.init.dirac_(polarizer.weight)
    parts = OrderedDict(polarizer=polarizer, norm=norm, conv=conv)
    model.set_submodule(name, nn.Sequential(parts).train(conv.training))
    return polarizer, norm


@torch.no_grad()
def settle(norm, model, split):
    """Give the batch norm the statistics of its input over all images of `split`.

    Its scale and shift then undo them. `model` is in evaluation mode.
    """
    moments = watch_norms(model, split, lambda _name: Moments(), {"its own": norm})["its own"]
    norm.running_mean.copy_(moments.mean)
    norm.running_var.copy_(moments.variance)
    norm.bias.copy_(norm.running_mean)
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())


def train_polarizer(model, polarizer, norm, record, config):
    """Train the two layers within `model`: a warm-up, then all terms of the loss."""
    moving = [polarizer, norm]
    stage = partial(
        Recipe.stage,
        config,
        batch_size=config.batch_size,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    fit(
        EvaluationMode(model, moving),
        record.clean,
        stage(epochs=config.warmup_epochs, lr=config.warmup_lr, lr_min=config.warmup_lr),
        on_epoch=partial(record.report, "warmup"),
        checkpoint=record.state / "warmup.safetensors",
    )
    record.report("warm", model)
    draws = drawn(record, config) if config.targets == "random" else None
    fit(
        EvaluationMode(model, moving if config.start == "victim" else []),
        record.clean,
        stage(epochs=config.epochs, lr=config.polarizer_lr, lr_min=config.polarizer_lr),
        loss=partial(polarizing, config=config, draws=draws),
        on_epoch=partial(record.report, "polarize"),
        checkpoint=record.state / "polarize.safetensors",
    )


def drawn(record, config):
    """A class other than its own for every clean image, int64 N."""
    generator = seeds.generator("npd targets", config.random_seed)
    steps = torch.randint(1, record.spec.classes, (len(record.clean),), generator=generator)
    return (record.clean.labels + steps.to(record.clean.labels.device)) % record.spec.classes


def polarizing(model, images, labels, index, *, config, draws=None):
    """The loss of a batch, images n,3,S,S and labels n.

    The changes are those that fool the model as it is now, in evaluation mode.
    """
    with evaluating(model):
        with torch.no_grad():
            logits = model(images)
        targets = likeliest_wrong(logits, labels) if draws is None else draws[index]
        changed = images + perturbation(model, images, targets, config)
    clean, perturbed = model(torch.cat([images, changed])).chunk(2)
    return purifying(clean, perturbed, labels, logits.argmax(1), targets, config)


def likeliest_wrong(logits, labels):
    """The most likely class other than its own of each row of logits n,C."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def perturbation(model, images, targets, config):
    """The change n,3,S,S that leads each image towards its target.

    Its L2 norm is at most config.radius, and the changed images stay in [0, 1].
    """
    change = torch.zeros_like(images)
    for _ in range(config.steps):
        change.requires_grad_()
        loss = F.cross_entropy(model(images + change), targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, change)
        change = within(change.detach() - config.step_size * gradient.sign(), images, config.radius)
    return change


def within(change, images, radius):
    """The change of each image cut to the length `radius`, then to what keeps it in [0, 1].

    The second cut makes no change longer.
    """
    length = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (images + change * (radius / length.clamp(min=1e-12)).clamp(max=1)).clamp(0, 1) - images


def purifying(clean, perturbed, labels, predicted, targets, config):
    """The weighted sum of the four terms, from the logits n,C of clean and changed images.

    `predicted` are the classes that the model predicts for the clean images, `targets` those that
    they were changed towards. Each term is a mean over images.
    """
    wrong = likeliest_wrong(perturbed, labels)
    return (
        config.lambda1 * F.cross_entropy(at_least_float32(clean), labels)
        + config.lambda2 * F.cross_entropy(at_least_float32(perturbed), predicted)
        + config.lambda3 * unlikelihood(perturbed, wrong).mean()
        + config.lambda4 * unlikelihood(perturbed, targets).mean()
    )


def rebuild(model, weights):
    """`model`, a network of `models.build`, with the polarizer and the `weights` of a repair."""
    (name,) = (
        key.removesuffix(".polarizer.weight")
        for key in weights
        if key.endswith(".polarizer.weight")
    )
    insert(model, name)
    model.load_state_dict(weights)
    return model


def main(config):
    run.defend(__name__, config, repair, check=check)
