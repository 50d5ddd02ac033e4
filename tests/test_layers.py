"""The import arrows of this project, all pointing one way."""

import ast
import json
import re
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT, names

PACKAGE = "antidote_bench"
# what starts runs, and is imported by no one
SCRIPTS = {
    "analysis",
    "attack",
    "defense",
    "detection",
    "audit",
    "compare",
    "convert",
    "measure",
    "sweep",
}
FOLDERS = ["analysis", "attack", "defense", "detection"]
# a group of modules may import from the groups before it, and from itself without a circle
FOUNDATION = {
    "errors", "text", "backdoorbench", "files", "seeds", "device", "distributed", "optimizers",
    "checkpoint", "charts", "config", "defaults", "parsing", "launch", "record.folder",
}  # fmt: skip
LEVELS = [
    FOUNDATION,
    {"data"},
    {"channels", "train", "evaluation", "features", "decoupling"},
    {"record"},
    {"wings"},
    {"protocol", "run"},
]  # fmt: skip
# they never import each other
WINGS = {"poisoning", "repair", "detection", "report", "sweep", "exchange", "audit", "analysis"}
TORCH_FREE = [
    "config",
    "parsing",
    "launch",
    "record.folder",
    "record.claim",
    "poisoning.options",
    "repair.options",
    "detection.options",
    "exchange.options",
    "analysis.options",
    "audit.options",
    "audit.page",
    "audit.sarif",
    "report.page",
    "report.published",
    "report.tables",
    "sweep.grid",
    "sweep.launchers",
]
# what a defense may import: the test sets are out of its reach
DEFENDER = {
    "config",
    "launch",
    "errors",
    "files",
    "seeds",
    "device",
    "optimizers",
    "checkpoint",
    "charts",
    "channels",
    "train",
    "features",
    "run",
    "data.dataset",
    "data.loader",
    "data.memmap",
    "decoupling",
    "repair",
    "detection.options",
    "detection.signatures",
    "detection.clusters",
    "detection.triggers",
}
# what a detector may import: test sets and poison flags are out of its reach
INSPECTOR = {*(DEFENDER - {"repair"}), "repair.isolation", "detection"}
# what knows them, and is out of reach of what detectors share
EVALUATOR = {"evaluation", "protocol.detect", "protocol.roc", "record.contents", "record.results"}


def imported(path):
    """Names of modules that a file imports, absolute, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path):
    """The name of a file of utils/ below it, repair.masks say."""
    return ".".join(path.relative_to(ROOT / "utils").with_suffix("").parts)


MODULES = {module_of(path): path for path in sorted((ROOT / "utils").rglob("[a-z]*.py"))}


def arrows(path):
    """The modules of utils/ that a file imports."""
    found = set()
    for name in imported(path):
        parts = name.split(".")[2:] if name.startswith(f"{PACKAGE}.utils.") else []
        found |= {".".join(parts[:end]) for end in (1, 2) if ".".join(parts[:end]) in MODULES}
    return found


def folders(path):
    """The folders of this project, and the scripts beside them, that a file imports from."""
    found = {name.removeprefix(f"{PACKAGE}.").split(".")[0] for name in imported(path)}
    return found & {entry.stem for entry in ROOT.iterdir()}


def level(module):
    room = "wings" if module.split(".")[0] in WINGS else module.split(".")[0]
    return next(
        number
        for number, group in enumerate(LEVELS)
        if module in group or (room in group and module not in FOUNDATION)
    )


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    for other in arrows(MODULES[module]):
        assert level(other) <= level(module), f"{module} imports {other}"
        rooms = {module.split(".")[0], other.split(".")[0]} & WINGS
        assert len(rooms) < 2, f"{module} imports {other} of another wing"
    assert not folders(MODULES[module]) & {*SCRIPTS, "tests", "benchmarks"}


def test_no_circle():
    left = {module: arrows(path) - {module} for module, path in MODULES.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"these import each other: {sorted(left)}"


def test_models_know_errors_only():
    for path in (ROOT / "models").glob("*.py"):
        assert arrows(path) <= {"errors"}, path


@pytest.mark.parametrize("folder", FOLDERS)
def test_scripts_do_not_import_scripts(folder):
    for name in names(folder):
        assert not folders(ROOT / folder / f"{name}.py") & SCRIPTS, name


@pytest.mark.parametrize("name", names("defense"))
def test_a_defense_sees_no_test_set(name):
    for module in arrows(ROOT / "defense" / f"{name}.py"):
        assert module in DEFENDER or module.split(".")[0] in DEFENDER, f"{name} imports {module}"


@pytest.mark.parametrize("name", names("detection"))
def test_a_detector_sees_no_test_set_and_no_poison_flag(name):
    for module in arrows(ROOT / "detection" / f"{name}.py"):
        assert module in INSPECTOR or module.split(".")[0] in INSPECTOR, f"{name} imports {module}"


def test_what_detectors_share_knows_no_more_than_they_do():
    for module, path in MODULES.items():
        if module.startswith("detection."):
            assert not arrows(path) & EVALUATOR, module


def test_nobody_touches_the_import_path_or_pickles():
    for folder in (*FOLDERS, "models", "utils"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            for word in ("sys.path", "torch.load(", "import pickle", ".cuda()", "torch.save("):
                safe = re.sub(r"safetensors\.torch\.(save|load)\(", "", text)
                if path == MODULES["checkpoint"]:  # the one place that knows files of torch.save
                    safe = safe.replace('torch.load(file, map_location="cpu", weights_only', "")
                    safe = safe.replace("torch.save(content, file)", "")
                assert word not in safe, f"{path}: {word}"


def test_everything_is_imported_as_a_part_of_the_package():
    """Under its bare name a module would be loaded twice, or be that of another project."""
    ours = {*FOLDERS, "models", "utils"}
    tops = [ROOT / name for name in (*ours, "benchmarks", "tests")]
    for path in [file for top in tops for file in top.rglob("*.py")] + [*ROOT.glob("*.py")]:
        assert not {name.split(".")[0] for name in imported(path)} & ours, path


def test_only_one_module_knows_the_files_of_a_record():
    names = re.compile(r'"(record\.json|config\.yaml|results\.csv|log\.csv|\w+\.safetensors)"')
    known = {
        "record.json",
        "config.yaml",
        "results.csv",
        "log.csv",
        "model.safetensors",
        "poison.safetensors",
        "trigger.safetensors",
    }
    places = [*MODULES.values(), ROOT / "compare.py", ROOT / "sweep.py"]
    places += (ROOT / "benchmarks").glob("*.py")
    found = {path for path in places if known & set(names.findall(path.read_text()))}
    assert found == {MODULES["record.folder"]}


def test_some_modules_need_no_torch():
    lines = "\n".join(f"import antidote_bench.utils.{module}" for module in TORCH_FREE)
    code = f"{lines}\nimport sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


HELP = """
import contextlib, io, json, runpy, sys, time

said, scripts = {}, sys.argv[1:]
sys.argv[1:] = ["--help"]
for script in scripts:
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    said[script] = out.getvalue()
    assert "torch" not in sys.modules and time.perf_counter() - begin < 3, script
print(json.dumps(said))
"""


@pytest.mark.parametrize("folder", FOLDERS)
def test_help_names_a_paper_and_needs_no_torch(folder):
    """All scripts of a folder in one process, for the sake of time."""
    scripts = [f"{folder}/{name}.py" for name in names(folder)]
    command = [sys.executable, "-c", HELP, *scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for script, said in json.loads(done.stdout).items():
        assert "default:" in said, script
        paper = re.search(r"\b(19|20)\d\d\b", said)
        assert paper or "baseline" in said or "Clean:" in said, f"{script} names no paper"


@pytest.mark.parametrize("script", ["attack/badnet.py", "audit.py", "compare.py", "measure.py"])
def test_help_is_quick(script):
    begin = time.perf_counter()
    command = [sys.executable, "-X", "importtime", script, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 3, "half a second on an idle machine"
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_python_is_new_enough():
    assert sys.version_info >= (3, 10)
