"""Print one table per data set and model from the folders of finished runs: attacks as columns, defenses as rows.

    python compare.py record/
    python compare.py record/ --format csv --output all.csv

ACC: clean test images classified right; ASR: triggered images that get the attacker's label; RA: the same images
given their true class; all in percent (csv: fractions). Runs that differ in nothing but their seeds share a cell, which
then reads mean ± sample standard deviation (number of runs). Runs left out are listed with the reason.

Exit codes: 0 a table was made, 1 --output cannot be written, 2 usage, 3 no run found, 4 every run found is damaged.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from utils.config import NOT_IDENTITY, SEEDS
from utils.errors import MissingError, RefusedError, UserError
from utils.files import write

METRICS = ("acc", "asr", "ra")
TABLE = ("dataset", "model", "recipe", "precision")
# Results that keep runs apart as options do; a label shows them only where the options do not suffice.
OF_ATTACK, OF_DEFENSE = ("label_mode", "n_test"), ("stage", "selection", "prior", "clean_budget", "recipe")
NEEDED = {*TABLE, *METRICS, *OF_ATTACK, *OF_DEFENSE, "attack", "defense", "variant", "seconds"}
CSV_HEADER = [*TABLE, "attack", "defense", "stage", "selection", "n",
              *(f"{name}_{part}" for name in METRICS for part in ("mean", "std")), "seconds_mean"]  # fmt: skip
NONE = ("none", ())
WEAK, IN_TRAINING, ORACLE = "*", "†", "‡"
FOOTNOTES = {
    WEAK: "weak attack (ASR below 80 % before defense): no defense is credited on it",
    IN_TRAINING: "in-training: trains its own model on the poisoned set instead of repairing the victim",
    ORACLE: "chosen with test data: not comparable",
}
LATEX = str.maketrans({
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
    "±": r"$\pm$", "–": "--", IN_TRAINING: r"$^\dagger$", ORACLE: r"$^\ddagger$",
})  # fmt: skip
TEXT_WIDTH = 120  # characters; more attacks go into a further block


@dataclass(frozen=True)
class Run:
    """A finished run; `victim` is the attack run that a defense repaired, None for an attack."""

    path: Path
    row: dict  # results.csv: column -> text
    numbers: dict  # acc, asr, ra (fractions) and seconds; None: not applicable
    config: dict  # option -> text
    weights: str | None  # sha256 of model.safetensors
    victim: "Run | None"

    @property
    def attack(self):
        return self.victim or self


class Table(NamedTuple):
    """The runs of one data set, model, recipe and precision; columns and rows in the order of display."""

    about: dict
    columns: dict  # column key -> label
    rows: dict  # row key -> label
    marks: dict  # either key -> footnote marks
    cells: dict  # (column key, row key) -> runs


class Page(NamedTuple):
    """A table as it is shown, without its layout."""

    title: str
    about: str
    columns: list  # labels
    rows: list  # (label, [[ACC, ASR, RA] per column])
    footnotes: list


def find_runs(folders):
    """Every folder that holds a run, finished or not, at or below `folders`; each once, links followed."""
    seen, runs = set(), []

    def unreadable(error):
        runs.append(Path(error.filename))

    for top in folders:
        for path, inside, files in os.walk(top, followlinks=True, onerror=unreadable):
            new = (real := os.path.realpath(path)) not in seen
            if new and ("state" in inside or {"results.csv", "record.json"} & set(files)):
                runs.append(Path(path))
            inside[:] = sorted(set(inside) - {"state"}) if new else []
            seen.add(real)
    return runs


def read_run(path):
    """The run in a folder; RefusedError says what is wrong with it."""
    record = load(path, "record.json", json.loads)
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise RefusedError("record.json lists no files")
    if record.get("format") != 1 or record.get("kind") not in ("attack", "defense"):
        raise RefusedError(f"record.json is of format {record.get('format')!r}, kind {record.get('kind')!r}")
    config = load(path, "config.yaml", parse_config, record)
    row, numbers = load(path, "results.csv", parse_results, record)
    victim = read_victim(path, record.get("victim_sha256")) if record["kind"] == "defense" else None
    return Run(path, row, numbers, config, record["files"].get("model.safetensors"), victim)


def read_victim(path, weights):
    """The attack run that the defense run in `path` lies in, which must be the one it was made for."""
    try:
        attack = read_run(Path(os.path.abspath(path)).parent.parent)
    except RefusedError as error:
        raise RefusedError(f"its attack run cannot be used: {error}") from error
    if attack.victim or weights is None or attack.weights != weights:
        raise RefusedError("made for another victim than the one it lies with")
    return attack


def load(path, name, parse, record=None):
    """parse(text) of the file `name`, whose sha256 must be the one in `record`."""
    try:
        content = (path / name).read_bytes()
        if record and hashlib.sha256(content).hexdigest() != record["files"].get(name):
            raise RefusedError(f"{name} was changed after it was written")
        return parse(content.decode())
    except FileNotFoundError:
        raise RefusedError(f"no {name}" if record else f"no {name}: unfinished") from None
    except (OSError, ValueError, RecursionError, csv.Error, yaml.YAMLError) as error:
        raise RefusedError(f"{name} is unusable: {printable(error)}") from error


def parse_config(text):
    """{option: value as text}."""
    config = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(config, dict):
        raise ValueError("it holds no options")
    return {printable(name): printable(value) for name, value in config.items() if value is not None}


def parse_results(text):
    """(column -> text, measure -> number or None) of the one row in a results.csv."""
    rows = list(csv.DictReader(io.StringIO(text)))
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows instead of 1")
    if missing := sorted(name for name in NEEDED if rows[0].get(name) is None):
        raise ValueError(f"no value for {', '.join(missing)}")
    row = {name: printable(value) for name, value in rows[0].items()}
    numbers = {name: float(row[name]) if row[name] else None for name in (*METRICS, "seconds")}
    for name, number in numbers.items():
        if number is not None and not 0 <= number <= (math.inf if name == "seconds" else 1):
            raise ValueError(f"{name} is {number}")
    if (total := (numbers["asr"] or 0) + (numbers["ra"] or 0)) > 1 + 2e-6:  # either may be rounded to 6 digits
        raise ValueError(f"ASR + RA is {total:.6g}, more than 1")
    return row, numbers


def printable(value):
    """Text of one line and without control characters: records may come from strangers."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(value)).split())


def read_all(paths):
    """(runs, [(path, why it is left out)]); of runs with the same options and seeds only the first counts."""
    runs, left_out = {}, []
    for path in paths:
        try:
            run = read_run(path)
        except RefusedError as error:
            left_out.append((path, error))
            continue
        seeds = tuple(part.config.get(seed) for part in (run, run.attack) for seed in sorted(SEEDS))
        first = runs.setdefault((keys(run), seeds), run)
        if first is not run:
            left_out.append((path, f"same run as {first.path}"))
    return list(runs.values()), left_out


def keys(run):
    """(table, column, row) that a run belongs to; a column or row is (name, settings)."""
    table = tuple(run.attack.row[name] for name in TABLE)
    column = run.attack.row["attack"], settings(run.attack, OF_ATTACK)
    if run.victim is None:
        return table, column, NONE
    same_precision = run.row["precision"] == run.victim.row["precision"]
    name = "-".join(filter(None, (run.row["defense"], run.row["variant"])))
    return table, column, (name, settings(run, OF_DEFENSE if same_precision else (*OF_DEFENSE, "precision")))


def settings(run, results):
    """The options and the columns `results` that describe an experiment, as sorted pairs without the empty ones."""
    options = {name: value for name, value in run.config.items() if name not in {*NOT_IDENTITY, *SEEDS, *TABLE}}
    options |= {name: run.row[name] for name in results}
    return tuple(sorted((name, value) for name, value in options.items() if value))


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


def show(runs, name):
    """A measure in percent, as it stands in a cell."""
    mean, deviation = spread(runs, name)
    if mean is None:
        return "–"
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f} ({len(runs)})")


def to_page(table, tables):
    """What `table` shows; the title tells it from the others."""
    about = {name: value or "–" for name, value in table.about.items()}
    title = f"{about['dataset']}, {about['model']}"
    if sum(all(other.about[name] == table.about[name] for name in ("dataset", "model")) for other in tables) > 1:
        title += f", recipe {about['recipe']}, {about['precision']}"
    columns = [label + table.marks[key] for key, label in table.columns.items()]
    rows = []
    for key, label in table.rows.items():
        cells = [[show(table.cells.get((column, key), []), name) for name in METRICS] for column in table.columns]
        rows.append((label + table.marks[key], cells))
    footnotes = [f"{mark} {text}" for mark, text in FOOTNOTES.items() if mark in "".join(table.marks.values())]
    return Page(title, f"recipe {about['recipe']}, precision {about['precision']}", columns, rows, footnotes)


def render_text(page):
    """Aligned columns; attacks that do not fit into TEXT_WIDTH follow in a further block."""
    side = ["", "defense", *(label for label, _ in page.rows)]
    side = [label.ljust(max(map(len, side))) for label in side]
    blocks = [[side]]
    for index, label in enumerate(page.columns):
        group = text_group(label, [cells[index] for _, cells in page.rows])
        if len(blocks[-1]) > 1 and sum(len(part[0]) for part in [*blocks[-1], group]) > TEXT_WIDTH:
            blocks.append([side])
        blocks[-1].append(group)
    shown = ["\n".join("".join(line).rstrip() for line in zip(*block, strict=True)) for block in blocks]
    return "\n\n".join([f"{page.title}\n{page.about}", *shown, *filter(None, ["\n".join(page.footnotes)])]) + "\n"


def text_group(label, cells):
    """The lines of one attack, equally long."""
    cells = [("ACC", "ASR", "RA"), *cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[0] += max(0, len(label) - sum(widths) - 4)
    lines = ["  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)) for row in cells]
    return [f"   {line}" for line in [label.center(len(lines[0])), *lines]]


def render_markdown(page):
    """A GitHub table."""

    def escape(words):
        return re.sub(r"([\\`*|<])", r"\\\1", words)

    header = ["defense", *(f"{escape(label)} {name.upper()}" for label in page.columns for name in METRICS)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    lines += [[escape(label), *itertools.chain(*cells)] for label, cells in page.rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([f"### {escape(page.title)}", escape(page.about), table, *map(escape, page.footnotes)]) + "\n"


def render_latex(page):
    """A table float (needs booktabs): title in the caption, footnotes below."""

    def line(*words):
        return " & ".join(words) + r" \\"

    def escape(words):
        return words.translate(LATEX)

    count = len(page.columns)
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{escape(page.title)} ({escape(page.about)})}}",
        rf"\begin{{tabular}}{{l{'rrr' * count}}}", r"\toprule",
        line("", *(rf"\multicolumn{{3}}{{c}}{{{escape(label)}}}" for label in page.columns)),
        " ".join(rf"\cmidrule(lr){{{3 * index + 2}-{3 * index + 4}}}" for index in range(count)),
        line("defense", *["ACC", "ASR", "RA"] * count), r"\midrule",
        *(line(escape(label), *map(escape, itertools.chain(*cells))) for label, cells in page.rows),
        r"\bottomrule", r"\end{tabular}", *(rf"\par\footnotesize {escape(note)}" for note in page.footnotes),
        r"\end{table}",
    ]) + "\n"  # fmt: skip


def render_csv(tables):
    """One row per table, attack and defense, as fractions; n is 0 where nothing was run."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for table in tables:
        for column, row in itertools.product(table.columns, table.rows):
            runs, options = table.cells.get((column, row), []), dict(row[1])
            kind = [options.get(name, "none") for name in ("stage", "selection")]
            numbers = [number for name in METRICS for number in spread(runs, name)] + [spread(runs, "seconds")[0]]
            numbers = [None if number is None else round(number, 6) for number in numbers]
            writer.writerow([*table.about.values(), table.columns[column], table.rows[row], *kind, len(runs), *numbers])
    return lines.getvalue()


def render(tables, form):
    """All tables in a format."""
    if form == "csv":
        return render_csv(tables)
    layout = {"text": render_text, "markdown": render_markdown, "latex": render_latex}[form]
    return "\n".join(layout(to_page(table, tables)) for table in tables)


def save(path, content):
    """Write `content` whole or not at all, to a plain file only (never over /dev/null)."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is no plain file")
        write(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def compare(folders, form, output):
    """Make the table and list what is not in it; raises MissingError or RefusedError where there is nothing to show."""
    left_out = [(folder, "no such folder") for folder in folders if not os.path.isdir(folder)]
    if not (paths := find_runs(filter(os.path.isdir, folders))):
        raise MissingError(f"no run at or below {', '.join(folders)}: name the folder of the records, often record/")
    runs, damaged = read_all(paths)
    left_out += damaged
    if runs and output:
        save(output, render(group(runs), form))
        print(f"table written to {output}")
    elif runs:
        print(render(group(runs), form), end="")
    if left_out:
        readable = form in ("text", "markdown") and not output
        head = f"{len(left_out)} run{'s' * (len(left_out) > 1)} left out:"
        bullet = "- " if form == "markdown" else ""
        lines = ["", head, *(f"{bullet}{path}: {why}" for path, why in left_out)]
        print("\n".join(lines), file=sys.stdout if readable else sys.stderr)
    if not runs:
        raise RefusedError(f"all {len(paths)} runs found are damaged or unfinished")


def main(argv=None):
    """Run with command line arguments; returns the exit code."""
    idea, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="compare.py", description=idea, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a record, a folder of records, or any above them")
    parser.add_argument("--format", choices=["text", "markdown", "csv", "latex"], default="text", help="default: text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there instead of printing it")
    options = parser.parse_args(argv)
    try:
        compare(options.folders, options.format, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that knows no ± or †
    sys.exit(main())
