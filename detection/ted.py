"""TED: on its way through the layers a triggered image has other neighbours than a clean one.

Mo, Zhang, Zhang, Luo, Sun, Hu, Gao, Xiang, "Robust Backdoor Detection for Deep Learning via
Topological Evolution Dynamics", IEEE S&P 2024 (arXiv 2312.02673). In each layer, the clean images
that are nearer than the nearest one of the predicted class are counted. The score is how far these
counts lie from those of clean images. The variant tedpp also asks whether the image lies within its
class: Le et al., "TED++", 2025 (arXiv 2510.14299).

    python detection/ted.py --result_file badnet_cifar10

Deviates in the score and in pooled maps; see docs/detection/ted.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import InputOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(InputOptions):
    variant: Literal["ted", "tedpp"] = "ted"
    """tedpp: an image farther from its class than that class is wide gets the largest count"""
    images: int = option(1000, at_least=2, unit="images")
    """clean images, predicted correctly, that an input is compared with, at most"""
    components: int = option(0, at_least=0)
    """principal components of the counts that the score takes, from the largest one (0: all)"""
    distance: Literal["variance", "eigenvectors"] = "variance"
    """variance: squared distances along the components, over their variance; eigenvectors: summed
    distances to the eigenvectors, over their share of the variance, as a known library has it"""
    contamination: float = option(0.01, above=0, below=1)
    """share of the clean images above which the paper's own rule flags an input"""


if __name__ == "__main__":
    launch(Config)

import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import forward_all
from antidote_bench.utils.detection.inspector import Scored
from antidote_bench.utils.errors import ConfigError

LARGEST = 4096  # values of a map that is not pooled
POOLED = 4  # side of a pooled map
INSIDE = 0.5  # share of its mates that an image of the reference has within the width of its place
LEAST = 1e-6  # a component's variance, as a share of the largest, below which it is left out


def score(model, record, config):
    known, labels = reference_outputs(model, record.reference, config)
    widths = [None] * len(known)
    if config.variant == "tedpp":
        widths = [class_widths(layer, labels) for layer in known]

    def of_batch(images, *_):
        outputs, predicted = layer_outputs(model, images)
        return torch.stack(
            [
                ranks(torch.cdist(output, layer), predicted, labels, width)
                for output, layer, width in zip(outputs, known, widths, strict=True)
            ],
            1,
        )

    found = forward_all(model, record.suspects, of_batch, config.precision)
    own = reference_ranks(known, labels, widths)
    distances = outlier_distance(found, own, config)
    limit = outlier_distance(own, own, config).quantile(1 - config.contamination)
    return Scored(distances, distances > limit)


def watched_layers(model):
    """The layers whose outputs are looked at: convolutions larger than 1x1, ReLUs, linear layers.

    Where the model has no module for its ReLUs, the batch norms take their place.
    """
    modules = list(model.modules())
    has_relu = any(isinstance(module, nn.ReLU) for module in modules)
    kinds = (nn.Linear, nn.ReLU if has_relu else nn.BatchNorm2d)
    return [
        module
        for module in modules
        if isinstance(module, kinds)
        or (isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1)
    ]


def layer_outputs(model, images):
    """([float32 n,D of every layer, in the order in which they run], predictions n).

    A layer that runs twice counts twice.
    """
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda own, _, output: outputs.append(flat(own, output)))
        for layer in watched_layers(model)
    ]
    try:
        predicted = model(images).argmax(1)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs, predicted


def flat(layer, output):
    """n,D of a layer's output.

    Where it has more than LARGEST values, maps are averaged to POOLED x POOLED, and what a linear
    layer gives for many places of an image is averaged over them.
    """
    if output[0].numel() > LARGEST and output.ndim > 2:
        if isinstance(layer, nn.Linear):
            output = output.flatten(1, -2).mean(1)
        elif output.ndim == 4:
            output = F.adaptive_avg_pool2d(output, POOLED)
    return output.flatten(1).float().clone()  # a layer in place may follow


def reference_outputs(model, reference, config):
    """([float32 m,D of every layer], labels m) of reference images that are predicted correctly.

    At most config.images of them, drawn by the seed. Raises ConfigError (exit 2) where there are
    fewer than two.
    """
    predicted = forward_all(
        model, reference, lambda images, *_: model(images).argmax(1), config.precision
    )
    right = (predicted == reference.labels).nonzero().flatten()
    if len(right) < 2:
        raise ConfigError(
            f"the victim classifies {len(right)} of {len(reference)} clean images correctly, and "
            "ted compares inputs with such images: raise --clean_count"
        )
    generator = seeds.generator("ted", config.random_seed)
    order = torch.randperm(len(right), generator=generator)[: config.images].sort().values
    chosen = reference[right[order.to(right.device)]]
    sizes = []

    def joined(images, *_):
        outputs, _ = layer_outputs(model, images)
        sizes[:] = [output.shape[1] for output in outputs]
        return torch.cat(outputs, 1)

    outputs = forward_all(model, chosen, joined, config.precision)
    return [part.contiguous() for part in outputs.split(sizes, 1)], chosen.labels


def ranks(distances, predicted, labels, widths=None):
    """How many reference images are nearer than the nearest one of the predicted class: int64 n.

    `distances` are n,m to the images with the true labels m. It is m where no image has the
    predicted class. With the `widths` m of `class_widths` it is m - 1 where the nearest image of
    the class is farther away than its width.
    """
    is_mate = labels[None] == predicted[:, None]
    nearest, place = distances.masked_fill(~is_mate, torch.inf).min(1)
    counts = (distances < nearest[:, None]).sum(1)
    if widths is not None:
        outside = nearest.isfinite() & (nearest > widths[place])
        counts = counts.masked_fill(outside, len(labels) - 1)
    return counts.masked_fill(nearest.isinf(), len(labels))


def class_widths(layer, labels):
    """Of every reference image the distance to so many mates of its class as is INSIDE of them: m.

    With c images of its class it is the ceil(c INSIDE)-th smallest distance to another one, and
    infinite for an image without mates.
    """
    distances = torch.cdist(layer, layer)
    is_mate = labels[None] == labels[:, None]
    is_mate.fill_diagonal_(False)
    ordered = distances.masked_fill(~is_mate, torch.inf).sort(1).values
    counts = is_mate.sum(1) + 1
    wanted = (INSIDE * counts).ceil().long() - 1
    return ordered.gather(1, wanted[:, None]).squeeze(1)


def reference_ranks(known, labels, widths):
    """The counts of the reference images among the others, int64 m,L.

    Images that have no mate of their class are left out.
    """
    found = []
    for layer, width in zip(known, widths, strict=True):
        distances = torch.cdist(layer, layer).fill_diagonal_(torch.inf)
        found.append(ranks(distances, labels, labels, width))
    has_mate = (labels[None] == labels[:, None]).sum(1) > 1
    if has_mate.sum() < 2:
        raise ConfigError(
            "no class has two clean images that the victim classifies correctly, and ted compares "
            "such images: raise --clean_count"
        )
    return torch.stack(found, 1)[has_mate]


def outlier_distance(counts, known, config):
    """How far the rows of `counts` n,L lie from those of `known` m,L; float64 n.

    Both are standardised by the mean and the standard deviation of `known`, whose principal
    components give the directions.
    """
    known, counts = known.double(), counts.double()
    mean, deviation = known.mean(0), known.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    known, counts = (known - mean) / deviation, (counts - mean) / deviation
    covariance = known.T @ known / max(len(known) - 1, 1)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    count = int((values > LEAST * values[0]).sum())
    count = min(config.components or count, count)
    values, vectors = values[:count], vectors[:, :count]
    if config.distance == "variance":
        return ((counts @ vectors).square() / values).sum(1)
    return (torch.cdist(counts, vectors.T) * (covariance.trace() / values)).sum(1)


def main(config):
    run.detect(__name__, config, score)
