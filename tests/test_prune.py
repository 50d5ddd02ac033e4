"""Pruning defenses against slow, written-out twins, planted backdoors, and on real digits; and how a setting is chosen."""

import copy
import csv
import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import models
from defense import fp
from tests.test_fmp import SPEC, found_record
from utils import choice, config, data
from utils import run as protocol
from utils.errors import ConfigError
from utils.judge import Judge
from utils.metrics import Exam, predict

SCRIPTS = [fp]


def options(script, **changes):
    return script.Config(**{"result_file": "x", "precision": "fp32", **changes})


def settled(name, record):
    """A network with the batch statistics of the record's pictures, which tells them apart; its predictions are their classes."""
    torch.manual_seed(0)
    model = models.build(name, SPEC, 8 if name == "resnet9" else None).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.bias.data.normal_(0, 0.5)
    with torch.no_grad():
        model(record.clean.images / 255)
        model.eval()
        last = fp.last_linear(model, SPEC)
        last.weight.normal_()
        last.bias.copy_(-last.weight @ fp.activations(model, record.clean, SPEC, options(fp)).mean(0))
    record.clean.truth[:] = predict(model, record.clean)
    assert len(record.clean.truth.unique()) > 3
    return model


def results(folder):
    (row,) = csv.DictReader(open(folder / "results.csv"))
    return row


@pytest.mark.parametrize("count", [20, 64, 300])
def test_a_fifth_is_held_back_with_every_class(count, tmp_path):
    clean = found_record(tmp_path, count)[0].clean
    work, held = choice.divide(clean, options(fp))
    assert len(work) + len(held) == count and len(held) == max(10, round(count / 5))
    assert held.truth.bincount().max() - held.truth.bincount().min() <= 1 and len(work.truth.unique()) == 10
    pictures = torch.cat([work.images, held.images]).flatten(1)
    assert len(pictures.unique(dim=0)) == count, "every picture is on one side"
    again, other = (choice.divide(clean, options(fp, data_seed=seed))[1] for seed in (0, 1))
    assert torch.equal(again.images, held.images) and not torch.equal(other.images, held.images)
    assert choice.divide(clean, options(fp, selection="oracle")) == (clean, None)


def test_too_few_pictures_to_hold_some_back(tmp_path):
    with pytest.raises(ConfigError, match="--clean_count 20"):
        choice.divide(found_record(tmp_path, 10)[0].clean, options(fp))


def spy(seen):
    def repair(model, record, _config):
        seen.append(record)
        assert record.report("looked", model) is None
        return model

    return repair


@pytest.mark.parametrize("selection", ["none", "fixed", "val", "oracle"])
def test_only_a_marked_run_can_ask_the_exam(selection, small, places, run, tmp_path):
    """The word that opens the exam is the one that the results carry, and every table marks it."""
    seen, folder = [], shutil.copytree(small, tmp_path / "v", ignore=shutil.ignore_patterns("defense"))
    given = config.parse(fp.Config, [*places, "--result_file", str(folder), "--save_folder_name", "spy"])
    protocol.defend("defense.spy", given, spy(seen), selection=selection)
    row, (record,) = results(folder / "defense/spy"), seen
    assert row["selection"] == selection and (record.measure is None) == (selection != "oracle")
    assert not any(isinstance(value, Exam | Judge) for value in vars(record).values())
    table = run("compare.py", tmp_path).stdout
    assert ("chosen with test data" in table) == (selection == "oracle")
    if record.measure:
        model = models.build("resnet9", record.spec, 8)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        assert {key: str(value) for key, value in record.measure(model).items()} == {key: row[key] for key in ("acc", "asr", "ra")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_exam_is_asked_for_by_the_option_alone(script, monkeypatch):
    said = []
    monkeypatch.setattr(protocol, "defend", lambda *_, **words: said.append(words["selection"]))
    for selection in ("val", "oracle"):
        script.main(options(script, selection=selection))
    assert options(script).selection == "val" and said == ["val", "oracle"]


def planted(tmp_path, measure=None):
    """(a network that takes a white corner for class 0, a record of 300 pictures without one that it classifies right).

    Unit 3 of 40 fires on the corner alone; 30 others fire for the class that the second row of the picture shows.
    """
    record, said = found_record(tmp_path)
    record.clean.images[:] = record.clean.images // 4
    for image, label in zip(record.clean.images, record.clean.truth.tolist(), strict=True):
        image[0, 1, label] = 255
    first, last = nn.Linear(3 * 32 * 32, 40), nn.Linear(40, 10)
    for layer in (first, last):
        layer.weight.data.zero_(), layer.bias.data.zero_()
    for unit in range(10, 40):
        first.weight.data[unit, 32 + unit % 10], first.bias.data[unit] = 1, -0.5
        last.weight.data[unit % 10, unit] = 1
    first.weight.data[3, 0], first.bias.data[3], last.weight.data[0, 3] = 1, -0.5, 9
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), last), dataclasses.replace(record, measure=measure), said


def corner(images):
    images = images.clone()
    images[:, :, 0, 0] = 255
    return images


def by_hand(model, order, counts, held):
    """Every step by a forward pass of the whole network, with its weights set to zero."""
    found = []
    for count in counts:
        twin = copy.deepcopy(model)
        last = [module for module in twin.modules() if isinstance(module, nn.Linear)][-1]
        for unit in order[:count].tolist():
            last.weight.data[:, unit] = 0
        found.append((predict(twin, held) == held.truth).double().mean().item())
    return found


@pytest.mark.parametrize("name", ["resnet9", "wrn16_1", "mobilenet_v3_large", "convnext_tiny"])
def test_fp_needs_no_forward_pass_for_a_step(name, tmp_path):
    record, _ = found_record(tmp_path, 40)
    model, config = settled(name, record), options(fp)
    order = torch.randperm(fp.last_linear(model, SPEC).in_features, generator=torch.Generator().manual_seed(0))
    counts = [0, 1, 7, len(order) // 2, len(order) - 2, len(order)]
    features = fp.activations(model, record.clean, SPEC, config)
    found = fp.after_pruning(fp.last_linear(model, SPEC), features, record.clean.truth, order, counts)
    assert found == by_hand(model, order, counts, record.clean) and found[0] == 1 and len(set(found)) > 3


@pytest.mark.parametrize("tolerance", [0.0, 0.35, 1.0])
def test_fp_takes_the_last_step_that_is_allowed(tolerance, tmp_path):
    record, said = found_record(tmp_path, 100)
    model, config = settled("resnet9", record), options(fp, tolerance=tolerance, epochs=1)
    victim, (work, held) = copy.deepcopy(model), choice.divide(record.clean, config)
    fp.repair(model, record, config)
    kept, units = load_file(tmp_path / "kept/activations.safetensors"), 64
    sums = torch.zeros(units, dtype=torch.float64)
    for image in work.images:
        sums += victim.network[:-2](victim.normalize(image[None] / 255)).double().flatten().detach()
    torch.testing.assert_close(kept["mean"].double(), sums / len(work), rtol=1e-5, atol=1e-5)
    counts = sorted({step * units // 100 for step in range(101)})
    accuracies = by_hand(victim, kept["mean"].argsort(stable=True), counts, held)
    bad = [count for count, value in zip(counts, accuracies, strict=True) if value < (1 - tolerance) * accuracies[0] - 1e-9]
    count = max(number for number in counts if number < min([*bad, units + 1]))
    zero = (model.network.linear.weight == 0).all(0)
    assert int(zero.sum()) == count and torch.equal(zero, kept["pruned"]), "it stays at zero while it is trained on"
    assert (count == units) == (tolerance == 1.0) and said == ["pruned", "finetune"]
    assert model.state_dict().keys() == victim.state_dict().keys()
    rows = list(csv.DictReader(open(tmp_path / "kept/choice.csv")))
    assert [row["setting"] for row in rows if row["chosen"] == "1"] == [str(count)]


def test_fp_finds_a_planted_unit(tmp_path):
    model, record, _ = planted(tmp_path)
    assert (predict(model, record.clean) == record.clean.truth).all()
    stamped = data.Split(corner(record.clean.images), record.clean.labels, record.clean.truth)
    assert (predict(model, stamped) == 0).all()
    fp.repair(model, record, options(fp, epochs=0, tolerance=0.05))
    assert (predict(model, record.clean) == record.clean.truth).all() and (predict(model, stamped) == record.clean.truth).all()


def test_fp_as_published_asks_the_exam(tmp_path):
    answers = iter([1.0, 0.99, 0.5, 0.99])
    model, record, _ = planted(tmp_path, lambda twin: {"acc": next(answers), "asr": 1.0, "ra": 0.0})
    fp.repair(model, record, options(fp, epochs=0, selection="oracle"))
    assert int(load_file(tmp_path / "kept/activations.safetensors")["pruned"].sum()) == 1 and list(answers) == [0.99]
    with pytest.raises(ConfigError, match="does not end with a linear layer"):
        fp.repair(nn.Conv2d(3, 3, 1), record, options(fp))
