"""The published data sets in the layouts of torchvision, Kaggle and their own archives.

They are looked for in the folder <dataset_path>/<name> and in <dataset_path> itself. Nothing here
imports torch before a set is read or downloaded.
"""

import csv
import gzip
import hashlib
import io
import os
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from antidote_bench.utils.data import images as image_files
from antidote_bench.utils.data import listing
from antidote_bench.utils.data.images import shown
from antidote_bench.utils.data.listing import Skipped, Source
from antidote_bench.utils.errors import MissingError
from antidote_bench.utils.text import cut

LARGEST_IDX = 1 << 28  # bytes of an IDX file's content

DIGITS = tuple("0123456789")
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
FASHIONMNIST = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
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
# the first attribute counts 4, the second 2, the third 1
CELEBA_ATTRIBUTES = ("Heavy_Makeup", "Smiling", "Mouth_Slightly_Open")
CELEBA = (
    "no attribute",
    "mouth open",
    "smiling",
    "smiling + mouth open",
    "heavy makeup",
    "heavy makeup + mouth open",
    "heavy makeup + smiling",
    "heavy makeup + smiling + mouth open",
)
TRAIN, TEST = 0, 2  # of CelebA's partition; 1 is for validation, and not used
# the names of the classes of sets that have a layout without a folder for every class
CLASS_NAMES = {
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "mnist": DIGITS,
    "fashionmnist": FASHIONMNIST,
    "celeba": CELEBA,
}
# the names of classes whose folders are called otherwise
WORDS = {"imagenette": IMAGENETTE}
MNIST_FOLDERS = {"mnist": "MNIST", "fashionmnist": "FashionMNIST"}
MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
MNIST_SHAPE = (28, 28)


def find(name, root):
    """{'train': Source, 'test': Source} of the set `name`, or None where no layout of it is there.

    Raises MissingError (exit 3) where a part of it is missing or damaged.
    """
    place, root = Path(root) / name, Path(root)
    if name in MNIST_FOLDERS:
        return _find_mnist(name, place, root)
    finder = {
        "cifar10": partial(_find_cifar, "cifar10"),
        "cifar100": partial(_find_cifar, "cifar100"),
        "gtsrb": _find_gtsrb,
        "tiny": partial(_find_folders, "tiny"),
        "imagenette": partial(_find_folders, "imagenette"),
        "celeba": _find_celeba,
    }[name]
    return finder(place) or finder(root)


def train_folder(name, root):
    """The folder with a folder of training images for every class, or None where there is none."""
    place, root = Path(root) / name, Path(root)
    found = [place / "train", *_class_folders_of(name, place), *_class_folders_of(name, root)]
    if name == "gtsrb" and is_kaggle_gtsrb(place):
        found.insert(0, _kaggle_part(place, "Train"))
    return next(filter(os.path.isdir, found), None)


def _class_folders_of(name, place):
    """Where the training images of a set with folders of classes can be, below `place`."""
    if name == "gtsrb":
        kaggle = [_kaggle_part(place, "Train")] if is_kaggle_gtsrb(place) else []
        return [*_gtsrb_places(place), *kaggle]
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


def _mark(paths, *, dates=True):
    """The names and sizes of files, and their dates if asked, as one text."""
    mark = ""
    for path in paths:
        status = os.stat(path)
        image_files.require_regular(path, status)
        name = shown(os.path.basename(path))
        mark += f"{name}{status.st_size}{status.st_mtime_ns if dates else ''}"
    return mark


# ---------- CIFAR ----------


def _find_cifar(name, place):
    folder = place / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    if not folder.is_dir():
        return None
    entries = listing.entries_of(folder, Skipped())
    paths = [entry.path for entry in entries if not listing.is_folder(entry)]
    mark, content = _mark(paths), _mark(paths, dates=False)
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


# ---------- MNIST and FashionMNIST ----------


def _find_mnist(name, place, root):
    """The splits of four IDX files, each packed by gzip or not.

    Files that lie in `root` itself are not taken: those of both sets have the same names.
    """
    raw = Path(MNIST_FOLDERS[name]) / "raw"
    names = [file for files in MNIST_FILES.values() for file in files]
    for folder in (place / raw, place / "raw", place, root / raw):
        found = {file: path for file in names if (path := _idx_path(folder, file))}
        if not found:
            continue
        if absent := [file for file in names if file not in found]:
            raise MissingError(
                f"{shown(folder)} lacks {absent[0]} or {absent[0]}.gz: put it there, or delete the "
                "other files and run again with --download true"
            )
        mark, content = _mark(found.values()), _idx_digest(found)
        return {
            split: Source(
                mark, partial(_read_mnist, *map(found.get, files)), CLASS_NAMES[name], content
            )
            for split, files in MNIST_FILES.items()
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


def _read_mnist(images_path, labels_path):
    """(images uint8 N,28,28,3, labels int64 N): the grey level stands in all three channels."""
    images = _read_idx(images_path, MNIST_SHAPE)
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


# ---------- GTSRB ----------


def _find_gtsrb(place):
    """GTSRB as torchvision or Kaggle has it.

    Of torchvision's the full official training set is taken where there is one; its "train" has
    fewer images.
    """
    if (place / "gtsrb" / "GT-final_test.csv").is_file():
        images, listed = place / "gtsrb" / "GTSRB", place / "gtsrb" / "GT-final_test.csv"
        train = next(filter(os.path.isdir, _gtsrb_places(place)), None)
        if train is None:
            raise MissingError(
                f"{images} has neither Final_Training/Images/ nor Training/: run with --download "
                "true"
            )
        test = images / "Final_Test" / "Images"
        return _gtsrb_splits(train, test, listed, "Filename", ";")
    return find_kaggle_gtsrb(place) if is_kaggle_gtsrb(place) else None


def is_kaggle_gtsrb(place):
    """Whether `place` has GTSRB as Kaggle has it: Train/<class>/*, Test/* and Test.csv.

    The folders may be called train and test. Then they look like image folders, but there are no
    folders of classes in test.
    """
    train, test = _kaggle_part(place, "Train"), _kaggle_part(place, "Test")
    if not os.path.isdir(train):
        return False
    if not os.path.isdir(test):
        return os.path.isfile(_kaggle_part(place, "Test.csv"))
    folders = [set(listing.class_folders(folder, Skipped())) for folder in (train, test)]
    return not set.intersection(*folders)


def find_kaggle_gtsrb(place):
    """The splits of GTSRB as Kaggle has it; MissingError (exit 3) where a part is missing."""
    train, test, listed = (_kaggle_part(place, name) for name in ("Train", "Test", "Test.csv"))
    if not os.path.isfile(listed):
        raise MissingError(
            f"{shown(place)} lacks Test.csv, which says of what classes the images in "
            f"{test.name}/ are: put it there"
        )
    return _gtsrb_splits(train, test, listed, "Path", ",")


def _kaggle_part(place, name):
    """The path of `name` in `place`, in lower case where it is called so."""
    return next(filter(os.path.exists, (place / name, place / name.lower())), place / name)


def _gtsrb_places(place):
    """Where torchvision puts the training images of GTSRB, the full set first."""
    images = place / "gtsrb" / "GTSRB"
    return images / "Final_Training" / "Images", images / "Training"


def _gtsrb_splits(train, test, listed, column, delimiter):
    """The splits of training images in folders of classes, and of test images in a list."""
    skipped = Skipped()
    classes = listing.class_folders(train, skipped)
    pairs = listing.scan(train, classes, skipped)
    test_pairs = _gtsrb_test(listed, test, classes, column, delimiter)
    return listing.splits(pairs, test_pairs, test, listing.class_names(classes))


def _gtsrb_test(path, folder, classes, column, delimiter):
    """(path, label) pairs of GTSRB's test images, from their list.

    `column` has the file of an image, of which the last part counts: all lie in `folder`.
    """
    try:
        text = io.StringIO(listing.text_of(path), newline="")
        rows = list(csv.DictReader(text, delimiter=delimiter))
        pairs = [(folder / Path(row[column]).name, int(row["ClassId"])) for row in rows]
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        divided = {";": "semicolons", ",": "commas"}[delimiter]
        raise MissingError(
            f"{path} is damaged: it needs the columns {column} and ClassId, divided by {divided}"
        ) from error
    if not all(0 <= label < len(classes) for _, label in pairs):
        raise MissingError(f"{path} names a class beyond the {len(classes)} of the training set")
    return pairs or listing.no_list(path)


# ---------- CelebA ----------


def _find_celeba(place):
    """CelebA with the eight classes that three of its attributes make.

    They are the three most balanced ones: Salem et al., "Dynamic Backdoor Attacks Against Machine
    Learning Models", 2020 (arXiv 2003.03675). A class is 4 Heavy_Makeup + 2 Smiling +
    Mouth_Slightly_Open, as in the code of Nguyen and Tran, "WaNet", 2021 (arXiv 2102.10369), and of
    BackdoorBench. The images of the set's own training and test partition are used: 162,770 and
    19,962.
    """
    return _celeba_in(place) or _celeba_in(place / "celeba")


def _celeba_in(place):
    """The splits whose images and lists lie in `place`, or in the folders of the set's own site."""
    wanted = {
        "the folder img_align_celeba with the unpacked images": [
            place / "img_align_celeba" / "img_align_celeba",  # Kaggle's
            place / "img_align_celeba",
            place / "Img" / "img_align_celeba",
        ],
        "list_attr_celeba.txt or .csv": _list_places(place, "Anno", "list_attr_celeba"),
        "list_eval_partition.txt or .csv": _list_places(place, "Eval", "list_eval_partition"),
    }
    found = {what: next(filter(os.path.exists, places), None) for what, places in wanted.items()}
    if not any(found.values()):
        return None
    if absent := [what for what in found if found[what] is None]:
        raise MissingError(f"{shown(place)} lacks {absent[0]}: put it there")
    folder, attributes, partition = found.values()
    classes, parts = _celeba_classes(attributes), _celeba_parts(partition)
    if classes.keys() != parts.keys():
        raise MissingError(
            f"{shown(attributes)} and {partition.name} do not list the same images: one of them is "
            "damaged"
        )
    train, test = (
        [
            (os.path.join(folder, name), classes[name])
            for name, part in parts.items()
            if part == wanted_part
        ]
        for wanted_part in (TRAIN, TEST)
    )
    if not train or not test:
        listing.no_list(partition)
    return listing.splits(train, test, folder, CELEBA)


def _list_places(place, folder, name):
    return [base / f"{name}{end}" for base in (place, place / folder) for end in (".txt", ".csv")]


def _celeba_classes(path):
    """{image: class 0..7} of a list of CelebA's attributes, which are 1 or -1 (or 0)."""
    table = _celeba_table(path, CELEBA_ATTRIBUTES)
    if not all({*values} <= {-1, 0, 1} for values in table.values()):
        _damaged(path)
    return {
        name: sum((value > 0) << bit for value, bit in zip(values, (2, 1, 0), strict=True))
        for name, values in table.items()
    }


def _celeba_parts(path):
    """{image: 0 (training), 1 (validation) or 2 (test)} of CelebA's list of partitions."""
    table = _celeba_table(path, ("partition",))
    if not all(0 <= part <= TEST for (part,) in table.values()):
        _damaged(path)
    return {name: part for name, (part,) in table.items()}


def _celeba_table(path, columns):
    """{image: [numbers in these columns]} of a list of CelebA.

    A .csv has a row of names. A .txt has its columns divided by spaces; that of the attributes
    begins with a line that has the number of images and one that has the names.
    """
    lines = iter(listing.text_of(path).splitlines())
    try:
        if path.suffix == ".csv":
            rows = csv.reader(lines)
            names, count = next(rows)[1:], None
        elif columns == CELEBA_ATTRIBUTES:
            count, names = int(next(lines)), next(lines).split()
            rows = map(str.split, lines)
        else:
            names, count = columns, None
            rows = map(str.split, lines)
        places = [1 + names.index(column) for column in columns]
        table = {row[0]: [int(row[place]) for place in places] for row in rows if row}
    except (csv.Error, StopIteration, IndexError, ValueError) as error:
        _damaged(path, error)
    if count not in {None, len(table)}:
        _damaged(path)
    return table


def _damaged(path, error=None):
    raise MissingError(
        f"{shown(path)} is damaged: put the list of the published set there"
    ) from error


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
    if name in MNIST_FOLDERS:
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
