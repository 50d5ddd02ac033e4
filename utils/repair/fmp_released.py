"""The eight deviations of FMP's released code from its paper, for defense/fmp.py.

`--variant released` switches all of them on, and each has an option of its own. The eighth,
zero_init, needs no function: biases are not pruned, and pruned filters may grow again.
"""

import operator

import numpy as np
import torch
from torch import nn

from antidote_bench.models import Normalize
from antidote_bench.utils import seeds
from antidote_bench.utils.channels import traced
from antidote_bench.utils.data.loader import augmentation
from antidote_bench.utils.errors import ConfigError

FEW = 32  # scored images


def any_images(count, seed):
    """few_images: positions of 32 of `count` images, whatever their classes."""
    return torch.randperm(count, generator=seeds.generator("fmp images", seed))[:FEW]


def augmented(images, spec, seed):
    """score_aug: the uint8 images N,3,S,S, augmented once as in training."""
    generator = seeds.generator("fmp augmentation", seed, device=images.device)
    return augmentation(spec)(images, generator)


def normalised(images, spec):
    """double_norm: the images N,3,S,S, normalised once more than the model does it."""
    return Normalize(spec.mean, spec.std).to(images.device)(images)


def block_sums(model, images):
    """alias_sum: `feature_maps`, but where an output is the first term of a sum, the sum.

    The residual blocks of the released code add in place, into the very tensor that a hook has
    kept. Raises ConfigError where torch.fx cannot trace the model.
    """
    try:
        graph = traced(model)
    except Exception as error:  # tracing fails in whatever way the model's own code does
        raise ConfigError(
            f"alias_sum does not apply, torch.fx cannot trace the model: {error}; "
            "--alias_sum false leaves it out"
        ) from error
    modules, wanted, maps = dict(model.named_modules()), {}, {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d):
            sums = [user for user in node.users if _is_sum(user) and user.args[0] is node]
            wanted[sums[0] if sums else node] = node.target

    class Keeper(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if node in wanted:
                maps[wanted[node]] = value
            return value

    Keeper(graph).run(images)
    return maps


def _is_sum(node):
    return node.target in (operator.add, operator.iadd, torch.add)


def by_accuracy_alone(accuracy, loss):
    """argsort: channels in the order of pruning, lowest accuracy first, ties in any order."""
    return np.argsort(accuracy)


def by_misplaced_ranks(orders, counts):
    """exec_order: {convolution: sorted channels to prune}, each by the ranks of another one.

    The ranks `orders` come in the order in which the convolutions run. They are given to the
    convolutions in the order of definition, which is that of `counts`.
    """
    to_prune = {}
    defined = [name for name in counts if name in orders]
    for name, source in zip(defined, orders, strict=True):
        channels = orders[source][: counts[name]].tolist()
        to_prune[name] = sorted(channel for channel in channels if channel < len(orders[name]))
    return to_prune


def scales_by_last_convolution(model, to_prune):
    """bn_last_conv: [(scale, channels)] of every batch norm.

    The channels are those of the convolution that is defined before it.
    """
    channels, entries = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            channels = to_prune.get(name, [])
        elif isinstance(module, nn.BatchNorm2d):
            known = [channel for channel in channels if channel < module.num_features]
            entries.append((module.weight, known))
    return entries
