"""What the head of the page of compare.py says: a line for each cell, and words of the user."""

from types import SimpleNamespace

import pytest

from antidote_bench.utils.record import folder
from antidote_bench.utils.report import detections, images, runs, story
from tests.test_compare import attack, defense
from tests.test_page import add, built, data, png, visit  # noqa: F401 (a fixture)
from tests.test_page import chromium as chromium

TABLE = {"dataset": "digits", "model": "resnet9", "recipe": "fast", "precision": "fp32"}


def told(root):
    return {line["name"]: line for line in data(built(root))["story"]}


def test_a_line_says_what_became_of_each_run(tmp_path):
    victim = attack(tmp_path / "record" / "a", acc=0.95)
    for name, numbers in {
        "ft": {"asr": 0.4, "ra": 0.5},
        "awm": {"asr": 0.1, "acc": 0.9, "ra": 0.73},
        "fst": {"asr": 0.0, "acc": 0.89},
        "fmp": {"asr": 0.0, "acc": 0.95, "ra": 0.5},
    }.items():
        defense(victim, name=name, **numbers)
    lines = told(tmp_path / "record")
    assert {name: (line["kind"], line["verdict"]) for name, line in lines.items()} == {
        "badnet": ("victim", "attacked"),
        "ft on badnet": ("bad", "not repaired: the ASR is above 10 %"),
        "awm on badnet": ("good", "repaired"),
        "fst on badnet": ("bad", "not repaired: the ACC falls by more than 5 points"),
        "fmp on badnet": ("bad", "not repaired: the RA is below 0.8 of the ACC"),
    }
    assert "95.0 % of the images" in lines["badnet"]["text"]
    assert lines["fst on badnet"]["text"].startswith("ASR 95.0 % → 0.0 %, ACC 95.0 % → 89.0 %")


def test_seeds_are_counted_and_weak_attacks_have_no_verdict(tmp_path):
    for seed, asr in enumerate([0.01, 0.2, 0.02]):
        defense(attack(tmp_path / "record" / f"a{seed}", seed=seed), asr=asr, ra=0.71, seed=seed)
    weak = attack(tmp_path / "record" / "w", name="wanet", asr=0.5)
    defense(weak, asr=0.0, row={"attack": "wanet"})
    lines = told(tmp_path / "record")
    assert lines["ft on badnet"]["verdict"] == "2 of 3 repaired: the ASR is above 10 %"
    assert lines["ft on wanet"]["verdict"] == "no verdict"


def test_many_runs_have_no_story(tmp_path, monkeypatch):
    victim = attack(tmp_path / "record" / "a")
    defense(victim)
    monkeypatch.setattr(story, "MOST", 2)
    assert len(told(tmp_path / "record")) == 2
    monkeypatch.setattr(story, "MOST", 1)
    assert told(tmp_path / "record") == {}


def table_of(judges, clean=False, **facts):
    """A table with one detector on one attack; `facts` are its row and its numbers."""
    numbers = {"score": 3.0, "target_found": None, "tpr": 0.9, "fpr": 0.05, **facts}
    run = SimpleNamespace(row={"suspects": facts.get("suspects", "")}, numbers=numbers)
    column, row = ("badnet", ()), ("nc", ())
    cells = {(column, row): [run]}
    benign = frozenset([column] if clean else [])
    return detections.Table(TABLE, judges, {column: "badnet"}, {row: "nc"}, cells, benign)


@pytest.mark.parametrize(
    ("table", "kind", "text"),
    [
        (table_of("model", suspects="0", target_found=1.0), "good", "the attacker’s target"),
        (table_of("model", suspects="3", target_found=0.0), "bad", "does not hold"),
        (table_of("model", suspects=folder.NO_CLASS), "bad", "suspects no class"),
        (table_of("model", True, suspects=folder.NO_CLASS), "plain", "suspects no class"),
        (table_of("model", True, suspects="3"), "bad", "nothing was poisoned"),
        (table_of("model"), "plain", "score 3"),
        (table_of("model", score=None), "plain", "the method abstains"),
        (table_of("input"), "plain", "flags 90.0 % of the triggered inputs and 5.0 %"),
        (table_of("data"), "plain", "of the poisoned training images"),
        (table_of("data", True), "plain", "flags 5.0 % of the clean training images"),
    ],
)
def test_a_line_says_what_a_detector_found(table, kind, text):
    (line,) = story.tell([], [table])
    assert line["name"] == "nc on badnet" and line["kind"] == kind and text in line["text"]


def test_the_found_trigger_is_on_the_page(tmp_path):
    record = add(attack(tmp_path / "a"), {folder.TRIGGERS: png(), folder.SCORES_CHART: png(40, 30)})
    (run,), _ = runs.read_all([record])
    found = table_of("model")
    cells = {key: [run] for key in found.cells}
    album = images.Album([], [found._replace(cells=cells)])
    (image,) = album.found
    assert image["caption"] == "found by nc on badnet" and list(image["size"]) == [120, 60]
    assert [list(it["size"]) for it in album.judged] == [[40, 30]] and not album.refused


def test_the_head_of_the_page(tmp_path, visit):  # noqa: F811
    victim = add(attack(tmp_path / "record" / "a"), {"preview.png": png()})
    defense(victim)
    note = "<b>ft</b> works & ends"
    view = visit(built(tmp_path / "record", "--note", note))
    assert view.locator("#note").inner_text() == note
    lines = view.locator("#story li").all_inner_texts()
    assert len(lines) == 2 and "repaired" in lines[1]
    assert view.locator("#story li.good").count() == 1
    assert view.locator("#story-images img").count() == 1
    bare = visit(built(tmp_path / "record"))
    assert not bare.locator("#note").is_visible()
