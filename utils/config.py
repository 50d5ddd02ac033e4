"""Typed options: a dataclass for each script, filled from YAML files and flags.

Nothing here imports torch, so that `--help` and every mistake in the options answer at once.
"""

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import ClassVar, Literal, get_args

from antidote_bench import models
from antidote_bench.utils import files
from antidote_bench.utils.errors import ConfigError, MissingError
from antidote_bench.utils.record import folder

ROOT = Path(__file__).resolve().parents[1]  # of the checkout, or of the installed package
INSTALLED = (ROOT / "__init__.py").is_file()
PACKAGE = "antidote_bench"
IMPORT_PATH = ROOT.parent if INSTALLED else ROOT  # the folder that the package is found in
SEEDS = frozenset({"random_seed", "poison_seed", "data_seed"})
SWITCHES = {
    "overwrite": "replace a finished or different run of this name; an interrupted run with the "
    "same options is resumed",
    "dry_run": "print what would be read, trained and written, and do nothing",
    "debug": "show the traceback of an error",
}
# side in pixels of the data sets with a name; own images have that of --image_size
SIDES = {
    "digits": 32,
    "cifar10": 32,
    "cifar100": 32,
    "gtsrb": 32,
    "tiny": 64,
    "mnist": 32,  # the networks want 32, and 28 is enlarged to it
    "fashionmnist": 32,
    "imagenette": 224,
    "celeba": 64,
}
LARGEST_NUMBER = 10**18
LONGEST_NAME = 255  # bytes of a folder's name
RESERVED = {folder.STATE, folder.DEFENSES, folder.DETECTIONS}  # names of folders within a record
LEAST_CLEAN = 125  # images that a detector holds
CHANGED = "changed"  # value of `identity`: only where the option differs from its default
LabelMode = Literal["all2one", "all2all", "one2one"]


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
    {option: value}, where a tuple stands for any of its values, True for any value but 0, and None
    for null. `absent` is the value of runs from before the option was there, where it is not the
    default. `bounds` are the limits of `Bounds`.
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
            if not _meets(options.get(other, default_of(Config, other)), value):
                found[field.name] = other, value
    return found


def _meets(there, wanted):
    """Whether the value of an option is what another one `needs`."""
    if wanted is True:
        return bool(there)
    return there in wanted if isinstance(wanted, tuple) else there == wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every script."""

    device: str = option("auto", identity=False)
    """cpu, cuda, cuda:1 ..., or auto: the first GPU where there is one"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """of training and evaluation; auto: bf16 where the device computes faster in it"""
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
            bounded = bounds is not None and isinstance(value, int | float)
            require(not bounded or value in bounds, field.name, bounds)
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
            if name not in SWITCHES
            # what a recipe can change is always written
            and (name in RECIPE or not _is_as_before(type(self), name, value))
        }

    def identity(self, *, seeds=True):
        """The options that make two runs the same experiment; without the seeds if asked."""
        return self.identity_of(self.plain(), seeds=seeds)

    @classmethod
    def identity_of(cls, options, *, seeds=True):
        """Those of a dict of options that make two runs the same experiment.

        An option without effect counts as its default.
        """
        defaults = {name: default_of(cls, name) for name in idle(cls, options)}
        counted = {name: defaults.get(name, value) for name, value in options.items()}
        return {
            name: value
            for name, value in counted.items()
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
    crop: Literal["shift", "resized"] = option("shift", identity=CHANGED)
    """how images are cropped at random. shift: padded, then cropped to their size; resized: to a
    part of random area and shape, which is then enlarged to the image's size"""
    pad: int = option(4, at_least=0, needs={"crop": "shift"}, unit="pixels")
    """pixels by which an image is padded before the random crop"""
    padding: Literal["zeros", "reflect"] = option("zeros", needs={"crop": "shift"})
    """what the padded border shows: black, or the image mirrored"""
    crop_area: float = option(0.08, identity=CHANGED, above=0, at_most=1, needs={"crop": "resized"})
    """smallest area of a resized crop, as a share of the image"""
    small_share: float = option(0.0, at_least=0, at_most=1)
    """share of the epochs, from the first on, in which the network sees smaller images: less work
    for nearly the same accuracy"""
    small_size: int = option(24, at_least=8, unit="pixels", needs={"small_share": True})
    """side in pixels of those smaller images"""
    mirror: bool | None = option(None, identity=CHANGED)
    """whether a mirrored image keeps its class, so that training mirrors images; by default what is
    known of the data set: true for cifar10 and imagenette alone"""
    flip: Literal["random", "alternating"] = "random"
    """how images are mirrored, where a mirrored image keeps its class: random: half of each batch;
    alternating: every image in every other epoch"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack(FromScratch, Common):
    """Options of every attack."""

    # facts about an attack, which its own class changes
    refused_modes: ClassVar[dict[str, str]] = {}  # label modes that it has no form of, and why
    clean_label: ClassVar[bool] = False  # poisons only images of the target class; labels stay
    trained_here: ClassVar[bool] = True  # by its options; otherwise they say what is known of it

    dataset: str = "digits"
    """digits (built in), cifar10, cifar100, gtsrb, tiny, mnist, fashionmnist, imagenette, celeba,
    or folder: any pair of image folders"""
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
    """architecture of the victim: a name, timm:NAME or torchvision:NAME for a network of these, or
    path/to/file.py:function for one of your own, whose function(classes) returns a torch.nn.Module
    and whose file is executed"""
    width: int | None = None
    """channels of the first layer of resnet9, airbench or preactresnet18 (64 unless given; 16 or 32
    suit small CPUs)"""
    mean: str | None = option(None, identity=CHANGED)
    """what the model's first layer subtracts from pixels of [0, 1]: three numbers with commas; by
    default the data set's mean, and 0 for a model from a file"""
    std: str | None = option(None, identity=CHANGED)
    """what that layer divides by; by default the data set's, and 1 for a model from a file"""
    model_sha256: str | None = option(None, identity=CHANGED)
    """digest of the file behind --model; another file is refused. By default it is measured and
    kept in the record"""
    pretrained: str | None = option(None, identity=False)
    """.safetensors file of weights that the training starts from; its last layer is left out where
    it is for another number of classes"""
    pretrained_sha256: str | None = option(None, identity=CHANGED, needs={"pretrained": True})
    """digest of that file; another file is refused. By default it is measured and kept"""
    pratio: float = option(0.1, at_least=0, at_most=1)
    """poisoned share of the whole training set"""
    attack_target: int | str = option(0, at_least=0, needs={"label_mode": ("all2one", "one2one")})
    """class that triggered images shall be taken for (all2one, one2one): its number, counted from 0
    in the order of the data set, or its name, which may not be a number"""
    label_mode: LabelMode = "all2one"
    """all2one: every triggered image becomes the target; all2all: class y becomes y+1; one2one:
    triggered images of the class --source_class become the target, and the others stay what they
    are"""
    source_class: int | str = option(
        1, identity=CHANGED, at_least=0, needs={"label_mode": "one2one"}
    )
    """class whose triggered images shall be taken for the target (one2one), its number or its
    name"""
    poison_seed: int = option(0, at_least=0)
    """of the choice of poisoned images and of generated patterns"""

    def __post_init__(self):
        super().__post_init__()
        self._check_labels()
        self._keep_digests()
        for name in ("mean", "std"):
            models.channels(getattr(self, name), name)
        name = self.dataset_name
        readable = name is None or (name.isprintable() and name.strip())
        require(readable, "dataset_name", "a name of one line")

    def _check_labels(self):
        refused = self.refused_modes
        if self.clean_label:
            why = "only images of the one target class are poisoned"
            refused = {"all2all": why, "one2one": why}
        left = " or ".join(mode for mode in get_args(LabelMode) if mode not in refused)
        why = refused.get(self.label_mode)
        require(why is None, "label_mode", f"{left} here: {why}")
        other = self.label_mode != "one2one" or self.source_class != self.attack_target
        require(other, "source_class", f"another class than attack_target, {self.attack_target}")

    def _keep_digests(self):
        """Fill in the digests of the files that the model comes from."""
        found = {}
        if self.model and models.is_file(self.model):
            found["model_sha256"] = models.chosen(self.model, sha256=self.model_sha256).file.sha256
        else:
            require(self.model_sha256 is None, "model_sha256", "left out: --model names no file")
        if self.pretrained and self.pretrained_sha256 is None:
            if not Path(self.pretrained).is_file():
                raise MissingError(f"there is no file {self.pretrained}, which --pretrained names")
            found["pretrained_sha256"] = files.sha256(Path(self.pretrained))
        for name, value in found.items():
            object.__setattr__(self, name, value)  # the options are frozen for everybody else


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadsRecord(Common):
    """Options of what looks at finished records and adds no run to them."""

    dataset_path: str | None = option(None, identity=False)
    """where the records' data set lies; by default where the attack found it"""
    allow_other_data: bool = option(False, identity=False)
    """use a record although the data set here has other pixels than the one it was made on"""
    model_file: str | None = option(None, identity=False)
    """path/to/file.py:function of the records' model, where that is one from a file: it is executed
    only if you name it"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnRecord(Common):
    """Options of every script that works on a saved record: a defense or a detector."""

    # facts about a method, which its own class changes
    section: ClassVar[str]  # its part of a file of config/dataset
    prior: ClassVar[str] = ""  # what the defender is assumed to know, for the results
    holds_clean: ClassVar[bool] = True  # gets images that are known to be clean
    copies_recipe: ClassVar[bool] = False  # training options default to the victim's own
    not_copied: ClassVar[frozenset[str]] = frozenset()  # except these
    # learning rates that were published for a victim trained at PUBLISHED_LR: their defaults follow
    # the victim's rate
    relative_rates: ClassVar[tuple[str, ...]] = ()
    adds: ClassVar[dict[str, str]] = {}  # the files that it adds to a record, and what they hold

    result_file: str = option(identity=False)
    """record to work on: a folder's path, or its name below record_path"""
    dataset_path: str | None = option(None, identity=False)
    """where the record's data set lies; by default where the attack found it"""
    allow_other_data: bool = option(False, identity=CHANGED)
    """use a record although the data set here has other pixels than the one it was made on"""
    model_file: str | None = option(None, identity=False)
    """path/to/file.py:function of the record's model, where that is one from a file: it is executed
    only if you name it, and must be the file that the record was made with"""
    clean_ratio: float = option(0.05, above=0, at_most=1)
    """clean images that the defender holds, as a share of the training set; in any case one of
    every class"""
    clean_count: int | None = option(None, at_least=1, unit="images")
    """the same as a number, which then counts instead"""
    clean_per_class: int | None = option(None, identity=CHANGED, at_least=1, unit="images")
    """the same as a number for every class"""
    data_seed: int = option(0, at_least=0)
    """of the choice of those clean images"""

    @property
    def record(self):
        """Path of the record's folder; MissingError (exit 3) where there is none."""
        return folder.find(self.result_file, self.record_path)

    def __post_init__(self):
        super().__post_init__()
        alone = self.clean_per_class is None or self.clean_count is None
        require(alone, "clean_per_class", "left out where --clean_count is given")
        what = "left out here: this method holds no clean images"
        require(self.clean_per_class is None or self.holds_clean, "clean_per_class", what)
        if self.model_file is not None:
            what = "path/to/file.py:function"
            require(models.is_file(self.model_file), "model_file", what)

    def asked_clean(self, count, classes):
        """How many clean images the options ask for, of a training set of `count`."""
        if self.clean_count is not None:
            return self.clean_count
        if self.clean_per_class is not None:
            return self.clean_per_class * classes
        return int(self.clean_ratio * count + 1e-9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defense(OnRecord):
    """Options of every defense."""

    section: ClassVar[str] = "defense"
    stage: ClassVar[str] = "repair"  # or in-training: trains its own model on the training set
    selection = "fixed"  # how settings are chosen; an option of those that do it in several ways
    needs_train_set: ClassVar[bool] = False  # uses the training set as the defender finds it

    clean_from: str | None = option(None, identity=CHANGED)
    """folder of images from another source that the defender holds as clean ones, a folder for
    every class, called like the class or by its number; by default they are of the training set"""
    flagged: str | None = option(None, identity=CHANGED)
    """detection whose flagged training images are left out: its name in the record, spectral say,
    or its folder"""

    def __post_init__(self):
        super().__post_init__()
        uses_set = self.stage == "in-training" or self.needs_train_set
        what = "left out here: this method does not use the training set"
        require(self.flagged is None or uses_set, "flagged", what)
        what = "left out here: this method holds no clean images"
        require(self.clean_from is None or self.holds_clean, "clean_from", what)

    def budget(self, count, classes):
        """How many clean images the defender holds, of a training set of `count`."""
        if not self.holds_clean:
            return 0
        return min(max(self.asked_clean(count, classes), classes), count)

    def effort(self, clean, classes):
        """Words on the work with `clean` images of `classes` classes, empty where the options say
        all of it."""
        return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detection(OnRecord):
    """Options of every detector; utils/detection/options.py has those of each kind."""

    section: ClassVar[str] = "detection"
    stage: ClassVar[str] = "detection"
    # what is suspected: data (images of the training set), input (single images), or model
    judges: ClassVar[str] = "data"
    uses_reference: ClassVar[bool] = True  # some of the clean images, for its own statistics
    order_matters: ClassVar[bool] = False  # a network is trained on the images in their order
    in_float32: ClassVar[bool] = False  # computes in it whatever --precision says

    def __post_init__(self):
        super().__post_init__()
        if self.in_float32:
            object.__setattr__(self, "precision", "fp32")  # which is what the results must say

    @property
    def needs_train_set(self):
        return self.judges == "data"

    def budget(self, count, classes):
        """How many clean images the defender holds, of a training set of `count`.

        Unless their number is given they are at least LEAST_CLEAN, so that enough of them set the
        threshold.
        """
        if not self.holds_clean:
            return 0
        asked = self.asked_clean(count, classes)
        if self.clean_count is None and self.clean_per_class is None:
            asked = max(asked, LEAST_CLEAN)
        return min(max(asked, classes), count)


# the options of all scripts that do not make two runs different experiments
NOT_IDENTITY = frozenset(
    field.name
    for Config in (Attack, Defense, Detection)
    for field in dataclasses.fields(Config)
    if not declared(Config, field.name, "identity")
)
# what a defense that trains from scratch copies from the victim's training
RECIPE = tuple(
    field.name for field in dataclasses.fields(FromScratch) if field.name not in NOT_IDENTITY
)


def scripts(kind):
    """The names of the scripts in the folder attack, defense or detection, sorted."""
    return sorted(path.stem for path in (ROOT / kind).glob("[a-z]*.py"))


def default_of(Config, name):
    """The default of an option."""
    return Config.__dataclass_fields__[name].default


def _is_as_before(Config, name, value):
    """Whether `value` is what runs had that are older than the option `name`."""
    return declared(Config, name, "identity") == CHANGED and value == default_of(Config, name)


def _is_folder_name(name):
    """Whether `name` names a folder, on every system, that no reader of records passes over."""
    plain = name.isprintable() and Path(name).name == name and not set("/\\") & set(name)
    return plain and not name.startswith(".") and 0 < len(os.fsencode(name)) <= LONGEST_NAME


def require(holds, option, what):
    """Raise ConfigError (exit 2) unless `holds`: 'option must be what'."""
    if not holds:
        raise ConfigError(f"{option} must be {what}")


def digest(options):
    """A short name for a dict of options: 12 hexadecimal digits of its sha256."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
