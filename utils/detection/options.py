"""Options of the kinds of detectors. Imports no torch."""

import dataclasses
from typing import ClassVar

from antidote_bench.utils.config import Detection, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(Detection):
    """Options of a detector that says which images of the training set are poisoned."""

    judges: ClassVar[str] = "data"

    nominal_fpr: float = option(0.05, above=0, below=1)
    """share of clean images that may be flagged by mistake; clean images that the method does not
    see set the threshold by it"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputOptions(DataOptions):
    """Options of a detector that says which of the images that a model is given are triggered."""

    judges: ClassVar[str] = "input"

    inputs: int = option(1000, at_least=1, unit="images")
    """how many clean test images are judged, and how many triggered ones"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(Detection):
    """Options of a detector that says whether a model holds a backdoor."""

    judges: ClassVar[str] = "model"
