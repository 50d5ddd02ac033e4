"""Image classifiers that take pixels in [0, 1]: normalisation is the first layer of every model.

A network of this project is one file here with a `build(classes)` that returns it; the file name is
the model's name. The torchvision networks share `torchvision_nets.py`. Weights are always random,
drawn from the global torch seed. Names, labels and checks need no torch, so that a script can check
its options before torch is loaded.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections import OrderedDict
from typing import TYPE_CHECKING

from antidote_bench.utils.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from antidote_bench.models.normalize import Normalize

__all__ = ["Normalize", "build", "check", "fit_to", "label", "names"]

TORCHVISION = (
    "convnext_tiny",
    "densenet161",
    "efficientnet_b3",
    "mobilenet_v3_large",
    "resnet18",
    "resnet34",
    "resnet50",
    "vit_b_16",
)
# the files of this folder that are no model
HELPERS = {"layers", "normalize", "split", "torchvision_nets"}
# smaller images shrink to nothing in them
FROM_32_PIXELS = {"convnext_tiny", "densenet161", "vgg19_bn"}
# the models whose width can be chosen
DEFAULT_WIDTH = {"airbench": 64, "preactresnet18": 64, "resnet9": 64}


def __getattr__(name):
    if name == "Normalize":  # on first use, because it loads torch
        return importlib.import_module("antidote_bench.models.normalize").Normalize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def names() -> list[str]:
    """All names that `build` knows, sorted."""
    own = {module.name for module in pkgutil.iter_modules(__path__)} - HELPERS
    return sorted(own.union(TORCHVISION))


def check(name: str, width: int | None = None) -> None:
    """Raise ConfigError unless `build(name, spec, width)` is possible."""
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? all models" if near else "the models are"
        raise ConfigError(f"there is no model {name!r}; {hint}: {', '.join(known)}")
    if width is None:
        return
    if name not in DEFAULT_WIDTH:
        raise ConfigError(
            f"the width of {name} is fixed: leave width out, or choose {' or '.join(DEFAULT_WIDTH)}"
        )
    if width < 1:
        raise ConfigError(f"the width of {name} must be at least 1 channel, not {width}")


def label(name: str, width: int | None = None) -> str:
    """The model's name in result tables: `resnet9` at its default width, `resnet9_w16` at width
    16."""
    check(name, width)
    return name if width in (None, DEFAULT_WIDTH.get(name)) else f"{name}_w{width}"


def build(name: str, spec, width: int | None = None) -> nn.Module:
    """The network `name` with random weights: pixels in [0, 1], float N,3,H,W -> logits N,classes.

    `spec` has `classes`, `size` (side in pixels), and `mean` and `std` (three floats each, in [0,
    1] pixel units). `width` is the number of channels of the first trained convolution of a model
    in DEFAULT_WIDTH; None is its default.
    """
    check(name, width)
    if name in FROM_32_PIXELS and spec.size < 32:
        raise ConfigError(
            f"{name} needs images of at least 32 pixels, not {spec.size}: choose another model or "
            "size"
        )
    from torch import nn

    from antidote_bench.models.normalize import Normalize

    if name in TORCHVISION:
        from antidote_bench.models import (
            torchvision_nets,
        )  # only here: loading torchvision takes a while

        network = torchvision_nets.build(name, spec.classes, spec.size)
    else:
        options = {"width": width or DEFAULT_WIDTH[name]} if name in DEFAULT_WIDTH else {}
        network = importlib.import_module(f"antidote_bench.models.{name}").build(
            spec.classes, **options
        )
    return nn.Sequential(OrderedDict(normalize=Normalize(spec.mean, spec.std), network=network))


def fit_to(model: nn.Module, images) -> None:
    """Make the weights that come from training images (float N,3,S,S in [0, 1]) and are not
    learned; most models have none."""
    if hasattr(model.network, "fit_to"):
        model.network.fit_to(model.normalize(images))
