"""Which images of a training set look poisoned: those most sensitive to rotation and translation.

Chen, Wu, Wang, "Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples", NeurIPS
2022. A network that has only begun to learn knows triggers better than it knows images. A trigger
that is rotated or moved out of place loses its features, so that the features of a poisoned image
change more than those of a clean one.
"""

import math
import sys
from functools import partial

import torch
import torch.nn.functional as F

from antidote_bench.utils import seeds
from antidote_bench.utils.data.loader import forward_all
from antidote_bench.utils.features import features_of
from antidote_bench.utils.train import Recipe, fit, victim_architecture

CLEAN, UNKNOWN, POISONED = 0, 1, 2
TURN, SHIFT = 180.0, 0.2  # largest rotation in degrees, and translation as a share of the side


def distinguish(record, config):
    """CLEAN, UNKNOWN or POISONED for every image of the training set, int64 N.

    `config` are SensitivityOptions. The record keeps the result, with the scores. The features are
    those of a network of the victim's architecture that is trained from scratch for this only.
    """
    model = train_features(record, config)
    change = draw(len(record.train), record.spec.size, config.random_seed)
    scores = sensitivity(model, record.train, change, config.precision)
    kinds = assign(scores, config.alpha_c, config.alpha_p, config.random_seed)
    record.keep("sensitivity.safetensors", {"score": scores, "kind": kinds})
    clean, _, poisoned = kinds.bincount(minlength=3).tolist()
    print(
        f"taking {clean} of {len(kinds)} images for clean and {poisoned} for poisoned",
        file=sys.stderr,
    )
    return kinds


def train_features(record, config):
    """A network that has learned the training set for a few epochs, and then for some more to drive
    the mean features of the labels apart."""
    model = victim_architecture(record, "distinguish", config)
    recipe = partial(
        Recipe.stage,
        config,
        batch_size=config.batch_size,
        lr=config.feature_lr,
        lr_min=config.feature_lr,
    )
    fit(
        model,
        record.train,
        recipe(epochs=config.feature_epochs),
        on_epoch=partial(record.report, "features"),
        checkpoint=record.state / "features.safetensors",
    )
    record.report("features", model)
    return fit(
        model,
        record.train,
        recipe(epochs=config.centre_epochs),
        loss=partial(centre_loss, classes=record.spec.classes),
        on_epoch=partial(record.report, "centres"),
        checkpoint=record.state / "centres.safetensors",
    )


def centre_loss(model, images, labels, index, *, classes):
    """`centre_similarity` of a batch."""
    return centre_similarity(features_of(model, images), labels, classes)


def centre_similarity(features, labels, classes):
    """Mean cosine between the mean features of every two labels in the batch; 0 for a single label.

    features n,D, labels n.
    """
    with torch.autocast(labels.device.type, enabled=False):
        member = (torch.arange(classes, device=labels.device)[:, None] == labels).to(
            torch.promote_types(features.dtype, torch.float32)
        )
        # K,D: a sum has the direction of the mean; that of a label without images is 0
        centres = F.normalize(member @ features.to(member.dtype))
        cosines = centres @ centres.T
    count = member.any(1).sum()
    return (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)).clamp(min=1)


def draw(count, size, seed):
    """A random rotation and translation for every image, float32 N,3.

    It is up to 180 degrees either way, and up to a fifth of the side in whole pixels. It is drawn
    once: a score under one draw says little about a threshold that was found under another.
    """
    uniform = 2 * torch.rand(count, 3, generator=seeds.generator("turn and shift", seed)) - 1
    return torch.cat([TURN * uniform[:, :1], (SHIFT * size * uniform[:, 1:]).round()], 1)


def sensitivity(model, split, change, precision="fp32"):
    """The mean square by which the features of every image change, float32 N; the paper's FCT.

    `change` N,3 are, for every image, the degrees of the rotation and the pixels of the translation
    to the right and down. The model is in evaluation mode for it and keeps its own mode.
    """
    change = change.to(split.labels.device)

    def squared_change(images, _labels, index):
        before = features_of(model, images).float()
        after = features_of(model, transformed(images, change[index])).float()
        return (before - after).square().mean(1)

    return forward_all(model, split, squared_change, precision)


def transformed(images, change):
    """Float images n,C,S,S, each rotated counter-clockwise about its centre and then translated.

    `change` n,3: degrees, pixels to the right, pixels down. Pixels come from the nearest place.
    From outside of the image comes black, also where the rotation has moved pixels out of it.
    """
    angle, shift = change[:, 0].deg2rad(), change[:, 1:] * (2 / images.shape[-1])
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rotation = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1)
    translation = torch.stack([one, zero, -shift[:, 0], zero, one, -shift[:, 1]], 1)
    with torch.autocast(images.device.type, enabled=False):
        for theta in (rotation, translation):  # each says where the pixels of the result come from
            grid = F.affine_grid(
                theta.view(-1, 2, 3).to(images.dtype), images.shape, align_corners=False
            )
            images = F.grid_sample(
                images, grid, mode="nearest", padding_mode="zeros", align_corners=False
            )
    return images


def assign(scores, alpha_c, alpha_p, seed):
    """CLEAN for the lowest scores, POISONED for the highest, else UNKNOWN: int64 N.

    They are floor(alpha_c N) and floor(alpha_p N) images. Among equal scores chance decides, not
    the order of the training set, which may be that of the classes.
    """
    count = len(scores)
    shuffled = torch.randperm(count, generator=seeds.generator("equal scores", seed))
    shuffled = shuffled.to(scores.device)
    order = shuffled[scores[shuffled].argsort(stable=True)]
    low, high = (int(share * count + 1e-9) for share in (alpha_c, alpha_p))
    kinds = torch.full((count,), UNKNOWN, dtype=torch.long, device=scores.device)
    kinds[order[:low]] = CLEAN
    kinds[order[count - high :]] = POISONED
    return kinds


def bounded(losses, bound, classes):
    """Losses n of images to unlearn, without a gradient from `bound` times that of a guess on."""
    return losses.clamp(max=bound * math.log(classes))
