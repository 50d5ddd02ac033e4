"""Fine-tuning: train on, with the few clean pictures the defender holds, and hope that the backdoor is forgotten.

The baseline of every paper. Defaults are the common recipe of the field: SGD 0.01, momentum 0.9, weight decay 5e-4,
batch 256, 100 epochs, cosine schedule, training augmentation, last epoch.

    python defense/ft.py --result_file badnet_cifar10
"""

from dataclasses import dataclass

from utils.config import FineTuning
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(FineTuning):
    batch_size: int = 256
    """images per step"""


if __name__ == "__main__":
    launch(Config)

from functools import partial

from utils import run
from utils.batch import augmentation
from utils.train import fit


def repair(model, record, config):
    return fit(model, record.clean, config, augment=augmentation(record.spec),
               on_epoch=partial(record.report, "finetune"), checkpoint=record.state / "finetune.safetensors")  # fmt: skip


def main(config):
    run.defend(__name__, config, repair)
