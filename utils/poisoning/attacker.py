"""What an attacker knows and may use to make a trigger, and how a trigger's tensors are kept."""

import json
import time
from typing import NamedTuple

import safetensors
import torch

from antidote_bench.utils import checkpoint, files, seeds
from antidote_bench.utils.record.folder import TRIGGER

LABELS = "labels.safetensors"  # in an unfinished run: labels that an attack has made
VICTIM = "victim/"  # in the file of an unfinished run: the weights that the victim starts from


class Prepared(NamedTuple):
    """What `prepare(config, attacker)` of an attack returns.

    `parts` are the tensors that the trigger consists of; the record keeps them. `victim` are the
    weights that the victim starts from, where it has learned together with its trigger.
    """

    parts: dict
    victim: dict | None = None


class Attacker:
    """What `prepare(config, attacker)` of an attack works with.

    `spec` and `train` are the data set's description and its clean training split, `index` the
    positions of the images that will be poisoned.
    """

    def __init__(self, spec, train, index, find_clean_model):
        self.spec, self.train, self.index, self.facts = spec, train, index, {}
        self._find_clean_model = find_clean_model
        self._not_counted = 0.0
        self._begin = time.perf_counter()

    def clean_model(self):
        """A network trained on the clean set, in evaluation mode, its parameters frozen.

        It is trained first where there is none yet.
        """
        begin = time.perf_counter()
        model, self.facts["clean_model"] = self._find_clean_model()
        self._not_counted += time.perf_counter() - begin
        return model

    @property
    def seconds(self):
        """Time spent so far, without the training of a clean model, which serves many attacks."""
        return time.perf_counter() - self._begin - self._not_counted


def prepare_once(prepare, config, attacker, state, name=TRIGGER):
    """(Prepared, facts for record.json): made once, and kept in the file `name` of the folder
    `state`."""
    path = state / name
    if not path.is_file():
        torch.manual_seed(seeds.number("trigger", config.poison_seed))
        prepared = prepare(config, attacker)
        facts = {**attacker.facts, "trigger_seconds": round(attacker.seconds, 2)}
        start = {f"{VICTIM}{name}": value for name, value in (prepared.victim or {}).items()}
        files.write(
            path, checkpoint.to_bytes({**prepared.parts, **start}, {"facts": json.dumps(facts)})
        )
    tensors = checkpoint.read_tensors(path)  # refuses a damaged file
    with safetensors.safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    start = {
        name.removeprefix(VICTIM): value
        for name, value in tensors.items()
        if name.startswith(VICTIM)
    }
    parts = {name: value for name, value in tensors.items() if not name.startswith(VICTIM)}
    return Prepared(parts, start or None), facts
