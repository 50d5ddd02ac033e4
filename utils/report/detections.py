"""What detectors say about finished victims: read from their folders, and shown as tables."""

import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from antidote_bench.utils.errors import MissingError, RefusedError
from antidote_bench.utils.record import folder
from antidote_bench.utils.report import formats
from antidote_bench.utils.report.content import load, parse_config, parse_record, reason, short
from antidote_bench.utils.report.runs import (
    LONGEST_NAME,
    OF_ATTACK,
    TABLE,
    Run,
    distinct,
    one_row,
    options_of,
    read_victim,
    seeds_of,
    settings,
)
from antidote_bench.utils.report.tables import name_all, of_row, spread
from antidote_bench.utils.text import one_line

OF_DETECTION = ("prior", "clean_budget", "nominal_fpr")
KINDS = {
    "data": "detectors of poisoned training images",
    "input": "detectors of triggered inputs",
    "model": "detectors of backdoored models",
}
SHARES = [
    "auroc", "auroc_no_cover", "auroc_fooled", "tpr_at_1", "tpr_at_5", "tpr_at_10", "nominal_fpr",
    "fpr", "tpr", "ppv", "f1", "own_fpr", "own_tpr", "own_ppv", "own_f1", "target_found",
    "published",
]  # fmt: skip
NUMBERS = [*SHARES, "threshold", "score", "target_rank", "seconds"]
NEEDED = {*TABLE, *OF_ATTACK[:1], *OF_DETECTION, *NUMBERS, "attack", "detection", "judges"}
CSV_MEASURES = [name for name in NUMBERS if name != "nominal_fpr"]
CSV_HEADER = [
    *TABLE, "attack", "detection", "judges", "prior", "nominal_fpr", "n",
    *(f"{name}_{part}" for name in CSV_MEASURES for part in ("mean", "std")),
]  # fmt: skip
SHOWN = {"AUROC": "auroc", "TPR": "tpr", "FPR": "fpr"}
ABOUT = (
    "in percent, mean ± sample standard deviation (runs); TPR and FPR at the threshold that clean "
    "images set"
)
ABOUT_MODELS = (
    "score, the higher the more suspicious; found: of the runs with a verdict on classes those in "
    "which the target is suspected, flagged: those in which any class is; AUROC: of backdoored "
    "against benign victims"
)


@dataclass(frozen=True)
class Detected:
    """A finished detection; `victim` is the attack run that was judged."""

    path: Path
    row: dict  # results.csv: column -> text
    numbers: dict  # NUMBERS: floats, None where not applicable
    config: dict  # option -> text
    record: dict  # record.json
    victim: Run


class Table(NamedTuple):
    """The runs of one data set, model and recipe, and of one kind of detectors."""

    about: dict  # TABLE
    judges: str
    columns: dict  # column key -> label
    rows: dict  # row key -> label
    cells: dict  # (column key, row key) -> runs
    clean: frozenset  # column keys of benign victims


# ---------- reading ----------


def split(paths):
    """(the folders of other runs, those of detections), by where they lie in a record."""
    others, found = [], []
    for path in paths:
        place = Path(os.path.abspath(path)).parent
        above = {folder.RECORD, folder.STATE}
        inside = place.name == folder.DETECTIONS and any(
            (place.parent / it).exists() for it in above
        )
        (found if inside else others).append(path)
    return others, found


def read_all(paths, victims=()):
    """(runs, [(path, why it is left out)]); of runs with the same options only the first counts.

    `victims` are attack runs that were read before.
    """
    known = {os.path.abspath(victim.path): victim for victim in victims}
    return distinct(
        paths, lambda path: read(path, known), lambda run: (keys(run), seeds_of(run, run.victim))
    )


def read(path, known):
    """The detection in a folder; RefusedError says what is wrong with it.

    `known` holds the victims that were read before: {absolute path: run}.
    """
    record = load(path, folder.RECORD, parse_record)
    if record.get("format") not in folder.FORMATS or record.get("kind") != "detection":
        raise RefusedError(
            f"{folder.RECORD} is of format {reason(repr(record.get('format')))}, kind "
            f"{reason(repr(record.get('kind')))}"
        )
    config = load(path, folder.OPTIONS, parse_config, record)
    row, numbers = load(path, folder.RESULTS, parse_results, record)
    victim = read_victim(path, record.get("victim_sha256"), known)
    return Detected(path, row, numbers, config, record, victim)


def parse_results(text):
    """(column -> text, measure -> number or None) of the one row in a results.csv."""
    return parse_detection(one_row(text))


def parse_detection(row):
    """The same of a row; ValueError where it is not one that a detector has written."""
    if missing := sorted(name for name in NEEDED if row.get(name) is None):
        raise ValueError(f"no value for {', '.join(missing)}")
    row = {name: short(value, name) for name, value in row.items() if value is not None}
    if row["judges"] not in KINDS:
        raise ValueError(f"judges is {row['judges']!r}")
    numbers = {name: float(row[name]) if row[name] else None for name in NUMBERS}
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{name} is {number}")
        if name in SHARES and number is not None and not 0 <= number <= 1:
            raise ValueError(f"{name} is {number}")
    return row, numbers


def in_table(path, rows, runs):
    """(runs, [(path, why it is left out)]) of the detections in the rows of a table of results.

    `runs` are the attacks and defenses of the same table, their victims among them.
    """
    victims, found, left_out = {run.path: run for run in runs}, [], []
    for row in rows:
        if not row.get("detection"):
            continue
        name = one_line(row["run"])[:LONGEST_NAME]
        try:
            victim = victims[path / name.split("/")[0]]
            values, numbers = parse_detection(row)
            options = options_of(values, victim) | {"random_seed": values["detection_seed"]}
            record = {"files": {}, "command": values["command"]}
            found.append(Detected(path / name, values, numbers, options, record, victim))
        except KeyError:
            left_out.append((path / name, "the table has no row of its victim"))
        except ValueError as error:
            left_out.append((path / name, reason(error)))
    return found, left_out


# ---------- tables ----------


def keys(run):
    """(table, column, row) that a run belongs to; a column or row is (name, settings)."""
    victim = run.victim
    table = *(victim.row[name] for name in TABLE), victim.data, run.row["judges"]
    column = victim.row["attack"], settings(victim, OF_ATTACK)
    name = "-".join(filter(None, (run.row["detection"], run.row["variant"])))
    return table, column, (name, settings(run, OF_DETECTION))


def group(runs):
    """The runs as sorted tables."""
    tables = {}
    for run in runs:
        key, *cell = keys(run)
        tables.setdefault(key, {}).setdefault(tuple(cell), []).append(run)
    order = list(KINDS)
    return [
        _table(key, tables[key])
        for key in sorted(tables, key=lambda key: (*key[:-1], order.index(key[-1])))
    ]


def _table(key, cells):
    *names, _, judges = key
    first = next(iter(cells.values()))[0]
    columns, rows = (
        name_all(set(part), first.victim.class_names) for part in zip(*cells, strict=True)
    )
    clean = frozenset(column for (column, _), runs in cells.items() if runs[0].victim.clean)
    columns = dict(sorted(columns.items(), key=lambda item: (item[0] not in clean, item[1])))
    rows = dict(sorted(rows.items(), key=lambda item: item[1]))
    about = dict(zip(TABLE, names, strict=True))
    return Table(about, judges, columns, rows, cells, clean)


def show(tables, form):
    """All tables in a format; MissingError (exit 3) where there are none."""
    if not tables:
        raise MissingError(
            "no detection found: python detection/strip.py --help shows how one is made"
        )
    if form == "csv":
        return formats.csv_text(CSV_HEADER, [row for table in tables for row in to_csv(table)])
    return formats.grids([to_grid(table) for table in tables], form)


def to_grid(table):
    """One row per detector, with columns of every attack."""
    header, rows = ["detector"], [[label] for label in table.rows.values()]
    columns = _of_models if table.judges == "model" else _of_images
    for column, label in table.columns.items():
        names, cells = columns(table, column)
        header += [f"{label} {name}" for name in names]
        for row, words in zip(rows, cells, strict=True):
            row += words
    if table.judges == "model":
        header.append("AUROC")
        for row, key in zip(rows, table.rows, strict=True):
            auroc = auroc_of_models(table, key)
            row.append("–" if auroc is None else f"{100 * auroc:.1f}")
    header += ["seconds", "n"]
    for row, key in zip(rows, table.rows, strict=True):
        runs = of_row(table, key)
        mean, _ = spread(runs, "seconds")
        row += ["–" if mean is None else f"{mean:.3g}", str(len(runs))]
    about = table.about
    title = f"{about['dataset'] or '–'}, {about['model'] or '–'}: {KINDS[table.judges]}"
    words = ABOUT_MODELS if table.judges == "model" else ABOUT
    return formats.Grid(title, f"recipe {about['recipe'] or '–'}; {words}", header, rows, [])


def _of_images(table, column):
    """(names of the columns of an attack, their cells for every row)."""
    names = ["FPR"] if column in table.clean else [*SHOWN]
    cells = []
    for key in table.rows:
        runs = table.cells.get((column, key), [])
        cells.append([formats.show(runs, SHOWN[name]) for name in names])
    return names, cells


def _of_models(table, column):
    """The same for detectors of models."""
    cells = []
    for key in table.rows:
        runs = table.cells.get((column, key), [])
        mean, deviation = spread(runs, "score")
        more = "" if deviation is None else f" ± {deviation:.3g}"
        verdicts = [run for run in runs if run.row.get("suspects")]
        if column in table.clean:
            hits = sum(run.row["suspects"] != folder.NO_CLASS for run in verdicts)
        else:
            hits = sum(run.numbers["target_found"] == 1 for run in verdicts)
        found = f"{hits} of {len(verdicts)}" if verdicts else "–"
        cells.append(["–" if mean is None else f"{mean:.3g}{more}", found])
    return ["score", "flagged" if column in table.clean else "found"], cells


def to_csv(table):
    """The rows of CSV_HEADER, as fractions."""
    for column, label in table.columns.items():
        for key, name in table.rows.items():
            runs = table.cells.get((column, key), [])
            if runs:
                row = runs[0].row
                yield [
                    *table.about.values(),
                    label,
                    name,
                    table.judges,
                    row["prior"],
                    row["nominal_fpr"],
                    len(runs),
                    *(number for measure in CSV_MEASURES for number in spread(runs, measure)),
                ]


def auroc_of_models(table, key):
    """The share of pairs of a backdoored and a benign victim in which a detector scores the
    backdoored one higher, a tie as half; None without both.

    It compares the scores of all attacks in the table, those of abstentions left out.
    """
    scores = {True: [], False: []}
    for (column, row), runs in table.cells.items():
        if row == key:
            known = [run.numbers["score"] for run in runs if run.numbers["score"] is not None]
            scores[column in table.clean] += known
    pairs = [(high > low) + (high == low) / 2 for high in scores[False] for low in scores[True]]
    return statistics.fmean(pairs) if pairs else None
