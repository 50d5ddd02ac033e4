"""The tables of the pages say what the committed results say, and the grids name their runs."""

import re
import shlex

import pytest

from antidote_bench.utils import files
from antidote_bench.utils.sweep import grid
from benchmarks import detection_tables, tables
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
            said = given.get(f"--{option}", str(value))
            # a record says false and 40.0 where the grid says False and 40
            same = said.lower() == str(value).lower() or float(said) == value
            assert same, (row["run"], option)
        assert row["seed"] == str((cell.victim or cell).options["random_seed"])


def test_the_tables_of_detectors_count_what_they_say():
    """Means over seeds; a cell is confirmed if both rates are near the published ones."""

    def row(attack, detector, tpr, fpr, positive="5"):
        facts = {"attack": attack, "label_mode": "all2one", "detection": detector, "judges": "data"}
        facts |= {"n_positive": positive, "auroc": "0.5" if positive != "0" else ""}
        return facts | {"own_tpr": tpr, "own_fpr": fpr, "tpr": tpr, "fpr": fpr}

    rows = [row("badnet", "scan", "0.9", "0.05"), row("badnet", "scan", "1", "0.05")]
    rows += [row("badnet", "agpd", "0.6", "0"), row("blended", "scan", "0.99", "0.11")]
    rows += [row("clean_badnet", "scan", "", "0.04", "0"), row("badnet", "new", "0.9", "0")]
    text = detection_tables.published(rows).splitlines()
    assert text[0] == "| attack | scan | agpd |"
    assert text[2:4] == [
        "| badnet | **96/0 → 95/5** | 90/0 → 60/0 |",
        "| blended | 100/0 → 99/11 | 100/0 → – |",
    ]
    assert text[-1] == "| confirmed | 1 of 2 | 0 of 1 |"
    text = detection_tables.matrix(rows, "tpr", benign="fpr").splitlines()
    assert text[0] == "| | detector | benign | badnet | blended |"
    assert text[-1] == "| training images | scan | 4.0 | 95.0 | 99.0 |"
    assert detection_tables.matrix(rows, "auroc").splitlines()[-1].endswith("| 50.0 | 50.0 |")
