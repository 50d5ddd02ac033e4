"""Batches of a split, on its own device, and their augmentation; and passes over a whole split."""

import math
import sys
import weakref
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from antidote_bench.utils.data.memmap import MemmapImages
from antidote_bench.utils.device import free_memory
from antidote_bench.utils.errors import UserError, is_out_of_memory

CROP_RATIO = 3 / 4, 4 / 3  # width over height of a resized crop
# crops drawn for an image: the first one that fits is taken, or the whole image where none fits
TRIES = 10
EVALUATION_BATCH = 250  # images per forward pass without a gradient, at most
SMALL = 32 * 32  # pixels of an image up to which a pass is not cut for its memory
PASS_MEMORY = 2**30  # bytes that a pass may take, where so much and as much again is free
# maps of the largest size that a forward pass holds at once: what a layer gets and gives, a
# shortcut, and what a kernel prepares
MAPS_AT_ONCE = 4
# what a backward pass takes beside what the forward pass has saved for it
BACKWARD = 1.25
_measured = weakref.WeakKeyDictionary()  # {network: {(function, shape of an image): bytes}}


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


def batch_slices(count, size):
    """The slices of `size` that cover `count` images in order; the last one may be shorter."""
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]


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

    def pass_over_all(size):
        return torch.cat([function(*batch) for batch in batches(split, size)])

    with evaluating(model), mixed_precision(split.labels.device, precision):
        return halving(pass_over_all, evaluation_batch(model, split.images))


@torch.no_grad()
def predicted_classes(model, images):
    """The classes n that `model`, in the mode it is in, predicts for float images n,3,S,S."""

    def predict(size):
        return torch.cat([model(part).argmax(1) for part in images.split(size)])

    return halving(predict, evaluation_batch(model, images))


def evaluation_batch(model, images, most=None):
    """How many images like `images` one forward pass of `model` takes without a gradient.

    At most `most`, by default EVALUATION_BATCH or all of them, and fewer of large images, so that
    the pass takes PASS_MEMORY at most. The number depends on how much memory is free only where
    that is little.
    """
    if most is None:
        most = max(1, min(EVALUATION_BATCH, len(images)))
    return _fitting(model, images, _forward_bytes, most)


def gradient_batch(model, images, most):
    """How many images like `images` a pass of `model` with its gradient takes, `most` at most."""
    return _fitting(model, images, _gradient_bytes, most)


def _fitting(model, images, bytes_of, most):
    """`most`, halved until so many images take no more memory than a pass may."""
    if images.shape[-1] * images.shape[-2] <= SMALL:
        return most
    known = _measured.setdefault(model, {})
    key = bytes_of, tuple(images.shape[1:])
    if key not in known:
        known[key] = bytes_of(model, to_unit(images[:1]))
    limit = min(PASS_MEMORY, free_memory(images.device) / 2)
    while most > 1 and most * known[key] > limit:
        most = (most + 1) // 2
    return most


def _forward_bytes(model, image):
    """About the memory that a forward pass takes for each image, without a gradient."""
    largest = image.nbytes

    def look(_module, _inputs, output):
        nonlocal largest
        if torch.is_tensor(output):
            largest = max(largest, output.nbytes)

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(look) for module in leaves]
    try:
        with evaluating(model), torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return MAPS_AT_ONCE * largest


def _gradient_bytes(model, image):
    """About the memory that a forward and a backward pass take for each image."""
    saved = Saved(model)
    with evaluating(model), torch.enable_grad(), saved.hooks():
        _output = model(image.clone().requires_grad_())  # alive, so that no storage is used twice
    return BACKWARD * saved.count()


class Saved:
    """Counts the bytes that autograd keeps of forward passes, without the weights of `model`.

    `look()` is called for every tensor that is saved or taken out again.
    """

    def __init__(self, model, look=lambda: None):
        self._model, self._look, self._sizes = model, look, {}

    def hooks(self):
        """The context for the passes that are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def count(self):
        """Bytes; a storage that several tensors share counts once."""
        weights = {part.untyped_storage().data_ptr() for part in self._model.parameters()}
        return sum(size for place, size in self._sizes.items() if place not in weights)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        self._sizes[storage.data_ptr()] = storage.nbytes()
        return self._unpack(tensor)

    def _unpack(self, tensor):
        self._look()
        return tensor


def halving(function, size):
    """`Passes(size).run(function)`, for work that is done once."""
    return Passes(size).run(function)


class Passes:
    """Work in passes of at most `size` images; where memory runs out, `size` is halved for good."""

    def __init__(self, size):
        self.size = size

    def run(self, function):
        """function(size); where memory runs out, once more with half the size, down to 1.

        `function` must be able to begin again. Raises UserError (exit 1) where memory runs out at
        1.
        """
        while True:
            try:
                return function(self.size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.size == 1:
                    raise UserError(
                        "out of memory with a single image in a pass: it takes a smaller --model, "
                        "smaller images (--image_size), or a machine with more free memory"
                    ) from error
            # here nothing refers to what the failed pass has left
            half = (self.size + 1) // 2
            print(f"out of memory: from {self.size} to {half} images in a pass", file=sys.stderr)
            self.size = half
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def mixed_precision(device, precision):
    """The context in which a network computes in bfloat16 (`precision` bf16) or float32 (fp32)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def to_unit(images):
    """uint8 images as float32 in [0, 1], channels last in memory; float images unchanged."""
    if images.is_floating_point():
        return images
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def clipped(pixels):
    """`pixels` clipped to [0, 1], with the derivative 1 at 0 and at 1 too.

    That of torch.clamp is 0 there since torch 2.15: a change that begins at zero could not begin
    where an image is black or white.
    """
    inside = (pixels >= 0) & (pixels <= 1)
    return torch.where(inside, pixels, pixels.detach().clamp(0, 1))


def augmentation(
    spec, pad=4, padding="zeros", first_mirrored=None, *, crop="shift", crop_area=0.08
):
    """The usual augmentation: a random crop, and a mirror where spec.flip allows it.

    Returns augment(images N,3,S,S of any dtype, generator, index=None, epoch=0) -> new images.
    Every image draws its own crop and mirror. `crop` is shift, with `pad` and `padding` (zeros or
    reflect) as in `random_crop`, or resized, with `crop_area` as in `random_resized_crop`. With
    `first_mirrored`, a bool for every position of the training set, an image is mirrored in every
    other epoch instead, and in the first one where it is true; `index` has the positions of the
    batch, `epoch` counts from 0. That is the alternating flip of Jordan 2024 (arXiv 2404.00498).
    """

    def augment(images, generator, index=None, epoch=0):
        if crop == "resized":
            images = random_resized_crop(images, crop_area, generator)
        else:
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


def random_resized_crop(images, smallest, generator):
    """Crop each of images N,3,S,S at random, and resize the crop to S,S.

    The area is from `smallest` to 1, as a share of the image, and the width over the height is from
    3/4 to 4/3. Szegedy et al., "Going deeper with convolutions", CVPR 2015 (arXiv 1409.4842), with
    areas from 0.08. uint8 images are rounded.
    """
    count, _, height, width = images.shape

    def numbers(columns):
        return torch.rand(count, columns, generator=generator, device=images.device)

    boxes = draw_boxes(height, width, (smallest, 1.0), CROP_RATIO, numbers)
    if images.is_floating_point():
        return resized_crops(images, *boxes)
    return resized_crops(images.to(torch.float32), *boxes).round().to(images.dtype)


def draw_boxes(height, width, scale, ratio, numbers):
    """(top, left, height, width) of a random crop of every image, each N, in whole pixels.

    The area is uniform and the ratio is uniform in its logarithm. They are drawn again where a side
    would be too long. `numbers(columns)` gives N,columns random numbers of [0, 1).
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
    """The crop of every image with these corners and sides (each N), resized to the whole size."""
    rows = _linear(top, height, images.shape[2])
    columns = _linear(left, width, images.shape[3])
    return products(images, rows, columns)


def _linear(start, length, size):
    """N,size,size: row i has the weights of a line's pixels in pixel i of the resized crop.

    Pixels are areas: the centre i + 1/2 of `size` stands over (i + 1/2) length / size. Beyond the
    outermost centres of a crop, their values go on.
    """
    pixels = torch.arange(size, device=start.device, dtype=torch.float32)
    inside = ((pixels + 0.5) * (length / size)[:, None] - 0.5).clamp(min=0)
    places = start[:, None] + torch.minimum(inside, length[:, None] - 1)
    return (1 - (places[..., None] - pixels).abs()).clamp(min=0)


def products(images, rows, columns):
    """images N,C,H,W times the matrices `rows` N,H,H along the height and `columns` N,W,W along the
    width."""
    return rows[:, None] @ images @ columns.mT[:, None]
