"""What is measured of finished runs afterwards: of victims, and of the models that defenses have
made of them.

A measure leaves a folder of its own in the run's folder, and changes nothing else there.
"""

import dataclasses
import os
import shlex
import sys
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch

from antidote_bench import models
from antidote_bench.utils import VERSION, checkpoint, parsing, seeds
from antidote_bench.utils import config as options
from antidote_bench.utils.device import setup
from antidote_bench.utils.errors import MissingError, RefusedError, UserError
from antidote_bench.utils.evaluation import Clock, Evaluator
from antidote_bench.utils.protocol import cut, relearn, repaired, retrained
from antidote_bench.utils.record import claim, contents, results, schema
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.record.measures import BENIGN, RETRAINED
from antidote_bench.utils.report import runs
from antidote_bench.utils.text import cut as cut_text

# a model is measured again on so many images of each test set before it is used; on another
# machine or in another precision the shares differ by less than the tolerance
CHECKED, TOLERANCE = 1000, 0.1
CHANNELS = "channels.safetensors"
SAME = ("dataset", "model", "recipe")  # columns in which a control agrees with its victim
COPIED = (
    *layout.ATTACK_COLUMNS, "defense", "variant", "seed", "poison_seed", "data_seed",
    "defense_seed", "acc", "asr",
)  # fmt: skip


class Target(NamedTuple):
    """A model to measure: a victim, a repaired one, or a control."""

    folder: Path  # of its run
    info: dict  # record.json
    row: dict  # of results.csv: column -> text
    control: str = ""  # BENIGN, RETRAINED (then the others are of the victim), or empty

    @property
    def weights(self):
        return self.info["files"][layout.WEIGHTS]

    @property
    def is_defense(self):
        return self.info["kind"] == "defense"

    @property
    def is_benign(self):
        return self.row["n_poison"] == "0"

    @property
    def label(self):
        return f"{self.folder}, {RETRAINED}" if self.control == RETRAINED else str(self.folder)


@dataclasses.dataclass(frozen=True)
class Case:
    """A victim's record, as a measure gets it; its images are loaded when they are needed."""

    folder: Path
    info: dict  # record.json
    config: object  # options of the measure
    device: torch.device

    @cached_property
    def made(self):
        """The options of the attack."""
        return contents.read_options(self.folder, self.info)

    @cached_property
    def truth(self):
        """The `cut.Truth` of the victim."""
        return cut.find_truth(self.loaded.model.eval(), self.loaded)

    @cached_property
    def loaded(self):
        return contents.load(self.folder, self.config, self.device, self.info)


def measure(config, places):
    """Measure the finished victims and the repaired models in or below the folders `places`.

    A benign model among them is the control of the victims that were trained like it. A run that
    cannot be measured is named, and the others go on; then UserError (exit 1) is raised, or the
    error itself where there is no other run. Raises MissingError (exit 3) where no victim is found.
    """
    config, device = setup(config)
    targets, errors = _found([layout.find(place, config.record_path) for place in places])
    groups = _grouped(targets, config)
    for folder, group in groups.items():
        try:
            case = Case(folder, contents.open_record(folder), config, device)
        except UserError as error:
            errors.append((folder, error))
            continue
        for target in group:
            try:
                _measure_one(config, case, target)
            except UserError as error:
                errors.append((target.folder, error))
    count = sum(map(len, groups.values()))
    if not count and not errors:
        raise MissingError(
            f"there is nothing to measure in {', '.join(map(str, places))}: relearn takes finished "
            "victims and repaired models (a benign model is only a victim's control), and cut "
            "defenses that prune channels"
        )
    _report(errors, max(count, len(errors)))


def _report(errors, count):
    if errors and count == 1:
        raise errors[0][1]
    for path, error in errors:
        print(f"not measured: {path}: {error}", file=sys.stderr)
    if errors:
        raise UserError(f"{len(errors)} of {count} runs could not be measured: see above")


def _found(folders):
    """(the `Target`s in or below some folders, [(path, error)])."""
    targets, errors = [], []
    for path in runs.find_runs(folders):
        if path.absolute().parent.name == layout.DETECTIONS:
            continue
        if layout.state_of(path) != layout.DONE:
            print(f"left out, because it is not finished: {path}", file=sys.stderr)
            continue
        try:
            targets.append(_target(path))
        except UserError as error:
            errors.append((path, error))
    return targets, errors


def _target(path):
    """The `Target` in the folder of a run; RefusedError (exit 4) says what is wrong with it."""
    is_defense = path.absolute().parent.name == layout.DEFENSES
    info = layout.verify(path, "defense") if is_defense else contents.open_record(path)
    row = layout.read_results(path)
    try:
        schema.check_results(row)
    except (KeyError, ValueError) as error:
        raise RefusedError(f"{path / layout.RESULTS} is damaged: {cut_text(error, 200)}") from error
    return Target(path, info, row)


def _grouped(targets, config):
    """{folder of a victim: what is measured on its record}.

    Without config.needs_control these are only models whose repair has kept what it pruned. A
    benign model is measured for every victim that was trained like it; where there are several, the
    one that was taken before is, or the first one. With config.retrained every victim has the other
    control too.
    """
    benign = [each for each in targets if each.is_benign and not each.is_defense]
    groups = {}
    for target in targets:
        if target.is_benign or not (config.needs_control or _has_pruned(target)):
            continue
        folder = target.folder
        if target.is_defense:
            folder = Path(os.path.normpath(folder / ".." / ".."))
        _, group = groups.setdefault(os.path.abspath(folder), (folder, []))
        group.append(target)
        if not target.is_defense:
            group += _control(target, benign, config)
            group += _retrained(target, config)
    return dict(groups.values())


def _has_pruned(target):
    """Whether a run is a defense that says which channels it has pruned; a note says where not."""
    if not target.is_defense:
        return False
    if not cut.kept(target.folder, target.info):
        print(f"left out, because it names no pruned channel: {target.folder}", file=sys.stderr)
        return False
    return True


def _control(victim, benign, config):
    """[the control of a victim], empty where there is none."""
    place = victim.folder / layout.MEASURES / f"{config.folder_name}_{BENIGN}"
    like = [
        other
        for other in benign
        if all(other.row[name] == victim.row[name] for name in SAME)
        and other.info["data"]["fingerprint"] == victim.info["data"]["fingerprint"]
    ]
    if not like:
        print(
            f"note: no benign model like {victim.folder} is among these, so it has no control",
            file=sys.stderr,
        )
    like.sort(key=lambda other: _is_of_another_model(place, other))
    return [first._replace(control=BENIGN) for first in like[:1]]


def _retrained(victim, config):
    """[the other control of a victim], empty where it is not asked for, or there is none."""
    if not config.retrained:
        return []
    why = "its recipe is not known" if "imported" in victim.info else ""
    if not why and victim.info.get("training_set") == "none":
        why = "its attack changes no image of the training set: a benign model is this control"
    if why:
        print(f"note: {victim.folder} is not retrained, because {why}", file=sys.stderr)
        return []
    return [victim._replace(control=RETRAINED)]


def _place(config, case, target):
    """The folder that a measure leaves."""
    if target.control:
        return case.folder / layout.MEASURES / f"{config.folder_name}_{target.control}"
    return target.folder / layout.MEASURES / config.folder_name


def _measure_one(config, case, target):
    """Measure one model, or say what was measured before."""
    place = _place(config, case, target)
    if config.dry_run:
        print(f"would measure {target.label} and write {place} ({layout.state_of(place)})")
        return
    if target.is_defense and target.info.get("victim_sha256") != case.info["files"][layout.WEIGHTS]:
        raise RefusedError(f"{target.folder} repaired another victim than the one there now")
    data = {"poisoned": case.info["files"][layout.POISONED]}
    if _is_of_another_model(place, target):
        config = dataclasses.replace(config, overwrite=True)  # it says nothing of this one
    with claim.owned(place):
        if claim.begin(place, config, kind="measure", victim=target.weights, data=data):
            _measure_now(config, case, target, place, data)
        else:
            print(f"already done: {place}")
    row = layout.read_results(place)
    print(f"{target.label}: {LINES[config.name](row)}", flush=True)


def _is_of_another_model(place, target):
    try:
        return layout.verify(place, "measure").get("victim_sha256") != target.weights
    except RefusedError:
        return False  # there is none, or `claim.begin` says what is wrong with it


def _measure_now(config, case, target, place, data):
    log = layout.Log(place / layout.STATE)
    clock = Clock(log.seconds)
    evaluator = Evaluator(case.loaded.test_sets, config, log)
    report = partial(evaluator.measure, "retrain")
    model = _model_of(case, target, report, place / layout.STATE).to(case.device).eval()
    row = {name: target.row.get(name, "") for name in COPIED}
    if target.control:
        own = case_row(case)
        row |= {name: own[name] for name in layout.ATTACK_COLUMNS}
        row |= {name: value for name, value in evaluator.answer(model).items() if name in row}
    else:
        _require_as_measured(target, model, evaluator)
    torch.manual_seed(seeds.number(f"measure {config.name}", config.random_seed))
    found, tensors = MEASURES[config.name](case, target, model, log, place / layout.STATE)
    kept = {name: checkpoint.to_bytes(part) for name, part in tensors.items()}
    _save(config, case, target, place, row | found, kept, data, clock.seconds)


def case_row(case):
    """The row of results.csv of the victim."""
    return contents.read_measures(case.folder, case.info)[0]


def _model_of(case, target, report, state):
    """The network to measure; `report` and `state` are for one that is trained here."""
    loaded = case.loaded
    if target.control == RETRAINED:
        return retrained.retrain(loaded, case.made, report, state)
    if target.control == BENIGN:
        made = contents.read_options(target.folder, target.info)
        chosen = contents.architecture(target.folder, made, case.config.model_file)
        return contents.load_model(target.folder, loaded.spec, target.info, made["width"], chosen)
    if not target.is_defense:
        return loaded.model
    network = models.build(loaded.name, loaded.spec, loaded.width)
    return repaired.rebuilt(target.folder, target.info, network)


def _require_as_measured(target, model, evaluator):
    """Raise RefusedError (exit 4) where the weights are not those that results.csv describes."""
    before = results.measures_of(target.row)
    for name, value in evaluator.sample(model, CHECKED).items():
        if None not in (value, before[name]) and abs(value - before[name]) > TOLERANCE:
            raise RefusedError(
                f"{target.folder} is damaged: {layout.RESULTS} says {name.upper()} "
                f"{100 * before[name]:.1f} %, but {layout.WEIGHTS} reaches {100 * value:.1f} % on "
                f"{CHECKED} images"
            )


def _save(config, case, target, place, row, kept, data, seconds):
    """Write the complete record of a measure; `kept` are further files, {name: bytes}."""
    row |= {
        "measure": config.name,
        "control": target.control,
        "precision": config.precision,
        "seconds": round(seconds, 2),
        "version": VERSION,
        "config_hash": options.digest(
            {"measure": config.name, "of": target.row["config_hash"]} | config.identity(seeds=False)
        ),
    }
    columns = layout.MEASURE_COLUMNS[config.name]
    table, facts = results.complete(row, config, case.device, kind="measure", columns=columns)
    facts |= {
        "command": _command(config, case, target),
        "victim_sha256": target.weights,
        "record_sha256": case.info["files"][layout.WEIGHTS],
        "data": data,
    }
    layout.finish(place, {layout.RESULTS: table, **kept}, facts, kind="measure")


def _command(config, case, target):
    """The command that measures the same again."""
    script = "measure.py"
    start = parsing.start(script)
    words = shlex.split(parsing.command(script, config))[len(start) :]
    folders = [case.folder, target.folder] if target.control else [target.folder]
    return shlex.join([*start, config.name, *dict.fromkeys(map(str, folders)), *words])


# ---------- the measures ----------


def _relearn(case, target, model, log, state):
    held = torch.zeros(0).long()
    if target.is_defense:
        saved = layout.read_options(target.folder)
        try:
            held = relearn.held_clean(target.row, saved, case.loaded.clean.labels)
        except (TypeError, ValueError) as error:
            raise RefusedError(
                f"{target.folder} does not say which clean images it held: {cut_text(error, 200)}"
            ) from error
    return relearn.relearn(model, case.loaded, case.made, held, case.config, log, state), {}


def _relearn_line(row):
    acc, asr, deviation = (
        format(100 * float(row[name]), ".1f") if row[name] else "n/a"
        for name in ("acc_relearn", "asr_relearn", "asr_relearn_std")
    )
    return f"after relearning ACC {acc}  ASR {asr} ± {deviation}  ({float(row['seconds']):.0f} s)"


def _cut(case, target, model, log, state):
    pruned = cut.in_layers(cut.kept(target.folder, target.info), case.loaded.model)
    tensors = {f"{name}/tac": values for name, values in case.truth.change.items()}
    tensors |= {f"{name}/carries": values for name, values in case.truth.carries.items()}
    return cut.measures(case.loaded.model, pruned, case.truth), {CHANNELS: tensors}


def _cut_line(row):
    if row["n_truth"] == "0":
        return "no few channels carry the backdoor, so that nothing can be said"
    precision, recall = (
        format(100 * float(row[name]), ".1f") if row[name] else "n/a"
        for name in ("cut_precision", "cut_recall")
    )
    lift = format(float(row["cut_lift"]), ".1f") if row["cut_lift"] else "n/a"
    counts = f"{row['n_hits']} of {row['n_cut']} pruned channels are among {row['n_truth']}"
    return f"{counts}: precision {precision}  recall {recall}  lift {lift}"


# what a measure finds, ({column: value}, {file: tensors}), and the words for its row
MEASURES = {"relearn": _relearn, "cut": _cut}
LINES = {"relearn": _relearn_line, "cut": _cut_line}
