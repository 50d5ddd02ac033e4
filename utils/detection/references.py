"""Records of benign models that a detector of models compares its own with."""

from typing import NamedTuple

import torch

from antidote_bench.utils import checkpoint
from antidote_bench.utils.errors import ConfigError, MissingError
from antidote_bench.utils.record import folder as layout

BENIGN = ("", "0")  # n_poison of a record: unknown, or none


class Reference(NamedTuple):
    """A benign model: where its record lies, and its tensors by name."""

    place: object
    tensors: dict


def places(config, least):
    """The folders of the records that config.reference names, the judged one left out.

    It holds names or folders of records, with commas between them, or folders of such records.
    Raises MissingError (exit 3) where there is no record, and ConfigError (exit 2) for a record of
    a poisoned training set, and for fewer than `least` records.
    """
    found = []
    for name in filter(None, (part.strip() for part in config.reference.split(","))):
        folder = layout.find(name, config.record_path)
        inside = [folder] if layout.state_of(folder) == layout.DONE else sorted(folder.iterdir())
        records = [place for place in inside if (place / layout.RECORD).is_file()]
        if not records:
            raise MissingError(f"{folder} is no finished record, and holds none")
        found += records
    judged = config.record.resolve()
    unique = {place.resolve(): place for place in found if place.resolve() != judged}
    for place in unique.values():
        if layout.read_results(place).get("n_poison") not in BENIGN:
            raise ConfigError(
                f"reference must name benign models: {place} was trained on poisoned images"
            )
    if len(unique) < least:
        raise ConfigError(
            f"reference must name at least {least} other records, not {len(unique)}: "
            "attack/clean.py makes them"
        )
    return list(unique.values())


def read(config, shapes, least):
    """The `Reference`s that config.reference names, with the tensors named in `shapes` {name:
    shape}.

    Raises what `places` raises, RefusedError (exit 4) for a damaged record, and ConfigError (exit
    2) for a model of another network or without finite weights.
    """
    found = []
    for place in places(config, least):
        layout.verify(place, "attack")
        tensors = checkpoint.read_tensors(place / layout.WEIGHTS)
        if any(name not in tensors or tensors[name].shape != shapes[name] for name in shapes):
            raise ConfigError(f"reference must name models of the same network: {place} is not")
        tensors = {name: tensors[name] for name in shapes}
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ConfigError(
                f"reference must leave out {place}: its weights are not finite numbers"
            )
        found.append(Reference(place, tensors))
    return found
