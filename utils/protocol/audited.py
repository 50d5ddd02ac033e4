"""What is audited: a model from a record or from a file of weights, and images of its task.

Nothing that a model brings along is executed, and of a record the poisoned images stay closed.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from antidote_bench import models
from antidote_bench.utils import checkpoint, config
from antidote_bench.utils.audit import calibration as known
from antidote_bench.utils.audit import options, verdict
from antidote_bench.utils.data import dataset, listing, sources
from antidote_bench.utils.data import images as image_files
from antidote_bench.utils.data.dataset import Spec, Split
from antidote_bench.utils.device import setup
from antidote_bench.utils.errors import ConfigError, MissingError, RefusedError, is_out_of_memory
from antidote_bench.utils.evaluation import predict
from antidote_bench.utils.exchange import weights
from antidote_bench.utils.record import contents
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.text import cut

LARGEST = 2**31  # bytes of a file of weights
MOST_IMAGES = 20_000
MOST_REFERENCES = 20  # benign models that a found trigger is tried on
COUNTER = "num_batches_tracked"  # of batch norms, the one whole number in most state dicts


class Given(NamedTuple):
    """The images that the user gives."""

    split: Split
    labelled: bool  # otherwise the labels are the model's own answers
    accuracy: float | None  # of the model on labelled images
    digest: str  # of pixels and given labels


@dataclass(frozen=True)
class Audited:
    """A model to judge, in evaluation mode and frozen."""

    model: nn.Module
    network: str | models.Architecture
    width: int | None
    spec: Spec
    group: known.Group
    path: str
    sha256: str  # of the file with the weights
    size: int  # bytes of that file
    benign: bool | None  # as its record says
    attack: str = ""  # as its record says
    asr: float | None = None  # 0 to 1, as its record says
    notes: tuple = ()


# ---------- the model ----------


def open_model(path, said):
    """The `Audited` model in a record, or in a file of weights; `said` is an `options.Subject`.

    Raises MissingError (exit 3) where there is none, ConfigError (exit 2) where the user has to say
    more, and RefusedError (exit 4) for what is damaged, unsafe or no state dict of that network.
    """
    place = Path(path)
    is_record = place.is_dir() or not place.exists() and (Path(said.record_path) / path).is_dir()
    if is_record:
        found = _from_record(layout.find(path, said.record_path), said)
    else:
        found = _from_file(place, said)
    _require_finite(found.model, path)
    return found


def open_benign(path, said, say):
    """The `Audited` model at `path`, or None, and say(why), where it is not known to be benign.

    A record must say so itself. A file of weights counts as benign, and `said` describes it.
    """

    def why_not(found):
        return "" if found.benign else "its record does not say that it is benign"

    return _open_unless(why_not, path, said, say)


def open_backdoored(path, said, say):
    """The same where it is not known to be backdoored.

    A record must say so itself, and its attack must work. A file of weights counts as backdoored.
    """

    def why_not(found):
        if found.benign is not False:
            return "its record does not say that it is backdoored"
        works = found.asr is not None and found.asr >= verdict.WORKS
        return "" if works else f"its ASR is below {100 * verdict.WORKS:.0f} %"

    return _open_unless(why_not, path, said, say)


def _open_unless(why_not, path, said, say):
    """The model at `path`; None, and why is said, if it is refused or why_not(it) is a reason."""
    try:
        found = open_model(path, _of_record(said) if path.is_dir() else said)
    except RefusedError as error:
        say(f"{path.name}: left out: {error}")
        return None
    if path.is_dir() and (reason := why_not(found)):
        say(f"{path.name}: left out: {reason}")
        return None
    return found


def open_references(folder, judged, said, say):
    """The benign models in `folder`, without the `judged` one: the first MOST_REFERENCES.

    What is left out is said with `say`, as by `open_benign`. Raises ConfigError (exit 2) where one
    has other classes or another image size, and MissingError (exit 3) where there is none.
    """
    found = []
    for path in options.models_in(folder):
        other = open_benign(path, said, say)
        if other is None or other.sha256 == judged.sha256:
            continue
        if (other.spec.classes, other.spec.size) != (judged.spec.classes, judged.spec.size):
            raise ConfigError(
                f"{path} is no reference model: it has {other.spec.classes} classes and images of "
                f"{other.spec.size} pixels, and the judged model {judged.spec.classes} and "
                f"{judged.spec.size}"
            )
        found.append(other.model)
        if len(found) == MOST_REFERENCES:
            break
    if not found:
        raise MissingError(f"{folder} holds no other model that is known to be benign")
    return found


def _of_record(said):
    """The same without what a record says itself."""
    own = said.model if said.model and models.is_file(said.model) else None
    unsaid = dict.fromkeys(("width", "num_classes", "image_size", "mean", "std", "dataset"))
    return replace(said, model=own, **unsaid)


def _from_record(folder, said):
    info = contents.open_record(folder)
    made = contents.read_options(folder, info)
    row, measures = contents.read_measures(folder, info)
    model_file = _own_file(said, made)
    facts = info["data"]
    if facts["classes"] > options.MOST_CLASSES:
        raise RefusedError(f"the record {folder} is refused: it has {facts['classes']} classes")
    mean, std = _constants(made, made["dataset"], facts["size"], said)
    names = tuple(facts.get("class_names") or ())
    spec = Spec(made["dataset"], facts["classes"], facts["size"], mean, std, False, {}, names)
    network = contents.architecture(folder, made, model_file)
    try:
        model = contents.load_model(folder, spec, info, made["width"], network)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise RefusedError(f"the record {folder} is damaged: {cut(error, 200)}") from error
    group = known.Group(
        row["dataset"],
        config.digest(facts["fingerprint"]),
        spec.classes,
        spec.size,
        models.label(made["model"], made["width"]),
        row["recipe"],
    )
    return Audited(
        _frozen(model, said),
        network,
        made["width"],
        spec,
        group,
        str(folder),
        info["files"][layout.WEIGHTS],
        (folder / layout.WEIGHTS).stat().st_size,
        row["n_poison"] == "0" if row["n_poison"] else None,
        row["attack"],
        measures["asr"],
    )


def _own_file(said, made):
    """The Python file of a record's model, which the user must name; None for any other model.

    Everything else about a record's model stands in the record.
    """
    given = ("width", "num_classes", "image_size", "mean", "std", "dataset")
    if extra := next((name for name in given if getattr(said, name) is not None), None):
        raise ConfigError(f"{extra} must be left out: the record says it")
    if said.model is None or models.is_file(made["model"]):
        return said.model
    raise ConfigError(f"model must be left out: the record says that it is {made['model']}")


def _from_file(path, said):
    content = checkpoint.read_file(path, LARGEST)
    missing = [
        name for name in ("model", "num_classes", "image_size") if getattr(said, name) is None
    ]
    if missing:
        raise ConfigError(f"a file of weights needs --{missing[0]} too")
    found = weights.from_bytes(content, path)
    network, spec = _described(said)
    model = models.build(network, spec, said.width)
    _require_numbers(found.tensors, model.network.state_dict(), path)
    fitted = weights.fit(found, model.network, path)
    model.network.load_state_dict(fitted.tensors)
    group = known.Group(
        said.dataset or "", "", spec.classes, spec.size, models.label(said.model, said.width), ""
    )
    digest = hashlib.sha256(content).hexdigest()
    return Audited(
        _frozen(model, said),
        network,
        said.width,
        spec,
        group,
        str(path),
        digest,
        len(content),
        None,
        notes=tuple(fitted.notes),
    )


def _described(said):
    """(the architecture, the `Spec`) of what the user says about weights."""
    models.check(said.model, said.width)
    network = models.chosen(said.model, mean=said.mean, std=said.std)
    made = {"mean": said.mean, "std": said.std, "model": said.model}
    if said.dataset is not None:
        sources.check(said.dataset)
    mean, std = _constants(made, said.dataset, said.image_size, said)
    name = said.dataset or "unknown"
    return network, Spec(name, said.num_classes, said.image_size, mean, std, False, {})


def _constants(made, name, size, said):
    """The (mean, std) of the data set `name`, which a model's first layer works with.

    They are those of no change where the options `made` bring their own. ConfigError (exit 2) where
    nobody knows them.
    """
    own = made.get("mean") is not None and made.get("std") is not None
    if own or models.is_file(made["model"]):
        return (0.0,) * 3, (1.0,) * 3
    if name in dataset.KNOWN:
        return dataset.KNOWN[name][:2]
    if name is None:
        raise ConfigError(
            "a model's first layer subtracts a mean from pixels of [0, 1] and divides by a "
            "deviation: give --mean and --std, such as 0,0,0 and 1,1,1 for neither, or --dataset"
        )
    if name != "digits" and said.dataset_path is None:
        raise MissingError(
            f"mean and deviation of the data set {name} are measured on it: name its place with "
            "--dataset_path"
        )
    root, side = said.dataset_path or "data", None if name == "digits" else size
    data = dataset.open_dataset(name, root, image_size=side, cache=said.cache_path)
    return data.spec.mean, data.spec.std


def _require_numbers(tensors, wanted, path):
    """RefusedError where a file has whole or complex numbers for real ones."""
    whole = {
        name.rpartition(".")[2] for name, value in wanted.items() if not value.is_floating_point()
    }
    for name, value in tensors.items():
        if not value.is_floating_point() and name.rpartition(".")[2] not in {COUNTER, *whole}:
            raise RefusedError(
                f"{path} is refused: {cut(name, 80)} holds numbers of the type "
                f"{str(value.dtype).removeprefix('torch.')}, and weights are real numbers"
            )


def _require_finite(model, path):
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise RefusedError(f"{path} is refused: {cut(name, 80)} holds nan or infinity")


def _frozen(model, said):
    _, device = setup(said)
    return model.to(device).eval().requires_grad_(False)


# ---------- the user's images ----------


def open_images(folder, audited):
    """The `Given` images in `folder`: a folder for every class, or images without labels.

    Raises MissingError (exit 3) where there are none, or one cannot be read.
    """
    place, spec = Path(folder), audited.spec
    if not place.is_dir():
        raise MissingError(f"there is no folder {cut(folder, 200)}")
    names = listing.class_folders(place, listing.Skipped())
    labels = None
    if names:
        classes = spec.class_names or tuple(map(listing.class_name, names))
        if len(classes) != spec.classes:
            raise ConfigError(
                f"{place} has {len(names)} folders, and the model has {spec.classes} classes: it "
                "needs a folder for every class, or none at all"
            )
        paths, labels = sources.find_labelled(place, classes)
    else:
        paths = [
            str(path)
            for path in sorted(place.iterdir(), key=os.fsencode)
            if path.suffix.lower() in image_files.extensions()
        ]
    if not 1 < len(paths) <= MOST_IMAGES:
        raise MissingError(f"{place} has {len(paths)} images: 2 to {MOST_IMAGES} are needed")
    parts = sorted(sources.decode(paths, spec.size), key=lambda part: part[0])
    pixels = torch.cat([torch.from_numpy(part) for _, part in parts])
    return _given(pixels, labels, audited)


def _given(pixels, labels, audited):
    """The `Given` images n,3,S,S (uint8) with labels, an int64 array or None."""
    mark = hashlib.sha256(pixels.numpy().tobytes())
    mark.update(b"" if labels is None else labels.tobytes())
    device = next(audited.model.parameters()).device
    pixels = pixels.to(device)
    unknown = torch.zeros(len(pixels), dtype=torch.long, device=device)
    answers = predict(audited.model, Split(pixels, unknown, unknown))
    accuracy = None
    if labels is not None:
        truth = torch.from_numpy(labels).to(device)
        accuracy = float((answers == truth).double().mean())
        answers = truth
    split = Split(pixels, answers, answers)
    return Given(split, labels is not None, accuracy, mark.hexdigest())


def implausible(given, spec):
    """Why a model does so badly on labelled images that a score would mean nothing, or ""."""
    least = min(2 / spec.classes, (1 + 1 / spec.classes) / 2)
    if given is None or given.accuracy is None or given.accuracy >= least:
        return ""
    return (
        f"The model gives only {100 * given.accuracy:.0f} % of the images their label: --mean and "
        "--std, the order of the classes or that of the colours may be wrong."
    )
