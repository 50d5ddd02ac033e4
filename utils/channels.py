"""The channels of a network: how data flow through them, and how strongly each reacts."""

import sys

import torch
from torch import nn

from antidote_bench.utils.data.loader import batches, evaluating, evaluation_batch, halving
from antidote_bench.utils.device import exact


class _Tracer(torch.fx.Tracer):
    """Follows no layer into its own code, those of other libraries included."""

    def is_leaf_module(self, module, qualified_name):
        is_layer = isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.MaxPool2d)
        return is_layer or super().is_leaf_module(module, qualified_name)


def traced(model):
    """The graph of a model as torch.fx sees it; whatever tracing raises."""
    return torch.fx.GraphModule(model, _Tracer().trace(model))


def paired_norms(model):
    """{convolution: batch norm} where that BatchNorm2d alone reads the convolution's output.

    A max pool may lie between them. The batch norm of a residual sum is never paired. Nothing is
    paired, with a warning, in a model that torch.fx cannot trace.
    """
    modules = dict(model.named_modules())
    try:
        nodes = traced(model).graph.nodes
    except Exception as error:  # tracing fails in whatever way the model's own code does
        print(
            f"warning: no batch norm is pruned, torch.fx cannot trace the model: {error}",
            file=sys.stderr,
        )
        return {}
    pairs = {}
    for node in nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.Conv2d):
            continue
        reader = _only_reader(node)
        if reader is not None and isinstance(modules[reader.target], nn.MaxPool2d):
            reader = _only_reader(reader)  # the maximum of zeros is zero
        if reader is not None and isinstance(modules[reader.target], nn.BatchNorm2d):
            pairs[node.target] = reader.target
    return pairs


def _only_reader(node):
    """The one module that reads the output of a traced node; None where there is no such module."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_module" else None


@torch.no_grad()
def lipschitz_bounds(model):
    """{batch norm: bounds, float64 C}.

    A bound is the largest factor by which a channel, the filter and the batch norm together, can
    amplify a change of its input.
    """
    bounds = {}
    for convolution, name in paired_norms(model).items():
        norm = model.get_submodule(name)
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bounds[name] = spectral_norms(model.get_submodule(convolution).weight) * scale.abs()
    return bounds


def spectral_norms(kernel):
    """The largest singular value of every filter of a kernel O,I,h,w, as a matrix I by h*w.

    float64 O. Computed from the eigenvalues of the smaller Gram matrix: 512 of 9 by 9 are faster
    than 512 decompositions of 512 by 9.
    """
    filters = kernel.double().flatten(2)
    gram = filters @ filters.mT if filters.shape[1] < filters.shape[2] else filters.mT @ filters
    return torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0).sqrt()


def outliers(scores, u):
    """bool C: which scores C of a layer exceed their mean + u * standard deviation.

    The standard deviation has C - 1 degrees of freedom. A score that is not finite is left out. Of
    n scores none can exceed the limit where u is (n - 1) / sqrt(n) or more.
    """
    finite = scores[scores.isfinite()]
    if len(finite) < 2:
        return torch.zeros_like(scores, dtype=torch.bool)
    return scores > finite.mean() + u * finite.std()


def layers_of_channels(model):
    """{qualified name: layer} whose outputs are what a channel says: the batch norms, or in a model
    without them the convolutions."""
    modules = dict(model.named_modules())
    for kind in (nn.BatchNorm2d, nn.Conv2d):
        found = {name: module for name, module in modules.items() if isinstance(module, kind)}
        if found:
            return found
    return {}


@torch.no_grad()
def trigger_activation_change(model, clean, triggered, layers=None):
    """{layer: float64 C}: by how much a trigger changes the map of each channel.

    `clean` and `triggered` are splits of the same images without and with it. For a pair of maps
    h,w it is the root of the mean squared difference, and the result is the mean over the pairs:
    TAC of Zheng et al., "Data-Free Backdoor Removal Based on Channel Lipschitzness", ECCV 2022
    (arXiv 2208.03111), which has the norm of the difference, sqrt(h w) times as much. `layers`,
    {name: layer}, are by default `layers_of_channels`; one that does not run is left out. In
    evaluation mode and float32.
    """
    layers = layers_of_channels(model) if layers is None else layers

    def pass_over_all(size):
        sums, handles = {}, []
        for name, layer in layers.items():

            def add(_module, _inputs, output, name=name):
                before, after = output.double().flatten(2).chunk(2)
                change = (after - before).square().mean(2).sqrt().sum(0)
                sums[name] = sums.get(name, 0.0) + change

            handles.append(layer.register_forward_hook(add))
        try:
            pairs = zip(batches(clean, size), batches(triggered, size), strict=True)
            for (without, *_), (with_it, *_) in pairs:
                model(torch.cat([without, with_it]))
        finally:
            for handle in handles:
                handle.remove()
        return {name: change / len(clean) for name, change in sums.items()}

    with evaluating(model), exact():
        return halving(pass_over_all, max(1, evaluation_batch(model, clean.images) // 2))
