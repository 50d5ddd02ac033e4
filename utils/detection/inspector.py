"""What a detector may see, and what it returns."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from antidote_bench.utils import checkpoint, files, seeds
from antidote_bench.utils.data.dataset import Spec, Split
from antidote_bench.utils.record.folder import OWN


@dataclass(frozen=True)
class Inspector:
    """What `score(model, record, config)` of a detector works with; which images are poisoned is
    not in it.

    `suspects` are the images to judge. For a detector of data they are the training set as it is
    found, or a sample of it, whose `truth` equals the given labels. For a detector of inputs they
    are images in random order, whose labels and truth are all -1. For a detector of models there
    are none.

    `reference` are images of the data set's training set that are known to be clean, with true
    labels, for the method's own statistics. Among the suspects of a detector of data they stand at
    the positions `reference_index`, which is empty otherwise. `model` and `width` name the victim's
    architecture. `state` is a folder for checkpoints, and `shared` one for what other detectors of
    the same record may use too.
    `report(stage, model, epoch=, loss=, lr=)` logs a row about a training; it measures nothing and
    returns nothing.
    """

    spec: Spec
    suspects: Split
    reference: Split
    reference_index: torch.Tensor
    model: str
    width: int | None
    state: Path
    shared: Path
    report: Callable

    @property
    def train(self):
        """The suspects, for functions that train on a record's training set."""
        return self.suspects

    def draw(self, count, purpose, seed):
        """`count` of the reference images in random order, or all where there are fewer."""
        generator = seeds.generator(purpose, seed)
        order = torch.randperm(len(self.reference), generator=generator)[:count]
        return self.reference[order.to(self.reference.labels.device)]

    def keep(self, name, content):
        """Add the file `name` to the detector's record.

        `content` is bytes, or a dict of tensors for a .safetensors file.
        """
        content = content if isinstance(content, bytes) else checkpoint.to_bytes(content)
        files.write(self.state / OWN / name, content)


class Scored(NamedTuple):
    """What a detector of images says; it may return `scores` alone."""

    scores: torch.Tensor  # float64, one per suspect, finite; the higher, the more suspicious
    flagged: torch.Tensor | None = None  # bool, by the paper's own rule, where it has one
    evidence: dict = {}  # tensors to keep in the record


@dataclass(frozen=True)
class Finding:
    """What a detector of models says.

    `score` is one number per model, `per_class` float64, one per class: the higher, the more
    suspicious. `suspects` are the classes that the method takes for a target, [] where it finds
    none, and None where it has no verdict on classes. `published` is the verdict of the paper's own
    rule, where it has one. A method that cannot judge the model says why
    in `abstained`, a sentence, and its score is None. `evidence` are tensors to keep in the record.
    """

    score: float | None
    per_class: torch.Tensor
    suspects: list | None = None
    published: bool | None = None
    abstained: str = ""
    evidence: dict = field(default_factory=dict)
