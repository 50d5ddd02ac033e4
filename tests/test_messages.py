"""What a user may type or write into a file by mistake: one sentence, the right exit code, no hang;
and what ends a script from outside."""

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from antidote_bench.attack.badnet import Config as BadNet
from antidote_bench.attack.wanet import Config as WaNet
from antidote_bench.defense.ft import Config as FT
from antidote_bench.defense.trap_and_replace import Config as TrapAndReplace
from antidote_bench.utils import backdoorbench, config, parsing
from antidote_bench.utils.config import Attack
from antidote_bench.utils.errors import ConfigError, RefusedError
from antidote_bench.utils.exchange.options import FromWeights
from antidote_bench.utils.record import results
from tests.helpers import ROOT, names


def parse(*words, of=BadNet):
    return parsing.parse(of, [str(word) for word in words])


def sentence(*words, of=BadNet, error=ConfigError):
    """The message of a mistake, which is one line and short, and the time it took is short too."""
    begun = time.monotonic()
    with pytest.raises(error) as caught:
        parse(*words, of=of)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500 and "jsonargparse" not in text
    assert time.monotonic() - begun < 20
    return text


# ---------- text stays text ----------

TEXTS = ["#x", "&x", "*x", "!x", "2024", "0123", "1e3", "no", "on", "2024-01-01", "a: b", "[x]"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_a_flag_is_taken_as_it_is(text):
    for name in ("save_folder_name", "dataset_name", "trigger_path", "dataset_path"):
        assert getattr(parse(f"--{name}={text}"), name) == text
        assert getattr(parse(f"--{name}", text), name) == text


@pytest.mark.parametrize("text", ["2024", "0123", "1e3", "no", "on", "2024-01-01", "'#x'", "'&x'"])
def test_text_of_a_file_is_taken_as_it_is(text, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(f"save_folder_name: {text}\ntrigger_path: null\n")
    found = parse("--yaml_path", file)
    assert (found.save_folder_name, found.trigger_path) == (text.strip("'"), None)


def test_a_flag_of_true_or_false_may_stand_alone():
    assert parse("--download", "--nesterov", "false", "--epochs", 3).download is True
    assert parse("--download=no").download is False
    repair = parse("--result_file", "x", "--allow_other_data", of=FT)
    assert repair.allow_other_data and not parse("--result_file", "x", of=FT).allow_other_data


# ---------- files of options ----------

NINTH_POWER = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGED = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10)
)
BAD_FILES = {
    "empty": (b"", "must hold options"),
    "comment": (b"# nothing\n", "must hold options"),
    "list": (b"- 1\n", "must hold options"),
    "word": (b"hello\n", "must hold options"),
    "broken": (b"[1", "no YAML"),
    "two": (b"epochs: 1\n---\nepochs: 2\n", "single document"),
    "latin1": ("trigger_path: b\xe4r.png\n".encode("latin-1"), "not UTF-8"),
    "utf16": ("epochs: 3\n".encode("utf-16"), "not UTF-8"),
    "nul": (b"epochs: 3\0\n", "no YAML"),
    "number": (b"1: 2\n", "unknown option '1'"),
    "null": (b"null: 2\n", "a key is no text"),
    "list as key": (b"[1]: 2\n", "a key is no text"),
    "tag": (b"lr: !!float x\n", "lr must be a number, not 'x'"),
    "time": (b"lr: !!timestamp x\n", "lr must be a number, not 'x'"),
    "call": (b"lr: !!python/object/apply:os.getcwd []\n", "'lr' must have one value"),
    "ninth": (NINTH_POWER.encode(), "'a0' must have one value"),
    "merged": (MERGED.encode(), "'a0' must have one value"),
    "itself": (b"epochs: &a [*a]\n", "'epochs' must have one value"),
    "all of itself": (b"&a {epochs: *a}\n", "'epochs' must have one value"),
    "deep": (b"[" * 90_000, "nested too deeply"),
    "large": (b"epochs: 3\n" * 20_000, "larger than 100 kB"),
    "nothing": (b"cache_path:\n", "cache_path must be text"),
    "none": (b"epochs: null\n", "epochs must be a whole number"),
    "nul in a name": (b'save_folder_name: "a\\0b"\n', "without the character NUL"),
    "values": (b"lr: [0.1]\n", "'lr' must have one value"),
    "nan": (b"lr: nan\n", "lr must be a number, not 'nan'"),
    "switch": (b"overwrite: maybe\n", "overwrite must be true or false"),
    "file": (b"yaml_path: b.yaml\n", "yaml_path is a flag"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_of_options_is_named(name, tmp_path):
    content, expected = BAD_FILES[name]
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    said = sentence("--yaml_path", file)
    assert expected in said and str(file) in said


def test_a_file_of_options_that_cannot_be_opened(tmp_path):
    assert str(tmp_path) in sentence("--yaml_path", tmp_path)
    assert "nowhere.yaml" in sentence("--yaml_path", "nowhere.yaml")
    assert "cannot be read" in sentence("--yaml_path", "a\0b")
    assert "--yaml_path" in sentence("--yaml_path")


def test_a_file_may_come_through_a_pipe_and_begin_with_a_mark():
    reader, writer = os.pipe()
    os.write(writer, b"\xef\xbb\xbfepochs: 3\n")
    os.close(writer)
    try:
        assert parse("--yaml_path", f"/dev/fd/{reader}").epochs == 3
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: .nan", "lr must be"),
        ("lr: .inf", "lr must be"),
        ("lr: -1", "lr must be"),
        ("epochs: -1", "epochs must be"),
        ("epochs: 1e30", "epochs must be a whole number"),
        (f"epochs: 1{30 * '0'}", "epochs must be a number of at most 18 digits"),
        (f"patch_row: -1{400 * '0'}", "patch_row must be a number of at most 18 digits"),
        (f"poison_seed: 1{9000 * '0'}", "poison_seed must be a whole number"),
    ],
)
def test_numbers_that_are_none(text, expected, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert expected in sentence("--yaml_path", file)
    assert expected in sentence("--" + text.replace(": ", "="))


@pytest.mark.parametrize(
    "content",
    ["attack: [1]", "attack: {lr: [1]}", "- attack", "attack: {lr: {a: 1}}", "", "attack: x", "["],
)
def test_a_bad_file_of_a_data_set(content, tmp_path, monkeypatch):
    (tmp_path / "config/dataset").mkdir(parents=True)
    (tmp_path / "config/recipe").symlink_to(ROOT / "config/recipe")
    (tmp_path / "config/dataset/own.yaml").write_text(content)
    monkeypatch.setattr(config, "ROOT", tmp_path)
    said = sentence("--dataset", "own")
    expected = "attack, defense and detection", "lr must have one value"
    assert "config/" in said and any(words in said for words in expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: [1]", None),
        ("lr: .nan", "lr must be"),
        ("epochs: x", "wrong type"),
        ("pad: -1", "pad"),
    ],
)
def test_a_victims_recipe_is_not_trusted(text, expected, tmp_path):
    (tmp_path / "config.yaml").write_text(f"dataset: cifar10\n{text}\n")
    Config = importlib.import_module("antidote_bench.defense.spectral").Config
    words = ["--result_file", tmp_path]
    if expected is None:  # cannot be read: said when the record is opened
        assert parse(*words, of=Config).lr == 0.01
    else:
        assert expected in sentence(*words, of=Config, error=RefusedError)


def test_what_a_later_option_overrides_must_be_right_too(tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: few\n")
    assert "a.yaml: epochs" in sentence("--yaml_path", tmp_path / "a.yaml", "--epochs", 3)
    assert "not 'many'" in sentence("--epochs", "many", "--epochs", 3)


# ---------- names ----------


@pytest.mark.parametrize(
    "name",
    [
        "state",
        "defense",
        ".shared",
        ".sweep",
        ".x",
        ".",
        "..",
        "",
        "a/b",
        "a\\b",
        "a\nb",
        256 * "x",
    ],
)
def test_folder_names_that_no_reader_finds(name):
    for Config, more in ((BadNet, []), (FT, ["--result_file", "x"])):
        assert "save_folder_name" in sentence(f"--save_folder_name={name}", *more, of=Config)


def test_a_data_set_has_a_name_in_results():
    assert parse("--dataset_name", "signs").dataset_name == "signs"
    assert parse("--dataset_name", "signs").identity() == parse().identity()
    assert "dataset_name" in sentence("--dataset_name", "two\nlines")
    assert "dataset_name" in sentence("--dataset_name", " ")


# ---------- options without effect ----------

WITHOUT_EFFECT = [
    (["--warmup", "0.5"], "schedule", "one_cycle"),
    (["--muon_lr", "0.1"], "optimizer", "muon"),
    (["--small_size", "20"], "small_share", "0.5"),
    (["--attack_target", "3", "--label_mode", "all2all"], "label_mode", "all2one"),
]


@pytest.mark.parametrize(("words", "other", "value"), WITHOUT_EFFECT)
def test_a_flag_without_effect_is_refused(words, other, value, tmp_path):
    said = sentence(*words)
    assert f"{words[0]} has no effect" in said and f"--{other}" in said
    parse(*words[:2], f"--{other}", value)
    assert parse(*[*words[:1], config.default_of(BadNet, words[0][2:]), *words[2:]])  # says nothing
    # written in a file, as in every config.yaml, it makes no other run of it
    (tmp_path / "a.yaml").write_text(
        "\n".join(f"{name[2:]}: {text}" for name, text in zip(words[::2], words[1::2], strict=True))
    )
    usual, found = parse(*words[2:]), parse("--yaml_path", tmp_path / "a.yaml")
    assert found == usual
    saved = {**usual.plain(), words[0][2:]: float(words[1])}
    assert BadNet.identity_of(saved) == usual.identity()


def test_the_command_leaves_out_what_has_no_effect():
    given = dataclasses.replace(parse("--label_mode", "all2all"), attack_target=3)
    assert parsing.command("attack/badnet.py", given) == (
        "python attack/badnet.py --label_mode all2all"
    )


def test_an_option_may_need_another_to_be_absent():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(Attack):
        trigger_path: str | None = None
        """a file"""
        grey: int = config.option(255, needs={"trigger_path": None})
        """a level"""

    assert parse("--grey", 3, of=Own).grey == 3
    assert "--grey has no effect with --trigger_path" in sentence(
        "--grey", 3, "--trigger_path", "x", of=Own
    )


def test_hashes_of_runs_stay_as_they_were():
    """Digests that runs had before options without effect were looked at."""
    known = {
        name: config.digest(
            {
                key: value
                for key, value in dataclasses.asdict(parse(*words, of=Config)).items()
                if config.declared(Config, key, "identity") is True
            }
        )
        for name, Config, words in (
            ("attack", BadNet, ["--dataset", "cifar10"]),
            ("fast", BadNet, ["--recipe", "fast"]),
            ("airbench", BadNet, ["--recipe", "airbench", "--model", "airbench"]),
            ("defense", FT, ["--result_file", "x"]),
        )
    }
    assert known == {
        "attack": config.digest(parse("--dataset", "cifar10").identity()),
        "fast": config.digest(parse("--recipe", "fast").identity()),
        "airbench": config.digest(parse("--recipe", "airbench", "--model", "airbench").identity()),
        "defense": config.digest(parse("--result_file", "x", of=FT).identity()),
    }


def test_another_data_set_makes_another_run():
    usual, other = (
        parse("--result_file", "x", *more, of=FT) for more in ([], ["--allow_other_data"])
    )
    assert "allow_other_data" not in usual.identity() and other.plain()["allow_other_data"] is True
    assert usual.identity() != other.identity()


# ---------- BackdoorBench's options ----------


def test_options_of_backdoorbench_with_the_same_meaning(tmp_path, capsys):
    words = "--wd 1e-3 --sgd_momentum 0.8 --client_optimizer sgd --lr_scheduler CosineAnnealingLR "
    words += "--attack_label_trans all2all --amp False --num_workers 4 --pin_memory True "
    words += "--steplr_milestones 50 75 --epochs 3"
    ours = "--weight_decay 1e-3 --momentum 0.8 --optimizer sgd --schedule cosine "
    ours += "--label_mode all2all --precision fp32 --epochs 3"
    assert parse(*words.split()) == parse(*ours.split())
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert warning.endswith(": num_workers, pin_memory, steplr_milestones\n")
    (tmp_path / "a.yaml").write_text("wd: 0.001\namp: True\nsteplr_milestones: \nprefetch: False\n")
    found = parse("--bd_yaml_path", tmp_path / "a.yaml", "--wd", "0.1")
    assert (found.weight_decay, found.precision) == (0.1, "auto")
    assert capsys.readouterr().err.endswith(": steplr_milestones, prefetch\n")
    assert parse("--amp").precision == "auto" and not capsys.readouterr().err
    wanet = parse("--s", "0.75", "--k", "8", of=WaNet)
    assert (wanet.strength, wanet.grid_points) == (0.75, 8)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--patch_mask_path", "x.png"], "--trigger_path"),
        (["--seed", "3"], "--random_seed"),
        (["--ratio", "0.1"], "unknown option 'ratio'"),
        (["--s", "0.1"], "unknown option 's'"),
        (["--lr_scheduler", "StepLR"], "schedule must be cosine or one_cycle, not 'StepLR'"),
        (["--client_optimizer", "adam"], "optimizer must be sgd or muon, not 'adam'"),
    ],
)
def test_options_of_backdoorbench_with_another_meaning(words, expected):
    assert expected in sentence(*words)


def test_options_of_backdoorbench_for_a_defense(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("dataset: cifar10\nmodel: resnet9\n")
    record = ["--result_file", tmp_path]
    words = ["--ratio", "0.1", "--dataset", "cifar10", "--model", "resnet9", "--target_label", "0"]
    assert parse(*record, *words, of=FT) == parse(*record, "--clean_ratio", "0.1", of=FT)
    assert capsys.readouterr().err.endswith(": dataset, model, target_label\n")
    for other in (["--dataset", "gtsrb"], ["--model", "vgg19_bn"]):
        assert "of the record is" in sentence(*record, *other, of=FT)
    assert "--data_seed" in sentence(*record, "--index", "x.txt", of=FT)
    assert parse(*record, "--model", "wrn16_1_leaky", of=TrapAndReplace).model == "wrn16_1_leaky"


FIELDS = FT.__dataclass_fields__.keys()


def test_every_alias_is_of_an_option_that_exists():
    known = {
        name: importlib.import_module(f"antidote_bench.{folder}.{name}").Config.__dataclass_fields__
        for folder in ("attack", "defense")
        for name in names(folder)
    }
    known["convert"] = FromWeights.__dataclass_fields__
    everywhere = {option for fields in known.values() for option in fields} | {"yaml_path"}
    assert set(backdoorbench.ALIASES.values()) <= everywhere
    for script, aliases in backdoorbench.OWN_ALIASES.items():
        assert set(aliases.values()) <= set(known[script]), script
    for options in known.values():  # an option of this project is never passed over
        assert not {*backdoorbench.IGNORED, *backdoorbench.ALIASES} & set(options)


@pytest.mark.parametrize("option", sorted(backdoorbench.OTHERWISE.keys() & FIELDS))
def test_an_option_that_is_called_otherwise_elsewhere_is_taken_where_it_exists(option):
    value = getattr(FT, option)
    assert parse("--result_file", "x", f"--{option}", value, of=FT) == parse(
        "--result_file", "x", of=FT
    )


# ---------- readers that leave, and signals ----------

BEGIN = f"import signal, sys, time, os; sys.path.insert(0, {str(ROOT)!r})\n"
BEGIN += "from antidote_bench.utils.launch import guard, obey_signals\n"


def script(tmp_path, body):
    file = tmp_path / "script.py"
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    file.write_text(f"{BEGIN}def work():\n{lines}\nsys.exit(guard(work))\n")
    return [sys.executable, str(file)]


@pytest.mark.parametrize(
    ("ending", "code"),
    [("pass", 0), ("raise ValueError('x')", 1), ("print('the last line', end='')", 0)],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_changes_nothing(ending, code, unbuffered, tmp_path):
    body = "print('one', flush=True)\nfor _ in range(20000): print('more')\n"
    body += "open('done', 'w').close()\n" + ending
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(
        script(tmp_path, body),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment,
    ) as process:
        assert process.stdout.readline() == b"one\n"
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(60) == code
    assert "BrokenPipe" not in said and "Traceback" not in said
    assert (tmp_path / "done").exists(), "the work goes on to its end"


def test_help_into_a_pipe_that_is_closed():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "attack/badnet.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("ignored", "how", "code", "word"),
    [
        (True, signal.SIGTERM, 143, "terminated"),
        (False, signal.SIGTERM, 143, "terminated"),
        (False, signal.SIGINT, 130, "interrupted"),
    ],
)
def test_signals_end_a_script(ignored, how, code, word, tmp_path):
    """SIGINT is ignored in what a shell that is not interactive starts in the background."""
    usual = signal.SIG_IGN if ignored else signal.default_int_handler
    body = "print('ready', flush=True)\ntime.sleep(60)"
    with subprocess.Popen(
        script(tmp_path, body),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, usual),
    ) as process:
        assert process.stdout.readline() == "ready\n"
        if ignored:
            process.send_signal(signal.SIGINT)
        process.send_signal(how)
        said = process.stderr.read()
        assert process.wait(60) == code
    assert said == f"{word}; the same command resumes after the last finished epoch\n"


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("end", ["obey_signals()", "raise ValueError('a damaged file')"])
def test_a_signal_that_was_swallowed_is_obeyed(number, end, tmp_path):
    body = f"try:\n    os.kill(os.getpid(), signal.{number})\n    time.sleep(60)\n"
    body += f"except BaseException:\n    pass\n{end}\nos._exit(7)"
    command = script(tmp_path, body)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == {"SIGTERM": 143, "SIGINT": 130}[number]
    assert "the same command resumes" in done.stderr and "damaged" not in done.stderr


def test_a_record_from_before_runs_again(tmp_path):
    """All options of a config.yaml, with values that have no effect, are taken as they are."""
    options = dataclasses.asdict(parse())
    old = {key: value for key, value in options.items() if key not in {"dataset_name"}}
    old |= {"warmup": 0.3, "muon_lr": 0.1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert parse("--yaml_path", tmp_path / "config.yaml") == parse()
    assert results.recipe(parse()) == results.recipe(parse("--yaml_path", tmp_path / "config.yaml"))
