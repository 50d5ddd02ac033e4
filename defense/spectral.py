"""Spectral Signatures: pictures that stand out along the direction in which their class varies most are removed, and the network is trained anew.

Tran, Li, Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018 (arXiv 1811.00636). Poisoned pictures shift the
features of the class they are labelled as: the first singular vector of its centred features points to them. The
defender sees the poisoned training set and the attacked model; the score of a picture is its squared length along
that vector, among the pictures of its given label, and of every label the 1.5 epsilon of highest scores go.

    python defense/spectral.py --result_file badnet_cifar10
    python defense/spectral.py --result_file badnet_cifar10 --classes outlying   # leave labels alone that vary as others do

epsilon, the poisoned share of a label that the defender expects, is a declared prior (column `prior`) and never the true one. The features are
the input of the last linear layer, in evaluation mode and without augmentation, centred by label; a known port scores
uncentred, augmented and unpooled ones. It holds no clean picture: the found set is scored and trained on whole.
The network is the victim's, with new random weights, and so is its training, unless options say otherwise.

Where half of a label is poison, as at 10 % of ten equal classes poisoned for one target, poison stands out no more than the rest. On the digits (BadNets,
resnet9, seed 0) 10 of 130 poisoned pictures are removed then and the ASR stays at 99.3 %; of 3 % poison (width 8) 24 of 39 are, and the ASR falls
from 95.6 to 2.2 %, the ACC from 99.6 to 98.6 %. On a clean network the ACC falls from 99.8 to 99.0 %.
"""

from dataclasses import dataclass
from typing import Literal

from utils.config import Retraining, require
from utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Retraining):
    epsilon: float = 0.1
    """poisoned share of a label that is expected; 1.5 times as much is removed, 0..0.66"""
    classes: Literal["all", "outlying"] = "all"
    """labels to remove from: all, or those whose features vary much more along one direction than those of others do"""
    outlier: float = 1.5
    """for --classes outlying: how many times the median of all labels the largest singular value, over the root of the count, must be"""

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.epsilon <= 0.66, "epsilon", "a share from 0 to 0.66, so that 1.5 times as much is less than all")
        require(self.outlier >= 1, "outlier", "1 or more")

    @property
    def prior(self):
        return f"rate={self.epsilon}"

    def work(self, clean, found):
        return f"the victim's network anew, {self.epochs} epochs on {found} pictures less about {1.5 * self.epsilon:.0%} of " + (
            "every label" if self.classes == "all" else "the labels that stand out"
        )


if __name__ == "__main__":
    launch(Config)

import sys

import torch
from torch.nn.utils.rnn import pad_sequence

from utils import run
from utils.channels import last_features
from utils.isolate import highest
from utils.train import retrain

TOGETHER = 16  # labels decomposed at once: bounds the memory


def repair(model, record, config):
    labels = record.train.labels
    scores, tops = score(last_features(model, record.train, config.precision), labels, record.spec.classes)
    chosen = torch.ones_like(tops, dtype=torch.bool) if config.classes == "all" else tops > config.outlier * tops[tops > 0].median()
    flagged = highest(scores, labels, record.spec.classes, 1.5 * config.epsilon) & chosen[labels]
    print(f"removing from the labels {chosen.nonzero().flatten().tolist()}", file=sys.stderr)
    record.keep("signatures.safetensors", {"score": scores, "label": labels, "removed": flagged.nonzero().flatten(), "top": tops})
    return retrain(record, flagged, config)


def score(features, labels, classes):
    """(scores N; the largest singular value of every label over the root of its count, 0 for a label without pictures), in float64.

    features N,D. The labels share batched products; blocks are filled with zero rows, which change no singular vector.
    """
    scores, tops = features.new_zeros(len(labels), dtype=torch.float64), features.new_zeros(classes, dtype=torch.float64)
    counts = labels.bincount(minlength=classes)
    members = labels.argsort(stable=True).split(counts.tolist())
    for chunk in counts.nonzero().flatten().split(TOGETHER):
        positions, sizes = [members[label] for label in chunk.tolist()], counts[chunk]
        blocks = pad_sequence([features[part].double() for part in positions], batch_first=True)  # K,n,D
        real = torch.arange(blocks.shape[1], device=labels.device) < sizes[:, None]  # K,n
        mean = blocks.sum(1, keepdim=True) / sizes[:, None, None]
        centred = (blocks - mean) * real[..., None]
        if centred.shape[1] <= centred.shape[2]:  # the smaller Gram matrix: its eigenvectors are the left singular vectors
            values, vectors = torch.linalg.eigh(centred @ centred.mT)
            found = values[:, -1:].clamp(min=0) * vectors[..., -1].square()
        else:
            values, vectors = torch.linalg.eigh(centred.mT @ centred)
            found = (centred @ vectors[..., -1:]).squeeze(2).square()
        scores[torch.cat(positions)] = found[real]
        tops[chunk] = (values[:, -1].clamp(min=0) / sizes).sqrt()
    return scores, tops


def main(config):
    run.defend(__name__, config, repair, stage="in-training")
