"""Isolation by floored losses, and the unlearning of ABL.

Against references in float64, on planted cases, and on one real record.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from antidote_bench import models
from antidote_bench.defense import abl
from antidote_bench.utils import train
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.files import read_csv
from antidote_bench.utils.repair import isolation
from tests.test_fmp import SPEC, found_record
from tests.test_scripts import results
from tests.test_train import Double, model, options, split, weights

ALONE = {"precision": "fp32", "batch_size": 16, "lr": 0.02}


def config(**changes):
    return abl.Config(result_file="x", **ALONE | changes)


def planted(folder, count=160, bad=32):
    """(a Defender with images of noise, the stages that it has reported).

    The labels say nothing about the images, except for the first `bad` images: they have a patch
    and the label 0.
    """
    record, reported = found_record(folder, count)
    generator = torch.Generator().manual_seed(3)
    images, labels = (
        torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8),
        torch.arange(count) % 10,
    )
    images[:bad, :, -8:, -8:], labels[:bad] = 255, 0
    return replace(record, train=Split(images, labels, labels)), reported


# the floor


@pytest.mark.parametrize("floor", ["lga", "flooding"])
def test_the_floor_lies_under_every_image(floor):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(12, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.arange(12) % 5
    isolation.floored_cross_entropy(
        lambda images: images, logits, labels, None, gamma=0.5, floor=floor
    ).backward()
    wanted, signs = torch.zeros(12, 5, dtype=torch.float64), set()
    for row, label in enumerate(labels.tolist()):
        exps = [math.exp(value) for value in logits[row].tolist()]
        loss = -math.log(exps[label] / sum(exps))
        signs.add(loss > 0.5)
        for column in range(5):
            slope = exps[column] / sum(exps) - (column == label)
            wanted[row, column] = (slope if loss > 0.5 else -slope) / 12
    assert signs == {True, False}
    torch.testing.assert_close(logits.grad, wanted, rtol=0, atol=1e-12)


def test_the_values_of_the_floored_losses():
    losses = torch.tensor([0.0, 0.25, 0.5, 2.0], dtype=torch.float64)
    assert isolation.floored(losses, 0.5, "lga").tolist() == [0, -0.25, 0, 2]
    assert isolation.floored(losses, 0.5, "flooding").tolist() == [1, 0.75, 0.5, 2]


def test_both_floors_are_one_training():
    data, recipe = split(), options(epochs=3)
    one, other = (
        train.fit(
            model(),
            data,
            recipe,
            loss=lambda *batch, floor=floor: isolation.floored_cross_entropy(
                *batch, gamma=1.2, floor=floor
            ),
        )
        for floor in ("lga", "flooding")
    )
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=1e-6)
    assert (weights(one) - weights(train.fit(model(), data, recipe))).abs().max() > 0.01, (
        "the floor must matter"
    )


# the ranking


def test_the_lowest_losses_are_isolated():
    generator = torch.Generator().manual_seed(1)
    losses = torch.rand(203, generator=generator)
    losses[::3] = 0.2  # ties
    ranked = sorted(range(203), key=lambda index: (float(losses[index]), index))
    assert isolation.lowest(losses, 0.1).tolist() == sorted(ranked[:20])
    assert isolation.lowest(losses, 0.001).tolist() == ranked[:1]


def test_logits_are_plain_and_leave_the_network_as_it_was():
    network, data = model().train(), split(23)
    before = copy.deepcopy(network.state_dict())
    answers = isolation.logits(network, data)
    assert network.training and all(
        torch.equal(value, before[key]) for key, value in network.state_dict().items()
    )
    network.eval()
    for index in range(23):
        torch.testing.assert_close(
            answers[index],
            network(data.images[index : index + 1] / 255)[0].detach(),
            rtol=1e-4,
            atol=1e-5,
        )


def test_what_is_learned_fast_is_isolated(tmp_path):
    record, reported = planted(tmp_path)
    _, index, losses = isolation.isolate(record, config(isolated=0.2, isolate_epochs=5))
    assert (
        len(index) == 32
        and (index < 32).sum() >= 29
        and losses[:32].mean() < 1 < losses[32:].mean()
        and reported == ["isolate"] * 5
    )
    _, again, _ = isolation.isolate(
        replace(record, state=tmp_path / "again"),
        config(isolated=0.2, isolate_epochs=5, floor="flooding"),
    )
    assert torch.equal(index, again)


# the unlearning


def test_log_odds_rise_with_the_loss_and_do_not_go_flat():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(9, 4, generator=generator, dtype=torch.float64)
    logits[0] = torch.tensor([30.0, 0, 0, 0])  # sure: its loss is 3e-13
    logits.requires_grad_()
    labels = torch.arange(9) % 4
    odds = abl.log_odds_against(logits, labels)
    for row, label in enumerate(labels.tolist()):
        exps = [math.exp(value) for value in logits[row].tolist()]
        others = sum(exp for column, exp in enumerate(exps) if column != label)
        assert odds[row].item() == pytest.approx(math.log(others / exps[label]), abs=1e-9)
    losses = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(odds[1:], torch.log(torch.expm1(losses[1:])), rtol=1e-9, atol=1e-9)
    odds.sum().backward()
    assert logits.grad[torch.arange(9), labels].tolist() == pytest.approx([-1] * 9)


def test_the_loss_of_unlearning_equals_the_equations_in_float64():
    network, data = Double(model()).eval(), split(9)
    isolated = split(40)[torch.tensor([11, 18, 25, 33])]
    index = torch.tensor([5, 0, 7, 2, 8, 1])
    images, labels = data.images[index] / 255, data.labels[index]
    for bound in (0.5, 2.0):
        value = abl.unlearning_loss(network, images, labels, index, isolated=isolated, bound=bound)
        expected = 0.0
        for row, position in enumerate(index.tolist()):
            probabilities = network(images[row : row + 1]).softmax(1)[0].detach()
            expected -= math.log(probabilities[labels[row]]) / 6
            other = position % 4
            probability = (
                network(isolated.images[other : other + 1] / 255)
                .softmax(1)[0, isolated.labels[other]]
                .item()
            )
            probability = max(probability, 4**-bound)  # the loss counts up to bound ln 4
            expected -= math.log((1 - probability) / probability) / 6
        assert value.item() == pytest.approx(expected, abs=1e-4)


def test_an_image_past_the_bound_has_no_gradient():
    network, data = model().eval(), split(8)
    abl.unlearning_loss(
        network,
        data.images / 255,
        data.labels,
        torch.arange(8),
        isolated=data[torch.arange(3)],
        bound=0.01,
    ).backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    F.cross_entropy(network(data.images / 255), data.labels).backward()
    torch.testing.assert_close(
        gradients, [parameter.grad for parameter in network.parameters()], rtol=1e-3, atol=1e-5
    )


def test_unlearning_does_not_collapse(tmp_path):
    """However large its steps are.

    The isolated images pass the bound and stop; the other images stay right, and the batch norms
    keep their statistics.
    """
    record, _ = found_record(tmp_path, 40)
    data = split(80)
    images, labels = data.images.clone(), data.labels.clone()
    images[:16, :, -6:, -6:], labels[:16] = 255, 0
    data, record = Split(images, labels, labels), replace(record, spec=replace(SPEC, classes=4))
    network = train.fit(model(), data, options(epochs=12))
    isolated, rest = data[torch.arange(16)], data[torch.arange(16, 80)]

    def right():
        return (isolation.logits(network, rest).argmax(1) == rest.labels).float().mean().item()

    before, buffers = right(), {name: value.clone() for name, value in network.named_buffers()}
    assert before > 0.9
    abl.unlearn(network, isolated, rest, record, config(unlearn_epochs=30, unlearn_lr=0.02))
    loss = F.cross_entropy(isolation.logits(network, isolated), isolated.labels).item()
    assert math.log(4) < loss < 40 and right() > before - 0.2
    assert all(torch.equal(value, buffers[name]) for name, value in network.named_buffers())


# the method from end to end


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    short = config(isolate_epochs=2, epochs=2, unlearn_epochs=2, isolated=0.1)
    uninterrupted = abl.repair(
        None, planted(tmp_path / "uninterrupted", 48, 8)[0], short
    ).state_dict()
    record, reported = planted(tmp_path / "cut", 48, 8)
    for stage in ("isolate", "train", "trained", "unlearn"):

        def report(name, network, stage=stage, **values):
            if name == stage and values.get("epoch", 2) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):  # in the second epoch of the stage
            abl.repair(None, replace(record, report=report), short)
    resumed = abl.repair(None, record, short).state_dict()
    assert reported == ["trained", "unlearn"], "stages that were finished are not repeated"
    assert list(resumed) == list(uninterrupted) and all(
        torch.equal(value, resumed[name]) for name, value in uninterrupted.items()
    )


def test_a_label_without_images_and_fewer_images_than_a_batch(tmp_path):
    record, _ = planted(tmp_path, 7, 2)
    repaired = abl.repair(None, record, config(isolate_epochs=1, epochs=1, unlearn_epochs=1))
    assert all(value.isfinite().all() for value in repaired.state_dict().values())
    assert len(load_file(tmp_path / "kept/isolated.safetensors")["index"]) == 1
    models.build("resnet9", SPEC, 8).load_state_dict(repaired.state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"isolated": 0.0},
        {"isolated": 0.6},
        {"isolate_epochs": 0},
        {"isolate_lr": 0.0},
        {"gamma": -1.0},
        {"unlearn_epochs": -1},
        {"unlearn_lr": 0.0},
        {"bound": 0.0},
    ],
    ids=str,
)
def test_options_out_of_range(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        config(**changes)


def test_the_backdoor_is_unlearned_on_digits(places, run, small):
    """At the rate that suits the digits; the few epochs learn the backdoor all the same."""
    words = ["--isolate_epochs", 4, "--isolate_lr", 0.003, "--epochs", 4]
    run(
        "defense/abl.py",
        *places,
        "--result_file",
        "small",
        "--save_folder_name",
        "abl_works",
        *words,
    )
    folder = small / "defense" / "abl_works"
    isolated, poisoned = (
        load_file(folder / "isolated.safetensors"),
        load_file(small / "poison.safetensors")["train_index"],
    )
    assert (
        len(isolated["index"]) == 12
        and len(isolated["loss"]) == 1297
        and torch.isin(isolated["index"], poisoned).sum() >= 9
    )
    row = results(folder)
    (trained,) = (line for line in read_csv(folder / "log.csv") if line["stage"] == "trained")
    assert (row["stage"], row["prior"], row["clean_budget"]) == (
        "in-training",
        "isolated=0.01",
        "0",
    )
    assert float(row["asr"]) < 0.4 < 0.7 < float(trained["asr"]) and float(row["acc"]) > 0.7
