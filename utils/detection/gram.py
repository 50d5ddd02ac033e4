"""Gram matrices of the maps of a network's last stage, and how far they are beyond clean ones.

Ma, Wang, Sun, Xue, Wen, Xiang, "The 'Beatrix' Resurrections: Robust Backdoor Detection via Gram
Matrices", NDSS 2023 (arXiv 2209.11715).
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from antidote_bench.utils.data import loader
from antidote_bench.utils.errors import ConfigError

WIDTH = 10.0  # of the bounds, in MADs
FLOOR = 0.01  # of the mean bound: an excess is relative to no less
LEAST_IMAGES = 5  # of a class, for bounds of its own
AT_ONCE = 2**24  # entries that are computed at once


class Bounds(NamedTuple):
    """Between which values the entries of clean images lie: float32 orders,E."""

    low: torch.Tensor
    high: torch.Tensor


def last_stage(model, images):
    """The convolution whose input are the maps that enter the last stage of `model`.

    It is the first one, in the order in which they run, whose output is as small as that of the
    last one. `images` are some to run, n,3,S,S. Raises ConfigError (exit 2) where that is the first
    convolution of all, which sees the image itself.
    """
    ran = []
    hooks = [
        module.register_forward_hook(lambda layer, _, output: ran.append((layer, output.shape[2:])))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        with loader.evaluating(model), torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    place = next((i for i, (_, size) in enumerate(ran) if size == ran[-1][1]), 0)
    if place == 0:
        raise ConfigError(
            "the model has no stage of convolutions whose input are maps of features: choose "
            "another --model for the attack"
        )
    return ran[place][0]


@contextmanager
def seen_by(layer):
    """A list that holds the input of `layer` after each forward pass, inside."""
    seen = []

    def keep(_layer, inputs):
        seen[:] = [inputs[0]]

    hook = layer.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


def grams(maps, order):
    """n,E: the entries on and above the diagonal of (v^p (v^p)')^(1/p), with p = `order`.

    `maps` n,C,H,W are the v, C by H W, whose power is taken entry by entry. A root keeps the sign.
    """
    flat = maps.flatten(2)
    # so that no power leaves the range of floats: a factor c of v makes a factor c^2 of the root
    scale = flat.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
    power = (flat / scale).pow(order)
    with loader.mixed_precision(maps.device, "fp32"):  # bfloat16 has too few digits for a root
        gram = power @ power.mT
    row, column = torch.triu_indices(*gram.shape[1:], device=gram.device)
    entries = gram.flatten(1).index_select(1, row * gram.shape[1] + column)
    return entries.sign() * entries.abs().pow(1 / order) * scale.squeeze(2).square()


def bounds_of(maps, orders):
    """The `Bounds` of clean maps n,C,H,W: the median of every entry and WIDTH MADs to each side."""
    low, high = [], []
    for order in range(1, orders + 1):
        entries = grams(maps, order)
        median = entries.median(0).values
        spread = WIDTH * (entries - median).abs().median(0).values
        low.append(median - spread)
        high.append(median + spread)
    return Bounds(torch.stack(low), torch.stack(high))


def bounds_of_classes(maps, predicted, classes, orders):
    """The `Bounds` of every class, from clean maps n,C,H,W and their predicted classes n.

    A class with fewer than LEAST_IMAGES has those of all images.
    """
    common, found = None, []
    for label in range(classes):
        own = maps[predicted == label]
        if len(own) < LEAST_IMAGES:
            common = bounds_of(maps, orders) if common is None else common
            found.append(common)
        else:
            found.append(bounds_of(own, orders))
    return found


def deviations(maps, predicted, bounds):
    """Of every image, float64 n: by how much its entries are beyond the bounds of its predicted
    class, relative to them, as a mean over entries and orders."""
    found = torch.zeros(len(maps), dtype=torch.float64, device=maps.device)
    each = max(AT_ONCE // maps.shape[1] ** 2, 1)
    for label in predicted.unique().tolist():
        low, high = bounds[label]
        for index in (predicted == label).nonzero().flatten().split(each):
            for order in range(1, len(low) + 1):
                entries = grams(maps[index], order)
                found[index] += _excess(entries, low[order - 1], high[order - 1]) / len(low)
    return found


def _excess(entries, low, high):
    """The mean relative excess of n,E entries beyond bounds E; float64 n."""
    floor = FLOOR * (low.abs().mean() + high.abs().mean()) / 2 + torch.finfo(low.dtype).tiny
    below = (low - entries).clamp(min=0) / low.abs().clamp(min=floor)
    above = (entries - high).clamp(min=0) / high.abs().clamp(min=floor)
    return (below + above).double().mean(1)
