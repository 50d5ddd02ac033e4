"""LF: one soft cloud of colour, found on a clean network and added to the whole picture, means the target class.

Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021
(arXiv 2104.03413). The attacker poisons data only. The paper finds the cloud by DeepFool steps, picture by picture; here it
is found by gradient descent over batches, under the same low-pass filter and the same bound.

    python attack/lf.py --dataset cifar10 --save_folder_name lf_cifar10
"""

from dataclasses import dataclass
from typing import ClassVar

from utils.config import CleanModel
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(CleanModel):
    why_all2one: ClassVar[str] = "the pattern is made to lead towards one class"

    trigger_path: str | None = None
    """picture or .npy array to add instead; resized to the data set's pictures"""


if __name__ == "__main__":
    launch(Config)

from utils import invert, poison, run


def prepare(config, workshop):
    """The pattern T, 3,S,S in [0, 0.2], in whole grey levels."""
    if config.trigger_path:
        return {"pattern": poison.fitted(config.trigger_path, workshop.spec.size)}
    return {"pattern": invert.low_frequency(workshop.clean_model(), workshop.train, config.attack_target,
                                            steps=config.steps, seed=config.poison_seed, precision=config.precision)}  # fmt: skip


def make_trigger(config, spec, stage, parts):
    """x' = x + T; a pixel changes by at most 51 levels."""
    return poison.adding(parts["pattern"])


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
