"""A network in two parts: a stem, and a head of the last blocks (airbench's groups, residual
blocks) and what follows them."""

from torch import nn

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


def split(name: str, model: nn.Module, blocks: int = 1) -> tuple[nn.Sequential, nn.Sequential]:
    """(stem, head) of a network that `models.build` has made; the head holds the last `blocks`
    blocks.

    Both consist of the very modules of `model`, in its order: head(stem(pixels)) is model(pixels),
    and what trains one trains the other. Raises ConfigError for a network without such a split.
    """
    if name not in SPLITS:
        raise ConfigError(
            f"there is no split into stem and head for {name}; there is one for {', '.join(SPLITS)}"
        )
    steps = []
    for part, child in model.network.named_children():
        if part == "fc":  # torchvision flattens between its modules
            steps.append(nn.Flatten())
        steps += child if isinstance(child, nn.Sequential) else [child]
    # all else are single layers
    places = [place for place, step in enumerate(steps) if any(True for _ in step.children())]
    if not 1 <= blocks <= len(places):
        raise ConfigError(f"the head of {name} can hold 1 to {len(places)} blocks, not {blocks}")
    cut = places[-blocks]
    return nn.Sequential(model.normalize, *steps[:cut]), nn.Sequential(*steps[cut:])
