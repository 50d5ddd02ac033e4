"""What the tests of detectors share: a detector called without its script."""

import dataclasses
import importlib

import torch

from antidote_bench.utils import parsing
from antidote_bench.utils.detection.inspector import Inspector, Scored
from antidote_bench.utils.evaluation import Clock
from antidote_bench.utils.protocol import detect
from antidote_bench.utils.record import contents
from antidote_bench.utils.record import folder as layout
from tests.helpers import few


def options(name, record, places, *words):
    """The options of detection/<name>.py for a short run on a small record."""
    module = importlib.import_module(f"antidote_bench.detection.{name}")
    short = [*few(f"detection.{name}"), "--result_file", record, "--device", "cpu"]
    short += ["--precision", "fp32"] + ["--inputs", "40"] * (module.Config.judges == "input")
    return parsing.parse(module.Config, [str(word) for word in (*places, *short, *words)])


def opened(config, place):
    """(victim, Inspector, Case) of a detector's options; it writes below the folder `place`."""
    info = contents.open_record(config.record)
    loaded = contents.load(config.record, config, torch.device("cpu"), info)
    row, _ = contents.read_measures(config.record, info)
    known = detect.choose_clean(loaded, config)
    case = detect.case_of(config, loaded, known, row)
    log = layout.Log(place)
    found = detect.inspector_of(config, loaded, case, known, place, info, log, Clock(0))
    model = loaded.model.eval().requires_grad_(False)
    return model, dataclasses.replace(found, shared=place / "shared"), case


def permuted(record, order, place):
    """The same `Inspector` with its suspects in another order."""
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order))
    index = position[record.reference_index] if len(record.reference_index) else order[:0]
    return dataclasses.replace(
        record, suspects=record.suspects[order], reference_index=index, shared=place
    )


def made_up(suspects, place, *, spec, reference_index=(), reference=None, width=4):
    """An `Inspector` of any images, for planted cases; its reference is among the suspects unless
    it is given."""
    index = torch.tensor(reference_index, dtype=torch.long)
    reference = suspects[index] if reference is None else reference
    return Inspector(
        spec,
        suspects,
        reference,
        index,
        "resnet9",
        width,
        place,
        place / "shared",
        lambda *_, **__: 0,
    )


def scores_of(said):
    """The scores in what a detector of images returns."""
    return said.scores if isinstance(said, Scored) else said
