"""Two defenses on the same victims: the differences victim by victim."""

import statistics

from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.report.formats import Grid, about, csv_text, footnotes, grids, title
from antidote_bench.utils.report.runs import METRICS, NONE, TABLE
from antidote_bench.utils.report.tables import place, spread

FEWEST = 3  # victims below which nothing is said in words
PARTS = ("mean", "min", "max")
CSV_HEADER = [
    *TABLE, "defense", "against", "attack", "victims",
    *(f"{name}_difference_{part}" for name in METRICS for part in PARTS),
]  # fmt: skip
NOTES = (
    "a victim that only one of the two defenses was given does not count; several runs on one "
    "victim count with their mean",
    "the smallest and the largest difference stand in brackets",
    "two defenses that are equally good differ in the same direction on all of 3 victims once in "
    "4 times, on all of 5 once in 16 times: so few seeds show a direction, and prove nothing",
)


def paired(tables, form, against):
    """The differences of every defense and the one with the label `against`, as text.

    ConfigError (exit 2) where no table has that defense.
    """
    known = sorted({label for table in tables for row, label in table.rows.items() if row != NONE})
    if against not in known:
        there = f"there are {', '.join(known)}" if known else "there is none at all"
        raise ConfigError(f"no defense is called {against!r} in these tables: {there}")
    found = [table for table in tables if against in table.rows.values()]
    if form == "csv":
        return csv_text(CSV_HEADER, [row for table in found for row in _csv(table, against)])
    return grids([_grid(table, tables, against) for table in found], form)


def differences(table, against):
    """[(row, column, {measure: its differences, one of each victim})], as fractions.

    A defense and an attack without a victim that both were given are left out.
    """
    other = next(row for row, label in table.rows.items() if label == against)
    found = []
    for row in table.rows:
        for column in table.columns:
            ours, theirs = (_by_victim(table, column, key) for key in (row, other))
            both = [victim for victim in ours if victim in theirs]
            if row in (NONE, other) or not both:
                continue
            values = {}
            for name in METRICS:
                pairs = [(spread(ours[at], name)[0], spread(theirs[at], name)[0]) for at in both]
                values[name] = [a - b for a, b in pairs if None not in (a, b)]
            found.append((row, column, values))
    return found


def _by_victim(table, column, row):
    victims = {}
    for run in table.cells.get((column, row), []):
        victims.setdefault(place(run.attack), []).append(run)
    return victims


def _grid(table, tables, against):
    rows = [
        [
            table.rows[row] + table.marks[row],
            table.columns[column] + table.marks[column],
            str(max(map(len, values.values()))),
            *(_shown(values[name]) for name in METRICS),
            in_words(values["asr"]),
        ]
        for row, column, values in differences(table, against)
    ]
    words = f"{about(table)}; differences to {against} on the same victims, in points"
    header = ["defense", "attack", "victims", *(name.upper() for name in METRICS), "ASR in words"]
    return Grid(title(table, tables), words, header, rows, [*footnotes(table), *NOTES])


def _csv(table, against):
    for row, column, values in differences(table, against):
        parts = (
            function(values[name]) if values[name] else None
            for name in METRICS
            for function in (statistics.fmean, min, max)
        )
        labels = table.rows[row], against, table.columns[column]
        yield [*table.about.values(), *labels, max(map(len, values.values())), *parts]


def _shown(values):
    if not values:
        return "–"
    mean, low, high = (100 * each for each in (statistics.fmean(values), min(values), max(values)))
    return f"{mean:+.1f}" + (f" ({low:+.1f} to {high:+.1f})" if len(values) > 1 else "")


def in_words(values):
    """On how many victims a measure is lower and on how many it is higher."""
    if len(values) < FEWEST:
        return "too few victims" if values else "–"
    lower, higher = sum(value < 0 for value in values), sum(value > 0 for value in values)
    for count, word in ((lower, "lower"), (higher, "higher")):
        if count == len(values):
            return f"{word} on all {count}"
    return f"lower on {lower}, higher on {higher} of {len(values)}"
