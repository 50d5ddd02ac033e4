"""One page of all runs: a single file that needs no network and holds numbers and images as data.

Records may come from strangers. Their texts reach the page as escaped JSON, which the page shows as
text only. No script but the page's own may run in it. Images are decoded and encoded again.
"""

import base64
import hashlib
import json
import shlex
from pathlib import Path

from antidote_bench.utils import config as options
from antidote_bench.utils import parsing
from antidote_bench.utils.errors import UserError
from antidote_bench.utils.record import folder
from antidote_bench.utils.report import detections, formats, palette, published, story
from antidote_bench.utils.report.curves import curve, finite
from antidote_bench.utils.report.images import Album
from antidote_bench.utils.report.runs import METRICS, NONE, TABLE
from antidote_bench.utils.report.tables import (
    BENIGN_LOSS,
    FOOTNOTES,
    ORACLE,
    UNCREDITED,
    benign_loss,
    missing,
    spread,
)
from antidote_bench.utils.text import one_line

HERE = Path(__file__).parent
POINTS, ALL_POINTS = 200, 60_000  # of one run's curve, and of all
GAPS = 300  # missing cells that are named
LONGEST = 300  # letters of a fact from record.json
FACTS = {
    "device": "device",
    "git_commit": "git commit",
    "antidote": "antidote",
    "peak_mb": "peak memory, MB",
    "config_hash": "configuration",
}


def build(tables, left_out, reported, judged=(), note=""):
    """The page as text.

    `tables` are as compare.py groups them, `left_out` is [(path, why)], `reported` the published
    numbers, or {}, and `judged` are the tables of detectors. `note` stands at the head.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UserError(
            f"--html needs the package {error.name}: pip install -r requirements.txt brings it"
        ) from error
    script, style, template = (
        (HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("js", "css", "html")
    )
    return (
        jinja2.Environment(autoescape=True)
        .from_string(template)
        .render(
            script=script,
            style=style,
            script_hash=digest(script),
            style_hash=digest(style),
            data=escaped(everything(tables, left_out, reported, judged, note)),
        )
    )


def digest(text):
    """The hash by which a content security policy admits an inline script or style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def escaped(value):
    """JSON in which nothing can end the element that it stands in."""
    # ASCII: U+2028 and its like are escaped too
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def everything(tables, left_out, reported, judged=(), note=""):
    """What the page shows, as plain data."""
    runs = [run for table in tables for cell in table.cells.values() for run in cell]
    album = Album(tables, judged)
    points = min(POINTS, max(ALL_POINTS // max(len(runs), 1), 2))
    cells, gaps = [], []
    for number, table in enumerate(tables):
        lacking = {(column, row): counts for column, row, *counts in missing(table)}
        cells += [
            as_cell(table, number, key, reported, points) | {"lacks": lacking.get(key)}
            for key in ordered(table)
        ]
        gaps += [
            [number, column[0], row[0], table.columns[column], table.rows[row], *counts]
            for (column, row), counts in lacking.items()
        ]
    refused = [*left_out, *album.refused]
    return {
        "summary": summary(runs, gaps, left_out),
        "note": note,
        "story": story.tell(tables, judged),
        "footnotes": FOOTNOTES,
        "published": published.FOOTNOTES if reported else None,
        "more": [*map(as_column, formats.more(tables)), *benign_column(cells)],
        "tables": [as_table(table) for table in tables],
        "cells": cells,
        "looks": {cell["names"][1]: palette.look(cell["names"][1]) for cell in cells},
        "colours": palette.COLOURS,
        "markers": [palette.svg_path(marker) for marker in palette.MARKERS],
        "missing": gaps[:GAPS],
        "triggers": album.triggers,
        "scores": album.scores,
        "added": album.added,
        "detections": [as_detections(table) for table in judged],
        "judged": album.judged,
        "found": album.found,
        "unshown": album.unshown,
        "left_out": [[one_line(path), one_line(why)] for path, why in refused],
    }


def summary(runs, gaps, left_out):
    """What the head of the page counts."""
    victims = sum(run.victim is None for run in runs)
    return {
        "runs": len(runs),
        "victims": victims,
        "repairs": len(runs) - victims,
        "missing": len(gaps),
        "left_out": len(left_out),
        "seeds": sorted({run.config.get("random_seed", "–") for run in runs}),
    }


def as_table(table):
    """What the runs of a table share, and the labels of its columns and rows."""
    return {
        **{name: table.about[name] or "–" for name in TABLE},
        "attacks": [*table.columns.values()],
        "defenses": [*table.rows.values()],
    }


def as_column(name):
    """A column of what was measured afterwards."""
    title, about = formats.MORE[name]
    return {"id": name, "title": title, "about": about, "factor": name in formats.FACTORS}


def benign_column(cells):
    """[the column of what a defense costs a benign model], [] where none ran on one."""
    if all(cell["benign_loss"][0] is None for cell in cells):
        return []
    return [{"id": "benign_loss", "title": "BENIGN", "about": BENIGN_LOSS, "factor": False}]


def as_detections(table):
    """A table of detectors as text."""
    return {
        "dataset": table.about["dataset"],
        "model": table.about["model"],
        **detections.to_grid(table)._asdict(),
    }


def ordered(table):
    """The table's keys of cells with runs, in the order of display."""
    columns, rows = list(table.columns), list(table.rows)
    return sorted(table.cells, key=lambda key: (columns.index(key[0]), rows.index(key[1])))


def as_cell(table, number, key, reported, points):
    """One row of the leaderboard."""
    runs, (column, row) = table.cells[key], key
    theirs = published.find(reported, table, column, row)
    before = None
    if row != NONE:
        victims = [run.victim for run in runs]
        before = {name: finite(spread(victims, name)[0]) for name in METRICS}
    return {
        "table": number,
        "attack": table.columns[column],
        "defense": table.rows[row],
        "names": [column[0], row[0]],
        "marks": [table.marks[column], table.marks[row]],
        "weak": any(mark in table.marks[column] for mark in UNCREDITED),
        "oracle": ORACLE in table.marks[row],
        "victim": row == NONE,
        **{
            name: [finite(value) for value in spread(runs, name)]
            for name in (*METRICS, "seconds", *formats.MORE)
        },
        "benign_loss": [finite(benign_loss(table, row)), None],  # of all its rows in the table
        "before": before,
        "runs": [as_run(run, points) for run in runs],
        "published": theirs
        and {name: theirs[name] for name in (*METRICS, "usable", "source", "note")},
    }


def as_run(run, points):
    """One seed of a cell: its numbers, where they come from, and its curve."""
    facts = {"target": run.target, "source": run.source}
    facts |= {label: run.record.get(name) for name, label in FACTS.items()}
    if isinstance(versions := run.record.get("versions"), dict):
        facts["versions"] = ", ".join(f"{name} {value}" for name, value in versions.items())
    return {
        "path": one_line(run.path),
        "seeds": seeds(run),
        "command": command(run),
        "curve": curve(run, points),
        "facts": {
            label: one_line(value)[:LONGEST] for label, value in facts.items() if value is not None
        },
        **{name: finite(number) for name, number in run.numbers.items()},
    }


def seeds(run):
    """The seeds of a run in words; for a defense its own two and its victim's."""
    own = ["random_seed", "data_seed"] if run.victim else ["random_seed", "poison_seed"]
    words = [
        f"{name.removesuffix('_seed')} {run.config[name]}" for name in own if name in run.config
    ]
    if run.victim:
        words.append(f"victim {run.victim.config.get('random_seed', '–')}")
    return ", ".join(words)


def command(run):
    """The command that makes the run again.

    The one in its record, if it is one of our scripts with options and nothing else. Otherwise the
    script with the config.yaml of the run. None where there is no script of its name.
    """
    script, stated = script_of(run), run.record.get("command")
    if not script:
        return None
    try:
        words = shlex.split(stated) if isinstance(stated, str) else []
        starts = [parsing.start(script, installed) for installed in (False, True)]
        begins = any(words[: len(start)] == start and len(words) > len(start) for start in starts)
        if begins and stated == one_line(shlex.join(words)):
            return stated
    except ValueError:  # a quotation without end
        pass
    words = [*parsing.start(script), "--yaml_path", str(run.path / folder.OPTIONS)]
    return one_line(shlex.join(words))


def script_of(run):
    """The script behind a run, None where attack/ or defense/ holds none of its name."""
    kind = "defense" if run.victim else "attack"
    names = options.scripts(kind)
    own = run.row[kind]
    if own in names or kind == "attack" and own.removeprefix("clean_") in names:
        return parsing.script(kind, own)
    return None
