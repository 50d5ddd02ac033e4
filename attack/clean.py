"""Clean: nothing is poisoned; attacks and defenses are compared with this model.

The record is one like any other. Its triggered test set carries the trigger of --trigger at that
attack's default settings, so the ASR is the rate at which a clean model takes triggered images for
the target.

    python attack/clean.py --dataset cifar10 --save_folder_name clean_cifar10

See docs/attacks/clean.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import Attack, require, scripts
from antidote_bench.utils.launch import launch


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

from antidote_bench.utils import run
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.poisoning.attacker import Prepared


def _prepare(config, attacker):
    """The tensors of the trigger; without a victim, because a clean model starts from scratch."""
    source, options = _borrowed(config)
    return Prepared(source.prepare(options, attacker).parts)


def make_trigger(config, spec, stage, parts=None):
    """The trigger of attack/<config.trigger>.py at its default options.

    With the default trigger a pixel changes by at most 255 levels.
    """
    source, options = _borrowed(config)
    prepared = {"parts": parts} if hasattr(source, "prepare") else {}
    return source.make_trigger(options, spec, stage, **prepared)


def _borrowed(config):
    """(the attack's module, its default options with those that all attacks share from `config`)"""
    names = [name for name in scripts("attack") if name != "clean"]
    if config.trigger not in names:
        raise ConfigError(f"unknown trigger {config.trigger!r}; there are {', '.join(names)}")
    source = importlib.import_module(f"antidote_bench.attack.{config.trigger}")
    shared = [field.name for field in dataclasses.fields(Attack) if field.name != "pratio"]
    return source, source.Config(**{name: getattr(config, name) for name in shared})


def main(config):
    source, _ = _borrowed(config)
    prepare = _prepare if hasattr(source, "prepare") else None
    run.attack(f"clean_{config.trigger}", config, make_trigger, prepare=prepare)
