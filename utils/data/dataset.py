"""Data sets as uint8 tensors: decoded once, cached in memory-mapped files, kept on the device."""

import hashlib
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from antidote_bench.utils import distributed, files, seeds
from antidote_bench.utils.data import facts, sources
from antidote_bench.utils.data import images as image_files
from antidote_bench.utils.data.memmap import MemmapImages
from antidote_bench.utils.device import free_memory
from antidote_bench.utils.errors import ConfigError, MissingError

# mean and std of the training set, pixels in [0, 1], and whether a mirrored image keeps its class,
# as the field uses them; for sets that are not here mean and std are measured
KNOWN = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261), True),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), False),
    "gtsrb": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), False),
    "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262), False),
    "mnist": ((0.1307,) * 3, (0.3081,) * 3, False),
    "fashionmnist": ((0.286,) * 3, (0.353,) * 3, False),
    "imagenette": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True),  # those of ImageNet
    "celeba": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), False),
}
CACHED = ("train.npy", "train_labels.npy", "test.npy", "test_labels.npy")
ALWAYS_CHECKED = 10**9  # bytes of a cache whose content is checked at every start


@dataclass(frozen=True)
class Spec:
    """What the other modules need to know about a data set.

    `mean` and `std` are per channel, of pixels in [0, 1]. `size` is the side in pixels. `flip` says
    whether a mirrored image keeps its class. `fingerprint` maps train and test to a digest of
    pixels and labels. `class_names` are the names of the classes, in the order of their labels.
    `listing` is a digest of the image files, by which two sets are told apart before any is
    decoded.
    """

    name: str
    classes: int
    size: int
    mean: tuple
    std: tuple
    flip: bool
    fingerprint: dict
    class_names: tuple = ()
    listing: str = ""


@dataclass(frozen=True)
class Split:
    """N images, uint8 N,3,S,S, with the `labels` to train on and the true classes `truth`, int64 N.

    `split[index]` has the images at `index` in memory. `split.view(index)` leaves memory-mapped
    images in their file.
    """

    images: torch.Tensor | MemmapImages
    labels: torch.Tensor
    truth: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Split(self.images[index], self.labels[index], self.truth[index])

    def view(self, index):
        mapped = isinstance(self.images, MemmapImages)
        images = self.images.view(index) if mapped else self.images[index]
        return Split(images, self.labels[index], self.truth[index])


class Dataset(NamedTuple):
    """A data set: its description, its training images and its test images."""

    spec: Spec
    train: Split
    test: Split


def side_of(name, image_size):
    """Side in pixels of a data set's images."""
    side = image_size or sources.SIDES.get(name)
    if name == "folder" and not side:
        raise ConfigError(
            "--dataset folder needs --image_size: the side in pixels that its images are resized to"
        )
    return side


def load(config, device, workers=distributed.SINGLE, victim=None, check_count=None):
    """The `Dataset` that the options of a script name, its images on `device`.

    For a defense, `victim` are the options of the attack, which name the data set. Several
    `workers` on one machine share its memory. `check_count` and errors are those of `open_dataset`.
    """
    named = victim or vars(config)
    return open_dataset(
        named["dataset"],
        config.dataset_path or named["dataset_path"],
        image_size=named["image_size"],
        device=device,
        cache=config.cache_path,
        download=config.download,
        resident_gb=config.resident_gb,
        mirror=named.get("mirror"),
        copies=1 if torch.device(device).type == "cuda" else workers.local_size,
        check_count=check_count,
    )


def open_dataset(
    name,
    root,
    *,
    image_size=None,
    device="cpu",
    cache="data/cache",
    download=False,
    resident_gb=None,
    mirror=None,
    copies=1,
    check_count=None,
):
    """A `Dataset`, its images on `device`.

    They are `MemmapImages` where they take more than `resident_gb`, by default a third of what is
    free there, shared by `copies` processes. `mirror` says whether a mirrored image keeps its
    class; by default it is as in KNOWN. Before anything is decoded, check_count(split, number of
    images) may raise. Raises MissingError (exit 3) where the set is not below `root` or an image is
    damaged.
    """
    side = side_of(name, image_size)
    found = sources.find(name, root, download=download)
    folder = facts.cache_folder(name, side, found, cache)
    if not (folder / "meta.json").is_file():
        _decode(found, side, folder, check_count)
    try:
        meta = facts.read_meta(folder)
        _check_content(folder, side, meta)
        mean, std, flip = KNOWN.get(name, (meta["mean"], meta["std"], False))
        flip = flip if mirror is None else mirror
        spec = Spec(
            name,
            meta["classes"],
            side,
            tuple(mean),
            tuple(std),
            flip,
            meta["fingerprint"],
            found["train"].classes,
            facts.listing_of(found),
        )
        budget = free_memory(device) / 3 / copies if resident_gb is None else resident_gb * 1e9
        size = sum((folder / f"{split}.npy").stat().st_size for split in ("train", "test"))
        train, test = (
            _open_split(folder, split, side, device, mapped=size > budget)
            for split in ("train", "test")
        )
        return Dataset(spec, train, test)
    except (MissingError, OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise MissingError(
            f"the cache {folder} is damaged: delete that folder and run again"
        ) from error


def balanced_subset(labels, count, seed):
    """Sorted positions of `count` images, with class counts as equal as the set allows.

    There is at least one image of every class. Where the total does not divide evenly, the classes
    that give one more are drawn with `seed`.
    """
    turns, positions = _turns(labels, seed)
    total = min(max(count, len(labels.unique())), len(labels))
    return positions[turns.argsort()[:total]].sort().values


def class_subset(labels, each, seed):
    """Sorted positions of `each` images of every class, and of all where a class has fewer.

    The first ones are those of `balanced_subset`.
    """
    turns, positions = _turns(labels, seed)
    return positions[turns < each * len(labels.unique())].sort().values


def _turns(labels, seed):
    """(turns N, positions N): the images in the order in which the classes give them.

    In every round each class that still has an image gives one; the order of the classes is drawn.
    """
    generator, labels = seeds.generator("balanced subset", seed), labels.cpu()
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    members = [part[torch.randperm(len(part), generator=generator)] for part in members]
    places = torch.randperm(len(members), generator=generator).tolist()
    turns = [
        torch.arange(len(part)) * len(members) + place
        for part, place in zip(members, places, strict=True)
    ]
    return torch.cat(turns), torch.cat(members)


def _open_split(folder, split, side, device, *, mapped):
    images, labels = map(torch.from_numpy, _arrays(folder, split, side))
    images = MemmapImages(images, device) if mapped else images.to(device)
    labels = labels.clone().to(device)
    return Split(images, labels, labels)


def _arrays(folder, split, side):
    """(images, labels) of a cache, memory-mapped; ValueError where they have another form."""
    # copy-on-write: tensors want writable memory, and nothing written may reach the file
    images, labels = (
        np.lib.format.open_memmap(folder / f"{split}{part}.npy", "c") for part in ("", "_labels")
    )
    form = images.shape, images.dtype, images.flags.c_contiguous, labels.shape, labels.dtype
    if form != ((len(labels), 3, side, side), np.uint8, True, (len(labels),), np.int64):
        raise ValueError(f"{split} has another shape or type")
    return images, labels


def _check_content(folder, side, meta):
    """ValueError where the files of a cache are not those that it was made of.

    Sizes are always compared. The content of a cache that is too large to be read at every start is
    compared only where a file is newer than meta.json, which is written last.
    """
    states = {name: os.stat(folder / name) for name in CACHED}
    for name, state in states.items():
        image_files.require_regular(folder / name, state, meta["sizes"][name])
        if state.st_size < meta["sizes"][name]:
            raise ValueError(f"{name} is too short")
    date = os.stat(folder / "meta.json").st_mtime_ns
    newer = any(state.st_mtime_ns > date for state in states.values())
    if sum(meta["sizes"].values()) > ALWAYS_CHECKED and not newer:
        return
    for split in ("train", "test"):
        if _fingerprint(*_arrays(folder, split, side)) != meta["fingerprint"][split]:
            raise ValueError(f"{split} has other images or labels")
    if newer:  # a copied cache: it need not be read again
        with suppress(OSError):
            os.utime(folder / "meta.json")


def _fingerprint(images, labels):
    content = hashlib.sha256(images)
    content.update(labels)
    return content.hexdigest()


def _decode(splits, side, folder, check_count=None):
    """Write the cache: a folder that gets its name only when it is complete."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        meta = {"fingerprint": {}, "classes": len(splits["train"].classes)}
        for split in ("train", "test"):
            source_images, labels = splits[split].read()
            if check_count:
                check_count(split, len(labels))
            images = _store(unfinished / f"{split}.npy", source_images, side)
            np.save(unfinished / f"{split}_labels.npy", labels)
            meta["fingerprint"][split] = _fingerprint(images, labels)
            if split == "train":
                meta |= _statistics(images)
        meta["sizes"] = {name: (unfinished / name).stat().st_size for name in CACHED}
        files.write_json(unfinished / "meta.json", meta | {"sha256": facts.mark_of(meta)})
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was quicker
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _store(path, source_images, side):
    """Decode into a .npy file, whose space is reserved first.

    A full disk must be an error here: writing to a memory-mapped file would crash the process.
    """
    shape = len(source_images), 3, side, side
    images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                error.filename = str(path)
                raise
    for start, part in sources.decode(source_images, side):
        images[start : start + len(part)] = part
    images.flush()
    return images


def _statistics(images):
    """Per-channel mean and standard deviation of uint8 images N,3,H,W, in [0, 1] pixels."""
    levels = np.arange(256) / 255
    counts = np.zeros((3, 256))
    # in parts: a whole set, counted at once, takes eight times its size
    for part in np.array_split(images, max(len(images) // 1000, 1)):
        counts += [np.bincount(part[:, channel].ravel(), minlength=256) for channel in range(3)]
    counts /= images[:, 0].size
    mean = [float(share @ levels) for share in counts]
    std = [
        max(float(share @ (levels - centre) ** 2) ** 0.5, 1e-3)
        for share, centre in zip(counts, mean, strict=True)
    ]
    return {"mean": mean, "std": std}
