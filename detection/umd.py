"""UMD: triggers of the pairs of classes that an attack connects work for each other, and are small.

Xiang, Xiong, Li, "UMD: Unsupervised Model Detection for X2X Backdoor Attacks", ICML 2023 (arXiv
2305.18651). For every ordered pair of classes the trigger is searched that leads images of the one
to the other. The group of pairs whose triggers work best for each other is compared with the other
pairs: the score is by how much smaller its triggers are. It takes all-to-one and all-to-all attacks
alike.

    python detection/umd.py --result_file badnet_cifar10

Deviates in the searches; see docs/detection/umd.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import ModelOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every ordered pair of classes, in a table of sources by "
        "targets, the `size` of its trigger (infinite where none reaches the goal) and its "
        "`success`; the `core`, the sources and targets (n, 2) of the group of pairs, its "
        "`objective`, and the triggers of these pairs, as `trigger` (n, 3, S, S) that is added, or "
        "as `mask` (n, 1, S, S) and `pattern` (n, 3, S, S)",
        "triggers.png": "an image of the trigger of each pair of the group, in red where the "
        "paper's own rule takes the model for backdoored; where there is no group, of the pairs "
        "with the largest success",
    }

    trigger: Literal["patch", "additive"] = "patch"
    """what is searched: a mask and a pattern, or numbers that are added to the pixels"""
    images: int = option(10, at_least=2, unit="images")
    """images of every class that are used, at most, of those that the model gets right"""
    steps: int = option(100, at_least=1)
    """most steps of a search"""
    together: int = option(100, identity=False, at_least=1, unit="pairs")
    """pairs whose triggers are searched at once; changes speed and memory only"""
    goal: float = option(0.9, above=0, at_most=1)
    """share of the images of the source that a trigger must lead to the target"""
    search_lr: float = option(0.1, above=0, needs={"trigger": "patch"})
    """learning rate of the search for a patch"""
    penalty: float = option(1e-3, above=0, needs={"trigger": "patch"})
    """lambda, weight of the mask's size, at the start of the search"""
    step_size: float = option(0.1, above=0, needs={"trigger": "additive"})
    """length of a step of an additive trigger, a Euclidean norm of pixels in [0, 1]"""
    confidence: float = option(0.95, above=0, below=1)
    """probability with which the paper's own rule takes a benign model for benign"""
    most_classes: int = option(30, at_least=1, unit="classes")
    """classes above which the method abstains: K of them have K (K - 1) pairs"""


if __name__ == "__main__":
    launch(Config)

import torch
from scipy import stats

from antidote_bench.utils import run
from antidote_bench.utils.charts import class_title, trigger_chart
from antidote_bench.utils.detection import pairs as pairing
from antidote_bench.utils.detection import soundness, triggers
from antidote_bench.utils.detection.inspector import Finding
from antidote_bench.utils.detection.outliers import FARTHEST

LEAST_CLASSES = 4  # with fewer, the pairs outside a group of one pair per source are too few
LEAST_NULL = 5  # pairs outside the group, for a median and a deviation
LEAST_IMAGES = 2  # of a class, for its pairs to count


def score(model, record, config):
    classes = record.spec.classes
    why = soundness.reason(model, record, config, least=LEAST_CLASSES)
    if not why and classes > config.most_classes:
        count = classes * (classes - 1)
        why = f"{classes} classes have {count} pairs: raise --most_classes to search them all"
    if why:
        return soundness.abstained(record, why)
    split = record.reference
    shown = pairing.right_images(model, split, classes, config.images, config.precision)
    pairs = pairing.ordered(classes, split.labels.device)
    trigger, size, success = search(model, shown, pairs, config, record)
    works = size.isfinite() & (shown.weight.sum(1) >= LEAST_IMAGES)[pairs.source]
    places = works.nonzero().flatten()
    working = pairing.Pairs(pairs.source[places], pairs.target[places])
    transfer = pairing.transfers(model, shown, working, trigger[places]).cpu()
    core, objective = pairing.best_core(transfer, working.source.cpu())
    found = Found(trigger, size, success, works, places[core].tolist(), objective)
    return finding(record, config, pairing.Pairs(*(part.cpu() for part in pairs)), found)


class Found:
    """What the searches have found of P pairs, on the CPU: the triggers, their sizes and success,
    which of them work, and the group of pairs (a list of positions) with its objective."""

    def __init__(self, trigger, size, success, works, core, objective):
        self.trigger, self.size, self.success = (
            value.detach().cpu() for value in (trigger, size, success)
        )
        self.works, self.core, self.objective = works.cpu(), core, objective


def search(model, shown, pairs, config, record):
    """(triggers, sizes, success) of all pairs."""
    kinds = {"patch": pairing.search_patches, "additive": pairing.search_additive}
    rows = torch.arange(len(pairs.source), device=pairs.source.device)
    parts = [
        kinds[config.trigger](model, shown, pairs, group, config, record.state)
        for group in rows.split(config.together)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def finding(record, config, pairs, found):
    """The `Finding`, and the image of the triggers."""
    classes, core = record.spec.classes, torch.tensor(found.core, dtype=torch.long)
    is_core = torch.zeros(len(found.works), dtype=torch.bool)
    is_core[core] = True
    null = found.works & ~is_core
    why = ""
    if not len(core):
        why = "no two sources have a trigger that reaches the goal"
    elif null.sum() < LEAST_NULL:
        why = f"{int(null.sum())} pairs outside the group have a trigger that reaches the goal"
    value, per_class, is_backdoored = None, torch.zeros(classes, dtype=torch.float64), None
    if not why:
        value = float(deviations(found.size, null, core[None])[0])
        groups = [(found.works & (pairs.target == label)) for label in range(classes)]
        groups = [members & is_core if (members & is_core).any() else members for members in groups]
        per_class = deviations(found.size, null, [group.nonzero().flatten() for group in groups])
        is_backdoored = value > limit(int(null.sum()), config.confidence)
    shown = core if len(core) else found.success.argsort(descending=True, stable=True)[:classes]
    save_chart(record, pairs, found, shown, bool(is_backdoored))
    suspects = pairs.target[core].unique().tolist() if is_backdoored else []
    return Finding(
        value,
        per_class,
        suspects if not why else None,
        published=is_backdoored,
        abstained=why,
        evidence=evidence(classes, pairs, found, core),
    )


def deviations(size, null, groups):
    """By how much the triggers of each group of pairs (positions) are smaller than the others.

    With u = 1 / size, it is (median u of the group - median u of the pairs `null`) / (1.4826 MAD of
    these), float64; -FARTHEST for a group of none, and never beyond FARTHEST.
    """
    tiny = torch.finfo(torch.float64).tiny
    inverse = 1 / size.double().clamp(min=tiny)
    others = inverse[null].numpy()
    centre = float(torch.from_numpy(others).quantile(0.5))
    spread = stats.median_abs_deviation(others, scale="normal")
    found = []
    for group in groups:
        if not len(group):
            found.append(-FARTHEST)
            continue
        away = float(inverse[group].quantile(0.5)) - centre
        found.append(away / spread if spread else FARTHEST * ((away > 0) - (away < 0)))
    return torch.tensor(found, dtype=torch.float64).clamp(-FARTHEST, FARTHEST)


def limit(count, confidence):
    """The deviation that the largest of `count` normal values stays below with the probability
    `confidence`."""
    return float(stats.norm.ppf(confidence ** (1 / count)))


def evidence(classes, pairs, found, core):
    table = torch.full((classes, classes), torch.inf)
    size = table.index_put((pairs.source, pairs.target), found.size)
    success = torch.zeros_like(table).index_put((pairs.source, pairs.target), found.success)
    tensors = {
        "size": size,
        "success": success,
        "core": torch.stack([pairs.source[core], pairs.target[core]], 1),
        "objective": torch.tensor(found.objective, dtype=torch.float64),
    }
    if found.trigger.shape[1] == 3:
        return tensors | {"trigger": found.trigger[core]}
    mask, pattern = triggers.unit(found.trigger[core])
    return tensors | {"mask": mask, "pattern": pattern}


def save_chart(record, pairs, found, rows, marked):
    """Keep the image of the triggers at positions `rows`."""
    trigger, names = found.trigger[rows], record.spec.class_names
    if trigger.shape[1] == 4:
        masks, patterns = triggers.unit(trigger)
        shown = triggers.add_trigger(torch.full_like(patterns, 0.5), masks, patterns)
    else:
        masks = trigger.abs().amax(1, keepdim=True).clamp(max=1)
        shown = (0.5 + trigger / 2).clamp(0, 1)
    titles = [
        f"{class_title(int(pairs.source[row]), names, 10)} to "
        f"{class_title(int(pairs.target[row]), names, 10)}: size {float(found.size[row]):.1f}"
        for row in rows.tolist()
    ]
    record.keep("triggers.png", trigger_chart(masks, shown, titles, [marked] * len(titles)))


def main(config):
    run.detect(__name__, config, score)
