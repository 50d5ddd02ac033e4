"""What a defender knows and may use."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from antidote_bench.models import Architecture
from antidote_bench.utils import checkpoint, files
from antidote_bench.utils.data.dataset import Spec, Split
from antidote_bench.utils.record.folder import OWN


@dataclass(frozen=True)
class Defender:
    """What `repair(model, record, config)` of a defense works with; the test sets are not in it.

    `train` is the training set as the defender finds it: its labels may be the attacker's, and its
    `truth` equals them. `clean` is a few images that are known to be clean, at positions
    `clean_index` of the training set; there are none where the clean images are from another
    source. `model` and `width` are what `models.build` takes for the victim's architecture. `state`
    is a folder for checkpoints, `shared` one for what other runs on the same training set may use
    too. `report(stage, model)` has the evaluator measure a model and log it; it returns nothing.
    `measure(model)`, which returns the evaluator's {acc, asr, ra}, is None unless the run is marked
    as using test data (selection oracle).
    """

    spec: Spec
    train: Split
    clean: Split
    clean_index: torch.Tensor
    model: str | Architecture
    width: int | None
    state: Path
    shared: Path
    report: Callable
    measure: Callable | None = None

    def keep(self, name, content):
        """Add the file `name` to the defense's record.

        `content` is bytes, or a dict of tensors for a .safetensors file.
        """
        content = content if isinstance(content, bytes) else checkpoint.to_bytes(content)
        files.write(self.state / OWN / name, content)
