"""Finished runs as tables: which runs share a cell, the labels, and the marks for footnotes."""

import itertools
import os
import statistics
from typing import NamedTuple

from utils.report.runs import NONE, OF_ATTACK, OF_DEFENSE, TABLE, keys

WEAK, IN_TRAINING, ORACLE = "*", "†", "‡"
FOOTNOTES = {
    WEAK: "weak attack (ASR below 80 % before defense): no defense is credited on it",
    IN_TRAINING: "in-training: trains its own model on the poisoned set instead of repairing the "
    "victim",
    ORACLE: "chosen with test data: not comparable",
}


class Table(NamedTuple):
    """The runs of one data set, model, recipe and precision; columns and rows in their order."""

    about: dict
    columns: dict  # column key -> label
    rows: dict  # row key -> label
    marks: dict  # either key -> footnote marks
    cells: dict  # (column key, row key) -> runs
    clean: frozenset  # column keys of the victims that were trained without poison


def group(runs):
    """The runs as sorted tables."""
    tables = {}
    for run in runs:
        table, *cell = keys(run)
        tables.setdefault(table, {}).setdefault(tuple(cell), []).append(run)
    return [to_table(dict(zip(TABLE, key, strict=True)), tables[key]) for key in sorted(tables)]


def to_table(about, cells):
    """`cells` with labels, order and marks."""
    columns, rows = (name_all(set(keys)) for keys in zip(*cells, strict=True))
    attacks = {key: [] for key in columns}
    for (column, _), runs in cells.items():
        attacks[column] += [run.attack for run in runs]
    clean = frozenset(key for key in columns if attacks[key][0].clean)
    columns = dict(sorted(columns.items(), key=lambda item: (item[0] not in clean, item[1])))
    rows = dict(sorted(rows.items(), key=lambda item: (item[0] != NONE, item[1])))
    marks = {}
    for key in columns:
        asr, _ = spread(distinct(attacks[key]), "asr")
        marks[key] = WEAK if asr is not None and asr < 0.8 and key not in clean else ""
        columns[key] += reached(attacks[key][0].row)
    for key in rows:
        pairs = {("stage", "in-training"): IN_TRAINING, ("selection", "oracle"): ORACLE}
        marks[key] = "".join(mark for pair, mark in pairs.items() if pair in key[1])
    return Table(about, columns, rows, marks, cells, clean)


def distinct(runs):
    """The runs, each folder once."""
    return list({os.path.abspath(run.path): run for run in runs}.values())


def victims(table, column):
    """The attack runs of a column; without any, those that its defenses repaired."""
    own = table.cells.get((column, NONE))
    return own or distinct(run.attack for run in of_column(table, column))


def of_column(table, column):
    """All runs on an attack."""
    return [run for (key, _), runs in table.cells.items() if key == column for run in runs]


def of_row(table, row):
    """All runs of a defense."""
    return [run for (_, key), runs in table.cells.items() if key == row for run in runs]


def reached(row):
    """The share that was poisoned, where it is smaller than the share that was asked for."""
    asked, got = (float(row.get(name) or 0) for name in ("pratio", "pratio_effective"))
    return f" [{100 * got:.1f} % poisoned]" if got < asked - 0.001 else ""


def name_all(keys):
    """{(name, settings): label}: the name, and in brackets what tells it from its namesakes."""
    labels = {}
    for name, pairs in keys:
        options = dict(pairs)
        shown = telling([dict(others) for other, others in keys if other == name])
        words = [
            options[key] if key == "label_mode" else f"{key} {options[key]}"
            for key in shown
            if key in options
        ]
        labels[name, pairs] = f"{name} ({', '.join(words)})" if words else name
    return labels


def telling(namesakes):
    """The settings to show: options that differ, a precision of its own, and results as far as
    they are needed to tell the namesakes apart."""

    def kinds(*names):
        return len({tuple(each.get(name) for name in names) for each in namesakes})

    results = {*OF_DEFENSE, *OF_ATTACK} - {"label_mode"}
    names = sorted(set().union(*namesakes) - results)
    shown = [name for name in names if kinds(name) > 1 or name == "precision"]
    for name in sorted(results):
        if kinds(*shown, name) > kinds(*shown):
            shown.append(name)
    return shown


def spread(runs, name):
    """(mean, sample standard deviation) of a measure; None where there are too few values."""
    values = [run.numbers[name] for run in runs if run.numbers[name] is not None]
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def missing(table):
    """[(column, row, runs there are, runs there should be)] of the cells that lack runs.

    A cell should have a run for each victim of its attack.
    """
    gaps = []
    wanted = {
        column: len(distinct(run.attack for run in of_column(table, column)))
        for column in table.columns
    }
    for column, row in itertools.product(table.columns, table.rows):
        want = wanted[column]
        have = len(distinct(run.attack for run in table.cells.get((column, row), [])))
        if have < want:
            gaps.append((column, row, have, want))
    return gaps
