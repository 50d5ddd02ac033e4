"""Every script end to end on real digits, started as users start it; kills, second runs and bad
input included."""

import concurrent.futures
import csv
import importlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

from antidote_bench import models
from antidote_bench.attack import clean
from antidote_bench.defense.ft import Config as FT
from antidote_bench.utils import parsing
from antidote_bench.utils import run as protocol
from antidote_bench.utils.config import Attack
from antidote_bench.utils.data import dataset
from antidote_bench.utils.errors import ConfigError, RefusedError
from antidote_bench.utils.poisoning import attacker
from tests.conftest import QUICK, SMALL
from tests.helpers import ROOT, few, names
from tests.start import running
from tests.start import start as fork

WRITTEN = {
    "config.yaml",
    "model.safetensors",
    "poison.safetensors",
    "log.csv",
    "results.csv",
    "record.json",
    "preview.png",
}


def results(folder):
    (row,) = csv.DictReader(open(folder / "results.csv"))
    return row


@pytest.fixture(scope="module")
def digits(places):
    return dataset.open_dataset("digits", "data", cache=places[3])


@pytest.fixture(scope="module")
def some_digits(digits, tmp_path_factory, places):
    """(options, true training labels) of 400 of the digits, and of 100 to test on, as image folders
    of ten classes."""
    place = tmp_path_factory.mktemp("digits")
    for name, split, count in (("train", digits[1], 40), ("test", digits[2], 10)):
        for label in range(10):
            folder = place / name / str(label)
            folder.mkdir(parents=True)
            for number in (split.truth == label).nonzero().flatten()[:count].tolist():
                image = split.images[number].permute(1, 2, 0).numpy()
                Image.fromarray(image).save(folder / f"{number:04}.png")
    size = digits[0].size
    words = ["--dataset", "folder", "--dataset_path", str(place), "--image_size", str(size)]
    words += ["--model", "resnet9", "--batch_size", "64"]
    loaded = dataset.open_dataset("folder", place, image_size=size, cache=places[3])
    return words, loaded[1].truth


def examine(folder, name, mode, truth):
    """What every attack leaves behind: files, one row, and a training set with the right images,
    kinds and labels."""
    script = importlib.import_module(f"antidote_bench.attack.{name}")
    options = parsing.parse(script.Config, ["--yaml_path", str(folder / "config.yaml")])
    text = (ROOT / "attack" / f"{name}.py").read_text()
    in_loop = "make_loss" in text or "edit=" in text  # no image is poisoned
    assert {path.name for path in folder.iterdir()} == WRITTEN | (
        {"trigger.safetensors"} if hasattr(script, "prepare") else set()
    )
    row, held = results(folder), safetensors.torch.load_file(folder / "poison.safetensors")
    assert float(row["asr"]) + float(row["ra"]) <= 1 and row["label_mode"] == mode
    assert row["n_backdoor"] == str(100 if mode == "all2all" else 90)
    wanted = round(options.pratio * len(truth))
    if options.clean_label:
        wanted = min(wanted, int((truth == 0).sum()))
    assert int(row["n_poison"]) == wanted and float(row["pratio_effective"]) == pytest.approx(
        wanted / len(truth)
    )
    info = json.loads((folder / "record.json").read_text())
    assert info["training_set"] == ("none" if in_loop else "stored")
    python, file, *words = shlex.split(info["command"])
    assert (python, file) == ("python", f"attack/{name}.py") and parsing.parse(
        script.Config, words
    ) == options
    poisoned, covers = (
        held["train_index"][held["train_kind"] == 1],
        held["train_index"][held["train_kind"] == 2],
    )
    assert len(poisoned) == (0 if in_loop else wanted) and len(held["train_index"].unique()) == len(
        poisoned
    ) + len(covers)
    told = dict(zip(held["train_index"].tolist(), held["train_labels"].tolist(), strict=True))
    if hasattr(script, "make_labels"):  # labels of any wrong class
        assert all(told[i] != int(truth[i]) for i in poisoned.tolist())
    else:
        goal = {i: (int(truth[i]) + 1) % 10 if mode == "all2all" else 0 for i in poisoned.tolist()}
        assert all(told[i] == goal[i] for i in poisoned.tolist())
    assert all(told[i] == int(truth[i]) for i in covers.tolist())
    if options.clean_label:
        assert (truth[poisoned] == 0).all()
    with open(folder / "log.csv") as file:
        assert [line["stage"] for line in csv.DictReader(file)] == ["train", "final"]


@pytest.mark.parametrize("mode", ["all2one", "all2all"])
@pytest.mark.parametrize("name", names("attack"))
def test_attack(name, mode, places, tmp_path, some_digits, capsys):
    """Every attack, in this process for the sake of time; those that have no such form say why."""
    script = importlib.import_module(f"antidote_bench.attack.{name}")
    data, truth = some_digits
    words = [*places, *data, *few(f"attack.{name}"), "--record_path", str(tmp_path)]
    words += ["--save_folder_name", "a", "--label_mode", mode]
    why = script.Config.refused_modes.get(mode)
    if script.Config.clean_label and mode == "all2all":
        why = "only images of the one target class are poisoned"
    if why:
        with pytest.raises(ConfigError, match=f"label_mode must be .*one here: {why}"):
            parsing.parse(script.Config, words)
        return
    script.main(parsing.parse(script.Config, words))
    shown = capsys.readouterr().out
    assert shown.startswith("ACC ") and "ASR " in shown and shown.count("\n") == 1
    examine(tmp_path / "a", name, mode, truth)


def test_clean_labels_are_cut_to_the_class(places, run, tmp_path):
    done = run(
        "attack/sig.py",
        *places,
        *SMALL,
        "--pratio",
        0.5,
        "--record_path",
        tmp_path,
        "--save_folder_name",
        "a",
    )
    count = int(results(tmp_path / "a")["n_poison"])
    assert (
        f"warning: 648 images were asked for, and all {count} of the target class are poisoned"
        in done.stderr
    )
    assert (
        float(results(tmp_path / "a")["pratio_effective"]) == pytest.approx(count / 1297)
        and results(tmp_path / "a")["pratio"] == "0.5"
    )
    done = run(
        "attack/sig.py",
        *places,
        *SMALL,
        "--pratio",
        0.05,
        "--record_path",
        tmp_path,
        "--save_folder_name",
        "b",
    )
    assert results(tmp_path / "b")["n_poison"] == "65" and "warning" not in done.stderr


def test_a_clean_model_is_made_once_or_given(places, run, tmp_path, smaller):
    words = [
        "attack/trojan_sq.py",
        *places,
        *SMALL,
        "--steps",
        2,
        "--record_path",
        tmp_path,
        "--cache_path",
        tmp_path / "cache",
    ]
    done = run(*words, "--save_folder_name", "a")
    assert "a clean model is trained first" in done.stderr
    done = run(*words, "--save_folder_name", "b", "--random_seed", 1, "--poison_seed", 1)
    assert "trained first" not in done.stderr
    made = [
        json.loads((tmp_path / name / "record.json").read_text())["clean_model"] for name in "ab"
    ]
    assert made[0] == made[1] and 0 <= made[0]["acc"] <= 1 and len(made[0]["sha256"]) == 64
    (folder,) = (path for path in (tmp_path / "cache" / "clean_models").iterdir() if path.is_dir())
    run(*words, "--save_folder_name", "c", "--clean_record", folder)
    same = [
        safetensors.torch.load_file(tmp_path / name / "trigger.safetensors")["pattern"]
        for name in "ac"
    ]
    assert torch.equal(*same)
    assert (
        "not of a clean model"
        in run(*words, "--save_folder_name", "d", "--clean_record", smaller, code=4).first
    )
    assert (
        "nowhere"
        in run(*words, "--save_folder_name", "d", "--clean_record", "nowhere", code=3).first
    )
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert "damaged" in run(*words, "--save_folder_name", "d", code=4).first


def test_two_attacks_at_once_share_one_clean_model(places, tmp_path):
    words = [
        "-m",
        "attack.l0_inv",
        *places,
        *QUICK,
        "--width",
        "4",
        "--steps",
        "1",
        "--cache_path",
        tmp_path / "cache",
        "--record_path",
        tmp_path,
        "--save_folder_name",
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        both = [pool.submit(fork, [*map(str, words), name], cwd=ROOT, env={}) for name in "ab"]
    both = [script.result() for script in both]
    said = "".join(script.stderr for script in both)
    assert [script.returncode for script in both] == [0, 0], said
    assert said.count("a clean model is trained first") == 1


def test_a_trigger_is_prepared_once(tmp_path):
    calls = []

    def prepare(options, place):
        calls.append(place)
        return attacker.Prepared({"pattern": torch.rand(3)}, {"weight": torch.ones(2)})

    def once():
        place = attacker.Attacker(None, None, None, None)
        return attacker.prepare_once(prepare, Attack(), place, tmp_path)

    (first, facts), (again, same) = once(), once()
    assert len(calls) == 1 and facts == same
    assert set(first.parts) == {"pattern"}
    assert torch.equal(first.parts["pattern"], again.parts["pattern"])
    assert torch.equal(again.victim["weight"], torch.ones(2))


def test_a_killed_attack_in_the_loss_resumes_with_what_it_knew(places, run, tmp_path):
    words = [
        "attack/blind.py",
        *places,
        "--width",
        4,
        "--epochs",
        4,
        "--start_batches",
        30,
        "--start_loss",
        5,
        "--record_path",
        tmp_path,
    ]
    start_and_kill(
        [*words, "--save_folder_name", "killed"],
        signal.SIGKILL,
        tmp_path / "killed/state/log.csv",
        2,
    )
    for name in ("killed", "unhurt"):
        run(*words, "--save_folder_name", name)
    one, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "unhurt")
    )
    assert one == other


def test_without_a_stored_training_set_nothing_is_trained_on_it(places, run, tmp_path):
    run("attack/blind.py", *places, *SMALL, "--record_path", tmp_path, "--save_folder_name", "a")

    class InTraining(FT):
        stage = "in-training"

    options = parsing.parse(InTraining, [*places, "--result_file", str(tmp_path / "a")])
    with pytest.raises(
        RefusedError, match="stores no poisoned training set, because blind poisons inside"
    ):
        protocol.defend("defense.any", options, None)
    done = run("defense/trap_and_replace.py", *places, "--result_file", tmp_path / "a", code=4)
    assert (
        "trap_and_replace trains on such a set" in done.first
        and not (tmp_path / "a/defense").exists()
    )
    run("defense/ft.py", *places, *QUICK, "--result_file", tmp_path / "a")


@pytest.mark.parametrize("name", names("defense"))
def test_defense(name, places, run, smaller, digits):
    before = {path: path.read_bytes() for path in smaller.iterdir() if path.is_file()}
    run(
        "-m",
        f"defense.{name}",
        *places,
        *few(f"defense.{name}"),
        "--result_file",
        "smaller",
        "--save_folder_name",
        f"{name}_quick",
        "--eval_every",
        1,
    )
    folder = smaller / "defense" / f"{name}_quick"
    written = {path.name for path in folder.iterdir()}
    assert written >= WRITTEN - {"poison.safetensors", "preview.png"} and set(
        json.loads((folder / "record.json").read_text())["files"]
    ) == written - {"record.json"}
    row, made = results(folder), results(smaller)
    Config = importlib.import_module(f"antidote_bench.defense.{name}").Config
    for added in written - WRITTEN:
        assert any(fnmatch(added, pattern) for pattern in Config.adds), f"{added} is not in `adds`"
    held = "64" if Config.holds_clean else "0"
    assert (
        row["defense"] == name
        and row["clean_budget"] == held
        and row["acc_before"] == made["acc"]
        and row["asr_before"] == made["asr"]
    )
    assert 0 <= float(row["der"]) <= 1 and float(row["asr"]) + float(row["ra"]) <= 1
    lines = list(csv.DictReader(open(folder / "log.csv")))
    stages = [line["stage"] for line in lines]
    assert (
        (stages[0], stages[-1]) == ("before", "after")
        and len(stages) > 2
        and all(line["acc"] and line["asr_all"] for line in lines)
    )
    # 50 of the 500 test images are of the target class; its own share of hits closes the gap
    q, last = (50 / 500, lines[-1])
    own_share = (float(last["asr_all"]) - (1 - q) * float(last["asr"])) / q
    assert -1e-9 <= own_share <= 1 + 1e-9
    options = yaml.safe_load((folder / "config.yaml").read_text())
    network = models.build(options.get("model") or "resnet9", digits[0], options.get("width") or 8)
    rebuild = getattr(
        importlib.import_module(f"antidote_bench.defense.{name}"),
        "rebuild",
        lambda network, weights: network.load_state_dict(weights),
    )
    rebuild(network, safetensors.torch.load_file(folder / "model.safetensors"))
    assert before == {path: path.read_bytes() for path in smaller.iterdir() if path.is_file()}, (
        "the victim is untouched"
    )


@pytest.fixture(scope="module")
def others(places, run):
    """{record: its attack and label mode}: a victim whose every class has a target of its own, a
    clean model, and a network of which some parameters are never trained, all as narrow and as
    short as `smaller`."""
    flags = {
        "other_badnet": ["badnet", "--label_mode", "all2all"],
        "other_clean": ["clean"],
        "other_airbench": ["badnet", "--model", "airbench", "--recipe", "airbench"],
    }
    for record, (script, *words) in flags.items():
        run(f"attack/{script}.py", *places, *SMALL, *words, "--save_folder_name", record)
    return {
        "other_badnet": ("badnet", "all2all"),
        "other_clean": ("clean_badnet", "all2one"),
        "other_airbench": ("badnet", "all2one"),
    }


@pytest.mark.parametrize("name", names("defense"))
def test_a_defense_without_a_target_and_without_poison(name, places, others):
    """In this process for the sake of time."""
    script = importlib.import_module(f"antidote_bench.defense.{name}")
    for record, made in others.items():
        words = [*places, *few(f"defense.{name}"), "--result_file", record]
        script.main(parsing.parse(script.Config, words))
        row = results(Path(places[1]) / record / "defense" / name)
        assert (row["attack"], row["label_mode"]) == made
        assert 0 <= float(row["acc"]) <= 1 and float(row["asr"]) + float(row["ra"]) <= 1


FIXED = ("whiten.weight", "whiten.bias", "norm1.weight", "norm2.weight")  # of airbench


@pytest.mark.parametrize("name", names("defense"))
def test_what_airbench_never_trains_no_defense_trains(name, places, run, others):
    """Filters of the first layer and scales of batch norms stay as the victim has them, or are
    switched off."""
    folder = Path(places[1]) / "other_airbench"
    if not (folder / "defense" / name / "record.json").is_file():
        run(
            "-m",
            f"defense.{name}",
            *places,
            *few(f"defense.{name}"),
            "--result_file",
            "other_airbench",
        )
    victim = safetensors.torch.load_file(folder / "model.safetensors")
    repaired = safetensors.torch.load_file(folder / "defense" / name / "model.safetensors")
    fixed = [key for key in victim if key.endswith(FIXED) and key in repaired]
    assert len(fixed) == 8
    for key in fixed:
        if name not in ("awm", "ims", "nft"):  # whose masks are soft
            assert ((repaired[key] == victim[key]) | (repaired[key] == 0)).all(), key


def test_the_defense_works(places, run, large_victim):
    """On the digits AWM removes what fine-tuning alone does not; FMP and Trap and Replace are
    measured in defense/README.md."""
    words = [*places, "--result_file", "large_victim"]
    run("defense/awm.py", *words, "--epochs", 6, "--save_folder_name", "works")
    run("defense/fmp.py", *words, "--variant", "no_pruning", "--save_folder_name", "control")
    found, control = (results(large_victim / "defense" / name) for name in ("works", "control"))
    assert float(found["asr"]) < 0.3 < 0.6 < float(control["asr"]) and float(found["acc"]) > 0.9


@pytest.mark.parametrize(
    ("name", "flags"),
    [("blended", []), ("wanet", ["--strength", 2, "--pratio", 0.2]), ("l2_inv", ["--steps", 100])],
)
def test_the_attack_works(name, flags, places, run, tmp_path):
    """On the digits; badnet's own record is looked at in test_record.py."""
    words = [*places, *flags, "--width", 8, "--image_size", 16]
    run(f"attack/{name}.py", *words, "--record_path", tmp_path, "--save_folder_name", "a")
    row = results(tmp_path / "a")
    assert float(row["acc"]) > 0.9 and float(row["asr"]) > 0.7


def test_a_clean_record_is_one_like_any_other(places, run, tmp_path):
    run(
        "attack/clean.py",
        *places,
        *SMALL,
        "--trigger",
        "blended",
        "--record_path",
        tmp_path,
        "--save_folder_name",
        "c",
    )
    made = results(tmp_path / "c")
    assert (
        made["attack"] == "clean_blended"
        and made["pratio_effective"] == "0.0"
        and made["n_backdoor"] == "450"
    )
    assert (
        len(safetensors.torch.load_file(tmp_path / "c" / "poison.safetensors")["train_index"]) == 0
    )
    run("defense/ft.py", *places, *QUICK, "--result_file", tmp_path / "c")
    assert results(tmp_path / "c" / "defense" / "ft")["acc_before"] == made["acc"]


def test_a_clean_record_carries_a_trigger_that_needs_a_clean_model(places, tmp_path):
    """That model is trained first, as for the attack itself."""
    words = [*places, *QUICK, "--width", 4, "--trigger", "trojan_sq", "--save_folder_name", "c"]
    words += ["--record_path", tmp_path, "--cache_path", tmp_path / "cache"]
    clean.main(parsing.parse(clean.Config, [str(word) for word in words]))
    made = results(tmp_path / "c")
    assert (made["attack"], made["n_poison"]) == ("clean_trojan_sq", "0")
    held = json.loads((tmp_path / "c" / "record.json").read_text())["clean_model"]
    assert (Path(held["record"]) / "model.safetensors").is_file()
    assert (tmp_path / "c" / "trigger.safetensors").is_file()


def test_a_clean_model_does_not_start_from_a_victim(monkeypatch):
    clean, lira = (
        importlib.import_module(f"antidote_bench.attack.{name}") for name in ("clean", "lira")
    )
    monkeypatch.setattr(
        lira,
        "prepare",
        lambda options, place: attacker.Prepared(
            {"generator/weight": torch.ones(1)}, {"weight": torch.ones(1)}
        ),
    )
    prepared = clean._prepare(clean.Config(trigger="lira"), None)
    assert set(prepared.parts) == {"generator/weight"} and not prepared.victim


def test_started_by_path_or_by_module_it_is_the_same(places, run, tmp_path):
    for number, start in enumerate((["attack/badnet.py"], ["-m", "attack.badnet"])):
        words = [*places, *SMALL, "--record_path", tmp_path]
        run(*start, *words, "--save_folder_name", f"a{number}")
        run(
            *(["defense/ft.py"], ["-m", "defense.ft"])[number],
            *places,
            *QUICK,
            "--record_path",
            tmp_path,
            "--result_file",
            f"a{number}",
        )
    for part in ("", "defense/ft"):
        one, other = (
            (tmp_path / f"a{number}" / part / "model.safetensors").read_bytes() for number in (0, 1)
        )
        assert one == other, "same seed, same weights"


def test_a_second_run_is_quick_and_changes_nothing(places, run, victim):
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in victim.iterdir()
        if path.is_file()
    }
    begin = time.perf_counter()
    words = ["--image_size", "16", "--save_folder_name", "victim"]
    done = run("attack/badnet.py", *places, *words)
    assert "already done" in done.stdout and time.perf_counter() - begin < 30
    assert before == {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in victim.iterdir()
        if path.is_file()
    }


def test_another_configuration_is_refused_and_overwritten_on_demand(places, run, tmp_path):
    here = [*places, *SMALL, "--record_path", tmp_path, "--save_folder_name", "a"]
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
    """Start a script, send it a signal once `epochs` rows are in its log; its exit code and what
    it said."""
    with running(list(map(str, arguments)), cwd=ROOT, env={}) as (script, error):
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") > epochs):
            assert script.exitcode is None, error.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(script.pid, how)
        script.join(60)
        return script.exitcode, error.read_text()


@pytest.mark.parametrize(
    ("how", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_killed_attack_resumes_and_ends_with_the_same_weights(
    how, code, places, run, tmp_path, whole
):
    arguments = [
        "attack/badnet.py",
        *places,
        "--record_path",
        tmp_path,
        "--save_folder_name",
        "a",
        "--epochs",
        "6",
        "--width",
        "8",
    ]
    state = tmp_path / "a" / "state"
    found, said = start_and_kill(arguments, how, state / "log.csv", 2)
    assert found == code and (how == signal.SIGKILL or "resumes" in said)
    assert state.is_dir() and not (tmp_path / "a" / "record.json").exists()
    refused = run("defense/ft.py", *places, "--result_file", tmp_path / "a", code=4)
    assert "not finished" in refused.first
    done = run(*arguments)
    assert done.stdout.startswith("ACC") and not state.exists()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == whole
    assert [row["epoch"] for row in csv.DictReader(open(tmp_path / "a" / "log.csv"))] == [
        "1",
        "2",
        "3",
        "4",
        "5",
        "6",
        "",
    ]


@pytest.fixture(scope="module")
def whole(places, run, tmp_path_factory):
    """The weights of the same run, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(
        "attack/badnet.py",
        *places,
        "--record_path",
        folder,
        "--save_folder_name",
        "a",
        "--epochs",
        "6",
        "--width",
        "8",
    )
    return (folder / "a" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (["ft", "--epochs", "40"], 6),
        (["trap_and_replace", "--epochs", "4", "--head_epochs", "40"], 12),
        (["awm", "--epochs", "6"], 4),
    ],
    ids=["ft", "trap_and_replace", "awm"],
)
def test_a_killed_defense_resumes(words, rows, places, run, small):
    name, *rest = words
    arguments = [
        f"defense/{name}.py",
        *places,
        "--result_file",
        "small",
        *rest,
        "--save_folder_name",
    ]
    start_and_kill(
        [*arguments, f"{name}_killed"],
        signal.SIGKILL,
        small / f"defense/{name}_killed/state/log.csv",
        rows,
    )
    run(*arguments, f"{name}_killed")
    # or stage 1 would be taken from there
    shutil.rmtree(small / "defense/.shared", ignore_errors=True)
    run(*arguments, f"{name}_unhurt")
    one, other = (
        safetensors.torch.load_file(small / "defense" / f"{name}_{how}" / "model.safetensors")
        for how in ("killed", "unhurt")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_images_that_stay_in_their_file_give_the_same_run(places, run, smaller, tmp_path):
    run("attack/badnet.py", *places, *SMALL, "--save_folder_name", "stored", "--resident_gb", "0")
    for name in ("model.safetensors", "poison.safetensors"):
        assert (smaller.parent / "stored" / name).read_bytes() == (smaller / name).read_bytes()
    for name in ("ft", "trap_and_replace"):
        words = [f"defense/{name}.py", *places, "--result_file", "stored", *few(f"defense.{name}")]
        run(*words, "--save_folder_name", name)
        shutil.rmtree(smaller.parent / "stored" / "defense" / ".shared", ignore_errors=True)
        run(*words, "--save_folder_name", f"{name}_stored", "--resident_gb", "0")
        one, other = (
            smaller.parent / "stored" / "defense" / folder / "model.safetensors"
            for folder in (name, f"{name}_stored")
        )
        assert one.read_bytes() == other.read_bytes()


def test_a_recipe_stands_in_the_record(places, run):
    done = run(
        "attack/badnet.py", *places, "--recipe", "fast", *SMALL, "--save_folder_name", "recipe"
    )
    row = results(Path(places[1]) / "recipe")
    assert (
        row["recipe"].startswith("fast: ")
        and "one_cycle" in row["recipe"]
        and done.stdout.startswith("ACC")
    )
    assert (
        json.loads((Path(places[1]) / "recipe" / "record.json").read_text())["recipe"]
        == row["recipe"]
    )


def test_dry_run_does_nothing(places, run, victim, tmp_path):
    done = run(
        "attack/wanet.py",
        "--record_path",
        tmp_path / "r",
        "--cache_path",
        tmp_path / "c",
        "--dry_run",
    )
    for words in (
        "digits",
        "130 of 1297",
        "per class [12, 9,",
        "259 more",
        "15 epochs of 20 steps",
        "backdoorbench: sgd lr 0.05",
        "wanet_digits (new)",
    ):
        assert words in done.stdout
    assert not list(tmp_path.iterdir())
    done = run(
        "defense/fmp.py",
        *places,
        "--result_file",
        "victim",
        "--save_folder_name",
        "planned",
        "--dry_run",
    )
    for words in ("badnet on 1297", "64 clean images", "trains   epochs 10", "planned (new)"):
        assert words in done.stdout
    for name, words in (
        ("awm", "trains   epochs 20"),
        ("trap_and_replace", "trains   epochs 200, head_epochs"),
    ):
        assert (
            words
            in run(
                f"defense/{name}.py",
                *places,
                "--result_file",
                "victim",
                "--save_folder_name",
                "planned",
                "--dry_run",
            ).stdout
        )
    assert not (victim / "defense" / "planned").exists()


def test_dry_run_says_when_a_clean_model_is_needed(run, tmp_path):
    here = [
        "attack/l2_inv.py",
        "--record_path",
        tmp_path / "r",
        "--cache_path",
        tmp_path / "c",
        "--dry_run",
    ]
    assert (
        "needs    a clean model" in run(*here).stdout
        and "needs" not in run(*here, "--pattern", "drawn").stdout
    )
    assert "each of 1297 images" in run("attack/blind.py", *here[1:]).stdout and not list(
        tmp_path.iterdir()
    )


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
    (
        ["attack/badnet.py", "--dataset", "cifar10", "--dataset_path", "/nowhere"],
        3,
        "/nowhere/cifar10",
    ),
    (["attack/badnet.py", "--dataset", "folder", "--dataset_path", "/nowhere"], 2, "--image_size"),
    (["attack/badnet.py", "--device", "cuda:77"], 2, "cuda:77"),
    (["attack/badnet.py", "--device", "abacus"], 2, "abacus"),
    (["attack/badnet.py", "--trigger_path", "nowhere.png"], 3, "nowhere.png"),
    (["attack/badnet.py", "--yaml_path", "nowhere.yaml"], 2, "nowhere.yaml"),
    (["attack/clean.py", "--trigger", "nothing"], 2, "badnet"),
    (["attack/clean.py", "--pratio", "0.1"], 2, "pratio"),
    (["attack/wanet.py", "--pratio", "0.5"], 2, "cross_ratio"),
    (
        ["attack/refool.py", "--clean_label", "true", "--label_mode", "all2all"],
        2,
        "only images of the one target class are poisoned",
    ),
    (
        ["attack/sig.py", "--label_mode", "all2all"],
        2,
        "only images of the one target class are poisoned",
    ),
    (["attack/lf.py", "--clean_record", "nowhere"], 3, "nowhere"),
    (["attack/l0_inv.py", "--trigger_path", "x.png"], 2, "mask_path"),
    (["attack/blind.py", "--pratio", "0.1"], 2, "pratio"),
    (["attack/refool.py", "--reflection_folder", "/nowhere"], 3, "/nowhere"),
    (["attack/adaptive_patch.py", "--patch_folder", "/nowhere"], 3, "/nowhere/1.png"),
    (["attack/badnet.py", "--lr", "1e30"], 1, "--lr"),
    (["defense/ft.py"], 2, "result_file"),
    (["defense/ft.py", "--result_file", "nothing"], 3, "nothing"),
    (["defense/ft.py", "--result_file", "victim", "--clean_ratio", "0"], 2, "clean_ratio"),
    (["defense/ft.py", "--result_file", "victim", "--clean_count", "0"], 2, "clean_count"),
    (["defense/fmp.py", "--result_file", "victim", "--variant", "best"], 2, "variant"),
    (["defense/awm.py", "--result_file", "victim", "--tau", "-1"], 2, "tau"),
    (
        [
            "defense/awm.py",
            "--result_file",
            "victim",
            "--save_folder_name",
            "nan",
            "--perturbation_lr",
            "1e38",
        ],
        1,
        "--perturbation_lr",
    ),
    (
        [
            "defense/trap_and_replace.py",
            "--result_file",
            "large_victim",
            "--save_folder_name",
            "vgg",
            "--model",
            "vgg19_bn",
        ],
        2,
        "no split",
    ),
    (
        [
            "defense/trap_and_replace.py",
            "--result_file",
            "victim",
            "--save_folder_name",
            "deep",
            "--head_blocks",
            "9",
        ],
        2,
        "1 to 2 blocks",
    ),
    (["compare.py", "/nowhere"], 3, "/nowhere"),
]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    BAD,
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.usefixtures("victim", "large_victim")
def test_bad_input_gets_one_sentence(words, code, sentence, places, run, tmp_path):
    here = places if words[0] != "compare.py" else []
    name = (
        ["--save_folder_name", f"bad{abs(hash(tuple(words)))}"]
        if words[0].startswith("attack")
        else []
    )
    done = run(*words, *here, *name, *(QUICK if here else []), code=code)
    assert (
        sentence in done.first
        and len(done.stderr.strip().splitlines()) == 1
        and "Traceback" not in done.stderr
    )
    assert not done.stdout


def test_debug_shows_the_traceback(run):
    done = run(
        "attack/badnet.py", "--dataset", "cifar10", "--dataset_path", "/nowhere", "--debug", code=3
    )
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(("option", "code"), [("--record_path", 4), ("--cache_path", 1)])
def test_a_place_where_nothing_can_be_written(option, code, run, places, tmp_path):
    (tmp_path / "file").write_text("in the way")
    tmp_path.chmod(0o500)  # root may write all the same, but not below a file
    done = run("attack/badnet.py", *places, option, tmp_path / "file" / "r", code=code)
    assert (
        "file" in done.first and option in done.first and len(done.stderr.strip().splitlines()) == 1
    )
    tmp_path.chmod(0o700)


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_disk_that_fills_up_damages_nothing(run, victim, places, tmp_path):
    shutil.copytree(victim, tmp_path / "victim")
    before = {
        path: path.read_bytes() for path in (tmp_path / "victim").rglob("*") if path.is_file()
    }
    words = [
        sys.executable,
        "defense/ft.py",
        *places,
        *QUICK,
        "--result_file",
        tmp_path / "victim",
        "--save_folder_name",
        "full",
    ]
    done = subprocess.run(
        list(map(str, words)), cwd=ROOT, capture_output=True, text=True, preexec_fn=small_files
    )
    assert (
        done.returncode == 1
        and len(done.stderr.strip().splitlines()) == 1
        and "Traceback" not in done.stderr
    )
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (
        not list((tmp_path / "victim").rglob("*.tmp"))
        and not (tmp_path / "victim/defense/full/record.json").exists()
    )
    run(
        "defense/ft.py",
        *places,
        *QUICK,
        "--result_file",
        tmp_path / "victim",
        "--save_folder_name",
        "full",
    )


def test_your_own_images(run, places, tmp_path):
    from tests.test_data import folders

    folders(tmp_path / "set", ("train", "val"), ("ant", "bee", "cat"), count=20, size=(50, 40))
    words = [
        "--dataset",
        "folder",
        "--dataset_path",
        tmp_path / "set",
        "--image_size",
        32,
        "--model",
        "resnet9",
        "--width",
        8,
    ]
    run(
        "attack/badnet.py",
        *places,
        *words,
        *QUICK,
        "--batch_size",
        16,
        "--record_path",
        tmp_path,
        "--save_folder_name",
        "a",
    )
    run("defense/ft.py", *places, *QUICK, "--result_file", tmp_path / "a", "--clean_ratio", 0.2)
    assert results(tmp_path / "a/defense/ft")["clean_budget"] == "12"
    shutil.move(tmp_path / "set", tmp_path / "moved")
    run(
        "defense/fmp.py",
        *places,
        *QUICK,
        "--result_file",
        tmp_path / "a",
        "--dataset_path",
        tmp_path / "moved",
    )
    (tmp_path / "moved/train/ant/0.png").unlink()
    done = run(
        "defense/ft.py",
        *places,
        "--result_file",
        tmp_path / "a",
        "--save_folder_name",
        "b",
        "--dataset_path",
        tmp_path / "moved",
        code=4,
    )
    assert "60" in done.first and "59" in done.first


def test_seeds_have_their_own_generators(run, places, tmp_path):
    """Another training seed keeps the poison; another poison seed keeps the first weights'
    initialisation."""
    rows = {}
    for name, flags in {"a": [], "b": ["--random_seed", 1], "c": ["--poison_seed", 1]}.items():
        run(
            "attack/badnet.py",
            *places,
            *flags,
            "--epochs",
            0,
            "--width",
            8,
            "--record_path",
            tmp_path,
            "--save_folder_name",
            name,
        )
        rows[name] = (
            safetensors.torch.load_file(tmp_path / name / "poison.safetensors")[
                "train_index"
            ].tolist(),
            (tmp_path / name / "model.safetensors").read_bytes(),
        )
    assert rows["a"][0] == rows["b"][0] != rows["c"][0]
    assert rows["a"][1] == rows["c"][1] != rows["b"][1]


def test_another_checkout_is_refused(tmp_path):
    shutil.copytree(ROOT / "attack", tmp_path / "attack")
    done = subprocess.run(
        [sys.executable, "attack/badnet.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "another checkout" in done.stderr


def test_seconds_and_provenance(victim):
    info = json.loads((victim / "record.json").read_text())
    assert (
        Path(victim / "preview.png").stat().st_size > 1000
        and info["config_hash"] == results(victim)["config_hash"]
    )
