"""Mini-batches cut from a split on its own device; augmentation acts on whole batches."""

import torch
import torch.nn.functional as F

from utils.stored import Stored

BATCH = 250  # pictures per pass that only looks


def batches(split, size, *, generator=None, augment=None, drop_last=False, part=None, order=None):
    """Yield (images float32 n,3,S,S in [0, 1], labels, positions) until every image was seen once.

    With a `generator` (on the split's device) the order is shuffled and `augment(images, generator, index=positions)` is
    applied to the uint8 images. A last batch of one image joins the one before it, because batch normalisation cannot train on
    it; `drop_last` leaves out every incomplete batch, unless it is the only one. `part` is the slice of each batch that is
    yielded, of pictures that are those of the whole one. `order` is positions: those images come instead, as they stand
    there. Pictures that are not in memory are read ahead, by a thread of their own.
    """
    device, count = split.labels.device, len(split)
    if order is None:
        order = torch.arange(count, device=device) if generator is None else torch.randperm(count, generator=generator, device=device)
    sizes = lengths(len(order), size, drop_last=drop_last)
    parts = order[: sum(sizes)].split(sizes)
    if isinstance(split.images, Stored):
        read = split.images.ahead(parts)
    else:
        read = (split.images.index_select(0, index) for index in parts)
    for index, images in zip(parts, read, strict=True):
        if augment:
            images = augment(images, generator, index=index)
        if part:
            images, index = images[part], index[part]
        yield to_unit(images), split.labels[index], index


def lengths(count, size, *, drop_last=False):
    """The sizes of the batches that `count` images are cut into."""
    full, rest = divmod(count, size)
    if rest == 0 or (drop_last and full):
        return [size] * full
    if rest == 1 and full:
        return [size] * (full - 1) + [size + 1]
    return [size] * full + [rest]


@torch.inference_mode()
def look(model, split, see, precision="fp32"):
    """What see(images, labels, positions) -> n,... returns for all pictures of `split`, in order, as one tensor.

    In evaluation mode, without a gradient and without augmentation; `model` comes out in the mode it came in.
    """
    training = model.training
    model.eval()
    try:
        with mixed_precision(split.labels.device, precision):
            return torch.cat([see(*batch) for batch in batches(split, BATCH)])
    finally:
        model.train(training)


def mixed_precision(device, precision):
    """The context in which a network computes in bfloat16 where `precision` is bf16, and in float32 otherwise."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def to_unit(images):
    """uint8 images as float32 in [0, 1], channels last in memory; float images unchanged."""
    if images.is_floating_point():
        return images
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def augmentation(spec, pad=4, padding="zeros", first_mirrored=None):
    """The field's training augmentation: a random crop after padding, and a mirror where the data set allows it.

    Returns augment(images N,3,S,S of any dtype, generator, index=None, epoch=0) -> new images; every image draws its own crop and
    mirror. `padding` is zeros or reflect. With `first_mirrored`, a bool for every position of the training set, an image is mirrored
    in every other epoch instead, beginning with the first where it is true: `index` has the positions of the batch, `epoch` counts
    from 0. That is the alternating flip of Jordan 2024 (arXiv 2404.00498).
    """

    def augment(images, generator, index=None, epoch=0):
        images = shifted(images, pad, padding, generator)
        if not spec.flip:
            return images
        if first_mirrored is None:
            mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
        else:
            mirrored = first_mirrored[index] ^ (epoch % 2 == 1)
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)

    return augment


def shifted(images, pad, padding, generator):
    """A crop of every image N,3,S,S at a random place, of its own size, after `pad` pixels were added on every side."""
    count, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(0, 2 * pad + 1, (2, count), generator=generator, device=device)
    padded = F.pad(images, (pad,) * 4) if padding == "zeros" else reflected(images, pad)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # N,C,2p+1,2p+1,H,W, a view
    return windows[torch.arange(count, device=device), :, top, left]


def reflected(images, pad):
    """Images N,3,S,S with `pad` pixels more on every side, mirrored at the border; F.pad does not take uint8."""
    sides = []
    for side in images.shape[-2:]:
        line = torch.arange(-pad, side + pad, device=images.device).abs()
        sides.append(side - 1 - (side - 1 - line).abs())
    return images[:, :, sides[0][:, None], sides[1]]
