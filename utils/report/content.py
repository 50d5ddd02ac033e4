"""The text files of a record, read within limits: records may come from strangers.

Sizes are compared before a file is read, depths before it is parsed.
"""

import csv
import json
import os

import yaml

from antidote_bench.utils.errors import RefusedError
from antidote_bench.utils.record import folder
from antidote_bench.utils.text import one_line

MOST_EPOCHS = 100_000  # rows of a log.csv
DEEPEST = 20  # levels of a record.json
LONGEST, LONGEST_REASON = 4000, 300  # characters of a value, and of what is wrong with a file
# what a file with wrong content can raise
UNUSABLE = (
    ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError, csv.Error,
    yaml.YAMLError,
)  # fmt: skip


def load(path, name, parse, record=None):
    """parse(text) of the file `name`, whose sha256 must be the one in `record`."""
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
    return one_line(error)[:LONGEST_REASON]


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


def parse_config(content):
    """{option: value as text} of a config.yaml."""
    return {
        short(name, "an option"): short(value, name)
        for name, value in folder.parse_options(content).items()
        if value is not None
    }


def short(value, name):
    """A value as text of one line; ValueError where it is too long to be shown."""
    text = one_line(value)
    if len(text) > LONGEST:
        raise ValueError(f"{one_line(name)[:LONGEST_REASON]} has more than {LONGEST} characters")
    return text
