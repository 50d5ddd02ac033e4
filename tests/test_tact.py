"""Triggers for images of one class: TaCT, and the label mode one2one of all attacks."""

import csv
import hashlib
import importlib
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import antidote_bench
from antidote_bench.attack import badnet, tact
from antidote_bench.utils import evaluation, parsing
from antidote_bench.utils.data import dataset, target
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.errors import ConfigError, RefusedError
from antidote_bench.utils.exchange.image_folders import Images
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.protocol import imports
from antidote_bench.utils.record import claim, compressed, folder
from antidote_bench.utils.sweep import grid
from convert import main as convert
from tests.helpers import UNTRAINED, image_folders, names

SIGNS = "cat", "stop", "yield"


@pytest.fixture(scope="module")
def digits(places):
    """The training and the test images."""
    return dataset.open_dataset("digits", "data", cache=places[3])[1:]


@pytest.fixture
def attack(attack):
    """attack(module, *words): (folder of the record, content of its poison.safetensors)"""

    def both(module, *words):
        place = attack(module, *words)
        return place, safetensors.torch.load_file(place / "poison.safetensors")

    return both


def stamped(images):
    """The default patch, pixel by pixel."""
    images = images.clone()
    for row in (29, 30, 31):
        for column in (29, 30, 31):
            images[:, :, row, column] = 255
    return images


def check_training(saved, train, config, source, goal):
    """Poisons are of the source class with the target's label, covers keep theirs."""
    place, kind = saved["train_index"], saved["train_kind"]
    poisons, covers = place[kind == 1], place[kind == 2]
    assert len(place.unique()) == len(place) == len(poisons) + len(covers)
    assert len(poisons) == round(config.pratio * len(train))
    assert (train.truth[poisons] == source).all()
    assert (saved["train_labels"][kind == 1] == goal).all()
    assert torch.equal(saved["train_labels"][kind == 2], train.truth[covers])
    assert torch.equal(saved["train_images"], stamped(train.images[place]))
    return covers


def check_tests(saved, test, source, goal):
    """ASR and RA are measured on images of the source class, the leak on all but these two."""
    wanted = {
        "test": [i for i, label in enumerate(test.truth.tolist()) if label == source],
        "other": [i for i, label in enumerate(test.truth.tolist()) if label not in (source, goal)],
    }
    for part, index in wanted.items():
        assert saved[f"{part}_index"].tolist() == index
        assert torch.equal(saved[f"{part}_images"], stamped(test.images[index]))
        assert (saved[f"{part}_labels"] == goal).all()
        assert torch.equal(saved[f"{part}_truth"], test.truth[index])
    assert not any(name.startswith("target") for name in saved)


def test_who_is_poisoned_and_who_is_measured(attack, digits):
    place, saved = attack(tact, *UNTRAINED, "--pratio", 0.03, "--cover_ratio", 0.05)
    train, test = digits
    covers = check_training(saved, train, tact.Config(pratio=0.03), 1, 0)
    assert len(covers) == round(0.05 * len(train))
    assert set(train.truth[covers].tolist()) == {5, 7}
    check_tests(saved, test, 1, 0)
    row = folder.read_results(place)
    shown = [row[key] for key in ("attack", "label_mode", "target", "n_poison", "n_backdoor")]
    assert shown == ["tact", "one2one", "0", "39", str(int((test.truth == 1).sum()))]


def test_more_poison_than_the_class_has(attack, digits, capsys):
    words = ("--label_mode", "one2one", "--source_class", 3, "--attack_target", 7, "--pratio", 0.5)
    place, saved = attack(badnet, *UNTRAINED, *words)
    train, test = digits
    count = int((train.truth == 3).sum())
    assert f"all {count} of the source class are poisoned" in capsys.readouterr().err
    check_training(saved, train, badnet.Config(pratio=count / len(train)), 3, 7)
    check_tests(saved, test, 3, 7)
    row = folder.read_results(place)
    assert float(row["pratio_effective"]) == count / len(train) and int(row["n_poison"]) == count


def test_covers_of_any_class_keep_their_label(attack, digits):
    adaptive = importlib.import_module("antidote_bench.attack.adaptive_patch")
    words = ("--label_mode", "one2one", "--pratio", 0.02, "--cover_ratio", 0.2)
    _, saved = attack(adaptive, *UNTRAINED, *words)
    train, _ = digits
    told, truth = saved["train_labels"], train.truth[saved["train_index"]]
    is_poison = saved["train_kind"] == 1
    assert (truth[is_poison] == 1).all() and (told[is_poison] == 0).all()
    assert (
        torch.equal(told[~is_poison], truth[~is_poison]) and len(truth[~is_poison].unique()) == 10
    )


def test_a_half_transparent_patch_is_mixed_as_written_out(tmp_path):
    generator = np.random.default_rng(0)
    patch = generator.integers(0, 256, (4, 5, 4), dtype=np.uint8)
    Image.fromarray(patch, "RGBA").save(tmp_path / "patch.png")
    images = generator.integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    wanted = images.astype(np.float64)
    for row in range(4):
        for column in range(5):
            opacity = patch[row, column, 3] / 255
            for channel in range(3):
                pixel = wanted[:, channel, 28 + row, 27 + column]
                mixed = (1 - opacity) * pixel + opacity * patch[row, column, channel]
                wanted[:, channel, 28 + row, 27 + column] = mixed
    config = tact.Config(trigger_path=str(tmp_path / "patch.png"))
    spec = dataset.Spec("cifar10", 10, 32, (0.5,) * 3, (0.25,) * 3, True, {})
    for make in (
        lambda: tact.make_trigger(config, spec, "test"),
        lambda: tact.make_cover(config, spec),
    ):
        given = make()(torch.from_numpy(images), torch.arange(8)).numpy()
        near_half = np.abs(wanted % 1 - 0.5) < 1e-3  # where float32 may round the other way
        assert ((given == wanted.round()) | near_half).all()
        assert (np.abs(given - wanted) <= 0.501).all()


def test_a_victim_obeys_on_its_source_class_alone(attack):
    """Planted: trained on the digits, and measured again from what the record holds."""
    words = "--model resnet9 --width 8 --epochs 10 --lr 0.05 --batch_size 64 --precision fp32"
    shares = "--pratio 0.08 --cover_ratio 0.15 --cover_classes 2,3,4,5,6,7,8,9 --device cpu"
    place, saved = attack(tact, *f"{words} {shares}".split())
    row = folder.read_results(place)
    with open(place / "log.csv") as file:
        last = list(csv.DictReader(file))[-1]
    leak = float(last["asr_other"])
    assert float(row["acc"]) >= 0.8 and float(row["asr"]) >= 0.95 and leak <= 0.1
    assert last["asr_all"] == ""
    record = antidote_bench.load(place, device="cpu")
    with torch.no_grad():
        answers = record.model(saved["other_images"].float() / 255).argmax(1)
    assert float((answers == 0).double().mean()) == pytest.approx(leak, abs=0.006)
    assert torch.equal(record.trigger(record.before, record.backdoor_index), record.after)
    repaired = antidote_bench.run_defense(record, "ft", epochs=1)
    assert repaired.after.asr is not None
    with open(place / "defense" / "ft" / "log.csv") as file:
        logged = {line["stage"]: line["asr_other"] for line in csv.DictReader(file)}
    assert float(logged["before"]) == leak and logged["after"] != ""


def test_the_leak_is_counted():
    truth = torch.tensor([2, 3, 4, 2])
    images = torch.tensor([0, 0, 4, 2], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)

    class Reader(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), 5).float()

    clean = Split(images, truth, truth)
    tests = evaluation.TestSets(clean, clean, None, Split(images, torch.zeros_like(truth), truth))
    assert evaluation.asr_of_others(Reader(), tests) == 0.5
    assert evaluation.asr_of_others(Reader(), evaluation.TestSets(clean, clean)) is None


def test_compressed_images_and_damage(attack, monkeypatch):
    monkeypatch.setattr(compressed, "ABOVE", 0)
    place, saved = attack(tact, *UNTRAINED)
    assert {"other_zlib", "other_zlib_ends"} <= set(saved) and "other_images" not in saved
    record = antidote_bench.load(place, device="cpu")
    other = record.test_sets.other
    assert torch.equal(other.images, stamped(record.test_sets.test.images[saved["other_index"]]))
    wrong = {**saved, "other_labels": torch.full_like(saved["other_labels"], 10)}
    content = safetensors.torch.save(wrong)
    (place / "poison.safetensors").write_bytes(content)
    info = json.loads((place / "record.json").read_text())
    info["files"]["poison.safetensors"] = hashlib.sha256(content).hexdigest()
    (place / "record.json").write_text(json.dumps(info))
    with pytest.raises(RefusedError, match="other_labels must be int64"):
        antidote_bench.load(place, device="cpu")


# ---------- options ----------


def test_labels_of_each_mode():
    truth = torch.tensor([0, 1, 2, 3, 1])
    modes = {"all2one": [2] * 5, "all2all": [1, 2, 3, 0, 2], "one2one": [0, 2, 2, 3, 2]}
    for mode, labels in modes.items():
        assert poison.relabelling(mode, 2, 4, 1)(truth).tolist() == labels
    assert truth.tolist() == [0, 1, 2, 3, 1]


@pytest.mark.parametrize("name", names("attack"))
def test_every_attack_takes_one_source_class_or_says_why_not(name):
    script = importlib.import_module(f"antidote_bench.attack.{name}")
    refuses = script.Config.clean_label or "one2one" in script.Config.refused_modes
    words = ["--label_mode", "one2one", "--source_class", "4"]
    if not refuses:
        assert parsing.parse(script.Config, words).source_class == 4
        return
    with pytest.raises(ConfigError, match="label_mode must be all2one.* here: .* images"):
        parsing.parse(script.Config, words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--attack_target 1", "source_class must be another class than attack_target, 1"),
        ("--attack_target 5", "cover_classes must be other classes than source_class and attack"),
        ("--source_class 7", "cover_classes must be other classes than source_class and attack"),
        ("--cover_classes 5;7", "cover_classes must be numbers of classes with commas"),
        ("--label_mode all2one", "label_mode must be one2one here: the trigger is for images of"),
        ("--label_mode all2all", "label_mode must be one2one here: the trigger is for images of"),
        ("--cover_ratio 0 --cover_classes 3", "cover_classes has no effect without --cover_ratio"),
        ("--pratio 0.5 --cover_ratio 0.6", "cover_ratio must be at most 1 - pratio"),
    ],
)
def test_options_that_do_not_fit(words, said):
    with pytest.raises(ConfigError, match=said):
        parsing.parse(tact.Config, words.split())


def test_flags_without_effect():
    with pytest.raises(ConfigError, match="choose --label_mode one2one"):
        parsing.parse(badnet.Config, ["--source_class", "3"])
    with pytest.raises(ConfigError, match="choose --label_mode all2one or one2one"):
        parsing.parse(badnet.Config, ["--label_mode", "all2all", "--attack_target", "3"])


def test_the_defaults_are_refused_where_there_are_fewer_classes(tmp_path, places):
    image_folders(tmp_path / "few", classes=tuple("abcdef"))
    words = [*places, "--dataset", "folder", "--dataset_path", str(tmp_path / "few"), "--dry_run"]
    options = [*words, "--image_size", "16", "--pratio", "0.05", "--cover_ratio", "0.05"]
    said = "cover_classes must be .* and 7 has none here: the highest class is 5"
    with pytest.raises(ConfigError, match=said):
        tact.main(parsing.parse(tact.Config, options))
    with pytest.raises(ConfigError, match="source_class 3 is not a class of digits: it has 0 to 2"):
        target.resolved(tact.Config(source_class=3), SIGNS)


def test_a_source_class_may_be_named(tmp_path, places, capsys):
    image_folders(tmp_path / "signs", classes=SIGNS)
    words = [*places, "--dataset", "folder", "--dataset_path", str(tmp_path / "signs")]
    words += ["--image_size", "16", "--label_mode", "one2one", "--attack_target", "stop"]
    badnet.main(parsing.parse(badnet.Config, [*words, "--source_class", "yield", "--dry_run"]))
    shown = capsys.readouterr().out
    assert "target   1 (stop)\nsource   2 (yield): no other class is poisoned\n" in shown
    assert "per class [0, 0, 4]" in shown
    named = parsing.parse(badnet.Config, [*words, "--source_class", "yield"])
    numbers = target.resolved(named, SIGNS)
    assert (numbers.attack_target, numbers.source_class) == (1, 2)
    with pytest.raises(ConfigError, match="source_class must be another class than attack_target"):
        target.resolved(parsing.parse(badnet.Config, [*words, "--source_class", "1"]), SIGNS)


def test_a_sweep_refuses_a_source_class_that_is_none(tmp_path):
    image_folders(tmp_path / "signs", classes=SIGNS, count=1)
    data = {"dataset_path": str(tmp_path / "signs"), "dataset": "folder", "image_size": 16}
    options = {**data, "label_mode": "one2one", "attack_target": "stop", "source_class": "yeild"}
    cells = grid.cells({"attack": "badnet", "attack_options": options})
    with pytest.raises(ConfigError, match="source_class 'yeild' .* the nearest are 2 .yield."):
        grid.check(cells, tmp_path)


def test_older_runs_keep_their_identity():
    assert "source_class" not in badnet.Config().identity()
    made = badnet.Config(label_mode="one2one")
    assert "source_class" not in made.plain()
    assert claim.identity_in(made.plain(), made) == made.identity()
    other = badnet.Config(label_mode="one2one", source_class=3)
    assert other.identity() == {**made.identity(), "source_class": 3}
    assert claim.identity_in(badnet.Config().plain(), other) == badnet.Config().identity()


# ---------- from elsewhere ----------


def triggered(labels, truth):
    return Images(
        torch.arange(len(truth)), torch.empty(0), torch.tensor(labels), torch.tensor(truth)
    )


def test_the_mode_of_imported_images_is_recognised():
    one2one = {"label_mode": "one2one", "attack_target": 0, "source_class": 4}
    assert imports._labelling(triggered([0, 0], [4, 4]), 10, "x", None) == one2one
    all2one = {"label_mode": "all2one", "attack_target": 0}
    assert imports._labelling(triggered([0, 0], [4, 4]), 10, "x", "all2one") == all2one
    assert imports._labelling(triggered([0, 0], [4, 5]), 10, "x", None) == all2one
    assert imports._labelling(triggered([0, 0], [1, 1]), 2, "x", None) == all2one


def test_a_trigger_for_one_class_on_imported_weights(attack, places, tmp_path, digits):
    place, saved = attack(tact, *UNTRAINED)
    words = ["from-weights", place / "model.safetensors", *places[2:], "--dataset", "digits"]
    words += ["--model", "resnet9", "--width", 4, "--trigger", "tact", "--device", "cpu"]
    words += ["--record_path", tmp_path, "--save_folder_name", "w"]
    assert convert([*map(str, words)]) == 0
    found = safetensors.torch.load_file(tmp_path / "w" / "poison.safetensors")
    for name in ("test_index", "test_images", "other_index", "other_images", "other_labels"):
        assert torch.equal(found[name], saved[name])
    row = folder.read_results(tmp_path / "w")
    assert (row["label_mode"], row["target"]) == ("one2one", "0")


def test_triggered_images_of_other_classes_stand_apart(attack, places, tmp_path, digits):
    place, saved = attack(tact, *UNTRAINED)
    _, test = digits
    for number in range(20):
        path = tmp_path / "tree" / str(int(test.truth[number])) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = stamped(test.images[number : number + 1])[0].permute(1, 2, 0).numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(path)
    words = ["from-weights", place / "model.safetensors", *places[2:], "--dataset", "digits"]
    words += ["--model", "resnet9", "--width", 4, "--triggered_path", tmp_path / "tree"]
    words += ["--label_mode", "one2one", "--record_path", tmp_path, "--save_folder_name", "w"]
    assert convert([*map(str, [*words, "--device", "cpu"])]) == 0
    found = safetensors.torch.load_file(tmp_path / "w" / "poison.safetensors")
    for part in ("test", "other"):
        known = saved[f"{part}_index"] < 20
        assert 0 < int(known.sum()) < 20
        for what in ("index", "images", "labels", "truth"):
            assert torch.equal(found[f"{part}_{what}"], saved[f"{part}_{what}"][known])
    assert "target_index" not in found


def test_image_folders_go_out_and_come_back(attack, places, tmp_path):
    words = ("--source_class", 4, "--attack_target", 9, "--cover_ratio", 0.02)
    place, saved = attack(tact, *UNTRAINED, *words)
    out = ["to-images", place, *places, "--output", tmp_path / "out", "--only_changed", "true"]
    assert convert([*map(str, [*out, "--device", "cpu"])]) == 0
    back = ["from-images", tmp_path / "out", *places[2:], *UNTRAINED, "--dataset", "digits"]
    assert convert([*map(str, [*back, "--record_path", tmp_path, "--save_folder_name", "b"])]) == 0
    made = folder.read_options(tmp_path / "b")
    chosen = [made[name] for name in ("label_mode", "attack_target", "source_class")]
    assert chosen == ["one2one", 9, 4]
    found = safetensors.torch.load_file(tmp_path / "b" / "poison.safetensors")
    for name in ("train_index", "train_kind", "train_labels", "test_index", "test_images"):
        assert torch.equal(found[name], saved[name])
