"""The table of finished runs: what shares a cell, what is shown, and that no damaged run is dropped in silence."""

import csv
import hashlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import compare
from utils import files

ROOT = Path(compare.__file__).parent
COLUMNS = (
    "dataset,model,attack,label_mode,target,pratio,pratio_effective,n_poison,recipe,precision,defense,variant,stage,"
    "selection,prior,clean_budget,seed,poison_seed,data_seed,acc_before,asr_before,ra_before,acc,asr,ra,der,n_test,"
    "n_backdoor,seconds,peak_mb,device,version,config_hash"
).split(",")
ROW = {"dataset": "digits", "model": "resnet9_w16", "recipe": "sgd lr 0.01 epochs 100 batch 128", "precision": "fp32",
       "label_mode": "all2one", "n_test": 360, "n_backdoor": 324, "seconds": 2.5, "device": "cpu"}  # fmt: skip


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_run(folder, kind, config, row, **record):
    """A complete run in `folder`, like the scripts leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    table.writeheader()
    table.writerow(row)
    (folder / "results.csv").write_text(text.getvalue())
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    files = {name: sha256(folder / name) for name in ("results.csv", "config.yaml")}
    files["model.safetensors"] = hashlib.sha256(str(folder).encode()).hexdigest()
    record = {"format": 1, "kind": kind, "name": folder.name, "files": files, **record}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def attack(folder, acc=0.9, asr=0.95, ra=0.04, name="badnet", seed=0, row=None, **options):
    """An attack run; `options` go into config.yaml, `row` into results.csv."""
    config = {"dataset": "digits", "model": "resnet9", "pratio": 0.1, "label_mode": "all2one", "epochs": 100,
              "precision": "auto", "random_seed": seed, "poison_seed": 0, "save_folder_name": folder.name,
              "device": "auto", "width": None, **options}  # fmt: skip
    numbers = {"attack": name, "defense": "none", "stage": "none", "seed": seed, "acc": acc, "asr": asr, "ra": ra}
    return write_run(folder, "attack", config, ROW | numbers | (row or {}))


def defense(victim, acc=0.88, asr=0.02, ra=0.85, name="ft", seed=0, row=None, folder=None, **options):
    """A defense run on the attack run in the folder `victim`."""
    config = {"result_file": str(victim), "clean_ratio": 0.05, "random_seed": seed, "data_seed": 0, **options}
    numbers = {"attack": "badnet", "defense": name, "stage": "repair", "selection": "fixed", "clean_budget": 72,
               "acc": acc, "asr": asr, "ra": ra}  # fmt: skip
    weights = json.loads((victim / "record.json").read_text())["files"]["model.safetensors"]
    folder = victim / "defense" / (folder or name)
    return write_run(folder, "defense", config, ROW | numbers | (row or {}), victim_sha256=weights)


def test_a_cut_share_is_shown(run, tmp_path):
    attack(tmp_path / "a", name="sig", row={"pratio": 0.1, "pratio_effective": 0.0987})
    attack(tmp_path / "b", name="badnet", row={"pratio": 0.1, "pratio_effective": 0.1002})
    shown = run(tmp_path)[1]
    assert "sig [9.9 % poisoned]" in shown and "badnet [" not in shown


def edit_record(folder, **changes):
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def run(capsys):
    """run(arguments...) -> (exit code, stdout, stderr) of compare.py, in this process."""

    def call(*arguments):
        code = compare.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.fixture
def table(run):
    """table(arguments...) -> the csv format as a DataFrame; nothing may be left out."""

    def call(*arguments):
        code, out, err = run(*arguments, "--format", "csv")
        assert (code, err) == (0, "")
        return pd.read_csv(io.StringIO(out))

    return call


def three_seeds(root):
    """Three victims, each repaired by ft; their ACC 0.90, 0.92, 0.97 has mean 0.93 and deviation sqrt(0.0013)."""
    for seed, acc in enumerate([0.90, 0.92, 0.97]):
        victim = attack(root / f"badnet_{seed}", acc=acc, asr=0.95, ra=0.04, seed=seed)
        defense(victim, acc=acc - 0.02, asr=[0.01, 0.02, 0.06][seed], ra=0.8)
    return root


def test_mean_deviation_and_count(tmp_path, run, table):
    three_seeds(tmp_path)
    none, ft = (row for _, row in table(tmp_path).iterrows())
    assert (none["defense"], none["stage"], none["selection"], none["n"]) == ("none", "none", "none", 3)
    assert (none["acc_mean"], none["acc_std"]) == (0.93, 0.036056)
    assert (ft["defense"], ft["stage"], ft["selection"], ft["n"]) == ("ft", "repair", "fixed", 3)
    assert (ft["asr_mean"], ft["asr_std"]) == (0.03, round(0.0007**0.5, 6))
    assert (ft["ra_mean"], ft["ra_std"], ft["seconds_mean"]) == (0.8, 0, 2.5)
    out = run(tmp_path)[1]
    assert "93.0 ± 3.6 (3)" in out and "3.0 ± 2.6 (3)" in out and "80.0 ± 0.0 (3)" in out


def test_one_seed_has_no_deviation_and_missing_seeds_show(tmp_path, run, table):
    three_seeds(tmp_path)
    defense(tmp_path / "badnet_1", name="fmp", acc=0.5)
    fmp = table(tmp_path).set_index("defense").loc["fmp"]
    assert fmp["n"] == 1 and fmp["acc_mean"] == 0.5 and pd.isna(fmp["acc_std"])
    line = next(line for line in run(tmp_path)[1].splitlines() if line.startswith("fmp"))
    assert line.split() == ["fmp", "50.0", "2.0", "85.0"]


def test_csv_keeps_six_digits(tmp_path, table):
    attack(tmp_path / "a", acc=0.12345678, asr=1 / 3 + 0.5, ra=0.0000012)
    row = table(tmp_path).iloc[0]
    assert (row["acc_mean"], row["asr_mean"], row["ra_mean"]) == (0.123457, 0.833333, 0.000001)
    assert list(row.index) == (
        "dataset,model,recipe,precision,attack,defense,stage,selection,n,acc_mean,acc_std,asr_mean,asr_std,ra_mean,ra_std,seconds_mean"
    ).split(",")


def test_text_and_order(tmp_path, run):
    for name in ("wanet", "badnet", "clean"):
        victim = attack(tmp_path / name, name=name, asr=0.1 if name == "clean" else 0.95)
    defense(tmp_path / "badnet", name="fmp")
    defense(victim, name="awm", asr="", ra="")
    code, out, err = run(tmp_path)
    assert (code, err) == (0, "")
    expected = """\
digits, resnet9_w16
recipe sgd lr 0.01 epochs 100 batch 128, precision fp32

               clean             badnet             wanet
defense    ACC   ASR   RA    ACC   ASR    RA    ACC   ASR   RA
none      90.0  10.0  4.0   90.0  95.0   4.0   90.0  95.0  4.0
awm       88.0     –    –      –     –     –      –     –    –
fmp          –     –    –   88.0   2.0  85.0      –     –    –
"""
    assert out == expected


def test_many_columns_are_split_into_blocks(tmp_path, run):
    for number in range(9):
        attack(tmp_path / str(number), name=f"attack{number}")
    lines = run(tmp_path)[1].splitlines()
    assert max(map(len, lines)) <= compare.TEXT_WIDTH
    assert sum(line.startswith("none") for line in lines) == 2
    assert all(any(f"attack{number}" in line for line in lines) for number in range(9))


def test_markdown(tmp_path, run):
    three_seeds(tmp_path)
    attack(tmp_path / "weak", name="wanet", asr=0.5)
    lines = run(tmp_path, "--format", "markdown")[1].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert lines[:3] == ["### digits, resnet9_w16", "", "recipe sgd lr 0.01 epochs 100 batch 128, precision fp32"]
    assert rows[0][:4] == ["defense", "badnet ACC", "badnet ASR", "badnet RA"]
    assert rows[0][4:] == [r"wanet\* ACC", r"wanet\* ASR", r"wanet\* RA"]
    assert rows[1] == ["---", *["---:"] * 6]
    assert rows[2] == ["none", "93.0 ± 3.6 (3)", "95.0 ± 0.0 (3)", "4.0 ± 0.0 (3)", "90.0", "50.0", "4.0"]
    assert rows[3][4:] == ["–", "–", "–"]
    assert r"\* weak attack (ASR below 80 % before defense): no defense is credited on it" in lines


def test_latex_is_escaped(tmp_path, run):
    three_seeds(tmp_path)
    attack(tmp_path / "weak", name="wanet", asr=0.5, row={"attack": "wa&net_50%"})
    defense(tmp_path / "weak", name="trap_and_replace", row={"stage": "in-training"})
    out = run(tmp_path, "--format", "latex")[1]
    assert r"\caption{digits, resnet9\_w16 (recipe sgd lr 0.01" in out
    assert r" & \multicolumn{3}{c}{badnet} & \multicolumn{3}{c}{wa\&net\_50\%*} \\" in out
    assert r"none & 93.0 $\pm$ 3.6 (3) & 95.0 $\pm$ 0.0 (3)" in out
    assert r"trap\_and\_replace$^\dagger$ & -- & -- & -- & 88.0" in out
    assert r"\begin{tabular}{lrrrrrr}" in out and r"\cmidrule(lr){5-7}" in out and "(ASR below 80 \\% before" in out
    assert not set(out) & set("±–†") and out.count(r"\begin{tabular}") == out.count(r"\end{tabular}") == 1


def test_csv_lists_combinations_that_were_not_run(tmp_path, table):
    defense(attack(tmp_path / "a"))
    attack(tmp_path / "b", name="wanet")
    row = table(tmp_path).set_index(["attack", "defense"]).loc[("wanet", "ft")]
    assert row["n"] == 0 and row["stage"] == "repair" and row[["acc_mean", "asr_std", "seconds_mean"]].isna().all()


def test_options_of_the_attack_make_columns(tmp_path, table):
    attack(tmp_path / "a")
    attack(tmp_path / "b", pratio=0.05)
    attack(tmp_path / "c", pratio=0.05, label_mode="all2all", row={"label_mode": "all2all"})
    attack(tmp_path / "d", name="wanet", grid=4)
    shown = table(tmp_path)
    labels = ["badnet (all2all, pratio 0.05)", "badnet (all2one, pratio 0.05)", "badnet (all2one, pratio 0.1)", "wanet"]
    assert list(shown["attack"]) == labels and set(shown["n"]) == {1}


def test_options_of_the_defense_make_rows(tmp_path, table):
    victim = attack(tmp_path / "a")
    defense(victim, folder="1", name="fmp", clean_ratio=0.1)
    defense(victim, folder="2", name="fmp")
    defense(victim, folder="3", name="fmp", row={"variant": "released"})
    defense(victim, folder="4", name="ft", device="cuda", row={"precision": "bf16"})
    labels = ["none", "fmp (clean_ratio 0.05)", "fmp (clean_ratio 0.1)", "fmp-released", "ft (precision bf16)"]
    assert list(table(tmp_path)["defense"]) == labels


@pytest.mark.parametrize("column", ["stage", "selection", "prior", "clean_budget", "recipe", "precision"])
def test_results_keep_defenses_apart_where_options_are_equal(tmp_path, table, column):
    victim = attack(tmp_path / "a")
    defense(victim, folder="1", seed=1)
    defense(victim, folder="2", seed=2, row={column: "other"})
    assert f"ft ({column} other)" in set(table(tmp_path)["defense"]) and set(table(tmp_path)["n"]) == {1}


@pytest.mark.parametrize("column", ["label_mode", "n_test"])
def test_results_keep_attacks_apart_where_options_are_equal(tmp_path, table, column):
    attack(tmp_path / "a", seed=1)
    attack(tmp_path / "b", seed=2, row={column: "other"})
    assert len(table(tmp_path)) == 2


def test_an_option_without_a_value_is_not_shown(tmp_path, table):
    attack(tmp_path / "a", width=None)
    attack(tmp_path / "b", width=16)
    assert list(table(tmp_path)["attack"]) == ["badnet", "badnet (width 16)"]


def test_recipe_and_precision_make_tables(tmp_path, run, table):
    attack(tmp_path / "a", acc=0.5)
    attack(tmp_path / "b", epochs=20, row={"recipe": "sgd epochs 20"})
    attack(tmp_path / "c", row={"precision": "bf16", "dataset": "cifar10"}, dataset="cifar10")
    out = run(tmp_path)[1]
    assert "digits, resnet9_w16, recipe sgd epochs 20, fp32\nrecipe sgd epochs 20, precision fp32\n" in out
    assert "\ncifar10, resnet9_w16\n" in out or out.startswith("cifar10, resnet9_w16\n")
    assert len(table(tmp_path)) == 3 and list(table(tmp_path)["dataset"]) == ["cifar10", "digits", "digits"]


def test_places_and_switches_do_not_separate(tmp_path, table):
    attack(tmp_path / "a", seed=0, device="cpu", dataset_path="x", eval_every=0)
    attack(tmp_path / "b", seed=1, device="cuda", dataset_path="y", eval_every=5, poison_seed=7)
    assert list(table(tmp_path)["n"]) == [2]


def test_copies_count_once(tmp_path, run):
    victim = attack(tmp_path / "a")
    defense(victim)
    shutil.copytree(victim, tmp_path / "b")
    code, out, _ = run(tmp_path)
    assert code == 0 and "±" not in out and "\n2 runs left out:\n" in out
    assert f"\n{tmp_path / 'b'}: same run as {victim}\n" in out
    assert f"\n{tmp_path / 'b/defense/ft'}: same run as {victim / 'defense/ft'}\n" in out


def test_folders_given_twice_nested_or_linked_are_read_once(tmp_path, table):
    defense(attack(tmp_path / "record" / "a"))
    (tmp_path / "record" / "loop").symlink_to(tmp_path / "record")
    (tmp_path / "link").symlink_to(tmp_path / "record" / "a")
    folders = [tmp_path / "record" / "a" / "defense", tmp_path / "record", tmp_path / "record", tmp_path / "link"]
    assert list(table(*folders)["n"]) == [1, 1]


def test_a_linked_run_is_found(tmp_path, table):
    attack(tmp_path / "elsewhere" / "a")
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    assert len(table(tmp_path / "record")) == 1


def test_a_run_itself_may_be_given(tmp_path, table, monkeypatch):
    folder = defense(attack(tmp_path / "a", asr=0.5))
    assert list(table(folder)["defense"]) == ["ft"]
    monkeypatch.chdir(folder)
    assert list(table(".")["defense"]) == ["ft"]


def test_marks(tmp_path, run):
    for name, asr in {"clean": 0.1, "clean_low": 0.1, "weak": 0.7999, "strong": 0.8}.items():
        attack(tmp_path / name, name=name, asr=asr)
    out = run(tmp_path)[1]
    assert "weak*" in out and out.count("*") == 2 and "†" not in out and "‡" not in out
    defense(tmp_path / "strong", name="anp", row={"selection": "oracle"})
    defense(tmp_path / "strong", name="trap", row={"stage": "in-training"})
    out = run(tmp_path)[1]
    assert "\nanp‡ " in out and "\ntrap† " in out
    assert "\n‡ chosen with test data: not comparable\n" in out and "\n† in-training" in out
    assert "‡" not in run(tmp_path, "--format", "csv")[1]


def test_weak_counts_before_defense(tmp_path, run):
    folder = defense(attack(tmp_path / "a", asr=0.5))
    assert "badnet*" in run(folder)[1]


def test_weak_is_judged_by_the_mean(tmp_path, run, monkeypatch):
    attack(tmp_path / "a", asr=0.7, seed=0)
    attack(tmp_path / "b", asr=0.95, seed=1)
    defense(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert "badnet*" not in run(".")[1]


def rewrite(folder, **row):
    """Put other results into a finished run, with the right hash."""
    record = json.loads((folder / "record.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    with open(folder / "results.csv", newline="") as file:
        old = next(csv.DictReader(file))
    write_run(folder, record["kind"], config, old | row)


def set_results(folder, text):
    (folder / "results.csv").write_text(text)
    files = json.loads((folder / "record.json").read_text())["files"]
    edit_record(folder, files=files | {"results.csv": sha256(folder / "results.csv")})


DAMAGES = {
    "no record.json: unfinished": lambda folder: (folder / "record.json").unlink(),
    "record.json is unusable": lambda folder: (folder / "record.json").write_text("{"),
    "record.json lists no files": lambda folder: (folder / "record.json").write_text("[]"),
    "record.json is of format 2": lambda folder: edit_record(folder, format=2),
    "kind 'other'": lambda folder: edit_record(folder, kind="other"),
    "no results.csv": lambda folder: (folder / "results.csv").unlink(),
    "no config.yaml": lambda folder: (folder / "config.yaml").unlink(),
    "config.yaml was changed after it was written": lambda folder: (folder / "config.yaml").write_text("pratio: 0.2"),
    "results.csv was changed after it was written": lambda folder: (folder / "results.csv").write_text(""),
    "results.csv is unusable: 0 rows instead of 1": lambda folder: set_results(folder, ""),
    "results.csv is unusable: no value for acc, asr": lambda folder: set_results(folder, "dataset,model\nx,y\n"),
    "could not convert string to float: 'high'": lambda folder: rewrite(folder, acc="high"),
    "acc is nan": lambda folder: rewrite(folder, acc="nan"),
    "asr is 95": lambda folder: rewrite(folder, asr=95),
    "ASR + RA is 1.01, more than 1": lambda folder: rewrite(folder, asr=0.9, ra=0.11),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damaged_runs_are_listed(tmp_path, run, reason):
    attack(tmp_path / "good")
    bad = attack(tmp_path / "bad", seed=1, acc=0.1)
    DAMAGES[reason](bad)
    code, out, err = run(tmp_path)
    head, _, listed = out.partition("\n1 run left out:\n")
    assert (code, err) == (0, "") and "90.0" in head and "±" not in head
    assert listed.startswith(f"{bad}: ") and reason in listed and listed.count("\n") == 1


def test_a_defense_of_another_or_damaged_victim_is_listed(tmp_path, run):
    for name, seed in (("a", 0), ("b", 1)):
        defense(attack(tmp_path / name, seed=seed))
    edit_record(tmp_path / "a/defense/ft", victim_sha256="0" * 64)
    (tmp_path / "b" / "config.yaml").write_text("pratio: 0.2")
    out = run(tmp_path)[1]
    assert "\n3 runs left out:\n" in out
    assert f"\n{tmp_path / 'a/defense/ft'}: made for another victim" in out
    assert f"\n{tmp_path / 'b/defense/ft'}: its attack run cannot be used: config.yaml was changed" in out


def test_a_defense_whose_weights_are_named_nowhere_is_listed(tmp_path, run):
    folder = defense(attack(tmp_path / "a"))
    edit_record(tmp_path / "a", files={name: sha256(tmp_path / "a" / name) for name in ("results.csv", "config.yaml")})
    edit_record(folder, victim_sha256=None)
    assert f"{folder}: made for another victim" in run(tmp_path)[1]


def test_unfinished_runs_are_listed_and_their_state_is_not_read(tmp_path, run):
    attack(tmp_path / "a")
    for folder in (tmp_path / "b", tmp_path / "a" / "defense" / "ft"):
        attack(folder / "state", seed=5)
    attack(tmp_path / "a" / "state", seed=6)
    out = run(tmp_path)[1]
    listed = [f"{tmp_path / path}: no record.json: unfinished" for path in ("a/defense/ft", "b")]
    assert out.splitlines()[-3:] == ["2 runs left out:", *listed] and "±" not in out


def test_machine_readable_formats_list_on_stderr(tmp_path, run):
    attack(tmp_path / "a")
    (tmp_path / "b" / "state").mkdir(parents=True)
    for form in ("csv", "latex"):
        _, out, err = run(tmp_path, "--format", form)
        assert "left out" not in out and f"1 run left out:\n{tmp_path / 'b'}: no record.json: unfinished\n" in err
    out = run(tmp_path, "--format", "markdown")[1]
    assert out.endswith(f"|\n\n1 run left out:\n- {tmp_path / 'b'}: no record.json: unfinished\n")


def test_names_cannot_break_a_line_or_the_terminal(tmp_path, run):
    attack(tmp_path / "a", row={"attack": "bad\x1b[31m\nnet"})
    assert "bad [31m net" in run(tmp_path)[1]


def test_later_columns_are_ignored(tmp_path, table):
    folder = attack(tmp_path / "a")
    header, row = (folder / "results.csv").read_text().splitlines()
    set_results(folder, f"{header},asr_all\n{row},high\n")
    assert len(table(tmp_path)) == 1


def test_exit_3_when_nothing_is_found(tmp_path, run):
    for folder in (tmp_path, tmp_path / "missing"):
        code, out, err = run(folder)
        assert (code, out) == (3, "") and err.count("\n") == 1 and str(folder) in err


def test_a_missing_folder_beside_a_run_is_listed(tmp_path, run):
    attack(tmp_path / "a")
    code, out, _ = run(tmp_path, tmp_path / "misspelt")
    assert code == 0 and out.endswith(f"\n1 run left out:\n{tmp_path / 'misspelt'}: no such folder\n")


def test_exit_4_when_all_are_damaged(tmp_path, run):
    for name in "ab":
        (attack(tmp_path / name) / "record.json").unlink()
    target = tmp_path / "table.md"
    code, out, err = run(tmp_path)
    assert code == 4 and out.count("unfinished") == 2 and err.count("\n") == 1
    code, out, err = run(tmp_path, "--output", target)
    assert (code, out) == (4, "") and err.count("json: unfinished\n") == 2 and not target.exists()


def test_output_is_whole_or_untouched(tmp_path, run, monkeypatch):
    attack(tmp_path / "a")
    (tmp_path / "b" / "state").mkdir(parents=True)
    target = tmp_path / "new" / "table.csv"
    code, out, err = run(tmp_path, "--format", "csv", "--output", target)
    assert code == 0 and out == f"table written to {target}\n" and "left out" in err
    before = target.read_text()
    assert before == run(tmp_path, "--format", "csv")[1] and os.listdir(target.parent) == ["table.csv"]

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    code, out, err = run(tmp_path, "--output", target)
    assert (code, out) == (1, "") and err == f"error: cannot write {target}: No space left on device\n"
    assert target.read_text() == before and os.listdir(target.parent) == ["table.csv"]


@pytest.mark.parametrize("place", ["", "a/results.csv/table.txt", "pipe"])
def test_unwritable_output(tmp_path, run, place):
    attack(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    code, out, err = run(tmp_path / "a", "--output", tmp_path / place)
    assert (code, out) == (1, "") and err.startswith("error: cannot write") and err.count("\n") == 1
    assert (tmp_path / "pipe").is_fifo()


def shell(*arguments, **keywords):
    command = [sys.executable, "compare.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **keywords)


def test_command_line(tmp_path):
    attack(tmp_path / "a")
    good = shell(tmp_path)
    assert good.returncode == 0 and good.stdout.startswith("digits, resnet9_w16\n") and good.stderr == ""
    assert shell(tmp_path, "--format", "html").returncode == shell().returncode == 2
    assert shell(tmp_path / "missing").returncode == 3
    (tmp_path / "a" / "record.json").unlink()
    assert shell(tmp_path).returncode == 4


def test_a_terminal_without_the_signs_gets_the_table(tmp_path):
    three_seeds(tmp_path)
    ascii_only = shell(tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ascii_only.returncode == 0 and "93.0 ? 3.6 (3)" in ascii_only.stdout


def results_of(row, folder):
    """A table of results with this row of a victim, and a row of a defense of a victim that is not there."""
    path = folder / "all.csv"
    lost = {**row, "run": "lost/defense/ft", "defense": "ft", "stage": "repair"}
    files.write(path, files.csv_text([{**row, "run": "x"}, lost], ["run", *row, "command"]))
    return path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "lost/defense/ft: the table has no row of its victim"),
        ({"acc": "1.5"}, "acc is 1.5"),
        ({"acc": "good"}, "could not convert"),
        ({"asr": "0.9", "ra": "0.2"}, "ASR + RA is 1.1"),
        ({"command": "python 'a"}, "No closing quotation"),
    ],
)
def test_rows_of_a_table_are_checked(tmp_path, run, changes, reason):
    row = dict.fromkeys([*COLUMNS, "command"], "") | {"attack": "badnet", "defense": "none", "acc": "0.9", "asr": "0.5", "ra": "0.3"}
    code, out, err = run(results_of(row | changes, tmp_path))
    assert code == (4 if changes else 0) and reason in out + err


@pytest.mark.parametrize("content", [b"", b"run,acc\n", b"\xff\xfe", b"run,command\n\0,\0\n"])
def test_a_file_that_is_no_table_is_refused(tmp_path, run, content):
    (tmp_path / "x.csv").write_bytes(content)
    code, out, err = run(tmp_path / "x.csv")
    assert code == 4 and err.startswith("error: all 1 runs found are damaged") and "x.csv: " in out + err
    write_run(
        tmp_path / "good", "attack", {}, ROW | {"attack": "badnet", "defense": "none", "stage": "none", "selection": "none", "acc": 0.9}
    )
    code, out, _ = run(tmp_path / "good", tmp_path / "x.csv")
    assert code == 0 and "90.0" in out and "x.csv: " in out, "one bad table never costs the others"


def test_a_table_that_is_not_there_is_missing(tmp_path, run):
    assert run(tmp_path / "none.csv")[0] == 3


def test_torch_is_not_imported():
    code = "import sys, compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_deviation_is_the_samples(tmp_path, table):
    values = [0.81, 0.855, 0.99, 0.9]
    for seed, acc in enumerate(values):
        attack(tmp_path / str(seed), acc=acc, seed=seed)
    assert table(tmp_path)["acc_std"][0] == round(statistics.stdev(values), 6)
