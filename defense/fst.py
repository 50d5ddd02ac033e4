"""FST: draw the victim's last layer anew, hold it away from the old one, and train all layers.

Min, Qin, Shen, Cheng, "Towards Stable Backdoor Purification through Feature Shift Tuning", NeurIPS
2023 (arXiv 2310.01875). Fine-tuning changes the features of a victim little, and the backdoor
stays in them. A last layer that must differ from the victim's forces the features to change.

    python defense/fst.py --result_file badnet_cifar10

Deviates in the norm of the new last layer before the first step; see docs/defenses/fst.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import FineTuningOptions


@dataclass(frozen=True, kw_only=True)
class Config(FineTuningOptions):
    mode: Literal["fst", "fe_tuning", "ft_init"] = "fst"
    """fst: all layers train, and the new last layer is pushed away from the victim's; fe_tuning: it
    is drawn and then frozen, and the others train; ft_init: all layers train, without the push"""
    alpha: float = option(0.2, at_least=0, needs={"mode": "fst"})
    """weight of the product of the two last layers, which is lowered"""
    epochs: int = option(10, at_least=0)
    """how many times every clean image is shown"""
    weight_decay: float = option(0.0, at_least=0)
    """L2 penalty on all weights"""

    @property
    def variant(self):
        """What tables call the run by, beside the method."""
        return None if self.mode == "fst" else self.mode


if __name__ == "__main__":
    launch(Config)

from contextlib import nullcontext
from functools import partial

import torch

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import augmentation
from antidote_bench.utils.features import last_linear
from antidote_bench.utils.repair.layers import frozen, require_features
from antidote_bench.utils.train import Recipe, cross_entropy, fit


def repair(model, record, config):
    head = last_linear(model)
    old = head.weight.detach().clone()
    draw_anew(head, config.random_seed)
    hold_norm = partial(set_norm, head.weight, old.norm())
    hold_norm()
    loss = cross_entropy
    if config.mode == "fst":
        loss = partial(shifted, head=head, old=old, alpha=config.alpha)
    with frozen(head) if config.mode == "fe_tuning" else nullcontext():
        return fit(
            model,
            record.clean,
            Recipe.of(config),
            loss=loss,
            augment=augmentation(record.spec),
            after_step=hold_norm,
            on_epoch=partial(record.report, "finetune"),
            checkpoint=record.state / "finetune.safetensors",
        )


@torch.no_grad()
def draw_anew(head, seed):
    """Draw weight and bias of a linear layer of d inputs uniformly from -1/sqrt(d) to 1/sqrt(d)."""
    generator, limit = seeds.generator("fst head", seed), head.in_features**-0.5
    for parameter in head.parameters():
        parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * limit)


@torch.no_grad()
def set_norm(weight, norm):
    """Scale `weight` in place to the Frobenius norm `norm`, a tensor."""
    weight.mul_(norm / weight.norm().clamp(min=1e-12))


def shifted(model, images, labels, index, *, head, old, alpha):
    """The cross-entropy of a batch plus alpha times the sum of the products of W and the old W.

    W is the weight of `head`, a part of `model`, whatever its bias is.
    """
    return cross_entropy(model, images, labels, index) + alpha * (head.weight * old).sum()


def main(config):
    run.defend(__name__, config, repair, check=require_features)
