"""A network in two parts: a stem, and a head of the last blocks (airbench's groups, residual
blocks) and what follows them."""

import torch
from torch import nn

from antidote_bench import models
from antidote_bench.models.examine import modes_kept, two_images
from antidote_bench.utils.errors import ConfigError

SPLITS = (
    "airbench",
    "preactresnet18",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet9",
    "wrn16_1",
    "wrn16_1_leaky",
)
TOLERANCE = 1e-3  # of the logits of a chain, relative to the largest


def split(
    name: str | models.Architecture, model: nn.Module, blocks: int = 1, size: int = 32
) -> tuple[nn.Sequential, nn.Sequential]:
    """(stem, head) of a network that `models.build` has made of `name`; the head holds the last
    `blocks` blocks.

    Both consist of the very modules of `model`, in its order: head(stem(pixels)) is model(pixels),
    and what trains one trains the other. Whether a network from outside this project is such a
    chain is tried with images of `size` pixels. Raises ConfigError for a network without such a
    split.
    """
    label = getattr(name, "name", name)
    if models.is_foreign(label):
        label = models.label(label)
        steps = _chain(model, label, size)
    elif label in SPLITS:
        steps = _steps(model.network)
        if "fc" in dict(model.network.named_children()):  # torchvision flattens before it
            steps.insert(-1, nn.Flatten())
    else:
        raise ConfigError(
            f"there is no split into stem and head for {label}; there is one for "
            f"{', '.join(SPLITS)}, and for networks of timm, torchvision and files that are chains "
            "of modules"
        )
    places = [place for place, step in enumerate(steps) if _is_block(step)]
    if not places:
        raise ConfigError(f"{label} has no block of convolutions that could be a head")
    if not 1 <= blocks <= len(places):
        raise ConfigError(f"the head of {label} can hold 1 to {len(places)} blocks, not {blocks}")
    cut = places[-blocks]
    return nn.Sequential(model.normalize, *steps[:cut]), nn.Sequential(*steps[cut:])


def _steps(network):
    """The modules in a row that a network consists of, without the Sequentials around them."""
    steps = []
    for child in network.children():
        steps += _steps(child) if isinstance(child, nn.Sequential) else [child]
    return steps


def _is_block(step):
    parts = [module for module in step.modules() if module is not step]
    return any(isinstance(module, nn.Conv2d) for module in parts)


@torch.no_grad()
def _chain(model, label, size):
    """The steps of a network that runs its modules in the order in which it holds them.

    A layer that makes one vector of the maps may be a function call there.
    """
    steps = _steps(model.network)
    device = next(model.parameters()).device
    images = two_images(size, device)
    first_linear = next((i for i, step in enumerate(steps) if isinstance(step, nn.Linear)), None)
    flat = [*steps[:first_linear], nn.Flatten(), *steps[first_linear:]] if first_linear else steps
    with modes_kept(model):
        logits = model.eval()(images)
        largest = logits.abs().max()
        for candidate in (steps, flat):
            if _answers(nn.Sequential(model.normalize, *candidate), images, logits, largest):
                return candidate
    raise ConfigError(
        f"there is no split into stem and head for {label}: it is no chain of modules, each of "
        "which takes what the one before it returns"
    )


def _answers(chain, images, logits, largest):
    try:
        answer = chain(images)
    except Exception:  # modules that do not fit together fail in any way
        return False
    same_shape = torch.is_tensor(answer) and answer.shape == logits.shape
    return same_shape and bool((answer - logits).abs().max() <= TOLERANCE * largest)
