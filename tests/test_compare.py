"""The tables and figures of finished runs: what shares a cell, what is shown, what is left out."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

import compare
from antidote_bench.utils import files
from antidote_bench.utils.errors import UserError
from antidote_bench.utils.report import formats, paired, palette, runs, summaries, tables
from tests.helpers import names

ROOT = Path(compare.__file__).parent
COLUMNS = (
    "dataset,model,attack,label_mode,target,pratio,pratio_effective,n_poison,recipe,precision,"
    "defense,variant,stage,selection,prior,clean_budget,seed,poison_seed,data_seed,acc_before,"
    "asr_before,ra_before,acc,asr,ra,der,n_test,n_backdoor,seconds,peak_mb,device,version,"
    "config_hash"
).split(",")
ROW = {
    "dataset": "digits",
    "model": "resnet9_w16",
    "recipe": "sgd lr 0.01 epochs 100 batch 128",
    "precision": "fp32",
    "label_mode": "all2one",
    "n_test": 360,
    "n_backdoor": 324,
    "seconds": 2.5,
    "device": "cpu",
}


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
    config = {
        "dataset": "digits",
        "model": "resnet9",
        "pratio": 0.1,
        "label_mode": "all2one",
        "epochs": 100,
        "precision": "auto",
        "random_seed": seed,
        "poison_seed": 0,
        "save_folder_name": folder.name,
        "device": "auto",
        "width": None,
        **options,
    }
    numbers = {
        "attack": name,
        "defense": "none",
        "stage": "none",
        "seed": seed,
        "acc": acc,
        "asr": asr,
        "ra": ra,
    }
    return write_run(folder, "attack", config, ROW | numbers | (row or {}))


def defense(
    victim, acc=0.88, asr=0.02, ra=0.85, name="ft", seed=0, row=None, folder=None, **options
):
    """A defense run on the attack run in the folder `victim`."""
    config = {
        "result_file": str(victim),
        "clean_ratio": 0.05,
        "random_seed": seed,
        "data_seed": 0,
        **options,
    }
    numbers = {
        "attack": "badnet",
        "defense": name,
        "stage": "repair",
        "selection": "fixed",
        "clean_budget": 72,
        "acc": acc,
        "asr": asr,
        "ra": ra,
    }
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
    """Three victims, each repaired by ft.

    Their ACC 0.90, 0.92, 0.97 has the mean 0.93 and the deviation sqrt(0.0013).
    """
    for seed, acc in enumerate([0.90, 0.92, 0.97]):
        victim = attack(root / f"badnet_{seed}", acc=acc, asr=0.95, ra=0.04, seed=seed)
        defense(victim, acc=acc - 0.02, asr=[0.01, 0.02, 0.06][seed], ra=0.8)
    return root


def test_mean_deviation_and_count(tmp_path, run, table):
    three_seeds(tmp_path)
    none, ft = (row for _, row in table(tmp_path).iterrows())
    assert (none["defense"], none["stage"], none["selection"], none["n"]) == (
        "none",
        "none",
        "none",
        3,
    )
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
        "dataset,model,recipe,precision,attack,defense,stage,selection,n,acc_mean,acc_std,asr_mean,"
        "asr_std,ra_mean,ra_std,seconds_mean"
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
    assert max(map(len, lines)) <= formats.TEXT_WIDTH
    assert sum(line.startswith("none") for line in lines) == 2
    assert all(any(f"attack{number}" in line for line in lines) for number in range(9))


def test_markdown(tmp_path, run):
    three_seeds(tmp_path)
    attack(tmp_path / "weak", name="wanet", asr=0.5)
    lines = run(tmp_path, "--format", "markdown")[1].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert lines[:3] == [
        "### digits, resnet9_w16",
        "",
        "recipe sgd lr 0.01 epochs 100 batch 128, precision fp32",
    ]
    assert rows[0][:4] == ["defense", "badnet ACC", "badnet ASR", "badnet RA"]
    assert rows[0][4:] == [r"wanet\* ACC", r"wanet\* ASR", r"wanet\* RA"]
    assert rows[1] == ["---", *["---:"] * 6]
    assert rows[2] == [
        "none",
        "93.0 ± 3.6 (3)",
        "95.0 ± 0.0 (3)",
        "4.0 ± 0.0 (3)",
        "90.0",
        "50.0",
        "4.0",
    ]
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
    assert (
        r"\begin{tabular}{lrrrrrr}" in out
        and r"\cmidrule(lr){5-7}" in out
        and "(ASR below 80 \\% before" in out
    )
    assert (
        not set(out) & set("±–†")
        and out.count(r"\begin{tabular}") == out.count(r"\end{tabular}") == 1
    )


def test_csv_lists_combinations_that_were_not_run(tmp_path, table):
    defense(attack(tmp_path / "a"))
    attack(tmp_path / "b", name="wanet")
    row = table(tmp_path).set_index(["attack", "defense"]).loc[("wanet", "ft")]
    assert (
        row["n"] == 0
        and row["stage"] == "repair"
        and row[["acc_mean", "asr_std", "seconds_mean"]].isna().all()
    )


def test_options_of_the_attack_make_columns(tmp_path, table):
    attack(tmp_path / "a")
    attack(tmp_path / "b", pratio=0.05)
    attack(tmp_path / "c", pratio=0.05, label_mode="all2all", row={"label_mode": "all2all"})
    attack(tmp_path / "d", name="wanet", grid=4)
    shown = table(tmp_path)
    labels = [
        "badnet (all2all, pratio 0.05)",
        "badnet (all2one, pratio 0.05)",
        "badnet (all2one, pratio 0.1)",
        "wanet",
    ]
    assert list(shown["attack"]) == labels and set(shown["n"]) == {1}


def test_options_of_the_defense_make_rows(tmp_path, table):
    victim = attack(tmp_path / "a")
    defense(victim, folder="1", name="fmp", clean_ratio=0.1)
    defense(victim, folder="2", name="fmp")
    defense(victim, folder="3", name="fmp", row={"variant": "released"})
    defense(victim, folder="4", name="ft", device="cuda", row={"precision": "bf16"})
    labels = [
        "none",
        "fmp (clean_ratio 0.05)",
        "fmp (clean_ratio 0.1)",
        "fmp-released",
        "ft (precision bf16)",
    ]
    assert list(table(tmp_path)["defense"]) == labels


@pytest.mark.parametrize(
    "column", ["stage", "selection", "prior", "clean_budget", "recipe", "precision"]
)
def test_results_keep_defenses_apart_where_options_are_equal(tmp_path, table, column):
    victim = attack(tmp_path / "a")
    defense(victim, folder="1", seed=1)
    defense(victim, folder="2", seed=2, row={column: "other"})
    assert f"ft ({column} other)" in set(table(tmp_path)["defense"]) and set(
        table(tmp_path)["n"]
    ) == {1}


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
    assert (
        "digits, resnet9_w16, recipe sgd epochs 20, fp32\nrecipe sgd epochs 20, precision fp32\n"
        in out
    )
    assert "\ncifar10, resnet9_w16\n" in out or out.startswith("cifar10, resnet9_w16\n")
    assert len(table(tmp_path)) == 3 and list(table(tmp_path)["dataset"]) == [
        "cifar10",
        "digits",
        "digits",
    ]


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
    folders = [
        tmp_path / "record" / "a" / "defense",
        tmp_path / "record",
        tmp_path / "record",
        tmp_path / "link",
    ]
    assert list(table(*folders)["n"]) == [1, 1]


def test_links_are_followed_below_the_given_folders_only(tmp_path, run, table):
    attack(tmp_path / "elsewhere" / "a")
    record, link = tmp_path / "record", tmp_path / "record" / "a"
    record.mkdir()
    link.symlink_to(tmp_path / "elsewhere" / "a")
    code, out, err = run(record)
    assert (code, out) == (3, "") and f"{link} is a link out of the folders that were given" in err
    attack(record / "b", name="wanet")
    code, out, _ = run(record)
    assert code == 0 and "badnet" not in out and f"\n{link}: a link out of the folders" in out
    assert list(table(record, tmp_path / "elsewhere")["attack"]) == ["badnet", "wanet"]
    assert list(table(link)["attack"]) == ["badnet"]


def test_a_link_to_the_whole_disk_is_not_entered(tmp_path, run, monkeypatch):
    attack(tmp_path / "record" / "a")
    (tmp_path / "record" / "all").symlink_to("/")
    entered, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: entered.append(os.fspath(path)) or scan(path))
    assert run(tmp_path / "record")[0] == 0
    assert str(tmp_path / "record" / "a") in entered
    assert not any("all" in Path(path).relative_to(tmp_path).parts for path in entered)


def test_folders_are_searched_to_a_depth(tmp_path, run):
    attack(tmp_path / "a")
    attack(tmp_path / Path(*"d" * 70), name="wanet")
    code, out, _ = run(tmp_path)
    assert code == 0 and "90.0" in out and "wanet" not in out
    assert "d: more than 64 levels below the folder that was given: give it itself\n" in out


def test_a_linked_file_is_refused(tmp_path, run):
    folder = attack(tmp_path / "record" / "a")
    (folder / "config.yaml").rename(tmp_path / "config.yaml")
    (folder / "config.yaml").symlink_to(tmp_path / "config.yaml")
    code, out, _ = run(tmp_path / "record")
    assert code == 4 and f"{folder}: config.yaml is a link" in out


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


def test_weak_is_decided_by_the_mean(tmp_path, run, monkeypatch):
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


def set_file(folder, name, text):
    """Put another file into a finished run, with the right hash."""
    (folder / name).write_text(text)
    files = json.loads((folder / "record.json").read_text())["files"]
    edit_record(folder, files=files | {name: sha256(folder / name)})


def set_results(folder, text):
    set_file(folder, "results.csv", text)


def enlarge(path, size):
    """Make a file of `size` bytes that takes no room on the disk."""
    with open(path, "ab") as file:
        file.truncate(size)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


DAMAGES = {
    "no record.json: unfinished": lambda folder: (folder / "record.json").unlink(),
    "record.json is unusable": lambda folder: (folder / "record.json").write_text("{"),
    "record.json lists no files": lambda folder: (folder / "record.json").write_text("[]"),
    "record.json is of format 3": lambda folder: edit_record(folder, format=3),
    "kind 'other'": lambda folder: edit_record(folder, kind="other"),
    "no results.csv": lambda folder: (folder / "results.csv").unlink(),
    "no config.yaml": lambda folder: (folder / "config.yaml").unlink(),
    "config.yaml was changed after it was written": lambda folder: (
        folder / "config.yaml"
    ).write_text("pratio: 0.2"),
    "results.csv was changed after it was written": lambda folder: (
        folder / "results.csv"
    ).write_text(""),
    "results.csv is unusable: 0 rows instead of 1": lambda folder: set_results(folder, ""),
    "results.csv is unusable: no value for acc, asr": lambda folder: set_results(
        folder, "dataset,model\nx,y\n"
    ),
    "could not convert string to float: 'high'": lambda folder: rewrite(folder, acc="high"),
    "acc is nan": lambda folder: rewrite(folder, acc="nan"),
    "asr is 95": lambda folder: rewrite(folder, asr=95),
    "ASR + RA is 1.01, more than 1": lambda folder: rewrite(folder, asr=0.9, ra=0.11),
    "config.yaml is unusable: it holds an alias": lambda folder: set_file(
        folder, "config.yaml", BOMB
    ),
    "it holds an alias or a tag": lambda folder: set_file(
        folder, "config.yaml", "a: &a x\nb: *a\n"
    ),
    "alias or a tag, and options have none": lambda folder: set_file(
        folder, "config.yaml", "a: !!timestamp x\n"
    ),
    "it holds a list or a mapping": lambda folder: set_file(
        folder, "config.yaml", f"a: {'[' * 200_000}"
    ),
    "mapping where an option has a single value": lambda folder: set_file(
        folder, "config.yaml", "a: {b: 1}"
    ),
    "config.yaml is larger than 256 KB": lambda folder: set_file(
        folder, "config.yaml", "a: 1\n" * 60_000
    ),
    "a has more than 4000 characters": lambda folder: set_file(
        folder, "config.yaml", f"a: {'x' * 5000}"
    ),
    "results.csv is larger than 1024 KB": lambda folder: enlarge(
        folder / "results.csv", 30 * 2**30
    ),
    "record.json is larger than 4096 KB": lambda folder: enlarge(
        folder / "record.json", 30 * 2**30
    ),
    "results.csv is unusable: it has more than 1 row": lambda folder: set_results(
        folder, "acc,asr\n" + "1,0\n" * 100_000
    ),
    "results.csv is unusable: it has more than 1000 columns": lambda folder: set_results(
        folder, "a," * 100_000 + "\n1\n"
    ),
    "model has more than 4000 characters": lambda folder: rewrite(folder, model="x" * 10_000),
    "record.json is unusable: maximum recursion": lambda folder: (
        folder / "record.json"
    ).write_text("[" * 100_000),
    "record.json is unusable: it has more than 20 levels": lambda folder: edit_record(
        folder, versions=json.loads('{"a":' * 30 + "1" + "}" * 30)
    ),
    "record.json is of format '1111": lambda folder: edit_record(folder, format="1" * 10**6),
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
    assert len(listed) < 1000


def test_a_defense_of_another_or_damaged_victim_is_listed(tmp_path, run):
    for name, seed in (("a", 0), ("b", 1)):
        defense(attack(tmp_path / name, seed=seed))
    edit_record(tmp_path / "a/defense/ft", victim_sha256="0" * 64)
    (tmp_path / "b" / "config.yaml").write_text("pratio: 0.2")
    out = run(tmp_path)[1]
    assert "\n3 runs left out:\n" in out
    assert f"\n{tmp_path / 'a/defense/ft'}: made for another victim" in out
    assert (
        f"\n{tmp_path / 'b/defense/ft'}: its attack run cannot be used: config.yaml was changed"
        in out
    )


def test_a_defense_whose_weights_are_named_nowhere_is_listed(tmp_path, run):
    folder = defense(attack(tmp_path / "a"))
    edit_record(
        tmp_path / "a",
        files={name: sha256(tmp_path / "a" / name) for name in ("results.csv", "config.yaml")},
    )
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
        assert (
            "left out" not in out
            and f"1 run left out:\n{tmp_path / 'b'}: no record.json: unfinished\n" in err
        )
    out = run(tmp_path, "--format", "markdown")[1]
    assert out.endswith(f"|\n\n1 run left out:\n- {tmp_path / 'b'}: no record.json: unfinished\n")


def test_an_endless_time_costs_no_other_run(tmp_path, table):
    for seed in (0, 1):
        attack(tmp_path / str(seed), seed=seed, row={"seconds": "inf" if seed else 2.5})
    assert list(table(tmp_path)["seconds_mean"]) == [2.5]


def test_names_cannot_break_a_line_or_the_terminal(tmp_path, run):
    attack(tmp_path / "a", row={"attack": "bad\x1b[31m\nnet"})
    assert "bad [31m net" in run(tmp_path)[1]


ESCAPE = "\x1b]0;title\x07\u202e\x9b31m\n"
TELLERS = {
    "folder": lambda root: attack(root / f"a{ESCAPE}") / "record.json",
    "format": lambda root: edit_record(attack(root / "a"), format=ESCAPE),
    "kind": lambda root: edit_record(attack(root / "a"), kind=[ESCAPE]),
    "option": lambda root: attack(root / "a", **{ESCAPE: "x" * 5000}),
    "yaml": lambda root: set_file(attack(root / "a"), "config.yaml", f"'{ESCAPE}\n"),
    "json": lambda root: (attack(root / "a") / "record.json").write_text(f"'{ESCAPE}"),
    "column": lambda root: rewrite(attack(root / "a"), acc=ESCAPE),
    "link": lambda root: (root / ESCAPE).symlink_to("/"),
    "data": lambda root: [
        attack(root / f"a{number}", row={"dataset": f"x{ESCAPE}"}, seed=number)
        and edit_record(root / f"a{number}", data={"fingerprint": f"{ESCAPE}{number}"})
        for number in (1, 2)
    ],
    "copy": lambda root: shutil.copytree(attack(root / "a"), root / f"b{ESCAPE}"),
    "label": lambda root: [
        attack(root / str(value), **{f"x{ESCAPE}": f"{value}{ESCAPE}"}) for value in (1, 2)
    ],
}


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "latex"])
@pytest.mark.parametrize("place", TELLERS)
def test_no_text_of_a_record_commands_the_terminal(tmp_path, run, place, form):
    TELLERS[place](tmp_path)
    for table in ("cells", "overview", "attacks"):
        _, out, err = run(tmp_path, "--table", table, "--format", form)
        shown = (out + err).replace("\n", "")
        assert shown and shown.isprintable()
    (tmp_path / f"x{ESCAPE}.csv").write_text(f"run,command,defense{ESCAPE}\n1,2,3\n")
    _, out, err = run(tmp_path, tmp_path / f"x{ESCAPE}.csv")
    assert (out + err).replace("\n", "").isprintable() and "x" in out + err


def formula_runs(root, name):
    row = {"attack": name, "dataset": name, "model": name, "recipe": name}
    return defense(attack(root / "a", row=row), name=name, row=row)


@pytest.mark.parametrize("name", ["=1+1", "+cmd|x", "-2+3", "@SUM(1)", "\t=1", "＝1"])
def test_csv_holds_no_formulas(tmp_path, run, name):
    formula_runs(tmp_path, name)
    for table in TABLES_SHOWN:
        out = run(tmp_path, "--table", table, "--format", "csv")[1]
        cells = [cell for line in csv.reader(io.StringIO(out)) for cell in line]
        assert f"'{name.strip()}" in cells
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "＝")) for cell in cells)


TABLES_SHOWN = ("cells", "overview", "attacks")


def test_numbers_in_csv_keep_their_sign():
    text = formats.csv_text(["a"], [[-0.5], ["-0.5"], [-3], ["-x"], [None]])
    assert text == 'a\n-0.5\n-0.5\n-3\n\'-x\n""\n'


@pytest.mark.parametrize(
    "name",
    ["![x](http://a.b)", "[x](javascript:alert(1))", "[x][y]", "[x]: http://a.b", "[x\\](a)"],
)
def test_markdown_holds_no_links(tmp_path, run, name):
    formula_runs(tmp_path, name)
    shutil.copytree(tmp_path / "a", tmp_path / name.replace("/", ":"))
    for table in TABLES_SHOWN:
        out = run(tmp_path, "--table", table, "--format", "markdown")[1]
        assert "![" not in out and not re.search(r"\]([(\[:])", out) and "left out" in out
        assert "x\\" in out


def test_plain_brackets_stay_in_markdown():
    assert formats.as_markdown("sig [9.9 % poisoned]") == "sig [9.9 % poisoned]"


@pytest.mark.parametrize("name", ["[2cm]", "*"])
def test_latex_labels_are_no_options_of_a_line(tmp_path, run, name):
    victim = attack(tmp_path / "a", row={"attack": name})
    for label in (name, f"{name}b"):
        defense(victim, name=label, folder=str(len(label)))
    for table in TABLES_SHOWN:
        lines = run(tmp_path, "--table", table, "--format", "latex")[1].splitlines()
        assert not any(line.startswith(("[", "*")) for line in lines)
        assert any(line.startswith(f"{{}}{name}") for line in lines)


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
    assert code == 0 and out.endswith(
        f"\n1 run left out:\n{tmp_path / 'misspelt'}: no such folder\n"
    )


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
    assert before == run(tmp_path, "--format", "csv")[1] and os.listdir(target.parent) == [
        "table.csv"
    ]

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    code, out, err = run(tmp_path, "--output", target)
    assert (code, out) == (
        1,
        "",
    ) and err == f"error: cannot write {target}: No space left on device\n"
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
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **keywords
    )


def test_command_line(tmp_path):
    attack(tmp_path / "a")
    good = shell(tmp_path)
    assert (
        good.returncode == 0
        and good.stdout.startswith("digits, resnet9_w16\n")
        and good.stderr == ""
    )
    assert shell(tmp_path, "--format", "html").returncode == shell().returncode == 2
    assert shell(tmp_path / "missing").returncode == 3
    (tmp_path / "a" / "record.json").unlink()
    assert shell(tmp_path).returncode == 4


def test_a_terminal_without_the_signs_gets_the_table(tmp_path):
    three_seeds(tmp_path)
    ascii_only = shell(tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ascii_only.returncode == 0 and "93.0 ? 3.6 (3)" in ascii_only.stdout


@pytest.mark.parametrize("arguments", [[], ["--format", "csv"], ["--help"]])
def test_a_closed_pipe_ends_quietly(tmp_path, arguments):
    attack(tmp_path / "a")
    (tmp_path / "b" / "state").mkdir(parents=True)
    command = [sys.executable, "compare.py", str(tmp_path), *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(writer)
    assert done.returncode == 0 and "rror" not in done.stderr


def test_a_closed_pipe_does_not_cost_the_page(tmp_path):
    attack(tmp_path / "r" / "a")
    command = [sys.executable, "compare.py", str(tmp_path / "r"), "--html", str(tmp_path / "p")]
    reader, writer = os.pipe()
    os.close(reader)
    subprocess.run(command, cwd=ROOT, stdout=writer, timeout=60, check=True)
    os.close(writer)
    assert (tmp_path / "p").read_text().endswith("</html>")


def results_of(row, folder):
    """A table of results with this row of a victim, and a defense whose victim is not in it."""
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
    row = dict.fromkeys([*COLUMNS, "command"], "") | {
        "attack": "badnet",
        "defense": "none",
        "acc": "0.9",
        "asr": "0.5",
        "ra": "0.3",
    }
    code, out, err = run(results_of(row | changes, tmp_path))
    assert code == (4 if changes else 0) and reason in out + err


@pytest.mark.parametrize("content", [b"", b"run,acc\n", b"\xff\xfe", b"run,command\n\0,\0\n"])
def test_a_file_that_is_no_table_is_refused(tmp_path, run, content):
    (tmp_path / "x.csv").write_bytes(content)
    code, out, err = run(tmp_path / "x.csv")
    assert (
        code == 4
        and err.startswith("error: all 1 runs found are damaged")
        and "x.csv: " in out + err
    )
    write_run(
        tmp_path / "good",
        "attack",
        {},
        ROW
        | {"attack": "badnet", "defense": "none", "stage": "none", "selection": "none", "acc": 0.9},
    )
    code, out, _ = run(tmp_path / "good", tmp_path / "x.csv")
    assert code == 0 and "90.0" in out and "x.csv: " in out, "one bad table never costs the others"


def test_tables_of_results_have_a_limit(tmp_path, run, monkeypatch):
    path = results_of(dict.fromkeys([*COLUMNS, "command"], ""), tmp_path)
    monkeypatch.setattr(runs, "MOST_ROWS", 1)
    assert "all.csv: it is unusable: it has more than 1 row\n" in run(path)[1]
    enlarge(path, 30 * 2**30)
    code, out, _ = run(path, attack(tmp_path / "a"))
    assert code == 0 and "90.0" in out and "all.csv: all.csv is larger than 65536 KB\n" in out


def test_a_table_that_is_not_there_is_missing(tmp_path, run):
    assert run(tmp_path / "none.csv")[0] == 3


def test_torch_is_not_imported():
    code = "import sys, compare; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode
        == 0
    )


def test_deviation_is_the_samples(tmp_path, table):
    values = [0.81, 0.855, 0.99, 0.9]
    for seed, acc in enumerate(values):
        attack(tmp_path / str(seed), acc=acc, seed=seed)
    assert table(tmp_path)["acc_std"][0] == round(statistics.stdev(values), 6)


# ---------- the short tables ----------


def overview_runs(root):
    """Two seeds of badnet and of a clean model, a weak attack, an oracle: each rule of repaired."""
    clean = {"n_poison": 0, "attack": "unpoisoned"}
    for seed in (0, 1):
        victim = attack(root / f"badnet_{seed}", acc=0.9, asr=0.95, ra=0.04, seed=seed)
        defense(victim, acc=0.8501, asr=0.1, ra=0.69, row={"seconds": 4 + 2 * seed})  # repaired
        lost = {"acc": 0.848} if seed else {"asr": 0.11, "acc": 0.9}
        defense(victim, **{"acc": 0.9, "asr": 0.0, "ra": 0.8, **lost}, name="fp")
        harmed = {"acc": 0.9, "asr": 0.05, "ra": 0.71}  # the RA is below 0.8 ACC
        defense(victim, **harmed, name="anp", row={"selection": "oracle"})
        free = attack(root / f"free_{seed}", name="unpoisoned", asr="", ra="", seed=seed, row=clean)
        defense(free, asr="", ra="", acc=0.89, row=clean)
    weak = attack(root / "weak", name="wanet", asr=0.5, ra=0.4)
    defense(weak, acc=0.9, asr=0.0, ra=0.88, row={"attack": "wanet"})
    return root


def test_overview(tmp_path, run):
    overview_runs(tmp_path)
    code, out, err = run(tmp_path, "--table", "overview", "--format", "markdown")
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    assert (code, err) == (0, "")
    assert rows[0] == [
        "defense", "clean images", "unpoisoned ACC", "badnet", r"wanet\*", "repaired", "seconds",
        "n",
    ]  # fmt: skip
    assert rows[2:] == [
        ["none", "–", "90.0", "90.0 / 95.0 / 4.0", "90.0 / 50.0 / 40.0", "0 of 2", "2.5", "1 to 2"],
        ["anp‡", "72", "–", "90.0 / 5.0 / 71.0", "–", "0 of 2", "2.5", "2"],
        ["fp", "72", "–", "87.4 / 5.5 / 80.0", "–", "0 of 2", "2.5", "2"],
        ["ft", "72", "89.0", "85.0 / 10.0 / 69.0", "90.0 / 0.0 / 88.0", "2 of 2", "3.5", "1 to 2"],
    ]
    assert "‡ chosen with test data" in out and summaries.REPAIRED in out
    assert "recipe sgd lr 0.01 epochs 100 batch 128, precision fp32, cpu; ACC / ASR / RA" in out


def test_overview_in_other_formats(tmp_path, run):
    overview_runs(tmp_path)
    lines = run(tmp_path, "--table", "overview")[1].splitlines()
    words = ["ft", "72", "89.0", "85.0", "/", "10.0", "/", "69.0", "90.0", "/", "0.0", "/", "88.0"]
    assert [*words, "2", "of", "2", "3.5", "1", "to", "2"] in [line.split() for line in lines]
    assert max(map(len, lines[3:-5])) <= formats.TEXT_WIDTH
    latex = run(tmp_path, "--table", "overview", "--format", "latex")[1]
    assert r"\begin{tabular}{lrrrrrrr}" in latex and r"ft & 72 & 89.0 & 85.0 / 10.0 / 69.0" in latex
    table = pd.read_csv(io.StringIO(run(tmp_path, "--table", "overview", "--format", "csv")[1]))
    row = table.set_index("defense").loc["ft"]
    assert (row["repaired"], row["attacked"], row["n_min"], row["n_max"]) == (2, 2, 1, 2)
    assert (row["stage"], row["clean_budget"], row["seconds_mean"]) == ("repair", 72, 3.5)
    assert row["benign_loss_mean"] == pytest.approx(0.01)


def test_the_ranking_says_what_a_defense_costs_a_benign_model(tmp_path, run):
    """Of two benign victims with an ACC of 90 %; nothing ran there but ft."""
    overview_runs(tmp_path)
    defense(tmp_path / "free_1", asr="", ra="", acc=0.87, row={"n_poison": 0})
    out = run(tmp_path, "--table", "ranking", "--format", "markdown")[1]
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    place = rows[0].index("benign")
    assert {row[0]: row[place] for row in rows[2:]} == {
        "none": "–", "ft": "2.0", "fp": "–", "anp‡": "–",
    }  # fmt: skip
    assert "benign: the points of ACC" in out
    for seed in (0, 1):
        shutil.rmtree(tmp_path / f"free_{seed}")
    assert "benign" not in run(tmp_path, "--table", "ranking")[1]


def test_overview_reads_tables_of_results(tmp_path, run):
    row = dict.fromkeys([*COLUMNS, "command"], "") | ROW | {"attack": "badnet", "seed": 0}
    victim = {**row, "run": "a", "defense": "none", "acc": 0.9, "asr": 0.9, "ra": 0.1}
    repaired = {**row, "run": "a/defense/ft", "defense": "ft", "stage": "repair", "acc": 0.88}
    repaired |= {"asr": 0.05, "ra": 0.8, "clean_budget": 72}
    files.write(tmp_path / "all.csv", files.csv_text([repaired, victim], ["run", *row]))
    out = run(tmp_path / "all.csv", "--table", "overview")[1]
    words = "ft 72 88.0 / 5.0 / 80.0 1 of 1 2.5 1".split()
    assert words in [line.split() for line in out.splitlines()]


def test_overview_with_published_numbers(tmp_path, run):
    paper = {"dataset": "cifar10", "model": "preactresnet18"}
    defense(attack(tmp_path / "a", row=paper), row=paper)
    out = run(tmp_path, "--table", "overview", "--published", "--format", "markdown")[1]
    assert "| ft, published | – | 90.0 / 1.5 / 89.4 | – | – | – |" in out
    assert "published: BackdoorBench leaderboard" in out


def test_against_pairs_the_runs_on_one_victim(tmp_path, run):
    """The fourth victim was given ft alone, and two runs on a victim count with their mean."""
    for seed, asr in enumerate((0.2, 0.5, 0.1)):
        victim = attack(tmp_path / f"badnet-{seed}", seed=seed)
        defense(victim, asr=0.6, ra=0.3)
        defense(victim, asr=asr, acc=0.9, ra=0.3, name="anp")
    defense(victim, asr=0.3, acc=0.9, ra=0.3, name="anp", seed=1, folder="anp-1")
    defense(attack(tmp_path / "badnet-3", seed=3), asr=0.0)
    words = [str(tmp_path), "--against", "ft"]
    (line,) = (x for x in run(*words)[1].splitlines() if x.startswith("anp"))
    assert "3   +2.0 (+2.0 to +2.0)   -30.0 (-40.0 to -10.0)" in line
    assert line.endswith("lower on all 3")
    (row,) = csv.DictReader(io.StringIO(run(*words, "--format", "csv")[1]))
    assert (row["defense"], row["against"], row["victims"]) == ("anp", "ft", "3")
    assert [float(row[f"asr_difference_{part}"]) for part in ("mean", "min", "max")] == [
        pytest.approx(each) for each in (-0.3, -0.4, -0.1)
    ]
    said = "error: no defense is called 'fp' in these tables: there are anp, ft\n"
    assert run(tmp_path, "--against", "fp") == (2, "", said)


def test_against_marks_weak_attacks(tmp_path, run):
    victim = attack(tmp_path / "a", asr=0.5, ra=0.4)
    for name in ("ft", "anp"):
        defense(victim, name=name)
    out = run(tmp_path, "--against", "ft")[1]
    assert re.search(r"^anp +badnet\* +1 ", out, re.M) and "* weak attack" in out


def test_a_difference_in_words():
    assert paired.in_words([]) == "–" and paired.in_words([0.1, 0.2]) == "too few victims"
    assert paired.in_words([0.1, 0.2, 0.3]) == "higher on all 3"
    assert paired.in_words([-0.1, 0.2, 0.0]) == "lower on 1, higher on 1 of 3"


def test_attacks(tmp_path, run):
    paper = {"dataset": "cifar10", "model": "preactresnet18", "pratio_effective": 0.1}
    for seed, acc in enumerate([0.90, 0.92, 0.97]):
        victim = attack(tmp_path / str(seed), acc=acc, seed=seed, row=paper | {"seconds": 600})
        edit_record(victim, trigger_seconds=[40, 50, "long"][seed])
    defense(victim, row=paper)
    attack(tmp_path / "weak", name="wanet", asr=0.3, row=paper | {"pratio_effective": ""})
    out = run(tmp_path, "--table", "attacks", "--format", "markdown", "--published")[1]
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    assert rows[0] == [
        "attack", "poisoned", "ACC", "ASR", "RA", "training s", "trigger s", "n", "published",
    ]  # fmt: skip
    assert rows[2] == [
        "badnet", "10.0 %", "93.0 ± 3.6 (3)", "95.0 ± 0.0 (3)", "4.0 ± 0.0 (3)", "600", "45", "3",
        "91.3 / 95.0 / 4.7",
    ]  # fmt: skip
    assert rows[3][:7] == [r"wanet\*", "–", "90.0", "30.0", "4.0", "2.5", "–"]
    out = run(tmp_path, "--table", "attacks", "--format", "csv")[1]
    table = pd.read_csv(io.StringIO(out)).set_index("attack")
    badnet = table.loc["badnet"]
    assert (badnet["n"], badnet["acc_std"], badnet["trigger_seconds_mean"]) == (3, 0.036056, 45)
    out = run(tmp_path / "weak", "--table", "attacks")[1]
    assert "trigger" not in out and "published" not in out


def test_attacks_are_found_through_their_defenses(tmp_path, run):
    folder = defense(attack(tmp_path / "a"))
    row = run(folder, "--table", "attacks")[1].splitlines()[-1].split()
    assert row == ["badnet", "–", "90.0", "95.0", "4.0", "2.5", "1"]


def test_clean_models_are_those_without_poison(tmp_path, run):
    attack(tmp_path / "a", name="clean_label", row={"n_poison": 50}, asr=0.5)
    attack(tmp_path / "b", name="zero", row={"n_poison": 0}, asr=0.1)
    header = run(tmp_path)[1].splitlines()[3]
    assert header.split() == ["zero", "clean_label*"], (
        "the clean model comes first, and is not weak"
    )


# ---------- data sets of one name, and victims that learned nothing ----------


def on(folder, mark, **facts):
    """Say on which data a finished victim was trained; returns its folder."""
    prints = {"train": mark, "test": "t"}
    edit_record(folder, data={"train": 1000, "test": 360, "fingerprint": prints, **facts})
    return folder


def test_two_data_sets_of_one_name_are_two(tmp_path, run, table):
    row = {"dataset": "folder"}
    for mark, acc in (("dogs", 0.9), ("cats", 0.8)):
        defense(on(attack(tmp_path / mark, acc=acc, row=row), mark), row=row)
    shown = table(tmp_path)
    names = sorted(set(shown["dataset"]))
    assert len(names) == 2 and all(re.fullmatch("folder #[0-9a-f]{6}", name) for name in names)
    assert list(shown["n"]) == [1] * 4 and sorted(shown["acc_mean"]) == [0.8, 0.88, 0.88, 0.9]
    code, out, _ = run(tmp_path)
    assert code == 0 and all(f"{name}, resnet9_w16\n" in out for name in names)
    assert "left out" not in out
    shutil.copytree(tmp_path / "dogs", tmp_path / "copy")
    assert "2 runs left out" in run(tmp_path)[1]


def test_one_data_set_needs_no_mark(tmp_path, run):
    for seed in (0, 1):
        on(attack(tmp_path / str(seed), seed=seed, row={"dataset": "pets"}), "pets")
    out = run(tmp_path)[1]
    assert out.startswith("pets, resnet9_w16\n") and "90.0 ± 0.0 (2)" in out


def test_marks_are_as_long_as_it_takes():
    assert tables.shortest("abcdef12", {"abcdef12", ""}) == "abcdef"
    assert tables.shortest("abcdef12", {"abcdef12", "abcdef13"}) == "abcdef12"


@pytest.mark.parametrize(("name", "count"), [("digits", 1), ("folder", 2)])
def test_runs_that_do_not_name_their_data(tmp_path, table, name, count):
    """Of the usual data sets there is one; one's own may be any."""
    on(attack(tmp_path / "a", row={"dataset": name}), "x")
    attack(tmp_path / "b", seed=1, row={"dataset": name})
    assert len(set(table(tmp_path)["dataset"])) == count and table(tmp_path)["n"].sum() == 2


def test_a_table_of_results_can_name_its_data(tmp_path, run):
    row = dict.fromkeys([*COLUMNS, "command"], "") | ROW | {"attack": "badnet", "defense": "none"}
    row |= {"dataset": "pets", "acc": 0.9}
    rows = [{**row, "run": name, "data_fingerprint": name * 12} for name in "ab"]
    files.write(tmp_path / "all.csv", files.csv_text(rows, ["run", *row, "data_fingerprint"]))
    out = run(tmp_path / "all.csv")[1]
    assert "pets #aaaaaa, resnet9_w16\n" in out and "pets #bbbbbb, resnet9_w16\n" in out


@pytest.mark.parametrize("data", [None, 7, "x", [1], {"fingerprint": {"a": [{}]}}, {"classes": []}])
def test_facts_about_data_may_be_anything(tmp_path, table, data):
    edit_record(attack(tmp_path / "a"), data=data)
    assert list(table(tmp_path)["n"]) == [1]


UNTRAINED = {  # acc, asr, ra, row, facts about the data: whether it is marked
    "a tenth": ((0.11, 0.989, 0.01), {}, None, True),
    "below three times chance": ((0.2999, 0.9, 0.1), {}, None, True),
    "three times chance": ((0.3, 0.9, 0.1), {}, None, False),
    "100 classes": ((0.2, 0.9, 0.1), {"dataset": "cifar100"}, None, False),
    "own, 20 classes": ((0.14, 0.9, 0.1), {"dataset": "pets"}, {"classes": 20}, True),
    "own, 20 classes, better": ((0.16, 0.9, 0.1), {"dataset": "pets"}, {"classes": 20}, False),
    "own, 2 classes": ((0.74, 0.9, 0.1), {"dataset": "pets"}, {"classes": 2}, True),
    "own, 2 classes, better": ((0.76, 0.9, 0.1), {"dataset": "pets"}, {"classes": 2}, False),
    "unknown classes": ((0.11, 0.9, 0.1), {"dataset": "pets"}, None, False),
    "one answer": ((0.1, 1, 0), {"dataset": "pets"}, None, True),
    "one answer, a large class": ((0.4, 1, 0), {"dataset": "pets", "n_backdoor": 216}, None, True),
    "more": ((0.5, 1, 0), {"dataset": "pets", "n_backdoor": 216}, None, False),
    "not the target": ((0.4, 0.5, 0), {"dataset": "pets", "n_backdoor": 216}, None, False),
    "clean": ((0.2, 0.1, 0.1), {"attack": "clean", "n_poison": 0}, None, True),
}


@pytest.mark.parametrize("case", UNTRAINED)
def test_a_victim_that_learned_nothing_is_marked(tmp_path, run, case):
    (acc, asr, ra), row, facts, marked = UNTRAINED[case]
    folder = attack(tmp_path / "a", acc=acc, asr=asr, ra=ra, row=row)
    if facts:
        on(folder, "x", **facts)
    for table in TABLES_SHOWN:
        out = run(tmp_path, "--table", table)[1]
        assert (f"{row.get('attack', 'badnet')}§" in out) == marked
        assert ("\n§ untrained victim" in out) == marked
    assert (r"$^\S$" in run(tmp_path, "--format", "latex")[1]) == marked


@pytest.mark.parametrize(("acc", "marked"), [(0.66, True), (0.69, False)])
def test_a_victim_far_below_the_clean_model_is_marked(tmp_path, run, acc, marked):
    attack(tmp_path / "clean", name="clean", acc=0.9, asr="", ra="", row={"n_poison": 0})
    defense(attack(tmp_path / "a", acc=acc), acc=acc, asr=0, ra=acc)
    assert ("badnet§" in run(tmp_path)[1]) == marked
    out = run(tmp_path, "--table", "overview", "--format", "csv")[1]
    row = pd.read_csv(io.StringIO(out)).set_index("defense").loc["ft"]
    assert (row["repaired"], row["attacked"]) == ((0, 0) if marked else (1, 1))


def test_a_clean_model_that_learned_nothing_judges_no_other(tmp_path, run):
    attack(tmp_path / "clean", name="clean", acc=0.1, asr="", ra="", row={"n_poison": 0})
    attack(tmp_path / "a", acc=0.5)
    out = run(tmp_path)[1]
    assert "clean§" in out and "badnet§" not in out


def test_no_defense_is_credited_on_the_seed_that_learned_nothing(tmp_path, run):
    for seed, acc in enumerate([0.9, 0.1]):
        victim = attack(tmp_path / str(seed), acc=acc, asr=0.99, ra=0.01, seed=seed)
        defense(victim, acc=acc, asr=0, ra=acc)
    out = run(tmp_path, "--table", "overview", "--format", "csv")[1]
    row = pd.read_csv(io.StringIO(out)).set_index("defense").loc["ft"]
    assert (row["repaired"], row["attacked"], row["n_max"]) == (1, 1, 2)
    assert "badnet§" in run(tmp_path)[1]


def test_figures_mark_a_victim_that_learned_nothing(tmp_path):
    from antidote_bench.utils import charts
    from antidote_bench.utils.report import figures

    defense(attack(tmp_path / "a", acc=0.11, asr=0.989, ra=0.01), acc=0.1)
    (table,) = tables.group(runs.read_all(runs.find_runs([tmp_path]))[0])
    with charts.plotting() as Figure:
        for _, figure in figures.drawn([table], Figure):
            words = list(figure.texts)
            for axes in figure.axes:
                words += [axes.title, *axes.get_xticklabels()]
            shown = " ".join(text.get_text() for text in words)
            assert "badnet§" in shown and "§ untrained victim" in shown


def test_committed_results_hold_no_untrained_victim():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.csv")):
        with open(path) as file:
            if not file.readline().startswith("run,"):
                continue
        for table in tables.group(runs.in_table(path, runs.read_table(path))[0]):
            assert not table.untrained, path


# ---------- colours and figures ----------


def test_looks_are_fixed_and_differ():
    assert palette.look("ft") == (0, 0) and palette.look("fmp") == (1, 1)
    assert palette.look("badnet", palette.ATTACKS) == (0, 0)
    for known, folder in ((palette.DEFENSES, "defense"), (palette.ATTACKS, "attack")):
        assert len({palette.look(name, known) for name in known}) == len(known)
        assert set(known) <= set(names(folder)), "a method that is no more"
    taken = {palette.look(name) for name in palette.DEFENSES}
    for name in ("a_new_one", "another", "", "-", "日本"):
        assert palette.look(name) not in taken and palette.look(name) == palette.look(name)
    variants = [palette.look(f"fmp-{name}") for name in ("random", "no_pruning", "released", "fmt")]
    assert {colour for colour, _ in variants} == {1} and len({*variants, (1, 1)}) == 5


def log_of(folder, rows):
    """Give a finished run a log with these lines."""
    lines = ["stage,epoch,loss,lr,acc,asr,ra,seconds", *rows]
    (folder / "log.csv").write_text("\n".join(lines))
    listed = json.loads((folder / "record.json").read_text())["files"]
    edit_record(folder, files=listed | {"log.csv": sha256(folder / "log.csv")})
    return folder


LOG = ["a,1,0.5,0.1,0.8,0.9,0.1,1", "a,2,0.4,0.1,,,,2", "b,1,0.2,0.1,0.9,0.1,0.8,3"]


def assert_sound(folder, count):
    """Whether a folder holds `count` figures, each as PNG, PDF and SVG; returns their names."""
    paths = sorted(folder.iterdir())
    stems = sorted({path.stem for path in paths})
    assert len(stems) == count and len(paths) == 3 * count
    for stem in stems:
        assert re.fullmatch(r"[a-z0-9_-]+", stem)
        with Image.open(folder / f"{stem}.png") as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 100
        pdf = (folder / f"{stem}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF-") and pdf.rstrip().endswith(b"%%EOF")
        assert b"/Type3" not in pdf and b"CreationDate" not in pdf
        root = ElementTree.parse(folder / f"{stem}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return stems


def test_figures(tmp_path, run):
    for name in ("badnet", "wanet"):
        victim = log_of(attack(tmp_path / "r" / name, name=name), LOG)
        log_of(defense(victim, row={"attack": name}), LOG)
        defense(victim, name="anp", row={"attack": name, "selection": "oracle"})
    code, out, err = run(tmp_path / "r", "--figures", tmp_path / "f")
    assert (code, err) == (0, "")
    assert out.endswith(f"\n5 figures, each as PNG, PDF, SVG, written to {tmp_path / 'f'}\n")
    stems = assert_sound(tmp_path / "f", 5)
    assert stems == [
        "curves-digits-resnet9_w16-badnet",
        "curves-digits-resnet9_w16-victims",
        "curves-digits-resnet9_w16-wanet",
        "heatmap-digits-resnet9_w16",
        "tradeoff-digits-resnet9_w16",
    ]
    first = (tmp_path / "f" / "tradeoff-digits-resnet9_w16.svg").read_bytes()
    assert palette.COLOURS[palette.look("ft")[0]][0].encode() in first
    code, out, err = run(tmp_path / "r", "--figures", tmp_path / "g", "--format", "csv")
    assert code == 0 and "figures" in err and "figures" not in out
    again = (tmp_path / "g" / "tradeoff-digits-resnet9_w16.svg").read_bytes()
    assert again == first, "the same runs give the same file"


def test_figures_of_strangers(tmp_path, run):
    hostile = [
        "$\\frac{a}{0}$",
        "../../etc/passwd",
        "_a",
        "<b>&",
        "日本 " + "x" * 300,
        "$x$",
        "a\\$b",
    ]
    bad_log = ["a,1,1e308,,1e300,nan,inf,1", f"b,{'9' * 50},-1e308,,0.5,0.5,0,1", "c,-5,0.2,,,,,"]
    for number, name in enumerate(hostile):
        row = {"attack": name, "dataset": "../$x^2$", "model": "a/../b"}
        victim = log_of(attack(tmp_path / "r" / str(number), name=name, row=row), bad_log)
        log_of(defense(victim, name=hostile[-1 - number], folder="d", row=row), bad_log)
    code, out, err = run(tmp_path / "r", "--figures", tmp_path / "f")
    assert (code, err) == (0, "") and "figures, each as" in out
    assert_sound(tmp_path / "f", 3 + len(hostile))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "r"]


def test_figures_without_a_defense_or_a_log(tmp_path, run):
    attack(tmp_path / "r" / "a")
    out = run(tmp_path / "r", "--figures", tmp_path / "f")[1]
    assert out.endswith("no figure written: no run is one of a defense, and none has a log of its "
                        "epochs\n") and not (tmp_path / "f").exists()  # fmt: skip
    log_of(tmp_path / "r" / "a", LOG)
    assert (
        "\n1 figure, as PNG, PDF, SVG, written"
        in run(tmp_path / "r", "--figures", tmp_path / "f")[1]
    )


def test_figures_that_cannot_be_written(tmp_path, run, monkeypatch):
    defense(attack(tmp_path / "r"))
    (tmp_path / "f").write_text("")
    code, _, err = run(tmp_path / "r", "--figures", tmp_path / "f")
    assert code == 1 and err.startswith("error: cannot write ") and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(tmp_path / "r", "--figures", tmp_path / "g")
    assert code == 1 and err == (
        "error: --figures needs the package matplotlib: pip install -r requirements.txt brings it\n"
    )


def test_what_figures_show(tmp_path):
    from antidote_bench.utils.report import figures

    for seed in (0, 1):
        victim = attack(tmp_path / str(seed), acc=0.9 + 0.02 * seed, seed=seed)
        defense(victim, acc=0.85, asr=0.1 * seed)
    log_of(victim, LOG)
    (table,) = tables.group(runs.read_all(runs.find_runs([tmp_path]))[0])
    (column,) = table.columns
    none, ft = table.rows
    assert figures.points_lost(table, column, ft) == pytest.approx(6)
    assert figures.points_lost(table, column, none) is None
    assert figures.asr_percent(table, column, ft) == pytest.approx(5)
    ((row, before, after),) = figures.trade(table, column)
    assert row == ft and before == pytest.approx([95, 91]) and after == pytest.approx([5, 85])
    ((name, _, line),) = figures.victim_lines(table)
    assert name == "badnet" and figures.series(line, "loss") == ([1, 2, 3], [0.5, 0.4, 0.2])
    assert figures.series(line, "asr") == ([1, 3], [90, 10])
    long = table._replace(rows={none: f"{'x' * 30}a{'x' * 30}", ft: f"{'x' * 30}b{'x' * 30}"})
    first, second = figures.labels_of(long, [none, ft])
    assert len(first) == figures.LONGEST and second == f"{first} #2"


def test_a_large_heat_map_says_what_is_cut(tmp_path, monkeypatch):
    from antidote_bench.utils import charts
    from antidote_bench.utils.report import figures

    for number in range(4):
        defense(attack(tmp_path / str(number), name=f"attack{number}"))
    (table,) = tables.group(runs.read_all(runs.find_runs([tmp_path]))[0])
    monkeypatch.setattr(figures, "SIDE", 3)
    monkeypatch.setattr(figures, "PANELS", 3)
    with charts.plotting() as Figure:
        drawn = dict(figures.drawn([table], Figure))
    words = {
        name: " ".join(text.get_text() for text in figure.texts) for name, figure in drawn.items()
    }
    assert "1 more rows and columns are not drawn" in words["heatmap-digits-resnet9_w16"]
    assert "1 more attacks are not drawn" in words["tradeoff-digits-resnet9_w16"]


@pytest.mark.parametrize("count", [1, 7, 60])
def test_charts_of_defenses(count, monkeypatch):
    """They are sound, and small enough for the page, however many layers or classes there are."""
    import torch

    from antidote_bench.utils import charts
    from antidote_bench.utils.report import images

    scores = [value / 64 for value in range(64)]
    layers = {f"network.layer{number}.conv": (scores, [0, number]) for number in range(count)}
    masks, patterns = torch.rand(count, 1, 8, 8), torch.rand(count, 3, 8, 8)
    titles = [f"class {number}" for number in range(count)]
    made = [
        charts.score_chart(layers),
        charts.trigger_chart(masks, patterns, titles, [number == 0 for number in range(count)]),
    ]
    for content in made:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            assert image.format == "PNG" and image.width * image.height < images.LARGEST_IMAGE
            colours = image.convert("RGB").getcolors(2**24)
        assert (196, 30, 58) in {colour for _, colour in colours}, (
            "what is pruned or flagged is red"
        )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="needs the package matplotlib: pip install"):
        charts.score_chart(layers)


def test_matplotlib_is_not_imported_for_a_table(tmp_path):
    code = f"import sys, compare; compare.main([{str(attack(tmp_path / 'a'))!r}]); "
    code += "sys.exit('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0
