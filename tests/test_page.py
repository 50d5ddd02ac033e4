"""The page of compare.py: what it holds, that strangers' records cannot harm it, and that it works.

The last part opens it in a real browser.
"""

import io
import json
import os
import random
import re
import subprocess
import sys
import time

import pytest
from PIL import Image

import compare
from antidote_bench.utils.errors import RefusedError
from antidote_bench.utils.report import curves, images, page, palette, published, runs, tables
from benchmarks import pictures
from tests.test_compare import ROOT, attack, defense, edit_record, sha256

HOSTILE = (
    "<img src=x onerror=\"document.title='harmed'\"></script>"
    "<script>document.title='harmed'</script>&amp;\u2028"
)
COMMAND = "python attack/badnet.py --dataset digits --save_folder_name 'a b'"
DAMAGED_PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 100


def png(width=120, height=60):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(file, "PNG")
    return file.getvalue()


def log(epochs, stage="train", measured=0):
    lines = ["stage,epoch,loss,lr,acc,asr,ra,seconds,asr_all", "before,,,,0.9,0.9,0.1,0,"]
    for epoch in range(1, epochs + 1):
        values = "0.8,0.7,0.2" if measured and epoch % measured == 0 else ",,"
        lines.append(f"{stage},{epoch},{2 / epoch},0.01,{values},{epoch},")
    return "\n".join([*lines, "final,,,,0.9,0.95,0.04,9,"]).encode()


def add(folder, files=None, **facts):
    """Put files and facts into a finished run, as its record lists them."""
    sums = json.loads((folder / "record.json").read_text())["files"]
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
        sums[name] = sha256(folder / name)
    edit_record(folder, files=sums, **facts)
    return folder


def laboratory(root):
    """Runs of every kind.

    Three seeds, a lost seed, a weak attack, an oracle, a published cell, a stranger's names, and an
    unfinished run.
    """
    for seed, acc in enumerate([0.90, 0.92, 0.97]):
        victim = attack(root / f"badnet_{seed}", acc=acc, seed=seed)
        add(
            victim,
            {"log.csv": log(15, measured=5), "preview.png": png()},
            command=COMMAND,
            device="cpu, 2 threads",
            git_commit="c0ffee",
            versions={"python": "3.12", "torch": "2.9"},
            peak_mb=812,
        )
        add(
            defense(victim, acc=acc - 0.02, asr=[0.01, 0.02, 0.06][seed], ra=0.8, seed=seed),
            {"log.csv": log(100, "finetune")},
        )
    add(
        defense(victim, name="fmp", asr=0.1, ra=0.75, row={"seconds": 11.5}),
        {"scores.png": png(300, 90)},
    )
    defense(victim, name="anp", acc=0.9, asr=0.001, row={"selection": "oracle", "variant": "best"})
    defense(
        attack(root / "wanet", name="wanet", asr=0.5, ra=0.4),
        asr=0.3,
        ra=0.6,
        row={"attack": "wanet"},
    )
    paper = {"dataset": "cifar10", "model": "preactresnet18", "recipe": "backdoorbench: epochs 100"}
    for name in ("badnet", "trojannn"):
        defense(
            attack(root / f"paper_{name}", name=name, row=paper, acc=0.92, asr=0.96, ra=0.03),
            row=paper,
        )
    attack(root / "stranger", name=HOSTILE, asr=0.9, row={"recipe": HOSTILE})
    (root / "cut" / "state").mkdir(parents=True)
    return root


def built(root, *arguments):
    target = root.parent / "page.html"
    assert compare.main([str(root), "--html", str(target), *arguments]) == 0
    return target


def data(file):
    """What the page's script reads."""
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.S
    )
    return json.loads(text)


# ---------- what stands in the page ----------


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return built(laboratory(tmp_path_factory.mktemp("page") / "record"), "--published")


def test_a_cell_is_a_row_with_every_seed(report):
    shown = data(report)
    assert shown["summary"] == {
        "runs": 15,
        "victims": 7,
        "repairs": 8,
        "missing": 4,
        "left_out": 1,
        "seeds": ["0", "1", "2"],
    }
    ft = next(
        cell
        for cell in shown["cells"]
        if cell["names"] == ["badnet", "ft"] and len(cell["runs"]) == 3
    )
    assert (
        next(cell["lacks"] for cell in shown["cells"] if cell["defense"] == "fmp") == [1, 3]
        and ft["lacks"] is None
    )
    assert (
        ft["acc"] == [0.91, 0.0360555]
        and ft["asr"] == [0.03, 0.0264575]
        and ft["before"]["acc"] == 0.93
    )
    assert [run["acc"] for run in ft["runs"]] == [0.88, 0.9, 0.95] and ft["runs"][2][
        "seeds"
    ] == "random 2, data 0, victim 2"
    assert {tuple(gap[3:]) for gap in shown["missing"] if gap[1] == "badnet"} == {
        ("badnet", "fmp", 1, 3),
        ("badnet", "anp-best", 1, 3),
    }
    assert {tuple(gap[3:]) for gap in shown["missing"] if gap[1] == "wanet"} == {
        ("wanet", "fmp", 0, 1),
        ("wanet", "anp-best", 0, 1),
    }
    oracle = [cell["defense"] for cell in shown["cells"] if cell["oracle"]]
    assert oracle == ["anp-best"] and [
        cell["attack"] for cell in shown["cells"] if cell["weak"]
    ] == ["wanet", "wanet"]
    assert shown["left_out"] == [
        [str(report.parent / "record" / "cut"), "no record.json: unfinished"]
    ]


def test_where_a_figure_comes_from(report):
    run = next(
        cell
        for cell in data(report)["cells"]
        if cell["names"] == ["badnet", "none"] and len(cell["runs"]) == 3
    )["runs"][0]
    assert (
        run["command"] == COMMAND
        and run["path"].endswith("badnet_0")
        and run["seeds"] == "random 0, poison 0"
    )
    assert run["facts"] == {
        "device": "cpu, 2 threads",
        "git commit": "c0ffee",
        "peak memory, MB": "812",
        "versions": "python 3.12, torch 2.9",
    }
    assert (
        run["curve"]["stages"] == [["train", 15]]
        and run["curve"]["loss"][:2] == [2, 1]
        and len(run["curve"]["epoch"]) == 15
    )
    assert run["curve"]["measured"] == [[4, 0.8, 0.7, 0.2], [9, 0.8, 0.7, 0.2], [14, 0.8, 0.7, 0.2]]


def test_an_image_per_trigger_and_not_per_seed(report):
    shown = data(report)
    assert [image["caption"] for image in shown["triggers"]] == ["badnet, digits"]
    assert [(image["caption"], image["size"]) for image in shown["scores"]] == [
        ("fmp on badnet", [300, 90])
    ]
    assert all(
        image["source"].startswith("data:image/webp;base64,")
        for image in shown["triggers"] + shown["scores"]
    )


def test_looks_come_from_the_palette(report):
    shown = data(report)
    assert shown["looks"]["fmp"] == list(palette.look("fmp"))
    assert set(shown["looks"]) == {cell["names"][1] for cell in shown["cells"]}
    assert shown["colours"] == [list(pair) for pair in palette.COLOURS]
    assert len(shown["markers"]) == len(palette.MARKERS)
    assert all(re.fullmatch(r"M[-\d.e L]+Z", marker) for marker in shown["markers"])


def test_published_figures_are_found_and_rated(report):
    cells = {
        tuple(cell["names"]): cell
        for cell in data(report)["cells"]
        if data(report)["tables"][cell["table"]]["dataset"] == "cifar10"
    }
    found = cells["badnet", "ft"]["published"]
    assert (found["acc"], found["asr"], found["ra"], found["usable"]) == (
        0.8996,
        0.0148,
        0.8939,
        "yes",
    )
    assert (
        "BackdoorBench leaderboard" in found["source"]
        and cells["trojannn", "none"]["published"]["usable"] == "care"
    )


def test_commands_of_strangers_are_no_traps(tmp_path):
    def command(told, folder="a b"):
        run = runs.Run(
            tmp_path / folder, {"attack": "badnet"}, {}, {}, {"files": {}, "command": told}, None
        )
        return page.command(run)

    fallback = f"python attack/badnet.py --yaml_path '{tmp_path}/a b/config.yaml'"
    clean = runs.Run(tmp_path, {"attack": "clean_badnet"}, {}, {}, {"files": {}}, None)
    assert page.command(clean).startswith("python attack/clean.py --yaml_path ")
    assert (
        command("python attack/badnet.py --lr 0.1") == "python attack/badnet.py --lr 0.1"
        and command(COMMAND) == COMMAND
    )
    for told in (
        None,
        3,
        "",
        "rm -rf .",
        "python attack/badnet.py; reboot",
        "python attack/badnet.py $(reboot)",
        "python attack/badnet.py 'open",
        "python attack/badnet.py\n--lr 0.1",
        "python attack/badnet.py --lr 1 | sh",
        "python attack/other.py --lr 1",
    ):
        assert command(told) == fallback


@pytest.mark.parametrize(
    "name",
    ["../record/evil/payload", "/tmp/payload", "clean_../x", "__init__", "", "x" * 300]
    + [f"clean_{'x' * 300}", "none", "Badnet", "README", "badnet.py", "*"],
)
def test_only_scripts_that_exist_have_a_command(tmp_path, monkeypatch, name):
    script = f"python attack/{name}.py --lr 0.1"
    (tmp_path / "attack").mkdir()
    (tmp_path / "attack" / "badnet.py").write_text("")
    (tmp_path / "attack" / "__init__.py").write_text("")
    (tmp_path / "payload.py").write_text("")
    monkeypatch.setattr(page.options, "ROOT", tmp_path)
    for known, expected in ((name, None), ("badnet", "python attack/badnet.py --lr 0.1")):
        told = script.replace(name, known) if name else expected
        run = runs.Run(tmp_path, {"attack": known}, {}, {}, {"files": {}, "command": told}, None)
        assert page.command(run) == expected


def test_a_stranger_gives_no_command(report):
    cells = data(report)["cells"]
    commands = {cell["names"][0]: cell["runs"][0]["command"] for cell in cells if cell["victim"]}
    assert commands.pop(" ".join(HOSTILE.replace("\u2028", " ").split())) is None
    assert all(command.startswith("python attack/") for command in commands.values())


def test_facts_of_any_depth_are_shown_as_text(tmp_path):
    deep = json.loads('{"a":' * 15 + "1" + "}" * 15)
    add(attack(tmp_path / "record" / "a"), versions=deep, device=deep, git_commit="x" * 10**5)
    facts = data(built(tmp_path / "record"))["cells"][0]["runs"][0]["facts"]
    assert all(len(fact) <= page.LONGEST for fact in facts.values()) and len(facts) == 3


def test_a_log_is_read_within_limits(tmp_path, monkeypatch):
    add(attack(tmp_path / "record" / "a"), {"log.csv": log(20)})
    monkeypatch.setattr(curves, "MOST_EPOCHS", 22)
    assert data(built(tmp_path / "record"))["cells"][0]["runs"][0]["curve"]["epoch"][-1] == 20
    monkeypatch.setattr(curves, "MOST_EPOCHS", 21)
    assert data(built(tmp_path / "record"))["cells"][0]["runs"][0]["curve"] is None
    monkeypatch.setattr(curves, "MOST_EPOCHS", 22)
    with open(tmp_path / "record" / "a" / "log.csv", "ab") as file:
        file.truncate(30 * 2**30)
    assert data(built(tmp_path / "record"))["cells"][0]["runs"][0]["curve"] is None


def test_what_a_defense_costs_a_benign_model_stands_in_all_its_rows(tmp_path):
    victim = attack(tmp_path / "record" / "a")
    defense(victim)
    defense(victim, name="fmp")
    assert not data(built(tmp_path / "record"))["more"], "no benign model, no column"
    benign = attack(tmp_path / "record" / "b", name="clean_badnet", acc=0.95, row={"n_poison": 0})
    defense(benign, acc=0.93, row={"attack": "clean_badnet", "n_poison": 0})
    shown = data(built(tmp_path / "record"))
    (column,) = shown["more"]
    assert (column["title"], column["about"]) == ("BENIGN", tables.BENIGN_LOSS)
    losses = {tuple(cell["names"]): cell["benign_loss"] for cell in shown["cells"]}
    assert losses == {
        ("badnet", "none"): [None, None],
        ("badnet", "ft"): [0.02, None],
        ("badnet", "fmp"): [None, None],
        ("clean_badnet", "none"): [None, None],
        ("clean_badnet", "ft"): [0.02, None],
    }


def test_victims_that_learned_nothing_are_grey(tmp_path):
    victim = attack(tmp_path / "record" / "a", acc=0.11, asr=0.989, ra=0.01)
    defense(victim, acc=0.1)
    shown = data(built(tmp_path / "record"))
    assert [cell["weak"] for cell in shown["cells"]] == [True, True]
    assert {cell["marks"][0] for cell in shown["cells"]} == {tables.UNTRAINED}
    assert shown["footnotes"][tables.UNTRAINED].startswith("untrained victim")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"<svg onload=alert(1)>", "no sound PNG"),
        (DAMAGED_PNG, "no sound PNG"),
        (png(5000, 2000), "5000 x 2000 pixels"),
        (None, "was changed"),
        (png()[:-30], "no sound PNG"),
        (b"\x89PNG" + bytes(images.LARGEST_FILE), "larger than 16 MB"),
    ],
    ids=["other", "damaged", "huge", "changed", "cut", "long"],
)
def test_unusable_images_are_listed(tmp_path, content, why):
    victim = add(attack(tmp_path / "record" / "a"), {"preview.png": content or b"1"})
    if content is None:
        (victim / "preview.png").write_bytes(png())
    shown = data(built(tmp_path / "record"))
    ((path, reason),) = shown["left_out"]
    assert path == str(victim / "preview.png") and why in reason and not shown["triggers"]


def test_images_that_no_record_lists_are_not_read(tmp_path):
    (attack(tmp_path / "record" / "a") / "preview.png").write_bytes(png())
    shown = data(built(tmp_path / "record"))
    assert not shown["triggers"] and not shown["left_out"]


def test_images_have_a_limit(tmp_path, monkeypatch):
    for number in range(4):
        add(
            attack(tmp_path / "record" / str(number), name=f"attack{number}"),
            {"preview.png": png(1300, 500)},
        )
    monkeypatch.setattr(images, "MOST", 3)
    monkeypatch.setattr(images, "FEW", 2)
    shown = data(built(tmp_path / "record"))
    assert (
        len(shown["triggers"]) == 3
        and shown["unshown"] == 1
        and shown["triggers"][0]["size"] == [600, 231]
    )


def test_the_recipe_does_not_change_what_a_trigger_looks_like(tmp_path):
    for number, options in enumerate([{}, {"epochs": 20}, {"patch_size": 5}]):
        add(attack(tmp_path / str(number), seed=number, **options), {"preview.png": png()})
    found_runs, _ = runs.read_all(runs.find_runs([tmp_path]))
    triggers = images.Album(tables.group(found_runs)).triggers
    assert [image["caption"] for image in triggers] == [
        "badnet, digits",
        "badnet (patch_size 5), digits",
    ]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"stage\n",
        b"\xff",
        b"stage,epoch,loss\ntrain,1e9,2\n",
        b"epoch\n\x00\n",
        b"stage,epoch,loss\ntrain,1,x\n",
    ],
)
def test_a_log_that_cannot_be_read_draws_no_curve(tmp_path, text):
    add(attack(tmp_path / "record" / "a"), {"log.csv": text})
    assert data(built(tmp_path / "record"))["cells"][0]["runs"][0]["curve"] is None


def test_long_curves_are_thinned_and_numbers_are_json(tmp_path):
    content = (
        log(1000)
        .replace(b"train,1,2.0", b"train,1,nan")
        .replace(b"train,1000,0.002", b"train,1000,inf")
    )
    add(
        attack(tmp_path / "record" / "a", row={"seconds": "inf"}),
        {"log.csv": content},
        versions=["x"],
        device={"a": HOSTILE * 9},
    )
    run = data(built(tmp_path / "record"))["cells"][0]["runs"][0]
    assert (
        len(run["curve"]["loss"]) == 200
        and run["curve"]["epoch"][-1] == 1000
        and run["curve"]["loss"][-1] is None
    )
    assert run["seconds"] is None and len(run["facts"]["device"]) == page.LONGEST


# ---------- the command ----------


def test_one_line_says_where_and_failures_are_as_elsewhere(tmp_path, capsys):
    attack(tmp_path / "record" / "a")
    target = tmp_path / "new" / "page.html"
    arguments = [str(tmp_path / "record"), "--html"]
    assert compare.main([*arguments, str(target)]) == 0 and capsys.readouterr().out.endswith(
        f"page written to {target}\n"
    )
    assert compare.main([*arguments, str(target), "--format", "csv"]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"page written to {target}\n" and "page" not in shown.out
    for place in (tmp_path, tmp_path / "record/a/results.csv/page.html"):
        assert compare.main([*arguments, str(place)]) == 1
        assert capsys.readouterr().err.startswith(f"error: cannot write {place}")
    target.unlink()
    (tmp_path / "record/a/record.json").unlink()
    assert compare.main([*arguments, str(target)]) == 4 and not target.exists()
    assert compare.main([str(tmp_path / "new"), "--html", str(target)]) == 3 and not target.exists()


def test_jinja_is_named_where_it_is_missing(tmp_path, capsys, monkeypatch):
    attack(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert compare.main([str(tmp_path / "a"), "--html", str(tmp_path / "page.html")]) == 1
    assert (
        capsys.readouterr().err
        == "error: --html needs the package jinja2: pip install -r requirements.txt brings it\n"
    )


def test_nothing_heavy_is_imported_for_a_table(tmp_path):
    code = f"import sys, compare; compare.main([{str(attack(tmp_path / 'a'))!r}])\n"
    code += "sys.exit(bool({'torch', 'jinja2', 'PIL', 'matplotlib'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False
        ).returncode
        == 0
    )


def test_a_pipe_in_a_record_is_not_waited_for(tmp_path):
    folder = attack(tmp_path / "a")
    (folder / "results.csv").unlink()
    os.mkfifo(folder / "results.csv")
    with pytest.raises(RefusedError, match=r"results\.csv is no regular file"):
        runs.read_run(folder, {})


# ---------- published figures ----------


def test_published_figures_are_possible():
    rows = published.read()
    assert len(rows) == 1001 and len({row["source"] for row in rows.values()}) == 2
    impossible = [key for key, row in rows.items() if row["asr"] + (row["ra"] or 0) > 1]
    assert impossible == [("gtsrb", "preactresnet18", "ssba", 0.1, "none")], (
        "the one published pair that is"
    )
    for row in rows.values():
        assert (
            all(row[name] is None or 0 <= row[name] <= 1 for name in ("acc", "asr", "ra"))
            and 0 < row["pratio"] <= 0.1
        )
        assert (
            row["usable"] in published.MARKS
            and (row["usable"] == "yes" or row["note"])
            and row["source"]
        )
        classes = {"cifar10": 10, "cifar100": 100, "gtsrb": 43, "tiny": 200}[row["dataset"]]
        assert row["usable"] == "no" or row["acc"] >= 2 / classes
        assert row["usable"] == "no" or row["defense"] not in ("anp", "ac", "nad", "bnp", "d_br"), (
            "none of them is what its name says"
        )


@pytest.mark.parametrize(
    ("key", "values", "usable"),
    [
        (("cifar10", "preactresnet18", "badnet", 0.1, "none"), (0.9132, 0.9503, 0.0467), "yes"),
        (("cifar10", "preactresnet18", "sig", 0.1, "fp"), (0.8910, 0.2620, 0.2061), "yes"),
        (("cifar10", "preactresnet18", "lf", 0.1, "dbd"), (0.5098, 0.9970, 0.0008), "care"),
        (("cifar10", "preactresnet18", "trojannn", 0.05, "abl"), (0.1864, 1, 0), "no"),
        (("cifar10", "preactresnet18", "blended", 0.01, "i_bau"), (0.8970, 0.3036, 0.5154), "yes"),
        (("cifar10", "preactresnet18", "wanet", 0.005, "anp"), (0.9127, 0.0112, 0.9124), "no"),
        (("cifar10", "preactresnet18", "ssba", 0.001, "ep"), (0.9043, 0.0472, 0.8584), "care"),
        (("cifar100", "preactresnet18", "inputaware", 0.1, "d_st"), (0.4752, 0.8839, 0.0786), "no"),
        (("gtsrb", "preactresnet18", "badnet", 0.1, "none"), (0.9724, 0.5925, 0.0442), "no"),
        (("gtsrb", "preactresnet18", "lira", 0.1, "nc"), (0.9082, 0.0004, 0.8018), "no"),
        (("tiny", "preactresnet18", "trojannn", 0.1, "clp"), (0.5586, 0.0839, 0.4274), "no"),
        (("tiny", "convnext_tiny", "badnet", 0.1, "none"), (0.6631, 0.9999, 0.0001), "care"),
        (("cifar100", "vgg19_bn", "lf", 0.1, "none"), (0.5809, 0.1843, 0.5780), "no"),
        (("gtsrb", "preactresnet18", "sig", 0.005, "none"), (0.9855, 0.6670, None), "yes"),
    ],
)
def test_published_figures_are_copied_right(key, values, usable):
    row = published.read()[key]
    assert (row["acc"], row["asr"], row["ra"], row["usable"]) == (*values, usable)


def test_published_figures_in_every_format(tmp_path, capsys):
    root = laboratory(tmp_path / "record")

    def shown(*arguments):
        assert compare.main([str(root), "--published", *arguments]) == 0
        return capsys.readouterr().out

    lines = [line.split() for line in shown().splitlines()]
    assert ["ft,", "published", "90.0", "1.5", "89.4", "92.4(?)", "6.0(?)", "77.3(?)"] in lines
    assert ["ft,", "difference", "-2.0", "+0.5", "-4.4", "-4.4", "-4.0", "+7.7"] in lines
    assert (
        "published: BackdoorBench leaderboard, commit b98eab4, 2025-06-04; one seed, and the "
        "recipe may differ" in shown()
    )
    assert r"ft, difference & -2.0 & +0.5 & -4.4" in shown(
        "--format", "latex"
    ) and "| ft, published | 90.0 |" in shown("--format", "markdown")
    csv = shown("--format", "csv").splitlines()
    assert csv[0].endswith(
        "acc_published,acc_difference,asr_published,asr_difference,ra_published,ra_difference,"
        "usable,source,note"
    )
    assert any(
        ",ft,repair,fixed,1,0.88,,0.02,,0.85,,2.5,0.8996,-0.0196,0.0148,0.0052,0.8939,-0.0439,yes,"
        in line
        for line in csv
    )


@pytest.mark.parametrize("other", [{"label_mode": "all2all"}, {"pratio": 0.2}, {"pratio": "many"}])
def test_only_the_same_setting_is_laid_beside(tmp_path, capsys, other):
    label_mode = {name: value for name, value in other.items() if name == "label_mode"}
    attack(
        tmp_path / "a", row={"dataset": "cifar10", "model": "preactresnet18", **label_mode}, **other
    )
    assert (
        compare.main([str(tmp_path), "--published"]) == 0
        and "published" not in capsys.readouterr().out
    )


# ---------- in a browser ----------


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium; skips where there is none, but not in CI."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    place = pictures.chromium()
    if not (sync_playwright and place):
        assert os.environ.get("CI") != "true", "CI needs the package playwright and a Chromium"
        pytest.skip("no Chromium, or no package playwright: the page is not tried in a browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """visit(file, width) -> the open page.

    At the end no error may have been logged, and nothing may have been fetched.
    """
    complaints, contexts = [], []

    def go(file, width=1440, scheme="light", **options):
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **options
        )
        contexts.append(context)
        view = context.new_page()
        view.on("console", lambda message: complaints.append(message.text))
        view.on("pageerror", lambda error: complaints.append(str(error)))
        view.on(
            "request",
            lambda request: (
                complaints.append(request.url)
                if not request.url.startswith(("file:", "data:"))
                else None
            ),
        )
        view.on("requestfailed", lambda request: complaints.append(f"failed: {request.url[:99]}"))
        view.goto(f"file://{file}")
        return view

    yield go
    for context in contexts:
        context.close()
    assert complaints == []


def column(view, name):
    """The texts of a column of the leaderboard, oracle rows left out."""
    place = view.locator("#board thead th").evaluate_all(
        "(heads, name) => heads.findIndex((head) => head.dataset.column === name)", name
    )
    return view.locator(f"#board tr.cell:not(.oracle) td:nth-child({place + 1})").all_inner_texts()


def number(text):
    found = re.match(r"\d+(\.\d+)?", text.strip())
    return float(found[0]) if found else None


def test_every_column_sorts_both_ways(report, visit):
    view = visit(report)
    names = view.locator("#board thead th").evaluate_all(
        "(heads) => heads.map((head) => head.dataset.column)"
    )
    assert names == [
        "dataset",
        "model",
        "recipe",
        "attack",
        "defense",
        "acc",
        "asr",
        "ra",
        "acc-published",
        "asr-published",
        "ra-published",
        "seconds",
        "n",
    ]
    for name in names:
        head = view.locator(f"th[data-column={name}]")
        for way in ("ascending", "descending"):
            head.locator("button").click()
            assert (
                head.get_attribute("aria-sort") == way
                and view.locator("th[aria-sort=none]").count() == len(names) - 1
            )
            texts = column(view, name)
            if name in ("dataset", "model", "recipe", "attack", "defense"):
                assert len(set(texts)) > 1
                ordered = view.evaluate(
                    "(texts) => [...texts].sort((a, b) => a.localeCompare(b, 'en', "
                    "{ numeric: true }))",
                    texts,
                )
                assert texts == (ordered if way == "ascending" else ordered[::-1])
                continue
            values = [number(text) for text in texts]
            known = [value for value in values if value is not None]
            assert known == sorted(known, reverse=way == "descending") and values[len(known) :] == [
                None
            ] * (len(values) - len(known))
        assert view.locator("#board tr.cell").last.inner_text().count("anp-best‡") == 1, (
            "an oracle never stands among the others"
        )


def test_the_page_of_the_repository_opens(visit):
    view = visit(ROOT / "docs" / "leaderboard.html")
    assert view.inner_text("#note").startswith("The results of this repository on CIFAR-10")
    rows = len(data(ROOT / "docs" / "leaderboard.html")["cells"])
    assert view.locator("#board tr.cell").count() == min(rows, 250)
    assert view.evaluate("document.documentElement.scrollWidth") == 1440
    long = view.locator("#board td.recipe", has_text="airbench").first
    assert long.bounding_box()["height"] < 90, "a long recipe is cut"
    long.hover()
    assert view.inner_text("#tip").startswith("airbench: sgd") and "bf16" in view.inner_text("#tip")


def test_a_column_says_what_it_is(tmp_path, visit):
    benign = attack(tmp_path / "record" / "b", name="clean_badnet", row={"n_poison": 0})
    defense(benign, acc=0.93, row={"attack": "clean_badnet", "n_poison": 0})
    view = visit(built(tmp_path / "record"))
    head = view.locator("th[data-column=benign_loss]")
    assert head.get_attribute("title") == tables.BENIGN_LOSS
    assert f"BENIGN: {tables.BENIGN_LOSS}" in view.inner_text("#notes")
    head.locator("button").click()
    loss = data(tmp_path / "page.html")["cells"][1]["benign_loss"][0]
    assert column(view, "benign_loss") == [f"{100 * loss:.1f}", "–"]


def test_filters_rule_the_whole_page(report, visit):
    view = visit(report)
    everything = view.locator("#board tr.cell").count()
    view.select_option("#filter-dataset", "cifar10")
    assert view.locator("#board tr.cell").count() == 4 and set(column(view, "dataset")) == {
        "cifar10"
    }
    assert view.locator(".map").count() == 1 and view.locator("#trigger-images img").count() == 0
    view.select_option("#filter-defense", "ft")
    assert [text.strip() for text in column(view, "defense")] == ["ft", "ft"] and view.locator(
        "#trade-charts g[data-defense]"
    ).count() == 2
    view.select_option("#filter-attack", "wanet")
    assert "No run is of this choice" in view.inner_text("#board")
    view.click("#reset")
    assert (
        view.locator("#board tr.cell").count() == everything
        and view.locator("#trigger-images img").count() == 1
    )
    view.select_option("#filter-model", "resnet9_w16")
    view.select_option("#filter-attack", "badnet")
    assert len(column(view, "attack")) == 3 and view.locator("#curve-charts figure").count() == 2
    view.select_option("#filter-recipe", "sgd lr 0.01 epochs 100 batch 128, fp32")
    assert len(column(view, "attack")) == 3


def test_the_heat_map_has_three_metrics(report, visit):
    view = visit(report)

    def cells():
        return (
            view.locator(".map", has_text="digits, resnet9_w16, sgd")
            .locator("td:not(.soft)")
            .all_inner_texts()
        )

    assert (
        cells()[:2] == ["95.0", "50.0"]
        and view.locator("#heat-metric [aria-pressed=true]").inner_text() == "ASR"
    )
    view.click("#heat-metric [data-value=acc]")
    assert cells()[:2] == ["93.0", "90.0"]
    view.click("#heat-metric [data-value=ra]")
    assert cells()[:2] == ["4.0", "40.0"] and cells().count("–") == 2
    assert (
        view.locator(".map td.oracle").count() == 1 and view.locator(".map tr.apart").count() == 1
    )
    colours = view.locator(".map td:not(.soft):not(.empty)").evaluate_all(
        "(cells) => cells.map((cell) => getComputedStyle(cell).backgroundColor)"
    )
    assert len(set(colours)) > 4


def test_seeds_show_by_pointing_focus_and_tap(report, visit):
    view = visit(report)
    row = view.locator("#board tr.cell", has_text="ft").filter(has_text="± 3.6").first
    row.locator("td.acc").hover()
    assert view.inner_text("#tip").splitlines() == [
        "ACC 91.0 ± 3.6 (3)",
        "88.0 (random 0, data 0, victim 0)",
        "90.0 (random 1, data 0, victim 1)",
        "95.0 (random 2, data 0, victim 2)",
    ]
    view.keyboard.press("Escape")
    assert view.locator("#tip").is_hidden()
    view.focus("th[data-column=n] button")
    view.keyboard.press("Tab")
    assert view.inner_text("#tip").splitlines() == [
        "none on badnet: ACC / ASR / RA",
        "92.0 / 96.0 / 3.0 (random 0, poison 0)",
    ]
    grid = view.locator(".map", has_text="digits, resnet9_w16, sgd")
    grid.locator("td[tabindex='0']").focus()
    view.keyboard.press("ArrowDown")
    assert view.inner_text("#tip").splitlines()[:2] == ["fmp on badnet", "ASR 10.0"]
    view.locator("#trade-charts g[tabindex='0']").first.focus()
    assert "before: ACC 92.0, ASR 96.0" in view.inner_text("#tip").splitlines()
    small = visit(report, 390, has_touch=True)
    small.locator("#board tr.cell").first.locator("td.acc").tap()
    assert small.inner_text("#tip").startswith("ACC") and small.locator("tr.details").count() == 0
    small.locator("#board tr.cell").first.locator(".open").tap()
    assert small.locator("tr.details").count() == 1


def test_details_hold_commands_and_versions(report, visit):
    view = visit(report)
    view.select_option("#filter-dataset", "digits")
    view.locator("#board tr.cell", has_text="± 3.6").first.locator(".open").press("Enter")
    details = view.locator("tr.details")
    assert (
        details.locator("code").all_inner_texts() == [COMMAND] * 3
        and details.locator("svg[role=img]").count() == 2
    )
    assert (
        "python 3.12, torch 2.9" in details.inner_text()
        and "c0ffee" in details.inner_text()
        and "badnet_2" in details.inner_text()
    )
    assert (
        details.locator("path.line.loss").count() == 3
        and details.locator("path.line.asr").count() == 3
    )
    view.locator("#board .open").first.press("Enter")
    assert (
        view.locator("#board .open[aria-expanded=true]").count()
        == view.locator("tr.details").count()
    )


def test_copies_what_is_seen(report, visit):
    view = visit(report, permissions=["clipboard-read", "clipboard-write"])
    view.select_option("#filter-dataset", "cifar10")
    view.select_option("#filter-defense", "ft")
    view.click("th[data-column=acc-published] button")
    view.click("[data-copy=markdown]")
    view.wait_for_function("document.getElementById('copied').textContent === 'Copied'")
    copied = view.evaluate("navigator.clipboard.readText()")
    assert copied.splitlines()[0].startswith(
        "| Data set | Model | Recipe | Attack | Defense | ACC | ASR | RA | ACC publ."
    )
    assert (
        "| badnet | ft | 88.0 | 2.0 | 85.0 | 90.0 (−2.0) |" in copied
        and len([line for line in copied.splitlines() if line[0:1] == "|"]) == 4
    )
    view.evaluate(
        "() => { navigator.clipboard.writeText = () => Promise.reject(new Error('kept')); }"
    )
    view.click("[data-copy=latex]")
    view.wait_for_selector("#copy:visible")
    latex = view.input_value("#copy")
    assert (
        r"\begin{tabular}{lllllrrrrrrrr}" in latex
        and "90.0 ($-$2.0)" in latex
        and "92.4(?) ($-$4.4)" in latex
    )
    assert latex.count("\\\\\n") == 3 and not set(latex) & set("±–†‡−")


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_overflows(report, visit, width):
    view = visit(report, width)
    for button in view.locator("#board .open").all():
        button.click()
    view.click("#curve-kind [data-value=measured]")
    assert view.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [
        width,
        width - 0 if width < 1344 else 1344,
    ]
    wide = view.evaluate("""() => [...document.querySelectorAll("body *")]
        .filter((node) => !node.closest(".scroll, svg, [hidden]"))
        .filter((node) => node.getBoundingClientRect().right > innerWidth + 1)
        .map((node) => node.outerHTML.slice(0, 80))""")
    assert wide == []


def test_light_and_dark(report, visit):
    view = visit(report)
    background = "getComputedStyle(document.body).backgroundColor"
    assert view.evaluate(background) == "rgb(255, 255, 255)"
    view.click("#theme")
    dark = view.evaluate(background)
    assert dark == "rgb(16, 20, 24)" and view.inner_text("#theme") == "Light"
    assert visit(report, scheme="dark").evaluate(background) == dark


def test_a_method_keeps_its_colour(report, visit, tmp_path):
    """On a page with one defense more, and in the dark, it has the look of the palette."""
    colour = "(node) => getComputedStyle(node).fill"
    mark = '#trade-charts g[data-defense="ft"] path.mark'
    light, dark = palette.COLOURS[palette.look("ft")[0]]
    view = visit(report)
    assert view.locator(mark).first.evaluate(colour) == rgb(light)
    shape = palette.svg_path(palette.MARKERS[palette.look("ft")[1]])
    assert view.locator(mark).first.get_attribute("d") == shape
    view.click("#theme")
    assert view.locator(mark).first.evaluate(colour) == rgb(dark)
    victim = attack(tmp_path / "record" / "a")
    for name in ("abl", "awm", "ft"):
        defense(victim, name=name)
    other = visit(built(tmp_path / "record"), scheme="dark")
    assert other.locator(mark).first.evaluate(colour) == rgb(dark)
    assert other.locator("#trade-key path.look").count() == 3


def rgb(colour):
    """#0072b2 as a browser writes it."""
    return f"rgb({', '.join(str(int(colour[place : place + 2], 16)) for place in (1, 3, 5))})"


def test_names_of_strangers_stay_text(report, visit):
    view = visit(report)
    assert view.title() == "Antidote report" and view.locator("img[src=x]").count() == 0
    assert "onerror=" in view.inner_text("#board") and "</script>" in view.inner_text("#board")
    view.locator("#board tr.cell", has_text="onerror").locator("td.acc").hover()
    assert view.locator("script").count() == 2


def test_what_is_copied_is_text(tmp_path, visit):
    name = "[![x](http://a.b)"
    row = {"attack": name, "dataset": name}
    defense(attack(tmp_path / "record" / "a", acc=0.11, row=row), name="*", row=row)
    view = visit(built(tmp_path / "record"))
    assert view.evaluate("asMarkdown([{ title: 'a', text: (cell) => cell.attack }], DATA.cells)")
    both = "[asMarkdown, asLatex].map((copy) => copy(columns(), sorted(visible())))"
    markdown, latex = view.evaluate(both)
    assert "![" not in markdown and not re.search(r"\]([(\[:])", markdown) and "a.b" in markdown
    assert not any(line.startswith(("[", "*")) for line in latex.splitlines())
    assert "{}[![x]" in latex and r"$^\S$" in latex
    view.locator("#board .open").first.click()
    assert view.locator("tr.details .command button").count() == 0
    assert "there is no script of this name" in view.inner_text("tr.details")


def test_images_are_drawn(report, visit):
    view = visit(report)
    for box in ("#trigger-images", "#score-images"):
        image = view.locator(f"{box} img").first
        image.scroll_into_view_if_needed()
        view.wait_for_function(
            "(image) => image.complete && image.naturalWidth > 0", arg=image.element_handle()
        )


def test_one_bare_run_makes_a_page(tmp_path, visit):
    attack(tmp_path / "record" / "a", asr="", ra="")
    view = visit(built(tmp_path / "record"))
    assert (
        view.inner_text("#summary")
        == "1 run: 1 victim, 0 repairs; 1 seed (0); 0 missing cells; 0 left out"
    )
    assert view.locator(
        "#board tr.cell"
    ).count() == 1 and "Nothing: every run found is above" in view.inner_text("#left-out")
    assert view.locator(
        "#triggers, #scores"
    ).count() == 0 and "No run of this choice has a log" in view.inner_text("#curves")


def thousand(root):
    """1,000 runs in 1,000 cells: 200 victims that differ in an option, with four repairs each."""
    draw, image = random.Random(0), png(1170, 426)
    for number in range(200):
        row = {
            "dataset": ("cifar10", "gtsrb")[number % 2],
            "attack": ("badnet", "wanet", "sig", "lf")[number % 4],
        }
        victim = attack(root / str(number), name=row["attack"], row=row, patch=number)
        add(victim, {"log.csv": log(100, measured=5), "preview.png": image})
        for name in ("ft", "fmp", "awm", "clp"):
            folder = defense(
                victim,
                acc=draw.random(),
                asr=draw.random() / 2,
                ra=draw.random() / 2,
                name=name,
                row=row,
            )
            add(folder, {"log.csv": log(50), **({"scores.png": image} if name == "fmp" else {})})
    return root


def test_a_thousand_runs(tmp_path, visit):
    root, begin = thousand(tmp_path / "record"), time.process_time()
    target = built(root)
    assert time.process_time() - begin < 10 and target.stat().st_size < 10e6
    view = visit(target)
    assert view.inner_text("#summary").startswith("1000 runs: 200 victims, 800 repairs")
    sort = "document.querySelector('[data-column=asr] button').click()"
    pick = (
        "{ const select = document.getElementById('filter-defense'); select.value = 'fmp'; "
        "select.dispatchEvent(new Event('change')); }"
    )
    for act, rows in ((sort, 250), (pick, 200)):
        took = (
            f"() => {{ const begin = performance.now(); {act}; document.body.offsetHeight; "
            "return performance.now() - begin; }"
        )
        assert view.evaluate(took) < 1000 and view.locator("#board tr.cell").count() == rows
    assert view.evaluate("document.documentElement.scrollWidth") == 1440
