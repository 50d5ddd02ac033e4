"""Random views of a batch, for contrastive learning: every picture draws its own crop, mirror, colours and blur.

Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations" (SimCLR), ICML 2020
(arXiv 2002.05709), appendix A. All are tensor operations on the device, without a loop over pictures: a resized crop and a
blur act on rows and columns alone, so each is two products with small matrices, which every picture has of its own.
"""

import math

import torch

GREY = 0.2989, 0.587, 0.114  # luma of red, green and blue, as torchvision has it
TRIES = 10  # crops drawn for a picture, of which the first that fits is taken; the whole picture where none does


def views(
    spec, *, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), jitter=(0.4, 0.4, 0.4, 0.1), coloured=0.8, grey=0.2, blurred=0.5, sigma=(0.1, 2.0)
):
    """view(images N,3,S,S uint8 or float in [0, 1], generator) -> new images, float32 in [0, 1].

    `scale` and `ratio` are ranges of a crop's area, as a share, and of width over height; it is resized with straight
    lines between pixels. Pictures are mirrored where the data set allows it. `jitter` says how far brightness, contrast,
    saturation (as factors around 1) and hue (in turns) go, in a random order, `sigma` is the range of a Gaussian blur in
    pixels; `coloured`, `grey` and `blurred` are the shares of pictures whose colours are changed, that turn grey, and that
    are blurred.
    """

    def view(images, generator):
        count, _, height, width = images.shape

        def numbers(columns):  # N,columns of [0, 1)
            return torch.rand(count, columns, generator=generator, device=images.device)

        def chosen(share):
            return numbers(1)[..., None, None] < share

        boxes = draw_boxes(height, width, scale, ratio, numbers)
        images = images.to(torch.float32) if images.is_floating_point() else images.to(torch.float32) / 255
        images = resized_crops(images, *boxes)
        if spec.flip:
            images = torch.where(chosen(0.5), images.flip(-1), images)
        images = torch.where(chosen(coloured), recoloured(images, jitter, numbers), images)
        images = torch.where(chosen(grey), luma(images), images)
        if blurred:
            widths = sigma[0] + (sigma[1] - sigma[0]) * numbers(1)[:, 0]
            images = torch.where(chosen(blurred), blur(images, widths, 3 * sigma[1]), images)
        return images.contiguous(memory_format=torch.channels_last)

    return view


def pairs(view):
    """An `augment` for batches that makes of n pictures 2n: a first view of each, then a second one."""
    return lambda images, generator, **_: view(torch.cat([images, images]), generator)


def draw_boxes(height, width, scale, ratio, numbers):
    """(top, left, height, width) of a random crop of every picture, each N, in whole pixels.

    The area is uniform and the ratio uniform in its logarithm, drawn again where a side would be too long.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers(TRIES))
    narrowest, widest = map(math.log, ratio)
    shape = torch.exp(narrowest + (widest - narrowest) * numbers(TRIES))
    wide, high = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (wide >= 1) & (wide <= width) & (high >= 1) & (high <= height)
    first, any_fits = fits.to(torch.uint8).argmax(1, keepdim=True), fits.any(1)
    wide = torch.where(any_fits, wide.gather(1, first)[:, 0], width)
    high = torch.where(any_fits, high.gather(1, first)[:, 0], height)
    down, right = numbers(2).unbind(1)
    return (down * (height - high + 1)).floor(), (right * (width - wide + 1)).floor(), high, wide


def resized_crops(images, top, left, height, width):
    """Of every picture the crop with these corners and sides (each N), bilinearly resized to the size of the whole."""
    return products(images, _linear(top, height, images.shape[2]), _linear(left, width, images.shape[3]))


def _linear(start, length, size):
    """N,size,size: row i has the weights with which pixel i of the resized crop takes from the pixels of a line.

    Pixels are areas: centre i + 1/2 of `size` stands over (i + 1/2) length / size. What lies beyond a crop's outermost
    centres is as they are.
    """
    pixels = torch.arange(size, device=start.device, dtype=torch.float32)
    inside = ((pixels + 0.5) * (length / size)[:, None] - 0.5).clamp(min=0)
    places = start[:, None] + torch.minimum(inside, length[:, None] - 1)
    return (1 - (places[..., None] - pixels).abs()).clamp(min=0)


def products(images, rows, columns):
    """images N,C,H,W with the matrices `rows` N,H,H applied to the lines of each and `columns` N,W,W to the columns."""
    return rows[:, None] @ images @ columns.mT[:, None]


def recoloured(images, jitter, numbers):
    """images with brightness, contrast and saturation times 1 - `jitter` to 1 + `jitter`, and hue moved by up to jitter[3] turns."""
    reach = images.new_tensor(jitter)
    drawn = reach * (2 * numbers(4) - 1)
    return jittered(images, 1 + drawn[:, :3], drawn[:, 3], numbers(3).argsort(1), (4 * numbers(1)[:, 0]).floor())


def luma(images):
    """N,1,H,W: how bright the pixels of N,3,H,W are."""
    red, green, blue = images.split(1, 1)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue


def jittered(images, factors, turns, order, before):
    """images with brightness, contrast and saturation changed by their `factors` N,3 and hue by `turns` N.

    The three go in the `order` N,3 (of 0, 1, 2) that each picture has, and the hue comes after as many of them as `before` N
    says: it is computed once for all, because it is what costs.
    """
    rounds = list(zip(range(3), order.unbind(1), factors.gather(1, order).unbind(1), strict=True))
    for place, kind, factor in rounds:
        images = adjusted(images, kind, torch.where(place < before, factor, 1))
    images = turned(images, turns)
    for place, kind, factor in rounds:
        images = adjusted(images, kind, torch.where(place < before, 1, factor))
    return images


def adjusted(images, kind, factor):
    """images times `factor` N in what each picture's `kind` N names, in [0, 1]: 0 brightness, 1 contrast, 2 saturation.

    What a picture moves away from is black, the mean of its luma, or the luma of each pixel.
    """
    kind, factor = kind[:, None, None, None], factor[:, None, None, None]
    light = luma(images)
    origin = torch.where(kind == 2, light, torch.where(kind == 1, light.mean((2, 3), keepdim=True), 0))
    return torch.lerp(origin.expand_as(images), images, factor).clamp(0, 1)


def turned(images, turns):
    """images with their colours moved around the circle of hues, by `turns` N; value and saturation stay, and so do greys."""
    red, green, blue = images.split(1, 1)
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    spread = high - low
    over = torch.where(spread > 0, spread, 1)
    sixth = torch.where(high == red, (green - blue) / over,
                        torch.where(high == green, 2 + (blue - red) / over, 4 + (red - green) / over))  # fmt: skip
    sixth = (sixth + 6 * turns[:, None, None, None]) % 6  # 0 red, 2 green, 4 blue
    pure = torch.cat([(sixth - 3).abs() - 1, 2 - (sixth - 2).abs(), 2 - (sixth - 4).abs()], 1).clamp(0, 1)
    return torch.addcmul(low, spread, pure)


def blur(images, sigma, reach):
    """Every picture convolved with a Gaussian of its own width `sigma` N, which ends at `reach`, in pixels; edges are mirrored."""
    return products(images, *(_gaussian(sigma, reach, size) for size in images.shape[2:]))


def _gaussian(sigma, reach, size):
    """N,size,size: row i has the weights of a Gaussian around pixel i of a line."""
    reach = min(round(reach), size - 1)  # a mirror shows no more
    offsets = torch.arange(-reach, reach + 1, device=sigma.device)
    taps = torch.softmax(-offsets.square() / (2 * sigma[:, None].square()), 1)  # N,k
    places = (torch.arange(size, device=sigma.device)[:, None] + offsets).abs()
    places = torch.minimum(places, 2 * (size - 1) - places)  # size,k
    rows = taps.new_zeros(len(taps), size, size)
    return rows.scatter_add_(2, places.expand(len(taps), -1, -1), taps[:, None].expand(-1, size, -1))
