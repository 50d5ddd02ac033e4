"""The report on an audit in SARIF 2.1.0, the format of static analysis tools. Imports no torch.

OASIS, "Static Analysis Results Interchange Format (SARIF) Version 2.1.0", 2020.
"""

import json
import re
from pathlib import Path
from urllib.parse import quote

from antidote_bench.utils import VERSION
from antidote_bench.utils.audit import report as reports
from antidote_bench.utils.audit import verdict as reached
from antidote_bench.utils.text import cut, one_line

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
RULE = "BD/verdict"


def as_sarif(report):
    """The report as the text of a SARIF file."""
    names = [found.name for found in report.detections]
    results = [_verdict(report)]
    results += [_result(report, *numbered) for numbered in enumerate(report.detections, 1)]
    run = {
        "tool": {"driver": _driver(VERSION, names)},
        "artifacts": [_artifact(report.model)],
        "results": results,
        "invocations": [
            _invocation(
                report.command,
                report.exit_code,
                report.verdict.line,
                True,
                startTimeUtc=report.started,
                endTimeUtc=report.ended,
            )
        ],
        "automationDetails": {"id": f"audit/{report.model['sha256'][:12]}"},
        "properties": {"limits": list(reached.LIMITS)},
    }
    return _text(run)


def failure(command, code, message):
    """The SARIF file of an audit that has failed: it has no result."""
    notification = {"level": "error", "message": {"text": one_line(message)}}
    invocation = _invocation(
        command, code, "failed", False, toolExecutionNotifications=[notification]
    )
    run = {"tool": {"driver": _driver(VERSION, [])}, "results": [], "invocations": [invocation]}
    return _text(run)


def _text(run):
    content = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _invocation(command, code, words, successful, **more):
    return {
        "executionSuccessful": successful,
        "exitCode": code,
        "exitCodeDescription": words,
        "arguments": list(map(one_line, command)),
        **more,
    }


def _driver(version, names):
    rules = [_rule(RULE, "Verdict", "Whether the model's scores are unusual for a benign model.")]
    rules += [
        _rule(f"BD/{name}", name, f"What the detector {name} says of the model.") for name in names
    ]
    driver = {"name": reports.TOOL, "version": version, "rules": rules}
    if re.fullmatch(r"\d+\.\d+\.\d+", version):
        driver["semanticVersion"] = version
    return driver


def _rule(identity, name, text):
    return {
        "id": identity,
        "name": name,
        "shortDescription": {"text": text},
        "fullDescription": {"text": text},
        "help": {"text": " ".join(reached.LIMITS)},
        "defaultConfiguration": {"level": "warning"},
        "properties": {"tags": ["security", "machine-learning"]},
    }


def _artifact(model):
    return {
        "location": {"uri": uri(model["path"])},
        "length": model["bytes"],
        "mimeType": "application/octet-stream",
        "hashes": {"sha-256": model["sha256"]},
        "roles": ["analysisTarget"],
    }


def uri(path):
    """A path as a reference to it: relative as it is given, absolute as file:///."""
    path = Path(path)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())


def _verdict(report):
    verdict = report.verdict
    kind = {reached.SUSPICIOUS: "fail", reached.NOTHING: "informational"}
    text = f"{verdict.line}. {verdict.reason}"
    found = _base(report, 0, kind.get(verdict.outcome, "open"), text)
    if verdict.p is not None:
        found["rank"] = _rank(verdict.p)
    facts = {
        "alpha": verdict.alpha,
        "p": verdict.p,
        "references": verdict.references,
        "classes": verdict.classes,
        "probability": verdict.learned and verdict.learned.value,
    }
    return found | {"properties": facts}


def _result(report, number, found):
    """The result of one detector: it accuses nobody, which is up to the verdict."""
    kind = "notApplicable" if found.score is None else "informational"
    name, score, p, classes, _, remark = reports.row(found)
    text = f"{name}: score {score}, p {p}, classes {classes}"
    text += f"; {remark}" if remark else ""
    result = _base(report, number, kind, text)
    if found.p is not None:
        result["rank"] = _rank(found.p)
    facts = {"score": found.score, "p": found.p, "classes": found.suspects or []}
    return result | {"properties": facts}


def _base(report, number, kind, text):
    """A SARIF result; only one of the kind fail has a level."""
    names = [RULE, *(f"BD/{found.name}" for found in report.detections)]
    return {
        "ruleId": names[number],
        "ruleIndex": number,
        "kind": kind,
        "level": "warning" if kind == "fail" else "none",
        "message": {"text": cut(text, 2000)},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": uri(report.model["path"]), "index": 0}
                }
            }
        ],
        "partialFingerprints": {"modelSha256/v1": report.model["sha256"]},
    }


def _rank(p):
    return round(100 * (1 - p), 4)
