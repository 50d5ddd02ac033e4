"""Records leave as files of other programs: image folders with a list, and BackdoorBench's own."""

import sys
from pathlib import Path

import torch

from antidote_bench import models
from antidote_bench.utils.data import dataset
from antidote_bench.utils.device import setup
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.exchange import attack_result, image_folders
from antidote_bench.utils.exchange.image_folders import Images
from antidote_bench.utils.record import contents
from antidote_bench.utils.record import folder as layout


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
