"""Image classifiers that take pixels in [0, 1]: normalisation is the first layer of every model.

A network of this project is one file here with a `build(classes)` that returns it; the file name is
the model's name. The torchvision networks share `torchvision_nets.py`. Three more forms of a name
lead out of this project: `timm:NAME` is a network of timm, `torchvision:NAME` one of torchvision
that is not fitted to small images, and `path/to/file.py:function` one of the user, whose file is
executed. Weights are always random, drawn from the global torch seed. Names, labels and checks need
no torch, so that a script can check its options before torch is loaded; only the check of a name of
timm or torchvision loads that library.
"""

from __future__ import annotations

import difflib
import importlib
import math
import pkgutil
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from antidote_bench.models import source, timm_nets
from antidote_bench.models.source import FileModel
from antidote_bench.utils.errors import ConfigError, RefusedError

if TYPE_CHECKING:
    from torch import nn

    from antidote_bench.models.normalize import Normalize

__all__ = [
    "Architecture",
    "Normalize",
    "build",
    "chosen",
    "check",
    "fit_to",
    "is_file",
    "is_foreign",
    "is_name",
    "label",
    "names",
]

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
PLAIN = re.compile(r"torchvision:([a-z0-9_]{1,100})")
# the files of this folder that are no model
HELPERS = {
    "examine",
    "layers",
    "normalize",
    "pretrained",
    "source",
    "split",
    "timm_nets",
    "torchvision_nets",
}
# sides in pixels below which images shrink to nothing in a network; the others take LEAST_SIDE
SMALLEST = {"airbench": 9, "convnext_tiny": 32, "densenet161": 32, "vgg19_bn": 32}
LEAST_SIDE = 8
LONGEST_NAME = 4096  # characters of the name of a model
# the models whose width can be chosen
DEFAULT_WIDTH = {"airbench": 64, "preactresnet18": 64, "resnet9": 64}


@dataclass(frozen=True)
class Architecture:
    """A network that the user has named, and that `build` may therefore make.

    `file` is the content of the user's Python file, None for every other network. `mean` and `std`
    are three floats each, in [0, 1] pixel units, or None for the usual ones.
    """

    name: str
    file: FileModel | None = None
    mean: tuple | None = None
    std: tuple | None = None

    def __str__(self):
        facts = [self.name]
        if self.file:
            facts = [self.file.label, self.file.sha256]
        return " ".join(map(str, [*facts, *filter(None, [self.mean, self.std])]))


def chosen(
    name: str, *, sha256: str | None = None, mean: str | None = None, std: str | None = None
) -> str | Architecture:
    """What `build` takes for the options of a user, who has named the model.

    A file that `name` names is read, and nothing is executed yet. Raises ConfigError (exit 2) where
    there is none, or where its digest is not `sha256`.
    """
    file = source.read(name) if is_file(name) else None
    if file and sha256 not in (None, file.sha256):
        raise ConfigError(
            f"{file.path} is not the file with the sha256 {sha256[:12]}... any more, but has "
            f"{file.sha256[:12]}...: name the file that it was, or leave model_sha256 out"
        )
    if not file and mean is None and std is None:
        return name
    return Architecture(name, file, channels(mean, "mean"), channels(std, "std"))


def channels(text: str | None, option: str) -> tuple | None:
    """The three numbers of the option `option`, mean or std; None for None."""
    if text is None:
        return None
    lowest, words = (0, "0 or more") if option == "mean" else (1e-6, "above 0")
    try:
        values = tuple(float(part) for part in str(text).split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(lowest <= value and math.isfinite(value) for value in values):
        raise ConfigError(
            f"{option} must be three numbers, for red, green and blue, {words} and in pixels of "
            f"[0, 1], such as 0.485,0.456,0.406"
        )
    return values


def is_file(name: str) -> bool:
    """Whether `name` has the form path/to/file.py:function."""
    return source.parts(name) is not None


def is_foreign(name: str) -> bool:
    """Whether `name` leads out of this project: to timm, to torchvision or to a file."""
    return is_file(name) or _is_of_library(name)


def _is_of_library(name):
    """Whether `name` has the form of a network of timm, or of torchvision as it is there."""
    return timm_nets.matches(name) or PLAIN.fullmatch(name) is not None


def is_name(name: object) -> bool:
    """Whether `name` can be the name of a model; one that leads out of here need not exist."""
    if not isinstance(name, str) or len(name) > LONGEST_NAME:
        return False
    return name in names() or is_foreign(name)


def __getattr__(name):
    if name == "Normalize":  # on first use, because it loads torch
        return importlib.import_module("antidote_bench.models.normalize").Normalize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def names() -> list[str]:
    """The names of all models of this project and of torchvision that `build` knows, sorted."""
    own = {module.name for module in pkgutil.iter_modules(__path__)} - HELPERS
    return sorted(own.union(TORCHVISION))


def check(name: str, width: int | None = None) -> None:
    """Raise ConfigError unless there is a model `name`, with that `width`."""
    if is_file(name):
        source.read(name)
    elif name.startswith(timm_nets.PREFIX) and timm_nets.matches(name):
        timm_nets.check(name)
    elif plain := PLAIN.fullmatch(name):
        from antidote_bench.models import torchvision_nets

        torchvision_nets.check_plain(plain[1])
    elif name not in names():
        raise ConfigError(_unknown(name))
    if width is None:
        return
    if name not in DEFAULT_WIDTH:
        raise ConfigError(
            f"the width of {name} is fixed: leave width out, or choose {' or '.join(DEFAULT_WIDTH)}"
        )
    if width < 1:
        raise ConfigError(f"the width of {name} must be at least 1 channel, not {width}")


def _unknown(name):
    known = names()
    near = difflib.get_close_matches(name, known, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? all models" if near else "the models are"
    return (
        f"there is no model {name!r}; {hint}: {', '.join(known)}; or timm:NAME, "
        "torchvision:NAME, or path/to/file.py:function"
    )


def label(name: str, width: int | None = None) -> str:
    """The model's name in result tables: `resnet9` at its default width, `resnet9_w16` at width 16,
    `timm:resnet18`, or `mine:build` for nets/mine.py:build."""
    if own := source.parts(name):
        return source.label(*own)
    if not _is_of_library(name):
        check(name, width)
    return name if width in (None, DEFAULT_WIDTH.get(name)) else f"{name}_w{width}"


def build(name: str | Architecture, spec, width: int | None = None) -> nn.Module:
    """The network `name` with random weights: pixels in [0, 1], float N,3,H,W -> logits N,classes.

    `spec` has `classes`, `size` (side in pixels), and `mean` and `std` (three floats each, in [0,
    1] pixel units). `width` is the number of channels of the first trained convolution of a model
    in DEFAULT_WIDTH; None is its default. A file is executed only for an `Architecture` that
    `chosen` has made of what the user has typed: its mere name, which may stand in a stranger's
    record, raises RefusedError (exit 4). Mean and std of the network's first layer are those of the
    data set, of a file's network 0 and 1, unless the user has given others.
    """
    own = name if isinstance(name, Architecture) else Architecture(name)
    mean, std = (spec.mean, spec.std) if own.file is None else ((0.0,) * 3, (1.0,) * 3)
    network = _network(own, spec, width)
    from torch import nn

    from antidote_bench.models.normalize import Normalize

    model = nn.Sequential(
        OrderedDict(normalize=Normalize(own.mean or mean, own.std or std), network=network)
    )
    if is_foreign(own.name):
        from antidote_bench.models.examine import examine

        examine(model, label(own.name), spec.classes, spec.size)
    return model


def _network(own, spec, width):
    """The network of an `Architecture`, without its first layer."""
    name = own.name
    if own.file is None:
        if is_file(name):
            raise RefusedError(f"the file of the model {label(name)} must be named by the user")
        check(name, width)
    if spec.size < SMALLEST.get(name, 0):
        raise ConfigError(
            f"{name} needs images of at least {SMALLEST[name]} pixels, not {spec.size}: choose "
            "another model or size"
        )
    plain = PLAIN.fullmatch(name)
    if plain or name in TORCHVISION:
        # only here: loading torchvision takes a while
        from antidote_bench.models import torchvision_nets

        if plain:
            return torchvision_nets.build_plain(plain[1], spec.classes)
        return torchvision_nets.build(name, spec.classes, spec.size)
    if is_foreign(name):
        from antidote_bench.models.layers import without_inplace

        if own.file:
            return without_inplace(own.file.build(spec.classes))
        return without_inplace(timm_nets.build(name, spec.classes, spec.size))
    options = {"width": width or DEFAULT_WIDTH[name]} if name in DEFAULT_WIDTH else {}
    return importlib.import_module(f"antidote_bench.models.{name}").build(spec.classes, **options)


def fit_to(model: nn.Module, images) -> None:
    """Make the weights that come from training images (float N,3,S,S in [0, 1]) and are not
    learned; most models have none."""
    if hasattr(model.network, "fit_to"):
        model.network.fit_to(model.normalize(images))
