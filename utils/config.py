"""Typed options: a dataclass for each script, filled from YAML files and flags.

Nothing here imports torch, so that `--help` and every mistake in the options answer at once.
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, get_args, get_type_hints

import jsonargparse
import yaml

from utils import backdoorbench
from utils.errors import ConfigError, RefusedError
from utils.record import folder

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

ROOT = Path(__file__).resolve().parents[1]
SEEDS = frozenset({"random_seed", "poison_seed", "data_seed"})
# the victims that the published learning rates of fine-tuning defenses belong to were trained with
PUBLISHED_LR, PUBLISHED_BATCH = 0.01, 128
SWITCHES = {
    "overwrite": "replace a finished or different run of this name; an interrupted run with the "
    "same options is resumed",
    "dry_run": "print what would be read, trained and written, and do nothing",
    "debug": "show the traceback of an error",
}
LARGEST_FILE = 100_000  # bytes of a YAML file of options
LARGEST_NUMBER = 10**18
LONGEST_NAME = 255  # bytes of a folder's name
RESERVED = {folder.STATE, folder.DEFENSES}  # names of folders within a record
NULL = "null"
NULLS = {"~", "null", "Null", "NULL", ""}
# where values are from that nobody wrote for this run, as the beginning of a message
FILES = "a value in the files of config/ has the wrong type: "
VICTIM = "a value in the record's config.yaml has the wrong type: "
CHANGED = "changed"  # value of `identity`: only where the option differs from its default


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The values that a number may have; `unit` is a word for the message, such as images."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    unit: str = ""

    def __contains__(self, value):
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and math.isfinite(value)
        )

    def __str__(self):
        if self.at_least is not None and self.at_most is not None:
            words = f"from {self.at_least:g} to {self.at_most:g}"
        elif self.above is not None and self.at_most is not None:
            words = f"above {self.above:g}, up to {self.at_most:g}"
        else:
            low = f"above {self.above:g}" if self.above is not None else ""
            low = f"{self.at_least:g} or more" if self.at_least is not None else low
            high = f"below {self.below:g}" if self.below is not None else ""
            high = f"at most {self.at_most:g}" if self.at_most is not None else high
            words = " and ".join(filter(None, [low, high]))
        return f"{words} {self.unit}".strip()


MISSING = dataclasses.MISSING


def option(default=MISSING, *, identity=True, needs=None, absent=MISSING, **bounds):
    """A field of an options dataclass.

    `identity` says whether two runs that differ in it are different experiments; it is False where
    the option says where files lie or how a run is watched, and CHANGED where runs from before the
    option was there had its default. `needs` says beside which other options it has an effect:
    {option: value}, where True stands for any value but 0, and None for null. `absent` is the value
    of runs from before the option was there, where it is not the default. `bounds` are the limits
    of `Bounds`.
    """
    metadata = {
        "identity": identity,
        "needs": needs or {},
        "bounds": Bounds(**bounds) if bounds else None,
    }
    if absent is not MISSING:
        metadata["absent"] = absent
    return dataclasses.field(default=default, metadata=metadata)


def declared(Config, name, fact):
    """`fact` (identity, needs or bounds) of an option; a subclass that changes the default keeps
    it."""
    for parent in Config.__mro__:
        field = parent.__dict__.get("__dataclass_fields__", {}).get(name)
        if field is not None and fact in field.metadata:
            return field.metadata[fact]
    return {"identity": True, "needs": {}, "bounds": None}[fact]


def idle(Config, options):
    """{option: (another one, the value it would need)} of those without effect in `options`."""
    found = {}
    for field in dataclasses.fields(Config):
        for other, value in declared(Config, field.name, "needs").items():
            there = options.get(other)
            if not (bool(there) if value is True else there == value):
                found[field.name] = other, value
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every script."""

    device: str = option("auto", identity=False)
    """cpu, cuda, cuda:1 ..., or auto: the first GPU where there is one"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """of training and evaluation; auto: bf16 where the device computes in it"""
    random_seed: int = option(0, at_least=0)
    """of weights, batches and augmentation"""
    record_path: str = option("record", identity=False)
    """folder that holds the records"""
    save_folder_name: str | None = option(None, identity=False)
    """name of this run's folder; by default made from the script's name"""
    cache_path: str = option("data/cache", identity=False)
    """folder of the decoded data sets"""
    resident_gb: float | None = option(None, identity=False, at_least=0)
    """GB of memory that a data set may take on the device; a larger one stays in its file and is
    read batch by batch. By default a third of what is free"""
    download: bool = option(False, identity=False)
    """let torchvision download a data set that is not there"""
    eval_every: int = option(0, identity=False, at_least=0)
    """measure ACC, ASR and RA every so many epochs too (0: only at the end)"""
    overwrite: bool = option(False, identity=False)
    dry_run: bool = option(False, identity=False)
    debug: bool = option(False, identity=False)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            bounds, value = declared(type(self), field.name, "bounds"), getattr(self, field.name)
            if isinstance(value, int):
                require(abs(value) <= LARGEST_NUMBER, field.name, "a number of at most 18 digits")
            if isinstance(value, float):
                require(math.isfinite(value), field.name, bounds or "a finite number")
            require(bounds is None or value is None or value in bounds, field.name, bounds)
        name = self.save_folder_name
        what = "a plain folder name, which begins with no dot"
        require(name is None or _is_folder_name(name), "save_folder_name", what)
        what = f"another name: {' and '.join(sorted(RESERVED))} are folders within a record"
        require(name not in RESERVED, "save_folder_name", what)

    def plain(self):
        """The options as the dict that config.yaml holds."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in SWITCHES and not _is_as_before(type(self), name, value)
        }

    def identity(self, *, seeds=True):
        """The options that make two runs the same experiment; without the seeds if asked."""
        return self.identity_of(self.plain(), seeds=seeds)

    @classmethod
    def identity_of(cls, options, *, seeds=True):
        """Those of a dict of options that make two runs the same experiment.

        An option without effect counts as its default.
        """
        without_effect = idle(cls, options)
        return {
            name: _default(cls, name) if name in without_effect else value
            for name, value in options.items()
            if declared(cls, name, "identity")
            and (seeds or name not in SEEDS)
            and not _is_as_before(cls, name, value)
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Options of stochastic gradient descent."""

    epochs: int = option(100, at_least=0)
    """how many times every image is shown"""
    batch_size: int = option(128, at_least=1, unit="images")
    """images per step"""
    lr: float = option(0.01, above=0)
    """highest learning rate"""
    lr_min: float = option(0.0, at_least=0)
    """learning rate that the schedule falls to"""
    schedule: Literal["cosine", "one_cycle"] = "cosine"
    """cosine: down along half a cosine, epoch by epoch; one_cycle: up and down in straight lines,
    step by step"""
    warmup: float = option(0.2, at_least=0, at_most=1, needs={"schedule": "one_cycle"})
    """share of the steps of one_cycle in which the rate rises"""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """sgd: for all weights; muon: Muon for the convolutions, each of which a batch norm must
    follow, and SGD for the rest"""
    muon_lr: float = option(0.24, above=0, needs={"optimizer": "muon"})
    """highest learning rate of Muon; it follows the schedule of --lr, which is that of SGD"""
    bias_lr_scale: float = option(1.0, above=0)
    """learning rate of biases and batch norms, as a multiple of --lr; they decay by as much per
    step as other weights do"""
    momentum: float = option(0.9, at_least=0, below=1)
    """of SGD"""
    nesterov: bool = False
    """Nesterov's form of the momentum"""
    weight_decay: float = option(5e-4, at_least=0)
    """L2 penalty on all weights"""
    compile: Literal["none", "default", "cuda_graphs"] = option("none", identity=False)
    """have torch.compile make kernels for the network, which takes a while; cuda_graphs: replay
    them as one graph as well, on a GPU"""

    def __post_init__(self):
        super().__post_init__()
        require(self.lr_min <= self.lr, "lr", "positive and no less than lr_min (itself 0 or more)")
        require(self.momentum > 0 or not self.nesterov, "momentum", "above 0 for --nesterov")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromScratch(Training):
    """Options of training a network from random weights on a whole training set."""

    label_smoothing: float = option(0.0, at_least=0, below=1)
    """share of a training label that is spread over all classes (not where an attack brings a loss
    of its own)"""
    pad: int = option(4, at_least=0, unit="pixels")
    """pixels by which an image is padded before the random crop"""
    padding: Literal["zeros", "reflect"] = "zeros"
    """what the padded border shows: black, or the image mirrored"""
    small_share: float = option(0.0, at_least=0, at_most=1)
    """share of the epochs, from the first on, in which the network sees smaller images: less work
    for nearly the same accuracy"""
    small_size: int = option(24, at_least=8, unit="pixels", needs={"small_share": True})
    """side in pixels of those smaller images"""
    flip: Literal["random", "alternating"] = "random"
    """how images are mirrored, where a mirrored image keeps its class: random: half of each batch;
    alternating: every image in every other epoch"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack(FromScratch, Common):
    """Options of every attack."""

    # facts about an attack, which its own class changes
    why_all2one: ClassVar[str] = ""  # why an attack with wrong labels has no all2all form
    clean_label: ClassVar[bool] = False  # poisons only images of the target class; labels stay

    dataset: str = "digits"
    """digits (built in), cifar10, cifar100, gtsrb, tiny, or folder: any pair of image folders"""
    dataset_path: str = option("data", identity=False)
    """folder that holds <dataset>/; with --dataset folder, the one that holds train/ and test/ or
    val/"""
    dataset_name: str | None = option(None, identity=False)
    """name of the data set in results and tables; by default the folder's name where --dataset is
    folder, and the data set's otherwise"""
    image_size: int | None = option(None, at_least=8, unit="pixels")
    """side in pixels that images are resized to; by default the data set's own (required for
    folder)"""
    recipe: str = "backdoorbench"
    """how the victim is trained: a file of config/recipe, which single options override"""
    model: str = "preactresnet18"
    """architecture of the victim"""
    width: int | None = None
    """channels of the first layer of resnet9, airbench or preactresnet18 (64 unless given; 16 or 32
    suit small CPUs)"""
    pratio: float = option(0.1, at_least=0, at_most=1)
    """poisoned share of the whole training set"""
    attack_target: int = option(0, at_least=0, needs={"label_mode": "all2one"})
    """class that triggered images shall be taken for (all2one)"""
    label_mode: Literal["all2one", "all2all"] = "all2one"
    """all2one: every triggered image becomes the target; all2all: class y becomes y+1"""
    poison_seed: int = option(0, at_least=0)
    """of the choice of poisoned images and of generated patterns"""

    def __post_init__(self):
        super().__post_init__()
        only_target = self.clean_label and "only images of the one target class are poisoned"
        why = self.why_all2one or only_target
        require(self.label_mode == "all2one" or not why, "label_mode", f"all2one here: {why}")
        name = self.dataset_name
        readable = name is None or (name.isprintable() and name.strip())
        require(readable, "dataset_name", "a name of one line")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defense(Common):
    """Options of every defense."""

    # facts about a defense, which its own class changes
    stage: ClassVar[str] = "repair"  # or in-training: trains its own model on the training set
    selection = "fixed"  # how settings are chosen; an option of those that do it in several ways
    prior: ClassVar[str] = ""  # what the defender is assumed to know, for the results
    needs_train_set: ClassVar[bool] = False  # uses the training set as the defender finds it
    holds_clean: ClassVar[bool] = True  # gets images that are known to be clean
    copies_recipe: ClassVar[bool] = False  # training options default to the victim's own
    # learning rates that were published for a victim trained at PUBLISHED_LR: their defaults follow
    # the victim's rate
    relative_rates: ClassVar[tuple[str, ...]] = ()
    adds: ClassVar[dict[str, str]] = {}  # the files that it adds to a record, and what they hold

    result_file: str = option(identity=False)
    """record to repair: a folder's path, or its name below record_path"""
    dataset_path: str | None = option(None, identity=False)
    """where the record's data set lies; by default where the attack found it"""
    allow_other_data: bool = option(False, identity=CHANGED)
    """repair a record although the data set here has other pixels than the one it was made on"""
    clean_ratio: float = option(0.05, above=0, at_most=1)
    """clean images that the defender holds, as a share of the training set; in any case one of
    every class"""
    clean_count: int | None = option(None, at_least=1, unit="images")
    """the same as a number, which then counts instead"""
    data_seed: int = option(0, at_least=0)
    """of the choice of those clean images"""

    def budget(self, count, classes):
        """How many clean images the defender holds, of a training set of `count`."""
        if not self.holds_clean:
            return 0
        asked = self.clean_count
        if asked is None:
            asked = int(self.clean_ratio * count + 1e-9)
        return min(max(asked, classes), count)

    @property
    def record(self):
        """Path of the record's folder; MissingError (exit 3) where there is none."""
        return folder.find(self.result_file, self.record_path)


# the options of all scripts that do not make two runs different experiments
NOT_IDENTITY = frozenset(
    field.name
    for Config in (Attack, Defense)
    for field in dataclasses.fields(Config)
    if not declared(Config, field.name, "identity")
)
# what a defense that trains from scratch copies from the victim's training
RECIPE = tuple(
    field.name for field in dataclasses.fields(FromScratch) if field.name not in NOT_IDENTITY
)


def _default(Config, name):
    return Config.__dataclass_fields__[name].default


def _is_as_before(Config, name, value):
    """Whether `value` is what runs had that are older than the option `name`."""
    return declared(Config, name, "identity") == CHANGED and value == _default(Config, name)


def _is_folder_name(name):
    """Whether `name` names a folder, on every system, that no reader of records passes over."""
    plain = name.isprintable() and Path(name).name == name and not set("/\\") & set(name)
    return plain and not name.startswith(".") and 0 < len(os.fsencode(name)) <= LONGEST_NAME


def require(holds, option, what):
    """Raise ConfigError (exit 2) unless `holds`: 'option must be what'."""
    if not holds:
        raise ConfigError(f"{option} must be {what}")


class Word(NamedTuple):
    """An option as it was written: its name, its text (None: null), and where that was."""

    name: str
    text: str | None
    where: str  # the beginning of a message; empty for a flag


def parse(Config, argv, description="", script=None):
    """The merged options as a `Config`.

    Later ones win: defaults, config/recipe/<recipe>.yaml, config/dataset/<dataset>.yaml, the files
    of --yaml_path, flags. `script` is the path of the script, attack/badnet.py say. Raises
    ConfigError (exit 2) for an unknown option or YAML key, for a value of the wrong type or out of
    range, and for a flag without effect.
    """
    own = Path(script).stem if script else Config.__module__.rpartition(".")[2]
    flags, rest = _flags(Config, own, argv)
    paths = [
        word.text
        for word in flags
        if backdoorbench.ALIASES.get(word.name, word.name) == "yaml_path"
    ]
    flags = [
        word for word in flags if backdoorbench.ALIASES.get(word.name, word.name) != "yaml_path"
    ]
    written = [*(word for path in paths for word in _words_of(Path(path))), *flags]
    found = [_translated(Config, own, word) for word in written]
    ignored = [word for word, name in zip(written, found, strict=True) if name is None]
    given = {word.name: word for word in found if word}
    parser = _parser(Config, description, script)
    defaults = _defaults(Config, {name: word.text for name, word in given.items()}, own)
    if {"-h", "--help"} & set(rest):
        parser.set_defaults({name: value for name, (value, _) in defaults.items()})
        parser.parse_args(["--help"])
    _check_record(Config, given, ignored)
    _warn(ignored)
    words = {name: _word(name, *default) for name, default in defaults.items()} | given
    # a later one wins, but an earlier one must be right too
    all_words = [*words.values(), *filter(None, found)]
    options = _converted(Config, parser, all_words, rest)
    config = _built(Config, options, words)
    _refuse_idle(Config, options, {word.name for word in found if word and not word.where})
    without_effect = {name: _default(Config, name) for name in idle(Config, options)}
    return dataclasses.replace(config, **without_effect)


def _built(Config, options, words):
    """Config(**options); a victim's option that is out of range is its record's fault."""
    try:
        return Config(**options)
    except ConfigError as error:
        word = words.get(str(error).split()[0])
        if word and word.where == VICTIM:
            raise RefusedError(f"{VICTIM}{error}") from error
        raise


def digest(options):
    """A short name for a dict of options: 12 hexadecimal digits of its sha256."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]


def script(kind, name):
    """The script behind runs called `name`.

    The runs of attack/clean.py are called after their trigger too, clean_badnet say.
    """
    own = name.startswith("clean_") and not (ROOT / kind / f"{name}.py").is_file()
    return f"{kind}/{'clean' if own else name}.py"


def command(script, config):
    """The command line that gives `config`: its options other than the defaults for its recipe and
    data set."""
    given = config.plain()
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    defaults = _defaults(type(config), given, Path(script).stem)
    usual |= {name: value for name, (value, _) in defaults.items()}
    changed = {name: value for name, value in given.items() if value != usual[name]}
    changed = {name: changed[name] for name in changed if name not in idle(type(config), given)}
    return shlex.join(["python", script, *words(changed)])


def words(given):
    """Options as the words of a command."""
    written = []
    for name, value in given.items():
        text = _text(value)
        written += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return written


class _Help(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of a script's docstring."""


def _parser(Config, description, script):
    parser = jsonargparse.ArgumentParser(
        prog=script,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_Help,
        parser_mode="scalar",
    )
    parser.add_argument(
        "--yaml_path", action="config", help="YAML file of options; a flag overrides what it says"
    )
    parser.add_class_arguments(Config, as_group=False, skip=set(SWITCHES))
    for action in parser._actions:
        if bounds := declared(Config, action.dest, "bounds"):
            action.help = f"{action.help}; {bounds}" if action.help else str(bounds)
    for name, text in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser


class _Words(argparse.ArgumentParser):
    """Splits a command line into options and their texts."""

    def error(self, message):
        raise ConfigError(" ".join(message.split()))


class _Collect(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        text = " ".join(values) if isinstance(values, list) else values
        namespace.found.append(Word(option_string[2:], text, ""))


def _flags(Config, own, argv):
    """(the options of a command line in their order, the words for help and --print_config)"""
    parser = _Words(add_help=False, allow_abbrev=False)
    hints = get_type_hints(Config)
    bare = {name for name, hint in hints.items() if hint is bool} | {"amp", "dithering"}
    for name in dict.fromkeys([*_known(Config), *_foreign(Config, own)]):
        count = "*" if name not in _known(Config) and _is_ignored(Config, own, name) else None
        count = "?" if name in bare else count
        parser.add_argument(f"--{name}", action=_Collect, nargs=count, const="true")
    found, rest = parser.parse_known_args(argv, argparse.Namespace(found=[]))
    for word in rest:
        name = word.lstrip("-").split("=")[0]
        if word in ("-h", "--help") or (name == "print_config" and word.startswith("--")):
            continue
        if not word.startswith("--"):
            raise ConfigError(
                f"{_short(word)} is no option: options begin with --; --help lists all"
            )
        raise ConfigError(_unknown(Config, name))
    return found.found, rest


def _known(Config):
    return [*(field.name for field in dataclasses.fields(Config)), "yaml_path"]


def _foreign(Config, own):
    """BackdoorBench's names for options of this script, and those that change nothing."""
    return [
        *_aliases(Config, own),
        *backdoorbench.IGNORED,
        *(backdoorbench.OF_THE_RECORD if issubclass(Config, Defense) else []),
    ]


def _aliases(Config, own):
    aliases = {**backdoorbench.ALIASES, **backdoorbench.OWN_ALIASES.get(own, {})}
    known = _known(Config)
    return {name: here for name, here in aliases.items() if here in known and name not in known}


def _is_ignored(Config, own, name):
    of_record = issubclass(Config, Defense) and name in backdoorbench.OF_THE_RECORD
    return (of_record or name in backdoorbench.IGNORED) and name not in _aliases(Config, own)


def _translated(Config, own, word):
    """The option with the name and the value that it has here; None where it changes nothing."""
    name, text, where = word
    if name not in _known(Config):
        here = _aliases(Config, own).get(name)
        if here is None and (_is_ignored(Config, own, name) or (name == "index" and not text)):
            return None
        if here is None:
            raise ConfigError(f"{where}{_unknown(Config, name)}")
        name, text = here, backdoorbench.VALUES.get(name, {}).get(text, text)
    if name == "yaml_path":
        raise ConfigError(f"{where}yaml_path is a flag: a file of options names no other file")
    if "\0" in (text or ""):
        raise ConfigError(f"{where}{name} must be text without the character NUL")
    return Word(name, text, where)


def _unknown(Config, name):
    """A sentence for an unknown option, with the nearest known ones."""
    if name in backdoorbench.OTHERWISE:
        return f"{name} is an option of BackdoorBench: here {backdoorbench.OTHERWISE[name]}"
    near = difflib.get_close_matches(name[:100], _known(Config), 3, 0.5)
    hint = f"the nearest are {', '.join(near)}" if near else "--help lists all"
    return f"unknown option {_short(name)}; {hint}"


def _check_record(Config, given, ignored):
    """ConfigError where a defense is told of another data set or model than its record's."""
    if not issubclass(Config, Defense):
        return
    made = _victim_options({name: word.text for name, word in given.items()})
    for word in ignored:
        there = made.get(word.name)
        if word.name in ("dataset", "model") and there and word.text not in (None, str(there)):
            raise ConfigError(
                f"{word.where}the {word.name} of the record is {_short(there)}, not "
                f"{_short(word.text)}: leave {word.name} out"
            )


def _warn(ignored):
    if ignored:
        names = ", ".join(dict.fromkeys(word.name for word in ignored))
        print(f"warning: ignored, because they change nothing here: {names}", file=sys.stderr)


def _words_of(path):
    """The options in a user's YAML file; ConfigError names the file and says what is wrong."""
    return [
        Word(name, None if node.tag.endswith(":null") else node.value, f"{_printable(path)}: ")
        for name, node in _nodes(path).items()
    ]


def _nodes(path):
    """{key: the node of its value} of a YAML file that is a mapping of plain values.

    Nothing is constructed: tags call no code, and an alias is never expanded.
    """
    shown = _printable(path)
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ConfigError(
                f"{shown} is larger than {LARGEST_FILE // 1000} kB and no file of options"
            )
        root = yaml.compose(content.decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise ConfigError(f"{shown} is not UTF-8 text: save it as UTF-8") from error
        why = getattr(error, "strerror", None) or "it cannot be opened"
        raise ConfigError(f"{shown} cannot be read: {why}") from error
    except RecursionError as error:
        raise ConfigError(f"{shown} is no file of options: it is nested too deeply") from error
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"{shown} is no YAML file of options: {_printable(why)}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{shown} must hold options, a line `option: value` for each")
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":null"):
            raise ConfigError(f"{shown}: a key is no text, and must be the name of an option")
        if not isinstance(value, yaml.ScalarNode):
            raise ConfigError(
                f"{shown}: {_short(key.value)} must have one value, no list or mapping"
            )
    return {key.value: value for key, value in root.value}


def _scalar(text):
    """The number, truth value or null that a text stands for in YAML; otherwise the text."""
    if not re.fullmatch(r"[\w.+:~-]{0,100}", text) or text == "":
        return text
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, AttributeError):
        return text
    is_scalar = isinstance(value, bool | int | float) or (value is None and text in NULLS)
    return value if is_scalar else text


jsonargparse.set_loader("scalar", _scalar, (ValueError,))
jsonargparse.set_dumper("scalar", lambda options: yaml.safe_dump(options, sort_keys=False))


def _text(value):
    """A value as a word of a command."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: NULL}[value]
    return str(value)


def _word(name, value, where):
    if not isinstance(value, str | int | float | None):
        raise _type_error(where)(f"{where}{name} must have one value, no list or mapping")
    return Word(name, None if value is None else _text(value), where)


def _type_error(where):
    return RefusedError if where == VICTIM else ConfigError


def _converted(Config, parser, words, rest):
    """{option: value} with values of the declared types."""
    hints = get_type_hints(Config)
    switches = dict.fromkeys(SWITCHES, False)
    written = []
    for name, text, where in words:
        if text is None and type(None) not in get_args(hints[name]):
            raise _type_error(where)(f"{where}{name} must be {_kinds(hints[name])}")
        if name not in SWITCHES:
            written.append(f"--{name}={NULL if text is None else text}")
        elif text.lower() not in ("true", "false"):
            raise ConfigError(f"{where}{name} must be true or false")
        else:
            switches[name] = text.lower() == "true"
    try:
        options = parser.parse_args([*written, *rest])
    except jsonargparse.ArgumentError as error:
        found = re.search(r'Parser key "(\w+)"', str(error))
        wrong = [word for word in words if found and word.name == found[1]]
        if not wrong:
            raise ConfigError(" ".join(str(error).split())[:300]) from error
        shown = [word for word in wrong if f"value: {word.text}" in str(error)]
        name, text, where = [*shown, wrong[-1]][0]
        raise _type_error(where)(
            f"{where}{name} must be {_kinds(hints[name])}, not {_short(text)}"
        ) from error
    return {field.name: options[field.name] for field in dataclasses.fields(Config)} | switches


def _kinds(hint):
    """Words for the type of an option."""
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): NULL,
    }
    if hint in names:
        return names[hint]
    return " or ".join(part if isinstance(part, str) else _kinds(part) for part in get_args(hint))


def _refuse_idle(Config, options, flags):
    """ConfigError where a flag that is no default has no effect."""
    for name, (other, value) in idle(Config, options).items():
        if name not in flags or options[name] == _default(Config, name):
            continue
        beside = f"with --{other} {options[other]}"
        remedy = f"choose --{other} {value}"
        if value is None:
            beside, remedy = f"with --{other}", f"leave --{other} out"
        elif value is True:
            beside, remedy = f"without --{other}", f"give --{other} too"
        raise ConfigError(f"--{name} has no effect {beside}: leave it out, or {remedy}")


def _short(value):
    """A text as it is shown in a message."""
    text = _printable(value)
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _printable(value):
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))


def _defaults(Config, given, own):
    """{option: (value, where it is from)}: what config/ and the victim say beside `given`."""
    recipe = {name: (value, FILES) for name, value in _recipe_options(Config, given).items()}
    return {**recipe, **_dataset_options(Config, given, own)}


def _recipe_options(Config, given):
    """What config/recipe/<recipe>.yaml says: the section `all`, then the one of the data set."""
    if not issubclass(Config, Attack):
        return {}
    name, recipes = str(given.get("recipe", Config.recipe)), ROOT / "config" / "recipe"
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
            f"config/recipe/{name}.yaml names {sorted(wrong)[0]!r}, which is no option of an attack"
        )
    return options


def _dataset_options(Config, given, own):
    """What config/dataset/<dataset>.yaml says for attacks or for defenses, and what a defense takes
    over from its victim.

    A section named like the script comes over it. For a defense the record names the data set.
    """
    section, made = "attack", {}
    dataset = given.get("dataset", getattr(Config, "dataset", None))
    if issubclass(Config, Defense):
        section, made = "defense", _victim_options(given)
        dataset = made.get("dataset")
    options = _section(ROOT / "config" / "dataset" / f"{Path(str(dataset)).name}.yaml", section)
    options = {**options, **options.get(own, {})}
    known = {field.name for field in dataclasses.fields(Config)}
    if given.get("model", options.get("model")) != options.get("model"):
        known -= {"width"}  # it is that of the model which the file names
    found = {name: (value, FILES) for name, value in options.items()}
    if issubclass(Config, Defense) and Config.copies_recipe:
        found |= {name: (made[name], VICTIM) for name in RECIPE if name in made}
    # where a data set has a rate of its own, all rates are as written
    if issubclass(Config, Defense) and "lr" not in found:
        found |= {name: (value, FILES) for name, value in rates_for(Config, made).items()}
    return {name: value for name, value in found.items() if name in known}


def _section(path, section):
    """The options in one section of a file of config/dataset; {} where there is no such file."""
    try:
        content = yaml.safe_load(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    right = isinstance(content, dict) and isinstance(content.get(section) or {}, dict)
    options = (content.get(section) or {}) if right else {}
    # what is no plain value is the section of one script
    if not right or any(isinstance(value, list) for value in options.values()):
        raise ConfigError(
            f"config/dataset/{path.name} must be YAML with sections attack and defense, which hold "
            "lines `option: value`"
        )
    return options


def _victim_options(given):
    """The options in the record that a defense repairs; {} where they cannot be read, which is said
    when the record is opened."""
    name = given.get("result_file") or ""
    for place in (Path(name), Path(given.get("record_path") or "record") / name):
        path = place / folder.OPTIONS
        try:
            nodes = _nodes(path) if path.is_file() else {}
        except (ConfigError, OSError):
            continue
        if nodes:
            return {
                name: node.value if node.tag.endswith(":str") else _scalar(node.value)
                for name, node in nodes.items()
            }
    return {}


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


def _mapping(path):
    """The YAML mapping in a file; {} where there is none, and the parser then says what is
    wrong."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
