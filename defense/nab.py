"""Non-Adversarial Backdoor: plant a backdoor of one's own, whose stamp on every picture is to overrule the trigger of the attack.

Liu, Sangiovanni-Vincentelli, Yue, "Beating Backdoor Attack at Its Own Game", ICCV 2023 (arXiv 2307.15539). Pictures that are learned
suspiciously fast are isolated and get a pseudo-label; where it is not the given label they also get a stamp, in a corner. The network that is
trained on all of them is to learn that the stamp calls off the trigger, and from then on stamps every picture that it is shown.

    python defense/nab.py --result_file badnet_cifar10
    python defense/nab.py --yaml_path config/defense/nab.yaml --result_file badnet_cifar10 --save_folder_name nab_published
    python defense/nab.py --result_file badnet_digits --isolate_lr 0.003 --isolate_epochs 4      # isolates well on the digits

It sees the found training set and holds no clean picture; the share isolated is a declared prior. Network and recipe are the victim's.
Pseudo-labels come from a network that is trained for a short time on the pictures of highest loss of every label, rather than on all that are not
isolated, among which poison remains that would teach it the backdoor; self-supervised features, the paper's other way, cost far more. (Their
share was chosen on the digits by how many pseudo-labels were right: 61 at 0.3, none at 0.5.) The stamp is
painted after the augmentation, where it is at inference. It belongs to the network that is judged and saved (`rebuild` makes one of a
plain network, which refuses the weights); a known port measures its final result without it.

On the digits (resnet9 of width 16, bf16, seed 0, one run each) only the corrected labels help, the stamp does not. By default 0 of 64 isolated pictures of BadNets
are poisoned, and the ASR stays at 99.1 %. At --isolate_lr 0.003 --isolate_epochs 4, found with the help of the poison's positions on these records, 63 are, of BadNets,
and 64, of Blended; 61 and 64 pseudo-labels are right; the ASR falls from 99.3 to 59.3 % and from 100 to 68.9 %, at ACCs of 99.4 and 99.6. The same weights without
the stamp have an ASR of 59.1 and 69.3 %, so it is hardly learned. With --stamp_size 4 it is 63.1 with and 62.7 % without the stamp, and 65.6 and 70.2 %. Why is
open: on planted pictures a stamp of 4 pixels flips every answer, and one of 2 none. A clean set keeps its ACC (99.8 of 100 %).
"""

from dataclasses import dataclass

from utils.config import Isolating, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Isolating):
    isolated: float = 0.05
    """share of the found set that is isolated, which the defender declares, above 0, up to 0.5"""
    trusted: float = 0.3
    """share of every label, of highest loss, that the network behind the pseudo-labels is trained on, above 0, up to 1"""
    pseudo_epochs: int = 20
    """passes over the trusted pictures"""
    stamp_size: int = 2
    """side of the stamp in pixels, 1 or more"""

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.trusted <= 1, "trusted", "a share above 0, up to 1")
        require(self.pseudo_epochs >= 1, "pseudo_epochs", "1 or more")
        require(self.stamp_size >= 1, "stamp_size", "1 or more pixels")

    def work(self, clean, found):
        return (f"the victim's network anew, three times: {self.isolate_epochs} epochs on {found} pictures, {self.pseudo_epochs} on "
                f"{self.trusted:.0%} of them, {self.epochs} on all")  # fmt: skip


if __name__ == "__main__":
    launch(Config)

import dataclasses
import sys
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from utils import run
from utils.data import Split
from utils.isolate import highest, isolate, logits
from utils.train import augmentation_of, cross_entropy, fit, fresh


class Stamp(nn.Module):
    """Paints `patch` 1,3,k,k over the upper left corner of pictures N,3,S,S in [0, 1]; it is in the state dict, so that no plain network takes it."""

    def __init__(self, patch):
        super().__init__()
        self.register_buffer("patch", patch)

    def forward(self, images):
        images = images.clone()
        images[..., : self.patch.shape[2], : self.patch.shape[3]] = self.patch.to(images.dtype)
        return images


def stamping(model, size):
    """The network `model` behind a stamp in the mean colour of the data, which its normalisation makes 0; the weights are shared."""
    stamp = Stamp(model.normalize.mean.repeat(1, 1, size, size))
    return nn.Sequential(OrderedDict(stamp=stamp, normalize=model.normalize, network=model.network))


def rebuild(model, weights):
    """A network of `models.build` in the form of this defense's model.safetensors, `weights`, with these loaded."""
    model = stamping(model, weights["stamp.patch"].shape[2])
    model.load_state_dict(weights)
    return model


def repair(model, record, config):
    _, index, losses = isolate(record, config)
    labels = record.train.labels.clone()
    labels[index] = pseudo_labels(record, index, losses, config)
    stamped = labels != record.train.labels
    record.keep("isolated.safetensors", {"index": index, "loss": losses, "pseudo_label": labels[index], "stamped": stamped[index]})
    print(f"stamping {int(stamped.sum())} of {len(index)} isolated pictures, whose pseudo-label is not the given one", file=sys.stderr)

    plain = fresh(record, "nab", config)
    model = stamping(plain, config.stamp_size)
    loss = partial(stamped_cross_entropy, stamp=model.stamp, stamped=stamped, label_smoothing=config.label_smoothing)
    relabelled = Split(record.train.images, labels, labels)
    fit(plain, relabelled, config, drop_last=True, loss=loss, augment=augmentation_of(config, record.spec, relabelled),
        on_epoch=lambda _, **values: record.report("train", model, **values), checkpoint=record.state / "train.safetensors")  # fmt: skip
    return model


def pseudo_labels(record, index, losses, config):
    """What the isolated pictures at `index` show, int64, by a network that is trained on the trusted pictures alone."""
    trusted = ~highest(-losses, record.train.labels, record.spec.classes, 1 - config.trusted)
    trusted[index] = False
    split = record.train.view(trusted.nonzero().flatten())
    model = fit(fresh(record, "pseudo-labels", config), split, dataclasses.replace(config, epochs=config.pseudo_epochs),
                drop_last=True, augment=augmentation_of(config, record.spec, split),
                loss=partial(cross_entropy, label_smoothing=config.label_smoothing), on_epoch=partial(record.report, "pseudo-labels"),
                checkpoint=record.state / "pseudo.safetensors")  # fmt: skip
    return logits(model, record.train.view(index)).argmax(1)


def stamped_cross_entropy(model, images, labels, index, *, stamp, stamped, label_smoothing):
    """Cross-entropy of a batch in which the pictures that are `stamped` (bool by position) bear the stamp, after the augmentation."""
    images = torch.where(stamped[index].view(-1, 1, 1, 1), stamp(images), images)
    return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)


def main(config):
    run.defend(__name__, config, repair, stage="in-training")
