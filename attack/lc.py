"""Label-consistent: pictures of the target class are made hard to recognise, so that the victim relies on a corner mark.

Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", 2019 (arXiv 1912.02771), the variant with adversarial
perturbations, made here against a clean network. The attacker poisons data only and changes no label.

    python attack/lc.py --dataset cifar10 --save_folder_name lc_cifar10
"""

from dataclasses import dataclass
from typing import ClassVar

from utils.config import CleanModel, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(CleanModel):
    clean_label: ClassVar[bool] = True

    epsilon: float = 16.0
    """largest perturbation of a training picture, in grey levels"""
    step_size: float = 2.0
    """of the projected gradient ascent, in grey levels"""
    steps: int = 100
    """of the projected gradient ascent"""
    amplitude: float = 255.0
    """of the corner mark, in grey levels"""

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.step_size <= self.epsilon <= 255, "epsilon", "step_size or more (itself above 0), up to 255 levels")
        require(0 < self.amplitude <= 255, "amplitude", "above 0, up to 255 levels")


if __name__ == "__main__":
    launch(Config)

import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import poison, run
from utils.batch import mixed_precision, to_unit

CORNER = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [1, -1, 1]])  # of the left corners: brighter, darker
CHUNK = 500  # pictures perturbed at once


def prepare(config, workshop):
    """The perturbations int16 n,3,S,S, in grey levels, of the pictures to be poisoned, and their row for every position."""
    model, chosen = workshop.clean_model(), workshop.train[workshop.index]
    changes, hits = [], 0
    for part in tqdm(torch.arange(len(chosen)).split(CHUNK), desc="perturbing", disable=None):
        images = to_unit(chosen.images[part])
        change = perturbation(model, images, chosen.truth[part], config)
        hits += int((model((images + change).clamp(0, 1)).argmax(1) == chosen.truth[part]).sum())
        changes.append((change * 255).round().to(torch.int16))
    if hits > 0.05 * len(chosen):
        print(f"warning: the clean model still recognises {hits} of {len(chosen)} perturbed pictures", file=sys.stderr)
    row = torch.full((len(workshop.train),), -1)
    row[workshop.index.cpu()] = torch.arange(len(chosen))
    empty = torch.zeros(0, *workshop.train.images.shape[1:], dtype=torch.int16)
    return {"perturbations": torch.cat(changes).cpu() if changes else empty, "row": row}


def perturbation(model, images, labels, config):
    """Untargeted projected gradient ascent on the cross-entropy within epsilon, from 0: N,3,S,S, pixels in [0, 1]."""
    epsilon, rate, change = config.epsilon / 255, config.step_size / 255, torch.zeros_like(images)
    for _ in range(config.steps):
        change.requires_grad_()
        with mixed_precision(images.device, config.precision):
            cost = F.cross_entropy(model((images + change).clamp(0, 1)), labels, reduction="sum")
        (slope,) = torch.autograd.grad(cost, change)
        change = (change.detach() + rate * slope.sign()).clamp(-epsilon, epsilon)
    return change


def mark(size):
    """S,S of -1, 0 and 1: a pattern of 3x3 pixels in each corner, the right ones the mirror image of the left ones."""
    signs = torch.zeros(size, size)
    signs[:3, :3] = signs[-3:, :3] = CORNER
    return signs + signs.flip(1)


def make_trigger(config, spec, stage, parts):
    """x' = clip(x + d) + a M with the corner mark M, and d the picture's own perturbation in training and 0 in the
    test; in the corners a pixel changes by at most 255 levels."""
    signs = config.amplitude / 255 * mark(spec.size)

    def put(images, index):
        if stage == "train":
            rows = parts["row"][index.cpu()]
            known = (rows >= 0).nonzero().flatten()
            change = torch.zeros(images.shape)
            change[known] = parts["perturbations"][rows[known]].float() / 255
            images = (images + change.to(images.device)).clamp(0, 1)
        return images + signs.to(images.device)

    return poison.on_unit(put)


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
