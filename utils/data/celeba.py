"""CelebA with its lists of attributes and of partitions."""

import csv
import os

from antidote_bench.utils.data import listing
from antidote_bench.utils.data.images import shown
from antidote_bench.utils.errors import MissingError

# the first attribute counts 4, the second 2, the third 1
ATTRIBUTES = ("Heavy_Makeup", "Smiling", "Mouth_Slightly_Open")
CLASSES = (
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


def find(place):
    """CelebA with the eight classes that three of its attributes make.

    They are the three most balanced ones: Salem et al., "Dynamic Backdoor Attacks Against Machine
    Learning Models", 2020 (arXiv 2003.03675). A class is 4 Heavy_Makeup + 2 Smiling +
    Mouth_Slightly_Open, as in the code of Nguyen and Tran, "WaNet", 2021 (arXiv 2102.10369), and of
    BackdoorBench. The images of the set's own training and test partition are used: 162,770 and
    19,962.
    """
    return _find_in(place) or _find_in(place / "celeba")


def _find_in(place):
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
    classes, parts = _classes(attributes), _parts(partition)
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
    return listing.splits(train, test, folder, CLASSES)


def _list_places(place, folder, name):
    return [base / f"{name}{end}" for base in (place, place / folder) for end in (".txt", ".csv")]


def _classes(path):
    """{image: class 0..7} of a list of CelebA's attributes, which are 1 or -1 (or 0)."""
    table = _table(path, ATTRIBUTES)
    if not all({*values} <= {-1, 0, 1} for values in table.values()):
        _damaged(path)
    return {
        name: sum((value > 0) << bit for value, bit in zip(values, (2, 1, 0), strict=True))
        for name, values in table.items()
    }


def _parts(path):
    """{image: 0 (training), 1 (validation) or 2 (test)} of CelebA's list of partitions."""
    table = _table(path, ("partition",))
    if not all(0 <= part <= TEST for (part,) in table.values()):
        _damaged(path)
    return {name: part for name, (part,) in table.items()}


def _table(path, columns):
    """{image: [numbers in these columns]} of a list of CelebA.

    A .csv has a row of names. A .txt has its columns divided by spaces; that of the attributes
    begins with a line that has the number of images and one that has the names.
    """
    lines = iter(listing.text_of(path).splitlines())
    try:
        if path.suffix == ".csv":
            rows = csv.reader(lines)
            names, count = next(rows)[1:], None
        elif columns == ATTRIBUTES:
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
