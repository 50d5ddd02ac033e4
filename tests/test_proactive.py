"""PDB: stamp, labels and answers in loops, what is trained on, resuming, and a real record."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from antidote_bench import models
from antidote_bench.defense import proactive
from antidote_bench.utils import evaluation, files
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.memmap import MemmapImages
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.record import contents
from tests.test_abl import planted
from tests.test_fmp import SPEC
from tests.test_scripts import results
from tests.test_train import Double, model


def config(**changes):
    return proactive.Config(
        result_file="x", **{"precision": "fp32", "batch_size": 16, "lr": 0.02} | changes
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_answers_are_moved_back(classes):
    """h^-1(h(y)) = y: the class that wins for the label of a stamped image is its own."""
    labels = torch.arange(classes)
    moved = proactive.mapped(labels, classes)
    assert moved.tolist() == [*range(1, classes), 0]
    answers = F.one_hot(moved, classes).double()
    assert torch.equal(proactive.MovedBack()(answers).argmax(1), labels)
    logits = torch.randn(4, classes, generator=generator()).double()
    wanted = [[row[(y + 1) % classes] for y in range(classes)] for row in logits.tolist()]
    assert proactive.MovedBack()(logits).tolist() == wanted


@pytest.mark.parametrize("colour", [2.0, 1.0])
def test_the_defended_network_in_loops(colour):
    plain = model().eval()
    defended = Double(proactive.stamping(plain, 7, colour)).eval()
    images = torch.rand(3, 3, 32, 32, generator=generator())
    stamped = images.clone()
    for row in range(7):
        for column in range(7):
            stamped[:, :, row, column] = colour
    before, answers = images.clone(), Double(plain).eval()(stamped).tolist()
    wanted = torch.tensor([[row[(y + 1) % len(row)] for y in range(len(row))] for row in answers])
    torch.testing.assert_close(defended(images), wanted.double(), rtol=0, atol=1e-6)
    assert torch.equal(images, before), "the argument does not change"


def test_the_rebuilt_network_and_no_plain_one_takes_the_weights():
    defended = proactive.stamping(models.build("resnet9", SPEC, 4), 5, 2.0).eval()
    weights, images = defended.state_dict(), torch.rand(4, 3, 32, 32)
    rebuilt = proactive.rebuild(models.build("resnet9", SPEC, 4), weights).eval()
    assert torch.equal(rebuilt(images), defended(images))
    with pytest.raises(RuntimeError, match="stamp.patch"):
        models.build("resnet9", SPEC, 4).load_state_dict(weights)


def test_the_stamped_images_are_darker_or_rotated_by_chance():
    """One pixel of every image says by how much: its value, and the place that it has moved to."""
    images = torch.zeros(4000, 3, 33, 33)
    images[..., 16, 31] = 1.0
    seen = proactive.varied(images, generator())[:, 0]
    values, places = seen.flatten(1).max(1)
    darker = values < 1
    assert 0.17 < darker.float().mean() < 0.23
    assert values.min() >= 0.5 and abs(float(values[darker].mean()) - 0.75) < 0.02
    rows, columns = places // 33 - 16, places % 33 - 16
    degrees = torch.atan2(-rows.double(), columns.double()).rad2deg()
    turned = degrees.abs() > 2.5  # a pixel at a distance of 15 shows no smaller angle
    assert 0.5 * 0.7 < turned.float().mean() < 0.5 * 0.87, "half of them, three quarters visibly"
    assert 7.5 < degrees.max() < 12.5 and -12.5 < degrees.min() < -7.5
    colours = proactive.varied(torch.full((9, 3, 8, 8), 2.0), generator())
    assert colours.max() == 2.0, "what is brighter than white stays so"


def test_only_the_clean_images_are_stamped():
    """The stamp comes before the crop, which moves it."""
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    stamp = proactive.stamping(model(), 7, 2.0).stamp
    calls = []

    def augment(images, generator, index, epoch):
        calls.append((index.tolist(), epoch))
        return images.roll(3, -1)

    index = torch.tensor([7, 0, 9, 4, 5, 8])
    seen = proactive.stamped_from(5, stamp, augment)(images, generator(), index=index, epoch=2)
    assert calls == [([7, 0, 9, 4, 5, 8], 2)]
    varied = proactive.varied(stamp(images / 255), generator())
    for row, position in enumerate(index.tolist()):
        wanted = varied[row] if position >= 5 else images[row] / 255
        assert torch.equal(seen[row], wanted.roll(3, -1))
        assert (seen[row].max() > 1) == (position >= 5)


@pytest.mark.parametrize("stored", ["memory", "file"])
def test_the_training_set_and_the_clean_images(stored, tmp_path):
    record, _ = planted(tmp_path, 12, 4)
    clean = Split(record.train.images[:3] + 1, torch.tensor([2, 9, 0]), torch.tensor([2, 9, 0]))
    train = record.train
    if stored == "file":
        images = MemmapImages(train.images, "cpu").replaced(torch.tensor([1]), train.images[:1])
        train = Split(images, train.labels, train.truth)
    split = proactive.with_stamped(replace(record, train=train, clean=clean), 2)
    images = train.images[torch.arange(12)]
    wanted = torch.cat([images, clean.images, clean.images])
    assert torch.equal(split.images[torch.arange(18)], wanted)
    assert split.labels.tolist() == [*train.labels.tolist(), 3, 0, 1, 3, 0, 1]


def test_images_in_a_file_and_others_behind_them():
    """They can be shuffled, replaced, read ahead and joined again."""
    base = torch.randint(0, 256, (5, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    more = torch.randint(0, 256, (2, 3, 8, 8), generator=generator(1), dtype=torch.uint8)
    once = MemmapImages(base, "cpu").view(torch.tensor([4, 0, 2])).joined(more)
    wanted = torch.cat([base[[4, 0, 2]], more])
    assert len(once) == 5 and torch.equal(once[torch.arange(5)], wanted)
    order = torch.tensor([3, 1, 4, 0])
    assert torch.equal(once.view(order)[:], wanted[order])
    assert torch.equal(torch.cat(list(once.ahead(order.split(3)))), wanted[order])
    twice = once.joined(more.flip(0), 2).replaced(torch.tensor([0, 3]), base[:2])
    wanted = torch.cat([wanted, more.flip(0), more.flip(0)])
    wanted[[0, 3]] = base[:2]
    assert torch.equal(twice[:], wanted)


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    short = config(epochs=2, repeats=2)
    record, stages = planted(tmp_path / "whole", 40, 8)
    wanted = proactive.repair(None, record, short).state_dict()
    assert stages == ["train", "train", "bare"]
    record, _ = planted(tmp_path / "killed", 40, 8)

    def report(name, network, **values):
        if values.get("epoch") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        proactive.repair(None, replace(record, report=report), short)
    resumed = proactive.repair(None, record, short).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in wanted.items())


@pytest.mark.parametrize("option", ["repeats", "stamp_size"])
def test_options_out_of_range(option):
    with pytest.raises(ConfigError, match=f"{option} must be 1 or more"):
        config(**{option: 0})


def test_a_stamp_is_smaller_than_the_images(tmp_path):
    record, _ = planted(tmp_path, 8, 2)
    proactive.check(None, record, config(stamp_size=31))
    with pytest.raises(ConfigError, match="smaller than the images, which have 32 pixels"):
        proactive.check(None, record, config(stamp_size=32))


def test_the_answers_to_the_trigger_are_moved_off_the_target_on_digits(places, run, small):
    """The bare network has the attack's backdoor still; the saved one is the one with the stamp.

    A triggered image is not taken for the target any more. But most are taken for the class before
    it, because the network obeys the trigger beside the stamp: measured, a RA of 0.14.
    """
    name = ["--result_file", "small", "--save_folder_name", "proactive_works"]
    run("defense/proactive.py", *places, *name, "--epochs", 7)
    folder = small / "defense" / "proactive_works"
    row, log = results(folder), files.read_csv(folder / "log.csv")
    assert (row["stage"], row["prior"], row["clean_budget"]) == ("in-training", "", "64")
    (bare,) = (line for line in log if line["stage"] == "bare")
    assert float(bare["asr"]) > 0.9 and float(bare["acc"]) > 0.9
    loaded = contents.load(small, config(cache_path=places[3]), torch.device("cpu"))
    weights = load_file(folder / "model.safetensors")
    rebuilt = proactive.rebuild(models.build("resnet9", loaded.spec, 8), weights)
    again = evaluation.evaluate(rebuilt, loaded.test_sets, row["precision"])
    assert again == {name: float(row[name]) for name in again}
    assert again["asr"] < 0.05 and again["acc"] > 0.8
