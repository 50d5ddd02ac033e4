"""Random views of a batch, for contrastive learning.

Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual
Representations" (SimCLR), ICML 2020 (arXiv 2002.05709), appendix A. All are tensor operations on
the device, without a loop over images. Every image draws its own crop, mirror, colours and blur. A
resized crop and a blur act on rows and columns separately, so that each is two products with small
matrices, which every image has of its own.
"""

import torch

from antidote_bench.utils.data.loader import draw_boxes, products, resized_crops

LUMA = 0.2989, 0.587, 0.114  # weights of red, green and blue, as in torchvision


def views(
    spec,
    *,
    scale=(0.2, 1.0),
    ratio=(3 / 4, 4 / 3),
    jitter=(0.4, 0.4, 0.4, 0.1),
    coloured=0.8,
    grey=0.2,
    blurred=0.5,
    sigma=(0.1, 2.0),
):
    """view(images N,3,S,S uint8 or float in [0, 1], generator) -> new images, float32 in [0, 1].

    `scale` and `ratio` are ranges of a crop's area, as a share of the image, and of its width over
    its height. A crop is resized bilinearly. Images are mirrored where the data set allows it.
    `jitter` says how far brightness, contrast and saturation (as factors around 1) and hue (in
    turns) change, in a random order. `sigma` is the range of the width of a Gaussian blur, in
    pixels. `coloured`, `grey` and `blurred` are the shares of images whose colours are changed,
    that become grey, and that are blurred.
    """

    def view(images, generator):
        count, _, height, width = images.shape

        def numbers(columns):  # N,columns of [0, 1)
            return torch.rand(count, columns, generator=generator, device=images.device)

        def chosen(share):
            return numbers(1)[..., None, None] < share

        boxes = draw_boxes(height, width, scale, ratio, numbers)
        is_float = images.is_floating_point()
        images = images.to(torch.float32) if is_float else images.to(torch.float32) / 255
        images = resized_crops(images, *boxes)
        if spec.flip:
            images = torch.where(chosen(0.5), images.flip(-1), images)
        images = torch.where(chosen(coloured), recoloured(images, jitter, numbers), images)
        images = torch.where(chosen(grey), luma(images), images)
        if blurred:
            widths = sigma[0] + (sigma[1] - sigma[0]) * numbers(1)[:, 0]
            blur = gaussian_blur(images, widths, 3 * sigma[1])
            images = torch.where(chosen(blurred), blur, images)
        return images.contiguous(memory_format=torch.channels_last)

    return view


def pairs(view):
    """An `augment` for batches: n images become 2n, a first view of each and then a second one."""
    return lambda images, generator, **_: view(torch.cat([images, images]), generator)


def recoloured(images, jitter, numbers):
    """images with brightness, contrast, saturation and hue changed at random.

    The first three are multiplied by a factor from 1 - `jitter` to 1 + `jitter`; the hue is shifted
    by up to jitter[3] turns.
    """
    reach = images.new_tensor(jitter)
    drawn = reach * (2 * numbers(4) - 1)
    factors, shifts = 1 + drawn[:, :3], drawn[:, 3]
    order, before = numbers(3).argsort(1), (4 * numbers(1)[:, 0]).floor()
    return jittered(images, factors, shifts, order, before)


def jittered(images, factors, shifts, order, before):
    """images with brightness, contrast and saturation times their `factors` N,3, and the hue moved.

    These three go in the `order` N,3 (of 0, 1, 2) of each image. The hue is moved by `shifts` N,
    after as many of them as `before` N says: once for all images, because that is the expensive
    part.
    """
    rounds = list(zip(range(3), order.unbind(1), factors.gather(1, order).unbind(1), strict=True))
    for place, kind, factor in rounds:
        images = adjusted(images, kind, torch.where(place < before, factor, 1))
    images = hue_shifted(images, shifts)
    for place, kind, factor in rounds:
        images = adjusted(images, kind, torch.where(place < before, 1, factor))
    return images


def adjusted(images, kind, factor):
    """images in [0, 1], with a `factor` N on what each image's `kind` N names.

    0 is brightness, 1 contrast, 2 saturation. An image is moved away from black, from the mean of
    its luma, or from the luma of each pixel.
    """
    kind, factor = kind[:, None, None, None], factor[:, None, None, None]
    light = luma(images)
    contrast_origin = torch.where(kind == 1, light.mean((2, 3), keepdim=True), 0)
    origin = torch.where(kind == 2, light, contrast_origin)
    return torch.lerp(origin.expand_as(images), images, factor).clamp(0, 1)


def luma(images):
    """N,1,H,W: the brightness of the pixels of N,3,H,W."""
    red, green, blue = images.split(1, 1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def hue_shifted(images, turns):
    """images with their hue shifted by `turns` N of its circle.

    Value and saturation stay, and so do greys.
    """
    red, green, blue = images.split(1, 1)
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    spread = high - low
    divisor = torch.where(spread > 0, spread, 1)
    sixth = torch.where(
        high == red,
        (green - blue) / divisor,
        torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixth = (sixth + 6 * turns[:, None, None, None]) % 6  # 0 red, 2 green, 4 blue
    pure = torch.cat(
        [(sixth - 3).abs() - 1, 2 - (sixth - 2).abs(), 2 - (sixth - 4).abs()], 1
    ).clamp(0, 1)
    return torch.addcmul(low, spread, pure)


def gaussian_blur(images, sigma, reach):
    """Every image convolved with a Gaussian of its own width `sigma` N, in pixels.

    The Gaussian ends at `reach` pixels. Beyond its edges an image is mirrored.
    """
    return products(images, *(_gaussian(sigma, reach, size) for size in images.shape[2:]))


def _gaussian(sigma, reach, size):
    """N,size,size: row i has the weights of a Gaussian around pixel i of a line."""
    reach = min(round(reach), size - 1)  # the mirrored line ends there
    offsets = torch.arange(-reach, reach + 1, device=sigma.device)
    taps = torch.softmax(-offsets.square() / (2 * sigma[:, None].square()), 1)  # N,k
    places = (torch.arange(size, device=sigma.device)[:, None] + offsets).abs()
    places = torch.minimum(places, 2 * (size - 1) - places)  # size,k
    rows = taps.new_zeros(len(taps), size, size)
    return rows.scatter_add_(
        2, places.expand(len(taps), -1, -1), taps[:, None].expand(-1, size, -1)
    )
