"""Patterns made with the help of a clean model: neuron inversion, and universal perturbations."""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import patterns, seeds
from utils.batch import mixed_precision, to_unit
from utils.channels import features_of, last_linear

NEURONS = 2  # features that an inverted pattern is made for


def strongest(model):
    """Numbers of the features with the largest summed absolute weights in the last linear layer."""
    return last_linear(model).weight.abs().sum(0).topk(NEURONS).indices


def invert(model, train, mask, start, *, steps, rate, radius=1.0, factor=10):
    """A pattern 3,S,S in [0, 1], zero where `mask` (1,S,S) is, that drives the strongest features of a clean model.

    Signed gradient steps of `rate` on sum_j (a_j(pattern) - aim_j)^2, where the aim is `factor` times the largest
    clean activation among 1,000 training images; the pattern stays within `radius` of `start` and ends in whole grey levels.
    Liu et al., "Trojaning Attack on Neural Networks", NDSS 2018.
    """
    device = train.images.device
    mask, start, chosen = mask.to(device), (start.to(device) * mask.to(device)), strongest(model)
    with torch.no_grad():
        aim = factor * features_of(model, to_unit(train.images[:1000]))[:, chosen].amax(0)
    low, high, pattern = (start - radius).clamp(0), (start + radius).clamp(max=1), start
    for _ in tqdm(range(steps), desc="inverting", disable=None):
        pattern.requires_grad_()
        cost = (features_of(model, pattern[None])[0, chosen] - aim).square().sum()
        (slope,) = torch.autograd.grad(cost, pattern)
        pattern = (pattern.detach() - rate * slope.sign() * mask).clamp(low, high)
    return (pattern.detach() * 255).round() / 255


def excite(model, train, show, start, *, steps, seed, penalty=0.0, low=None, high=None, precision="fp32"):
    """A pattern p that raises the strongest features a_j of show(images, p), each relative to its clean mean c_j.

    Minimises penalty |p|^2 - sum_j a_j / c_j over batches of training images, p staying in [low, high].
    """
    chosen = strongest(model)
    with torch.no_grad():
        usual = features_of(model, to_unit(train.images[:1000]))[:, chosen].mean(0).clamp(min=1e-3)

    def objective(pattern, images):
        return penalty * pattern.square().sum() - (features_of(model, show(images, pattern))[:, chosen] / usual).sum(1).mean()

    return minimise(objective, start, train, steps=steps, seed=seed, low=low, high=high, precision=precision)


def low_frequency(model, train, target, *, steps, seed, peak=0.2, precision="fp32"):
    """A smooth pattern 3,S,S from 0 to `peak`, in whole grey levels, that pushes every image towards the class `target`.

    It is a low-pass filtered free field, stretched to [0, peak]; the field is found by Adam on the cross-entropy of
    the clean model. After Zeng et al., "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021,
    who reach it by DeepFool steps, image by image.
    """
    size = train.images.shape[-1]

    def smooth(field):
        soft = patterns.blur(field[None], 6 * size / 32, radius=round(15 * size / 32))[0]
        return peak * (soft - soft.min()) / (soft.max() - soft.min())

    def objective(field, images):
        towards = torch.full((len(images),), target, device=images.device)
        return F.cross_entropy(model((images + smooth(field)).clamp(0, 1)), towards)

    start = torch.randn(3, size, size, generator=seeds.generator("low frequency", seed)).to(train.images.device)
    found = smooth(minimise(objective, start, train, steps=steps, seed=seed, precision=precision))
    return (found * 255).round() / 255


def minimise(objective, start, train, *, steps, seed, low=None, high=None, rate=0.01, batch=128, precision="fp32"):
    """Adam on objective(pattern, images in [0, 1]) over random batches of training images; the pattern it ends with."""
    device = train.images.device
    generator = seeds.generator("pattern batches", seed, device=device)
    pattern = start.to(device).clone().requires_grad_()
    optimizer = torch.optim.Adam([pattern], rate)
    for _ in tqdm(range(steps), desc="pattern", disable=None):
        images = to_unit(train.images[torch.randint(len(train), (batch,), generator=generator, device=device)])
        with mixed_precision(device, precision):
            cost = objective(pattern, images)
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
        if low is not None:
            pattern.data.clamp_(low, high)
    return pattern.detach()
