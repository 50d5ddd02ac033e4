"""Mode Connectivity Repair: its curve against equations, the chosen position, a real record."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from antidote_bench import models
from antidote_bench.defense import mcr
from antidote_bench.utils import files, seeds, train
from antidote_bench.utils.data import loader
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.repair import selection
from tests.test_fmp import SPEC, found_record
from tests.test_scripts import results
from tests.test_train import Double, model, split, weights
from tests.test_train import options as recipe


def options(**changes):
    return mcr.Config(result_file="x", **{"precision": "fp32", "batch_size": 16, **changes})


def ends():
    """Two networks of the same form with other weights, in float64."""
    first = Double(model())
    torch.manual_seed(5)
    second = copy.deepcopy(first)
    for parameter in second.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return first, second


def by_hand(first, bend, second, s):
    """The network at s, parameter by parameter; `bend` is a network too."""
    point = copy.deepcopy(first)
    parts = (network.parameters() for network in (point, first, bend, second))
    for parameter, one, middle, other in zip(*parts, strict=True):
        parameter.data = (
            one.data * (1 - s) * (1 - s) + middle.data * 2 * s * (1 - s) + other.data * s * s
        )
    return point


def as_network(like, row):
    """A network of the form of `like` with the weights in `row`."""
    network, begin = copy.deepcopy(like), 0
    for parameter in network.parameters():
        part = row[begin : begin + parameter.numel()]
        parameter.data = part.detach().reshape(parameter.shape).clone()
        begin += parameter.numel()
    assert begin == len(row)
    return network


def test_the_curve_joins_its_ends():
    first, second = ends()
    first.to(memory_format=torch.channels_last)  # the order of the weights does not depend on it
    curve = mcr.Curve(first, second)
    for s, network in ((0, first), (1, second)):
        weights = curve.weights(s)
        for name, parameter in network.named_parameters():
            assert torch.equal(weights[name], parameter)
    midway = curve.weights(0.5)
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(
            midway[name], (one + other).detach() / 2, msg="the bend begins midway: a straight line"
        )
    assert [name for name, _ in curve.named_parameters()] == ["bend"]
    assert list(curve.state_dict()) == ["bend"]


@pytest.mark.parametrize("s", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_outputs_and_the_gradient_of_the_bend_equal_the_equations(s):
    first, second = ends()
    curve, data = mcr.Curve(first, second).train(), split(12)
    with torch.no_grad():
        curve.bend += 0.05 * torch.randn(
            len(curve.bend), generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
    network = by_hand(first, as_network(first, curve.bend), second, s).train()
    images = data.images.float() / 255
    logits, wanted = curve(images, torch.tensor(s, dtype=torch.float64)), network(images)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-10)
    F.cross_entropy(logits, data.labels).backward()
    F.cross_entropy(wanted, data.labels).backward()
    slope = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    torch.testing.assert_close(curve.bend.grad, 2 * s * (1 - s) * slope, rtol=0, atol=1e-10)
    assert slope.abs().max() > 1e-3


def test_training_the_curve_equals_a_loop_in_float64():
    first, second = ends()
    data, config = split(), recipe(epochs=2)
    loss = mcr.cross_entropy_at_random
    curve = train.fit(mcr.Curve(first, second), data, config, loss=loss)
    bend, velocity = by_hand(first, first, second, 0), {}
    parts = (network.parameters() for network in (bend, first, second))
    for parameter, one, other in zip(*parts, strict=True):
        parameter.data = (one.data + other.data) / 2
    for epoch in range(2):
        angle = torch.tensor(torch.pi * epoch / 2, dtype=torch.float64)
        rate = config.lr / 2 * (1 + torch.cos(angle))
        torch.manual_seed(seeds.number("dropout", 0, epoch))
        order = torch.randperm(len(data), generator=seeds.generator("epoch", 0, epoch))
        for index in order.split(config.batch_size):
            s = torch.rand(()).double()
            network = by_hand(first, bend, second, s).train()
            logits = network(data.images[index].float() / 255)
            F.cross_entropy(logits, data.labels[index]).backward()
            for name, parameter in bend.named_parameters():
                slope = 2 * s * (1 - s) * network.get_parameter(name).grad
                slope = slope + config.weight_decay * parameter.data
                velocity[name] = config.momentum * velocity.get(name, 0) + slope
                parameter.data -= rate * velocity[name]
    wanted = torch.cat([parameter.detach().flatten() for parameter in bend.parameters()])
    torch.testing.assert_close(curve.bend.detach(), wanted, rtol=0, atol=1e-6)
    assert (curve.bend.detach() - (curve.start + curve.end) / 2).abs().max() > 1e-3
    assert torch.equal(curve.start, mcr.flat_weights(first))
    assert torch.equal(curve.end, mcr.flat_weights(second))


def test_statistics_are_the_averages_of_the_batches(monkeypatch):
    monkeypatch.setattr(loader, "EVALUATION_BATCH", 16)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.Dropout(0.5),
        nn.Conv2d(5, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
    ).train()
    network[2].eval()
    network[1].running_mean += 7
    data = split(40)
    modes = [module.training for module in network.modules()]
    before = copy.deepcopy(network)
    assert mcr.estimate_norms(network, data, "fp32") is network
    assert [module.training for module in network.modules()] == modes
    assert (network[1].momentum, network[4].momentum) == (0.1, 0.3)
    for pair in zip(network.parameters(), before.parameters(), strict=True):
        assert torch.equal(*pair)
    sums = [[0, 0], [0, 0]]
    layers = ((before[0], before[1]), (before[3], before[4]))
    with torch.no_grad():
        for part in (data.images / 255).double().split((16, 16, 8)):
            x = part
            for (convolution, norm), of_layer in zip(layers, sums, strict=True):
                x = F.conv2d(x, convolution.weight.double(), convolution.bias.double())
                mean = x.mean((0, 2, 3))
                of_layer[0] = of_layer[0] + len(part) * mean
                of_layer[1] = of_layer[1] + len(part) * x.var((0, 2, 3), correction=1)
                biased = x.var((0, 2, 3), correction=0)[:, None, None]
                x = (x - mean[:, None, None]) / (biased + norm.eps).sqrt()
    for norm, (mean, variance) in zip((network[1], network[4]), sums, strict=True):
        torch.testing.assert_close(norm.running_mean.double(), mean / 40, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), variance / 40, rtol=1e-4, atol=1e-5)


def test_a_network_without_batch_norm_has_no_statistics():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    data = Split(torch.zeros(5, 3, 2, 2, dtype=torch.uint8), torch.arange(5), torch.arange(5))
    assert mcr.estimate_norms(network, data, "fp32") is network and network.training


def test_positions_go_from_the_ends_inwards():
    distances = [round(min(s, 1 - s), 9) for s in mcr.POSITIONS]
    assert distances == sorted(distances)
    assert sorted(mcr.POSITIONS) == [step / 10 for step in range(1, 10)]
    pairs = zip(mcr.POSITIONS[:8:2], mcr.POSITIONS[1:8:2], strict=True)
    assert all(one < other for one, other in pairs), "nearer the copy is stronger"


@pytest.mark.parametrize(
    ("allowed", "chosen"),
    [
        ([True], ["0.5"]),
        ([False, True], ["0.6"]),
        ([False, False, True], ["0.4"]),
        ([False] * 9, []),
    ],
)
def test_the_choice_goes_from_the_middle_outwards(allowed, chosen, tmp_path, monkeypatch):
    record, stages = found_record(tmp_path, 100)
    torch.manual_seed(0)
    victim = models.build("resnet9", SPEC, 8).eval()
    before = copy.deepcopy(victim.state_dict())
    accuracies = iter([1.0, *(0.95 if fine else 0.5 for fine in allowed)])
    monkeypatch.setattr(selection, "accuracy", lambda *_: next(accuracies))
    repaired = mcr.repair(victim, record, options(epochs=1, curve_epochs=1))
    assert repaired is victim and not repaired.training
    assert stages == ["finetune", "finetuned", "curve", "connected"]
    rows = files.read_csv(tmp_path / "kept" / "choice.csv")
    settings = ["none", *map(str, reversed(mcr.POSITIONS))]
    assert [row["setting"] for row in rows] == settings[: len(allowed) + 1]
    assert [row["setting"] for row in rows if row["chosen"] == "1"] == chosen
    same = all(torch.equal(value, before[name]) for name, value in repaired.state_dict().items())
    assert same == (not chosen), "without a position the victim comes back, its statistics too"


def test_a_fixed_position_is_that_point_of_the_curve(tmp_path, monkeypatch):
    record, _ = found_record(tmp_path, 40)
    torch.manual_seed(0)
    victim = models.build("resnet9", SPEC, 8).train()
    config, made = options(selection="fixed", position=0.3, epochs=2, curve_epochs=2), []
    Curve = mcr.Curve
    monkeypatch.setattr(mcr, "Curve", lambda *ends: made.append(Curve(*ends)) or made[0])
    start = mcr.flat_weights(victim)
    repaired = mcr.repair(victim, record, config)
    (curve,) = made
    assert torch.equal(curve.start, start) and not torch.equal(curve.end, start)
    assert not torch.equal(curve.bend, (start + curve.end) / 2)
    wanted = 0.49 * start + 0.42 * curve.bend.detach() + 0.09 * curve.end
    torch.testing.assert_close(mcr.flat_weights(repaired), wanted)
    before = copy.deepcopy(list(repaired.buffers()))
    again = mcr.estimate_norms(repaired, record.clean, "fp32").buffers()
    for one, other in zip(again, before, strict=True):
        if one.is_floating_point():
            assert torch.equal(one, other), "the statistics are those of the clean images"
    assert repaired.training
    assert all(parameter.requires_grad for parameter in repaired.parameters())
    assert not (tmp_path / "kept" / "choice.csv").exists()


@pytest.mark.parametrize("stop", ["finetune", "curve"])
def test_an_interrupted_run_ends_with_the_same_weights(stop, tmp_path):
    record, _ = found_record(tmp_path, 40)
    config = options(selection="fixed", epochs=3, curve_epochs=3)

    def victim():
        torch.manual_seed(0)
        return models.build("resnet9", SPEC, 8)

    def report(stage, model, *, epoch=None, **_):
        if stage == stop and epoch == 2:
            raise KeyboardInterrupt

    elsewhere = dataclasses.replace(record, state=tmp_path / "uninterrupted")
    uninterrupted = mcr.repair(victim(), elsewhere, config)
    with pytest.raises(KeyboardInterrupt):
        mcr.repair(victim(), dataclasses.replace(record, report=report), config)
    resumed = mcr.repair(victim(), record, config)
    assert torch.equal(weights(resumed), weights(uninterrupted))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("position", 1.1, "position must be from 0 to 1"),
        ("curve_epochs", -1, "curve_epochs must be 0 or more"),
        ("curve_lr", 0.0, "curve_lr must be above 0"),
        ("lr_min", 0.02, "curve_lr must be no less than lr_min"),
    ],
)
def test_options_out_of_range(option, value, message):
    with pytest.raises(ConfigError, match=message):
        options(**{option: value, "lr": 0.05})


def test_the_evaluator_sees_the_middle_of_the_curve(tmp_path):
    """As it is after some epochs, with batch norm statistics of its own."""
    record, _ = found_record(tmp_path, 40)
    seen = []

    def report(stage, model, **_):
        if stage == "curve":
            seen.append(weights(model))

    torch.manual_seed(0)
    config = options(selection="fixed", epochs=1, curve_epochs=2)
    mcr.repair(models.build("resnet9", SPEC, 8), dataclasses.replace(record, report=report), config)
    assert len(seen) == 2 and not torch.equal(*seen)


def test_on_the_digits_the_accuracy_stays(places, run, victim):
    """The ASR stays too: docs/defenses/mcr.md says so.

    With selection oracle the position of lowest ASR on the test set is taken, and marked.
    """
    short = ["--epochs", 10, "--curve_epochs", 5, "--selection", "oracle"]
    run("defense/mcr.py", *places, "--result_file", "victim", "--precision", "fp32", *short)
    folder = victim / "defense" / "mcr"
    row, rows = results(folder), files.read_csv(folder / "choice.csv")
    assert float(row["acc"]) > float(row["acc_before"]) - 0.1
    assert row["selection"] == "oracle" and len(rows) == 10
    best = min(rows[1:], key=lambda tried: float(tried["asr"]))
    assert [tried["setting"] for tried in rows if tried["chosen"] == "1"] == [best["setting"]]
    assert float(row["asr"]) == pytest.approx(float(best["asr"]))
