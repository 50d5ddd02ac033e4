"""Typed options: a dataclass per script, filled from the recipe's YAML, the data set's, `--yaml_path`, and the flags.

Nothing here imports torch, so that `--help` and every mistake in the options answer at once.
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import shlex
import sys
from pathlib import Path
from typing import ClassVar, Literal

import jsonargparse
import yaml

from utils.errors import ConfigError, MissingError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

ROOT = Path(__file__).resolve().parents[1]
SEEDS = frozenset({"random_seed", "poison_seed", "data_seed"})
# What may change between two runs of the same experiment: where things lie and how the run is watched.
NOT_IDENTITY = frozenset({"record_path", "save_folder_name", "result_file", "dataset_path", "cache_path", "download",
                          "device", "compile", "resident_gb", "eval_every", "score_batch", "together", "overwrite", "debug",
                          "dry_run"})  # fmt: skip
# What a defense that trains anew takes over from the victim's training.
RECIPE = ("epochs", "batch_size", "lr", "lr_min", "schedule", "warmup", "optimizer", "momentum", "nesterov", "weight_decay", "muon_lr",
          "bias_lr_scale", "label_smoothing", "pad", "padding", "flip", "small_share", "small_size")  # fmt: skip
PUBLISHED_LR, PUBLISHED_BATCH = 0.01, 128  # of the victims that the published learning rates of fine-tuning defenses belong to
SWITCHES = {
    "overwrite": "replace a finished or different run of this name; an interrupted one with the same options goes on",
    "dry_run": "say what would be read, trained and written, and do nothing",
    "debug": "show the traceback of an error",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every script."""

    device: str = "auto"
    """cpu, cuda, cuda:1 ..., or auto: the first GPU where there is one"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """of training and evaluation; auto: bf16 where the device computes in it"""
    random_seed: int = 0
    """of weights, batches and augmentation"""
    record_path: str = "record"
    """folder that holds the records"""
    save_folder_name: str | None = None
    """name of this run's folder; by default made from the script's name"""
    cache_path: str = "data/cache"
    """folder of the decoded data sets"""
    resident_gb: float | None = None
    """GB of memory that a data set may take on the device; a larger one stays in its file and is read batch by batch. By default a third of
    what is free"""
    download: bool = False
    """let torchvision download a data set that is not there"""
    eval_every: int = 0
    """measure ACC, ASR and RA every so many epochs too (0: only at the end)"""
    overwrite: bool = False
    dry_run: bool = False
    debug: bool = False

    def __post_init__(self):
        require(self.random_seed >= 0, "random_seed", "0 or more")
        require(self.resident_gb is None or self.resident_gb >= 0, "resident_gb", "0 or more")
        require(self.eval_every >= 0, "eval_every", "0 or more epochs")
        name = self.save_folder_name
        require(name is None or (name not in {"", ".", ".."} and Path(name).name == name), "save_folder_name", "a plain folder name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Options of stochastic gradient descent."""

    epochs: int = 100
    """passes over the training set"""
    batch_size: int = 128
    """images per step"""
    lr: float = 0.01
    """highest learning rate"""
    lr_min: float = 0.0
    """learning rate that the schedule falls to"""
    schedule: Literal["cosine", "one_cycle"] = "cosine"
    """cosine: down along half a cosine, epoch by epoch; one_cycle: up and down in straight lines, step by step"""
    warmup: float = 0.2
    """share of a one_cycle's steps in which the rate rises, 0..1"""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """sgd: for all weights; muon: Muon for the convolutions, of which a batch norm must follow every one, and SGD for the rest"""
    muon_lr: float = 0.24
    """highest learning rate of Muon; it follows the schedule of --lr, which is that of SGD"""
    bias_lr_scale: float = 1.0
    """learning rate of biases and batch norms, as a multiple of --lr; they decay by as much per step as other weights do"""
    momentum: float = 0.9
    """of SGD"""
    nesterov: bool = False
    """Nesterov's form of the momentum"""
    weight_decay: float = 5e-4
    """L2 penalty on all weights"""
    compile: Literal["none", "default", "cuda_graphs"] = "none"
    """have torch.compile make kernels for the network, which takes a while; cuda_graphs: and replay them as one, on a GPU"""

    def __post_init__(self):
        super().__post_init__()
        require(self.epochs >= 0, "epochs", "0 or more")
        require(self.batch_size >= 1, "batch_size", "1 or more images")
        require(self.lr > 0 and 0 <= self.lr_min <= self.lr, "lr", "positive and no less than lr_min (itself 0 or more)")
        require(0 <= self.warmup <= 1, "warmup", "a share from 0 to 1")
        require(0 <= self.momentum < 1, "momentum", "0 or more and below 1")
        require(self.momentum > 0 or not self.nesterov, "momentum", "above 0 for --nesterov")
        require(self.weight_decay >= 0, "weight_decay", "0 or more")
        require(self.muon_lr > 0, "muon_lr", "positive")
        require(self.bias_lr_scale > 0, "bias_lr_scale", "positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromScratch(Training):
    """Options of training a network from random weights on a whole training set."""

    label_smoothing: float = 0.0
    """share of a training label that is spread over all classes (not where an attack brings a loss of its own), 0..1"""
    pad: int = 4
    """pixels by which a picture is padded before the random crop"""
    padding: Literal["zeros", "reflect"] = "zeros"
    """what the padded border shows: black, or the picture mirrored"""
    small_share: float = 0.0
    """share of the epochs, from the first on, in which the network sees smaller images, 0..1: less work for nearly the same accuracy"""
    small_size: int = 24
    """side in pixels of those smaller images"""
    flip: Literal["random", "alternating"] = "random"
    """how pictures are mirrored, where a mirrored picture keeps its class: random: half of each batch; alternating: every
    picture in every other epoch"""

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.label_smoothing < 1, "label_smoothing", "0 or more and below 1")
        require(self.pad >= 0, "pad", "0 or more pixels")
        require(0 <= self.small_share <= 1, "small_share", "a share from 0 to 1")
        require(self.small_size >= 8, "small_size", "8 pixels or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack(FromScratch, Common):
    """Options of every attack."""

    why_all2one: ClassVar[str] = ""  # the reason, where an attack with wrong labels has no all2all form
    clean_label: ClassVar[bool] = False  # poison pictures of the target class only, which keep their label

    dataset: str = "digits"
    """digits (built in), cifar10, cifar100, gtsrb, tiny, or folder: any pair of image folders"""
    dataset_path: str = "data"
    """folder that holds <dataset>/; with --dataset folder, the one that holds train/ and test/ or val/"""
    image_size: int | None = None
    """side in pixels that pictures are resized to; by default the data set's own (required for folder)"""
    recipe: str = "backdoorbench"
    """how the victim is trained: a file of config/recipe, which single options override"""
    model: str = "preactresnet18"
    """architecture of the victim"""
    width: int | None = None
    """channels of the first layer of resnet9, airbench or preactresnet18 (64 unless given; 16 or 32 suit small CPUs)"""
    pratio: float = 0.1
    """poisoned share of the whole training set, 0..1"""
    attack_target: int = 0
    """class that triggered images shall be taken for (all2one)"""
    label_mode: Literal["all2one", "all2all"] = "all2one"
    """all2one: every triggered image becomes the target; all2all: class y becomes y+1"""
    poison_seed: int = 0
    """of the choice of poisoned images and of generated patterns"""

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.pratio <= 1, "pratio", "a share from 0 to 1")
        why = self.why_all2one or self.clean_label and "only pictures of the one target class are poisoned"
        require(self.label_mode == "all2one" or not why, "label_mode", f"all2one here: {why}")
        require(self.attack_target >= 0, "attack_target", "a class number, 0 or more")
        require(self.image_size is None or self.image_size >= 8, "image_size", "8 pixels or more")
        require(self.poison_seed >= 0, "poison_seed", "0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanModel(Attack):
    """Options of an attack whose trigger is made with the help of a clean model."""

    clean_record: str | None = None
    """clean model's record, a folder's path or its name below record_path; by default one is trained and kept in cache_path"""
    steps: int = 500
    """of the search for the pattern"""

    def __post_init__(self):
        super().__post_init__()
        require(self.steps >= 1, "steps", "1 or more")

    @property
    def needs_clean_model(self):
        """Whether the pattern is made rather than drawn or loaded."""
        return getattr(self, "trigger_path", None) is None and getattr(self, "pattern", "inverted") == "inverted"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defense(Common):
    """Options of every defense."""

    holds_clean: ClassVar[bool] = True  # whether it works with clean pictures; one that does not is handed none
    # options with learning rates that were published for a victim trained at PUBLISHED_LR: their defaults follow the victim's rate
    relative_rates: ClassVar[tuple[str, ...]] = ()

    result_file: str
    """record to repair: a folder's path, or its name below record_path"""
    dataset_path: str | None = None
    """where the record's data set lies; by default where the attack found it"""
    clean_ratio: float = 0.05
    """clean images that the defender holds, as a share of the training set; in any case one of every class"""
    clean_count: int | None = None
    """the same as a number, which then counts instead"""
    data_seed: int = 0
    """of the choice of those clean images"""

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.clean_ratio <= 1, "clean_ratio", "a share above 0, up to 1")
        require(self.clean_count is None or self.clean_count >= 1, "clean_count", "1 or more images")
        require(self.data_seed >= 0, "data_seed", "0 or more")

    def budget(self, count, classes):
        """How many clean images the defender holds, of a training set of `count`."""
        if not self.holds_clean:
            return 0
        asked = int(self.clean_ratio * count + 1e-9) if self.clean_count is None else self.clean_count
        return min(max(asked, classes), count)

    def work(self, clean, found):
        """For a dry run: in words what will be computed with so many clean pictures and a found training set of `found`.

        None: what the options of Training say, on the clean pictures.
        """

    @property
    def record(self):
        """Path of the record's folder; MissingError where there is none."""
        return find_record(self.result_file, self.record_path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning(Training, Defense):
    """Options of a defense that trains the victim on; its learning rates are by default relative to the victim's own."""

    relative_rates: ClassVar[tuple[str, ...]] = ("lr", "lr_min")

    lr: float = 0.01
    """highest learning rate; where it is not given, 0.01 times how much larger the victim's rate per image was than 0.01 in batches of 128"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choosing(Defense):
    """Options of a defense that chooses one of several settings, from weak to strong, by itself."""

    tolerance: float = 0.1
    """share of the victim's accuracy that the chosen setting may cost, 0..1"""
    selection: Literal["val", "oracle"] = "val"
    """val: choose by a fifth of the clean pictures, which are held back for that; oracle: by the test set, as published tables often did,
    which every table here marks"""

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.tolerance <= 1, "tolerance", "a share from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retraining(FromScratch, Defense):
    """Options of a defense that trains the victim's network anew; what is not given is as in the victim's own training."""

    holds_clean: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distinguishing(Defense):
    """Options of a defense that tells poisoned pictures of the found set by how sensitive their features are."""

    holds_clean: ClassVar[bool] = False

    alpha_c: float = 0.2
    """share of the found set, the least sensitive pictures, that is taken for clean, 0..1"""
    alpha_p: float = 0.05
    """share of it, the most sensitive ones, that is taken for poisoned, 0..1; both together are at most 1"""
    feature_epochs: int = 2
    """passes over the found set, without augmentation, that make the features"""
    centre_epochs: int = 10
    """passes that then drive the centres of the labels apart"""
    feature_lr: float = 0.01
    """learning rate of both, above 0"""
    batch_size: int = 128
    """images per step of both"""

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.alpha_c and 0 <= self.alpha_p and self.alpha_c + self.alpha_p <= 1 + 1e-9, "alpha_c and alpha_p",
                "shares, 0 or more and at most 1 together")  # fmt: skip
        require(self.feature_epochs >= 0 and self.centre_epochs >= 0, "feature_epochs and centre_epochs", "0 or more")
        require(self.feature_lr > 0, "feature_lr", "positive")
        require(self.batch_size >= 1, "batch_size", "1 or more images")

    @property
    def prior(self):
        return f"clean={self.alpha_c} poison={self.alpha_p}"

    def work(self, clean, found):
        return f"a network that tells pictures apart, {self.feature_epochs} + {self.centre_epochs} epochs on {found} pictures"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Isolating(Retraining):
    """Options of a defense that first isolates the pictures whose labels are learned too easily: see utils/isolate.py."""

    isolated: float = 0.01
    """share of the found set that is isolated, which the defender declares, above 0, up to 0.5"""
    isolate_epochs: int = 20
    """passes over the found set before the losses are ranked"""
    isolate_lr: float | None = None
    """learning rate of these passes, which stays as it is; by default --lr"""
    gamma: float = 0.5
    """loss below which the training of these passes pushes a picture up again"""
    floor: Literal["lga", "flooding"] = "lga"
    """lga: sign(l - gamma) l, the paper's local gradient ascent; flooding: |l - gamma| + gamma. Taken picture by picture the gradient is the
    same, and so is the result"""

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.isolated <= 0.5, "isolated", "a share above 0, up to 0.5")
        require(self.isolate_epochs >= 1, "isolate_epochs", "1 or more")
        require(self.isolate_lr is None or self.isolate_lr > 0, "isolate_lr", "positive")
        require(self.gamma >= 0, "gamma", "0 or more")

    @property
    def prior(self):
        return f"isolated={self.isolated}"


def find_record(name, record_path):
    """Path of a record's folder, given as such or by its name below record_path; MissingError where there is none."""
    places = [Path(name), Path(record_path) / name]
    for place in places:
        if place.is_dir():
            return place
    raise MissingError(f"there is no record {name!r}: looked at {places[0]} and {places[1]}; "
                       "an attack script makes one, and --record_path says where records lie")  # fmt: skip


def require(holds, option, what):
    """ConfigError unless `holds`: 'option must be what'."""
    if not holds:
        raise ConfigError(f"{option} must be {what}")


def parse(Config, argv, description="", prog=None):
    """The merged options as a `Config`: defaults < config/recipe/<recipe>.yaml < config/dataset/<dataset>.yaml < --yaml_path
    < flags.

    Raises ConfigError for an unknown option or YAML key and for a value of the wrong type or out of range.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("yaml_path", "dataset", "model", "recipe", "result_file", "record_path"):
        first.add_argument(f"--{name}", action="append", default=[])
    early, _ = first.parse_known_args(argv)
    files = [item for path in early.yaml_path for item in ("--yaml_path", path)]
    yaml_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    yaml_only.add_argument("--yaml_path", action="append")
    flags = yaml_only.parse_known_args(argv)[1]  # files go first, so that a flag wins wherever it stands

    parser = _parser(Config, description, prog)
    given = {}
    for path in early.yaml_path:
        given |= _mapping(Path(path))
    given |= {name: values[-1] for name, values in vars(early).items() if values}
    parser.set_defaults({**_recipe_options(Config, given), **_dataset_options(Config, given)})
    try:
        options = parser.parse_args([*files, *flags])
    except jsonargparse.ArgumentError as error:
        raise ConfigError(_explain(str(error), parser, given, flags)) from error
    names = [field.name for field in dataclasses.fields(Config)]
    try:
        return Config(**{name: options[name] for name in names})
    except TypeError as error:  # flags and --yaml_path were checked by the parser
        raise ConfigError(f"a value in the files of config/ has the wrong type: {error}") from error


def identity(config, *, seeds=True):
    """The options that make two runs the same experiment, as a dict; without the seeds if asked."""
    hidden = NOT_IDENTITY if seeds else NOT_IDENTITY | SEEDS
    return {key: value for key, value in plain(config).items() if key not in hidden}


def digest(options):
    """A short name for a dict of options: 12 hexadecimal digits of its sha256."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]


def plain(config):
    """A dataclass of options as the dict that config.yaml holds."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in SWITCHES}


def script(kind, name):
    """The file behind runs called `name`: attack/clean.py adds the name of the trigger to its own, clean_badnet say."""
    own = name.startswith("clean_") and not (ROOT / kind / f"{name}.py").is_file()
    return f"{kind}/{'clean' if own else name}.py"


def command(script, config):
    """The command line that `parse` makes `config` of: the options that differ from the defaults of its recipe and data set."""
    given = plain(config)
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    usual |= {**_recipe_options(type(config), given), **_dataset_options(type(config), given)}
    return shlex.join(["python", script, *words({name: value for name, value in given.items() if value != usual[name]})])


def words(given):
    """Options as the words of a command."""
    found = []
    for name, value in given.items():
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        found += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return found


class _Help(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of a script's docstring."""


def _parser(Config, description, prog):
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False, formatter_class=_Help)
    parser.add_argument("--yaml_path", action="config", help="YAML file of options; a flag overrides what it says")
    parser.add_class_arguments(Config, as_group=False, skip=set(SWITCHES))
    for name, text in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser


def _recipe_options(Config, given):
    """What config/recipe/<recipe>.yaml says: its section `all`, and over it the one named like the data set."""
    if not issubclass(Config, Attack):
        return {}
    name, folder = str(given.get("recipe", Config.recipe)), ROOT / "config" / "recipe"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"there is no recipe {name!r}: config/recipe has {', '.join(known)}")
    sections = _mapping(folder / f"{name}.yaml")
    if not sections or not all(isinstance(part, dict) for part in sections.values()):
        raise ConfigError(f"config/recipe/{name}.yaml must be YAML with a section `all`, and others named like data sets")
    options = {**sections.get("all", {}), **sections.get(str(given.get("dataset", Config.dataset)), {})}
    if wrong := options.keys() - {field.name for field in dataclasses.fields(Attack)}:
        raise ConfigError(f"config/recipe/{name}.yaml names {sorted(wrong)[0]!r}, which is no option of an attack")
    return options


def _dataset_options(Config, given):
    """What config/dataset/<dataset>.yaml says for attacks or for defenses, and over it in the section named like the script.

    For a defense the record names the data set.
    """
    if issubclass(Config, Defense):
        section, made = "defense", {}
        for place in (Path(given.get("result_file", "")), Path(given.get("record_path", "record")) / given.get("result_file", "")):
            made = made or _mapping(place / "config.yaml")
        dataset = made.get("dataset")
    else:
        section, dataset = "attack", given.get("dataset", Config.dataset)
    options = _mapping(ROOT / "config" / "dataset" / f"{Path(str(dataset)).name}.yaml").get(section) or {}
    options = {**options, **options.get(Path(sys.modules[Config.__module__].__file__).stem, {})}
    known = {field.name for field in dataclasses.fields(Config)}
    if given.get("model", options.get("model")) != options.get("model"):
        known -= {"width"}  # it is that of the model which the file names
    if issubclass(Config, Retraining):
        options |= {key: made[key] for key in RECIPE if key in made}
    if issubclass(Config, Defense) and "lr" not in options:  # where a data set has a rate of its own, all rates are as written
        options |= rates_for(Config, made)
    return {key: value for key, value in options.items() if key in known}


def rates_for(Config, victim):
    """The default learning rates of a defense for a `victim`, the options of its attack; none where they are the published ones.

    A published rate belongs to a victim that was trained by SGD at PUBLISHED_LR with batches of PUBLISHED_BATCH, and is multiplied by how
    much larger this one's rate per image was: a batch twice as large is trained at twice the rate. That is the linear scaling rule of
    Goyal et al., "Accurate, Large Minibatch SGD", 2017 (arXiv 1706.02677).
    """
    rate, batch = victim.get("lr"), victim.get("batch_size")
    if not isinstance(rate, float) or not 0 < rate < math.inf or not isinstance(batch, int) or batch < 1:
        return {}
    scale = rate / batch * PUBLISHED_BATCH / PUBLISHED_LR
    published = {field.name: field.default for field in dataclasses.fields(Config)}
    return {name: float(f"{published[name] * scale:.3g}") for name in Config.relative_rates}


def _mapping(path):
    """The YAML mapping in a file; empty where there is none (the parser then says what is wrong)."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _explain(text, parser, given, flags):
    """One sentence for what the parser found wrong; an unknown option is named with its nearest names."""
    known = [action.dest for action in parser._actions] + ["print_config"]
    used = [*given, *(flag[2:].split("=")[0] for flag in flags if flag.startswith("--"))]
    for name in used:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.5)
            return f"unknown option {name!r}; " + (f"the nearest are {', '.join(near)}" if near else "--help lists all")
    return " ".join(text.split())
