"""The one training loop: SGD or Adam, a schedule, mixed precision, a checkpoint after every epoch."""

import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import models
from utils import crew, files, seeds
from utils.batch import augmentation, batches, lengths, mixed_precision, to_unit
from utils.errors import RefusedError, UserError
from utils.optimizers import OPTIMIZERS, set_rate, states

FITTED = 5000  # training images, evenly spaced, that a network without learned first layer is fitted to
COMPILE = {"default": "default", "cuda_graphs": "reduce-overhead"}  # our words for torch.compile's modes


def cross_entropy(model, images, labels, index, label_smoothing=0.0):
    """The ordinary loss of a batch: images n,3,S,S in [0, 1], labels n, and their positions in the split."""
    return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)


def fit(model, split, config, *, loss=cross_entropy, optimizer=None, augment=None, drop_last=False, order=None, after_step=None,
        on_epoch=None, checkpoint=None, workers=crew.ALONE):  # fmt: skip
    """Train `model` in place on `split` and return it, in the mode it came in.

    `config` gives epochs, batch_size, lr, lr_min, schedule, warmup, optimizer and its options (utils/optimizers.py), compile,
    random_seed and precision (bf16 or fp32).
    `loss(model, images, labels, index)` is what is minimised; where it is a module, its buffers belong to the
    checkpoint. `optimizer(parameters, config)` gets the parameters that need a gradient, and is by default the one that
    config.optimizer names. `augment(images, generator, index=, epoch=)` changes the uint8 images of a batch.
    `order(model, generator)` gives the positions of the pictures that an epoch shows, config.steps times batch_size of them;
    without it, it shows every picture once, shuffled. `after_step()` runs after every optimiser step, `on_epoch(model, epoch=, loss=, lr=)` after
    every epoch with its mean loss. With a `checkpoint` path the state after every epoch is kept there, and training goes
    on from what lies there; every epoch draws from its own seed, so an interrupted CPU run ends with the same weights.
    With several `workers`, who have joined, each one computes its part of every batch, and all end with the same weights;
    the first one calls `on_epoch` and writes the checkpoint, which all can read. A `loss` must be a mean over pictures then.
    Raises UserError (exit 1) when the loss is no longer a number.
    """
    device, training = split.labels.device, model.training
    model.to(memory_format=torch.channels_last)
    network = model if workers.size == 1 else crew.spread(model)
    network = network if config.compile == "none" else torch.compile(network, mode=COMPILE[config.compile])
    optimizer = (optimizer or OPTIMIZERS[config.optimizer])(trained(model), config)
    memory = loss.to(device) if isinstance(loss, nn.Module) else nn.Module()
    done = load_state(checkpoint, model, optimizer, memory) if checkpoint else 0
    sizes = lengths(len(split), config.batch_size, drop_last=drop_last) if order is None else [config.batch_size] * config.steps
    crew.require_parts(sizes, workers)
    crew.require_same(done, "another checkpoint than the first one: all nodes need the same file system below --record_path", workers)
    steps, weights = len(sizes), [crew.weight(size, workers) for size in sizes]
    with tqdm(total=steps * config.epochs, initial=steps * done, desc="training", unit=" steps", disable=None) as bar:
        for epoch in range(done, config.epochs):
            rates = [SCHEDULES[config.schedule](epoch, step / steps, config) for step in range(steps)]
            generator = _seeded(config.random_seed, epoch, device, workers)
            shown = batches(split, config.batch_size, generator=generator, augment=augment and partial(augment, epoch=epoch),
                            drop_last=drop_last, part=crew.part(workers), order=order and order(model, generator))  # fmt: skip
            small = epoch < round(getattr(config, "small_share", 0) * config.epochs)  # only what trains from scratch has the option
            seen_by = Shrinking(network, config.small_size) if small else network
            mean = crew.mean(*one_pass(seen_by, shown, rates, weights, loss, optimizer, config.precision, after_step, bar), workers)
            crew.settle(model, workers)
            if not math.isfinite(mean):
                raise UserError(f"the loss is {mean} after epoch {epoch + 1}: lower --lr, which is {config.lr}")
            bar.set_postfix(epoch=epoch + 1, loss=f"{mean:.3f}")
            if on_epoch and workers.rank == 0:
                on_epoch(model, epoch=epoch + 1, loss=round(mean, 6), lr=round(rates[-1], 8))
            if checkpoint and workers.rank == 0:
                save_state(checkpoint, model, optimizer, epoch + 1, memory)
    return model.train(training)


def retrain(record, flagged, config):
    """The victim's network with new random weights, trained on the found set without the pictures `flagged` (bool N).

    `config` is a config.Retraining.
    """
    print(f"removing {int(flagged.sum())} of {len(flagged)} pictures, and training anew on the others", file=sys.stderr)
    kept = record.train.view((~flagged).nonzero().flatten())
    return fit(fresh(record, "retrain", config), kept, config, drop_last=True,
               loss=partial(cross_entropy, label_smoothing=config.label_smoothing), augment=augmentation_of(config, record.spec, kept),
               on_epoch=partial(record.report, "retrain"), checkpoint=record.state / "retrain.safetensors")  # fmt: skip


def fresh(record, purpose, config):
    """The victim's network with new random weights, which differ by `purpose`, on the device."""
    return new(record.model, record.width, record.spec, record.train, purpose, config.random_seed)


def augmentation_of(config, spec, split):
    """The `augment` of a training on `split` that the options pad, padding, flip and random_seed describe."""
    first_mirrored = None
    if config.flip == "alternating":
        device = split.labels.device
        generator = seeds.generator("alternating flip", config.random_seed, device=device)
        first_mirrored = torch.rand(len(split), generator=generator, device=device) < 0.5
    return augmentation(spec, config.pad, config.padding, first_mirrored)


class Shrinking(nn.Module):
    """A network that sees images N,3,S,S resized to `size` pixels, where that is smaller."""

    def __init__(self, network, size):
        super().__init__()
        self.network, self.size = network, size

    def forward(self, images):
        if self.size < images.shape[-1]:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.network(images.contiguous(memory_format=torch.channels_last))


def trained(model):
    """The parameters of `model` that need a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def new(name, width, spec, split, purpose, seed):
    """A network as `models.build` makes it, on the device of `split`, the training set; `purpose` and `seed` draw its weights."""
    torch.manual_seed(seeds.number(purpose, seed))
    return untrained(name, width, spec, split)


def untrained(name, width, spec, split):
    """The same with weights from the global generator."""
    model = models.build(name, spec, width).to(split.labels.device)
    some = torch.linspace(0, len(split) - 1, min(len(split), FITTED), device=split.labels.device).long()
    models.fit_to(model, to_unit(split.images[some]))
    return model


def stage(config, **changes):
    """The options of one stage of a method, as `fit` asks for them: its seed and precision, and of SGD what is usual.

    epochs, batch_size and lr must be among the changes.
    """
    usual = {"lr_min": 0.0, "schedule": "cosine", "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "compile": "none",
             "optimizer": "sgd", "bias_lr_scale": 1.0}  # fmt: skip
    return SimpleNamespace(**{**usual, "random_seed": config.random_seed, "precision": config.precision, **changes})


def cosine(epoch, share, config):
    """Learning rate of an epoch, counted from 0: from lr down to lr_min along half a cosine."""
    return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * epoch / config.epochs)) / 2


def one_cycle(epoch, share, config):
    """Learning rate of the step before which the `share` of an epoch is done: up to lr in the warm-up, then down to lr_min.

    Smith and Topin, "Super-Convergence", 2017 (arXiv 1708.07120), with straight lines and a rise from lr_min.
    """
    done = (epoch + share) / config.epochs
    height = done / config.warmup if done < config.warmup else (1 - done) / (1 - config.warmup)
    return config.lr_min + (config.lr - config.lr_min) * height


SCHEDULES = {"cosine": cosine, "one_cycle": one_cycle}


def one_pass(model, order, rates, weights, loss, optimizer, precision, after_step, bar):
    """One pass, a rate and the loss's weight for every step; (sum of the losses, left on the device, pictures)."""
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
    """The generator of one epoch's order and augmentation; dropout draws from the global one, which is seeded too."""
    others = [workers.rank] if workers.rank else []  # no two parts of a batch lose the same features
    torch.manual_seed(seeds.number("dropout", seed, epoch, *others))
    return seeds.generator("epoch", seed, epoch, device=device)


def save_state(path, model, optimizer, epoch, memory=None):
    """Keep everything that the next epoch starts from, without pickle; `memory` is a module with buffers of its own."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"loss/{name}": tensor for name, tensor in (memory or nn.Module()).state_dict().items()}
    for number, (_, state) in enumerate(states(optimizer)):
        tensors |= {f"optimizer/{number}/{name}": value for name, value in state.items() if torch.is_tensor(value)}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    files.write(path, safetensors.torch.save(whole, {"epoch": str(epoch)}))


def load_state(path, model, optimizer, memory=None):
    """Load what save_state has kept; the number of epochs it has seen, 0 where there is none."""
    if not Path(path).is_file():
        return 0
    try:
        with safetensors.safe_open(path, "pt") as file:
            epoch = int(file.metadata()["epoch"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, KeyError, TypeError) as error:
        raise RefusedError(f"the checkpoint {path} is damaged: delete the folder {Path(path).parent} to start again") from error
    known = states(optimizer)
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part == "optimizer":
            number, _, key = rest.partition("/")
            parameter, state = known[int(number)]
            if tensor.shape == parameter.shape:  # the fused step reads memory as it lies: channels last, like the weights
                tensor = torch.empty_like(parameter).copy_(tensor)
            state[key] = tensor.to(parameter.device)
    for part, module in (("model/", model), ("loss/", memory or nn.Module())):
        module.load_state_dict({name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)})
    return epoch
