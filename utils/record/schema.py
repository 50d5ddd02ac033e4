"""What the files of a record must hold: types, shapes and ranges. Records may come from others."""

import io
import re

import torch

from antidote_bench import models
from antidote_bench.utils import files
from antidote_bench.utils.data import sources
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.record.folder import RESULT_COLUMNS
from antidote_bench.utils.text import cut

LARGEST_SIDE = 4096  # pixels
MOST_ROWS = 100_000  # of a log.csv
SHA256 = re.compile("[0-9a-f]{64}")
# parts of poison.safetensors that a record may lack: one2one has the second, other label modes have
# the first, and older records neither
OPTIONAL = "target", "other"
LONGEST = 200  # characters of a value in a message


def check_options(made):
    """Check the options in an attack's config.yaml; ValueError says which one is wrong."""
    _require(made.get("dataset") in sources.NAMES, "dataset", f"one of {sources.NAMES}", made)
    _require(isinstance(made.get("dataset_path"), str), "dataset_path", "text", made)
    _require(models.is_name(made.get("model")), "model", "the name of a network", made)
    if models.is_file(made["model"]):
        digest = made.get("model_sha256")
        right = isinstance(digest, str) and SHA256.fullmatch(digest)
        _require(right, "model_sha256", "a digest of 64 hexadecimal digits", made)
    for name in ("mean", "std"):
        _require(_is_normalisation(made, name), name, "null or three numbers", made)
    _require(made.get("mirror") in (None, True, False), "mirror", "null, true or false", made)
    for name, lowest in (("image_size", 8), ("width", 1)):
        value = made.get(name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        right = value is None or whole and lowest <= value <= LARGEST_SIDE
        _require(right, name, f"null or a whole number, {lowest} to {LARGEST_SIDE}", made)


def check_facts(info):
    """Check record.json of an attack; ValueError says what is wrong."""
    name = info.get("name")
    if not isinstance(name, str) or not name.isprintable() or len(name) > LONGEST:
        raise ValueError("name must be a short printable text")
    data = info.get("data")
    if not isinstance(data, dict):
        raise ValueError("data must be a mapping")
    for name in ("train", "test", "classes", "size"):
        value = data.get(name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        _require(
            whole and value > 0, f"data.{name}", "a whole number above 0", {f"data.{name}": value}
        )
    prints = data.get("fingerprint")
    right = isinstance(prints, dict) and all(isinstance(value, str) for value in prints.values())
    _require(right and set(prints) == {"train", "test"}, "data.fingerprint", "two digests", data)
    names = data.get("class_names", [])
    right = isinstance(names, list) and all(isinstance(name, str) for name in names)
    right = right and len(names) in (0, data["classes"])
    _require(right, "data.class_names", "a list of names, one for each class", data)


def check_results(row):
    """Check the row of a victim's results.csv; ValueError or KeyError says what is wrong."""
    for name in ("acc", "asr", "ra"):
        value = float(row[name]) if row[name] else 0.0
        _require(0 <= value <= 1, name, "a share from 0 to 1 or empty", row)
    if missing := set(RESULT_COLUMNS) - {"defense_seed", "lr"} - row.keys():
        raise KeyError(f"no column {', '.join(sorted(missing))}")


def check_poisoned(tensors, data, file):
    """Check dtype, shape and range of every tensor of poison.safetensors; ValueError names it."""
    side, classes = data.spec.size, data.spec.classes
    counts = {"train": len(data.train), **dict.fromkeys(("test", *OPTIONAL), len(data.test))}
    for part, count in counts.items():
        if part in OPTIONAL and f"{part}_images" not in tensors:
            continue
        index = tensors[f"{part}_index"]
        _check_whole(file, f"{part}_index", index, index.numel(), 0, count - 1)
        if len(index.unique()) != len(index):
            raise ValueError(f"{file}: {part}_index must not name an image twice")
        images, shape = tensors[f"{part}_images"], (len(index), 3, side, side)
        if images.dtype != torch.uint8 or images.shape != shape:
            raise ValueError(f"{file}: {part}_images must be uint8 {shape}")
        for name in ("labels", "truth") if part != "train" else ("labels",):
            _check_whole(
                file, f"{part}_{name}", tensors[f"{part}_{name}"], len(index), 0, classes - 1
            )
    _check_whole(file, "train_kind", tensors["train_kind"], len(tensors["train_index"]), 1, 2)


def check_finite(tensors, file):
    """ValueError where a tensor of numbers holds nan or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{file}: {name} must hold finite numbers")


def read_rows(content):
    """The rows of a CSV file, [{column: text}]; ValueError or csv.Error where it is none."""
    rows = files.read_rows(io.StringIO(content.decode()), MOST_ROWS)
    if any(None in row or None in row.values() for row in rows):
        raise ValueError("a row has another number of columns than the header")
    return rows


def _check_whole(file, name, tensor, count, low, high):
    right = tensor.dtype == torch.int64 and tensor.shape == (count,)
    if right and count:
        right = low <= int(tensor.min()) and int(tensor.max()) <= high
    if not right:
        raise ValueError(f"{file}: {name} must be int64, {count} of them, {low} to {high}")


def _is_normalisation(made, name):
    value = made.get(name)
    try:
        return value is None or isinstance(value, str) and models.channels(value, name) is not None
    except ConfigError:
        return False


def _require(right, name, what, values):
    if not right:
        raise ValueError(f"{name} must be {what}, and is {cut(repr(values.get(name)), LONGEST)}")
