"""Options that several attacks share. Imports no torch."""

import dataclasses
from typing import Literal

from antidote_bench.utils.config import Attack, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanModelOptions(Attack):
    """Options of an attack whose trigger is made with the help of a clean model."""

    clean_record: str | None = None
    """clean model's record, a folder's path or its name below record_path; by default one is
    trained and kept in cache_path"""
    steps: int = option(500, at_least=1)
    """of the search for the pattern"""

    @property
    def needs_clean_model(self):
        """Whether the pattern is made rather than drawn or loaded."""
        made = getattr(self, "pattern", "inverted") == "inverted"
        return made and getattr(self, "trigger_path", None) is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvertedPatternOptions(CleanModelOptions):
    """Options of an attack whose pattern excites neurons of a clean model."""

    pattern: Literal["inverted", "drawn"] = "inverted"
    """inverted: made to excite neurons of a clean model; drawn: seeded noise, which needs no
    model"""
    trigger_path: str | None = None
    """image or .npy array to use as the pattern instead, black where there is none; resized to the
    data set's images"""
