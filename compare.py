"""Compare finished runs: one table per data set and model, attacks as columns, defenses as rows.

    python compare.py record/
    python compare.py record/ --table overview --format markdown
    python compare.py record/ --format csv --output all.csv
    python compare.py record/ --html report.html --figures figures/
    python compare.py benchmarks/results/cpu.csv
    python compare.py record/ --against ft

ACC: clean test images classified correctly. ASR: triggered images that get the attacker's label.
RA: triggered images that get their true class. All in percent; as fractions in CSV. Runs that
differ only in their seeds share a cell: mean ± sample standard deviation (number of runs). Runs
that are left out are listed with the reason.

--table  cells: every attack and defense. overview: means only, and how many runs each defense
repaired. ranking: the defenses in order, their means over the attacks and their costs. attacks:
the victims, with what they cost. detection: what detectors find.
--against shows another table: how every defense differs from the named one, victim by victim.
--html writes one page that works offline: a leaderboard to sort and filter, charts, images of the
triggers, and the command behind every cell. --figures writes figures for a paper. --published adds
what others report, from benchmarks/published.csv; their recipe may differ.

Exit codes: 0 a table was made, 1 a file cannot be written, 2 usage, 3 no run found, 4 every run
found is damaged.
"""

import argparse
import os
import sys
from pathlib import Path

from antidote_bench.utils.errors import MissingError, RefusedError, UserError
from antidote_bench.utils.files import write
from antidote_bench.utils.report import (
    detections,
    formats,
    page,
    paired,
    published,
    ranking,
    summaries,
)
from antidote_bench.utils.report.runs import in_table, read_all, read_table, search
from antidote_bench.utils.report.tables import group
from antidote_bench.utils.text import one_line

TABLES = {
    "cells": formats.cells,
    "overview": summaries.overview,
    "ranking": ranking.ranking,
    "attacks": summaries.attacks,
}
DETECTION = "detection"  # the table of detectors, which have no ACC, ASR and RA


def compare(options):
    """Do what the options say; MissingError or RefusedError where there is nothing to show."""
    reported = published.read() if options.published else {}
    runs, detected, left_out, count = read(options.folders)
    tables, judged = group(runs), detections.group(detected)
    readable = options.format in ("text", "markdown") and not options.output
    if runs or detected:
        if options.against:
            content = paired.paired(tables, options.format, options.against)
        elif options.table == DETECTION:
            content = detections.show(judged, options.format)
        else:
            content = TABLES[options.table](tables, options.format, reported)
        if options.output:
            save(options.output, content)
        say(f"table written to {options.output}\n" if options.output else content, end="")
    if left_out:
        list_left_out(left_out, options.format, sys.stdout if readable else sys.stderr)
    if not runs and not detected:
        raise RefusedError(f"all {count} runs found are damaged or unfinished")
    stream = sys.stdout if readable or options.output else sys.stderr
    if options.html:
        save(options.html, page.build(tables, left_out, reported, judged, options.note))
        say(f"page written to {options.html}", stream)
    if options.figures:
        from antidote_bench.utils.report import figures  # heavy

        say(figures.save_all(tables, options.figures, save), stream)


def read(places):
    """(runs, detections, [(path, why it is left out)], how many were found) in folders and
    tables."""
    results = [Path(name) for name in places if os.path.isfile(name) and name.endswith(".csv")]
    folders = [name for name in places if Path(name) not in results]
    left_out = [(folder, "no such folder") for folder in folders if not os.path.isdir(folder)]
    paths, links = search(filter(os.path.isdir, folders))
    if not paths and not results:
        raise MissingError(
            f"no run at or below {', '.join(folders)}: name the folder of the records, often "
            "record/" + (f"; {links[0][0]} is {links[0][1]}" if links else "")
        )
    left_out += links
    others, judged = detections.split(paths)
    runs, damaged = read_all(others)
    detected, refused = detections.read_all(judged, runs)
    damaged += refused
    for path in results:
        try:
            rows = read_table(path)
        except RefusedError as error:
            damaged.append((path, error))
            continue
        more, refused = in_table(path, rows)
        judged, unusable = detections.in_table(path, rows, more)
        runs, detected = runs + more, detected + judged
        damaged += [*refused, *unusable]
    return runs, detected, left_out + damaged, len(paths) + len(results)


def list_left_out(left_out, form, stream):
    """Say which runs are not in the table, and why."""
    bullet, shown = "", one_line
    if form == "markdown":
        bullet, shown = "- ", as_list_item
    head = f"{len(left_out)} run{'s' * (len(left_out) > 1)} left out:"
    lines = ["", head, *(f"{bullet}{shown(f'{path}: {why}')}" for path, why in left_out)]
    say("\n".join(lines), stream)


def as_list_item(text):
    """A line of Markdown in which names of folders are text; plain names stay as they are."""
    return formats.as_markdown(one_line(text))


def say(text, stream=None, end="\n"):
    """Print at once; where nobody reads any more, as behind `| head`, nothing is said."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, end=end, flush=True)
    except BrokenPipeError:
        silence(stream)


def silence(stream):
    """Let a stream lead nowhere, so that the flush at the end cannot fail either."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def save(path, content):
    """Write `content` whole or not at all, to a plain file only (never over /dev/null)."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is no plain file")
        write(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def main(argv=None):
    """Run with command line arguments; returns the exit code."""
    idea, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description=idea,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="a record, a folder of records, any folder above them, or a table that "
        "sweep.py --results has written",
    )
    add(
        "--table",
        choices=[*TABLES, DETECTION],
        default="cells",
        help="what to show; default: cells",
    )
    add("--against", metavar="DEFENSE", help="compare all others with this one, victim by victim")
    forms = ["text", "markdown", "csv", "latex"]
    add("--format", choices=forms, default="text", help="default: text")
    add("--output", type=Path, metavar="FILE", help="write the table to a file; do not print it")
    add("--html", type=Path, metavar="FILE", help="also write a page: one file, for any browser")
    add("--note", default="", metavar="TEXT", help="words of yours at the head of the page")
    add("--figures", type=Path, metavar="DIR", help="also write figures as PNG, PDF and SVG")
    add("--published", action="store_true", help="add published numbers, and the difference")
    try:
        compare(parser.parse_args(argv))
    except UserError as error:
        say(f"error: {one_line(error)}", sys.stderr)
        return error.code
    return 0


def start():
    """Run as a script, which ends without a word where its output is no longer read."""
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no ± or †
    try:
        return main()
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            say("", stream, end="")


if __name__ == "__main__":
    sys.exit(start())
