"""One training in several processes: the result of one, whatever the batches, and nothing said
twice."""

import csv
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import safetensors.torch
import torch
from torch import nn

from antidote_bench.utils import device, distributed, parsing
from antidote_bench.utils.errors import ConfigError
from tests import distributed_training
from tests.helpers import ROOT

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
PAGE = (ROOT / "docs" / "running.md").read_text()
COMMANDS = [line for line in PAGE.splitlines() if line.startswith("torchrun ")]


@pytest.fixture
def torchrun():
    """torchrun(*arguments): start two processes, return what they printed; with start=True the
    processes under way."""

    def begin(*arguments, start=False):
        command, pipe = [*TORCHRUN, *map(str, arguments)], subprocess.PIPE
        both = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **ONE_THREAD}, stdout=pipe, stderr=pipe, text=True
        )
        if start:
            return both
        out, err = both.communicate()
        assert both.returncode == 0, f"exit {both.returncode}\n{out}\n{err}"
        return out, err

    return begin


@pytest.fixture
def process(monkeypatch):
    """process(rank): have this process think that it is one of the two that torchrun has
    started."""

    def become(rank):
        place = {
            "RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": 2,
            "TORCHELASTIC_RUN_ID": "none",
        }
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))

    return become


def rows(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


def start(script, *words):
    """Run a script in this process."""
    module = importlib.import_module(f"antidote_bench.{script}")
    module.main(parsing.parse(module.Config, [str(word) for word in words]))


def test_two_processes_train_as_one(torchrun, run, tmp_path):
    torchrun("-m", "tests.distributed_training", tmp_path)
    run("-m", "tests.distributed_training", tmp_path, env=ONE_THREAD)
    two, one = (safetensors.torch.load_file(tmp_path / f"of_{size}.safetensors") for size in (2, 1))
    facts = json.loads((tmp_path / "of_2.json").read_text())
    assert facts["equal"] == dict.fromkeys(facts["equal"], True), (
        "the processes end with different weights"
    )
    for name, within in {
        "float32": 1e-5,
        "float64": 1e-12,
        "uneven": 1e-12,
        "stored": 1e-5,
        "interrupted": 1e-5,
    }.items():
        torch.testing.assert_close(
            two[f"{name} weights"], one[f"{name} weights"], rtol=0, atol=within
        )
        # they are rounded to 1e-6
        torch.testing.assert_close(two[f"{name} losses"], one[f"{name} losses"], rtol=0, atol=2e-6)
        assert two[f"{name} losses"][-1] < 1.1, "the networks learn"
    assert (
        torch.equal(two["interrupted weights"], two["float32 weights"])
        and len(two["interrupted losses"]) == 2
    )
    assert "BatchNorm2d" in facts["kinds"] and "SyncBatchNorm" not in facts["kinds"]
    assert facts["refused"] == [
        "process 1 of 2 has something else",
        "a batch of 1 images cannot be shared by 2 processes: "
        "raise --batch_size or start fewer with torchrun's --nproc_per_node",
    ]


def test_an_attack_in_two_processes_is_killed_and_resumes(torchrun, places, run, tmp_path):
    """Batch normalisation sees half a batch on a CPU: the losses of an epoch differed by up to 0.1,
    the last ones by 0.02 (seeds 0 to 2)."""
    words = [*places, "--record_path", tmp_path, "--width", 8, "--epochs", 6, "--save_folder_name"]
    state = tmp_path / "two" / "state"
    for _ in range(4):  # torchrun may end the first process before it has noticed
        both = torchrun("attack/badnet.py", *words, "two", start=True)
        while both.poll() is None and (not (state / "log.csv").exists() or len(rows(state)) < 2):
            time.sleep(0.02)
        (other,) = (
            child for child in psutil.Process(both.pid).children() if child.environ()["RANK"] == "1"
        )
        other.kill()
        said = both.communicate()[1]
        assert both.returncode == 1
        if "error: another process of this training has ended; the same command resumes" in said:
            break
        shutil.rmtree(state)
    else:
        raise AssertionError(f"nothing was said: {said}")

    out, err = torchrun("attack/badnet.py", *words, "two")
    assert out.startswith("ACC") and out.count("\n") == 1 and "Warning" not in err
    run("attack/badnet.py", *words, "one", env=ONE_THREAD)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["epoch"] for row in two] == ["1", "2", "3", "4", "5", "6", ""]
    differences = [
        abs(float(a["loss"]) - float(b["loss"])) for a, b in zip(one[:-1], two[:-1], strict=True)
    ]
    assert max(differences) < 0.25 and differences[-1] < 0.1
    assert (
        all(abs(float(one[-1][key]) - float(two[-1][key])) < 0.04 for key in ("acc", "asr"))
        and float(two[-1]["acc"]) > 0.9
    )
    assert (
        json.loads((tmp_path / "two" / "record.json").read_text())["device"] == "2 x cpu, 1 threads"
    )
    out, _ = torchrun("attack/badnet.py", *words, "two")
    assert out.count("already done") == 1 and out.count("ACC") == 1


def test_the_first_process_makes_the_trigger_and_its_clean_model(torchrun, places, tmp_path):
    words = [
        *places,
        "--record_path",
        tmp_path,
        "--cache_path",
        tmp_path / "cache",
        "--width",
        4,
        "--epochs",
        1,
        "--steps",
        2,
    ]
    out, err = torchrun("attack/trojan_sq.py", *words, "--save_folder_name", "a")
    assert (
        out.startswith("ACC")
        and out.count("\n") == 1
        and err.count("a clean model is trained first") == 1
    )
    assert (tmp_path / "a" / "record.json").is_file()
    (made,) = (tmp_path / "cache" / "clean_models").glob("*/record.json")
    assert json.loads(made.read_text())["device"] == "cpu, 1 threads"


@pytest.mark.parametrize(
    ("script", "words", "sentence"),
    [
        (
            "attack.blind",
            [],
            "blind brings a loss of its own and runs in one process: start it without torchrun",
        ),
        (
            "attack.badnet",
            ["--batch_size", "1"],
            "a batch of 1 images cannot be shared by 2 processes: raise --batch_size",
        ),
        (
            "attack.badnet",
            ["--device", "cuda:1"],
            "--device takes cuda, cpu or auto there, not 'cuda:1'",
        ),
        (
            "defense.ft",
            ["--result_file", "small"],
            "the defense ft runs in one process: start it without torchrun",
        ),
    ],
)
def test_what_torchrun_cannot_start_is_refused(script, words, sentence, places, process):
    process(0)
    with pytest.raises(ConfigError, match=sentence):
        start(script, *places, *words)


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ConfigError, match="2 processes, but GPUs here: 1; start it with --nproc_per_node 1"
    ):
        device.setup(SimpleNamespace(device="cuda"), distributed.Workers(1, 2, 1, 2))


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_says_what_it_would_do(rank, process, places, capsys):
    process(rank)
    start("attack.badnet", *places, "--dry_run")
    assert capsys.readouterr().out.count("writes") == 1 - rank


def test_batch_normalisation_of_whole_batches_leaves_the_model_alone(monkeypatch):
    """Torch has it for GPUs only: here is seen what is trained there, not how."""
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda network, **_: network)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    model = distributed_training.model()
    twin = distributed.data_parallel(model)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert any(isinstance(module, nn.SyncBatchNorm) for module in twin.modules())
    one, other = model.state_dict(), twin.state_dict()
    assert one.keys() == other.keys() and all(
        one[name].data_ptr() == other[name].data_ptr() for name in one
    )


def test_the_documented_command(places, process, capsys):
    assert COMMANDS
    for line in COMMANDS:
        words = shlex.split(re.sub(r"\s+#.*", "", line))
        script = next(word for word in words if word.endswith(".py"))
        process(0)
        rest = words[words.index(script) + 1 :]
        start(
            script.removesuffix(".py").replace("/", "."),
            *rest,
            *places,
            "--dataset",
            "digits",
            "--dry_run",
        )
        assert "writes" in capsys.readouterr().out
