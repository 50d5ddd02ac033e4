"""The leaderboard: every entry fits the schema, and those from tables are what the tables say."""

import json

import jsonschema
import pytest

from antidote_bench.utils import files
from benchmarks import leaderboard
from tests.helpers import ROOT

SCHEMA = json.loads((leaderboard.FOLDER / "entry.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
ENTRIES = leaderboard.read()
# what someone else may send
EXTERNAL = {
    "kind": "external",
    "attack": "badnet",
    "pratio": 0.1,
    "defense": "ft",
    "dataset": "cifar10",
    "network": "preactresnet18",
    "acc": 0.9,
    "asr": 0.2,
    "ra": 0.7,
    "sd": {"acc": 0.01, "asr": 0.1, "ra": 0.1},
    "n": 2,
    "seeds": [0, 1],
    "command": "python defense/ft.py --result_file badnet_cifar10",
    "hardware": "one GPU",
    "source": {"text": "https://example.org/records"},
    "note": "",
}


def faults(entry):
    return [error.message for error in VALIDATOR.iter_errors(entry)]


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert not faults(EXTERNAL)
    assert SCHEMA["properties"]["kind"]["enum"] and set(SCHEMA["required"]) < set(EXTERNAL)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "best"},
        {"acc": 91.3},
        {"acc": None},
        {"seeds": None},
        {"seeds": [0, 0]},
        {"command": None},
        {"hardware": ""},
        {"source": {}},
        {"source": {"text": "x", "table": "mine.csv"}},
        {"n": 1},
        {"kind": "unreliable"},
        {"defense": "../ft"},
        {"more": 1},
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change):
    assert faults({**EXTERNAL, **change})


def test_every_entry_fits_and_lies_in_the_folder_of_its_kind():
    for path, entry in ENTRIES:
        assert not faults(entry), path
        assert path.parent.name == entry["kind"], path
        assert entry["seeds"] is None or len(entry["seeds"]) == entry["n"], path
    known = {path for path, _ in ENTRIES}
    assert known == set(leaderboard.FOLDER.rglob("*.json")) - {
        leaderboard.FOLDER / "entry.schema.json"
    }
    assert set(SCHEMA["properties"]["source"]["properties"]["table"]["enum"]) == {
        leaderboard.PUBLISHED,
        *(f"benchmarks/results/{name}.csv" for name in leaderboard.TABLES),
    }


def test_entries_from_tables_are_what_the_tables_say():
    made = {leaderboard.FOLDER / name: entry for name, entry in leaderboard.generated().items()}
    there = {path: entry for path, entry in ENTRIES if "table" in entry["source"]}
    assert made == there, "python -m benchmarks.leaderboard writes them anew"
    kinds = {entry["kind"] for entry in made.values()}
    assert kinds == {"ours", "reported", "unreliable"}


def test_ours_are_the_rows_of_the_results():
    rows = {
        (row["model"], row["defense"], row["variant"]): row
        for row in files.read_csv(ROOT / "benchmarks/results/cpu.csv")
    }
    found = [entry for _, entry in ENTRIES if entry["source"].get("table", "").endswith("cpu.csv")]
    assert len(found) == len(rows)
    for entry in found:
        method, _, variant = entry["defense"].partition("-")
        row = rows[entry["network"], method, variant]
        assert [entry[name] for name in ("acc", "asr", "ra")] == pytest.approx(
            [float(row[name]) for name in ("acc", "asr", "ra")], abs=1e-6
        )
        assert (entry["command"], entry["n"], entry["seeds"]) == (row["command"], 1, [0])


def test_runs_that_differ_in_their_seeds_are_one_entry():
    row = next(files.read_csv(ROOT / "benchmarks/results/cpu.csv").__iter__())
    two = [{**row, "seed": "1", "acc": "0.8"}, {**row, "seed": "0", "acc": "0.9"}]
    entry = leaderboard.from_runs(two, "benchmarks/results/cpu.csv")
    assert entry["acc"] == 0.85 and entry["sd"]["acc"] == pytest.approx(0.070711)
    assert (entry["n"], entry["seeds"], entry["sd"]["asr"]) == (2, [0, 1], 0)
    assert not faults(entry)
    entry = leaderboard.from_runs([two[0], {**two[1], "ra": ""}], "benchmarks/results/cpu.csv")
    assert entry["ra"] is None and entry["sd"]["ra"] is None


@pytest.fixture
def entries_of(tmp_path, monkeypatch):
    """entries_of(rows): the entries of defenses in a table of such rows and their victim, which
    differ from the victim's row."""
    victim = next(iter(files.read_csv(ROOT / "benchmarks/results/cpu.csv")))
    place = tmp_path / "benchmarks" / "results" / "x.csv"

    def entries_of(rows):
        folder = f"{victim['run']}/defense"
        rows = [{**victim, "run": f"{folder}/{n}", **row} for n, row in enumerate(rows)]
        files.write(place, files.csv_text([victim, *rows], list(victim)))
        monkeypatch.setattr(leaderboard, "ROOT", tmp_path)
        monkeypatch.setattr(leaderboard, "TABLES", ("x",))
        entry, *others = leaderboard.ours()
        assert entry["defense"] == "none" and entry["n"] == 1
        return others

    return entries_of


def test_runs_with_more_clean_images_are_another_entry(entries_of):
    entries = entries_of(
        {"defense": "ft", "clean_budget": count, "acc": acc}
        for count, acc in (("100", "0.8"), ("2500", "0.9"), ("2500", "0.7"))
    )
    found = [(entry["acc"], entry["n"], entry["note"]) for entry in entries]
    note = "recipe airbench; {} clean images"
    assert found == [(0.8, 1, note.format(100)), (0.8, 2, note.format(2500))]


def test_runs_with_other_options_are_another_entry_that_says_which(entries_of):
    command = "python defense/mm_bm.py --result_file a --save_folder_name b --random_seed"
    first, second = entries_of(
        {"defense": "mm_bm", "seed": seed, "acc": acc, "command": f"{command} {seed}{more}"}
        for seed, acc, more in (("0", "0.1", ""), ("1", "0.3", ""), ("0", "0.8", " --penalty 0.05"))
    )
    assert (first["acc"], first["n"]) == (0.2, 2) and "label" not in first
    assert (second["acc"], second["n"]) == (0.8, 1)
    assert second["label"] == "mm_bm (penalty 0.05)"
    assert "| mm_bm (penalty 0.05) |" in leaderboard.table([first, second])


def test_entries_of_others_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leaderboard, "FOLDER", tmp_path)
    own, old = tmp_path / "external" / "a.json", tmp_path / "ours" / "gone.json"
    stale = {**EXTERNAL, "kind": "ours", "source": {"text": "x", "table": leaderboard.PUBLISHED}}
    files.write_json(own, EXTERNAL)
    files.write_json(old, stale)
    assert leaderboard.main([]) == 0
    assert json.loads(own.read_text()) == EXTERNAL and not old.exists()
    assert len(leaderboard.read()) == 1 + len(leaderboard.generated())
    capsys.readouterr()
    assert leaderboard.main(["--table", "--attack", "badnet"]) == 0
    line = "| badnet | 10 % | ft | external | cifar10, preactresnet18 | 90.0 ± 1.0 | 20.0 ± 10.0 |"
    assert line in capsys.readouterr().out


# ---------- the page ----------


def shown(text):
    """What the script of a page reads."""
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def test_the_page_is_what_the_tables_say():
    text = leaderboard.PAGE.read_text(encoding="utf-8")
    assert text == leaderboard.page(), "python -m benchmarks.leaderboard writes it anew"
    assert len(text) < 2**20 and str(ROOT) not in text


def test_the_page_holds_every_run_on_cifar10():
    found = shown(leaderboard.page())
    cells = [run for cell in found["cells"] for run in cell["runs"]]
    rows = [
        row
        for name in leaderboard.ON_PAGE
        for row in files.read_csv(ROOT / f"benchmarks/results/{name}.csv")
        if row["dataset"] == "cifar10" and not row.get("detection")
    ]
    assert sorted(run["command"] for run in cells) == sorted(row["command"] for row in rows)
    assert sorted(run["acc"] for run in cells) == pytest.approx(
        sorted(float(row["acc"]) for row in rows), abs=1e-5
    )
    assert all(run["path"].startswith("benchmarks/results/") for run in cells)
    assert {run["facts"]["device"] for run in cells} == {row["device"] for row in rows}
    kinds = {table["title"].partition(": ")[2] for table in found["detections"]}
    assert "detectors of poisoned training images" in kinds and not found["left_out"]


def test_a_victim_in_two_tables_counts_once(monkeypatch):
    monkeypatch.setattr(leaderboard, "ON_PAGE", ("defenses", "attacks"))
    found = shown(leaderboard.page())
    cell = next(cell for cell in found["cells"] if cell["names"] == ["badnet", "none"])
    seeds = [run["seeds"] for run in cell["runs"]]
    assert seeds[:2] == ["random 0, poison 0", "random 1, poison 1"]
    assert len(seeds) == len(set(seeds))
    assert cell["runs"][0]["path"].startswith("benchmarks/results/defenses.csv")
    same = [why for path, why in found["left_out"] if "-badnet-" in path]
    assert len(same) == 1 and same[0].startswith("same run as benchmarks/results/defenses.csv")
