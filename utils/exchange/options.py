"""Options of convert.py. Imports no torch."""

import dataclasses
from types import ModuleType
from typing import ClassVar, Literal

from antidote_bench.utils.config import CHANGED, Attack, LabelMode, ReadsRecord, option, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported(Attack):
    """Options of a victim that was trained elsewhere.

    They are those of an attack, so that a defense finds in the record what it takes over from a
    victim: say how it was trained (--lr, --batch_size, ...) as far as it is known.
    """

    trained_here: ClassVar[bool] = False
    pratio: ClassVar[None] = None  # no option here: poisoned_share says what is known of it

    source: str = option(identity=False)
    """what is imported; the first word after the name of the command is the same"""
    digest: str | None = None
    """first 12 hexadecimal digits of the sha256 of the file with the weights; an import of another
    file is refused. By default they are measured and kept in the record"""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """of the measurement; auto: bf16 where the device computes in it"""
    poisoned_share: float | None = option(None, at_least=0, at_most=1)
    """poisoned share of the training set, if it is known; 0 for a benign model"""

    def __post_init__(self):
        super().__post_init__()
        require_digest(self.digest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled:
    """Options where the labels of triggered images say what the attack is after; they replace those
    of an attack."""

    attack_target: int | None = option(None, at_least=0, needs={})
    """class that triggered images shall be taken for, as a number; the labels of the triggered test
    images say it, and another one is refused"""
    label_mode: LabelMode | None = None
    """all2one: every triggered image becomes the target; all2all: class y becomes y+1; one2one:
    triggered images of one class become the target. It is found in the same way"""
    source_class: int | None = option(
        None, identity=CHANGED, at_least=0, needs={"label_mode": "one2one"}
    )
    """class of the triggered images, as a number, where all of them are of one (one2one); it is
    found in the same way"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromWeights(Imported):
    attack_module: ClassVar[ModuleType | None] = None  # of the attack that --trigger names

    trigger: str | None = None
    """attack whose trigger the model knows; the options of that attack are then options here. By
    default no trigger is known, and ASR and RA stay empty"""
    triggered_path: str | None = option(None, identity=False, needs={"trigger": None})
    """folder of triggered test images instead: <true class>/<position in the test set>.png, where
    the class is a number"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromBackdoorBench(Labelled, Imported):
    source: str = option(identity=False)
    """folder of BackdoorBench's record/ with attack_result.pt, or one of a defense below it with
    defense_result.pt; the first word after the name of the command is the same"""
    attack: str | None = None
    """name of the attack, which attack_result.pt does not say; by default the name of an attack
    that the folder's name contains"""
    dataset: str | None = None
    """data set as it is called here; by default the one that the record names"""
    model: str | None = None
    """architecture as it is called here; by default the one that the record names"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromImages(Labelled, Attack):
    source: str = option(identity=False)
    """folder with images.csv, as to-images writes it; the first word after the name of the command
    is the same"""
    digest: str | None = None
    """first 12 hexadecimal digits of the sha256 of images.csv; a training on another list is
    refused. By default they are measured and kept in the record"""
    pratio: float | None = option(None, identity=False, at_least=0, at_most=1)
    """leave it out: images.csv says what is poisoned"""

    def __post_init__(self):
        super().__post_init__()
        require_digest(self.digest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(ReadsRecord):
    """Options of what leaves a record."""

    result_file: str = option(identity=False)
    """record to export: a folder's path, or its name below record_path; the first word after the
    name of the command is the same"""
    output: str = option(identity=False)
    """folder to write, which must not exist yet"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToImages(Export):
    only_changed: bool = option(False, identity=False)
    """write only the training images that were changed and the triggered test images, which are
    enough for from-images where the data set is there"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToBackdoorBench(Export):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToTrojai(Export):
    result_file: str = option(identity=False)
    """record to export, or a folder of records: its path, or its name below record_path; the first
    word after the name of the command is the same"""
    examples: int = option(2, identity=False, at_least=1)
    """test images of every class that go with a model"""


def require_digest(digest):
    """ConfigError unless `digest` has the form of one, or is None."""
    right = digest is None or len(digest) == 12 and set(digest) <= set("0123456789abcdef")
    require(right, "digest", "12 hexadecimal digits in lower case")
