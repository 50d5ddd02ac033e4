"""SentiNet: the part of an image that decides its class also decides that of other images.

Chou, Tramer, Pellegrino, "SentiNet: Detecting Localized Universal Attacks Against Deep Learning
Systems", IEEE S&P Workshops 2020 (arXiv 1812.00292). Grad-CAM finds that part. It is laid over
clean images, of which a trigger turns most to its class; noise in the same place shows how much the
part hides. The score is how many more images are turned than a clean image's part would turn.

    python detection/sentinet.py --result_file badnet_cifar10

Deviates in that one class is proposed for an input; see docs/detection/sentinet.md.
"""

from dataclasses import dataclass
from typing import ClassVar

from antidote_bench.utils.config import option
from antidote_bench.utils.detection.options import InputOptions
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(InputOptions):
    adds: ClassVar[dict[str, str]] = {
        "evidence.safetensors": "of every image the share of clean images that it has `fooled`, "
        "their mean `confidence` under noise, and the `area` of its part"
    }

    carriers: int = option(100, at_least=1, unit="images")
    """clean images that the part of each input is laid over, as far as there are as many"""
    bounding: int = option(400, at_least=1, unit="images")
    """clean images whose parts set the boundary, at most"""
    part: float = option(0.15, above=0, below=1)
    """value of the Grad-CAM from which on a pixel belongs to the part, as a share of the largest"""


if __name__ == "__main__":
    launch(Config)

import numpy as np
import torch
import torch.nn.functional as F

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data import loader
from antidote_bench.utils.detection.inspector import Scored
from antidote_bench.utils.detection.passes import logits_of
from antidote_bench.utils.errors import ConfigError

GRADIENT_BATCH = 100  # images per backward pass, at most
BINS = 10  # of the confidence, for the boundary
DEGREE = 2  # of the boundary
# weight of the confidence, less than one carrier: where all carriers are fooled by the parts of
# clean images too, the part that hides less is more suspicious
TIE = 1e-3


def score(model, record, config):
    carriers, bounding = (
        record.draw(count, f"sentinet {purpose}", config.random_seed)
        for count, purpose in ((config.carriers, "carriers"), (config.bounding, "boundary"))
    )
    carriers = loader.to_unit(carriers.images)
    found = measure(model, record.suspects, carriers, config)
    known = measure(model, bounding, carriers, config)
    curve = boundary(known[:, 1], known[:, 0])
    scores = found[:, 0] - curve(found[:, 1]) + TIE * found[:, 1]
    evidence = {
        name: found[:, place].contiguous()
        for place, name in enumerate(("fooled", "confidence", "area"))
    }
    return Scored(scores, evidence=evidence)


def measure(model, split, carriers, config):
    """Of every image, float64 N,3: the share of carriers that its part turns to its class, the mean
    confidence with noise instead of the part, and the share of the pixels that are in it."""
    generator = seeds.generator("sentinet noise", config.random_seed)
    noise = torch.rand(carriers.shape[1:], generator=generator).to(carriers.device)
    parts = decisive_parts(model, split, config)
    at_once = max(loader.EVALUATION_BATCH // len(carriers), 1)

    def of_batch(images, _, positions):
        predicted = model(images).argmax(1)
        found = [
            laid_over(model, *some, carriers, noise)
            for some in zip(
                images.split(at_once),
                predicted.split(at_once),
                parts[positions].split(at_once),
                strict=True,
            )
        ]
        area = parts[positions].double().mean((1, 2, 3))
        return torch.cat([torch.cat(found), area[:, None]], 1)

    return loader.forward_all(model, split, of_batch, config.precision)


def laid_over(model, images, predicted, parts, carriers, noise):
    """(share of the carriers that get the prediction, mean confidence under noise), float64 n,2.

    `parts` are bool n,1,S,S, `carriers` k,3,S,S, and `noise` 3,S,S.
    """

    def probabilities(patch):
        shown = torch.where(parts[:, None], patch, carriers[None])  # n,k,3,S,S
        logits = logits_of(model, shown.flatten(0, 1))
        return logits.double().softmax(1).view(len(images), len(carriers), -1)

    fooled = probabilities(images[:, None]).argmax(2) == predicted[:, None]
    confidence = probabilities(noise.expand_as(images)[:, None]).max(2).values
    return torch.stack([fooled.double().mean(1), confidence.mean(1)], 1)


def decisive_parts(model, split, config):
    """The pixels of every image whose Grad-CAM is at least config.part of the largest: bool
    N,1,S,S."""
    size = loader.gradient_batch(model, split.images, min(GRADIENT_BATCH, max(len(split), 1)))

    def pass_over_all(size):
        with loader.evaluating(model), torch.enable_grad():
            return torch.cat(
                [
                    decisive(grad_cam(model, images), config.part)
                    for images, _, _ in loader.batches(split, size)
                ]
            )

    return loader.halving(pass_over_all, size)


def decisive(cams, part):
    """Where a Grad-CAM, one of n,1,S,S, is at least `part` of its largest value."""
    largest = cams.amax((1, 2, 3), keepdim=True)
    return (cams >= part * largest) & (largest > 0)


def grad_cam(model, images):
    """Grad-CAM of the predicted class in the last feature map larger than 1x1: n,1,S,S, no less
    than 0.

    Selvaraju et al., "Grad-CAM", ICCV 2017 (arXiv 1610.02391). Raises ConfigError (exit 2) where
    the model has no feature map.
    """
    maps = []

    def keep(_module, _inputs, output):
        if torch.is_tensor(output) and output.ndim == 4 and output[0, 0].numel() > 1:
            maps[:] = [output]

    hooks = [
        module.register_forward_hook(keep) for module in model.modules() if module is not model
    ]
    try:
        # frozen weights need no gradient, so the images carry it
        logits = model(images.detach().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    if not maps:
        raise ConfigError(
            "sentinet does not apply: the model has no feature map larger than one place; strip "
            "and teco need none"
        )
    (slope,) = torch.autograd.grad(logits.max(1).values.sum(), maps)
    with torch.no_grad():
        weights = slope.float().mean((2, 3), keepdim=True)
        cam = (weights * maps[0].float()).sum(1, keepdim=True).relu()
        return F.interpolate(cam, images.shape[-2:], mode="bilinear")


def boundary(confidence, fooled):
    """The curve over which the parts of clean images do not come: float64 n -> float64 n.

    A parabola, or a line or a constant where the images are too few, is fitted to the largest
    `fooled` of every of BINS intervals of the `confidence`. Outside of the clean images'
    confidences it goes on as a constant.
    """
    x, y = confidence.cpu().numpy(), fooled.cpu().numpy()
    edges = np.linspace(x.min(), x.max(), BINS + 1)
    place = np.digitize(x, edges[1:-1])
    tops = [np.flatnonzero(place == number) for number in range(BINS)]
    tops = np.array([index[y[index].argmax()] for index in tops if len(index)])
    degree = min(DEGREE, len(np.unique(x[tops])) - 1)
    curve = np.polynomial.Polynomial.fit(x[tops], y[tops], degree)

    def height(values):
        shown = values.detach().cpu().numpy().clip(x.min(), x.max())
        return torch.from_numpy(curve(shown)).to(values.device)

    return height


def main(config):
    run.detect(__name__, config, score)
