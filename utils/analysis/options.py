"""Options of the scripts in analysis/. Imports no torch."""

import dataclasses
from pathlib import Path
from typing import Literal

from antidote_bench.utils.config import Common, option, require
from antidote_bench.utils.record import folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis(Common):
    """Options of every analysis."""

    result_file: str = option(identity=False)
    """record to look at: a folder's path, or its name below record_path"""
    defense: str | None = option(None, identity=False)
    """finished defense of the record, whose model is shown beside the victim: the name of its
    folder, ft say"""
    output: str | None = option(None, identity=False)
    """folder for the picture and its numbers; by default analysis/ in the record"""
    dataset_path: str | None = option(None, identity=False)
    """where the record's data set lies; by default where the attack found it"""
    allow_other_data: bool = option(False, identity=False)
    """use a record although the data set here has other pixels than the one it was made on"""
    model_file: str | None = option(None, identity=False)
    """path/to/file.py:function of the record's model, where that is one from a file: it is executed
    only if you name it"""
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
