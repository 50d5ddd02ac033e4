"""What a network computes inside: the maps of its convolutions and batch norms.

They can be read and switched off.
"""

import sys
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from antidote_bench.utils.channels import outliers, paired_norms
from antidote_bench.utils.data.loader import batches, evaluating, evaluation_batch, halving
from antidote_bench.utils.device import exact
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.features import last_linear


@contextmanager
def frozen(model):
    """No parameter of `model` needs a gradient inside; afterwards the same ones do as before."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def convolutions(model):
    """{qualified name: nn.Conv2d} in the order in which the model holds them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def batch_norms(model):
    """{qualified name: nn.BatchNorm2d} in the order in which the model holds them.

    They have scales, shifts and running statistics.

    Raises ConfigError (exit 2) where it has none.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats
    }
    if not norms:
        raise ConfigError(
            "the defense does not apply: the model has no batch norm whose channels it could "
            "prune; fp and ft need none"
        )
    return norms


def require_batch_norms(model, record, config):
    """ConfigError (exit 2) where the model has no batch norm; for `run.defend`."""
    batch_norms(model)


def require_convolutions(model, record, config):
    """ConfigError (exit 2) where the model has no convolution; for `run.defend`."""
    if not convolutions(model):
        raise ConfigError("the defense does not apply: the model has no convolution; ft needs none")


def require_features(model, record, config):
    """ConfigError (exit 2) where no linear layer makes the logits; for `run.defend`."""
    last_linear(model)


def feature_maps(model, images):
    """{convolution: its raw output N,C,h,w, bias included}, in the order in which they run.

    Later in-place layers cannot change the outputs.
    """
    outputs, hooks = {}, []
    for name, module in convolutions(model).items():

        def keep(_module, _inputs, output, name=name):
            outputs[name] = output
            return output.clone()

        hooks.append(module.register_forward_hook(keep))
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def parameters_of(model, to_prune, *, norms=True, biases=True):
    """[(parameter, channels)] behind the maps `to_prune`, {convolution: channels}.

    These are filters, with `biases` their biases, and with `norms` scale and shift of the paired
    batch norms.
    """
    modules = dict(model.named_modules())
    pairs = paired_norms(model) if norms else {}
    entries = []
    for name, channels in to_prune.items():
        entries.append((modules[name].weight, channels))
        if biases and modules[name].bias is not None:
            entries.append((modules[name].bias, channels))
        if name in pairs:
            norm = modules[pairs[name]]
            entries += [(norm.weight, channels), (norm.bias, channels)]
    return entries


def make_pruner(entries):
    """A function that sets the given channels of parameters, [(parameter, channels)], to zero."""
    masks = []
    for parameter, channels in entries:
        if len(channels):
            mask = torch.ones_like(parameter)
            mask[channels] = 0
            masks.append((parameter, mask))

    @torch.no_grad()
    def prune():
        for parameter, mask in masks:
            parameter.mul_(mask)

    return prune


def prune_outliers(model, record, scores, u, *, shifts):
    """Switch off the channels whose score stands out in their layer.

    `scores` are {batch norm: scores C}; high ones are suspicious. The scale of such a channel
    becomes zero, with `shifts` its shift too; nothing else of the model changes. The record gets
    scores.safetensors, and the evaluator measures the model.
    """
    to_prune = {name: outliers(values, u) for name, values in scores.items()}
    kinds = ("weight", "bias") if shifts else ("weight",)
    entries = [
        (getattr(model.get_submodule(name), kind), where.nonzero().flatten().tolist())
        for name, where in to_prune.items()
        for kind in kinds
    ]
    make_pruner(entries)()
    tensors = {f"{name}/score": values for name, values in scores.items()}
    tensors |= {f"{name}/pruned": where for name, where in to_prune.items()}
    record.keep("scores.safetensors", tensors)
    counts = [int(where.sum()) for where in to_prune.values()]
    print(
        f"pruning {sum(counts)} of {sum(map(len, to_prune.values()))} channels, in "
        f"{sum(map(bool, counts))} of {len(counts)} batch norms",
        file=sys.stderr,
    )
    record.report("pruned", model)


@torch.no_grad()
def watch_norms(model, split, make, norms=None):
    """{batch norm: make(name)}, after add(values n,C,h,w) of it has got all inputs of that layer.

    `norms`, {name: batch norm}, are by default all of the model; those that do not run are left
    out. All images of `split` pass the model batch by batch, in evaluation mode and float32.
    """
    norms = batch_norms(model) if norms is None else norms

    def pass_over_all(size):
        watchers = {}

        def look(_module, inputs, name):
            if name not in watchers:
                watchers[name] = make(name)
            watchers[name].add(inputs[0])

        handles = [
            norm.register_forward_pre_hook(partial(look, name=name)) for name, norm in norms.items()
        ]
        try:
            for images, _, _ in batches(split, size):
                model(images)
        finally:
            for handle in handles:
                handle.remove()
        return watchers

    with evaluating(model), exact():
        return halving(pass_over_all, evaluation_batch(model, split.images))


class Moments:
    """Mean and variance by channel, float64 C, of batches of values n,C,... added one by one.

    No batch is stored.
    """

    def __init__(self):
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, values):
        others = [dim for dim in range(values.ndim) if dim != 1]
        variance, mean = torch.var_mean(values.double(), others, correction=0)
        more = values.numel() // values.shape[1]
        shift = mean - self.mean
        total = self.count + more
        between = shift.square() * (self.count * more / total)
        self._squares = self._squares + more * variance + between
        self.mean = self.mean + shift * (more / total)
        self.count = total

    @property
    def variance(self):
        """With count - 1 degrees of freedom, as the running variance of a batch norm."""
        return self._squares / (self.count - 1)
