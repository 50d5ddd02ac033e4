"""Which pictures of a found training set look poisoned: those whose features change most when the picture is turned and shifted.

Chen, Wu, Wang, "Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples", NeurIPS 2022. A network that
has only begun to learn knows triggers before it knows pictures; a trigger that is turned or shifted away takes its features along.
"""

import math
import sys
from functools import partial

import torch
import torch.nn.functional as F

from utils import seeds
from utils.batch import look
from utils.channels import features_of
from utils.train import fit, fresh, stage

CLEAN, UNKNOWN, POISONED = 0, 1, 2
TURN, SHIFT = 180.0, 0.2  # largest turn in degrees, and shift as a share of the side


def distinguish(record, config):
    """CLEAN, UNKNOWN or POISONED for every picture of the found set, int64 N; kept in a file with the scores.

    `config` is a config.Distinguishing. The network is the victim's with new random weights, and forgotten afterwards.
    """
    model = fresh(record, "distinguish", config)
    plan = partial(stage, config, batch_size=config.batch_size, lr=config.feature_lr, lr_min=config.feature_lr)
    fit(model, record.train, plan(epochs=config.feature_epochs), on_epoch=partial(record.report, "features"),
        checkpoint=record.state / "features.safetensors")  # fmt: skip
    record.report("features", model)
    fit(model, record.train, plan(epochs=config.centre_epochs), loss=partial(centre_loss, classes=record.spec.classes),
        on_epoch=partial(record.report, "centres"), checkpoint=record.state / "centres.safetensors")  # fmt: skip
    scores = sensitivity(model, record.train, draw(len(record.train), record.spec.size, config.random_seed), config.precision)
    kinds = assign(scores, config.alpha_c, config.alpha_p, config.random_seed)
    record.keep("sensitivity.safetensors", {"score": scores, "kind": kinds})
    clean, _, poisoned = kinds.bincount(minlength=3).tolist()
    print(f"taking {clean} of {len(kinds)} pictures for clean and {poisoned} for poisoned", file=sys.stderr)
    return kinds


def centre_loss(model, images, labels, index, *, classes):
    return centre_similarity(features_of(model, images), labels, classes)


def centre_similarity(features, labels, classes):
    """Mean cosine between the mean features, n,D, of every two labels in the batch; 0 where all labels are the same."""
    with torch.autocast(labels.device.type, enabled=False):
        member = (torch.arange(classes, device=labels.device)[:, None] == labels).to(torch.promote_types(features.dtype, torch.float32))
        centres = F.normalize(member @ features.to(member.dtype))  # K,D: a sum has the direction of the mean; without pictures it is 0
        cosines = centres @ centres.T
    count = member.any(1).sum()
    return (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)).clamp(min=1)


def sensitivity(model, split, change, precision="fp32"):
    """The mean square by which the features of every picture move when it is turned and shifted, float32 N; the paper's FCT.

    `change` N,3 are the degrees and the pixels right and down for every picture. In evaluation mode; leaves the model as it was.
    """
    change = change.to(split.labels.device)

    def moved(images, _labels, index):
        one, other = (features_of(model, shown).float() for shown in (images, turned(images, change[index])))
        return (one - other).square().mean(1)

    return look(model, split, moved, precision)


def draw(count, size, seed):
    """A turn of up to 180 degrees either way and a shift of up to a fifth of the side, in whole pixels, for every picture: float32 N,3.

    Drawn once: what is scored with other numbers than its threshold is assigned at random.
    """
    uniform = 2 * torch.rand(count, 3, generator=seeds.generator("turn and shift", seed)) - 1
    return torch.cat([TURN * uniform[:, :1], (SHIFT * size * uniform[:, 1:]).round()], 1)


def turned(images, change):
    """Float images n,C,S,S, each turned counter-clockwise about its middle and then shifted; the nearest pixel is taken, black comes in.

    `change` n,3: degrees, pixels to the right, pixels down. What the turn moves out of the frame does not come back with the shift.
    """
    angle, shift = change[:, 0].deg2rad(), change[:, 1:] * (2 / images.shape[-1])
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1)
    move = torch.stack([one, zero, -shift[:, 0], zero, one, -shift[:, 1]], 1)
    with torch.autocast(images.device.type, enabled=False):
        for theta in (turn, move):  # each says where the pixels of the result come from
            grid = F.affine_grid(theta.view(-1, 2, 3).to(images.dtype), images.shape, align_corners=False)
            images = F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return images


def assign(scores, alpha_c, alpha_p, seed):
    """CLEAN for the floor(alpha_c N) lowest scores, POISONED for the floor(alpha_p N) highest, else UNKNOWN: int64 N.

    Among equal scores chance decides and not the order of the set, which may be that of the classes.
    """
    count = len(scores)
    mixed = torch.randperm(count, generator=seeds.generator("equal scores", seed)).to(scores.device)
    order = mixed[scores[mixed].argsort(stable=True)]
    low, high = (int(share * count + 1e-9) for share in (alpha_c, alpha_p))
    kinds = torch.full((count,), UNKNOWN, dtype=torch.long, device=scores.device)
    kinds[order[:low]] = CLEAN
    kinds[order[count - high :]] = POISONED
    return kinds


def bounded(losses, bound, classes):
    """Losses n of pictures to unlearn, from `bound` times that of a blind guess on without a gradient."""
    return losses.clamp(max=bound * math.log(classes))
