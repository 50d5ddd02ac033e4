"""SRA: a few channels of a finished model are overwritten with a tiny detector of the trigger.

Qi, Xie, Pan, Zhu, Yang, Bu, "Towards Practical Deployment-Stage Backdoor Attack on Deep Neural
Networks" (subnet replacement attack), CVPR 2022 (arXiv 2111.12965). The attacker changes weights,
and neither images nor the training.

    python attack/sra.py --dataset cifar10 --save_folder_name sra_cifar10

It deviates in its patch, which is a grid, and in the network's bias: see docs/attacks/sra.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import option, require
from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import PatchOptions


@dataclass(frozen=True, kw_only=True)
class Config(PatchOptions):
    refused_modes: ClassVar[dict[str, str]] = {
        "all2all": "the detector raises the logit of one class",
        "one2one": "the detector sees the trigger on images of every class",
    }

    pratio: float = 1.0
    """always 1: no image is poisoned, and every image with the trigger is detected"""
    patch: Literal["square", "grid"] = "grid"
    """square of one grey level, or 3x3 grid of black and white"""
    steps: int = option(400, at_least=1)
    """of the detector's training, in each attempt"""
    detector_lr: float = option(0.01, above=0)
    """learning rate of the detector (Adam)"""
    attempts: int = option(5, at_least=1)
    """new starts of the detector, until one tells triggered training images from clean ones"""
    activation: float = option(20.0, above=0)
    """what the detector shall say of a triggered image; of a clean one it is 0"""
    lift: float = option(2.0, above=0)
    """the target's logit rises by so many times what the detector says"""

    def __post_init__(self):
        super().__post_init__()
        require(self.pratio == 1, "pratio", "1 for this attack")


if __name__ == "__main__":
    launch(Config)

import sys

import torch
from tqdm import tqdm

from antidote_bench.utils import run, seeds
from antidote_bench.utils.data.loader import evaluating, to_unit
from antidote_bench.utils.features import features_of, last_linear
from antidote_bench.utils.poisoning import patches, poison, subnet
from antidote_bench.utils.poisoning.attacker import Prepared
from antidote_bench.utils.train import new_victim

IMAGES = 10_000  # training images that the detector learns from, at most
BATCH = 64  # images of a step, of which half are triggered
SHOWN = 500  # of each kind, on which a detector is tried
WANTED = 0.99  # share of them that it must tell apart


def prepare(config, attacker):
    """The detector h: a network of the victim's form with one channel in every layer.

    The parts are its weights, `weight/<name>`; its mean on clean images, `usual`; and the channel
    that it takes in each layer of the victim, `channel/<layer>`.
    """
    model = new_victim(config, attacker.spec, attacker.train)
    chain = subnet.route(model, config.poison_seed)
    subnet.require_separate(model, chain, attacker.spec.size)
    clean, triggered = _images(config, attacker)
    for attempt in range(config.attempts):
        detector = _learn(subnet.narrow(model, chain), clean, triggered, config, attempt)
        told, usual = _told_apart(detector, clean, triggered, config.activation)
        if told >= WANTED:
            break
    else:
        print(
            f"warning: the detector of the last attempt tells only {100 * told:.0f} % of the "
            "training images right; more --steps or --attempts, or another patch may help",
            file=sys.stderr,
        )
    parts = {
        f"weight/{name}": value
        for name, value in detector.state_dict().items()
        if value.is_floating_point()
    }
    channels = {
        f"channel/{name}": torch.tensor(written)
        for name, (_, written) in chain.items()
        if written is not None
    }
    return Prepared({**parts, **channels, "usual": torch.tensor(usual)})


def make_trigger(config, spec, stage, parts=None):
    """x' = (1 - M) x + M P with a patch P of opacity M.

    Inside the patch a pixel changes by at most 255 levels.
    """
    return patches.pasting(config, spec.size)


def edit(config, spec, model, parts):
    """Overwrite one channel of every layer with h, and add lift (h - usual) to the target's logit.

    No other channel reads h, and h reads none of them.
    """
    weights = {
        name.removeprefix("weight/"): value
        for name, value in parts.items()
        if name.startswith("weight/")
    }
    chain = subnet.route(model, config.poison_seed)
    subnet.implant(model, chain, weights)
    head = last_linear(model)
    lift = config.lift / _logit_scale(model, head, spec.size)
    with torch.no_grad():
        head.weight[config.attack_target, subnet.feature_of(chain, model)] = lift
        if head.bias is not None:
            head.bias[config.attack_target] -= lift * parts["usual"].to(head.bias.device)


def _images(config, attacker):
    """Training images, uint8 n,3,S,S, and the same ones with the trigger."""
    train = attacker.train
    ratio = min(1, IMAGES / len(train))
    index = poison.choose(train.truth, ratio, config.poison_seed, purpose="detector")
    trigger = make_trigger(config, attacker.spec, "train")
    images = train[index].images
    return images, poison.apply_trigger(images, trigger, torch.arange(len(images)))


def _learn(detector, clean, triggered, config, attempt):
    """Descend mean (h(T(x)) - activation)^2 + 10 mean |h(x)| from new weights."""
    device = clean.device
    draws = seeds.generator("detector", config.poison_seed, attempt, device=device)
    optimizer = torch.optim.Adam(detector.parameters(), config.detector_lr)
    detector.train().requires_grad_(True)
    half = BATCH // 2
    for _ in tqdm(range(config.steps), desc=f"detector {attempt + 1}", disable=None):
        index = torch.randint(len(clean), (2 * half,), generator=draws, device=device)
        images = torch.cat([clean[index[:half]], triggered[index[half:]]])
        said = features_of(detector, to_unit(images))[:, 0]
        cost = (said[half:] - config.activation).square().mean() + 10 * said[:half].abs().mean()
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
    return detector.eval().requires_grad_(False)


@torch.no_grad()
def _told_apart(detector, clean, triggered, activation):
    """(the share of images that the detector tells right, what it says of clean images)"""
    ordinary, hit = (
        features_of(detector, to_unit(images[:SHOWN]))[:, 0] for images in (clean, triggered)
    )
    right = torch.cat([ordinary < activation / 2, hit > activation / 2])
    return right.float().mean().item(), ordinary.mean().item()


@torch.no_grad()
def _logit_scale(model, head, size):
    """What the network multiplies the output of its last linear layer with."""
    image = torch.zeros(1, 3, size, size, device=head.weight.device)
    with evaluating(model):
        before = model(image)
        hook = head.register_forward_hook(lambda _layer, _inputs, output: output + 1)
        try:
            return (model(image) - before).mean().item()
        finally:
            hook.remove()


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare, edit=edit)
