"""Options: what overrides what, and one sentence with the right exit code for every mistake."""

import dataclasses
import importlib
import itertools
import re
import shlex

import pytest
import yaml

from antidote_bench.attack.badnet import Config as BadNet
from antidote_bench.defense.fmp import Config as FMP
from antidote_bench.utils import config, files, parsing
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.record import results
from antidote_bench.utils.repair.options import RetrainingOptions
from tests.helpers import ROOT, names

FOLDERS = ("attack", "defense", "detection")


def parse(*argv, of=BadNet):
    return parsing.parse(of, [str(word) for word in argv])


def test_flags_win_over_yaml_over_data_set_over_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("lr: 0.2\nepochs: 4\n")
    assert parse("--dataset", "cifar10").epochs == 100
    digits = yaml.safe_load((ROOT / "config/recipe/backdoorbench.yaml").read_text())["digits"]
    assert parse().epochs == digits["epochs"] != 100
    found = parse("--epochs", 7, "--yaml_path", file)  # the flag stands first and still wins
    assert (found.epochs, found.lr, found.batch_size) == (7, 0.2, digits["batch_size"])
    assert parse(f"--yaml_path={file}").epochs == 4


def test_the_recipe_of_the_protocol_is_what_is_done_without_one():
    recipe = yaml.safe_load((ROOT / "config/recipe/backdoorbench.yaml").read_text())
    defaults = {field.name: field.default for field in dataclasses.fields(BadNet)}
    assert defaults.items() >= {**recipe["all"], "recipe": "backdoorbench"}.items()
    assert [parse("--dataset", name).epochs for name in ("cifar10", "gtsrb", "tiny")] == [
        100,
        50,
        200,
    ]


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "config/recipe").glob("*.yaml"))
)
def test_recipes(name, tmp_path):
    recipe = yaml.safe_load((ROOT / f"config/recipe/{name}.yaml").read_text())
    for dataset in ("cifar10", "digits"):
        found = parse("--recipe", name, "--dataset", dataset)
        assert (
            vars(found).items()
            >= {**recipe["all"], **recipe.get(dataset, {}), "recipe": name}.items()
        )
        assert name in results.recipe(
            found
        ) and f"lr {found.lr} epochs {found.epochs} batch {found.batch_size}" in results.recipe(
            found
        )
    file = tmp_path / "a.yaml"
    file.write_text(f"recipe: {name}\ndataset: cifar10\nlr: 0.7\n")
    found = parse("--yaml_path", file, "--epochs", 3)
    assert (found.recipe, found.lr, found.epochs, found.batch_size) == (
        name,
        0.7,
        3,
        recipe["all"]["batch_size"],
    )


def test_recipes_have_different_names_in_the_results():
    plain = parse("--dataset", "cifar10")
    changes = [
        {"lr_min": 0.001},
        {"nesterov": True},
        {"label_smoothing": 0.1},
        {"pad": 2},
        {"schedule": "one_cycle"},
        {"momentum": 0.8},
        {"recipe": "fast"},
        {"epochs": 3},
        {"batch_size": 5},
        {"weight_decay": 0.1},
        {"optimizer": "muon"},
        {"optimizer": "muon", "muon_lr": 0.1},
        {"bias_lr_scale": 2.0},
        {"padding": "reflect"},
        {"flip": "alternating"},
        {"small_share": 0.5},
        {"small_share": 0.5, "small_size": 20},
        {"crop": "resized"},
        {"crop": "resized", "crop_area": 0.5},
        {"mirror": True},
        {"mirror": False},
    ]
    texts = [results.recipe(dataclasses.replace(plain, **change)) for change in [{}, *changes]]
    assert len(set(texts)) == len(texts)
    assert texts[0] == "backdoorbench: sgd lr 0.01 epochs 100 batch 128 decay 0.0005"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "there is no recipe 'own': config/recipe has backdoorbench"),
        ("epochs: 3", "must be YAML with a section"),
        (
            "all: {epoch: 3}",
            "config/recipe/own.yaml names 'epoch', which is no option of an attack",
        ),
        ("all: {epochs: many}", "a value in the files of config/ has the wrong type"),
        (":", "must be YAML"),
    ],
)
def test_bad_recipes(text, sentence, tmp_path, monkeypatch):
    (tmp_path / "config/recipe").mkdir(parents=True)
    (tmp_path / "config/recipe/backdoorbench.yaml").touch()
    if text:
        (tmp_path / "config/recipe/own.yaml").write_text(text)
    monkeypatch.setattr(config, "ROOT", tmp_path)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        parse("--recipe", "own")


def test_yaml_may_name_the_data_set(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("dataset: digits\n")
    assert parse("--yaml_path", file).width == 16
    file.write_text("dataset: cifar10\n")
    assert parse("--yaml_path", file).width is None


def test_a_width_belongs_to_its_model():
    assert (parse().model, parse().width, parse("--model", "resnet9").width) == ("resnet9", 16, 16)
    assert (
        parse("--model", "preactresnet18").width is None
        and parse("--model", "resnet9", "--width", "8").width == 8
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--pration", "0.1"], "'pration'; the nearest are pratio"),
        (["--epochs", "many"], "epochs"),
        (["--epochs", "2.5"], "epochs"),
        (["--pratio", "1.5"], "pratio must be from 0 to 1"),
        (["--pratio", "-0.1"], "pratio"),
        (["--label_mode", "all2some"], "label_mode"),
        (["--attack_target", "-1"], "attack_target"),
        (["--lr", "0"], "lr must be above 0"),
        (["--warmup", "1.5"], "warmup must be from 0 to 1"),
        (["--nesterov", "true", "--momentum", "0"], "momentum must be above 0"),
        (["--schedule", "linear"], "schedule"),
        (["--label_smoothing", "1"], "label_smoothing must be"),
        (["--pad", "-1"], "pad must be"),
        (["--resident_gb", "-1"], "resident_gb must be"),
        (["--compile", "true"], "compile"),
        (["--batch_size", "0"], "batch_size"),
        (["--save_folder_name", "../x"], "save_folder_name"),
        (["--patch_value", "300"], "patch_value"),
        (["--yaml_path", "nowhere.yaml"], "nowhere.yaml"),
        (["--epo", "3"], "'epo'; the nearest are"),
        (["stray"], "stray"),
    ],
)
def test_mistakes(words, sentence):
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epoch: 3", "'epoch'; the nearest are epochs"),
        ("epochs: x", "epochs"),
        ("[1", "parsing"),
        ("- 1", ""),
    ],
)
def test_mistakes_in_yaml(tmp_path, text, sentence):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse("--yaml_path", file)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_written_runs_again(tmp_path):
    file, first = (
        tmp_path / "config.yaml",
        parse("--lr", "1e-3", "--patch_row", "-4", "--random_seed", 5),
    )
    file.write_text(yaml.safe_dump(first.plain()))
    assert parse("--yaml_path", file) == first


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--dataset", "cifar10"],
        ["--recipe", "fast", "--dataset", "cifar10", "--lr", "1e-3", "--nesterov", "true"],
        ["--width", "null", "--recipe", "fast", "--nesterov", "false", "--random_seed", 5],
        ["--patch_row", "-4", "--pratio", "0.05"],
        [
            "--dataset",
            "folder",
            "--dataset_path",
            "my 'own' signs; $x",
            "--trigger_path",
            "-a b.png",
            "--image_size",
            48,
        ],
    ],
)
def test_the_command_makes_the_same_options_again(words):
    first = parse(
        *(
            f"--trigger_path={word}" if word == "-a b.png" else word
            for word in words
            if word != "--trigger_path"
        )
    )
    python, script, *again = shlex.split(parsing.command("attack/badnet.py", first))
    assert (python, script) == ("python", "attack/badnet.py") and parse(*again) == first
    assert bool(again) == bool(words), "what the recipe and the data set say is not repeated"


@pytest.mark.parametrize(
    ("folder", "name"),
    [(folder, name) for folder in ("defense", "detection") for name in names(folder)],
)
def test_the_command_of_a_method_makes_the_same_options_again(folder, name, tmp_path):
    (tmp_path / "a victim").mkdir()
    (tmp_path / "a victim" / "config.yaml").write_text("dataset: digits\n")
    Config = __import__(f"antidote_bench.{folder}.{name}", fromlist=["Config"]).Config
    places = ["--result_file", "a victim", "--record_path", tmp_path]
    for words in (
        [],
        ["--yaml_path", ROOT / f"config/{folder}/{name}.yaml"],
        ["--clean_count", 7, "--device", "cpu", "--data_seed", 3],
    ):
        first = parse(*places, *words, of=Config)
        assert parse(*shlex.split(parsing.command("x.py", first))[2:], of=Config) == first


def test_identity_ignores_places_and_keeps_the_rest():
    one, other = (
        parse("--device", "cpu", "--record_path", "a"),
        parse("--dataset_path", "b", "--overwrite"),
    )
    assert one.identity() == other.identity()
    assert parse("--poison_seed", 1).identity() != one.identity()
    assert parse("--poison_seed", 1).identity(seeds=False) == one.identity(seeds=False)
    assert config.digest(parse("--patch_size", 2).identity()) != config.digest(one.identity())


def test_a_defense_needs_a_record():
    with pytest.raises(ConfigError, match="result_file"):
        parse(of=FMP)


@pytest.mark.parametrize(
    ("folder", "name"), [(folder, name) for folder in FOLDERS for name in names(folder)]
)
def test_every_script_has_a_yaml_that_only_overrides(folder, name):
    script = __import__(f"antidote_bench.{folder}.{name}", fromlist=["Config"])
    file = ROOT / "config" / folder / f"{name}.yaml"
    given = yaml.safe_load(file.read_text())
    parse(
        "--yaml_path",
        file,
        *(["--result_file", "x"] if folder != "attack" else []),
        of=script.Config,
    )
    defaults = {field.name: field.default for field in dataclasses.fields(script.Config)}
    assert given and not {key for key, value in given.items() if defaults[key] == value}, (
        "a value has one source"
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "config" / "dataset").glob("*.yaml")), ids=lambda path: path.stem
)
def test_data_set_options_exist(path):
    known = {
        folder: {
            f.name
            for name in names(folder)
            for f in dataclasses.fields(
                __import__(f"antidote_bench.{folder}.{name}", fromlist=["Config"]).Config
            )
        }
        for folder in FOLDERS
    }
    for section, options in yaml.safe_load(path.read_text()).items():
        own = {name: part for name, part in options.items() if isinstance(part, dict)}
        assert options.keys() - own.keys() <= known[section]
        for name, part in own.items():
            fields = {
                field.name: field
                for field in dataclasses.fields(
                    __import__(f"antidote_bench.{section}.{name}", fromlist=["Config"]).Config
                )
            }
            assert part and all(fields[key].default != value for key, value in part.items())


def test_yaml_says_the_same_without_libyaml(tmp_path):
    paths = sorted((ROOT / "config").rglob("*.yaml"))
    assert len(paths) > 30
    for path in paths:
        assert files.read_yaml(path) == files.read_yaml(path, yaml.SafeLoader)
    deep = tmp_path / "deep.yaml"
    for depth, loader in itertools.product((100, 101), (files.YAML_LOADER, yaml.SafeLoader)):
        deep.write_text("[" * depth + "]" * depth)
        if depth > files.DEEPEST_YAML:
            with pytest.raises(ValueError, match="nested too deeply"):
                files.read_yaml(deep, loader)
        else:
            assert len(files.read_yaml(deep, loader)) == 1
    deep.write_text("")
    assert files.read_yaml(deep) is None


def test_a_data_set_has_options_for_one_method(tmp_path):
    (tmp_path / "config.yaml").write_text("dataset: gtsrb")
    sam, plain = (
        __import__(f"antidote_bench.defense.{name}", fromlist=["Config"]).Config
        for name in ("ft_sam", "ft")
    )
    made = parse("--result_file", tmp_path, of=sam)
    assert (made.rho, made.label_smoothing) == (8, 0) and parse(
        "--result_file", tmp_path, "--rho", 1, of=sam
    ).rho == 1
    assert parse("--result_file", tmp_path, of=plain) == plain(result_file=str(tmp_path))
    (tmp_path / "config.yaml").write_text("dataset: cifar10")
    assert parse("--result_file", tmp_path, of=sam) == sam(result_file=str(tmp_path))


def test_every_option_is_documented(capsys):
    for folder in FOLDERS:
        for name in names(folder):
            Config = __import__(f"antidote_bench.{folder}.{name}", fromlist=["Config"]).Config
            text = parsing._parser(Config, "", "x").format_help()
            for field in dataclasses.fields(Config):
                described = re.search(
                    rf"--{field.name}\b[^\n]*?(  |\n)\s*(?P<text>.+?)\((type|default|required)",
                    text[text.index("options:") :],
                    re.S,
                )
                assert described and len(described["text"].split()) > 1, (
                    f"{name} --{field.name} says nothing"
                )


@pytest.mark.parametrize(
    ("victim", "scale"),
    [
        ({"lr": 0.01, "batch_size": 128}, 1),
        ({"lr": 0.1, "batch_size": 128}, 10),
        ({"lr": 0.3, "batch_size": 256}, 15),
        ({"lr": 0.83, "batch_size": 1000}, 10.624),
        ({}, 1),
        ({"lr": "0.1", "batch_size": 128}, 1),
        ({"lr": float("nan"), "batch_size": 128}, 1),
        ({"lr": 0.1, "batch_size": 0}, 1),
    ],
)
def test_rates_of_fine_tuning_are_relative_to_the_victims(victim, scale, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"dataset": "cifar10", **victim}))
    found = parse("--result_file", tmp_path, of=FMP)
    assert (found.lr, found.lr_min) == (
        pytest.approx(0.01 * scale, rel=0.005),
        pytest.approx(1e-4 * scale, rel=0.005),
    )
    assert parse("--result_file", tmp_path, "--lr", 0.5, of=FMP).lr == 0.5
    for name in names("defense"):
        Config = importlib.import_module(f"antidote_bench.defense.{name}").Config
        if issubclass(Config, RetrainingOptions):  # takes over the victim's own
            continue
        options, usual = (
            parse("--result_file", tmp_path, of=Config),
            Config(result_file=str(tmp_path)),
        )
        relative = {"ft", "fmp", "fp", "nad", "ft_sam", "fst", "nc", "mcr", "rnp", "pam"}
        changed = {
            key
            for key in ("lr", "lr_min", "curve_lr")
            if getattr(options, key, 0) != getattr(usual, key, 0)
        }
        assert bool(changed) == (name in relative and scale != 1), name


def test_rates_of_the_digits_are_those_of_their_file(tmp_path):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"dataset": "digits", "lr": 0.4, "batch_size": 64})
    )
    assert (
        parse("--result_file", tmp_path, of=FMP).lr,
        parse("--result_file", tmp_path, of=FMP).lr_min,
    ) == (0.05, 1e-4)
