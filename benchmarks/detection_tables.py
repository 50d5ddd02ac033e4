"""Tables of detectors over many attacks, in Markdown.

    python -m benchmarks.detection_tables benchmarks/results/detection_cifar10.csv --show auroc
    python -m benchmarks.detection_tables benchmarks/results/detection_cifar10.csv --show tpr
    python -m benchmarks.detection_tables benchmarks/results/detection_cifar10.csv --show published

auroc: how well a detector ranks. tpr: what it finds at the threshold that clean images set; the
column benign is the FPR on a benign victim. published: the rule of each method's own paper, beside
Table 1 of Yuan et al., "Activation Gradient based Poisoned Sample Detection Against Backdoor
Attacks", ICLR 2025, which is in published_detection.csv.
"""

import argparse
import statistics
import sys
from pathlib import Path

from antidote_bench.utils import files, launch
from antidote_bench.utils.errors import MissingError

PUBLISHED = Path(__file__).with_name("published_detection.csv")
KINDS = {"data": "training images", "input": "inputs"}
# a cell is confirmed if both rates are within these points of the published ones
NEAR_TPR, NEAR_FPR = 20, 10


def key(row):
    return row["attack"], row["label_mode"], row["detection"]


def rates(row):
    """(TPR, FPR) in percent."""
    return 100 * float(row["own_tpr"]), 100 * float(row["own_fpr"])


def is_near(there, here):
    """Whether the rates of a cell confirm the published ones."""
    return abs(there[0] - here[0]) <= NEAR_TPR and abs(there[1] - here[1]) <= NEAR_FPR


def measured(rows):
    """{(attack, label mode, detector): (mean TPR, mean FPR)} over seeds, in percent."""
    found = {}
    for row in rows:
        if row["own_tpr"] != "":
            found.setdefault(key(row), []).append(rates(row))
    return {
        cell: tuple(map(statistics.mean, zip(*all_, strict=True))) for cell, all_ in found.items()
    }


def matrix(rows, column, benign=None):
    """The mean of a column over seeds, in percent: detectors as rows, attacks as columns.

    `benign` is the column of benign victims, None for no such column.
    """
    found, order = {}, {}
    for row in rows:
        is_benign = row["n_positive"] == "0"
        name = benign if is_benign else column
        if row["detection"] and row["judges"] in KINDS and name and row[name] != "":
            place = "benign" if is_benign else attack_of(row)
            value = 100 * float(row[name])
            found.setdefault((row["judges"], row["detection"], place), []).append(value)
            order.setdefault(place)
    places = sorted(order, key=lambda place: place != "benign")
    lines = [f"| | detector | {' | '.join(places)} |", "|---|---|" + "---:|" * len(places)]
    for kind, name in sorted({cell[:2] for cell in found}):
        cells = [found.get((kind, name, place)) for place in places]
        texts = ["–" if cell is None else f"{statistics.mean(cell):.1f}" for cell in cells]
        lines.append(f"| {KINDS[kind]} | {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def attack_of(row):
    return row["attack"] + (", all2all" if row["label_mode"] == "all2all" else "")


def published(rows):
    """Every attack and detector: TPR / FPR as published, and as measured here."""
    theirs = {key(row): rates(row) for row in files.read_csv(PUBLISHED)}
    here = measured(rows)
    known = [cell for cell in theirs if cell in here]
    detectors = list(dict.fromkeys(name for _, _, name in known))
    attacks = list(dict.fromkeys((attack, mode) for attack, mode, _ in known))
    lines = [f"| attack | {' | '.join(detectors)} |", "|---" + "|---" * len(detectors) + "|"]
    for attack, mode in attacks:
        cells = [(attack, mode, name) for name in detectors]
        texts = [_cell(theirs[cell], here.get(cell)) for cell in cells]
        shown = attack + (f", {mode}" if mode == "all2all" else "")
        lines.append(f"| {shown} | {' | '.join(texts)} |")
    near = [cell for cell in known if is_near(theirs[cell], here[cell])]
    counts = [
        f"{sum(cell[2] == name for cell in near)} of {sum(cell[2] == name for cell in known)}"
        for name in detectors
    ]
    return "\n".join([*lines, f"| confirmed | {' | '.join(counts)} |"])


def _cell(there, here):
    """TPR/FPR as published, an arrow, and TPR/FPR here: bold where they are confirmed."""
    said = f"{there[0]:.0f}/{there[1]:.0f}"
    if here is None:
        return f"{said} → –"
    text = f"{said} → {here[0]:.0f}/{here[1]:.0f}"
    return f"**{text}**" if is_near(there, here) else text


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.detection_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("results", type=Path, metavar="CSV", help="results of detections")
    parser.add_argument("--show", choices=SHOWN, required=True)
    asked = parser.parse_args(argv)
    return launch.guard(lambda: show(asked.results, asked.show))


SHOWN = {
    "auroc": lambda rows: matrix(rows, "auroc"),
    "tpr": lambda rows: matrix(rows, "tpr", benign="fpr"),
    "published": published,
}


def show(path, what):
    if not path.is_file():
        raise MissingError(f"there is no file {path}: sweep.py --results makes one")
    print(SHOWN[what](files.read_csv(path)))


if __name__ == "__main__":
    sys.exit(main())
