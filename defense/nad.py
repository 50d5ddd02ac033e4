"""NAD: a fine-tuned copy of the victim shows it where to look, and training on while looking there makes it forget the backdoor.

Li, Lyu, Koren, Lyu, Li, Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks", ICLR
2021 (arXiv 2101.05930). The teacher is the victim after some epochs of fine-tuning; the student is the victim, trained on
the cross-entropy and the distance of its attention maps from the teacher's. Sees the clean pictures.

    python defense/nad.py --result_file badnet_cifar10
    python defense/nad.py --result_file badnet_cifar10 --epochs 10      # as many as the teacher's

The attention of a stage is sum_c |F_c|^p over its maps F, flattened and divided by its L2 norm; the distance is the mean
square. In any network a stage is found by the size of its maps: of every size larger than 1x1 that some convolution
puts out, the output of the outermost module, and among several the last to run, which is a residual stage after its
sum; the last three sizes count. A well-known port takes the third map behind the global pool of PreActResNet18,
where it has one value, which is always 1: only two of its terms are at work. It also runs the student four times
per batch, so that batch norms move four times; here hooks read all maps in the one pass, the teacher is in evaluation
mode, and teacher and student have their own epochs. Rates are those of `ft` and not the paper's steps.

On the digits (resnet9 of width 16, 64 clean pictures, fp32, seed 0, n = 1) the ASR falls from 99.3 to 0.0 for badnet and from 100.0 to 9.8 for
blended, at a price: the ACC falls from 100.0 to 90.2 and from 99.8 to 61.2, and that of a clean model from 99.8 to 83.2. The
distances weigh heavily at the rate of 0.05 that the digits are trained with.
"""

from dataclasses import dataclass

from utils.config import FineTuning, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(FineTuning):
    batch_size: int = 256
    """images per step"""
    teacher_epochs: int = 10
    """passes over the clean pictures that make the teacher"""
    power: float = 2.0
    """p, to which the maps are raised, 1 or more"""
    beta1: float = 500.0
    """weight of the distance at the first of the three stages, 0 or more"""
    beta2: float = 1000.0
    """weight at the second"""
    beta3: float = 1000.0
    """weight at the third, the one with the smallest maps"""

    def __post_init__(self):
        super().__post_init__()
        require(self.teacher_epochs >= 0, "teacher_epochs", "0 or more")
        require(self.power >= 1, "power", "1 or more")
        require(min(self.betas) >= 0, "beta1, beta2 and beta3", "0 or more")

    @property
    def betas(self):
        """The weights of the three stages, in the order in which they run."""
        return self.beta1, self.beta2, self.beta3


if __name__ == "__main__":
    launch(Config)

import copy
import dataclasses
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from utils import run
from utils.batch import augmentation, to_unit
from utils.errors import ConfigError
from utils.train import cross_entropy, fit

STAGES = 3


def repair(model, record, config):
    train = partial(fit, split=record.clean, augment=augmentation(record.spec))
    names = stages(model, to_unit(record.clean.images[:1]))
    teacher = train(copy.deepcopy(model), config=dataclasses.replace(config, epochs=config.teacher_epochs),
                    on_epoch=partial(record.report, "teacher"), checkpoint=record.state / "teacher.safetensors")  # fmt: skip
    record.report("taught", teacher)
    teacher.eval().requires_grad_(False)
    with kept_maps(teacher, names) as aims, kept_maps(model, names) as maps:

        def loss(student, images, labels, index):
            with torch.no_grad():
                teacher(images)
            value = cross_entropy(student, images, labels, index)
            return value + sum(
                beta * distance(maps[name], aims[name], config.power) for name, beta in zip(names, config.betas, strict=True)
            )

        return train(model, config=config, loss=loss, on_epoch=partial(record.report, "distill"),
                     checkpoint=record.state / "distill.safetensors")  # fmt: skip


def stages(model, images):
    """The names of the three modules whose outputs are the last maps of their size, in the order in which they run."""
    sizes, found, hooks = set(), {}, []
    for name, module in model.named_modules():

        def look(module, _inputs, output, name=name):
            if isinstance(module, nn.Conv2d):
                sizes.add(output.shape[2:])
            if sizes and torch.is_tensor(output) and output.ndim == 4:  # what comes before all convolutions is a picture
                depth = name.count(".") if name else -1
                known = found.get(output.shape[2:])
                if known is None or depth <= known[0]:
                    found.pop(output.shape[2:], None)
                    found[output.shape[2:]] = depth, name

        hooks.append(module.register_forward_hook(look))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    names = [name for size, (_, name) in found.items() if size in sizes and min(size) > 1]
    if len(names) < STAGES:
        raise ConfigError(f"nad does not apply: the model has maps of {len(names)} size(s) larger than 1x1, and nad takes {STAGES}; "
                          "try ft_sam, or larger pictures")  # fmt: skip
    return names[-STAGES:]


@contextmanager
def kept_maps(model, names):
    """{name: output N,C,h,w of that module in the last pass}, inside."""
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


def attention(maps, power):
    """sum_c |F_c|^p of maps N,C,h,w as rows of length 1, N,h*w; computed in float32 at least."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return F.normalize(maps.abs().pow(power).sum(1).flatten(1))


def distance(maps, aims, power):
    """The mean square between the attention of two sets of maps."""
    return F.mse_loss(attention(maps, power), attention(aims, power))


def main(config):
    run.defend(__name__, config, repair)
