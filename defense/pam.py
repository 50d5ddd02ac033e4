"""PAM: fine-tune with the gradient at weights that are pulled back towards the victim's.

Min, Qin, Zhang, Shen, Cheng, "Uncovering, Explaining, and Mitigating the Superficial Safety of
Backdoor Defense", NeurIPS 2024 (arXiv 2410.09838). A purified network may lie so near to the
victim that a few poisons bring the backdoor back. Path-Aware Minimization lowers the loss on the
way back to the victim, on images that a generator of triggers has changed.

    python defense/pam.py --result_file badnet_cifar10

Deviates in the search for triggers and in what batch norms learn from: see docs/defenses/pam.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import SearchOptions
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import ReversalOptions


@dataclass(frozen=True, kw_only=True)
class Config(SearchOptions, ReversalOptions):
    relative_rates: ClassVar[tuple[str, ...]] = ("lr",)

    source: Literal["btidbf", "nc", "none"] = "btidbf"
    """of the images that are unlearned. btidbf: the generator of BTI-DBF, as published; nc: the
    trigger of a class that Neural Cleanse flags in the victim, our own variant; none: the same
    steps on clean images alone, a baseline"""
    rounds: int = option(3, at_least=0)
    """rounds of learning the mask, training the generator, and unlearning"""
    search_batch: int = option(128, at_least=1, unit="images")
    """images per step of the mask, of the generator, and of the search of nc"""
    share: float = option(0.2, at_least=0, at_most=1)
    """share of a batch that the generator changes, or that gets the trigger; one image at least"""
    lr: float = option(0.01, above=0)
    """learning rate; the default is 0.01 for a victim that was trained at 0.01 with batches of 128,
    and in proportion to the victim's own rate per image otherwise"""
    momentum: float = option(0.1, at_least=0, below=1)
    """of SGD"""
    rho: float = option(0.5, at_least=0)
    """how far the weights are moved towards the victim's before the gradient is taken; 0 is plain
    fine-tuning"""
    statistics: Literal["own", "pulled"] = "own"
    """of batch norms, what those that the network keeps follow. own: activations at its own
    weights; pulled: those at the moved weights, as in the released code"""

    @property
    def variant(self):
        """What tables call the run by, beside the method."""
        return {"btidbf": None, "nc": "nc", "none": "clean"}[self.source]


if __name__ == "__main__":
    launch(Config)

import sys
from functools import partial

import torch
from torch.func import functional_call

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import evaluating
from antidote_bench.utils.detection import triggers
from antidote_bench.utils.optimizers import sgd
from antidote_bench.utils.repair import reversal
from antidote_bench.utils.repair.layers import frozen, require_features
from antidote_bench.utils.train import cross_entropy, trainable


def check(model, record, config):
    if config.source == "btidbf":
        require_features(model, record, config)


def repair(model, record, config):
    victim = [weight.detach().clone() for weight in trainable(model)]
    recipe = reversal.constant(config, config.lr, momentum=config.momentum)
    optimizer = sgd(trainable(model), recipe)  # which all rounds share
    for number, change in enumerate(changes(model, record, config)):
        loss = partial(path_aware, victim=victim, change=change, config=config)
        reversal.unlearn(
            model, record, config, recipe, loss=loss, optimizer=optimizer, number=number
        )
    return model


def changes(model, record, config):
    """Yield for every round a function that changes some images of a batch n,3,S,S."""
    if config.source == "none":
        yield from [lambda images: images] * config.rounds
        return
    if config.source == "nc":
        add = flagged_trigger(model, record, config)
        change = partial(reversal.with_changed, generator=add, share=config.share)
        yield from [change] * config.rounds
        return
    for generator in reversal.rounds(model, record, config):
        yield partial(reversal.with_changed, generator=generator, share=config.share)


def flagged_trigger(model, record, config):
    """A function that adds to images n,3,S,S the trigger of a class that Neural Cleanse flags.

    The search is made once, on the victim. Of several classes the one with the smallest mask is
    taken. Where none is flagged, images stay as they are. The record gets triggers.png.
    """
    spec = record.spec
    with evaluating(model), frozen(model):
        found = triggers.find(model, record.clean, spec.classes, config, record.state)
    masks, patterns, success = found
    norms, _, flagged = triggers.judge(masks, success, config)
    image = triggers.chart(masks, patterns, norms, flagged, spec.class_names)
    record.keep("triggers.png", image)
    if not flagged.any():
        print("no class is flagged: the steps are on clean images alone", file=sys.stderr)
        return lambda images: images
    target = int(norms.where(flagged, torch.inf).argmin())
    return partial(triggers.add_trigger, mask=masks[target], pattern=patterns[target])


def path_aware(model, images, labels, index, *, victim, change, config):
    """The cross-entropy of the changed images at the moved weights; images n,3,S,S, labels n.

    Its gradient with respect to the weights is the gradient there, because the move is a constant.
    `victim` are the victim's values of the weights that need a gradient.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    moves = towards(victim, [weight.detach() for weight in weights.values()], config.rho)
    moved = {
        name: weight + move for (name, weight), move in zip(weights.items(), moves, strict=True)
    }
    changed = change(images)
    if config.statistics == "own":
        with torch.no_grad():
            model(changed)  # its buffers follow here, and below their copies do
        moved |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return cross_entropy(partial(functional_call, model, moved), changed, labels, index)


def towards(victim, weights, rho):
    """rho (victim - w) / || victim - w || for every tensor; the norm is that of all together.

    It is 0 where the weights are the victim's.
    """
    ways = torch._foreach_sub(victim, weights)
    length = torch.stack(torch._foreach_norm(ways)).norm() + 1e-12
    return torch._foreach_mul(ways, rho / length)


def main(config):
    run.defend(__name__, config, repair, check=check)
