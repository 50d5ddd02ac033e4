"""The models that finished defenses have made of a record's victim."""

import importlib

from antidote_bench.utils import checkpoint
from antidote_bench.utils.config import PACKAGE, scripts
from antidote_bench.utils.errors import MissingError, RefusedError
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.text import cut, quoted


def find(record, name, victim):
    """(the folder of a finished defense of the record in the folder `record`, its record.json).

    `victim` is what record.json of the record says. Raises MissingError (exit 3) where there is no
    such defense, and RefusedError (exit 4) where it is damaged or has repaired another victim.
    """
    path = record / layout.DEFENSES / name
    if not path.is_dir():
        there = sorted(each.parent.name for each in path.parent.glob(f"[!.]*/{layout.RECORD}"))
        hint = f"it has {', '.join(there)}" if there else "none was run on it"
        raise MissingError(f"the record {record} has no defense {quoted(name)}: {cut(hint, 300)}")
    info = layout.verify(path, "defense")
    if info.get("victim_sha256") != victim["files"][layout.WEIGHTS]:
        raise RefusedError(f"{path} repaired another victim than the one of {record}")
    return path, info


def rebuilt(path, info, network):
    """The model of a verified defense, on the CPU; its network may have layers that the victim's
    has not.

    `network` is one like the victim's, which is filled. Raises RefusedError (exit 4) where the
    defense is not known here, or its weights do not fit.
    """
    name = info["name"]
    if name not in scripts("defense"):
        raise RefusedError(f"{path} is of a defense {quoted(name)}, which is not known here")
    weights = checkpoint.from_bytes(layout.read_checked(path, layout.WEIGHTS, info), path)
    own = getattr(importlib.import_module(f"{PACKAGE}.defense.{name}"), "rebuild", None)
    try:
        if own:
            return own(network, weights)
        network.load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError) as error:
        raise RefusedError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    return network
