"""UNIT: bound the activation of every unit as tightly as the accuracy on clean images allows.

Cheng, Shen, Zhang, Tao, An, Guo, Ma, Zhang, "UNIT: Backdoor Mitigation via Automated
Neural Distribution Tightening", ECCV 2024 (arXiv 2407.11372). A trigger drives units far beyond
what clean images do. One bound for every unit is learned, and no weight of the victim changes.

    python defense/unit.py --result_file badnet_cifar10

Deviates in which bounds are kept and in the images, which are not augmented; the saved model has
bounds that the victim has not: see docs/defenses/unit.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import Defense, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    selection = "val"  # a fifth of the clean images says how tight the bounds may be

    per_channel: bool = False
    """one bound for a channel, at all positions of its map; otherwise every position has its own,
    and images of another size do not fit"""
    deviations: float = option(4.0, at_least=0)
    """standard deviations above its mean at which the bound of a unit begins"""
    steps: int = option(300, at_least=0)
    """of Adam on the bounds"""
    step_images: int | None = option(None, at_least=1, unit="images")
    """clean images per step, drawn for each; by default all that are not held out"""
    bound_lr: float = option(1e-3, above=0)
    """learning rate of Adam"""
    penalty: float = option(1e-3, above=0)
    """weight of the bounds' size in the loss, to begin with"""
    drop: float = option(0.03, at_least=0, at_most=1)
    """accuracy on the held-out images that the bounds may cost: 0.03 is three of a hundred"""


if __name__ == "__main__":
    launch(Config)

import math
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.channels import traced
from antidote_bench.utils.checkpoint import load, save
from antidote_bench.utils.data.loader import (
    EVALUATION_BATCH,
    Passes,
    evaluating,
    gradient_batch,
    mixed_precision,
    predicted_classes,
    to_unit,
)
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.repair import selection
from antidote_bench.utils.repair.layers import Moments, frozen, watch_norms
from antidote_bench.utils.repair.unlearning import at_least_float32

IN_A_ROW = 5  # steps of one kind after which the weight of the bounds' size changes
UP, DOWN = 2.0, 2.0**1.5  # by these factors
KEEP_EVERY = 50  # steps between two checkpoints
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
)  # fmt: skip
CALLS = {
    torch.relu, torch.relu_, F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish,
    F.hardswish, "relu", "relu_",
}  # fmt: skip


def check(model, record, config):
    selection.hold_out(record.clean, config)
    bounded(model)


def repair(model, record, config):
    work, held_out = selection.hold_out(record.clean, config)
    before = selection.accuracy(model, held_out, config)
    needed = math.ceil((before - config.drop) * len(held_out) - 1e-9)
    with frozen(model):
        network, places = bounded(model)
        start = partial(Start, config.deviations, config.per_channel)
        watchers = watch_norms(network, work, lambda _name: start(), places)
        for name, watcher in watchers.items():
            places[name].value = nn.Parameter(watcher.bounds())
        record.report("bounded", network)
        with evaluating(network):
            tighten(network, work, held_out, needed, record, config)
        for place in places.values():
            place.value.requires_grad_(False)
    return network.train(model.training)


class UpperBound(nn.Module):
    """Activations with no value above its bound; the bounds have the shape of one image's values,
    or C,1,1."""

    def __init__(self, value=None):
        super().__init__()
        self.register_parameter("value", value)

    def forward(self, x):
        if self.value is None:
            return x
        value = self.value.to(x.dtype)
        return torch.where(x > value, value, x)


def bounded(model):
    """(`model` with an `UpperBound` behind every activation, {its name: it} of these).

    The parameters are those of `model`, under their names. Raises ConfigError (exit 2) where
    torch.fx cannot follow the model, or finds no activation.
    """
    try:
        with evaluating(model):  # nothing may drop out: that would be fixed in the graph
            network = traced(model)
    except Exception as error:  # tracing fails in whatever way the model's own code does
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"unit does not apply: torch.fx cannot follow the model ({why}); try mm_bm or ft_sam"
        ) from error
    places = {}
    for node in [node for node in network.graph.nodes if is_activation(network, node)]:
        name = f"bounds.{len(places)}"
        places[name] = UpperBound()
        network.add_submodule(name, places[name])
        with network.graph.inserting_after(node):
            after = network.graph.call_module(name, (node,))
        for user in [user for user in node.users if user is not after]:
            user.replace_input_with(node, after)
    if not places:
        raise ConfigError(
            "unit does not apply: torch.fx finds no activation in the model; try mm_bm or ft_sam"
        )
    network.recompile()
    return network.train(model.training), places


def is_activation(network, node):
    """Whether a node of the graph calls an activation, or a layer with one at its end."""
    if node.op == "call_module":
        layers = network.get_submodule(node.target).modules()
        return any(isinstance(layer, ACTIVATIONS) for layer in layers)
    return node.op in ("call_function", "call_method") and node.target in CALLS


class Start:
    """Mean and standard deviation of values n,... over n, or per channel, for `watch_norms`."""

    def __init__(self, deviations, per_channel):
        self._deviations, self._per_channel, self._moments = deviations, per_channel, Moments()

    def add(self, values):
        by_channel = self._per_channel and values.ndim == 4
        self._shape = (values.shape[1], 1, 1) if by_channel else values.shape[1:]
        self._like = values[:0]
        self._moments.add(values if by_channel else values.flatten(1))

    def bounds(self):
        """The mean plus so many standard deviations, but 0 or more."""
        highest = self._moments.mean + self._deviations * self._moments.variance.sqrt()
        return highest.clamp(min=0).view(self._shape).to(self._like)


def tighten(network, work, held_out, needed, record, config):
    """Learn the bounds of `network`, in evaluation mode, on the split `work`.

    They end as the smallest with which `needed` images of `held_out` are classified right.
    """
    search = Search([part for part in network.parameters() if part.requires_grad], config.penalty)
    optimizer = torch.optim.Adam(search.values, config.bound_lr, betas=(0.5, 0.9), fused=True)
    path, images = record.state / "bounds.safetensors", to_unit(held_out.images)
    passes = Passes(gradient_batch(network, work.images, EVALUATION_BATCH))

    def is_accurate():
        with mixed_precision(images.device, config.precision):
            return (predicted_classes(network, images) == held_out.truth).sum() >= needed

    done = load(path, search, optimizer)
    if not done:
        search.look(is_accurate())
    with tqdm(
        total=config.steps, initial=done, desc="bounding", unit=" steps", disable=None
    ) as bar:
        for step in range(done, config.steps):
            index = drawn(len(work), step, images.device, config)
            passes.run(partial(slopes, network, search, optimizer, work, index, config))
            optimizer.step()
            search.after_step(is_accurate)
            if (step + 1) % KEEP_EVERY == 0:
                save(path, search, optimizer, step + 1)
                record.report("bounds", network, epoch=step + 1)
            bar.update()
    search.take()
    if not search.least.isfinite():
        print("no bounds keep the accuracy: those of the start are kept", file=sys.stderr)


def drawn(count, step, device, config):
    """The positions of the images of a step."""
    if config.step_images is None or config.step_images >= count:
        return torch.arange(count, device=device)
    generator = seeds.generator("unit", config.random_seed, step, device=device)
    return torch.randperm(count, generator=generator, device=device)[: config.step_images]


def slopes(network, search, optimizer, work, index, config, size):
    """Set the gradients of the bounds: of the cross-entropy at `index`, and of their size.

    A pass has `size` images.
    """
    optimizer.zero_grad()
    (search.penalty * search.size()).backward()
    for part in index.split(size):
        with mixed_precision(index.device, config.precision):
            logits = network(to_unit(work.images[part]))
        loss = F.cross_entropy(at_least_float32(logits), work.truth[part], reduction="sum")
        (loss / len(index)).backward()


class Search(nn.Module):
    """The bounds `values`, a list of parameters, and what the search for them remembers.

    All of it stays on the device, so that no step waits for another.
    """

    def __init__(self, values, penalty):
        super().__init__()
        self.values = nn.ParameterList(values)
        self.kept = nn.ParameterList(
            nn.Parameter(value.detach().clone(), requires_grad=False) for value in values
        )
        like = {"device": values[0].device, "dtype": values[0].dtype}
        self.first = penalty
        self.register_buffer("penalty", torch.tensor(penalty, **like))
        self.register_buffer("least", torch.tensor(math.inf, **like))
        self.register_buffer("good", torch.tensor(0.0, **like))
        self.register_buffer("bad", torch.tensor(0.0, **like))

    def size(self):
        """The sum over all activations of the mean of their bounds."""
        return sum(value.mean() for value in self.values)

    @torch.no_grad()
    def after_step(self, is_accurate):
        """Keep the bounds at 0 or more, look at them, and change the weight of their size."""
        for value in self.values:
            value.clamp_(min=0)
        accurate = is_accurate()
        self.look(accurate)
        self.adapt(accurate)

    @torch.no_grad()
    def look(self, accurate):
        """Remember the bounds if they are accurate, a bool tensor, and smaller than all before."""
        size = self.size()
        better = accurate & (size < self.least)
        self.least.copy_(torch.where(better, size, self.least))
        for kept, value in zip(self.kept, self.values, strict=True):
            kept.copy_(torch.where(better, value, kept))

    @torch.no_grad()
    def adapt(self, accurate):
        """Raise or lower the weight after IN_A_ROW steps of one kind.

        A weight below the first one rises to that.
        """
        self.good.copy_(torch.where(accurate, self.good + 1, 0))
        self.bad.copy_(torch.where(accurate, 0, self.bad + 1))
        up, down = self.good >= IN_A_ROW, self.bad >= IN_A_ROW
        higher = torch.where(self.penalty < self.first, self.first, self.penalty * UP)
        lower = torch.where(down, self.penalty / DOWN, self.penalty)
        self.penalty.copy_(torch.where(up, higher, lower))
        self.good.masked_fill_(up, 0)
        self.bad.masked_fill_(down, 0)

    @torch.no_grad()
    def take(self):
        """Make the remembered bounds those of the network."""
        for value, kept in zip(self.values, self.kept, strict=True):
            value.copy_(kept)


def rebuild(model, weights):
    """`model`, a network of `models.build`, with the bounds and the `weights` of a repair."""
    network, places = bounded(model)
    for name, place in places.items():
        place.value = nn.Parameter(weights[f"{name}.value"].clone(), requires_grad=False)
    network.load_state_dict(weights)
    return network


def main(config):
    run.defend(__name__, config, repair, check=check)
