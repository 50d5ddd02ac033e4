"""The two protocols: attack poisons, trains, judges and saves; defend loads, repairs, judges and saves."""

import contextlib
import dataclasses
import sys
from functools import partial
from pathlib import Path

import torch

import models
from utils import crew, data, files, metrics, poison, record, results, seeds, sources, train, workshop
from utils.batch import lengths
from utils.config import Attack, CleanModel, Training, digest, find_record, identity
from utils.device import setup
from utils.errors import ConfigError, RefusedError
from utils.judge import Judge
from utils.preview import preview

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


def attack(script, config, make_trigger, *, prepare=None, make_cover=None, cover_ratio=0.0, make_loss=None, workers=None):
    """Poison a data set, train a victim on it, judge it and save the record.

    `script` is the attack's module name. `make_trigger(config, spec, stage)` gives the trigger of stage train or test.
    `prepare(config, workshop)`, if given, makes the tensors that the trigger consists of, a dict; they are kept in the
    record, and make_trigger and make_cover get them as `parts`; under `victim/` there may be the weights that
    the victim starts from. `make_cover(config, spec)` disturbs the
    share `cover_ratio` of the training set, drawn from the rest, which keeps its labels. With `make_loss(config,
    trigger, relabel)` the set stays clean, and the attack is in what `train.fit` minimises. `workers` are the processes
    that train the victim together, by default those that torchrun has started.
    """
    name, workers = script.rpartition(".")[2], workers or crew.found()
    if make_loss and workers.size > 1:
        raise ConfigError(f"{name} brings a loss of its own and runs in one process: start it without torchrun")
    crew.require_parts([config.batch_size], workers)
    config = dataclasses.replace(config, save_folder_name=config.save_folder_name or f"{name}_{config.dataset}")
    config, device = setup(config, workers)
    models.check(config.model, config.width)
    folder = Path(config.record_path) / config.save_folder_name
    select = partial(_select, config=config, cover_ratio=cover_ratio)
    if config.dry_run:
        return None if workers.rank else _plan_attack(config, folder, select, in_loop=make_loss is not None)
    begun = workers.rank > 0 or record.begin(folder, config, kind="attack")
    with crew.joined(workers, device):
        if not crew.tell(begun, workers):
            return _already_done(folder)
        _attack(name, config, device, folder, select, make_trigger, prepare, make_cover, make_loss, workers)


def _attack(name, config, device, folder, select, make_trigger, prepare, make_cover, make_loss, workers):
    state = folder / "state"
    with crew.first(workers):
        spec, clean, test = data.load(config.dataset, config.dataset_path, image_size=config.image_size, device=device,
                                      cache=config.cache_path, download=config.download, resident_gb=config.resident_gb,
                                      copies=1 if device.type == "cuda" else workers.local_size)  # fmt: skip
    crew.require_same((spec.fingerprint, config.precision), "other pictures than the first one, or another precision", workers)
    index, cover = select(clean.truth, spec.classes)
    n_poison = len(index)
    relabel = poison.relabelling(config.label_mode, config.attack_target, spec.classes)
    parts, origin = {}, {}
    if prepare:
        with crew.first(workers):
            parts, origin = workshop.prepared(
                prepare, config, workshop.Workshop(spec, clean, index, partial(clean_model, config, spec, device)), state
            )
        make_trigger, make_cover = (make and partial(make, parts=parts) for make in (make_trigger, make_cover))
    shown = make_trigger(config, spec, "test")
    test_index, backdoor = poison.backdoored(test, shown, relabel)
    target_index, target = poison.backdoored(test, shown, relabel, own=True)
    exam = metrics.Exam(test, backdoor, target)
    judge = Judge(exam, config, state / "log.csv")
    loss = partial(train.cross_entropy, label_smoothing=config.label_smoothing)
    if make_loss:
        loss, index = make_loss(config, make_trigger(config, spec, "train"), relabel), index[:0]
    found = poison.poison(clean, make_trigger(config, spec, "train"), relabel, index) if len(index) else clean
    if len(cover):
        found = poison.poison(found, make_cover(config, spec), None, cover)

    model = train.new(config.model, config.width, spec, found, "weights", config.random_seed)
    if start := record.start_weights(parts):
        model.load_state_dict(start)
    train.fit(model, found, config, loss=loss, augment=train.augmentation_of(config, spec, found), drop_last=True,
              on_epoch=partial(judge.measure, "train"), checkpoint=state / "train.safetensors", workers=workers)  # fmt: skip
    if workers.rank:
        return
    seconds = judge.clock.seconds
    after = judge.measure("final", model)

    row = results.of_attack(name, config, after, exam, n_poison, len(clean), seconds)
    table, facts = results.seal(row, config, device, workers)
    eight = torch.linspace(0, len(backdoor) - 1, 8).long().unique() if len(backdoor) else torch.arange(0)
    contents = {
        record.WEIGHTS: record.weights_file(model),
        record.POISONED: record.poison_file(found, index, cover, test_index, backdoor, target_index, target),
        "preview.png": preview(test[test_index[eight]], backdoor[eight]),
        results.FILE: table,
    }
    if prepare:
        contents[record.TRIGGER] = record.trigger_file(parts)
    facts |= {"data": record.facts(spec, clean, test), "training_set": "none" if make_loss else "stored", **origin}
    record.finish(folder, contents, facts, kind="attack")
    print(results.line(after, seconds))


def defend(script, config, repair, *, stage="repair", selection="fixed", needs_found=False):
    """Load the record, let `repair(model, record, config) -> model` work on it, judge what comes back and save it.

    The method gets the victim and a `Record`; the exam stays with the judge. `stage` is repair or in-training,
    `selection` says how the method's settings were chosen: none, fixed, val or oracle. With oracle, and only then, the
    Record lets the method measure candidates on the exam; the same word goes to the results, where every table marks it.
    `needs_found` is for a repair that looks at the found training set, as every method in training does.
    """
    name = script.rpartition(".")[2]
    if crew.found().size > 1:
        raise ConfigError(f"the defense {name} runs in one process: start it without torchrun")
    config, device = setup(dataclasses.replace(config, save_folder_name=config.save_folder_name or name))
    info = record.verify(config.record, "attack")
    folder, victim_sum = config.record / "defense" / config.save_folder_name, info["files"][record.WEIGHTS]
    if config.dry_run:
        return _plan_defense(name, config, folder, info)
    if (needs_found or stage == "in-training") and info.get("training_set") == "none":
        raise RefusedError(f"the record {config.record} stores no poisoned training set, because {info['name']} poisons inside the training "
                           f"loop; {name} {'looks at' if stage == 'repair' else 'trains on'} such a set")  # fmt: skip
    if not record.begin(folder, config, kind="defense", victim=victim_sum):
        return _already_done(folder)

    state = folder / "state"
    model, found, exam, clean, spec = record.load(config.record, config, device)
    budget = config.budget(len(clean), spec.classes)
    index = (data.balanced_subset(clean.labels, budget, config.data_seed) if budget else torch.empty(0, dtype=torch.long)).to(device)
    victim = files.read_csv(config.record / results.FILE)[0]
    judge = Judge(exam, config, state / "log.csv")
    judge.note("before", {**results.measured(victim), "asr_all": files.read_csv(config.record / "log.csv")[-1].get("asr_all")})

    def report(stage, model, **values):
        judge.measure(stage, model, **values)  # and nothing comes back

    torch.manual_seed(seeds.number("defense", config.random_seed))
    made, measure = record.architecture(config.record), judge.answer if selection == "oracle" else None
    shared = config.record / "defense" / ".shared" / info["files"][record.POISONED][:12]
    model = repair(model, record.Record(spec, found, clean[index], index, *made, state, shared, report, measure), config)
    seconds = judge.clock.seconds
    after = judge.measure("after", model)

    row = results.of_defense(name, config, victim, after, len(index), seconds, stage=stage, selection=selection)
    table, facts = results.seal(row, config, device)
    contents = {record.WEIGHTS: record.weights_file(model), results.FILE: table, **record.kept(state)}
    record.finish(folder, contents, {**facts, "victim_sha256": victim_sum}, kind="defense")
    print(results.line(after, seconds))


def clean_model(config, spec, device):
    """(the clean model that an attack's options name, what record.json tells of it), on `device` and frozen.

    It is the one of config.clean_record, or one trained like the victim, but with a seed of its own, and kept in
    config.cache_path. Raises RefusedError (exit 4) where the record is of another data set or not of a clean model.
    """
    if config.clean_record:
        folder = find_record(config.clean_record, config.record_path)
    else:
        same = {field.name: getattr(config, field.name) for field in dataclasses.fields(Attack)}
        made = Attack(**{**same, **CLEAN, "record_path": str(Path(config.cache_path) / "clean_models")})
        label = f"{config.dataset}_{models.label(config.model, config.width)}_{digest({**identity(made), **spec.fingerprint})}"
        folder = Path(made.record_path) / label
        with files.locked(folder.with_suffix(".lock")), contextlib.redirect_stdout(sys.stderr):  # of two runs at once, one trains
            if not (folder / "record.json").is_file():
                print(f"a clean model is trained first and kept in {folder}")
                attack(
                    "clean", dataclasses.replace(made, save_folder_name=label), lambda *_: lambda images, index: images, workers=crew.ALONE
                )
    info = record.verify(folder, "attack")
    row = files.read_csv(folder / results.FILE)[0]
    if row["n_poison"] != "0":
        raise RefusedError(f"the record {folder} is not of a clean model but of {info['name']}; attack/clean.py makes one")
    if (row["dataset"], info["data"]["classes"], info["data"]["size"]) != (config.dataset, spec.classes, spec.size):
        raise RefusedError(f"the clean model {folder} was trained on another data set than {config.dataset} at {spec.size} pixels")
    if info["data"]["fingerprint"] != spec.fingerprint:
        print(f"warning: the clean model {folder} was trained on other pixels than those of {config.dataset} here", file=sys.stderr)
    if float(row["acc"]) < WEAK:
        print(f"warning: the clean model {folder} has an ACC of only {100 * float(row['acc']):.0f} %", file=sys.stderr)
    model = record.victim(folder, spec).to(device).eval().requires_grad_(False)
    return model, {"record": str(folder), "sha256": info["files"][record.WEIGHTS], "acc": float(row["acc"])}


def _select(truth, classes, *, config, cover_ratio):
    """(positions to poison, positions to disturb); ConfigError where the target is not a class."""
    if config.attack_target >= classes:
        raise ConfigError(f"attack_target {config.attack_target} is not a class of {config.dataset}: it has 0 to {classes - 1}")
    among = truth == config.attack_target if config.clean_label else None
    index = poison.choose(truth, config.pratio, config.poison_seed, among=among)
    if config.clean_label and len(index) == int(among.sum()):
        print(f"warning: {round(config.pratio * len(truth))} pictures were asked for, and all {len(index)} of the target class are poisoned; "
              f"--pratio below {len(index) / len(truth):.3f} leaves some of them untouched", file=sys.stderr)  # fmt: skip
    free = torch.ones(len(truth), dtype=torch.bool)
    free[index.cpu()] = False
    return index, poison.choose(truth, cover_ratio, config.poison_seed, among=free, purpose="cover")


def _plan_attack(config, folder, select, in_loop):
    data.side_of(config.dataset, config.image_size)
    found = sources.find(config.dataset, config.dataset_path)
    truth = torch.from_numpy(found["train"].read()[1])
    classes = int(truth.max()) + 1
    index, cover = select(truth, classes)
    per_class = torch.bincount(truth[index], minlength=classes).tolist()
    steps, tests = len(lengths(len(truth), config.batch_size, drop_last=True)), len(found["test"].read()[1])
    print(f"reads    {config.dataset} from {config.dataset_path}: {len(truth)} training and {tests} test pictures")
    if in_loop:
        print(f"poisons  no stored picture: the loss shows each of {len(truth)} pictures with the trigger too")
    else:
        print(
            f"poisons  {len(index)} of {len(truth)} pictures; per class {per_class}; {len(cover)} more are disturbed and keep their label"
        )
    if isinstance(config, CleanModel) and config.needs_clean_model:
        print(f"needs    a clean model: {config.clean_record or 'one is trained first where the cache has none'}")
    print(f"trains   {models.label(config.model, config.width)} for {config.epochs} epochs of {steps} steps in {config.precision}")
    print(f"recipe   {results.recipe(config)}")
    print(f"writes   {folder} ({_state(folder)})")


def _plan_defense(name, config, folder, victim):
    count = config.budget(victim["data"]["train"], victim["data"]["classes"])
    print(f"reads    {config.record}: {victim['name']} on {victim['data']['train']} training pictures")
    held = f"{count} clean pictures of {victim['data']['classes']} classes" if count else "no clean picture"
    print(f"repairs  with {name} and {held} in {config.precision}")
    work = config.work(count, victim["data"]["train"])
    if work is None and isinstance(config, Training):
        work = f"{config.epochs} epochs of {len(lengths(count, config.batch_size))} steps"
    print(f"trains   {work or 'as the method says'}")
    print(f"writes   {folder} ({_state(folder)})")


def _state(folder):
    return "complete" if (folder / "record.json").exists() else "unfinished" if (folder / "state").exists() else "new"


def _already_done(folder):
    row = files.read_csv(folder / results.FILE)[0]
    print(f"already done: {folder}")
    print(results.line(results.measured(row), float(row["seconds"])))
