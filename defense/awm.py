"""AWM: learn a soft mask on the convolution weights that resists the worst single perturbation.

The trigger is unknown. One perturbation, the same for all clean images, stands in for it: every
round computes it from zero, so that it misleads the masked network. Then a factor in [0, 1] for
every weight is trained on clean and perturbed images, with a small L1 penalty. Chai, Chen,
"One-shot Neural Backdoor Erasing via Adversarial Weight Masking", NeurIPS 2022 (arXiv 2207.04497).

    python defense/awm.py --result_file badnet_cifar10

The defaults follow the released code, except for the source of the clean images and for the scale
of tau at other image sizes: see docs/defenses/awm.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import Defense, option
from antidote_bench.utils.launch import launch

USUAL = {"alpha": 0.9, "tau": 1000.0, "batch_size": 128}
ONE_SHOT = {"alpha": 0.99, "tau": 100.0, "batch_size": 32}  # as published for CIFAR-10


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    adds: ClassVar[dict[str, str]] = {
        "mask.safetensors": "the factor of every convolution weight, by parameter name"
    }

    variant: Literal["one_shot"] | None = None
    """one_shot: one clean image of each class and nine augmented copies of it, with the constants
    published for that"""
    epochs: int = option(20, at_least=0)
    """rounds; each computes the perturbation and then trains the mask"""
    inner: int = option(5, at_least=1)
    """epochs on the clean images in each half of a round"""
    batch_size: int | None = option(None, at_least=1, unit="images")
    """images per step: 128, for one_shot 32; never more than there are"""
    tau: float | None = option(None, at_least=0)
    """largest L1 norm of the perturbation at 3x32x32, in [0, 1] pixels: 1000, for one_shot 100"""
    alpha: float | None = option(None, at_least=0, at_most=1)
    """weight of the loss on clean images: 0.9, for one_shot 0.99"""
    beta: float | None = option(None, at_least=0)
    """weight of the loss on perturbed images: 1 - alpha"""
    gamma: float = option(1e-8, at_least=0)
    """weight of the mask's L1 norm"""
    perturbation_lr: float = option(10.0, above=0)
    """step size of the perturbation"""
    lr: float = option(1e-2, above=0)
    """step size of the mask"""
    lr_decay: float = option(1.0, above=0, at_most=1)
    """factor of the mask's step size after every round; the first release had 0.9"""
    mask_optimizer: Literal["adam", "sgd"] = "adam"
    """of the mask; sgd is the pseudocode's plain step, whose size (--lr) was not published"""
    inner_label: Literal["predicted", "true"] = "predicted"
    """what the perturbation leads away from; true is the pseudocode's"""
    clamp: Literal["mask", "none", "both"] = "mask"
    """where perturbed images are clamped to [0, 1]: while the mask is trained, nowhere
    (pseudocode), or in both halves"""

    def setting(self, name):
        """batch_size, tau or alpha, as given or as the variant has it."""
        given = getattr(self, name)
        if given is not None:
            return given
        return (ONE_SHOT if self.variant == "one_shot" else USUAL)[name]

    def budget(self, count, classes):
        """One image of every class in one-shot mode."""
        return classes if self.variant == "one_shot" else super().budget(count, classes)

    def schedule(self, count):
        """(steps of half a round, images per step) for `count` clean images, copies included."""
        batch = min(self.setting("batch_size"), count)
        return max(1, count // batch * self.inner), batch


if __name__ == "__main__":
    launch(Config)

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torchvision.transforms import v2
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.checkpoint import load, save
from antidote_bench.utils.data.loader import (
    Passes,
    clipped,
    evaluating,
    gradient_batch,
    predicted_classes,
    to_unit,
)
from antidote_bench.utils.device import exact
from antidote_bench.utils.errors import ConfigError, UserError
from antidote_bench.utils.optimizers import set_rate
from antidote_bench.utils.repair.layers import convolutions, require_convolutions

COPIES = 9  # of every image, in one-shot mode
# rounds between two checkpoints: writing the mask of a large network takes longer than a round
KEEP_EVERY = 5


def repair(model, record, config):
    images, labels = record.clean.images, record.clean.truth
    if config.variant == "one_shot":
        images, labels = with_copies(images, labels, record.spec.flip, config.data_seed)
    with evaluating(model), exact():  # batch norms keep the statistics that they have
        factors = learn(
            model,
            to_unit(images),
            labels,
            config,
            on_round=partial(record.report, "mask", model),
            state=record.state,
        )
    record.keep("mask.safetensors", factors)
    return model


def with_copies(images, labels, flip, seed):
    """The uint8 images, and after them COPIES random crops of each, rescaled to its size.

    Copies are mirrored at random where `flip` allows it.
    """
    steps = [v2.RandomResizedCrop(images.shape[-1], antialias=True)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    augment = v2.Compose(steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.number("awm copies", seed))
        copies = torch.stack([augment(image) for image in images.cpu() for _ in range(COPIES)])
    images = torch.cat([images, copies.to(images.device)])
    return images, torch.cat([labels, labels.repeat_interleave(COPIES)])


def learn(model, images, labels, config, *, on_round=None, state=None):
    """Multiply the kernels of `model`, in evaluation mode, by a learned mask; {parameter: factors}.

    images n,3,S,S in [0, 1], labels n. The model changes in place. `on_round(epoch=, loss=, lr=)`
    is called after every round, when the model carries the mask of that round. With a folder
    `state` an interrupted run continues from its checkpoint.
    """
    mask = Mask(model)
    optimizer = make_optimizer(mask, config)
    done = load(state / "mask.safetensors", mask, optimizer) if state else 0
    tau = config.setting("tau") * images[0].numel() / 3072
    mask.write()
    with tqdm(
        total=config.epochs, initial=done, desc="masking", unit=" rounds", disable=None
    ) as bar:
        for epoch in range(done, config.epochs):
            rate = config.lr * config.lr_decay**epoch
            set_rate(optimizer, rate)
            delta_draws, mask_draws = draw_batches(len(images), epoch, labels.device, config)
            delta = perturbation(model, images, labels, delta_draws, tau, config)
            loss = train_mask(mask, images, labels, mask_draws, delta, optimizer, config)
            mask.write()
            if not mask.factors.isfinite().all():
                raise UserError(
                    f"the mask is no longer a number after round {epoch + 1}: lower --lr or "
                    "--perturbation_lr"
                )
            if state and (epoch + 1) % KEEP_EVERY == 0:
                save(state / "mask.safetensors", mask, optimizer, epoch + 1)
            if on_round:
                on_round(epoch=epoch + 1, loss=round(float(loss), 6), lr=round(rate, 8))
            bar.update()
    return mask.split(mask.factors.detach())


class Mask(nn.Module):
    """A factor in [0, 1] for every convolution weight of `model`, all in one row.

    It remembers the weights that the model has now, and masks these.
    """

    def __init__(self, model):
        super().__init__()
        self._model = [model]  # in a list: no part of this module, whose state a checkpoint holds
        self._kernels = {
            f"{name}.weight": layer.weight for name, layer in convolutions(model).items()
        }
        if not self._kernels:
            raise ConfigError("awm does not apply: the model has no convolution; ft needs none")
        self.original = torch.cat([kernel.detach().flatten() for kernel in self._kernels.values()])
        self.factors = nn.Parameter(torch.ones_like(self.original))

    def split(self, row):
        """{parameter: its part of a row of all weights, in its shape}."""
        parts = row.split([kernel.numel() for kernel in self._kernels.values()])
        return {
            name: part.view(kernel.shape)
            for (name, kernel), part in zip(self._kernels.items(), parts, strict=True)
        }

    @property
    def model(self):
        return self._model[0]

    def logits(self, images):
        """Of the masked model; gradients reach the factors."""
        return functional_call(self.model, self.split(self.factors * self.original), (images,))

    def l1_norm(self):
        return self.factors.abs().sum()

    @torch.no_grad()
    def clamp(self):
        self.factors.clamp_(0, 1)

    @torch.no_grad()
    def write(self):
        """Set every kernel of the model to its original weights times their factors."""
        for name, weight in self.split(self.factors * self.original).items():
            self._kernels[name].copy_(weight)


def make_optimizer(mask, config):
    if config.mask_optimizer == "sgd":
        return torch.optim.SGD([mask.factors], config.lr)
    return torch.optim.Adam([mask.factors], config.lr, fused=True)


def draw_batches(count, epoch, device, config):
    """Positions 2,steps,images of the clean images that the two halves of a round use."""
    generator = seeds.generator("awm", config.random_seed, epoch, device=device)
    return torch.randint(count, (2, *config.schedule(count)), device=device, generator=generator)


def perturbation(model, images, labels, draws, tau, config):
    """The perturbation 1,3,S,S that misleads the model; its L1 norm is at most tau.

    It is the same for all images, and leads away from what config.inner_label says.
    """
    if config.inner_label == "predicted":  # for all images at once: here the model does not change
        labels = predicted_classes(model, images)
    delta = torch.zeros_like(images[:1], requires_grad=True)
    passes = Passes(gradient_batch(model, images, draws.shape[1]))
    for index in draws:
        gradient = passes.run(partial(slope, model, images, labels, index, delta, config))
        with torch.no_grad():
            delta += config.perturbation_lr * gradient
    delta = delta.detach()
    # it is rescaled, not projected
    return delta * (tau / delta.abs().sum().clamp(min=1e-30)).clamp(max=1)


def slope(model, images, labels, index, delta, config, size):
    """The gradient by `delta` of the mean cross-entropy of the perturbed images at `index`.

    A pass has `size` images.
    """
    total = 0
    for part in index.split(size):
        perturbed = images[part] + delta
        if config.clamp == "both":
            perturbed = clipped(perturbed)
        loss = F.cross_entropy(model(perturbed), labels[part])
        (gradient,) = torch.autograd.grad(loss, delta)
        total = total + gradient * (len(part) / len(index))
    return total


def train_mask(mask, images, labels, draws, delta, optimizer, config):
    """Train the factors in place; the mean loss without the L1 penalty, a tensor."""
    total, passes = 0, Passes(gradient_batch(mask.model, images, 2 * draws.shape[1]))
    for index in draws:

        def add_gradients(size, index=index):
            optimizer.zero_grad()
            return sum(
                descend(mask, images[part], labels[part], delta, len(part) / len(index), config)
                for part in index.split(max(1, size // 2))
            )

        total += passes.run(add_gradients)
        optimizer.step()
        mask.clamp()
    return total / len(draws)


def descend(mask, images, labels, delta, weight, config):
    """Add the gradient of `weight` times the loss to that of the factors.

    Returns `weight` times the loss without the L1 penalty.
    """
    alpha = config.setting("alpha")
    beta = 1 - alpha if config.beta is None else config.beta
    perturbed = images + delta
    if config.clamp != "none":
        perturbed = clipped(perturbed)
    # one pass for both: in evaluation mode images do not influence each other
    on_clean, on_perturbed = mask.logits(torch.cat([images, perturbed])).chunk(2)
    clean_loss = F.cross_entropy(on_clean, labels)
    perturbed_loss = F.cross_entropy(on_perturbed, labels)
    data_loss = alpha * clean_loss + beta * perturbed_loss
    loss = data_loss + config.gamma * mask.l1_norm()
    (loss if weight == 1 else weight * loss).backward(inputs=[mask.factors])
    return weight * data_loss.detach()


def main(config):
    run.defend(__name__, config, repair, check=require_convolutions)
