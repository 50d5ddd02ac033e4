"""Victims from elsewhere become records.

`from_weights`, `from_backdoorbench` and `from_images` claim a folder, measure the model and save a
record as an attack does.
"""

import dataclasses
import hashlib
import shutil
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from antidote_bench import models
from antidote_bench.utils import checkpoint, run
from antidote_bench.utils import config as options
from antidote_bench.utils import train as training
from antidote_bench.utils.data import dataset, sources, target
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.memmap import replaced
from antidote_bench.utils.device import setup
from antidote_bench.utils.errors import ConfigError, MissingError, RefusedError
from antidote_bench.utils.evaluation import Evaluator, TestSets
from antidote_bench.utils.exchange import attack_result, diagnosis, image_folders, order, weights
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.poisoning.attacker import Attacker, prepare_once
from antidote_bench.utils.record import claim, contents, results
from antidote_bench.utils.record import folder as layout

DIGEST = 12  # digits
# what the name of a record in results begins with, by where it is from
IMPORTED = {"weights": "imported", "backdoorbench": "backdoorbench"}


# ---------- a state dict ----------


def from_weights(command, config):
    """Make the record of a model whose weights lie in a file; `command` is what was typed."""
    models.check(config.model, config.width)
    if config.trigger and not config.attack_module:
        raise ConfigError("trigger must be a flag here, --trigger, because its options follow it")
    path = Path(config.source)
    content = checkpoint.read_file(path)
    config = _with_digest(config, content, path)
    found = weights.from_bytes(content, path)
    config, device = setup(_named(config, f"imported_{config.dataset}"))
    if config.dry_run:
        return _plan(config, f"{len(found.tensors)} tensors from {path}")
    with _claimed(config, device) as (folder, data, config, new):
        if not new:
            return
        model, notes = _model(found, config, data, path)
        poisoning = _known_trigger(config, data, folder / layout.STATE)
        facts = {"from": "weights", "file": path.name, "notes": notes}
        _measure_and_save(command, config, data, model, poisoning, facts, device, folder)


def _known_trigger(config, data, state):
    """The `Poisoning` of a model whose training set is unknown, and whose trigger may be known."""
    share = config.poisoned_share
    n_poison = None if share is None else round(share * len(data.train))
    poisoning = _without_triggers(data)._replace(n_poison=n_poison)
    relabel = poison.relabelling(
        config.label_mode, config.attack_target, data.spec.classes, config.source_class
    )
    if attack := config.attack_module:
        parts, extra = _parts(config, data, state)
        trigger = attack.make_trigger(config, data.spec, "test", **extra)
        tested = poison.triggered_tests(data.test, trigger, relabel, config)
        return poisoning._replace(**tested, parts=parts)
    if config.triggered_path:
        found = image_folders.read_tree(config.triggered_path, data.spec, relabel)
        return _with_tests(config, poisoning, data, found, len(data.test))
    return poisoning


def _parts(config, data, state):
    """(the tensors of an attack's trigger or None, the arguments that they are for make_trigger)"""
    attack = config.attack_module
    if not hasattr(attack, "prepare"):
        return None, {}

    def refuse(*_):
        raise ConfigError(
            f"the trigger of {config.trigger} is made from a training set or a clean model, and "
            "would be another one here: name a folder of triggered test images with "
            "--triggered_path instead of --trigger"
        )

    nothing = torch.empty(0, dtype=torch.long)
    attacker = Attacker(data.spec, _Unavailable(refuse, len(data.train)), nothing, refuse)
    parts = prepare_once(attack.prepare, config, attacker, state)[0].parts
    return parts, {"parts": parts}


class _Unavailable:
    """Stands for a training set that an attacker must not use: `refuse` raises when it is."""

    def __init__(self, refuse, length):
        self._refuse, self._length = refuse, length

    def __len__(self):
        return self._length

    def __getattr__(self, name):
        self._refuse(name)


# ---------- BackdoorBench ----------


def from_backdoorbench(command, config):
    """Make a record of a folder of BackdoorBench's record/, or of one of its repaired models."""
    path, attack_path = attack_result.find(config.source)
    folder = attack_path.parent
    content = checkpoint.read_file(path)
    config = _with_digest(config, content, path)
    facts = {"from": "backdoorbench", "file": folder.resolve().name}
    if path == attack_path:
        result = attack_result.from_bytes(content, path)
    else:
        result = attack_result.from_bytes(checkpoint.read_file(attack_path), attack_path)
        result = attack_result.repaired(result, content, path)
        facts["repaired_by"] = path.parent.resolve().name
    config = _as_there(config, result, folder)
    models.check(config.model, config.width)
    name = "_".join(filter(None, ("imported", facts["file"], facts.get("repaired_by"))))
    config, device = setup(_named(config, name))
    if config.dry_run:
        return _plan(config, f"{path} and {len(result.test.index)} triggered test images")
    with _claimed(config, device) as (place, data, config, new):
        if not new:
            return
        if data.spec.classes != result.classes:
            raise RefusedError(
                f"{path} has {result.classes} classes, and {config.dataset} here has "
                f"{data.spec.classes}: --dataset_path names the data set that it was made on"
            )
        model, notes = _model(weights.find(result.weights, path), config, data, path)
        poisoning = _changed(config, data, result.train, result.test, result.counts)
        _measure_and_save(
            command,
            config,
            data,
            model,
            poisoning,
            facts | {"notes": notes},
            device,
            place,
            stored=result.train is not None,
        )


def _as_there(config, result, folder):
    """The options of an import with what attack_result.pt says."""
    name = config.dataset or result.dataset
    sources.check(name)
    model = config.model or attack_result.same_here(result.model)
    normalised = {}
    usual = name == result.dataset and not models.is_file(model)
    if not usual and result.dataset in dataset.KNOWN and config.mean is None:
        mean, std, _ = dataset.KNOWN[result.dataset]
        normalised = {
            option: ",".join(map(str, values)) for option, values in (("mean", mean), ("std", std))
        }
    side = None if sources.SIDES.get(name) == result.size else result.size
    if config.poisoned_share is None and result.train is not None:
        share = len(result.train.index) / result.counts[attack_result.TRAIN]
        config = dataclasses.replace(config, poisoned_share=round(share, 6))
    return dataclasses.replace(
        _labelled(config, result.test, result.classes, folder),
        dataset=name,
        model=model,
        image_size=config.image_size or side,
        attack=config.attack or _attack_in(folder.resolve().name),
        **normalised,
    )


def _attack_in(name):
    """The name of the attack that a folder's name contains, the longest one; empty: none."""
    return max(
        (each for each in options.scripts("attack") if each in name.lower()), key=len, default=""
    )


def _labelled(config, test, classes, place):
    """The options with the `label_mode` and the classes that triggered test images follow;
    ConfigError where the user says another."""
    found = _labelling(test, classes, place, config.label_mode)
    for name, value in found.items():
        if getattr(config, name) not in (None, value):
            words = " ".join(map(str, found.values()))
            raise ConfigError(
                f"{name} must be left out: the triggered test images in {place} have the labels of "
                f"{words}"
            )
    return dataclasses.replace(config, **found)


def _labelling(test, classes, place, said):
    """{label_mode, attack_target} that the labels of triggered test images follow, and the
    source_class where all of them are of another one class; `said` is the user's label_mode, which
    decides where two are right."""
    targets, sources = test.labels.unique().tolist(), test.truth.unique().tolist()
    if len(targets) == 1:
        one_source = len(sources) == 1 and sources != targets and classes > 2
        if one_source and said != "all2one":
            found = {"label_mode": "one2one", "attack_target": targets[0]}
            return {**found, "source_class": sources[0]}
        return {"label_mode": "all2one", "attack_target": targets[0]}
    if len(targets) and torch.equal(test.labels, (test.truth + 1) % classes):
        return {"label_mode": "all2all", "attack_target": 0}
    raise RefusedError(
        f"the triggered test images in {place} must have one label, or each the class after its "
        f"own; they have the labels {targets[:10]}"
    )


def _changed(config, data, train, test, counts, kept=None):
    """The `Poisoning` of a model whose changed images are known.

    `kept` is a mask of the changed training images that are no poison, but keep their label.
    """
    poisoning = _without_triggers(data)
    if train is not None:
        device = data.train.labels.device
        place = order.positions(data.train, train, counts[attack_result.TRAIN], "training")
        place, images, labels, truth = (part.to(device) for part in train._replace(index=place))
        own = data.train.labels.clone()
        own[place] = labels
        split = Split(replaced(data.train.images, place, images), own, data.train.truth)
        if kept is None:
            kept = labels == truth
            if config.label_mode != "one2one":  # others are poisoned although their labels stay
                kept &= (labels != config.attack_target) & (config.label_mode == "all2one")
        kept = kept.to(device)
        index, cover = place[~kept].sort().values, place[kept].sort().values
        poisoning = poisoning._replace(
            train=split, index=index, cover_index=cover, n_poison=len(index)
        )
    return _with_tests(config, poisoning, data, test, counts[attack_result.TEST])


def _without_triggers(data):
    """The `Poisoning` of a data set in which no image is known to be changed."""
    nothing = torch.empty(0, dtype=torch.long, device=data.test.labels.device)
    return contents.Poisoning(
        train=data.train,
        index=nothing,
        cover_index=nothing,
        n_poison=None,
        test_sets=TestSets(data.test, data.test[nothing]),
        backdoor_index=nothing,
        target_index=nothing,
        parts=None,
        facts={},
    )


def _with_tests(config, poisoning, data, found, count):
    """The same with triggered test images: those of their attack label's class stand apart, and so
    do those of the classes that a trigger for one class is not for."""
    device = data.test.labels.device
    place = order.positions(data.test, found, count, "test").to(device)
    images, labels, truth = (part.to(device) for part in found[1:])
    sorted_place, rank = place.sort()
    every = Split(images[rank], labels[rank], truth[rank])
    own = every.labels == every.truth
    target, other = own, torch.zeros_like(own)
    if config.label_mode == "one2one":
        target, other = other, own & (every.truth != config.attack_target)
        every.labels[other] = config.attack_target
    return poisoning._replace(
        test_sets=TestSets(
            data.test,
            every[~own],
            every[target] if target.any() else None,
            every[other] if other.any() else None,
        ),
        backdoor_index=sorted_place[~own],
        target_index=sorted_place[target],
        other_index=sorted_place[other],
    )


# ---------- image folders ----------


def from_images(command, config):
    """Train a victim on a poisoned set that lies in image folders, and save its record."""
    models.check(config.model, config.width)
    if config.pratio is not None:
        raise ConfigError(f"pratio must be left out: {image_folders.LIST} says what is poisoned")
    folder = Path(config.source)
    path = folder / image_folders.LIST
    content = image_folders.read_list(folder)
    config = _with_digest(config, content, path)
    config, device = setup(_named(config, f"images_{folder.resolve().name}"))
    if config.dry_run:
        return _plan(config, f"the images that {path} lists as changed")
    # what is poisoned and for which label stands in the list, which needs the data set's classes
    data = dataset.load(config, device)
    rows = image_folders.rows_of(content, folder, data.spec.classes)
    (train, kept), (test, _) = (
        image_folders.read_changed(folder, rows, split, data.spec.size)
        for split in (image_folders.TRAIN, image_folders.TEST)
    )
    if not len(test.index):
        raise MissingError(
            f"{path} lists no triggered test image (split test, kind poison): ASR is measured on "
            "them"
        )
    share = int((~kept).sum()) / len(data.train)
    config = _labelled(config, test, data.spec.classes, folder)
    config = dataclasses.replace(config, pratio=round(share, 6))
    counts = {attack_result.TRAIN: len(data.train), attack_result.TEST: len(data.test)}
    with _claimed(config, device, data) as (place, data, config, new):
        if not new:
            return
        poisoning = _changed(config, data, train, test, counts, kept)
        facts = {"imported": {"from": "images", "file": folder.resolve().name}, "command": command}
        loss = partial(training.cross_entropy, label_smoothing=config.label_smoothing)
        poisoning = poisoning._replace(facts=facts)
        run.train_victim("images", config, data, poisoning, device, place, loss=loss)


# ---------- what all of them do ----------


def _with_digest(config, content, path):
    """The options with the digest of what was read from `path`; RefusedError where they have
    another."""
    found = hashlib.sha256(content).hexdigest()[:DIGEST]
    if config.digest not in (None, found):
        raise RefusedError(f"{path} is refused: its digest is {found}, not {config.digest}")
    return dataclasses.replace(config, digest=found)


def _named(config, name):
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
    return dataclasses.replace(config, save_folder_name=config.save_folder_name or plain[:100])


@contextmanager
def _claimed(config, device, data=None):
    """Yield (folder, data set, options, whether there is work to do) with the folder owned."""
    folder = Path(config.record_path) / config.save_folder_name
    with claim.owned(folder):
        data = data or dataset.load(config, device)
        config = target.resolved(config, data.spec.class_names)
        new = claim.begin(folder, config, kind="attack", data=contents.facts_of(data))
        if not new:
            run.already_done(folder)
        try:
            yield folder, data, config, new
        except Exception:
            _leave_nothing(folder)
            raise
        if new:
            print(f"record: {folder}")


def _leave_nothing(folder):
    """Remove what an import has begun that failed; a training that can be resumed stays."""
    state = folder / layout.STATE
    if not any(state.rglob("*.safetensors")):
        shutil.rmtree(state, ignore_errors=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def _model(found, config, data, path):
    """(the network with the weights, notes on how they were found)"""
    architecture = models.chosen(
        config.model, sha256=config.model_sha256, mean=config.mean, std=config.std
    )
    model = models.build(architecture, data.spec, config.width)
    fitted = weights.fit(found, model.network, path)
    model.network.load_state_dict(fitted.tensors)
    for note in fitted.notes:
        print(f"note: {path}: {note}", file=sys.stderr)
    return model.to(data.test.labels.device), list(fitted.notes)


def _measure_and_save(
    command, config, data, model, poisoning, facts, device, folder, *, stored=False
):
    """Measure a model that is as it came, and save its record."""
    evaluator = Evaluator(poisoning.test_sets, config, layout.Log(folder / layout.STATE))
    measured = evaluator.measure("final", model)
    # nobody expects a trigger to work on a model that is benign or repaired
    harmless = poisoning.n_poison == 0 or "repaired_by" in facts
    for line in diagnosis.hints(model, data, measured, config.precision, harmless):
        print(f"warning: {line}", file=sys.stderr)
    parts = IMPORTED[facts["from"]], _attack_name(config), facts.get("repaired_by")
    name = ":".join(filter(None, parts))
    poisoning = poisoning._replace(facts={"imported": facts, "command": command})
    victim = contents.Victim(
        name,
        config,
        model,
        data,
        poisoning,
        poisons_in_loop=not stored,
        measured=measured,
        seconds=0.0,
    )
    contents.save_victim(folder, victim, device)
    print(results.line(measured, 0.0))


def _attack_name(config):
    return getattr(config, "trigger", None) or getattr(config, "attack", None)


def _plan(config, what):
    """Print what an import would read and write."""
    folder = Path(config.record_path) / config.save_folder_name
    print(f"reads    {what}")
    print(f"         {config.dataset} from {config.dataset_path}")
    print(f"model    {models.label(config.model, config.width)}")
    print(f"writes   {folder} ({layout.state_of(folder)})")
