"""The feature maps of a network's convolutions: reading them, and switching some of them off."""

import sys

import torch
from torch import nn


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
    """{convolution: batch norm} where the convolution's output goes to that BatchNorm2d and nowhere else.

    A batch norm of a residual sum is never paired. Nothing is paired, with a warning, in a model torch.fx cannot trace.
    """
    modules = dict(model.named_modules())
    try:
        nodes = torch.fx.symbolic_trace(model).graph.nodes
    except Exception as error:  # tracing fails in whatever way the model's own code does
        print(f"warning: no batch norm is pruned, torch.fx cannot trace the model: {error}", file=sys.stderr)
        return {}
    calls = [node for node in nodes if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d)]
    users = {node.target: list(node.users) for node in calls}
    return {name: user[0].target for name, user in users.items()
            if len(user) == 1 and user[0].op == "call_module" and isinstance(modules[user[0].target], nn.BatchNorm2d)}  # fmt: skip


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
