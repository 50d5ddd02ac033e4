"""NAD: train the victim to attend to the same regions of an image as a fine-tuned copy of it does.

Li, Lyu, Koren, Lyu, Li, Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep
Neural Networks", ICLR 2021 (arXiv 2101.05930). The teacher is the victim after some epochs of
fine-tuning. The student is the victim, trained on the clean images with the cross-entropy and the
distance of its attention maps from the teacher's.

    python defense/nad.py --result_file badnet_cifar10

Deviates in the training recipe, and finds the stages of any network; see docs/defenses/nad.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import FineTuningOptions


@dataclass(frozen=True, kw_only=True)
class Config(FineTuningOptions):
    batch_size: int = 256
    """images per step"""
    teacher_epochs: int = option(10, at_least=0)
    """epochs of fine-tuning on the clean images that make the teacher"""
    power: float = option(2.0, at_least=1)
    """p, the power of the feature maps in an attention map"""
    beta1: float = option(500.0, at_least=0)
    """weight of the distance at the first of the three stages"""
    beta2: float = option(1000.0, at_least=0)
    """weight of the distance at the second stage"""
    beta3: float = option(1000.0, at_least=0)
    """weight of the distance at the third stage, which has the smallest maps"""

    @property
    def betas(self):
        """The weights of the three stages, in the order in which they run."""
        return self.beta1, self.beta2, self.beta3


if __name__ == "__main__":
    launch(Config)

import copy
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.utils import run
from antidote_bench.utils.data.loader import augmentation, evaluating, to_unit
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.train import Recipe, cross_entropy, fit

STAGES = 3


def check(model, record, config):
    find_stages(model, to_unit(record.clean.images[:1]))


def repair(model, record, config):
    names = find_stages(model, to_unit(record.clean.images[:1]))
    teacher = fine_tuned(copy.deepcopy(model), record, config)
    record.report("taught", teacher)
    teacher.eval().requires_grad_(False)
    with kept_maps(teacher, names) as teacher_maps, kept_maps(model, names) as student_maps:

        def loss(student, images, labels, index):
            with torch.no_grad():
                teacher(images)
            value = cross_entropy(student, images, labels, index)
            return value + sum(
                beta * distance(student_maps[name], teacher_maps[name], config.power)
                for name, beta in zip(names, config.betas, strict=True)
            )

        return fit(
            model,
            record.clean,
            Recipe.of(config),
            loss=loss,
            augment=augmentation(record.spec),
            on_epoch=partial(record.report, "distill"),
            checkpoint=record.state / "distill.safetensors",
        )


def find_stages(model, images):
    """The names of the three modules that end a stage, in the order in which they run.

    A stage ends with the last map N,C,h,w of its size. The three last sizes count that are larger
    than 1x1 and that some convolution puts out.
    """
    convolution_sizes, last_of_size, hooks = set(), {}, []

    def look(name, module, _inputs, output):
        if isinstance(module, nn.Conv2d):
            convolution_sizes.add(output.shape[2:])
        before_convolutions = not convolution_sizes  # the output is still an image there
        if before_convolutions or not torch.is_tensor(output) or output.ndim != 4:
            return
        size, depth = output.shape[2:], name.count(".") if name else -1
        if size not in last_of_size or depth <= last_of_size[size][0]:
            last_of_size.pop(size, None)  # so that the sizes stay in the order of their last maps
            last_of_size[size] = depth, name

    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(partial(look, name)))
    try:
        with torch.no_grad(), evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    names = [
        name
        for size, (_, name) in last_of_size.items()
        if size in convolution_sizes and min(size) > 1
    ]
    if len(names) < STAGES:
        raise ConfigError(
            f"nad does not apply: the model has maps of {len(names)} size(s) larger than 1x1, and "
            f"nad takes {STAGES}; try ft_sam, or larger images"
        )
    return names[-STAGES:]


def fine_tuned(model, record, config):
    """`model` after the epochs of fine-tuning that make the teacher of it, in place."""
    return fit(
        model,
        record.clean,
        Recipe.of(config, epochs=config.teacher_epochs),
        augment=augmentation(record.spec),
        on_epoch=partial(record.report, "teacher"),
        checkpoint=record.state / "teacher.safetensors",
    )


@contextmanager
def kept_maps(model, names):
    """{name: output N,C,h,w of that module in the last forward pass}, inside."""
    maps, hooks = {}, []
    for name in names:

        def keep(_module, _inputs, output, name=name):
            maps[name] = output
            return output.clone()  # a later in-place sum cannot change what is kept

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def distance(maps, aims, power):
    """The mean square of the difference between the attention of `maps` and that of `aims`."""
    return F.mse_loss(attention(maps, power), attention(aims, power))


def attention(maps, power):
    """sum_c |F_c|^p of maps N,C,h,w as rows N,h*w of L2 norm 1; in float32 at least."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return F.normalize(maps.abs().pow(power).sum(1).flatten(1))


def main(config):
    run.defend(__name__, config, repair, check=check)
