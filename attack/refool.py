"""Refool: the reflection of another scene, as in a window pane, means the target class.

Liu, Ma, Bailey, Lu, "Reflection Backdoor: A Natural Backdoor Attack on Deep Neural Networks", ECCV 2020
(arXiv 2007.02343). The attacker poisons data only. The paper keeps labels and searches for the most effective
reflections; like later reimplementations this one draws them at random and changes labels, unless --clean_label true.

    python attack/refool.py --dataset cifar10 --save_folder_name refool_cifar10

Reflected scenes are training pictures of other classes than the target, or those of --reflection_folder. Offsets and blur
are those of the paper for pictures of 560 pixels, scaled to --blend_size.
"""

from dataclasses import dataclass

from utils.config import Attack, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Attack):
    clean_label: bool = False
    """poison pictures of the target class only, which keep their label"""
    alpha: float | None = None
    """weight of the picture against the reflection; by default drawn from 0.55 to 0.95 for each picture"""
    ghost_ratio: float = 0.49
    """share of pictures with a double reflection; the others have one out of focus"""
    scenes: int = 200
    """number of scenes that are reflected"""
    blend_size: int = 64
    """side in pixels at which pictures are mixed, rounded to a multiple of their own"""
    reflection_folder: str | None = None
    """folder of pictures to reflect instead"""

    def __post_init__(self):
        super().__post_init__()
        require(self.alpha is None or 0 < self.alpha < 1, "alpha", "between 0 and 1")
        require(0 <= self.ghost_ratio <= 1, "ghost_ratio", "a share from 0 to 1")
        require(self.scenes >= 1, "scenes", "1 or more")
        require(8 <= self.blend_size <= 1024, "blend_size", "8 to 1024 pixels")


if __name__ == "__main__":
    launch(Config)

from pathlib import Path

import torch
import torch.nn.functional as F

from utils import patterns, poison, run, seeds
from utils.batch import to_unit
from utils.errors import MissingError

GAMMA, PAPER_SIZE, CHUNK = 2.2, 560, 64


def prepare(config, workshop):
    """The scenes uint8 N,3,S,S."""
    if config.reflection_folder:
        files = sorted(
            path for path in Path(config.reflection_folder).glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".npy")
        )
        if not files:
            raise MissingError(f"there are no pictures in {config.reflection_folder}; --reflection_folder names a folder of them")
        found = torch.stack([poison.fitted(path, workshop.spec.size) for path in files[: config.scenes]])
        return {"scenes": (found * 255).round().to(torch.uint8)}
    train = workshop.train
    others = poison.choose(train.truth, config.scenes / len(train), config.poison_seed,
                           among=train.truth != config.attack_target, purpose="refool scenes")  # fmt: skip
    return {"scenes": train.images[others]}


def make_trigger(config, spec, stage, parts):
    """x' = (a x^g + R)^(1/g) with a scene's reflection R and g = 2.2; a pixel changes by at most 255 levels."""
    side = spec.size * max(1, round(config.blend_size / spec.size))

    def reflect(images, index):
        # ten numbers for every position of the split: all that is random about its reflection
        drawn = seeds.uniform("refool", config.poison_seed, index, 10)
        which = (drawn[:, 0] * len(parts["scenes"])).long().to(images.device)
        drawn, scenes = drawn.to(images.device), bright(to_unit(parts["scenes"].to(images.device)), side)  # each is reflected many times
        mixed = [_mixed(config, images[part], scenes[which[part]], drawn[part], side) for part in torch.arange(len(images)).split(CHUNK)]
        return torch.cat(mixed)

    return poison.on_unit(reflect)


def bright(images, side):
    """Images enlarged to `side` pixels, as amounts of light instead of grey levels."""
    return F.interpolate(images, (side, side), mode="bilinear").clamp(0, 1) ** GAMMA


def _mixed(config, images, scene, drawn, side):
    picture = bright(images, side)
    alpha = (0.55 + 0.4 * drawn[:, 7] if config.alpha is None else torch.full_like(drawn[:, 7], config.alpha)).view(-1, 1, 1, 1)
    mixed = alpha * picture
    double = drawn[:, 1] < config.ghost_ratio
    for kind, reflection in ((double, ghost), (~double, unfocused)):
        chosen = kind.nonzero().flatten()
        if len(chosen):
            mixed[chosen] += reflection(scene[chosen], picture[chosen], alpha[chosen], drawn[chosen])
    return F.interpolate(mixed.clamp(0, 1) ** (1 / GAMMA), images.shape[2:], mode="area")


def ghost(scene, picture, alpha, drawn):
    """(1 - alpha) times a R + (1 - a) R shifted by 3 to 8 of 560 pixels right and down, zeros coming in; a is u or |1 - u|, u from 0.15 to 0.5."""
    share = (0.15 + 0.35 * drawn[:, 5] - (drawn[:, 4] < 0.5).float()).abs().view(-1, 1, 1, 1)
    shift = -2 * (3 + (6 * drawn[:, 2:4]).floor()) / PAPER_SIZE  # in the units of affine_grid, where the picture is 2 wide
    moves = torch.eye(2, 3, device=scene.device).repeat(len(scene), 1, 1)
    moves[:, :, 2] = shift
    moved = F.grid_sample(scene, F.affine_grid(moves, list(scene.shape), align_corners=False), align_corners=False)
    return (1 - alpha) * (share * scene + (1 - share) * moved)


def unfocused(scene, picture, alpha, drawn):
    """The scene, blurred by 1 to 5 of 560 pixels, darkened where the sum would be too bright, under a Gaussian vignette."""
    side = scene.shape[-1]
    soft = patterns.blur(scene, (1 + 4 * drawn[:, 6]) * side / PAPER_SIZE, radius=-(-15 * side // PAPER_SIZE))
    total = soft + picture
    over = total > 1
    excess = ((total - 1) * over).sum((2, 3), keepdim=True) / over.sum((2, 3), keepdim=True).clamp(min=1)
    line = torch.linspace(0, 1, side, device=scene.device)
    row, column = (torch.exp(-0.5 * ((line - 0.25 - 0.5 * drawn[:, k, None]) * 6) ** 2) for k in (8, 9))
    vignette = row[:, None, :, None] * column[:, None, None, :]
    return (soft - 1.1 * excess).clamp(0, 1) * vignette * (1 - alpha / 2)


def main(config):
    run.attack(__name__, config, make_trigger, prepare=prepare)
