"""Finds the image files of a data set, lists and decodes them; imports no torch."""

import concurrent.futures
import csv
import hashlib
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.errors import ConfigError, MissingError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
SIDES = {"digits": 32, "cifar10": 32, "cifar100": 32, "gtsrb": 32, "tiny": 64}
NAMES = [*SIDES, "folder"]
CHUNK = 500  # images per task of the decoding pool


@dataclass(frozen=True)
class Source:
    """One split before it is decoded.

    `fingerprint` changes when any file does. `read()` gives (images, labels): images are a list of
    paths or one uint8 array N,H,W,3; labels are int64 N.
    """

    fingerprint: str
    read: Callable


def check(name):
    """ConfigError where there is no data set of that name."""
    if name not in NAMES:
        raise ConfigError(f"unknown data set {name!r}; there are {', '.join(NAMES)}")


def find(name, root, *, download=False):
    """{'train': Source, 'test': Source} of data set `name` below `root`.

    Raises MissingError (exit 3), which says where it was looked for.
    """
    check(name)
    if name == "digits":
        return {
            split: Source("scikit-learn digits, 32 pixels, 1", partial(_digits, split))
            for split in ("train", "test")
        }
    place = Path(root) if name == "folder" else Path(root) / name
    if (place / "train").is_dir():
        return _folders(place)
    native = _native(name, place)
    if not native and download and name != "folder":
        _download(name, place)
        native = _native(name, place)
    if not native:
        raise MissingError(_where(name, place))
    return native


def decode(images, side):
    """Yield (start, uint8 array n,3,side,side) until every image was decoded, on all cores.

    `images` are paths or an array N,H,W,3. Images of another size are resized to side x side
    (bilinear, antialiased). MissingError (exit 3) names an image that cannot be read.
    """
    chunks = [(start, images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]
    with tqdm(total=len(images), desc="decoding", unit=" images", disable=None) as bar:
        for start, decoded in _map(partial(_decode_chunk, side), chunks):
            bar.update(len(decoded))
            yield start, decoded


def _map(function, chunks):
    workers = min(os.cpu_count() or 1, len(chunks))
    if workers < 2:
        yield from map(function, chunks)
        return
    # fork: the workers need not import torch again; they use neither torch nor the GPU
    start = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context(start)
    ) as pool:
        try:
            # no list of the tasks is kept: it would hold every image until the last is decoded
            for task in concurrent.futures.as_completed(
                [pool.submit(function, chunk) for chunk in chunks]
            ):
                yield task.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _decode_chunk(side, chunk):
    start, sources = chunk
    images = np.stack([_decode_one(source, side) for source in sources])
    return start, np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _decode_one(source, side):
    """A path or an array H,W,3 as uint8 side,side,3."""
    try:
        image = Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source)
        image = image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise MissingError(f"the image {source} is too large to decode") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise MissingError(f"the image {source} is damaged or empty: mend or delete it") from error
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _folders(place):
    """train/<class>/* and test/ or val/<class>/*; classes are the sorted folder names of train/."""
    test = next((place / name for name in ("test", "val") if (place / name).is_dir()), None)
    if test is None:
        raise MissingError(
            f"{place} has train/ but neither test/ nor val/: put the test images there, a folder "
            "per class"
        )
    classes = sorted(entry.name for entry in os.scandir(place / "train") if entry.is_dir())
    if len(classes) < 2:
        raise MissingError(
            f"{place / 'train'} needs at least two class folders; it has {len(classes)}"
        )
    if (place / "val" / "val_annotations.txt").is_file():  # Tiny-ImageNet as it is published
        rows = [
            line.split("\t")[:2]
            for line in (place / "val" / "val_annotations.txt").read_text().splitlines()
        ]
        pairs = [(place / "val" / "images" / name, classes.index(label)) for name, label in rows]
        return {"train": _listed(_scan(place / "train", classes)), "test": _listed(pairs)}
    extra = sorted({entry.name for entry in os.scandir(test) if entry.is_dir()} - set(classes))
    if extra:
        raise MissingError(f"{test} has a class that {place / 'train'} lacks: {extra[0]}")
    return {
        "train": _listed(_scan(place / "train", classes)),
        "test": _listed(_scan(test, classes)),
    }


def _scan(folder, classes):
    """(path, label) of every image below folder/<class>, sorted."""
    pairs = []
    for label, name in enumerate(classes):
        for directory, _, files in os.walk(folder / name):
            chosen = (file for file in files if os.path.splitext(file)[1].lower() in EXTENSIONS)
            pairs += [(os.path.join(directory, file), label) for file in chosen]
    if not pairs:
        raise MissingError(f"no images below {folder}: expected {folder}/<class>/*.png, .jpg ...")
    return sorted(pairs)


def _listed(pairs):
    """A Source of (path, label) pairs; its fingerprint covers paths, labels, sizes and dates."""
    mark = hashlib.sha256()
    for path, label in pairs:
        try:
            status = os.stat(path)
        except OSError as error:
            raise MissingError(f"the image {path} is missing") from error
        mark.update(f"{path}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    paths, labels = (
        [str(path) for path, _ in pairs],
        np.array([label for _, label in pairs], np.int64),
    )
    return Source(mark.hexdigest(), lambda: (paths, labels))


def _native(name, place):
    """The splits in the layout that torchvision downloads (Tiny-ImageNet: in that of its archive).

    None where there is no such layout.
    """
    if name in {"cifar10", "cifar100"}:
        folder = place / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
        if folder.is_dir():
            mark = "".join(
                f"{file.name}{file.stat().st_size}{file.stat().st_mtime_ns}"
                for file in sorted(folder.iterdir())
            )
            return {
                split: Source(mark, partial(_cifar, name, place, split))
                for split in ("train", "test")
            }
    if name == "gtsrb" and (place / "gtsrb" / "GT-final_test.csv").is_file():
        return _gtsrb(place / "gtsrb")
    if name == "tiny" and (place / "tiny-imagenet-200" / "train").is_dir():
        return _folders(place / "tiny-imagenet-200")
    return None


def _cifar(name, place, split):
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        # checks the archive's own checksums before it reads
        found = kind(place, train=split == "train")
    except RuntimeError as error:
        raise MissingError(
            f"{name} in {place} is damaged: delete it and run again with --download true"
        ) from error
    return found.data, np.array(found.targets, np.int64)


def _gtsrb(place):
    """The full official training set where there is one; torchvision's "train" has fewer images."""
    images = place / "GTSRB"
    train = next(
        (p for p in (images / "Final_Training" / "Images", images / "Training") if p.is_dir()), None
    )
    if train is None:
        raise MissingError(
            f"{images} has neither Final_Training/Images/ nor Training/: run with --download true"
        )
    classes = sorted(entry.name for entry in os.scandir(train) if entry.is_dir())
    with open(place / "GT-final_test.csv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    test = [
        (images / "Final_Test" / "Images" / row["Filename"], int(row["ClassId"])) for row in rows
    ]
    return {"train": _listed(_scan(train, classes)), "test": _listed(test)}


def _digits(split):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey levels 0..16, enlarged to 32x32 RGB.

    They are divided into 1,297 training and 500 test images, stratified.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    grey = np.round(found.images * (255 / 16)).astype(np.uint8)
    large = [
        np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
        for image in grey
    ]
    images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
    index = np.arange(len(images))
    train, test = train_test_split(index, test_size=500, stratify=found.target, random_state=0)
    index = np.sort(train if split == "train" else test)
    return images[index], found.target[index].astype(np.int64)


def _download(name, place):
    from torchvision import datasets
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        if name == "tiny":
            url, md5 = (
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                "90528d7ca1a48142e341f4ef8d21d0de",
            )
            download_and_extract_archive(url, place, md5=md5)
        elif name == "gtsrb":
            for split in ("train", "test"):
                datasets.GTSRB(place, split=split, download=True)
        else:
            {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](place, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise MissingError(
            f"could not download {name} to {place}: {error}; {_where(name, place)}"
        ) from error


def _where(name, place):
    if name == "folder":
        return (
            f"no images at {place}: --dataset_path names a folder with train/<class>/* and "
            "test/<class>/* or val/<class>/*"
        )
    return (
        f"data set {name} is not at {place}: put image folders there, {place}/train/<class>/* and "
        f"{place}/test/<class>/*, or let torchvision fetch it with --download true"
    )
