"""Neural Cleanse: flag classes that a small patch leads all images to, and unlearn the patch.

Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor
Attacks in Neural Networks", IEEE S&P 2019. For every class the smallest trigger (mask and pattern)
is searched that leads clean images to it. A class whose mask is unusually small is flagged. The
network is fine-tuned on clean images, some of which carry its trigger and keep their label.

    python defense/nc.py --result_file badnet_cifar10

Deviates in when the goal is checked and when a search ends: see docs/defenses/nc.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import FineTuningOptions


@dataclass(frozen=True, kw_only=True)
class Config(FineTuningOptions):
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
    search_epochs: int = option(80, at_least=1)
    """epochs on the clean images, at most, in which the trigger of a class is searched"""
    search_batch: int = option(32, at_least=1, unit="images")
    """images per step of the search"""
    together: int = option(10, identity=False, at_least=1, unit="classes")
    """classes whose triggers are searched at once; changes speed and memory only"""
    search_lr: float = option(0.1, above=0)
    """learning rate of the search"""
    penalty: float = option(1e-3, above=0)
    """lambda, weight of the mask's size, at the start of the search"""
    goal: float = option(0.98, above=0, at_most=1)
    """share of the images that a trigger must lead to its class"""
    threshold: float = option(2.0, at_least=0)
    """anomaly index above which a small trigger is flagged"""
    share: float = option(0.2, above=0, at_most=1)
    """share of the clean images that a flagged trigger is put on"""

    def triggered(self, clean):
        """How many of `clean` images a flagged trigger is put on."""
        return max(1, round(self.share * clean))


if __name__ == "__main__":
    launch(Config)

import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from antidote_bench.utils import files, run, seeds
from antidote_bench.utils.charts import trigger_chart
from antidote_bench.utils.checkpoint import load, save
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.loader import (
    augmentation,
    batches,
    evaluating,
    mixed_precision,
    to_unit,
)
from antidote_bench.utils.repair.layers import frozen
from antidote_bench.utils.train import Recipe, fit

PATIENCE = 5  # epochs in a row above the goal, or below it, after which lambda changes
UP, DOWN = 2.0, 2.0**1.5  # factor and divisor of lambda
GAIN = 0.01  # share by which the smallest mask must shrink to count as a gain
STALE = 25  # epochs without a gain after which a search may end
# makes the median absolute deviation of normal numbers their standard deviation
CONSISTENT = 1.4826
COLUMNS = ["class", "norm", "index", "flagged", "success"]


def repair(model, record, config):
    masks, patterns, success = find_triggers(model, record, config)
    norms = masks.sum((1, 2, 3))
    index, flagged = anomalies(norms, success >= config.goal, config.threshold)
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
    model.to(memory_format=torch.channels_last)
    classes = torch.arange(record.spec.classes, device=record.clean.labels.device)
    with evaluating(model), frozen(model):
        parts = [
            search(model, record.clean, group, config, record.state)
            for group in classes.split(config.together)
        ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def search(model, split, classes, config, folder):
    """(masks K,1,S,S, patterns K,3,S,S, success K) of `classes`, each as if it were alone.

    All searches share the passes through the frozen `model`; one that has ended takes no part in
    the next ones. Where the goal was never reached, the trigger is the last one. The checkpoint is
    in `folder`.
    """
    checkpoint = folder / f"triggers_{classes[0]}_{classes[-1]}.safetensors"
    state = Search(classes, split.images.shape[-1], config)
    optimizer = torch.optim.Adam(
        state.raw.parameters(), config.search_lr, betas=(0.5, 0.9), fused=True
    )
    done = load(checkpoint, state, optimizer)
    title = f"triggers from class {classes[0]}"
    for epoch in tqdm(range(done, config.search_epochs), desc=title, unit=" epochs", disable=None):
        rows = state.active.nonzero().flatten()  # waits for the device, once per epoch
        if not len(rows):
            break
        train_triggers(model, split, state, rows, optimizer, epoch, config)
        state.advance(success_rates(model, split, state, rows, config), config.goal)
        save(checkpoint, state, optimizer, epoch + 1)
    return *unit(state.best), state.success


class Search(nn.Module):
    """The state of the searches for the triggers of some classes (int64 K); checkpoints hold it.

    `raw` has 4,S,S numbers for each class: mask and pattern are (1 + tanh)/2 of them. The buffers
    have length K. `penalty` is lambda, and `active` says which searches go on. `norm`, `best` and
    `success` belong to the smallest mask that has reached the goal. Before one has, the norm is
    infinite, and the others belong to the last mask.
    """

    def __init__(self, classes, size, config):
        super().__init__()
        start = [
            torch.rand(
                4, size, size, generator=seeds.generator("trigger", config.random_seed, label)
            )
            for label in classes.tolist()
        ]
        start = (2 * torch.stack(start).to(classes.device).clamp(0.01, 0.99) - 1).atanh()  # K,4,S,S
        self.raw = nn.ParameterList(start.unbind())
        zeros = torch.zeros(len(classes), device=classes.device)
        counts = torch.zeros_like(classes)
        buffers = {
            "classes": classes,
            "best": start,
            "success": zeros,
            "penalty": zeros + config.penalty,
            "norm": zeros + torch.inf,
            "last_gain": zeros + torch.inf,  # the norm at the last gain
            "above": counts,  # epochs in a row above the goal
            "below": counts,
            "stale": counts,  # epochs since the last gain
            "has_risen": counts.bool(),  # lambda has
            "has_fallen": counts.bool(),
            "active": ~counts.bool(),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value.clone())

    def triggers(self, rows):
        """(masks n,1,S,S, patterns n,3,S,S) of the classes at positions `rows`, a list."""
        return unit(torch.stack([self.raw[row] for row in rows]))

    @torch.no_grad()
    def advance(self, success, goal):
        """Update the state by the success of the triggers after an epoch, K shares.

        Keeps the smallest masks that work, changes lambda, and ends searches.
        """
        raw = torch.stack(list(self.raw))
        works, norm = self.active & (success >= goal), unit(raw)[0].sum((1, 2, 3))
        taken = torch.where(works, norm < self.norm, self.active & self.norm.isinf())
        self.best = torch.where(taken[:, None, None, None], raw, self.best)
        self.success = torch.where(taken, success, self.success)
        self.norm = torch.where(taken & works, norm, self.norm)
        self.schedule(works)

    def schedule(self, works):
        """Change lambda by which triggers (bool K) reach the goal, and end searches without gain.

        A search ends once its lambda has both risen and fallen.
        """
        self.above = torch.where(works, self.above + 1, 0)
        self.below = torch.where(works, 0, self.below + 1)
        up, down = self.above == PATIENCE, self.below == PATIENCE
        fallen = torch.where(down, self.penalty / DOWN, self.penalty)
        self.penalty = torch.where(up, self.penalty * UP, fallen)
        self.above, self.below = self.above.masked_fill(up, 0), self.below.masked_fill(down, 0)
        self.has_risen, self.has_fallen = self.has_risen | up, self.has_fallen | down
        gained = self.norm < (1 - GAIN) * self.last_gain
        self.last_gain = torch.where(gained, self.norm, self.last_gain)
        self.stale = torch.where(gained | self.norm.isinf(), 0, self.stale + 1)
        self.active = self.active & ~(self.has_risen & self.has_fallen & (self.stale >= STALE))


def train_triggers(model, split, state, rows, optimizer, epoch, config):
    """One epoch on the images for the triggers at positions `rows`."""
    device, positions, classes = split.labels.device, rows.tolist(), state.classes[rows]
    generator = seeds.generator("trigger batches", config.random_seed, epoch, device=device)
    for images, _, _ in batches(split, config.search_batch, generator=generator):
        masks, patterns = state.triggers(positions)
        with mixed_precision(device, config.precision):
            logits = outputs(model, images, masks, patterns).flatten(0, 1)
            targets = classes.expand(len(images), -1)
            losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
            loss = losses.view(targets.shape).mean(0)
        optimizer.zero_grad(set_to_none=True)  # Adam leaves alone what gets no gradient
        (loss + state.penalty[rows] * masks.sum((1, 2, 3))).sum().backward()
        optimizer.step()


@torch.no_grad()
def success_rates(model, split, state, rows, config):
    """Share K of all images that each trigger at positions `rows` leads to its class, else 0."""
    (masks, patterns), classes, hits = state.triggers(rows.tolist()), state.classes[rows], 0
    with mixed_precision(split.labels.device, config.precision):
        for images, _, _ in batches(split, config.search_batch):
            hits = hits + (outputs(model, images, masks, patterns).argmax(2) == classes).sum(0)
    shares = (hits / len(split)).to(state.success.dtype)
    return torch.zeros_like(state.success).index_copy(0, rows, shares)


def outputs(model, images, masks, patterns):
    """Logits n,K,classes of images n,3,S,S with each of K triggers."""
    triggered = add_trigger(images[:, None], masks, patterns)  # n,K,3,S,S
    logits = model(triggered.flatten(0, 1).contiguous(memory_format=torch.channels_last))
    return logits.unflatten(0, triggered.shape[:2])


def add_trigger(images, mask, pattern):
    """(1 - m) x + m pattern, for images, masks and patterns in [0, 1] that broadcast."""
    return images + mask * (pattern - images)


def unit(raw):
    """(mask n,1,S,S, pattern n,3,S,S) in [0, 1] of raw numbers n,4,S,S."""
    return (raw.tanh() / 2 + 0.5).split((1, 3), 1)


def anomalies(norms, works, threshold):
    """(anomaly index, flagged) of K classes by the sizes of their masks.

    The index is the distance from the median in units of the median absolute deviation. Where that
    is zero, the index of every class that is not at the median is infinite. Flagged is a trigger
    that `works`, that is, reached the goal, with an index above `threshold` and a size below the
    median.
    """
    norms = norms.double()
    away = norms - norms.quantile(0.5)
    index = away.abs() / (CONSISTENT * away.abs().quantile(0.5))
    index = index.nan_to_num(0.0, posinf=torch.inf)  # 0 / 0 is at the median
    return index, works & (index > threshold) & (away < 0)


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
    titles = [f"class {row['class']}: norm {float(row['norm']):.1f}" for row in rows]
    on_grey = add_trigger(torch.full_like(patterns, 0.5), masks, patterns)
    record.keep("triggers.png", trigger_chart(masks, on_grey, titles, flagged.tolist()))


def with_triggered(clean, masks, patterns, targets, config):
    """The clean images, and copies of some of them with the trigger of each class in `targets`.

    The copies keep their true labels. Every trigger gets images of its own.
    """
    parts = [clean]
    for target in targets:
        generator = seeds.generator("stamped images", config.random_seed, target)
        order = torch.randperm(len(clean), generator=generator)
        part = clean[order[: config.triggered(len(clean))].to(clean.labels.device)]
        images = add_trigger(to_unit(part.images), masks[target], patterns[target])
        parts.append(Split((images * 255).round().to(torch.uint8), part.truth, part.truth))
    joined = [
        torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "truth")
    ]
    return Split(*joined)


def main(config):
    run.defend(__name__, config, repair)
