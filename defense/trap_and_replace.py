"""Trap and Replace: lure the backdoor into the head of a network, then replace the head.

Wang, Hong, Zhang, Zhou, Wang, "Trap and Replace: Defending Backdoor Attacks by Trapping Them into an Easy-to-Replace
Subnetwork", NeurIPS 2022 (arXiv 2210.06428). Stage 1 trains a network of its own on the poisoned set, while a decoder
must rebuild the picture from the stem's output: the stem then keeps what pictures consist of, and the backdoor settles
in the head. Stage 2 freezes the stem and trains a new head on the clean pictures. The victim's weights are never used.

    python defense/trap_and_replace.py --result_file badnet_cifar10
    python defense/trap_and_replace.py --result_file badnet_cifar10 --model wrn16_1_leaky         # the paper's network
    python defense/trap_and_replace.py --result_file badnet_cifar10 --variant no_trap             # a control: without the decoder
    python defense/trap_and_replace.py --result_file badnet_cifar10 --head_lr 0.01 --save_folder_name again   # stage 1 is used again

The head is the last residual block and what follows. The clean pictures are taken out of the poisoned set by their
positions in it, the poisoned among them included; both stages see the same ones. Deviations: as everywhere here pixels are normalised, in
the stem (the paper does so for 224 pixels only; what the decoder rebuilds is not normalised), the clean pictures are a
balanced draw, and the last epoch counts (the released code also keeps the best by test accuracy). A small head is trained with
Adam at 0.03, which was published for one of 75,000 parameters, a larger one with SGD at 0.1, published for ResNet-34.
"""

from dataclasses import dataclass
from typing import Literal

import models
from utils.config import Defense, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    variant: Literal["no_trap", "head_only"] | None = None
    """no_trap: stage 1 without the decoder; head_only: stage 2 alone, on the victim (a repair, and the cheapest control)"""
    model: str | None = None
    """architecture to train; by default the victim's"""
    width: int | None = None
    """channels of the first layer of resnet9, where --model names it"""
    head_blocks: int = 1
    """residual blocks in the head"""
    epochs: int = 200
    """passes over the poisoned set in stage 1"""
    batch_size: int = 256
    """images per step of stage 1"""
    trap_lr: float = 1e-3
    """learning rate of Adam in stage 1"""
    reconstruction: float = 10.0
    """weight of the mean squared error of the rebuilt pictures (lambda)"""
    smoothness: float = 1.0
    """weight of the total variation of the rebuilt pictures (lambda 2)"""
    head_epochs: int = 100
    """passes over the clean pictures in stage 2"""
    head_batch_size: int = 64
    """images per step of stage 2"""
    head_optimizer: Literal["adam", "sgd"] | None = None
    """of stage 2: adam for a head of up to 100,000 parameters, else sgd with momentum 0.9"""
    head_lr: float | None = None
    """learning rate of stage 2: 0.03 with adam, 0.1 with sgd"""
    weight_decay: float = 5e-4
    """L2 penalty on all weights, in both stages"""
    cutmix: bool = True
    """paste a box of another clean picture into every one in stage 2"""
    label_smoothing: float = 0.1
    """share of the label that goes to all classes in stage 2"""
    dropout: float = 0.5
    """share of inner activations of the head's residual blocks that is dropped in stage 2"""

    def __post_init__(self):
        super().__post_init__()
        if self.model:
            models.check(self.model, self.width)
        require(self.model or self.width is None, "width", "left out where --model is: the network is then the victim's")
        require(not self.model or self.variant != "head_only", "model", "left out for head_only: the network is the victim")
        require(self.epochs >= 0 and self.head_epochs >= 0, "epochs and head_epochs", "0 or more")
        require(self.batch_size >= 1 and self.head_batch_size >= 1, "batch_size and head_batch_size", "1 or more images")
        require(
            self.trap_lr > 0 and (self.head_lr is None or self.head_lr > 0) and self.weight_decay >= 0,
            "trap_lr, head_lr and weight_decay",
            "positive, or 0 for the last",
        )
        require(self.reconstruction >= 0 and self.smoothness >= 0, "reconstruction and smoothness", "0 or more")
        require(0 <= self.label_smoothing < 1 and 0 <= self.dropout < 1, "label_smoothing and dropout", "0 or more and below 1")
        require(self.head_blocks >= 1, "head_blocks", "1 or more")

    def work(self, clean, found):
        last = f"a head for {self.head_epochs} epochs of {max(clean // self.head_batch_size, 1)} steps on {clean} pictures"
        if self.variant == "head_only":
            return last
        return f"a network for {self.epochs} epochs of {max((found - clean) // self.batch_size, 1)} steps on {found - clean} pictures, then {last}"


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

from models.split import split
from utils import files, run
from utils.batch import augmentation, to_unit
from utils.channels import frozen
from utils.config import digest
from utils.data import Split
from utils.optimizers import adam, sgd
from utils.preview import preview
from utils.train import fit, new, stage

PICTURES = 8  # whose reconstruction is kept
SMALL_HEAD = 100_000  # parameters
OPTIMIZERS = {"adam": (adam, 0.03), "sgd": (sgd, 0.1)}  # and their published rates


class Trap(nn.Module):
    """A network in two parts and, where there is one, the decoder that its stem works for too; logits out."""

    def __init__(self, stem, head, decoder):
        super().__init__()
        self.stem, self.head, self.decoder = stem, head, decoder

    def forward(self, images):
        return self.head(self.stem(images))


class Replaced(nn.Module):
    """A stem whose batch norms keep their statistics, with a head in training."""

    def __init__(self, stem, head):
        super().__init__()
        self.stem, self.head = stem, head

    def train(self, mode=True):
        super().train(mode)
        self.stem.eval()
        return self

    def forward(self, images):
        return self.head(self.stem(images))


def repair(model, record, config):
    name, width = (config.model, config.width) if config.model else (record.model, record.width)
    if config.variant != "head_only":
        model = trapped(name, width, record, config)
        record.report("trapped", model)
    return replaced(name, width, split(name, model, config.head_blocks)[0], record, config)


def trapped(name, width, record, config):
    """The network of stage 1, trained or taken from the record's shared folder; pictures of what its decoder rebuilds are kept."""
    device = record.clean.labels.device
    whole = new(name, width, record.spec, record.train, "trap", config.random_seed)
    stem, head = split(name, whole, config.head_blocks)
    decoding = config.variant != "no_trap" and (config.reconstruction or config.smoothness)
    trap = Trap(stem, head, decoder_for(stem, record.spec.size) if decoding else None).to(device)
    path = record.shared / f"trap-{key(name, width, record, config)}.safetensors"
    with files.locked(path.with_suffix(".lock")):  # of two runs at once, one trains
        if path.is_file():
            with safetensors.safe_open(path, "pt") as file:
                trap.load_state_dict({part: file.get_tensor(part) for part in file.keys()})
                print(f"stage 1 is taken from {path}; its {file.metadata()['seconds']} s do not count in this run", file=sys.stderr)
        else:
            begin = time.perf_counter()
            fit(trap, poisoned_rest(record), stage(config, epochs=config.epochs, batch_size=config.batch_size, lr=config.trap_lr,
                                                   weight_decay=config.weight_decay),
                loss=partial(trap_loss, reconstruction=config.reconstruction, smoothness=config.smoothness), optimizer=adam,
                augment=augmentation(record.spec), drop_last=True, on_epoch=partial(record.report, "trap"),
                checkpoint=record.state / "trap.safetensors")  # fmt: skip
            whole_state = {part: tensor.cpu().contiguous() for part, tensor in trap.state_dict().items()}
            files.write(path, safetensors.torch.save(whole_state, {"seconds": f"{time.perf_counter() - begin:.0f}"}))
    if decoding:
        record.keep("reconstruction.png", reconstructions(trap, record.clean[torch.linspace(0, len(record.clean) - 1, PICTURES).long()]))
    return whole


def replaced(name, width, stem, record, config):
    """A network with the weights of `stem` and a new head, trained on the clean pictures."""
    whole = new(name, width, record.spec, record.train, "head", config.random_seed)
    own, head = split(name, whole, config.head_blocks)
    own.load_state_dict(stem.state_dict())
    hooks = [convolution.register_forward_pre_hook(partial(_drop, config.dropout)) for convolution in inner_convolutions(head)]
    size = sum(parameter.numel() for parameter in head.parameters())
    optimizer, rate = OPTIMIZERS[config.head_optimizer or ("adam" if size <= SMALL_HEAD else "sgd")]
    loss = partial(cutmix_loss if config.cutmix else smoothed, label_smoothing=config.label_smoothing)
    plan = stage(
        config, epochs=config.head_epochs, batch_size=config.head_batch_size, lr=config.head_lr or rate, weight_decay=config.weight_decay
    )
    with frozen(own):
        fit(Replaced(own, head), record.clean, plan, loss=loss, optimizer=optimizer, augment=augmentation(record.spec), drop_last=True,
            on_epoch=partial(record.report, "head"), checkpoint=record.state / "head.safetensors")  # fmt: skip
    for hook in hooks:
        hook.remove()
    return whole


def key(name, width, record, config):
    """A short name for all that the network of stage 1 depends on, beside the poisoned set."""
    names = ("head_blocks", "epochs", "batch_size", "trap_lr", "weight_decay", "random_seed", "precision")
    lure = [0, 0] if config.variant == "no_trap" else [config.reconstruction, config.smoothness]
    return digest({"network": [name, width], "lure": lure, "holdout": record.clean_index.tolist(), "data": record.spec.fingerprint,
                   **{option: getattr(config, option) for option in names}})  # fmt: skip


def poisoned_rest(record):
    """The training set as found, without the positions whose clean pictures the defender holds."""
    keep = torch.ones(len(record.train), dtype=torch.bool, device=record.train.labels.device)
    keep[record.clean_index] = False
    print(f"stage 1 on {int(keep.sum())} of {len(keep)} pictures; the {len(record.clean)} clean ones are held out", file=sys.stderr)
    return record.train.view(keep.nonzero().flatten())


def decoder_for(stem, size):
    """Transposed convolutions from the stem's output to pictures N,3,size,size in [0, 1]; the channels halve with every doubling of the side."""
    with torch.no_grad():
        _, channels, side, _ = stem.eval()(torch.zeros(1, 3, size, size, device=next(stem.parameters()).device)).shape
    doublings = max(round(math.log2(size / side)), 0)
    widths = [channels >> step for step in range(doublings)] + [3] if doublings else [channels, 3]
    layers = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1) if doublings else nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    layers.pop()
    if side << doublings != size:
        layers.append(nn.Upsample((size, size), mode="bilinear"))
    return nn.Sequential(*layers, nn.Sigmoid())


def trap_loss(model, images, labels, index, *, reconstruction, smoothness):
    """Cross-entropy of the head and, through the same stem, the reconstruction error and its total variation."""
    features = model.stem(images)
    loss = F.cross_entropy(model.head(features), labels)
    if model.decoder is None:
        return loss
    rebuilt = model.decoder(features).float()
    return loss + reconstruction * F.mse_loss(rebuilt, images) + smoothness * total_variation(rebuilt)


def total_variation(images):
    """Sum of squared differences of neighbours, down and across, over the number of values."""
    down, across = images[:, :, 1:] - images[:, :, :-1], images[..., 1:] - images[..., :-1]
    return (down.square().sum() + across.square().sum()) / images.numel()


def smoothed(model, images, labels, index, *, label_smoothing):
    return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)


def cutmix_loss(model, images, labels, index, *, label_smoothing):
    """Label-smoothed cross-entropy with both labels of a mixed picture, in the shares of its pixels."""
    mixed, partner, kept = cutmix(images)
    logits = model(mixed)
    own, other = (F.cross_entropy(logits, told, label_smoothing=label_smoothing) for told in (labels, labels[partner]))
    return kept * own + (1 - kept) * other


def cutmix(images):
    """(images with one box from a permuted batch, the permutation, the share of pixels that stayed); draws on the device.

    Yun et al., "CutMix", ICCV 2019: the box has a share 1 - r of the area, r uniform, and a uniform centre; it is cut at the border.
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


def inner_convolutions(head):
    """Of every residual block in the head the last convolution of its main path."""
    blocks = [block for block in head if any(True for _ in block.children())]
    return [[layer for name, layer in block.named_modules() if isinstance(layer, nn.Conv2d) and not name.startswith(("shortcut", "downsample"))][-1]
            for block in blocks]  # fmt: skip


def _drop(share, layer, inputs):
    return (F.dropout(inputs[0], share, layer.training),)


@torch.no_grad()
def reconstructions(trap, clean):
    """A picture of some clean images and of what the decoder makes of them."""
    training = trap.training
    rebuilt = trap.eval().decoder(trap.stem(to_unit(clean.images)))
    trap.train(training)
    shown = Split((rebuilt * 255).round().to(torch.uint8), clean.labels, clean.truth)
    return preview(clean, shown, titles=("clean", "rebuilt"))


def main(config):
    run.defend(__name__, config, repair, stage="repair" if config.variant == "head_only" else "in-training")
