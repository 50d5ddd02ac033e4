"""The two protocols: attack poisons, trains, judges and saves; defend loads, repairs, judges and saves."""

import dataclasses
from functools import partial
from pathlib import Path

import torch

import models
from utils import data, files, metrics, poison, record, results, seeds, sources, train
from utils.batch import augmentation, lengths
from utils.device import setup
from utils.errors import ConfigError
from utils.judge import Judge
from utils.preview import preview


def attack(script, config, make_trigger, *, make_cover=None, cover_ratio=0.0):
    """Poison a data set offline, train a victim on it, judge it and save the record.

    `script` is the attack's module name. `make_trigger(config, spec, stage)` gives the trigger of stage train or
    test. `make_cover(config, spec)`, if given, disturbs the share `cover_ratio` of the training set, drawn from the
    rest, which keeps its labels.
    """
    name = script.rpartition(".")[2]
    config, device = setup(dataclasses.replace(config, save_folder_name=config.save_folder_name or f"{name}_{config.dataset}"))
    models.check(config.model, config.width)
    folder = Path(config.record_path) / config.save_folder_name
    select = partial(_select, config=config, cover_ratio=cover_ratio)
    if config.dry_run:
        return _plan_attack(config, folder, select)
    if not record.begin(folder, config, kind="attack"):
        return _already_done(folder)

    state = folder / "state"
    spec, clean, test = data.load(
        config.dataset, config.dataset_path, image_size=config.image_size, device=device, cache=config.cache_path, download=config.download
    )
    index, cover = select(clean.truth, spec.classes)
    relabel = poison.relabelling(config.label_mode, config.attack_target, spec.classes)
    test_index, backdoor = poison.backdoored(test, make_trigger(config, spec, "test"), relabel)
    judge = Judge(metrics.Exam(test, backdoor), config, state / "log.csv")
    found = poison.poison(clean, make_trigger(config, spec, "train"), relabel, index) if len(index) else clean
    if len(cover):
        found = poison.poison(found, make_cover(config, spec), None, cover)

    torch.manual_seed(seeds.number("weights", config.random_seed))
    model = models.build(config.model, spec, config.width).to(device)
    train.fit(model, found, config, augment=augmentation(spec), drop_last=True,
              on_epoch=partial(judge.measure, "train"), checkpoint=state / "train.safetensors")  # fmt: skip
    seconds = judge.clock.seconds
    after = judge.measure("final", model)

    row = results.of_attack(name, config, after, metrics.Exam(test, backdoor), len(index), len(clean), seconds)
    table, facts = results.seal(row, config, device)
    shown = torch.linspace(0, len(backdoor) - 1, 8).long().unique() if len(backdoor) else torch.arange(0)
    contents = {
        record.WEIGHTS: record.weights_file(model),
        record.POISONED: record.poison_file(found, index, cover, test_index, backdoor),
        "preview.png": preview(test[test_index[shown]], backdoor[shown]),
        results.FILE: table,
    }
    record.finish(folder, contents, {**facts, "data": record.facts(spec, clean, test)}, kind="attack")
    print(results.line(after, seconds))


def defend(script, config, repair, *, stage="repair", selection="fixed"):
    """Load the record, let `repair(model, record, config) -> model` work on it, judge what comes back and save it.

    The method gets the victim and a `Record`; the exam stays with the judge. `stage` is repair or in-training,
    `selection` says how the method's settings were chosen: none, fixed, val or oracle.
    """
    name = script.rpartition(".")[2]
    config, device = setup(dataclasses.replace(config, save_folder_name=config.save_folder_name or name))
    info = record.verify(config.record, "attack")
    folder, victim_sum = config.record / "defense" / config.save_folder_name, info["files"][record.WEIGHTS]
    if config.dry_run:
        return _plan_defense(name, config, folder, info)
    if not record.begin(folder, config, kind="defense", victim=victim_sum):
        return _already_done(folder)

    state = folder / "state"
    model, found, exam, clean, spec = record.load(config.record, config, device)
    index = data.balanced_subset(clean.labels, _budget(config, len(clean)), config.data_seed).to(device)
    victim = files.read_csv(config.record / results.FILE)[0]
    judge = Judge(exam, config, state / "log.csv")
    judge.note("before", results.measured(victim))

    def report(stage, model, **values):
        judge.measure(stage, model, **values)  # and nothing comes back

    torch.manual_seed(seeds.number("defense", config.random_seed))
    model = repair(model, record.Record(spec, found, clean[index], index, state, report), config)
    seconds = judge.clock.seconds
    after = judge.measure("after", model)

    row = results.of_defense(name, config, victim, after, len(index), seconds, stage=stage, selection=selection)
    table, facts = results.seal(row, config, device)
    contents = {record.WEIGHTS: record.weights_file(model), results.FILE: table}
    record.finish(folder, contents, {**facts, "victim_sha256": victim_sum}, kind="defense")
    print(results.line(after, seconds))


def _select(truth, classes, *, config, cover_ratio):
    """(positions to poison, positions to disturb); ConfigError where the target is not a class."""
    if config.attack_target >= classes:
        raise ConfigError(f"attack_target {config.attack_target} is not a class of {config.dataset}: it has 0 to {classes - 1}")
    index = poison.choose(truth, config.pratio, config.poison_seed)
    free = torch.ones(len(truth), dtype=torch.bool)
    free[index.cpu()] = False
    return index, poison.choose(truth, cover_ratio, config.poison_seed, among=free, purpose="cover")


def _budget(config, count):
    """How many clean images a defender holds: floor(clean_ratio * count)."""
    return int(config.clean_ratio * count + 1e-9)


def _plan_attack(config, folder, select):
    data.side_of(config.dataset, config.image_size)
    found = sources.find(config.dataset, config.dataset_path)
    truth = torch.from_numpy(found["train"].read()[1])
    classes = int(truth.max()) + 1
    index, cover = select(truth, classes)
    per_class = torch.bincount(truth[index], minlength=classes).tolist()
    steps, tests = len(lengths(len(truth), config.batch_size, drop_last=True)), len(found["test"].read()[1])
    print(f"reads    {config.dataset} from {config.dataset_path}: {len(truth)} training and {tests} test pictures")
    print(f"poisons  {len(index)} of {len(truth)} pictures; per class {per_class}; {len(cover)} more are disturbed and keep their label")
    print(f"trains   {models.label(config.model, config.width)} for {config.epochs} epochs of {steps} steps in {config.precision}")
    print(f"writes   {folder} ({_state(folder)})")


def _plan_defense(name, config, folder, victim):
    count = _budget(config, victim["data"]["train"])
    print(f"reads    {config.record}: {victim['name']} on {victim['data']['train']} training pictures")
    print(f"repairs  with {name} and {count} clean pictures of {victim['data']['classes']} classes in {config.precision}")
    if hasattr(config, "epochs"):
        print(f"trains   {config.epochs} epochs of {len(lengths(count, config.batch_size))} steps")
    print(f"writes   {folder} ({_state(folder)})")


def _state(folder):
    return "complete" if (folder / "record.json").exists() else "unfinished" if (folder / "state").exists() else "new"


def _already_done(folder):
    row = files.read_csv(folder / results.FILE)[0]
    print(f"already done: {folder}")
    print(results.line(results.measured(row), float(row["seconds"])))
