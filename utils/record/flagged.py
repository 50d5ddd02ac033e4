"""The training images that a detector has flagged, for a defense to leave out."""

from pathlib import Path
from typing import NamedTuple

import torch

from antidote_bench.utils import checkpoint
from antidote_bench.utils.data.clean import Held
from antidote_bench.utils.errors import MissingError, RefusedError
from antidote_bench.utils.record import folder as layout


class Flagged(NamedTuple):
    """What the detection in a folder has flagged."""

    mask: torch.Tensor  # bool N, on the CPU
    sha256: str  # of its scores
    path: Path


def read(config, info, count):
    """The `Flagged` of `count` training images that config.flagged names, None where it names none.

    `info` is what record.json says about the victim. Raises MissingError (exit 3) where there is no
    such detection, and RefusedError (exit 4) where it is of another victim, or not of training
    images.
    """
    if config.flagged is None:
        return None
    path = find(config.flagged, config)
    found = layout.verify(path, "detection")
    if found.get("victim_sha256") != info["files"][layout.WEIGHTS]:
        raise RefusedError(f"{path} judged another victim than the one of {config.record}")
    name = layout.SCORES
    saved = checkpoint.from_bytes(layout.read_checked(path, name, found), path / name)
    mask = saved.get("flagged")
    is_mask = mask is not None and mask.dtype == torch.bool and mask.shape == (count,)
    if not is_mask or "kind" in saved:
        raise RefusedError(f"{path} did not judge the {count} training images of {config.record}")
    return Flagged(mask, found["files"][name], path)


def find(name, config):
    """The folder of a detection: in the record, a path, or a path below config.record_path."""
    places = [config.record / layout.DETECTIONS / name, Path(name), Path(config.record_path) / name]
    for place in places:
        if (place / layout.RECORD).is_file():
            return place
    raise MissingError(
        f"there is no finished detection {name!r}: looked at {', '.join(map(str, places))}; a "
        "script of detection/ makes one"
    )


def leave_out(train, held, flagged):
    """(the training set without what was flagged, the clean images with their positions in it).

    Images that the defender knows to be clean stay.
    """
    keep = ~flagged.mask
    keep[held.index.cpu()] = True
    index = keep.nonzero().flatten()
    device = train.labels.device
    position = torch.full((len(keep),), -1)
    position[index] = torch.arange(len(index))
    moved = Held(held.split, position[held.index.cpu()].to(device), held.mark)
    return train.view(index.to(device)), moved
