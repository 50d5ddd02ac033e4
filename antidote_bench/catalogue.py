"""What there is: attacks, defenses, detectors and models, with the facts to choose them by."""

import dataclasses
import difflib
import importlib
import re
from typing import get_args, get_type_hints

import pandas

from antidote_bench import models
from antidote_bench.utils import config
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.poisoning.options import CleanRecordOptions


def list_attacks(**facts) -> pandas.DataFrame:
    """All attacks: `idea`, `arxiv` (number of the paper), `clean_label` (labels stay true),
    `all2all` (whether every class can have a target of its own), `one2one` (whether the trigger can
    be for one class alone) and `uses_clean_model`.

    Only those that have the `facts`, list_attacks(clean_label=True) say.
    """
    return _listed("attack", _facts_of_attack, facts)


def list_defenses(**facts) -> pandas.DataFrame:
    """All defenses: `idea`, `arxiv`, `stage` (repair or in-training), `needs_clean_images`,
    `needs_training_set` (the poisoned one), `selection` (how settings are chosen) and `prior` (what
    the defender is assumed to know).

    Only those that have the `facts`, list_defenses(needs_clean_images=False) say.
    """
    return _listed("defense", _facts_of_defense, facts)


def list_detectors(**facts) -> pandas.DataFrame:
    """All detectors: `idea`, `arxiv`, `judges` (data, input or model, or several where it is an
    option), `needs_clean_images` and `needs_training_set`.

    Only those that have the `facts`, list_detectors(judges="model") say.
    """
    return _listed("detection", _facts_of_detector, facts)


def list_models(**facts) -> pandas.DataFrame:
    """All networks with a name of their own: `source` (antidote or torchvision), `default_width`
    where the width can be chosen, and `smallest_image`, a side in pixels.

    Only those that have the `facts`, list_models(source="torchvision") say.
    """
    columns = ["source", "default_width", "smallest_image"]
    rows = {
        name: {
            "source": "torchvision" if name in models.TORCHVISION else "antidote",
            "default_width": models.DEFAULT_WIDTH.get(name),
            "smallest_image": models.SMALLEST.get(name, models.LEAST_SIDE),
        }
        for name in models.names()
    }
    frame = _framed(rows, columns).astype({"default_width": "Int64"})
    return _having(frame, facts)


def module(kind: str, name: str):
    """The module of a script; ConfigError where there is none of that name."""
    known = config.scripts(kind)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}? there are " if near else "there are "
        what = {"detection": "detector"}.get(kind, kind)
        raise ConfigError(f"unknown {what} {name!r}; {hint}{', '.join(known)}")
    return importlib.import_module(f"{config.PACKAGE}.{kind}.{name}")


def _listed(kind, facts_of, facts):
    rows = {}
    for name in config.scripts(kind):
        script = module(kind, name)
        paper = re.search(r"arXiv\s+(\d{4}\.\d{4,5})", script.__doc__)
        about = {
            "idea": script.__doc__.partition("\n")[0].partition(": ")[2],
            "arxiv": paper[1] if paper else None,
        }
        rows[name] = about | facts_of(script.Config)
    return _having(_framed(rows, ["idea", "arxiv", *facts_of(None)]), facts)


def _facts_of_attack(Config):
    Config = Config or config.Attack
    refused = {"all2all", "one2one"} if Config.clean_label else set(Config.refused_modes)
    return {
        "clean_label": Config.clean_label,
        "all2all": "all2all" not in refused,
        "one2one": "one2one" not in refused,
        "uses_clean_model": issubclass(Config, CleanRecordOptions),
    }


def _facts_of_defense(Config):
    options = (Config or config.Defense)(result_file="")
    return {
        "stage": options.stage,
        "needs_clean_images": options.holds_clean,
        "needs_training_set": options.needs_train_set or options.stage == "in-training",
        "selection": options.selection,
        "prior": options.prior,
    }


def _facts_of_detector(Config):
    Config = Config or config.Detection
    options = Config(result_file="")
    choices = get_args(get_type_hints(Config)["judges"]) if "judges" in _options(Config) else ()
    return {
        "judges": ", ".join(choices) or options.judges,
        "needs_clean_images": options.holds_clean,
        "needs_training_set": options.needs_train_set,
    }


def _options(Config):
    return {field.name for field in dataclasses.fields(Config)}


def _framed(rows, columns):
    frame = pandas.DataFrame.from_dict(rows, orient="index", columns=columns)
    return frame.rename_axis("name")


def _having(frame, facts):
    """The rows of a frame that have the facts; ConfigError for a fact that it has no column of."""
    for name, value in facts.items():
        if name not in frame:
            raise ConfigError(f"unknown fact {name!r}; there are {', '.join(frame)}")
        frame = frame[[each == value or value in str(each).split(", ") for each in frame[name]]]
    return frame
