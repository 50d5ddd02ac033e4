"""The networks of timm, an optional extra: `timm:resnet18` is what timm calls `resnet18`.

Weights are random. Networks whose input has a fixed size, vision transformers say, are built for
the size of the data set's images. Names are those of architectures, without the tag that names
published weights.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from antidote_bench.utils.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

PREFIX = "timm:"
NAME = re.compile(r"timm:[a-z0-9_.]{1,100}")


def matches(name: str) -> bool:
    """Whether `name` has the form of a network of timm."""
    return NAME.fullmatch(name) is not None


def check(name: str) -> None:
    """Raise ConfigError (exit 2) unless timm is installed and has the architecture `name`."""
    timm = _timm(name)
    own = name.removeprefix(PREFIX)
    architecture, _, tag = own.partition(".")
    if own in timm.list_models():
        return
    if tag and timm.is_model(architecture):
        raise ConfigError(
            f"--model {PREFIX}{architecture} is the name of {name}: leave .{tag} out, which names "
            "weights; --pretrained takes a file of weights"
        )
    near = difflib.get_close_matches(own, timm.list_models(), cutoff=0.5)
    hint = f"did you mean {' or '.join(PREFIX + word for word in near)}? " if near else ""
    raise ConfigError(f"timm has no network {own!r}; {hint}timm.list_models() lists all")


def build(name: str, classes: int, size: int) -> nn.Module:
    """The network `name` for images of `size` pixels a side: float N,3,size,size -> N,classes.

    Raises ConfigError (exit 2) where timm cannot build it.
    """
    timm = _timm(name)
    architecture = name.removeprefix(PREFIX)
    facts = timm.get_pretrained_cfg(architecture)
    options = {"img_size": size} if facts is not None and facts.fixed_input_size else {}
    try:
        return timm.create_model(architecture, pretrained=False, num_classes=classes, **options)
    except Exception as error:  # its builders fail in many ways at sizes that they do not take
        raise ConfigError(
            f"{name} cannot be built for images of {size} pixels: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def _timm(name):
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"the model {name} needs timm, which is not installed: pip install timm"
        ) from error
    return timm
