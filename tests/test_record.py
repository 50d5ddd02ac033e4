"""Records: what is written comes back, and everything that is damaged, foreign or unfinished is
refused."""

import csv
import dataclasses
import json
import os
import pickle
import shutil

import pytest
import safetensors.torch
import torch
import yaml

from antidote_bench.attack.badnet import Config as BadNet
from antidote_bench.defense.ft import Config
from antidote_bench.utils import checkpoint, evaluation, files
from antidote_bench.utils.data.memmap import MemmapImages
from antidote_bench.utils.errors import ConfigError, MissingError, RefusedError
from antidote_bench.utils.record import claim, contents
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.repair.defender import Defender
from tests.helpers import image_folders

CPU = torch.device("cpu")


@pytest.fixture
def copy(victim, tmp_path):
    """A record of one's own to damage, and the options of a defense on it."""
    shutil.copytree(victim, tmp_path / "copy")
    made = yaml.safe_load((victim / "config.yaml").read_text())
    return tmp_path / "copy", Config(
        result_file=str(tmp_path / "copy"), cache_path=made["cache_path"]
    )


def rewrite(folder, name, content):
    """Replace a file and its checksum, as someone with bad intentions would."""
    (folder / name).write_bytes(content)
    info = json.loads((folder / "record.json").read_text())
    info["files"][name] = files.sha256(folder / name)
    (folder / "record.json").write_text(json.dumps(info))


def test_round_trip(copy):
    folder, config = copy
    loaded = contents.load(folder, config, CPU)
    model, found, clean, test_sets = loaded.model, loaded.train, loaded.clean, loaded.test_sets
    saved = safetensors.torch.load_file(folder / "poison.safetensors")
    made = yaml.safe_load((folder / "config.yaml").read_text())
    index = saved["train_index"]
    assert len(index) == round(made["pratio"] * len(clean)) and (saved["train_kind"] == 1).all()
    assert (
        torch.equal(found.images[index], saved["train_images"]) and (found.labels[index] == 0).all()
    )
    rest = torch.ones(len(clean), dtype=torch.bool)
    rest[index] = False
    assert torch.equal(found.images[rest], clean.images[rest]) and torch.equal(
        found.labels[rest], clean.truth[rest]
    )
    assert torch.equal(found.truth, found.labels), (
        "the training set does not tell what was poisoned"
    )
    assert not torch.equal(found.images[index], clean.images[index]), (
        "the clean set is not the stamped one"
    )
    assert (
        0 not in test_sets.backdoor.truth
        and (test_sets.backdoor.labels == 0).all()
        and len(test_sets.backdoor) == (test_sets.test.truth != 0).sum()
    )
    assert torch.equal(test_sets.test.truth[saved["test_index"]], test_sets.backdoor.truth)
    assert (test_sets.backdoor.images[:, :, 29:, 29:] == 255).all()
    assert (
        torch.equal(test_sets.target.truth, test_sets.target.labels)
        and len(test_sets.target) == (test_sets.test.truth == 0).sum()
    )
    assert (
        torch.equal(test_sets.test.truth[saved["target_index"]], test_sets.target.truth)
        and (test_sets.target.images[:, :, 29:, 29:] == 255).all()
    )
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    info = json.loads((folder / "record.json").read_text())
    assert set(info["files"]) == {path.name for path in folder.iterdir() if path.is_file()} - {
        "record.json"
    }


def test_what_a_record_says(victim):
    info = json.loads((victim / "record.json").read_text())
    assert info["format"] == 1 and info["seeds"] == {"random_seed": 0, "poison_seed": 0}
    assert (
        {"torch", "torchvision", "numpy", "python"} <= set(info["versions"])
        and info["seconds"] > 0
        and info["peak_mb"] > 0
    )
    (row,) = csv.DictReader(open(victim / "results.csv"))
    assert row["defense"] == "none" and float(row["asr"]) + float(row["ra"]) <= 1
    assert (
        float(row["acc"]) > 0.9
        and float(row["asr"]) > 0.9
        and row["n_poison"] == "130"
        and row["precision"] in ("bf16", "fp32")
    )
    assert not (victim / "state").exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "poison.safetensors", "config.yaml", "results.csv", "preview.png"]
)
def test_changed_file(copy, name):
    folder, config = copy
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(RefusedError, match=f"{name} is not the file that was saved"):
        contents.load(folder, config, CPU)


@pytest.mark.parametrize("name", ["model.safetensors", "poison.safetensors", "config.yaml"])
def test_missing_and_truncated_files(copy, name):
    folder, config = copy
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(RefusedError, match=name):
        contents.load(folder, config, CPU)
    (folder / name).unlink()
    with pytest.raises(RefusedError, match=f"{name} is missing"):
        contents.load(folder, config, CPU)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/antidote-was-here",)


@pytest.mark.parametrize("name", ["model.safetensors", "poison.safetensors"])
def test_a_pickle_is_refused_and_not_run(copy, name):
    folder, config = copy
    rewrite(folder, name, pickle.dumps(Bomb()))
    with pytest.raises(RefusedError, match="not a safetensors file"):
        contents.load(folder, config, CPU)
    assert not os.path.exists("/tmp/antidote-was-here")


def test_yaml_runs_no_code(copy):
    folder, config = copy
    rewrite(
        folder,
        "config.yaml",
        b"dataset: !!python/object/apply:os.system ['touch /tmp/antidote-was-here']\n",
    )
    with pytest.raises(RefusedError, match="config.yaml"):
        contents.load(folder, config, CPU)
    assert not os.path.exists("/tmp/antidote-was-here")


def test_record_json(copy):
    folder, config = copy
    path, info = folder / "record.json", json.loads((folder / "record.json").read_text())
    for text, sentence in (
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps(info | {"format": 3}), "format 3"),
        (json.dumps(info | {"kind": "defense"}), "not the record of an attack"),
        (json.dumps(info | {"files": {}}), "is missing"),
        (json.dumps(info | {"files": info["files"] | {"../../secret": "0"}}), "missing"),
    ):
        path.write_text(text)
        with pytest.raises(RefusedError, match=sentence):
            contents.load(folder, config, CPU)
    path.unlink()
    with pytest.raises(RefusedError, match="no record.json"):
        contents.load(folder, config, CPU)
    (folder / "state").mkdir()
    with pytest.raises(RefusedError, match="has not finished"):
        contents.load(folder, config, CPU)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t | {"train_index": t["train_index"] + 100_000}, "train_index must be int64"),
        (lambda t: {key: value for key, value in t.items() if key != "test_truth"}, "test_truth"),
        (
            lambda t: t | {"train_images": t["train_images"][:, :, :8].contiguous()},
            "train_images must be uint8",
        ),
    ],
)
def test_poison_that_does_not_fit(copy, change, sentence):
    folder, config = copy
    rewrite(
        folder,
        "poison.safetensors",
        safetensors.torch.save(change(safetensors.torch.load_file(folder / "poison.safetensors"))),
    )
    with pytest.raises(RefusedError, match=sentence):
        contents.load(folder, config, CPU)


def test_weights_of_another_model(copy):
    folder, config = copy
    rewrite(folder, "model.safetensors", safetensors.torch.save({"x": torch.zeros(1)}))
    with pytest.raises(RefusedError, match="damaged"):
        contents.load(folder, config, CPU)


def test_made_on_a_set_of_another_size(copy):
    folder, config = copy
    info = json.loads((folder / "record.json").read_text())
    info["data"]["train"] = 1298
    (folder / "record.json").write_text(json.dumps(info))
    with pytest.raises(RefusedError, match="train is 1298, but here it is 1297.*--dataset_path"):
        contents.load(folder, config, CPU)


def test_missing_record():
    with pytest.raises(MissingError, match="nowhere.*record/nowhere"):
        Config(result_file="nowhere").record  # noqa: B018


def test_begin(tmp_path):
    folder, config = tmp_path / "run", Config(result_file="x")
    assert claim.begin(folder, config, kind="defense") and claim.begin(
        folder, config, kind="defense"
    ), "an unfinished run goes on"
    assert claim.begin(folder, Config(result_file="x", epochs=4), kind="defense"), (
        "a run that got nowhere stands in nobody's way"
    )
    assert claim.begin(folder, config, kind="defense")
    files.write(folder / "state" / "log.csv", "")
    assert claim.begin(folder, Config(result_file="x", epochs=4), kind="defense"), "no checkpoint"
    assert claim.begin(folder, config, kind="defense")
    files.write(folder / "state" / "finetune.safetensors", "")
    with pytest.raises(ConfigError, match="epochs 100 there and 3 here.*--overwrite"):
        claim.begin(folder, Config(result_file="x", epochs=3), kind="defense")
    assert claim.begin(folder, Config(result_file="x", epochs=3, overwrite=True), kind="defense")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("!")
    with pytest.raises(RefusedError, match="--save_folder_name"):
        claim.begin(foreign, config, kind="defense")


def test_what_goes_on_and_what_starts_again(tmp_path):
    folder, config = tmp_path / "run", Config(result_file="x")
    kept = folder / "state" / "finetune.safetensors"

    def progress_survives(options, victim):
        assert claim.begin(folder, options, kind="defense", victim=victim)
        found = kept.exists()
        kept.write_bytes(b"")
        return found

    assert not progress_survives(config, "v1")
    assert progress_survives(config, "v1")
    assert not progress_survives(config, "v2"), "a checkpoint of another victim is of no use"
    files.write(folder / "state" / "log.csv", "")
    layout.finish(
        folder,
        {"model.safetensors": b"1", "results.csv": "2"},
        {"victim_sha256": "v2"},
        kind="defense",
    )
    assert not claim.begin(folder, config, kind="defense", victim="v2")
    other = Config(result_file="x", epochs=3, overwrite=True)
    assert not progress_survives(other, "v2")
    assert progress_survives(other, "v2"), "an interrupted run that overwrites goes on"
    assert progress_survives(Config(result_file="x", epochs=3), "v2"), (
        "also without saying so again"
    )
    assert not claim.begin(folder, config, kind="defense", victim="v2"), (
        "the old run is still complete"
    )
    with pytest.raises(ConfigError, match="another victim"):
        claim.begin(folder, config, kind="defense", victim="v3")


def test_nothing_is_half_written(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_run_cut_off_in_its_last_step_is_completed(tmp_path, monkeypatch):
    folder, config = tmp_path / "run", Config(result_file="x")
    contents = {"model.safetensors": b"1", "results.csv": "2"}
    assert claim.begin(folder, config, kind="defense")
    files.write(folder / "state" / "log.csv", "3")
    real, left = os.replace, [6]

    def cut_off(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        layout.finish(folder, contents, {}, kind="defense")
    monkeypatch.setattr(os, "replace", real)
    with pytest.raises(RefusedError, match="not finished"):
        layout.verify(folder, "defense")
    assert not claim.begin(folder, config, kind="defense"), "nothing is left to do"
    layout.verify(folder, "defense")
    assert not (folder / "state").exists()


def test_overwriting_keeps_the_old_run_until_the_new_one_is_complete(copy):
    folder, _ = copy
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    made = yaml.safe_load((folder / "config.yaml").read_text())
    from antidote_bench.attack.badnet import Config as BadNet

    assert claim.begin(folder, BadNet(**made | {"overwrite": True, "epochs": 2}), kind="attack")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    layout.verify(folder, "attack")


def test_a_defenses_own_files_belong_to_its_record(tmp_path):
    """They are listed, survive an interruption, and go with the run that made them."""
    folder, options = tmp_path / "run", Config(result_file="x")

    def one_run(config, own):
        assert claim.begin(folder, config, kind="defense")
        files.write(folder / "state/log.csv", "stage\n")
        made = Defender(*[None] * 6, folder / "state", None, None)
        for name in own:
            made.keep(
                name, {"values": torch.arange(3)} if name.endswith(".safetensors") else b"image"
            )
        layout.finish(
            folder,
            {layout.WEIGHTS: b"", "results.csv": "a\n", **layout.own_files(folder / "state")},
            {},
            kind="defense",
        )
        assert set(layout.verify(folder, "defense")["files"]) == {
            path.name for path in folder.iterdir()
        } - {"record.json"}
        return {path.name for path in folder.iterdir()} - {
            "record.json",
            "config.yaml",
            "log.csv",
            "results.csv",
            layout.WEIGHTS,
        }

    assert one_run(options, ["a.safetensors", "b.png"]) == {"a.safetensors", "b.png"}
    assert (
        checkpoint.read_tensors(folder / "a.safetensors")["values"].tolist() == [0, 1, 2]
        and (folder / "b.png").read_bytes() == b"image"
    )
    assert one_run(Config(result_file="x", epochs=3, overwrite=True), ["c.png"]) == {"c.png"}, (
        "no file of the run before is left"
    )


def test_an_older_record_has_no_images_of_the_target(copy):
    folder, config = copy
    held = safetensors.torch.load_file(folder / "poison.safetensors")
    rewrite(
        folder,
        "poison.safetensors",
        safetensors.torch.save(
            {name: part for name, part in held.items() if not name.startswith("target")}
        ),
    )
    test_sets = contents.load(folder, config, CPU).test_sets
    assert test_sets.target is None and evaluation.asr_of_all(0.5, None, test_sets) is None


def test_a_record_from_before_an_option_existed_has_its_default(victim, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(victim, folder)
    made = yaml.safe_load((folder / "config.yaml").read_text())
    config = BadNet(**made)
    rewrite(
        folder,
        "config.yaml",
        yaml.safe_dump(
            {key: value for key, value in made.items() if key not in ("nesterov", "pad")}
        ).encode(),
    )
    assert not claim.begin(folder, config, kind="attack")
    with pytest.raises(ConfigError, match=r"configuration \(pad 4 there and 2 here\);"):
        claim.begin(folder, dataclasses.replace(config, pad=2), kind="attack")


def test_a_set_above_the_budget_gives_the_same_record(copy):
    folder, config = copy
    loaded = contents.load(folder, config, CPU)
    other = contents.load(folder, dataclasses.replace(config, resident_gb=0), CPU)
    found, clean, test_sets = loaded.train, loaded.clean, loaded.test_sets
    stored, plain, same = other.train, other.clean, other.test_sets
    assert isinstance(stored.images, MemmapImages) and isinstance(same.test.images, MemmapImages)
    assert torch.equal(stored.images[:], found.images) and torch.equal(
        plain.images[:], clean.images
    )
    assert torch.equal(stored.labels, found.labels) and torch.equal(
        same.backdoor.images, test_sets.backdoor.images
    )


def changed(name, function):
    """A change of one tensor of poison.safetensors."""
    return lambda tensors: tensors | {name: function(tensors[name])}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (changed("test_labels", lambda t: t.float() * torch.nan), "test_labels must be int64"),
        (
            changed("test_labels", lambda t: t + 99),
            "test_labels must be int64, 450 of them, 0 to 9",
        ),
        (changed("test_labels", lambda t: t - 1), "test_labels must be int64"),
        (changed("test_labels", lambda t: t[:, None].clone()), "test_labels must be int64"),
        (changed("train_labels", lambda t: t[:-1].clone()), "train_labels must be int64"),
        (changed("test_images", lambda t: t.float()), "test_images must be uint8"),
        (changed("test_images", lambda t: t[:, :1].contiguous()), "test_images must be uint8"),
        (changed("test_index", lambda t: t.clamp(max=3)), "must not name an image twice"),
        (changed("train_kind", lambda t: t + 5), "train_kind must be int64"),
        (changed("target_truth", lambda t: t + 10), "target_truth must be int64"),
    ],
)
def test_tensors_are_checked_by_a_schema(copy, change, sentence):
    folder, config = copy
    tensors = change(safetensors.torch.load_file(folder / "poison.safetensors"))
    rewrite(folder, "poison.safetensors", safetensors.torch.save(tensors))
    with pytest.raises(RefusedError, match=sentence):
        contents.load(folder, config, CPU)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "x" * 200_000}, "model must be the name of a network"),
        ({"model": None}, "model must be"),
        ({"image_size": float("nan")}, "image_size must be null or a whole number"),
        ({"image_size": 10**30}, "image_size must be"),
        ({"image_size": 64}, "image_size is not that of record.json"),
        ({"width": -1}, "width must be"),
        ({"dataset": "../x"}, "dataset must be one of"),
        ({"dataset_path": 3}, "dataset_path must be text"),
        ({"model": ["resnet9"] * 3}, "a list or a mapping"),
    ],
)
def test_options_are_checked_by_a_schema(copy, options, sentence):
    folder, config = copy
    made = yaml.safe_load((folder / "config.yaml").read_text())
    rewrite(folder, "config.yaml", yaml.safe_dump(made | options).encode())
    with pytest.raises(RefusedError, match=sentence) as refused:
        contents.load(folder, config, CPU)
    assert len(str(refused.value)) < 1000


def test_aliases_are_not_expanded(copy):
    """A few hundred bytes that stand for 9 to the power of 9 values."""
    folder, config = copy
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for last, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n"
    rewrite(folder, "config.yaml", f"{bomb}model: *i\n".encode())
    with pytest.raises(RefusedError, match="config.yaml: it holds an alias"):
        contents.load(folder, config, CPU)


@pytest.mark.parametrize(
    "change",
    [
        {"data": None},
        {"data": {"train": "many"}},
        {"name": 3},
        {"data": {"train": 1, "test": 1, "classes": 2, "size": 8, "fingerprint": "x"}},
        {"files": {"config.yaml": 3}},
    ],
)
def test_facts_are_checked_by_a_schema(copy, change):
    folder, config = copy
    info = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(info | change))
    with pytest.raises(RefusedError, match="record.json"):
        contents.load(folder, config, CPU)


def test_a_deeply_nested_record_is_refused(copy):
    folder, config = copy
    (folder / "record.json").write_text("[" * 100_000)
    with pytest.raises(RefusedError, match="record.json cannot be read"):
        contents.load(folder, config, CPU)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.csv", b""),
        ("results.csv", b"acc,asr\n"),
        ("results.csv", b"acc,asr\n\xff,1\n"),
        ("results.csv", b"acc,asr\n" + b"0" * 200_000 + b",1\n"),
        ("results.csv", b"acc,asr,ra\nnan,1,0\n"),
        ("log.csv", b"stage\n"),
        ("log.csv", b"stage,epoch\nfinal\n"),
    ],
)
def test_tables_are_checked_by_a_schema(copy, name, content):
    folder, _ = copy
    rewrite(folder, name, content)
    with pytest.raises(RefusedError, match="is damaged: results.csv or log.csv"):
        contents.read_measures(folder, contents.open_record(folder))


def test_other_weights_get_no_figures_of_the_old_ones(copy, places, run):
    """Weights and checksum are exchanged: the model answers otherwise than results.csv says."""
    folder, _ = copy
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    shuffled = {
        name: tensor * 0 if tensor.ndim == 2 else tensor for name, tensor in weights.items()
    }
    rewrite(folder, "model.safetensors", safetensors.torch.save(shuffled))
    done = run("defense/clp.py", *places, "--result_file", folder, code=4)
    assert "results.csv says" in done.first and "model.safetensors reaches" in done.first
    next(value for value in weights.values() if value.is_floating_point()).fill_(torch.nan)
    rewrite(folder, "model.safetensors", safetensors.torch.save(weights))
    done = run("defense/clp.py", *places, "--result_file", folder, code=4)
    assert "must hold finite numbers" in done.first


@pytest.mark.parametrize("name", ["defense", "defense/clp", "defense/clp/state", "defense/.shared"])
def test_nothing_is_written_through_a_link(copy, places, run, tmp_path, name):
    folder, _ = copy
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(folder / "defense", ignore_errors=True)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(elsewhere)
    done = run("defense/clp.py", *places, "--result_file", folder, code=4)
    assert "is a link" in done.first and not list(elsewhere.iterdir())


def test_links_and_pipes_are_no_files_of_a_record(copy, tmp_path):
    folder, config = copy
    for make in (lambda path: path.symlink_to(tmp_path / "moved"), os.mkfifo):
        (folder / "model.safetensors").rename(tmp_path / "moved")
        make(folder / "model.safetensors")
        with pytest.raises(RefusedError, match="model.safetensors is"):
            contents.load(folder, config, CPU)
        (folder / "model.safetensors").unlink()
        (tmp_path / "moved").rename(folder / "model.safetensors")
    contents.load(folder, config, CPU)


def test_files_are_not_read_beyond_a_limit(copy):
    folder, config = copy
    with open(folder / "results.csv", "wb") as file:
        file.truncate(2**30)
    with pytest.raises(RefusedError, match="results.csv is larger than 1024 KB"):
        contents.load(folder, config, CPU)


def test_what_was_verified_is_what_is_loaded(copy):
    """The victim is replaced after its record was opened."""
    folder, config = copy
    info = contents.open_record(folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    rewrite(
        folder,
        "model.safetensors",
        safetensors.torch.save({name: tensor + 1 for name, tensor in weights.items()}),
    )
    with pytest.raises(RefusedError, match="model.safetensors was changed"):
        contents.load(folder, config, CPU, info)


def test_the_data_path_of_a_record_from_others_is_not_followed(copy, tmp_path):
    folder, config = copy
    made = yaml.safe_load((folder / "config.yaml").read_text())
    rewrite(
        folder,
        "config.yaml",
        yaml.safe_dump(made | {"dataset": "folder", "dataset_path": "/etc"}).encode(),
    )
    other = dataclasses.replace(config, cache_path=str(tmp_path / "cache"))
    with pytest.raises(MissingError, match="name the place of its data set with --dataset_path"):
        contents.load(folder, other, CPU)


def test_other_data_is_another_run(tmp_path, run):
    """The same folder name and options on other images: refused, neither "done" nor resumed."""
    one, other = image_folders(tmp_path / "one", 0), image_folders(tmp_path / "other", 60)
    more = image_folders(tmp_path / "more", 0, count=14)
    renamed = image_folders(tmp_path / "renamed", 0, classes=("a", "c"))
    base = ["--record_path", tmp_path / "record", "--cache_path", tmp_path / "cache"]
    words = ["attack/badnet.py", *base, "--dataset", "folder", "--image_size", 16, "--model"]
    words += ["resnet9", "--width", 4, "--epochs", 1, "--batch_size", 8, "--pratio", 0.25]
    words += ["--save_folder_name", "x", "--dataset_path"]
    run(*words, one)
    assert "already done" in run(*words, one).stdout
    moved = shutil.copytree(one, tmp_path / "moved")
    assert "already done" in run(*words, moved).stdout, "the same data elsewhere is the same run"
    done = run(*words, other, code=2)
    assert "holds a run on other data (other images or labels)" in done.first
    assert "train 24 there and 28 here" in run(*words, more, code=2).first
    repair = ["defense/clp.py", *base, "--result_file", "x", "--dataset_path"]
    run(*repair, moved)
    done = run(*repair, other, code=4)
    assert "has other pixels or labels" in done.first and "--allow_other_data" in done.first
    assert "class 'b', which is 'c' here" in run(*repair, renamed, code=4).first
    run(*repair, other, "--allow_other_data", "true", "--save_folder_name", "forced")


def test_an_interrupted_run_is_not_resumed_on_other_data(tmp_path):
    folder = tmp_path / "run"
    config = BadNet(cache_path=str(tmp_path / "cache"))
    facts = {"train": 8, "test": 8, "classes": 2, "size": 8, "fingerprint": {"train": "1"}}
    assert claim.begin(folder, config, kind="attack", data=facts)
    files.write(folder / "state/train.safetensors", b"")
    assert claim.begin(folder, config, kind="attack", data=facts)
    assert (folder / "state/train.safetensors").exists()
    with pytest.raises(ConfigError, match="holds a run on other data .other images or labels.*"):
        claim.begin(folder, config, kind="attack", data=facts | {"fingerprint": {"train": "2"}})
    with pytest.raises(ConfigError, match="train 8 there and 9 here"):
        claim.begin(folder, config, kind="attack", data=facts | {"train": 9})


def test_a_checkpoint_from_elsewhere_is_said_aloud(tmp_path, capsys):
    folder = tmp_path / "run"
    ours, theirs = (BadNet(cache_path=str(tmp_path / name)) for name in ("ours", "theirs"))
    assert claim.begin(folder, theirs, kind="attack", data={})
    files.write(folder / "state/train.safetensors", b"")
    assert claim.begin(folder, theirs, kind="attack", data={})
    assert not capsys.readouterr().err
    assert claim.begin(folder, ours, kind="attack", data={})
    assert "was not made with the cache folder" in capsys.readouterr().err


def test_a_folder_has_one_owner(tmp_path):
    folder = tmp_path / "run"
    with claim.owned(folder):
        with pytest.raises(ConfigError, match="a run is under way in .*run: wait for its end"):
            with claim.owned(folder):
                pass
    with claim.owned(folder):
        pass
    assert not list(tmp_path.iterdir()), "nothing is left over"


def test_a_record_from_before_an_option_was_published_has_the_older_form(tmp_path):
    from antidote_bench.defense.ft_sam import Config as FTSAM

    folder = tmp_path / "run"
    older = FTSAM(result_file="x", cache_path=str(tmp_path / "cache"), smoothing="all")
    assert claim.begin(folder, older, kind="defense", victim="v")
    files.write(folder / "state/log.csv", "stage\n")
    layout.finish(
        folder,
        {"model.safetensors": b"1", "results.csv": "2"},
        {"victim_sha256": "v"},
        kind="defense",
    )
    made = yaml.safe_load((folder / "config.yaml").read_text())
    del made["smoothing"]
    rewrite(folder, "config.yaml", yaml.safe_dump(made).encode())
    assert not claim.begin(folder, older, kind="defense", victim="v")
    with pytest.raises(ConfigError, match="smoothing all there and others here"):
        claim.begin(
            folder, dataclasses.replace(older, smoothing="others"), kind="defense", victim="v"
        )
