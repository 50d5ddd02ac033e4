"""Finished runs: found in their folders, and read with every checksum compared."""

import csv
import io
import json
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

from utils.config import NOT_IDENTITY, SEEDS
from utils.errors import RefusedError
from utils.record import folder

METRICS = ("acc", "asr", "ra")
TABLE = ("dataset", "model", "recipe", "precision")
# Results that keep runs apart as options do; a label shows them where the options do not suffice.
OF_ATTACK = ("label_mode", "n_test")
OF_DEFENSE = ("stage", "selection", "prior", "clean_budget", "recipe")
NEEDED = {*TABLE, *METRICS, *OF_ATTACK, *OF_DEFENSE, "attack", "defense", "variant", "seconds"}
NONE = ("none", ())
# options that change no result; the last two are of single defenses, which nothing here may import
UNSHOWN = NOT_IDENTITY | {"score_batch", "together"}


@dataclass(frozen=True)
class Run:
    """A finished run; `victim` is the attack run that a defense repaired, None for an attack."""

    path: Path
    row: dict  # results.csv: column -> text
    numbers: dict  # acc, asr, ra (fractions) and seconds; None: not applicable
    config: dict  # option -> text
    record: dict  # record.json
    victim: "Run | None"

    @property
    def attack(self):
        return self.victim or self

    @property
    def clean(self):
        """Whether nothing was poisoned; a row that does not say how much is told by its name."""
        try:
            return float(self.row["n_poison"]) == 0
        except (KeyError, ValueError):
            return self.row["attack"] == "clean" or self.row["attack"].startswith("clean_")

    @property
    def weights(self):
        return self.record["files"].get(folder.WEIGHTS)


def find_runs(folders):
    """Every folder at or below `folders` with a run, finished or not; each once, links followed."""
    seen, runs = set(), []

    def unreadable(error):
        runs.append(Path(error.filename))

    for top in folders:
        for path, inside, files in os.walk(top, followlinks=True, onerror=unreadable):
            new = (real := os.path.realpath(path)) not in seen
            if new and (folder.STATE in inside or {folder.RESULTS, folder.RECORD} & set(files)):
                runs.append(Path(path))
            inside[:] = sorted(set(inside) - {folder.STATE}) if new else []
            seen.add(real)
    return runs


def read_run(path, known):
    """The run in a folder; RefusedError says what is wrong with it.

    `known` holds the runs that were read before: {absolute path: run}.
    """
    record = load(path, folder.RECORD, json.loads)
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise RefusedError(f"{folder.RECORD} lists no files")
    if record.get("format") != folder.FORMAT or record.get("kind") not in ("attack", "defense"):
        raise RefusedError(
            f"{folder.RECORD} is of format {record.get('format')!r}, kind {record.get('kind')!r}"
        )
    config = load(path, folder.OPTIONS, parse_config, record)
    row, numbers = load(path, folder.RESULTS, parse_results, record)
    victim = None
    if record["kind"] == "defense":
        victim = read_victim(path, record.get("victim_sha256"), known)
    return Run(path, row, numbers, config, record, victim)


def read_victim(path, weights, known):
    """The attack run in whose folder the defense run `path` lies; it must be its victim."""
    place = Path(os.path.abspath(path)).parent.parent
    try:
        attack = known.get(str(place)) or read_run(place, known)
    except RefusedError as error:
        raise RefusedError(f"its attack run cannot be used: {error}") from error
    if attack.victim or weights is None or attack.weights != weights:
        raise RefusedError("made for another victim than the one it lies with")
    return attack


def load(path, name, parse, record=None):
    """parse(text) of the file `name`, whose sha256 must be the one in `record`."""
    try:
        return parse(folder.read_checked(path, name, record).decode())
    except (ValueError, RecursionError, csv.Error, yaml.YAMLError) as error:
        raise RefusedError(f"{name} is unusable: {printable(error)}") from error


def parse_config(text):
    """{option: value as text}."""
    config = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(config, dict):
        raise ValueError("it holds no options")
    return {
        printable(name): printable(value) for name, value in config.items() if value is not None
    }


def parse_results(text):
    """(column -> text, measure -> number or None) of the one row in a results.csv."""
    rows = list(csv.DictReader(io.StringIO(text)))
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows instead of 1")
    return parse_row(rows[0])


def parse_row(row):
    """The same of a row, column -> text; ValueError where it is not one that a run has written."""
    if missing := sorted(name for name in NEEDED if row.get(name) is None):
        raise ValueError(f"no value for {', '.join(missing)}")
    row = {name: printable(value) for name, value in row.items()}
    numbers = {name: float(row[name]) if row[name] else None for name in (*METRICS, "seconds")}
    for name in ("pratio", "pratio_effective"):
        float(row.get(name) or 0)
    for name, number in numbers.items():
        if number is not None and not 0 <= number <= (math.inf if name == "seconds" else 1):
            raise ValueError(f"{name} is {number}")
    total = (numbers["asr"] or 0) + (numbers["ra"] or 0)
    if total > 1 + 2e-6:  # either may be rounded to 6 digits
        raise ValueError(f"ASR + RA is {total:.6g}, more than 1")
    return row, numbers


def read_table(path):
    """(runs, [(path, why it is left out)]) of a table with a row for every run.

    sweep.py --results writes one. Such runs have no folder: their options are those of the command
    in the row. RefusedError where it is another file.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise RefusedError(f"it is unusable: {printable(error)}") from error
    if not rows or not {"run", "command", "defense"} <= set(rows[0]):
        raise RefusedError(
            "it is no table of results, which has columns run, command and defense; sweep.py "
            "--results writes one"
        )
    victims, runs, left_out = {}, [], []
    for row in sorted(rows, key=lambda row: row["defense"] != "none"):
        name = printable(row["run"])
        try:
            values, numbers = parse_row(row)
            victim = None if row["defense"] == "none" else victims[name.split("/")[0]]
            record = {"files": {}, "command": values["command"]}
            if seconds := values.get("trigger_seconds"):
                record["trigger_seconds"] = float(seconds)
            run = Run(path / name, values, numbers, options_of(values, victim), record, victim)
        except KeyError:
            left_out.append((path / name, "the table has no row of its victim"))
        except ValueError as error:
            left_out.append((path / name, printable(error)))
        else:
            runs.append(run)
            victims[name] = run
    return runs, left_out


def options_of(row, victim):
    """{option: value as text} of the run in a row: its seeds, learning rate, and its command's."""
    words = shlex.split(row["command"])[2:]
    pairs = zip(words, words[1:], strict=False)
    options = {word[2:]: value for word, value in pairs if word.startswith("--")}
    columns = {
        "random_seed": "defense_seed" if victim else "seed",
        "data_seed": "data_seed",
        "poison_seed": "poison_seed",
        "lr": "lr",
    }
    own = {option: row[column] for option, column in columns.items() if row.get(column)}
    return options | own


def printable(value):
    """Text of one line and without control characters: records may come from strangers."""
    text = str(value)
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(text.split())


def read_all(paths):
    """(runs, [(path, why it is left out)]).

    Of runs with the same options and seeds only the first counts.
    """
    runs, left_out, known = {}, [], {}
    for path in paths:
        try:
            run = known[os.path.abspath(path)] = read_run(path, known)
        except RefusedError as error:
            left_out.append((path, error))
            continue
        seeds = tuple(part.config.get(seed) for part in (run, run.attack) for seed in sorted(SEEDS))
        first = runs.setdefault((keys(run), seeds), run)
        if first is not run:
            left_out.append((path, f"same run as {first.path}"))
    return list(runs.values()), left_out


def keys(run):
    """(table, column, row) that a run belongs to; a column or row is (name, settings)."""
    table = tuple(run.attack.row[name] for name in TABLE)
    column = run.attack.row["attack"], settings(run.attack, OF_ATTACK)
    if run.victim is None:
        return table, column, NONE
    same_precision = run.row["precision"] == run.victim.row["precision"]
    results = OF_DEFENSE if same_precision else (*OF_DEFENSE, "precision")
    name = "-".join(filter(None, (run.row["defense"], run.row["variant"])))
    return table, column, (name, settings(run, results))


def settings(run, results):
    """The options and the columns `results` that describe an experiment, as sorted pairs.

    Empty ones are left out.
    """
    unshown = {*UNSHOWN, *SEEDS, *TABLE}
    options = {name: value for name, value in run.config.items() if name not in unshown}
    options |= {name: run.row[name] for name in results}
    return tuple(sorted((name, value) for name, value in options.items() if value))
