"""Attacks, defenses and detectors from Python: the code, options and folders of the scripts."""

import dataclasses
from pathlib import Path

import pandas

from antidote_bench import catalogue, models
from antidote_bench.records import Record, Repaired, detections, load
from antidote_bench.utils import config, parsing
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.record import folder as layout

# options of the command line that have no meaning here
ONLY_SCRIPTS = {"help", "print_config", "dry_run", "debug"}
# options of an attack, or of `load`, that say where things are and how to compute
SHARED = (
    "dataset_path", "cache_path", "device", "precision", "resident_gb", "allow_other_data",
    "model_file",
)  # fmt: skip


def run_attack(name: str, **options) -> Record:
    """Do what `python attack/<name>.py` does with the `options`, and load the record.

    Poisons a data set, trains the victim and saves the record. With the same options an interrupted
    run is resumed, and a finished one is loaded. Raises a subclass of UserError, whose one sentence
    says what is wrong.
    """
    module, parsed = options_for("attack", name, options)
    own = f"clean_{parsed.trigger}" if name == "clean" else name
    folder = parsed.save_folder_name or f"{own}_{parsed.dataset}"
    module.main(dataclasses.replace(parsed, save_folder_name=folder))
    places = {key: getattr(parsed, key) for key in SHARED if hasattr(parsed, key)}
    if models.is_file(parsed.model):
        places["model_file"] = parsed.model
    return load(Path(parsed.record_path, folder), **places)


def run_defense(record: Record | str | Path, name: str, **options) -> Repaired:
    """Do what `python defense/<name>.py --result_file <record>` does with the `options`.

    Where the data set lies, the device and the precision are those that the record was loaded with,
    unless `options` say otherwise. The defense gets the victim, its clean images and the training
    set as it was found, and no test image. Raises a subclass of UserError.
    """
    record, folder = _run_on(record, "defense", name, options)
    return record.repaired(folder)


def run_detector(record: Record | str | Path, name: str, **options) -> pandas.Series:
    """Do what `python detection/<name>.py --result_file <record>` does; the row of its results.csv.

    `options` and errors are as for a defense. The detector never learns what is poisoned.
    """
    record, folder = _run_on(record, "detection", name, options)
    return detections(record.path / layout.DETECTIONS / folder).iloc[0]


def _run_on(record, kind, name, options):
    """(the record, the name of the folder that the finished run has left in it)"""
    if not isinstance(record, Record):
        known = {field.name for field in dataclasses.fields(config.Defense)}
        record = load(record, **{key: value for key, value in options.items() if key in known})
    told = {key: getattr(record.settings, key) for key in SHARED}
    # defaults are left out: a file of options may say otherwise
    given = {
        key: value for key, value in told.items() if value != config.default_of(config.Defense, key)
    }
    given |= {**options, "result_file": record.path}
    module, parsed = options_for(kind, name, given)
    folder = parsed.save_folder_name or name
    module.main(dataclasses.replace(parsed, save_folder_name=folder))
    return record, folder


def options_for(kind, name, options):
    """(the module of a script, its options as the command line would give them)"""
    module = catalogue.module(kind, name)
    for word in options:
        if word in ONLY_SCRIPTS:
            raise ConfigError(f"{word} is an option of the command line and has no effect here")
    words = parsing.words(options)
    return module, parsing.parse(module.Config, words, script=f"{kind}/{name}.py")
