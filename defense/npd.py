"""Neural Polarizer: leave the victim as it is, and put one small linear layer into it that lets no trigger pass.

Zhu, Wei, Zha, Wu, "Neural Polarizer: A Lightweight and Effective Backdoor Defense via Purifying Poisoned Features", NeurIPS 2023
(arXiv 2306.16697). The layer, a 1x1 convolution and a batch norm before a late convolution, is all that is trained: on clean
pictures, and on changes of them towards another class, which stand for the unknown trigger. Sees the clean pictures.

    python defense/npd.py --result_file badnet_cifar10
    python defense/npd.py --result_file badnet_cifar10 --layer network.layer4.0.conv1

First some epochs of cross-entropy at a low rate. Then, for every batch, each picture x of class y is changed by signed steps
towards s, its most likely class other than y, within a ball of the L2 norm and within [0, 1]; and a step of SGD goes down
lambda1 * CE(x, y) + lambda2 * CE(x', the class that x is given now) - lambda3 * log(1 - p_k(x')) - lambda4 * log(1 - p_s(x')),
where k is the most likely class of x' other than y. `--targets random` draws s once for every picture. No augmentation.
Radius and weights for GTSRB and Tiny ImageNet are in config/dataset.

The layer goes before the last but one of the convolutions larger than 1x1, in the order in which they run: layer4.1.conv1 of
PreActResNet18, the paper's. It begins as the identity: the batch norm has the statistics of the clean pictures there, and the
scale and shift that undo it, so that the answers are the victim's in either mode. It normalises by the batch, clean
and changed pictures together, in the steps of SGD alone. The rate is constant.

The layer cannot be folded into the convolution: its shift is not added to the zeros around the maps. The model that is returned,
judged and saved therefore has two layers more than the victim, and all others byte for byte; `rebuild` makes it of a network of
`models.build` and model.safetensors. A known port saves the untouched victim as the result, and the layer elsewhere.

On the digits (resnet9 of width 16, 64 clean pictures, fp32, seed 0, n = 1) the defaults do nothing: the ASR of badnet goes from 99.3 to 99.1,
that of blended stays at 100.0, and the ACC of a clean model goes from 100.0 to 99.8. The place inside the last residual branch is one that a
shortcut leads around: there --polarizer_lr 0.1 --epochs 30 leaves badnet at 98.0, with a larger radius (6, in steps of 0.3) at 97.6.
With --layer network.layer3.conv, which all maps pass, the same rate and epochs bring badnet to 2.0 and blended to 37.1, at an ACC of 99.2
each (from 99.6 and 99.8); a clean model goes from 100.0 to 99.6. These options were tried on badnet by its ASR.
"""

from dataclasses import dataclass
from typing import Literal

from utils.config import Defense, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    layer: str | None = None
    """convolution before which the polarizer stands, by its name in the model; by default the last but one larger than 1x1"""
    warmup_epochs: int = 5
    """passes over the clean pictures on their cross-entropy alone"""
    warmup_lr: float = 1e-4
    """rate of SGD in them"""
    epochs: int = 50
    """passes that then follow, on all terms"""
    polarizer_lr: float = 0.01
    """rate of SGD in them"""
    batch_size: int = 128
    """images per step"""
    momentum: float = 0.9
    """of SGD, 0 or more and below 1"""
    weight_decay: float = 5e-4
    """L2 penalty on the polarizer, 0 or more"""
    radius: float = 3.0
    """largest L2 norm of a picture's change, over all its values in [0, 1]"""
    steps: int = 2
    """of the search for it"""
    step_size: float = 0.1
    """change of a pixel in each of them, above 0"""
    targets: Literal["likely", "random"] = "likely"
    """class that a picture is changed towards: its most likely wrong one, or one drawn for it beforehand"""
    lambda1: float = 1.0
    """weight of the clean pictures' cross-entropy, 0 or more"""
    lambda2: float = 0.4
    """weight of the changed pictures' cross-entropy with the class given to the clean ones"""
    lambda3: float = 0.4
    """weight of unlearning the most likely wrong class of a changed picture"""
    lambda4: float = 0.4
    """weight of unlearning the class that it was changed towards"""

    def __post_init__(self):
        super().__post_init__()
        require(min(self.warmup_epochs, self.epochs, self.steps) >= 0, "warmup_epochs, epochs and steps", "0 or more")
        require(min(self.warmup_lr, self.polarizer_lr, self.step_size) > 0, "warmup_lr, polarizer_lr and step_size", "above 0")
        require(self.batch_size >= 1, "batch_size", "1 or more images")
        require(0 <= self.momentum < 1, "momentum", "0 or more and below 1")
        require(self.weight_decay >= 0 and self.radius >= 0, "weight_decay and radius", "0 or more")
        require(min(self.lambda1, self.lambda2, self.lambda3, self.lambda4) >= 0, "lambda1 to lambda4", "0 or more")

    def work(self, clean, found):
        steps = -(-clean // self.batch_size)
        return f"one layer in {self.warmup_epochs} + {self.epochs} epochs of about {steps} steps of {min(self.batch_size, clean)} images"


if __name__ == "__main__":
    launch(Config)

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from utils import run, seeds
from utils.batch import BATCH, batches, to_unit
from utils.channels import Moments, convolutions, feature_maps, frozen
from utils.errors import ConfigError
from utils.train import fit, stage
from utils.unlearn import Still, precise, unlikelihood


def repair(model, record, config):
    training = model.training
    name = place(model, to_unit(record.clean.images[:1]), config.layer)
    model.eval()
    with frozen(model):
        insert_and_train(model, name, record, config)
    return model.train(training)


def insert_and_train(model, name, record, config):
    """Insert the layer before the convolution `name` of `model`, which is frozen, and train it there."""
    polarizer, norm = insert(model, name)
    settle(norm, model, record.clean)
    record.report("inserted", model)
    train = partial(fit, Still(model, [polarizer, norm]), record.clean)
    plan = partial(stage, config, batch_size=config.batch_size, momentum=config.momentum, weight_decay=config.weight_decay)
    train(plan(epochs=config.warmup_epochs, lr=config.warmup_lr, lr_min=config.warmup_lr), on_epoch=partial(record.report, "warmup"),
          checkpoint=record.state / "warmup.safetensors")  # fmt: skip
    record.report("warm", model)
    loss = partial(polarizing, config=config, draws=drawn(record, config) if config.targets == "random" else None)
    train(plan(epochs=config.epochs, lr=config.polarizer_lr, lr_min=config.polarizer_lr), loss=loss, on_epoch=partial(record.report, "polarize"),
          checkpoint=record.state / "polarize.safetensors")  # fmt: skip


def place(model, images, name=None):
    """The name of the convolution that the polarizer stands before: `name`, or the last but one larger than 1x1 of those that run.

    ConfigError where there is no such convolution.
    """
    layers = convolutions(model)
    if name is not None:
        if name not in layers:
            last = f"the last ones are {', '.join(list(layers)[-3:])}" if layers else "it has none"
            raise ConfigError(f"layer must be a convolution of the model, and {name!r} is not one: {last}")
        return name
    training = model.training
    with torch.no_grad():
        large = [name for name in feature_maps(model.eval(), images) if max(layers[name].kernel_size) > 1]
    model.train(training)
    if len(large) < 2:
        raise ConfigError(f"npd does not apply: the model has {len(large)} convolution(s) larger than 1x1, and the polarizer goes before "
                          "the last but one; --layer names another place, or try ft_sam")  # fmt: skip
    return large[-2]


def insert(model, name):
    """Put a polarizer that is the identity before the convolution `name` of `model`, in place; its two layers.

    In the model's state they are `name`.polarizer and `name`.norm, and the convolution is `name`.conv.
    """
    conv = model.get_submodule(name)
    like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    polarizer, norm = nn.Conv2d(conv.in_channels, conv.in_channels, 1, bias=False, **like), nn.BatchNorm2d(conv.in_channels, **like)
    nn.init.dirac_(polarizer.weight)
    model.set_submodule(name, nn.Sequential(OrderedDict(polarizer=polarizer, norm=norm, conv=conv)).train(conv.training))
    return polarizer, norm


def rebuild(model, weights):
    """Bring a network of `models.build` into the form of this defense's model.safetensors, `weights`, and load them; the network."""
    (name,) = (key.removesuffix(".polarizer.weight") for key in weights if key.endswith(".polarizer.weight"))
    insert(model, name)
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def settle(norm, model, split):
    """Give the batch norm the statistics of what enters it, over all pictures of `split`, and the scale and shift that undo them."""
    moments = Moments()
    handle = norm.register_forward_pre_hook(lambda _module, inputs: moments.add(inputs[0]))
    try:
        for images, _, _ in batches(split, BATCH):
            model(images)
    finally:
        handle.remove()
    norm.running_mean.copy_(moments.mean)
    norm.running_var.copy_(moments.variance)
    norm.bias.copy_(norm.running_mean)
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())


def drawn(record, config):
    """A class other than its own for every clean picture, int64 N."""
    generator = seeds.generator("npd targets", config.random_seed)
    steps = torch.randint(1, record.spec.classes, (len(record.clean),), generator=generator)
    return (record.clean.labels + steps.to(record.clean.labels.device)) % record.spec.classes


def polarizing(model, images, labels, index, *, config, draws=None):
    """The loss of a batch, images n,3,S,S and labels n; the changes are those that fool the model as it answers now, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        logits = model(images)
    targets = likeliest_wrong(logits, labels) if draws is None else draws[index]
    changed = images + perturbation(model, images, targets, config)
    clean, perturbed = model.train()(torch.cat([images, changed])).chunk(2)
    return purifying(clean, perturbed, labels, logits.argmax(1), targets, config)


def perturbation(model, images, targets, config):
    """The change n,3,S,S that leads each picture towards its target; its L2 norm is at most config.radius, the pictures stay in [0, 1]."""
    change = torch.zeros_like(images)
    for _ in range(config.steps):
        change.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(images + change), targets, reduction="sum"), change)
        change = within(change.detach() - config.step_size * gradient.sign(), images, config.radius)
    return change


def within(change, images, radius):
    """The change of each picture cut to the length `radius`, then to what keeps the picture in [0, 1], which makes it no longer."""
    length = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (images + change * (radius / length.clamp(min=1e-12)).clamp(max=1)).clamp(0, 1) - images


def likeliest_wrong(logits, labels):
    """The most likely class other than its own of each row of logits n,C."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def purifying(clean, perturbed, labels, given, targets, config):
    """The weighted sum of the four terms, means over pictures, from the logits n,C of the clean and of the changed ones.

    `given` are the classes that the model gives to the clean pictures, `targets` those that they were changed towards.
    """
    wrong = likeliest_wrong(perturbed, labels)
    return (config.lambda1 * F.cross_entropy(precise(clean), labels) + config.lambda2 * F.cross_entropy(precise(perturbed), given)
            + config.lambda3 * unlikelihood(perturbed, wrong).mean() + config.lambda4 * unlikelihood(perturbed, targets).mean())  # fmt: skip


def main(config):
    run.defend(__name__, config, repair)
