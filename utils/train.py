"""The one training loop: an optimizer, a schedule, mixed precision, a checkpoint after each
epoch."""

import dataclasses
import hashlib
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from antidote_bench import models
from antidote_bench.models.examine import examine
from antidote_bench.models.pretrained import adopt
from antidote_bench.utils import checkpoint as checkpoints
from antidote_bench.utils import distributed, seeds
from antidote_bench.utils.data.loader import (
    SMALL,
    augmentation,
    batch_sizes,
    batches,
    mixed_precision,
    to_unit,
)
from antidote_bench.utils.errors import ConfigError, MissingError, UserError
from antidote_bench.utils.features import last_linear
from antidote_bench.utils.optimizers import OPTIMIZERS, set_rate

# training images, evenly spaced, that a network without learned first layer is fitted to; fewer
# above SMALL pixels
FITTED = 5000
# torch.compile's names for the modes of --compile
COMPILE = {"default": "default", "cuda_graphs": "reduce-overhead"}


def cross_entropy(model, images, labels, index, label_smoothing=0.0):
    """The usual loss of a batch: images n,3,S,S in [0, 1], labels n, and positions in the split."""
    return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How `fit` trains; the fields are the options of the same names (utils/config.py)."""

    epochs: int
    batch_size: int
    lr: float
    random_seed: int
    precision: str
    lr_min: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.2
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    muon_lr: float = 0.24
    bias_lr_scale: float = 1.0
    small_share: float = 0.0
    small_size: int = 24
    compile: str = "none"
    epoch_steps: int | None = None  # where `fit` gets an `order`

    @classmethod
    def of(cls, config, **changes):
        """All options of a script that say how to train, with `changes`."""
        names = [field.name for field in dataclasses.fields(cls) if hasattr(config, field.name)]
        return cls(**{name: getattr(config, name) for name in names} | changes)

    @classmethod
    def stage(cls, config, *, epochs, batch_size, lr, **changes):
        """One stage of a method: the seed and the precision of a script, and the defaults above."""
        return cls(
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            random_seed=config.random_seed,
            precision=config.precision,
            **changes,
        )


def fit(
    model,
    split,
    recipe,
    *,
    loss=cross_entropy,
    optimizer=None,
    augment=None,
    drop_last=False,
    order=None,
    after_step=None,
    after_epoch=None,
    on_epoch=None,
    checkpoint=None,
    workers=distributed.SINGLE,
):
    """Train `model` in place on `split` and return it, in the mode it came in.

    `loss(model, images, labels, index)` is minimised; where it is a module, its buffers belong to
    the checkpoint. `optimizer(parameters, recipe)` gets the parameters that need a gradient, and is
    by default the one that recipe.optimizer names. `augment(images, generator, index=, epoch=)`
    changes the uint8 images of a batch. `order(model, generator)` gives the positions of the images
    of an epoch, recipe.epoch_steps times batch_size of them; without it an epoch shows every image
    once, shuffled. `after_step()` runs after every optimizer step. After every epoch
    `after_epoch(model)` may change the model, in the same way in all workers, and then
    `on_epoch(model, epoch=, loss=, lr=)` gets it and the mean loss.

    With a `checkpoint` path the state after every epoch is saved there, and training goes on from
    it. Every epoch draws from its own seed, so an interrupted CPU run ends with the same weights.
    Several `workers`, in one process group, each compute their part of every batch, and end with
    the same weights; the first one calls `on_epoch` and writes the checkpoint, which all can read.
    A `loss` must be a mean over images then. Raises UserError (exit 1) when the loss is no longer a
    number.
    """
    device, training = split.labels.device, model.training
    model.to(memory_format=torch.channels_last)
    network = model if workers.size == 1 else distributed.data_parallel(model)
    if recipe.compile != "none":
        network = torch.compile(network, mode=COMPILE[recipe.compile])
    optimizer = (optimizer or OPTIMIZERS[recipe.optimizer])(trainable(model), recipe)
    memory = loss.to(device) if isinstance(loss, nn.Module) else nn.Module()
    done = _resume(checkpoint, model, optimizer, memory, workers)
    sizes = _batch_sizes(split, recipe, drop_last, order, workers)
    steps, weights = len(sizes), [distributed.loss_weight(size, workers) for size in sizes]
    with _progress(recipe, steps, done) as bar:
        for epoch in range(done, recipe.epochs):
            rates = [
                SCHEDULES[recipe.schedule](epoch, step / steps, recipe) for step in range(steps)
            ]
            generator = _seeded(recipe.random_seed, epoch, device, workers)
            shown = batches(
                split,
                recipe.batch_size,
                generator=generator,
                augment=augment and partial(augment, epoch=epoch),
                drop_last=drop_last,
                part=distributed.batch_slice(workers),
                order=order and order(model, generator),
            )
            seen_by = _at_epoch(network, recipe, epoch)
            total = train_epoch(
                seen_by, shown, rates, weights, loss, optimizer, recipe.precision, after_step, bar
            )
            mean = distributed.mean(*total, workers)
            distributed.average_norms(model, workers)
            _require_finite(mean, recipe, epoch)
            bar.set_postfix(epoch=epoch + 1, loss=f"{mean:.3f}")
            if after_epoch:
                after_epoch(model)
            if on_epoch and workers.rank == 0:
                on_epoch(model, epoch=epoch + 1, loss=round(mean, 6), lr=round(rates[-1], 8))
            if checkpoint and workers.rank == 0:
                checkpoints.save(checkpoint, model, optimizer, epoch + 1, memory)
    return model.train(training)


def _progress(recipe, steps, done):
    return tqdm(
        total=steps * recipe.epochs,
        initial=steps * done,
        desc="training",
        unit=" steps",
        disable=None,
    )


def _at_epoch(network, recipe, epoch):
    """The network as it sees the images of an epoch: smaller in the first part of the training."""
    small = epoch < round(recipe.small_share * recipe.epochs)
    return Shrinking(network, recipe.small_size) if small else network


def _require_finite(loss, recipe, epoch):
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} after epoch {epoch + 1}: lower --lr, which is {recipe.lr}"
        )


def _resume(checkpoint, model, optimizer, memory, workers):
    """The number of epochs that are done already, after the checkpoint was loaded."""
    done = checkpoints.load(checkpoint, model, optimizer, memory) if checkpoint else 0
    distributed.require_same(
        done,
        "another checkpoint than the first one: all nodes need the same file system below "
        "--record_path",
        workers,
    )
    return done


def _batch_sizes(split, recipe, drop_last, order, workers):
    """The sizes of an epoch's batches."""
    if order is None:
        sizes = batch_sizes(len(split), recipe.batch_size, drop_last=drop_last)
    else:
        sizes = [recipe.batch_size] * recipe.epoch_steps
    distributed.require_full_batches(sizes, workers)
    return sizes


def retrain(record, flagged, config):
    """The victim's architecture, trained from scratch without the images `flagged` (bool N).

    `config` are RetrainingOptions.
    """
    print(
        f"removing {int(flagged.sum())} of {len(flagged)} images, and retraining on the others",
        file=sys.stderr,
    )
    split = record.train.view((~flagged).nonzero().flatten())
    return fit(
        victim_architecture(record, "retrain", config),
        split,
        Recipe.of(config),
        drop_last=True,
        loss=partial(cross_entropy, label_smoothing=config.label_smoothing),
        augment=augmentation_of(config, record.spec, split),
        on_epoch=partial(record.report, "retrain"),
        checkpoint=record.state / "retrain.safetensors",
    )


def victim_architecture(record, purpose, config):
    """The victim's architecture with new random weights, on the device; `purpose` and the seed
    draw them."""
    return build_seeded_model(
        record.model, record.width, record.spec, record.train, purpose, config.random_seed
    )


def augmentation_of(config, spec, split):
    """The `augment` of a training on `split` that the options crop, crop_area, pad, padding,
    mirror, flip and random_seed describe."""
    if config.mirror is not None:
        spec = dataclasses.replace(spec, flip=config.mirror)
    first_mirrored = None
    if config.flip == "alternating":
        device = split.labels.device
        generator = seeds.generator("alternating flip", config.random_seed, device=device)
        first_mirrored = torch.rand(len(split), generator=generator, device=device) < 0.5
    return augmentation(
        spec,
        config.pad,
        config.padding,
        first_mirrored,
        crop=config.crop,
        crop_area=config.crop_area,
    )


class Shrinking(nn.Module):
    """A network that sees images N,3,S,S resized to `size` pixels, where that is smaller."""

    def __init__(self, network, size):
        super().__init__()
        self.network, self.size = network, size

    def forward(self, images):
        if self.size < images.shape[-1]:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.network(images.contiguous(memory_format=torch.channels_last))


def trainable(model):
    """The parameters of `model` that need a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def new_victim(config, spec, split):
    """The network that an attack trains: with random weights, drawn by torch's global generator, or
    with those of config.pretrained.

    Raises ConfigError (exit 2) where these do not fit, and MissingError (exit 3) without the file.
    """
    chosen = models.chosen(
        config.model, sha256=config.model_sha256, mean=config.mean, std=config.std
    )
    model = build_model(chosen, config.width, spec, split)
    if config.pretrained:
        _load_pretrained(model, Path(config.pretrained), config.pretrained_sha256)
    return model


def _load_pretrained(model, path, sha256):
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MissingError(f"{path}, which --pretrained names, cannot be read") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ConfigError(f"{path} is not the file with the sha256 {sha256[:12]}... any more")
    try:
        head = last_linear(model.network)
    except ConfigError:
        head = None  # every weight must fit then
    names = [name for name, module in model.network.named_modules() if module is head]
    adopt(model.network, checkpoints.from_bytes(content, path), names[0] if names else None, path)


def try_out(config, spec, split):
    """Build the network of an attack that is none of this project, or whose weights lie in a file,
    and let go of it: what does not fit is said before anything is trained."""
    if not (models.is_foreign(config.model) or config.pretrained):
        return
    with torch.random.fork_rng(devices=[]):
        model = new_victim(config, spec, split)
    if models.is_foreign(config.model) and config.small_share:
        examine(model.cpu(), models.label(config.model), spec.classes, config.small_size)


def build_model(name, width, spec, split):
    """A network as `models.build` makes it of `name`, on the device of `split`, the training set.

    torch's global generator draws its weights.
    """
    model = models.build(name, spec, width).to(split.labels.device)
    if hasattr(model.network, "fit_to"):  # most models would not look at the images
        pixels = split.images.shape[-1] * split.images.shape[-2]
        count = min(len(split), FITTED, max(FITTED * SMALL // pixels, 1))
        some = torch.linspace(0, len(split) - 1, count, device=split.labels.device).long()
        models.fit_to(model, to_unit(split.images[some]))
    return model


def build_seeded_model(name, width, spec, split, purpose, seed):
    """The same with weights that `purpose` and `seed` draw."""
    torch.manual_seed(seeds.number(purpose, seed))
    return build_model(name, width, spec, split)


def cosine(epoch, share, recipe):
    """Learning rate of an epoch, counted from 0: from lr down to lr_min along half a cosine."""
    return (
        recipe.lr_min
        + (recipe.lr - recipe.lr_min) * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
    )


def one_cycle(epoch, share, recipe):
    """Learning rate of a step, before which `share` of its epoch is done.

    It rises to lr in the warm-up and then falls to lr_min. Smith and Topin, "Super-Convergence",
    2017 (arXiv 1708.07120), with straight lines and a rise from lr_min.
    """
    done = (epoch + share) / recipe.epochs
    height = done / recipe.warmup if done < recipe.warmup else (1 - done) / (1 - recipe.warmup)
    return recipe.lr_min + (recipe.lr - recipe.lr_min) * height


SCHEDULES = {"cosine": cosine, "one_cycle": one_cycle}


def train_epoch(model, order, rates, weights, loss, optimizer, precision, after_step, bar):
    """Train for one epoch; (sum of the losses, left on the device, number of images).

    `rates` are the learning rates and `weights` the weights of the loss, for every step.
    """
    model.train()
    total, count = 0, 0
    for rate, weight, (images, labels, index) in zip(rates, weights, order, strict=True):
        set_rate(optimizer, rate)
        with mixed_precision(labels.device, precision):
            value = loss(model, images, labels, index)
        optimizer.zero_grad(set_to_none=True)
        (value if weight == 1 else weight * value).backward()
        optimizer.step()
        if after_step:
            after_step()
        total += value.detach() * len(labels)
        count += len(labels)
        bar.update()
    return total, count


def _seeded(seed, epoch, device, workers):
    """The generator of an epoch's order and augmentation.

    Dropout draws from torch's global generator, which is seeded too.
    """
    # no two parts of a batch lose the same features
    others = [workers.rank] if workers.rank else []
    torch.manual_seed(seeds.number("dropout", seed, epoch, *others))
    return seeds.generator("epoch", seed, epoch, device=device)
