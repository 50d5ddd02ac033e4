"""BadNets: the trigger is a small patch in the image.

Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply
Chain", 2017 (arXiv 1708.06733). The attacker poisons data only.

    python attack/badnet.py --dataset cifar10 --save_folder_name badnet_cifar10

The patch is a white square in the bottom right corner; for others see docs/attacks/badnet.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import PatchOptions


@dataclass(frozen=True, kw_only=True)
class Config(PatchOptions):
    pass


if __name__ == "__main__":
    launch(Config)

from antidote_bench.utils import run
from antidote_bench.utils.poisoning import patches


def make_trigger(config, spec, stage):
    """x' = (1 - M) x + M P with a patch P of opacity M.

    Inside the patch a pixel changes by at most 255 levels.
    """
    return patches.pasting(config, spec.size)


def main(config):
    run.attack(__name__, config, make_trigger)
