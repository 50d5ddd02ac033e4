"""Defaults that do not stand in the code: those of config/, and those that a victim decides.

Nothing here imports torch.
"""

import dataclasses
import math
import re
from pathlib import Path

import yaml

from antidote_bench.utils import config, files
from antidote_bench.utils.config import Attack, OnRecord
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.record import folder
from antidote_bench.utils.text import printable, quoted

# the victims that the published learning rates of fine-tuning defenses belong to were trained with
PUBLISHED_LR, PUBLISHED_BATCH = 0.01, 128
# for images above so many pixels, unless a network or a recipe is named: the network and the recipe
# of the other defaults are made for images of CIFAR's size
SMALL = 64
FOR_LARGE = {"recipe": "imagenet", "model": "resnet18"}
LARGEST_FILE = 100_000  # bytes of a YAML file of options
NULL = "null"
NULLS = {"~", "null", "Null", "NULL", ""}
# where values are from that nobody wrote for this run, as the beginning of a message
FILES = "a value in the files of config/ has the wrong type: "
VICTIM = "a value in the record's config.yaml has the wrong type: "


def defaults_for(Config, given, own):
    """{option: (value, where it is from)}: what config/ and the victim say beside `given`."""
    large = for_large_images(Config, given, own)
    given = {**large, **given}
    found = {**large, **_recipe_options(Config, given)}
    found = {name: (value, FILES) for name, value in found.items()}
    return {**found, **_dataset_options(Config, given, own)}


def for_large_images(Config, given, own):
    """{recipe, model} of an attack on images above SMALL pixels; {} where `given` or the file of
    the data set names one of them, or a width."""
    if not issubclass(Config, Attack):
        return {}
    dataset = str(given.get("dataset", Config.dataset))
    of_dataset = _of_dataset(dataset, "attack", own)
    named = {name for name in given if given[name] is not None and given[name] != NULL}
    named |= of_dataset.keys()
    if named & {"recipe", "model", "width"}:
        return {}
    side = given.get("image_size", of_dataset.get("image_size")) or config.SIDES.get(dataset, 0)
    is_large = str(side).isdecimal() and int(side) > SMALL
    return dict(FOR_LARGE) if is_large else {}


def _recipe_options(Config, given):
    """What config/recipe/<recipe>.yaml says: the section `all`, then the one of the data set."""
    if not issubclass(Config, Attack):
        return {}
    name, recipes = str(given.get("recipe", Config.recipe)), config.ROOT / "config" / "recipe"
    known = sorted(path.stem for path in recipes.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"there is no recipe {name!r}: config/recipe has {', '.join(known)}")
    sections = _mapping(recipes / f"{name}.yaml")
    if not sections or not all(isinstance(part, dict) for part in sections.values()):
        raise ConfigError(
            f"config/recipe/{name}.yaml must be YAML with a section `all`, and others named like "
            "data sets"
        )
    options = {
        **sections.get("all", {}),
        **sections.get(str(given.get("dataset", Config.dataset)), {}),
    }
    if wrong := options.keys() - {field.name for field in dataclasses.fields(Attack)}:
        raise ConfigError(
            f"config/recipe/{name}.yaml names {quoted(min(map(str, wrong)))}, which is no option "
            "of an attack"
        )
    return options


def _dataset_options(Config, given, own):
    """What config/dataset/<dataset>.yaml says for attacks, defenses or detectors, and what the
    last two take over from their victim.

    A section named like the script comes over it. For these two the record names the data set.
    """
    section, made = "attack", {}
    dataset = given.get("dataset", getattr(Config, "dataset", None))
    if issubclass(Config, OnRecord):
        section, made = Config.section, victim_options(given)
        dataset = made.get("dataset")
    options = _of_dataset(dataset, section, own)
    known = {field.name for field in dataclasses.fields(Config)}
    if given.get("model", options.get("model")) != options.get("model"):
        known -= {"width"}  # it is that of the model which the file names
    found = {name: (value, FILES) for name, value in options.items()}
    if issubclass(Config, OnRecord) and Config.copies_recipe:
        copied = [name for name in config.RECIPE if name not in Config.not_copied]
        found |= {name: (made[name], VICTIM) for name in copied if name in made}
    # where a data set has a rate of its own, all rates are as written
    if issubclass(Config, OnRecord) and "lr" not in found:
        found |= {name: (value, FILES) for name, value in rates_for(Config, made).items()}
    return {name: value for name, value in found.items() if name in known}


def rates_for(Config, victim):
    """The default learning rates of a defense for a `victim`, the options of its attack.

    A published rate belongs to a victim that was trained by SGD at PUBLISHED_LR with batches of
    PUBLISHED_BATCH images. It is multiplied by the ratio of the victims' rates per image: a batch
    twice as large is trained at twice the rate. That is the linear scaling rule of Goyal et al.,
    "Accurate, Large Minibatch SGD", 2017 (arXiv 1706.02677). The result is {} where the options
    hold no usable rate.
    """
    rate, batch = victim.get("lr"), victim.get("batch_size")
    usable = isinstance(rate, float) and 0 < rate < math.inf
    if not usable or not isinstance(batch, int) or batch < 1:
        return {}
    scale = rate / batch * PUBLISHED_BATCH / PUBLISHED_LR
    published = {field.name: field.default for field in dataclasses.fields(Config)}
    return {name: float(f"{published[name] * scale:.3g}") for name in Config.relative_rates}


def victim_options(given):
    """The options in the record that a defense repairs; {} where they cannot be read, which is said
    when the record is opened."""
    name = given.get("result_file") or ""
    for place in (Path(name), Path(given.get("record_path") or "record") / name):
        path = place / folder.OPTIONS
        try:
            nodes = read_nodes(path) if path.is_file() and not path.is_symlink() else {}
        except (ConfigError, OSError):
            continue
        if nodes:
            return {
                name: node.value if node.tag.endswith(":str") else scalar(node.value)
                for name, node in nodes.items()
            }
    return {}


def _of_dataset(dataset, section, own):
    """The options that config/dataset/<dataset>.yaml has for the script `own`."""
    path = config.ROOT / "config" / "dataset" / f"{Path(str(dataset)).name}.yaml"
    options = _section(path, section)
    return {**options, **options.get(own, {})}


def _section(path, section):
    """The options in one section of a file of config/dataset; {} where there is no such file."""
    try:
        content = files.read_yaml(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError):
        content = None
    right = isinstance(content, dict) and isinstance(content.get(section) or {}, dict)
    options = (content.get(section) or {}) if right else {}
    # what is no plain value is the section of one script
    if not right or any(isinstance(value, list) for value in options.values()):
        raise ConfigError(
            f"config/dataset/{path.name} must be YAML with sections attack, defense and "
            "detection, which hold lines `option: value`"
        )
    return options


def _mapping(path):
    """The YAML mapping in a file; {} where there is none, and the parser then says what is
    wrong."""
    try:
        content = files.read_yaml(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_nodes(path, lists=frozenset()):
    """{key: the node of its value} of a YAML file that is a mapping of plain values.

    The keys `lists` may have a list of plain values. Nothing is constructed: tags call no code, and
    an alias is never expanded.
    """
    shown = printable(path)
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ConfigError(
                f"{shown} is larger than {LARGEST_FILE // 1000} kB and no file of options"
            )
        root = files.compose_yaml(content.decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise ConfigError(f"{shown} is not UTF-8 text: save it as UTF-8") from error
        why = getattr(error, "strerror", None) or "it cannot be opened"
        raise ConfigError(f"{shown} cannot be read: {why}") from error
    except RecursionError as error:
        raise ConfigError(f"{shown} is no file of options: it is nested too deeply") from error
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"{shown} is no YAML file of options: {printable(why)}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{shown} must hold options, a line `option: value` for each")
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":null"):
            raise ConfigError(f"{shown}: a key is no text, and must be the name of an option")
        parts = [value]
        if key.value in lists and isinstance(value, yaml.SequenceNode):
            parts = value.value
        if not all(isinstance(part, yaml.ScalarNode) for part in parts):
            raise ConfigError(
                f"{shown}: {quoted(key.value)} must have one value, no list or mapping"
            )
    return {key.value: value for key, value in root.value}


def scalar(text):
    """The number, truth value or null that a text stands for in YAML; otherwise the text."""
    if not re.fullmatch(r"[\w.+:~-]{0,100}", text) or text == "":
        return text
    try:
        value = yaml.load(text, files.YAML_LOADER)
    except (yaml.YAMLError, ValueError, AttributeError):
        return text
    is_scalar = isinstance(value, bool | int | float) or (value is None and text in NULLS)
    return value if is_scalar else text
