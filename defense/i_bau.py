"""I-BAU: unlearn the perturbation that fools the model most, by an implicit hypergradient.

Zeng, Chen, Park, Mao, Jin, Jia, "Adversarial Unlearning of Backdoors via Implicit Hypergradient",
ICLR 2022 (arXiv 2110.03735). One perturbation of all clean images maximises the loss, and the
weights minimise it. The perturbation depends on the weights; some terms of a Neumann series take
that into account.

    python defense/i_bau.py --result_file badnet_cifar10

Deviates from the authors' code in the share of perturbed images and in where the clean images come
from; see docs/defenses/i_bau.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import Defense, option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    adds: ClassVar[dict[str, str]] = {
        "perturbation.safetensors": "the `perturbation` (3, S, S) of the last round, in [0, 1] "
        "pixels, not clipped"
    }

    rounds: int = option(5, at_least=0)
    """rounds of finding the perturbation and unlearning it"""
    batch_size: int = option(100, at_least=1, unit="images")
    """images per step"""
    perturbation_lr: float = option(10.0, above=0)
    """step size of the ascent, in [0, 1] pixels per unit of gradient"""
    penalty: float = option(1e-3, at_least=0)
    """weight of the perturbation's squared L2 norm"""
    unlearn_lr: float = option(1e-3, above=0)
    """step size of Adam on the weights"""
    portion: float = option(0.01, above=0, at_most=1)
    """share of a batch that carries the perturbation; one image at least"""
    terms: int = option(5, at_least=1)
    """terms of the Neumann series of the hypergradient"""
    contraction: float = option(0.1, above=0)
    """step size of the inner map, of which the perturbation is taken to be a fixed point"""


if __name__ == "__main__":
    launch(Config)

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import (
    Passes,
    batch_sizes,
    batch_slices,
    evaluating,
    gradient_batch,
    predicted_classes,
    to_unit,
)
from antidote_bench.utils.device import exact
from antidote_bench.utils.errors import ConfigError, UserError

GRAPHS = 3  # what can be differentiated twice takes about as many times the memory


def check(model, record, config):
    images, labels = to_unit(record.clean.images[:2]), record.clean.truth[:2]
    delta = torch.zeros_like(images, requires_grad=True)
    with evaluating(model), twice_differentiable():
        loss = F.cross_entropy(model(images + delta), labels)
        (slope,) = torch.autograd.grad(loss, delta, create_graph=True)
        try:
            torch.autograd.grad(slope.square().sum(), delta, materialize_grads=True)
        except RuntimeError as error:
            raise ConfigError(
                f"i_bau does not apply: the model cannot be differentiated twice ({error}); try "
                "ft_sam"
            ) from error


def repair(model, record, config):
    images, labels = to_unit(record.clean.images), record.clean.truth
    with evaluating(model), exact(), twice_differentiable():
        delta = unlearn(
            model,
            images,
            labels,
            config,
            on_round=lambda **values: record.report("unlearn", model, **values),
        )
    record.keep("perturbation.safetensors", {"perturbation": delta})
    return model


@contextmanager
def twice_differentiable():
    """Inside, torch computes by what it can differentiate twice.

    Of the kernels of attention that is MATH alone. The hard sigmoid is written as a ReLU6.
    """
    with sdpa_kernel(SDPBackend.MATH), _HardSigmoids():
        yield


class _HardSigmoids(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        return function(*args, **(kwargs or {}))


def unlearn(model, images, labels, config, *, on_round=None):
    """Train `model` (in evaluation mode) in place; the last round's perturbation 3,S,S.

    images n,3,S,S in [0, 1], labels n. `on_round(epoch=, loss=, lr=)` is called after every round.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, config.unlearn_lr)
    sizes, delta = batch_sizes(len(images), config.batch_size), torch.zeros_like(images[:1])
    for number in tqdm(range(config.rounds), desc="unlearning", unit=" rounds", disable=None):
        generator = seeds.generator("i_bau", config.random_seed, number, device=labels.device)
        parts = torch.randperm(len(images), generator=generator, device=labels.device).split(sizes)
        delta = find_perturbation(model, images, parts, config)
        passes = Passes(max(1, gradient_batch(model, images, GRAPHS * max(sizes)) // GRAPHS))
        total = 0
        for part in parts:
            mask = draw_mask(part, images.dtype, config.portion, generator)
            inner = images[parts[0]], labels[parts[0]]
            outer = images[part], labels[part], mask
            step = partial(step_gradients, model, inner, outer, delta, weights, config)
            loss, gradients = passes.run(step)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            optimizer.step()
            total += loss * len(part)
        loss = float(total) / len(images)
        if not all(weight.isfinite().all() for weight in weights):
            raise UserError(
                f"the weights are no longer numbers after round {number + 1}: lower --unlearn_lr, "
                f"which is {config.unlearn_lr}"
            )
        if on_round:
            on_round(epoch=number + 1, loss=round(loss, 6), lr=config.unlearn_lr)
    return delta[0]


def find_perturbation(model, images, parts, config):
    """The perturbation 1,3,S,S that leads the model away from its own predictions.

    It starts at 0 and takes one step of ascent on every part, which are positions in `images`.
    """
    most = max(len(part) for part in parts)
    classes = predicted_classes(model, images)  # the model does not change here
    passes = Passes(gradient_batch(model, images, most))
    delta = torch.zeros_like(images[:1], requires_grad=True)
    for part in parts:
        ascend = partial(slope_of_gain, model, images[part], classes[part], delta, config.penalty)
        gradient = passes.run(ascend)
        with torch.no_grad():
            delta += config.perturbation_lr * gradient
    return delta.detach()


def slope_of_gain(model, images, predicted, delta, penalty, size):
    """The gradient by `delta` of what its ascent climbs; a pass has `size` images."""
    total = 0
    for loss in inner_losses(model, images, predicted, penalty, size):
        (gradient,) = torch.autograd.grad(-loss(delta), delta)
        total = total + gradient
    return total


def step_gradients(model, inner, outer, delta, weights, config, size):
    """`hypergradient` of a step, in passes of `size` images.

    `inner` are the images and labels that the perturbation fools, `outer` the images, labels and
    mask that the weights are trained on.
    """
    return hypergradient(
        outer_losses(model, *outer, size),
        inner_losses(model, *inner, config.penalty, size),
        delta,
        weights,
        config.terms,
        config.contraction,
    )


def inner_losses(model, images, labels, penalty, size):
    """What the perturbation minimises, its penalty less the cross-entropy, as functions of it.

    One for each part of `size` images; their sum counts.
    """

    def inner(delta, part, share):
        loss = F.cross_entropy(model(images[part] + delta), labels[part])
        return share * (penalty * delta.square().sum() - loss)

    return parts_of(inner, len(images), size)


def draw_mask(part, dtype, portion, generator):
    """n,1,1,1: 1 for the share `portion` of the images of a part, one at least, else 0."""
    order = torch.rand(len(part), generator=generator, device=part.device).argsort()
    chosen = order[: max(1, int(portion * len(part)))]
    mask = torch.zeros(len(part), 1, 1, 1, device=part.device, dtype=dtype)
    return mask.index_fill_(0, chosen, 1)


def outer_losses(model, images, labels, mask, size):
    """What the weights minimise, as functions of the perturbation that the masked images carry.

    One for each part of `size` images; their sum counts.
    """

    def outer(delta, part, share):
        return share * F.cross_entropy(model(images[part] + mask[part] * delta), labels[part])

    return parts_of(outer, len(images), size)


def parts_of(function, count, size):
    """`function(delta, part, share)` for each part of `size` images of `count`, as functions of
    delta; `share` is that of the part's images."""
    return [
        partial(function, part=part, share=(part.stop - part.start) / count)
        for part in batch_slices(count, size)
    ]


def hypergradient(outer, inner, delta, weights, terms, step):
    """(outer(delta), its total derivative by `weights`), where delta is a minimum of inner(delta).

    Both are sums of functions, which are given as lists, and depend on the weights too. At a fixed
    point of the inner map P(delta) = delta - step * inner'(delta), the derivative is
    outer_w + v P_w with v = outer_delta + v P_delta. v is the sum of the first `terms` terms
    outer_delta P_delta^k.
    """
    delta, loss = delta.detach().requires_grad_(), 0
    derivatives = [0] * (1 + len(weights))
    for function in outer:
        value = function(delta)
        parts = torch.autograd.grad(value, [delta, *weights], materialize_grads=True)
        derivatives = [whole + part for whole, part in zip(derivatives, parts, strict=True)]
        loss = loss + value.detach()
    direct, *gradients = derivatives
    slopes = Slopes(inner, delta)
    term, v = direct, direct
    for _ in range(terms - 1):
        curved = sum(
            torch.autograd.grad(slope, delta, term, retain_graph=bool(slopes.kept))[0]
            for slope in slopes
        )
        term = term - step * curved
        v = v + term
    for slope in slopes:
        indirect = torch.autograd.grad(slope, weights, -step * v, materialize_grads=True)
        gradients = [first + second for first, second in zip(gradients, indirect, strict=True)]
    return loss, gradients


class Slopes:
    """The derivatives of `functions` at delta, one by one, which can be differentiated again.

    That of a single function is computed once and kept; the graphs of several would not fit into
    memory together.
    """

    def __init__(self, functions, delta):
        self._functions, self._delta = functions, delta
        self.kept = [self._slope(*functions)] if len(functions) == 1 else None

    def __iter__(self):
        return iter(self.kept) if self.kept else map(self._slope, self._functions)

    def _slope(self, function):
        (slope,) = torch.autograd.grad(function(self._delta), self._delta, create_graph=True)
        return slope


def main(config):
    run.defend(__name__, config, repair, check=check)
