"""The text files of a record, read within limits: records may come from strangers.

Sizes are compared before a file is read, depths before it is parsed.
"""

import csv
import itertools
import json
import os

import yaml

from utils.errors import RefusedError
from utils.record import folder

# bytes; real files have a few thousand
LARGEST = {folder.RECORD: 2**22, folder.OPTIONS: 2**18, folder.RESULTS: 2**20, folder.LOG: 2**24}
MOST_EPOCHS, MOST_COLUMNS = 100_000, 1000  # rows of a log.csv, columns of any CSV file
DEEPEST = 20  # levels of a record.json
LONGEST, LONGEST_REASON = 4000, 300  # characters of a value, and of what is wrong with a file
# what a file with wrong content can raise
UNUSABLE = (
    ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError, csv.Error,
    yaml.YAMLError,
)  # fmt: skip


def load(path, name, parse, record=None):
    """parse(text) of the file `name`, whose sha256 must be the one in `record`."""
    require_size(path / name, LARGEST[name])
    try:
        return parse(folder.read_checked(path, name, record).decode())
    except UNUSABLE as error:
        raise RefusedError(f"{name} is unusable: {reason(error)}") from error


def require_size(path, largest):
    """RefusedError where a file is larger; one that is not there is left to its reader."""
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError):
        return
    if size > largest:
        raise RefusedError(f"{path.name} is larger than {largest >> 10} KB")


def reason(error):
    """What is wrong, in a line of text."""
    return printable(error)[:LONGEST_REASON]


def parse_record(text):
    """The content of a record.json: a mapping with `files`, {name: checksum}."""
    record = json.loads(text)
    level, depth = [record], 0
    while level and depth <= DEEPEST:
        level, depth = [child for each in level for child in children(each)], depth + 1
    if level:
        raise ValueError(f"it has more than {DEEPEST} levels")
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise RefusedError(f"{folder.RECORD} lists no files")
    return record


def children(value):
    """The values that lie in a value of JSON."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def parse_config(text):
    """{option: value as text} of a config.yaml, which is a mapping of scalars."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    require_flat(yaml.parse(text, loader))
    config = yaml.load(text, loader)
    if not isinstance(config, dict):
        raise ValueError("it holds no options")
    return {
        short(name, "an option"): short(value, name)
        for name, value in config.items()
        if value is not None
    }


def require_flat(events):
    """ValueError where YAML holds more than one level, an alias or a tag.

    What is loaded afterwards cannot be nested deeply, and no part of it can be repeated.
    """
    depth = 0
    for event in events:
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise ValueError("it holds an alias or a tag, and options have none")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > 1:
            raise ValueError("it holds a list or a mapping where an option has a single value")


def read_rows(file, most):
    """The rows of a CSV file, column -> text; ValueError where there are more than `most`."""
    reader = csv.DictReader(file)
    if len(reader.fieldnames or ()) > MOST_COLUMNS:
        raise ValueError(f"it has more than {MOST_COLUMNS} columns")
    rows = list(itertools.islice(reader, most + 1))
    if len(rows) > most:
        raise ValueError(f"it has more than {most} row{'s' * (most > 1)}")
    return rows


def short(value, name):
    """A value as text of one line; ValueError where it is too long to be shown."""
    text = printable(value)
    if len(text) > LONGEST:
        raise ValueError(f"{printable(name)[:LONGEST_REASON]} has more than {LONGEST} characters")
    return text


def printable(value):
    """Text of one line and without control characters."""
    text = str(value)
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(text.split())
