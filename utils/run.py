"""The three protocols.

`attack` poisons a data set, trains a victim, measures it and saves a record. `defend` loads a
record, repairs the victim, measures the result and saves it. `detect` loads a record, has a
detector judge it, measures and saves what the detector says.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from antidote_bench import models
from antidote_bench.utils import distributed, files, seeds, train
from antidote_bench.utils.config import Attack, Training, digest
from antidote_bench.utils.data import clean, dataset, target
from antidote_bench.utils.device import setup
from antidote_bench.utils.errors import ConfigError, RefusedError
from antidote_bench.utils.evaluation import Evaluator
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.poisoning.attacker import LABELS, Attacker, Prepared, prepare_once
from antidote_bench.utils.poisoning.poison import Cover
from antidote_bench.utils.protocol import detect as detection
from antidote_bench.utils.protocol import estimate, plan
from antidote_bench.utils.record import claim, contents, flagged, results
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.repair import selection
from antidote_bench.utils.repair.defender import Defender
from antidote_bench.utils.repair.options import SelectionOptions
from antidote_bench.utils.text import cut

# the clean model behind a trigger is not the victim of any seed a user would give
CLEAN = {
    "pratio": 0.0,
    "label_mode": "all2one",
    "attack_target": 0,
    "poison_seed": 0,
    "random_seed": 2**20,
    "eval_every": 0,
    "overwrite": False,
}
WEAK = 0.5  # ACC below which a clean model deserves a warning
# a victim is measured again on so many images of each test set before it is repaired; on another
# machine or in another precision the shares differ by less than the tolerance
CHECKED, CHECK_TOLERANCE = 1000, 0.1


class Method(NamedTuple):
    """The functions of an attack, as `attack` describes them."""

    name: str
    make_trigger: Callable
    prepare: Callable | None = None
    cover: Cover | None = None
    make_loss: Callable | None = None
    prefer: Callable | None = None
    edit: Callable | None = None
    after_epoch: Callable | None = None
    make_labels: Callable | None = None

    @property
    def poisons_images(self):
        """Whether the record stores the poison: a training set with other images or labels."""
        return not (self.make_loss or self.edit)


def attack(
    script,
    config,
    make_trigger,
    *,
    prepare=None,
    cover=None,
    make_loss=None,
    prefer=None,
    edit=None,
    after_epoch=None,
    make_labels=None,
    workers=None,
):
    """Poison a data set, train a victim on it, measure it and save the record.

    `script` is the attack's module name. `make_trigger(config, spec, stage)` gives the trigger of
    stage train or test. `prepare(config, attacker)`, if given, returns a `Prepared`: the tensors
    that the trigger consists of, which make_trigger and cover.make get as `parts`. `cover`, a
    `Cover`, changes further training images, drawn from those that are not poisoned. With
    `make_loss(config, trigger, relabel)` the training set stays clean, and the attack is in the
    loss that `train.fit` minimises. `prefer(images)` gives a number to each of a batch of training
    images, uint8 N,3,S,S: those of the lowest numbers are poisoned, among those that may be, and
    not random ones. `edit(config, spec, model)` changes the trained victim in place; it gets
    `parts` too, and the training set stays clean. `after_epoch(model)` changes the victim in place
    after every epoch, before it is measured and its state saved; it draws no random number.
    `make_labels(config, attacker)` gives the labels to train on, int64 N: the images stay as they
    are, those with another label than the true one are the poisoned ones, and the trigger is on
    test images alone. `workers` are the processes that train the victim together, by default those
    that torchrun has started.
    """
    name = script.rpartition(".")[2]
    method = Method(
        name, make_trigger, prepare, cover, make_loss, prefer, edit, after_epoch, make_labels
    )
    workers = workers or distributed.from_environment()
    if make_loss and workers.size > 1:
        raise ConfigError(
            f"{name} brings a loss of its own and runs in one process: start it without torchrun"
        )
    distributed.require_full_batches([config.batch_size], workers)
    folder_name = config.save_folder_name or f"{name}_{config.dataset}"
    config = dataclasses.replace(config, save_folder_name=folder_name)
    config, device = setup(config, workers)
    models.check(config.model, config.width)
    folder = Path(config.record_path) / config.save_folder_name
    if config.dry_run:
        return None if workers.rank else plan.attack(method, config, folder, _select, device)
    owner = contextlib.nullcontext() if workers.rank else claim.owned(folder)
    with owner, distributed.process_group(workers, device):
        data = _load(config, device, workers)
        config = target.resolved(config, data.spec.class_names)
        chosen = _select(config, data.train.truth, method, data.train.images)
        train.try_out(config, data.spec, data.train)
        make_victim = partial(train.new_victim, config, data.spec, data.train)
        estimate.require_trainable(make_victim, config.batch_size, data.spec.size)
        facts = contents.facts_of(data)
        begun = workers.rank > 0 or claim.begin(folder, config, kind="attack", data=facts)
        if not distributed.broadcast(begun, workers):
            return already_done(folder)
        _attack(method, config, data, chosen, device, folder, workers)


def _load(config, device, workers):
    """The data set, which must be the same for all processes."""
    with distributed.first_process_first(workers):
        data = dataset.load(config, device, workers)
    distributed.require_same(
        (data.spec.fingerprint, config.precision),
        "other images than the first one, or another precision",
        workers,
    )
    return data


def _attack(method, config, data, chosen, device, folder, workers):
    state = folder / layout.STATE
    index, cover_index = chosen
    method, prepared, facts = _prepare(method, config, data, index, state, device, workers)
    labels = None
    if method.make_labels:
        labels, made = _make_labels(method, config, data, index, state, device, workers)
        facts |= made
        index = (labels != data.train.truth).nonzero().flatten()
    poisoning, loss = _poison(method, config, data, index, cover_index, labels)
    poisoning = poisoning._replace(parts=prepared and prepared.parts, facts=facts)
    train_victim(
        method.name,
        config,
        data,
        poisoning,
        device,
        folder,
        loss=loss,
        start=prepared and prepared.victim,
        poisons_in_loop=not method.poisons_images,
        edit=method.edit and partial(method.edit, config, data.spec),
        after_epoch=method.after_epoch,
        workers=workers,
    )


def train_victim(
    name,
    config,
    data,
    poisoning,
    device,
    folder,
    *,
    loss,
    start=None,
    poisons_in_loop=False,
    edit=None,
    after_epoch=None,
    workers=distributed.SINGLE,
):
    """Train a victim on a `contents.Poisoning` of `data`, measure it and save its record.

    `loss` is what `train.fit` minimises. The victim is a new network, or one with the weights
    `start`; `edit(model)` and `after_epoch(model)` are as in `attack`. With `poisons_in_loop` the
    record stores no training set.
    """
    state = folder / layout.STATE
    evaluator = Evaluator(poisoning.test_sets, config, layout.Log(state))
    model = _train(
        config,
        data.spec,
        poisoning.train,
        evaluator,
        state,
        loss=loss,
        start=start,
        after_epoch=after_epoch,
        workers=workers,
    )
    if workers.rank:
        return
    if edit:
        edit(model)
    seconds = evaluator.clock.seconds
    measured = evaluator.measure("final", model)
    victim = contents.Victim(
        name,
        config,
        model,
        data,
        poisoning,
        poisons_in_loop=poisons_in_loop,
        measured=measured,
        seconds=seconds,
    )
    contents.save_victim(folder, victim, device, workers)
    print(results.line(measured, seconds))


def _select(config, truth, method, images=None):
    """(positions to poison, positions to change as cover images)

    Without `images` the attack's preference for some of them is left out.
    """
    if method.make_labels:  # it chooses them itself; only their number is known before
        return poison.choose(truth, config.pratio, config.poison_seed), truth[:0]
    among, cover = poison.poisonable(truth, config), method.cover
    index = poison.to_poison(truth, config, images, method.prefer)
    if among is not None and 0 < len(index) == int(among.sum()):
        print(
            f"warning: {round(config.pratio * len(truth))} images were asked for, and all "
            f"{len(index)} of the {'target' if config.clean_label else 'source'} class are "
            f"poisoned; --pratio below {len(index) / len(truth):.3f} leaves some of them untouched",
            file=sys.stderr,
        )
    free = torch.ones(len(truth), dtype=torch.bool)
    free[index.cpu()] = False
    ratio = cover.ratio if cover else 0.0
    if ratio and cover.classes is not None:
        free &= poison.of_classes(truth.cpu(), cover.classes)
    return index, poison.choose(truth, ratio, config.poison_seed, among=free, purpose="cover")


def _prepare(method, config, data, index, state, device, workers):
    """(the method with its trigger's tensors filled in, Prepared or None, facts about them)."""
    if not method.prepare:
        return method, None, {}
    find_clean_model = partial(clean_model, config, data.spec, device)
    attacker = Attacker(data.spec, data.train, index, find_clean_model)
    with distributed.first_process_first(workers):
        prepared, facts = prepare_once(method.prepare, config, attacker, state)
    parts, cover = prepared.parts, method.cover
    method = method._replace(
        make_trigger=partial(method.make_trigger, parts=parts),
        cover=cover and cover._replace(make=partial(cover.make, parts=parts)),
        edit=method.edit and partial(method.edit, parts=parts),
    )
    return method, prepared, facts


def _make_labels(method, config, data, index, state, device, workers):
    """(the labels to train on, int64 N on the device, facts about them), made once."""

    def prepare(config, attacker):
        return Prepared({"labels": method.make_labels(config, attacker)})

    attacker = Attacker(
        data.spec, data.train, index, partial(clean_model, config, data.spec, device)
    )
    with distributed.first_process_first(workers):
        prepared, facts = prepare_once(prepare, config, attacker, state, LABELS)
    return prepared.parts["labels"].to(device), facts


def _poison(method, config, data, index, cover_index, labels=None):
    """(Poisoning, the loss to minimise)

    With `labels` no image is triggered for the training.
    """
    relabel = poison.relabelling(
        config.label_mode, config.attack_target, data.spec.classes, config.source_class
    )
    shown = method.make_trigger(config, data.spec, "test")
    tested = poison.triggered_tests(data.test, shown, relabel, config)
    loss = partial(train.cross_entropy, label_smoothing=config.label_smoothing)
    n_poison = len(index)
    if method.make_loss:
        trigger = method.make_trigger(config, data.spec, "train")
        loss = method.make_loss(config, trigger, relabel)
    if not method.poisons_images:
        index = index[:0]
    split = data.train
    if labels is not None:
        split = dataset.Split(split.images, labels, split.truth)
    elif len(index):
        trigger = method.make_trigger(config, data.spec, "train")
        split = poison.poison(split, trigger, relabel, index)
    if len(cover_index):
        split = poison.poison(split, method.cover.make(config, data.spec), None, cover_index)
    poisoning = contents.Poisoning(
        split, index, cover_index, n_poison, **tested, parts=None, facts={}
    )
    return poisoning, loss


def _train(config, spec, split, evaluator, state, *, loss, start, after_epoch, workers):
    """The victim: a new network, or one with the weights `start`, trained on `split`."""
    torch.manual_seed(seeds.number("weights", config.random_seed))
    model = train.new_victim(config, spec, split)
    if start:
        model.load_state_dict(start)
    return train.fit(
        model,
        split,
        train.Recipe.of(config),
        loss=loss,
        augment=train.augmentation_of(config, spec, split),
        drop_last=True,
        after_epoch=after_epoch,
        on_epoch=partial(evaluator.measure, "train"),
        checkpoint=state / "train.safetensors",
        workers=workers,
    )


def defend(script, config, repair, check=None):
    """Load a record, let the method repair the victim, measure the result and save it.

    `repair(model, record, config) -> model` gets the victim and a `Defender`.
    `check(model, record, config)` gets the same before anything is written, and raises ConfigError
    where the method does not apply. The test sets stay with the evaluator. Only a method whose
    config.selection is oracle may have candidates measured on them; the results say so, and every
    table marks it.
    """
    name = script.rpartition(".")[2]
    if distributed.from_environment().size > 1:
        raise ConfigError(f"the defense {name} runs in one process: start it without torchrun")
    folder_name = config.save_folder_name or name
    config, device = setup(dataclasses.replace(config, save_folder_name=folder_name))
    info = contents.open_record(config.record)
    folder = config.record / layout.DEFENSES / config.save_folder_name
    if config.dry_run:
        return plan.defense(name, config, folder, info, device)
    _require_train_set(name, config, info)
    with claim.owned(folder):
        # the data is compared first: other data is never "already done"
        loaded = contents.load(config.record, config, device, info)
        if config.selection == "oracle":
            _require_triggered(name, config, loaded)
        held = clean.hold(loaded.clean, loaded.spec, config)
        marked = flagged.read(config, info, len(loaded.train))
        if marked:
            train_set, held = flagged.leave_out(loaded.train, held, marked)
            loaded = loaded._replace(train=train_set)
        if isinstance(config, Training):
            estimate.require_trainable(lambda: loaded.model, config.batch_size, loaded.spec.size)
        if isinstance(config, SelectionOptions):
            selection.hold_out(held.split, config)  # raises where there are too few
        if check:
            check(loaded.model, _defender(config, loaded, held, folder, info, marked), config)
        victim, facts = info["files"][layout.WEIGHTS], contents.facts_of_clean(held, marked)
        if not claim.begin(folder, config, kind="defense", victim=victim, data=facts):
            return already_done(folder)
        _defend(name, config, repair, loaded, held, marked, folder, info, device)


def _defend(name, config, repair, loaded, held, marked, folder, info, device):
    victim_row, before = contents.read_measures(config.record, info)
    evaluator = Evaluator(loaded.test_sets, config, layout.Log(folder / layout.STATE))
    _require_victim(config, loaded, before, evaluator)
    evaluator.note("before", before)
    defender = _defender(config, loaded, held, folder, info, marked, evaluator)
    torch.manual_seed(seeds.number("defense", config.random_seed))
    model = repair(loaded.model, defender, config)
    seconds = evaluator.clock.seconds
    measured = evaluator.measure("after", model)
    repaired = contents.Repair(
        name,
        config,
        model,
        victim_row,
        info["files"][layout.WEIGHTS],
        held,
        marked,
        measured=measured,
        seconds=seconds,
    )
    contents.save_repair(folder, repaired, device)
    print(results.line(measured, seconds))


def _require_train_set(name, config, info):
    """Raise RefusedError (exit 4) where a method needs a poisoned set that the record lacks."""
    in_training = config.stage == "in-training"
    if (config.needs_train_set or in_training) and info.get("training_set") == "none":
        why = f"{info['name']} poisons inside the training loop or the weights, and no image"
        if info.get("imported"):
            why = "the victim was imported without one"
        raise RefusedError(
            f"the record {config.record} stores no poisoned training set, because {why}; {name} "
            f"{'trains on' if in_training else 'looks at'} such a set"
        )


def _require_triggered(name, config, loaded):
    """Raise RefusedError (exit 4) where the record of a method that needs them has no triggered
    test images."""
    if not len(loaded.test_sets.backdoor):
        raise RefusedError(
            f"the record {config.record} has no triggered test image, because its trigger is not "
            f"known, and {name} is measured on them"
        )


def _require_victim(config, loaded, before, evaluator):
    """Raise RefusedError (exit 4) where the weights are not those that results.csv describes."""
    measured = evaluator.sample(loaded.model, CHECKED)
    for name, value in measured.items():
        if None not in (value, before[name]) and abs(value - before[name]) > CHECK_TOLERANCE:
            raise RefusedError(
                f"the record {config.record} is damaged: {layout.RESULTS} says {name.upper()} "
                f"{100 * before[name]:.1f} %, but {layout.WEIGHTS} reaches {100 * value:.1f} % on "
                f"{CHECKED} of its images"
            )


def _defender(config, loaded, held, folder, info, marked=None, evaluator=None):
    """What the method may know and use; without an evaluator nothing can be measured."""

    def report(stage, model, **values):
        evaluator.measure(stage, model, **values)  # and nothing is returned

    mark = info["files"][layout.POISONED][:12] + (f"-{marked.sha256[:12]}" if marked else "")
    shared = config.record / layout.DEFENSES / layout.SHARED / mark
    return Defender(
        loaded.spec,
        loaded.train,
        held.split,
        held.index,
        loaded.name,
        loaded.width,
        state=folder / layout.STATE,
        shared=shared,
        report=report,
        measure=evaluator.answer if evaluator and config.selection == "oracle" else None,
    )


def detect(script, config, score):
    """Load a record, let the detector judge it, measure what it says and save it.

    `score(model, record, config)` gets the victim, which it must not change, and an `Inspector`. It
    returns a float64 score for every image that it judges, the higher the more suspicious, or a
    `Scored`; a detector of models returns a `Finding`. Which images are poisoned only the evaluator
    knows.
    """
    name = script.rpartition(".")[2]
    if distributed.from_environment().size > 1:
        raise ConfigError(f"the detector {name} runs in one process: start it without torchrun")
    folder_name = config.save_folder_name or name
    config, device = setup(dataclasses.replace(config, save_folder_name=folder_name))
    info = contents.open_record(config.record)
    folder = config.record / layout.DETECTIONS / config.save_folder_name
    if config.dry_run:
        return detection.plan(name, config, folder, info)
    _require_train_set(name, config, info)
    with claim.owned(folder):
        loaded = contents.load(config.record, config, device, info)
        if config.judges == "input":
            _require_triggered(name, config, loaded)
        victim = info["files"][layout.WEIGHTS]
        if claim.begin(folder, config, kind="detection", victim=victim):
            row, before = contents.read_measures(config.record, info)
            evaluator = Evaluator(loaded.test_sets, config, layout.Log(folder / layout.STATE))
            _require_victim(config, loaded, before, evaluator)
            detection.inspect(name, config, score, loaded, folder, info, row, device)
        else:
            print(f"already done: {folder}")
        print(detection.line(layout.read_results(folder)))


def clean_model(config, spec, device):
    """(the clean model that an attack's options name, what record.json says about it).

    It is the one of config.clean_record, or one that is trained like the victim with another seed
    and kept in config.cache_path. It is on `device`, its parameters frozen. Raises RefusedError
    (exit 4) where the record is of another data set or not of a clean model.
    """
    named = getattr(config, "clean_record", None)  # attack/clean.py borrows triggers, not options
    if named:
        folder = layout.find(named, config.record_path)
    else:
        folder = _train_clean_model(config, spec)
    info = contents.open_record(folder)
    row, _ = contents.read_measures(folder, info)
    data, made = info["data"], contents.read_options(folder, info)
    if row["n_poison"] != "0":
        raise RefusedError(
            f"the record {folder} is not of a clean model but of {info['name']}; attack/clean.py "
            "makes one"
        )
    there = made["dataset"], data["classes"], data["size"]
    if there != (config.dataset, spec.classes, spec.size):
        raise RefusedError(
            f"the clean model {folder} was trained on another data set than {config.dataset} at "
            f"{spec.size} pixels"
        )
    if data["fingerprint"] != spec.fingerprint:
        print(
            f"warning: the clean model {folder} was trained on other pixels than those of "
            f"{config.dataset} here",
            file=sys.stderr,
        )
    if float(row["acc"]) < WEAK:
        print(
            f"warning: the clean model {folder} has an ACC of only {100 * float(row['acc']):.0f} %",
            file=sys.stderr,
        )
    own = config.model if models.is_file(config.model) else None
    chosen = contents.architecture(folder, made, own)
    model = contents.load_model(folder, spec, info, made["width"], chosen)
    model = model.to(device).eval().requires_grad_(False)
    facts = {
        "record": str(folder),
        "sha256": info["files"][layout.WEIGHTS],
        "acc": float(row["acc"]),
    }
    return model, facts


def _train_clean_model(config, spec):
    """The folder of a clean model in the cache; it is trained first where it is not there yet."""
    same = {field.name: getattr(config, field.name) for field in dataclasses.fields(Attack)}
    record_path = str(Path(config.cache_path) / "clean_models")
    made = Attack(**{**same, **CLEAN, "record_path": record_path})
    mark = digest({**made.identity(), **spec.fingerprint})
    network = models.label(config.model, config.width).replace(":", "-")
    label = f"{config.dataset}_{network}_{mark}"
    folder = Path(record_path) / label
    lock = files.locked(folder.with_suffix(".lock"))  # of two runs at once, one trains
    with lock, contextlib.redirect_stdout(sys.stderr):
        if layout.state_of(folder) != layout.DONE:
            print(f"a clean model is trained first and kept in {folder}")
            made = dataclasses.replace(made, save_folder_name=label)
            attack(
                "clean", made, lambda *_: lambda images, index: images, workers=distributed.SINGLE
            )
    return folder


def already_done(folder):
    """Print where a finished run lies and what it measured."""
    row = layout.read_results(folder)
    try:
        line = results.line(results.measures_of(row), float(row["seconds"]))
    except (KeyError, ValueError) as error:
        raise RefusedError(f"{folder / layout.RESULTS} is damaged: {cut(error, 200)}") from error
    print(f"already done: {folder}")
    print(line)
