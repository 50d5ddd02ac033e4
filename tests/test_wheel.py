"""The wheel: it holds all of the package and nothing beside it, and works from any folder."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import sweep
from antidote_bench.utils import config, parsing
from antidote_bench.utils.record import results
from antidote_bench.utils.report import page
from tests.helpers import ROOT

QUICK = ("--epochs", "1", "--width", "4")
# what a clone has and a wheel needs
NEEDED = (
    "analysis", "antidote_bench", "attack", "benchmarks", "config", "defense", "detection",
    "models", "utils", "pyproject.toml", "requirements.txt", "README.md", "LICENSE",
)  # fmt: skip
FOLDERS = ("analysis", "attack", "defense", "detection", "models", "utils", "config")


def python(*words, cwd, path=None):
    """The output of a command `python WORDS...` that succeeds; `path` is its PYTHONPATH."""
    added = {"PYTHONPATH": str(path)} if path else {}
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **added}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copied(source):
    """A copy of this checkout, as far as a wheel needs it, in the new folder `source`."""
    source.mkdir()
    for path in [ROOT / name for name in NEEDED] + [*ROOT.glob("*.py")]:
        if path.is_dir():
            left_out = shutil.ignore_patterns("__pycache__", ".*", "results")
            shutil.copytree(path, source / path.name, ignore=left_out)
        else:
            shutil.copy(path, source)
    return source


def files_below(folder):
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_a_wheel_works_anywhere(tmp_path):
    source, site, place = (tmp_path / name for name in ("source", "site", "place"))
    copied(source)
    # what an earlier build has left there is not taken along
    stale = source / "build" / "lib" / "antidote_bench"
    stale.mkdir(parents=True)
    (stale / "gone.py").write_text("")
    wheel = ("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    python("-m", "pip", *wheel, cwd=tmp_path)
    (built,) = tmp_path.glob("*.whl")
    install = ("install", "-q", "--no-deps", "--no-index", "--target", site, built)
    python("-m", "pip", *install, cwd=tmp_path)

    package = site / "antidote_bench"
    entries = {path.name for path in site.iterdir()}
    assert entries == {package.name, *(name for name in entries if name.endswith(".dist-info"))}
    assert len(entries) == 2 and not (package / "gone.py").exists()
    _check_files(package, source)
    _check_metadata(site)

    place.mkdir()
    attack = ("antidote_bench.attack.badnet", "--dataset", "digits", *QUICK)
    said = python("-m", *attack, "--save_folder_name", "mine", cwd=place, path=site)
    assert said.startswith("ACC")
    code = (
        "import antidote_bench as a; r = a.run_defense('record/mine', 'ft', epochs=1);"
        "print(a.__file__, r.path)"
    )
    said = python("-c", code, cwd=place, path=site)
    assert said.endswith(f"{package / '__init__.py'} record/mine/defense/ft\n")
    table = python("-m", "antidote_bench.compare", "record", "--published", cwd=place, path=site)
    assert "badnet" in table and "ft" in table
    info = json.loads((place / "record" / "mine" / "record.json").read_text())
    assert info["command"].startswith("python -m antidote_bench.attack.badnet --")
    assert info["git_commit"] is None
    assert sorted(path.name for path in place.iterdir()) == ["data", "record"]


def _check_files(package, source):
    """Every script, every file of options, and what the page is made of is in the wheel."""
    scripts = {path.name for path in source.glob("*.py")} - {"setup.py"}
    own = files_below(source / "antidote_bench")
    others = {f"{name}/{file}" for name in FOLDERS for file in files_below(source / name)}
    assert files_below(package) == scripts | own | others | {"benchmarks/published.csv"}
    assert {"compare.py", "sweep.py"} <= scripts
    assert {"attack/badnet.py", "config/attack/badnet.yaml", "utils/report/page.js"} <= others


def _check_metadata(site):
    """The wheel says what it needs, and how the tools of developers are asked for."""
    (about,) = importlib.metadata.distributions(path=[str(site)])
    needed = [line.partition(";")[0] for line in about.requires if "extra ==" not in line]
    first = {line.split(">=")[0].split("[")[0] for line in needed}
    assert {"torch", "torchvision", "pandas", "safetensors", "jsonargparse"} <= first
    assert not first & {"pytest", "ruff", "ray", "huggingface_hub"}
    assert {"hub", "sweep", "test"} <= set(about.metadata.get_all("Provides-Extra"))


def test_requirements_bring_the_package():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert lines[-1] == "-e ."


def test_a_command_starts_a_file_or_a_module():
    assert parsing.start("attack/badnet.py", installed=False) == ["python", "attack/badnet.py"]
    module = ["python", "-m", "antidote_bench.attack.badnet"]
    assert parsing.start("attack/badnet.py", installed=True) == module


@pytest.mark.parametrize("start", ["python attack/badnet.py", "python -m antidote_bench.attack.x"])
def test_a_table_of_results_takes_both_kinds_of_commands(start):
    command = f"{start} --width 8 --cache_path /there --epochs 2 --record_path=here"
    assert sweep._without_places(command) == f"{start} --width 8 --epochs 2"


def test_the_commit_is_that_of_this_checkout_or_none(tmp_path, monkeypatch):
    """A folder inside the repository of another project has no commit of its own."""
    about = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], [*about, "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(config, "ROOT", tmp_path)
    assert len(results._git_commit()) == 40
    (tmp_path / "site" / "antidote_bench").mkdir(parents=True)
    monkeypatch.setattr(config, "ROOT", tmp_path / "site" / "antidote_bench")
    assert results._git_commit() is None


def test_the_page_shows_commands_of_both_kinds():
    run = types.SimpleNamespace(victim=None, row={"attack": "badnet"}, path=Path("there"))
    for start in ("python attack/badnet.py", "python -m antidote_bench.attack.badnet"):
        run.record = {"command": f"{start} --width 8"}
        assert page.command(run) == f"{start} --width 8"
    run.record = {"command": "python -m antidote_bench.attack.other --width 8"}
    assert page.command(run) == "python attack/badnet.py --yaml_path there/config.yaml"
