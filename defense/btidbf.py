"""BTI-DBF (U): train a generator that changes what clean images do not need, and unlearn that.

Xu, Huang, Li, Qin, Ren, "Towards Reliable and Efficient Backdoor Trigger Inversion via Decoupling
Benign Features", ICLR 2024. A mask keeps the features that clean images need. A generator changes
images so that the other features move, as a trigger would. The network learns to give the changed
images their true labels and features.

    python defense/btidbf.py --result_file badnet_cifar10

Deviates in the generator, in units and in what is in evaluation mode: see docs/defenses/btidbf.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import ReversalOptions


@dataclass(frozen=True, kw_only=True)
class Config(ReversalOptions):
    unlearn_lr: float = option(1e-4, above=0)
    """learning rate of Adam on the weights of the network"""


if __name__ == "__main__":
    launch(Config)

from functools import partial

import torch
import torch.nn.functional as F

from antidote_bench.utils import run
from antidote_bench.utils.features import features_and_logits
from antidote_bench.utils.optimizers import adam
from antidote_bench.utils.repair import reversal
from antidote_bench.utils.repair.layers import require_features
from antidote_bench.utils.repair.unlearning import at_least_float32
from antidote_bench.utils.train import trainable


def repair(model, record, config):
    recipe = reversal.constant(config, config.unlearn_lr)
    optimizer = adam(trainable(model), recipe)  # which all rounds share
    for number, generator in enumerate(reversal.rounds(model, record, config)):
        loss = partial(unlearning, generator=generator, share=config.share)
        reversal.unlearn(
            model, record, config, recipe, loss=loss, optimizer=optimizer, number=number
        )
    return model


def unlearning(model, images, labels, index, *, generator, share):
    """The cross-entropy of a batch with changed images, and the change of its features.

    images n,3,S,S, labels n. The unit of the second is the mean square of the unchanged features.
    """
    changed = reversal.with_changed(images, generator, share)
    old, _ = features_and_logits(model, images)
    new, logits = features_and_logits(model, changed)
    old, new = at_least_float32(old), at_least_float32(new)
    scale = old.detach().square().mean().clamp(min=torch.finfo(old.dtype).tiny)
    return F.cross_entropy(logits, labels) + (new - old).square().mean() / scale


def main(config):
    run.defend(__name__, config, repair, check=require_features)
