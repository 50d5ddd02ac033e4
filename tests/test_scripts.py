"""Every script end to end on real digits, started as users start it; kills, second runs and bad input included."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.conftest import QUICK, ROOT, names

WRITTEN = {"config.yaml", "model.safetensors", "poison.safetensors", "log.csv", "results.csv", "record.json", "preview.png"}


def results(folder):
    (row,) = csv.DictReader(open(folder / "results.csv"))
    return row


@pytest.mark.parametrize("mode", ["all2one", "all2all"])
@pytest.mark.parametrize("name", names("attack"))
def test_attack(name, mode, places, run, tmp_path):
    done = run("-m", f"attack.{name}", *places, *QUICK, "--record_path", tmp_path, "--save_folder_name", "a", "--label_mode", mode)
    assert {path.name for path in (tmp_path / "a").iterdir()} == WRITTEN
    assert done.stdout.startswith("ACC ") and "ASR " in done.stdout and done.stdout.count("\n") == 1
    row = results(tmp_path / "a")
    assert float(row["asr"]) + float(row["ra"]) <= 1 and row["label_mode"] == mode
    assert row["n_backdoor"] == ("500" if mode == "all2all" else "450" if row["target"] == "0" else "")
    assert row["n_poison"] == ("0" if name == "clean" else "130")
    with open(tmp_path / "a" / "log.csv") as file:
        assert [line["stage"] for line in csv.DictReader(file)] == ["train", "final"]


@pytest.mark.parametrize("name", names("defense"))
def test_defense(name, places, run, small):
    before = {path: path.read_bytes() for path in small.iterdir() if path.is_file()}
    run("-m", f"defense.{name}", *places, *QUICK, "--result_file", "small", "--save_folder_name", f"{name}_quick", "--eval_every", 1)
    folder = small / "defense" / f"{name}_quick"
    assert {path.name for path in folder.iterdir()} == WRITTEN - {"poison.safetensors", "preview.png"}
    row, made = results(folder), results(small)
    assert row["defense"] == name and row["clean_budget"] == "64" and row["acc_before"] == made["acc"] and row["asr_before"] == made["asr"]
    assert 0 <= float(row["der"]) <= 1 and float(row["asr"]) + float(row["ra"]) <= 1
    stages = [line["stage"] for line in csv.DictReader(open(folder / "log.csv"))]
    assert stages == ["before", *(["pruned"] if name == "fmp" else []), "finetune", "after"]
    assert before == {path: path.read_bytes() for path in small.iterdir() if path.is_file()}, "the victim is untouched"


@pytest.mark.parametrize(("name", "flags"), [("blended", []), ("wanet", ["--strength", 2, "--pratio", 0.2])])
def test_the_attack_works(name, flags, places, run, tmp_path):
    """On the digits; badnet's own record is looked at in test_record.py."""
    run(f"attack/{name}.py", *places, *flags, "--record_path", tmp_path, "--save_folder_name", "a")
    row = results(tmp_path / "a")
    assert float(row["acc"]) > 0.9 and float(row["asr"]) > 0.7


def test_a_clean_record_is_one_like_any_other(places, run, tmp_path):
    run("attack/clean.py", *places, *QUICK, "--width", 8, "--trigger", "blended", "--record_path", tmp_path, "--save_folder_name", "c")
    made = results(tmp_path / "c")
    assert made["attack"] == "clean_blended" and made["pratio_effective"] == "0.0" and made["n_backdoor"] == "450"
    assert len(safetensors.torch.load_file(tmp_path / "c" / "poison.safetensors")["train_index"]) == 0
    run("defense/ft.py", *places, *QUICK, "--result_file", tmp_path / "c")
    assert results(tmp_path / "c" / "defense" / "ft")["acc_before"] == made["acc"]


def test_started_by_path_or_by_module_it_is_the_same(places, run, tmp_path):
    for number, start in enumerate((["attack/badnet.py"], ["-m", "attack.badnet"])):
        run(*start, *places, *QUICK, "--record_path", tmp_path, "--save_folder_name", f"a{number}")
        run(*(["defense/ft.py"], ["-m", "defense.ft"])[number], *places, *QUICK, "--record_path", tmp_path, "--result_file", f"a{number}")
    for part in ("", "defense/ft"):
        one, other = ((tmp_path / f"a{number}" / part / "model.safetensors").read_bytes() for number in (0, 1))
        assert one == other, "same seed, same weights"


def test_a_second_run_is_quick_and_changes_nothing(places, run, victim):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in victim.iterdir() if path.is_file()}
    begin = time.perf_counter()
    done = run("attack/badnet.py", *places, "--save_folder_name", "victim")
    assert "already done" in done.stdout and time.perf_counter() - begin < 30
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in victim.iterdir() if path.is_file()}


def test_another_configuration_is_refused_and_overwritten_on_demand(places, run, tmp_path):
    here = [*places, "--record_path", tmp_path, "--save_folder_name", "a", *QUICK]
    run("attack/badnet.py", *here)
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    done = run("attack/badnet.py", *here, "--pratio", "0.2", code=2)
    assert "pratio 0.1 there and 0.2 here" in done.first and "--overwrite" in done.first
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == first
    run("defense/ft.py", *places, *QUICK, "--result_file", tmp_path / "a")
    run("attack/badnet.py", *here, "--pratio", "0.2", "--overwrite")
    assert results(tmp_path / "a")["pratio"] == "0.2"
    done = run("defense/ft.py", *places, *QUICK, "--result_file", tmp_path / "a", code=2)
    assert "another victim" in done.first


def start_and_kill(arguments, how, log, epochs):
    """Start a script, send it a signal once `epochs` rows are in its log, return its exit code."""
    script = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > epochs):
        assert script.poll() is None, script.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    script.send_signal(how)
    return script.wait(60), script.stderr.read()


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_killed_attack_resumes_and_ends_with_the_same_weights(how, code, places, run, tmp_path, whole):
    arguments = ["attack/badnet.py", *places, "--record_path", tmp_path, "--save_folder_name", "a", "--epochs", "6"]
    state = tmp_path / "a" / "state"
    found, said = start_and_kill(arguments, how, state / "log.csv", 2)
    assert found == code and (how == signal.SIGKILL or "resumes" in said)
    assert state.is_dir() and not (tmp_path / "a" / "record.json").exists()
    refused = run("defense/ft.py", *places, "--result_file", tmp_path / "a", code=4)
    assert "not finished" in refused.first
    done = run(*arguments)
    assert done.stdout.startswith("ACC") and not state.exists()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == whole
    assert [row["epoch"] for row in csv.DictReader(open(tmp_path / "a" / "log.csv"))] == ["1", "2", "3", "4", "5", "6", ""]


@pytest.fixture(scope="module")
def whole(places, run, tmp_path_factory):
    """The weights of the same run, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run("attack/badnet.py", *places, "--record_path", folder, "--save_folder_name", "a", "--epochs", "6")
    return (folder / "a" / "model.safetensors").read_bytes()


def test_a_killed_defense_resumes(places, run, victim):
    arguments = ["defense/ft.py", *places, "--result_file", "victim", "--epochs", "40", "--save_folder_name"]
    start_and_kill([*arguments, "killed"], signal.SIGKILL, victim / "defense/killed/state/log.csv", 6)
    run(*arguments, "killed")
    run(*arguments, "unhurt")
    one, other = (safetensors.torch.load_file(victim / "defense" / name / "model.safetensors") for name in ("killed", "unhurt"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_dry_run_does_nothing(places, run, victim, tmp_path):
    done = run("attack/wanet.py", "--record_path", tmp_path / "r", "--cache_path", tmp_path / "c", "--dry_run")
    for words in ("digits", "130 of 1297", "per class [12, 9,", "259 more", "15 epochs of 20 steps", "wanet_digits (new)"):
        assert words in done.stdout
    assert not list(tmp_path.iterdir())
    done = run("defense/fmp.py", *places, "--result_file", "victim", "--save_folder_name", "planned", "--dry_run")
    for words in ("badnet on 1297", "64 clean pictures", "10 epochs of 1 steps", "planned (new)"):
        assert words in done.stdout
    assert not (victim / "defense" / "planned").exists()


def test_print_config_runs_again(places, run, tmp_path):
    text = run("attack/badnet.py", "--pratio", "0.2", "--print_config").stdout
    (tmp_path / "c.yaml").write_text(text)
    again = run("attack/badnet.py", "--yaml_path", tmp_path / "c.yaml", "--print_config").stdout
    assert again == text and "pratio: 0.2" in text


BAD = [
    (["attack/badnet.py", "--pration", "0.1"], 2, "pratio"),
    (["attack/badnet.py", "--epochs", "many"], 2, "epochs"),
    (["attack/badnet.py", "--pratio", "1.2"], 2, "0 to 1"),
    (["attack/badnet.py", "--attack_target", "10"], 2, "0 to 9"),
    (["attack/badnet.py", "--dry_run", "--attack_target", "10"], 2, "0 to 9"),
    (["attack/badnet.py", "--model", "resnet99"], 2, "resnet"),
    (["attack/badnet.py", "--dataset", "cifar11"], 2, "cifar10"),
    (["attack/badnet.py", "--dataset", "cifar10", "--dataset_path", "/nowhere"], 3, "/nowhere/cifar10"),
    (["attack/badnet.py", "--dataset", "folder", "--dataset_path", "/nowhere"], 2, "--image_size"),
    (["attack/badnet.py", "--device", "cuda:77"], 2, "cuda:77"),
    (["attack/badnet.py", "--device", "abacus"], 2, "abacus"),
    (["attack/badnet.py", "--trigger_path", "nowhere.png"], 3, "nowhere.png"),
    (["attack/badnet.py", "--yaml_path", "nowhere.yaml"], 2, "nowhere.yaml"),
    (["attack/clean.py", "--trigger", "nothing"], 2, "badnet"),
    (["attack/clean.py", "--pratio", "0.1"], 2, "pratio"),
    (["attack/wanet.py", "--pratio", "0.5"], 2, "cross_ratio"),
    (["attack/badnet.py", "--lr", "1e30"], 1, "--lr"),
    (["defense/ft.py"], 2, "result_file"),
    (["defense/ft.py", "--result_file", "nothing"], 3, "nothing"),
    (["defense/ft.py", "--result_file", "victim", "--clean_ratio", "0"], 2, "clean_ratio"),
    (["compare.py", "/nowhere"], 3, "/nowhere"),
]


@pytest.mark.parametrize(("words", "code", "sentence"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_bad_input_gets_one_sentence(words, code, sentence, places, run, victim, tmp_path):
    here = places if words[0] != "compare.py" else []
    name = ["--save_folder_name", f"bad{abs(hash(tuple(words)))}"] if words[0].startswith("attack") else []
    done = run(*words, *here, *name, *(QUICK if here else []), code=code)
    assert sentence in done.first and len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    assert not done.stdout


def test_debug_shows_the_traceback(run):
    done = run("attack/badnet.py", "--dataset", "cifar10", "--dataset_path", "/nowhere", "--debug", code=3)
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("option", ["--record_path", "--cache_path"])
def test_a_place_where_nothing_can_be_written(option, run, places, tmp_path):
    (tmp_path / "file").write_text("in the way")
    tmp_path.chmod(0o500)  # root may write all the same, but not below a file
    done = run("attack/badnet.py", *places, option, tmp_path / "file" / "r", code=1)
    assert "file" in done.first and option in done.first and len(done.stderr.strip().splitlines()) == 1
    tmp_path.chmod(0o700)


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_disk_that_fills_up_damages_nothing(run, victim, places, tmp_path):
    shutil.copytree(victim, tmp_path / "victim")
    before = {path: path.read_bytes() for path in (tmp_path / "victim").rglob("*") if path.is_file()}
    words = [sys.executable, "defense/ft.py", *places, *QUICK, "--result_file", tmp_path / "victim", "--save_folder_name", "full"]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not list((tmp_path / "victim").rglob("*.tmp")) and not (tmp_path / "victim/defense/full/record.json").exists()
    run("defense/ft.py", *places, *QUICK, "--result_file", tmp_path / "victim", "--save_folder_name", "full")


def test_your_own_pictures(run, places, tmp_path):
    from tests.test_data import folders

    folders(tmp_path / "set", ("train", "val"), ("ant", "bee", "cat"), count=20, size=(50, 40))
    words = ["--dataset", "folder", "--dataset_path", tmp_path / "set", "--image_size", 32, "--model", "resnet9", "--width", 8]
    run("attack/badnet.py", *places, *words, *QUICK, "--batch_size", 16, "--record_path", tmp_path, "--save_folder_name", "a")
    run("defense/ft.py", *places, *QUICK, "--result_file", tmp_path / "a", "--clean_ratio", 0.2)
    assert results(tmp_path / "a/defense/ft")["clean_budget"] == "12"
    shutil.move(tmp_path / "set", tmp_path / "moved")
    run("defense/fmp.py", *places, *QUICK, "--result_file", tmp_path / "a", "--dataset_path", tmp_path / "moved")
    (tmp_path / "moved/train/ant/0.png").unlink()
    done = run(
        "defense/ft.py", *places, "--result_file", tmp_path / "a", "--save_folder_name", "b", "--dataset_path", tmp_path / "moved", code=4
    )
    assert "60" in done.first and "59" in done.first


def test_seeds_have_their_own_generators(run, places, tmp_path):
    """Another training seed keeps the poison; another poison seed keeps the first weights' initialisation."""
    rows = {}
    for name, flags in {"a": [], "b": ["--random_seed", 1], "c": ["--poison_seed", 1]}.items():
        run("attack/badnet.py", *places, *flags, "--epochs", 0, "--record_path", tmp_path, "--save_folder_name", name)
        rows[name] = (safetensors.torch.load_file(tmp_path / name / "poison.safetensors")["train_index"].tolist(),
                      (tmp_path / name / "model.safetensors").read_bytes())  # fmt: skip
    assert rows["a"][0] == rows["b"][0] != rows["c"][0]
    assert rows["a"][1] == rows["c"][1] != rows["b"][1]


def test_another_checkout_is_refused(tmp_path):
    shutil.copytree(ROOT / "attack", tmp_path / "attack")
    done = subprocess.run([sys.executable, "attack/badnet.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 2 and "another checkout" in done.stderr


def test_seconds_and_provenance(victim):
    info = json.loads((victim / "record.json").read_text())
    assert Path(victim / "preview.png").stat().st_size > 1000 and info["config_hash"] == results(victim)["config_hash"]
