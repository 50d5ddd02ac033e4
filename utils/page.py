"""One page of all runs: a single file that needs no network, in which numbers and pictures stand as data.

Records may come from strangers. Their texts reach the page as escaped JSON, which the page shows as text only; no script but
the page's own may run in it; pictures are decoded and drawn anew.
"""

import base64
import csv
import hashlib
import io
import json
import math
import shlex
from pathlib import Path

from utils import config as options
from utils import published
from utils.errors import RefusedError, UserError
from utils.finished import METRICS, NONE, TABLE, load, printable
from utils.pictures import Album
from utils.tables import FOOTNOTES, ORACLE, WEAK, missing, spread

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


def build(tables, left_out, figures):
    """The page as text; `tables` as compare.py groups them, `left_out` [(path, why)], `figures` published ones, or {}."""
    try:
        import jinja2
    except ImportError as error:
        raise UserError(f"--html needs the package {error.name}: pip install -r requirements.txt brings it") from error
    script, style, template = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("js", "css", "html"))
    return (
        jinja2.Environment(autoescape=True)
        .from_string(template)
        .render(
            script=script,
            style=style,
            script_hash=digest(script),
            style_hash=digest(style),
            data=escaped(everything(tables, left_out, figures)),
        )
    )


def digest(text):
    """The hash by which a content security policy admits an inline script or style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def escaped(value):
    """JSON in which nothing can end the element that it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 and its like are escaped too
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def everything(tables, left_out, figures):
    """What the page shows, as plain data."""
    runs = [run for table in tables for cell in table.cells.values() for run in cell]
    album = Album(tables)
    points = min(POINTS, max(ALL_POINTS // len(runs), 2))
    cells, gaps = [], []
    for number, table in enumerate(tables):
        lacking = {(column, row): (have, want) for column, row, have, want in missing(table)}
        cells += [as_cell(table, number, key, figures, points) | {"lacks": lacking.get(key)} for key in ordered(table)]
        gaps += [[number, *key, table.columns[key[0]], table.rows[key[1]], *lacking[key]] for key in lacking]
    victims = sum(run.victim is None for run in runs)
    return {
        "summary": {"runs": len(runs), "victims": victims, "repairs": len(runs) - victims, "missing": len(gaps), "left_out": len(left_out),
                    "seeds": sorted({run.config.get("random_seed", "–") for run in runs})},
        "footnotes": FOOTNOTES, "published": published.FOOTNOTES if figures else None,
        "tables": [{**{name: table.about[name] or "–" for name in TABLE}, "attacks": [*table.columns.values()],
                    "defenses": [*table.rows.values()]} for table in tables],
        "cells": cells, "missing": [[number, column[0], row[0], *rest] for number, column, row, *rest in gaps[:GAPS]], "triggers": album.triggers, "scores": album.scores, "unshown": album.unshown,
        "left_out": [[printable(path), printable(why)] for path, why in [*left_out, *album.refused]],
    }  # fmt: skip


def ordered(table):
    """The table's keys of cells with runs, in the order of display."""
    columns, rows = list(table.columns), list(table.rows)
    return sorted(table.cells, key=lambda key: (columns.index(key[0]), rows.index(key[1])))


def as_cell(table, number, key, figures, points):
    """One row of the leaderboard."""
    runs, (column, row) = table.cells[key], key
    figure = published.find(figures, table.about, column, row)
    return {
        "table": number, "attack": table.columns[column], "defense": table.rows[row], "names": [column[0], row[0]],
        "marks": [table.marks[column], table.marks[row]], "weak": table.marks[column] == WEAK, "oracle": ORACLE in table.marks[row],
        "victim": row == NONE, **{name: [finite(value) for value in spread(runs, name)] for name in (*METRICS, "seconds")},
        "before": None if row == NONE else {name: finite(spread([run.victim for run in runs], name)[0]) for name in METRICS},
        "runs": [as_run(run, points) for run in runs],
        "published": figure and {name: figure[name] for name in (*METRICS, "usable", "source", "note")},
    }  # fmt: skip


def as_run(run, points):
    """One seed of a cell: its numbers, where they come from, and its curve."""
    facts = {label: run.record.get(name) for name, label in FACTS.items()}
    if isinstance(versions := run.record.get("versions"), dict):
        facts["versions"] = ", ".join(f"{name} {value}" for name, value in versions.items())
    return {
        "path": printable(run.path), "seeds": seeds(run), "command": command(run), "curve": curve(run, points),
        "facts": {label: printable(value)[:LONGEST] for label, value in facts.items() if value is not None},
        **{name: finite(number) for name, number in run.numbers.items()},
    }  # fmt: skip


def seeds(run):
    """The seeds of a run in words; for a defense its own two and its victim's."""
    own = ["random_seed", "data_seed"] if run.victim else ["random_seed", "poison_seed"]
    words = [f"{name.removesuffix('_seed')} {run.config[name]}" for name in own if name in run.config]
    if run.victim:
        words.append(f"victim {run.victim.config.get('random_seed', '–')}")
    return ", ".join(words)


def command(run):
    """What makes the run again: its own word, where that is nothing but a script of ours with options, or its configuration."""
    kind = "defense" if run.victim else "attack"
    script, told = options.script(kind, run.row[kind]), run.record.get("command")
    try:
        if isinstance(told, str) and told.startswith(f"python {script} ") and told == printable(shlex.join(shlex.split(told))):
            return told
    except ValueError:  # a quotation without end
        pass
    return printable(shlex.join(["python", script, "--yaml_path", str(run.path / "config.yaml")]))


def curve(run, points):
    """{stages: [[name, how many points]], epoch, loss, measured: [[position, ACC, ASR, RA]]}, None where no log can be read."""
    try:
        rows = load(run.path, "log.csv", parse_log, run.record)
    except RefusedError:
        return None
    step = math.ceil(len(rows) / points)
    rows = [row for place, row in enumerate(rows) if (len(rows) - 1 - place) % max(step, 1) == 0]
    stages = []
    for stage, *_ in rows:
        if not stages or stages[-1][0] != stage:
            stages.append([stage, 0])
        stages[-1][1] += 1
    measured = [[place, *values] for place, (_, _, _, *values) in enumerate(rows) if any(value is not None for value in values)]
    return {"stages": stages, "epoch": [row[1] for row in rows], "loss": [row[2] for row in rows], "measured": measured} if rows else None


def parse_log(text):
    """[(stage, epoch, loss, ACC, ASR, RA)] of the epochs in a log.csv."""
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row.get("epoch")]
    return [(printable(row.get("stage")), int(row["epoch"]), *(finite(row.get(name), 4) for name in ("loss", *METRICS))) for row in rows]


def finite(value, digits=6):
    """A number with so many significant digits that a page needs; None for none, an empty text and what JSON cannot hold."""
    number = math.nan if value in (None, "") else float(value)
    return float(f"{number:.{digits}g}") if math.isfinite(number) else None
