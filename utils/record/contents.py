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
from antidote_bench.utils.data.dataset import Dataset, Spec, Split
from antidote_bench.utils.data.memmap import replaced
from antidote_bench.utils.errors import MissingError, RefusedError
from antidote_bench.utils.evaluation import TestSets
from antidote_bench.utils.record import claim, results, schema
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.text import cut

POISON, COVER = 1, 2  # kinds of changed training images: poisoned; changed, but with the true label
PREVIEWED = 8  # images in preview.png


class Poisoning(NamedTuple):
    """What an attack has made of a data set."""

    train: Split  # the training set, poisoned
    index: torch.Tensor  # positions of its poisoned images
    cover_index: torch.Tensor  # positions of images that are changed and keep their label
    n_poison: int
    test_sets: TestSets
    backdoor_index: torch.Tensor  # positions in the test set of test_sets.backdoor
    target_index: torch.Tensor  # and of test_sets.target
    parts: dict | None  # the tensors that the trigger consists of
    facts: dict  # about the trigger, for record.json


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
    clean_count: int
    measured: dict
    seconds: float


class Loaded(NamedTuple):
    """An attack's record, as a defense gets it."""

    model: nn.Module  # the victim
    name: str  # of its architecture
    width: int | None
    train: Split  # the training set as the victim saw it
    clean: Split  # the data set's own training set
    test_sets: TestSets
    spec: Spec


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
    table, facts = results.complete(row, config, device, workers)
    contents = {
        layout.WEIGHTS: checkpoint.to_bytes(victim.model.state_dict()),
        layout.POISONED: checkpoint.to_bytes(_poisoned_tensors(poisoning)),
        layout.PREVIEW: _preview(data.test, poisoning),
        layout.RESULTS: table,
    }
    if poisoning.parts is not None:
        contents[layout.TRIGGER] = checkpoint.to_bytes(poisoning.parts)
    facts |= {
        "data": facts_of(data),
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
        repair.clean_count,
        repair.seconds,
    )
    table, facts = results.complete(row, repair.config, device)
    contents = {
        layout.WEIGHTS: checkpoint.to_bytes(repair.model.state_dict()),
        layout.RESULTS: table,
        **layout.own_files(folder / layout.STATE),
    }
    facts |= {"victim_sha256": repair.victim_sha256}
    layout.finish(folder, contents, facts, kind="defense")


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
    _require_own_data_path(folder, config, info, made)
    try:
        _require_same_size(info["data"], made)
        check_count = partial(_require_same_count, folder, info["data"], made["dataset"])
        data = dataset.load(config, device, victim=made, check_count=check_count)
        _require_same_data(folder, info["data"], data, config)
        saved = _read_tensors(folder, layout.POISONED, info)
        schema.check_poisoned(saved, data, layout.POISONED)
        saved = {name: value.to(device) for name, value in saved.items()}
        train = _poisoned_split(data.train, saved)
        target = _split(saved, "target") if "target_images" in saved else None
        test_sets = TestSets(data.test, _split(saved, "test"), target)
        model = load_model(folder, data.spec, info, made).to(device)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise RefusedError(
            f"the record {folder} is damaged: {' '.join(str(error).split())[:200]}"
        ) from error
    return Loaded(model, made["model"], made["width"], train, data.train, test_sets, data.spec)


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
    """(the row of results.csv, {acc, asr, ra, asr_all}) of a verified record's victim."""
    try:
        row, last = (
            schema.read_rows(_read(folder, name, info))[-1] for name in (layout.RESULTS, layout.LOG)
        )
        schema.check_results(row)
        measures = results.measures_of(row)
        asr_all = last.get("asr_all") or None
        return row, {**measures, "asr_all": asr_all if asr_all is None else float(asr_all)}
    except (KeyError, IndexError, ValueError, csv.Error) as error:
        raise RefusedError(
            f"the record {folder} is damaged: {layout.RESULTS} or {layout.LOG}: "
            f"{cut(error, schema.LONGEST)}"
        ) from error


def load_model(folder, spec, info, made):
    """The network of a verified record, which has the options `made`.

    RuntimeError or KeyError where its weights do not fit.
    """
    model = models.build(made["model"], spec, made["width"])
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


def _poisoned_tensors(poisoning):
    """The content of poison.safetensors: what was changed in training, and the triggered tests."""
    index, cover, train = poisoning.index, poisoning.cover_index, poisoning.train
    changed = torch.cat([index, cover])
    kinds = torch.cat([torch.full_like(index, POISON), torch.full_like(cover, COVER)])
    backdoor, target = poisoning.test_sets.backdoor, poisoning.test_sets.target
    return {
        "train_index": changed,
        "train_images": train.images[changed],
        "train_labels": train.labels[changed],
        "train_kind": kinds,
        "test_index": poisoning.backdoor_index,
        "test_images": backdoor.images,
        "test_labels": backdoor.labels,
        "test_truth": backdoor.truth,
        "target_index": poisoning.target_index,
        "target_images": target.images,
        "target_labels": target.labels,
        "target_truth": target.truth,
    }


def _preview(test, poisoning):
    """PNG bytes: some test images with and without the trigger."""
    backdoor = poisoning.test_sets.backdoor
    shown = torch.arange(0)
    if len(backdoor):
        shown = torch.linspace(0, len(backdoor) - 1, PREVIEWED).long().unique()
    return preview(test[poisoning.backdoor_index[shown]], backdoor[shown])


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
