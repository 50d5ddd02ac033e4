"""MNIST and FashionMNIST: four IDX files, each packed by gzip or not."""

import gzip
import hashlib
import os
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from antidote_bench.utils.data import images as image_files
from antidote_bench.utils.data import listing
from antidote_bench.utils.data.images import shown
from antidote_bench.utils.data.listing import Source
from antidote_bench.utils.errors import MissingError

LARGEST_IDX = 1 << 28  # bytes of an IDX file's content
DIGITS = tuple("0123456789")
FASHIONMNIST = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CLASS_NAMES = {"mnist": DIGITS, "fashionmnist": FASHIONMNIST}
FOLDERS = {"mnist": "MNIST", "fashionmnist": "FashionMNIST"}
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
SHAPE = (28, 28)


def find(name, place, root):
    """The splits of four IDX files, each packed by gzip or not.

    Files that lie in `root` itself are not taken: those of both sets have the same names.
    """
    raw = Path(FOLDERS[name]) / "raw"
    names = [file for files in FILES.values() for file in files]
    for folder in (place / raw, place / "raw", place, root / raw):
        found = {file: path for file in names if (path := _idx_path(folder, file))}
        if not found:
            continue
        if absent := [file for file in names if file not in found]:
            raise MissingError(
                f"{shown(folder)} lacks {absent[0]} or {absent[0]}.gz: put it there, or delete the "
                "other files and run again with --download true"
            )
        mark, content = listing.mark_of(found.values()), _idx_digest(found)
        return {
            split: Source(mark, partial(_read, *map(found.get, files)), CLASS_NAMES[name], content)
            for split, files in FILES.items()
        }
    return None


def _idx_path(folder, name):
    """The path of an IDX file, or None; Kaggle's copies have a dot for the first hyphen of idx."""
    names = [name, name.replace("-idx", ".idx")]
    names += [f"{each}.gz" for each in names]
    return next(filter(os.path.isfile, (folder / each for each in names)), None)


def _idx_digest(found):
    """A digest of the first part of all files, which is the same where they are packed."""
    digest = hashlib.sha256()
    for name, path in found.items():
        digest.update(name.encode())
        digest.update(_idx_content(path, lambda file: file.read(listing.SAMPLED_BYTES)))
    return digest.hexdigest()


def _idx_content(path, read):
    """What `read` returns for the unpacked content of a file; MissingError where it is damaged."""
    with image_files.open_regular(path, LARGEST_IDX) as file:
        try:
            if path.suffix != ".gz":
                return read(file)
            with gzip.GzipFile(fileobj=file) as unpacked:
                return read(unpacked)
        except (OSError, EOFError, ValueError, zlib.error, struct.error) as error:
            raise MissingError(
                f"{shown(path)} is damaged: delete it and put the file of the published set there"
            ) from error


def _read(images_path, labels_path):
    """(images uint8 N,28,28,3, labels int64 N): the grey level stands in all three channels."""
    images = _read_idx(images_path, SHAPE)
    labels = _read_idx(labels_path, ())
    if len(images) != len(labels) or labels.max() >= len(DIGITS):
        raise MissingError(
            f"{shown(labels_path)} does not fit {images_path.name}: it needs a label from 0 to 9 "
            f"for each of {len(images)} images"
        )
    return np.repeat(images[..., None], 3, axis=-1), labels.astype(np.int64)


def _read_idx(path, shape):
    """The uint8 array (N, *shape) of an IDX file, whose format http://yann.lecun.com/exdb/mnist
    describes: a mark with the number of dimensions, the dimensions, and the values."""

    def read(file):
        dimensions = 1 + len(shape)
        head = struct.unpack(f">{1 + dimensions}I", file.read(4 + 4 * dimensions))
        mark, count, *form = head
        size = count * int(np.prod(shape))
        if mark != 0x800 + dimensions or tuple(form) != shape or not 0 < size <= LARGEST_IDX:
            raise ValueError("another form")
        values = file.read(size + 1)
        if len(values) != size:
            raise ValueError("another length")
        return np.frombuffer(values, np.uint8).reshape(count, *shape)

    return _idx_content(path, read)
