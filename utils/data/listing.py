"""Lists the image files of a data set, class by class; imports no torch."""

import functools
import hashlib
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from antidote_bench.utils.data import images as image_files
from antidote_bench.utils.data.images import shown
from antidote_bench.utils.errors import MissingError

LARGEST_LIST = 64 << 20  # bytes of a text file that lists images
SHOWN = 3  # examples in a message
SAMPLED, SAMPLED_BYTES = 100, 1 << 16  # files of a split, and bytes of each, that a listing covers

# what other programs leave among images, in lower case; so is every name that begins with a dot
SYSTEM = {
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "__macosx",
    "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip


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
            parts.append(f"hidden or system entries: {len(self.hidden)} ({some(self.hidden)})")
        if self.others:
            kinds = [f"{count} {shown(kind)[:20]}" for kind, count in self.others.most_common(10)]
            kinds += ["..."] * (len(self.others) > len(kinds))
            parts.append(f"files of other formats: {self.others.total()} ({', '.join(kinds)})")
        return "; ".join(parts)


def read_folders(place, words=None):
    """The splits in train/<class>/* and test/ or val/<class>/*; train/ says which classes there
    are.

    `words` are the names of classes whose folders are called otherwise: {folder: name}. Raises
    MissingError (exit 3) where a split or the images of a class are missing.
    """
    train = place / "train"
    test = next((place / name for name in ("test", "val") if os.path.isdir(place / name)), None)
    if test is None:
        raise MissingError(
            f"{place} has train/ but neither test/ nor val/: put the test images there, a folder "
            "per class"
        )
    skipped = Skipped()
    classes = class_folders(train, skipped)
    if len(classes) < 2:
        raise MissingError(f"{train} needs at least two class folders; it has {len(classes)}")
    names = class_names(classes, words)
    if (place / "val" / "val_annotations.txt").is_file():  # Tiny-ImageNet as it is published
        train_pairs, test_pairs = scan(train, classes, skipped), _annotated(place / "val", classes)
        return splits(train_pairs, test_pairs, place / "val", names)
    extra = [name for name in class_folders(test, skipped) if name not in set(classes)]
    if extra:
        raise MissingError(f"{test} has a class that {train} lacks: {some(extra)}")
    pairs = scan(train, classes, skipped)
    found = splits(pairs, scan(test, classes, skipped, partly=True), test, names)
    if str(skipped):
        say(f"note: passed over below {shown(place)}: {skipped}")
    return found


def class_names(folders, words=None):
    """The names of the classes whose images lie in the folders of these names."""
    names = map(class_name, folders)
    return tuple((words or {}).get(name, name) for name in names)


def splits(train_pairs, test_pairs, test, classes):
    """The two sources of (path, label) pairs.

    `classes` are the names of the classes. What the folder `test` lacks is said or refused.
    """
    present = {label for _, label in test_pairs}
    if len(present) < 2:
        raise MissingError(
            f"the test images in {test} are all of class {some([classes[min(present)]])}: attack "
            "and defense are measured on at least two classes"
        )
    if absent := [name for label, name in enumerate(classes) if label not in present]:
        say(
            f"warning: {shown(test)} has no image of {len(absent)} of {len(classes)} classes "
            f"({some(absent)}): nothing is measured on these"
        )
    return {"train": source_of(train_pairs, classes), "test": source_of(test_pairs, classes)}


@functools.cache  # once, however often a run opens the set
def say(text):
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, the first
        print(text, file=sys.stderr)


def class_folders(folder, skipped):
    """The names of the folders in `folder`, sorted; by value where all of them are numbers."""
    entries = entries_of(folder, skipped)
    names = [entry.name for entry in entries if is_folder(entry)]
    skipped.others.update(_ending(entry.name) for entry in entries if not is_folder(entry))
    if all(name.isascii() and name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return names


def scan(folder, classes, skipped, *, partly=False):
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
        for entry in entries_of(directory, skipped):
            if is_folder(entry):
                waiting.append(entry.path)
            elif (ending := _ending(entry.name)) in endings:
                found.append(entry.path)
            else:
                skipped.others[ending] += 1
    return found


def source_of(pairs, classes):
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


def _annotated(folder, classes):
    """(path, label) pairs of Tiny-ImageNet's validation images, from their list."""
    path, number = folder / "val_annotations.txt", {name: n for n, name in enumerate(classes)}
    pairs = []
    for line in text_of(path).splitlines():
        name, _, rest = line.partition("\t")
        label = number.get(rest.partition("\t")[0])
        if label is None:
            raise MissingError(
                f"{path} is damaged: the line {shown(line[:60])!r} names no class of train/"
            )
        pairs.append((folder / "images" / name, label))
    return pairs or no_list(path)


def text_of(path):
    """The content of a text file that lists images."""
    with image_files.open_regular(path, LARGEST_LIST) as file:
        return file.read().decode("utf-8-sig", errors="surrogateescape")


def no_list(path):
    raise MissingError(f"{path} is damaged: it lists no image")


def entries_of(folder, skipped):
    """The entries of `folder`, sorted, without those that hide or that a system leaves behind."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise MissingError(f"cannot read the folder {shown(folder)}: {error.strerror}") from error
    hidden = [entry.name for entry in entries if _hides(entry.name)]
    skipped.hidden += hidden
    return [entry for entry in entries if not _hides(entry.name)] if hidden else entries


def is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _hides(name):
    return name.startswith(".") or name.lower() in SYSTEM


def _ending(name):
    return os.path.splitext(name)[1].lower() or "without extension"


def _identity(folder):
    try:
        status = os.stat(folder)
    except OSError as error:
        raise MissingError(f"cannot read the folder {shown(folder)}: {error.strerror}") from error
    return status.st_dev, status.st_ino


def some(names):
    return ", ".join([shown(name) for name in names[:SHOWN]] + ["..."] * (len(names) > SHOWN))


def class_name(name):
    """A folder's name as text that is the same on every machine."""
    return normalized(shown(name))


def normalized(name):
    """The name of a class with its letters composed, as all of them are here."""
    return unicodedata.normalize("NFC", name)


def mark_of(paths, *, dates=True):
    """The names and sizes of files, and their dates if asked, as one text."""
    mark = ""
    for path in paths:
        status = os.stat(path)
        image_files.require_regular(path, status)
        name = shown(os.path.basename(path))
        mark += f"{name}{status.st_size}{status.st_mtime_ns if dates else ''}"
    return mark
