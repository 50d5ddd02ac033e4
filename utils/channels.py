"""What a network computes inside: the maps of its convolutions and batch norms, which can be read and switched off, and its last features."""

import sys
from contextlib import contextmanager

import torch
from torch import nn

from utils.batch import BATCH, batches, look
from utils.device import exact
from utils.errors import ConfigError


@contextmanager
def frozen(model):
    """No parameter of `model` needs a gradient inside; afterwards those need one again that did before."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def last_linear(model):
    """The layer that makes the logits; ConfigError where the model has none."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ConfigError("the model has no linear layer, whose input would be looked at: choose another --model for the attack")
    return layers[-1]


def features_of(model, images):
    """What the last linear layer of `model` gets for images n,3,S,S: n,D, with gradients where they are on."""
    found = []
    hook = last_linear(model).register_forward_pre_hook(lambda _layer, inputs: found.append(inputs[0]))
    try:
        model(images)
    finally:
        hook.remove()
    return found[0]


def last_features(model, split, precision="fp32"):
    """`features_of` every picture of `split`, float32 N,D, in order.

    In evaluation mode and without augmentation; leaves the model as it was. ConfigError where there is no such layer.
    """
    return look(model, split, lambda images, *_: features_of(model, images).float(), precision)


def convolutions(model):
    """{qualified name: nn.Conv2d} in the order in which the model holds them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def feature_maps(model, images):
    """{convolution: its raw output N,C,h,w}, bias included, in the order in which they run; later in-place layers
    cannot change what is kept."""
    found, hooks = {}, []
    for name, module in convolutions(model).items():

        def keep(_module, _inputs, output, name=name):
            found[name] = output
            return output.clone()

        hooks.append(module.register_forward_hook(keep))
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def paired_norms(model):
    """{convolution: batch norm} where the convolution's output goes to that BatchNorm2d and nowhere else, perhaps through a max pool.

    A batch norm of a residual sum is never paired. Nothing is paired, with a warning, in a model torch.fx cannot trace.
    """
    modules = dict(model.named_modules())
    try:
        nodes = torch.fx.symbolic_trace(model).graph.nodes
    except Exception as error:  # tracing fails in whatever way the model's own code does
        print(f"warning: no batch norm is pruned, torch.fx cannot trace the model: {error}", file=sys.stderr)
        return {}
    found = {}
    for node in nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d):
            reader = _only_reader(node)
            if reader is not None and isinstance(modules[reader.target], nn.MaxPool2d):  # the maximum of zeros is zero
                reader = _only_reader(reader)
            if reader is not None and isinstance(modules[reader.target], nn.BatchNorm2d):
                found[node.target] = reader.target
    return found


def _only_reader(node):
    """The one module that reads what a node of a traced network gives; None where others do, or something else."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_module" else None


def parameters_of(model, doomed, *, norms=True, biases=True):
    """[(parameter, channels)] that make up the maps `doomed`, {convolution: channels}: filters, biases, and with `norms`
    the scale and shift of the paired batch norm."""
    modules, pairs = dict(model.named_modules()), paired_norms(model) if norms else {}
    found = []
    for name, channels in doomed.items():
        found.append((modules[name].weight, channels))
        if biases and modules[name].bias is not None:
            found.append((modules[name].bias, channels))
        if name in pairs:
            found += [(modules[pairs[name]].weight, channels), (modules[pairs[name]].bias, channels)]
    return found


def zeroing(entries):
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
    """Switch off the channels whose score stands out in their layer, and keep and report what was found.

    `scores` are {batch norm: scores C}, of which the high ones are suspicious. The scale of such a channel becomes zero,
    with `shifts` its shift too; nothing else of the model changes.
    """
    doomed = {name: outliers(values, u) for name, values in scores.items()}
    entries = []
    for name, gone in doomed.items():
        norm, channels = model.get_submodule(name), gone.nonzero().flatten().tolist()
        entries += [(parameter, channels) for parameter in ((norm.weight, norm.bias) if shifts else (norm.weight,))]
    zeroing(entries)()
    kept = {f"{name}/score": values for name, values in scores.items()} | {f"{name}/pruned": gone for name, gone in doomed.items()}
    record.keep("scores.safetensors", kept)
    count, layers = sum(int(gone.sum()) for gone in doomed.values()), sum(bool(gone.any()) for gone in doomed.values())
    print(f"pruning {count} of {sum(map(len, doomed.values()))} channels, in {layers} of {len(doomed)} batch norms", file=sys.stderr)
    record.report("pruned", model)


def outliers(scores, u):
    """Which of the scores C of a layer, a bool each, exceed their mean + u * standard deviation (of C - 1 degrees of freedom).

    A score that is not finite is left out. Of n values none can exceed it where u is (n - 1) / sqrt(n) or more.
    """
    known = scores[scores.isfinite()]
    return scores > known.mean() + u * known.std() if len(known) > 1 else torch.zeros_like(scores, dtype=torch.bool)


def batch_norms(model):
    """{qualified name: nn.BatchNorm2d} in the order in which the model holds them; ConfigError where it has none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    if not found:
        raise ConfigError("the defense does not apply: the model has no batch norm whose channels it could prune; fp and ft need none")
    return found


@torch.no_grad()
def watch_norms(model, split, see):
    """Show every picture of `split` to the model, in evaluation mode and float32, and call see(name, values n,C,h,w) with
    what enters each batch norm, batch by batch; leaves the model as it was."""
    training = model.training
    handles = [
        norm.register_forward_pre_hook(lambda _module, inputs, name=name: see(name, inputs[0])) for name, norm in batch_norms(model).items()
    ]
    model.eval()
    try:
        with exact():
            for images, _, _ in batches(split, BATCH):
                model(images)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)


class Moments:
    """Mean and variance by channel, float64 C, of batches of values n,C,... that are forgotten one after the other."""

    def __init__(self):
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, values):
        others = [dim for dim in range(values.ndim) if dim != 1]
        variance, mean = torch.var_mean(values.double(), others, correction=0)
        more, shift = values.numel() // values.shape[1], mean - self.mean
        total = self.count + more
        self._squares = self._squares + more * variance + shift.square() * (self.count * more / total)
        self.mean = self.mean + shift * (more / total)
        self.count = total

    @property
    def variance(self):
        """With count - 1 degrees of freedom, as the running variance of a batch norm."""
        return self._squares / (self.count - 1)
