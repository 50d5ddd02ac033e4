"""Options that several attacks share. Imports no torch."""

import dataclasses
from typing import Literal

from antidote_bench.utils.config import Attack, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanRecordOptions(Attack):
    """Options of an attack whose trigger is made with the help of a clean model."""

    clean_record: str | None = None
    """clean model's record, a folder's path or its name below record_path; by default one is
    trained and kept in cache_path"""

    @property
    def needs_clean_model(self):
        """Whether the pattern is made rather than drawn or loaded."""
        made = getattr(self, "pattern", "inverted") == "inverted"
        return made and getattr(self, "trigger_path", None) is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanModelOptions(CleanRecordOptions):
    """Options of an attack that searches for a pattern with the help of a clean model."""

    steps: int = option(500, at_least=1)
    """of the search for the pattern"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvertedPatternOptions(CleanModelOptions):
    """Options of an attack whose pattern excites neurons of a clean model."""

    pattern: Literal["inverted", "drawn"] = "inverted"
    """inverted: made to excite neurons of a clean model; drawn: seeded noise, which needs no
    model"""
    trigger_path: str | None = None
    """image or .npy array to use as the pattern instead, black where there is none; resized to the
    data set's images"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchOptions(Attack):
    """Options of an attack whose trigger is a small patch; patches.pasting makes it."""

    patch: Literal["square", "grid"] = option("square", needs={"trigger_path": None})
    """square of one grey level, or 3x3 grid of black and white"""
    patch_size: int | None = option(None, needs={"trigger_path": None}, at_least=1, unit="pixels")
    """side of the patch in pixels; by default 3 at 32x32 and in proportion at other sizes"""
    patch_value: int = option(
        255, needs={"patch": "square", "trigger_path": None}, at_least=0, at_most=255
    )
    """grey level of the square; 0 is black, 255 white"""
    patch_row: int | None = None
    """top row of the patch, negative from the bottom; by default it touches the bottom"""
    patch_column: int | None = None
    """left column of the patch, negative from the right; by default it touches the right"""
    trigger_path: str | None = None
    """image or .npy array to paste instead of the square; an alpha channel is its opacity"""
