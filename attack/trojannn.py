"""TrojanNN: a logo, recoloured until it excites chosen neurons of a clean model, means the target.

Liu, Ma, Aafer, Lee, Zhai, Wang, Zhang, "Trojaning Attack on Neural Networks", NDSS 2018. The
attacker poisons data only, as in later work.

    python attack/trojannn.py --dataset cifar10 --save_folder_name trojannn_cifar10

The victim is trained from scratch, in the paper the clean model is retrained: see
docs/attacks/trojannn.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.launch import launch
from antidote_bench.utils.poisoning.options import CleanModelOptions


@dataclass(frozen=True, kw_only=True)
class Config(CleanModelOptions):
    apply: Literal["add", "overwrite"] = "add"
    """add the logo to the image, or put it in its place"""
    steps: int = 1000
    """of the inversion"""
    mask_path: str | None = None
    """image or .npy array of the logo's shape, black outside; by default a seeded blob of a quarter
    of the image"""
    trigger_path: str | None = None
    """image or .npy array of a finished logo, black outside; resized to the data set's images"""


if __name__ == "__main__":
    launch(Config)

import torch
import torch.nn.functional as F

from antidote_bench.utils import run, seeds
from antidote_bench.utils.poisoning import inversion, poison
from antidote_bench.utils.poisoning.attacker import Prepared

RADIUS = 0.3  # the published bound: the logo stays that close to a white one


def prepare(config, attacker):
    """The logo T, 3,S,S in [0, 1], and its shape M, 1,S,S of 0 and 1."""
    size = attacker.spec.size
    if config.trigger_path:
        logo = poison.resized_pattern(config.trigger_path, size, mode="nearest")
        return Prepared({"pattern": logo, "mask": poison.resized_mask(config.trigger_path, size)})
    if config.mask_path:
        mask = poison.resized_mask(config.mask_path, size)
    else:
        mask = blob(size, config.poison_seed)
    logo = inversion.invert(
        attacker.clean_model(),
        attacker.train,
        mask,
        torch.ones(3, size, size),
        steps=config.steps,
        rate=0.1,
        radius=RADIUS,
    )
    return Prepared({"pattern": logo, "mask": mask})


def make_trigger(config, spec, stage, parts):
    """x' = x + T, or (1 - M) x + T with --apply overwrite.

    Inside the logo a pixel changes by at most 255 levels.
    """

    def put(images, index):
        pattern, mask = parts["pattern"].to(images.device), parts["mask"].to(images.device)
        return images + pattern if config.apply == "add" else (1 - mask) * images + pattern

    return poison.on_unit(put)


def blob(size, seed):
    """Mask 1,S,S of the quarter of the image where smooth noise, lowered outwards, is largest."""
    noise = torch.rand(1, 1, 6, 6, generator=seeds.generator("trojannn logo", seed))
    field = F.interpolate(noise, (size, size), mode="bicubic", align_corners=True)[0]
    line = torch.linspace(-1, 1, size).square()
    field = field - line[:, None] - line
    return (field > field.flatten().kthvalue(round(0.75 * size * size)).values).float()


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
