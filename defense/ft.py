"""FT: fine-tune the victim on the few clean images that the defender holds.

The network may forget the backdoor when it trains on without the trigger. FT has no paper of its
own: it is the baseline of nearly all of them.

    python defense/ft.py --result_file badnet_cifar10

Deviates from no paper: the defaults are the common recipe of the field; see docs/defenses/ft.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import FineTuningOptions


@dataclass(frozen=True, kw_only=True)
class Config(FineTuningOptions):
    batch_size: int = 256
    """images per step"""


if __name__ == "__main__":
    launch(Config)

from functools import partial

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import augmentation
from antidote_bench.utils.train import Recipe, fit


def repair(model, record, config):
    return fit(
        model,
        record.clean,
        Recipe.of(config),
        augment=augmentation(record.spec),
        on_epoch=partial(record.report, "finetune"),
        checkpoint=record.state / "finetune.safetensors",
    )


def main(config):
    run.defend(__name__, config, repair)
