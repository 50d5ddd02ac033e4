"""The audit: the detectors of models look at a model, and what they say is compared with what they
say of benign models."""

import importlib
import math
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from antidote_bench.utils import VERSION, config, seeds
from antidote_bench.utils.audit import calibration as known
from antidote_bench.utils.audit import options, verdict
from antidote_bench.utils.audit import report as reports
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.loader import to_unit
from antidote_bench.utils.detection import charts, triggers
from antidote_bench.utils.detection.inspector import Inspector
from antidote_bench.utils.errors import ConfigError, MissingError, UserError, is_out_of_memory
from antidote_bench.utils.evaluation import predict
from antidote_bench.utils.protocol.audited import (
    implausible,
    open_backdoored,
    open_benign,
    open_images,
)
from antidote_bench.utils.protocol.detect import weights_hash
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.text import cut

# ---------- the detectors ----------


def inspect(audited, given, plan, references=()):
    """([`verdict.Detection`], [detectors that the budget left no time for]), in order of cost.

    `given` are the user's images or None. A detector that has begun is not stopped. Triggers that
    are found are tried on the benign models `references`.
    """
    before, start = weights_hash(audited.model), time.monotonic()
    limit = math.inf if plan.budget is None else 60 * plan.budget
    found, left_out = [], []
    bar = tqdm(plan.detectors, unit=" detectors", disable=None)
    for name in bar:
        bar.set_description(name)
        if time.monotonic() - start >= limit:
            left_out.append(name)
            continue
        found.append(_detection(name, audited, given, references))
        if weights_hash(audited.model) != before:
            raise UserError(f"{name} has changed the model that it was given to judge")
    return found, left_out


def _detection(name, audited, given, references):
    """What one detector says about a model."""
    device = next(audited.model.parameters()).device
    method = _detector_options(name, str(device))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        finding, why = _finding(name, audited, given, method, Path(place))
        seconds = time.monotonic() - start
        triggers_png = b""
        with suppress(FileNotFoundError):
            triggers_png = (Path(place) / layout.OWN / layout.TRIGGERS).read_bytes()
    judged = finding is not None and not why
    networks = [audited.model, *references]
    per_class = tuple(finding.per_class.tolist()) if judged else ()
    suspects = finding.suspects if judged else None
    return verdict.Detection(
        name,
        finding.score if judged else None,
        per_class,
        suspects,
        finding.published if judged else None,
        why,
        seconds,
        options=config.digest(method.identity()),
        images=given.digest if given and method.holds_clean else "",
        triggers=_triggers(networks, finding, given) if judged and given else (),
        triggers_png=triggers_png,
        chart=charts.class_chart(finding.per_class.cpu(), suspects or []) if judged else b"",
    )


def _finding(name, audited, given, method, place):
    """(what a detector returns or None, why it does not judge the model)"""
    split = given.split if given else _no_images(audited)
    least = 2 * audited.spec.classes
    if method.holds_clean and len(split) < least:
        return None, f"{len(split)} images are too few: it takes two for each class, {least}"
    inspector = Inspector(
        audited.spec,
        split[:0],
        split if method.holds_clean else split[:0],
        torch.zeros(0, dtype=torch.long),
        audited.network,
        audited.width,
        state=place,
        shared=place / "shared",
        report=lambda *_, **__: None,
    )
    module = importlib.import_module(f"antidote_bench.detection.{name}")
    torch.manual_seed(seeds.number("detection", method.random_seed))
    try:
        finding = module.score(audited.model, inspector, method)
    except (UserError, RuntimeError, ValueError) as error:  # of a network that it cannot take apart
        if is_out_of_memory(error):
            raise
        return None, f"it failed: {cut(error, 200)}"
    if finding.abstained:
        return finding, finding.abstained
    if not math.isfinite(finding.score) or not finding.per_class.isfinite().all():
        return finding, "its score is not a finite number"
    return finding, ""


def _no_images(audited):
    device, side = next(audited.model.parameters()).device, audited.spec.size
    labels = torch.zeros(0, dtype=torch.long, device=device)
    pixels = torch.zeros(0, 3, side, side, dtype=torch.uint8, device=device)
    return Split(pixels, labels, labels)


def _detector_options(name, device):
    """The options of a detector in an audit, in full precision."""
    module = importlib.import_module(f"antidote_bench.detection.{name}")
    own = options.SETTINGS.get(name, {})
    return module.Config(result_file="audit", device=device, precision="fp32", **own)


def _triggers(networks, finding, given):
    """The `verdict.Trigger` of every class that a detector suspects, where it has found any.

    `networks` are the judged model and the benign ones.
    """
    held = finding.evidence
    if not ({"mask", "pattern"} <= held.keys() or "trigger" in held):
        return ()
    labels = finding.suspects
    if not labels:
        labels = [int(finding.per_class.argmax())]
    return tuple(_trigger(networks, held, given.split, label) for label in labels)


def _trigger(networks, held, split, label):
    others = split[(split.labels != label).nonzero().flatten()]
    pixels = to_unit(others.images)
    if "trigger" in held:
        kind, shown = "additive", (pixels + held["trigger"][label].to(pixels)).clamp(0, 1)
    else:
        kind = "patch"
        mask, pattern = (held[name][label].to(pixels) for name in ("mask", "pattern"))
        shown = triggers.add_trigger(pixels, mask, pattern)
    changed = (255 * shown).round().to(torch.uint8)
    shown = Split(changed, others.labels, others.labels)
    own, *elsewhere = (_share(network, shown, label) for network in networks)
    return verdict.Trigger(label, kind, own, len(others), tuple(elsewhere))


def _share(network, images, label):
    """The share of images that a network gives a label; 0 of none."""
    if not len(images):
        return 0.0
    return float((predict(network, images) == label).double().mean())


# ---------- the verdict ----------


class Judged(NamedTuple):
    """What an audit has found."""

    detections: list  # of `verdict.Detection`, with p-values
    verdict: verdict.Verdict
    calibration: known.Calibration | None
    comparable: str  # how the model is comparable with the reference models
    left_out: list  # detectors that the budget left no time for


def judge(audited, given, plan, calibration_file=None, references=()):
    """The `Judged` model; `calibration_file` is the user's, None for those of this project.

    `references` are benign models that found triggers are tried on, beside the judged one.
    """
    if reason := implausible(given, audited.spec):
        return Judged([], verdict.Verdict(verdict.UNKNOWN, reason, plan.alpha), None, "", [])
    calibration, why, comparable = options.calibration_for(
        calibration_file, audited.group, given.digest if given else ""
    )
    if calibration:
        calibration = calibration.without(audited.sha256)
    found, left_out = inspect(audited, given, plan, references)
    found = [verdict.calibrated(each, calibration, VERSION) for each in found]
    reached = verdict.reach(found, calibration, plan.alpha, VERSION)
    if calibration is None:
        reached = replace(reached, reason=f"{reached.reason[:-1]}; {why}.")
    return Judged(found, reached, calibration, comparable, left_out)


def report(audited, given, judged, times, command, code):
    """The `reports.Report`; `times` are two ISO 8601 texts, and `code` is the exit code."""
    model = {
        "path": audited.path,
        "sha256": audited.sha256,
        "bytes": audited.size,
        "architecture": audited.group.architecture,
        "classes": audited.spec.classes,
        "size": audited.spec.size,
        "parameters": sum(value.numel() for value in audited.model.parameters()),
        "mean": audited.model.normalize.mean.flatten().tolist(),
        "std": audited.model.normalize.std.flatten().tolist(),
        "notes": list(audited.notes),
    }
    images = given and {
        "count": len(given.split),
        "labels": "given" if given.labelled else "predicted",
        "accuracy": given.accuracy,
        "sha256": given.digest,
    }
    return reports.Report(
        model,
        images,
        judged.detections,
        judged.verdict,
        judged.calibration,
        judged.comparable,
        judged.left_out,
        code,
        *times,
        list(command),
    )


# ---------- the calibration ----------


def calibrate(folder, said, plan, images, output, say, most=None):
    """Score the benign models in `folder`, and write the calibration file `output` after each.

    `images` is a folder of images or None, and `say(text)` prints. Models that the file has already
    are not scored again. Records of models that are not benign are left out. It ends when the file
    has `most` models, if that is not None. Raises ConfigError (exit 2) where the models are of
    different kinds.
    """
    found = known.read(output) if Path(output).is_file() else None
    for path in options.models_in(folder):
        if found and most is not None and len(found.models) >= most:
            break
        audited = open_benign(path, said, say)
        if audited is None:
            continue
        given = open_images(images, audited) if images else None
        methods = _methods(plan.detectors, given, str(next(audited.model.parameters()).device))
        found = found or known.Calibration(Path(output).stem, audited.group, methods, {})
        _require_same_kind(found, audited, methods, output)
        if audited.sha256 in found.models:
            continue
        if why := implausible(given, audited.spec):
            raise ConfigError(f"{path} is no reference model: {why}")
        scores = _scores(audited, given, plan)
        found = replace(found, models={**found.models, audited.sha256: scores})
        known.write(output, found)
        say(f"{len(found.models)}  {path.name}: {_shown(scores)}")
    if found is None or not found.models:
        raise MissingError(f"{folder} holds no model that is known to be benign")
    return found


def learn(folder, said, images, output, say):
    """Score the backdoored models in `folder`, and add them to the calibration file `output`.

    It is written after each; models that it has already are not scored again. The detectors are
    those of the file, and `images` are those that the benign models were scored with. What is left
    out is said with say(text). Raises ConfigError (exit 2) where a model is of another kind.
    """
    found = known.read(output)
    plan = options.Plan(tuple(found.methods))
    for path in options.models_in(folder):
        audited = open_backdoored(path, said, say)
        if audited is None or audited.sha256 in found.backdoored:
            continue
        if audited.sha256 in found.models:
            raise ConfigError(f"{path} is one of the benign models of {output} already")
        given = open_images(images, audited) if images else None
        device = str(next(audited.model.parameters()).device)
        _require_same_kind(found, audited, _methods(plan.detectors, given, device), output)
        scores = _scores(audited, given, plan)
        held = {"attack": audited.attack, "scores": scores}
        found = replace(found, backdoored={**found.backdoored, audited.sha256: held})
        known.write(output, found)
        say(f"{len(found.backdoored)}  {path.name}: {_shown(scores)}")
    if not found.backdoored:
        raise MissingError(f"{folder} holds no model that is known to be backdoored")
    return found


def _scores(audited, given, plan):
    """{detector: score or None}; no budget stops it."""
    detections, _ = inspect(audited, given, replace(plan, budget=None))
    return {each.name: each.score for each in detections}


def _shown(scores):
    return ", ".join(
        f"{name} {'abstained' if score is None else format(score, '.3g')}"
        for name, score in scores.items()
    )


def _methods(names, given, device):
    """{detector: `Method`} of the detectors that are to score the reference models."""
    found = {}
    for name in names:
        method = _detector_options(name, device)
        images = given.digest if given and method.holds_clean else ""
        found[name] = known.Method(config.digest(method.identity()), VERSION, images)
    return found


def _require_same_kind(found, audited, methods, output):
    if found.group != audited.group:
        raise ConfigError(
            f"{audited.path} is of another data set, network or recipe than the others in "
            f"{output}: reference models are of one kind"
        )
    if found.methods != methods:
        raise ConfigError(
            f"{output} was made with other detectors, options or images: name another --output"
        )
