"""Images near those of a data set that belong to none of its classes: distorted ones."""

import torch
from torchvision.transforms.v2 import functional as distort

PIECES = 3  # along each side, of a jigsaw
ALPHA, SIGMA = 50.0, 5.0  # strength and smoothness of an elastic distortion, in pixels


def distorted(images, count, generator):
    """`count` distorted images made of `images` n,3,S,S in [0, 1] in turn, each in one of four
    ways: turned, an elastic distortion, a jigsaw, or a part pasted elsewhere."""
    ways = torch.randint(4, (count,), generator=generator).tolist()
    makers = turned, elastic, jigsaw, pasted
    return torch.stack(
        [makers[way](images[number % len(images)], generator) for number, way in enumerate(ways)]
    )


def turned(image, generator):
    """By 90, 180 or 270 degrees."""
    return image.rot90(_whole(1, 4, generator), (1, 2))


def elastic(image, generator):
    """Every pixel moved by a smooth random field."""
    size = image.shape[-1]
    field = 2 * torch.rand(1, 2, size, size, generator=generator) - 1
    kernel = min(8 * int(SIGMA) + 1, 2 * ((size - 1) // 2) - 1)  # odd, and smaller than the image
    field = distort.gaussian_blur(field, [kernel, kernel], [SIGMA, SIGMA]) * ALPHA / size
    return distort.elastic(image, field.permute(0, 2, 3, 1).to(image.device))


def jigsaw(image, generator):
    """Its PIECES x PIECES parts in another order; the rest at the borders stays."""
    part = image.shape[-1] // PIECES
    places = [(part * row, part * column) for row in range(PIECES) for column in range(PIECES)]
    mixed = image.clone()
    order = torch.randperm(len(places), generator=generator).tolist()
    for (top, left), other in zip(places, order, strict=True):
        down, right = places[other]
        mixed[:, top : top + part, left : left + part] = image[
            :, down : down + part, right : right + part
        ]
    return mixed


def pasted(image, generator):
    """A quarter of its area, from a random place, over another random place."""
    side = image.shape[-1] // 2
    top, left, down, right = (_whole(0, image.shape[-1] - side + 1, generator) for _ in range(4))
    changed = image.clone()
    changed[:, down : down + side, right : right + side] = image[
        :, top : top + side, left : left + side
    ]
    return changed


def _whole(low, high, generator):
    return int(torch.randint(low, high, (1,), generator=generator))
