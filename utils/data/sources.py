"""Finds the images of a data set by its name and decodes them; imports no torch."""

import concurrent.futures
import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from antidote_bench.utils.config import SIDES
from antidote_bench.utils.data import gtsrb, listing, mnist, published_sets
from antidote_bench.utils.data import images as image_files
from antidote_bench.utils.data.images import shown
from antidote_bench.utils.data.listing import Skipped, Source
from antidote_bench.utils.errors import ConfigError, MissingError, UserError

NAMES = [*SIDES, "folder"]
CHUNK = 500  # images per task of the decoding pool


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
            split: Source(
                "scikit-learn digits, 32 pixels, 1", partial(_digits, split), mnist.DIGITS
            )
            for split in ("train", "test")
        }
    place = Path(root) if name == "folder" else Path(root) / name
    if name == "gtsrb" and gtsrb.is_kaggle(place):
        return gtsrb.find_kaggle(place)
    if os.path.isdir(place / "train"):
        return listing.read_folders(place, published_sets.WORDS.get(name))
    found = None if name == "folder" else published_sets.find(name, root)
    if not found and download and name != "folder":
        published_sets.download(name, place)
        found = published_sets.find(name, root)
    if not found:
        raise MissingError(_where(name, place))
    return found


def class_names(name, root):
    """The names of the classes of data set `name`, as its folders say: no image is looked at.

    Raises MissingError (exit 3) where there are no folders of classes.
    """
    check(name)
    if name == "digits":
        return mnist.DIGITS
    place = Path(root) if name == "folder" else Path(root) / name
    train = place / "train"
    if name in published_sets.CLASS_NAMES and not os.path.isdir(train):
        return published_sets.CLASS_NAMES[name]
    if name != "folder":
        train = published_sets.train_folder(name, root)
    if train is None or not os.path.isdir(train):
        raise MissingError(_where(name, place))
    folders = listing.class_folders(train, Skipped())
    return listing.class_names(folders, published_sets.WORDS.get(name))


def find_labelled(folder, classes):
    """(paths, labels int64 N) of the images of a folder that has a folder for every class.

    These are called like `classes`, or by the numbers of the classes, from 0 on. Where they lie in
    a folder train/ within `folder`, the images are taken from there. Raises MissingError (exit 3)
    for a folder that is not there, that is no class, or that has no image.
    """
    place = Path(folder)
    if os.path.isdir(place / "train") and "train" not in classes:
        place = place / "train"
    if not os.path.isdir(place):
        raise MissingError(f"there is no folder {shown(folder)}")
    folders = listing.class_folders(place, Skipped())
    names = [listing.class_name(name) for name in folders]
    numbers = {name: number for number, name in enumerate(classes)}
    if not set(names) <= numbers.keys() and all(name.isdecimal() for name in names):
        numbers = {name: int(name) for name in names if int(name) < len(classes)}
    if unknown := [name for name in names if name not in numbers]:
        raise MissingError(
            f"{shown(place)} has the folder {unknown[0]!r}, which is no class: its folders must be "
            f"called like the classes ({listing.some(classes)}) or be numbers from 0 to "
            f"{len(classes) - 1}"
        )
    labels = np.array([numbers[name] for name in names], np.int64)
    if absent := [name for number, name in enumerate(classes) if number not in labels]:
        raise MissingError(f"{shown(place)} has no folder for the class {listing.some(absent)}")
    pairs = listing.scan(place, folders, Skipped())
    return [str(path) for path, _ in pairs], labels[[position for _, position in pairs]]


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
        except concurrent.futures.BrokenExecutor as error:
            raise UserError(
                "a process that decodes images has died: too little memory, or a damaged image"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _decode_chunk(side, chunk):
    start, sources = chunk
    images = np.stack([_decode_one(source, side) for source in sources])
    return start, np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _decode_one(source, side):
    """A path or an array H,W,3 as uint8 side,side,3."""
    stored = isinstance(source, np.ndarray)
    image = Image.fromarray(source) if stored else image_files.read_rgb(source)
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image)


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


def _where(name, place):
    if name == "folder":
        return (
            f"no images at {place}: --dataset_path names a folder with train/<class>/* and "
            "test/<class>/* or val/<class>/*"
        )
    return (
        f"data set {name} is not at {place}: put {published_sets.layouts(name, place)}, or let "
        "torchvision fetch it with --download true"
    )
