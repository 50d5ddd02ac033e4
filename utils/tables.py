"""Finished runs as tables: which share a cell, what a cell is called, and what has to be said of it."""

import itertools
import os
import statistics
from typing import NamedTuple

from utils.finished import NONE, OF_ATTACK, OF_DEFENSE, TABLE, keys

WEAK, IN_TRAINING, ORACLE = "*", "†", "‡"
FOOTNOTES = {
    WEAK: "weak attack (ASR below 80 % before defense): no defense is credited on it",
    IN_TRAINING: "in-training: trains its own model on the poisoned set instead of repairing the victim",
    ORACLE: "chosen with test data: not comparable",
}


class Table(NamedTuple):
    """The runs of one data set, model, recipe and precision; columns and rows in the order of display."""

    about: dict
    columns: dict  # column key -> label
    rows: dict  # row key -> label
    marks: dict  # either key -> footnote marks
    cells: dict  # (column key, row key) -> runs


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
    columns = dict(sorted(columns.items(), key=lambda item: (not item[1].startswith("clean"), item[1])))
    rows = dict(sorted(rows.items(), key=lambda item: (item[0] != NONE, item[1])))
    marks = {}
    for key in columns:
        attacks = [run.attack for (column, _), runs in cells.items() if column == key for run in runs]
        asr, _ = spread({os.path.abspath(attack.path): attack for attack in attacks}.values(), "asr")
        marks[key] = WEAK if asr is not None and asr < 0.8 and not key[0].startswith("clean") else ""
        columns[key] += reached(attacks[0].row)
    for key in rows:
        pairs = {("stage", "in-training"): IN_TRAINING, ("selection", "oracle"): ORACLE}
        marks[key] = "".join(mark for pair, mark in pairs.items() if pair in key[1])
    return Table(about, columns, rows, marks, cells)


def reached(row):
    """The share that was poisoned, where the target class did not hold the share that was asked for."""
    asked, got = (float(row.get(name) or 0) for name in ("pratio", "pratio_effective"))
    return f" [{100 * got:.1f} % poisoned]" if got < asked - 0.001 else ""


def name_all(keys):
    """{(name, settings): label}: the name and, in brackets, the settings that tell it from its namesakes."""
    labels = {}
    for name, pairs in keys:
        options = dict(pairs)
        shown = telling([dict(others) for other, others in keys if other == name])
        words = [options[key] if key == "label_mode" else f"{key} {options[key]}" for key in shown if key in options]
        labels[name, pairs] = f"{name} ({', '.join(words)})" if words else name
    return labels


def telling(namesakes):
    """The settings to show: options that differ, a precision of its own, and results as far as needed to differ."""

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
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def missing(table):
    """[(column, row, runs there are, runs there should be)]: combinations without a run, and with fewer victims than their attack has."""
    victims, gaps = {}, []
    for (column, _), runs in table.cells.items():
        victims.setdefault(column, set()).update(os.path.abspath(run.attack.path) for run in runs)
    for column, row in itertools.product(table.columns, table.rows):
        have = len({os.path.abspath(run.attack.path) for run in table.cells.get((column, row), [])})
        if have < len(victims[column]):
            gaps.append((column, row, have, len(victims[column])))
    return gaps
