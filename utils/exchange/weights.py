"""Weights of other programs: found in their files, renamed, and checked against a network."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy._core import multiarray

from antidote_bench.utils import checkpoint
from antidote_bench.utils.errors import RefusedError
from antidote_bench.utils.text import one_line

# where programs keep a state dict in a file with more in it, in the order of search
PLACES = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights",
)  # fmt: skip
# what wrappers put in front of every name: data parallel, torch.compile, Lightning, this project
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.")
KINDS = ("Bool", "Int8", "UInt8", "Int16", "Int32", "Int64", "Float32", "Float64")
# numpy's arrays and numbers, under the names that both its major versions write
NUMPY = [
    np.ndarray,
    np.dtype,
    *(getattr(np.dtypes, f"{kind}DType") for kind in KINDS),
    *(
        (function, f"{module}.{name}")
        for name, function in (
            ("_reconstruct", multiarray._reconstruct),
            ("scalar", multiarray.scalar),
        )
        for module in ("numpy._core.multiarray", "numpy.core.multiarray")
    ),
]
DEEPEST = 3  # dicts within dicts
COUNTER = "num_batches_tracked"  # of batch norms; files of torch before 0.4.1 lack it
SHOWN = 5  # names in a message


class Weights(NamedTuple):
    """A state dict, {name: tensor}, and what had to be done to find it, in words."""

    tensors: dict
    notes: tuple = ()


def from_bytes(content, path):
    """The `Weights` in the content of a .safetensors file, or of one that torch.save has written;
    `path` is where it was read.

    No code of the file runs. Raises RefusedError (exit 4) where it holds anything else than
    tensors, numpy's arrays and plain values, or no state dict.
    """
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        return Weights(checkpoint.from_bytes(content, path))
    return find(checkpoint.from_pt(content, path, NUMPY), path)


def find(content, path):
    """The `Weights` in the content of a file: itself a state dict, or a dict that holds one."""
    notes = ()
    for _ in range(DEEPEST):
        if _is_state_dict(content):
            return Weights(dict(content), notes)
        place = next((name for name in PLACES if _has_dict(content, name)), None)
        if place is None:
            break
        content, notes = content[place], (*notes, f"taken from the entry {place!r}")
    keys = [one_line(key)[:40] for key in content] if isinstance(content, dict) else []
    held = f"it holds {_some(keys)}" if keys else "it holds no dict"
    raise RefusedError(
        f"{path} is refused: there is no state dict in it, only tensors under names ({held}); save "
        "model.state_dict()"
    )


def _is_state_dict(content):
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(name, str) and torch.is_tensor(value) for name, value in content.items())
    )


def _has_dict(content, name):
    return isinstance(content, dict) and isinstance(content.get(name), dict)


def without_prefixes(weights, wanted):
    """The same without what wrappers have put in front of all names; `wanted` are the right
    names."""
    tensors, notes = weights
    wanted = set(wanted)
    while tensors and not wanted & set(tensors):
        prefix = next(
            (word for word in PREFIXES if all(name.startswith(word) for name in tensors)), None
        )
        if prefix is None:
            break
        tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
        notes = (*notes, f"the prefix {prefix!r} of all names is left out")
    return Weights(tensors, notes)


def fit(weights, network, source):
    """The `Weights` under the names of `network`, an nn.Module without weights of its own yet.

    Names that differ are matched by position where number, order, shapes and kinds of all tensors
    agree. Raises RefusedError (exit 4), which names what does not fit; `source` is the file, for
    the message.
    """
    wanted = network.state_dict()
    tensors, notes = without_prefixes(weights, wanted)
    counters = {
        name: value
        for name, value in wanted.items()
        if name.endswith(COUNTER)
        and name not in tensors
        and name.replace(COUNTER, "running_mean") in tensors
    }
    tensors = {**tensors, **counters}
    if set(tensors) != set(wanted) and _same_form(tensors, wanted):
        tensors = dict(zip(wanted, tensors.values(), strict=True))
        notes = (*notes, "names are matched by position")
    _require_fit(tensors, wanted, source)
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise RefusedError(f"{source} is refused: {one_line(name)[:80]} holds nan or infinity")
    return Weights({name: tensors[name].to(value.dtype) for name, value in wanted.items()}, notes)


def _same_form(tensors, wanted):
    """Whether two state dicts agree in everything but the first parts of their names."""
    return _form(tensors) == _form(wanted)


def _form(tensors):
    return [(name.rpartition(".")[2], value.shape) for name, value in tensors.items()]


def _require_fit(tensors, wanted, source):
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    wrong = [
        f"{name} is {_shape(tensors[name])} and must be {_shape(value)}"
        for name, value in wanted.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    words = [f"{len(names)} {what}: {_some(names)}" for what, names in found.items() if names]
    if words:
        raise RefusedError(f"the weights in {source} do not fit this --model: {'; '.join(words)}")


def _shape(tensor):
    return "x".join(map(str, tensor.shape)) or "a single number"


def _some(names):
    shown = [one_line(name)[:120] for name in names[:SHOWN]]
    return ", ".join(shown + ["..."] * (len(names) > SHOWN))
