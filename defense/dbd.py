"""DBD: a network that first learns to see without labels cannot tie a trigger to one; labels come later, and only those it believes.

Huang, Li, Wu, Qin, Ren, "Backdoor Defense via Decoupling the Training Process", ICLR 2022 (arXiv 2202.03423). Three stages on the
found training set, with a new network of the victim's kind and no clean picture: SimCLR trains the backbone without labels, so that a
poisoned picture lies among those that look like it; a linear layer is trained on the frozen backbone with the symmetric
cross-entropy, which gives way to wrong labels; then, epoch by epoch, the share of the pictures whose labels have the lowest loss keep them,
the others lose them, and MixMatch trains the whole network on both.

    python defense/dbd.py --result_file badnet_cifar10
    python defense/dbd.py --result_file badnet_cifar10 --yaml_path config/defense/dbd.yaml     # as long as in the paper
    python defense/dbd.py --result_file badnet_cifar10 --among label --save_folder_name again  # half of every label is believed

The share `labelled` that keeps its labels supposes that poison is among the others: a declared prior (column `prior`). By
default SimCLR and MixMatch have 100 epochs each, as in a well-known port (the paper: 1,000 and 190). That port keeps the cosine
of 1,000 epochs, whose rate then hardly falls, and takes the settings of ImageNet for all sets but CIFAR-10; here the cosine
ends with the epochs asked for.

As in the released code the views of SimCLR are blurred with probability 1/2 too, the linear layer sees cropped and mirrored
pictures, and guessing labels moves the batch norms. Other than there: a picture is mirrored only where the data set allows it;
crops are resized bilinearly, not bicubically, and those of the labelled stages padded with zeros; both views of a picture are
anchors of the contrastive loss; Adam begins anew with MixMatch; every picture is mixed in a proportion of its own (there a
batch has one); and labelled and unlabelled pictures go through the network as one batch.

On the digits config/dataset/digits.yaml asks for less of everything: 10 epochs of SimCLR, 6 of MixMatch of 20 steps, about 80 s
of one CPU core (resnet9 of width 16, bf16, seed 0, n = 1). The ASR falls from 99.3 to 0.0 for badnet and from 100.0 to 0.0 for
blended, the ACC from 99.6 to 96.8 and from 99.8 to 96.8; after the linear layer it is 0.4 and 1.3 at an ACC of 94.4 and 93.0.
That of a clean model falls from 100.0 to 86.6: the lowest losses of the whole set may leave a class without labels, here the
eight, which is never answered then. With --among label it falls to 96.0, and that of badnet to 95.8 (ASR 0.0).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from utils.config import Defense, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Defense):
    holds_clean: ClassVar[bool] = False

    ssl_epochs: int = 100
    """passes of SimCLR over the training set (the paper: 1000), 0 or more"""
    ssl_batch_size: int = 512
    """images per step of SimCLR, each in two views, 2 or more"""
    ssl_lr: float = 0.4
    """highest learning rate of SGD in SimCLR, which falls to 0 along a cosine; above 0"""
    ssl_weight_decay: float = 1e-4
    """L2 penalty on all weights in SimCLR, 0 or more"""
    temperature: float = 0.5
    """by which the similarities of views are divided, above 0"""
    head_epochs: int = 10
    """passes that train the linear layer on the frozen backbone, 0 or more"""
    head_batch_size: int = 128
    """images per step of these, 1 or more"""
    head_lr: float = 0.002
    """learning rate of Adam for it, above 0; resnet9 divides its logits by 8 and may want more"""
    alpha: float = 0.1
    """weight of the cross-entropy in the symmetric one, 0 or more"""
    beta: float = 1.0
    """weight of the reverse cross-entropy in it, 0 or more"""
    labelled: float = 0.5
    """share of the training set, of lowest loss, whose labels MixMatch believes; between 0 and 1"""
    among: Literal["all", "label"] = "all"
    """all: the lowest losses of the whole set, as in the paper; label: those of every label, so that no class loses all of its labels"""
    epochs: int = 100
    """epochs of MixMatch (the paper: 190), for each of which that share is chosen anew, 0 or more"""
    steps: int = 1024
    """of MixMatch per epoch, 1 or more"""
    mixmatch_lr: float = 0.002
    """learning rate of Adam in MixMatch, above 0"""
    batch_size: int = 64
    """labelled images per step of MixMatch, and as many unlabelled ones in two views, 1 or more"""
    sharpening: float = 0.5
    """temperature that sharpens guessed labels, above 0; 1 leaves them as they are"""
    mixing: float = 0.75
    """of the Beta distribution of the share in which pictures are mixed, above 0"""
    unlabelled_weight: float = 15.0
    """that the unlabelled pictures reach at the end, step by step from 0; 0 or more"""

    def __post_init__(self):
        super().__post_init__()
        require(min(self.ssl_epochs, self.head_epochs, self.epochs) >= 0, "ssl_epochs, head_epochs and epochs", "0 or more")
        require(self.ssl_batch_size >= 2, "ssl_batch_size", "2 or more images, which are told apart")
        require(min(self.head_batch_size, self.batch_size, self.steps) >= 1, "head_batch_size, batch_size and steps", "1 or more")
        require(min(self.ssl_lr, self.head_lr, self.mixmatch_lr) > 0, "ssl_lr, head_lr and mixmatch_lr", "above 0")
        require(min(self.ssl_weight_decay, self.alpha, self.beta) >= 0, "ssl_weight_decay, alpha and beta", "0 or more")
        require(self.unlabelled_weight >= 0, "unlabelled_weight", "0 or more")
        require(min(self.temperature, self.sharpening, self.mixing) > 0, "temperature, sharpening and mixing", "above 0")
        require(0 < self.labelled < 1, "labelled", "a share between 0 and 1")

    @property
    def prior(self):
        return f"labelled={self.labelled}"

    def work(self, clean, found):
        return (
            f"the victim's network anew: {self.ssl_epochs} epochs of {max(found // self.ssl_batch_size, 1)} steps without labels, "
            f"a linear layer for {self.head_epochs}, then {self.epochs} of {self.steps} steps with {self.labelled:.0%} of the labels"
        )


if __name__ == "__main__":
    launch(Config)

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from utils import run
from utils.batch import augmentation, look
from utils.channels import features_of, last_linear
from utils.optimizers import adam
from utils.train import fit, fresh, stage
from utils.unlearn import probe
from utils.views import pairs, views

CODE = 128  # numbers that a view becomes
FLOOR = 1e-4  # probability of a label that is not the given one, in the reverse cross-entropy: its logarithm must be finite


class Contrast(nn.Module):
    """The codes n,128 of pictures: two layers on what the last linear layer of `network` gets, which itself takes no part."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        wide = last_linear(network).in_features
        self.projection = nn.Sequential(nn.Linear(wide, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Linear(wide, CODE))

    def forward(self, images):
        return self.projection(features_of(self.network, images))


class MixMatch(nn.Module):
    """The loss of a batch whose first third is labelled, and whose others are two views of the same unlabelled pictures.

    Berthelot et al., "MixMatch: A Holistic Approach to Semi-Supervised Learning", NeurIPS 2019 (arXiv 1905.02249). It counts its
    steps, because the weight of the unlabelled pictures grows with them.
    """

    def __init__(self, config, classes):
        super().__init__()
        self.config, self.classes, self.last = config, classes, max(config.epochs * config.steps - 1, 1)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, model, images, labels, index):
        config, count = self.config, len(images) // 3
        with torch.no_grad():
            guess = guessed(model(images[count:]).float(), config.sharpening)
        torch.clear_autocast_cache()  # or some versions of torch would learn with the bfloat16 weights of this pass, which have no gradient
        aims = torch.cat([F.one_hot(labels[:count], self.classes).float(), guess, guess])
        shares, partners = draw_mixture(len(images), config.mixing, images.device)
        logits = model(mixed(images, shares, partners)).float()
        weight = config.unlabelled_weight * self.step / self.last
        self.step += 1
        return semi_supervised(logits, mixed(aims, shares, partners), count, weight)


def repair(model, record, config):
    network = fresh(record, "dbd", config)
    contrasted(network, record, config)
    with_head(network, record, config)
    record.report("decoupled", network)
    return tuned(network, record, config)


def contrasted(network, record, config):
    """Train all of `network` but its last linear layer so that two views of a picture are alike, and unlike those of others."""

    def loss(contrast, images, labels, index):
        return nt_xent(contrast(images), config.temperature)

    fit(Contrast(network).to(record.train.labels.device), record.train,
        stage(config, epochs=config.ssl_epochs, batch_size=config.ssl_batch_size, lr=config.ssl_lr, weight_decay=config.ssl_weight_decay),
        loss=loss, augment=pairs(views(record.spec)), drop_last=True, checkpoint=record.state / "contrast.safetensors",
        on_epoch=lambda _contrast, **values: record.report("contrast", network, **values))  # fmt: skip


def with_head(network, record, config):
    """Train the last linear layer of `network`, the rest of which is frozen, with the symmetric cross-entropy."""

    def loss(model, images, labels, index):
        return symmetric(model(images), labels, config.alpha, config.beta).mean()

    plan = stage(config, epochs=config.head_epochs, batch_size=config.head_batch_size, lr=config.head_lr, lr_min=config.head_lr,
                 weight_decay=0.0)  # fmt: skip
    with probe(network) as last:
        fit(last, record.train, plan, loss=loss, optimizer=adam, augment=augmentation(record.spec),
            on_epoch=lambda _model, **values: record.report("head", network, **values),
            checkpoint=record.state / "head.safetensors")  # fmt: skip


def tuned(network, record, config):
    """`network`, trained whole by MixMatch; which labels count is chosen anew before every epoch."""

    def order(network, generator):
        labels = record.train.labels if config.among == "label" else torch.zeros_like(record.train.labels)
        known, unknown = halves(losses(network, record.train, config), labels, config.labelled)
        return positions(known, unknown, config.steps, config.batch_size, generator)

    return fit(network, record.train,
               stage(config, epochs=config.epochs, steps=config.steps, batch_size=3 * config.batch_size, lr=config.mixmatch_lr,
                     lr_min=config.mixmatch_lr, weight_decay=0.0),
               loss=MixMatch(config, record.spec.classes), optimizer=adam, augment=augmentation(record.spec), order=order,
               on_epoch=partial(record.report, "mixmatch"), checkpoint=record.state / "mixmatch.safetensors")  # fmt: skip


def nt_xent(codes, temperature):
    """The mean over all 2n codes of -log softmax, among the cosines with all others over the temperature, at the other view.

    codes 2n,D: a first view of each picture, then a second one in the same order. Chen et al. 2020, equation 1.
    """
    with torch.autocast(codes.device.type, enabled=False):  # of cosines bfloat16 has two digits
        codes = F.normalize(codes.float())
        similar = codes @ codes.T / temperature
    places = torch.arange(len(codes), device=codes.device)
    return F.cross_entropy(similar.masked_fill(places == places[:, None], -math.inf), places.roll(len(codes) // 2))


def symmetric(logits, labels, alpha, beta):
    """alpha times cross-entropy and beta times reverse cross-entropy of each picture, float32 n.

    Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019 (arXiv 1908.06112). The reverse one
    is -sum_k p_k log q_k with q = 1 for the given label and FLOOR for the others, so -log FLOOR times what p leaves to these.
    """
    logs = -F.cross_entropy(logits.float(), labels, reduction="none")
    return -alpha * logs - beta * math.log(FLOOR) * (1 - logs.exp())


def losses(network, split, config):
    """The symmetric cross-entropy of every picture with its given label, float32 N: in evaluation mode, without augmentation."""
    return look(network, split, lambda images, labels, _: symmetric(network(images), labels, config.alpha, config.beta), config.precision)


def halves(losses, labels, share):
    """(positions of the `share` of lowest losses within every label, of the others), neither empty; of equal losses the first is lower."""
    order = losses.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]  # by label, and by loss within
    counts = labels.bincount()
    rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
    order = order[((rank + 0.5).double() / counts[labels[order]]).argsort(stable=True)]
    count = min(max(int(share * len(losses) + 1e-9), 1), len(losses) - 1)
    return order[:count], order[count:]


def positions(known, unknown, steps, size, generator):
    """The positions of an epoch, steps * 3 * size: in every step `size` of the known ones and twice the same `size` of the unknown.

    Each side is shuffled, and again when all were seen.
    """

    def drawn(side):
        passes = -(-steps * size // len(side))
        shuffled = [side[torch.randperm(len(side), generator=generator, device=side.device)] for _ in range(passes)]
        return torch.cat(shuffled)[: steps * size].view(steps, size)

    known, unknown = drawn(known), drawn(unknown)
    return torch.cat([known, unknown, unknown], 1).flatten()


def guessed(logits, temperature):
    """Labels n,K of n pictures, from logits 2n,K of a first view of each and then a second: their mean probabilities, sharpened."""
    mean = logits.softmax(1).view(2, -1, logits.shape[1]).mean(0)
    return (mean.log() / temperature).softmax(1)  # in proportion to the mean to the power of 1 / temperature


def draw_mixture(count, mixing, device):
    """(shares N of at least 1/2 that pictures keep of themselves, positions N of those they are mixed with), from the global generator."""
    beta = torch.distributions.Beta(*torch.full((2,), mixing, device=device), validate_args=False).sample((count,))
    return torch.maximum(beta, 1 - beta), torch.randperm(count, device=device)


def mixed(values, shares, partners):
    """values N,... each times its share, and the rest of its partner's."""
    return torch.lerp(values[partners], values, shares.view(-1, *[1] * (values.ndim - 1)))


def semi_supervised(logits, aims, count, weight):
    """Cross-entropy of the first `count` pictures, plus `weight` times the mean square of what the others' probabilities N,K miss."""
    known = F.cross_entropy(logits[:count], aims[:count])
    return known + weight * F.mse_loss(logits[count:].softmax(1), aims[count:])


def main(config):
    run.defend(__name__, config, repair, stage="in-training")
