"""A factor for every batch norm channel, learned on clean pictures, that says which channels to switch off."""

import copy
import sys
from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call

from utils import choice
from utils.batch import augmentation
from utils.channels import frozen
from utils.train import fit, stage

THRESHOLDS = tuple(step / 20 for step in range(19))  # 0 to 0.9, from weak to strong
REPORTS = 20  # stages of a mask that the judge sees


class Mask(nn.Module):
    """The factors of all channels in a row, within [0, 1], beside the scales and shifts they belong to."""

    def __init__(self, model, layers):
        super().__init__()
        self._names, self._sizes = list(layers), [layer.num_features for layer in layers.values()]
        self._model = [model]  # in a list: no part of this module, whose state a checkpoint keeps
        self.scales, self.shifts = (torch.cat([getattr(layer, part).detach() for layer in layers.values()]) for part in ("weight", "bias"))
        self.factors = nn.Parameter(torch.ones_like(self.scales))

    def logits(self, images, factors, shifts=None):
        """Of the model with its scales times `factors`, one for every channel, and its shifts times `shifts`."""
        parts = {f"{name}.weight": part for name, part in self.split(self.scales * factors).items()}
        if shifts is not None:
            parts |= {f"{name}.bias": part for name, part in self.split(self.shifts * shifts).items()}
        return functional_call(self._model[0], parts, (images,))

    def split(self, row):
        """{batch norm: its part} of values for all channels."""
        return dict(zip(self._names, row.split(self._sizes), strict=True))

    @torch.no_grad()
    def clamp(self):
        self.factors.clamp_(0, 1)


def learn(mask, model, split, loss, record, config, *, epochs):
    """Train the mask on `split` by SGD with momentum 0.9 at the constant rate config.mask_lr; {batch norm: its factors}.

    `loss(mask, images, labels, index)` is minimised. Batches are normalised by their own statistics; those that the model
    keeps stay as they are, and so do its parameters. The state after every epoch is kept, and the judge sees some of them.
    """
    options = stage(config, epochs=epochs, batch_size=config.batch_size, lr=config.mask_lr, lr_min=config.mask_lr, weight_decay=0.0)

    def on_epoch(mask, *, epoch, **values):
        if epoch % max(1, epochs // REPORTS) == 0:
            twin = copy.deepcopy(model)
            for name, scale in mask.split(mask.scales * mask.factors.detach()).items():
                twin.get_submodule(name).weight.data.copy_(scale)
            record.report("mask", twin, epoch=epoch, **values)

    with normalised_by_batches(model.to(memory_format=torch.channels_last)):
        fit(mask, split, options, loss=loss, augment=augmentation(record.spec), after_step=mask.clamp, on_epoch=on_epoch,
            checkpoint=record.state / "mask.safetensors")  # fmt: skip
    return mask.split(mask.factors.detach())


def prune(model, factors, held, record, config, *, shifts=False):
    """Set the scale of every channel of `model` to zero whose factor, {batch norm: factors}, is at most a threshold.

    With `shifts` the shifts too. The threshold is config.threshold, or with another selection than fixed is chosen among THRESHOLDS.
    """
    kinds = ("weight", "bias") if shifts else ("weight",)
    entries = [(getattr(model.get_submodule(name), kind), part) for name, part in factors.items() for kind in kinds]
    originals = [parameter.detach().clone() for parameter, _ in entries]

    @torch.no_grad()
    def show(threshold):
        for (parameter, part), original in zip(entries, originals, strict=True):
            parameter.copy_(original if threshold is None else original.masked_fill(part <= threshold, 0))

    row = torch.cat(list(factors.values()))
    if config.selection == "fixed":
        threshold = config.threshold
        show(threshold)
    else:
        different = {int((row <= threshold).sum()): threshold for threshold in THRESHOLDS}  # of equals the largest
        threshold = choice.choose(list(different.values()), show, model, record, config, held)
    gone = {name: torch.zeros_like(part, dtype=torch.bool) if threshold is None else part <= threshold for name, part in factors.items()}
    record.keep("mask.safetensors", {f"{name}/factors": part for name, part in factors.items()}
                | {f"{name}/pruned": part for name, part in gone.items()})  # fmt: skip
    count = sum(int(part.sum()) for part in gone.values())
    what = "no threshold leaves enough accuracy" if threshold is None else f"threshold {threshold:g}"
    print(f"{what}: pruning {count} of {len(row)} channels", file=sys.stderr)


@contextmanager
def normalised_by_batches(model):
    """Batch norms use the statistics of the batch inside without keeping them, nothing drops out, no parameter needs a gradient."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.training, layer.track_running_stats = True, False
    try:
        with frozen(model):
            yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        for module, mode in modes:
            module.training = mode
