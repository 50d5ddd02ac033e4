"""Which channels a defense has cut, and which ones carry the backdoor: precision, recall and lift.

The evaluator looks for the channels that carry a backdoor with pairs of test images, clean and
triggered, which no defense sees. In each layer it ranks the channels by how strongly the trigger
moves them, and switches them off in this order until the backdoor is gone.
"""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from antidote_bench.utils import checkpoint
from antidote_bench.utils.channels import (
    layers_of_channels,
    paired_norms,
    trigger_activation_change,
)
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.evaluation import TestSets, evaluate
from antidote_bench.utils.record import folder as layout

PAIRS = 512  # of images, on which the channels are ranked
JUDGED = 512  # further triggered images, and clean ones, on which ASR and ACC are measured
GONE, COST = 0.2, 0.05  # the ASR falls to this share of what it was, and the ACC by less than this
FILES = "mask.safetensors", "scores.safetensors"  # in which defenses keep what they have pruned
LAYERS, NETWORK = "layers", "network"  # where the channels were looked for
HALF = 0.5  # a factor below it counts as pruned


class Truth(NamedTuple):
    """What is known of the backdoor in a victim."""

    change: dict  # {layer: TAC, float64 C}
    carries: dict  # {layer: bool C} of the layers of which that is known
    test_sets: TestSets  # on which it was measured
    kind: str  # LAYERS, NETWORK, or empty where nothing is known


class Cut(NamedTuple):
    """What a defense has pruned."""

    where: dict  # {layer of the victim: bool C}
    unpaired: int  # channels of convolutions that no layer of the victim stands for


def measures(model, cut, truth):
    """{column: value} of a `Cut` in the victim `model`, whose `Truth` is known.

    What was pruned in layers of which nothing is known does not count.
    """
    carries = truth.carries
    pruned = {name: cut.where.get(name, torch.zeros_like(there)) for name, there in carries.items()}
    hits = {name: pruned[name] & there for name, there in carries.items()}
    misses = {name: pruned[name] & ~there for name, there in carries.items()}
    n_cut, n_truth, n_hits = map(count, (pruned, carries, hits))
    found = {
        "truth": truth.kind,
        "n_channels": sum(map(len, carries.values())),
        "n_cut": n_cut,
        "n_unjudged": count(cut.where) + cut.unpaired - n_cut,
        "n_truth": n_truth,
    }
    if not n_truth:
        return found
    layers = [
        (len(part), count({name: part}), count({name: pruned[name]}))
        for name, part in carries.items()
    ]
    chance = sum(carrying * cut_there / size for size, carrying, cut_there in layers)
    return found | {
        "n_hits": n_hits,
        "n_chance": chance,
        "cut_precision": n_hits / n_cut if n_cut else None,
        "cut_recall": n_hits / n_truth,
        "cut_lift": n_hits / chance if chance else None,
        "cut_p": chance_of(layers, n_hits),
        "asr_hits": _measured(model, hits, truth.test_sets)["asr"],
        "asr_misses": _measured(model, misses, truth.test_sets)["asr"],
    }


def count(where):
    """The number of channels in {layer: bool C}."""
    return sum(int(part.sum()) for part in where.values())


def chance_of(layers, hits):
    """The probability of so many hits or more, where each layer's cut channels are drawn at random.

    `layers` are (channels, those that carry the backdoor, those that are cut).
    """
    from scipy.stats import hypergeom

    total = np.ones(1)
    for size, carrying, cut in layers:
        total = np.convolve(total, hypergeom.pmf(np.arange(cut + 1), size, carrying, cut))
    return float(min(total[hits:].sum(), 1.0))


# ---------- what carries the backdoor ----------


def find_truth(model, loaded):
    """The `Truth` of the victim `model` of a record.

    It is looked for in every layer by itself. A backdoor that goes round each of them, through the
    shortcuts of a residual network, is looked for in all layers together. Raises ConfigError (exit
    2) where the model has no channels or the record no triggered test images.
    """
    layers = layers_with_scales(model)
    tests, place = loaded.test_sets, loaded.backdoor_index
    if not layers or len(tests.backdoor) < 2:
        raise ConfigError("the model has no channels, or the record no triggered test image")
    every = torch.arange(len(tests.backdoor), device=place.device)
    ranked, judged = spaced(every[::2], PAIRS), spaced(every[1::2], JUDGED)
    change = trigger_activation_change(
        model, tests.test[place[ranked]], tests.backdoor[ranked], layers
    )
    change = {name: values.cpu() for name, values in change.items()}
    clean = spaced(torch.arange(len(tests.test), device=place.device), JUDGED)
    test_sets = TestSets(tests.test[clean], tests.backdoor[judged])

    def measure(where):
        return _measured(model, where, test_sets)

    before, carries = measure({}), {}
    for name, values in change.items():
        carries |= carrying({name: values}, measure, before)
    kind = LAYERS if carries else NETWORK
    if not carries:
        carries = carrying({name: outlying(part) for name, part in change.items()}, measure, before)
    return Truth(change, carries, test_sets, kind if carries else "")


def outlying(values):
    """How far values C lie above their median, in units of their robust standard deviation."""
    distance = values - values.median()
    return distance / (1.4826 * distance.abs().median() + 1e-12)


def carrying(scores, measure, before):
    """{layer: bool C} of the channels that carry the backdoor; {} where that cannot be said.

    `scores` are {layer: C}, and measure(where) gives {acc, asr} without the channels `where`. They
    are the fewest ones of the highest scores without which the ASR is at most GONE of what it was
    and the ACC has lost at most COST, and no more than half of the channels.
    """
    order = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
    sizes = [len(part) for part in scores.values()]

    def highest(number):
        row = torch.zeros(len(order), dtype=torch.bool).index_fill(0, order[:number], True)
        return dict(zip(scores, row.split(sizes), strict=True))

    def look(number):
        now = measure(highest(number))
        return now["asr"] <= GONE * before["asr"], now["acc"] >= before["acc"] - COST

    number = fewest(len(order) // 2, look)
    return highest(number) if number else {}


def fewest(most, look):
    """The smallest number up to `most` for which look(number) is (gone, cheap); 0 without one.

    The ASR does not fall evenly: the number is doubled first, and then raised one by one from the
    last but one.
    """
    low, high, gone, cheap = 0, 1, False, True
    while high <= most:
        gone, cheap = look(high)
        if gone or not cheap:
            break
        low, high = high, 2 * high
    else:
        return 0
    for number in range(low + 1, high):
        is_gone, is_cheap = look(number)
        if is_gone and is_cheap:
            return number
        if not is_cheap:
            return 0
    return high if gone and cheap else 0


def layers_with_scales(model):
    """{name: layer} of the channels that can be switched off."""
    layers = layers_of_channels(model)
    return {name: layer for name, layer in layers.items() if layer.weight is not None}


def spaced(places, most):
    """At most so many of the places, evenly spaced."""
    return places[:: max(-(-len(places) // most), 1)]


def _measured(model, where, test_sets):
    with switched_off(model, where):
        return evaluate(model, test_sets)


@contextmanager
def switched_off(model, where):
    """The channels `where`, {layer: bool C}, put out zero inside."""
    saved = []
    try:
        for name, chosen in where.items():
            layer = model.get_submodule(name)
            for parameter in filter(lambda each: each is not None, (layer.weight, layer.bias)):
                saved.append((parameter, parameter.detach().clone()))
                parameter.data[chosen.to(parameter.device)] = 0
        yield
    finally:
        for parameter, value in saved:
            parameter.data.copy_(value)


# ---------- what was cut ----------


def kept(folder, info):
    """{layer: bool C} of what a verified defense has pruned, as it says in its files: they hold
    `<layer>/pruned` or `<layer>/factors`. Empty where there is nothing of the kind."""
    found = {}
    for name in FILES:
        if name in info["files"]:
            content = layout.read_checked(folder, name, info)
            found |= _pruned(checkpoint.from_bytes(content, folder / name))
    return found


def in_layers(pruned, model):
    """The `Cut` in the layers of the victim `model`, of what `kept` has found.

    Where the defense names convolutions, the batch norms that alone read them stand for them.
    """
    sizes = {name: len(layer.weight) for name, layer in layers_with_scales(model).items()}
    pairs = paired_norms(model) if any(name not in sizes for name in pruned) else {}
    where, unpaired = {}, 0
    for name, chosen in pruned.items():
        own = name if name in sizes else pairs.get(name)
        if own is None or len(chosen) != sizes[own]:
            unpaired += int(chosen.sum())
        else:
            where[own] = where.get(own, torch.zeros_like(chosen)) | chosen
    return Cut(where, unpaired)


def _pruned(tensors):
    """{layer: bool C} of the tensors that a defense keeps."""
    found = {}
    for key, value in tensors.items():
        layer, _, what = key.rpartition("/")
        if what == "pruned" and value.dtype == torch.bool and value.dim() == 1:
            found[layer] = value
        elif what == "factors" and value.is_floating_point() and value.dim() == 1:
            found.setdefault(layer, value < HALF)
    return found
