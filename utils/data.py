"""Data sets as whole uint8 tensors: decoded once, cached as memory-mapped files, resident on the device."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils import files, seeds, sources
from utils.device import free_memory
from utils.errors import ConfigError, MissingError
from utils.stored import Stored

# mean and std of the training set in [0, 1] pixels and whether a mirrored picture keeps its class, as the field uses
# them; sets that are not here are measured
KNOWN = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261), True),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), False),
    "gtsrb": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), False),
    "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262), False),
}


@dataclass(frozen=True)
class Spec:
    """What the other modules need to know about a data set.

    `mean` and `std` are per channel, of pixels in [0, 1]; `size` is the side in pixels; `flip` says whether a
    mirrored picture keeps its class; `fingerprint` maps train and test to a digest of pixels and labels.
    """

    name: str
    classes: int
    size: int
    mean: tuple
    std: tuple
    flip: bool
    fingerprint: dict


@dataclass(frozen=True)
class Split:
    """N pictures (images N,3,S,S uint8), the `labels` a model is told and the `truth` the pictures show (int64 N).

    `split[index]` has the pictures at `index` in memory; `split.view(index)` leaves stored ones where they are.
    """

    images: torch.Tensor | Stored
    labels: torch.Tensor
    truth: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Split(self.images[index], self.labels[index], self.truth[index])

    def view(self, index):
        images = self.images.view(index) if isinstance(self.images, Stored) else self.images[index]
        return Split(images, self.labels[index], self.truth[index])


def side_of(name, image_size):
    """Side in pixels of a data set's pictures."""
    side = image_size or sources.SIDES.get(name)
    if name == "folder" and not side:
        raise ConfigError("--dataset folder needs --image_size: the side in pixels that its pictures are resized to")
    return side


def load(name, root, *, image_size=None, device="cpu", cache="data/cache", download=False, resident_gb=None, copies=1):
    """(Spec, training Split, test Split) of a data set, its pictures on `device`, or `Stored` where they take more than
    `resident_gb` (by default a third of what is free there, shared by `copies` processes).

    Raises MissingError (exit 3) where the set is not below `root` or a picture is damaged.
    """
    side = side_of(name, image_size)
    found = sources.find(name, root, download=download)
    mark = hashlib.sha256(f"{side}|{found['train'].fingerprint}|{found['test'].fingerprint}".encode()).hexdigest()
    folder = Path(cache) / f"{name}-{side}-{mark[:12]}"
    if not (folder / "meta.json").is_file():
        _decode(found, side, folder)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        mean, std, flip = KNOWN.get(name, (meta["mean"], meta["std"], False))
        spec = Spec(name, meta["classes"], side, tuple(mean), tuple(std), flip, meta["fingerprint"])
        budget = free_memory(device) / 3 / copies if resident_gb is None else resident_gb * 1e9
        stored = sum((folder / f"{split}.npy").stat().st_size for split in ("train", "test")) > budget
        return spec, *(_mapped(folder, split, device, stored) for split in ("train", "test"))
    except (OSError, ValueError, KeyError) as error:
        raise MissingError(f"the cache {folder} is damaged: delete that folder and run again") from error


def balanced_subset(labels, count, seed):
    """Sorted positions of `count` images, class counts as equal as the set allows and at least one of every class.

    Where the total does not divide evenly, the classes that give one more are drawn with `seed`.
    """
    generator, labels = seeds.generator("balanced subset", seed), labels.cpu()
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    members = [part[torch.randperm(len(part), generator=generator)] for part in members]
    # dealt like cards: in each round every class that still has an image gives one, in an order drawn once
    seats = torch.randperm(len(members), generator=generator).tolist()
    turns = [torch.arange(len(part)) * len(members) + seat for part, seat in zip(members, seats, strict=True)]
    total = min(max(count, len(members)), len(labels))
    return torch.cat(members)[torch.cat(turns).argsort()[:total]].sort().values


def _mapped(folder, split, device, stored):
    # copy-on-write: tensors want writable memory, and nothing written may reach the file
    images = torch.from_numpy(np.load(folder / f"{split}.npy", mmap_mode="c"))
    images = Stored(images, device) if stored else images.to(device)
    labels = torch.from_numpy(np.load(folder / f"{split}_labels.npy")).to(device)
    return Split(images, labels, labels)


def _decode(found, side, folder):
    """Write the cache: a folder that gets its name only when it is complete."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        meta = {"fingerprint": {}}
        for split in ("train", "test"):
            pictures, labels = found[split].read()
            images = _store(unfinished / f"{split}.npy", pictures, side)
            np.save(unfinished / f"{split}_labels.npy", labels)
            content = hashlib.sha256(images)
            content.update(labels)
            meta["fingerprint"][split] = content.hexdigest()
            if split == "train":
                meta |= {"classes": int(labels.max()) + 1} | _statistics(images)
        files.write_json(unfinished / "meta.json", meta)
        if not folder.is_dir():  # another run may have been quicker
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _store(path, pictures, side):
    """Decode into a .npy file whose space is reserved first: a full disk must be an error here, not a crash later."""
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (len(pictures), 3, side, side))
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                error.filename = str(path)
                raise
    for start, part in sources.decode(pictures, side):
        images[start : start + len(part)] = part
    images.flush()
    return images


def _statistics(images):
    """Per-channel mean and standard deviation of uint8 images N,3,H,W, in [0, 1] pixels."""
    levels = np.arange(256) / 255
    counts = np.zeros((3, 256))
    for part in np.array_split(images, max(len(images) // 1000, 1)):  # a whole set, counted at once, takes eight times its size
        counts += [np.bincount(part[:, channel].ravel(), minlength=256) for channel in range(3)]
    counts /= images[:, 0].size
    mean = [float(share @ levels) for share in counts]
    std = [max(float(share @ (levels - centre) ** 2) ** 0.5, 1e-3) for share, centre in zip(counts, mean, strict=True)]
    return {"mean": mean, "std": std}
