"""Images as files in folders, and the list that says what each of them is."""

import csv
import io
import os
import secrets
import shutil
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from antidote_bench.utils import files
from antidote_bench.utils.data import images as image_files
from antidote_bench.utils.data.images import shown
from antidote_bench.utils.errors import ConfigError, MissingError, RefusedError
from antidote_bench.utils.text import cut

LIST = "images.csv"
COLUMNS = ["index", "split", "file", "label", "original_label", "kind"]
TRAIN, TEST = "train", "test"  # splits
CLEAN, POISON, COVER = "clean", "poison", "cover"  # kinds
MOST_ROWS = 10**7
LARGEST_LIST = 1 << 30  # bytes


class Images(NamedTuple):
    """Changed images of a split: their positions in it, int64 N in ascending order, uint8 images
    N,3,S,S, the labels that the attacker gives them, and their true classes, both int64 N."""

    index: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    truth: torch.Tensor

    def on_cpu(self):
        return Images(*(part.cpu() for part in self))


class Row(NamedTuple):
    """A line of the list: an image at position `index` of a split, and its file below the folder.

    `label` is what a model is told, `original` the true class.
    """

    index: int
    split: str
    file: str
    label: int
    original: int
    kind: str


def read_all(paths, size):
    """The images in files as uint8 N,3,size,size.

    Raises MissingError (exit 3) for a file that is not there or damaged, and RefusedError (exit 4)
    for an image of another size.
    """
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    for number, path in enumerate(tqdm(paths, desc="reading", unit=" images", disable=None)):
        image = image_files.read_rgb(path)
        if image.size != (size, size):
            width, height = image.size
            raise RefusedError(
                f"the image {shown(path)} has {width}x{height} pixels and must have {size}x{size}"
            )
        images[number] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return images


def read_tree(folder, spec, relabel):
    """The `Images` of a split in files <true class>/<position>.png below a folder, where the class
    is a number; relabel(truth) gives the attacker's labels.

    Raises MissingError (exit 3) where there is no such file.
    """
    pairs = sorted(
        (int(path.stem), int(path.parent.name), path)
        for path in Path(folder).glob("*/*.png")
        if _is_number(path.stem) and _is_number(path.parent.name)
    )
    if not pairs:
        raise MissingError(
            f"there is no image <true class>/<position>.png with two numbers below {shown(folder)}"
        )
    index, truth = (torch.tensor([pair[part] for pair in pairs]) for part in (0, 1))
    _require_places(folder, index, truth, spec.classes)
    images = read_all([path for _, _, path in pairs], spec.size)
    return Images(index, images, relabel(truth), truth)


def read_changed(folder, rows, split, size):
    """(the `Images` of a split that the rows of a list say are changed, which of them are cover)"""
    chosen = sorted(row for row in rows if row.split == split and row.kind != CLEAN)
    index, labels, truth = (
        torch.tensor([getattr(row, name) for row in chosen], dtype=torch.long)
        for name in ("index", "label", "original")
    )
    _require_places(folder, index, truth, None)
    images = read_all([Path(folder) / row.file for row in chosen], size)
    cover = torch.tensor([row.kind == COVER for row in chosen], dtype=torch.bool)
    return Images(index, images, labels, truth), cover


def _is_number(text):
    return text.isascii() and text.isdecimal() and len(text) < 10


def _require_places(folder, index, truth, classes):
    """RefusedError where a position comes twice or a class is none."""
    if len(index.unique()) != len(index):
        raise RefusedError(f"{shown(folder)} is refused: two images have the same position")
    if classes and int(truth.max()) >= classes:
        raise RefusedError(
            f"{shown(folder)} is refused: it has a class {int(truth.max())}, and the data set has "
            f"0 to {classes - 1}"
        )


def write_all(images, paths):
    """Write uint8 images N,3,S,S as PNG files, with the folders that they need."""
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    batch = 1000  # images that are copied to the CPU at once
    with tqdm(total=len(paths), desc="writing", unit=" images", disable=None) as bar:
        for start in range(0, len(paths), batch):
            part = torch.arange(start, min(start + batch, len(paths)))
            for pixels, path in zip(
                images[part].permute(0, 2, 3, 1).cpu().numpy(), paths[start:], strict=False
            ):
                Image.fromarray(np.ascontiguousarray(pixels)).save(path, "PNG")
                bar.update()


@contextmanager
def new_folder(path):
    """Yield a temporary folder that is renamed to `path` when everything in it is written.

    Raises ConfigError (exit 2) where there is something already.
    """
    path = Path(path)
    require_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    unfinished.mkdir()
    try:
        yield unfinished
        os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def require_new(path):
    """ConfigError (exit 2) where there is something at `path`."""
    if os.path.lexists(path):
        raise ConfigError(f"{shown(path)} is there already: name a folder that does not exist yet")


def class_folders(names, count):
    """Names of folders for `count` classes, in whose order, as this project sorts class folders,
    the classes keep their numbers: their own names where that is possible, else their numbers."""
    plain = len(names) == count and all(
        name.isprintable() and name == os.path.basename(name) and name[:1] not in ("", ".")
        for name in names
    )
    words = not all(name.isascii() and name.isdecimal() for name in names)
    if plain and words and sorted(names, key=os.fsencode) == list(names):
        return list(names)
    return [f"{number:0{len(str(count - 1))}d}" for number in range(count)]


def write_list(folder, rows: Iterable[Row]):
    """Write the list of a folder's images."""
    lines = (dict(zip(COLUMNS, row, strict=True)) for row in rows)
    files.write(folder / LIST, files.csv_text(lines, COLUMNS))


def read_list(folder):
    """The bytes of a folder's list; MissingError (exit 3) where there is none."""
    path = Path(folder) / LIST
    if not path.is_file():
        raise MissingError(
            f"there is no {shown(path)}: it lists the images, with the columns {', '.join(COLUMNS)}"
        )
    with image_files.open_regular(path, LARGEST_LIST) as file:
        return file.read()


def rows_of(content, folder, classes):
    """The `Row`s in the content of a folder's list.

    Raises RefusedError (exit 4) where a row is not one or names a file outside the folder.
    """
    path = Path(folder) / LIST
    try:
        lines = files.read_rows(io.StringIO(content.decode("utf-8-sig"), newline=""), MOST_ROWS)
    except (ValueError, csv.Error) as error:
        raise RefusedError(f"{shown(path)} is refused: {cut(error, 200)}") from error
    return [_row(path, number, line, classes) for number, line in enumerate(lines, 2)]


def _row(path, number, line, classes):
    try:
        row = Row(
            int(line["index"]),
            line["split"],
            line["file"],
            int(line["label"]),
            int(line["original_label"]),
            line["kind"],
        )
        place = Path(row.file)
        right = row.split in (TRAIN, TEST) and row.kind in (CLEAN, POISON, COVER)
        right &= row.index >= 0 and 0 <= row.label < classes and 0 <= row.original < classes
        right &= not place.is_absolute() and ".." not in place.parts and "\0" not in row.file
    except (KeyError, TypeError, ValueError):
        right = False
    if not right:
        raise RefusedError(
            f"{shown(path)} is refused: line {number} is not index, split (train or test), file "
            f"below the folder, label and original_label (0 to {classes - 1}), kind (clean, poison "
            "or cover)"
        )
    return row
