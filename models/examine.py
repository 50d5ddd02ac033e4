"""A look at a network that is none of this project: does it classify, and where are its logits
made?"""

import copy
from contextlib import contextmanager

import torch
from torch import nn

from antidote_bench.utils.errors import ConfigError


def examine(model, label, classes, size):
    """Let two images of `size` pixels pass the new `model`, in both modes, and mark its head.

    Afterwards the attribute `makes_logits` of every nn.Linear says whether it makes the logits, of
    the features of an image, n,D. The model stays as it is. Raises ConfigError (exit 2) where it
    does not make n,classes logits of images n,3,size,size.
    """
    images = two_images(size)
    with modes_kept(model):
        _require_logits(_forward(model.eval(), images, label), label, classes, size)  # lazy layers
        buffers = copy.deepcopy(dict(model.named_buffers()))
        calls = []
        hooks = [
            module.register_forward_hook(
                lambda layer, inputs, output: calls.append((layer, inputs[0], output))
            )
            for module in model.modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            logits = _forward(model, images, label)
        finally:
            for hook in hooks:
                hook.remove()
        _mark_head(model, calls, logits)
        with torch.random.fork_rng(devices=[]):
            _require_logits(_forward(model.train(), images, label), label, classes, size)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def two_images(size, device=None):
    """Two different images, float 2,3,size,size in [0, 1]. They are not drawn: the generator that
    draws the weights is left alone."""
    return torch.linspace(0, 1, 2 * 3 * size * size, device=device).view(2, 3, size, size)


@contextmanager
def modes_kept(model):
    """Afterwards every module is in the mode, training or not, in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _forward(model, images, label):
    try:
        return model(images)
    except Exception as error:  # whatever a foreign network raises
        raise ConfigError(
            f"the model {label} does not take images of {images.shape[-1]} pixels: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error


def _require_logits(logits, label, classes, size):
    shape = tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
    if shape != (2, classes):
        raise ConfigError(
            f"the model {label} must turn 2 images of {size} pixels into logits of shape "
            f"{(2, classes)}, and returns {shape}"
        )


def _mark_head(model, calls, logits):
    """Mark the last layer that ran, if it makes the logits of features n,D.

    What follows it may scale the logits or make probabilities of them, which changes no order.
    """
    head = None
    if calls:
        layer, features, output = calls[-1]
        same = output.shape == logits.shape and torch.equal(output.argsort(1), logits.argsort(1))
        head = layer if same and features.ndim == 2 else None
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.makes_logits = module is head
