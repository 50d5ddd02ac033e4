"""GTSRB in the layouts of torchvision and of Kaggle."""

import csv
import io
import os
from pathlib import Path

from antidote_bench.utils.data import listing
from antidote_bench.utils.data.images import shown
from antidote_bench.utils.data.listing import Skipped
from antidote_bench.utils.errors import MissingError


def find(place):
    """GTSRB as torchvision or Kaggle has it.

    Of torchvision's the full official training set is taken where there is one; its "train" has
    fewer images.
    """
    if (place / "gtsrb" / "GT-final_test.csv").is_file():
        images, listed = place / "gtsrb" / "GTSRB", place / "gtsrb" / "GT-final_test.csv"
        train = next(filter(os.path.isdir, places(place)), None)
        if train is None:
            raise MissingError(
                f"{images} has neither Final_Training/Images/ nor Training/: run with --download "
                "true"
            )
        test = images / "Final_Test" / "Images"
        return _splits(train, test, listed, "Filename", ";")
    return find_kaggle(place) if is_kaggle(place) else None


def is_kaggle(place):
    """Whether `place` has GTSRB as Kaggle has it: Train/<class>/*, Test/* and Test.csv.

    The folders may be called train and test. Then they look like image folders, but there are no
    folders of classes in test.
    """
    train, test = kaggle_part(place, "Train"), kaggle_part(place, "Test")
    if not os.path.isdir(train):
        return False
    if not os.path.isdir(test):
        return os.path.isfile(kaggle_part(place, "Test.csv"))
    folders = [set(listing.class_folders(folder, Skipped())) for folder in (train, test)]
    return not set.intersection(*folders)


def find_kaggle(place):
    """The splits of GTSRB as Kaggle has it; MissingError (exit 3) where a part is missing."""
    train, test, listed = (kaggle_part(place, name) for name in ("Train", "Test", "Test.csv"))
    if not os.path.isfile(listed):
        raise MissingError(
            f"{shown(place)} lacks Test.csv, which says of what classes the images in "
            f"{test.name}/ are: put it there"
        )
    return _splits(train, test, listed, "Path", ",")


def kaggle_part(place, name):
    """The path of `name` in `place`, in lower case where it is called so."""
    return next(filter(os.path.exists, (place / name, place / name.lower())), place / name)


def places(place):
    """Where torchvision puts the training images of GTSRB, the full set first."""
    images = place / "gtsrb" / "GTSRB"
    return images / "Final_Training" / "Images", images / "Training"


def _splits(train, test, listed, column, delimiter):
    """The splits of training images in folders of classes, and of test images in a list."""
    skipped = Skipped()
    classes = listing.class_folders(train, skipped)
    pairs = listing.scan(train, classes, skipped)
    test_pairs = _test_pairs(listed, test, classes, column, delimiter)
    return listing.splits(pairs, test_pairs, test, listing.class_names(classes))


def _test_pairs(path, folder, classes, column, delimiter):
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
