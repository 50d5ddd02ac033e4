"""A chain of single channels through a network, from the image to the features.

`route` finds one by data flow, `narrow` makes the network that the chain is when it stands alone,
and `implant` writes that network's weights into the chain and cuts it off from the rest.
"""

import copy

import torch
from torch import nn

from antidote_bench.utils import seeds
from antidote_bench.utils.channels import traced
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.features import features_of, last_linear

MIXING = nn.Conv2d, nn.Linear  # layers whose outputs read every input channel
NORMS = nn.BatchNorm1d, nn.BatchNorm2d
KEPT = "kernel_size", "stride", "padding", "dilation", "padding_mode"  # of a narrow convolution
TOLERANCE = 1e-3  # of the check that a chain is cut off, relative and absolute


def route(model, seed):
    """{layer: (channel that it reads, channel that it writes)} of a chain.

    The layers are all convolutions, linear layers and batch norms. What a layer reads is None where
    it reads the image, and what it writes is None where it makes the logits. The terms of a
    residual sum have one channel in common. `seed` draws the channels. Raises ConfigError (exit 2)
    where the channels of the model cannot be followed.
    """
    modules, head = dict(model.named_modules()), last_linear(model)
    try:
        same, reads, writes = _streams(model, modules)
    except ConfigError:
        raise
    except Exception as error:  # tracing fails in whatever way the model's own code does
        raise _not_followed(f"torch.fx cannot trace it: {error}") from error
    widths = {}
    for name, stream in writes.items():
        if modules[name] is not head and isinstance(modules[name], MIXING):
            width = modules[name].weight.shape[0]
            if widths.setdefault(same[stream], width) != width:
                raise _not_followed("it adds maps of different widths")
    draws = seeds.generator("chain", seed)
    channels = {
        stream: int(torch.randint(width, (), generator=draws)) for stream, width in widths.items()
    }
    channels = {stream: channels.get(same[stream]) for stream in range(len(same))}
    return {name: (channels.get(reads[name]), channels[writes[name]]) for name in writes}


def _streams(model, modules):
    """(the stream that each stream is one with, {layer: stream read}, {layer: stream written}).

    A stream is the maps that a mixing layer writes, in all that is computed of them channel by
    channel; sums make streams one. The image is None.
    """
    same, carried, reads, writes = [], {}, {}, {}
    for node in traced(model).graph.nodes:
        found = [carried[each] for each in node.all_input_nodes if carried[each] is not None]
        stream = found[0] if found else None
        for other in found[1:]:
            one, two = same[stream], same[other]
            same = [one if each == two else each for each in same]
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, MIXING + NORMS):
            if node.target in writes or getattr(module, "groups", 1) > 1:
                raise _not_followed(f"{node.target} has groups or is used twice")
            reads[node.target] = stream
            if isinstance(module, MIXING):
                stream = len(same)
                same.append(stream)
            writes[node.target] = stream
        carried[node] = stream
    return same, reads, writes


def _not_followed(why):
    return ConfigError(
        f"sra does not apply to this --model, because {why}; resnet9 and preactresnet18 are two "
        "that it applies to"
    )


def narrow(model, chain):
    """A new network of the form of `model`, in which every layer has one channel.

    Its features, n,1, are what the chain computes. torch's global generator draws the weights.
    """
    small = copy.deepcopy(model)
    for name, (read, write) in chain.items():
        old = model.get_submodule(name)
        if isinstance(old, nn.Conv2d):
            inputs = old.in_channels if read is None else 1
            settings = {key: getattr(old, key) for key in KEPT}
            new = nn.Conv2d(inputs, 1, bias=old.bias is not None, **settings)
        elif isinstance(old, nn.Linear):
            new = nn.Linear(1, 1, bias=old.bias is not None)
            new.makes_logits = write is None
        else:
            new = type(old)(1, old.eps, old.momentum)
        parent, _, last = name.rpartition(".")
        setattr(small.get_submodule(parent), last, new.to(next(model.parameters()).device))
    return small


@torch.no_grad()
def implant(model, chain, weights):
    """Write `weights`, the state of a narrow network, into the chain, and cut it off.

    No layer of the chain reads another channel, and no other channel reads the chain. What makes
    the logits reads it with weight 0. Changes `model` in place.
    """
    for name, (read, write) in chain.items():
        layer = model.get_submodule(name)
        if isinstance(layer, MIXING) and read is not None:
            layer.weight[:, read] = 0
        if write is None:
            continue
        if isinstance(layer, NORMS):
            for part in ("weight", "bias", "running_mean", "running_var"):
                getattr(layer, part)[write] = weights[f"{name}.{part}"][0]
            continue
        layer.weight[write] = 0
        inputs = slice(None) if read is None else slice(read, read + 1)
        layer.weight[write, inputs] = weights[f"{name}.weight"][0].to(layer.weight)
        if layer.bias is not None:
            layer.bias[write] = weights[f"{name}.bias"][0]


def feature_of(chain, model):
    """The number of the feature that the chain computes."""
    head = last_linear(model)
    return next(read for name, (read, _) in chain.items() if model.get_submodule(name) is head)


@torch.no_grad()
def require_separate(model, chain, size):
    """Raise ConfigError (exit 2) where a narrow network in the chain computes something else than
    alone: some operation of the model mixes channels."""
    device = next(model.parameters()).device
    draws = seeds.generator("chain check", 0)
    images = torch.rand(2, 3, size, size, generator=draws).to(device)
    try:
        with torch.random.fork_rng(devices=[]):
            small = narrow(model, chain).eval()
        whole = copy.deepcopy(model).eval()
        implant(whole, chain, small.state_dict())
        alone = features_of(small, images)[:, 0]
        inside = features_of(whole, images)[:, feature_of(chain, model)]
    except Exception as error:  # the model's own code may expect other widths
        raise _not_followed(f"one channel of it does not run alone: {error}") from error
    if not torch.allclose(alone, inside, rtol=TOLERANCE, atol=TOLERANCE):
        raise _not_followed("it mixes the channels of a map outside its layers")
