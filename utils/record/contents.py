"""The tensors of a record: what a finished run saves, and what a defense loads."""

import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

import models
from utils import checkpoint, distributed
from utils.charts import preview
from utils.data import dataset
from utils.data.dataset import Dataset, Spec, Split
from utils.data.memmap import replaced
from utils.errors import RefusedError
from utils.evaluation import TestSets
from utils.record import folder as layout
from utils.record import results

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


def load(folder, config, device):
    """The `Loaded` content of an attack's record; `config` are the options of a defense.

    Raises RefusedError (exit 4) where the record is damaged or was made on another data set.
    """
    info = layout.verify(folder, "attack")
    made = layout.read_options(folder)
    try:
        data = dataset.load(config, device, victim=made)
        _require_same_data(folder, info["data"], data)
        saved = checkpoint.read_tensors(folder / layout.POISONED)
        saved = {name: value.to(device) for name, value in saved.items()}
        train = _poisoned_split(data.train, saved)
        target = _split(saved, "target") if "target_images" in saved else None
        test_sets = TestSets(data.test, _split(saved, "test"), target)
        model = load_model(folder, data.spec).to(device)
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise RefusedError(
            f"the record {folder} is damaged: {' '.join(str(error).split())[:200]}"
        ) from error
    return Loaded(model, train, data.train, test_sets, data.spec)


def architecture(folder):
    """(name, width) of a verified record's network, as models.build takes them."""
    made = layout.read_options(folder)
    return made["model"], made["width"]


def load_model(folder, spec):
    """The network of a verified record; RuntimeError or KeyError where its weights do not fit."""
    name, width = architecture(folder)
    model = models.build(name, spec, width)
    model.load_state_dict(checkpoint.read_tensors(folder / layout.WEIGHTS))
    return model


def facts_of(data):
    """What record.json says about a `Dataset`, for a defense to recognise it."""
    return {
        "train": len(data.train),
        "test": len(data.test),
        "classes": data.spec.classes,
        "size": data.spec.size,
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
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(clean):
        raise IndexError(f"{layout.POISONED} names images that the training set does not have")
    images = replaced(clean.images, index, saved["train_images"])
    labels[index] = saved["train_labels"]
    return Split(images, labels, labels)


def _split(saved, part):
    return Split(*(saved[f"{part}_{what}"] for what in ("images", "labels", "truth")))


def _require_same_data(folder, made, data):
    for name, count in facts_of(data).items():
        if name != "fingerprint" and made[name] != count:
            raise RefusedError(
                f"the record {folder} was made on a {data.spec.name} whose {name} is {made[name]}, "
                f"but here it is {count}; --dataset_path names the set it was made on"
            )
    if made["fingerprint"] != data.spec.fingerprint:
        print(
            f"warning: {data.spec.name} here has other pixels than the one the record {folder} "
            "was made on",
            file=sys.stderr,
        )
