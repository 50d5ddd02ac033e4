"""Records of BackdoorBench: attack_result.pt and the PNG files beside it, read and written.

The file is a dict: the state dict of the model, what the data set is called, and the state of two
poisoned data sets, which name the changed images by their positions in the clean ones.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from antidote_bench.utils import checkpoint, files
from antidote_bench.utils.errors import ConfigError, MissingError, RefusedError
from antidote_bench.utils.exchange import image_folders
from antidote_bench.utils.exchange.image_folders import Images
from antidote_bench.utils.exchange.weights import NUMPY
from antidote_bench.utils.text import one_line

FILE = "attack_result.pt"
REPAIRED = "defense_result.pt"  # of a defense, below the folder of its attack
TRAIN, TEST = "bd_train", "bd_test"  # entries of the dict; the folders are called <entry>_dataset
LARGEST_COUNT = 10**8  # images of a data set
# networks of BackdoorBench that are not built in here: torchvision's, also for small images
PLAIN = (
    "alexnet", "vgg16", "vgg19", "vgg19_bn", "resnet18", "resnet34", "resnet50", "resnext50_32x4d",
    "wide_resnet50_2", "squeezenet1_0", "shufflenet_v2_x1_0", "mobilenet_v2", "mnasnet1_0",
    "efficientnet_b0",
)  # fmt: skip
SAME = (
    "preactresnet18", "convnext_tiny", "densenet161", "efficientnet_b3", "mobilenet_v3_large",
    "vit_b_16",
)  # fmt: skip
# networks of BackdoorBench by the names that they have here
MODELS = {
    **{name: name for name in SAME},
    **{f"torchvision:{name}": name for name in PLAIN},
    **{f"timm:{name}": name for name in ("resnet18", "resnet34", "resnet50")},
}
# those that are another network under the same name
LARGE_STEM = "its first layer has 7x7 weights there, also for small images"
DIFFERENT = {
    "vgg19_bn": "it has three fully connected layers there and one here",
    "resnet18": LARGE_STEM,
    "resnet34": LARGE_STEM,
    "resnet50": LARGE_STEM,
}
DATASETS = ("cifar10", "cifar100", "gtsrb", "tiny")


class Result(NamedTuple):
    """What attack_result.pt and its images say.

    `train`, which may be None, and `test` are `Images`: the changed training images, and the
    triggered test images. `counts` are the numbers of images of the two clean sets.
    """

    model: str
    classes: int
    size: int
    dataset: str
    weights: dict
    train: Images | None
    test: Images
    counts: dict


def find(source):
    """(the file with the model, the attack_result.pt that it belongs to) of a folder of
    BackdoorBench's record/, or of one of a defense below it, or of such a file itself.

    Both are the same for an attack. Raises MissingError (exit 3) where one is not there.
    """
    source = Path(source)
    folder = source.parent if source.name in (FILE, REPAIRED) else source
    if not folder.is_dir():
        raise MissingError(
            f"there is no folder {folder}: name one that holds {FILE}, or {REPAIRED} below it"
        )
    if (folder / FILE).is_file() and source.name != REPAIRED:
        return folder / FILE, folder / FILE
    if not (folder / REPAIRED).is_file():
        raise MissingError(f"there is no {FILE} in {folder}, and no {REPAIRED}")
    # record/<name>/defense/<method>/defense_result.pt
    above = (parent / FILE for parent in list(folder.resolve().parents)[:2])
    attack = next((path for path in above if path.is_file()), None)
    if attack is None:
        raise MissingError(
            f"there is no {FILE} in the two folders above {folder}: it says which images have the "
            "trigger; from-weights takes the weights alone"
        )
    return folder / REPAIRED, attack


def repaired(result, content, path):
    """A `Result` with the model of a defense, from the bytes of its defense_result.pt.

    It has no training set: the model was made of more than that. Raises RefusedError (exit 4) where
    the file is no such one, or is of another network.
    """
    found = checkpoint.from_pt(content, path, NUMPY)
    facts = (_entry(path, found, "model_name", str), _entry(path, found, "num_classes", int))
    if facts != (result.model, result.classes):
        raise RefusedError(
            f"{path} is refused: it is of the network {_shown(facts[0])} with {facts[1]} classes, "
            f"and the attack of {result.model} with {result.classes}"
        )
    return result._replace(weights=dict(_entry(path, found, "model", dict)), train=None)


def from_bytes(content, path):
    """The `Result` in an attack_result.pt, from its bytes and the images beside its `path`.

    No code of the file runs: it may hold tensors, numpy arrays and plain values. Raises
    MissingError (exit 3) where an image is not there, and RefusedError (exit 4) where the file
    holds something else, which is named.
    """
    content = checkpoint.from_pt(content, path, NUMPY)
    size = _entry(path, content, "img_size", list | tuple)
    model = _entry(path, content, "model_name", str)
    classes = _entry(path, content, "num_classes", int)
    sides = [int(value) for value in size] if all(_whole(value) for value in size) else []
    if len(sides) not in (2, 3) or sides[0] != sides[1] or not 8 <= sides[0] <= 4096:
        raise RefusedError(f"{path} is refused: img_size must be a square, and is {_shown(size)}")
    train = content.get(TRAIN)
    states = {TRAIN: train, TEST: _entry(path, content, TEST, dict)}
    read = {
        name: _images(path, name, state, sides[0], classes)
        for name, state in states.items()
        if state is not None
    }
    return Result(
        model,
        classes,
        sides[0],
        _entry(path, content, "clean_data", str),
        dict(_entry(path, content, "model", dict)),
        read.get(TRAIN, (None, None))[0],
        read[TEST][0],
        {name: count for name, (_, count) in read.items()},
    )


def _entry(path, content, name, kind):
    value = content.get(name) if isinstance(content, dict) else None
    if not isinstance(value, kind):
        raise RefusedError(
            f"{path} is refused: it is no record of BackdoorBench, whose entry {name!r} is "
            f"{getattr(kind, '__name__', 'list or tuple')}, and here {_shown(value)}"
        )
    return value


def _images(path, name, state, size, classes):
    """(`Images`, number of images of the clean set) of a poisoned data set's state."""
    state = state if isinstance(state, dict) else {}
    container = _entry(path, state, "bd_data_container", dict)
    entries = _entry(path, container, "data_dict", dict)
    indicator = state.get("poison_indicator")
    flat = isinstance(indicator, np.ndarray | list | torch.Tensor)
    indicator = np.asarray(indicator) if flat else np.empty(())
    if indicator.ndim != 1 or indicator.dtype.kind not in "biuf":
        raise RefusedError(f"{path} is refused: {name} has no poison_indicator for every image")
    rows = sorted(_row(path, name, key, value) for key, value in entries.items())
    index, labels, truth = (
        (torch.tensor(column) for column in zip(*rows, strict=True))
        if rows
        else (torch.empty(0, dtype=torch.long),) * 3
    )
    count = len(indicator)
    _require_range(path, name, "positions", index, count)
    _require_range(path, name, "labels", torch.cat([labels, truth]), classes)
    if not np.array_equal(np.flatnonzero(indicator), index.numpy()):
        raise RefusedError(
            f"{path} is refused: in {name} the poison_indicator marks other images than those "
            "that are stored"
        )
    index, labels, truth = (
        column[_kept(path, name, state, index)] for column in (index, labels, truth)
    )
    places = [
        path.parent / f"{name}_dataset" / str(label) / f"{number}.png"
        for number, label in zip(index.tolist(), truth.tolist(), strict=True)
    ]
    return Images(index, image_folders.read_all(places, size), labels, truth), count


def _row(path, name, key, value):
    """(position, backdoor label, original label) of an entry of data_dict."""
    info = value.get("other_info") if isinstance(value, dict) else None
    numbers = [key, *info] if isinstance(info, list | tuple) and len(info) == 2 else []
    if len(numbers) != 3 or not all(_whole(number) for number in numbers):
        raise RefusedError(
            f"{path} is refused: {name} holds an image as {_shown(value)}; what is read is a file "
            "with two labels, as BackdoorBench saves it with save_folder_path"
        )
    return tuple(int(number) for number in numbers)


def _kept(path, name, state, index):
    """A mask of the stored images that the set shows: it may be a part of the clean one."""
    shown = state.get("original_index_array")
    shown = np.asarray(shown if isinstance(shown, np.ndarray | list | torch.Tensor) else ())
    if shown.ndim != 1 or shown.dtype.kind not in "iu" and len(shown):
        raise RefusedError(
            f"{path} is refused: original_index_array of {name} is no list of numbers"
        )
    return torch.from_numpy(np.isin(index.numpy(), shown))


def _whole(value):
    """Whether a value is a whole number: of Python, numpy or torch."""
    if torch.is_tensor(value):
        return value.ndim == 0 and not value.is_floating_point() and abs(int(value)) < LARGEST_COUNT
    right = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return right and abs(int(value)) < LARGEST_COUNT


def _require_range(path, name, what, values, below):
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < below:
        raise RefusedError(f"{path} is refused: {name} has {what} outside 0..{below - 1}")


def _shown(value):
    return one_line(repr(value)[:200])[:60]


def same_here(model):
    """The name that a network of BackdoorBench has here.

    Raises RefusedError (exit 4) where there is none, and says what to do.
    """
    for here, there in MODELS.items():
        if there == model:
            return here
    raise RefusedError(
        f"the network {one_line(model)[:60]!r} of BackdoorBench is not built in here: "
        "--model path/to/file.py:function names one of your own with the same weights"
    )


def names_there(model):
    """(what the network `model` is called there, the function that renames its weights)

    Raises ConfigError (exit 2) where BackdoorBench has no such network.
    """
    if model not in MODELS:
        why = DIFFERENT.get(model, "it is not among the networks there")
        raise ConfigError(
            f"{model} cannot be exported to BackdoorBench: {why}; there are {', '.join(MODELS)}"
        )

    def rename(name):
        name = name.removeprefix("vit.") if model == "vit_b_16" else name
        name = (
            name.replace("shortcut.weight", "shortcut.0.weight")
            if model == "preactresnet18"
            else name
        )
        return f"1.{name}" if model == "vit_b_16" else name  # after a resize, 0

    return MODELS[model], rename


def write(folder, name, result):
    """Write a `Result` as record `name` of BackdoorBench into `folder`, which exists and is empty.

    Paths in the file are those that its scripts resolve: ./record/<name>/... Without training
    images its `bd_train` is None, as BackdoorBench has it for attacks that store none.
    """
    content = {
        "model_name": result.model,
        "num_classes": result.classes,
        "model": result.weights,
        "data_path": f"./data/{result.dataset}",
        "img_size": (result.size, result.size, 3),
        "clean_data": result.dataset,
    }
    for part, images, kept in (
        (TRAIN, result.train, np.arange(result.counts[TRAIN])),
        (TEST, result.test, result.test.index.numpy()),
    ):
        if images is None:
            content[part] = None
            continue
        content[part] = _state(f"./record/{name}/{part}_dataset", images, kept, result.counts[part])
        image_folders.write_all(
            images.images,
            [
                folder / f"{part}_dataset" / str(label) / f"{number}.png"
                for number, label in zip(images.index.tolist(), images.truth.tolist(), strict=True)
            ],
        )
    files.write(folder / FILE, checkpoint.to_pt(content))


def _state(place, images, kept, count):
    """The state of a poisoned data set as BackdoorBench restores it."""
    indicator = np.zeros(count)
    indicator[images.index.numpy()] = 1
    rows = zip(images.index.tolist(), images.labels.tolist(), images.truth.tolist(), strict=True)
    return {
        "bd_data_container": {
            "save_folder_path": place,
            "data_dict": {
                number: {"path": f"{place}/{truth}/{number}.png", "other_info": [label, truth]}
                for number, label, truth in rows
            },
            "save_file_format": ".png",
        },
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": kept,
        "poison_indicator": indicator,
        "save_folder_path": place,
    }
