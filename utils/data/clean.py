"""The clean images that a defender holds: of the data set's training set, or of another source."""

import hashlib
import sys
from typing import NamedTuple

import torch

from antidote_bench.utils.data import sources
from antidote_bench.utils.data.dataset import Split, balanced_subset, class_subset


class Held(NamedTuple):
    """Clean images with true labels, and where they are from.

    They are at the positions `index` of the training set. Those of another source are at none, and
    `mark` is a digest of their pixels and labels, None for images of the training set.
    """

    split: Split
    index: torch.Tensor
    mark: str | None = None


def hold(clean, spec, config):
    """What the options of a defense give to the defender; `clean` is the data set's training set.

    Raises MissingError (exit 3) where config.clean_from is no folder of images of these classes.
    """
    device, budget = clean.labels.device, config.budget(len(clean), spec.classes)
    nowhere = torch.empty(0, dtype=torch.long, device=device)
    if not budget:
        return Held(clean[nowhere], nowhere)
    if config.clean_from is None:
        index = choose(clean.labels, budget, config).to(device)
        return Held(clean[index], index)
    paths, labels = sources.find_labelled(config.clean_from, spec.class_names)
    labels = torch.from_numpy(labels)
    if len(labels) < budget and config.clean_per_class is None:
        print(
            f"note: {config.clean_from} has {len(labels)} images, and {budget} were asked for",
            file=sys.stderr,
        )
    index = choose(labels, budget, config)
    images = torch.empty(len(index), 3, spec.size, spec.size, dtype=torch.uint8)
    for start, part in sources.decode([paths[place] for place in index], spec.size):
        images[start : start + len(part)] = torch.from_numpy(part)
    labels = labels[index]
    mark = hashlib.sha256(images.numpy())
    mark.update(labels.numpy())
    images, labels = images.to(device), labels.to(device)
    return Held(Split(images, labels, labels), nowhere, mark.hexdigest())


def choose(labels, budget, config):
    """Sorted positions of `budget` images, or of config.clean_per_class of every class."""
    if config.clean_per_class is None:
        return balanced_subset(labels, budget, config.data_seed)
    index = class_subset(labels, config.clean_per_class, config.data_seed)
    if short := config.clean_per_class * len(labels.unique()) - len(index):
        print(
            f"note: the defender holds {short} images fewer than asked for, because some classes "
            f"have no {config.clean_per_class} images",
            file=sys.stderr,
        )
    return index
