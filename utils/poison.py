"""Triggers and poisoned splits.

A trigger is a function (images, index) -> images. It takes a batch N,3,S,S, uint8 or float in [0, 1], on any device,
and the images' positions in their split; it returns the same shape, dtype and device, is deterministic, treats every
image by itself and leaves its argument alone.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from utils import seeds
from utils.data import Split
from utils.errors import ConfigError, MissingError
from utils.stored import replaced

POISON, COVER = 1, 2  # kinds in a record: poisoned; triggered or disturbed, but with its true label
CHUNK = 2**20  # pixels stamped at once: keeps the float copies small


def on_unit(function):
    """Make a trigger from a function on float32 in [0, 1]: converts, clamps before the cast, rounds to nearest."""

    def trigger(images, index):
        if images.is_floating_point():
            return function(images.float(), index).clamp(0, 1).to(images.dtype)
        changed = function(images.float().div_(255), index)
        return changed.mul_(255).round_().clamp_(0, 255).to(images.dtype)

    return trigger


def adding(pattern):
    """The trigger x' = x + pattern, 3,S,S or what broadcasts to it, in [-1, 1]."""
    return on_unit(lambda images, index: images + pattern.to(images.device))


def relabelling(label_mode, target, classes):
    """truth -> the attacker's labels: the target for every class (all2one), or the next class (all2all)."""
    if label_mode == "all2all":
        return lambda truth: (truth + 1) % classes
    return lambda truth: torch.full_like(truth, target)


def choose(truth, ratio, seed, *, among=None, purpose="poison"):
    """Sorted positions of round(ratio * N) of N images, uniform over those where the mask `among` holds (all of them).

    Cut to what `among` offers. `truth` is int64 N; the result lies on its device. Other purposes draw other images.
    """
    candidates = torch.arange(len(truth)) if among is None else among.cpu().nonzero().flatten()
    count = min(round(ratio * len(truth)), len(candidates))
    order = torch.randperm(len(candidates), generator=seeds.generator(purpose, seed))
    return candidates[order[:count]].sort().values.to(truth.device)


def stamp(images, trigger, index):
    """The images at positions `index`, triggered, as a new tensor."""
    if not len(index):  # not every trigger takes an empty batch
        return images[:0]
    size = max(CHUNK // (images.shape[-1] * images.shape[-2]), 1)
    return torch.cat([trigger(images[part], part) for part in index.split(size)])


def poison(split, trigger, relabel, index):
    """`split` with the images at `index` triggered and given the attacker's labels (`relabel` of None: their own)."""
    images, labels = replaced(split.images, index, stamp(split.images, trigger, index)), split.labels.clone()
    if relabel is not None:
        labels[index] = relabel(split.truth[index])
    return Split(images, labels, split.truth)


def backdoored(split, trigger, relabel, *, own=False):
    """(positions, triggered split) of every image whose label the attacker would change: what ASR and RA are read from.

    With `own`, of the others: those that have the attacker's label already.
    """
    index = ((relabel(split.truth) == split.truth) == own).nonzero().flatten()
    images = stamp(split.images, trigger, index)
    return index, Split(images, relabel(split.truth[index]), split.truth[index])


def fitted(path, size, *, signed=False, mode="bilinear"):
    """A picture or .npy file as float 3,size,size in [0, 1] ([-1, 1] if `signed`), resized where it has another size."""
    found = pattern(path, lowest=-1 if signed else 0)[None, :3]
    if found.shape[-2:] == (size, size):
        return found[0]
    return F.interpolate(found, (size, size), mode=mode, **({"antialias": True} if mode == "bilinear" else {}))[0]


def pattern(path, *, lowest=0):
    """A picture or .npy file as float C,H,W in [lowest, 1]; C is 3, or 4 where it has an alpha channel.

    Arrays are H,W or H,W,C or C,H,W: uint8 0..255, or float lowest..1. MissingError (exit 3) where there is no such file,
    ConfigError (exit 2) where it is not a pattern.
    """
    if not Path(path).is_file():
        raise MissingError(f"there is no pattern file {path}")
    try:
        if str(path).endswith(".npy"):
            array = np.load(path, allow_pickle=False)
        else:
            picture = Image.open(path)
            array = np.asarray(picture.convert("RGBA" if "A" in picture.getbands() or "transparency" in picture.info else "RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"cannot read the pattern {path}: it must be a picture or a .npy array of numbers") from error
    array = array[..., None].repeat(3, -1) if array.ndim == 2 else array
    if array.ndim == 3 and array.shape[-1] not in (3, 4) and array.shape[0] in (3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] not in (3, 4):
        raise ConfigError(f"the pattern {path} has shape {array.shape}: expected H,W or H,W,3 or H,W,4 or 3,H,W")
    unit = torch.from_numpy(array.astype(np.float32)) / (255 if array.dtype == np.uint8 else 1)
    if not (unit.isfinite().all() and unit.min() >= lowest and unit.max() <= 1):
        raise ConfigError(f"the pattern {path} holds values outside 0..255 (uint8) or {lowest}..1 (float)")
    return unit.permute(2, 0, 1).contiguous()
