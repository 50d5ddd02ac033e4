"""A table of the defenses in order: means over the attacks, ranks, and what a run costs."""

import itertools
import statistics

from antidote_bench.utils.report.formats import (
    Grid,
    about,
    csv_text,
    footnotes,
    grids,
    title,
    without_empty,
)
from antidote_bench.utils.report.runs import METRICS, NONE, TABLE
from antidote_bench.utils.report.summaries import seconds
from antidote_bench.utils.report.tables import (
    BENIGN_LOSS,
    ORACLE,
    benign_loss,
    count_in,
    credited,
    of_row,
    spread,
)

CSV_HEADER = [
    *TABLE, "defense", "stage", "selection", "attacks", "attacks_all",
    *(f"{name}_mean" for name in METRICS), "der_mean", "rank_mean", "seconds_mean", "peak_mb_max",
    "benign_loss_mean",
]  # fmt: skip
BENIGN = "benign"
HEADER = ["defense", "rank", "DER", "ACC", "ASR", "RA", "attacks", BENIGN, "seconds", "MB"]
NOTES = (
    "means over the attacks, each a mean over the seeds; clean models, weak attacks and untrained "
    "victims do not count",
    "DER: (1 + the ASR removed - the ACC lost) / 2 in percent, where a gain counts as 0: 50 does "
    "nothing, 100 is best",
    "rank: the place by DER among the defenses on an attack, 1 is best, equal ones share the mean "
    "of their places; then the mean over the attacks",
    "compare ranks and means only between rows with the same attacks",
)
# columns that are left out where nothing stands in them, and what they mean
OPTIONAL = {BENIGN: f"{BENIGN}: {BENIGN_LOSS}", "MB": "MB: the largest peak memory of a run"}


def ranking(tables, form, reported):
    """One row per defense, the best rank first; `reported` is not shown."""
    if form == "csv":
        return csv_text(CSV_HEADER, [row for table in tables for row in ranking_csv(table)])
    return grids([ranking_grid(table, tables) for table in tables], form)


def ranking_grid(table, tables):
    """The ranking of one table."""
    rows = [
        [
            table.rows[row] + table.marks[row],
            "–" if place is None else f"{place:.1f}",
            *("–" if value is None else f"{100 * value:.1f}" for value in values),
            f"{len(there)} of {len(strong_attacks(table))}",
            "–" if (loss := benign_loss(table, row)) is None else f"{100 * loss:.1f}",
            seconds(of_row(table, row)),
            f"{memory:.0f}" if (memory := peak_mb(table, row)) else "–",
        ]
        for row, place, values, there in ranked(table)
    ]
    header, rows = without_empty(HEADER, rows, OPTIONAL)
    notes = [*footnotes(table), *NOTES, *(OPTIONAL[name] for name in header if name in OPTIONAL)]
    return Grid(title(table, tables), about(table), header, rows, notes)


def ranking_csv(table):
    """The rows of CSV_HEADER, fractions with six digits."""
    for row, place, (der, *means), there in ranked(table):
        options = dict(row[1])
        yield [
            *table.about.values(),
            table.rows[row],
            *(options.get(name, "none") for name in ("stage", "selection")),
            len(there),
            len(strong_attacks(table)),
            *means,
            der,
            place,
            spread(of_row(table, row), "seconds")[0],
            peak_mb(table, row) or None,
            benign_loss(table, row),
        ]


def ranked(table):
    """[(row, mean rank, [mean DER, ACC, ASR, RA], attacks)]: no defense first, then by rank.

    What was chosen with test data has no rank and comes last, as does what ran on no attack.
    """
    places, found = ranks(table), []
    for row in table.rows:
        cells = [runs for column in table.columns if (runs := counted(table, column, row))]
        ders = [mean_of(map(effectiveness, runs)) for runs in cells]
        means = [mean_of(spread(runs, name)[0] for runs in cells) for name in METRICS]
        der = None if row == NONE else mean_of(ders)
        found.append((row, mean_of(places.get(row, [])), [der, *means], cells))
    return sorted(found, key=lambda each: (each[0] != NONE, each[1] is None, each[1] or 0))


def ranks(table):
    """{row: its place by DER on each attack that it ran on}; equal ones share their mean place."""
    places = {}
    for column in table.columns:
        ders = {
            row: mean_of(map(effectiveness, counted(table, column, row)))
            for row in table.rows
            if row != NONE and ORACLE not in table.marks[row]
        }
        ders = {row: der for row, der in ders.items() if der is not None}
        ordered, before = sorted(ders.values(), reverse=True), 0
        shared = {}
        for der, equal in itertools.groupby(ordered):
            count = len(list(equal))
            shared[der] = before + (count + 1) / 2
            before += count
        for row, der in ders.items():
            places.setdefault(row, []).append(shared[der])
    return places


def counted(table, column, row):
    """The runs of a cell whose victim is strong and has learned its task."""
    return [run for run in table.cells.get((column, row), []) if credited(table, column, run)]


def strong_attacks(table):
    """The columns with a run that counts."""
    return {column for column, row in table.cells if counted(table, column, row)}


def effectiveness(run):
    """DER in [0, 1], of which 0.5 is no effect; None where a number is missing.

    Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization",
    ICCV 2023.
    """
    before, after = run.attack.numbers, run.numbers
    values = [numbers[name] for numbers in (before, after) for name in ("acc", "asr")]
    if None in values:
        return None
    acc, asr, acc_after, asr_after = values
    return (max(0, asr - asr_after) - max(0, acc - acc_after) + 1) / 2


def mean_of(values):
    """The mean of those that are not None; None where there is none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def peak_mb(table, row):
    """The largest peak memory of the runs of a row in MB, 0 where none is stated."""
    return max((count_in(run.row, "peak_mb") for run in of_row(table, row)), default=0)
