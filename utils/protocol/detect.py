"""The evaluator's part of a detection: what is judged, what is known about it, and the measures.

A detector gets an `Inspector`. Only this module knows which of its images are poisoned, and which
clean ones set the threshold.
"""

import hashlib
import math
from typing import NamedTuple

import torch

from antidote_bench.utils import checkpoint, seeds
from antidote_bench.utils.config import digest
from antidote_bench.utils.data.clean import choose
from antidote_bench.utils.data.dataset import Split, balanced_subset
from antidote_bench.utils.data.memmap import replaced
from antidote_bench.utils.detection import charts
from antidote_bench.utils.detection.inspector import Finding, Inspector, Scored
from antidote_bench.utils.errors import ConfigError, UserError
from antidote_bench.utils.evaluation import Clock, predict
from antidote_bench.utils.protocol import roc
from antidote_bench.utils.record import contents
from antidote_bench.utils.record import folder as layout

CALIBRATION = 0.2  # share of the clean images that set the threshold
LEAST_CALIBRATION = 100  # of them, as far as there are enough
MOST_OF_TESTS = 0.5  # share of the test images that set the threshold, at most
# roles of the judged images, in scores.safetensors
SUSPECT, REFERENCE, CALIBRATING = 0, 1, 2


class Known(NamedTuple):
    """Sorted positions of the images that are known to be clean."""

    reference: torch.Tensor  # in the training set; for the method's own statistics
    calibrating: torch.Tensor  # they set the threshold: in the set that the judged images are from


class Case(NamedTuple):
    """The images that a detector judges, and what it is not told about them; all of length N."""

    suspects: Split
    role: torch.Tensor  # int64: SUSPECT, REFERENCE or CALIBRATING
    positive: torch.Tensor  # bool: poisoned or triggered
    cover: torch.Tensor  # bool: changed, with the true label
    fooled: torch.Tensor  # bool: triggered, and the model gives the attacker's label
    source: torch.Tensor  # int64: the position in the set that the image is from


def inspect(name, config, score, loaded, folder, info, victim_row, device):
    """Let the detector judge the model or the images, measure what it says and save it."""
    log = layout.Log(folder / layout.STATE)
    clock = Clock(log.seconds)
    model = loaded.model.eval().requires_grad_(False)
    with clock.paused():
        known = choose_clean(loaded, config)
        case = case_of(config, loaded, known, victim_row)
        weights = weights_hash(model)
    inspector = inspector_of(config, loaded, case, known, folder, info, log, clock)
    torch.manual_seed(seeds.number("detection", config.random_seed))
    said = score(model, inspector, config)
    seconds = clock.seconds
    if weights_hash(model) != weights:
        raise UserError(f"{name} has changed the model that it was given to judge")
    if config.judges == "model":
        judged = _judge_model(name, said, loaded.spec, victim_row)
    else:
        judged = _judge_images(name, config, said, case)
    n_calibration = len(known.calibrating)
    budget = {"clean_budget": len(known.reference) + n_calibration, "n_calibration": n_calibration}
    detected = contents.Detected(
        name,
        config,
        victim_row,
        info["files"][layout.WEIGHTS],
        measured={**budget, **judged.measured},
        seconds=seconds,
        scores=judged.tensors,
        evidence=said.evidence if isinstance(said, Scored | Finding) else {},
        chart=judged.chart,
    )
    contents.save_detection(folder, detected, device)


class Judged(NamedTuple):
    measured: dict  # columns of results.csv
    tensors: dict  # of scores.safetensors
    chart: bytes


def choose_clean(loaded, config):
    """The `Known` clean images.

    They are images of the training set, but for those that set the threshold of a detector of
    inputs: these are test images, because the model has been trained on none of what it judges. All
    images set the threshold where the method uses no reference, and none does for a detector of
    models. Raises ConfigError (exit 2) where the images are too few.
    """
    truth, classes = loaded.clean.truth.cpu(), loaded.spec.classes
    count = config.budget(len(truth), classes)
    index = choose(truth, count, config) if count else torch.zeros(0).long()
    if config.judges == "model":
        return Known(index, index[:0])
    share = _calibration(len(index), classes, config)
    is_calibration = torch.zeros(len(index), dtype=torch.bool)
    is_calibration[_drawn(truth[index], share, config)] = True
    calibrating = index[is_calibration]
    if config.judges == "input":
        tests = loaded.test_sets.test.truth.cpu()
        calibrating = _drawn(tests, min(share, int(MOST_OF_TESTS * len(tests))), config)
    least = roc.least_calibration(config.nominal_fpr)
    if len(calibrating) < least:
        raise ConfigError(
            f"{len(index)} clean images are too few: nominal_fpr {config.nominal_fpr:g} needs "
            f"{least} that the method does not see, beside its own, and here these are "
            f"{len(calibrating)}; raise --clean_count or --nominal_fpr"
        )
    return Known(index[~is_calibration], calibrating)


def _calibration(count, classes, config):
    """How many of `count` clean images set the threshold."""
    if not config.uses_reference:
        return count
    most = max(count - 2 * classes, 0)  # a reference holds some of every class
    return max(round(CALIBRATION * count), min(LEAST_CALIBRATION, most))


def _drawn(truth, count, config):
    """Positions of `count` images, the same number of every class."""
    return balanced_subset(truth, count, seeds.number("calibration", config.data_seed))


def case_of(config, loaded, known, victim_row):
    """The `Case` that a detector judges; `victim_row` is the attack's row of results.csv."""
    if config.judges == "data":
        case = _training_set(loaded, known)
        return case if config.sample is None else _sample_of(case, config)
    if config.judges == "input":
        return _inputs(config, loaded, known.calibrating, victim_row["n_poison"] != "0")
    empty = loaded.clean[torch.zeros(0).long().to(loaded.clean.labels.device)]
    nothing = torch.zeros(0, dtype=torch.bool)
    return Case(empty, torch.zeros(0).long(), nothing, nothing, nothing, torch.zeros(0).long())


def _training_set(loaded, known):
    """The training set as it is found; the clean images stand in it with their true labels."""
    place = torch.cat(known).to(loaded.clean.labels.device)
    labels = loaded.train.labels.clone()
    labels[place] = loaded.clean.labels[place]
    images = replaced(loaded.train.images, place, loaded.clean.images[place])
    role = torch.full((len(labels),), SUSPECT)
    role[known.reference], role[known.calibrating] = REFERENCE, CALIBRATING
    kinds = loaded.kinds.cpu()
    return Case(
        Split(images, labels, labels),
        role,
        (kinds == contents.POISON) & (role == SUSPECT),
        (kinds == contents.COVER) & (role == SUSPECT),
        torch.zeros(len(labels), dtype=torch.bool),
        torch.arange(len(labels)),
    )


def _sample_of(case, config):
    """The case with config.sample of its unknown images, drawn at random, and all known ones."""
    unknown = (case.role == SUSPECT).nonzero().flatten()
    generator = seeds.generator("judged sample", config.data_seed)
    drawn = unknown[torch.randperm(len(unknown), generator=generator)[: config.sample]]
    known = (case.role != SUSPECT).nonzero().flatten()
    index = torch.cat([drawn, known]).sort().values
    suspects = case.suspects[index.to(case.suspects.labels.device)]
    return Case(suspects, *(part[index] for part in case[1:]))


def _inputs(config, loaded, calibrating, is_poisoned):
    """Clean and triggered test images in equal numbers, and the calibrating images, shuffled.

    No calibrating image is among them, with or without the trigger. The record of a benign model
    has triggered images too, but none that would be a positive: they are left out.
    """
    test, backdoor = loaded.test_sets.test, loaded.test_sets.backdoor
    clean_place = _others(torch.arange(len(test)), calibrating)
    place = _others(loaded.backdoor_index.cpu(), calibrating)
    count = min(config.inputs, len(clean_place), len(place) or len(clean_place))
    clean_place = _spaced(clean_place, count)
    place = _spaced(place, count if is_poisoned else 0)
    device = test.labels.device
    parts = [test[calibrating.to(device)], test[clean_place.to(device)], backdoor[place.to(device)]]
    role = _labelled(parts, CALIBRATING, SUSPECT, SUSPECT)
    positive = _labelled(parts, 0, 0, 1).bool()
    fooled = positive.clone()
    fooled[positive] = (predict(loaded.model, parts[2], config.precision) == parts[2].labels).cpu()
    source = torch.cat([calibrating, clean_place, place])
    generator = seeds.generator("inputs", config.data_seed)
    order = torch.randperm(len(role), generator=generator)
    images = torch.cat([part.images[:] for part in parts])[order.to(device)]
    unknown = torch.full((len(role),), -1, device=device)
    return Case(
        Split(images, unknown, unknown),
        role[order],
        positive[order],
        torch.zeros(len(role), dtype=torch.bool),
        fooled[order],
        source[order],
    )


def _others(sources, calibrating):
    """The positions of those `sources`, positions of test images, that are not calibrating."""
    return (~torch.isin(sources, calibrating)).nonzero().flatten()


def _labelled(parts, *values):
    return torch.cat(
        [torch.full((len(part),), value) for part, value in zip(parts, values, strict=True)]
    )


def _spaced(places, count):
    """`count` of the places, evenly spaced; none where there are none."""
    if not len(places):
        return places
    return places[torch.linspace(0, len(places) - 1, count).long()]


def inspector_of(config, loaded, case, known, folder, info, log, clock):
    """What the method may know and use."""
    device = loaded.clean.labels.device
    index = known.reference.to(device)
    data = config.judges == "data"
    files = info["files"]
    # detectors of data share their passes, whichever of the clean images set the threshold
    shown = [torch.cat(known).sort().values]
    if config.judges == "input":
        shown = [case.role, case.positive, case.source]
    elif data and config.sample:
        shown = [case.role, case.source]
    mark = digest(
        [
            config.judges,
            files[layout.WEIGHTS],
            files[layout.POISONED],
            info["data"]["fingerprint"],
            [part.tolist() for part in shown],
        ]
    )

    def report(stage, model, *, epoch=None, **values):
        log.write(stage, epoch, {**values, "seconds": round(clock.seconds, 2)})

    return Inspector(
        loaded.spec,
        case.suspects,
        loaded.clean[index],
        torch.searchsorted(case.source, known.reference).to(device) if data else index[:0],
        loaded.name,
        loaded.width,
        state=folder / layout.STATE,
        shared=config.record / layout.DETECTIONS / layout.SHARED / mark,
        report=report,
    )


def _judge_images(name, config, said, case):
    said = said if isinstance(said, Scored) else Scored(said)
    scores = said.scores.detach().cpu()
    if scores.dtype != torch.float64 or scores.shape != case.role.shape:
        raise UserError(f"{name} must return one float64 score for each of {len(case.role)} images")
    if not scores.isfinite().all():
        raise UserError(f"{name} has returned a score that is not a finite number")
    values = scores.numpy()
    limit = roc.threshold(values[(case.role == CALIBRATING).numpy()], config.nominal_fpr)
    flagged = (scores > limit) & (case.role == SUSPECT)
    tensors = {"score": scores, "flagged": flagged, "role": case.role}
    if config.judges == "input":
        tensors |= {"kind": case.positive.long(), "index": case.source}
    elif config.sample:
        tensors["index"] = case.source
    if said.flagged is not None:
        tensors["own_flagged"] = said.flagged.cpu() & (case.role == SUSPECT)
    measured = {"threshold": limit, **_measures(values, tensors, case)}
    judged = case.role == SUSPECT
    groups = {
        "clean": judged & ~case.positive & ~case.cover,
        "cover": judged & case.cover,
        "poisoned" if config.judges == "data" else "triggered": case.positive,
    }
    groups = {name: chosen.numpy() for name, chosen in groups.items()}
    return Judged(measured, tensors, charts.histogram(values, groups, limit))


def _measures(values, tensors, case):
    """The columns of results.csv that say how well the scores and the decisions do."""
    judged = (case.role == SUSPECT).numpy()
    positive, cover = case.positive.numpy(), case.cover.numpy()
    fooled = case.fooled.numpy()

    def auroc(chosen):
        return roc.ranking(values[chosen], positive[chosen])["auroc"]

    measured = {
        "n_positive": int(positive.sum()),
        "n_cover": int(cover.sum()),
        "n_negative": int((judged & ~positive).sum()),
        **roc.ranking(values[judged], positive[judged]),
        **roc.rates(tensors["flagged"].numpy()[judged], positive[judged]),
        "auroc_no_cover": auroc(judged & ~cover) if cover.any() else None,
        "auroc_fooled": auroc(judged & (fooled | ~positive)) if fooled.any() else None,
    }
    if "own_flagged" in tensors:
        own = roc.rates(tensors["own_flagged"].numpy()[judged], positive[judged])
        measured |= {f"own_{key}": value for key, value in own.items()}
    return measured


def _judge_model(name, said, spec, victim_row):
    if not isinstance(said, Finding):
        raise UserError(f"{name} must return a Finding")
    per_class = said.per_class.detach().double().cpu()
    if per_class.shape != (spec.classes,) or (said.score is None) != bool(said.abstained):
        raise UserError(
            f"{name} must return a score of each of {spec.classes} classes, and either a score of "
            "the model or why it abstains"
        )
    if said.score is not None and not math.isfinite(said.score):
        raise UserError(f"{name} has returned a score that is not a finite number")
    if not per_class.isfinite().all():
        raise UserError(f"{name} has returned a score of a class that is not a finite number")
    measured = {
        "score": said.score,
        "suspects": _named(said),
        "published": "" if said.published is None else int(said.published),
        "abstained": said.abstained,
    }
    if victim_row["target"] and victim_row["n_poison"] != "0" and not said.abstained:
        target = int(victim_row["target"])
        if said.suspects is not None:
            measured["target_found"] = int(target in said.suspects)
        measured["target_rank"] = roc.rank(per_class.numpy(), target)
    tensors = {"per_class": per_class}
    return Judged(measured, tensors, charts.class_chart(per_class, said.suspects or []))


def _named(said):
    """The suspected classes of a `Finding` for results.csv; empty where it has no verdict."""
    if said.suspects is None or said.abstained:
        return ""
    return " ".join(map(str, said.suspects)) or layout.NO_CLASS


def weights_hash(model):
    """A digest of all that the output depends on, buffers that no checkpoint holds included."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return hashlib.sha256(checkpoint.to_bytes(tensors)).hexdigest()


def plan(name, config, folder, info):
    """Print what a detector would read, judge and write."""
    data = info["data"]
    count = config.budget(data["train"], data["classes"])
    what = {
        "data": f"{data['train']} training images",
        "input": f"up to {2 * getattr(config, 'inputs', 0)} test images, half of them triggered",
        "model": f"a model of {data['classes']} classes",
    }[config.judges]
    print(f"reads    {config.record}: {info['name']} on {data['train']} training images")
    print(f"judges   {what} with {name}")
    held = f"{count} clean images of {data['classes']} classes" if count else "no clean image"
    print(f"holds    {held} and computes in {config.precision}")
    print(f"writes   {folder} ({layout.state_of(folder)})")


def line(row):
    """The one line that a detector's script ends with; `row` is that of results.csv."""
    seconds = f"({float(row['seconds']):.0f} s)"
    if row["abstained"]:
        return f"abstained: {row['abstained']}  {seconds}"
    if row["judges"] == "model":
        verdict = f"  suspects {row['suspects']}" if row["suspects"] else ""
        return f"score {float(row['score']):.3g}{verdict}  {seconds}"
    shown = (
        f"{name} {format(100 * float(row[key]), '.1f') if row[key] else 'n/a'}"
        for key, name in (("auroc", "AUROC"), ("tpr", "TPR"), ("fpr", "FPR"))
    )
    return f"{'  '.join(shown)}  {seconds}"
