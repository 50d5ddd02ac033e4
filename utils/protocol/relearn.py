"""How quickly a model learns a backdoor again: a measure of what a repair has left of it.

A copy of the model is fine-tuned on a few clean training images, of which five are poisoned, and
its ASR is measured again. A model that never had the backdoor learns little from them, and one
whose backdoor was only silenced learns it back. Min, Qin, Zhang, Shen, Cheng, "Uncovering,
Explaining, and Mitigating the Superficial Safety of Backdoor Defense", NeurIPS 2024 (arXiv
2410.09838). The evaluator does this with poisoned images that no defense sees as such.
"""

import copy
import dataclasses
import statistics
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch

from antidote_bench.utils import seeds
from antidote_bench.utils.config import FromScratch
from antidote_bench.utils.data.clean import choose
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.defaults import PUBLISHED_LR, rates_for
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.evaluation import Evaluator
from antidote_bench.utils.record.contents import POISON
from antidote_bench.utils.repair.options import FineTuningOptions
from antidote_bench.utils.train import Recipe, augmentation_of, fit, trainable

SHARE, PER_CLASS = 0.02, 10  # of the training set, and at least so many images of every class
EPOCHS = 5
BATCH, IMAGES = 128, 1000  # published; fewer images make smaller batches, and as many steps
REPEATS = 3  # seeds, each with its own images
FROM_TRAINING, FROM_TESTS = "training", "test"  # where the poisoned images are from


class Lesson(NamedTuple):
    """What a model is fine-tuned on, and what it is measured on then."""

    split: Split
    test_sets: object  # evaluation.TestSets, without what is in `split`
    source: str  # FROM_TRAINING or FROM_TESTS


def relearn(model, loaded, made, held, config, log, state):
    """{column: value} of the measure of `model`, which stays as it is.

    `loaded` is the victim's record, `made` the options of its attack, and `held` the positions of
    the clean images that the defender had. `state` is the folder for checkpoints. Raises
    ConfigError (exit 2) where the model has nothing to train, or the record has too few poisoned
    images.
    """
    if not trainable(model):
        raise ConfigError("the model has no parameter that could be trained")
    measured = []
    for seed in range(config.random_seed, config.random_seed + REPEATS):
        lesson = lesson_of(loaded, held, config.poisons, seed)
        evaluator = Evaluator(lesson.test_sets, config, log)
        recipe = recipe_of(config, made, len(lesson.split), seed)
        student = fit(
            copy.deepcopy(model),
            lesson.split,
            recipe,
            augment=augmentation_of(training_options(made, seed), loaded.spec, lesson.split),
            on_epoch=partial(evaluator.measure, f"seed {seed}"),
            checkpoint=state / f"seed_{seed}.safetensors",
        )
        measured.append(evaluator.measure(f"seed {seed}, after", student))
    rates = [each["asr"] for each in measured]
    known = None not in rates
    return {
        "acc_relearn": statistics.fmean(each["acc"] for each in measured),
        "asr_relearn": statistics.fmean(rates) if known else None,
        "asr_relearn_std": statistics.stdev(rates) if known else None,
        "poisons": config.poisons,
        "poisons_from": lesson.source if config.poisons else "",
        "n_images": len(lesson.split),
        "lr": recipe.lr,
        "repeats": REPEATS,
        "relearn_seed": config.random_seed,
    }


def recipe_of(config, made, count, seed):
    """Plain SGD at a constant rate on `count` images, for a victim with the options `made`.

    The rate is 0.01 with batches of 128 for a victim that was trained so, and in proportion to the
    victim's own rate per image otherwise, as that of fine-tuning defenses is.
    """
    batch = min(BATCH, round(count * BATCH / IMAGES))
    rate = rates_for(FineTuningOptions, made).get("lr", PUBLISHED_LR)
    rate = float(f"{rate * batch / BATCH:.3g}")
    return Recipe(
        epochs=EPOCHS,
        batch_size=batch,
        lr=rate,
        lr_min=rate,
        momentum=0.9,
        weight_decay=0.0,
        random_seed=seed,
        precision=config.precision,
    )


def training_options(made, seed):
    """The victim's own options of augmentation; older records lack some, which have a default."""
    usual = {field.name: field.default for field in dataclasses.fields(FromScratch)}
    return SimpleNamespace(**(usual | made | {"random_seed": seed}))


def held_clean(row, options, labels):
    """The positions of the clean training images that a defense had.

    `row` and `options` are the text of its results.csv and the content of its config.yaml, and
    `labels` those of the clean training set.
    """
    count = int(row["clean_budget"] or 0)
    if not count or options.get("clean_from"):
        return torch.zeros(0).long()
    each, seed = options.get("clean_per_class"), int(row["data_seed"])
    return choose(labels, count, SimpleNamespace(clean_per_class=each, data_seed=seed)).cpu()


def lesson_of(loaded, held, poisons, seed):
    """The `Lesson` with so many poisoned images.

    Its clean images are of the training set, those at the positions `held` and what the attack has
    changed left out, with the classes in equal numbers and their true labels. The poisoned ones
    take the place of as many of them. They are poisoned training images; where the record has none
    with a trigger they are triggered test images, which are not in the test set then.
    """
    free = (loaded.kinds.cpu() == 0).index_fill(0, held.cpu(), False)
    truth, device = loaded.clean.truth.cpu(), loaded.clean.labels.device
    count = max(round(SHARE * len(truth)), PER_CLASS * loaded.spec.classes)
    index = in_turns(truth, free, "relearn: clean images", seed)[poisons:count]
    taken, test_sets, source = _poisoned(loaded, poisons, seed)
    parts = [taken, loaded.clean[index.to(device)]]
    images, labels = (
        torch.cat([getattr(part, name)[:] for part in parts]) for name in ("images", "labels")
    )
    return Lesson(Split(images, labels, labels), test_sets, source)


def _poisoned(loaded, count, seed):
    """(`count` poisoned images with the attacker's labels, the test sets without them, source)"""
    tests, source = loaded.test_sets, FROM_TRAINING
    there, shown = poisoned(loaded), loaded.train
    if not there.any():
        source, shown = FROM_TESTS, tests.backdoor
        there = torch.ones(len(shown), dtype=torch.bool)
    order = in_turns(shown.labels.cpu(), there, "relearn: poisoned images", seed)
    if len(order) < count:
        raise ConfigError(
            f"poisons must be at most {len(order)}, as many as the record has, and is {count}"
        )
    device = shown.labels.device
    taken, left = shown[order[:count].to(device)], order[count:].sort().values
    if source == FROM_TESTS:
        tests = tests._replace(backdoor=tests.backdoor[left.to(device)])
    return taken, tests, source


def poisoned(loaded):
    """Which training images bear the trigger, bool N, and of these only the ones with another
    label than their class where there are any."""
    found = torch.zeros(len(loaded.kinds), dtype=torch.bool)
    index = (loaded.kinds == POISON).nonzero().flatten()
    if not len(index):
        return found
    shown, clean = loaded.train[index], loaded.clean[index]
    triggered = (shown.images != clean.images).flatten(1).any(1)
    relabelled = triggered & (shown.labels != clean.truth)
    return found.index_fill(0, index[relabelled if relabelled.any() else triggered].cpu(), True)


def in_turns(labels, among, purpose, seed):
    """The positions that are true in `among`, bool N, in an order in which the `labels` take turns.

    `purpose` and `seed` draw it. Few positions more or less in `among` move the others little.
    """
    order = torch.randperm(len(labels), generator=seeds.generator(purpose, seed))
    order = order[among[order]]
    turn = torch.zeros_like(order)
    for label in labels[order].unique():
        members = (labels[order] == label).nonzero().flatten()
        turn[members] = torch.arange(len(members))
    return order[turn.argsort(stable=True)]
