"""Measures of finished runs: what they are made of, a step by hand, planted cases, and the tables
that show them."""

import csv
import itertools
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import antidote_bench
import compare
import measure as script
from antidote_bench.utils import files, parsing
from antidote_bench.utils.checkpoint import to_bytes
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.evaluation import TestSets
from antidote_bench.utils.protocol import cut, measure, relearn, retrained
from antidote_bench.utils.protocol.options import Relearn
from antidote_bench.utils.record import contents
from antidote_bench.utils.record import measures as records
from antidote_bench.utils.report import runs
from antidote_bench.utils.train import fit
from tests.helpers import ROOT

CLASSES, COUNT = 5, 200
NONE = torch.zeros(0).long()


def loaded(kinds=None, labels=None, stamped=True):
    """A record of 200 images of 5 classes, of which the first 20 are poisoned and 10 are covers; a
    changed image has a first pixel of 255, and no other has."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(255, (COUNT, 3, 4, 4), generator=generator, dtype=torch.uint8)
    truth = torch.arange(COUNT) % CLASSES
    if kinds is None:
        kinds = torch.zeros(COUNT).long()
        kinds[:20], kinds[20:30] = contents.POISON, contents.COVER
    changed = images.clone()
    if stamped:
        changed[kinds > 0, :, 0, 0] = 255
    poison = kinds == contents.POISON
    told = torch.where(poison, torch.zeros_like(truth) if labels is None else labels, truth)
    clean = Split(images, truth, truth)
    others = truth != 0
    test = TestSets(clean, Split(255 - images[others], truth[others] * 0, truth[others]))
    return SimpleNamespace(
        train=Split(changed, told, told),
        clean=clean,
        kinds=kinds,
        test_sets=test,
        spec=SimpleNamespace(classes=CLASSES),
    )


def places(split, record):
    """The positions in the clean training set of the images of a split that are unchanged."""
    same = (split.images[:, None] == record.clean.images[None]).flatten(2).all(2)
    return same.nonzero()[:, 1]


# What a model is fine-tuned on


@pytest.mark.parametrize("dose", [0, 1, 5])
def test_a_lesson_is_balanced_clean_and_disjoint_from_what_others_hold(dose):
    record, held = loaded(), torch.arange(30, 60)
    lesson = relearn.lesson_of(record, held, dose, 0)
    split = lesson.split
    stamped = split.images[:, :, 0, 0].eq(255).all(1)
    assert len(split) == 10 * CLASSES and int(stamped.sum()) == dose
    assert split.labels[stamped].tolist() == [0] * dose
    clean = split[~stamped]
    index = places(clean, record)
    assert len(index) == len(index.unique()) == 50 - dose and int(index.min()) >= 60
    assert torch.equal(clean.labels, record.clean.truth[index])
    counts = clean.labels.bincount(minlength=CLASSES)
    assert counts.max() - counts.min() <= 1 and lesson.source == "training"
    assert lesson.test_sets is record.test_sets


def test_of_the_poisoned_images_those_with_a_changed_label_are_taken():
    lesson = relearn.lesson_of(loaded(), NONE, 16, 0)
    with pytest.raises(ConfigError, match="at most 16"):  # 4 of 20 are of the target class
        relearn.lesson_of(loaded(), NONE, 17, 0)
    assert lesson.split.labels[:16].tolist() == [0] * 16


def test_all_poisoned_images_of_an_attack_that_changes_no_label():
    truth = torch.arange(COUNT) % CLASSES
    kinds = ((truth == 3) & (torch.arange(COUNT) < 100)).long()
    lesson = relearn.lesson_of(loaded(kinds, truth), NONE, 5, 0)
    assert lesson.split.labels[:5].tolist() == [3] * 5 and lesson.source == "training"


def test_every_target_of_all_to_all_is_taught():
    truth = torch.arange(COUNT) % CLASSES
    lesson = relearn.lesson_of(loaded(None, (truth + 1) % CLASSES), NONE, 5, 0)
    assert sorted(lesson.split.labels[:5].tolist()) == list(range(CLASSES))


@pytest.mark.parametrize("poisoned", [False, True], ids=["no data", "labels only"])
def test_test_images_teach_what_no_training_image_shows(poisoned):
    """They are no longer in the test set then; flipped labels alone show no trigger."""
    kinds = None if poisoned else torch.zeros(COUNT).long()
    record = loaded(kinds, stamped=False)
    lesson = relearn.lesson_of(record, NONE, 5, 0)
    taught, left = lesson.split.images[:5], lesson.test_sets.backdoor
    there = record.test_sets.backdoor
    assert lesson.source == "test" and len(left) == len(there) - 5
    both = torch.cat([taught, left.images]).flatten(1).unique(dim=0)
    assert torch.equal(both, there.images.flatten(1).unique(dim=0))


def test_the_images_do_not_depend_on_the_model_and_little_on_what_a_defender_holds():
    record = loaded()
    one, same, other = (relearn.lesson_of(record, NONE, 5, seed).split for seed in (0, 0, 1))
    assert torch.equal(one.images, same.images) and not torch.equal(one.images, other.images)
    index = places(one[torch.arange(5, 50)], record)
    moved = places(relearn.lesson_of(record, index[:3], 5, 0).split[torch.arange(5, 50)], record)
    assert len(set(index.tolist()) & set(moved.tolist())) == 42  # all but those 3
    smaller = relearn.lesson_of(record, NONE, 1, 0).split
    assert torch.equal(smaller.images[5:], one.images[5:])


def test_the_clean_images_of_a_defense_are_those_that_it_had():
    """`held_clean` finds them again from the results of a defense and its options."""
    from antidote_bench.utils.config import Defense
    from antidote_bench.utils.data.clean import choose

    labels = torch.arange(300) % 10
    for options in ({"clean_count": 40}, {"clean_per_class": 3}, {"clean_ratio": 0.2}):
        config = Defense(result_file="x", data_seed=3, **options)
        index = choose(labels, config.budget(300, 10), config)
        row = {"clean_budget": str(len(index)), "data_seed": "3"}
        assert torch.equal(relearn.held_clean(row, options, labels), index)
    assert not len(relearn.held_clean(row, {"clean_from": "photos"}, labels))
    assert not len(relearn.held_clean({"clean_budget": "", "data_seed": "0"}, {}, labels))


# The training


@pytest.mark.parametrize(
    ("made", "count", "batch", "rate"),
    [
        ({"lr": 0.01, "batch_size": 128}, 1000, 128, 0.01),
        ({"lr": 0.1, "batch_size": 256}, 1000, 128, 0.05),
        ({"lr": 0.01, "batch_size": 128}, 2000, 128, 0.01),
        ({"lr": 0.05, "batch_size": 64}, 100, 13, 0.0102),
        ({}, 1000, 128, 0.01),
    ],
)
def test_the_rate_follows_the_victims_rate_per_image(made, count, batch, rate):
    recipe = relearn.recipe_of(SimpleNamespace(precision="fp32"), made, count, 0)
    assert (recipe.batch_size, recipe.lr, recipe.lr_min) == (batch, rate, rate)
    assert (recipe.epochs, recipe.momentum, recipe.weight_decay) == (5, 0.9, 0)


def test_training_against_gradients_by_hand():
    """Logistic regression on points of the plane, in float64: SGD with momentum, step by step."""
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    labels = (points[:, 0] > 0).long()
    model = nn.Linear(2, 2).double()
    weight, bias = (part.detach().numpy().copy() for part in (model.weight, model.bias))
    recipe = relearn.recipe_of(SimpleNamespace(precision="fp32"), {}, 60, 0)
    shown = []
    split = Split(points[:, :, None, None], labels, labels)

    def loss(model, images, labels, index):
        shown.append(index.numpy())
        return nn.functional.cross_entropy(model(images.flatten(1)), labels)

    fit(model, split, recipe, loss=loss)
    speed = [np.zeros((2, 2)), np.zeros(2)]
    for index in shown:
        x, y = points[index].numpy(), np.eye(2)[labels[index].numpy()]
        logits = np.exp(x @ weight.T + bias)
        error = (logits / logits.sum(1, keepdims=True) - y) / len(x)
        speed = [0.9 * v + g for v, g in zip(speed, (error.T @ x, error.sum(0)), strict=True)]
        weight, bias = weight - recipe.lr * speed[0], bias - recipe.lr * speed[1]
    assert len(shown) == 5 * 8 and recipe.batch_size == 8
    np.testing.assert_allclose(model.weight.detach(), weight, rtol=1e-10)
    np.testing.assert_allclose(model.bias.detach(), bias, rtol=1e-10)


def test_a_model_without_parameters_is_refused():
    model = nn.Flatten()
    with pytest.raises(ConfigError, match="no parameter"):
        relearn.relearn(model, loaded(), {}, NONE, None, None, None)


# Planted cases on the digits


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Two seeds instead of three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relearn, "REPEATS", 2)
        yield


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The folder of a victim, a repair of it that hides its backdoor, and a benign model, measured;
    what measure.py said."""
    base = tmp_path_factory.mktemp("measures")
    where = {"record_path": str(base / "record"), "cache_path": str(base / "cache")}
    small = {**where, "width": 8, "recipe": "fast", "epochs": 4}
    victim = antidote_bench.run_attack("badnet", save_folder_name="badnet", **small)
    antidote_bench.run_attack("clean", save_folder_name="clean", **small)
    antidote_bench.run_defense(victim, "fp", epochs=1)
    words = [f"--{name}={value}" for name, value in where.items()]
    assert script.main(["relearn", "badnet", "clean", *words]) == 0
    return base / "record", words


def row_of(folder):
    with open(folder / "results.csv") as file:
        return next(csv.DictReader(file))


def rate(folder, column="asr_relearn"):
    return float(row_of(folder)[column])


def test_a_hidden_backdoor_comes_back_and_a_benign_model_learns_none(planted):
    base, _ = planted
    repaired = base / "badnet" / "defense" / "fp"
    assert float(row_of(repaired)["asr"]) < 0.6  # most of it looks gone
    assert rate(base / "badnet" / "measure" / "relearn") > 0.95
    assert rate(repaired / "measure" / "relearn") > 0.9
    benign = base / "badnet" / "measure" / "relearn_benign"
    assert rate(benign) < 0.2 and row_of(benign)["control"] == "benign"
    assert rate(benign, "acc_relearn") > 0.85
    assert row_of(benign)["attack"] == "badnet"
    info = json.loads((benign / "record.json").read_text())
    weights = json.loads((base / "clean" / "record.json").read_text())["files"]
    assert info["victim_sha256"] == weights["model.safetensors"]


@pytest.mark.parametrize(
    ("benign", "retrained", "gap"),
    [(0.2, None, 0.7), (None, 0.5, 0.4), (0.2, 0.5, 0.4), (0.5, 0.2, 0.4), (None, None, None)],
)
def test_the_gap_is_that_to_the_larger_control(benign, retrained, gap):
    known = {"asr_relearn_benign": benign, "asr_relearn_retrained": retrained}
    run = SimpleNamespace(numbers={"asr_relearn": 0.9}, attack=SimpleNamespace(numbers=known))
    runs.add_gap(run)
    assert run.numbers["relearn_gap"] == (gap and pytest.approx(gap))


def test_the_tables_show_it(planted, capsys, tmp_path):
    base, _ = planted
    assert compare.main([str(base), "--html", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in said.splitlines() if line.split()}
    assert "RELEARN" in said and float(lines["none"][-2]) > 95 and lines["fp"][-1].startswith("+")
    assert said.count("GAP: by how many") == 1 and lines["benign"][-1] == "–"
    assert '"id":"relearn_gap"' in (tmp_path / "page.html").read_text()
    assert compare.main([str(base), "--format", "csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    (fp,) = (row for row in rows if (row["attack"], row["defense"]) == ("badnet", "fp"))
    (own,) = (row for row in rows if (row["attack"], row["defense"]) == ("badnet", "none"))
    gap = float(fp["asr_relearn_mean"]) - float(own["asr_relearn_benign_mean"])
    assert float(fp["relearn_gap_mean"]) == pytest.approx(gap, abs=2e-6)
    frame = antidote_bench.results(base).set_index("defense")
    assert frame.loc["fp", "asr_relearn"] == pytest.approx(float(fp["asr_relearn_mean"]), abs=1e-6)


def opened(folder, words):
    """(the content of a record, the options of its attack)"""
    config = parsing.parse(Relearn, words, "", "measure.py")
    info = contents.open_record(folder)
    loaded = contents.load(folder, config, torch.device("cpu"), info)
    return loaded, contents.read_options(folder, info)


def test_the_retrained_control_of_a_benign_model_is_that_model(planted, tmp_path):
    """With nothing left out, the recipe and the seeds lead to the same weights."""
    base, words = planted
    loaded, made = opened(base / "clean", words)
    report = []
    model = retrained.retrain(loaded, made, lambda model, **values: report.append(values), tmp_path)
    assert [values["epoch"] for values in report] == [1, 2, 3, 4] and model is not loaded.model
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_the_retrained_control_sees_nothing_that_the_attack_changed(planted, tmp_path, monkeypatch):
    base, words = planted
    loaded, made = opened(base / "badnet", words)
    shown = []
    monkeypatch.setattr(retrained, "fit", lambda model, split, recipe, **_: shown.append(split))
    retrained.retrain(loaded, made, None, tmp_path)
    (split,) = shown
    left = loaded.kinds == 0
    assert torch.equal(split.images[:], loaded.clean.images[:][left])
    assert torch.equal(split.labels, loaded.clean.truth[left]) and not left.all()
    with pytest.raises(ConfigError, match="the weights of a file"):
        retrained.retrain(loaded, made | {"pretrained": "x"}, None, tmp_path)


def test_a_retrained_model_has_no_backdoor_and_learns_none(planted, tmp_path, capsys):
    base, words = planted
    shutil.copytree(base / "badnet", tmp_path / "badnet")
    victim = tmp_path / "badnet"
    assert script.main(["relearn", str(victim), "--retrained", "true", *words]) == 0
    said = capsys.readouterr().out
    assert said.count("already done") == 2 and f"{victim}, retrained: after relearning ACC" in said
    row = row_of(victim / "measure" / "relearn_retrained")
    assert (row["control"], row["attack"], row["defense"]) == ("retrained", "badnet", "none")
    assert float(row["asr"]) < 0.1 and float(row["acc"]) > 0.9
    assert float(row["asr_relearn"]) < 0.3 and float(row["acc_relearn"]) > 0.85
    info = json.loads((victim / "measure" / "relearn_retrained" / "record.json").read_text())
    command = shlex.split(info["command"])
    assert command[:4] == ["python", "measure.py", "relearn", str(victim)]
    assert "--retrained" in command and command.count(str(victim)) == 1
    assert compare.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (last,) = (line for line in lines if line.startswith("retrained model"))
    assert float(last.split()[-2]) == pytest.approx(100 * float(row["asr_relearn"]), abs=0.06)
    assert script.main(["relearn", str(victim), "--retrained", "true", *words]) == 0
    assert capsys.readouterr().out.count("already done") == 3


@pytest.mark.parametrize(
    ("info", "why"),
    [
        ({"training_set": "none"}, "its attack changes no image of the training set"),
        ({"imported": {}, "training_set": "stored"}, "its recipe is not known"),
    ],
)
def test_some_victims_have_no_retrained_control(capsys, info, why):
    made = SimpleNamespace(retrained=True)
    assert measure._retrained(measure.Target(Path("x"), info, {}), made) == []
    assert f"x is not retrained, because {why}" in capsys.readouterr().err
    stored = measure.Target(Path("x"), {"training_set": "stored"}, {})
    assert measure._retrained(stored, made) == [stored._replace(control="retrained")]
    assert measure._retrained(stored, SimpleNamespace(retrained=False)) == []


def test_what_was_measured_is_not_measured_again(planted, capsys):
    base, words = planted
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    assert script.main(["relearn", str(base), *words]) == 0
    assert capsys.readouterr().out.count("already done") == 3
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before


def test_the_same_figures_after_an_interruption_and_nothing_else_in_the_run_changes(
    planted, tmp_path, monkeypatch
):
    base, words = planted
    shutil.copytree(base / "badnet", tmp_path / "badnet")
    repaired = tmp_path / "badnet" / "defense" / "fp"
    shutil.rmtree(repaired / "measure")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def interrupted(model, split, recipe, **options):
        if recipe.random_seed:
            raise KeyboardInterrupt
        return fit(model, split, recipe, **options)

    with monkeypatch.context() as patch:
        patch.setattr(relearn, "fit", interrupted)
        assert script.main(["relearn", str(repaired), *words]) == 130
    assert not (repaired / "measure" / "relearn" / "record.json").exists()
    assert script.main(["relearn", str(repaired), *words]) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    own, first = (
        row_of(place / "measure" / "relearn")
        for place in (repaired, base / "badnet" / "defense" / "fp")
    )
    for name in ("acc_relearn", "asr_relearn", "asr_relearn_std", "config_hash"):
        assert own[name] == first[name]


def test_another_dose_has_a_folder_of_its_own_and_stands_in_no_table(planted, tmp_path):
    base, words = planted
    shutil.copytree(base / "badnet", tmp_path / "badnet")
    place = tmp_path / "badnet" / "defense" / "fp"
    shutil.rmtree(place / "measure")
    assert script.main(["relearn", str(place), "--poisons", "0", *words]) == 0
    row = row_of(place / "measure" / "relearn_0")
    assert row["poisons"] == "0" and float(row["asr_relearn"]) < 0.5
    info = json.loads((place / "record.json").read_text())
    assert records.read(place, info["files"]["model.safetensors"]) == ({}, [])


def test_a_measure_of_other_weights_and_a_damaged_one_are_left_out(planted, tmp_path, capsys):
    base, words = planted
    shutil.copytree(base / "badnet", tmp_path / "badnet")
    found, left_out = records.read(tmp_path / "badnet", "0" * 64)
    assert found == {} and len(left_out) == 2 and "another model" in str(left_out[0][1])
    path = tmp_path / "badnet" / "measure" / "relearn" / "results.csv"
    path.write_text(path.read_text().replace("badnet", "badnot"))
    assert compare.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "1 run left out" in said and "not the file that was saved" in said
    row = next(line for line in said.splitlines() if line.startswith("none"))
    assert row.split()[-2:] == ["–", "–"]


def test_a_sweeps_table_keeps_it(planted, tmp_path):
    base, _ = planted
    import sweep
    from antidote_bench.utils.sweep.grid import Cell

    cell = Cell("attack", "badnet", {}, "badnet")
    row = sweep._row(cell, base)
    (tmp_path / "table.csv").write_text(files.csv_text([row], list(row)))
    assert float(row["asr_relearn"]) > 0.95 and float(row["asr_relearn_benign"]) < 0.2


# Which channels were cut


class Detector(nn.Module):
    """Four channels of a convolution 1x1 and two of a second one; the first pixel is the trigger,
    channel 2 sees it, and the last channel makes it the class 1."""

    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Conv2d(3, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width, eps=0)
        self.second = nn.Conv2d(width, 2, 1, bias=False)
        self.last = nn.BatchNorm2d(2, eps=0)
        with torch.no_grad():
            self.first.weight.zero_()
            self.first.weight[2, 0] = 1  # red
            self.first.weight[0, 1] = 1  # green
            self.second.weight.zero_()
            self.second.weight[1, 2], self.second.weight[0, 0] = 9, 1
        self.eval()

    def forward(self, images):
        return self.last(self.second(self.norm(self.first(images)))).amax((2, 3))


def detected(count=40):
    """A record for `Detector`: green images of class 0 or, where no green is, of class 1."""
    images = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
    images[:, 1] = 255
    triggered = images.clone()
    triggered[:, 0, 0, 0] = 255
    labels = torch.zeros(count).long()
    tests = TestSets(Split(images, labels, labels), Split(triggered, labels + 1, labels))
    return SimpleNamespace(test_sets=tests, backdoor_index=torch.arange(count))


def test_the_planted_channel_is_found_in_every_layer():
    """Without channel 2, or without the last one, nothing is triggered; the ACC rests on others."""
    truth = cut.find_truth(Detector(), detected())
    found = {name: part.nonzero().flatten().tolist() for name, part in truth.carries.items()}
    assert found == {"norm": [2], "last": [1]} and truth.kind == "layers"
    # by hand, in float64: one of four pixels of a map changes by 1, or by 9
    expected = {"norm": [0, 0, (1 / 4) ** 0.5, 0], "last": [0, (81 / 4) ** 0.5]}
    for name, values in expected.items():
        np.testing.assert_allclose(truth.change[name].numpy(), values, rtol=1e-6)


def test_a_network_is_as_it_was_after_channels_were_switched_off():
    model = Detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with cut.switched_off(model, {"norm": torch.tensor([False, False, True, False])}):
        assert not model.norm.weight[2].any() and not model.norm.bias[2].any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("hits", [0, 1, 2, 3])
def test_chance_by_enumeration(hits):
    """All ways to draw 2 of 6 channels of one layer and 1 of 4 of another, 3 and 1 of which carry
    the backdoor."""
    one, other = itertools.combinations(range(6), 2), range(4)
    draws = [
        sum(channel < 3 for channel in two) + (single < 1)
        for two, single in itertools.product(one, other)
    ]
    assert cut.chance_of([(6, 3, 2), (4, 1, 1)], hits) == pytest.approx(
        np.mean(np.array(draws) >= hits)
    )
    truth = cut.Truth(
        {}, {"norm": torch.tensor([1, 1, 1, 0, 0, 0]).bool()}, detected().test_sets, "layers"
    )
    pruned = {"norm": torch.tensor([1, 0, 0, 1, 0, 0]).bool()}
    found = cut.measures(Detector(6), cut.Cut(pruned, 5), truth)
    mean = np.mean(
        [sum(channel < 3 for channel in two) for two in itertools.combinations(range(6), 2)]
    )
    assert found["n_chance"] == pytest.approx(mean) and found["cut_lift"] == pytest.approx(1 / mean)
    assert (found["cut_precision"], found["n_unjudged"]) == (1 / 2, 5)
    assert found["cut_recall"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("most", "gone", "cheap", "number"),
    [
        (16, {1, 2, 3}, 16, 1),
        (16, {7, 8, 9}, 16, 7),
        (16, {6, 8}, 16, 6),  # not even: 7 is not looked at
        (16, {8}, 8, 8),
        (16, {5, 6, 7, 8}, 4, 0),  # too dear
        (16, set(), 16, 0),
        (4, {5}, 16, 0),  # too many
    ],
)
def test_the_fewest_channels(most, gone, cheap, number):
    assert cut.fewest(most, lambda count: (count in gone, count <= cheap)) == number


def test_what_a_defense_has_kept_in_the_layers_of_the_victim(tmp_path):
    """Pruned channels, soft masks, and convolutions, whose batch norms stand for them."""
    tensors = {
        "norm/pruned": torch.tensor([True, False, False, False]),
        "norm/factors": torch.ones(4),
        "first/factors": torch.tensor([0.9, 0.4, 0.6, 0.0]),
        "gone/pruned": torch.ones(3, dtype=torch.bool),
        "mask": torch.ones(2, 2),
    }
    (tmp_path / "mask.safetensors").write_bytes(to_bytes(tensors))
    info = {"files": {"mask.safetensors": files.sha256(tmp_path / "mask.safetensors")}}
    kept = cut.kept(tmp_path, info)
    assert set(kept) == {"norm", "first", "gone"}
    found = cut.in_layers(kept, Detector())
    assert found.unpaired == 3 and set(found.where) == {"norm"}
    assert found.where["norm"].tolist() == [True, True, False, True]
    assert not cut.kept(tmp_path, {"files": {}})


def test_the_chain_of_sra_is_the_truth(tmp_path, monkeypatch):
    """The attack writes one channel of every layer; in those that no shortcut passes it is found,
    alone, and a defense that prunes the chain has a precision and a recall of 1."""
    monkeypatch.setattr(cut, "PAIRS", 100)
    monkeypatch.setattr(cut, "JUDGED", 100)
    where = {"record_path": str(tmp_path), "cache_path": str(tmp_path / "cache")}
    small = {"width": 8, "recipe": "fast", "epochs": 2, "steps": 150}
    record = antidote_bench.run_attack("sra", save_folder_name="sra", **small, **where)
    assert record.measures.asr > 0.9
    tensors = load_file(record.path / "trigger.safetensors")
    truth = cut.find_truth(record.model, record)
    assert set(truth.carries) >= {"network.layer1.bn", "network.layer2.bn", "network.layer3.bn"}
    for name, part in truth.carries.items():
        assert part.nonzero().flatten().tolist() == [int(tensors[f"channel/{name}"])]
    chain = {
        name: torch.zeros_like(part).index_fill(0, tensors[f"channel/{name}"].view(1), True)
        for name, part in ((each, truth.change[each] > np.inf) for each in truth.change)
    }
    found = cut.measures(record.model, cut.Cut(chain, 0), truth)
    assert found["cut_precision"] == found["cut_recall"] == 1 and found["asr_hits"] < 0.1
    assert found["asr_misses"] > 0.9 and found["cut_lift"] > 5


def test_measured_from_the_command_line_and_shown(planted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cut, "PAIRS", 50)
    monkeypatch.setattr(cut, "JUDGED", 50)
    base, words = planted
    shutil.copytree(base / "badnet", tmp_path / "badnet")
    antidote_bench.run_defense(
        tmp_path / "badnet", "clp", u=1.5, cache_path=words[1].partition("=")[2]
    )
    capsys.readouterr()
    assert script.main(["cut", str(tmp_path), *words]) == 0
    said = capsys.readouterr()
    assert "names no pruned channel" in said.err and "precision" in said.out
    place = tmp_path / "badnet" / "defense" / "clp" / "measure" / "cut"
    row = row_of(place)
    pruned = load_file(place.parents[1] / "scores.safetensors")
    count = sum(int(part.sum()) for name, part in pruned.items() if name.endswith("/pruned"))
    assert int(row["n_cut"]) + int(row["n_unjudged"]) == count
    carries = load_file(place / "channels.safetensors")
    total = sum(int(part.sum()) for name, part in carries.items() if name.endswith("/carries"))
    assert total == int(row["n_truth"]) > 0
    assert float(row["cut_recall"]) == pytest.approx(int(row["n_hits"]) / total)
    assert compare.main([str(tmp_path)]) == 0
    assert "CUT-P" in (shown := capsys.readouterr().out) and "LIFT: how many times" in shown


# What cannot be measured


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["relearn", "nothing"], 3, "there is no record 'nothing'"),
        (["relearn", "clean"], 3, "nothing to measure"),
        (["relearn", "badnet", "--poisons", "1000"], 2, "at most"),
        (["relearn", "badnet", "--poisons", "-1"], 2, "0 or more"),
        (["relearn", "badnet", "--pratio", "1"], 2, "unknown option"),
    ],
)
def test_bad_input_gets_one_sentence(planted, words, code, sentence, capsys):
    base, options = planted
    if words[1] == "badnet":  # so that one run alone fails
        words[1] = str(base / "badnet" / "defense" / "fp")
    assert script.main([*words, *options]) == code
    said = capsys.readouterr().err.strip()
    assert sentence in said and len(said.splitlines()) == 1


def test_a_defense_of_another_victim_is_refused(planted, tmp_path, capsys):
    base, words = planted
    shutil.copytree(base / "badnet", tmp_path / "badnet")
    shutil.rmtree(tmp_path / "badnet" / "defense" / "fp" / "measure")
    path = tmp_path / "badnet" / "defense" / "fp" / "record.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"victim_sha256": "0" * 64}))
    assert script.main(["relearn", str(path.parent), *words]) == 4
    assert "repaired another victim" in capsys.readouterr().err


def test_a_defense_cannot_import_it():
    """Which images are poisoned is known to the evaluator alone."""
    from tests.test_layers import DEFENDER, arrows

    assert not {"protocol", "record"} & {module.split(".")[0] for module in DEFENDER}
    assert "protocol.relearn" in arrows(ROOT / "utils" / "protocol" / "measure.py")
