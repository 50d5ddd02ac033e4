"""Options of audit.py. Imports no torch."""

import math
from dataclasses import dataclass
from pathlib import Path

from antidote_bench.utils import config
from antidote_bench.utils.audit import calibration as known
from antidote_bench.utils.errors import ConfigError, MissingError

# model detectors by their cost; those of the second group need images of the task, and those of the
# third as well and take hours on a small machine, so that they run only where they are named
DATA_FREE = ("headstat", "headprobe", "mm_bd")
WITH_IMAGES = ("trodo", "ban", "btidbf", "nc")
SLOW = ("pixel", "umd", "featurere")
ALL = (*DATA_FREE, *WITH_IMAGES, *SLOW)
# options of detectors that differ from their defaults, so that an audit takes minutes on a CPU
SETTINGS = {"mm_bd": {"starts": 5, "steps": 50, "step_size": 0.05}}
SHIPPED = config.ROOT / "config" / "audit"  # calibration files of this project
MOST_CLASSES = 50_000
SIZES = 8, 1024  # side of an image in pixels


@dataclass(frozen=True)
class Subject:
    """What the user says about the models to audit; None where it is left to a record.

    `model` is the architecture, `mean` and `std` three numbers with commas, and `dataset` the name
    of the data set that the models were trained on.
    """

    model: str | None = None
    width: int | None = None
    num_classes: int | None = None
    image_size: int | None = None
    mean: str | None = None
    std: str | None = None
    dataset: str | None = None
    dataset_path: str | None = None
    cache_path: str = "data/cache"
    record_path: str = "record"
    device: str = "auto"
    precision: str = "fp32"


@dataclass(frozen=True)
class Plan:
    """How to audit. `budget` are minutes, after which no further detector is started."""

    detectors: tuple
    alpha: float = 0.05
    budget: float | None = None


def check(subject, plan):
    """ConfigError (exit 2) where an option is out of range."""
    config.require(0 < plan.alpha < 1, "alpha", "above 0 and below 1")
    right = plan.budget is None or plan.budget >= 0 and math.isfinite(plan.budget)
    config.require(right, "budget", "0 minutes or more")
    classes, size = subject.num_classes, subject.image_size
    what = f"from 2 to {MOST_CLASSES}"
    config.require(classes is None or 2 <= classes <= MOST_CLASSES, "num_classes", what)
    low, high = SIZES
    config.require(size is None or low <= size <= high, "image_size", f"from {low} to {high}")


def chosen(names, has_images):
    """The detectors that the option --detectors means, in order of their costs.

    None: those that need no images, and with images the usual ones as well.
    """
    if names is None:
        return (*DATA_FREE, *(WITH_IMAGES if has_images else ()))
    asked = ALL if names == "all" else tuple(filter(None, names.split(",")))
    if unknown := [name for name in asked if name not in ALL]:
        raise ConfigError(
            f"there is no detector of models {unknown[0][:60]!r} here; there are {', '.join(ALL)}, "
            "or all"
        )
    if not has_images and (blind := [name for name in asked if name not in DATA_FREE]):
        if names != "all":
            raise ConfigError(f"{blind[0]} needs images of the task: --images names a folder")
        asked = DATA_FREE
    if not asked:
        raise ConfigError("detectors must name at least one detector")
    return tuple(name for name in ALL if name in asked)


def calibration_for(path, group, images=""):
    """(the `Calibration` to use or None, why there is none, how its models are comparable).

    `path` is the file that the user names, or None for those of this project. `group` is that of
    the model; its `data` and `recipe` may be unknown. `images` is the digest of the user's images,
    and of this project's files one that was made with them is preferred. Raises ConfigError
    (exit 2) where the named file is of models that cannot be compared.
    """
    if path is not None:
        found = known.read(path)
        if why := _difference(found.group, group):
            raise ConfigError(f"the models of {path} cannot be compared with this one: {why}")
        return found, "", comparable(found.group, group)
    fitting = [
        found
        for found in map(known.read, sorted(SHIPPED.glob("*.json")))
        if not _difference(found.group, group) and group.dataset == found.group.dataset
    ]
    if fitting:
        found = max(fitting, key=lambda found: bool(images) and found.saw(images))
        return found, "", comparable(found.group, group)
    if not group.dataset:
        return None, "name the data set that the model was trained on with --dataset", ""
    return None, "audit.py --calibrate makes them of benign models of your own", ""


def _difference(there, here):
    """Why models of two groups cannot be compared, or ""."""
    for name in ("architecture", "classes", "size", "dataset", "data", "recipe"):
        own, other = getattr(here, name), getattr(there, name)
        if own != other and own and other:
            shown = "their data set has other images" if name == "data" else ""
            return shown or f"their {name} is {str(other)[:100]}, and here it is {str(own)[:100]}"
    return ""


def comparable(there, here):
    """matched where data and recipe are known to be the same, otherwise assumed."""
    same = here.data and here.data == there.data and here.recipe and here.recipe == there.recipe
    return "matched" if same else "assumed"


def models_in(folder):
    """The records and files of weights in a folder of models, sorted."""
    place = Path(folder)
    if not place.is_dir():
        raise MissingError(f"there is no folder {str(folder)[:200]}")
    found = [
        path
        for path in sorted(place.iterdir())
        if not path.name.startswith(".")
        and (path.is_dir() or path.suffix.lower() in (".safetensors", ".pt", ".pth"))
    ]
    if not found:
        raise MissingError(f"{folder} holds no record and no file of weights")
    return found
