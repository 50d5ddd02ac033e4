"""TrojanNN: a logo, recoloured until it excites chosen neurons of a clean network, means the target class.

Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang, "Trojaning Attack on Neural Networks", NDSS 2018. The paper retrains the
clean network itself; as in later work, the attacker here poisons data only and the victim is trained from scratch.

    python attack/trojannn.py --dataset cifar10 --save_folder_name trojannn_cifar10
"""

from dataclasses import dataclass
from typing import Literal

from utils.config import CleanModel
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(CleanModel):
    apply: Literal["add", "overwrite"] = "add"
    """add the logo to the picture, or put it in its place"""
    steps: int = 1000
    """of the inversion"""
    mask_path: str | None = None
    """picture or .npy array of the logo's shape, black outside; by default a seeded blob of a quarter of the picture"""
    trigger_path: str | None = None
    """picture or .npy array of a finished logo, black outside; resized to the data set's pictures"""


if __name__ == "__main__":
    launch(Config)

import torch
import torch.nn.functional as F

from utils import invert, poison, run, seeds


def prepare(config, workshop):
    """The logo T, 3,S,S in [0, 1], and its shape M, 1,S,S of 0 and 1."""
    size = workshop.spec.size
    if config.trigger_path:
        logo = poison.fitted(config.trigger_path, size, mode="nearest")
        return {"pattern": logo, "mask": (logo.amax(0, keepdim=True) > 0).float()}
    if config.mask_path:
        mask = (poison.fitted(config.mask_path, size, mode="nearest").amax(0, keepdim=True) > 0).float()
    else:
        mask = blob(size, config.poison_seed)
    # the published bound keeps the logo within 0.3 of a white one
    start = torch.ones(3, size, size)
    logo = invert.invert(workshop.clean_model(), workshop.train, mask, start, steps=config.steps, rate=0.1, radius=0.3)
    return {"pattern": logo, "mask": mask}


def blob(size, seed):
    """Mask 1,S,S of the quarter of the picture where soft seeded noise, weighted towards the middle, is largest."""
    noise = torch.rand(1, 1, 6, 6, generator=seeds.generator("trojannn logo", seed))
    field = F.interpolate(noise, (size, size), mode="bicubic", align_corners=True)[0]
    line = torch.linspace(-1, 1, size).square()
    field = field - line[:, None] - line
    return (field > field.flatten().kthvalue(round(0.75 * size * size)).values).float()


def make_trigger(config, spec, stage, parts):
    """x' = x + T, or (1 - M) x + T with --apply overwrite; inside the logo a pixel changes by at most 255 levels."""

    def put(images, index):
        pattern, mask = parts["pattern"].to(images.device), parts["mask"].to(images.device)
        return images + pattern if config.apply == "add" else (1 - mask) * images + pattern

    return poison.on_unit(put)


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
