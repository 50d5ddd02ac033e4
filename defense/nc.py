"""Neural Cleanse: flag classes that a small patch leads all images to, and unlearn the patch.

Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor
Attacks in Neural Networks", IEEE S&P 2019. For every class the smallest trigger (mask and pattern)
is searched that leads clean images to it. A class whose mask is unusually small is flagged. The
network is fine-tuned on clean images, some of which carry its trigger and keep their label.

    python defense/nc.py --result_file badnet_cifar10

Deviates in when the goal is checked and when a search ends: see docs/defenses/nc.md.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import SearchOptions
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import FineTuningOptions


@dataclass(frozen=True, kw_only=True)
class Config(SearchOptions, FineTuningOptions):
    adds: ClassVar[dict[str, str]] = {
        "triggers.csv": "of every `class` the `norm` of its trigger's mask, the anomaly `index`, "
        "whether it was `flagged`, and its `success`, the share of the clean images that the "
        "trigger leads to the class; where none was flagged, the model is the victim",
        "triggers.safetensors": "the same, with every class's `mask` (1, S, S) and `pattern` "
        "(3, S, S) in [0, 1] pixels",
        "triggers.png": "an image of each mask and of its pattern on grey, flagged ones in red",
    }

    batch_size: int = 256
    """images per step of the fine-tuning"""
    share: float = option(0.2, above=0, at_most=1)
    """share of the clean images that a flagged trigger is put on"""

    def effort(self, clean, classes):
        together = min(self.together, classes)
        steps = self.search_epochs * math.ceil(clean / self.search_batch)
        return (
            f"searches {classes} triggers, one for each class, {together} at once: at most "
            f"{steps * math.ceil(classes / together)} steps in all, each with {together} triggers "
            f"on {min(self.search_batch, clean)} images"
        )

    def triggered(self, clean):
        """How many of `clean` images a flagged trigger is put on."""
        return max(1, round(self.share * clean))


if __name__ == "__main__":
    launch(Config)

import sys
from functools import partial

import torch

from antidote_bench.utils import files, run, seeds
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.loader import augmentation, evaluating, to_unit
from antidote_bench.utils.detection import triggers
from antidote_bench.utils.repair.layers import frozen
from antidote_bench.utils.train import Recipe, fit

COLUMNS = ["class", "norm", "index", "flagged", "success"]


def repair(model, record, config):
    print(config.effort(len(record.clean), record.spec.classes), file=sys.stderr)
    masks, patterns, success = find_triggers(model, record, config)
    norms, index, flagged = triggers.judge(masks, success, config)
    save_triggers(record, masks, patterns, norms, index, flagged, success)
    record.report("searched", model)
    targets = flagged.nonzero().flatten().tolist()
    if not targets:
        print("no class is flagged: the model stays as it is", file=sys.stderr)
        return model
    classes = [
        f"class {target} (norm {norms[target]:.1f}, index {index[target]:.1f})"
        for target in targets
    ]
    print(f"flagged: {', '.join(classes)}", file=sys.stderr)
    return fit(
        model,
        with_triggered(record.clean, masks, patterns, targets, config),
        Recipe.of(config),
        augment=augmentation(record.spec),
        on_epoch=partial(record.report, "finetune"),
        checkpoint=record.state / "finetune.safetensors",
    )


def find_triggers(model, record, config):
    """(masks K,1,S,S, patterns K,3,S,S, success K) of the triggers of all classes.

    The success is the share of the clean images that a trigger leads to its class. The model stays
    as it was.
    """
    with evaluating(model), frozen(model):
        return triggers.find(model, record.clean, record.spec.classes, config, record.state)


def save_triggers(record, masks, patterns, norms, index, flagged, success):
    """Save numbers, triggers and an image of them beside the repair."""
    columns = norms.tolist(), index.tolist(), flagged.int().tolist(), success.tolist()
    rows = [
        {
            "class": label,
            "norm": f"{norm:.4f}",
            "index": f"{anomaly:.4f}",
            "flagged": flag,
            "success": f"{share:.4f}",
        }
        for label, (norm, anomaly, flag, share) in enumerate(zip(*columns, strict=True))
    ]
    record.keep("triggers.csv", files.csv_text(rows, COLUMNS).encode())
    tensors = {
        "mask": masks,
        "pattern": patterns,
        "norm": norms,
        "index": index,
        "flagged": flagged,
        "success": success,
    }
    record.keep("triggers.safetensors", tensors)
    names = record.spec.class_names
    record.keep("triggers.png", triggers.chart(masks, patterns, norms, flagged, names))


def with_triggered(clean, masks, patterns, targets, config):
    """The clean images, and copies of some of them with the trigger of each class in `targets`.

    The copies keep their true labels. Every trigger gets images of its own.
    """
    parts = [clean]
    for target in targets:
        generator = seeds.generator("stamped images", config.random_seed, target)
        order = torch.randperm(len(clean), generator=generator)
        part = clean[order[: config.triggered(len(clean))].to(clean.labels.device)]
        images = triggers.add_trigger(to_unit(part.images), masks[target], patterns[target])
        parts.append(Split((images * 255).round().to(torch.uint8), part.truth, part.truth))
    joined = [
        torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "truth")
    ]
    return Split(*joined)


def main(config):
    run.defend(__name__, config, repair)
