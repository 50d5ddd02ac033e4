"""The two protocols.

`attack` poisons a data set, trains a victim, measures it and saves a record. `defend` loads a
record, repairs the victim, measures the result and saves it.
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
from antidote_bench.utils.config import Attack, digest
from antidote_bench.utils.data import dataset, sources
from antidote_bench.utils.data.loader import batch_sizes
from antidote_bench.utils.device import setup
from antidote_bench.utils.errors import ConfigError, RefusedError
from antidote_bench.utils.evaluation import Evaluator, TestSets
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.poisoning.attacker import Attacker, prepare_once
from antidote_bench.utils.poisoning.options import CleanModelOptions
from antidote_bench.utils.poisoning.poison import Cover
from antidote_bench.utils.record import claim, contents, results
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.repair.defender import Defender

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


def attack(script, config, make_trigger, *, prepare=None, cover=None, make_loss=None, workers=None):
    """Poison a data set, train a victim on it, measure it and save the record.

    `script` is the attack's module name. `make_trigger(config, spec, stage)` gives the trigger of
    stage train or test. `prepare(config, attacker)`, if given, returns a `Prepared`: the tensors
    that the trigger consists of, which make_trigger and cover.make get as `parts`. `cover`, a
    `Cover`, changes further training images, drawn from those that are not poisoned. With
    `make_loss(config, trigger, relabel)` the training set stays clean, and the attack is in the
    loss that `train.fit` minimises. `workers` are the processes that train the victim together, by
    default those that torchrun has started.
    """
    name = script.rpartition(".")[2]
    method = Method(name, make_trigger, prepare, cover, make_loss)
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
        return None if workers.rank else _plan_attack(method, config, folder)
    owner = contextlib.nullcontext() if workers.rank else claim.owned(folder)
    with owner, distributed.process_group(workers, device):
        data = _load(config, device, workers)
        chosen = _select(config, data.train.truth, data.spec.classes, method.cover)
        facts = contents.facts_of(data)
        begun = workers.rank > 0 or claim.begin(folder, config, kind="attack", data=facts)
        if not distributed.broadcast(begun, workers):
            return _already_done(folder)
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
    poisoning, loss = _poison(method, config, data, index, cover_index)
    poisoning = poisoning._replace(parts=prepared and prepared.parts, facts=facts)

    evaluator = Evaluator(poisoning.test_sets, config, layout.Log(state))
    start = prepared and prepared.victim
    model = _train(config, data.spec, poisoning.train, loss, start, evaluator, state, workers)
    if workers.rank:
        return
    seconds = evaluator.clock.seconds
    measured = evaluator.measure("final", model)
    victim = contents.Victim(
        method.name,
        config,
        model,
        data,
        poisoning,
        poisons_in_loop=method.make_loss is not None,
        measured=measured,
        seconds=seconds,
    )
    contents.save_victim(folder, victim, device, workers)
    print(results.line(measured, seconds))


def _select(config, truth, classes, cover):
    """(positions to poison, positions to change as cover images).

    Raises ConfigError (exit 2) where the target is not a class.
    """
    if config.attack_target >= classes:
        raise ConfigError(
            f"attack_target {config.attack_target} is not a class of {config.dataset}: it has 0 to "
            f"{classes - 1}"
        )
    among = truth == config.attack_target if config.clean_label else None
    index = poison.choose(truth, config.pratio, config.poison_seed, among=among)
    if config.clean_label and len(index) == int(among.sum()):
        print(
            f"warning: {round(config.pratio * len(truth))} images were asked for, and all "
            f"{len(index)} of the target class are poisoned; --pratio below "
            f"{len(index) / len(truth):.3f} leaves some of them untouched",
            file=sys.stderr,
        )
    free = torch.ones(len(truth), dtype=torch.bool)
    free[index.cpu()] = False
    ratio = cover.ratio if cover else 0.0
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
        cover=cover and Cover(partial(cover.make, parts=parts), cover.ratio),
    )
    return method, prepared, facts


def _poison(method, config, data, index, cover_index):
    """(Poisoning, the loss to minimise)"""
    relabel = poison.relabelling(config.label_mode, config.attack_target, data.spec.classes)
    shown = method.make_trigger(config, data.spec, "test")
    backdoor_index, backdoor = poison.triggered_split(data.test, shown, relabel)
    target_index, target = poison.triggered_split(data.test, shown, relabel, own=True)
    loss = partial(train.cross_entropy, label_smoothing=config.label_smoothing)
    n_poison = len(index)
    if method.make_loss:
        trigger = method.make_trigger(config, data.spec, "train")
        loss, index = method.make_loss(config, trigger, relabel), index[:0]
    split = data.train
    if len(index):
        trigger = method.make_trigger(config, data.spec, "train")
        split = poison.poison(split, trigger, relabel, index)
    if len(cover_index):
        split = poison.poison(split, method.cover.make(config, data.spec), None, cover_index)
    test_sets = TestSets(data.test, backdoor, target)
    poisoning = contents.Poisoning(
        split, index, cover_index, n_poison, test_sets, backdoor_index, target_index, None, {}
    )
    return poisoning, loss


def _train(config, spec, split, loss, start, evaluator, state, workers):
    """The victim: a new network, or one with the weights `start`, trained on `split`."""
    model = train.build_seeded_model(
        config.model, config.width, spec, split, "weights", config.random_seed
    )
    if start:
        model.load_state_dict(start)
    return train.fit(
        model,
        split,
        train.Recipe.of(config),
        loss=loss,
        augment=train.augmentation_of(config, spec, split),
        drop_last=True,
        on_epoch=partial(evaluator.measure, "train"),
        checkpoint=state / "train.safetensors",
        workers=workers,
    )


def defend(script, config, repair):
    """Load a record, let the method repair the victim, measure the result and save it.

    `repair(model, record, config) -> model` gets the victim and a `Defender`. The test sets stay
    with the evaluator. Only a method whose config.selection is oracle may have candidates measured
    on them; the results say so, and every table marks it.
    """
    name = script.rpartition(".")[2]
    if distributed.from_environment().size > 1:
        raise ConfigError(f"the defense {name} runs in one process: start it without torchrun")
    folder_name = config.save_folder_name or name
    config, device = setup(dataclasses.replace(config, save_folder_name=folder_name))
    info = contents.open_record(config.record)
    folder = config.record / layout.DEFENSES / config.save_folder_name
    if config.dry_run:
        return _plan_defense(name, config, folder, info)
    _require_train_set(name, config, info)
    with claim.owned(folder):
        # the data is compared first: other data is never "already done"
        loaded = contents.load(config.record, config, device, info)
        victim = info["files"][layout.WEIGHTS]
        if not claim.begin(folder, config, kind="defense", victim=victim):
            return _already_done(folder)
        _defend(name, config, repair, loaded, folder, info, device)


def _defend(name, config, repair, loaded, folder, info, device):
    victim_row, before = contents.read_measures(config.record, info)
    evaluator = Evaluator(loaded.test_sets, config, layout.Log(folder / layout.STATE))
    _require_victim(config, loaded, before, evaluator)
    evaluator.note("before", before)
    defender = _defender(config, device, loaded, folder, info, evaluator)
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
        clean_count=len(defender.clean),
        measured=measured,
        seconds=seconds,
    )
    contents.save_repair(folder, repaired, device)
    print(results.line(measured, seconds))


def _require_train_set(name, config, info):
    """Raise RefusedError (exit 4) where a method needs a poisoned set that the record lacks."""
    in_training = config.stage == "in-training"
    if (config.needs_train_set or in_training) and info.get("training_set") == "none":
        raise RefusedError(
            f"the record {config.record} stores no poisoned training set, because {info['name']} "
            f"poisons inside the training loop; {name} "
            f"{'trains on' if in_training else 'looks at'} such a set"
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


def _defender(config, device, loaded, folder, info, evaluator):
    """What the method may know and use."""
    clean, spec = loaded.clean, loaded.spec
    index = torch.empty(0, dtype=torch.long)
    if budget := config.budget(len(clean), spec.classes):
        index = dataset.balanced_subset(clean.labels, budget, config.data_seed)
    index = index.to(device)

    def report(stage, model, **values):
        evaluator.measure(stage, model, **values)  # and nothing is returned

    shared = config.record / layout.DEFENSES / layout.SHARED / info["files"][layout.POISONED][:12]
    return Defender(
        spec,
        loaded.train,
        clean[index],
        index,
        loaded.name,
        loaded.width,
        state=folder / layout.STATE,
        shared=shared,
        report=report,
        measure=evaluator.answer if config.selection == "oracle" else None,
    )


def clean_model(config, spec, device):
    """(the clean model that an attack's options name, what record.json says about it).

    It is the one of config.clean_record, or one that is trained like the victim with another seed
    and kept in config.cache_path. It is on `device`, its parameters frozen. Raises RefusedError
    (exit 4) where the record is of another data set or not of a clean model.
    """
    if config.clean_record:
        folder = layout.find(config.clean_record, config.record_path)
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
    model = contents.load_model(folder, spec, info, made).to(device).eval().requires_grad_(False)
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
    label = f"{config.dataset}_{models.label(config.model, config.width)}_{mark}"
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


def _plan_attack(method, config, folder):
    """Print what an attack would read, poison, train and write."""
    dataset.side_of(config.dataset, config.image_size)
    found = sources.find(config.dataset, config.dataset_path)
    truth = torch.from_numpy(found["train"].read()[1])
    classes, n_test = int(truth.max()) + 1, len(found["test"].read()[1])
    index, cover_index = _select(config, truth, classes, method.cover)
    steps = len(batch_sizes(len(truth), config.batch_size, drop_last=True))
    network = models.label(config.model, config.width)
    print(
        f"reads    {config.dataset} from {config.dataset_path}: {len(truth)} training and {n_test} "
        "test images"
    )
    if method.make_loss:
        print(
            f"poisons  no stored image: the loss shows each of {len(truth)} images with the "
            "trigger too"
        )
    else:
        per_class = torch.bincount(truth[index], minlength=classes).tolist()
        print(
            f"poisons  {len(index)} of {len(truth)} images; per class {per_class}; "
            f"{len(cover_index)} more are changed and keep their label"
        )
    if isinstance(config, CleanModelOptions) and config.needs_clean_model:
        where = config.clean_record or "one is trained first where the cache has none"
        print(f"needs    a clean model: {where}")
    print(f"trains   {network} for {config.epochs} epochs of {steps} steps in {config.precision}")
    print(f"recipe   {results.recipe(config)}")
    print(f"writes   {folder} ({layout.state_of(folder)})")


def _plan_defense(name, config, folder, victim):
    """Print what a defense would read, train and write."""
    data = victim["data"]
    count = config.budget(data["train"], data["classes"])
    clean = f"{count} clean images of {data['classes']} classes" if count else "no clean image"
    print(f"reads    {config.record}: {victim['name']} on {data['train']} training images")
    print(f"repairs  with {name} and {clean} in {config.precision}")
    print(f"trains   {_work(config)}")
    print(f"writes   {folder} ({layout.state_of(folder)})")


def _work(config):
    """The options that say how much a defense computes."""
    names = [field.name for field in dataclasses.fields(config)]
    work = [name for name in names if name.endswith(("epochs", "steps", "rounds"))]
    return ", ".join(f"{name} {getattr(config, name)}" for name in work) or "nothing"


def _already_done(folder):
    row = layout.read_results(folder)
    print(f"already done: {folder}")
    print(results.line(results.measures_of(row), float(row["seconds"])))
