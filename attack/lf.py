"""LF: one smooth cloud of colour, found on a clean model and added to an image, means the target.

Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV
2021 (arXiv 2104.03413). The pattern has low frequencies only, as images do.

    python attack/lf.py --dataset cifar10 --save_folder_name lf_cifar10

Gradient descent finds the pattern here, DeepFool in the paper: see docs/attacks/lf.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import CleanModelOptions


@dataclass(frozen=True, kw_only=True)
class Config(CleanModelOptions):
    refused_modes: ClassVar[dict[str, str]] = {
        "all2all": "the pattern is made to lead towards one class"
    }

    trigger_path: str | None = None
    """image or .npy array to add instead; resized to the data set's images"""


if __name__ == "__main__":
    launch(Config)

from antidote_bench.utils import run
from antidote_bench.utils.poisoning import inversion, poison
from antidote_bench.utils.poisoning.attacker import Prepared


def prepare(config, attacker):
    """The pattern T, 3,S,S in [0, 0.2], in whole grey levels."""
    if config.trigger_path:
        pattern = poison.resized_pattern(config.trigger_path, attacker.spec.size)
        return Prepared({"pattern": pattern})
    pattern = inversion.low_frequency(
        attacker.clean_model(),
        attacker.train,
        config.attack_target,
        steps=config.steps,
        seed=config.poison_seed,
        precision=config.precision,
    )
    return Prepared({"pattern": pattern})


def make_trigger(config, spec, stage, parts):
    """x' = x + T; a pixel changes by at most 51 levels."""
    return poison.adding(parts["pattern"])


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
