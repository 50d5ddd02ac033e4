"""Classes by name, other data in a sweep, and words and images that say what they are about."""

import dataclasses
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageColor
from torch import nn

import compare
import sweep
from antidote_bench.attack import badnet
from antidote_bench.defense import ft, nc
from antidote_bench.utils import charts, config, files, parsing, text
from antidote_bench.utils.data import dataset, listing, sources, target
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.errors import ConfigError, MissingError
from antidote_bench.utils.record import folder
from antidote_bench.utils.report import images, published, ranking, runs, tables
from antidote_bench.utils.sweep import grid
from tests.helpers import image_folders
from tests.test_compare import attack, defense
from tests.test_page import add, built, chromium, data, laboratory, png, visit  # noqa: F401

CLASSES = ("cat", "no entry", "stop")
GRID = {
    "dataset": "folder",
    "attack": "badnet",
    "attack_options": {
        "attack_target": "stop",
        "image_size": 16,
        "model": "resnet9",
        "width": 4,
        "epochs": 1,
        "batch_size": 8,
        "pratio": 0.3,
    },
}

# ---------- classes by name ----------


@pytest.mark.parametrize(("wanted", "number"), [("stop", 2), (1, 1), ("cafe\u0301", 3)])
def test_a_class_has_a_number_and_a_name(wanted, number):
    assert target.class_number(wanted, (*CLASSES, "caf\u00e9"), "signs") == number


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("stpo", "'stpo' is not a class of signs: the nearest are 2 (stop); a number from 0 to 2"),
        ("No Entry", "the nearest are 1 (no entry)"),
        ("zebra", "give the name or the number of one of its classes, 0 (cat) to 2 (stop)"),
        (3, "attack_target 3 is not a class of signs: it has 0 to 2"),
        ("", "'' is not a class"),
    ],
)
def test_what_is_no_class_is_refused_with_the_nearest(wanted, words):
    with pytest.raises(ConfigError) as refused:
        target.class_number(wanted, CLASSES, "signs")
    assert words in str(refused.value)


def test_a_name_of_two_classes_is_refused():
    with pytest.raises(ConfigError, match="several classes of signs: give the number, 0 or 2"):
        target.class_number("a", ("a", "b", "a"), "signs")


def test_digits_are_a_number_and_a_note_says_so(capsys):
    listing.say.cache_clear()
    options = badnet.Config(attack_target=1)
    assert target.resolved(options, ("1", "2", "3")).attack_target == 1
    note = "note: attack_target 1 is the class 1 (2); the class that is called 1 has the number 0"
    assert note in capsys.readouterr().err
    assert target.resolved(options, CLASSES).attack_target == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("written", "value"),
    [("stop", "stop"), ("14", 14), ("00014", 14), ("yes", "yes"), ("null", "null"), ("1.5", "1.5")],
)
def test_the_option_is_a_number_or_text(written, value, tmp_path):
    assert parsing.parse(badnet.Config, ["--attack_target", written]).attack_target == value
    path = tmp_path / "options.yaml"
    path.write_text(yaml.safe_dump({"attack_target": value}))
    assert parsing.parse(badnet.Config, ["--yaml_path", str(path)]).attack_target == value


def test_numbers_below_zero_stay_refused():
    with pytest.raises(ConfigError, match="attack_target must be 0 or more"):
        parsing.parse(badnet.Config, ["--attack_target=-1"])


@pytest.mark.parametrize(
    ("number", "names", "shown"),
    [
        (2, CLASSES, "2 (stop)"),
        (2, (), "2"),
        (1, ("00000", "00001"), "1"),
        (0, ("a\nb\x1b[0m",), "0 (a b [0m)"),
        (0, ("x" * 99,), f"0 ({'x' * 57}...)"),
    ],
)
def test_a_class_is_shown_with_its_name(number, names, shown):
    assert text.name_of_class(number, names) == shown


def test_names_of_classes_come_from_folders_alone(tmp_path):
    image_folders(tmp_path / "signs", classes=CLASSES, count=1)
    for path in (tmp_path / "signs").rglob("*.png"):
        path.write_bytes(b"no image")
    assert sources.class_names("folder", tmp_path / "signs") == CLASSES
    assert sources.class_names("digits", tmp_path) == tuple("0123456789")
    assert sources.class_names("cifar10", tmp_path)[:2] == ("airplane", "automobile")
    for name, place in (
        ("gtsrb", "gtsrb/gtsrb/GTSRB/Training"),
        ("tiny", "tiny/tiny-imagenet-200/train"),
    ):
        with pytest.raises(MissingError):
            sources.class_names(name, tmp_path)
        for label in ("00010", "00002"):
            (tmp_path / place / label).mkdir(parents=True)
        assert sources.class_names(name, tmp_path) == ("00002", "00010")


# ---------- a run by name, and a sweep on other data ----------


@pytest.fixture(scope="module")
def bench(tmp_path_factory, run):
    """A sweep's victim on the data set A, whose target was named, and what there is beside it."""
    place = tmp_path_factory.mktemp("words")
    image_folders(place / "A", classes=CLASSES)
    shutil.copytree(place / "A", place / "moved")
    image_folders(place / "B", offset=1, classes=CLASSES)
    image_folders(place / "more", classes=CLASSES, count=13)
    (cell,) = grid.cells(GRID, places(place, "A"))
    printed = run(*cell.words(place / "record"))
    return SimpleNamespace(place=place, cell=cell, printed=printed, records=place / "record")


def places(place, name, cache="cache"):
    return {"dataset_path": str(place / name), "cache_path": str(place / cache)}


def test_a_name_and_its_number_are_one_run(bench, run):
    words = bench.cell.words(bench.records)
    made = folder.read_options(bench.records / bench.cell.path)
    assert made["attack_target"] == 2
    assert folder.read_results(bench.records / bench.cell.path)["target"] == "2"
    for name, code, said in (("2", 0, "already done"), ("cat", 2, "attack_target 2 there and 0")):
        done = run(*(name if word == "stop" else word for word in words), code=code)
        assert said in done.stdout + done.stderr


def test_the_dry_run_says_the_names(bench, run):
    words = [*bench.cell.words(bench.records), "--dry_run"]
    out = run(*words).stdout
    assert "of 3 classes: 0 (cat), 1 (no entry), 2 (stop)\n" in out
    assert "target   2 (stop)\n" in out
    wrong = ["stip" if word == "stop" else word for word in words]
    assert "the nearest are 2 (stop)" in run(*wrong, code=2).first


def states(bench, name="A", cache="cache", **options):
    content = {**GRID, "attack_options": {**GRID["attack_options"], **options}}
    cells = grid.cells({**content, "defense": "ft"}, places(bench.place, name, cache))
    cells = [dataclasses.replace(cells[0], name=bench.cell.name), cells[1]]
    cells[1] = dataclasses.replace(cells[1], victim=cells[0])
    repaired(bench, cells[1])
    return list(grid.states(cells, bench.records).values())


def repaired(bench, cell):
    """A finished defense as far as a sweep looks at it."""
    place = bench.records / cell.path
    options = parsing.parse(ft.Config, cell.words(bench.records)[1:]).plain()
    files.write_yaml(place / folder.OPTIONS, options)
    victim = json.loads((place.parents[1] / folder.RECORD).read_text())
    files.write_json(
        place / folder.RECORD, {"victim_sha256": victim["files"][folder.WEIGHTS], "files": {}}
    )


def test_the_name_in_a_grid_is_the_number_in_the_record(bench):
    assert states(bench) == [folder.DONE, folder.DONE]
    assert states(bench, attack_target=2) == [folder.DONE, folder.DONE]
    assert states(bench, attack_target="cat")[0] == grid.OTHER


@pytest.mark.parametrize("cache", ["cache", "cold"])
def test_a_sweep_sees_other_data_and_moved_data(bench, cache):
    assert states(bench, "moved", cache) == [folder.DONE, folder.DONE]
    assert states(bench, "B", cache) == [grid.OTHER, grid.OTHER]
    assert states(bench, "more", cache) == [grid.OTHER, grid.OTHER]
    assert states(bench, "nowhere", cache) == [folder.DONE, folder.DONE]


def test_pixels_in_the_cache_decide(bench):
    """Also where the files are other ones: the same pixels in another format are the same data."""
    shutil.copytree(bench.place / "A", bench.place / "format", dirs_exist_ok=True)
    for path in (bench.place / "format").rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    assert states(bench, "format", "warm") == [grid.OTHER, grid.OTHER]
    dataset.open_dataset(
        "folder", bench.place / "format", image_size=16, cache=bench.place / "warm"
    )
    assert states(bench, "format", "warm") == [folder.DONE, folder.DONE]


def test_a_record_without_a_listing_counts_where_it_was_made(bench):
    path = bench.records / bench.cell.path / folder.RECORD
    old = path.read_text()
    info = json.loads(old)
    del info["data_listing"]
    path.write_text(json.dumps(info))
    try:
        assert states(bench, "A", "cold") == [folder.DONE, folder.DONE]
        assert states(bench, "moved", "cold") == [grid.OTHER, grid.OTHER]
        assert states(bench, "more", "cold") == [grid.OTHER, grid.OTHER]
    finally:
        path.write_text(old)


def test_a_table_of_results_is_not_taken_for_other_data(bench, tmp_path):
    cells = grid.cells(GRID, places(bench.place, "A"))
    row = sweep._row(bench.cell, bench.records)
    files.write(tmp_path / "t.csv", files.csv_text([row], list(row)))
    new = {cell.path: folder.NEW for cell in cells}
    known = sweep._with_results(tmp_path / "t.csv", cells, new, tmp_path)
    assert set(known.values()) == {grid.RECORDED}
    dataset.open_dataset("folder", bench.place / "B", image_size=16, cache=bench.place / "cache")
    cells = grid.cells(GRID, places(bench.place, "B"))
    with pytest.raises(ConfigError, match="on other data than --dataset_path names now"):
        sweep._with_results(tmp_path / "t.csv", cells, new, tmp_path)


def test_a_grid_reads_numbers_as_the_options_do(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("attack: badnet\nattack_options: {attack_target: [00014, 0o7, 00018, 0x10]}\n")
    (cells) = grid.cells(grid.read(path))
    assert [cell.options["attack_target"] for cell in cells] == [14, "0o7", "00018", 16]


def test_a_misspelled_class_stops_a_sweep_before_it_begins(bench):
    cells = grid.cells({"attack": "badnet", "attack_options": {"attack_target": "thee"}})
    with pytest.raises(ConfigError, match=r"'thee' is not a class of digits.*in python attack"):
        grid.check(cells, bench.records)
    grid.check(grid.cells(GRID, places(bench.place, "nowhere")), bench.records)
    with pytest.raises(ConfigError, match=r"the nearest are 2 \(stop\)"):
        grid.check(
            grid.cells(GRID, {**places(bench.place, "A"), "attack_target": "shop"}), bench.records
        )


# ---------- images and tables ----------


def split(images, labels):
    return Split(images, torch.tensor(labels), torch.tensor([0, 1]))


def test_a_preview_frames_its_images_and_names_their_classes():
    white = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    content = charts.preview(split(white, [0, 1]), split(white, [2, 2]))
    shown = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    for row in range(3):
        top = charts.TOP + row * (charts.SIDE + charts.GAP)
        for column in range(2):
            left = charts.MARGIN + column * (charts.SIDE + charts.GAP)
            edges = shown[[top - 1, top + charts.SIDE], left : left + charts.SIDE]
            assert (edges == ImageColor.getrgb(charts.FRAME)).all()
            sides = shown[top : top + charts.SIDE, [left - 1, left + charts.SIDE]]
            assert (sides == ImageColor.getrgb(charts.FRAME)).all()
    named = charts.preview(split(white, [0, 1]), split(white, [2, 2]), names=("\u732b", *CLASSES))
    changed = (np.asarray(Image.open(io.BytesIO(named)).convert("RGB")) != shown).any((1, 2))
    assert changed.any() and not changed[charts.TOP - 1 :].any(), "only the words above differ"


def named_victim(place, name="badnet", number=1, **options):
    victim = attack(place, name=name, attack_target=number, row={"target": number}, **options)
    facts = {"classes": 3, "class_names": list(CLASSES), "fingerprint": {"train": "a"}}
    return add(victim, {"preview.png": png()}, data=facts)


def test_tables_and_pages_name_the_target(tmp_path, capsys):
    defense(named_victim(tmp_path / "record" / "a"))
    named_victim(tmp_path / "record" / "b", number=2)
    page = data(built(tmp_path / "record"))
    assert "badnet (attack_target 1 (no entry))" in capsys.readouterr().out
    facts = {cell["runs"][0]["facts"]["target"] for cell in page["cells"]}
    assert facts == {"1 (no entry)", "2 (stop)"}
    captions = [image["caption"] for image in page["triggers"]]
    assert captions[1].endswith("digits, target 2 (stop)")


@pytest.mark.parametrize("names", [None, 7, ["cat", 1], ["\x1b[31m"] * 3])
def test_strange_names_of_classes_do_no_harm(tmp_path, names, capsys):
    for number in ("0", "9" * 5000 if names else "x"):
        victim = named_victim(tmp_path / "record" / number[:1], number=number[:4000])
        add(victim, data={"class_names": names})
    page = data(built(tmp_path / "record"))
    assert len(page["cells"]) == 2 and "\x1b" not in capsys.readouterr().out


def test_published_numbers_meet_the_data_set_and_not_its_name(tmp_path):
    row = {"dataset": "cifar10", "model": "preactresnet18"}
    attack(tmp_path / "real", row=row, dataset="cifar10")
    attack(tmp_path / "own", row=row, dataset="folder")
    attack(tmp_path / "renamed", row=row, dataset="digits", dataset_name="cifar10")
    other = {**row, "dataset": "mine"}
    attack(tmp_path / "called", row=other, dataset="cifar10", dataset_name="mine")
    reported, found = published.read(), {}
    for name in ("real", "own", "renamed", "called"):
        read, _ = runs.read_all([tmp_path / name])
        (table,) = tables.group(read)
        found[name] = published.find(reported, table, next(iter(table.columns)), runs.NONE)
    assert found["real"]["acc"] == found["called"]["acc"] == 0.9132
    assert found["own"] is None and found["renamed"] is None


def test_an_own_set_is_no_built_in_one_in_a_table_of_results(tmp_path):
    """Rows without a mark of the pixels: the command says which data set it was."""
    row = {"dataset": "cifar10", "model": "preactresnet18"}
    for name in ("cifar10", "folder"):
        attack(tmp_path / name, row=row, dataset=name)
    known = add(attack(tmp_path / "known", row=row, dataset="cifar10", seed=1))
    add(known, data={"fingerprint": {"train": "a", "test": "b"}})
    read, _ = runs.read_all([tmp_path / name for name in ("cifar10", "folder", "known")])
    sizes = {
        table.about["dataset"]: sum(map(len, table.cells.values())) for table in tables.group(read)
    }
    (real,) = [name for name in sizes if name != "cifar10 #own"]
    assert sizes == {"cifar10 #own": 1, real: 2}


def test_images_that_a_defense_adds_are_on_the_page(tmp_path):
    victim = attack(tmp_path / "record" / "a")
    (tmp_path / "record" / "outside.png").write_bytes(png())
    add(
        defense(victim, name="nc"),
        {"triggers.png": png(400, 90), "scores.png": png(), "broken.png": b"x"},
    )
    add(defense(victim, name="ft"), {f"{number}.png": png() for number in range(9)})
    page = data(built(tmp_path / "record"))
    found = [(image["file"], image["caption"], image["size"]) for image in page["added"]]
    of_nc = ("triggers.png", "triggers.png of nc on badnet", [400, 90])
    assert found[-1] == of_nc and len(found) == 1 + images.MOST_ADDED
    assert all(image["source"].startswith("data:image/webp;base64,") for image in page["added"])
    assert any("broken.png" in path for path, _ in page["left_out"])
    assert [image["caption"] for image in page["scores"]] == ["nc on badnet"]


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "x.svg", "preview.png", "a/x.png"])
def test_only_plain_names_of_images_are_looked_at(name):
    assert not images.is_added_image(name)


def test_the_page_shows_an_added_image_in_the_details(tmp_path, visit):  # noqa: F811
    victim = attack(tmp_path / "record" / "a")
    add(defense(victim, name="nc"), {"triggers.png": png(400, 90)})
    view = visit(built(tmp_path / "record"))
    for button in view.locator("#board .open").all():
        button.click()
    image = view.locator("tr.details figure img")
    assert image.count() == 1
    assert "triggers.png of nc on badnet" in view.inner_text("tr.details figure figcaption")
    image.scroll_into_view_if_needed()
    view.wait_for_function("(node) => node.naturalWidth === 400", arg=image.element_handle())


def test_a_phone_shows_acc_asr_and_ra(tmp_path, visit):  # noqa: F811
    view = visit(built(laboratory(tmp_path / "record")), 390)
    edges = "(nodes) => nodes.map((node) => node.getBoundingClientRect().right)"
    for column in ("acc", "asr", "ra"):
        cells = view.locator(f"#board tr.cell td.{column}").evaluate_all(edges)
        assert cells and max(cells) <= 390, column


# ---------- the ranking ----------


def test_defenses_are_ranked_by_what_they_do_on_strong_attacks(tmp_path, capsys):
    """DER by hand: ft (1 + .90 - .10) / 2 = .90 and (1 + .40 - 0) / 2 = .70; fp .95 and .60."""
    first = attack(tmp_path / "a", acc=0.9, asr=0.95)
    second = attack(tmp_path / "b", name="blended", acc=0.9, asr=1.0, ra=0.0)
    weak = attack(tmp_path / "c", name="sig", acc=0.9, asr=0.3, ra=0.5)
    row = {"attack": "blended"}
    defense(first, name="ft", acc=0.8, asr=0.05, row={"seconds": 4, "peak_mb": 700})
    defense(second, name="ft", acc=0.95, asr=0.6, ra=0.3, row={**row, "seconds": 8, "peak_mb": 90})
    defense(first, name="fp", acc=0.9, asr=0.05)
    defense(second, name="fp", acc=0.9, asr=0.8, ra=0.1, row=row)
    defense(weak, name="fp", acc=0.1, asr=0.0, ra=0.1, row={"attack": "sig"})
    defense(first, name="anp", acc=0.9, asr=0.0, row={"selection": "oracle"})
    (table,) = tables.group(runs.read_all(runs.find_runs([tmp_path]))[0])
    found = {row[0]: (place, values[0]) for row, place, values, _ in ranking.ranked(table)}
    assert list(found) == ["none", "fp", "ft", "anp"]
    assert found["fp"] == (1.5, pytest.approx((0.95 + 0.6) / 2))
    assert found["ft"] == (1.5, pytest.approx((0.9 + 0.7) / 2))
    assert found["anp"][0] is None and found["none"] == (None, None)
    assert compare.main([str(tmp_path), "--table", "ranking"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "ft 1.5 80.0 87.5 32.5 57.5 2 of 2 6.0 700".split() in lines
    assert "none – – 90.0 97.5 2.0 2 of 2 2.5 –".split() in lines


def test_equal_defenses_share_their_places(tmp_path):
    victim = attack(tmp_path / "a")
    for name, asr in (("ft", 0.0), ("fp", 0.0), ("anp", 0.5)):
        defense(victim, name=name, asr=asr, acc=0.9, ra=0.4)
    (table,) = tables.group(runs.read_all(runs.find_runs([tmp_path]))[0])
    places = {row[0]: place for row, place, *_ in ranking.ranked(table)}
    assert places == {"none": None, "ft": 1.5, "fp": 1.5, "anp": 3.0}


# ---------- sentences ----------


def test_a_record_that_is_not_there_is_looked_for_once(tmp_path):
    missing = tmp_path / "w.pt"
    with pytest.raises(MissingError) as said:
        folder.find(str(missing), tmp_path)
    assert str(said.value).count(f"looked at {missing};") == 1
    with pytest.raises(MissingError, match=f"looked at w.pt and {missing};"):
        folder.find("w.pt", tmp_path)
    missing.write_bytes(b"weights")
    with pytest.raises(MissingError, match=r"w.pt is a file, and a record is a folder"):
        folder.find("w.pt", tmp_path)


class Counted(torch.optim.Adam):
    steps = 0

    def step(self, closure=None):
        Counted.steps += 1
        return super().step(closure)


def test_nc_says_how_many_steps_its_searches_take(tmp_path, monkeypatch):
    default = parsing.parse(nc.Config, ["--result_file", "x"])
    assert default.effort(1960, 43) == (
        "searches 43 triggers, one for each class, 10 at once: at most 24800 steps in all, each "
        "with 10 triggers on 32 images"
    )
    classes, clean, short = 5, 12, {"together": 2, "search_epochs": 3, "search_batch": 8}
    options = dataclasses.replace(default, precision="fp32", **short)
    images = torch.randint(256, (clean, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(clean) % classes
    record = SimpleNamespace(
        clean=Split(images, labels, labels), spec=SimpleNamespace(classes=classes), state=tmp_path
    )
    monkeypatch.setattr(nc.torch.optim, "Adam", Counted)
    nc.find_triggers(nn.Sequential(nn.Flatten(), nn.Linear(192, classes)), record, options)
    assert f"at most {Counted.steps} steps in all" in options.effort(clean, classes)


def test_other_defenses_say_nothing_more():
    options = parsing.parse(ft.Config, ["--result_file", "x"])
    assert options.effort(100, 10) == "" and isinstance(options, config.Defense)
