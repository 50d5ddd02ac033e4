"""IBD-PSC: a triggered image keeps its prediction when the network's last layers are amplified.

Hou, Feng, Hua, Luo, Zhang, Li, "IBD-PSC: Input-level Backdoor Detection via Parameter-oriented
Scaling Consistency", ICML 2024 (arXiv 2405.09786). Scales and shifts of the last k batch norms are
multiplied, for some k from the first one at which clean images are misclassified. The score is the
mean probability that these networks give to the victim's prediction.

    python detection/ibd_psc.py --result_file badnet_cifar10

Deviates where clean images are never misclassified so often; see docs/detection/ibd_psc.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import InputOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(InputOptions):
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "`error`, the share of clean images that are misclassified with "
        "1, 2, ... amplified batch norms, and `amplified`, the numbers that the score is made of"
    }

    factor: float = option(1.5, above=1)
    """by which the scales and shifts of batch norms are multiplied"""
    networks: int = option(5, at_least=1)
    """amplified networks whose probabilities are averaged"""
    error: float = option(0.6, above=0, below=1)
    """share of misclassified clean images from which on batch norms are enough"""
    limit: float = option(0.9, above=0, below=1)
    """score above which the paper's own rule flags an input"""


if __name__ == "__main__":
    launch(Config)

import sys
from copy import deepcopy

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import evaluating, forward_all, to_unit
from antidote_bench.utils.detection.inspector import Scored
from antidote_bench.utils.errors import ConfigError


def score(model, record, config):
    names = norms_in_order(model, record.reference)
    errors = errors_by_count(model, names, record.reference, config)
    counts = chosen_counts(errors, len(names), config)
    predicted = forward_all(
        model, record.suspects, lambda images, *_: model(images).argmax(1), config.precision
    )
    total = 0
    for count in counts:
        network = amplified(model, names, count, config.factor)
        total = total + probabilities(network, record.suspects, predicted, config.precision)
    scores = total / len(counts)
    evidence = {
        "error": torch.tensor(errors, dtype=torch.float64),
        "amplified": torch.tensor(counts),
    }
    return Scored(scores, scores > config.limit, evidence)


def norms_in_order(model, split):
    """Names of the batch norms with scale, shift and statistics, in the order in which they run.

    Raises ConfigError (exit 2) where there is none.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.affine and module.track_running_stats
    }
    seen = {}  # a dict keeps the order
    hooks = [
        module.register_forward_hook(lambda *_, name=name: seen.setdefault(name))
        for name, module in modules.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(to_unit(split.images[:1]))
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ConfigError(
            "ibd_psc does not apply: the model has no batch norm whose scale and shift could be "
            "amplified; strip and teco need none"
        )
    return list(seen)


def amplified(model, names, count, factor):
    """A copy of `model` in which scale and shift of the last `count` batch norms of `names` are
    multiplied by `factor`."""
    network = deepcopy(model)
    modules = dict(network.named_modules())
    with torch.no_grad():
        for name in names[len(names) - count :]:
            modules[name].weight.mul_(factor)
            modules[name].bias.mul_(factor)
    return network


def errors_by_count(model, names, reference, config):
    """The share of reference images that is misclassified with 1, 2, ... amplified batch norms.

    The list ends with the first share above config.error, or with all batch norms.
    """
    found = []
    for count in range(1, len(names) + 1):
        network = amplified(model, names, count, config.factor)
        wrong = forward_all(
            network,
            reference,
            lambda images, labels, _, network=network: network(images).argmax(1) != labels,
            config.precision,
        )
        found.append(float(wrong.double().mean()))
        if found[-1] > config.error:
            break
    return found


def chosen_counts(errors, most, config):
    """How many batch norms are amplified in each of the networks that make the score.

    They are config.networks numbers from the first one with an error above config.error, `most` at
    most. Where no error is so large, they are the largest numbers.
    """
    first = len(errors)
    if errors[-1] <= config.error:
        first = max(most - config.networks + 1, 1)
        print(
            f"warning: with all {most} batch norms amplified, {errors[-1]:.0%} of the clean images "
            f"are misclassified, not more than {config.error:.0%}: the last ones are used",
            file=sys.stderr,
        )
    return list(range(first, min(first + config.networks - 1, most) + 1))


def probabilities(network, split, labels, precision):
    """The probability of each image's label of `labels`, float64 N."""

    def of_batch(images, _, positions):
        chosen = labels[positions, None]
        return network(images).double().softmax(1).gather(1, chosen).squeeze(1)

    return forward_all(network, split, of_batch, precision)


def main(config):
    run.detect(__name__, config, score)
