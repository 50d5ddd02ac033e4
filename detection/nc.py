"""Neural Cleanse: a class that an unusually small patch leads all images to is a target.

Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor
Attacks in Neural Networks", IEEE S&P 2019. For every class the smallest trigger (mask and pattern)
is searched that leads clean images to it, as in defense/nc.py. The score is by how much the
smallest mask stands out, on a logarithmic scale.

    python detection/nc.py --result_file badnet_cifar10

Deviates in the logarithm, and in when a search ends; see docs/detection/nc.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.detection.options import ModelOptions, SearchOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(SearchOptions, ModelOptions):
    in_float32: ClassVar[bool] = False
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every class the `mask` (1, S, S) and the `pattern` (3, S, S) "
        "of its trigger in [0, 1] pixels, the mask's `norm`, the paper's anomaly `index`, and the "
        "`success`, the share of the clean images that the trigger leads to the class",
        "triggers.png": "an image of each mask and of its pattern on grey, in red where the "
        "paper's own rule takes the class for a target",
    }

    search_batch: int = 16
    """images per step of the search"""


if __name__ == "__main__":
    launch(Config)

from antidote_bench.utils import run
from antidote_bench.utils.detection import soundness, triggers
from antidote_bench.utils.detection.inspector import Finding
from antidote_bench.utils.detection.outliers import LEAST_CLASSES


def score(model, record, config):
    why = soundness.reason(model, record, config)
    if why:
        return soundness.abstained(record, why)
    classes = record.spec.classes
    masks, patterns, success = triggers.find(model, record.reference, classes, config, record.state)
    norms, index, flagged = triggers.judge(masks, success, config)
    works = success >= config.goal
    per_class = triggers.smallness(norms, works)
    found = {"mask": masks, "pattern": patterns, "norm": norms, "index": index, "success": success}
    names = record.spec.class_names
    record.keep("triggers.png", triggers.chart(masks, patterns, norms, flagged, names))
    if works.sum() < LEAST_CLASSES:
        few = f"a trigger that reaches the goal was found for {int(works.sum())} classes only"
        return Finding(None, per_class, abstained=few, evidence=found)
    return Finding(
        float(per_class.max()),
        per_class,
        flagged.nonzero().flatten().tolist(),
        published=bool(flagged.any()),
        evidence=found,
    )


def main(config):
    run.detect(__name__, config, score)
