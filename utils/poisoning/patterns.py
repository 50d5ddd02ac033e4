"""Patterns that several attacks draw: a seeded image, and waves of the cosine transform.

Beside them, the Gaussian blur and the colour conversion that patterns are made with.
"""

import math

import torch
import torch.nn.functional as F

from antidote_bench.utils import seeds


def seeded_image(size, seed):
    """A bright image 3,size,size in [0, 1]: soft clouds under twelve hard-edged discs and boxes.

    Each channel is scaled to a mean of 200 and a standard deviation of 80 grey levels before it is
    clipped, like the copyrighted cartoon that is usually blended in.
    """
    generator = seeds.generator("blended pattern", seed)
    coarse = torch.rand(1, 3, 9, 9, generator=generator)
    image = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)[0]
    rows, columns = torch.meshgrid(*[torch.linspace(0, 1, size)] * 2, indexing="ij")
    for shape in range(12):
        row, column, radius = torch.rand(3, generator=generator)
        colour = (torch.rand(3, generator=generator) < 0.6).float().view(3, 1, 1)
        radius = 0.06 + 0.14 * radius
        if shape % 2:
            distance = (rows - row).square() + (columns - column).square()
        else:
            distance = torch.maximum((rows - row).abs(), (columns - column).abs()).square()
        image = torch.where(distance <= radius**2, colour, image)
    centred = (image - image.mean((1, 2), keepdim=True)) / image.std((1, 2), keepdim=True)
    return (200 / 255 + centred * 80 / 255).clamp(0, 1)


def blur(images, sigma, radius):
    """Gaussian blur of N,C,H,W with zeros outside.

    `sigma` is in pixels, one number or one for each image; the kernel has 2 `radius` + 1 pixels.
    """
    if not torch.is_tensor(sigma):  # filled on the device: a copy there would wait at every step
        sigma = torch.full((1,), sigma, dtype=images.dtype, device=images.device)
    sigma = sigma.to(images).reshape(-1, 1).expand(len(images), 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)
    kernel = kernel[:, None, None]  # NC,1,1,2r+1
    rows = images.reshape(1, -1, *images.shape[2:])
    rows = F.conv2d(rows, kernel, padding=(0, radius), groups=len(kernel))
    rows = F.conv2d(rows, kernel.mT, padding=(radius, 0), groups=len(kernel))
    return rows.reshape(images.shape)


def cosine_waves(size, window, places):
    """S,S: the image whose `window`-pixel blocks have a DCT of 1 at the given places, 0 elsewhere.

    The DCT is the orthonormal DCT-II. It is linear, so adding a number to a coefficient of every
    block is adding a multiple of this image.
    """
    steps = torch.arange(window, dtype=torch.float64)
    wave = torch.zeros(window, window, dtype=torch.float64)
    for row, column in places:
        waves = [
            torch.cos(math.pi * (2 * steps + 1) * k / (2 * window))
            * math.sqrt((1 if k == 0 else 2) / window)
            for k in (row, column)
        ]
        wave += torch.outer(*waves)
    blocks = -(-size // window)
    return wave.repeat(blocks, blocks)[:size, :size].float()


def chroma(plane, red, blue):
    """3,S,S: how R, G and B change when `plane` is added to both chroma planes and the luma stays.

    The planes are red (R - Y) and blue (B - Y), with Y = 0.299 R + 0.587 G + 0.114 B
    (ITU-R BT.601).
    """
    return torch.stack([plane / red, -(0.299 / red + 0.114 / blue) / 0.587 * plane, plane / blue])
