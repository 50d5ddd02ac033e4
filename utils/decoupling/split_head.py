"""A network as its features and its last linear layer, which makes the logits of them."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from antidote_bench.utils.features import last_features, last_linear


def known_features(model, split, config):
    """(features n,D of the images of `split`, the layer that makes the logits of them).

    The features have the type of the layer's weights.
    """
    head = last_linear(model)
    return last_features(model, split, config.precision).clone().to(head.weight), head


@contextmanager
def features_times(model, factor):
    """The features of `model` are multiplied by `factor` (D) inside; None leaves them alone."""
    if factor is None:
        yield
        return
    handle = last_linear(model).register_forward_pre_hook(
        lambda _layer, inputs: (inputs[0] * factor,)
    )
    try:
        yield
    finally:
        handle.remove()


def mask_loss(head, features, labels, mask):
    """CE(h(m F), y) - CE(h((1 - m) F), y) of features n,D and a mask D.

    It is low where the mask keeps what the labels need and drops the rest.
    """
    kept, removed = (
        F.cross_entropy(head(factor * features), labels) for factor in (mask, 1 - mask)
    )
    return kept - removed


def shares_of_others(answers, labels, classes):
    """Of every class the share of the images of other classes that are taken for it, float64 K."""
    taken = answers[:, None] == torch.arange(classes, device=answers.device)
    other = labels[:, None] != torch.arange(classes, device=answers.device)
    found = (taken & other).sum(0).double() / other.sum(0).clamp(min=1)
    return found.cpu()
