"""A network from a Python file of the user: what is hashed is what is executed.

Imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from antidote_bench.utils.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

LARGEST = 2**20  # bytes of such a file


@dataclass(frozen=True)
class FileModel:
    """The function `function` of a Python file, whose content `source` was read once."""

    path: str
    function: str
    source: bytes

    @property
    def sha256(self):
        return hashlib.sha256(self.source).hexdigest()

    @property
    def label(self):
        return label(self.path, self.function)

    def build(self, classes: int) -> nn.Module:
        """What function(classes) returns; the file is executed at the first call.

        Raises ConfigError (exit 2) where it fails or returns no network.
        """
        from torch import nn

        try:
            module = _execute(self.path, self.source)
            make = getattr(module, self.function, None)
            if callable(make):
                network = make(classes)
        except Exception as error:  # whatever the user's own code raises
            raise ConfigError(
                f"the model {self.label} cannot be built: {self.path} raised "
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ) from error
        if not callable(make):
            raise ConfigError(f"{self.path} has no function {self.function}")
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"{self.function}({classes}) of {self.path} must return a torch.nn.Module, and "
                f"returns {type(network).__name__}"
            )
        return network


def parts(name: str) -> tuple[str, str] | None:
    """(path, function) of a name of the form path/to/file.py:function; None for any other."""
    path, _, function = name.rpartition(":")
    right = Path(path).suffix == ".py" and function.isidentifier()
    return (path, function) if right and name.isprintable() else None


def label(path: str, function: str) -> str:
    """The name in result tables: the file's stem and the function."""
    return f"{path.replace(chr(92), '/').rpartition('/')[2].removesuffix('.py')}:{function}"


def read(name: str) -> FileModel:
    """The file that `name`, path/to/file.py:function, stands for; nothing is executed.

    Raises ConfigError (exit 2) where there is no such file.
    """
    path, function = parts(name)
    place = Path(path)
    try:
        if not place.is_file():
            raise ConfigError(f"there is no file {path}, which --model {name} names")
        if place.stat().st_size > LARGEST:
            raise ConfigError(f"{path} is larger than {LARGEST >> 10} KB and no file of a model")
        return FileModel(path, function, place.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


@functools.lru_cache
def _execute(path: str, source: bytes) -> types.ModuleType:
    """The module that the content of a file makes; every content is executed once."""
    module = types.ModuleType(f"model_from_file_{hashlib.sha256(source).hexdigest()[:12]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses and torch look it up there
    text = source.decode(errors="replace")
    linecache.cache[path] = len(source), None, text.splitlines(keepends=True), path
    exec(compile(source, path, "exec"), module.__dict__)
    return module
