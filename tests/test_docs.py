"""The tables of the pages say what the committed results say, and the grids name their runs."""

import re
import shlex

import pytest

from antidote_bench.utils import files
from antidote_bench.utils.sweep import grid
from benchmarks import tables
from compare import main
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "strong_victims.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
# table of results: the grids whose runs it holds
GRIDS = {
    "attacks": ["attacks_digits", "attacks_cifar10"],
    "defenses": ["defenses_digits", "defenses_cifar10"],
    "baselines": ["baselines"],
    "cpu": ["cpu"],
    "rates": ["rates"],
    "widths": ["widths"],
    "detection_digits": ["detection_digits"],
    "detection_cifar10": ["detection_cifar10"],
}


def percent(row):
    return [f"{100 * float(row[name]):.1f}" for name in ("acc", "asr", "ra")]


def line(*cells):
    return "| " + " | ".join(cells) + " |"


def victims_table():
    """The rows of victims, those of the evidence first."""
    rows = [
        row
        for name in ("cpu.csv", "widths.csv")
        for row in files.read_csv(RESULTS / name)
        if row["defense"] == "none"
    ]
    return [
        line(
            f"`{row['model']}`",
            row["recipe"].split(":")[0],
            row["attack"],
            *percent(row),
            f"{float(row['seconds']):.0f}",
        )
        for row in rows
    ]


def rates_table():
    """Fine-tuning at several rates, victim by victim."""
    lines = [
        line("victim", "its rate / batch", "`ft` at", "epochs", "ACC", "ASR", "RA"),
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in files.read_csv(RESULTS / "rates.csv"):
        rate, batch = (re.search(rf"{name} (\S+)", row["recipe"])[1] for name in ("lr", "batch"))
        epochs = re.search(r"--epochs (\d+)", row["command"])
        own = ["none", ""] if row["defense"] == "none" else [row["lr"], epochs[1]]
        lines.append(line(f"`{row['model']}`", f"{rate} / {batch}", *own, *percent(row)))
    return lines


def test_the_tables_of_strong_victims_are_the_measured_ones(capsys):
    for table in (victims_table(), rates_table()):
        assert "\n".join(table) in PAGE
    assert main([str(RESULTS / "cpu.csv"), "--format", "markdown"]) == 0
    shown = capsys.readouterr().out
    assert shown[shown.index("| defense") :].strip() in PAGE


@pytest.mark.parametrize("path", tables.pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_tables_of_a_page_are_what_their_commands_print(path):
    text = path.read_text()
    assert tables.rewritten(text) == text, "python -m benchmarks.tables writes them anew"


@pytest.mark.parametrize("name", GRIDS)
def test_measured_runs_are_runs_of_the_grids(name):
    paths = [ROOT / f"config/sweep/{each}.yaml" for each in GRIDS[name]]
    cells = {str(cell.path): cell for path in paths for cell in grid.cells(grid.read(path))}
    for row in files.read_csv(RESULTS / f"{name}.csv"):
        cell = cells[row["run"]]
        words = shlex.split(row["command"])
        given = dict(zip(words[2::2], words[3::2], strict=True))
        assert words[1] == f"{cell.kind}/{cell.script}.py"
        for option, value in cell.options.items():
            assert given.get(f"--{option}", str(value)) == str(value), (row["run"], option)
        assert row["seed"] == str((cell.victim or cell).options["random_seed"])


def test_the_rules_of_the_papers_beside_the_published_table():
    page = (ROOT / "docs" / "detection.md").read_text()
    shown = re.findall(r"^  \| (\w+) \| [\d.]+ \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    rows = files.read_csv(RESULTS / "detection_cifar10.csv")
    found = {row["detection"]: row for row in rows if row["n_positive"] not in ("", "0")}
    assert len(shown) == 7
    for name, tpr, fpr in shown:
        own = [f"{100 * float(found[name][key]):.1f}" for key in ("own_tpr", "own_fpr")]
        assert own == [tpr, fpr], name
