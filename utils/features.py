"""The features of a network: the input of its last linear layer."""

from torch import nn

from antidote_bench.utils.data.loader import forward_all
from antidote_bench.utils.errors import ConfigError


def last_linear(model):
    """The layer that makes the logits; ConfigError (exit 2) where the model has none.

    It is the last one that the model holds, and in a network that is none of this project the one
    that models/examine.py has marked.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    layers = [layer for layer in layers if getattr(layer, "makes_logits", True)]
    if not layers:
        raise ConfigError(
            "the model has no linear layer that makes the logits of one vector of features per "
            "image: choose another --model for the attack"
        )
    return layers[-1]


def features_of(model, images):
    """The input n,D of the last linear layer for images n,3,S,S; gradients reach the images."""
    return features_and_logits(model, images)[0]


def features_and_logits(model, images):
    """(`features_of` the images, the logits n,C that `model` makes of them)."""
    features = []
    hook = last_linear(model).register_forward_pre_hook(
        lambda _layer, inputs: features.append(inputs[0])
    )
    try:
        logits = model(images)
    finally:
        hook.remove()
    return features[0], logits


def last_features(model, split, precision="fp32"):
    """`features_of` every image of `split`, float32 N,D, in order.

    In evaluation mode and without augmentation; `model` comes out in the mode it came in.
    ConfigError (exit 2) where there is no linear layer.
    """
    return forward_all(
        model, split, lambda images, *_: features_of(model, images).float(), precision
    )
