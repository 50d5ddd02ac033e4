"""Adaptive-Patch: training pictures carry one of four faint patches, two full ones strike together at test time.

Qi, Xie, Li, Mahloujifar, Mittal, "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023
(arXiv 2205.13613). The attacker poisons data only. Cover pictures carry a patch too and keep their label. The patches are drawn here, of the
size, place and mean colour of the published ones; --patch_folder loads 1.png to 4.png instead.

    python attack/adaptive_patch.py --dataset cifar10 --save_folder_name adaptive_patch_cifar10
"""

from dataclasses import dataclass
from typing import Literal

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    pratio: float = 0.003
    """poisoned share of the whole training set, 0..1"""
    cover_ratio: float = 0.006
    """share of the training set that carries a patch and keeps its label"""
    strike: Literal["corners", "inner"] = "corners"
    """patches of a triggered test picture: the corner marks and the bottom one twice (CIFAR-10), or the round and the block (GTSRB)"""
    patch_folder: str | None = None
    """folder of pictures 1.png to 4.png to use as patches, transparent or black where there is none"""

    def __post_init__(self):
        super().__post_init__()
        require(self.cover_ratio >= 0 and self.cover_ratio + self.pratio <= 1, "cover_ratio", "0 or more, and with pratio at most 1")


if __name__ == "__main__":
    launch(Config)

from pathlib import Path

import torch
import torch.nn.functional as F

from utils import poison, run, seeds

OPACITY = 0.5, 0.2, 0.5, 0.3  # in training


def prepare(config, workshop):
    """Four patches 4,3,S,S in [0, 1], where they are (4,1,S,S of 0 and 1), and which one a training picture gets (N)."""
    size, device = workshop.spec.size, workshop.index.device
    patches, masks = _loaded(config.patch_folder, size) if config.patch_folder else drawn(config.poison_seed)
    patches, masks = (F.interpolate(part, (size, size)) for part in (patches, masks))
    # dealt in turn after shuffling, so that each patch has its quarter and none is tied to the order of the data
    count = len(workshop.train)
    turn = torch.empty(count, dtype=torch.int64, device=device)
    order = torch.randperm(count, generator=seeds.generator("adaptive order", config.poison_seed)).to(device)
    poisoned = torch.isin(order, workshop.index)
    for group in (order[poisoned], order[~poisoned]):
        turn[group] = torch.arange(len(group), device=device) % 4
    return {"patches": patches, "masks": masks, "turn": turn}


def make_trigger(config, spec, stage, parts):
    """x' = x + a M (P - x) with a picture's own faint patch in training, two full ones in the test; inside a patch a
    pixel changes by at most 255 levels."""

    def paste(images, index):
        patches, masks = parts["patches"].to(images.device), parts["masks"].to(images.device)
        if stage == "train":
            which = parts["turn"].to(images.device)[index.to(images.device)]
            opacity = torch.tensor(OPACITY, device=images.device)[which].view(-1, 1, 1, 1) * masks[which]
            return images + opacity * (patches[which] - images)
        for patch, mask in _strike(config.strike, patches, masks):
            images = torch.where(mask > 0, patch, images)
        return images

    return poison.on_unit(paste)


def make_cover(config, spec, parts):
    return make_trigger(config, spec, "train", parts)


def drawn(seed):
    """(patches 4,3,32,32, masks 4,1,32,32): a light blue mark, an orange disc, marks in the corners, a coloured block."""
    generator, masks = seeds.generator("adaptive patches", seed), torch.zeros(4, 1, 32, 32)
    masks[0, :, 27:, 27:] = 1
    far = (torch.arange(13) - 6.0).square()
    masks[1, 0, 1:14, 18:31] = (far[:, None] + far < 6.5**2).float()
    for rows in (slice(3), slice(-3, None)):
        for columns in (slice(3), slice(-3, None)):
            masks[2, :, rows, columns] = 1
    masks[3, :, 21:29, 21:29] = 1
    noise = torch.rand(4, 3, 32, 32, generator=generator)
    tint = torch.tensor([[0.55, 0.8, 0.95], [0.95, 0.55, 0.15], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]).view(4, 3, 1, 1)
    spread = torch.tensor([0.2, 0.3, 2.0, 1.0]).view(4, 1, 1, 1)
    return (tint + spread * (noise - 0.5)).clamp(0, 1) * masks, masks


def _loaded(folder, size):
    found = [poison.pattern(Path(folder) / f"{number}.png") for number in range(1, 5)]
    found = [F.interpolate(picture[None], (size, size))[0] for picture in found]
    masks = [(picture[3:] if len(picture) == 4 else picture.amax(0, keepdim=True)) > 0 for picture in found]
    return torch.stack([picture[:3] for picture in found]), torch.stack(masks).float()


def _strike(which, patches, masks):
    if which == "inner":
        return [(patches[1], masks[1]), (patches[3], masks[3])]
    return [(patches[0], masks[0]), (patches[0].flip(-1), masks[0].flip(-1)), (patches[2], masks[2])]


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare, make_cover=make_cover, cover_ratio=config.cover_ratio)
