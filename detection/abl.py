"""ABL's isolation: poisoned images are learned faster than clean ones.

Li, Lyu, Koren, Lyu, Li, Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
NeurIPS 2021 (arXiv 2110.11571). A network is trained from scratch on the training set, with losses
that cannot stay below a floor. The score of an image is minus its loss afterwards.

    python detection/abl.py --result_file badnet_cifar10

Deviates in the floor, which is that of each image; see docs/detection/abl.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import FromScratch, option
from antidote_bench.utils.detection.options import DataOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(FromScratch, DataOptions):
    uses_reference: ClassVar[bool] = False
    order_matters: ClassVar[bool] = True  # it is trained on in batches
    copies_recipe: ClassVar[bool] = True
    not_copied: ClassVar[frozenset[str]] = frozenset({"epochs"})
    # what utils/repair/isolation.py reads
    isolate_lr: ClassVar[None] = None

    epochs: int = option(20, at_least=1)
    """epochs on the training set before the losses are ranked; the learning rate stays at --lr"""
    gamma: float = option(0.5, at_least=0)
    """loss below which these epochs push the loss of an image up again"""
    floor: Literal["lga", "flooding"] = "lga"
    """lga: sign(l - gamma) l; flooding: |l - gamma| + gamma. Taken image by image the gradient is
    the same, and so is the result"""
    isolated: float = option(0.05, above=0, at_most=0.5)
    """share of the training set that the paper's own rule flags"""

    @property
    def isolate_epochs(self):
        return self.epochs

    @property
    def prior(self):
        return f"isolated={self.isolated}"


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run
from antidote_bench.utils.detection.inspector import Scored
from antidote_bench.utils.repair.isolation import isolate


def score(model, record, config):
    _, index, losses = isolate(record, config)
    flagged = torch.zeros(len(losses), dtype=torch.bool)
    flagged[index.cpu()] = True
    return Scored(-losses.double(), flagged)


def main(config):
    run.detect(__name__, config, score)
