"""Tables as text, Markdown, LaTeX or CSV."""

import csv
import io
import itertools
import re
from typing import NamedTuple

from antidote_bench.utils.files import as_cell
from antidote_bench.utils.report import published
from antidote_bench.utils.report.runs import CONTROLS, GAP, MEASURED, METRICS, TABLE
from antidote_bench.utils.report.tables import (
    FOOTNOTES,
    IN_TRAINING,
    ORACLE,
    UNTRAINED,
    spread,
    victims,
)

LATEX = str.maketrans(
    {
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        "±": r"$\pm$",
        "–": "--",
        UNTRAINED: r"$^\S$",
        IN_TRAINING: r"$^\dagger$",
        ORACLE: r"$^\ddagger$",
    }
)
CSV_HEADER = [
    *TABLE, "attack", "defense", "stage", "selection", "n",
    *(f"{name}_{part}" for name in METRICS for part in ("mean", "std")), "seconds_mean",
]  # fmt: skip
CSV_PUBLISHED = [
    *(f"{name}_{part}" for name in METRICS for part in ("published", "difference")),
    "usable", "source", "note",
]  # fmt: skip
# {column: (title, what it is)} of what was measured afterwards, shown where a run has it
MORE = {
    "asr_relearn": (
        "RELEARN",
        "the ASR after 5 epochs of fine-tuning on 2 % of the training set, 5 poisoned images among "
        "them",
    ),
    GAP: (
        "GAP",
        "by how many points RELEARN is above that of a model without a backdoor: a benign one or "
        "the retrained one, whichever has more",
    ),
    "cut_precision": (
        "CUT-P",
        "the share of the pruned channels that carry the backdoor, as the evaluator has found",
    ),
    "cut_recall": ("CUT-R", "the share of the channels that carry the backdoor that were pruned"),
    "cut_lift": (
        "LIFT",
        "how many times more of these were pruned than by as many channels of each layer at random",
    ),
}
FACTORS = ("cut_lift",)  # of these, what is not in percent
TEXT_WIDTH = 120  # characters; further columns go into a further block


class Sheet(NamedTuple):
    """A table with several measures per attack, as it is shown, without its layout."""

    title: str
    about: str
    columns: list  # labels
    rows: list  # (label, [[a text for each of `measures`] per column])
    footnotes: list
    measures: list  # titles: ACC, ASR, RA and others


class Grid(NamedTuple):
    """A plain table as it is shown, without its layout; the first column holds the labels."""

    title: str
    about: str
    header: list
    rows: list  # of texts, as many as the header has
    footnotes: list


def without_empty(header, rows, optional):
    """(header, rows) without those of the columns `optional` in which nothing but – stands."""
    empty = {
        place
        for place, name in enumerate(header)
        if name in optional and all(row[place] == "–" for row in rows)
    }
    header, *rows = (
        [word for place, word in enumerate(row) if place not in empty] for row in [header, *rows]
    )
    return header, rows


# ---------- the table of all cells ----------


def cells(tables, form, reported):
    """All tables in a format; `reported` are the published numbers to show beside them, or {}."""
    if form == "csv":
        return cells_csv(tables, reported)
    sheets = [to_sheet(table, tables, reported) for table in tables]
    return "\n".join({"text": text, "markdown": markdown, "latex": latex}[form](s) for s in sheets)


def to_sheet(table, tables, reported):
    """What `table` shows, with the published numbers below each row that has some."""
    rows, notes, names = [], list(footnotes(table)), [*METRICS, *more([table])]
    for key, label in table.rows.items():
        runs = [table.cells.get((column, key), []) for column in table.columns]
        label_and_marks = label + table.marks[key]
        rows.append((label_and_marks, [[show(each, name) for name in names] for each in runs]))
        theirs = [published.find(reported, table, column, key) for column in table.columns]
        if any(theirs):
            rows += beside(label, runs, theirs, len(names))
            notes += sources(theirs)
    rows += control_rows(table, names)
    notes += [f"{MORE[name][0]}: {MORE[name][1]}" for name in names[len(METRICS) :]]
    columns = [label + table.marks[key] for key, label in table.columns.items()]
    titles = [MORE[name][0] if name in MORE else name.upper() for name in names]
    notes = list(dict.fromkeys(notes))
    return Sheet(title(table, tables), about(table), columns, rows, notes, titles)


def more(tables):
    """The columns of MORE that a run in the tables has."""
    runs = [run for table in tables for cell in table.cells.values() for run in cell]
    return [name for name in MORE if any(run.numbers.get(name) is not None for run in runs)]


def control_rows(table, names):
    """The rows of the models without a backdoor that the attacks' poisoned images were tried on."""
    for label, control in CONTROLS.items():
        texts = [show(victims(table, column), control) for column in table.columns]
        if set(texts) != {"–"}:
            yield (
                label,
                [[text if name == "asr_relearn" else "–" for name in names] for text in texts],
            )


def title(table, tables):
    """Data set and model, and what else tells a table from the others."""
    words = f"{table.about['dataset'] or '–'}, {table.about['model'] or '–'}"
    same = [
        other
        for other in tables
        if all(other.about[name] == table.about[name] for name in ("dataset", "model"))
    ]
    if len(same) > 1:
        words += f", recipe {table.about['recipe'] or '–'}, {table.about['precision'] or '–'}"
    return words


def about(table):
    """Recipe and precision in words."""
    return f"recipe {table.about['recipe'] or '–'}, precision {table.about['precision'] or '–'}"


def footnotes(table):
    """What the marks in a table mean."""
    marks = "".join(table.marks.values())
    return [f"{mark} {words}" for mark, words in FOOTNOTES.items() if mark in marks]


def show(runs, name):
    """A measure, most in percent, as it stands in a cell."""
    mean, deviation = spread(runs, name)
    if mean is None:
        return "–"
    scale, sign = (1 if name in FACTORS else 100), ("+" if name == GAP else "")
    beside = "" if deviation is None else f" ± {scale * deviation:.1f} ({len(runs)})"
    return f"{scale * mean:{sign}.1f}{beside}"


def beside(label, cells, theirs, width):
    """The two rows below a row: what was published for it, and by how much ours is higher.

    `width` is the number of measures of an attack, of which the first ones are METRICS.
    """
    published_row, difference_row = [], []
    for runs, row in zip(cells, theirs, strict=True):
        mark = published.MARKS[row["usable"]] if row else ""
        pairs = [(row and row[name], spread(runs, name)[0]) for name in METRICS]
        published_row.append(
            ["–" if their is None else f"{100 * their:.1f}{mark}" for their, _ in pairs]
        )
        difference_row.append(
            ["–" if None in pair else f"{100 * (pair[1] - pair[0]):+.1f}" for pair in pairs]
        )
    empty = ["–"] * (width - len(METRICS))
    published_row, difference_row = (
        [[*cell, *empty] for cell in row] for row in (published_row, difference_row)
    )
    return [(f"{label}, published", published_row), (f"{label}, difference", difference_row)]


def sources(theirs):
    """Footnotes on published numbers."""
    rows = [row for row in theirs if row]
    marks = {published.MARKS[row["usable"]] for row in rows}
    return [
        *(f"published: {row['source']}; one seed, and the recipe may differ" for row in rows),
        *(f"{mark} {words}" for mark, words in published.FOOTNOTES.items() if mark in marks),
    ]


def cells_csv(tables, reported):
    """One row per table, attack and defense, as fractions; n is 0 where nothing was run.

    With `reported` there are more columns, and with measures that were made afterwards.
    """
    rows, measured = [], [*MEASURED, GAP] if more(tables) else []
    for table in tables:
        for column, row in itertools.product(table.columns, table.rows):
            runs, options = table.cells.get((column, row), []), dict(row[1])
            theirs = published.find(reported, table, column, row)
            rows.append(
                [
                    *table.about.values(),
                    table.columns[column],
                    table.rows[row],
                    *(options.get(name, "none") for name in ("stage", "selection")),
                    len(runs),
                    *(number for name in METRICS for number in spread(runs, name)),
                    spread(runs, "seconds")[0],
                    *(csv_published(runs, theirs) if reported else []),
                    *(number for name in measured for number in spread(runs, name)),
                ]
            )
    header = [*CSV_HEADER, *(CSV_PUBLISHED if reported else [])]
    header += [f"{name}_{part}" for name in measured for part in ("mean", "std")]
    return csv_text(header, rows)


def csv_published(runs, theirs):
    """The cells of CSV_PUBLISHED."""
    if not theirs:
        return [None] * len(CSV_PUBLISHED)
    pairs = [(theirs[name], spread(runs, name)[0]) for name in METRICS]
    numbers = [
        number
        for their, our in pairs
        for number in (their, None if None in (their, our) else our - their)
    ]
    return [*numbers, theirs["usable"], theirs["source"], theirs["note"]]


def csv_text(header, rows):
    """CSV with six digits after the point."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([as_cell(_rounded(cell)) for cell in row])
    return lines.getvalue()


def _rounded(cell):
    return round(cell, 6) if isinstance(cell, float) else cell


# ---------- layouts ----------


def grids(tables, form):
    """Plain tables in a format other than CSV."""
    layout = {"text": grid_text, "markdown": grid_markdown, "latex": grid_latex}[form]
    return "\n".join(layout(grid) for grid in tables)


def text(sheet):
    """Aligned columns; attacks that do not fit into TEXT_WIDTH follow in a further block."""
    groups = [
        text_group(label, [sheet.measures, *(cells[index] for _, cells in sheet.rows)])
        for index, label in enumerate(sheet.columns)
    ]
    return text_blocks(sheet, ["", "defense", *(label for label, _ in sheet.rows)], groups)


def text_group(label, cells):
    """The lines of one attack, equally long; the first of its cells are titles."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[0] += max(0, len(label) - sum(widths) - 2 * (len(widths) - 1))
    lines = [
        "  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True))
        for row in cells
    ]
    return [f"   {line}" for line in [label.center(len(lines[0])), *lines]]


def text_blocks(table, side, groups):
    """The labels `side` with as many `groups` of columns beside them as fit, block after block."""
    side = [label.ljust(max(map(len, side))) for label in side]
    blocks = [[side]]
    for group in groups:
        if len(blocks[-1]) > 1 and sum(len(part[0]) for part in [*blocks[-1], group]) > TEXT_WIDTH:
            blocks.append([side])
        blocks[-1].append(group)
    blocks = [
        "\n".join("".join(line).rstrip() for line in zip(*block, strict=True)) for block in blocks
    ]
    notes = filter(None, ["\n".join(table.footnotes)])
    return "\n\n".join([f"{table.title}\n{table.about}", *blocks, *notes]) + "\n"


def grid_text(grid):
    """Aligned columns."""
    side, *columns = zip(grid.header, *grid.rows, strict=True)
    groups = [[f"   {word.rjust(max(map(len, column)))}" for word in column] for column in columns]
    return text_blocks(grid, side, groups)


def markdown(sheet):
    """A GitHub table."""
    header = [f"{label} {name}" for label in sheet.columns for name in sheet.measures]
    rows = [[label, *itertools.chain(*cells)] for label, cells in sheet.rows]
    return grid_markdown(
        Grid(sheet.title, sheet.about, ["defense", *header], rows, sheet.footnotes)
    )


def grid_markdown(grid):
    """A GitHub table."""
    lines = [grid.header, ["---", *["---:"] * (len(grid.header) - 1)], *grid.rows]
    table = "\n".join(f"| {' | '.join(map(as_markdown, line))} |" for line in lines)
    words = [f"### {as_markdown(grid.title)}", as_markdown(grid.about)]
    return "\n\n".join([*words, table, *map(as_markdown, grid.footnotes)]) + "\n"


def as_markdown(text):
    """A text in which nothing is Markdown: no link, no image, no HTML."""
    text = re.sub(r"([\\`*|<])", r"\\\1", text).replace("![", r"\!\[")
    return re.sub(r"\]([(\[:])", r"\]\\\1", text)


def latex(sheet):
    """A table float (needs booktabs): title in the caption, footnotes below."""
    count, width = len(sheet.columns), len(sheet.measures)
    attacks = (
        rf"\multicolumn{{{width}}}{{c}}{{{label.translate(LATEX)}}}" for label in sheet.columns
    )
    begins = (width * index + 2 for index in range(count))
    rules = (rf"\cmidrule(lr){{{begin}-{begin + width - 1}}}" for begin in begins)
    header = [
        latex_line("", *attacks),
        " ".join(rules),
        latex_line("defense", *sheet.measures * count),
    ]
    rows = [[label, *itertools.chain(*cells)] for label, cells in sheet.rows]
    return latex_float(sheet, f"l{'r' * width * count}", header, rows)


def grid_latex(grid):
    """A table float (needs booktabs): title in the caption, footnotes below."""
    header = latex_line(*(label.translate(LATEX) for label in grid.header))
    return latex_float(grid, f"l{'r' * (len(grid.header) - 1)}", [header], grid.rows)


def latex_line(*words):
    line = " & ".join(words) + r" \\"
    # [ and * would be read as options of the rule or the line before
    return "{}" + line if line.startswith(("[", "*")) else line


def latex_float(table, columns, header, rows):
    """The lines around the `header`, which is LaTeX, and the `rows`, which are texts."""
    caption = f"{table.title} ({table.about})".translate(LATEX)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        *header,
        r"\midrule",
        *(latex_line(*(word.translate(LATEX) for word in row)) for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\footnotesize {note.translate(LATEX)}" for note in table.footnotes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"
