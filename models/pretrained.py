"""Weights from a file for a new network: all must fit, only the last layer may be another one."""

import functools
import sys

import torch

from antidote_bench.utils.errors import ConfigError

PREFIX = "network."  # of the names in the records of this project
COUNTER = "num_batches_tracked"  # of batch norms: nothing depends on it
SHOWN = 3  # names in a message


def adopt(network, tensors, head, path):
    """Give `network` the weights `tensors`, {name: tensor}, that the file `path` holds.

    `head` is the name of the layer that makes the logits, None where there is none. It keeps its
    random weights where the file has none for it or is for another number of classes. Raises
    ConfigError (exit 2) where anything else does not fit, and changes nothing then.
    """
    own = network.state_dict()
    if tensors and all(name.startswith(PREFIX) for name in tensors):
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    of_head = {name for name in own if head is not None and name.startswith(f"{head}.")}
    fits_head = all(name in tensors and tensors[name].shape == own[name].shape for name in of_head)
    left_out = set() if fits_head else of_head
    found = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    wanted = {name for name in own if name not in left_out}
    missing = sorted(name for name in wanted - found.keys() if not name.endswith(COUNTER))
    surplus = sorted(found.keys() - wanted)
    shapes = [
        f"{name} is {tuple(found[name].shape)} there and {tuple(own[name].shape)} here"
        for name in sorted(wanted & found.keys())
        if found[name].shape != own[name].shape
    ]
    problems = [
        *([f"{_some(missing)} missing"] if missing else []),
        *([f"{_some(surplus)} too many"] if surplus else []),
        *shapes[:SHOWN],
    ]
    if problems:
        raise ConfigError(f"the weights in {path} do not fit this --model: {'; '.join(problems)}")
    if not all(tensor.isfinite().all() for tensor in found.values()):
        raise ConfigError(f"the weights in {path} are not all finite numbers")
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
    if left_out:
        _say(
            f"note: the last layer, {head}, starts at random, because that in {path} is missing or "
            "for another number of classes"
        )


@functools.cache  # once, however often a run builds the network
def _say(text):
    print(text, file=sys.stderr)


def _some(names):
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN))
