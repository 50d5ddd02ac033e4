"""Options of the scripts in analysis/. Imports no torch."""

import dataclasses
from pathlib import Path
from typing import Literal

from antidote_bench.utils.config import ReadsRecord, option, require
from antidote_bench.utils.record import folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis(ReadsRecord):
    """Options of every analysis."""

    result_file: str = option(identity=False)
    """record to look at: a folder's path, or its name below record_path"""
    defense: str | None = option(None, identity=False)
    """finished defense of the record, whose model is shown beside the victim: the name of its
    folder, ft say"""
    output: str | None = option(None, identity=False)
    """folder for the picture and its numbers; by default analysis/ in the record"""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """of the passes through a network; auto: bf16 where the device computes in it"""
    random_seed: int = option(0, at_least=0)
    """of the choice of images, and of the layout of a picture"""

    @property
    def record(self):
        """Path of the record's folder; MissingError (exit 3) where there is none."""
        return folder.find(self.result_file, self.record_path)

    def __post_init__(self):
        super().__post_init__()
        name = self.defense
        plain = name is None or (name == Path(name).name and name not in ("", ".", ".."))
        require(plain, "defense", "the name of a folder in defense/ of the record, ft say")
