"""Finished runs: found in their folders, and read with every checksum compared."""

import hashlib
import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from antidote_bench.utils import config, parsing
from antidote_bench.utils.config import NOT_IDENTITY, SEEDS, Attack, default_of
from antidote_bench.utils.errors import RefusedError
from antidote_bench.utils.files import read_rows
from antidote_bench.utils.record import folder, measures
from antidote_bench.utils.report.content import (
    UNUSABLE,
    load,
    parse_config,
    parse_record,
    reason,
    require_size,
    short,
)
from antidote_bench.utils.text import name_of_class, one_line

METRICS = ("acc", "asr", "ra")
MEASURED = tuple(name for columns in measures.SHOWN.values() for name in columns.values())
GAP = "relearn_gap"  # how much more of a backdoor a model learns again than the controls do
# models without a backdoor: {what a table calls one: its ASR after relearning}
CONTROLS = {f"{name} model": f"asr_relearn_{name}" for name in measures.CONTROLS}
TABLE = ("dataset", "model", "recipe", "precision")
# Results that keep runs apart as options do; a label shows them where the options do not suffice.
OF_ATTACK = ("label_mode", "n_test")
OF_DEFENSE = ("stage", "selection", "prior", "clean_budget", "recipe")
NEEDED = {*TABLE, *METRICS, *OF_ATTACK, *OF_DEFENSE, "attack", "defense", "variant", "seconds"}
NONE = ("none", ())
DATA_MARK = 12  # digits
OWN_DATA = "own"  # mark of a user's own data set where nothing else is known of it
LOWEST = 64  # levels of folders that are searched
TOO_LOW = f"more than {LOWEST} levels below the folder that was given: give it itself"
LEADS_OUT = "a link out of the folders that were given: give the folder that it leads to as well"
# options that change no result, or are in another one; those in the last line are of single
# scripts, which nothing here may import
UNSHOWN = NOT_IDENTITY | {
    "dataset_name",
    *("score_batch", "together", "source", "triggered_path", "poisoned_share"),
}
# options that older records lack, with the value that is the same as none
AS_BEFORE = {
    (name, str(default_of(Config, name)))
    for Config in (Attack, config.Defense, config.Detection)
    for name in Config.__dataclass_fields__
    if config.declared(Config, name, "identity") == config.CHANGED
}
# what a table of results says of a run beside its numbers: {fact of record.json: column}
FACTS = {"device": "device", "antidote": "version", "peak_mb": "peak_mb"}
LARGEST_TABLE, MOST_ROWS = 2**26, 100_000  # bytes and rows of a table of results
LONGEST_NUMBER = 9  # digits of a class
LONGEST_NAME = 500  # characters of a run in it


@dataclass(frozen=True)
class Run:
    """A finished run; `victim` is the attack run that a defense repaired, None for an attack."""

    path: Path
    row: dict  # results.csv: column -> text
    numbers: dict  # acc, asr, ra (fractions), seconds and MEASURED; None: not applicable
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

    @property
    def data_facts(self):
        """What the record of the victim says about its data set, {} where it says nothing."""
        facts = self.attack.record.get("data")
        return facts if isinstance(facts, dict) else {}

    @property
    def data(self):
        """A mark of the victim's data set, which its pixels decide; empty where nothing says it."""
        prints = self.data_facts.get("fingerprint")
        if not prints:
            own = OWN_DATA if self.known_data == "folder" else ""
            return (self.attack.row.get("data_fingerprint") or own)[:DATA_MARK]
        text = json.dumps(prints, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:DATA_MARK]

    @property
    def known_data(self):
        """The data set that the option --dataset names: another one may be called like it."""
        options = self.attack.config
        if options.get("dataset") == "folder" or options.get("dataset_name"):
            return options.get("dataset", default_of(Attack, "dataset"))
        return self.attack.row["dataset"]

    @property
    def class_names(self):
        """The names of the classes, in the order of their numbers; () where nothing says them."""
        names = self.data_facts.get("class_names")
        right = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return tuple(names) if right else ()

    @property
    def target(self):
        """The class that the attacker wants, with its name; None where there is not one."""
        number = self.attack.row.get("target")
        return named(number, self.class_names) if number and not self.clean else None

    @property
    def source(self):
        """The class that alone is poisoned, with its name; None where there is not one."""
        options = self.attack.config
        number = options.get("source_class") or str(default_of(Attack, "source_class"))
        is_one = self.attack.row["label_mode"] == "one2one" and not self.clean
        return named(number, self.class_names) if is_one else None


def named(number, names):
    """The text `number` of a class with its name, if it is one."""
    is_number = number.isdecimal() and len(number) <= LONGEST_NUMBER
    return name_of_class(number, names) if is_number else one_line(number)


def find_runs(folders):
    """Every folder at or below `folders` with a run, finished or not, each once."""
    return search(folders)[0]


def search(folders):
    """(the folders of find_runs, [(path, why it is not entered)]).

    Links are followed where they lead to a place below `folders`.
    """
    folders = list(folders)
    tops = [Path(os.path.realpath(top)) for top in folders]
    seen, runs, left_out = set(), [], []

    def unreadable(error):
        runs.append(Path(error.filename))

    def outside(path):
        real = Path(os.path.realpath(path))
        return os.path.islink(path) and not any(real.is_relative_to(top) for top in tops)

    for top in folders:
        for path, inside, files in os.walk(top, followlinks=True, onerror=unreadable):
            new = (real := os.path.realpath(path)) not in seen
            if new and (folder.STATE in inside or {folder.RESULTS, folder.RECORD} & set(files)):
                runs.append(Path(path))
            seen.add(real)
            others = {folder.STATE, folder.FINISHED}
            if folder.RECORD in files:
                others.add(folder.MEASURES)  # what was measured of this run
            below = sorted(set(inside) - others) if new else []
            links = [name for name in below if outside(os.path.join(path, name))]
            inside[:] = [name for name in below if name not in links]
            left_out += [(Path(path, name), LEADS_OUT) for name in links]
            if inside and len(Path(path).parts) - len(Path(top).parts) >= LOWEST:
                left_out.append((Path(path, inside[0]), TOO_LOW))
                inside.clear()
    return runs, left_out


def read_run(path, known):
    """The run in a folder; RefusedError says what is wrong with it.

    `known` holds the runs that were read before: {absolute path: run}. A victim is added to it.
    """
    record = load(path, folder.RECORD, parse_record)
    is_readable = record.get("format") in folder.FORMATS
    if not is_readable or record.get("kind") not in ("attack", "defense"):
        raise RefusedError(
            f"{folder.RECORD} is of format {reason(repr(record.get('format')))}, kind "
            f"{reason(repr(record.get('kind')))}"
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
        if str(place) not in known:
            known[str(place)] = read_run(place, known)
    except RefusedError as error:
        raise RefusedError(f"its attack run cannot be used: {error}") from error
    attack = known[str(place)]
    if attack.victim or weights is None or attack.weights != weights:
        raise RefusedError("made for another victim than the one it lies with")
    return attack


def parse_results(text):
    """(column -> text, measure -> number or None) of the one row in a results.csv."""
    return parse_row(one_row(text))


def one_row(text):
    """The one row in the text of a results.csv, column -> text; ValueError where there is none."""
    rows = read_rows(io.StringIO(text), most=1)
    if not rows:
        raise ValueError("0 rows instead of 1")
    return rows[0]


def parse_row(row):
    """The same of a row, column -> text; ValueError where it is not one that a run has written."""
    if missing := sorted(name for name in NEEDED if row.get(name) is None):
        raise ValueError(f"no value for {', '.join(missing)}")
    row = {name: short(value, name) for name, value in row.items()}
    numbers = {name: float(row[name]) if row[name] else None for name in (*METRICS, "seconds")}
    for name in ("pratio", "pratio_effective"):
        float(row.get(name) or 0)
    for name, number in numbers.items():
        if number is not None and not 0 <= number <= (math.inf if name == "seconds" else 1):
            raise ValueError(f"{name} is {number}")
    total = (numbers["asr"] or 0) + (numbers["ra"] or 0)
    if total > 1 + 2e-6:  # either may be rounded to 6 digits
        raise ValueError(f"ASR + RA is {total:.6g}, more than 1")
    return row, numbers | numbers_of(row) | {GAP: None}


def read_table(path):
    """The rows of a table of results, which sweep.py --results writes, as dicts.

    RefusedError where it is another file.
    """
    require_size(path, LARGEST_TABLE)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = read_rows(file, MOST_ROWS)
    except (OSError, *UNUSABLE) as error:
        raise RefusedError(f"it is unusable: {reason(error)}") from error
    if not rows or not {"run", "command", "defense"} <= set(rows[0]):
        raise RefusedError(
            "it is no table of results, which has columns run, command and defense; sweep.py "
            "--results writes one"
        )
    return rows


def in_table(path, rows):
    """(runs, [(path, why it is left out)]) of the attacks and defenses in the rows of a table.

    Such runs have no folder: their options are those of the command in the row.
    """
    victims, runs, left_out = {}, [], []
    rows = [row for row in rows if not row.get("detection")]
    for row in sorted(rows, key=lambda row: row["defense"] != "none"):
        name = one_line(row["run"])[:LONGEST_NAME]
        try:
            values, numbers = parse_row(row)
            victim = None if row["defense"] == "none" else victims[name.split("/")[0]]
            record = {"files": {}, "command": values["command"]}
            record |= {fact: values[name] for fact, name in FACTS.items() if values.get(name)}
            if seconds := values.get("trigger_seconds"):
                record["trigger_seconds"] = float(seconds)
            run = Run(path / name, values, numbers, options_of(values, victim), record, victim)
            add_gap(run)
        except KeyError:
            left_out.append((path / name, "the table has no row of its victim"))
        except ValueError as error:
            left_out.append((path / name, reason(error)))
        else:
            runs.append(run)
            victims[name] = run
    return runs, left_out


def options_of(row, victim):
    """{option: value as text} of the run in a row: its seeds, learning rate, and its command's."""
    _, options = parsing.taken_apart(row["command"])
    columns = {
        "random_seed": "defense_seed" if victim else "seed",
        "data_seed": "data_seed",
        "poison_seed": "poison_seed",
        "lr": "lr",
    }
    own = {option: row[column] for option, column in columns.items() if row.get(column)}
    return options | own


def read_all(paths):
    """(runs, [(path, why it is left out)]).

    Of runs with the same options and seeds only the first counts.
    """
    known = {}

    def read(path):
        run = known[os.path.abspath(path)] = read_run(path, known)
        return run

    runs, left_out = distinct(paths, read, lambda run: (keys(run), seeds_of(run, run.attack)))
    places = {}
    for run in [*runs, *(run.victim for run in runs if run.victim)]:
        places.setdefault(os.path.abspath(run.path), []).append(run)
    for same in places.values():
        found, damaged = measures.read(same[0].path, same[0].weights)
        left_out += damaged
        for run in same:
            run.row.update(found)
            run.numbers.update(numbers_of(found))
    for run in runs:
        add_gap(run)
    return runs, left_out


def add_gap(run):
    """Put the difference of a run to the larger control of its victim beside its numbers."""
    after, known = run.numbers["asr_relearn"], run.attack.numbers
    controls = [known[name] for name in CONTROLS.values() if known[name] is not None]
    run.numbers[GAP] = None if after is None or not controls else after - max(controls)


def numbers_of(row):
    """{one of MEASURED: number, None where it is not there}; ValueError where one is out of
    range."""
    numbers = {name: float(row[name]) if row.get(name) else None for name in MEASURED}
    for name, number in numbers.items():
        most = math.inf if name in measures.UNBOUNDED else 1
        if number is not None and not (0 <= number <= most and math.isfinite(number)):
            raise ValueError(f"{name} is {number}")
    return numbers


def distinct(paths, read, identity):
    """(runs, [(path, why it is left out)]): of runs with the same `identity(run)` the first.

    `read(path)` gives a run, or raises RefusedError.
    """
    runs, left_out = {}, []
    for path in paths:
        try:
            run = read(path)
        except RefusedError as error:
            left_out.append((path, error))
            continue
        first = runs.setdefault(identity(run), run)
        if first is not run:
            left_out.append((path, f"same run as {first.path}"))
    return list(runs.values()), left_out


def seeds_of(*parts):
    """The seeds of a run and of its victim."""
    return tuple(part.config.get(seed) for part in parts for seed in sorted(SEEDS))


def keys(run):
    """(table, column, row) that a run belongs to; a column or row is (name, settings).

    A table is the values of TABLE and the mark of the data set.
    """
    table = *(run.attack.row[name] for name in TABLE), run.data
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
    options = {
        name: value
        for name, value in run.config.items()
        if name not in unshown and (name, value) not in AS_BEFORE
    }
    options |= {name: run.row[name] for name in results}
    return tuple(sorted((name, value) for name, value in options.items() if value))
