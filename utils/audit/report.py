"""The report on an audit, as data and as text. Imports no torch."""

import base64
import json
import math
from dataclasses import dataclass
from statistics import median

from antidote_bench.utils import VERSION
from antidote_bench.utils.audit import verdict as reached
from antidote_bench.utils.audit.calibration import Calibration
from antidote_bench.utils.text import cut, one_line

FORMAT = 1
TOOL = "antidote-audit"
MATCHED = {
    "matched": "trained on the same data by the same recipe, as the record says",
    "assumed": "how the model was trained is not known; that it was trained like them is assumed",
}

NATURAL = {
    "specific": "it is specific to this model",
    "likely": "it is likely a natural trigger, which comes from the data",
    "unknown": "whether it is specific to this model stays open",
}


@dataclass(frozen=True)
class Report:
    """An audit that has come to its end.

    `model` are facts about the judged model and `images` about the given images (None where there
    are none), as report.schema.json describes them. `comparable` says how the model is comparable
    with the reference models of `calibration`; `left_out` are the detectors that the budget left no
    time for. Times are ISO 8601 texts in UTC.
    """

    model: dict
    images: dict | None
    detections: list
    verdict: reached.Verdict
    calibration: Calibration | None
    comparable: str
    left_out: list
    exit_code: int
    started: str
    ended: str
    command: list


def as_data(report):
    """The report as plain data, as report.schema.json describes it."""
    verdict = report.verdict
    return {
        "format": FORMAT,
        "tool": {"name": TOOL, "version": VERSION},
        "model": report.model,
        "images": report.images,
        "outcome": verdict.outcome,
        "reason": verdict.reason,
        "alpha": verdict.alpha,
        "p": verdict.p,
        "p_floor": verdict.floor,
        "probability": verdict.learned and verdict.learned._asdict(),
        "classes": verdict.classes,
        "combined": verdict.detectors,
        "detectors": [_detector(each) for each in report.detections],
        "not_run": report.left_out,
        "calibration": _calibration(report),
        "limits": list(reached.LIMITS),
        "started": report.started,
        "ended": report.ended,
        "command": report.command,
        "exit_code": report.exit_code,
    }


def as_json(report):
    return json.dumps(as_data(report), indent=1, allow_nan=False) + "\n"


def _calibration(report):
    if report.calibration is None:
        return None
    group = report.calibration.group
    return {
        "name": report.calibration.name,
        "references": len(report.calibration.models),
        "dataset": group.dataset,
        "architecture": group.architecture,
        "recipe": group.recipe,
        "comparable": report.comparable,
    }


def _detector(found):
    return {
        "name": found.name,
        "score": found.score,
        "p": found.p,
        "references": found.references,
        "uncalibrated": found.uncalibrated,
        "abstained": found.abstained,
        "classes": found.suspects,
        "per_class": [value if math.isfinite(value) else None for value in found.per_class],
        "published": found.published,
        "triggers": [_trigger(trigger) for trigger in found.triggers],
        "triggers_png": base64.b64encode(found.triggers_png).decode() or None,
        "seconds": round(found.seconds, 3),
    }


def _trigger(trigger):
    elsewhere = trigger.elsewhere
    return {
        "class": trigger.label,
        "kind": trigger.kind,
        "success": trigger.success,
        "images": trigger.images,
        "benign_models": len(elsewhere),
        "benign_median": median(elsewhere) if elsewhere else None,
        "benign_largest": max(elsewhere) if elsewhere else None,
        "natural": trigger.natural,
    }


# ---------- text ----------


def as_text(report):
    """The report for a terminal."""
    verdict = report.verdict
    lines = [f"{one_line(report.model['path'])}: {verdict.line}", verdict.reason]
    lines += compared(report)
    if report.detections:
        lines += ["", *_table(report.detections)]
    if report.left_out:
        lines += ["", f"The budget left no time for {', '.join(report.left_out)}."]
    lines += ["", *(f"note: {cut(note, 300)}" for note in report.model["notes"])]
    return "\n".join([*lines, *reached.LIMITS]) + "\n"


def compared(report):
    """Sentences about the reference models, and what their number guarantees."""
    calibration = report.calibration
    if calibration is None:
        return []
    group, verdict = calibration.group, report.verdict
    count = len(calibration.models)
    lines = [
        f"Reference models: {count} benign ones of {group.architecture} on {group.dataset} "
        f"({MATCHED[report.comparable]})."
    ]
    if verdict.p is not None:
        rate = guaranteed(verdict.alpha, count)
        lines.append(
            "A benign model like them is called suspicious with a probability of at most "
            f"{rate:.3g}; the smallest possible p is {verdict.floor:.3g}."
        )
    return lines + probability(verdict.learned)


def probability(learned):
    """The sentence about what was learned from backdoored models, or none."""
    if learned is None:
        return []
    attacks = f" of {learned.attacks} attacks" if learned.attacks else ""
    if 0.01 <= learned.value <= 0.99:
        value = f"{learned.value:.2f}"
    else:
        value = "above 0.99" if learned.value > 0.5 else "below 0.01"
    return [
        f"The probability of a backdoor is {value} if it was even before, as learned "
        f"from {learned.models} backdoored models{attacks}; another attack may look different, and "
        "the verdict does not use it."
    ]


def guaranteed(alpha, count):
    """The largest p-value k / (count + 1) up to alpha: the false-alarm rate that is guaranteed."""
    return math.floor(alpha * (count + 1) * (1 + 1e-12)) / (count + 1)


def _table(detections):
    head = ("detector", "score", "p", "classes", "seconds", "")
    rows = [head, *(row(each) for each in detections)]
    widths = [max(len(line[column]) for line in rows) for column in range(len(head) - 1)]
    return [_padded(line, widths) for line in rows]


def _padded(line, widths):
    """The texts of a row in columns; the last one, a remark, ends the line."""
    columns = [text.ljust(width) for text, width in zip(line[:-1], widths, strict=True)]
    return "  ".join([*columns, line[-1]]).rstrip()


def row(found):
    """(name, score, p, classes, seconds, remark) of a detection, as texts."""
    return (
        found.name,
        "–" if found.score is None else f"{found.score:.4g}",
        "–" if found.p is None else f"{found.p:.3g}",
        ", ".join(map(str, found.suspects or [])) or "–",
        f"{found.seconds:.1f}",
        remark(found),
    )


def remark(found):
    """What is to be said about a detection beside its numbers."""
    parts = [f"abstained: {found.abstained}"] if found.abstained else []
    parts += [f"no p-value: {found.uncalibrated}"] if found.uncalibrated else []
    parts += map(_tried, found.triggers)
    return one_line("; ".join(parts))


def _tried(trigger):
    """What a found trigger does to the given images, here and on benign models."""
    text = (
        f"its trigger for class {trigger.label} leads {100 * trigger.success:.0f} % of "
        f"{trigger.images} given images there"
    )
    if not trigger.elsewhere:
        return text
    middle, most = 100 * median(trigger.elsewhere), 100 * max(trigger.elsewhere)
    return (
        f"{text}, and on {len(trigger.elsewhere)} benign models {middle:.0f} % in the median and "
        f"{most:.0f} % at most: {NATURAL[trigger.natural]}"
    )
