"""The import arrows of this project, all pointing one way."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import names

ROOT = Path(__file__).resolve().parents[1]
# a module may import from the lines above its own only
ORDER = (
    "errors files seeds models config finished tables published pictures page launch sources grid engines crew device stored data batch views channels generator patterns invert poison metrics choice unlearn optimizers train isolate sensitivity masks preview judge record workshop results run"
).split()
RANK = {name: rank for rank, name in enumerate(ORDER)}


def imported(path):
    """Names of modules that a file imports, absolute, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ranked(module):
    """Rank of an imported module of the project, None for others."""
    top, _, rest = module.partition(".")
    return RANK["models"] if top == "models" else RANK.get(rest.split(".")[0]) if top == "utils" else None


def test_every_module_has_a_place():
    assert {path.stem for path in (ROOT / "utils").glob("[a-z]*.py")} == set(ORDER) - {"models"}


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "utils").glob("[a-z]*.py")), *sorted((ROOT / "models").glob("*.py"))], ids=lambda p: p.stem
)
def test_imports_go_down_only(path):
    own = RANK["models"] if path.parent.name == "models" else RANK[path.stem]
    for module in imported(path):
        assert module.split(".")[0] not in {"attack", "defense", "compare", "tests"}
        rank = ranked(module)
        assert rank is None or rank < own or (path.parent.name == "models" and rank == own), f"{path.name} imports {module}"


@pytest.mark.parametrize("folder", ["attack", "defense"])
def test_scripts_do_not_import_scripts(folder):
    for name in names(folder):
        tops = {module.split(".")[0] for module in imported(ROOT / folder / f"{name}.py")}
        assert not tops & {"attack", "defense", "compare"}, name


def test_no_defense_sees_the_exam():
    for name in names("defense"):
        modules = set(imported(ROOT / "defense" / f"{name}.py"))
        assert not any(module.startswith(("utils.metrics", "utils.poison", "utils.record")) for module in modules), name


def test_nobody_touches_the_import_path_or_pickles():
    for folder in ("attack", "defense", "models", "utils"):
        for path in (ROOT / folder).glob("*.py"):
            text = path.read_text()
            for word in ("sys.path", "torch.load(", "import pickle", ".cuda()"):
                assert word not in text, f"{path}: {word}"
            assert text.count("torch.save(") == text.count("safetensors.torch.save("), path


@pytest.mark.parametrize("script", [f"{folder}/{name}.py" for folder in ("attack", "defense") for name in names(folder)] + ["compare.py"])
def test_help_answers_without_torch(script):
    import time

    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 3, "half a second on an idle machine"
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    if script != "compare.py":
        assert "default:" in done.stdout
        assert re.search(r"\b(19|20)\d\d\b", done.stdout) or "baseline" in done.stdout or "Clean:" in done.stdout, "no paper is named"


def test_python_is_new_enough():
    assert sys.version_info >= (3, 10)
