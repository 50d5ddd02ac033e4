"""What training costs here: measured on a few batches of noise, and extrapolated."""

import copy
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from antidote_bench.utils.data.loader import BACKWARD, Saved, mixed_precision, to_unit
from antidote_bench.utils.errors import ConfigError, is_out_of_memory
from antidote_bench.utils.text import cut

SECONDS = 5.0  # within which measuring ends, but for the first step
LONGEST = 8.0  # seconds after which even that one is broken off
FIRST = 2  # images of the first batch: batch normalisation needs more than one
SAFE_SIDE = 32  # pixels
GROWTH = 4  # from one measured batch to the next
COPIES = 3  # of the weights: themselves, their gradients and the optimizer's state


class Cost(NamedTuple):
    """What a training step takes."""

    seconds: float
    memory: int  # bytes, those of the weights included
    measured: int  # images of the largest batch that was measured
    is_least: bool  # both are at least so much: the first step was broken off


class _BrokenOffError(Exception):
    """A step took too long; it holds the bytes that it had saved."""


def of_step(model, batch, classes, side, precision, *, optimizer=None, augment=None):
    """The `Cost` of a step of `model` on `batch` images of `side` pixels; the model is trained.

    Batches grow up to the whole one while the next one would end within SECONDS. `optimizer` makes
    its step too, and `augment(images, generator)` changes the uint8 images before. Raises
    ConfigError (exit 2) where the network does not train on such a batch.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    begin, seconds, saved, last = time.perf_counter(), {}, {}, 0
    for size in _sizes(batch):
        start = time.perf_counter()
        if last and start - begin + seconds[last] * size / last > SECONDS:
            break
        shape = size, 3, side, side
        images = torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)
        labels = torch.arange(size, device=device) % classes
        if augment:
            images = augment(images, generator)
        limit = math.inf if last else start + LONGEST
        try:
            saved[size] = train_once(model, to_unit(images), labels, precision, optimizer, limit)
        except _BrokenOffError as error:
            kept = {size: error.args[0]}
            return Cost(LONGEST * batch / size, _memory(model, kept, batch), size, True)
        except RuntimeError as error:
            if is_out_of_memory(error) and last:
                break
            raise
        # the first time a size is seen, kernels are made for it
        seconds[size] = min(seconds.get(size, math.inf), time.perf_counter() - start)
        last = size
    return Cost(seconds[last] * batch / last, _memory(model, saved, batch), last, False)


def _sizes(batch):
    """The sizes of the measured batches, each twice."""
    size = min(FIRST, batch)
    yield from (size, size)
    while size < batch:
        size = min(GROWTH * size, batch)
        yield from (size, size)


def train_once(model, images, labels, precision, optimizer=None, limit=math.inf):
    """One step in training mode; the bytes of what the forward pass has saved for the backward one.

    images float n,3,S,S in [0, 1], labels n. Raises ConfigError (exit 2) where the network does not
    take them. The step is broken off when time.perf_counter() exceeds `limit`.
    """

    def look():
        if time.perf_counter() > limit:
            raise _BrokenOffError(saved.count())

    saved = Saved(model, look)
    model.train()
    try:
        with saved.hooks(), mixed_precision(images.device, precision):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
    except (ValueError, RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(_why(error, images)) from error
    if optimizer:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return saved.count()


def require_trainable(make_model, batch, side):
    """Raise ConfigError (exit 2) where a network does not train on `batch` images of `side` pixels.

    Every network here takes two images of SAFE_SIDE pixels. `make_model()` gives the network, which
    stays as it is, and is called only where there is less.
    """
    if batch > 1 and side >= SAFE_SIDE:
        return
    model = copy.deepcopy(make_model())
    device = next(model.parameters()).device
    count = min(batch, FIRST)
    images = torch.zeros(count, 3, side, side, device=device)
    train_once(model, images, torch.zeros(count, dtype=torch.long, device=device), "fp32")


def _why(error, images):
    side, text = images.shape[-1], str(error)
    if "more than 1 value per channel" in text:
        return (
            f"batch normalisation does not train on one image of {side} pixels at a time: "
            "--batch_size must be 2 or more"
        )
    return (
        f"the network does not train on images of {side} pixels ({cut(text, 120)}): choose another "
        "--model or --image_size"
    )


def _memory(model, saved, batch):
    """Bytes of a step with `batch` images, of what was saved with other numbers of them."""
    smallest, largest = min(saved), max(saved)
    slope = saved[largest] / largest
    if largest > smallest:
        slope = (saved[largest] - saved[smallest]) / (largest - smallest)
    weights = sum(value.nbytes for value in model.state_dict().values())
    return int(COPIES * weights + BACKWARD * slope * batch)
