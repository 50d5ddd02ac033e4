"""Corruptions of images in five severities, after ImageNet-C.

Hendrycks, Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019 (arXiv 1903.12261). Of its fifteen kinds frost is missing, because it
needs photographs. All random numbers are drawn once, as fields of the size of an image, and are the
same for all images. So what becomes of an image does not depend on the other ones.
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from antidote_bench.utils import seeds

POINTS = 128  # of a Poisson process of rate 1 in each pixel: far more than its mean ever counts
FINEST = 2  # pixels between the grid points of the finest noise of a fog
# what severities 1 to 5 stand for; lengths are shares of the side of an image
DEVIATION = (0.08, 0.12, 0.18, 0.26, 0.38)  # of Gaussian noise
PHOTONS = (60, 25, 12, 5, 3)  # that a white pixel counts in shot noise
REPLACED = (0.03, 0.06, 0.09, 0.17, 0.27)  # share of the values that impulse noise replaces
RADIUS = (0.02, 0.03, 0.04, 0.055, 0.07)  # of the disk of a defocus
GLASS = (0.02, 0.03, 0.045, 0.06, 0.08)  # largest displacement of a pixel behind glass
SOFT = 0.015  # deviation of the blur before and after
PATH = (0.1, 0.14, 0.18, 0.24, 0.3)  # length of a motion
ZOOM = (1.11, 1.16, 1.21, 1.26, 1.31)  # largest factor
FLAKES = (0.02, 0.04, 0.06, 0.09, 0.12)  # share of the pixels that a flake begins in
WHITENED = (0.1, 0.15, 0.2, 0.25, 0.3)  # weight of the bright grey image under snow
FOG = (1.0, 1.5, 2.0, 2.5, 3.0)  # weight of the fog
ADDED = (0.1, 0.2, 0.3, 0.4, 0.5)  # to the largest of the three colours of a pixel
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # what is left of the distances to the mean
ELASTIC = (0.02, 0.03, 0.04, 0.05, 0.065)  # largest displacement
PIXELS = (0.6, 0.5, 0.4, 0.3, 0.25)  # side of the reduced image
QUALITY = (25, 18, 15, 10, 7)  # of the JPEG file


def corrupt(kind, images, severity, seed):
    """Images n,3,S,S in [0, 1] with the corruption `kind`, a key of KINDS; float32, in [0, 1].

    `severity` is from 1 to 5, and `seed` draws the fields. Computes in float32 whatever
    the precision around it.
    """
    with torch.autocast(images.device.type, enabled=False):
        return KINDS[kind](images.float(), severity - 1, seed).clamp(0, 1)


def field(purpose, seed, shape, device, draw=torch.rand):
    """Random numbers of `shape` on the device; `purpose`, a word, and the seed draw them."""
    generator = seeds.generator(f"corruption {purpose}", seed)
    return draw(*shape, generator=generator).to(device)


# Noise


def gaussian_noise(images, level, seed):
    noise = field("gaussian", seed, images.shape[1:], images.device, torch.randn)
    return images + DEVIATION[level] * noise


def shot_noise(images, level, seed):
    """Every value x becomes a Poisson count with mean c x, over c.

    A Poisson process of rate 1 runs in every place; the count is its points up to c x.
    """
    shape = (*images.shape[1:], POINTS)
    gaps = -field("shot", seed, shape, images.device).clamp(min=1e-12).log()
    points = gaps.cumsum(-1)
    mean = (PHOTONS[level] * images).movedim(0, -1).contiguous()
    counts = torch.searchsorted(points, mean)
    return counts.movedim(-1, 0).float() / PHOTONS[level]


def impulse_noise(images, level, seed):
    """Values become 0 or 1, as often the one as the other."""
    chance = field("impulse", seed, images.shape[1:], images.device)
    black, white = chance < REPLACED[level] / 2, chance > 1 - REPLACED[level] / 2
    return images.masked_fill(black, 0).masked_fill(white, 1)


# Blur


def defocus_blur(images, level, seed):
    """The mean over a disk."""
    radius = RADIUS[level] * images.shape[-1]
    distance = _grid(math.ceil(radius), images.device).square().sum(0).sqrt()
    return _filtered(images, (radius + 0.5 - distance).clamp(0, 1))


def glass_blur(images, level, seed):
    """Every pixel is displaced by itself, in an image that is blurred before and after."""
    size = images.shape[-1]
    moved = 2 * field("glass", seed, (1, size, size, 2), images.device) - 1
    blurred = _gaussian(images, SOFT * size)
    # in units of half a side, as torch's grids have it
    displaced = transforms.elastic(blurred, 2 * GLASS[level] * moved)
    return _gaussian(displaced, SOFT * size)


def motion_blur(images, level, seed):
    """The mean along a line from the lower left to the upper right."""
    return _filtered(images, _line(PATH[level] * images.shape[-1], images.device))


def zoom_blur(images, level, seed):
    """The mean of the image and five enlargements."""
    total = images
    factors = torch.linspace(1, ZOOM[level], 6)[1:].tolist()
    for factor in factors:
        total = total + transforms.affine(
            images, 0, [0, 0], factor, [0, 0], InterpolationMode.BILINEAR
        )
    return total / (1 + len(factors))


# Weather


def snow(images, level, seed):
    """White flakes, blurred along a line, over an image that is paler."""
    size = images.shape[-1]
    flakes = field("snow", seed, (1, 1, size, size), images.device) < FLAKES[level]
    fallen = 2 * _filtered(flakes.float(), _line(0.1 * size, images.device))
    grey = transforms.rgb_to_grayscale(images)
    weight = WHITENED[level]
    pale = (1 - weight) * images + weight * torch.maximum(images, 1.5 * grey + 0.5)
    return pale + fallen + fallen.rot90(2, (2, 3))


def fog(images, level, seed):
    """Fractal noise is laid over the image, which keeps its largest value."""
    size = images.shape[-1]
    noise, step, weight = 0, size, 1.0
    while step >= FINEST:
        side = math.ceil(size / step) + 1
        grid = field(f"fog {step}", seed, (1, 1, side, side), images.device)
        smooth = F.interpolate(grid, (size, size), mode="bilinear", align_corners=True)
        noise, step, weight = noise + weight * smooth, step // 2, weight / 2
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    largest = images.amax((1, 2, 3), keepdim=True)
    return (images + FOG[level] * noise) * largest / (largest + FOG[level])


def brightness(images, level, seed):
    """The largest colour of every pixel is raised, the others in proportion: the value of HSV."""
    value = images.amax(1, keepdim=True)
    raised = (value + ADDED[level]).clamp(max=1)
    return torch.where(value > 0, images * raised / value.clamp(min=1e-6), raised)


# Digital


def contrast(images, level, seed):
    mean = images.mean((2, 3), keepdim=True)
    return mean + CONTRAST[level] * (images - mean)


def elastic(images, level, seed):
    """Every place is displaced, smoothly over the image."""
    size = images.shape[-1]
    raw = 2 * field("elastic", seed, (1, 2, size, size), images.device) - 1
    smooth = _gaussian(raw, 0.1 * size)
    # in units of half a side, as torch's grids have it
    moved = 2 * ELASTIC[level] * smooth / smooth.abs().max()
    return transforms.elastic(images, moved.movedim(1, -1))


def pixelate(images, level, seed):
    """Reduced, and enlarged without smoothing."""
    size = images.shape[-1]
    side = max(round(PIXELS[level] * size), 1)
    return F.interpolate(F.adaptive_avg_pool2d(images, side), (size, size), mode="nearest")


def jpeg(images, level, seed):
    pixels = (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    found = torch.stack([torch.from_numpy(_stored(image, QUALITY[level])) for image in pixels])
    return found.to(images.device).permute(0, 3, 1, 2).float() / 255


def _stored(pixels, quality):
    """uint8 S,S,3 written to a JPEG file and read again."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=quality)
    return np.array(Image.open(content))


KINDS = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic": elastic,
    "pixelate": pixelate,
    "jpeg": jpeg,
}


def _grid(reach, device):
    """2,2r+1,2r+1: how far each place is down and to the right of the centre, in pixels."""
    line = torch.arange(-reach, reach + 1, device=device, dtype=torch.float32)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"))


def _line(length, device):
    """The kernel of a diagonal line through the centre; weights fall to 0 within a pixel of it."""
    down, right = _grid(math.ceil(length / 2), device)
    along = ((right - down) / math.sqrt(2)).clamp(-length / 2, length / 2)
    across = torch.hypot(right - along / math.sqrt(2), down + along / math.sqrt(2))
    return (1 - across).clamp(min=0)


def _filtered(images, kernel):
    """Images n,C,S,S averaged with the weights of a kernel k,k, the border continued."""
    channels, reach = images.shape[1], kernel.shape[-1] // 2
    weights = (kernel / kernel.sum()).expand(channels, 1, -1, -1)
    return F.conv2d(F.pad(images, (reach,) * 4, mode="replicate"), weights, groups=channels)


def _gaussian(images, deviation):
    """Images averaged with the weights of a normal distribution, `deviation` in pixels."""
    side = 2 * math.ceil(3 * deviation) + 1
    return transforms.gaussian_blur(images, [side, side], [deviation, deviation])
