"""A new defense is one .py and one .yaml: the tests of all defenses pass with it, and no other file
has to change."""

import os
import subprocess
import sys

from antidote_bench.utils import files
from tests.helpers import ROOT

SCRIPT = '''"""Shrink: scale down the weights of the last layer.

A toy baseline, which shows what a defense needs.

    python defense/shrink_toy.py --result_file badnet_cifar10
"""

from dataclasses import dataclass

from antidote_bench.utils.config import Defense, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    factor: float = option(0.5, above=0, at_most=1)
    """what the weights are multiplied by"""


if __name__ == "__main__":
    launch(Config)

import torch

from antidote_bench.utils import run
from antidote_bench.utils.features import last_linear


@torch.no_grad()
def repair(model, record, config):
    last_linear(model).weight.mul_(config.factor)
    record.report("shrunk", model)
    return model


def main(config):
    run.defend(__name__, config, repair)
'''
OPTIONS = "# Shrink, less than by default.\nfactor: 0.7\n"
TESTS = ["test_config.py", "test_layers.py", "test_scripts.py", "test_sweep.py"]


def tracked(place):
    """{path: checksum} of the files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
    paths = [place / name for name in listed.stdout.splitlines()]
    return {path.relative_to(place): files.sha256(path) for path in paths if path.is_file()}


def test_a_new_defense_is_one_script_and_one_yaml(tmp_path):
    clone = tmp_path / "clone"
    for path in tracked(ROOT):
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        (clone / path).write_bytes((ROOT / path).read_bytes())
    subprocess.run(["git", "init", "-q"], cwd=clone, check=True)
    before = tracked(clone)
    (clone / "defense" / "shrink_toy.py").write_text(SCRIPT)
    (clone / "config" / "defense" / "shrink_toy.yaml").write_text(OPTIONS)
    words = ["-p", "no:cacheprovider", "-k", "shrink_toy", *(f"tests/{it}" for it in TESTS)]
    environment = {
        **{name: value for name, value in os.environ.items() if "XDIST" not in name},
        "PYTHONPATH": str(clone),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= 6, f"only {passed} tests know the new defense"
    after = tracked(clone)
    new = {str(path) for path in after.keys() - before.keys()}
    assert new == {"defense/shrink_toy.py", "config/defense/shrink_toy.yaml"}
    assert {path: after[path] for path in before} == before, "a test has changed another file"
