"""Triggers and poisoned splits.

A trigger is a function (images, index) -> images. It takes a batch N,3,S,S, uint8 or float in
[0, 1], on any device, and the images' positions in their split. It returns the same shape, dtype
and device, is deterministic, treats every image by itself, and does not change its argument.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from antidote_bench.utils import seeds
from antidote_bench.utils.data import images as image_files
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.memmap import replaced
from antidote_bench.utils.errors import ConfigError, MissingError
from antidote_bench.utils.evaluation import TestSets

CHUNK = 2**20  # pixels that get a trigger at once: keeps the float copies small
LARGEST_ARRAY = 2**28  # bytes of a .npy pattern


class Cover(NamedTuple):
    """Images of an attack that are changed and keep their true label.

    `make(config, spec)` gives the change, a function like a trigger; `ratio` is their share of the
    training set. They are drawn from the `classes`, a tuple of numbers, or from all.
    """

    make: Callable
    ratio: float
    classes: tuple[int, ...] | None = None


def on_unit(function):
    """Make a trigger from a function (images, index) -> images on float32 in [0, 1].

    The trigger converts its images, rounds to the nearest grey level, and clamps before the cast.
    """

    def trigger(images, index):
        if images.is_floating_point():
            return function(images.float(), index).clamp(0, 1).to(images.dtype)
        changed = function(images.float().div_(255), index)
        return changed.mul_(255).round_().clamp_(0, 255).to(images.dtype)

    return trigger


def adding(pattern):
    """The trigger x' = x + pattern, 3,S,S or what broadcasts to it, in [-1, 1]."""
    return on_unit(lambda images, index: images + pattern.to(images.device))


def relabelling(label_mode, target, classes, source=None):
    """The function truth -> the attacker's labels.

    These are the target for every class (all2one), the next class (all2all), or the target for the
    class `source` and every other class itself (one2one).
    """
    if label_mode == "all2all":
        return lambda truth: (truth + 1) % classes
    if label_mode == "one2one":
        return lambda truth: truth.masked_fill(truth == source, target)
    return lambda truth: torch.full_like(truth, target)


def poisonable(truth, config):
    """A mask of the images that an attack may poison, None where it may poison all.

    A clean-label attack poisons images of the target class, and one of a single source class those
    of that class.
    """
    if config.clean_label:
        return truth == config.attack_target
    return truth == config.source_class if config.label_mode == "one2one" else None


def of_classes(truth, classes):
    """A mask of the images of the `classes`; ConfigError (exit 2) where one of them has none."""
    for number in classes:
        if not (truth == number).any():
            raise ConfigError(
                f"cover_classes must be classes with training images, and {number} has none here: "
                f"the highest class is {int(truth.max())}"
            )
    return torch.isin(truth, torch.tensor(classes, device=truth.device))


def to_poison(truth, config, images=None, prefer=None):
    """Sorted positions of the images that an attack poisons, drawn with config.poison_seed.

    `prefer(images)`, if given, gives a batch N,3,S,S uint8 a number each: those of the lowest
    numbers are poisoned. Without `images`, uint8 of all positions, it is left out.
    """
    among, scores = poisonable(truth, config), None
    if prefer and images is not None:
        scores = _scores(images, prefer, among)
    return choose(truth, config.pratio, config.poison_seed, among=among, scores=scores)


def _scores(images, prefer, among):
    """What `prefer` gives the images that may be poisoned, float64 N; inf for the others."""
    scores = torch.full((len(images),), torch.inf, dtype=torch.float64)
    places = torch.arange(len(images)) if among is None else among.cpu().nonzero().flatten()
    for part in places.split(max(CHUNK // images.shape[-1] ** 2, 1)):
        scores[part] = prefer(images[part]).cpu().double()
    return scores


def choose(truth, ratio, seed, *, among=None, scores=None, purpose="poison"):
    """Sorted positions of round(ratio * N) of N images, drawn uniformly; fewer if there are fewer.

    `among` is a mask of the images that may be drawn, by default all. With `scores`, a number for
    each of the N images, those of the lowest are taken, and only equal ones are drawn. `truth` is
    int64 N; the result lies on its device. Another `purpose` draws other images. ConfigError
    (exit 2) where a ratio above 0 comes to no image.
    """
    candidates = torch.arange(len(truth)) if among is None else among.cpu().nonzero().flatten()
    count = min(round(ratio * len(truth)), len(candidates))
    if ratio > 0 and not count:
        raise ConfigError(_no_image(ratio, len(truth), len(candidates), purpose))
    order = torch.randperm(len(candidates), generator=seeds.generator(purpose, seed))
    if scores is not None:
        order = order[scores.cpu()[candidates[order]].argsort(stable=True)]
    return candidates[order[:count]].sort().values.to(truth.device)


def _no_image(ratio, total, candidates, purpose):
    """Why `choose` finds no image, and what to do."""
    share = {
        "poison": "pratio",
        "cover": "the share of images that are changed and keep their label",
    }
    name = share.get(purpose, f"the share of {purpose}")
    if not candidates:
        return (
            f"{name} must be 0 here, not {ratio:g}: none of the {total} training images may be "
            "chosen for it"
        )
    return (
        f"{name} must be 0 or at least {smallest_share(total)} for {total} training images: "
        f"{ratio:g} of them is less than half an image"
    )


def smallest_share(total):
    """As a decimal number, the smallest share of `total` images that rounds to an image.

    It is just above half an image: half an image rounds to none.
    """
    digits = len(str(2 * total)) + 1
    return f"{(10**digits // (2 * total) + 1) / 10**digits:.{digits}f}"


class Portions:
    """Cuts batches so that a share of all images so far is taken, to within half an image.

    `take(size)` is the number to take of the next batch of `size` images; no random number is
    drawn. With `at_most`, the places that are left in the batch, what does not fit comes later.
    """

    def __init__(self, share):
        self.share, self.seen, self.taken = share, 0, 0

    def take(self, size, at_most=None):
        self.seen += size
        due = round(self.share * self.seen) - self.taken
        count = min(due, size if at_most is None else at_most)
        self.taken += count
        return count


def apply_trigger(images, trigger, index):
    """The images at positions `index` with the trigger, as a new tensor."""
    if not len(index):  # not every trigger takes an empty batch
        return images[:0]
    size = max(CHUNK // (images.shape[-1] * images.shape[-2]), 1)
    return torch.cat([trigger(images[part], part) for part in index.split(size)])


def poison(split, trigger, relabel, index):
    """`split` with the images at `index` triggered, and given the attacker's labels.

    With a `relabel` of None they keep their own labels.
    """
    images = replaced(split.images, index, apply_trigger(split.images, trigger, index))
    labels = split.labels.clone()
    if relabel is not None:
        labels[index] = relabel(split.truth[index])
    return Split(images, labels, split.truth)


def triggered_tests(test, trigger, relabel, config):
    """What is measured of the trigger, as {field of a `Poisoning`: value}.

    In one2one every triggered image of a class that is neither source nor target stands apart,
    with the target for its label: they show whether the trigger works on them too.
    """
    backdoor_index, backdoor = triggered_split(test, trigger, relabel)
    if config.label_mode != "one2one":
        target_index, target = triggered_split(test, trigger, relabel, own=True)
        return {
            "test_sets": TestSets(test, backdoor, target),
            "backdoor_index": backdoor_index,
            "target_index": target_index,
        }
    every_class = relabelling("all2one", config.attack_target, None)
    index, other = triggered_split(test, trigger, every_class)
    place = (other.truth != config.source_class).nonzero().flatten()
    return {
        "test_sets": TestSets(test, backdoor, None, other[place]),
        "backdoor_index": backdoor_index,
        "target_index": index[:0],
        "other_index": index[place],
    }


def triggered_split(split, trigger, relabel, *, own=False):
    """(positions, triggered split) of every image whose label the attacker would change.

    ASR and RA are measured on it. With `own` it holds the other images instead: those that have the
    attacker's label already.
    """
    index = ((relabel(split.truth) == split.truth) == own).nonzero().flatten()
    images = apply_trigger(split.images, trigger, index)
    return index, Split(images, relabel(split.truth[index]), split.truth[index])


def resized_pattern(path, size, *, signed=False, mode="bilinear"):
    """An image or .npy file as float 3,size,size in [0, 1], or in [-1, 1] if `signed`.

    A pattern of another size is resized. An alpha channel lays it over black, which is no change
    for a pattern that is added.
    """
    pattern = read_pattern(path, lowest=-1 if signed else 0)[None]
    if pattern.shape[1] == 4:
        pattern = pattern[:, :3] * pattern[:, 3:].clamp(min=0)
    if pattern.shape[-2:] != (size, size):
        antialias = {"antialias": True} if mode == "bilinear" else {}
        pattern = F.interpolate(pattern, (size, size), mode=mode, **antialias)
    return pattern[0]


def resized_mask(path, size):
    """1,size,size of 0 and 1: 1 where an image or .npy file is not black."""
    return (resized_pattern(path, size, mode="nearest").amax(0, keepdim=True) > 0).float()


def read_pattern(path, *, lowest=0):
    """An image or .npy file as float C,H,W in [lowest, 1]; C is 4 with an alpha channel, else 3.

    Images are read as those of a data set are: upright, and 16 bits keep their range. Arrays are
    H,W or H,W,C or C,H,W: uint8 0..255, or float lowest..1. MissingError (exit 3) where there is no
    such file, ConfigError (exit 2) where it is not a pattern.
    """
    if not Path(path).exists():
        raise MissingError(f"there is no pattern file {path}")
    array = _read_array(path) if _is_array(path) else _read_image(path)
    array = array[..., None].repeat(3, -1) if array.ndim == 2 else array
    if array.ndim == 3 and array.shape[-1] not in (3, 4) and array.shape[0] in (3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] not in (3, 4) or not array.size:
        raise ConfigError(
            f"the pattern {path} has shape {array.shape}: expected H,W or H,W,3 or H,W,4 or 3,H,W"
        )
    unit = torch.from_numpy(array.astype(np.float32)) / (255 if array.dtype == np.uint8 else 1)
    if not (unit.isfinite().all() and unit.min() >= lowest and unit.max() <= 1):
        raise ConfigError(
            f"the pattern {path} holds {array.dtype} values outside {lowest}..1: save it as uint8 "
            f"(0..255) or as float ({lowest}..1)"
        )
    return unit.permute(2, 0, 1).contiguous()


def _is_array(path):
    return Path(path).suffix.lower() == ".npy"


def _read_array(path):
    """The numbers of a .npy file."""
    try:
        # only a file is opened, and only one that is as long as it says
        with image_files.open_regular(path, LARGEST_ARRAY):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.dtype.kind not in "biuf":
            raise ValueError(array.dtype)
    except MissingError as error:
        raise ConfigError(f"this is no pattern: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, OverflowError) as error:
        raise ConfigError(
            f"cannot read the pattern {path}: it must be an image or a .npy array of numbers"
        ) from error
    return np.array(array)


def _read_image(path):
    """The numbers of an image, H,W,3 or H,W,4 with transparency."""
    try:
        image = image_files.open_image(path)
    except MissingError as error:
        raise ConfigError(f"this is no pattern: {error}") from error
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
