"""What comes from elsewhere becomes a record, and a record leaves for elsewhere, image by image."""

import csv
import dataclasses
import hashlib
import importlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import compare
import convert
from antidote_bench import models
from antidote_bench.attack import clean
from antidote_bench.models import Normalize
from antidote_bench.utils import backdoorbench, checkpoint, files, parsing
from antidote_bench.utils.data.dataset import Dataset, Spec, Split
from antidote_bench.utils.data.published_sets import CIFAR10
from antidote_bench.utils.errors import ConfigError, MissingError, RefusedError
from antidote_bench.utils.exchange import attack_result, diagnosis, image_folders, order, weights
from antidote_bench.utils.exchange.image_folders import Images
from tests.helpers import ROOT, names

TINY = ("--model", "resnet9", "--width", "4")
REAL = ROOT.parent / "shared" / "data" / "backdoorbench_badnet"


def tensors(folder, name="poison"):
    return safetensors.torch.load_file(folder / f"{name}.safetensors")


def row(folder):
    return files.read_csv(folder / "results.csv")[0]


def same(one, other):
    """Whether two dicts of tensors are equal, bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """here(*words, code=0): convert.py in this process, with records of its own; `here.record` is
    their folder."""
    base = tmp_path_factory.mktemp("exchange")
    places = ["--record_path", str(base / "record"), "--cache_path", str(base / "cache")]

    def call(*words, code=0):
        assert convert.main([*map(str, words), *places]) == code

    call.base, call.record = base, base / "record"
    return call


def read_weights(path):
    return weights.from_bytes(checkpoint.read_file(path), path)


def read_result(folder):
    path = folder / attack_result.FILE
    return attack_result.from_bytes(checkpoint.read_file(path), path)


# ---------- weights ----------


def net(classes=3):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


def test_records_leave_in_the_layout_of_trojai(here, small, places, capsys):
    """A backdoored and a benign record: numbered by the hashes of their weights, with weights that
    torch reads as such, examples of every class, and a manifest whose hashes are right."""
    zoo = here.base / "zoo"
    zoo.mkdir()
    shutil.copytree(small, zoo / "badnet")
    tiny = [*places, *TINY, "--epochs", "0", "--precision", "fp32", "--record_path", str(zoo)]
    clean.main(parsing.parse(clean.Config, [*map(str, tiny), "--save_folder_name", "clean"]))
    out = here.base / "trojai"
    here("to-trojai", zoo, "--output", out, "--dry_run", "true")
    assert f"would write {out}" in capsys.readouterr().out and not out.exists()
    here("to-trojai", zoo, "--output", out, "--examples", "3")
    rows = json.loads((out / "manifest.json").read_text())["models"]
    table = files.read_csv(out / "METADATA.csv")
    assert [each["attack"] for each in rows] == [each["attack"] for each in table]
    assert {each["attack"]: each["poisoned"] for each in rows} == {
        "badnet": True,
        "clean_badnet": False,
    }
    marks = {}
    for each in rows:
        place = out / "models" / each["model_name"]
        content = (place / "model.pt").read_bytes()
        assert hashlib.sha256(content).hexdigest() == each["sha256"]
        assert (place / "ground_truth.csv").read_text() == f"{int(each['poisoned'])}\n"
        source = zoo / ("badnet" if each["poisoned"] else "clean")
        marks[each["model_name"]] = json.loads((source / "record.json").read_text())["files"][
            "model.safetensors"
        ]
        held = torch.load(io.BytesIO(content), weights_only=True)
        assert same(held, tensors(source, "model"))
        assert all(name.startswith("network.") for name in held), "as the README beside them says"
        shown = sorted(path.name for path in (place / "clean-example-data").iterdir())
        assert shown == [f"class_{k}_example_{n}.png" for k in range(10) for n in range(3)]
        triggered = place / "poisoned-example-data"
        assert triggered.exists() == each["poisoned"]
        if each["poisoned"]:
            assert len(list(triggered.iterdir())) == 27, "the target class has no triggered image"
    assert sorted(marks) == sorted(marks, key=marks.get)
    assert json.loads((place / "config.json").read_text())["number_classes"] == 10
    here("to-trojai", zoo, "--output", out, code=2)
    here("to-trojai", zoo, "--output", out, "--dry_run", "true", code=2)
    here("to-images", zoo, "--output", here.base / "b", "--dry_run", "true", code=4)
    here("to-trojai", here.base / "trojai", "--output", here.base / "b", code=3)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": state, "lr": [0.1], "acc": np.float64(0.9)},
        lambda state: {"net": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {"model": {f"module._orig_mod.{k}": value for k, value in state.items()}},
        lambda state: {f"model.{name}": value.half() for name, value in state.items()},
    ],
)
def test_a_state_dict_is_found_wherever_it_is(tmp_path, wrap):
    state = {name: value.half().to(value.dtype) for name, value in net().state_dict().items()}
    torch.save(wrap(state), tmp_path / "a.pt")
    fitted = weights.fit(read_weights(tmp_path / "a.pt"), net(), "a.pt")
    assert same(fitted.tensors, state)


def test_other_names_are_matched_by_position_if_all_forms_agree():
    state = net().state_dict()
    other = {f"x{number}.{name.split('.')[1]}": v for number, (name, v) in enumerate(state.items())}
    fitted = weights.fit(weights.Weights(other), net(), "a.pt")
    assert same(fitted.tensors, dict(state)) and "position" in fitted.notes[-1]
    with pytest.raises(
        RefusedError, match="missing: 0.weight, 0.bias, 1.weight, 1.bias, 1.r.*, ..."
    ):
        weights.fit(weights.Weights(dict(reversed(other.items()))), net(), "a.pt")


def test_weights_that_do_not_fit_are_named():
    state = dict(net(classes=5).state_dict())
    del state["0.bias"]
    with pytest.raises(RefusedError) as error:
        weights.fit(weights.Weights(state), net(), "a.pt")
    assert "1 missing: 0.bias;" in str(error.value)
    assert "3.weight is 5x4 and must be 3x4" in str(error.value)
    state = {**net().state_dict(), "3.bias": torch.tensor([0, torch.nan, 0])}
    with pytest.raises(RefusedError, match="3.bias holds nan"):
        weights.fit(weights.Weights(state), net(), "a.pt")


def test_files_with_no_state_dict_are_refused(tmp_path):
    torch.save({"epoch": 3, "args": {}}, tmp_path / "a.pt")
    with pytest.raises(RefusedError, match="no state dict in it.*epoch, args"):
        read_weights(tmp_path / "a.pt")
    torch.save({"model": net()}, tmp_path / "a.pt")  # a whole module: loading it would run code
    with pytest.raises(RefusedError, match="torch.nn.modules"):
        read_weights(tmp_path / "a.pt")
    with pytest.raises(MissingError):
        read_weights(tmp_path / "b.pt")


@pytest.fixture(scope="module")
def unknown(here):
    """A record of a network whose trigger nobody knows."""
    spec = SimpleNamespace(classes=10, size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    torch.manual_seed(0)
    state = models.build("resnet9", spec, 4).network.state_dict()
    safetensors.torch.save_file(state, here.base / "a.safetensors")
    here("from-weights", here.base / "a.safetensors", *TINY, "--save_folder_name", "unknown")
    return here.record / "unknown"


def test_without_a_trigger_asr_and_ra_are_empty(here, unknown, run, capsys):
    made = row(unknown)
    assert made["acc"] and not made["asr"] and not made["ra"] and not made["n_poison"]
    assert (made["attack"], made["recipe"]) == ("imported", "imported")
    places = ["--record_path", here.record, "--cache_path", here.base / "cache"]
    repair = ["--result_file", "unknown", *places, "--epochs", "1", "--clean_count", "20"]
    assert "ASR n/a" in run("defense/ft.py", *repair).stdout
    assert not row(unknown / "defense" / "ft")["asr_before"]
    done = run("defense/abl.py", *repair[:6], code=4)
    assert "imported without one; abl trains on such a set" in done.first
    done = run("detection/strip.py", *repair[:6], code=4)
    assert "no triggered test image" in done.first
    capsys.readouterr()
    assert compare.main([str(unknown)]) == 0
    shown = capsys.readouterr().out
    assert "imported" in shown and "–" in shown and "left out" not in shown


def test_the_trigger_of_an_attack_may_be_named(here, unknown, capsys):
    file = here.base / "a.safetensors"
    trigger = ("--trigger", "badnet", "--patch_size", "5", "--attack_target", "3")
    here("from-weights", file, *TINY, *trigger, "--poisoned_share", "0",
         "--save_folder_name", "known")  # fmt: skip
    record = here.record / "known"
    assert (row(record)["attack"], row(record)["n_poison"]) == ("imported:badnet", "0")
    stored = tensors(record)
    assert (stored["test_images"][:, :, -5:, -5:] == 255).all()
    assert (stored["test_labels"] == 3).all()
    assert (stored["test_truth"] != 3).all() and len(stored["train_index"]) == 0
    # the same images as files
    tree = here.base / "tree"
    pairs = zip(stored["test_truth"].tolist(), stored["test_index"].tolist(), strict=True)
    paths = [tree / str(truth) / f"{index}.png" for truth, index in pairs]
    image_folders.write_all(stored["test_images"], paths)
    here("from-weights", file, *TINY, "--triggered_path", tree, "--attack_target", "3",
         "--save_folder_name", "tree")  # fmt: skip
    again = tensors(here.record / "tree")
    assert all(
        torch.equal(again[f"test_{what}"], stored[f"test_{what}"]) for what in ("index", "images")
    )
    assert row(here.record / "tree")["asr"] == row(record)["asr"]
    # what is learned, is drawn or belongs to another file is not taken for the model's own
    here("from-weights", file, *TINY, "--trigger", "trojannn", "--save_folder_name", "x", code=2)
    assert "--triggered_path" in capsys.readouterr().err
    here("from-weights", file, *TINY, "--digest", "0" * 12, "--save_folder_name", "x", code=4)
    here("from-weights", file, "--width", "8", "--save_folder_name", "x", code=4)
    assert not (here.record / "x").exists()
    here("from-weights", file, *TINY, "--save_folder_name", "unknown")
    assert "already done" in capsys.readouterr().out


def test_the_poisoned_share_may_be_told_as_an_attack_has_it(here, unknown, tmp_path):
    file = here.base / "a.safetensors"
    options = tmp_path / "a.yaml"
    options.write_text("pratio: 0.2\n")
    told = {
        "flag": ("--pratio", "0.2"),
        "yaml": ("--yaml_path", options, "--trigger", "wanet"),
        "blind": ("--poisoned_share", "0.2", "--trigger", "blind"),  # whose own share is 1
    }
    for name, words in told.items():
        here("from-weights", file, *TINY, *words, "--save_folder_name", name)
        made = row(here.record / name)
        assert (made["pratio"], made["n_poison"]) == ("0.2", "259")


def test_what_is_read_is_what_is_checked(here, unknown, monkeypatch):
    file, reads = here.base / "a.safetensors", []

    def read_bytes(path, original=Path.read_bytes):
        reads.append(path)
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    here("from-weights", file, *TINY, "--save_folder_name", "unknown")
    assert reads.count(file) == 1
    here("from-weights", file, *TINY, "--digest", "0" * 12, "--save_folder_name", "x", code=4)


# ---------- why a model does badly ----------


class Nearest(nn.Module):
    """Classes by the mean of an image: class c where it is nearest to `centres[c]`."""

    def __init__(self, centres):
        super().__init__()
        self.centres = torch.tensor(centres)

    def forward(self, images):
        return -(images.mean((1, 2, 3))[:, None] - self.centres).abs()


def levels(count, classes=4):
    """A data set whose class c has images of the one grey level 40 + 40 c."""
    labels = torch.arange(count) % classes
    images = (40 + 40 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).clone()
    split = Split(images, labels, labels)
    spec = Spec("x", classes, 8, (0.0,) * 3, (1.0,) * 3, False, {}, tuple("abcd"))
    return Dataset(spec, split, split)


@pytest.mark.parametrize(
    ("centres", "hint"),
    [
        ([40 / 255, 80 / 255, 120 / 255, 160 / 255], None),
        ([40.0, 80.0, 120.0, 160.0], "--mean 0,0,0 --std 0.00392157,0.00392157,0.00392157"),
        ([160 / 255, 120 / 255, 80 / 255, 40 / 255], "if its 0 is the 3 (d) here"),
        ([1.0, 1.0, 1.0, 1.0], "near chance"),
    ],
)
def test_a_model_that_does_badly_is_looked_at(centres, hint):
    data = levels(100)
    network = nn.Sequential()
    network.add_module("normalize", Normalize(data.spec.mean, data.spec.std))
    network.add_module("network", Nearest(centres))
    right = (network(data.test.images / 255).argmax(1) == data.test.truth).double().mean().item()
    found = diagnosis.hints(network, data, {"acc": right, "asr": None}, "fp32", False)
    assert found == [] if hint is None else hint in found[0]


# ---------- the order of a data set ----------


def photographs(count, classes=4):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (count, 3, 8, 8), generator=draw, dtype=torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=draw)
    return Split(images, labels, labels)


def changed(split, index):
    """Images of a split with a bright corner, and a pattern over all of them."""
    images = (0.8 * split.images[index].float() + 40 * torch.ones(8).cumsum(0) / 8).to(torch.uint8)
    images[:, :, -3:, -3:] = 255
    return Images(index, images, torch.zeros_like(index), split.truth[index])


def test_changed_images_are_found_in_another_order():
    theirs, index = photographs(200), torch.arange(3, 200, 9)
    found = changed(theirs, index)
    assert torch.equal(order.positions(theirs, found, 200, "test"), index)
    rank = theirs.labels.argsort(stable=True)
    place = order.positions(theirs[rank], found, 200, "test")
    assert torch.equal(rank[place], index)
    # within the classes only: the labels alone would not show it
    shuffled = torch.cat(
        [(theirs.labels == label).nonzero().flatten().flip(0) for label in range(4)]
    )
    back = torch.empty(200, dtype=torch.long)
    back[rank] = shuffled
    place = order.positions(theirs[back], found, 200, "test")
    assert torch.equal(back[place], index)


def test_images_of_another_set_are_refused(capsys):
    split = photographs(200)
    found = changed(split, torch.arange(20))
    with pytest.raises(RefusedError, match="come from a test set of 100, and the one here has 200"):
        order.positions(split, found, 100, "test")
    noise = found._replace(images=torch.randint(0, 255, found.images.shape, dtype=torch.uint8))
    assert torch.equal(order.positions(split, noise, 200, "test"), found.index)
    assert "do not look like" in capsys.readouterr().err
    with pytest.raises(RefusedError, match="another order, and 20 of the 20"):
        order.positions(split[torch.arange(200).flip(0)], noise, 200, "test")
    with pytest.raises(RefusedError, match="no test image 500"):
        order.positions(split, found._replace(index=found.index + 481), 200, "test")


# ---------- BackdoorBench ----------


@pytest.fixture(scope="module")
def real(here):
    """The record that BackdoorBench has made, and its data set as image folders, which are sorted
    by class."""
    if not REAL.is_dir():
        pytest.skip("the record is not beside this checkout (../shared/data)")
    folder = here.base / "badnet_0_1"
    folder.mkdir()
    (folder / "attack_result.pt").symlink_to(REAL / "attack_result.pt")
    with tarfile.open(REAL / "images.tar") as archive:
        archive.extractall(folder, filter="data")
    for split in ("train", "test"):
        content = np.load(REAL / f"clean_{split}.npz")
        paths = [
            here.base / "data" / "cifar10" / split / CIFAR10[label] / f"{number:04}.png"
            for number, label in enumerate(content["y"])
        ]
        image_folders.write_all(torch.from_numpy(content["x"]).permute(0, 3, 1, 2), paths)
    here("from-backdoorbench", folder, "--dataset_path", here.base / "data")
    return here.record / "imported_badnet_0_1"


def test_a_real_record_has_the_figures_of_its_own_evaluation(real):
    with open(REAL / "attack_df.csv") as file:
        theirs = list(csv.DictReader(file))[-1]
    ours = row(real)
    assert [ours[name] for name in ("acc", "asr", "ra")] == [
        theirs[f"test_{name}"] for name in ("acc", "asr", "ra")
    ]
    assert (ours["attack"], ours["n_poison"]) == ("backdoorbench:badnet", "102")
    assert (ours["target"], ours["n_test"], ours["n_backdoor"]) == ("0", "500", "454")
    stored = tensors(real)
    for split in ("train", "test"):  # nothing but the corner differs from the clean image there
        content = np.load(REAL / f"clean_{split}.npz")
        clean = content["x"][np.argsort(content["y"], kind="stable")]
        images = stored[f"{split}_images"].permute(0, 2, 3, 1).numpy().copy()
        images[:, -3:, -3:] = clean[stored[f"{split}_index"]][:, -3:, -3:]
        assert (images == clean[stored[f"{split}_index"]]).all()


def test_a_record_comes_back_from_backdoorbench_as_it_was(real, here, capsys):
    output = here.base / "BackdoorBench" / "record" / "back"
    data = ("--dataset_path", here.base / "data")
    here("to-backdoorbench", real, "--output", output)
    assert "sorted by class" in capsys.readouterr().err
    content = torch.load(output / "attack_result.pt", weights_only=False)
    first = content["bd_train"]["bd_data_container"]["data_dict"]
    number, entry = next(iter(first.items()))
    assert entry["path"] == f"./record/back/bd_train_dataset/{entry['other_info'][1]}/{number}.png"
    here("from-backdoorbench", output, *data, "--save_folder_name", "back", "--attack", "badnet")
    assert f"record: {here.record / 'back'}\n" in capsys.readouterr().out
    assert same(tensors(here.record / "back"), tensors(real))
    assert same(tensors(here.record / "back", "model"), tensors(real, "model"))
    for name in ("acc", "asr", "ra", "pratio"):
        assert row(here.record / "back")[name] == row(real)[name]


def test_a_repaired_model_of_backdoorbench_is_no_victim(real, here, capsys):
    attack = here.base / "badnet_0_1"
    content = torch.load(attack / "attack_result.pt", weights_only=False)
    facts = {name: content[name] for name in ("model_name", "num_classes")}
    state = {name: value.clone() for name, value in content["model"].items()}
    state["classifier.3.bias"][0] -= 100  # no image is taken for the target
    folder = attack / "defense" / "ft"
    folder.mkdir(parents=True)
    torch.save({**facts, "model": state, "index": np.arange(3)}, folder / "defense_result.pt")
    data = ("--dataset_path", here.base / "data")
    here("from-backdoorbench", folder, *data)
    assert "may not be the trigger" not in capsys.readouterr().err
    record = here.record / "imported_badnet_0_1_ft"
    made, victim = row(record), row(real)
    assert (made["attack"], made["n_poison"]) == ("backdoorbench:badnet:ft", "")
    assert (made["asr"], made["n_backdoor"]) == ("0.0", victim["n_backdoor"])
    assert float(made["ra"]) >= float(victim["ra"])
    stored = tensors(record)
    assert len(stored["train_index"]) == 0
    assert torch.equal(stored["test_images"], tensors(real)["test_images"])
    facts["model_name"] = "preactresnet18"
    torch.save({**facts, "model": state}, folder / "defense_result.pt")
    here("from-backdoorbench", folder, *data, "--save_folder_name", "x", code=4)
    assert "network 'preactresnet18'" in capsys.readouterr().err
    torch.save({**facts, "model": state}, here.base / "defense_result.pt")
    here("from-backdoorbench", here.base, *data, "--save_folder_name", "x", code=3)
    assert "from-weights takes the weights alone" in capsys.readouterr().err


def test_what_images_say_is_not_contradicted(real, here, capsys):
    source = here.base / "badnet_0_1"
    words = ("--dataset_path", here.base / "data", "--save_folder_name", "x")
    here("from-backdoorbench", source, *words, "--attack_target", "3", code=2)
    assert "attack_target must be left out: the triggered test images" in capsys.readouterr().err
    here("from-backdoorbench", source, *words, "--label_mode", "all2all", code=2)
    assert "label_mode must be left out" in capsys.readouterr().err
    agreed = ("--attack_target", "0", "--label_mode", "all2one", "--dry_run")
    here("from-backdoorbench", source, *words, *agreed)
    here("to-images", real, "--output", here.base / "images_of_real", "--only_changed", "true",
         *words[:2])  # fmt: skip
    images = ("from-images", here.base / "images_of_real", "--dataset", "cifar10", *words, *TINY)
    here(*images, "--attack_target", "3", code=2)
    here(*images, "--pratio", "0.2", code=2)
    assert "pratio must be left out: images.csv says" in capsys.readouterr().err
    assert not (here.record / "x").exists()


def test_a_record_without_a_training_set_goes_to_backdoorbench(tmp_path):
    made = read_result(result(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    attack_result.write(tmp_path / "b", "b", made._replace(train=None))
    again = read_result(tmp_path / "b")
    assert again.train is None and torch.equal(again.test.images, made.test.images)
    assert not (tmp_path / "b" / "bd_train_dataset").exists()


def result(folder, change=None):
    """An attack_result.pt of eight images in `folder`, after change(content)."""
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    index = torch.tensor([1, 5])
    part = Images(index, images, torch.tensor([0, 0]), torch.tensor([1, 2]))
    counts = {"bd_train": 8, "bd_test": 8}
    made = attack_result.Result("preactresnet18", 3, 8, "cifar10", {}, part, part, counts)
    folder.mkdir(exist_ok=True)
    attack_result.write(folder, folder.name, made)
    content = torch.load(folder / "attack_result.pt", weights_only=False)
    if change:
        change(content)
        torch.save(content, folder / "attack_result.pt")
    return folder


def test_labels_may_be_numbers_of_any_kind(tmp_path):
    def change(content):
        entries = content["bd_test"]["bd_data_container"]["data_dict"]
        first, second = entries.pop(1), entries.pop(5)
        first["other_info"] = [np.int32(0), torch.tensor(1)]
        entries.update({np.int64(5): second, np.int64(1): first})
        content["bd_test"]["poison_indicator"] = content["bd_test"]["poison_indicator"].astype(bool)
        content["bd_train"] = None

    found = read_result(result(tmp_path / "a", change))
    assert found.train is None and found.test.index.tolist() == [1, 5]
    assert (found.test.labels.tolist(), found.test.truth.tolist()) == ([0, 0], [1, 2])


def entries(content):
    return content["bd_test"]["bd_data_container"]["data_dict"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda content: content.update(extra=subprocess.Popen), "Popen, and loading that"),
        (lambda content: entries(content).update({1: (Image.new("RGB", (8, 8)), 0, 1)}), "PIL"),
        (lambda content: entries(content).update({1: (0, 0, 1)}), "holds an image as"),
        (lambda content: entries(content)[1].update(other_info=[9, 1]), "labels outside 0..2"),
        (lambda content: entries(content)[1].update(other_info=["../x", 1]), "with two labels"),
        (lambda content: entries(content).update({8: entries(content)[1]}), "positions outside"),
        (lambda content: content["bd_test"].update(poison_indicator=np.ones(8)), "marks other"),
        (lambda content: content["bd_test"].update(poison_indicator=None), "no poison_indicator"),
        (lambda content: content.update(img_size=[8, 9, 3]), "img_size must be a square"),
        (lambda content: content.update(bd_test=None), "'bd_test' is dict"),
        (lambda content: content.pop("model"), "'model' is dict"),
    ],
)
def test_hostile_and_damaged_results_are_refused(tmp_path, change, why):
    with pytest.raises(RefusedError, match=why):
        read_result(result(tmp_path / "a", change))


def test_networks_have_their_counterparts():
    spec = SimpleNamespace(classes=3, size=32, mean=(0,) * 3, std=(1,) * 3)
    there, rename = attack_result.names_there("preactresnet18")
    names = [rename(name) for name in models.build("preactresnet18", spec).network.state_dict()]
    assert there == "preactresnet18" and "layer2.0.shortcut.0.weight" in names
    assert attack_result.names_there("vit_b_16")[1]("vit.heads.head.bias") == "1.heads.head.bias"
    # torchvision's, with 7x7 weights in the first layer and three fully connected ones at the end
    assert attack_result.same_here("resnet18") == "torchvision:resnet18"
    assert attack_result.same_here("vgg19_bn") == "torchvision:vgg19_bn"
    assert attack_result.names_there("torchvision:vgg19_bn")[0] == "vgg19_bn"
    with pytest.raises(RefusedError, match="googlenet.*--model path/to/file.py:function"):
        attack_result.same_here("googlenet")
    with pytest.raises(ConfigError, match="7x7"):
        attack_result.names_there("resnet18")


# ---------- image folders ----------


def test_a_victim_of_exported_images_is_the_same_victim(here, run, capsys):
    places = ["--record_path", here.record, "--cache_path", here.base / "cache"]
    training = [*TINY, "--epochs", "1", "--precision", "fp32"]
    run("attack/wanet.py", *places, *training, "--save_folder_name", "own")
    here("to-images", "own", "--output", here.base / "images")
    rows = files.read_csv(here.base / "images" / "images.csv")
    kinds = [line["kind"] for line in rows if line["split"] == "train"]
    assert (kinds.count("poison"), kinds.count("cover"), len(kinds)) == (130, 259, 1297)
    assert all((here.base / "images" / line["file"]).is_file() for line in rows)
    assert rows[0]["file"].split("/")[1] == rows[0]["label"]
    here("from-images", here.base / "images", *training, "--save_folder_name", "again")
    for name in ("poison", "model"):
        own, again = (tensors(here.record / each, name) for each in ("own", "again"))
        assert same({key: own[key] for key in again}, again)
    made = row(here.record / "again")
    assert (made["attack"], made["pratio"]) == ("images", "0.100231")
    here("to-images", "own", "--output", here.base / "few", "--only_changed", "true")
    assert len(files.read_csv(here.base / "few" / "images.csv")) == 130 + 259 + 450
    here("to-images", "own", "--output", here.base / "few", code=2)
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "0,train,../../etc/passwd,0,0,poison",
        "0,train,/etc/passwd,0,0,poison",
        "-1,train,a.png,0,0,poison",
        "0,train,a.png,10,0,poison",
        "0,other,a.png,0,0,poison",
        "0,train,a.png,0,0,bad",
        "0,train,a.png,0",
    ],
)
def test_a_list_of_images_names_files_below_it(tmp_path, line):
    (tmp_path / "images.csv").write_text(f"{','.join(image_folders.COLUMNS)}\n{line}\n")
    with pytest.raises(RefusedError, match="line 2 is not index"):
        image_folders.rows_of(image_folders.read_list(tmp_path), tmp_path, 10)


def test_class_folders_keep_the_order_of_the_classes():
    assert image_folders.class_folders(CIFAR10, 10) == list(CIFAR10)
    assert image_folders.class_folders(("b", "a"), 2) == ["0", "1"]
    assert image_folders.class_folders(("a/b", "c"), 2) == ["0", "1"]
    assert image_folders.class_folders(tuple(map(str, range(12))), 12)[:2] == ["00", "01"]


# ---------- flags and pages ----------


def config_of(name):
    if name == "convert":
        return convert.COMMANDS["from-weights"]
    kind = "attack" if name in names("attack") else "defense"
    return importlib.import_module(f"antidote_bench.{kind}.{name}").Config


def test_the_page_lists_the_options_that_the_parser_knows():
    page = (ROOT / "docs" / "from_backdoorbench.md").read_text()
    for there, name in backdoorbench.ALIASES.items():
        assert f"| `--{there}` | `--{name}` |" in page
    for own, aliases in backdoorbench.OWN_ALIASES.items():
        options = {field.name for field in dataclasses.fields(config_of(own))}
        for there, name in aliases.items():
            assert name in options and there not in options, (own, there)
            assert f"| `{own}` | `--{there}` | `--{name}` |" in page
    tables = (backdoorbench.OWN_IGNORED, backdoorbench.FIXED, backdoorbench.OWN_OTHERWISE)
    for own in set().union(*tables):
        for there in set().union(*(table.get(own, ()) for table in tables)):
            assert there not in config_of(own).__dataclass_fields__, (own, there)


def test_what_a_user_of_backdoorbench_types_is_answered(tmp_path, capsys):
    def answer(name, *words):
        with pytest.raises(ConfigError) as error:
            parsing.parse(config_of(name), words, script=f"attack/{name}.py")
        return str(error.value)

    their = "../config/attack/prototype/cifar10.yaml"
    assert "is the default here" in answer("badnet", "--yaml_path", their)
    their = "../config/attack/badnet/default.yaml"
    assert "config/attack/badnet.yaml" in answer("badnet", "--bd_yaml_path", their)
    assert "--trigger_path" in answer("badnet", "--patch_mask_path", "a.png")
    assert "always 1,2" in answer("ctrl", "--trigger_channels", "0", "1")
    file = tmp_path / "a.yaml"
    file.write_text("s: 0.4\nk: 6\nsteplr_milestones: [1, 2]\ngrid_rescale: 1.0\n")
    got = parsing.parse(config_of("wanet"), ["--yaml_path", str(file)], script="attack/wanet.py")
    assert (got.strength, got.grid_points) == (0.4, 6)
    assert "ignored" in capsys.readouterr().err
    file.write_text("epochs: [1, 2]\n")
    assert "one value" in answer("badnet", "--yaml_path", str(file))


def test_help_needs_no_torch():
    code = "import convert, sys\nconvert.main(['--help'])\nconvert.main(['from-weights', '--help'])"
    command = [sys.executable, "-X", "importtime", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert all(f"{command}:" in done.stdout for command in convert.COMMANDS)
    assert "--triggered_path" in done.stdout


def test_commands_that_are_none(here, capsys):
    here("from-nowhere", code=2)
    assert "the commands are from-weights" in capsys.readouterr().err
    here("from-weights", "--trigger", "nothing", code=2)
    assert "unknown trigger" in capsys.readouterr().err
    here("from-backdoorbench", "nowhere", code=3)
    here("from-images", "nowhere", "--dataset", "digits", code=3)
