"""Fine-Pruning: prune the units that are inactive on clean images, and then fine-tune.

Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
Networks", RAID 2018 (arXiv 1805.12185). The inputs of the last linear layer are ranked by their
mean activation on clean images, and pruned in steps of 1 %, the least active first, until the
accuracy on held-out images falls below (1 - tolerance) of the victim's. The last state before that
is fine-tuned as in defense/ft.py, and pruned units stay pruned.

    python defense/fp.py --result_file badnet_cifar10

Deviates in which units are ranked: those after the network's pooling; see docs/defenses/fp.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import FineTuningOptions, SelectionOptions


@dataclass(frozen=True, kw_only=True)
class Config(FineTuningOptions, SelectionOptions):
    adds: ClassVar[dict[str, str]] = {
        "activations.safetensors": "the `mean` activation of the last linear layer's inputs, and "
        "which were `pruned`",
        "choice.csv": "the numbers of pruned units that were measured, and which one was taken",
    }

    batch_size: int = 256
    """images per step"""


if __name__ == "__main__":
    launch(Config)

import copy
import sys
from functools import partial

import torch

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import augmentation
from antidote_bench.utils.features import last_features, last_linear
from antidote_bench.utils.repair import selection
from antidote_bench.utils.train import Recipe, fit

STEPS = 100  # of 1 % of the units each


def check(model, record, config):
    last_linear(model)


def repair(model, record, config):
    work, held_out = selection.hold_out(record.clean, config)
    mean = last_features(model, work, config.precision).mean(0)
    order = mean.argsort(stable=True)
    count = choose_count(model, order, held_out, record, config)
    pruned = first_units(order, count)
    record.keep("activations.safetensors", {"mean": mean, "pruned": pruned})
    print(f"pruning {count} of {len(order)} units", file=sys.stderr)
    prune = make_pruner(last_linear(model), pruned)
    prune()
    record.report("pruned", model)
    return fit(
        model,
        record.clean,
        Recipe.of(config),
        augment=augmentation(record.spec),
        after_step=prune,
        on_epoch=partial(record.report, "finetune"),
        checkpoint=record.state / "finetune.safetensors",
    )


def choose_count(model, order, held_out, record, config):
    """How many units, first in `order`, can go before one step more costs too much accuracy."""
    counts = sorted({step * len(order) // STEPS for step in range(STEPS + 1)})
    if config.selection == "oracle":
        accuracies = test_accuracies(model, order, counts, record)
    else:
        features = last_features(model, held_out, config.precision)
        accuracies = pruned_accuracies(last_linear(model), features, held_out.truth, order, counts)
    rows = []
    for count, accuracy in zip(counts, accuracies, strict=True):
        rows.append({"setting": count, "acc": accuracy})
        if not selection.allows(accuracy, rows[0]["acc"], config):
            break
        allowed = count
    selection.save_choices(rows, allowed, record)
    return allowed


@torch.no_grad()
def pruned_accuracies(linear, features, truth, order, counts):
    """Accuracies of `linear` on features N,D without the first units of `order`.

    There is one for each of the rising `counts` of units, which begin with 0. No forward pass is
    needed: every step subtracts from all logits what the units of that step have added.
    """
    # float64, because the differences add up
    features, weight = features[:, order].double(), linear.weight[:, order].double()
    logits = features @ weight.T + (0 if linear.bias is None else linear.bias.double())
    accuracies = []
    for begin, end in zip([0, *counts], counts, strict=False):
        logits -= features[:, begin:end] @ weight[:, begin:end].T
        accuracies.append((logits.argmax(1) == truth).double().mean())
    return torch.stack(accuracies).tolist()


def test_accuracies(model, order, counts, record):
    """The accuracies on the test set, as the evaluator measures them, one by one."""
    candidate = copy.deepcopy(model)
    for count in counts:
        make_pruner(last_linear(candidate), first_units(order, count))()
        yield record.measure(candidate)["acc"]


def first_units(order, count):
    """Which units, bool D, are among the first `count` of `order`."""
    return torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:count], True)


def make_pruner(linear, pruned):
    """A function that sets the weights of the units `pruned` (bool D) to zero."""

    @torch.no_grad()
    def prune():
        linear.weight.masked_fill_(pruned, 0)

    return prune


def main(config):
    run.defend(__name__, config, repair, check=check)
