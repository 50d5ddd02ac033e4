"""Antidote: backdoor attacks on image classifiers, and the defenses against them.

In a checkout the folders attack/, defense/, detection/, models/ and utils/ stand beside this one
and are parts of this package; in a wheel they lie in it.

What is listed in `__all__` is for notebooks and other programs. It is loaded on first use, so that
importing the package takes no time. docs/python.md shows all of it.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from antidote_bench import hub
    from antidote_bench.catalogue import list_attacks, list_defenses, list_detectors, list_models
    from antidote_bench.records import (
        Measures,
        Record,
        Repaired,
        detections,
        evaluate,
        load,
        results,
    )
    from antidote_bench.runs import run_attack, run_defense, run_detector
    from antidote_bench.triggers import Trigger, trigger
    from antidote_bench.utils.data.dataset import Split
    from antidote_bench.utils.errors import ConfigError, MissingError, RefusedError, UserError
    from antidote_bench.utils.evaluation import TestSets

__all__ = [
    "ConfigError",
    "Measures",
    "MissingError",
    "Record",
    "RefusedError",
    "Repaired",
    "Split",
    "TestSets",
    "Trigger",
    "UserError",
    "detections",
    "evaluate",
    "hub",
    "list_attacks",
    "list_defenses",
    "list_detectors",
    "list_models",
    "load",
    "results",
    "run_attack",
    "run_defense",
    "run_detector",
    "trigger",
]

_PLACES = {
    "catalogue": ("list_attacks", "list_defenses", "list_detectors", "list_models"),
    "records": ("Measures", "Record", "Repaired", "detections", "evaluate", "load", "results"),
    "runs": ("run_attack", "run_defense", "run_detector"),
    "triggers": ("Trigger", "trigger"),
    "utils.data.dataset": ("Split",),
    "utils.errors": ("ConfigError", "MissingError", "RefusedError", "UserError"),
    "utils.evaluation": ("TestSets",),
}
_HOMES = {name: module for module, names in _PLACES.items() for name in names}

_here = Path(__file__).resolve().parent
if not (_here / "utils").is_dir():
    __path__.append(str(_here.parent))


def __getattr__(name):
    if name == "__version__":
        return importlib.import_module(f"{__name__}.utils").VERSION
    if name == "hub":
        return importlib.import_module(f"{__name__}.hub")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__, "__version__"])
