"""The README is true: its commands run, its files exist, its methods are those of the folders."""

import ast
import dataclasses
import importlib
import re
import shlex
import shutil
import subprocess
from typing import get_args

import pytest
import yaml
from PIL import Image

from antidote_bench.utils import files
from antidote_bench.utils.config import LabelMode
from benchmarks import speed
from tests.helpers import ROOT, few, names

README = (ROOT / "README.md").read_text()
LISTS = {
    kind: (ROOT / "docs" / f"{kind}s" / "README.md").read_text() for kind in ("attack", "defense")
}
DOCS = [path.read_text() for path in sorted((ROOT / "docs").glob("**/*.md"))]
BLOCKS = re.findall(r"```(?:bash|sh)\n(.*?)```", "\n".join([README, *DOCS]), re.S)
COMMANDS = [
    re.sub(r"\s+#.*", "", line).strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
]
COMMANDS = list(dict.fromkeys(line for line in COMMANDS if line and not line.startswith("#")))
SCRIPTS = [line for line in COMMANDS if line.startswith("python ")]
LEFT_OUT = {"data", "docs", "record", "tests", "build"}  # folders that no command needs
# options that make a run long, or ask for data that is not here
SMALL = {
    "--dataset",
    "--model",
    "--epochs",
    "--width",
    "--dataset_path",
    "--image_size",
    "--yaml_path",
    "--batch_size",
    "--download",
}


def small(words):
    """The words of a command without the options of SMALL and their values."""
    short, skip = [], False
    for word in words:
        if not skip and word not in SMALL:
            short.append(word)
        skip = word in SMALL
    return short


@pytest.fixture(scope="module")
def bench(tmp_path_factory, places):
    """An empty folder with the scripts, in which the folder names of the README may be used."""
    place = tmp_path_factory.mktemp("readme")
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in LEFT_OUT:
            shutil.copytree(
                folder, place / folder.name, ignore=shutil.ignore_patterns("__pycache__")
            )
    for pattern in ("*.py", "*.toml", "*.txt", "Makefile"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, place / file.name)
    return place


def test_commands_are_known():
    other = [line for line in COMMANDS if not line.startswith("python ")]
    assert {"make demo", "make test"} <= set(other)
    for line in other:
        words = shlex.split(line)
        if words[0] == "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
            assert set(words[1:]) <= set(targets), line
        else:
            assert words[0] in {"git", "cd", "pip", "torchrun"}, (
                f"nothing tests the command {line!r}"
            )


@pytest.mark.parametrize("line", SCRIPTS)
def test_every_option_of_a_command_exists(line, run):
    words = shlex.split(line)[1:]
    script = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
    assert (ROOT / script).is_file()
    first = 2 if words[0] in ("-m", "convert.py") else 1  # a module, or a script and its command
    text = run(*words[:first], "--help").stdout
    for word in words:
        if word.startswith("--"):
            assert f"{word} " in text or f"{word}\n" in text or f"[{word}]" in text, (
                f"{line}: no option {word}"
            )


# conversions that need a record of BackdoorBench, or are to one: test_exchange.py runs them
CONVERSIONS = ("from-backdoorbench", "to-backdoorbench", "from-weights")
QUICK = shlex.split("--dataset digits --image_size 16 --model resnet9 --width 4 --epochs 1")


def shortened(line):
    """The words after `python -m` of a command, on the digits and for one epoch."""
    words = shlex.split(line)[1:]
    if words[0] == "-m":
        module, *words = words[1:]
    else:
        module, *words = words[0].removesuffix(".py").replace("/", "."), *words[1:]
    if module.startswith("attack."):
        return [module, *small(words), *QUICK]
    if module.startswith(("defense.", "detection.")):
        known = importlib.import_module(f"antidote_bench.{module}").Config.__dataclass_fields__
        inputs = ["--inputs", "40"] if "inputs" in known else []
        return [module, *small(words), *few(module), *inputs]
    if module == "convert" and words[0] == "from-images":
        return [module, *small(words), *QUICK]
    if module == "analysis.features":
        return [module, *words, "--images", "100", "--marked_images", "50"]
    if module == "benchmarks.speed":
        kept = [word for word in words if word != "--save"]
        return [module, *kept, "--parts", "evaluate", "--scale", "0.01", "--pairs", "1"]
    if module == "sweep":
        return [module, *words, "--engine", "serial", "--", "--epochs", "1"]
    return [module, *words]


def test_every_command_runs(bench, run):
    """In the order of the README, on the digits, for one epoch; -m runs the copy in bench."""
    for line in SCRIPTS:
        words = shortened(line)
        if words[0] == "convert" and words[1] in CONVERSIONS:
            continue
        if words[0] == "sweep":
            (bench / words[1]).write_text("{attack: {badnet: {width: 4}}, defense: ft}")
        sweeps = words[0] == "sweep"
        run("-m", *words, cwd=bench, env={"PYTHONPATH": str(bench)}, forks=sweeps)


def test_the_example_of_an_attack_works(bench, run):
    page = (ROOT / "docs" / "extending.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (bench / "attack" / "stripe.py").write_text(example)
    words = ["-m", "attack.stripe", "--column", "5", "--epochs", "1", "--width", "4"]
    done = run(*words, cwd=bench, env={"PYTHONPATH": str(bench)})
    assert done.stdout.startswith("ACC")
    assert (bench / "record" / "stripe_digits" / "record.json").is_file()
    (bench / "attack" / "stripe.py").unlink()  # other tests share the place


def test_demo_is_what_make_runs():
    lines = subprocess.run(
        ["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    demo = [
        line.removeprefix(".venv/bin/")
        for line in lines
        if line.startswith(".venv/bin/python ") and " -m " not in line
    ]
    grid = yaml.safe_load((ROOT / "config/sweep/demo.yaml").read_text())
    assert len(grid["defense"]) == 3 and len(grid["detection"]) == 2
    assert [line.split()[1] for line in demo] == [
        "attack/badnet.py",
        *(f"defense/{name}.py" for name in grid["defense"]),
        *(f"detection/{name}.py" for name in grid["detection"]),
        "compare.py",
    ]
    words = shlex.split(demo[-1])
    note = words[words.index("--note") + 1]
    assert note.startswith("ft fails here: ") and set(grid["defense"]) <= set(note.split())


@pytest.mark.parametrize("folder", ["attack", "defense"])
def test_methods_are_listed(folder):
    row = rf"^\| \[`(\w+)`\]\(\.\./\.\./{folder}/\w+\.py\)"
    listed = re.findall(row, LISTS[folder], re.M)
    assert sorted(listed) == sorted(names(folder))
    assert f"docs/{folder}s/README.md), {len(listed)} of them" in README


def trains_the_victim(text):
    """Whether a script changes the training, or hands over weights that the victim starts from."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    starts = [call for call in calls if getattr(call.func, "id", "") == "Prepared"]
    own = "make_loss" in text or "after_epoch" in text
    return own or any(len(call.args) + len(call.keywords) > 1 for call in starts)


def test_the_list_of_attacks_says_what_the_scripts_do():
    for name, controls, labels in re.findall(
        r"^\| \[`(\w+)`\]\(\.\./\.\./attack/.*?\) \|.*?\| (.*?) \| (.*?) \|", LISTS["attack"], re.M
    ):
        text = (ROOT / "attack" / f"{name}.py").read_text()
        Config = __import__(f"antidote_bench.attack.{name}", fromlist=["Config"]).Config
        modes = [mode for mode in get_args(LabelMode) if mode not in Config.refused_modes]
        # what nearly all attacks can do stands below the list
        shown = modes if modes == ["one2one"] else [mode for mode in modes if mode != "one2one"]
        assert labels == ("clean label" if Config.clean_label else ", ".join(shown)), name
        assert (controls in ("training", "the loss")) == trains_the_victim(text), name


def test_every_detector_is_listed_by_what_it_judges():
    said = re.search(
        r"Training images: (.*?)\. Inputs: (.*?)\. Models: (.*?)\.\n", README.replace("\n  ", " ")
    )
    for kind, listed in zip(("data", "input", "model"), said.groups(), strict=True):
        found = []
        for name in names("detection"):
            Config = __import__(f"antidote_bench.detection.{name}", fromlist=["Config"]).Config
            options = {field.name for field in dataclasses.fields(Config)}
            is_option = "judges" in options  # cd judges images of both kinds
            if Config.judges == kind or is_option and kind != "model":
                found.append(f"`{name}`")
        assert listed == ", ".join(found)


def test_the_gallery_shows_the_attacks_of_records(small, run, tmp_path):
    image = tmp_path / "triggers.png"
    words = ("-m", "benchmarks.gallery", "--output", image, "--record_path")
    assert run(*words, small).stdout == f"1 trigger in {image}\n"
    with Image.open(image) as content:
        assert content.width > content.height
    missing = run(*words, tmp_path / "none", code=3)
    assert missing.first.startswith("error: no record of an attack on digits at or below")


def test_every_part_of_the_speed_benchmark_runs(bench, run):
    words = [
        "benchmarks.speed",
        "--models",
        "resnet9_w4",
        "--scale",
        "0.005",
        "--pairs",
        "1",
        "--dataset",
        "digits",
        "--precisions",
        "fp32",
        "--save",
    ]
    # kernels are made in test_train.py, which takes long
    place = {"cwd": bench, "env": {"PYTHONPATH": str(bench), "TORCHDYNAMO_DISABLE": "1"}}
    results = bench / "benchmarks" / "results" / "speed.csv"
    results.unlink()
    done = run("-m", *words, **place)
    rows = files.read_csv(results)
    assert {row["part"] for row in rows} == set(speed.PARTS) and all(
        float(row["value"]) > 0 for row in rows if row["part"] not in ("stamp", "compile")
    )
    for part in speed.TARGETS:
        assert any(row["part"] == part and row["what"].startswith("as released") for row in rows)
    assert {row["what"] for row in rows if row["part"] == "stamp"} <= set(names("attack"))
    assert (
        len(rows)
        == len({tuple(row[key] for key in speed.KEY) for row in rows})
        == done.stdout.count("part ")
    )
    run("-m", *words, "--parts", "evaluate", **place)
    assert len(files.read_csv(results)) == len(rows), (
        "a measurement takes the place of the one before"
    )


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *ROOT.glob("*/README.md"),
    *(ROOT / "docs").glob("**/*.md"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_front_door_is_short():
    words = [word for word in README.split() if re.search(r"\w", word)]
    assert len(words) < 1000
