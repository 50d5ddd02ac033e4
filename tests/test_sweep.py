"""Grids: which runs they are, that each runs once and to its end, and what a failure leaves."""

import concurrent.futures
import dataclasses
import functools
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import yaml

from antidote_bench.utils import files, parsing
from antidote_bench.utils.errors import ConfigError, MissingError
from antidote_bench.utils.record import claim, folder
from antidote_bench.utils.sweep import grid, launchers
from tests.helpers import ROOT, names
from tests.start import start as fork

QUICK = {"epochs": 1, "width": 8}


def paths(content, **extra):
    return [str(cell.path) for cell in grid.cells(content, extra)]


def test_a_grid_is_a_product():
    content = {
        "dataset": ["digits", "cifar10"],
        "attack": ["badnet", "wanet"],
        "seed": [0, 1, 2],
        "defense": ["ft", "fmp"],
    }
    cells = grid.cells(content)
    assert len(cells) == 2 * 2 * 3 * (1 + 2) == len({cell.path for cell in cells})
    last = cells[-1]
    assert last.command("record") == (
        "python defense/fmp.py --random_seed 2 --data_seed 2 --record_path record "
        "--save_folder_name fmp --result_file cifar10-wanet-s2"
    )
    assert last.victim.command("my records") == (
        "python attack/wanet.py --dataset cifar10 --random_seed 2 --poison_seed 2 "
        "--record_path 'my records' --save_folder_name cifar10-wanet-s2"
    )
    order = [cell.path for cell in cells]
    assert all(
        order.index(cell.victim.path) < order.index(cell.path) for cell in cells if cell.victim
    )


def test_entries_have_options_and_lists_multiply():
    content = {
        "model": ["preactresnet18", {"resnet9": {"width": 16}}],
        "pratio": [0.1, 0.01],
        "attack": ["badnet", {"wanet": {"strength": [1, 2], "pratio": 0.2}}],
        "attack_options": {"label_mode": "all2all"},
        "defense": [{"fmp": {"variant": [None, "random"]}}],
        "defense_options": {"clean_ratio": [0.05, 0.1]},
    }
    found = [path for path in paths(content) if "defense" not in path]
    badnet, wanet = "badnet-label_mode_all2all", "wanet-label_mode_all2all-strength_{}{}-p0.2-s0"
    assert sorted(found) == sorted(
        [
            *(f"preactresnet18-{badnet}-p{share}-s0" for share in (0.1, 0.01)),
            *(f"resnet9-{badnet}-width_16-p{share}-s0" for share in (0.1, 0.01)),
            *(f"preactresnet18-{wanet.format(strength, '')}" for strength in (1, 2)),
            *(f"resnet9-{wanet.format(strength, '-width_16')}" for strength in (1, 2)),
        ]
    ), "a share of an attack's own is no reason to run it for every share of the grid"
    of_one = [path.split("/")[-1] for path in paths(content) if path.startswith(f"{found[0]}/")]
    assert of_one == [
        "fmp-clean_ratio_0.05",
        "fmp-clean_ratio_0.1",
        "fmp-clean_ratio_0.05-variant_random",
        "fmp-clean_ratio_0.1-variant_random",
    ]
    (cell,) = grid.cells({"attack": {"badnet": {"random_seed": 7}}, "seed": 3})
    assert (cell.options["random_seed"], cell.options["poison_seed"]) == (7, 3), (
        "an option of an entry is stronger than the seed"
    )


def test_includes_take_from_the_grid_and_excludes_take_away():
    content = {
        "dataset": "digits",
        "attack": ["badnet", "sig"],
        "pratio": [0.1, 0.05],
        "seed": [0, 1],
        "defense": ["ft", "fmp"],
        "include": [{"attack": "clean", "pratio": 0.0, "defense": "ft"}],
        "exclude": [{"attack": "sig", "pratio": 0.1}, {"defense": "fmp", "seed": [1, 2]}],
    }
    found = paths(content)
    assert not [path for path in found if path.startswith("digits-sig-p0.1")], "with its defenses"
    assert {path.split("/")[0] for path in found if path.endswith("/fmp")} == {
        "digits-badnet-p0.1-s0",
        "digits-badnet-p0.05-s0",
        "digits-sig-p0.05-s0",
    }
    assert [path for path in found if "clean" in path] == [
        "digits-clean-p0.0-s0",
        "digits-clean-p0.0-s0/defense/ft",
        "digits-clean-p0.0-s1",
        "digits-clean-p0.0-s1/defense/ft",
    ]


def test_names_follow_from_the_run_alone():
    small, large = (
        {"attack": "badnet", "seed": 1},
        {"attack": ["wanet", "badnet"], "seed": [0, 1], "defense": "ft"},
    )
    assert set(paths(small)) <= set(paths(large)), "a grid that grows finds its runs again"
    strange = paths(
        {
            "attack": [
                {
                    "badnet": {
                        "trigger_path": [f"a/{'x' * 200}.png", f"a/{'x' * 200}.npy", "a b", "a_b"]
                    }
                }
            ]
        }
    )
    assert len(set(strange)) == 4 and all(re.fullmatch(r"[\w.+-]{1,140}", name) for name in strange)
    assert paths(small, cache_path="/elsewhere") == paths(small), (
        "options of all runs are in no name"
    )


@pytest.mark.parametrize(
    "content, what",
    [
        ({"atack": ["badnet"]}, "unknown key 'atack'"),
        ([1], "must be a mapping"),
        (
            {"attack": ["badnet"], "include": [{"exclude": []}]},
            "include has an unknown key 'exclude'",
        ),
        ({"attack": ["badnet"], "attack_options": ["epochs"]}, "attack_options must be a mapping"),
        ({"attack": [{"badnet": 3}]}, "name: {option: value}"),
        ({"defense": ["ft"]}, "no run"),
        ({"attack": ["badnet"], "exclude": [{"attack": "wanet"}]}, "fits no run"),
        ({"attack": ["badnet"], "exclude": ["wanet"]}, "must be a mapping such as"),
        (
            {"attack": ["badnet"], "attack_options": {"record_path": "elsewhere"}},
            "the option record_path is the sweep's own: give it to sweep.py, before --",
        ),
        (
            {"attack": [{"badnet": {"save_folder_name": "x"}}]},
            "the option save_folder_name is the sweep's own",
        ),
        (
            {"attack": ["badnet"], "defense": ["ft"], "defense_options": {"result_file": "x"}},
            "the option result_file is the sweep's own",
        ),
        ({"attack": ["badnet"], "seed": [0, "one"]}, "random_seed"),
        ({"attack": [{"badnet": {True: 3}}]}, "the name of an option must be text"),
        ({"attack": ["badnett"]}, "unknown attack 'badnett'; there are adaptive_blend"),
        ({"attack": ["badnet"], "defense": ["tf"]}, "unknown defense 'tf'"),
        (
            {"attack": ["badnet"], "attack_options": {"epoch": 3}},
            "unknown option 'epoch'; the nearest are epochs",
        ),
        ({"attack": ["badnet"], "model": ["resnet9", "resnt9"]}, "resnt9"),
        ({"attack": ["badnet"], "dataset": ["digits", "cifar11"]}, "unknown data set 'cifar11'"),
        (
            {"attack": ["badnet"], "pratio": [0.1, 2]},
            "pratio must be from 0 to 1 (in python attack/badnet.py",
        ),
    ],
)
def test_mistakes_are_named_before_anything_runs(content, what, tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=re.escape(what)):
        grid.check(grid.cells(grid.read(path)), tmp_path)


def test_a_grid_that_is_not_there(tmp_path):
    with pytest.raises(MissingError, match="config/sweep holds some"):
        grid.read(tmp_path / "none.yaml")
    for content in (b"a: [", b"seed: !!float x", b"attack: \xff", b"[" * 90_000):
        (tmp_path / "odd.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read"):
            grid.read(tmp_path / "odd.yaml")


def test_numbers_are_excluded_however_they_are_written():
    content = {
        "attack": {"badnet": {"lr": ["1e-2", 0.1]}},  # 1e-2 is text in YAML
        "exclude": [{"lr": 0.01}, {"seed": "1"}],
        "seed": [0, 1],
    }
    assert paths(content) == ["badnet-lr_0.1-s0"]


# ---------- which finished run is that of a cell ----------


def finished(cell, records, **changed):
    """Leave the folder of a cell's run as its script would, without running it."""
    Config = grid._config_of(cell)
    options = parsing.parse(Config, cell.words(records)[1:]).plain()
    place = records / cell.path
    files.write_yaml(place / folder.OPTIONS, {**options, "precision": "fp32", **changed})
    victim = {"victim_sha256": "of weights"} if cell.victim else {}
    files.write_json(place / folder.RECORD, {**victim, "files": {folder.WEIGHTS: "of weights"}})


def states(content, records, **extra):
    return list(grid.states(grid.cells(content, extra), records).values())


@pytest.mark.parametrize(
    "content, extra",
    [
        ({"attack": {"badnet": {"lr": ["1e-2"]}}}, {}),  # text in YAML
        ({"attack": {"wanet": {"strength": [1], "cross_ratio": "2"}}}, {}),
        ({"attack": "badnet", "pratio": 1e-1, "seed": "1"}, {"nesterov": "true"}),
        ({"attack": {"badnet": {"precision": None, "width": None}}}, {"momentum": ".9"}),
        ({"attack": {"badnet": {"lr": 0.1}}, "defense": {"ft": {"clean_ratio": "5e-2"}}}, {}),
    ],
)
def test_options_are_compared_as_their_script_reads_them(content, extra, tmp_path):
    cells = grid.cells(content, extra)
    for cell in cells:
        finished(cell, tmp_path)
    assert states(content, tmp_path, **extra) == ["done"] * len(cells)


def test_a_finished_run_with_other_options_is_another_run(tmp_path):
    content = {"attack": "badnet", "dataset": "cifar10", "seed": [0, 1], "defense": "ft"}
    cells = grid.cells(content)
    for cell in cells:
        finished(cell, tmp_path)
    assert states(content, tmp_path) == ["done"] * 4
    assert states(content, tmp_path, device="cpu") == ["done"] * 4, "no part of the experiment"
    assert states(content, tmp_path, precision="fp32") == ["done"] * 4
    assert states(content, tmp_path, precision="bf16") == ["other"] * 4
    assert states(content, tmp_path, lr="0.5") == ["other"] * 4, (
        "the folder's name does not show it"
    )
    finished(cells[0], tmp_path, epochs=3)
    finished(cells[2], tmp_path, random_seed=7)
    assert states(content, tmp_path) == ["other", "done", "other", "done"], (
        "a trial with other options, and another seed"
    )
    finished(cells[0], tmp_path, lr=0.5)
    assert states(content, tmp_path)[1] == "other", "the default rate of ft follows the victim's"
    (tmp_path / cells[3].path / folder.OPTIONS).write_text("a: [")
    assert states(content, tmp_path)[3] == "other"


def test_runs_that_differ_in_seeds_are_parsed_once(tmp_path, monkeypatch):
    content = {"attack": "badnet", "seed": [0, 1, 2], "defense": ["ft", "fmp"]}
    cells = grid.cells(content)
    for cell in cells:
        finished(cell, tmp_path)
    parsed, parse = [], parsing.parse
    monkeypatch.setattr(parsing, "parse", lambda *words: parsed.append(words) or parse(*words))
    assert states(content, tmp_path) == ["done"] * 9
    assert len(parsed) == 3


@pytest.mark.parametrize(
    "path", sorted((ROOT / "config" / "sweep").glob("*.yaml")), ids=lambda path: path.stem
)
def test_grids_that_ship_are_right(path, tmp_path):
    cells = grid.cells(grid.read(path))
    grid.check(cells, tmp_path)
    known = {*names("attack"), *names("defense"), *names("detection")}
    assert {cell.script for cell in cells} <= known
    assert (
        f"| [`{path.name}`]({path.name}) | {len(cells)} |"
        in (path.parent / "README.md").read_text()
    )


def test_the_documented_grid_is_right(tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.S)
    (tmp_path / "grid.yaml").write_text(example)
    cells = grid.cells(grid.read(tmp_path / "grid.yaml"))
    grid.check(cells, tmp_path)
    victims = (
        (2 + 1) * 4 * 3 * 2
    )  # CIFAR-10 with two shares and the digits with one; four attacks, three seeds, two networks
    clean = 2 * 2 * 3
    assert len(cells) == (victims + clean) * (1 + 2 * (1 + 2))


@pytest.fixture
def sweep(tmp_path, places):
    """sweep(content, *arguments, code=0): run a grid in a folder of its own; what it printed.

    Without Ray it is forked, and its runs are: none loads torch.
    """

    def start(content, *arguments, code=0, rest=()):
        command = words(content, *arguments, rest=rest)
        if "serial" in arguments or "--dry_run" in arguments:
            done = fork(list(map(str, command[1:])), cwd=tmp_path, env={}, forks=True)
        else:
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, (
            f"exit {done.returncode} instead of {code}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def words(content, *arguments, rest=()):
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
        return [
            sys.executable,
            ROOT / "sweep.py",
            "grid.yaml",
            *arguments,
            "--",
            *places[2:],
            *rest,
        ]

    start.words = words
    return start


def endings(records):
    """{run: the exit codes in its log}"""
    logs = (records / ".sweep").rglob("*.log")
    return {
        log.relative_to(records / ".sweep").as_posix()[:-4]: re.findall(
            r"^# exit (-?\d+)", log.read_text(), re.M
        )
        for log in logs
    }


def all_complete(records, cells):
    return all(
        (records / cell.path / "record.json").is_file()
        and not (records / cell.path / "state").exists()
        for cell in cells
    )


LONG = "digits-badnet-epochs_100000-width_8-s0"
SMALL = {
    "dataset": "digits",
    "attack": ["badnet", "clean"],
    "attack_options": QUICK,
    "defense": [{"ft": {"epochs": 1}}],
}


def test_one_after_the_other(sweep, tmp_path, places):
    assert (
        "4 runs: 4 new: 2 attacks and 2 defenses" in sweep(SMALL, "--dry_run").stdout
        and not (tmp_path / "record").exists()
    )
    done = sweep(SMALL, "--engine", "serial")
    assert done.stdout.startswith("4 runs: 4 new; 4 to run\n") and done.stdout.endswith(
        "4 runs: 4 done\n"
    )
    assert re.search(
        r"^\[2/4\] digits-badnet-epochs_1-width_8-s0/defense/ft-epochs_1: "
        r"ACC [\d.]+  ASR [\d.]+  RA [\d.]+  \(\d+ s\)$",
        done.stdout,
        re.M,
    )
    cells = grid.cells(SMALL)
    assert all_complete(tmp_path / "record", cells) and set(
        map(tuple, endings(tmp_path / "record").values())
    ) == {("0",)}
    again = sweep(SMALL, "--engine", "serial").stdout
    assert again == "4 runs: 4 done; 0 to run\n4 runs: 4 done\n"
    plan = sweep(SMALL, "--dry_run").stdout
    assert plan.count("done     record/digits-") == 4
    script, *options = grid.cells(SMALL, {"cache_path": places[3]})[1].words("record")
    typed = fork([str(ROOT / script), *options], cwd=tmp_path, env={})
    assert typed.stdout.startswith("already done: record/digits-badnet"), (
        "what is shown is what was run"
    )
    one = {**SMALL, "attack": ["badnet"], "defense": []}
    other = sweep(one, "--engine", "serial", rest=["--batch_size", "32"], code=1)
    assert (
        "1 other" in other.stdout
        and "holds another configuration (batch_size 64 there and 32 here)" in other.stdout
    )


def test_a_table_of_results_outlives_the_records(sweep, tmp_path, run):
    words = ("--engine", "serial", "--results", "all.csv")
    assert sweep(SMALL, *words).stdout.endswith("4 runs: 4 done\n")
    rows = files.read_csv(tmp_path / "all.csv")
    assert [row["run"] for row in rows] == [str(cell.path) for cell in grid.cells(SMALL)]
    for row in rows:
        (made,) = files.read_csv(tmp_path / "record" / row["run"] / "results.csv")
        assert (
            made.items() <= row.items()
            and row["command"].startswith("python ")
            and str(tmp_path) not in row["command"]
        )
    shown = run("compare.py", tmp_path / "record", "--format", "csv").stdout
    assert [
        line.split(",")[8:]
        for line in run("compare.py", tmp_path / "all.csv", "--format", "csv").stdout.splitlines()
    ] == [line.split(",")[8:] for line in shown.splitlines()], (
        "the same numbers as from the folders"
    )
    run("compare.py", tmp_path / "all.csv", "--html", tmp_path / "page.html")

    shutil.rmtree(tmp_path / "record")
    assert sweep(SMALL, *words).stdout == "4 runs: 4 recorded; 0 to run\n4 runs: 4 recorded\n"
    more = {
        **SMALL,
        "defense": [*SMALL["defense"], "clp"],
        "exclude": [{"attack": "clean", "defense": "clp"}],
    }
    again = sweep(more, *words).stdout
    assert again.startswith("5 runs: 2 new, 3 recorded; 2 to run\n"), (
        "the one victim that is needed again, and its missing defense"
    )
    assert len(files.read_csv(tmp_path / "all.csv")) == 5
    victim = next(
        row for row in files.read_csv(tmp_path / "all.csv") if row["run"] == rows[0]["run"]
    )
    assert {key: victim[key] for key in ("acc", "asr", "ra")} == {
        key: rows[0][key] for key in ("acc", "asr", "ra")
    }


@pytest.mark.parametrize("content", [b"", b"acc\n", b"acc\n\xff\n", b"acc\nx\n", b"acc\n1,2\n"])
def test_damaged_results_stop_no_other_run(sweep, tmp_path, content):
    grid_of_two = {"attack": ["badnet", "clean"]}
    cells = grid.cells(grid_of_two)
    for cell in cells:
        finished(cell, tmp_path / "record", cache_path="data/cache")
        place = tmp_path / "record" / cell.path
        results = content if cell is cells[0] else b"acc,asr\n0.5,0.1\n"
        (place / "results.csv").write_bytes(results)
        sums = {name: files.sha256(place / name) for name in ("config.yaml", "results.csv")}
        files.write_json(place / "record.json", {"command": "python a.py --x=-1", "files": sums})
    done = sweep(grid_of_two, "--engine", "serial", "--results", "all.csv", code=1)
    (row,) = files.read_csv(tmp_path / "all.csv")
    assert row == {
        "run": str(cells[1].path),
        "acc": "0.5",
        "asr": "0.1",
        "command": "python a.py --x=-1",
    }
    warning, error = done.stderr.splitlines()
    assert warning.startswith(f"warning: the results of record/{cells[0].path} cannot be read (")
    assert error == (
        "error: the results of 1 runs cannot be read: delete the folders named above, and the same "
        "command makes them again"
    )


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"run\n\xff\n", b"run,acc\n,1\n"])
def test_another_file_is_no_table_of_results(sweep, tmp_path, content):
    (tmp_path / "other.csv").write_bytes(content)
    done = sweep(SMALL, "--engine", "serial", "--results", "other.csv", code=2)
    assert (
        done.stderr.startswith("error: --results other.csv")
        and (tmp_path / "other.csv").read_bytes() == content
    )


def test_a_failure_stops_nothing_but_its_defenses(sweep, tmp_path):
    content = {**SMALL, "attack": [{"badnet": {"lr": 1e30}}, "clean"]}
    done = sweep(content, "--engine", "serial", code=1)
    assert (
        "[1/4] digits-badnet-epochs_1-lr_1e_30-width_8-" in done.stdout.replace("+", "_")
        and "failed with exit code 1: " in done.stdout
    )
    assert "    error: the loss is nan after epoch 1: lower --lr" in done.stdout.replace(
        "inf", "nan"
    )
    assert (
        "not run, because its victim is not done" in done.stdout
        and "1 new, 1 failed, 2 done" in done.stdout
    )
    assert done.stderr == (
        "error: not all runs are done; --retry_failed tries the failed ones again, the others "
        "start with the same command\n"
    )
    before = endings(tmp_path / "record")
    again = sweep(content, "--engine", "serial", code=1)
    assert (
        again.stdout.startswith("4 runs: 1 new, 1 failed, 2 done; 0 to run\n")
        and endings(tmp_path / "record") == before
    )
    sweep(content, "--engine", "serial", "--retry_failed", code=1)
    assert sorted(map(len, endings(tmp_path / "record").values())) == [1, 1, 2]


@pytest.mark.parametrize(
    ("engine", "background"), [("serial", False), ("ray", False), ("ray", True)]
)
def test_ctrl_c_leaves_all_resumable(sweep, tmp_path, engine, background):
    """In the background, where shells have SIGINT ignored, SIGTERM does."""
    at_start = signal.SIG_IGN if background else signal.default_int_handler
    word, code, sent = "interrupted", 130, signal.SIGINT
    if background:
        word, code, sent = "terminated", 143, signal.SIGTERM
    if engine == "ray":
        pytest.importorskip("ray")
    content = {
        "dataset": "digits",
        "attack": ["badnet"],
        "attack_options": {**QUICK, "epochs": 400},
    }
    with subprocess.Popen(
        sweep.words(content, "--engine", engine),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, at_start),
    ) as running:
        until(lambda: list(tmp_path.glob("record/*/state/train.safetensors")))
        running.send_signal(sent)
        begin = time.monotonic()
        _, error = running.communicate(timeout=60)
    assert time.monotonic() - begin < launchers.LEAVE - 5, "the runs were not told"
    assert running.returncode == code, error
    assert error == f"{word}; the same command resumes after the last finished epoch\n"
    assert endings(tmp_path / "record") == {"digits-badnet-epochs_400-width_8-s0": []}
    assert "1 partial" in sweep(content, "--dry_run").stdout
    epochs = (
        len(
            (tmp_path / "record/digits-badnet-epochs_400-width_8-s0/state/log.csv")
            .read_text()
            .splitlines()
        )
        - 1
    )
    assert 0 < epochs < 400
    time.sleep(1)
    running = subprocess.run(
        ["pgrep", "-f", f"cache_path.*{tmp_path.name}|{tmp_path}"], capture_output=True, text=True
    ).stdout
    assert not running, "nothing goes on behind the user's back"


def test_no_time_is_time_that_is_up(sweep, tmp_path):
    """Ray is asked in test_runs_share_a_gpu_and_a_full_disk_is_told."""
    done = sweep(SMALL, "--engine", "serial", "--minutes", "0", code=124)
    assert done.stdout == "4 runs: 4 new; 4 to run\n4 runs: 4 new\n"
    assert done.stderr == "time is up; the same command goes on after the last finished epoch\n"
    assert not endings(tmp_path / "record"), "nothing was started"
    refused = sweep(SMALL, "--engine", "serial", "--minutes", "-1", code=2)
    assert refused.stderr == "error: --minutes must be 0 or more\n"


def test_a_sweep_stops_in_time_and_goes_on(sweep, tmp_path):
    content = {
        "dataset": "digits",
        "attack": ["badnet", "clean"],
        "attack_options": {**QUICK, "epochs": 100_000},
    }
    begin = time.monotonic()
    done = sweep(content, "--engine", "serial", "--minutes", "0.15", code=124)
    assert 9 <= time.monotonic() - begin < 120
    assert done.stdout == (
        f"2 runs: 2 new; 2 to run\nstarted {LONG}: its output goes to record/.sweep/{LONG}.log\n"
        "2 runs: 1 new, 1 partial\n"
    )
    assert (tmp_path / f"record/{LONG}/state/train.safetensors").is_file()
    assert endings(tmp_path / "record") == {LONG: []}, "it is not counted as failed"
    again = sweep(content, "--engine", "serial", "--minutes", "0", code=124)
    assert again.stdout.startswith("2 runs: 1 new, 1 partial; 2 to run\n")


class Moment:
    """A deadline, as a number for time.monotonic, which comes when `has_come()` is true."""

    def __init__(self, has_come):
        self.has_come = has_come

    def __le__(self, now):
        return self.has_come()

    def __sub__(self, now):
        return 0.0 if self.has_come() else 60.0


@pytest.mark.parametrize(
    ("address", "environment", "joined"),
    [(None, {}, "local"), ("auto", {}, "auto"), (None, {"RAY_ADDRESS": "auto"}, "auto")],
)
def test_a_ray_of_its_own_leaves_that_of_another_sweep_alone(
    monkeypatch, address, environment, joined
):
    """Two sweeps on one machine: the second one must not join the first one's."""
    monkeypatch.setattr(launchers.os, "environ", dict(environment))
    ray = mock.Mock()
    with launchers._connected(ray, address):
        pass
    assert ray.init.call_args.args == (joined,)


def test_an_error_of_the_sweep_itself_stops_the_runs(sweep, tmp_path):
    """Its table is no table any more when the short run ends: the long one is stopped."""
    pytest.importorskip("ray")
    content = {
        "dataset": "digits",
        "attack": [{"badnet": {**QUICK, "epochs": 100_000}}, {"clean": QUICK}],
    }
    with subprocess.Popen(
        sweep.words(content, "--results", "all.csv"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        assert running.stdout.readline() == b"2 runs: 2 new; 2 to run\n"
        (tmp_path / "all.csv").write_text("a,b\n1,2\n")
        assert running.wait(timeout=180) == 2
    assert "1 partial, 1 done" in sweep(content, "--dry_run").stdout


def test_a_closed_pipe_ends_the_list_quietly(sweep, tmp_path):
    content = {"attack": "badnet", "seed": list(range(2000))}  # more than a pipe holds
    with subprocess.Popen(
        sweep.words(content, "--dry_run"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as listing:
        assert listing.stdout.readline().startswith(b"new ")
        listing.stdout.close()
        assert listing.stderr.read() == b""


@pytest.mark.parametrize("words", [["--lr"], ["lr", "1"], ["--overwrite", "--lr", "1"]])
def test_what_comes_after_the_dashes_is_pairs(sweep, words):
    refused = sweep({"attack": "badnet"}, "--dry_run", rest=words, code=2)
    assert refused.stderr.startswith("error: after -- come pairs of --option and value")


@pytest.mark.parametrize("word", ["--record_path=x", "--save_folder_name=x", "--result_file=x"])
def test_options_of_the_sweep_itself_are_refused_after_the_dashes(sweep, word):
    refused = sweep({"attack": "badnet"}, "--dry_run", rest=[word], code=2)
    assert refused.stderr.startswith(f"error: the option {word[2:-2]} is the sweep's own")
    assert "lr 0.5" in sweep({"attack": "badnet"}, "--dry_run", rest=["--lr=0.5"]).stdout


def until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)
    return found


def test_two_tries_at_a_job_make_one_run(tmp_path):
    """A machine is given up for dead and is alive: the second try waits, and finds it done."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, time; time.sleep(1); pathlib.Path('out').mkdir(); "
        "pathlib.Path('out/record.json').touch()"
    )
    job = launchers.Job(
        "slow", [str(tmp_path / "slow.py")], tmp_path / "out", tmp_path / "slow.log", tmp_path
    )
    codes = []
    tries = [
        threading.Thread(target=lambda: codes.append(launchers.execute(job))) for _ in range(2)
    ]
    for one in tries:
        one.start()
    for one in tries:
        one.join()
    assert codes == [0, 0] and (tmp_path / "slow.log").read_text().count("# exit 0") == 1


def job_of(tmp_path, code, name="one", **more):
    """A Job whose command runs `code`."""
    (tmp_path / f"{name}.py").write_text(code)
    log = tmp_path / f"{name}.log"
    words = [str(tmp_path / f"{name}.py")]
    size = launchers.log_size(log)
    return launchers.Job(name, words, tmp_path / name, log, tmp_path, log_before=size, **more)


def test_a_log_grows_while_its_run_is_on(tmp_path):
    job = job_of(tmp_path, "import time; print('half'); time.sleep(300)")
    said, seen = [], []

    def stop():
        seen.append(until(lambda: job.log.is_file() and "half" in job.log.read_text(), 20))

    end = Moment(lambda: seen)
    watcher = threading.Thread(target=stop)
    watcher.start()
    with pytest.raises(launchers.TimeIsUp):
        launchers.attempt(job, until=end, say=said.append)
    watcher.join()
    assert seen == [True]
    assert len(said) == 1 and said[0].startswith("started one: its output goes to ")


def test_a_failure_in_another_sweep_is_not_repeated(tmp_path):
    job = job_of(tmp_path, "import sys; sys.exit(3)")
    assert launchers.execute(job) == 3
    assert launchers.execute(job) == 3
    assert job.log.read_text().count("# exit 3") == 1, "the second found it ended"
    assert launchers.execute(job_of(tmp_path, "import sys; sys.exit(4)")) == 4, "asked for anew"


OWNING = """
import pathlib, sys, time
from antidote_bench.utils.launch import guard
from antidote_bench.utils.record import claim
def work():
    with claim.owned(pathlib.Path("one")):
        pathlib.Path("owns").touch()
        time.sleep({seconds})
sys.exit(guard(work))
"""


def test_a_run_of_another_process_is_waited_for(tmp_path):
    """A script that somebody typed owns the folder: its end is waited for, and nothing failed."""
    job = job_of(tmp_path, OWNING.format(seconds=0))
    other = threading.Thread(
        target=lambda: launchers.execute(job_of(tmp_path, OWNING.format(seconds=4), "two"))
    )
    other.start()
    until((tmp_path / "owns").is_file, 30)
    with pytest.raises(launchers.UnderWay):
        launchers.attempt(job)
    with pytest.raises(launchers.TimeIsUp):
        launchers.execute(job, until=time.monotonic())
    said = []
    assert list(launchers.in_order([job], say=said.append)) == [(job, 0)]
    other.join()
    assert said[0] == "waiting: other processes are at work on what is left" and len(said) == 2
    assert job.log.read_text().count("# exit") == 1


def test_a_script_that_finds_its_folder_owned_has_not_failed(tmp_path, monkeypatch):
    """It is owned in the moment between the look at it and the start of the script."""
    monkeypatch.setattr(launchers, "_require_free", lambda place: None)
    job = job_of(tmp_path, OWNING.format(seconds=0))
    with claim.owned(tmp_path / "one"), pytest.raises(launchers.UnderWay):
        launchers.attempt(job)
    assert launchers.last_exit_code(job.log) is None
    assert launchers.execute(job) == 0


def test_what_is_free_is_not_kept_waiting(tmp_path):
    """The defense of a victim that another process trains waits; other runs do not."""
    jobs = [
        job_of(tmp_path, "", "one"),
        job_of(tmp_path, "", "of_one", after="one"),
        job_of(tmp_path, "", "two"),
    ]
    with claim.owned(jobs[0].folder):
        ended = launchers.in_order(jobs)
        assert next(ended) == (jobs[2], 0)
    assert list(ended) == [(jobs[0], 0), (jobs[1], 0)]


def test_two_sweeps_at_once_make_every_run_once(sweep, tmp_path):
    words = sweep.words(SMALL, "--engine", "serial", "--results", "all.csv")
    words, place = list(map(str, words[1:])), {"cwd": tmp_path, "env": {}}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        sweeps = [pool.submit(fork, words, **place, forks=True) for _ in range(2)]
    for one in sweeps:
        done = one.result()
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert done.stdout.endswith("4 runs: 4 done\n")
    cells = grid.cells(SMALL)
    assert all_complete(tmp_path / "record", cells)
    ended = endings(tmp_path / "record")
    assert ended.keys() == {cell.log.relative_to(".sweep").as_posix()[:-4] for cell in cells}
    assert all(codes == ["0"] for codes in ended.values()), "each was run once"
    assert sorted(row["run"] for row in files.read_csv(tmp_path / "all.csv")) == sorted(
        str(cell.path) for cell in cells
    )
    assert not list((tmp_path / "record").rglob("*.lock"))


def test_ray_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install 'ray>=2.40', or use --engine serial"):
        list(launchers.with_ray([]))


def test_ray_runs_a_grid_on_this_machine(sweep, tmp_path):
    pytest.importorskip("ray")
    content = {**SMALL, "attack": ["badnet", {"badnet": {"lr": 1e30}}]}
    done = sweep(content, code=1)
    assert "4 runs: 1 new, 1 failed, 2 done" in done.stdout
    assert sorted(map(tuple, endings(tmp_path / "record").values())) == [("0",)] * 2 + [("1",)]
    assert all_complete(tmp_path / "record", grid.cells({**SMALL, "attack": ["badnet"]}))
    nobody = sweep({**SMALL, "seed": 1}, "--address", "127.0.0.1:1", code=2)
    assert nobody.stderr.startswith("error: no Ray cluster answers at 127.0.0.1:1")


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two nodes that say they have a GPU each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # a dead node is noticed within two seconds instead of half a minute
    quick = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 1000,
        "health_check_failure_threshold": 3,
    }
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick})
    try:
        cluster.nodes = [cluster.add_node(num_cpus=4, num_gpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


STOPPABLE = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path("{name}.checkpoint").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("{name}.begun").touch()
time.sleep({sleep})
"""


@pytest.mark.parametrize("engine", ["serial", "ray"])
def test_the_run_under_way_leaves_a_checkpoint(tmp_path, engine, request):
    at = {"address": request.getfixturevalue("cluster").address} if engine == "ray" else {}
    for name, sleep in (("short", 0), ("long", 300)):
        (tmp_path / f"{name}.py").write_text(STOPPABLE.format(name=name, sleep=sleep))
    jobs = [
        launchers.Job(
            name,
            [str(tmp_path / f"{name}.py")],
            tmp_path / name,
            tmp_path / f"{name}.log",
            tmp_path,
        )
        for name in ("short", "long")
    ]
    ended = []
    end = Moment(lambda: ended and (tmp_path / "long.begun").exists())
    with pytest.raises(launchers.TimeIsUp, match="the same command goes on"):
        for job, code in launchers.LAUNCHERS[engine](jobs, until=end, **at):
            ended.append((job.name, code))
    assert ended == [("short", 0)]
    assert until((tmp_path / "long.checkpoint").is_file, 10)
    assert not (tmp_path / "short.checkpoint").exists()


WAITS_FOR_A2 = """
import pathlib, time
while not pathlib.Path("a2.log").exists():
    time.sleep(0.1)
"""


def test_the_first_in_order_is_next_whatever_it_waited_for(cluster, tmp_path):
    """There is room for two runs: the defenses of a victim are not behind other victims."""
    names = {"a": None, "a1": "a", "a2": "a", "b": None, "c": None, "c1": "c"}
    codes = {"c": "import sys; sys.exit(3)", "b": WAITS_FOR_A2}
    jobs = [
        job_of(tmp_path, codes.get(name, ""), name, after=after) for name, after in names.items()
    ]
    said = []
    done = launchers.with_ray(jobs, address=cluster.address, cpus=4, gpus=0, say=said.append)
    results = {job.name: code for job, code in done}
    started = [re.findall(r"^started (\w+)", line)[0] for line in said]
    assert results == {"a": 0, "a1": 0, "a2": 0, "b": 0, "c": 3, "c1": None}
    assert sorted(started[:2]) == ["a", "b"] and started[2:] == ["a1", "a2", "c"]


def test_runs_share_a_gpu_and_a_full_disk_is_told(cluster, tmp_path):
    """Half of a GPU is asked for."""
    (tmp_path / "look.py").write_text(
        "import os; names = ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS'); "
        "print('sees', *map(os.environ.get, names))"
    )
    (tmp_path / "full").symlink_to("/dev/full")
    jobs = [
        launchers.Job(
            str(n), [str(tmp_path / "look.py")], tmp_path / "none", tmp_path / f"{n}.log", tmp_path
        )
        for n in range(4)
    ]
    start = functools.partial(launchers.with_ray, address=cluster.address)
    with pytest.raises(launchers.TimeIsUp):
        list(start(jobs, until=time.monotonic()))
    assert not list(tmp_path.glob("*.log")), "nothing was started"
    assert [code for _, code in start(jobs, cpus=2, gpus=0.5)] == [0] * 4
    assert {
        re.findall(r"^sees .*", (tmp_path / f"{n}.log").read_text(), re.M)[0] for n in range(4)
    } == {"sees 0 2"}
    with pytest.raises(ConfigError, match="no machine has 2 GPUs for a run: lower --gpus"):
        list(start(jobs, gpus=2))
    jobs = [dataclasses.replace(jobs[0], log=tmp_path / "full")]
    with pytest.raises(OSError, match="No space left"):
        list(start(jobs))


def test_runs_survive_the_death_of_a_node(cluster, sweep, tmp_path):
    """A run on each node; one is killed while it trains: all runs end done, and none twice."""
    content = {
        **SMALL,
        "seed": [0, 1],
        "attack": ["badnet"],
        "attack_options": {"width": 8, "epochs": 20},
        "defense": [],
    }
    here = ("--address", cluster.address, "--gpus", "1")
    refused = sweep(content, *here, "--cpus", "1000", code=2)
    assert refused.stderr == "error: no machine has 1000 CPUs for a run: lower --cpus\n"
    with subprocess.Popen(
        sweep.words(content, *here),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        until(lambda: len(list(tmp_path.glob("record/*/state/train.safetensors"))) == 2)
        cluster.remove_node(cluster.nodes[1], allow_graceful=False)
        out, error = running.communicate(timeout=600)
    assert running.returncode == 0, f"{out}\n{error}"
    assert out.endswith("2 runs: 2 done\n") and all_complete(
        tmp_path / "record", grid.cells(content)
    )
    assert all(codes.count("0") == 1 for codes in endings(tmp_path / "record").values())
    tries = {
        log.stem: log.read_text().count(" on ")
        for log in (tmp_path / "record/.sweep").rglob("*.log")
    }
    assert sum(count > 1 for count in tries.values()) == 1, (
        "the run of the node that died was started again"
    )
    (again,) = (tmp_path / "record" / name for name, count in tries.items() if count > 1)
    assert (again / "log.csv").read_text().count("\ntrain,20,") == 1
