"""A small, seeded part of what `python -m tests.fuzz` does, and what it has found."""

import csv
import io

import pytest

from antidote_bench.utils import files
from antidote_bench.utils.report import formats, page
from tests.fuzz import configs, rounds, texts

EXAMPLES = {"config": 40, "record": 12, "text": 25, "image": 8, "grid": 25}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for all cases: the records in it are made once."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("kind", rounds.KINDS)
def test_drawn_cases(kind, place):
    found = rounds.draw(kind, 0, EXAMPLES[kind], place)
    assert len(found) >= EXAMPLES[kind] // 2
    assert not [(case, faults) for case, faults in found if faults]


FOUND = {
    "a tag that a number has not": (
        "config",
        ("attack.lira", "flags", [("nesterov", "!!timestamp x")], "as it is"),
    ),
    "the same in a file": ("config", ("defense.ft", "yaml", [("lr", "!!timestamp x")], "as it is")),
    "null in a recipe": (
        "config",
        ("attack.wanet", "recipe", [("null", "1"), ("lr ", "x")], "as it is"),
    ),
    "a tag in a file of defaults": (
        "config",
        ("attack.badnet", "dataset", [("lr", "!!timestamp x")], "as it is"),
    ),
    "a pipe in the place of a folder": ("record", ([("node", "defense", "pipe")], "clp", False)),
    "results without a row": ("record", ([("content", "results.csv", "header")], "attack", False)),
    "results of a repair without a row": (
        "record",
        ([("content", "defense/ft/results.csv", "header")], "again", False),
    ),
    "a number of a million digits": (
        "record",
        ([("json", "../begun/state/begun.json", [31, 36, 25, 14], "long")], "resume attack", False),
    ),
    "data that are no mapping": (
        "record",
        ([("add", "../begun/state/begun.json", "data", "long")], "resume attack", False),
    ),
    "a class without a name": ("record", ([("json", "record.json", [33], "delete")], "ft", True)),
    "a log with other columns": (
        "record",
        ([("cell", "../begun/state/log.csv", [24, 37], "0.5")], "resume attack", True),
    ),
    "a folder as a checkpoint": (
        "record",
        ([("node", "../begun/state/train.safetensors", "folder")], "resume attack", False),
    ),
    "a state that is nested deeply": (
        "record",
        ([("content", "../begun/state/begun.json", "deep")], "resume attack", False),
    ),
    "a checkpoint of another shape": (
        "record",
        ([("tensor", "defense/ft_begun/state/finetune.safetensors", [5], "flat")], "resume", False),
    ),
    "options that lie elsewhere": ("record", ([("node", "config.yaml", "link out")], "dry", False)),
    "a tag in a grid": ("grid", ([("x", "!!timestamp x")], "as it is", [])),
    "an escape in a message": ("grid", ([("exclude", ".\ueb41\x1b[31m")], "as it is", [])),
    "an escape in a list": ("grid", ([("dataset", '"\\x1b[31m"')], "as it is", [])),
    "powers of aliases": ("grid", ([("exclude", "{attack: *a9}")], "powers", [])),
    "an alias to itself": ("grid", ([("include", "&a [*a]")], "as it is", [])),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name, place):
    kind, case = FOUND[name]
    assert not list(rounds.module_of(kind).check(case, place))


# ---------- the fuzzer itself sees what is wrong ----------


def test_the_fuzzer_sees_tracebacks_programs_and_files_outside(place):
    from tests.fuzz import world

    def work():
        import subprocess

        (place / "elsewhere").write_text("x")
        subprocess.run(["true"], check=True)
        print("\x1b[31m")
        raise RuntimeError("x")

    faults = world.run(work, allowed=[place / "record"], codes={0}).faults
    for word in ("elsewhere", "'true'", "exit code 1", "'unexpected'", r"['\x1b']"):
        assert any(word in fault for fault in faults), word


def test_the_fuzzer_sees_a_hang(place, monkeypatch):
    import time

    from tests.fuzz import world

    monkeypatch.setattr(world, "SECONDS", 0.2)
    (fault,) = world.run(lambda: time.sleep(5), allowed=[], codes={0}).faults
    assert fault.startswith("hangs")


SPOILT = {
    "csv": (formats, "as_cell", lambda cell: cell, "=1+1", "a cell that a spreadsheet runs"),
    "markdown": (formats, "as_markdown", lambda text: text, "[x](javascript:a)", "not escaped"),
    "latex": (formats, "LATEX", {}, "%x_", "not escaped"),
}


@pytest.mark.parametrize("form", SPOILT)
def test_the_fuzzer_sees_what_is_not_escaped(form, place, monkeypatch):
    module, name, spoilt, text, fault = SPOILT[form]
    case = ([("attack", text), ("dataset", text)], ("cells", form))
    assert not texts.check(case, place)
    monkeypatch.setattr(module, name, spoilt)
    assert any(fault in found for found in texts.check(case, place))


def test_the_fuzzer_sees_a_script_in_a_page(place, monkeypatch):
    case = ([("attack", "</script><script>alert(1)</script>")], ("cells", "page"))
    assert not texts.check(case, place)
    monkeypatch.setattr(page, "escaped", lambda value: str(value))
    with pytest.raises(ValueError):
        texts.check(case, place)


# ---------- cells ----------

CELLS = ["=1+1", "'=1", "'", "''", "'x", "-x", "-5", "@a", "\t=1", "＝1", "x", "", "+1e5", "a,b"]


def test_cells_come_back_and_none_is_a_formula(tmp_path):
    rows = [{"a": cell, "=b": "1"} for cell in CELLS]
    text = files.csv_text(rows, ["a", "=b"])
    for cell in (cell for row in csv.reader(io.StringIO(text)) for cell in row):
        assert not cell.startswith(files.FORMULA) or float(cell) is not None
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert files.read_csv(tmp_path / "a.csv") == rows
    assert files.read_rows(io.StringIO(text), len(rows)) == rows
    assert files.read_rows(io.StringIO("a\n'x\n"), 1) == [{"a": "'x"}]
    with pytest.raises(ValueError, match="no column 'c'"):
        files.csv_text([{"c": 1}], ["a"])


def test_every_script_is_drawn():
    assert {"attack.badnet", "defense.ft"} <= set(configs.SCRIPTS)
