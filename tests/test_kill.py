"""What kill -9 at every file operation of an attack and of a defense leaves behind.

The same command then ends with the same weights, and nothing is left over.
"""

import itertools
import os
import shutil

import pytest

from antidote_bench.utils import files
from tests import start
from tests.helpers import ROOT, image_folders

OPERATIONS = ("replace", "rename", "unlink", "mkdir", "rmdir", "link")


def states_of(words, place, copies):
    """Folders below `copies`, each as a kill at one file operation of a script in `place` leaves
    it: a script that runs through copies `place` before each of them."""
    process = start.SERVER.Process(target=_run, args=(words, str(place), copies))
    process.start()
    process.join()
    assert process.exitcode == 0
    return sorted(copies.iterdir())


def _run(words, place, copies):
    def copied(operation):
        def function(path, *args, **options):
            inside = options.get("dir_fd") is not None or place in str(path)
            if inside and not copying:
                copying.append(True)
                shutil.copytree(place, copies / f"{next(numbers):03}")
                copying.clear()
            return operation(path, *args, **options)

        return function

    numbers, copying = itertools.count(), []
    for name in OPERATIONS:
        setattr(os, name, copied(getattr(os, name)))
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    start.run_script(words, str(ROOT), {})


def contents(folder):
    """{path: checksum} of the files in a folder that must not depend on interruptions."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stable = path.suffix in (".safetensors", ".png", ".yaml")
        found[str(path.relative_to(folder))] = files.sha256(path) if stable else path.is_file()
    return found


@pytest.mark.parametrize("kind", ["attack", "defense"])
def test_killed_at_every_file_operation(kind, run, tmp_path):
    record, data = tmp_path / "record", image_folders(tmp_path / "data")
    common = ["--record_path", str(record), "--cache_path", str(tmp_path / "cache")]
    words = ["attack/badnet.py", *common, "--dataset", "folder", "--dataset_path", str(data)]
    words += ["--image_size", "16", "--model", "resnet9", "--width", "4", "--epochs", "1"]
    words += ["--pratio", "0.25", "--batch_size", "8", "--save_folder_name", "run"]
    folder = record / "run"
    if kind == "defense":
        run(*words)
        words = ["defense/clp.py", *common, "--result_file", "run"]
        folder = record / "run" / "defense" / "clp"
    run(*words)
    wanted, around = contents(folder), {path.name for path in folder.parent.iterdir()}
    shutil.rmtree(folder)
    states = states_of(words, record, tmp_path / "states")
    assert len(states) > 10, "too few file operations were seen"
    for state in states:
        shutil.rmtree(record)
        state.rename(record)
        run(*words)
        assert contents(folder) == wanted, f"killed at file operation {state.name}"
        assert {path.name for path in folder.parent.iterdir()} == around, "something is left over"
