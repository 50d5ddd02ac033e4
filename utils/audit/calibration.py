"""Scores of benign models, and how surprising another model's scores are beside them.

A score becomes a conformal p-value (Vovk, Gammerman, Shafer 2005; Bates et al. 2023): the share of
models, the judged one among them, with a score as large. If the judged model is benign and drawn
like the reference models, it is at most a with a probability of at most a. Imports no torch.
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from antidote_bench.utils import files
from antidote_bench.utils.errors import ConfigError, MissingError

FORMAT = 1
LARGEST = 2**24  # bytes of a calibration file
MOST_MODELS = 100_000
# what a file with wrong content can raise; an OverflowError comes of a huge whole number
UNUSABLE = OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError
UNKNOWN = 0.5  # what an abstention counts as, beside the p-values of one detector


@dataclass(frozen=True)
class Group:
    """The kind of models that scores are compared within.

    `architecture` is the network's name in results. `data` is the digest of the training images and
    labels, and `recipe` says how the models were trained; both are empty where they are unknown.
    """

    dataset: str
    data: str
    classes: int
    size: int
    architecture: str
    recipe: str


@dataclass(frozen=True)
class Method:
    """A detector as it scored the reference models."""

    options: str  # digest of its options
    version: str  # of this package
    images: str  # digest of the given images and labels that it used; empty where it uses none


@dataclass(frozen=True)
class Calibration:
    """The scores of n benign models.

    `models` maps the sha256 of a model's weights to its scores, {detector: score}; None stands for
    a detector that abstained. `backdoored` holds models that are known to be backdoored, which no
    p-value uses: the sha256 to {"attack": its name or "", "scores": as in `models`}.
    """

    name: str
    group: Group
    methods: dict
    models: dict
    backdoored: dict = field(default_factory=dict)

    def scores_of(self, names):
        """The scores of these detectors, one dict per model."""
        return [{name: scores.get(name) for name in names} for scores in self.models.values()]

    def saw(self, images):
        """Whether a detector scored the models with the images of this digest."""
        return any(method.images == images for method in self.methods.values())

    def without(self, sha256):
        """The same without the model of this digest: none is judged beside itself."""
        benign, backdoored = (
            {name: held for name, held in kind.items() if name != sha256}
            for kind in (self.models, self.backdoored)
        )
        return replace(self, models=benign, backdoored=backdoored)


# ---------- p-values ----------


def p_value(score, references):
    """(1 + number of the n `references` that are at least `score`) / (n + 1)."""
    return (1 + sum(other >= score for other in references)) / (len(references) + 1)


def combined(scores, references):
    """One p-value of several detectors, exact however they depend on each other.

    `scores` are the judged model's, {detector: score or None}, and `references` those of n benign
    models. Each detector's scores are ranked among all n + 1 models, a model's statistic is the sum
    of the negative logarithms of its ranks, and the p-value is that of the statistic. All n + 1
    models are treated alike, which is what makes it valid.
    """
    rows = [scores, *references]
    terms = [ranks([row[name] for row in rows]) for name in scores]
    statistics = [
        math.fsum(-math.log(rank) for rank in column) for column in zip(*terms, strict=True)
    ]
    return p_value(statistics[0], statistics[1:])


def ranks(scores):
    """The share of the scores that are at least as large as each; UNKNOWN for None."""
    known = [score for score in scores if score is not None]
    return [
        UNKNOWN if score is None else sum(other >= score for other in known) / len(known)
        for score in scores
    ]


def smallest(count):
    """The smallest p-value that `count` reference models allow."""
    return 1 / (count + 1)


def needed(alpha):
    """The number of reference models from which on a p-value can be `alpha`."""
    count = max(math.floor(1 / alpha) - 2, 0)
    while smallest(count) > alpha:
        count += 1
    return count


# ---------- files ----------


def write(path, calibration):
    """Write a calibration file: JSON, one model a line."""
    head = {
        "format": FORMAT,
        "name": calibration.name,
        "group": asdict(calibration.group),
        "methods": {name: asdict(method) for name, method in calibration.methods.items()},
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    lines.append(_one_a_line("models", calibration.models))
    if calibration.backdoored:
        lines.append(_one_a_line("backdoored", calibration.backdoored))
    files.write(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _one_a_line(name, models):
    body = ",\n".join(f"  {json.dumps(key)}: {json.dumps(held)}" for key, held in models.items())
    return f' "{name}": {{\n{body}\n }}' if models else f' "{name}": {{}}'


def read(path):
    """The `Calibration` in a file.

    Raises MissingError (exit 3) where there is none, and ConfigError (exit 2) where it is no such
    file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"there is no calibration file {path}; --calibrate makes one")
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST >> 20} MB")
        return _parsed(json.loads(path.read_text(encoding="utf-8")))
    except UNUSABLE as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} is no calibration file: {why}") from error


def _parsed(held):
    """A `Calibration` of the content of a file; ValueError or TypeError where it is none."""
    keys = {"format", "name", "group", "methods", "models"}
    if not isinstance(held, dict) or set(held) - {"backdoored"} != keys:
        raise ValueError(f"it must hold {', '.join(sorted(keys))} and nothing but backdoored")
    if held["format"] != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    group = Group(**held["group"])
    methods = {name: Method(**facts) for name, facts in held["methods"].items()}
    _require_types(Group, group)
    for method in methods.values():
        _require_types(Method, method)
    benign, backdoored = held["models"], held.get("backdoored", {})
    if not isinstance(benign, dict) or not isinstance(backdoored, dict):
        raise ValueError("its models must be named by their digests")
    if not isinstance(held["name"], str) or len(benign) + len(backdoored) > MOST_MODELS:
        raise ValueError("its name must be text, and its models must be fewer than 100,000")
    for scores in benign.values():
        _check_scores(scores, methods)
    for each in backdoored.values():
        if set(each) != {"attack", "scores"} or not isinstance(each["attack"], str):
            raise ValueError("a backdoored model must have an attack, a text, and scores")
        _check_scores(each["scores"], methods)
    return Calibration(held["name"], group, methods, benign, backdoored)


def _require_types(Kind, value):
    for name, kind in Kind.__annotations__.items():
        if type(getattr(value, name)) is not kind:
            raise ValueError(f"{name} must be of the type {kind.__name__}")


def _check_scores(scores, methods):
    if set(scores) != set(methods):
        raise ValueError("every model must have a score, or null, of every detector")
    for score in scores.values():
        right = isinstance(score, int | float) and not isinstance(score, bool)
        if score is not None and not (right and math.isfinite(score)):
            raise ValueError("a score must be a finite number or null")
