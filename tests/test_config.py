"""Options: what overrides what, and one sentence with the right exit code for every mistake."""

import dataclasses
import re

import pytest
import yaml

from attack.badnet import Config as BadNet
from defense.fmp import Config as FMP
from tests.conftest import ROOT, names
from utils import config
from utils.errors import ConfigError


def parse(*argv, of=BadNet):
    return config.parse(of, [str(word) for word in argv])


def test_flags_win_over_yaml_over_data_set_over_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("lr: 0.2\nepochs: 4\n")
    assert parse("--dataset", "cifar10").epochs == 100
    digits = yaml.safe_load((ROOT / "config/dataset/digits.yaml").read_text())["attack"]
    assert parse().epochs == digits["epochs"] != 100
    found = parse("--epochs", 7, "--yaml_path", file)  # the flag stands first and still wins
    assert (found.epochs, found.lr, found.batch_size) == (7, 0.2, digits["batch_size"])
    assert parse(f"--yaml_path={file}").epochs == 4


def test_yaml_may_name_the_data_set(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("dataset: digits\n")
    assert parse("--yaml_path", file).width == 16
    file.write_text("dataset: cifar10\n")
    assert parse("--yaml_path", file).width is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--pration", "0.1"], "'pration'; the nearest are pratio"),
        (["--epochs", "many"], "epochs"),
        (["--epochs", "2.5"], "epochs"),
        (["--pratio", "1.5"], "pratio must be a share from 0 to 1"),
        (["--pratio", "-0.1"], "pratio"),
        (["--label_mode", "all2some"], "label_mode"),
        (["--attack_target", "-1"], "attack_target"),
        (["--lr", "0"], "lr must be positive"),
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
    ("text", "sentence"), [("epoch: 3", "'epoch'; the nearest are epochs"), ("epochs: x", "epochs"), ("[1", "parsing"), ("- 1", "")]
)
def test_mistakes_in_yaml(tmp_path, text, sentence):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse("--yaml_path", file)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_written_runs_again(tmp_path):
    file, first = tmp_path / "config.yaml", parse("--lr", "1e-3", "--patch_row", "-4", "--random_seed", 5)
    file.write_text(yaml.safe_dump(config.plain(first)))
    assert parse("--yaml_path", file) == first


def test_identity_ignores_places_and_keeps_the_rest():
    one, other = parse("--device", "cpu", "--record_path", "a"), parse("--dataset_path", "b", "--overwrite")
    assert config.identity(one) == config.identity(other)
    assert config.identity(parse("--poison_seed", 1)) != config.identity(one)
    assert config.identity(parse("--poison_seed", 1), seeds=False) == config.identity(one, seeds=False)
    assert config.digest(config.identity(parse("--patch_size", 2))) != config.digest(config.identity(one))


def test_a_defense_needs_a_record():
    with pytest.raises(ConfigError, match="result_file"):
        parse(of=FMP)


@pytest.mark.parametrize(("folder", "name"), [(folder, name) for folder in ("attack", "defense") for name in names(folder)])
def test_every_script_has_a_yaml_that_only_overrides(folder, name):
    script = __import__(f"{folder}.{name}", fromlist=["Config"])
    file = ROOT / "config" / folder / f"{name}.yaml"
    given = yaml.safe_load(file.read_text())
    parse("--yaml_path", file, *(["--result_file", "x"] if folder == "defense" else []), of=script.Config)
    defaults = {field.name: field.default for field in dataclasses.fields(script.Config)}
    assert given and not {key for key, value in given.items() if defaults[key] == value}, "a value has one source"


@pytest.mark.parametrize("path", sorted((ROOT / "config" / "dataset").glob("*.yaml")), ids=lambda path: path.stem)
def test_data_set_options_exist(path):
    known = {folder: {f.name for name in names(folder) for f in dataclasses.fields(__import__(f"{folder}.{name}", fromlist=["Config"]).Config)}
             for folder in ("attack", "defense")}  # fmt: skip
    for section, options in yaml.safe_load(path.read_text()).items():
        assert set(options) <= known[section]


def test_every_option_is_documented(capsys):
    for folder in ("attack", "defense"):
        for name in names(folder):
            Config = __import__(f"{folder}.{name}", fromlist=["Config"]).Config
            text = config._parser(Config, "", "x").format_help()
            for field in dataclasses.fields(Config):
                described = re.search(
                    rf"--{field.name}\b[^\n]*?(  |\n)\s*(?P<text>.+?)\((type|default|required)", text[text.index("options:") :], re.S
                )
                assert described and len(described["text"].split()) > 1, f"{name} --{field.name} says nothing"
