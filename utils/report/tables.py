"""Finished runs as tables: which runs share a cell, the labels, and the marks for footnotes."""

import itertools
import math
import os
import statistics
from typing import NamedTuple

from antidote_bench.utils.report.runs import (
    NONE,
    OF_ATTACK,
    OF_DEFENSE,
    OWN_DATA,
    TABLE,
    keys,
    named,
)

WEAK, UNTRAINED, IN_TRAINING, ORACLE = "*", "§", "†", "‡"
FOOTNOTES = {
    WEAK: "weak attack (ASR below 80 % before defense): no defense is credited on it",
    UNTRAINED: "untrained victim (ACC near chance or far below that of the clean model, or the "
    "attacker's label for every image): no defense is credited on it",
    IN_TRAINING: "in-training: trains its own model on the poisoned set instead of repairing the "
    "victim",
    ORACLE: "chosen with test data: not comparable",
}
UNCREDITED = WEAK + UNTRAINED
BENIGN_LOSS = "the points of ACC that the defense costs a benign model of the same recipe"
CLASSES = {
    "digits": 10,
    "cifar10": 10,
    "cifar100": 100,
    "gtsrb": 43,
    "tiny": 200,
    "mnist": 10,
    "fashionmnist": 10,
    "imagenette": 10,
    "celeba": 8,
}
CHANCES = 3  # an ACC below so many times chance is near it
SHARE_OF_CLEAN = 0.75  # an ACC below this share of the clean model's is far below it
CONSTANT_ASR, CONSTANT_MORE = 0.95, 0.05  # of a victim that gives every image the same label
SHORTEST = 6  # digits of a data set's mark in a title


class Table(NamedTuple):
    """The runs of one data set, model, recipe and precision; columns and rows in their order."""

    about: dict
    columns: dict  # column key -> label
    rows: dict  # row key -> label
    marks: dict  # either key -> footnote marks
    cells: dict  # (column key, row key) -> runs
    clean: frozenset  # column keys of the victims that were trained without poison
    untrained: frozenset  # folders of the victims that have not learned their task
    dataset: str  # the data set that the option --dataset names; empty where the runs differ in it


def group(runs):
    """The runs as sorted tables."""
    runs, tables, marks = list(runs), {}, {}
    for run in runs:
        marks.setdefault(run.attack.row["dataset"], set()).add(run.data)
    only = {}
    for name, known in marks.items():
        pixels = known - {"", OWN_DATA}
        if name in CLASSES and len(pixels) == 1:
            known.discard("")  # a table of results names no pixels, and of these sets there is one
            (only[name],) = pixels
    for run in runs:
        (name, *rest, mark), *cell = keys(run)
        mark = mark if mark in marks[name] else only[name]
        tables.setdefault((name, *rest, mark), {}).setdefault(tuple(cell), []).append(run)
    return [to_table(describe(key, marks), tables[key]) for key in sorted(tables)]


def describe(key, marks):
    """The values of TABLE in words; `marks` are those of all data sets with the same name."""
    *names, mark = key
    about = dict(zip(TABLE, names, strict=True))
    known = marks[about["dataset"]]
    if mark and len(known) > 1:
        about["dataset"] += f" #{shortest(mark, known)}"
    return about


def shortest(mark, known):
    """As much of a mark as tells it from the others."""
    lengths = range(SHORTEST, len(mark) + 1)
    apart = (size for size in lengths if len({each[:size] for each in known}) == len(known))
    return mark[: next(apart, len(mark))]


def to_table(about, cells):
    """`cells` with labels, order and marks."""
    names = next(iter(cells.values()))[0].class_names
    columns, rows = (name_all(set(keys), names) for keys in zip(*cells, strict=True))
    attacks = {key: [] for key in columns}
    for (column, _), runs in cells.items():
        attacks[column] += [run.attack for run in runs]
    clean = frozenset(key for key in columns if attacks[key][0].clean)
    columns = dict(sorted(columns.items(), key=lambda item: (item[0] not in clean, item[1])))
    rows = dict(sorted(rows.items(), key=lambda item: (item[0] != NONE, item[1])))
    bad = untrained(attacks, clean)
    marks = {}
    for key in columns:
        asr, _ = spread(distinct(attacks[key]), "asr")
        marks[key] = WEAK if asr is not None and asr < 0.8 and key not in clean else ""
        marks[key] += UNTRAINED if any(place(run) in bad for run in attacks[key]) else ""
        columns[key] += reached(attacks[key][0].row)
    for key in rows:
        pairs = {("stage", "in-training"): IN_TRAINING, ("selection", "oracle"): ORACLE}
        marks[key] = "".join(mark for pair, mark in pairs.items() if pair in key[1])
    known = {run.known_data for runs in cells.values() for run in runs}
    dataset = known.pop() if len(known) == 1 else ""
    return Table(about, columns, rows, marks, cells, clean, bad, dataset)


# ---------- victims that have not learned their task ----------


def untrained(attacks, clean):
    """The folders of such victims; `attacks` is {column key: runs}."""
    victims = distinct(run for runs in attacks.values() for run in runs)
    bad = {place(run) for run in victims if near_chance(run) or constant(run)}
    benign = [run for key in clean for run in distinct(attacks[key]) if place(run) not in bad]
    highest, _ = spread(benign, "acc")
    limit = SHARE_OF_CLEAN * (highest or 0)
    return frozenset(bad | {place(run) for run in victims if below(run.numbers["acc"], limit)})


def near_chance(run):
    """Whether the ACC is below CHANCES times chance; with few classes, below half way from chance
    to 1."""
    count = classes(run)
    limit = min(CHANCES / count, (1 + 1 / count) / 2) if count else 0
    return below(run.numbers["acc"], limit)


def classes(run):
    """The number of classes of a victim's data set, None where nothing says it."""
    count = run.data_facts.get("classes")
    if isinstance(count, int) and count > 1:
        return count
    return CLASSES.get(run.known_data)


def constant(run):
    """Whether a victim gives (almost) every image the attacker's label.

    Its ACC is then the share of this class among the test images.
    """
    acc, asr = run.numbers["acc"], run.numbers["asr"]
    total, triggered = (count_in(run.row, name) for name in ("n_test", "n_backdoor"))
    if run.clean or run.row["label_mode"] != "all2one" or not 0 < triggered < total:
        return False
    share = 1 - triggered / total
    most = share + CONSTANT_MORE * (1 - share)
    return asr is not None and asr >= CONSTANT_ASR and below(acc, most)


def count_in(row, name):
    """A number of images in a row of results, 0 where there is none."""
    try:
        number = float(row.get(name) or 0)
    except ValueError:
        return 0
    return number if math.isfinite(number) else 0


def below(value, limit):
    return value is not None and value < limit


# ---------- runs in a table ----------


def place(run):
    """What tells a run from all others."""
    return os.path.abspath(run.path)


def credited(table, column, run):
    """Whether a defense on this victim can count as a success."""
    strong = column not in table.clean and WEAK not in table.marks[column]
    return strong and place(run.attack) not in table.untrained


def distinct(runs):
    """The runs, each folder once."""
    return list({place(run): run for run in runs}.values())


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


def benign_loss(table, row):
    """The mean ACC that a defense loses on the benign models of the table, a fraction; None where
    it ran on none."""
    runs = [run for column in table.clean for run in table.cells.get((column, row), [])]
    pairs = [(run.attack.numbers["acc"], run.numbers["acc"]) for run in runs]
    losses = [before - after for before, after in pairs if None not in (before, after)]
    if not losses or row == NONE:
        return None
    return statistics.fmean(losses)


def reached(row):
    """The share that was poisoned, where it is smaller than the share that was asked for."""
    asked, got = (float(row.get(name) or 0) for name in ("pratio", "pratio_effective"))
    return f" [{100 * got:.1f} % poisoned]" if got < asked - 0.001 else ""


def name_all(keys, class_names=()):
    """{(name, settings): label}: the name, and in brackets what tells it from its namesakes."""

    def shown_value(key):
        is_class = key in ("attack_target", "source_class")
        return named(options[key], class_names) if is_class else options[key]

    labels = {}
    for name, pairs in keys:
        options = dict(pairs)
        shown = telling([dict(others) for other, others in keys if other == name])
        words = [
            options[key] if key == "label_mode" else f"{key} {shown_value(key)}"
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
    values = [run.numbers[name] for run in runs]
    values = [value for value in values if value is not None and math.isfinite(value)]
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
