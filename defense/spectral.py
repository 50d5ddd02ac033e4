"""Spectral Signatures: remove the images that stand out along their class's main direction.

Tran, Li, Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018 (arXiv 1811.00636). Poison
shifts the features of the class that it is labelled as, so that the first singular vector of the
centred features points to it. The score of an image is its squared length along that vector. The
1.5 epsilon of highest scores are removed from every label, and the network is retrained.

    python defense/spectral.py --result_file badnet_cifar10

Deviates from a known port, which does not centre the features; see docs/defenses/spectral.md.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch
from antidote_bench.utils.repair.options import RetrainingOptions


@dataclass(frozen=True, kw_only=True)
class Config(RetrainingOptions):
    stage: ClassVar[str] = "in-training"
    adds: ClassVar[dict[str, str]] = {
        "signatures.safetensors": "of every training image its `label` and `score`, the positions "
        "`removed`, and of every label `top`, the largest singular value over the root of its "
        "number of images"
    }

    epsilon: float = option(0.1, at_least=0, at_most=0.66)
    """poisoned share of a label that the defender expects; 1.5 times as much is removed, which must
    be less than all"""
    classes: Literal["all", "outlying"] = "all"
    """labels to remove from: all, or those whose features vary much more along one direction than
    those of other labels do"""
    outlier: float = option(1.5, at_least=1)
    """for --classes outlying: how many times the median of all labels the largest singular value,
    over the root of the number of images, must be"""

    @property
    def prior(self):
        return f"rate={self.epsilon}"


if __name__ == "__main__":
    launch(Config)

import sys

import torch
from torch.nn.utils.rnn import pad_sequence

from antidote_bench.utils import run
from antidote_bench.utils.features import last_features
from antidote_bench.utils.repair.isolation import highest
from antidote_bench.utils.train import retrain

TOGETHER = 16  # labels that are decomposed at once: bounds the memory


def repair(model, record, config):
    labels, classes = record.train.labels, record.spec.classes
    features = last_features(model, record.train, config.precision)
    scores, tops = score(features, labels, classes)
    if config.classes == "all":
        suspicious = torch.ones_like(tops, dtype=torch.bool)
    else:
        suspicious = tops > config.outlier * tops[tops > 0].median()
    print(f"removing from the labels {suspicious.nonzero().flatten().tolist()}", file=sys.stderr)
    flagged = highest(scores, labels, classes, 1.5 * config.epsilon) & suspicious[labels]
    evidence = {
        "score": scores,
        "label": labels,
        "removed": flagged.nonzero().flatten(),
        "top": tops,
    }
    record.keep("signatures.safetensors", evidence)
    return retrain(record, flagged, config)


def score(features, labels, classes):
    """(scores N, the largest singular value of every label over the root of its count), float64.

    `features` are N,D. The value of a label without images is 0.
    """
    scores = features.new_zeros(len(labels), dtype=torch.float64)
    tops = features.new_zeros(classes, dtype=torch.float64)
    counts = labels.bincount(minlength=classes)
    members = labels.argsort(stable=True).split(counts.tolist())
    for chunk in counts.nonzero().flatten().split(TOGETHER):
        positions = [members[label] for label in chunk.tolist()]
        blocks = [features[index].double() for index in positions]
        block_scores, tops[chunk] = score_blocks(blocks, counts[chunk])
        scores[torch.cat(positions)] = block_scores
    return scores, tops


def score_blocks(blocks, sizes):
    """The same of some labels, whose features are the K `blocks` n,D, of different `sizes` n.

    The labels share batched products. Blocks are filled up with rows of zeros, which change no
    singular vector.
    """
    padded = pad_sequence(blocks, batch_first=True)  # K,n,D
    real = torch.arange(padded.shape[1], device=sizes.device) < sizes[:, None]  # K,n
    mean = padded.sum(1, keepdim=True) / sizes[:, None, None]
    centred = (padded - mean) * real[..., None]
    # the smaller of the two Gram matrices is decomposed
    if centred.shape[1] <= centred.shape[2]:  # its eigenvectors are the left singular vectors
        values, vectors = torch.linalg.eigh(centred @ centred.mT)
        scores = values[:, -1:].clamp(min=0) * vectors[..., -1].square()
    else:
        values, vectors = torch.linalg.eigh(centred.mT @ centred)
        scores = (centred @ vectors[..., -1:]).squeeze(2).square()
    return scores[real], (values[:, -1].clamp(min=0) / sizes).sqrt()


def main(config):
    run.defend(__name__, config, repair)
