"""The entries of the leaderboard: JSON files, one for each defense on a victim. And its page.

    python -m benchmarks.leaderboard                          # from the tables here
    python -m benchmarks.leaderboard --table --attack badnet  # all entries as a table

leaderboard/ours is made from the results on CIFAR-10 in benchmarks/results, leaderboard/reported
and leaderboard/unreliable from benchmarks/published.csv, as far as it is about the attacks that
ours has. Entries of others, which name no table, stay as they are; leaderboard/README.md says how
to add one. docs/leaderboard.html is the page that compare.py --html makes of our results, and of
the detectors on CIFAR-10.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from antidote_bench.utils import files
from antidote_bench.utils.report import detections, runs, tables
from antidote_bench.utils.report import page as report
from antidote_bench.utils.report.formats import as_markdown
from antidote_bench.utils.report.runs import METRICS

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "leaderboard"
KINDS = ("ours", "external", "reported", "unreliable")
DATASET, NETWORK, PRATIO = "cifar10", "preactresnet18", 0.1  # of the published figures
TABLES = ("cpu", "widths", "cpu_small", "defenses")
PAGE = ROOT / "docs" / "leaderboard.html"
ON_PAGE = (*TABLES, "detection_cifar10")
NOTE = (
    "The results of this repository on CIFAR-10: its tables of defenses and of detectors. n is the "
    "number of runs, which differ in their seeds. Open a row for the command that makes it."
)
PUBLISHED = "benchmarks/published.csv"
CARE = "a known deviation"  # where published.csv gives no other reason


def main(words=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.leaderboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", action="store_true", help="print all entries, write nothing")
    parser.add_argument("--attack", help="with --table: only entries of this attack")
    asked = parser.parse_args(words)
    if asked.table:
        print(table([entry for _, entry in read() if asked.attack in (None, entry["attack"])]))
    else:
        print(f"{write()} entries written in {FOLDER}")
        files.write(PAGE, page())
        print(f"page written to {PAGE}")
    return 0


def write():
    """Write the entries that are made from tables, delete those that are no more; their number."""
    made = {FOLDER / name: entry for name, entry in generated().items()}
    for path, entry in read():
        if "table" in entry["source"] and path not in made:
            path.unlink()
    for path, entry in made.items():
        files.write_json(path, entry)
    return len(made)


def read():
    """[(path, entry)] of all files; ValueError where one is no JSON."""
    paths = sorted(path for kind in KINDS for path in (FOLDER / kind).glob("*.json"))
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def generated():
    """{name of a file below leaderboard/: entry} of all that is made from tables."""
    own = list(ours())
    attacks = {entry["attack"] for entry in own}
    entries = [*own, *(entry for entry in reported() if entry["attack"] in attacks)]
    found = {}
    for entry in entries:
        facts = (entry[name] for name in ("dataset", "network", "attack", "defense"))
        name, number = "-".join(facts).replace(":", "_"), 1
        while (path := f"{entry['kind']}/{name}{f'-{number}' if number > 1 else ''}.json") in found:
            number += 1
        found[path] = entry
    return found


def ours():
    """An entry for every cell of our tables, the mean over its runs."""
    for name in TABLES:
        place = f"benchmarks/results/{name}.csv"
        rows = [row for row in runs.read_table(ROOT / place) if row["dataset"] == DATASET]
        found, _ = runs.in_table(Path(place), rows)
        for shown in tables.group(run for run in found if run.row["label_mode"] == "all2one"):
            for (_, defense), cell in shown.cells.items():
                yield from_runs([run.row for run in cell], place, shown.rows[defense])


def from_runs(rows, table, label=None):
    """The entry of runs that differ in their seeds; `label` is their defense in our tables."""
    first = min(rows, key=lambda row: int(row["seed"]))
    notes = [f"recipe {first['recipe'].partition(':')[0]}"]
    if first["clean_budget"] not in ("", "0"):
        notes.append(f"{first['clean_budget']} clean images")
    notes += ["settings chosen by the triggered test set"] * (first["selection"] == "oracle")
    entry = {
        "kind": "ours",
        "attack": first["attack"],
        "pratio": float(first["pratio"]),
        "defense": "-".join(filter(None, (first["defense"], first["variant"]))),
        "dataset": first["dataset"],
        "network": first["model"],
        **{name: mean(rows, name) for name in METRICS},
        "n": len(rows),
        "seeds": sorted({int(row["seed"]) for row in rows}),
        "command": first["command"],
        "hardware": f"{first['device']}, {first['precision']}",
        "source": {"text": Path(table).name, "table": table},
        "note": "; ".join(notes),
    }
    if label not in (None, entry["defense"]):
        entry["label"] = label
    if len(rows) > 1:
        entry["sd"] = {name: deviation(rows, name) for name in METRICS}
    return entry


def reported():
    """An entry for every published figure on the published network."""
    for row in files.read_csv(ROOT / PUBLISHED):
        if (row["dataset"], row["model"]) != (DATASET, NETWORK) or float(row["pratio"]) != PRATIO:
            continue
        note = row["note"] or ("" if row["usable"] == "yes" else CARE)
        yield {
            "kind": "unreliable" if row["usable"] == "no" else "reported",
            "attack": row["attack"],
            "pratio": PRATIO,
            "defense": row["defense"],
            "dataset": DATASET,
            "network": NETWORK,
            **{name: float(row[name]) if row[name] else None for name in METRICS},
            "n": 1,
            "seeds": None,
            "command": None,
            "hardware": None,
            "source": {"text": row["source"], "table": PUBLISHED},
            "note": note,
        }


def page():
    """The page of our results as text; it depends on the tables and on utils/report alone."""
    found, judged, left_out = {}, [], []
    for name in ON_PAGE:
        place = Path("benchmarks", "results", f"{name}.csv")  # as the page shows it
        rows = [row for row in runs.read_table(ROOT / place) if row["dataset"] == DATASET]
        there, refused = runs.in_table(place, rows)
        detected, unusable = detections.in_table(place, rows, there)
        found |= {run.path: run for run in there}
        judged += detected
        left_out += [*refused, *unusable]
    # of a victim in two tables the first counts, which is the one that was repaired
    kept, same = runs.distinct(
        found, found.get, lambda run: (runs.keys(run), runs.seeds_of(run, run.attack))
    )
    shown, detectors = tables.group(kept), detections.group(judged)
    return report.build(shown, left_out + same, {}, detectors, NOTE)


def values(rows, name):
    return [float(row[name]) for row in rows if row[name]]


def mean(rows, name):
    """The mean of a column over the runs, a fraction; None where one lacks it."""
    found = values(rows, name)
    return round(statistics.fmean(found), 6) if len(found) == len(rows) else None


def deviation(rows, name):
    found = values(rows, name)
    return round(statistics.stdev(found), 6) if len(found) == len(rows) else None


def table(entries):
    """The entries as a table in Markdown: by attack and defense, the victim first."""

    def place(entry):
        defense = entry["defense"]
        method = re.split("-", defense)[0]
        order = KINDS.index(entry["kind"]), entry["dataset"], entry["network"]
        return entry["attack"], defense != "none", method, defense, *order

    lines = [
        "| attack | poisoned | defense | kind | data, network | ACC | ASR | RA | n | source |",
        "| --- | ---: | --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for entry in sorted(entries, key=place):
        source = entry["source"]["text"].partition(",")[0]
        defense = entry.get("label", entry["defense"])
        cells = [entry["attack"], f"{100 * entry['pratio']:g} %", defense, entry["kind"]]
        cells += [f"{entry['dataset']}, {entry['network']}"]
        cells += [percent(entry, name) for name in METRICS] + [str(entry["n"]), source]
        lines.append(f"| {' | '.join(map(as_markdown, cells))} |")
    return "\n".join(lines)


def percent(entry, name):
    """A measure in percent, with its standard deviation where there is one."""
    if entry[name] is None:
        return "–"
    spread = entry.get("sd", {}).get(name)
    return f"{100 * entry[name]:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


if __name__ == "__main__":
    raise SystemExit(main())
