"""FeatureRE: a change of the images whose features, few of them and nearly alike, decide the class.

Wang, Mei, Ding, Zhai, Ma, "Rethinking the Reverse-engineering of Trojan Triggers", NeurIPS 2022.
For every class a network that changes images and a mask of the features are trained: the changed
images' features inside the mask, put in place of those of clean images, shall lead to the class,
although they are unlike those of the class. The score is how far the best class gets.

    python detection/featurere.py --result_file badnet_cifar10

Deviates in the network, in units and in the length; see docs/detection/featurere.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import ModelOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every class the `value` V of its best epoch and what it is "
        "made of: the `cosine`, the `success`, the `change` of the images, the `share` of the "
        "features in the mask and their `spread`; and the `mask` of the class with the least value",
        "triggers.png": "some clean images, and what the network of that class makes of them",
    }

    images: int = option(100, at_least=2, unit="images")
    """clean images that are used, at most"""
    blocks: int = option(1, at_least=0)
    """blocks of the model behind the features; 0: the features are the input of its last linear
    layer"""
    warmup_epochs: int = option(100, at_least=1)
    """epochs in which the network alone leads the images to the class"""
    search_epochs: int = option(100, at_least=1)
    """epochs after these, in which the network and the mask are searched"""
    search_batch: int = option(32, at_least=2, unit="images")
    """images per step"""
    generator_lr: float = option(1e-3, above=0)
    """learning rate of the network that changes images"""
    generator_width: int = option(8, at_least=1, unit="channels")
    """channels of that network's first level"""
    mask_lr: float = option(0.1, above=0)
    """learning rate of the mask"""
    change_bound: float = option(0.15, above=0)
    """mean squared change of the images, in units of their standard deviation, above which it is
    made smaller"""
    mask_bound: float = option(0.03, above=0, at_most=1)
    """share of the features in the mask above which it is made smaller"""
    spread_bound: float = option(1.0, above=0)
    """deviation of the masked features over the changed images, in units of that of the clean
    images' features, above which it is made smaller"""
    goal: float = option(0.9, above=0, at_most=1)
    """share of the images that shall go to the class"""
    limit: float = option(-0.75)
    """value V below which the paper's own rule takes a class for a target"""


if __name__ == "__main__":
    launch(Config)

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from antidote_bench.models.split import split as split_model
from antidote_bench.utils import run, seeds
from antidote_bench.utils.charts import preview
from antidote_bench.utils.checkpoint import load, save
from antidote_bench.utils.data.dataset import Split, balanced_subset
from antidote_bench.utils.data.loader import Passes, batches, forward_all, gradient_batch, to_unit
from antidote_bench.utils.decoupling.generator import UNet
from antidote_bench.utils.detection import soundness
from antidote_bench.utils.detection.inspector import Finding
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.features import features_of, last_linear

SHOWN = 8  # images in triggers.png
SAVED = 10  # epochs between checkpoints
COSINE, WARMUP, PENALTY = 5, 100, 10  # weights of terms of the losses


class Parts(NamedTuple):
    """The model in two parts, and what is known of the clean images at the place between them."""

    stem: object  # images n,3,S,S to features n,...
    head: object  # features to logits
    features: torch.Tensor  # of the clean images
    deviation: torch.Tensor  # mean over the features of their standard deviation
    pixels: torch.Tensor  # standard deviation of the pixels of the data set, 3,1,1


class Measures(NamedTuple):
    """What is measured of changed images; scalars."""

    cosine: torch.Tensor  # of the mean features of the changed images and of the class
    success: torch.Tensor  # share that the mixed features lead to the class
    change: torch.Tensor  # mean squared change of the images
    share: torch.Tensor  # of the features in the mask
    spread: torch.Tensor  # deviation of the masked features
    loss: torch.Tensor  # cross-entropy of the mixed features

    def excess(self, config):
        """By how much each bound is passed, as a share of it: of the change, share and spread, and
        by how much the goal is missed."""
        return (
            excess(self.change, config.change_bound),
            excess(self.share, config.mask_bound),
            excess(self.spread, config.spread_bound),
            (config.goal - self.success).clamp(min=0) / config.goal,
        )

    def value(self, config):
        """V; the lower, the more like a backdoor."""
        return self.cosine - self.success + sum(self.excess(config)[:3])


def score(model, record, config):
    why = soundness.reason(model, record, config, least=2)
    if why:
        return soundness.abstained(record, why)
    split, classes = some_images(record.reference, config), record.spec.classes
    counts = split.labels.bincount(minlength=classes)
    if not counts.all():
        missing = int((counts == 0).nonzero()[0])
        return soundness.abstained(record, f"there is no clean image of class {missing}")
    try:
        parts = parts_of(model, split, record, config)
    except ConfigError as error:
        return soundness.abstained(record, f"{error}; --blocks 0 asks for no such split")
    found = [invert(parts, model, split, label, record, config) for label in range(classes)]
    values = torch.stack([state.value for state in found]).double().cpu()
    best = found[int(values.argmin())]
    save_images(record, model, split, best)
    kept = {name: torch.stack([getattr(state, name) for state in found]) for name in KEPT}
    suspects = (values < config.limit).nonzero().flatten().tolist()
    return Finding(
        -float(values.min()),
        -values,
        suspects,
        published=bool(suspects),
        evidence={"value": values, "mask": best.best_mask, **kept},
    )


def some_images(split, config):
    """At most as many images as the search takes, the same number of every class."""
    if len(split) <= config.images:
        return split
    seed = seeds.number("featurere images", config.data_seed)
    chosen = balanced_subset(split.truth.cpu(), config.images, seed)
    return split[torch.as_tensor(chosen).to(split.labels.device)]


def parts_of(model, split, record, config):
    """The `Parts`; ConfigError where the model cannot be taken apart there."""
    if config.blocks:
        stem, head = split_model(record.model, model, config.blocks, record.spec.size)
    else:
        stem, head = (lambda images: features_of(model, images)), last_linear(model)
    features = forward_all(model, split, lambda images, *_: stem(images)).clone()
    deviation = features.std(0, correction=0).mean()
    pixels = torch.tensor(record.spec.std, device=split.labels.device).view(3, 1, 1)
    tiny = torch.finfo(features.dtype).tiny
    return Parts(stem, head, features, deviation.clamp(min=tiny), pixels)


# The search for one class

KEPT = ("cosine", "success", "change", "share", "spread")


class Inversion(nn.Module):
    """The state of the search for one class; checkpoints hold it.

    The mask, of the shape of the features, is (1 + tanh)/2 of `raw`. `best`, `best_mask`, `value`
    and the measures KEPT are those of the epoch with the least value.
    """

    def __init__(self, width, shape, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = UNet(width)
        self.best = copy.deepcopy(self.generator).requires_grad_(False)
        self.raw = nn.Parameter(torch.ones(shape))
        self.register_buffer("best_mask", self.mask().detach().clone())
        self.register_buffer("value", torch.tensor(torch.inf))
        self.register_buffer("excess", torch.zeros(4))  # at the end of the last epoch
        for name in KEPT:
            self.register_buffer(name, torch.tensor(0.0))

    def mask(self):
        return self.raw.tanh() / 2 + 0.5

    @torch.no_grad()
    def advance(self, measures, config):
        """Keep the network and the mask where their value is the least so far."""
        value = measures.value(config)
        self.excess.copy_(torch.stack(measures.excess(config)))
        if value < self.value:
            self.value.copy_(value)
            self.best.load_state_dict(self.generator.state_dict())
            self.best_mask.copy_(self.mask())
            for name in KEPT:
                getattr(self, name).copy_(getattr(measures, name))


def invert(parts, model, split, label, record, config):
    """The `Inversion` of a class, searched on the images of the others."""
    rows = (split.labels != label).nonzero().flatten()
    others, wanted = split[rows], parts.features[split.labels == label].mean(0)
    seed = seeds.number("featurere generator", config.random_seed, label)
    state = Inversion(config.generator_width, wanted.shape, seed).to(rows.device)
    groups = [
        {"params": list(state.generator.parameters()), "lr": config.generator_lr},
        {"params": [state.raw], "lr": config.mask_lr},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.5, 0.9))
    path = record.state / f"class_{label}.safetensors"
    done, last = load(path, state, optimizer), config.warmup_epochs + config.search_epochs
    passes = Passes(gradient_batch(model, split.images, config.search_batch + 1))
    for epoch in tqdm(range(done, last), desc=f"class {label}", unit=" epochs", disable=None):
        draws = seeds.generator(
            "featurere batches", config.random_seed, label, epoch, device=rows.device
        )
        for images, _, _ in batches(others, config.search_batch, generator=draws):
            if epoch < config.warmup_epochs:
                warm_up(parts, state, images, label, optimizer, passes, config)
            else:
                partners = partners_of(parts, len(images), draws)
                search(parts, state, images, partners, wanted, label, optimizer, passes, config)
        if epoch >= config.warmup_epochs:
            state.advance(
                at_rest(parts, state, others, wanted, label, draws, passes, config), config
            )
        if (epoch + 1) % SAVED == 0 or epoch + 1 == last:
            save(path, state, optimizer, epoch + 1)
    return state


def partners_of(parts, count, draws):
    """The features of `count` clean images, drawn at random."""
    size = len(parts.features)
    return parts.features[torch.randint(size, (count,), generator=draws, device=draws.device)]


def warm_up(parts, state, images, label, optimizer, passes, config):
    """A step of the network alone: the whole features of the changed images lead to the class."""

    def loss(changed, features):
        distance = distance_of(parts, images, changed)
        wanted = torch.full((len(images),), label, device=images.device)
        penalty = beyond(distance, distance > config.change_bound)
        return F.cross_entropy(parts.head(features), wanted) + WARMUP * penalty

    backward(parts, state, images, loss, optimizer, passes)
    optimizer.step()


def search(parts, state, images, partners, wanted, label, optimizer, passes, config):
    """A step of the network, and one of the mask with the same features."""
    mask = state.mask().detach()
    too_far, _, too_wide, missed = state.excess.unbind()

    def loss(changed, features):
        found = measures_of(parts, images, changed, features, partners, mask, wanted, label)
        spread = beyond(found.spread, found.spread > config.spread_bound)
        change = beyond(found.change, found.change > config.change_bound)
        misses = beyond(found.loss, found.success < config.goal)
        return (
            COSINE * found.cosine.clamp(min=0)
            + PENALTY * (1 + too_wide) * spread
            + PENALTY * (1 + too_far) * change
            + (1 + missed) * misses
        )

    changed, features = backward(parts, state, images, loss, optimizer, passes)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mask = state.mask()
    found = measures_of(parts, images, changed, features, partners, mask, wanted, label)
    total = found.loss + beyond(mask.sum(), found.share > config.mask_bound)
    (state.raw.grad,) = torch.autograd.grad(total, state.raw)
    optimizer.step()


def backward(parts, state, images, loss, optimizer, passes):
    """(changed images, their features), detached; the network gets its gradients of
    loss(changed images, features).

    The loss is one of the whole batch. Where a pass takes fewer images, their part of its gradient
    is carried through the model again.
    """

    def both(some):
        changed = state.generator(some)
        return changed, parts.stem(changed)

    def work(size):
        optimizer.zero_grad(set_to_none=True)  # Adam leaves alone what gets no gradient
        if len(images) <= size:
            found = both(images)
            loss(*found).backward()
            return tuple(value.detach() for value in found)
        with torch.no_grad():
            found = [both(some) for some in images.split(size)]
        leaves = [torch.cat(values).requires_grad_() for values in zip(*found, strict=True)]
        slopes = torch.autograd.grad(
            loss(*leaves), leaves, allow_unused=True, materialize_grads=True
        )
        slopes = zip(*(slope.split(size) for slope in slopes), strict=True)
        for some, slope in zip(images.split(size), slopes, strict=True):
            torch.autograd.backward(both(some), slope)
        return tuple(leaf.detach() for leaf in leaves)

    return passes.run(work)


@torch.no_grad()
def at_rest(parts, state, others, wanted, label, draws, passes, config):
    """The `Measures` over all images of the other classes."""

    def work(size):
        found = []
        for images, _, _ in batches(others, size):
            changed = state.generator(images)
            found.append((images, changed, parts.stem(changed)))
        return tuple(torch.cat(values) for values in zip(*found, strict=True))

    images, changed, features = passes.run(work)
    partners = partners_of(parts, len(images), draws)
    mask = state.mask()
    return measures_of(parts, images, changed, features, partners, mask, wanted, label)


def measures_of(parts, images, changed, features, partners, mask, wanted, label):
    """The `Measures` of changed images n,3,S,S and their features n,...

    `partners` n,... are features of clean images, into which those of the mask are put. `wanted` is
    the mean feature of the class.
    """
    masked = mask * features
    logits = parts.head(masked + (1 - mask) * partners)
    labels = torch.full((len(logits),), label, device=logits.device)
    spread = masked.std(0, correction=0).sum() / mask.sum() / parts.deviation
    return Measures(
        F.cosine_similarity(features.mean(0).flatten(), wanted.flatten(), 0),
        (logits.argmax(1) == label).to(logits.dtype).mean(),
        distance_of(parts, images, changed),
        mask.mean(),
        spread,
        F.cross_entropy(logits, labels),
    )


def distance_of(parts, images, changed):
    """The mean squared change of the images, in units of the pixels' standard deviation."""
    return ((changed - images) / parts.pixels).square().mean()


def beyond(value, is_beyond):
    """A term of a loss that counts only where a bound is passed, told without waiting for a GPU."""
    return torch.where(is_beyond, value, torch.zeros_like(value))


def excess(value, bound):
    """By how much a value passes a bound, as a share of it."""
    return (value - bound).clamp(min=0) / bound


@torch.no_grad()
def save_images(record, model, split, state):
    shown = to_unit(split.images[: min(SHOWN, len(split))])
    changed = state.best(shown)
    truth = split.truth[: len(shown)]
    pair = (
        Split((images * 255).round().to(torch.uint8), model(images).argmax(1), truth)
        for images in (shown, changed)
    )
    record.keep("triggers.png", preview(*pair, ("clean", "changed"), record.spec.class_names))


def main(config):
    run.detect(__name__, config, score)
