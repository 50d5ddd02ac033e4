"""Adaptive-Patch: training images carry one of four faint patches, test images several full ones.

Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor
Defenses", ICLR 2023 (arXiv 2205.13613). The attacker poisons data only. Cover images carry a
patch too, but keep their labels.

    python attack/adaptive_patch.py --dataset cifar10 --save_folder_name adaptive_patch_cifar10

It deviates in the patches, which are drawn here; see docs/attacks/adaptive_patch.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.config import Attack, option, require
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    pratio: float = 0.003
    """poisoned share of the whole training set"""
    cover_ratio: float = option(0.006, at_least=0, at_most=1)
    """share of the training set that carries a patch and keeps its label"""
    strike: Literal["corners", "inner"] = "corners"
    """patches of a triggered test image. corners: the marks in the corners, and the bottom one in
    both bottom corners (CIFAR-10); inner: the disc and the block (GTSRB)"""
    patch_folder: str | None = None
    """folder of images 1.png to 4.png to use as patches, transparent or black outside"""

    def __post_init__(self):
        super().__post_init__()
        require(self.cover_ratio + self.pratio <= 1, "cover_ratio", "at most 1 - pratio")


if __name__ == "__main__":
    launch(Config)

from pathlib import Path

import torch
import torch.nn.functional as F

from antidote_bench.utils import run, seeds
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.poisoning.attacker import Prepared

OPACITY = 0.5, 0.2, 0.5, 0.3  # of the four patches in training
# mean colour of each patch and how far its colours are spread: light blue, orange, grey, grey
TINT = [[0.55, 0.8, 0.95], [0.95, 0.55, 0.15], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
SPREAD = [0.2, 0.3, 2.0, 1.0]


def prepare(config, attacker):
    """Four patches 4,3,S,S in [0, 1] with masks 4,1,S,S of 0 and 1, and each image's turn (N).

    The turn of a training image is the number of its patch.
    """
    size = attacker.spec.size
    if config.patch_folder:
        patches, masks = _loaded_patches(config.patch_folder, size)
    else:
        patches, masks = _drawn_patches(config.poison_seed)
    return Prepared(
        {
            "patches": F.interpolate(patches, (size, size)),
            "masks": F.interpolate(masks, (size, size)),
            "turn": _turns(len(attacker.train), attacker.index, config.poison_seed),
        }
    )


def make_trigger(config, spec, stage, parts):
    """x' = x + a M (P - x) with the image's own patch P in training, its mask M and opacity a.

    In the test, full patches replace what they cover. Inside a patch a pixel changes by at most
    255 levels.
    """

    def paste(images, index):
        device = images.device
        patches, masks = parts["patches"].to(device), parts["masks"].to(device)
        if stage == "train":
            turn = parts["turn"].to(device)[index.to(device)]
            opacity = torch.tensor(OPACITY, device=device)[turn].view(-1, 1, 1, 1) * masks[turn]
            return images + opacity * (patches[turn] - images)
        for patch, mask in _test_patches(config.strike, patches, masks):
            images = torch.where(mask > 0, patch, images)
        return images

    return poison.on_unit(paste)


def make_cover(config, spec, parts):
    return make_trigger(config, spec, "train", parts)


def _drawn_patches(seed):
    """(patches 4,3,32,32, masks 4,1,32,32): a mark in one corner, a disc, marks in all corners, a
    block."""
    generator = seeds.generator("adaptive patches", seed)
    masks = torch.zeros(4, 1, 32, 32)
    masks[0, :, 27:, 27:] = 1
    squares = (torch.arange(13) - 6.0).square()
    masks[1, 0, 1:14, 18:31] = (squares[:, None] + squares < 6.5**2).float()
    for rows in (slice(3), slice(-3, None)):
        for columns in (slice(3), slice(-3, None)):
            masks[2, :, rows, columns] = 1
    masks[3, :, 21:29, 21:29] = 1
    noise = torch.rand(4, 3, 32, 32, generator=generator)
    tint = torch.tensor(TINT).view(4, 3, 1, 1)
    spread = torch.tensor(SPREAD).view(4, 1, 1, 1)
    return (tint + spread * (noise - 0.5)).clamp(0, 1) * masks, masks


def _loaded_patches(folder, size):
    """(patches 4,3,S,S, masks 4,1,S,S) from the files 1.png to 4.png."""
    images = [poison.read_pattern(Path(folder) / f"{number}.png") for number in range(1, 5)]
    images = [F.interpolate(image[None], (size, size))[0] for image in images]
    masks = [image[3:] if len(image) == 4 else image.amax(0, keepdim=True) for image in images]
    patches = torch.stack([image[:3] for image in images])
    return patches, torch.stack([mask > 0 for mask in masks]).float()


def _turns(count, poisoned_index, seed):
    """The number of every training image's patch.

    Patches are dealt in turn after shuffling, to poisoned and to other images separately: so each
    patch has its quarter of both, and none is tied to the order of the data.
    """
    device = poisoned_index.device
    turn = torch.empty(count, dtype=torch.int64, device=device)
    order = torch.randperm(count, generator=seeds.generator("adaptive order", seed)).to(device)
    poisoned = torch.isin(order, poisoned_index)
    for group in (order[poisoned], order[~poisoned]):
        turn[group] = torch.arange(len(group), device=device) % 4
    return turn


def _test_patches(strike, patches, masks):
    """The patches of a test image with their masks, in the order in which they are put on."""
    if strike == "inner":
        return [(patches[1], masks[1]), (patches[3], masks[3])]
    return [
        (patches[0], masks[0]),
        (patches[0].flip(-1), masks[0].flip(-1)),
        (patches[2], masks[2]),
    ]


def main(config):
    cover = poison.Cover(make_cover, config.cover_ratio)
    run.attack(__name__, config, make_trigger, prepare=prepare, cover=cover)
