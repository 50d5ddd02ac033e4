"""Clean: no poison at all, the model that every attack and every defense is measured against.

The record is one like any other. Its triggered test set carries the trigger of --trigger at that attack's default
settings, so ASR is the rate at which a harmless model takes triggered pictures for the target.

    python attack/clean.py --dataset cifar10 --save_folder_name clean_cifar10
"""

from dataclasses import dataclass

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    pratio: float = 0.0
    """always 0: nothing is poisoned"""
    trigger: str = "badnet"
    """attack whose trigger the test set carries"""

    def __post_init__(self):
        super().__post_init__()
        require(self.pratio == 0, "pratio", "0 for the clean model")


if __name__ == "__main__":
    launch(Config)

import dataclasses
import importlib
from pathlib import Path

from utils import record, run
from utils.errors import ConfigError


def make_trigger(config, spec, stage, parts=None):
    """The trigger of attack/<config.trigger>.py at its default options; by default a pixel changes by at most 255 levels."""
    source, options = _borrowed(config)
    return source.make_trigger(options, spec, stage, *([parts] if hasattr(source, "prepare") else []))


def _prepare(config, workshop):
    source, options = _borrowed(config)
    parts = source.prepare(options, workshop)
    return {name: part for name, part in parts.items() if not name.startswith(record.START)}  # the clean model starts anew


def _borrowed(config):
    """(module of the attack, its default options with this run's seed and target)"""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem != "clean")
    if config.trigger not in names:
        raise ConfigError(f"unknown trigger {config.trigger!r}; there are {', '.join(names)}")
    source = importlib.import_module(f"attack.{config.trigger}")
    common = {field.name: getattr(config, field.name) for field in dataclasses.fields(Attack) if field.name != "pratio"}
    return source, source.Config(**common)


def main(config):
    prepare = _prepare if hasattr(_borrowed(config)[0], "prepare") else None
    run.attack(f"clean_{config.trigger}", config, make_trigger, prepare=prepare)
