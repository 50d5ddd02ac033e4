"""Options of the kinds of detectors. Imports no torch."""

import dataclasses
from typing import ClassVar

from antidote_bench.utils.config import Detection, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(Detection):
    """Options of a detector that says which images of the training set are poisoned."""

    judges: ClassVar[str] = "data"
    sample: ClassVar[int | None] = None  # images of the training set that are judged; None: all

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
class SearchOptions:
    """Options of Neural Cleanse's search for the trigger of each class, in triggers.py."""

    search_epochs: int = option(80, at_least=1)
    """epochs on the clean images, at most, in which the trigger of a class is searched"""
    search_batch: int = option(32, at_least=1, unit="images")
    """images per step of the search"""
    together: int = option(10, identity=False, at_least=1, unit="classes")
    """classes whose triggers are searched at once; changes speed and memory only"""
    search_lr: float = option(0.1, above=0)
    """learning rate of the search"""
    penalty: float = option(1e-3, above=0)
    """lambda, weight of the mask's size, at the start of the search"""
    goal: float = option(0.98, above=0, at_most=1)
    """share of the images that a trigger must lead to its class"""
    threshold: float = option(2.0, at_least=0)
    """anomaly index above which the paper's own rule takes a small trigger for a backdoor"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(Detection):
    """Options of a detector that says whether a model holds a backdoor."""

    judges: ClassVar[str] = "model"
    in_float32: ClassVar[bool] = True
