"""A factor for every batch norm channel, learned on clean images, that says which ones to prune."""

import copy
import sys
from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call

from antidote_bench.utils.data.loader import augmentation, evaluating
from antidote_bench.utils.repair import selection
from antidote_bench.utils.repair.layers import frozen
from antidote_bench.utils.train import Recipe, fit

THRESHOLDS = tuple(step / 20 for step in range(19))  # 0 to 0.9, from weak to strong
REPORTS = 20  # epochs of a mask after which the evaluator measures it


class Mask(nn.Module):
    """The factors of all channels in one row, within [0, 1], beside their scales and shifts."""

    def __init__(self, model, layers):
        super().__init__()
        self._names = list(layers)
        self._sizes = [layer.num_features for layer in layers.values()]
        self._model = [model]  # in a list: no part of this module, whose state a checkpoint keeps
        self.scales, self.shifts = (
            torch.cat([getattr(layer, part).detach() for layer in layers.values()])
            for part in ("weight", "bias")
        )
        self.factors = nn.Parameter(torch.ones_like(self.scales))

    def logits(self, images, factors, shifts=None):
        """Those of the model with its scales times `factors` and its shifts times `shifts`.

        Both have one value for every channel.
        """
        parameters = {
            f"{name}.weight": part for name, part in self.split(self.scales * factors).items()
        }
        if shifts is not None:
            parameters |= {
                f"{name}.bias": part for name, part in self.split(self.shifts * shifts).items()
            }
        return functional_call(self._model[0], parameters, (images,))

    def split(self, row):
        """{batch norm: its values} of a row of values for all channels."""
        return dict(zip(self._names, row.split(self._sizes), strict=True))

    @torch.no_grad()
    def clamp(self):
        self.factors.clamp_(0, 1)


def learn(mask, model, split, loss, record, config, *, epochs):
    """Train the mask on `split`, and return {batch norm: its factors}.

    `loss(mask, images, labels, index)` is minimised by SGD with momentum 0.9 at the constant rate
    config.mask_lr. Batches are normalised by their own statistics; those that the model keeps stay
    as they are, and so do its parameters. There is a checkpoint after every epoch, and the
    evaluator measures the mask after some of them.
    """
    recipe = Recipe.stage(
        config,
        epochs=epochs,
        batch_size=config.batch_size,
        lr=config.mask_lr,
        lr_min=config.mask_lr,
        weight_decay=0.0,
    )

    def on_epoch(mask, *, epoch, **values):
        if epoch % max(1, epochs // REPORTS) == 0:
            masked = copy.deepcopy(model)
            for name, scale in mask.split(mask.scales * mask.factors.detach()).items():
                masked.get_submodule(name).weight.data.copy_(scale)
            record.report("mask", masked, epoch=epoch, **values)

    with normalised_by_batches(model.to(memory_format=torch.channels_last)):
        fit(
            mask,
            split,
            recipe,
            loss=loss,
            augment=augmentation(record.spec),
            after_step=mask.clamp,
            on_epoch=on_epoch,
            checkpoint=record.state / "mask.safetensors",
        )
    return mask.split(mask.factors.detach())


@contextmanager
def normalised_by_batches(model):
    """Batch norms use the statistics of the batch inside and do not update their own.

    Nothing drops out, and no parameter needs a gradient.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with evaluating(model), frozen(model):
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
        try:
            yield
        finally:
            for layer in layers:
                layer.track_running_stats = True


def prune(model, factors, held_out, record, config, *, shifts=False):
    """Set the scale of every channel of `model` to zero whose factor is at most a threshold.

    `factors` are {batch norm: those of its channels}. With `shifts` the shift becomes zero too. The
    threshold is config.threshold, or with another selection than fixed is chosen among THRESHOLDS.
    """
    apply = threshold_setter(model, factors, ("weight", "bias") if shifts else ("weight",))
    row = torch.cat(list(factors.values()))
    if config.selection == "fixed":
        threshold = config.threshold
        apply(threshold)
    else:
        # of thresholds that prune the same channels, the highest
        distinct = {int((row <= threshold).sum()): threshold for threshold in THRESHOLDS}
        settings = list(distinct.values())
        threshold = selection.select(settings, apply, model, record, config, held_out)
    pruned = {
        name: torch.zeros_like(part, dtype=torch.bool) if threshold is None else part <= threshold
        for name, part in factors.items()
    }
    record.keep(
        "mask.safetensors",
        {f"{name}/factors": part for name, part in factors.items()}
        | {f"{name}/pruned": part for name, part in pruned.items()},
    )
    count = sum(int(part.sum()) for part in pruned.values())
    if threshold is None:
        why = "no threshold leaves enough accuracy"
    else:
        why = f"threshold {threshold:g}"
    print(f"{why}: pruning {count} of {len(row)} channels", file=sys.stderr)


def threshold_setter(model, factors, kinds):
    """A function of a threshold that prunes the parameters `kinds` of every batch norm by it.

    It starts from the parameters that `model` has now; the threshold None brings them back.
    """
    entries = [
        (getattr(model.get_submodule(name), kind), part)
        for name, part in factors.items()
        for kind in kinds
    ]
    originals = [parameter.detach().clone() for parameter, _ in entries]

    @torch.no_grad()
    def apply(threshold):
        for (parameter, part), original in zip(entries, originals, strict=True):
            pruned = original
            if threshold is not None:
                pruned = original.masked_fill(part <= threshold, 0)
            parameter.copy_(pruned)

    return apply
