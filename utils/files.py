"""Files that are whole or absent: written under a temporary name, flushed to disk, renamed; and
locks on files, which die with their process."""

import csv
import hashlib
import io
import itertools
import json
import math
import os
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from antidote_bench.utils.text import cut

try:
    import fcntl
except ImportError:  # Windows has another one
    fcntl = None
    import msvcrt

MOST_COLUMNS = 1000  # of a CSV file
FORMULA = tuple("=+-@\t\r＝＋－＠")  # what makes a spreadsheet run a cell
# of a YAML file that a user writes: its bytes, and its values when every alias is written out
LARGEST_YAML, MOST_VALUES = 2**20, 10**5
DEEPEST_YAML = 100  # levels of lists and mappings
# libyaml, where PyYAML was built with it, reads ten times as fast
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def write(path, content):
    """Write `content` (str or bytes) to `path` atomically; an OSError leaves the old file as it
    was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def write_once(path, content):
    """The same, but a file that is there already stays, also one that came a moment ago."""
    new = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.new")
    write(new, content)
    try:
        os.link(new, path)
    except FileExistsError:
        pass
    finally:
        new.unlink()


@contextmanager
def locked(path):
    """Lock the file `path` for this process; another one waits, and a killed one releases it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        _lock(file)
        yield


@contextmanager
def owned(path):
    """Hold the file `path` for this process alone, and delete it in the end.

    Raises BlockingIOError at once where another process holds it; a killed one releases it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _lock_now(path)
    try:
        yield
    finally:
        if fcntl:
            path.unlink(missing_ok=True)  # before another process can lock it
        file.close()
        if not fcntl:  # Windows deletes no open file, so not another process's either
            with suppress(OSError):
                path.unlink()


def _lock_now(path):
    """The open file `path`, locked."""
    while True:
        file = open(path, "a")
        try:
            _lock(file, wait=False)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()  # its owner has deleted it in the meantime: lock the new one


def _lock(file, *, wait=True):
    """Lock an open file; BlockingIOError where another process has, and this one shall not wait."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    while True:
        try:
            file.seek(0)  # it locks bytes from there on
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            return
        except OSError as error:
            if not wait:
                raise BlockingIOError(error.errno, "another process has locked it") from error
        time.sleep(0.1)


def write_yaml(path, mapping):
    write(path, yaml.safe_dump(mapping, sort_keys=False))


def read_yaml(path, Loader=YAML_LOADER):
    """What a user's YAML file says.

    Raises OSError where it cannot be read, and ValueError, which says why, where it is no YAML, or
    too large, or expands to too much.
    """
    with open(path, "rb") as file:
        content = file.read(LARGEST_YAML + 1)
    if len(content) > LARGEST_YAML:
        raise ValueError(f"it is larger than {LARGEST_YAML >> 10} KB")
    try:
        root = compose_yaml(content.decode("utf-8-sig"), Loader)
        if _count_values(root, {}) > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES} values")
        return root and Loader("").construct_document(root)
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    # a value that is not of the type that its tag names raises almost anything
    except (yaml.YAMLError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise ValueError(cut(error, 200)) from error


def compose_yaml(text, Loader=YAML_LOADER):
    """The root node of YAML, None where it is empty.

    Raises yaml.YAMLError, and RecursionError above DEEPEST_YAML levels: nodes are composed
    recursively, in libyaml without a check of the stack.
    """
    depth = 0
    for event in yaml.parse(text, Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_YAML:
            raise RecursionError
    return yaml.compose(text, Loader)


def _count_values(node, known):
    """How many values a node of YAML stands for; infinity where it holds itself."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf
        pairs = isinstance(node, yaml.MappingNode)
        children = itertools.chain.from_iterable(node.value) if pairs else node.value
        known[id(node)] = 1 + sum(_count_values(child, known) for child in children)
    return known[id(node)]


def write_json(path, mapping):
    write(path, json.dumps(mapping, indent=1) + "\n")


def csv_text(rows, columns):
    """Rows (dicts) as CSV; a column that a row lacks stays empty. ValueError for one too many.

    No spreadsheet runs a cell of it, and `read_rows` and `read_csv` give back the same texts.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(map(as_cell, columns))
    for row in rows:
        if unknown := row.keys() - set(columns):
            raise ValueError(f"there is no column {min(unknown)!r}")
        table.writerow([as_cell(row.get(name, "")) for name in columns])
    return text.getvalue()


def as_cell(value):
    """A value as a cell that no spreadsheet takes for a formula: an apostrophe stands before such a
    text, and before one that begins with an apostrophe itself."""
    guarded = isinstance(value, str) and (value.startswith("'") or _is_formula(value))
    return f"'{value}" if guarded else value


def from_cell(text):
    """The text that `as_cell` has made a cell of."""
    guarded = isinstance(text, str) and text[:1] == "'" and text[1:].startswith(("'", *FORMULA))
    return text[1:] if guarded else text


def _is_formula(text):
    """Whether a text, which is no number, begins like a formula."""
    try:
        float(text)
    except ValueError:
        return text.startswith(FORMULA)
    return False


def read_rows(file, most):
    """The rows of an open CSV file, column -> text; ValueError where there are more than `most`."""
    reader = csv.DictReader(file)
    if len(reader.fieldnames or ()) > MOST_COLUMNS:
        raise ValueError(f"it has more than {MOST_COLUMNS} columns")
    rows = list(map(_from_cells, itertools.islice(reader, most + 1)))
    if len(rows) > most:
        raise ValueError(f"it has more than {most} row{'s' * (most > 1)}")
    return rows


def read_csv(path):
    """The rows as dicts of strings."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(map(_from_cells, csv.DictReader(file)))


def _from_cells(row):
    return {from_cell(name): from_cell(text) for name, text in row.items()}


def sha256(path):
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):  # Python 3.11
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(file.read()).hexdigest()
