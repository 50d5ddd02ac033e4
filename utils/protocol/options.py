"""Options of the measures of finished runs. Imports no torch."""

import dataclasses
from typing import ClassVar, Literal

from antidote_bench.utils.config import ReadsRecord, option
from antidote_bench.utils.record.measures import POISONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure(ReadsRecord):
    """Options of every measure."""

    name: ClassVar[str]
    needs_control: ClassVar[bool] = True  # and looks at victims, not at their repairs alone

    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """of training and evaluation; auto: bf16 where the device computes in it"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relearn(Measure):
    """Options of relearning."""

    name: ClassVar[str] = "relearn"

    poisons: int = option(POISONS, at_least=0, unit="images")
    """poisoned images among those that the model is fine-tuned on; tables show 5, and 0 says what
    fine-tuning alone does"""
    random_seed: int = option(0, at_least=0)
    """of the images and of the training; the repeats after the first count on from it"""
    retrained: bool = option(False, identity=False)
    """also make and measure the other control: the victim's recipe and seeds on the training set
    without the images that the attack changed, which takes as long as the attack"""

    @property
    def folder_name(self):
        """The name of a run's folder; tables read the one of the usual dose."""
        dose = "" if self.poisons == POISONS else f"_{self.poisons}"
        return self.save_folder_name or f"{self.name}{dose}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut(Measure):
    """Options of the measures of pruned channels."""

    name: ClassVar[str] = "cut"
    needs_control: ClassVar[bool] = False

    @property
    def folder_name(self):
        """The name of a run's folder."""
        return self.save_folder_name or self.name
