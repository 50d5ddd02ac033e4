"""ASD: its three rules on given losses, its clean images, its copy, resuming, and a real record."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from antidote_bench import models
from antidote_bench.defense import asd
from antidote_bench.utils import train
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.memmap import MemmapImages
from antidote_bench.utils.errors import ConfigError
from tests.test_abl import planted
from tests.test_dbd import network
from tests.test_fmp import SPEC
from tests.test_scripts import results
from tests.test_train import model, split
from tests.test_train import options as recipe

LABELS = torch.tensor([0, 0, 0, 1, 1, 1])
LOSSES = [0.5, 0.1, 0.3, 0.9, 0.2, 0.7]
AFTER = [0.1, 0.1, 0.0, 0.9, 0.1, 0.1]  # the losses of the copy: they have fallen by ...
FALLEN = [0.4, 0.0, 0.3, 0.0, 0.1, 0.6]


def config(**changes):
    short = {"class_epochs": 2, "overall_epochs": 1, "virtual_epochs": 1, "steps": 2}
    return asd.Config(
        **{"result_file": "x", "precision": "fp32", "batch_size": 8, **short, **changes}
    )


def pool(epoch, monkeypatch, record=None, **changes):
    """(the positions that are believed in an epoch, the others, the scores) of six images."""
    losses = {"network": torch.tensor(LOSSES), "copy": torch.tensor(AFTER)}
    monkeypatch.setattr(asd, "losses_of", lambda network, *_: losses[network])
    monkeypatch.setattr(asd, "virtual_copy", lambda *_: "copy")
    is_seed = torch.tensor([True, False, False, True, False, False])
    known, unknown, scores = asd.choose_pool(
        "network",
        epoch,
        split=Split(None, LABELS, LABELS),
        is_seed=is_seed,
        record=record,
        config=config(**changes),
    )
    assert sorted([*known.tolist(), *unknown.tolist()]) == list(range(6))
    return set(known.tolist()), scores


def lowest(values, count):
    return set(sorted(range(len(values)), key=lambda position: values[position])[:count])


@pytest.mark.parametrize(("epoch", "count"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_first_the_clean_images_and_the_lowest_losses_of_every_class(epoch, count, monkeypatch):
    known, scores = pool(epoch, monkeypatch, class_epochs=6, grow_every=2, grow_by=1)
    wanted = {0, 3}
    for label in (0, 1):
        others = [k for k in range(6) if LABELS[k] == label and k not in (0, 3)]
        wanted |= set(sorted(others, key=lambda k: LOSSES[k])[:count])
    if count == 2:
        wanted -= {5}  # the highest loss beside the clean images: no pool has all
    assert known == wanted and scores.tolist() == pytest.approx(LOSSES)


@pytest.mark.parametrize(("share", "count"), [(0.5, 3), (0.34, 2)])
def test_then_the_lowest_losses_of_all(share, count, monkeypatch):
    known, scores = pool(2, monkeypatch, labelled=share)
    assert known == lowest(LOSSES, count) and scores.tolist() == pytest.approx(LOSSES)


@pytest.mark.parametrize("epoch", [3, 4])
def test_at_last_those_whose_loss_falls_least(epoch, monkeypatch):
    known, scores = pool(epoch, monkeypatch)
    assert scores.tolist() == pytest.approx(FALLEN) and known == lowest(FALLEN, 3) == {1, 3, 4}
    assert pool(epoch, monkeypatch, virtual_epochs=0)[0] == lowest(LOSSES, 3) == {1, 2, 4}


def test_the_mixture_does_not_depend_on_the_copy(monkeypatch):
    draws = []
    for seed in (0, 0, 1):
        torch.rand(7)
        pool(3, monkeypatch, random_seed=seed)
        draws.append(torch.rand(3))
    pool(4, monkeypatch)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], torch.rand(3)), "every epoch has its own"


@pytest.mark.parametrize("stored", ["memory", "file"])
def test_the_clean_images_are_in_the_training_set(stored, tmp_path, capsys):
    """They replace what is at their places, or come last; only the asked ones do."""
    record, _ = planted(tmp_path, 12, 4)
    train = record.train
    if stored == "file":
        train = Split(MemmapImages(train.images, "cpu"), train.labels, train.truth)
    labels = torch.tensor([3, 2, 3, 3, 5])
    clean = Split(record.train.images[:5] // 2, labels, labels)
    record = replace(record, train=train, clean=clean, clean_index=torch.tensor([1, 4, 6, 7, 9]))
    split, is_seed = asd.with_seeds(record, config(seeds=2))
    assert is_seed.nonzero().flatten().tolist() == [1, 4, 6, 9], "the fourth is one too many"
    images, labels = train.images[torch.arange(12)], train.labels.clone()
    images[[1, 4, 6, 9]], labels[[1, 4, 6, 9]] = (
        clean.images[[0, 1, 2, 4]],
        clean.labels[[0, 1, 2, 4]],
    )
    assert torch.equal(split.images[torch.arange(12)], images) and torch.equal(split.labels, labels)
    assert "16 clean images fewer than asked" in capsys.readouterr().err
    other = replace(record, clean_index=torch.tensor([], dtype=torch.long))
    split, is_seed = asd.with_seeds(other, config(seeds=2))
    assert is_seed.nonzero().flatten().tolist() == [12, 13, 14, 15]
    wanted = torch.cat([train.images[torch.arange(12)], clean.images[[0, 1, 2, 4]]])
    assert torch.equal(split.images[torch.arange(16)], wanted)
    assert split.labels.tolist() == [*train.labels.tolist(), 3, 2, 3, 5]


def test_the_deeper_half_of_a_residual_network_is_the_published_one():
    """It is layer3, layer4 and the last layer; a batch norm before the first convolution stays."""
    model = models.build("preactresnet18", SPEC, 4)
    asd.freeze_first_half(model)
    stay = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    trained = {name for name, _ in model.named_parameters()} - set(stay)
    assert {name.split(".")[1] for name in trained} == {"layer3", "layer4", "linear"}
    late = [name for name in stay if name.split(".")[1] in ("layer3", "layer4", "linear")]
    assert late == ["network.layer3.0.bn1.weight", "network.layer3.0.bn1.bias"]


def test_a_copy_is_trained_and_the_network_stays(tmp_path):
    record, _ = planted(tmp_path, 40, 8)
    model, options = network().train(), config(virtual_batch_size=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copies = [asd.virtual_copy(model, record.train, epoch, record, options) for epoch in (3, 3, 4)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())
    changed = {
        name.split(".")[1]
        for name, weight in copies[0].named_parameters()
        if not torch.equal(weight, before[name])
    }
    assert changed == {"layer2", "layer3", "linear"}
    one, same, other = (dict(each.named_parameters())["network.linear.weight"] for each in copies)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    short = config(virtual_batch_size=16, seeds=1)
    record, stages = planted(tmp_path / "whole", 40, 8)
    wanted = asd.repair(None, record, short).state_dict()
    assert stages == 4 * ["mixmatch"]
    kept = load_file(tmp_path / "whole/kept/pool.safetensors")
    assert kept["believed"].sum() == 20 and kept["score"].shape == (40,)
    assert kept["score"][kept["believed"]].max() <= kept["score"][~kept["believed"]].min()
    record, _ = planted(tmp_path / "killed", 40, 8)

    def report(name, network, **values):
        if values["epoch"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asd.repair(None, replace(record, report=report), short)
    resumed = asd.repair(None, record, short).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seeds", 0),
        ("class_epochs", 0),
        ("grow_every", 0),
        ("grow_by", -1),
        ("virtual_lr", 0.0),
        ("virtual_batch_size", 0),
    ],
)
def test_options_out_of_range(option, value):
    with pytest.raises(ConfigError, match=f"{option} must be "):
        config(**{option: value})


def test_a_dry_run_tells_the_published_cost():
    published = asd.Config(result_file="x")
    assert "122880 steps, 23.6 million in all" in published.effort(100, 10)
    assert published.prior == "labelled=0.5"


def test_the_copy_tells_poison_from_what_the_network_knows(tmp_path):
    """A network that has learned the four colours of clean images; poison has a patch and the label
    0, and its loss falls most while a copy is trained."""
    clean, options = split(160), config(virtual_batch_size=4)
    plain = train.fit(model(), clean, recipe(epochs=12))
    images, labels = clean.images.clone(), clean.labels.clone()
    poisoned = torch.arange(1, 160, 8)  # of the class 1
    images[poisoned, :, -8:, -8:], labels[poisoned] = 255, 0
    record, _ = planted(tmp_path, 8, 2)
    known, _, scores = asd.choose_pool(
        plain,
        3,
        split=Split(images, labels, labels),
        is_seed=torch.zeros(160, dtype=torch.bool),
        record=record,
        config=options,
    )
    others = torch.ones(160, dtype=torch.bool)
    others[poisoned] = False
    assert scores[poisoned].min() > scores[others].max()
    assert not torch.isin(poisoned, known).any()


def test_the_final_pool_has_hardly_any_poison_on_digits(places, run, small):
    phases = ["--class_epochs", 5, "--grow_every", 1, "--overall_epochs", 1, "--virtual_epochs", 0]
    words = [*phases, "--steps", 20, "--batch_size", 32, "--mixmatch_lr", 0.01]
    run(
        "defense/asd.py",
        *(*places, "--result_file", "small", "--save_folder_name", "asd_works"),
        *words,
    )
    folder = small / "defense" / "asd_works"
    row, believed = results(folder), load_file(folder / "pool.safetensors")["believed"]
    assert (row["stage"], row["prior"]) == ("in-training", "labelled=0.5")
    assert row["clean_budget"] == "64"
    poisoned = load_file(small / "poison.safetensors")["train_index"]
    assert believed.sum() == len(believed) // 2
    assert believed[poisoned].float().mean() <= 0.15  # measured: 0.05
    assert float(row["acc"]) > 0.5
