"""Records leave as files of other programs: image folders with a list, BackdoorBench's own, and the
layout of a TrojAI round."""

import dataclasses
import hashlib
import sys
from pathlib import Path

import torch

from antidote_bench import models
from antidote_bench.utils import checkpoint
from antidote_bench.utils.data import dataset
from antidote_bench.utils.device import setup
from antidote_bench.utils.errors import ConfigError, MissingError
from antidote_bench.utils.exchange import attack_result, image_folders, trojai
from antidote_bench.utils.exchange.image_folders import Images
from antidote_bench.utils.exchange.options import ToTrojai
from antidote_bench.utils.record import contents
from antidote_bench.utils.record import folder as layout


def plan(config):
    """Say what an export would read and write (--dry_run)."""
    found = layout.find(config.result_file, config.record_path)
    places = _records(found) if isinstance(config, ToTrojai) else [found]
    for place in places:
        contents.open_record(place)
        print(f"would read {place}")
    image_folders.require_new(config.output)
    print(f"would write {config.output}")


def to_images(config):
    """Write the poisoned training set and the test sets of a record as image folders."""
    record, loaded, _ = _opened(config)
    classes = loaded.spec.classes
    names = image_folders.class_folders(loaded.spec.class_names, classes)
    rows = []
    with image_folders.new_folder(config.output) as folder:
        if _has_training_set(record):
            rows += _write_training(folder, config, loaded, names)
        if not config.only_changed:
            test = loaded.test_sets.test
            every = torch.arange(len(test))
            rows += _write_split(folder, "test", test, every, names, image_folders.CLEAN)
        backdoor, index = loaded.test_sets.backdoor, loaded.backdoor_index
        rows += _write_split(folder, "test_triggered", backdoor, index, names, image_folders.POISON)
        image_folders.write_list(folder, rows)
    print(f"{len(rows)} images written to {config.output}")


def _has_training_set(record):
    """Whether a record stores a poisoned training set; a note says where it does not."""
    if record.get("training_set") != "none":
        return True
    print("note: the record stores no poisoned training set, and none is written", file=sys.stderr)
    return False


def _write_training(folder, config, loaded, names):
    """The rows of the training images, each written below the folder of its label."""
    train, kinds = loaded.train, loaded.kinds.cpu()
    index = torch.arange(len(train))
    if config.only_changed:
        index = kinds.nonzero().flatten()
    labels, truth = train.labels.cpu()[index].tolist(), loaded.clean.labels.cpu()[index].tolist()
    words = (image_folders.CLEAN, image_folders.POISON, image_folders.COVER)
    rows = [
        image_folders.Row(
            number,
            image_folders.TRAIN,
            f"train/{names[label]}/{number}.png",
            label,
            original,
            words[kind],
        )
        for number, label, original, kind in zip(
            index.tolist(), labels, truth, kinds[index].tolist(), strict=True
        )
    ]
    image_folders.write_all(train.view(index).images, [folder / row.file for row in rows])
    return rows


def _write_split(folder, name, split, index, names, kind):
    """The rows of a test set's images, each written below the folder of its true class."""
    rows = [
        image_folders.Row(
            number, image_folders.TEST, f"{name}/{names[truth]}/{number}.png", label, truth, kind
        )
        for number, label, truth in zip(
            index.tolist(), split.labels.tolist(), split.truth.tolist(), strict=True
        )
    ]
    image_folders.write_all(split.images, [folder / row.file for row in rows])
    return rows


def to_backdoorbench(config):
    """Write a record as BackdoorBench saves its own."""
    record, loaded, made = _opened(config)
    name = made["dataset"]
    there, rename = attack_result.names_there(made["model"])
    if name not in attack_result.DATASETS:
        raise ConfigError(
            f"the data set {name} is not among those of BackdoorBench: "
            f"{', '.join(attack_result.DATASETS)}"
        )
    if loaded.width not in (None, models.DEFAULT_WIDTH.get(made["model"])):
        raise ConfigError(
            f"BackdoorBench has {made['model']} at one width only, "
            f"{models.DEFAULT_WIDTH[made['model']]}, and the record has {loaded.width}"
        )
    constants = loaded.model.normalize
    own = torch.stack([constants.mean.cpu().flatten(), constants.std.cpu().flatten()])
    if not torch.allclose(own, torch.tensor(dataset.KNOWN[name][:2])):
        raise ConfigError(
            f"BackdoorBench normalises images of {name} by other constants than this model"
        )
    backdoor = loaded.test_sets.backdoor
    if not len(backdoor):
        raise ConfigError("the record has no triggered test image, and BackdoorBench needs them")
    train = _changed_training_images(loaded).on_cpu() if _has_training_set(record) else None
    result = attack_result.Result(
        there,
        loaded.spec.classes,
        loaded.spec.size,
        name,
        {rename(key): value.cpu() for key, value in loaded.model.network.state_dict().items()},
        train,
        Images(loaded.backdoor_index, backdoor.images, backdoor.labels, backdoor.truth).on_cpu(),
        {attack_result.TRAIN: len(loaded.train), attack_result.TEST: len(loaded.test_sets.test)},
    )
    output = Path(config.output)
    with image_folders.new_folder(output) as folder:
        attack_result.write(folder, output.name, result)
    _say_order(name, loaded.clean)
    print(f"written to {output}; BackdoorBench looks for it at record/{output.name}")


def to_trojai(config):
    """Write a record, or all records in a folder, in the layout of a TrojAI round."""
    places = _records(layout.find(config.result_file, config.record_path))
    rows = []
    with image_folders.new_folder(config.output) as folder:
        for number, place in enumerate(places):
            name = f"id-{number:08d}"
            model = _trojai_model(dataclasses.replace(config, result_file=str(place)))
            trojai.write_model(folder / trojai.MODELS / name, model)
            digest = hashlib.sha256(model.content).hexdigest()
            rows.append({"model_name": name, **model.truth, "sha256": digest})
        trojai.write_index(folder, rows)
    print(f"{len(rows)} models written to {config.output}")


def _records(folder):
    """The records in a folder, or the folder itself if it is one, in the order of the hashes of
    their weights."""
    if (folder / layout.RECORD).is_file():
        return [folder]
    found = [path.parent for path in folder.glob(f"*/{layout.RECORD}")]
    if not found:
        raise MissingError(f"{folder} holds no record")
    return sorted(found, key=lambda path: contents.open_record(path)["files"][layout.WEIGHTS])


def _trojai_model(config):
    """The `trojai.Model` of a record."""
    record, loaded, made = _opened(config)
    row, _ = contents.read_measures(layout.find(config.result_file, config.record_path), record)
    constants = loaded.model.normalize
    facts = {
        "architecture": models.label(made["model"], made["width"]),
        "number_classes": loaded.spec.classes,
        "image_size": loaded.spec.size,
        "mean": constants.mean.flatten().tolist(),
        "std": constants.std.flatten().tolist(),
    }
    known = "attack", "label_mode", "target", "pratio", "acc", "asr", "ra", "recipe", "seed"
    poisoned = row["n_poison"] != "0"
    truth = {"poisoned": poisoned, "model_architecture": facts["architecture"]}
    truth |= {name: row[name] for name in known}
    sets, count = loaded.test_sets, config.examples
    weights = {name: value.cpu() for name, value in loaded.model.state_dict().items()}
    return trojai.Model(
        checkpoint.to_pt(weights),
        facts,
        truth,
        _examples(sets.test, count),
        _examples(sets.backdoor, count) if poisoned else {},
    )


def _examples(split, count):
    """{true class: its first `count` images} of a split."""
    return {
        label: split.images[(split.truth == label).nonzero().flatten()[:count]]
        for label in split.truth.unique().tolist()
    }


def _changed_training_images(loaded):
    index = loaded.kinds.nonzero().flatten()
    return Images(
        index,
        loaded.train.view(index).images,
        loaded.train.labels[index],
        loaded.clean.labels[index],
    )


def _say_order(name, clean):
    """A warning where positions are not those of the data set as BackdoorBench reads it."""
    labels = clean.labels.cpu()
    if name.startswith("cifar") and torch.equal(labels, labels.sort().values):
        print(
            f"warning: {name} here is sorted by class, and BackdoorBench reads it in the order of "
            "torchvision: its poisoned images replace other images of their classes than here. "
            "An attack on the files that torchvision downloads has its order",
            file=sys.stderr,
        )


def _opened(config):
    """(record.json, `Loaded`, options of the attack) of the record to export."""
    config, device = setup(config)
    folder = layout.find(config.result_file, config.record_path)
    info = contents.open_record(folder)
    loaded = contents.load(folder, config, device, info)
    return info, loaded, contents.read_options(folder, info)
