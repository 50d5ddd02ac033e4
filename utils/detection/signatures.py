"""Spectral signatures: the squared length of an image's features along the main direction of its
label. Tran, Li, Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018."""

import torch
from torch.nn.utils.rnn import pad_sequence

TOGETHER = 16  # labels that are decomposed at once: bounds the memory


def signatures(features, labels, classes):
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
