"""The tables of docs/ say what the committed results say."""

import re

from compare import main
from tests.conftest import ROOT
from utils import files

PAGE = (ROOT / "docs" / "strong_victims.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def percent(row):
    return [f"{100 * float(row[name]):.1f}" for name in ("acc", "asr", "ra")]


def line(*cells):
    return "| " + " | ".join(cells) + " |"


def victims_table():
    """The rows of victims, those of the evidence first."""
    rows = [row for name in ("cpu.csv", "widths.csv") for row in files.read_csv(RESULTS / name) if row["defense"] == "none"]
    return [
        line(f"`{row['model']}`", row["recipe"].split(":")[0], row["attack"], *percent(row), f"{float(row['seconds']):.0f}") for row in rows
    ]


def rates_table():
    """Fine-tuning at several rates, victim by victim."""
    lines = [line("victim", "its rate / batch", "`ft` at", "epochs", "ACC", "ASR", "RA"), "|---|---|---:|---:|---:|---:|---:|"]
    for row in files.read_csv(RESULTS / "rates.csv"):
        rate, batch = (re.search(rf"{name} (\S+)", row["recipe"])[1] for name in ("lr", "batch"))
        epochs = re.search(r"--epochs (\d+)", row["command"])
        told = ["none", ""] if row["defense"] == "none" else [row["lr"], epochs[1]]
        lines.append(line(f"`{row['model']}`", f"{rate} / {batch}", *told, *percent(row)))
    return lines


def test_the_tables_of_strong_victims_are_the_measured_ones(capsys):
    for table in (victims_table(), rates_table()):
        assert "\n".join(table) in PAGE
    assert main([str(RESULTS / "cpu.csv"), "--format", "markdown"]) == 0
    shown = capsys.readouterr().out
    assert shown[shown.index("| defense") :].strip() in PAGE
