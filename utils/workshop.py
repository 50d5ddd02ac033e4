"""What an attacker makes a trigger from, and what is kept of it."""

import json
import time

import safetensors
import safetensors.torch
import torch

from utils import files, record, seeds


class Workshop:
    """What `prepare(config, workshop)` of an attack works with.

    `spec` and `train` are the data set's and its clean training split, `index` the positions that will be poisoned.
    """

    def __init__(self, spec, train, index, find_clean_model):
        self.spec, self.train, self.index, self.facts = spec, train, index, {}
        self._find_clean_model, self._elsewhere, self._begin = find_clean_model, 0.0, time.perf_counter()

    def clean_model(self):
        """A network trained on the clean set, in evaluation mode and frozen; trained first where there is none yet."""
        begin = time.perf_counter()
        model, self.facts["clean_model"] = self._find_clean_model()
        self._elsewhere += time.perf_counter() - begin
        return model

    @property
    def seconds(self):
        """Time spent so far, without that of training a clean model, which is kept and serves many attacks."""
        return time.perf_counter() - self._begin - self._elsewhere


def prepared(prepare, config, workshop, state):
    """(the tensors that a trigger consists of, what record.json tells of them), made once and kept in the folder `state`."""
    path = state / record.TRIGGER
    if not path.is_file():
        torch.manual_seed(seeds.number("trigger", config.poison_seed))
        parts = record.plain(prepare(config, workshop))
        facts = {**workshop.facts, "trigger_seconds": round(workshop.seconds, 2)}
        files.write(path, safetensors.torch.save(parts, {"facts": json.dumps(facts)}))
    parts = record.tensors(path)  # refuses a damaged file
    with safetensors.safe_open(path, "pt") as file:
        return parts, json.loads(file.metadata()["facts"])
