"""Finds the image files of a data set, lists and decodes them; imports no torch."""

import concurrent.futures
import csv
import functools
import hashlib
import io
import multiprocessing
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from antidote_bench.utils.config import SIDES
from antidote_bench.utils.data import images as image_files
from antidote_bench.utils.data.images import shown
from antidote_bench.utils.errors import ConfigError, MissingError, UserError

NAMES = [*SIDES, "folder"]
CHUNK = 500  # images per task of the decoding pool
LARGEST_LIST = 64 << 20  # bytes of a text file that lists images
SHOWN = 3  # examples in a message
SAMPLED, SAMPLED_BYTES = 100, 1 << 16  # files of a split, and bytes of each, that a listing covers

# what other programs leave among images, in lower case; so is every name that begins with a dot
SYSTEM = {
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "__macosx",
    "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip

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


@dataclass(frozen=True)
class Source:
    """One split before it is decoded.

    `fingerprint` changes when any file does. `read()` gives (images, labels): images are a list of
    paths or one uint8 array N,H,W,3; labels are int64 N. `classes` are the names of the classes.
    `listing` is a digest of names, sizes and parts of the content, which stays when the files are
    moved. `count` is the number of images, None where only `read` tells it.
    """

    fingerprint: str
    read: Callable
    classes: tuple = ()
    listing: str = ""
    count: int | None = None


@dataclass
class Skipped:
    """What is not read among the images: hidden and system entries, other files by extension."""

    hidden: list = field(default_factory=list)
    others: Counter = field(default_factory=Counter)

    def add(self, other):
        self.hidden += other.hidden
        self.others += other.others

    def __str__(self):
        parts = []
        if self.hidden:
            parts.append(f"hidden or system entries: {len(self.hidden)} ({_some(self.hidden)})")
        if self.others:
            kinds = [f"{count} {shown(kind)[:20]}" for kind, count in self.others.most_common(10)]
            kinds += ["..."] * (len(self.others) > len(kinds))
            parts.append(f"files of other formats: {self.others.total()} ({', '.join(kinds)})")
        return "; ".join(parts)


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
            split: Source("scikit-learn digits, 32 pixels, 1", partial(_digits, split), DIGITS)
            for split in ("train", "test")
        }
    place = Path(root) if name == "folder" else Path(root) / name
    if os.path.isdir(place / "train"):
        return _folders(place)
    native = _native(name, place)
    if not native and download and name != "folder":
        _download(name, place)
        native = _native(name, place)
    if not native:
        raise MissingError(_where(name, place))
    return native


def class_names(name, root):
    """The names of the classes of data set `name`, as its folders say: no image is looked at.

    Raises MissingError (exit 3) where there are no folders of classes.
    """
    check(name)
    place = Path(root) if name == "folder" else Path(root) / name
    own = {"digits": DIGITS, "cifar10": CIFAR10, "cifar100": CIFAR100}.get(name)
    if own and (name == "digits" or not os.path.isdir(place / "train")):
        return own
    places = [place / "train", place / "tiny-imagenet-200" / "train", *_gtsrb_places(place)]
    train = next(filter(os.path.isdir, places), None)
    if train is None:
        raise MissingError(_where(name, place))
    return tuple(map(_class_name, _class_folders(train, Skipped())))


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
    folders = _class_folders(place, Skipped())
    names = [_class_name(name) for name in folders]
    numbers = {name: number for number, name in enumerate(classes)}
    if not set(names) <= numbers.keys() and all(name.isdecimal() for name in names):
        numbers = {name: int(name) for name in names if int(name) < len(classes)}
    if unknown := [name for name in names if name not in numbers]:
        raise MissingError(
            f"{shown(place)} has the folder {unknown[0]!r}, which is no class: its folders must be "
            f"called like the classes ({_some(classes)}) or be numbers from 0 to {len(classes) - 1}"
        )
    labels = np.array([numbers[name] for name in names], np.int64)
    if absent := [name for number, name in enumerate(classes) if number not in labels]:
        raise MissingError(f"{shown(place)} has no folder for the class {_some(absent)}")
    pairs = _scan(place, folders, Skipped())
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


def _folders(place):
    """train/<class>/* and test/ or val/<class>/*; classes are the folder names of train/."""
    train = place / "train"
    test = next((place / name for name in ("test", "val") if os.path.isdir(place / name)), None)
    if test is None:
        raise MissingError(
            f"{place} has train/ but neither test/ nor val/: put the test images there, a folder "
            "per class"
        )
    skipped = Skipped()
    classes = _class_folders(train, skipped)
    if len(classes) < 2:
        raise MissingError(f"{train} needs at least two class folders; it has {len(classes)}")
    if (place / "val" / "val_annotations.txt").is_file():  # Tiny-ImageNet as it is published
        train_pairs, test_pairs = _scan(train, classes, skipped), _annotated(place / "val", classes)
        return _splits(train_pairs, test_pairs, place / "val", classes)
    extra = [name for name in _class_folders(test, skipped) if name not in set(classes)]
    if extra:
        raise MissingError(f"{test} has a class that {train} lacks: {_some(extra)}")
    pairs = _scan(train, classes, skipped)
    found = _splits(pairs, _scan(test, classes, skipped, partly=True), test, classes)
    if str(skipped):
        say(f"note: passed over below {shown(place)}: {skipped}")
    return found


def _splits(train_pairs, test_pairs, test, classes):
    """The two sources of (path, label) pairs; what the folder `test` lacks is said or refused."""
    present = {label for _, label in test_pairs}
    if len(present) < 2:
        raise MissingError(
            f"the test images in {test} are all of class {_some([classes[min(present)]])}: attack "
            "and defense are measured on at least two classes"
        )
    if absent := [name for label, name in enumerate(classes) if label not in present]:
        say(
            f"warning: {shown(test)} has no image of {len(absent)} of {len(classes)} classes "
            f"({_some(absent)}): nothing is measured on these"
        )
    names = tuple(map(_class_name, classes))
    return {"train": _listed(train_pairs, names), "test": _listed(test_pairs, names)}


@functools.cache  # once, however often a run opens the set
def say(text):
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, the first
        print(text, file=sys.stderr)


def _some(names):
    return ", ".join([shown(name) for name in names[:SHOWN]] + ["..."] * (len(names) > SHOWN))


def _class_name(name):
    """A folder's name as text that is the same on every machine."""
    return normalized(shown(name))


def normalized(name):
    """The name of a class with its letters composed, as all of them are here."""
    return unicodedata.normalize("NFC", name)


def _class_folders(folder, skipped):
    """The names of the folders in `folder`, sorted; by value where all of them are numbers."""
    entries = _entries(folder, skipped)
    names = [entry.name for entry in entries if _is_folder(entry)]
    skipped.others.update(_ending(entry.name) for entry in entries if not _is_folder(entry))
    if all(name.isascii() and name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return names


def _entries(folder, skipped):
    """The entries of `folder`, sorted, without those that hide or that a system leaves behind."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise MissingError(f"cannot read the folder {shown(folder)}: {error.strerror}") from error
    hidden = [entry.name for entry in entries if _hides(entry.name)]
    skipped.hidden += hidden
    return [entry for entry in entries if not _hides(entry.name)] if hidden else entries


def _hides(name):
    return name.startswith(".") or name.lower() in SYSTEM


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _ending(name):
    return os.path.splitext(name)[1].lower() or "without extension"


def _scan(folder, classes, skipped, *, partly=False):
    """(path, label) of every image below folder/<class>, sorted.

    Raises MissingError where there is none, or none of some class, unless it is `partly` so.
    """
    pairs, empty = [], []
    for label, name in enumerate(classes):
        passed = Skipped()
        place = os.path.join(folder, name)
        files = _files(place, passed) if os.path.isdir(place) else []
        pairs += [(path, label) for path in files]
        skipped.add(passed)
        if not files:
            empty.append((name, passed))
    if not pairs:
        raise MissingError(
            f"no images below {folder}: expected {folder}/<class>/*.png, .jpg ..."
            + (f"; passed over: {skipped}" if str(skipped) else "")
        )
    if empty and not partly:
        name, passed = empty[0]
        raise MissingError(
            f"class {shown(name)} in {folder} has no image: put images there or delete the folder"
            + (f"; passed over in it: {passed}" if str(passed) else "")
            + (f"; {len(empty) - 1} more classes are empty" if len(empty) > 1 else "")
        )
    return sorted(pairs, key=lambda pair: os.fsencode(pair[0]))


def _files(folder, skipped):
    """Paths of the image files below `folder`.

    Links are followed, but no folder is read twice, and none that `folder` itself lies in.
    """
    waiting, found = [folder], []
    above = [*Path(os.path.abspath(folder)).parents, *Path(os.path.realpath(folder)).parents]
    seen = set(map(_identity, above))
    endings = image_files.extensions()
    while waiting:
        directory = waiting.pop()
        if (identity := _identity(directory)) in seen:
            continue
        seen.add(identity)
        for entry in _entries(directory, skipped):
            if _is_folder(entry):
                waiting.append(entry.path)
            elif (ending := _ending(entry.name)) in endings:
                found.append(entry.path)
            else:
                skipped.others[ending] += 1
    return found


def _identity(folder):
    try:
        status = os.stat(folder)
    except OSError as error:
        raise MissingError(f"cannot read the folder {shown(folder)}: {error.strerror}") from error
    return status.st_dev, status.st_ino


def _annotated(folder, classes):
    """(path, label) pairs of Tiny-ImageNet's validation images, from their list."""
    path, number = folder / "val_annotations.txt", {name: n for n, name in enumerate(classes)}
    pairs = []
    for line in _text(path).splitlines():
        name, _, rest = line.partition("\t")
        label = number.get(rest.partition("\t")[0])
        if label is None:
            raise MissingError(
                f"{path} is damaged: the line {shown(line[:60])!r} names no class of train/"
            )
        pairs.append((folder / "images" / name, label))
    return pairs or _no_list(path)


def _no_list(path):
    raise MissingError(f"{path} is damaged: it lists no image")


def _text(path):
    """The content of a text file that lists images."""
    with image_files.open_regular(path, LARGEST_LIST) as file:
        return file.read().decode("utf-8-sig", errors="surrogateescape")


def _listed(pairs, classes):
    """A Source of (path, label) pairs; its fingerprint covers paths, labels, sizes and dates."""
    mark, listing = hashlib.sha256(), hashlib.sha256()
    for path, label in pairs:
        try:
            status = os.stat(path)
        except FileNotFoundError as error:
            why = "links to a file that is not there" if os.path.islink(path) else "is missing"
            raise MissingError(f"the image {shown(path)} {why}") from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in its name
            raise MissingError(f"the image {shown(path)} cannot be read: {error}") from error
        image_files.require_regular(path, status)
        mark.update(os.fsencode(path))
        mark.update(f"\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        listing.update(os.fsencode(os.path.basename(path)))
        listing.update(f"\0{label}\0{status.st_size}\n".encode())
    paths, labels = (
        [str(path) for path, _ in pairs],
        np.array([label for _, label in pairs], np.int64),
    )
    for path in paths[:: -(-len(paths) // SAMPLED)]:
        with image_files.open_regular(path) as file:
            listing.update(file.read(SAMPLED_BYTES))
    return Source(
        mark.hexdigest(), lambda: (paths, labels), classes, listing.hexdigest(), len(pairs)
    )


def _native(name, place):
    """The splits in the layout that torchvision downloads (Tiny-ImageNet: in that of its archive).

    None where there is no such layout.
    """
    if name in {"cifar10", "cifar100"}:
        folder = place / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
        if folder.is_dir():
            mark, names = _mark(folder), {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
            listing = _mark(folder, dates=False)
            return {
                split: Source(mark, partial(_cifar, name, place, split), names, listing)
                for split in ("train", "test")
            }
    if name == "gtsrb" and (place / "gtsrb" / "GT-final_test.csv").is_file():
        return _gtsrb(place)
    if name == "tiny" and (place / "tiny-imagenet-200" / "train").is_dir():
        return _folders(place / "tiny-imagenet-200")
    return None


def _mark(folder, *, dates=True):
    """The names and sizes of the files in `folder`, and their dates if asked, as one text."""
    mark = ""
    for entry in _entries(folder, Skipped()):
        if _is_folder(entry):
            continue
        status = os.stat(entry.path)
        image_files.require_regular(entry.path, status)
        mark += f"{shown(entry.name)}{status.st_size}{status.st_mtime_ns if dates else ''}"
    return mark


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
    images, listed = place / "gtsrb" / "GTSRB", place / "gtsrb" / "GT-final_test.csv"
    train = next(filter(os.path.isdir, _gtsrb_places(place)), None)
    if train is None:
        raise MissingError(
            f"{images} has neither Final_Training/Images/ nor Training/: run with --download true"
        )
    skipped = Skipped()
    classes = _class_folders(train, skipped)
    pairs = _scan(train, classes, skipped)
    test = images / "Final_Test" / "Images"
    return _splits(pairs, _gtsrb_test(listed, test, classes), test, classes)


def _gtsrb_places(place):
    """Where torchvision puts the training images of GTSRB, the full set first."""
    images = place / "gtsrb" / "GTSRB"
    return images / "Final_Training" / "Images", images / "Training"


def _gtsrb_test(path, folder, classes):
    """(path, label) pairs of GTSRB's test images, from their list."""
    try:
        rows = list(csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=";"))
        pairs = [(folder / row["Filename"], int(row["ClassId"])) for row in rows]
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise MissingError(
            f"{path} is damaged: it needs the columns Filename and ClassId, divided by semicolons"
        ) from error
    if not all(0 <= label < len(classes) for _, label in pairs):
        raise MissingError(f"{path} names a class beyond the {len(classes)} of the training set")
    return pairs or _no_list(path)


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
