"""Typed options: a dataclass for each script, filled from YAML files and flags.

Nothing here imports torch, so that `--help` and every mistake in the options answer at once.
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import shlex
from pathlib import Path
from typing import ClassVar, Literal

import jsonargparse
import yaml

from utils.errors import ConfigError
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


def option(default=dataclasses.MISSING, *, identity=True, **bounds):
    """A field of an options dataclass.

    `identity` says whether two runs that differ in it are different experiments; it is False where
    the option says where files lie or how a run is watched. `bounds` are the limits of `Bounds`.
    """
    metadata = {"identity": identity, "bounds": Bounds(**bounds) if bounds else None}
    return dataclasses.field(default=default, metadata=metadata)


def declared(Config, name, fact):
    """`fact` (identity or bounds) of an option; a subclass that changes the default keeps it."""
    for parent in Config.__mro__:
        field = parent.__dict__.get("__dataclass_fields__", {}).get(name)
        if field is not None and fact in field.metadata:
            return field.metadata[fact]
    return {"identity": True, "bounds": None}[fact]


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
            require(bounds is None or value is None or value in bounds, field.name, bounds)
        name = self.save_folder_name
        plain = name is None or (name not in {"", ".", ".."} and Path(name).name == name)
        require(plain, "save_folder_name", "a plain folder name")

    def plain(self):
        """The options as the dict that config.yaml holds."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in SWITCHES}

    def identity(self, *, seeds=True):
        """The options that make two runs the same experiment; without the seeds if asked."""
        return self.identity_of(self.plain(), seeds=seeds)

    @classmethod
    def identity_of(cls, options, *, seeds=True):
        """Those of a dict of options that make two runs the same experiment."""
        return {
            name: value
            for name, value in options.items()
            if declared(cls, name, "identity") and (seeds or name not in SEEDS)
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
    warmup: float = option(0.2, at_least=0, at_most=1)
    """share of the steps of one_cycle in which the rate rises"""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """sgd: for all weights; muon: Muon for the convolutions, each of which a batch norm must
    follow, and SGD for the rest"""
    muon_lr: float = option(0.24, above=0)
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
    small_size: int = option(24, at_least=8, unit="pixels")
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
    attack_target: int = option(0, at_least=0)
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


def require(holds, option, what):
    """Raise ConfigError (exit 2) unless `holds`: 'option must be what'."""
    if not holds:
        raise ConfigError(f"{option} must be {what}")


def parse(Config, argv, description="", script=None):
    """The merged options as a `Config`.

    Later ones win: defaults, config/recipe/<recipe>.yaml, config/dataset/<dataset>.yaml, the files
    of --yaml_path, flags. `script` is the path of the script, attack/badnet.py say. Raises
    ConfigError (exit 2) for an unknown option or YAML key and for a value of the wrong type or out
    of range.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("yaml_path", "dataset", "model", "recipe", "result_file", "record_path"):
        first.add_argument(f"--{name}", action="append", default=[])
    early, _ = first.parse_known_args(argv)
    files = [item for path in early.yaml_path for item in ("--yaml_path", path)]
    yaml_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    yaml_only.add_argument("--yaml_path", action="append")
    flags = yaml_only.parse_known_args(argv)[1]
    # files go first, so that a flag wins wherever it stands

    parser = _parser(Config, description, script)
    given = {}
    for path in early.yaml_path:
        given |= _mapping(Path(path))
    given |= {name: values[-1] for name, values in vars(early).items() if values}
    parser.set_defaults(_defaults(Config, given, script))
    try:
        options = parser.parse_args([*files, *flags])
    except jsonargparse.ArgumentError as error:
        raise ConfigError(_explain(str(error), parser, given, flags)) from error
    names = [field.name for field in dataclasses.fields(Config)]
    try:
        return Config(**{name: options[name] for name in names})
    except TypeError as error:  # flags and --yaml_path were checked by the parser
        raise ConfigError(f"a value in the files of config/ has the wrong type: {error}") from error


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
    usual |= _defaults(type(config), given, script)
    changed = {name: value for name, value in given.items() if value != usual[name]}
    return shlex.join(["python", script, *words(changed)])


def words(given):
    """Options as the words of a command."""
    written = []
    for name, value in given.items():
        text = "null" if value is None else str(value)
        text = text.lower() if isinstance(value, bool) else text
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


def _defaults(Config, given, script):
    """What the files of config/recipe and config/dataset say for the options `given`."""
    return {**_recipe_options(Config, given), **_dataset_options(Config, given, script)}


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


def _dataset_options(Config, given, script):
    """What config/dataset/<dataset>.yaml says for attacks or for defenses.

    Its section named like the script comes over it. For a defense the record names the data set.
    """
    if issubclass(Config, Defense):
        section, made = "defense", {}
        name = given.get("result_file", "")
        for place in (Path(name), Path(given.get("record_path", "record")) / name):
            made = made or _mapping(place / folder.OPTIONS)
        dataset = made.get("dataset")
    else:
        section, dataset = "attack", given.get("dataset", Config.dataset)
    path = ROOT / "config" / "dataset" / f"{Path(str(dataset)).name}.yaml"
    options = _mapping(path).get(section) or {}
    own = Path(script).stem if script else Config.__module__.rpartition(".")[2]
    options = {**options, **options.get(own, {})}
    known = {field.name for field in dataclasses.fields(Config)}
    if given.get("model", options.get("model")) != options.get("model"):
        known -= {"width"}  # it is that of the model which the file names
    if issubclass(Config, Defense) and Config.copies_recipe:
        options |= {key: made[key] for key in RECIPE if key in made}
    # where a data set has a rate of its own, all rates are as written
    if issubclass(Config, Defense) and "lr" not in options:
        options |= rates_for(Config, made)
    return {key: value for key, value in options.items() if key in known}


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


def _explain(text, parser, given, flags):
    """One sentence for a parser's error; an unknown option is named with the nearest known ones."""
    known = [action.dest for action in parser._actions] + ["print_config"]
    used = [*given, *(flag[2:].split("=")[0] for flag in flags if flag.startswith("--"))]
    for name in used:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.5)
            hint = f"the nearest are {', '.join(near)}" if near else "--help lists all"
            return f"unknown option {name!r}; {hint}"
    return " ".join(text.split())
