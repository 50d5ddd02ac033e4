"""Patterns made with the help of a clean model: neuron inversion and universal perturbations."""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from antidote_bench.utils import seeds
from antidote_bench.utils.data.loader import (
    Passes,
    clipped,
    gradient_batch,
    mixed_precision,
    to_unit,
)
from antidote_bench.utils.features import features_of, last_features, last_linear
from antidote_bench.utils.poisoning import patterns

NEURONS = 2  # features that an inverted pattern is made for
SAMPLE = 1000  # training images that say how active a feature usually is


def invert(model, train, mask, start, *, steps, rate, radius=1.0, factor=10):
    """A pattern 3,S,S in [0, 1] that drives the strongest features of a clean model.

    It is zero where `mask` (1,S,S) is, stays within `radius` of `start`, and ends in whole grey
    levels. It descends sum_j (a_j(pattern) - aim_j)^2 by steps of `rate` along the sign of the
    gradient; the aim is `factor` times the largest activation among SAMPLE clean images. Liu et
    al., "Trojaning Attack on Neural Networks", NDSS 2018.
    """
    mask = mask.to(train.images.device)
    start = start.to(train.images.device) * mask
    chosen = strongest_features(model)
    aim = factor * last_features(model, train[:SAMPLE])[:, chosen].amax(0)
    low, high = (start - radius).clamp(0), (start + radius).clamp(max=1)
    pattern = start
    for _ in tqdm(range(steps), desc="inverting", disable=None):
        pattern.requires_grad_()
        cost = (features_of(model, pattern[None])[0, chosen] - aim).square().sum()
        (gradient,) = torch.autograd.grad(cost, pattern)
        pattern = (pattern.detach() - rate * gradient.sign() * mask).clamp(low, high)
    return (pattern.detach() * 255).round() / 255


def excite(
    model, train, apply, start, *, steps, seed, penalty=0.0, low=None, high=None, precision="fp32"
):
    """A pattern p that raises the strongest features of a clean model on apply(images, p).

    It minimises penalty |p|^2 - sum_j a_j / c_j over batches of training images, where c_j is the
    mean activation on clean images; p stays in [low, high].
    """
    chosen = strongest_features(model)
    usual = last_features(model, train[:SAMPLE])[:, chosen].mean(0).clamp(min=1e-3)

    def objective(pattern, images):
        activations = features_of(model, apply(images, pattern))[:, chosen]
        return penalty * pattern.square().sum() - (activations / usual).sum(1).mean()

    return minimise(
        model,
        objective,
        start,
        train,
        steps=steps,
        seed=seed,
        low=low,
        high=high,
        precision=precision,
    )


def low_frequency(model, train, target, *, steps, seed, peak=0.2, precision="fp32"):
    """A smooth pattern 3,S,S that, added to any image, leads it to the class `target`.

    It is a low-pass filtered free field, stretched to [0, peak] and rounded to whole grey levels;
    Adam finds the field that minimises the cross-entropy of the clean model. After Zeng et al.,
    "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021, who use
    DeepFool steps, image by image.
    """
    size = train.images.shape[-1]

    def smooth(field):
        soft = patterns.blur(field[None], 6 * size / 32, radius=round(15 * size / 32))[0]
        return peak * (soft - soft.min()) / (soft.max() - soft.min())

    def objective(field, images):
        targets = torch.full((len(images),), target, device=images.device)
        return F.cross_entropy(model(clipped(images + smooth(field))), targets)

    noise = torch.randn(3, size, size, generator=seeds.generator("low frequency", seed))
    field = minimise(model, objective, noise, train, steps=steps, seed=seed, precision=precision)
    return (smooth(field) * 255).round() / 255


def minimise(
    model,
    objective,
    start,
    train,
    *,
    steps,
    seed,
    low=None,
    high=None,
    rate=0.01,
    batch=128,
    precision="fp32",
):
    """The pattern that Adam reaches from `start` on objective(pattern, images in [0, 1]).

    Every step has a random batch of training images. The objective is a mean over them, in which
    they pass `model`, in evaluation mode.
    """
    device = train.images.device
    generator = seeds.generator("pattern batches", seed, device=device)
    pattern = start.to(device).clone().requires_grad_()
    optimizer = torch.optim.Adam([pattern], rate)
    passes = Passes(gradient_batch(model, train.images, batch))
    for _ in tqdm(range(steps), desc="pattern", disable=None):
        index = torch.randint(len(train), (batch,), generator=generator, device=device)

        def add_gradients(size, index=index):
            optimizer.zero_grad()
            for part in index.split(size):
                with mixed_precision(device, precision):
                    cost = objective(pattern, to_unit(train.images[part]))
                weight = len(part) / batch
                (cost if weight == 1 else weight * cost).backward()

        passes.run(add_gradients)
        optimizer.step()
        if low is not None:
            pattern.data.clamp_(low, high)
    return pattern.detach()


def strongest_features(model):
    """Numbers of the features with the largest sums of absolute weights in the last linear
    layer."""
    return last_linear(model).weight.abs().sum(0).topk(NEURONS).indices
