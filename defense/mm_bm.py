"""MM-BM: clip what a network's stages put out, channel by channel, as low as its outputs allow.

Wang, Xiang, Miller, Kesidis, "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary
Backdoor Pattern Types Using a Maximum Margin Statistic", IEEE S&P 2024 (arXiv 2205.06900): the
mitigation of that paper. A trigger drives some channels far above what clean images do. Upper
bounds on the channels are learned, and no weight of the victim changes.

    python defense/mm_bm.py --result_file badnet_cifar10

Deviates in where the bounds are and how they begin; the saved model has bounds that the victim has
not: see docs/defenses/mm_bm.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import Defense, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    places: str | None = None
    """modules whose outputs are clipped, by their names in the model, with commas; by default the
    end of the first layers and of every stage but the last"""
    start: float | None = option(None, above=0)
    """first value of every bound; by default a channel's own: one in a thousand of its values on
    the clean images is above it. The released code has 8"""
    epochs: int = option(50, at_least=0)
    """how many times every clean image is shown"""
    batch_size: int = option(200, at_least=1, unit="images")
    """images per step"""
    bound_lr: float = option(0.1, above=0)
    """learning rate of Adam"""
    penalty: float = option(0.5, at_least=0)
    """weight of the bounds' size in the loss, to begin with"""
    least_accuracy: float = option(0.95, at_least=0, at_most=1)
    """accuracy on the clean images from which on that weight rises; below, it falls"""


if __name__ == "__main__":
    launch(Config)

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import (
    batches,
    evaluating,
    evaluation_batch,
    forward_all,
    halving,
    to_unit,
)
from antidote_bench.utils.device import exact
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.optimizers import adam
from antidote_bench.utils.repair import selection
from antidote_bench.utils.repair.layers import frozen
from antidote_bench.utils.repair.unlearning import EvaluationMode, at_least_float32
from antidote_bench.utils.train import Recipe, fit

ABOVE = 0.001  # share of a channel's values on clean images that its first bound cuts
ADAPTED = (20, 30, 40)  # epochs after which the weight of the bounds' size changes
FACTOR = 1.2  # by this


def check(model, record, config):
    find_places(model, to_unit(record.clean.images[:1]), config.places)
    classified_right(model, record.clean, config)


def repair(model, record, config):
    names = find_places(model, to_unit(record.clean.images[:1]), config.places)
    split, targets = classified_right(model, record.clean, config)
    with frozen(model):
        values = first_values(model, names, split, config.start)
        bounds = add_bounds(model, values)
        record.report("bounded", model)
        learn(model, bounds, split, targets, record, config)
        for bound in bounds:
            bound.requires_grad_(False)
    return model


def learn(model, bounds, split, targets, record, config):
    """Train `bounds`, parameters of `model`, so that its outputs stay the logits `targets` N,K."""
    objective = Objective(bounds, targets, config.penalty)

    def on_epoch(_, *, epoch, **values):
        if epoch in ADAPTED:
            objective.adapt(selection.accuracy(model, split, config) >= config.least_accuracy)
        record.report("bounds", model, epoch=epoch, **values)

    recipe = Recipe.stage(
        config,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.bound_lr,
        lr_min=config.bound_lr,
        weight_decay=0.0,
    )
    fit(
        EvaluationMode(model),
        split,
        recipe,
        loss=objective,
        optimizer=adam,
        on_epoch=on_epoch,
        checkpoint=record.state / "bounds.safetensors",
    )


class Objective(nn.Module):
    """The loss: how far the logits are from `targets` N,K, and the size of the bounds, weighted."""

    def __init__(self, bounds, targets, penalty):
        super().__init__()
        self._bounds, self._targets = tuple(bounds), targets  # no part of a checkpoint
        self.register_buffer("penalty", torch.tensor(penalty, dtype=torch.float64))

    def forward(self, model, images, labels, index):
        """MSE(logits, targets) + penalty * the sum of the L2 norms of the bounds' vectors."""
        logits = at_least_float32(model(images))
        size = sum(bound.norm() for bound in self._bounds)
        return F.mse_loss(logits, self._targets[index]) + self.penalty.to(logits.dtype) * size

    def adapt(self, is_accurate):
        self.penalty.mul_(FACTOR if is_accurate else 1 / FACTOR)


def classified_right(model, clean, config):
    """(the images of the split `clean` that `model` classifies right, its logits for them N,K).

    ConfigError (exit 2) where there is none.
    """
    logits = forward_all(model, clean, lambda images, *_: model(images), config.precision).clone()
    index = (logits.argmax(1) == clean.truth).nonzero().flatten()
    if not len(index):
        raise ConfigError(
            f"mm_bm does not apply: the model classifies none of the {len(clean)} clean images "
            "right; ft needs none such"
        )
    return clean[index], at_least_float32(logits[index])


def find_places(model, images, names=None):
    """The names of the modules whose outputs are clipped: `names`, with commas, or those found.

    These are maps N,C,h,w. Raises ConfigError where there are none, or where a name is wrong.
    """
    modules = dict(model.named_modules())
    found = [name.strip() for name in names.split(",")] if names else ends_of_stages(model)
    for name in found:
        if name not in modules or name == "":
            last = ", ".join(name for name, _ in model.network.named_children())
            raise ConfigError(
                f"places must be modules of the model, and {name!r} is none; those below network "
                f"are {last}"
            )
    shapes = {}

    def look(_module, _inputs, output, name):
        shapes[name] = output.shape if torch.is_tensor(output) else ()

    watched(model, found, look, lambda: model(images))
    found = [name for name in found if names or len(shapes.get(name, ())) == 4]
    if wrong := [name for name in found if len(shapes.get(name, ())) != 4]:
        raise ConfigError(f"places must be modules that put out maps, and {wrong[0]!r} does not")
    if not found:
        raise ConfigError(
            "mm_bm does not apply: the model has no stages of convolutions, one after the other; "
            "--places names modules whose outputs are to be clipped, or try ft_sam"
        )
    return list(dict.fromkeys(found))


def ends_of_stages(model):
    """The names of the last module before the first stage and of every stage but the last one.

    Stages are the parts that hold convolutions, where a network has several of them beside each
    other. Before them a network may have a first convolution, its batch norm and its activation.
    """
    part, prefix = model, ""
    while True:
        stages = [name for name, child in part.named_children() if is_stage(child)]
        if len(stages) != 1:
            break
        part, prefix = part.get_submodule(stages[0]), f"{prefix}{stages[0]}."
    if not stages:
        return []
    first = []
    for name, child in part.named_children():
        if name == stages[0]:
            break
        is_pool = "Pool" in type(child).__name__ or isinstance(child, nn.Identity)
        if not is_pool and (first or isinstance(child, nn.Conv2d)):
            first.append(name)
    return [f"{prefix}{name}" for name in [*first[-1:], *stages[:-1]]]


def is_stage(module):
    return any(isinstance(part, nn.Conv2d) for part in module.modules() if part is not module)


@torch.no_grad()
def watched(model, names, look, function):
    """function(), in evaluation mode, in which look(module, inputs, output, name) sees every
    output of the modules `names`."""
    hooks = [
        model.get_submodule(name).register_forward_hook(partial(look, name=name)) for name in names
    ]
    try:
        with evaluating(model), exact():
            return function()
    finally:
        for hook in hooks:
            hook.remove()


def first_values(model, names, split, start=None):
    """{module: the first bounds C of its channels}: `start`, or what all but ABOVE of a channel's
    values on `split` do not exceed."""

    def pass_over_all(size):
        largest = {}

        def look(_module, _inputs, output, name):
            rows = output.transpose(0, 1).flatten(1)  # C, values
            keep = int(ABOVE * len(split) * output[0, 0].numel()) + 1
            if name in largest:
                rows = torch.cat([largest[name], rows], 1)
            largest[name] = rows.topk(min(keep, rows.shape[1]), 1).values

        watched(
            model, names, look, lambda: [model(images) for images, _, _ in batches(split, size)]
        )
        return {name: rows[:, -1] for name, rows in largest.items()}

    values = halving(pass_over_all, evaluation_batch(model, split.images))
    if start is not None:
        values = {name: torch.full_like(each, start) for name, each in values.items()}
    return values


def add_bounds(model, values):
    """Clip the outputs of modules from now on, {module: bounds C}; the bounds as parameters.

    In the model's state they are `module`.upper_bound, and all else has the names that it had.
    """
    modules, bounds = dict(model.named_modules()), []
    for name, value in values.items():
        module = modules[name]
        module.register_parameter("upper_bound", nn.Parameter(value.clone()))
        module.register_forward_hook(clip)
        bounds.append(module.upper_bound)
    return bounds


def clip(module, _inputs, output):
    """Maps N,C,h,w with no value above the bound of its channel.

    Only values above a bound have a gradient for it; torch.clamp would give it half of the gradient
    of those that are equal to it.
    """
    bound = module.upper_bound.to(output.dtype).view(-1, 1, 1)
    return torch.where(output > bound, bound, output)


def rebuild(model, weights):
    """`model`, a network of `models.build`, with the bounds and the `weights` of a repair."""
    ending = ".upper_bound"
    values = {
        name.removesuffix(ending): value for name, value in weights.items() if name.endswith(ending)
    }
    for bound in add_bounds(model, values):
        bound.requires_grad_(False)
    model.load_state_dict(weights)
    return model


def main(config):
    run.defend(__name__, config, repair, check=check)
