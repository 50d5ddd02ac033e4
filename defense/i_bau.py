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

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import batch_sizes, evaluating, to_unit
from antidote_bench.utils.device import exact
from antidote_bench.utils.errors import UserError


def repair(model, record, config):
    images, labels = to_unit(record.clean.images), record.clean.truth
    # of the kernels of attention, only MATH can be differentiated twice
    with evaluating(model), exact(), sdpa_kernel(SDPBackend.MATH):
        delta = unlearn(
            model,
            images,
            labels,
            config,
            on_round=lambda **values: record.report("unlearn", model, **values),
        )
    record.keep("perturbation.safetensors", {"perturbation": delta})
    return model


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
        inner = inner_loss(model, images[parts[0]], labels[parts[0]], config.penalty)
        total = 0
        for part in parts:
            mask = draw_mask(part, images.dtype, config.portion, generator)
            outer = outer_loss(model, images[part], mask, labels[part])
            loss, gradients = hypergradient(
                outer, inner, delta, weights, config.terms, config.contraction
            )
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
    with torch.no_grad():  # the model does not change here
        classes = [model(images[part]).argmax(1) for part in parts]
    delta = torch.zeros_like(images[:1], requires_grad=True)
    for part, predicted in zip(parts, classes, strict=True):
        gain = (
            F.cross_entropy(model(images[part] + delta), predicted)
            - config.penalty * delta.square().sum()
        )
        (gradient,) = torch.autograd.grad(gain, delta)
        with torch.no_grad():
            delta += config.perturbation_lr * gradient
    return delta.detach()


def inner_loss(model, images, labels, penalty):
    """What the perturbation minimises, as a function of it: its penalty less the cross-entropy."""

    def inner(delta):
        return penalty * delta.square().sum() - F.cross_entropy(model(images + delta), labels)

    return inner


def draw_mask(part, dtype, portion, generator):
    """n,1,1,1: 1 for the share `portion` of the images of a part, one at least, else 0."""
    order = torch.rand(len(part), generator=generator, device=part.device).argsort()
    chosen = order[: max(1, int(portion * len(part)))]
    mask = torch.zeros(len(part), 1, 1, 1, device=part.device, dtype=dtype)
    return mask.index_fill_(0, chosen, 1)


def outer_loss(model, images, mask, labels):
    """What the weights minimise, as a function of the perturbation that the masked images carry."""
    return lambda delta: F.cross_entropy(model(images + mask * delta), labels)


def hypergradient(outer, inner, delta, weights, terms, step):
    """(outer(delta), its total derivative by `weights`), where delta is a minimum of inner(delta).

    Both functions depend on the weights too. At a fixed point of the inner map
    P(delta) = delta - step * inner'(delta), the derivative is outer_w + v P_w with
    v = outer_delta + v P_delta. v is the sum of the first `terms` terms outer_delta P_delta^k.
    """
    delta = delta.detach().requires_grad_()
    loss = outer(delta)
    direct, *gradients = torch.autograd.grad(loss, [delta, *weights], materialize_grads=True)
    (slope,) = torch.autograd.grad(inner(delta), delta, create_graph=True)
    term, v = direct, direct
    for _ in range(terms - 1):
        (curved,) = torch.autograd.grad(slope, delta, term, retain_graph=True)
        term = term - step * curved
        v = v + term
    indirect = torch.autograd.grad(slope, weights, -step * v, materialize_grads=True)
    gradients = [first + second for first, second in zip(gradients, indirect, strict=True)]
    return loss.detach(), gradients


def main(config):
    run.defend(__name__, config, repair)
