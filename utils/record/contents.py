"""The tensors of a record: what a finished run saves, and what a defense loads."""

import csv
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from antidote_bench import models
from antidote_bench.utils import checkpoint, distributed
from antidote_bench.utils.charts import preview
from antidote_bench.utils.data import dataset
from antidote_bench.utils.data.clean import Held
from antidote_bench.utils.data.dataset import Dataset, Spec, Split
from antidote_bench.utils.data.memmap import replaced
from antidote_bench.utils.errors import ConfigError, MissingError, RefusedError
from antidote_bench.utils.evaluation import TestSets
from antidote_bench.utils.record import claim, compressed, results, schema
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.record.flagged import Flagged
from antidote_bench.utils.text import cut

POISON, COVER = 1, 2  # kinds of changed training images: poisoned; changed, but with the true label
PREVIEWED = 8  # images in preview.png


class Poisoning(NamedTuple):
    """What an attack has made of a data set."""

    train: Split  # the training set, poisoned
    index: torch.Tensor  # positions of its poisoned images
    cover_index: torch.Tensor  # positions of images that are changed and keep their label
    n_poison: int | None  # None: unknown
    test_sets: TestSets
    backdoor_index: torch.Tensor  # positions in the test set of test_sets.backdoor
    target_index: torch.Tensor  # and of test_sets.target
    parts: dict | None  # the tensors that the trigger consists of
    facts: dict  # about the trigger, for record.json
    other_index: torch.Tensor | None = None  # positions of test_sets.other, where there is one


@dataclass(frozen=True)
class Victim:
    """A finished attack, as `save_victim` saves it."""

    name: str
    config: object  # options of the attack
    model: nn.Module
    dataset: Dataset
    poisoning: Poisoning
    poisons_in_loop: bool  # the record stores no poisoned training set
    measured: dict
    seconds: float


@dataclass(frozen=True)
class Repair:
    """A finished defense, as `save_repair` saves it."""

    name: str
    config: object  # options of the defense
    model: nn.Module
    victim_row: dict
    victim_sha256: str
    held: Held  # the clean images that the defender had
    marked: Flagged | None  # the training images that were left out
    measured: dict
    seconds: float


@dataclass(frozen=True)
class Detected:
    """A finished detection, as `save_detection` saves it."""

    name: str
    config: object  # options of the detector
    victim_row: dict
    victim_sha256: str
    measured: dict  # columns of results.csv
    seconds: float
    scores: dict  # tensors
    evidence: dict  # tensors
    chart: bytes  # PNG


class Loaded(NamedTuple):
    """An attack's record, as a protocol gets it."""

    model: nn.Module  # the victim
    name: str | models.Architecture  # what models.build takes for its architecture
    width: int | None
    train: Split  # the training set as the victim saw it
    clean: Split  # the data set's own training set
    test_sets: TestSets
    spec: Spec
    kinds: torch.Tensor  # of the training images, int64 N: 0 untouched, or POISON or COVER
    backdoor_index: torch.Tensor  # positions in the test set of test_sets.backdoor


def save_victim(folder, victim, device, workers=distributed.SINGLE):
    """Write the complete record of an attack."""
    config, poisoning, data = victim.config, victim.poisoning, victim.dataset
    row = results.of_attack(
        victim.name,
        config,
        victim.measured,
        poisoning.test_sets,
        poisoning.n_poison,
        len(data.train),
        victim.seconds,
    )
    table, facts = results.complete(row, config, device, workers, kind="attack")
    poisoned = compressed.packed(_poisoned_tensors(poisoning))
    contents = {
        layout.WEIGHTS: checkpoint.to_bytes(victim.model.state_dict()),
        layout.POISONED: checkpoint.to_bytes(poisoned),
        layout.PREVIEW: _preview(data, poisoning),
        layout.RESULTS: table,
    }
    if poisoning.parts is not None:
        contents[layout.TRIGGER] = checkpoint.to_bytes(poisoning.parts)
    facts |= {
        "format": layout.FORMAT if "train_images" in poisoned else layout.FORMAT_COMPRESSED,
        "data": facts_of(data),
        "data_listing": data.spec.listing,
        "training_set": "none" if victim.poisons_in_loop else "stored",
        **poisoning.facts,
    }
    layout.finish(folder, contents, facts, kind="attack")


def save_repair(folder, repair, device):
    """Write the complete record of a defense."""
    row = results.of_defense(
        repair.name,
        repair.config,
        repair.victim_row,
        repair.measured,
        repair.held,
        repair.marked,
        repair.seconds,
    )
    table, facts = results.complete(row, repair.config, device, kind="defense")
    contents = {
        layout.WEIGHTS: checkpoint.to_bytes(repair.model.state_dict()),
        layout.RESULTS: table,
        **layout.own_files(folder / layout.STATE),
    }
    data = facts_of_clean(repair.held, repair.marked)
    facts |= {"victim_sha256": repair.victim_sha256, "data": data}
    layout.finish(folder, contents, facts, kind="defense")


def save_detection(folder, detected, device):
    """Write the complete record of a detector."""
    config = detected.config
    row = results.of_detection(
        detected.name, config, detected.victim_row, detected.measured, detected.seconds
    )
    table, facts = results.complete(
        row, config, device, kind="detection", columns=layout.DETECTION_COLUMNS
    )
    contents = {
        layout.SCORES: checkpoint.to_bytes(detected.scores),
        layout.SCORES_CHART: detected.chart,
        layout.RESULTS: table,
        **layout.own_files(folder / layout.STATE),
    }
    if detected.evidence:
        contents[layout.EVIDENCE] = checkpoint.to_bytes(detected.evidence)
    facts |= {"victim_sha256": detected.victim_sha256}
    layout.finish(folder, contents, facts, kind="detection")


def open_record(folder):
    """What record.json of an attack's record says, after everything in the record was verified.

    Raises RefusedError (exit 4).
    """
    info = layout.verify(folder, "attack")
    try:
        schema.check_facts(info)
    except ValueError as error:
        raise RefusedError(f"the record {folder} is damaged: {layout.RECORD}: {error}") from error
    return info


def load(folder, config, device, info=None):
    """The `Loaded` content of an attack's record; `config` are the options of a defense.

    `info` is what `open_record` has returned. Every file is compared with its checksum as it is
    read, so that what was verified is what is loaded. Raises RefusedError (exit 4) where the record
    is damaged or was made on another data set.
    """
    info = info or open_record(folder)
    made = read_options(folder, info)
    model_file = getattr(config, "model_file", None)
    if model_file and not models.is_file(made["model"]):
        raise ConfigError(f"leave model_file out: the model of the record is {made['model']}")
    chosen = architecture(folder, made, model_file)
    _require_own_data_path(folder, config, info, made)
    try:
        _require_same_size(info["data"], made)
        check_count = partial(_require_same_count, folder, info["data"], made["dataset"])
        data = dataset.load(config, device, victim=made, check_count=check_count)
        _require_same_data(folder, info["data"], data, config)
        saved = _read_tensors(folder, layout.POISONED, info)
        counts = {part: len(data.test) for part in compressed.PARTS} | {"train": len(data.train)}
        saved = compressed.unpacked(saved, data.spec.size, counts)
        schema.check_poisoned(saved, data, layout.POISONED)
        saved = {name: value.to(device) for name, value in saved.items()}
        train = _poisoned_split(data.train, saved)
        kinds = torch.zeros_like(train.labels)
        kinds[saved["train_index"]] = saved["train_kind"]
        there = (part for part in schema.OPTIONAL if f"{part}_images" in saved)
        beside = {part: _split(saved, part) for part in there}
        test_sets = TestSets(data.test, _split(saved, "test"), **beside)
        model = load_model(folder, data.spec, info, made["width"], chosen).to(device)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise RefusedError(
            f"the record {folder} is damaged: {' '.join(str(error).split())[:200]}"
        ) from error
    return Loaded(
        model,
        chosen,
        made["width"],
        train,
        data.train,
        test_sets,
        data.spec,
        kinds,
        saved["test_index"],
    )


def read_options(folder, info):
    """The options of an attack in a verified record; RefusedError (exit 4) where one is wrong."""
    try:
        made = layout.parse_options(_read(folder, layout.OPTIONS, info))
        schema.check_options(made)
    except layout.UNUSABLE as error:
        raise RefusedError(
            f"the record {folder} is damaged: {layout.OPTIONS}: {cut(error, schema.LONGEST)}"
        ) from error
    return made


def read_measures(folder, info):
    """(the row of results.csv, {acc, asr, ra, asr_all, asr_other}) of a verified record's
    victim."""
    try:
        row, last = (
            schema.read_rows(_read(folder, name, info))[-1] for name in (layout.RESULTS, layout.LOG)
        )
        schema.check_results(row)
        measures = results.measures_of(row)
        texts = {name: last.get(name) or None for name in ("asr_all", "asr_other")}
        return row, measures | {name: text and float(text) for name, text in texts.items()}
    except (KeyError, IndexError, ValueError, csv.Error) as error:
        raise RefusedError(
            f"the record {folder} is damaged: {layout.RESULTS} or {layout.LOG}: "
            f"{cut(error, schema.LONGEST)}"
        ) from error


def architecture(folder, made, model_file=None):
    """What models.build takes for the model of a verified record, which has the options `made`.

    No record starts a file: where the model is one from a file, it must be `model_file`, which the
    user names, and its content that of the file which the record was made with. Otherwise
    RefusedError (exit 4) says what to do.
    """
    name, normalisation = made["model"], {"mean": made.get("mean"), "std": made.get("std")}
    if not models.is_file(name):
        return models.chosen(name, **normalisation)
    if model_file is None:
        raise RefusedError(
            f"the model of the record {folder} comes from a Python file, which is executed only if "
            f"you name it: --model_file path/to/file.py:function (the record says {cut(name, 60)})"
        )
    chosen = models.chosen(model_file, **normalisation)
    there, function = made["model_sha256"], name.rpartition(":")[2]
    if (chosen.file.sha256, chosen.file.function) != (there, function):
        raise RefusedError(
            f"{model_file} is not the model that the record {folder} was made with: that is the "
            f"function {function} of a file with the sha256 {there[:12]}..., and this file has "
            f"{chosen.file.sha256[:12]}..."
        )
    return chosen


def load_model(folder, spec, info, width, chosen):
    """The network of a verified record; `chosen` is its `architecture`.

    RuntimeError or KeyError where its weights do not fit.
    """
    model = models.build(chosen, spec, width)
    weights = _read_tensors(folder, layout.WEIGHTS, info)
    schema.check_finite(weights, layout.WEIGHTS)
    model.load_state_dict(weights)
    return model


def _read(folder, name, info):
    """The bytes of a file; what was verified before is compared again, as it is read."""
    try:
        return layout.read_checked(folder, name, info)
    except RefusedError as error:
        raise RefusedError(f"the record {folder} is damaged: {error}") from error


def _read_tensors(folder, name, info):
    return checkpoint.from_bytes(_read(folder, name, info), folder / name)


def facts_of(data):
    """What record.json says about a `Dataset`, for a defense to recognise it."""
    return {
        "train": len(data.train),
        "test": len(data.test),
        "classes": data.spec.classes,
        "size": data.spec.size,
        "class_names": list(data.spec.class_names),
        "fingerprint": data.spec.fingerprint,
    }


def facts_of_clean(held, marked=None):
    """What record.json of a defense says about clean images of another source, and about a
    `Flagged`; None where there is neither."""
    facts = {"clean_images": held.mark, "flagged": marked and marked.sha256}
    return {name: value for name, value in facts.items() if value} or None


def _poisoned_tensors(poisoning):
    """The content of poison.safetensors: what was changed in training, and the triggered tests."""
    index, cover, train = poisoning.index, poisoning.cover_index, poisoning.train
    changed = torch.cat([index, cover])
    kinds = torch.cat([torch.full_like(index, POISON), torch.full_like(cover, COVER)])
    backdoor = poisoning.test_sets.backdoor
    tensors = {
        "train_index": changed,
        "train_images": train.images[changed],
        "train_labels": train.labels[changed],
        "train_kind": kinds,
        "test_index": poisoning.backdoor_index,
        "test_images": backdoor.images,
        "test_labels": backdoor.labels,
        "test_truth": backdoor.truth,
    }
    for part in schema.OPTIONAL:
        split = getattr(poisoning.test_sets, part)
        if split is not None:
            tensors |= {
                f"{part}_index": getattr(poisoning, f"{part}_index"),
                f"{part}_images": split.images,
                f"{part}_labels": split.labels,
                f"{part}_truth": split.truth,
            }
    return tensors


def _preview(data, poisoning):
    """PNG bytes: some test images with and without the trigger."""
    backdoor = poisoning.test_sets.backdoor
    shown = torch.arange(0)
    if len(backdoor):
        shown = torch.linspace(0, len(backdoor) - 1, PREVIEWED).long().unique()
    clean = data.test[poisoning.backdoor_index[shown]]
    return preview(clean, backdoor[shown], names=data.spec.class_names)


def _poisoned_split(clean, saved):
    """The training set as it was trained on; its truth is what its labels claim."""
    labels, index = clean.labels.clone(), saved["train_index"]
    images = replaced(clean.images, index, saved["train_images"])
    labels[index] = saved["train_labels"]
    return Split(images, labels, labels)


def _split(saved, part):
    return Split(*(saved[f"{part}_{what}"] for what in ("images", "labels", "truth")))


def _require_own_data_path(folder, config, info, made):
    """The data set's place in a record from others is not followed unless the user names it."""
    theirs = made["dataset"] != "digits" and info.get("origin") != claim.origin(config)
    if config.dataset_path is None and theirs:
        raise MissingError(
            f"the record {folder} was not made with the cache folder {config.cache_path}: name the "
            f"place of its data set with --dataset_path (it says {made['dataset_path']!r})"
        )


def _require_same_size(facts, made):
    """Before any image is decoded: at a size that others chose, they could fill the disk."""
    if dataset.side_of(made["dataset"], made["image_size"]) != facts["size"]:
        raise ValueError(f"image_size is not that of {layout.RECORD}, {facts['size']}")


def _require_same_count(folder, facts, name, what, here):
    if facts[what] != here:
        raise RefusedError(
            f"the record {folder} was made on a {name} whose {what} is {facts[what]}, but here it "
            f"is {here}; --dataset_path names the set it was made on"
        )


def _require_same_data(folder, made, data, config):
    facts = facts_of(data)
    for what in ("train", "test", "classes", "size"):
        _require_same_count(folder, made, data.spec.name, what, facts[what])
    names = made.get("class_names") or facts["class_names"]
    if names != facts["class_names"]:
        pairs = zip(names, facts["class_names"], strict=False)
        here, there = next((here, there) for there, here in pairs if here != there)
        raise RefusedError(
            f"the record {folder} was made on a {data.spec.name} with a class {there!r}, which is "
            f"{here!r} here; --dataset_path names the set it was made on"
        )
    if made["fingerprint"] != facts["fingerprint"] and not config.allow_other_data:
        raise RefusedError(
            f"{data.spec.name} here has other pixels or labels than the one the record {folder} "
            "was made on: --dataset_path names that one, --allow_other_data true goes on"
        )
