"""Detectors of poisoned training images beside a published table.

    python -m benchmarks.published_detection benchmarks/results/detection_cifar10.csv

The published figures are in published_detection.csv: Table 1 of Yuan et al., "Activation Gradient
based Poisoned Sample Detection Against Backdoor Attacks", ICLR 2025. Both sides use the rule of
each method's own paper. The table is Markdown.
"""

import argparse
import statistics
import sys
from pathlib import Path

from antidote_bench.utils import files, launch
from antidote_bench.utils.errors import MissingError

PUBLISHED = Path(__file__).with_suffix(".csv")
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


def table(rows):
    """Every attack and detector: TPR / FPR as published, and as measured here."""
    published = {key(row): rates(row) for row in files.read_csv(PUBLISHED)}
    here = measured(rows)
    known = [cell for cell in published if cell in here]
    detectors = list(dict.fromkeys(name for _, _, name in known))
    attacks = list(dict.fromkeys((attack, mode) for attack, mode, _ in known))
    lines = [f"| attack | {' | '.join(detectors)} |", "|---" + "|---" * len(detectors) + "|"]
    for attack, mode in attacks:
        cells = [(attack, mode, name) for name in detectors]
        texts = [_cell(published[cell], here.get(cell)) for cell in cells]
        shown = attack + (f", {mode}" if mode == "all2all" else "")
        lines.append(f"| {shown} | {' | '.join(texts)} |")
    near = [cell for cell in known if is_near(published[cell], here[cell])]
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
        prog="python -m benchmarks.published_detection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("results", type=Path, metavar="CSV", help="results of detections")
    asked = parser.parse_args(argv)
    return launch.guard(lambda: show(asked.results))


def show(path):
    if not path.is_file():
        raise MissingError(f"there is no file {path}: sweep.py --results makes one")
    print(table(files.read_csv(path)))


if __name__ == "__main__":
    sys.exit(main())
