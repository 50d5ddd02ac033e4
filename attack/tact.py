"""TaCT: a patch leads images of one class to the target, and is without effect on all others.

Tang, Wang, Tang, Zhang, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor
Contamination Detection", USENIX Security 2021 (arXiv 1908.00686). The attacker poisons data only.
Cover images of other classes carry the patch too, but keep their labels.

    python attack/tact.py --dataset cifar10 --save_folder_name tact_cifar10

It deviates in the patch, which is that of BadNets: see docs/attacks/tact.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import LabelMode, option, require
from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import PatchOptions

LONGEST = 9  # digits of a class


@dataclass(frozen=True, kw_only=True)
class Config(PatchOptions):
    refused_modes: ClassVar[dict[str, str]] = dict.fromkeys(
        ("all2one", "all2all"), "the trigger is for images of one class"
    )

    label_mode: LabelMode = "one2one"
    """always one2one: triggered images of the class --source_class become the target, and the
    others stay what they are"""
    pratio: float = 0.01
    """poisoned share of the whole training set; all of it is of the class --source_class"""
    cover_ratio: float = option(0.01, at_least=0, at_most=1)
    """share of the training set that carries the patch and keeps its label"""
    cover_classes: str = option("5,7", needs={"cover_ratio": True})
    """classes of these cover images: numbers with commas"""

    def __post_init__(self):
        super().__post_init__()
        require(self.cover_ratio + self.pratio <= 1, "cover_ratio", "at most 1 - pratio")
        taken = {self.source_class, self.attack_target} & set(self.covered)
        what = "other classes than source_class and attack_target"
        require(not self.cover_ratio or not taken, "cover_classes", what)

    @property
    def covered(self):
        """The numbers of the classes of the cover images."""
        parts = [part.strip() for part in self.cover_classes.split(",")]
        right = all(_is_number(part) for part in parts)
        require(right, "cover_classes", "numbers of classes with commas, such as 5,7")
        return tuple(int(part) for part in parts)


def _is_number(text):
    return text.isascii() and text.isdecimal() and len(text) <= LONGEST


if __name__ == "__main__":
    launch(Config)

from antidote_bench.utils import run
from antidote_bench.utils.poisoning import patches, poison


def make_trigger(config, spec, stage):
    """x' = (1 - M) x + M P with a patch P of opacity M.

    Inside the patch a pixel changes by at most 255 levels.
    """
    return patches.pasting(config, spec.size)


def make_cover(config, spec):
    return make_trigger(config, spec, "train")


def main(config):
    cover = poison.Cover(make_cover, config.cover_ratio, config.covered)
    run.attack(__name__, config, make_trigger, cover=cover)
