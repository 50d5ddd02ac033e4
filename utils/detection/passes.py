"""Passes through the victim that fit into memory.

Those over all suspects that several detectors share are made once and kept beside the record.
"""

from pathlib import Path

import torch

from antidote_bench.utils import checkpoint, files
from antidote_bench.utils.data import loader
from antidote_bench.utils.device import exact
from antidote_bench.utils.errors import RefusedError
from antidote_bench.utils.features import last_linear

MOST_BYTES = 2**30  # of a pass that is kept; a larger one is made again
GRADIENT_BATCH = 100  # images per backward pass, at most


def penultimate(model, record, config):
    """(features float32 N,D, logits float32 N,classes) of all suspects, in order.

    The features are the input of the last linear layer, in evaluation mode and without
    augmentation. What was computed once is read from record.shared, whose name stands for the
    victim and the suspects; `model` must be the victim.
    """
    images = record.suspects

    def compute():
        layer, seen = last_linear(model), []
        hook = layer.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))

        def both(images, *_):
            seen.clear()
            logits = model(images)
            return torch.cat([seen[0].float(), logits.float()], 1)

        try:
            joint = loader.forward_all(model, images, both, config.precision)
        finally:
            hook.remove()
        return {"joint": joint}

    joint = _kept(record, f"penultimate-{config.precision}", len(images), compute)["joint"]
    classes = record.spec.classes
    return joint[:, :-classes], joint[:, -classes:]


def gradients(model, record, config):
    """{convolution: float32 N,C}: the gradient of each suspect's given-label logit with respect to
    the output of every convolution, averaged over the positions of the map.

    In evaluation mode and float32. One backward pass gives all layers. Kept like `penultimate`.
    """

    def pass_over_all(size):
        parts = [
            _map_gradients(model, images, labels)
            for images, labels, _ in loader.batches(record.suspects, size)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def compute():
        most = min(GRADIENT_BATCH, len(record.suspects))
        size = loader.gradient_batch(model, record.suspects.images, most)
        with loader.evaluating(model), exact():
            return loader.halving(pass_over_all, size)

    return _kept(record, "gradients", len(record.suspects), compute)


def logits_of(model, images):
    """The logits n,K of images n,3,S,S in [0, 1]; without a gradient."""
    images = images.contiguous(memory_format=torch.channels_last)

    def pass_over_all(size):
        with torch.no_grad():
            return torch.cat([model(part) for part in images.split(size)])

    return loader.halving(pass_over_all, loader.evaluation_batch(model, images))


def _map_gradients(model, images, labels):
    """The same for one batch."""
    outputs = {}
    hooks = [
        module.register_forward_hook(
            lambda _layer, _inputs, output, name=name: outputs.__setitem__(name, output)
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    try:
        with torch.enable_grad():
            # frozen weights need no gradient, so the images carry it
            logits = model(images.detach().requires_grad_())
            chosen = logits.gather(1, labels[:, None]).sum()
            found = torch.autograd.grad(chosen, list(outputs.values()))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: gradient.mean((2, 3)) for name, gradient in zip(outputs, found, strict=True)}


def _kept(record, name, count, compute):
    """The tensors `compute()` gives, each of `count` rows, read where they were made before."""
    device = record.suspects.labels.device
    path = Path(record.shared) / f"{name}.safetensors"
    if path.is_file() and not path.is_symlink():
        tensors = checkpoint.read_tensors(path)
        sound = all(
            len(tensor) == count and tensor.dtype == torch.float32 and tensor.isfinite().all()
            for tensor in tensors.values()
        )
        if not sound:
            raise RefusedError(f"{path} is damaged: delete it and run again")
        return {key: tensor.to(device) for key, tensor in tensors.items()}
    tensors = compute()
    if sum(tensor.nbytes for tensor in tensors.values()) <= MOST_BYTES:
        files.write(path, checkpoint.to_bytes(tensors))
    return tensors
