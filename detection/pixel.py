"""Pixel: a class that a change of few pixels leads all images to is a target.

Tao, Shen, Liu, An, Xu, Ma, Li, Zhang, "Better Trigger Inversion Optimization in Backdoor Scanning",
CVPR 2022. For every class an additive trigger is searched, as a positive part minus a negative one.
The score is by how much the smallest number of changed pixels stands out.

    python detection/pixel.py --result_file badnet_cifar10

Deviates in when a search ends, and the score is our own; see docs/detection/pixel.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import ModelOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    in_float32: ClassVar[bool] = False
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every class the `trigger` (3, S, S) in [-1, 1] that is added, "
        "the number of `pixels` that it changes, and the `success`, the share of the clean images "
        "of other classes that it leads to the class",
        "triggers.png": "an image of the pixels that each trigger changes, and of the trigger "
        "around grey; in red that of the largest score",
    }

    images: int = option(100, at_least=2)
    """clean images of the search, at most"""
    search_epochs: int = option(1000, at_least=1)
    """epochs on these, at most, in which the trigger of a class is searched"""
    search_batch: int = option(32, at_least=1, unit="images")
    """images per step of the search"""
    search_lr: float = option(0.1, above=0)
    """learning rate of the search"""
    together: int = option(10, identity=False, at_least=1, unit="classes")
    """classes whose triggers are searched at once; changes speed and memory only"""
    penalty: float = option(1e-3, above=0)
    """lambda, weight of the trigger's size, at the start of the search"""
    goal: float = option(0.9, above=0, at_most=1)
    """share of the images of other classes that a trigger must lead to its class"""
    stale: int = option(100, at_least=1, unit="epochs")
    """epochs without a smaller trigger after which a search ends"""


if __name__ == "__main__":
    launch(Config)

import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.utils import run, seeds
from antidote_bench.utils.charts import class_title, trigger_chart
from antidote_bench.utils.data.dataset import balanced_subset
from antidote_bench.utils.data.loader import (
    Passes,
    batches,
    clipped,
    evaluation_batch,
    gradient_batch,
    halving,
    mixed_precision,
)
from antidote_bench.utils.detection import soundness, triggers
from antidote_bench.utils.detection.inspector import Finding
from antidote_bench.utils.detection.outliers import LEAST_CLASSES

PATIENCE = 10  # epochs in a row above the goal, or below it, after which lambda changes
UP, DOWN = 1.5, 1.5**1.5  # factor and divisor of lambda
SAVED = 10  # epochs between checkpoints
SMALLEST = 1 / 255  # a pixel that changes less counts as unchanged


def score(model, record, config):
    why = soundness.reason(model, record, config)
    if why:
        return soundness.abstained(record, why)
    split = some_images(record.reference, config)
    classes = torch.arange(record.spec.classes, device=split.labels.device)
    parts = [
        search(model, split, group, config, record) for group in classes.split(config.together)
    ]
    trigger, success = (torch.cat(part) for part in zip(*parts, strict=True))
    pixels, works = changed_pixels(trigger), success >= config.goal
    per_class = triggers.smallness(1.0 + pixels, works)
    evidence = {"trigger": trigger, "pixels": pixels, "success": success}
    record.keep("triggers.png", chart(trigger, pixels, per_class, record.spec.class_names))
    if works.sum() < LEAST_CLASSES:
        few = f"a trigger that reaches the goal was found for {int(works.sum())} classes only"
        return Finding(None, per_class, abstained=few, evidence=evidence)
    return Finding(float(per_class.max()), per_class, evidence=evidence)


def some_images(split, config):
    """At most as many images as the search takes, the same number of every class."""
    if len(split) <= config.images:
        return split
    seed = seeds.number("pixel images", config.data_seed)
    chosen = balanced_subset(split.truth.cpu(), config.images, seed)
    return split[torch.as_tensor(chosen).to(split.labels.device)]


def search(model, split, classes, config, record):
    """(triggers k,3,S,S, success k) of some `classes`, int64 k, each as if it were alone."""
    state = Search(classes, split.images.shape[-1], config)
    optimizer = torch.optim.Adam(state.raw.parameters(), config.search_lr, betas=(0.5, 0.9))

    def advance(rows, epoch):
        train(model, split, state, rows, optimizer, epoch, config)
        state.advance(success_rates(model, split, state, rows, config), config)

    triggers.run_epochs(advance, state, optimizer, record.state / "pixel", config, SAVED)
    return state.best, state.success


class Search(nn.Module):
    """The state of the searches for some classes (int64 K); checkpoints hold it.

    `raw` has 2,3,S,S numbers for each class, the positive and the negative part. The buffers have
    length K. `best`, `success`, `size` and `pixels` belong to the smallest trigger that has reached
    the goal; before one has, `best` is the last one and the others are 0 and infinite.
    """

    def __init__(self, classes, size, config):
        super().__init__()
        generators = [
            seeds.generator("pixel trigger", config.random_seed, label)
            for label in classes.tolist()
        ]
        start = [torch.rand(2, 3, size, size, generator=generator) for generator in generators]
        start = torch.stack(start).to(classes.device)
        self.raw = nn.ParameterList(start.unbind())
        zeros, counts = torch.zeros(len(classes), device=classes.device), torch.zeros_like(classes)
        buffers = {
            "classes": classes,
            "best": added(start),
            "success": zeros,
            "size": zeros + torch.inf,
            "pixels": zeros + torch.inf,
            "penalty": zeros + config.penalty,
            "above": counts,  # epochs in a row above the goal
            "below": counts,
            "stale": counts,  # epochs since the last smaller trigger
            "active": ~counts.bool(),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.clone())

    def parts(self, rows):
        """The raw numbers n,2,3,S,S of the classes at positions `rows`, a list."""
        return torch.stack([self.raw[row] for row in rows])

    @torch.no_grad()
    def advance(self, success, config):
        """Update the state by the success of the triggers after an epoch, K shares."""
        raw = torch.stack(list(self.raw))
        trigger, size = truncated(added(raw)), sizes(raw)
        pixels = changed_pixels(trigger).to(size)
        works = self.active & (success >= config.goal)
        taken = works & (size < self.size) & (pixels < self.pixels)
        shown = taken | (self.active & self.pixels.isinf())
        self.best = torch.where(shown[:, None, None, None], trigger, self.best)
        self.success = torch.where(taken, success, self.success)
        self.size = torch.where(taken, size, self.size)
        self.pixels = torch.where(taken, pixels, self.pixels)
        for row in taken.nonzero().flatten().tolist():
            self.raw[row].copy_(torch.stack([trigger[row], -trigger[row]]).clamp(min=0))
        self.above = torch.where(works, self.above + 1, 0)
        self.below = torch.where(works, 0, self.below + 1)
        up, down = self.above == PATIENCE, self.below == PATIENCE
        fallen = torch.where(down, self.penalty / DOWN, self.penalty)
        self.penalty = torch.where(up, self.penalty * UP, fallen)
        self.above, self.below = self.above.masked_fill(up, 0), self.below.masked_fill(down, 0)
        self.stale = torch.where(taken | self.pixels.isinf(), 0, self.stale + 1)
        self.active = self.active & (self.stale < config.stale)


def added(raw):
    """The trigger n,3,S,S in [-1, 1] of raw numbers n,2,3,S,S."""
    return raw[:, 0].clamp(0, 1) - raw[:, 1].clamp(0, 1)


def sizes(raw):
    """The penalised size n: over the pixels, the largest channel of (1 + tanh(p / 10)) / 2, of both
    parts."""
    return (raw.div(10).tanh() / 2 + 0.5).amax(2).sum((1, 2, 3))


def truncated(trigger):
    """The trigger n,3,S,S without the pixels that change by less than 1/255 in every channel."""
    return trigger * (trigger.abs() >= SMALLEST).any(1, keepdim=True)


def changed_pixels(trigger):
    """How many pixels each trigger n,3,S,S changes by at least 1/255 in a channel; int64 n."""
    return (trigger.abs() >= SMALLEST).any(1).sum((1, 2))


def train(model, split, state, rows, optimizer, epoch, config):
    """One epoch on the images for the triggers at positions `rows`."""
    device, positions, classes = split.labels.device, rows.tolist(), state.classes[rows]
    generator = seeds.generator("pixel batches", config.random_seed, epoch, device=device)
    most = (config.search_batch + 1) * len(positions)
    passes = Passes(gradient_batch(model, split.images, most))
    for images, labels, _ in batches(split, config.search_batch, generator=generator):
        other = (labels[:, None] != classes).float()  # n,k
        weight = other / other.sum(0).clamp(min=1)

        def add_gradients(size, images=images, weight=weight):
            optimizer.zero_grad(set_to_none=True)
            (state.penalty[rows] * sizes(state.parts(positions))).sum().backward()
            for some, part in triggers.pass_parts(len(positions), len(images), size):
                with mixed_precision(device, config.precision):
                    logits = outputs(model, images[part], added(state.parts(positions[some])))
                wanted = classes[some].expand(len(logits), -1)
                losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
                (losses.view(wanted.shape) * weight[part, some]).sum().backward()

        passes.run(add_gradients)
        optimizer.step()


@torch.no_grad()
def success_rates(model, split, state, rows, config):
    """Share K of the images of other classes that each truncated trigger at positions `rows` leads
    to its class, else 0."""
    classes = state.classes[rows]
    trigger = truncated(added(state.parts(rows.tolist())))
    other = (split.labels[:, None] != classes).sum(0)

    def count_hits(size):
        hits = torch.zeros_like(classes)
        for images, labels, _ in batches(split, config.search_batch):
            for some, part in triggers.pass_parts(len(classes), len(images), size):
                answers = outputs(model, images[part], trigger[some]).argmax(2)
                wanted = classes[some]
                hits[some] += ((answers == wanted) & (labels[part, None] != wanted)).sum(0)
        return hits

    most = (config.search_batch + 1) * len(classes)
    with mixed_precision(split.labels.device, config.precision):
        hits = halving(count_hits, evaluation_batch(model, split.images, most))
    shares = (hits / other.clamp(min=1)).to(state.success.dtype)
    return torch.zeros_like(state.success).index_copy(0, rows, shares)


def outputs(model, images, trigger):
    """Logits n,k,classes of images n,3,S,S with each of k triggers added, cut to [0, 1]."""
    return triggers.logits_of_each(model, clipped(images[:, None] + trigger))


def chart(trigger, pixels, per_class, names):
    """PNG bytes: the pixels that each trigger changes, and the trigger around grey."""
    titles = [
        f"class {class_title(label, names, 16)}: {count} pixels"
        for label, count in enumerate(pixels.tolist())
    ]
    changed = (trigger.abs() >= SMALLEST).any(1, keepdim=True).float()
    marked = (per_class == per_class.max()).tolist()
    return trigger_chart(changed, 0.5 + trigger / 2, titles, marked)


def main(config):
    run.detect(__name__, config, score)
