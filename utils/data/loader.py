"""Batches of a split, on its own device, and their augmentation; and passes over a whole split."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from antidote_bench.utils.data.memmap import MemmapImages

EVALUATION_BATCH = 250  # images per forward pass without a gradient


def batches(split, size, *, generator=None, augment=None, drop_last=False, part=None, order=None):
    """Yield (images float32 n,3,S,S in [0, 1], labels, positions) until every image was seen once.

    With a `generator` (on the split's device) the order is shuffled, and
    `augment(images, generator, index=positions)` is applied to the uint8 images. A last batch of
    one image joins the one before it, because batch normalisation cannot train on it; `drop_last`
    leaves out every incomplete batch, unless it is the only one. `part` is the slice of each batch
    that is yielded; the augmentation still draws for the whole batch. With `order`, positions, the
    images at these positions come instead. Memory-mapped images are read ahead by a thread.
    """
    if order is None:
        order = _order(len(split), split.labels.device, generator)
    sizes = batch_sizes(len(order), size, drop_last=drop_last)
    parts = order[: sum(sizes)].split(sizes)
    if isinstance(split.images, MemmapImages):
        read = split.images.ahead(parts)
    else:
        read = (split.images.index_select(0, index) for index in parts)
    for index, images in zip(parts, read, strict=True):
        if augment:
            images = augment(images, generator, index=index)
        if part:
            images, index = images[part], index[part]
        yield to_unit(images), split.labels[index], index


def _order(count, device, generator):
    if generator is None:
        return torch.arange(count, device=device)
    return torch.randperm(count, generator=generator, device=device)


def batch_sizes(count, size, *, drop_last=False):
    """The sizes of the batches that `count` images are cut into."""
    full, rest = divmod(count, size)
    if rest == 0 or (drop_last and full):
        return [size] * full
    if rest == 1 and full:
        return [size] * (full - 1) + [size + 1]
    return [size] * full + [rest]


@contextmanager
def evaluating(model):
    """`model` in evaluation mode inside; afterwards every module is in the mode it came in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


@torch.inference_mode()
def forward_all(model, split, function, precision="fp32"):
    """What function(images, labels, positions) -> n,... returns for all images of `split`.

    In order, as one tensor; in evaluation mode, without gradients and without augmentation. `model`
    comes out in the mode it came in.
    """
    with evaluating(model), mixed_precision(split.labels.device, precision):
        return torch.cat([function(*batch) for batch in batches(split, EVALUATION_BATCH)])


def mixed_precision(device, precision):
    """The context in which a network computes in bfloat16 (`precision` bf16) or float32 (fp32)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def to_unit(images):
    """uint8 images as float32 in [0, 1], channels last in memory; float images unchanged."""
    if images.is_floating_point():
        return images
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def augmentation(spec, pad=4, padding="zeros", first_mirrored=None):
    """The usual augmentation: a random crop after padding, and a mirror where spec.flip allows it.

    Returns augment(images N,3,S,S of any dtype, generator, index=None, epoch=0) -> new images.
    Every image draws its own crop and mirror. `padding` is zeros or reflect. With `first_mirrored`,
    a bool for every position of the training set, an image is mirrored in every other epoch
    instead, and in the first one where it is true; `index` has the positions of the batch, `epoch`
    counts from 0. That is the alternating flip of Jordan 2024 (arXiv 2404.00498).
    """

    def augment(images, generator, index=None, epoch=0):
        images = random_crop(images, pad, padding, generator)
        if not spec.flip:
            return images
        if first_mirrored is None:
            mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
        else:
            mirrored = first_mirrored[index] ^ (epoch % 2 == 1)
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)

    return augment


def random_crop(images, pad, padding, generator):
    """Pad images N,3,S,S by `pad` pixels on every side, and crop each to its size at random."""
    count, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(0, 2 * pad + 1, (2, count), generator=generator, device=device)
    padded = F.pad(images, (pad,) * 4) if padding == "zeros" else reflect_pad(images, pad)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # N,C,2p+1,2p+1,H,W, a view
    return windows[torch.arange(count, device=device), :, top, left]


def reflect_pad(images, pad):
    """Images N,3,S,S with `pad` more pixels on every side, mirrored at the border.

    torch's own reflection padding does not take uint8.
    """
    sides = []
    for side in images.shape[-2:]:
        line = torch.arange(-pad, side + pad, device=images.device).abs()
        sides.append(side - 1 - (side - 1 - line).abs())
    return images[:, :, sides[0][:, None], sides[1]]
