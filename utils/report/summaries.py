"""Two short tables: an overview of all defenses, and the attacks with what they cost."""

import math

from antidote_bench.utils.report import published
from antidote_bench.utils.report.formats import (
    CSV_PUBLISHED,
    Grid,
    about,
    csv_published,
    csv_text,
    footnotes,
    grids,
    show,
    sources,
    title,
    without_empty,
)
from antidote_bench.utils.report.runs import METRICS, NONE, TABLE
from antidote_bench.utils.report.tables import (
    UNCREDITED,
    benign_loss,
    count_in,
    credited,
    of_row,
    spread,
    victims,
)

LARGEST_ASR, LARGEST_LOSS, SMALLEST_RA = (
    0.1,
    0.05,
    0.8,
)  # of a repaired model; the RA as share of ACC
REPAIRED = (
    "repaired: runs whose ASR is at most 10 %, that lose at most 5 points of ACC, and whose RA is "
    "at least 0.8 of their ACC; clean models and weak attacks do not count"
)
FEW = 1000  # triggered test images; with fewer the overview says how exactly they measure an ASR
OVERVIEW_CSV = [
    *TABLE, "defense", "stage", "selection", "clean_budget", "n_min", "n_max", "repaired",
    "attacked", "seconds_mean", "benign_loss_mean",
]  # fmt: skip
ATTACKS_CSV = [
    *TABLE, "attack", "pratio_effective", "n",
    *(f"{name}_{part}" for name in METRICS for part in ("mean", "std")),
    "seconds_mean", "trigger_seconds_mean",
]  # fmt: skip


# ---------- all defenses ----------


def overview(tables, form, reported):
    """One row per defense: the means over the seeds on each attack, and how often it repaired."""
    if form == "csv":
        return csv_text(OVERVIEW_CSV, [row for table in tables for row in overview_csv(table)])
    return grids([overview_grid(table, tables, reported) for table in tables], form)


def overview_grid(table, tables, reported):
    """The overview of one table."""
    clean = {column: column in table.clean for column in table.columns}
    header = ["defense", "clean images"]
    header += [
        label + table.marks[column] + " ACC" * clean[column]
        for column, label in table.columns.items()
    ]
    rows, notes = [], footnotes(table)
    for key, label in table.rows.items():
        good, attacked = count_repaired(table, key)
        runs = of_row(table, key)
        rows.append(
            [
                label + table.marks[key],
                runs[0].row["clean_budget"] or "–",
                *(means(table.cells.get((column, key)), clean[column]) for column in table.columns),
                f"{good} of {attacked}",
                seconds(runs),
                " to ".join(dict.fromkeys(map(str, counts(table, key)))),
            ]
        )
        theirs = [published.find(reported, table, column, key) for column in table.columns]
        if any(theirs):
            cells = map(published_means, theirs, clean.values())
            rows.append([f"{label}, published", "–", *cells, "–", "–", "–"])
            notes += sources(theirs)
    devices = " or ".join(sorted({run.row.get("device") or "–" for run in all_runs(table)}))
    words = f"{about(table)}, {devices}; ACC / ASR / RA in percent, means over the seeds"
    notes = dict.fromkeys([*notes, REPAIRED, *bounds(table)])
    return Grid(
        title(table, tables), words, [*header, "repaired", "seconds", "n"], rows, list(notes)
    )


def overview_csv(table):
    """The rows of OVERVIEW_CSV; what a defense does on each attack stands in the table of cells."""
    for key, label in table.rows.items():
        runs, options = of_row(table, key), dict(key[1])
        yield [
            *table.about.values(),
            label,
            *(options.get(name, "none") for name in ("stage", "selection")),
            runs[0].row["clean_budget"],
            *counts(table, key),
            *count_repaired(table, key),
            spread(runs, "seconds")[0],
            benign_loss(table, key),
        ]


def count_repaired(table, key):
    """(how many runs of a row are repaired, how many could be)."""
    runs = [
        run
        for column in table.columns
        for run in table.cells.get((column, key), [])
        if credited(table, column, run)
    ]
    return sum(map(repaired, runs)), len(runs)


def repaired(run):
    """Whether the backdoor is gone and the rest of the model is as good as before; see REPAIRED."""
    return not missed(run)


def missed(run):
    """The first condition of REPAIRED that a run does not meet, in words; "" for a repaired one."""
    acc, asr, ra = (run.numbers[name] for name in METRICS)
    before = run.attack.numbers["acc"]
    if None in (acc, asr, ra, before):
        return "a figure is missing"
    if asr > LARGEST_ASR:
        return f"the ASR is above {100 * LARGEST_ASR:.0f} %"
    if acc < before - LARGEST_LOSS:
        return f"the ACC falls by more than {100 * LARGEST_LOSS:.0f} points"
    return f"the RA is below {SMALLEST_RA} of the ACC" if ra < SMALLEST_RA * acc else ""


def bounds(table):
    """[how exactly an ASR at the limit of REPAIRED is known], [] where the test images are many, or
    no run says how many."""
    found = [count_in(run.row, "n_backdoor") for run in all_runs(table)]
    count = min(filter(None, found), default=FEW)
    if count >= FEW:
        return []
    low, high = (f"{100 * bound:.1f}" for bound in wilson(LARGEST_ASR, count))
    return [
        f"an ASR of {100 * LARGEST_ASR:.0f} % on {count:.0f} triggered test images, the fewest of "
        f"a run here, has a 95 % interval from {low} to {high} %: whether a run near the limit is "
        "repaired is not sure"
    ]


def wilson(share, count):
    """The 95 % interval of a share that `count` images have shown.

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    z = 1.959964
    centre = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z**2 / count
    return (centre - half) / scale, (centre + half) / scale


def counts(table, key):
    """(smallest, largest) number of runs in the cells of a row that hold any."""
    sizes = [
        len(table.cells[column, key]) for column in table.columns if (column, key) in table.cells
    ]
    return min(sizes), max(sizes)


def means(runs, clean):
    """ACC / ASR / RA in percent; of a clean model the ACC alone."""
    values = [spread(runs, name)[0] for name in METRICS[: 1 if clean else None]] if runs else [None]
    return slashes(values)


def published_means(row, clean):
    """The same of a published row, with the mark that says how far it can be used."""
    if not row:
        return "–"
    values = [row[name] for name in METRICS[: 1 if clean else None]]
    return slashes(values) + published.MARKS[row["usable"]]


def slashes(values):
    if all(value is None for value in values):
        return "–"
    return " / ".join("–" if value is None else f"{100 * value:.1f}" for value in values)


def seconds(runs, name="seconds"):
    mean, _ = spread(runs, name)
    return "–" if mean is None else f"{mean:.1f}" if mean < 10 else f"{mean:.0f}"


def all_runs(table):
    return [run for runs in table.cells.values() for run in runs]


# ---------- the attacks ----------


def attacks(tables, form, reported):
    """One row per attack: what the victims measure and what they cost."""
    if form == "csv":
        header = [*ATTACKS_CSV, *(CSV_PUBLISHED if reported else [])]
        return csv_text(header, [row for table in tables for row in attacks_csv(table, reported)])
    return grids([attacks_grid(table, tables, reported) for table in tables], form)


def attacks_grid(table, tables, reported):
    """The attacks of one table; a column in which nothing stands is left out."""
    header = ["attack", "poisoned", "ACC", "ASR", "RA", "training s", "trigger s", "n", "published"]
    rows, notes = [], [note for note in footnotes(table) if note[0] in UNCREDITED]
    for column, label in table.columns.items():
        runs = victims(table, column)
        share = poisoned(runs[0])
        theirs = published.find(reported, table, column, NONE)
        rows.append(
            [
                label + table.marks[column],
                "–" if share is None else f"{100 * share:.1f} %",
                *(show(runs, name) for name in METRICS),
                seconds(runs),
                "–" if (cost := trigger_seconds(runs)) is None else f"{cost:.0f}",
                str(len(runs)),
                published_means(theirs, False),
            ]
        )
        notes += sources([theirs])
    header, rows = without_empty(header, rows, ("trigger s", "published"))
    return Grid(title(table, tables), about(table), header, rows, list(dict.fromkeys(notes)))


def attacks_csv(table, reported):
    """The rows of ATTACKS_CSV, and the published numbers if there are any."""
    for column, label in table.columns.items():
        runs = victims(table, column)
        theirs = published.find(reported, table, column, NONE)
        yield [
            *table.about.values(),
            label,
            poisoned(runs[0]),
            len(runs),
            *(number for name in METRICS for number in spread(runs, name)),
            spread(runs, "seconds")[0],
            trigger_seconds(runs),
            *(csv_published(runs, theirs) if reported else []),
        ]


def poisoned(run):
    """The share of the training set that was poisoned."""
    share = run.row.get("pratio_effective")
    return float(share) if share else None


def trigger_seconds(runs):
    """The mean time that making the trigger took; None where no record says it."""
    values = [run.record.get("trigger_seconds") for run in runs]
    values = [value for value in values if isinstance(value, int | float) and 0 <= value < 1e9]
    return sum(values) / len(values) if values else None
