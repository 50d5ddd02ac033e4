"""Print one table per data set and model from the folders of finished runs: attacks as columns, defenses as rows.

    python compare.py record/
    python compare.py record/ --format csv --output all.csv
    python compare.py record/ --html report.html
    python compare.py benchmarks/results/cpu.csv

ACC: clean test images classified right; ASR: triggered images that get the attacker's label; RA: the same images
given their true class; all in percent (csv: fractions). Runs that differ in nothing but their seeds share a cell, which
then reads mean ± sample standard deviation (number of runs). Runs left out are listed with the reason.
--html writes one page that works offline: a leaderboard to sort and filter, charts, pictures of the triggers, and the command
behind every cell. --published adds what others report, from benchmarks/published.csv; their recipe may differ.

Exit codes: 0 a table was made, 1 --output or --html cannot be written, 2 usage, 3 no run found, 4 every run found is damaged.
"""

import argparse
import csv
import io
import itertools
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from utils import page, published
from utils.errors import MissingError, RefusedError, UserError
from utils.files import write
from utils.finished import METRICS, TABLE, find_runs, read_all, read_table
from utils.tables import FOOTNOTES, IN_TRAINING, ORACLE, group, spread

LATEX = str.maketrans({
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
    "±": r"$\pm$", "–": "--", IN_TRAINING: r"$^\dagger$", ORACLE: r"$^\ddagger$",
})  # fmt: skip
CSV_HEADER = [*TABLE, "attack", "defense", "stage", "selection", "n",
              *(f"{name}_{part}" for name in METRICS for part in ("mean", "std")), "seconds_mean"]  # fmt: skip
CSV_PUBLISHED = [*(f"{name}_{part}" for name in METRICS for part in ("published", "difference")), "usable", "source", "note"]
TEXT_WIDTH = 120  # characters; more attacks go into a further block


class Sheet(NamedTuple):
    """A table as it is shown, without its layout."""

    title: str
    about: str
    columns: list  # labels
    rows: list  # (label, [[ACC, ASR, RA] per column])
    footnotes: list


def show(runs, name):
    """A measure in percent, as it stands in a cell."""
    mean, deviation = spread(runs, name)
    if mean is None:
        return "–"
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f} ({len(runs)})")


def to_sheet(table, tables, figures):
    """What `table` shows, with the published `figures` below each row that has some; the title tells it from the others."""
    about = {name: value or "–" for name, value in table.about.items()}
    title = f"{about['dataset']}, {about['model']}"
    if sum(all(other.about[name] == table.about[name] for name in ("dataset", "model")) for other in tables) > 1:
        title += f", recipe {about['recipe']}, {about['precision']}"
    columns = [label + table.marks[key] for key, label in table.columns.items()]
    rows, notes = [], {f"{mark} {text}": None for mark, text in FOOTNOTES.items() if mark in "".join(table.marks.values())}
    for key, label in table.rows.items():
        cells = [table.cells.get((column, key), []) for column in table.columns]
        rows.append((label + table.marks[key], [[show(runs, name) for name in METRICS] for runs in cells]))
        found = [published.find(figures, table.about, column, key) for column in table.columns]
        if any(found):
            rows += beside(label, cells, found)
            notes |= dict.fromkeys(sources(found))
    return Sheet(title, f"recipe {about['recipe']}, precision {about['precision']}", columns, rows, list(notes))


def beside(label, cells, found):
    """The two rows below a row: what was published for it, and what ours has more."""
    theirs, more = [], []
    for runs, figure in zip(cells, found, strict=True):
        mark = published.MARKS[figure["usable"]] if figure else ""
        pairs = [(figure and figure[name], spread(runs, name)[0]) for name in METRICS]
        theirs.append(["–" if their is None else f"{100 * their:.1f}{mark}" for their, _ in pairs])
        more.append(["–" if None in pair else f"{100 * (pair[1] - pair[0]):+.1f}" for pair in pairs])
    return [(f"{label}, published", theirs), (f"{label}, difference", more)]


def sources(found):
    """Footnotes on published figures."""
    figures = [figure for figure in found if figure]
    marks = {published.MARKS[figure["usable"]] for figure in figures}
    return [
        *(f"published: {figure['source']}; one seed, and the recipe may differ" for figure in figures),
        *(f"{mark} {text}" for mark, text in published.FOOTNOTES.items() if mark in marks),
    ]


def render_text(sheet):
    """Aligned columns; attacks that do not fit into TEXT_WIDTH follow in a further block."""
    side = ["", "defense", *(label for label, _ in sheet.rows)]
    side = [label.ljust(max(map(len, side))) for label in side]
    blocks = [[side]]
    for index, label in enumerate(sheet.columns):
        group = text_group(label, [cells[index] for _, cells in sheet.rows])
        if len(blocks[-1]) > 1 and sum(len(part[0]) for part in [*blocks[-1], group]) > TEXT_WIDTH:
            blocks.append([side])
        blocks[-1].append(group)
    shown = ["\n".join("".join(line).rstrip() for line in zip(*block, strict=True)) for block in blocks]
    return "\n\n".join([f"{sheet.title}\n{sheet.about}", *shown, *filter(None, ["\n".join(sheet.footnotes)])]) + "\n"


def text_group(label, cells):
    """The lines of one attack, equally long."""
    cells = [("ACC", "ASR", "RA"), *cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[0] += max(0, len(label) - sum(widths) - 4)
    lines = ["  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)) for row in cells]
    return [f"   {line}" for line in [label.center(len(lines[0])), *lines]]


def render_markdown(sheet):
    """A GitHub table."""

    def escape(words):
        return re.sub(r"([\\`*|<])", r"\\\1", words)

    header = ["defense", *(f"{escape(label)} {name.upper()}" for label in sheet.columns for name in METRICS)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    lines += [[escape(label), *itertools.chain(*cells)] for label, cells in sheet.rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([f"### {escape(sheet.title)}", escape(sheet.about), table, *map(escape, sheet.footnotes)]) + "\n"


def render_latex(sheet):
    """A table float (needs booktabs): title in the caption, footnotes below."""

    def line(*words):
        return " & ".join(words) + r" \\"

    def escape(words):
        return words.translate(LATEX)

    count = len(sheet.columns)
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{escape(sheet.title)} ({escape(sheet.about)})}}",
        rf"\begin{{tabular}}{{l{'rrr' * count}}}", r"\toprule",
        line("", *(rf"\multicolumn{{3}}{{c}}{{{escape(label)}}}" for label in sheet.columns)),
        " ".join(rf"\cmidrule(lr){{{3 * index + 2}-{3 * index + 4}}}" for index in range(count)),
        line("defense", *["ACC", "ASR", "RA"] * count), r"\midrule",
        *(line(escape(label), *map(escape, itertools.chain(*cells))) for label, cells in sheet.rows),
        r"\bottomrule", r"\end{tabular}", *(rf"\par\footnotesize {escape(note)}" for note in sheet.footnotes),
        r"\end{table}",
    ]) + "\n"  # fmt: skip


def render_csv(tables, figures):
    """One row per table, attack and defense, as fractions; n is 0 where nothing was run. With `figures` there are more columns."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([*CSV_HEADER, *(CSV_PUBLISHED if figures else [])])
    for table in tables:
        for column, row in itertools.product(table.columns, table.rows):
            runs, options = table.cells.get((column, row), []), dict(row[1])
            kind = [options.get(name, "none") for name in ("stage", "selection")]
            numbers = [number for name in METRICS for number in spread(runs, name)] + [spread(runs, "seconds")[0]]
            more = csv_published(runs, published.find(figures, table.about, column, row)) if figures else []
            cells = [*table.about.values(), table.columns[column], table.rows[row], *kind, len(runs), *numbers, *more]
            writer.writerow([round(cell, 6) if isinstance(cell, float) else cell for cell in cells])
    return lines.getvalue()


def csv_published(runs, figure):
    """The cells of CSV_PUBLISHED."""
    if not figure:
        return [None] * len(CSV_PUBLISHED)
    pairs = [(figure[name], spread(runs, name)[0]) for name in METRICS]
    numbers = [number for their, our in pairs for number in (their, None if None in (their, our) else our - their)]
    return [*numbers, figure["usable"], figure["source"], figure["note"]]


def render(tables, form, figures):
    """All tables in a format."""
    if form == "csv":
        return render_csv(tables, figures)
    layout = {"text": render_text, "markdown": render_markdown, "latex": render_latex}[form]
    return "\n".join(layout(to_sheet(table, tables, figures)) for table in tables)


def save(path, content):
    """Write `content` whole or not at all, to a plain file only (never over /dev/null)."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is no plain file")
        write(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def compare(folders, form, output, html, figures):
    """Make the table and list what is not in it; raises MissingError or RefusedError where there is nothing to show."""
    results = [Path(name) for name in folders if os.path.isfile(name) and name.endswith(".csv")]
    folders = [name for name in folders if Path(name) not in results]
    left_out = [(folder, "no such folder") for folder in folders if not os.path.isdir(folder)]
    if not (paths := find_runs(filter(os.path.isdir, folders))) and not results:
        raise MissingError(f"no run at or below {', '.join(folders)}: name the folder of the records, often record/")
    runs, damaged = read_all(paths)
    for path in results:
        try:
            more, refused = read_table(path)
        except RefusedError as error:
            more, refused = [], [(path, error)]
        runs, damaged = runs + more, damaged + refused
    tables, left_out = group(runs), left_out + damaged
    readable = form in ("text", "markdown") and not output
    if runs and output:
        save(output, render(tables, form, figures))
        print(f"table written to {output}")
    elif runs:
        print(render(tables, form, figures), end="")
    if left_out:
        head = f"{len(left_out)} run{'s' * (len(left_out) > 1)} left out:"
        bullet = "- " if form == "markdown" else ""
        lines = ["", head, *(f"{bullet}{path}: {why}" for path, why in left_out)]
        print("\n".join(lines), file=sys.stdout if readable else sys.stderr)
    if not runs:
        raise RefusedError(f"all {len(paths) + len(results)} runs found are damaged or unfinished")
    if html:
        save(html, page.build(tables, left_out, figures))
        print(f"page written to {html}", file=sys.stdout if readable or output else sys.stderr)


def main(argv=None):
    """Run with command line arguments; returns the exit code."""
    idea, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="compare.py", description=idea, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="a record, a folder of records, any above them, or a table that sweep.py --results has written",
    )
    parser.add_argument("--format", choices=["text", "markdown", "csv", "latex"], default="text", help="default: text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there instead of printing it")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page of everything there too: one file, for any browser")
    parser.add_argument("--published", action="store_true", help="lay the published figures beside ours, with the difference")
    options = parser.parse_args(argv)
    try:
        figures = published.read() if options.published else {}
        compare(options.folders, options.format, options.output, options.html, figures)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that knows no ± or †
    sys.exit(main())
