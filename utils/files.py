"""Files that are whole or absent: written under a temporary name, flushed to disk, renamed."""

import csv
import hashlib
import io
import itertools
import json
import os
from contextlib import contextmanager
from pathlib import Path

import yaml

try:
    import fcntl
except ImportError:  # Windows has none: two runs at once are then the user's care
    fcntl = None

MOST_COLUMNS = 1000  # of a CSV file


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
    """Lock the file `path` for this process; another one waits, and a killed one releases it.

    Yields the open file: a child process that inherits it holds the lock too.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


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
        path.unlink(missing_ok=True)
        file.close()


def _lock_now(path):
    """The open file `path`, locked."""
    while True:
        file = open(path, "a")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()  # its owner has deleted it in the meantime: lock the new one


def write_yaml(path, mapping):
    write(path, yaml.safe_dump(mapping, sort_keys=False))


def write_json(path, mapping):
    write(path, json.dumps(mapping, indent=1) + "\n")


def csv_text(rows, columns):
    """Rows (dicts) as CSV; a column that a row lacks stays empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def read_rows(file, most):
    """The rows of an open CSV file, column -> text; ValueError where there are more than `most`."""
    reader = csv.DictReader(file)
    if len(reader.fieldnames or ()) > MOST_COLUMNS:
        raise ValueError(f"it has more than {MOST_COLUMNS} columns")
    rows = list(itertools.islice(reader, most + 1))
    if len(rows) > most:
        raise ValueError(f"it has more than {most} row{'s' * (most > 1)}")
    return rows


def read_csv(path):
    """The rows as dicts of strings."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def sha256(path):
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):  # Python 3.11
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(file.read()).hexdigest()
