"""What a run would read, train and write, said before anything is done (`--dry_run`)."""

import dataclasses
import math
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from antidote_bench import models
from antidote_bench.utils import distributed, train
from antidote_bench.utils.config import Training
from antidote_bench.utils.data import dataset, facts, sources, target
from antidote_bench.utils.data.dataset import Spec, Split
from antidote_bench.utils.data.loader import batch_sizes
from antidote_bench.utils.device import free_memory
from antidote_bench.utils.optimizers import OPTIMIZERS
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.poisoning.options import CleanRecordOptions
from antidote_bench.utils.protocol import estimate
from antidote_bench.utils.record import contents, results
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.text import name_of_class

MOST_CLASSES = 10  # that are named
# from so many of a unit on the next one is used
TIMES = (120, 1, "s"), (120 * 60, 60, "min"), (48 * 3600, 3600, "h"), (math.inf, 86400, "days")


class Counts(NamedTuple):
    """Images of an attack."""

    train: int
    test: int
    changed: int  # of the training images, those that the record stores


def attack(method, config, folder, select, device):
    """Print what an attack would read, poison, train and write, and what that costs.

    The network is built and takes some steps on noise; ConfigError (exit 2) where it cannot.
    Nothing is written.
    """
    side = dataset.side_of(config.dataset, config.image_size)
    found = sources.find(config.dataset, config.dataset_path)
    truth = torch.from_numpy(found["train"].read()[1])
    names, n_test = found["train"].classes, len(found["test"].read()[1])
    config = target.resolved(config, names)
    index, cover_index = select(config, truth, method)
    steps = len(batch_sizes(len(truth), config.batch_size, drop_last=True))
    network = models.label(config.model, config.width)
    print(
        f"reads    {config.dataset} from {config.dataset_path}: {len(truth)} training and {n_test} "
        f"test images of {len(names)} classes: {_classes(names)}"
    )
    if config.label_mode != "all2all":
        print(f"target   {name_of_class(config.attack_target, names)}")
    if config.label_mode == "one2one":
        alone = "" if method.make_labels else ": no other class is poisoned"
        print(f"source   {name_of_class(config.source_class, names)}{alone}")
    if method.make_loss:
        print(
            f"poisons  no stored image: the loss shows each of {len(truth)} images with the "
            "trigger too"
        )
    elif method.edit:
        print("poisons  no image: weights are changed after the training")
    elif method.make_labels:
        print(f"poisons  {len(index)} labels of {len(truth)}, and no image")
    else:
        per_class = torch.bincount(truth[index], minlength=len(names)).tolist()
        if method.prefer and poison.poisonable(truth, config) is None:
            per_class = "known when the images are read"
        print(
            f"poisons  {len(index)} of {len(truth)} images; per class {per_class}; "
            f"{len(cover_index)} more are changed and keep their label"
        )
    if isinstance(config, CleanRecordOptions) and config.needs_clean_model:
        where = config.clean_record or "one is trained first where the cache has none"
        print(f"needs    a clean model: {where}")
    each = f"{steps} step" + "s" * (steps != 1)
    print(f"trains   {network} for {config.epochs} epochs of {each} in {config.precision}")
    print(f"recipe   {results.recipe(config)}")
    spec = _unseen(config.dataset, names, side)
    counts = Counts(len(truth), n_test, len(index) + len(cover_index))
    _print_attack_costs(method, config, counts, spec, found, device)
    print(f"writes   {folder} ({layout.state_of(folder)})")


def _classes(names):
    """The classes with their numbers; of many only the first ones and the last."""
    shown = [name_of_class(number, names) for number in range(len(names))]
    return ", ".join(shown if len(shown) <= MOST_CLASSES else [*shown[:3], "...", shown[-1]])


def defense(name, config, folder, victim, device):
    """Print what a defense would read, train and write, and what that costs.

    ConfigError (exit 2) where its batches are too small for the victim.
    """
    data = victim["data"]
    count = config.budget(data["train"], data["classes"])
    clean = f"{count} clean images of {data['classes']} classes" if count else "no clean image"
    print(f"reads    {config.record}: {victim['name']} on {data['train']} training images")
    print(f"repairs  with {name} and {clean} in {config.precision}")
    print(f"trains   {_work(config)}")
    if effort := config.effort(count, data["classes"]):
        print(effort)
    _print_defense_costs(config, data, count, victim, device)
    print(f"writes   {folder} ({layout.state_of(folder)})")


def _work(config):
    """The options that say how much a defense computes."""
    names = [field.name for field in dataclasses.fields(config)]
    work = [name for name in names if name.endswith(("epochs", "steps", "rounds"))]
    return ", ".join(f"{name} {getattr(config, name)}" for name in work) or "nothing"


# ---------- what it costs ----------


def _unseen(name, class_names, side):
    """The Spec of a data set of which no image was read."""
    half = (0.5,) * 3
    return Spec(name, len(class_names), side, half, half, True, {}, tuple(class_names))


def _noise(spec, count, device):
    """A split of `count` random images."""
    images = torch.randint(256, (count, 3, spec.size, spec.size), dtype=torch.uint8, device=device)
    labels = torch.arange(count, device=device) % spec.classes
    return Split(images, labels, labels)


def _print_attack_costs(method, config, counts, spec, found, device):
    program = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
    few = _noise(spec, estimate.FIRST, device)
    model = train.new_victim(config, spec, few).to(memory_format=torch.channels_last)
    sizes = batch_sizes(counts.train, config.batch_size, drop_last=True)
    workers = distributed.from_environment().size
    cost = estimate.of_step(
        model,
        math.ceil(max(sizes) / workers),
        spec.classes,
        spec.size,
        config.precision,
        optimizer=OPTIMIZERS[config.optimizer](train.trainable(model), train.Recipe.of(config)),
        augment=_augment(config, spec, few),
    )
    seconds = config.epochs * len(sizes) * cost.seconds * _share_of_work(config, spec.size)
    seconds += _evaluations(config) * 2 * counts.test * _forward(cost, max(sizes))
    if method.make_labels:
        beside = ", beside what the labels take"
    else:
        beside = ", beside what the trigger takes" if method.prepare or method.make_loss else ""
    print(f"time     {_about(cost)} {duration(seconds)}: {_step(cost, max(sizes))}{beside}")
    print(f"memory   {_memory(config, counts, spec, program + cost.memory, device)}")
    weights = sum(value.nbytes for value in model.state_dict().values())
    print(f"disk     {_disk(config, counts, spec, found, weights)}")


def _augment(config, spec, few):
    """The augmentation of the training, of images whose positions do not matter."""
    augment = train.augmentation_of(dataclasses.replace(config, flip="random"), spec, few)
    return partial(augment, epoch=0)


def _share_of_work(config, side):
    """How much of the work is left where a part of the epochs sees smaller images."""
    smaller = min(1, (config.small_size / side) ** 2)
    return 1 - config.small_share * (1 - smaller)


def _evaluations(config):
    """How often the victim is measured."""
    return 1 + (config.epochs // config.eval_every if config.eval_every else 0)


def _forward(cost, batch):
    """Seconds of a forward pass for one image: a third of a training step."""
    return cost.seconds / batch / 3


def _memory(config, counts, spec, beside, device):
    """Words for the memory of an attack: the images that it holds, and what it takes beside."""
    image = 3 * spec.size**2
    budget = free_memory(device) / 3 if config.resident_gb is None else config.resident_gb * 1e9
    mapped = (counts.train + counts.test) * image > budget
    train_images = counts.changed if mapped else 2 * counts.train
    images = (train_images + (1 if mapped else 2) * counts.test) * image
    words = f"about {size(beside + images)} on {device.type}, of which images take {size(images)}"
    return f"{words}; {size(free_memory(device))} are free"


def _disk(config, counts, spec, found, weights):
    """Words for the disk space of an attack."""
    image = 3 * spec.size**2
    record = weights + (counts.changed + counts.test) * image
    cache = facts.cache_folder(config.dataset, spec.size, found, config.cache_path)
    decoded = 0 if cache.is_dir() else (counts.train + counts.test) * image
    needed = record + decoded + 2 * weights  # a checkpoint holds what the optimizer remembers too
    place = Path(config.record_path).absolute()
    place = next(parent for parent in (place, *place.parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    words = f"at most about {size(needed)}: {size(record)} for the record"
    words += f", {size(decoded)} for decoded images" * bool(decoded)
    return f"{words}, {size(2 * weights)} while it trains; {size(free)} are free"


def _print_defense_costs(config, data, count, victim, device):
    made = contents.read_options(config.record, victim)
    chosen = contents.architecture(config.record, made, getattr(config, "model_file", None))
    spec = _unseen(made["dataset"], range(data["classes"]), data["size"])
    few = _noise(spec, estimate.FIRST, device)
    model = train.build_model(chosen, made["width"], spec, few)
    model = model.to(memory_format=torch.channels_last)
    whole = config.needs_train_set or config.stage == "in-training" or not count
    images = data["train"] if whole else count
    asked = getattr(config, "batch_size", None) or images
    batch = min(asked, images)
    if not isinstance(config, Training):  # batch normalisation may be left as it is there
        batch = max(batch, estimate.FIRST)
    cost = estimate.of_step(model, batch, spec.classes, spec.size, config.precision)
    epochs = config.epochs if isinstance(config, Training) else 1
    seconds = epochs * len(batch_sizes(images, batch)) * cost.seconds
    what = "an epoch" if epochs == 1 else f"{epochs} epochs"
    print(
        f"time     {_about(cost)} {duration(seconds)} for {what} of plain training on {images} "
        f"{'training' if whole else 'clean'} images: {_step(cost, batch)}"
    )
    print(f"memory   about {size(cost.memory)} for such a step, beside the images")


# ---------- words ----------


def _about(cost):
    return "at least" if cost.is_least else "about"


def _step(cost, batch):
    """Words for a step: its time, and how that is known."""
    words = f"{duration(cost.seconds)} for a step on {batch} images"
    return f"{words}, measured on {cost.measured}" if cost.measured < batch else words


def duration(seconds):
    """A time in words, in two digits: 40 ms, 1.5 s, 20 min, 3.2 h."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    length, unit = next((length, unit) for most, length, unit in TIMES if seconds < most)
    value = seconds / length
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"


def size(count):
    """A number of bytes in words: 45 MB, 2.1 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
