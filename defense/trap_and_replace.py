"""Trap and Replace: lure the backdoor into the head of a network, then replace the head.

Wang, Hong, Zhang, Zhou, Wang, "Trap and Replace: Defending Backdoor Attacks by Trapping Them into
an Easy-to-Replace Subnetwork", NeurIPS 2022 (arXiv 2210.06428). Stage 1 trains a new network on the
poisoned set, while a decoder must rebuild the image from the stem's output: the stem learns what
images consist of, and the backdoor settles in the head. Stage 2 freezes the stem and trains a new
head on the clean images.

    python defense/trap_and_replace.py --result_file badnet_cifar10

Deviates in normalisation, choice of clean images and last epoch: see
docs/defenses/trap_and_replace.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench import models
from antidote_bench.utils.config import Defense, option, require
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    adds: ClassVar[dict[str, str]] = {
        "reconstruction.png": "eight clean images and what the decoder of stage 1 makes of them; "
        "only where there is a decoder"
    }

    variant: Literal["no_trap", "head_only"] | None = None
    """no_trap: stage 1 without the decoder; head_only: stage 2 alone, on the victim (a repair, and
    the cheapest control)"""
    model: str | None = None
    """architecture to train; by default the victim's"""
    width: int | None = None
    """channels of the first layer of resnet9, where --model names it"""
    head_blocks: int = option(1, at_least=1)
    """residual blocks in the head"""
    epochs: int = option(200, at_least=0)
    """epochs of stage 1, on the poisoned set"""
    batch_size: int = option(256, at_least=1, unit="images")
    """images per step of stage 1"""
    trap_lr: float = option(1e-3, above=0)
    """learning rate of Adam in stage 1"""
    reconstruction: float = option(10.0, at_least=0)
    """weight of the mean squared error of the rebuilt images (lambda)"""
    smoothness: float = option(1.0, at_least=0)
    """weight of the total variation of the rebuilt images (lambda 2)"""
    head_epochs: int = option(100, at_least=0)
    """epochs of stage 2, on the clean images"""
    head_batch_size: int = option(64, at_least=1, unit="images")
    """images per step of stage 2"""
    head_optimizer: Literal["adam", "sgd"] | None = None
    """of stage 2: adam for a head of up to 100,000 parameters, else sgd with momentum 0.9"""
    head_lr: float | None = option(None, above=0)
    """learning rate of stage 2: 0.03 with adam, 0.1 with sgd"""
    weight_decay: float = option(5e-4, at_least=0)
    """L2 penalty on all weights, in both stages"""
    cutmix: bool = True
    """paste a box of another clean image into every image of stage 2"""
    label_smoothing: float = option(0.1, at_least=0, below=1)
    """share of the label that is spread over all classes in stage 2"""
    dropout: float = option(0.5, at_least=0, below=1)
    """share of inner activations of the head's residual blocks that is dropped in stage 2"""

    @property
    def stage(self):
        return "repair" if self.variant == "head_only" else "in-training"

    def __post_init__(self):
        super().__post_init__()
        if self.model:
            named = not models.is_file(self.model)
            require(
                named, "model", "the name of a network here; a file's is trained as the victim's"
            )
            models.check(self.model, self.width)
        require(
            self.model or self.width is None,
            "width",
            "left out where --model is: the network is then the victim's",
        )
        require(
            not self.model or self.variant != "head_only",
            "model",
            "left out for head_only: the network is the victim",
        )


if __name__ == "__main__":
    launch(Config)

import math
import sys
import time
from functools import partial

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench.models.split import split
from antidote_bench.utils import files, run
from antidote_bench.utils.charts import preview
from antidote_bench.utils.config import digest
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.loader import augmentation, evaluating, to_unit
from antidote_bench.utils.optimizers import adam, sgd
from antidote_bench.utils.repair.layers import frozen
from antidote_bench.utils.repair.unlearning import EvaluationMode
from antidote_bench.utils.train import Recipe, build_seeded_model, cross_entropy, fit

PREVIEWED = 8  # images whose reconstruction is kept
SMALL_HEAD = 100_000  # parameters
SHORTCUTS = "shortcut", "downsample"  # names of what leads past the main path of a block
OPTIMIZERS = {"adam": (adam, 0.03), "sgd": (sgd, 0.1)}  # with their published learning rates
STAGE_1 = (  # options that the network of stage 1 depends on
    "head_blocks",
    "epochs",
    "batch_size",
    "trap_lr",
    "weight_decay",
    "random_seed",
    "precision",
)


def check(model, record, config):
    name, width = architecture(record, config)
    if config.model:
        with torch.random.fork_rng(devices=[]):
            model = models.build(name, record.spec, width)
    split(name, model, config.head_blocks, record.spec.size)


def architecture(record, config):
    """(what models.build takes, the width) of the network to train."""
    if config.model:
        return models.chosen(config.model), config.width
    return record.model, record.width


def repair(model, record, config):
    name, width = architecture(record, config)
    if config.variant != "head_only":
        model = train_trap(name, width, record, config)
        record.report("trapped", model)
    stem, _ = split(name, model, config.head_blocks, record.spec.size)
    return replace_head(name, width, stem, record, config)


class Trap(nn.Module):
    """Stem and head of a network, and the decoder that shares the stem (or None); logits out."""

    def __init__(self, stem, head, decoder):
        super().__init__()
        self.stem, self.head, self.decoder = stem, head, decoder

    def forward(self, images):
        return self.head(self.stem(images))


def train_trap(name, width, record, config):
    """The network of stage 1: trained, or loaded from the record's shared folder."""
    network = build_seeded_model(name, width, record.spec, record.train, "trap", config.random_seed)
    stem, head = split(name, network, config.head_blocks, record.spec.size)
    decoding = config.variant != "no_trap" and (config.reconstruction or config.smoothness)
    decoder = decoder_for(stem, record.spec.size) if decoding else None
    trap = Trap(stem, head, decoder).to(record.clean.labels.device)
    path = record.shared / f"trap-{key(name, width, record, config)}.safetensors"
    with files.locked(path.with_suffix(".lock")):  # of two runs at once, one trains
        if path.is_file():
            load_trap(trap, path)
        else:
            begin = time.perf_counter()
            fit_trap(trap, record, config)
            save_trap(trap, path, time.perf_counter() - begin)
    if decoding:
        some = torch.linspace(0, len(record.clean) - 1, PREVIEWED).long()
        chart = reconstructions(trap, record.clean[some], record.spec.class_names)
        record.keep("reconstruction.png", chart)
    return network


def decoder_for(stem, size):
    """Transposed convolutions from the stem's output to images N,3,size,size in [0, 1].

    The channels halve with every doubling of the side.
    """
    pixels = torch.zeros(1, 3, size, size, device=next(stem.parameters()).device)
    with torch.no_grad(), evaluating(stem):
        _, channels, side, _ = stem(pixels).shape
    doublings = max(round(math.log2(size / side)), 0)
    widths = [channels >> step for step in range(doublings)] + [3] if doublings else [channels, 3]
    layers = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        if doublings:
            layers.append(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1))
        else:
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
        layers.append(nn.ReLU())
    layers.pop()
    if side << doublings != size:
        layers.append(nn.Upsample((size, size), mode="bilinear"))
    return nn.Sequential(*layers, nn.Sigmoid())


def key(name, width, record, config):
    """A short name for all that the network of stage 1 depends on, beside the poisoned set."""
    lure = [0, 0] if config.variant == "no_trap" else [config.reconstruction, config.smoothness]
    return digest(
        {
            "network": [str(name), width],
            "lure": lure,
            "holdout": record.clean_index.tolist(),
            "data": record.spec.fingerprint,
            **{field: getattr(config, field) for field in STAGE_1},
        }
    )


def load_trap(trap, path):
    """Load the weights of stage 1 that another run has saved at `path`."""
    with safetensors.safe_open(path, "pt") as file:
        trap.load_state_dict({part: file.get_tensor(part) for part in file.keys()})
        print(
            f"stage 1 is taken from {path}; its {file.metadata()['seconds']} s do not count in "
            "this run",
            file=sys.stderr,
        )


def fit_trap(trap, record, config):
    """Train stem, head and decoder on the poisoned set."""
    recipe = Recipe.stage(
        config,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.trap_lr,
        weight_decay=config.weight_decay,
    )
    fit(
        trap,
        without_clean(record),
        recipe,
        loss=partial(trap_loss, reconstruction=config.reconstruction, smoothness=config.smoothness),
        optimizer=adam,
        augment=augmentation(record.spec),
        drop_last=True,
        on_epoch=partial(record.report, "trap"),
        checkpoint=record.state / "trap.safetensors",
    )


def without_clean(record):
    """The poisoned set without the positions whose clean images the defender holds."""
    rest = torch.ones(len(record.train), dtype=torch.bool, device=record.train.labels.device)
    rest[record.clean_index] = False
    print(
        f"stage 1 on {int(rest.sum())} of {len(rest)} images; the {len(record.clean)} clean ones "
        "are held out",
        file=sys.stderr,
    )
    return record.train.view(rest.nonzero().flatten())


def trap_loss(model, images, labels, index, *, reconstruction, smoothness):
    """Cross-entropy of the head + reconstruction * error + smoothness * total variation.

    Error and total variation are those of the images that the decoder makes of the same features.
    """
    features = model.stem(images)
    loss = F.cross_entropy(model.head(features), labels)
    if model.decoder is None:
        return loss
    rebuilt = model.decoder(features).float()
    return (
        loss + reconstruction * F.mse_loss(rebuilt, images) + smoothness * total_variation(rebuilt)
    )


def total_variation(images):
    """Sum of squared differences of neighbours, down and across, over the number of values."""
    down, across = images[:, :, 1:] - images[:, :, :-1], images[..., 1:] - images[..., :-1]
    return (down.square().sum() + across.square().sum()) / images.numel()


def save_trap(trap, path, seconds):
    """Save the weights of stage 1 for other runs."""
    weights = {part: tensor.cpu().contiguous() for part, tensor in trap.state_dict().items()}
    files.write(path, safetensors.torch.save(weights, {"seconds": f"{seconds:.0f}"}))


@torch.no_grad()
def reconstructions(trap, clean, names=()):
    """PNG bytes: some clean images, of classes called `names`, and what the decoder makes of
    them."""
    with evaluating(trap):
        rebuilt = trap.decoder(trap.stem(to_unit(clean.images)))
    rebuilt = Split((rebuilt * 255).round().to(torch.uint8), clean.labels, clean.truth)
    return preview(clean, rebuilt, titles=("clean", "rebuilt"), names=names)


def replace_head(name, width, stem, record, config):
    """A network with the weights of `stem` and a new head, trained on the clean images."""
    network = build_seeded_model(name, width, record.spec, record.train, "head", config.random_seed)
    own_stem, head = split(name, network, config.head_blocks, record.spec.size)
    own_stem.load_state_dict(stem.state_dict())
    hooks = [
        convolution.register_forward_pre_hook(partial(drop_inputs, config.dropout))
        for convolution in inner_convolutions(head)
    ]
    with frozen(own_stem):
        fit_head(network, head, record, config)
    for hook in hooks:
        hook.remove()
    return network


def fit_head(network, head, record, config):
    """Train `head` within `network`; the stem keeps its weights and batch norm statistics."""
    size = sum(parameter.numel() for parameter in head.parameters())
    optimizer, rate = OPTIMIZERS[config.head_optimizer or ("adam" if size <= SMALL_HEAD else "sgd")]
    recipe = Recipe.stage(
        config,
        epochs=config.head_epochs,
        batch_size=config.head_batch_size,
        lr=config.head_lr or rate,
        weight_decay=config.weight_decay,
    )
    loss = cutmix_loss if config.cutmix else cross_entropy
    fit(
        EvaluationMode(network, [head]),
        record.clean,
        recipe,
        loss=partial(loss, label_smoothing=config.label_smoothing),
        optimizer=optimizer,
        augment=augmentation(record.spec),
        drop_last=True,
        on_epoch=partial(record.report, "head"),
        checkpoint=record.state / "head.safetensors",
    )


def inner_convolutions(head):
    """The last convolution of the main path of each residual block in the head."""
    found = []
    for block in head:
        own = [
            layer
            for name, layer in block.named_modules()
            if name and isinstance(layer, nn.Conv2d) and not name.startswith(SHORTCUTS)
        ]
        found += own[-1:]
    return found


def drop_inputs(share, layer, inputs):
    """Dropout of a layer's inputs, as a forward pre-hook."""
    return (F.dropout(inputs[0], share, layer.training),)


def cutmix_loss(model, images, labels, index, *, label_smoothing):
    """Label-smoothed cross-entropy with both labels of a mixed image, weighted by their pixels."""
    mixed, partner, share = cutmix(images)
    logits = model(mixed)
    own = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    other = F.cross_entropy(logits, labels[partner], label_smoothing=label_smoothing)
    return share * own + (1 - share) * other


def cutmix(images):
    """(images with one box from a permuted batch, the permutation, the share of pixels that stay).

    Yun et al., "CutMix", ICCV 2019: the box has a share 1 - r of the area, r uniform, and a uniform
    centre; it is cut at the border. Draws on the device of the images.
    """
    ratio, *centre = torch.rand(3, device=images.device)
    spans = []
    for side, place in zip(images.shape[-2:], centre, strict=True):
        half, middle = ((side * (1 - ratio).sqrt()).floor() / 2).floor(), (place * side).floor()
        position = torch.arange(side, device=images.device)
        spans.append((position >= middle - half) & (position < middle + half))
    box = spans[0][:, None] & spans[1]
    partner = torch.randperm(len(images), device=images.device)
    return torch.where(box, images[partner], images), partner, 1 - box.float().mean()


def main(config):
    run.defend(__name__, config, repair, check=check)
