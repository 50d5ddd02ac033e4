"""Detectors: what holds for all of them, found by their scripts, and the evaluator's part."""

import csv
import dataclasses
import importlib
import json
import shlex

import pytest
import torch
from safetensors.torch import load_file

from antidote_bench.utils import parsing
from antidote_bench.utils.data import loader
from antidote_bench.utils.protocol import detect
from antidote_bench.utils.record import contents
from antidote_bench.utils.record import folder as layout
from tests import inspecting
from tests.helpers import names

ALWAYS = {"config.yaml", "results.csv", "record.json", "scores.safetensors", "scores.png"}


def row_of(folder):
    (row,) = csv.DictReader(open(folder / "results.csv"))
    return row


# give all images one score where the network has learned nothing, as `smaller` has
CONSTANT = {"teco", "ted"}


@pytest.mark.parametrize("name", names("detection"))
def test_detector(name, places, request, tmp_path, monkeypatch, capsys):
    """Killed when it has its scores, it goes on; its files, its row, and a second run; and a score
    depends neither on the order of the images nor on the batches."""
    module = importlib.import_module(f"antidote_bench.detection.{name}")
    record = request.getfixturevalue("small" if name in CONSTANT else "smaller")
    config = inspecting.options(name, record, places, "--save_folder_name", f"{name}_quick")
    folder = record / "detection" / f"{name}_quick"
    with monkeypatch.context() as patch:
        patch.setattr(contents, "save_detection", killed)
        with pytest.raises(KeyboardInterrupt):
            module.main(config)
    assert layout.state_of(folder) == layout.PARTIAL
    module.main(config)
    assert layout.state_of(folder) == layout.DONE and not (folder / "state").exists()
    said = capsys.readouterr().out
    module.main(config)
    again = capsys.readouterr().out.splitlines()
    assert again == [f"already done: {folder}", said.strip()]
    examine(name, module, config, folder)
    compare_orders(module, config, folder, tmp_path, monkeypatch)


def killed(*_):
    raise KeyboardInterrupt


def examine(name, module, config, folder):
    """The files, the row and the command of a finished run."""
    adds = set(module.Config.adds)
    optional = {"log.csv", *adds}
    there = {path.name for path in folder.iterdir()}
    assert there >= ALWAYS | adds and there <= ALWAYS | optional
    row, info = row_of(folder), json.loads((folder / "record.json").read_text())
    assert list(row) == layout.DETECTION_COLUMNS and row["detection"] == name
    assert info["kind"] == "detection" and layout.verify(folder, "detection") == info
    _, script, *words = shlex.split(info["command"])
    assert script == f"detection/{name}.py"
    found = parsing.parse(module.Config, words, script=script)
    assert found.identity() == {**config.identity(), "precision": row["precision"]}
    if config.judges == "model":
        assert row["score"] or row["abstained"]
        return
    saved = load_file(folder / "scores.safetensors")
    assert saved["score"].dtype == torch.float64 and saved["score"].isfinite().all()
    judged = saved["role"] == detect.SUSPECT
    assert int(judged.sum()) == int(row["n_positive"]) + int(row["n_negative"])
    assert int((saved["role"] == detect.CALIBRATING).sum()) == int(row["n_calibration"]) >= 19
    assert torch.equal(saved["flagged"], judged & (saved["score"] > float(row["threshold"])))
    assert 0 <= float(row["auroc"]) <= 1


def compare_orders(module, config, folder, place, monkeypatch):
    """The scores of the run, and those of the same images in another order and other batches."""
    model, record, _ = inspecting.opened(config, place)
    monkeypatch.setattr(loader, "EVALUATION_BATCH", 70)
    if config.judges == "model":
        said = module.score(model, record, config)
        saved = load_file(folder / "scores.safetensors")["per_class"]
        torch.testing.assert_close(said.per_class.double().cpu(), saved, rtol=1e-3, atol=1e-6)
        return
    saved = load_file(folder / "scores.safetensors")["score"]
    order = torch.arange(len(saved))
    if not config.order_matters:
        order = torch.randperm(len(saved), generator=torch.Generator().manual_seed(1))
    shown = inspecting.permuted(record, order, place / "other")
    scores = inspecting.scores_of(module.score(model, shown, config))
    assert (scores - saved[order]).abs().median() <= 1e-3 * saved.std()  # rounding
    assert torch.corrcoef(torch.stack([scores, saved[order]]))[0, 1] > 0.99
    if config.judges == "input":
        compare_some(module, config, model, record, saved, place)


def compare_some(module, config, model, record, saved, place):
    """The scores of some inputs in another order, and of one alone, are those of all together."""
    for some in (torch.tensor([50, 3, 77, 10, 31]), torch.tensor([20])):
        alone = dataclasses.replace(
            record, suspects=record.suspects[some], shared=place / f"some_{len(some)}"
        )
        scores = inspecting.scores_of(module.score(model, alone, config))
        torch.testing.assert_close(scores, saved[some], rtol=1e-3, atol=1e-3 * float(saved.std()))
