"""The published data sets in the layouts of torchvision, Kaggle and their own archives.

They are looked for in the folder <dataset_path>/<name> and in <dataset_path> itself. Nothing here
imports torch before a set is read or downloaded.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np

from antidote_bench.utils.data import celeba, gtsrb, listing, mnist
from antidote_bench.utils.data.images import shown
from antidote_bench.utils.data.listing import Skipped, Source
from antidote_bench.utils.errors import MissingError
from antidote_bench.utils.text import cut

CIFAR10 = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
CIFAR100 = tuple(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
    crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
    lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()
)
IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
IMAGENETTE_FOLDERS = ("imagenette2", "imagenette2-320", "imagenette2-160")
# the names of the classes of sets that have a layout without a folder for every class
CLASS_NAMES = {
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    **mnist.CLASS_NAMES,
    "celeba": celeba.CLASSES,
}
# the names of classes whose folders are called otherwise
WORDS = {"imagenette": IMAGENETTE}


def find(name, root):
    """{'train': Source, 'test': Source} of the set `name`, or None where no layout of it is there.

    Raises MissingError (exit 3) where a part of it is missing or damaged.
    """
    place, root = Path(root) / name, Path(root)
    if name in mnist.FOLDERS:
        return mnist.find(name, place, root)
    finder = {
        "cifar10": partial(_find_cifar, "cifar10"),
        "cifar100": partial(_find_cifar, "cifar100"),
        "gtsrb": gtsrb.find,
        "tiny": partial(_find_folders, "tiny"),
        "imagenette": partial(_find_folders, "imagenette"),
        "celeba": celeba.find,
    }[name]
    return finder(place) or finder(root)


def train_folder(name, root):
    """The folder with a folder of training images for every class, or None where there is none."""
    place, root = Path(root) / name, Path(root)
    found = [place / "train", *_class_folders_of(name, place), *_class_folders_of(name, root)]
    if name == "gtsrb" and gtsrb.is_kaggle(place):
        found.insert(0, gtsrb.kaggle_part(place, "Train"))
    return next(filter(os.path.isdir, found), None)


def _class_folders_of(name, place):
    """Where the training images of a set with folders of classes can be, below `place`."""
    if name == "gtsrb":
        kaggle = [gtsrb.kaggle_part(place, "Train")] if gtsrb.is_kaggle(place) else []
        return [*gtsrb.places(place), *kaggle]
    return [folder / "train" for folder in _archive_folders(name, place)]


def _archive_folders(name, place):
    """What the archives of a set with train/ and val/ unpack to, below `place`."""
    names = {"tiny": ("tiny-imagenet-200",), "imagenette": IMAGENETTE_FOLDERS}
    return [place / folder for folder in names.get(name, ())]


def _find_folders(name, place):
    for folder in _archive_folders(name, place):
        if os.path.isdir(folder / "train"):
            return listing.read_folders(folder, WORDS.get(name))
    return None


# ---------- CIFAR ----------


def _find_cifar(name, place):
    folder = place / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    if not folder.is_dir():
        return None
    entries = listing.entries_of(folder, Skipped())
    paths = [entry.path for entry in entries if not listing.is_folder(entry)]
    mark, content = listing.mark_of(paths), listing.mark_of(paths, dates=False)
    return {
        split: Source(mark, partial(_read_cifar, name, place, split), CLASS_NAMES[name], content)
        for split in ("train", "test")
    }


def _read_cifar(name, place, split):
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


# ---------- downloads, and what is said where a set is missing ----------


def download(name, place):
    """Have torchvision download a set to the folder `place`; MissingError (exit 3) where it fails.

    Imagenette is fetched with 320 pixels a side, which are enough for the default of 224.
    """
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
        elif name == "imagenette":
            datasets.Imagenette(place, size="320px", download=True)
        else:
            kinds = {
                "cifar10": datasets.CIFAR10,
                "cifar100": datasets.CIFAR100,
                "mnist": datasets.MNIST,
                "fashionmnist": datasets.FashionMNIST,
                "celeba": datasets.CelebA,
            }
            kinds[name](place, download=True)
    except Exception as error:  # the errors of gdown, which fetches CelebA, have no common class
        raise MissingError(
            f"could not download {name} to {shown(place)}: {cut(error, 300)}; put "
            f"{layouts(name, place)}"
        ) from error


def layouts(name, place):
    """Words for what the folder `place` of a set may hold."""
    folders = f"image folders there, {place}/train/<class>/* and {place}/test/<class>/*"
    if name in mnist.FOLDERS:
        return f"{folders}, or the four files {place}/train-images-idx3-ubyte.gz ..."
    other = {
        "gtsrb": f"Kaggle's {place}/Train/, {place}/Test/ and {place}/Test.csv",
        "imagenette": f"the unpacked archive, {place}/imagenette2/ (or -320, -160)",
        "celeba": (
            f"{place}/img_align_celeba/ (the unpacked images), {place}/list_attr_celeba.txt and "
            f"{place}/list_eval_partition.txt"
        ),
    }
    return f"{folders}, or {other[name]}" if name in other else folders
