"""Records in Python: the model, the images, the figures, and any other model measured on them."""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas
import torch
from torch import nn

from antidote_bench import models
from antidote_bench.models.examine import modes_kept
from antidote_bench.utils import device as devices
from antidote_bench.utils import evaluation, files, parsing
from antidote_bench.utils.config import Defense
from antidote_bench.utils.data.dataset import Spec, Split
from antidote_bench.utils.errors import ConfigError, MissingError
from antidote_bench.utils.evaluation import TestSets
from antidote_bench.utils.protocol import repaired as repairs
from antidote_bench.utils.record import contents
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.report import detections as reported
from antidote_bench.utils.report import runs
from antidote_bench.utils.text import quoted

# columns of results.csv that hold text, even where it looks like a number
TEXT = (
    "run", "dataset", "model", "attack", "label_mode", "recipe", "precision", "defense", "variant",
    "stage", "selection", "prior", "device", "version", "config_hash", "detection", "judges",
    "suspects",
)  # fmt: skip


def is_image(images):
    """Whether a tensor has the values of images: uint8, or float in [0, 1], up to rounding."""
    if images.dtype == torch.uint8 or not len(images):
        return images.dtype == torch.uint8 or images.is_floating_point()
    return images.is_floating_point() and -0.001 <= images.min() and images.max() <= 1.001


class Measures(NamedTuple):
    """ACC, ASR and RA as fractions; `asr` and `ra` are None where no image bears a trigger."""

    acc: float
    asr: float | None
    ra: float | None

    def __str__(self):
        """In percent."""
        shown = ("n/a" if value is None else f"{100 * value:.1f}" for value in self)
        pairs = zip(("ACC", "ASR", "RA"), shown, strict=True)
        return "  ".join(f"{name} {value}" for name, value in pairs)


@dataclass(frozen=True, eq=False)
class Record:
    """A finished attack: its options, its victim, and the images before and after the trigger.

    Images are uint8 N,3,S,S, labels and true classes int64 N; `split.images`, `split.labels` and
    `split.truth` are the parts of a split. All of it lies on `device`.
    """

    path: Path
    attack: str
    """name of the attack"""
    measures: Measures
    """ACC, ASR and RA of the victim, as the record states them"""
    options: dict[str, Any] = field(repr=False)
    """the content of config.yaml"""
    spec: Spec = field(repr=False)
    """the data set: `name`, `classes`, `size`, `class_names`, `mean`, `std`"""
    model: nn.Module = field(repr=False)
    """the victim, in evaluation mode; it takes float images in [0, 1]"""
    train: Split = field(repr=False)
    """the training set as the victim saw it; its `truth` is what its labels claim"""
    clean_train: Split = field(repr=False)
    """the same before the attack"""
    poison_index: torch.Tensor = field(repr=False)
    """positions of the poisoned images in the training set"""
    cover_index: torch.Tensor = field(repr=False)
    """positions of the training images that are changed and keep their label"""
    test_sets: TestSets = field(repr=False)
    """what models are measured on: `test`, and `backdoor` with triggers and the attacker's
    labels"""
    backdoor_index: torch.Tensor = field(repr=False)
    """positions of the triggered images in the test set"""
    settings: Defense = field(repr=False)
    """where the data set lies, the device and the precision, as `load` was told"""
    precision: str
    """that the network computes in here, fp32 or bf16"""
    new_network: Callable[[], nn.Module] = field(repr=False)
    """makes a network like the victim, with random weights"""

    @property
    def device(self) -> torch.device:
        return self.test_sets.test.labels.device

    @property
    def before(self) -> torch.Tensor:
        """The test images that get a trigger, without it."""
        return self.test_sets.test.images[self.backdoor_index]

    @property
    def after(self) -> torch.Tensor:
        """The same images with the trigger, as they are stored."""
        return self.test_sets.backdoor.images

    @cached_property
    def trigger(self):
        """The attack's `Trigger`, made again from the record's options and tensors.

        Raises RefusedError where it does not give the images that the record holds.
        """
        from antidote_bench import triggers

        return triggers.of_record(self)

    @property
    def results(self) -> pandas.DataFrame:
        """The rows of results.csv, of the victim and of all defenses that were run on it."""
        return results(self.path)

    @property
    def detections(self) -> pandas.DataFrame:
        """The same of all detectors."""
        return detections(self.path)

    def repaired(self, name: str) -> "Repaired":
        """The finished defense in the folder defense/<name> of the record.

        Raises RefusedError where it is damaged, or repaired another victim.
        """
        return _load_repaired(self, name)


@dataclass(frozen=True, eq=False)
class Repaired:
    """A finished defense: its options, and the model that it made of the victim."""

    path: Path
    defense: str
    before: Measures
    """of the victim"""
    after: Measures
    """of the model that the defense returned"""
    options: dict[str, Any] = field(repr=False)
    """the content of its config.yaml"""
    row: pandas.Series = field(repr=False)
    """the row of results.csv"""
    _record: Record = field(repr=False)
    _info: dict = field(repr=False)

    @cached_property
    def model(self) -> nn.Module:
        """The repaired model, in evaluation mode on the device of the record."""
        return _rebuilt(self._record, self.path, self._info)


def load(record: str | Path, **options) -> Record:
    """The record in a folder, or of that name below `record_path`.

    `options` are those that every defense has: `record_path`, `dataset_path`, `cache_path`,
    `device`, `precision`, `download` and others. Every file is checked first, and nothing in the
    record is executed. Raises ConfigError for a wrong option, MissingError where the record or its
    data set is not there, and RefusedError where the record is damaged.
    """
    if not isinstance(record, str | Path):
        raise ConfigError(f"a record is a folder's path or its name, not {_kind(record)}")
    words = parsing.words({**options, "result_file": record})
    settings = parsing.parse(Defense, words)
    resolved, device = devices.setup(settings)
    path = settings.record
    info = contents.open_record(path)
    loaded = contents.load(path, resolved, device, info)
    _, measures = contents.read_measures(path, info)
    return Record(
        path,
        info["name"],
        _measures(measures),
        contents.read_options(path, info),
        loaded.spec,
        loaded.model.eval(),
        loaded.train,
        loaded.clean,
        (loaded.kinds == contents.POISON).nonzero().flatten(),
        (loaded.kinds == contents.COVER).nonzero().flatten(),
        loaded.test_sets,
        loaded.backdoor_index,
        settings,
        resolved.precision,
        partial(models.build, loaded.name, loaded.spec, loaded.width),
    )


def evaluate(model: nn.Module, on: Record | TestSets, precision: str | None = None) -> Measures:
    """ACC, ASR and RA of any network, N,3,S,S in [0, 1] -> logits N,classes.

    `on` is a record, or test sets of your own: TestSets(Split(images, labels, truth), the same with
    triggers), images uint8, or float in [0, 1]. `precision` is fp32 or bf16, by default that of the
    record, and fp32 without one. The network stays on its device, which must be that of the images,
    and in its mode. Raises ConfigError where the arguments are others.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, not {_kind(model)}")
    if not isinstance(on, Record | TestSets):
        raise ConfigError(f"a model is evaluated on a Record or TestSets, not {_kind(on)}")
    test_sets, usual = (on.test_sets, on.precision) if isinstance(on, Record) else (on, "")
    _require_test_sets(test_sets)
    precision = precision or usual or "fp32"
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision must be fp32 or bf16, not {quoted(precision)}")
    here, there = test_sets.test.labels.device, next(model.parameters(), test_sets.test.labels)
    if here.type != there.device.type:
        raise ConfigError(
            f"the model is on {there.device} and the images are on {here}: move the model there "
            f"with .to({str(here)!r})"
        )
    _require_logits(model, test_sets.test, on.spec.classes if isinstance(on, Record) else None)
    return _measures(evaluation.evaluate(model, test_sets, precision))


def _kind(value):
    return f"an object of the class {type(value).__name__}"


def _require_test_sets(test_sets):
    """ConfigError unless the parts of `TestSets` that someone has made are right."""
    for name, split in test_sets._asdict().items():
        if split is None and name not in ("test", "backdoor"):
            continue
        if not isinstance(split, Split):
            raise ConfigError(f"{name} of the test sets must be a Split, not {_kind(split)}")
        counts = {len(part) for part in (split.images, split.labels, split.truth)}
        if len(counts) > 1:
            raise ConfigError(f"{name} must have a label and a true class for every image")
        images = split.images
        if torch.is_tensor(images) and len(images) and not is_image(images):
            raise ConfigError(f"{name} must have images of uint8, or float in [0, 1]")


def _require_logits(model, split, classes):
    """ConfigError where a model returns anything but the logits of images, N,classes."""
    if not len(split):
        return
    device = split.labels.device
    images = split[torch.arange(min(len(split), 2), device=device)].images.to(device)
    with modes_kept(model), torch.no_grad():
        logits = model.eval()(images / 255 if images.dtype == torch.uint8 else images)
    found = tuple(logits.shape) if torch.is_tensor(logits) else _kind(logits)
    least = classes or int(split.truth.max()) + 1
    right = torch.is_tensor(logits) and logits.ndim == 2 and len(logits) == len(images)
    if not right or logits.shape[1] < least or classes and logits.shape[1] != classes:
        wanted = f"({len(images)}, {classes or f'{least} or more'})"
        raise ConfigError(
            f"the model must turn {len(images)} images into logits of shape {wanted}, and returns "
            f"{found}"
        )


def results(*folders: str | Path) -> pandas.DataFrame:
    """The results of all finished attacks and defenses at or below `folders`, a row for each.

    The column `run` is the run's folder, the others are those of results.csv; shares are fractions.
    A warning names every run that is left out, because it is damaged or unfinished.
    """
    (others, _), left_out = _search(folders)
    found, damaged = runs.read_all(others)
    return _frame(found, layout.RESULT_COLUMNS, [*left_out, *damaged])


def detections(*folders: str | Path) -> pandas.DataFrame:
    """The same of all finished detectors."""
    (_, judged), left_out = _search(folders)
    found, damaged = reported.read_all(judged)
    return _frame(found, layout.DETECTION_COLUMNS, [*left_out, *damaged])


def _search(folders):
    """((folders of attacks and defenses, folders of detectors), [(path, why it is left out)])"""
    if not folders:
        raise ConfigError("name one folder or more, record say")
    for folder in folders:
        if not isinstance(folder, str | Path):
            raise ConfigError(f"a folder is text or a Path, not {_kind(folder)}")
        if not Path(folder).is_dir():
            raise MissingError(f"there is no folder {folder}")
    paths, links = runs.search(folders)
    return reported.split(paths), links


def _frame(found, columns, left_out=()):
    """Rows of text as a frame, in which numbers are numbers and empty fields are missing."""
    for path, why in left_out:
        warnings.warn(f"{path} is left out: {why}", stacklevel=3)
    rows = [{"run": str(run.path), **run.row} for run in found]
    columns = dict.fromkeys(["run", *columns, *(name for row in rows for name in row)])
    types = {name: str for name in TEXT if name in columns}
    text = io.StringIO(files.csv_text(rows, list(columns)))
    return pandas.read_csv(text, dtype=types, keep_default_na=False, na_values=[""])


def _measures(values):
    return Measures(values["acc"], values["asr"], values["ra"])


def _load_repaired(record, name):
    """The `Repaired` in a folder of a record."""
    path = record.path / layout.DEFENSES / name
    if not path.is_dir():
        raise MissingError(f"{record.path} has no defense {quoted(name)}: run_defense runs one")
    path, info = repairs.find(record.path, name, layout.verify(record.path, "attack"))
    run = runs.read_run(path, {})
    row = _frame([run], layout.RESULT_COLUMNS).iloc[0]
    before, after = (
        Measures(*(None if pandas.isna(row[key]) else float(row[key]) for key in keys))
        for keys in (("acc_before", "asr_before", "ra_before"), ("acc", "asr", "ra"))
    )
    defense, options = run.row["defense"], layout.read_options(path)
    return Repaired(path, defense, before, after, options, row, record, info)


def _rebuilt(record, path, info):
    """The model of a defense, whose network may have layers that the victim's has not."""
    model = repairs.rebuilt(path, info, record.new_network())
    return model.to(record.device).eval()
