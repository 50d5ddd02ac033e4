"""Images above 64 pixels: their defaults and crops, what a dry run says they cost, and records
whose images are compressed."""

import contextlib
import dataclasses
import importlib
import json
import math
import shlex
import time
import tracemalloc
import types
import zlib

import pytest
import safetensors.torch
import torch
import yaml
from torch import nn
from torchvision.transforms.v2 import functional as tv

from antidote_bench import models
from antidote_bench.attack.badnet import Config as BadNet
from antidote_bench.utils import config, parsing, train
from antidote_bench.utils.data import dataset, loader
from antidote_bench.utils.errors import ConfigError, RefusedError
from antidote_bench.utils.protocol import estimate, plan
from antidote_bench.utils.record import claim, compressed, contents, results
from tests.helpers import image_folders
from tests.test_record import rewrite

CPU = torch.device("cpu")
FOLDER = ["--dataset", "folder", "--dataset_path", "x", "--image_size"]


def parse(*words, of=BadNet):
    return parsing.parse(of, [str(word) for word in words])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------- defaults ----------


@pytest.mark.parametrize(
    "words",
    [
        [*FOLDER, 65],
        [*FOLDER, 224, "--epochs", 3, "--mirror", "false"],
        ["--dataset", "cifar10", "--image_size", 128],
        [*FOLDER, 224, "--width", "null"],
    ],
)
def test_large_images_have_a_network_and_a_recipe_of_their_own(words):
    found = parse(*words)
    assert (found.model, found.recipe, found.crop) == ("resnet18", "imagenet", "resized")
    assert found.mirror is ("--mirror" not in words)
    assert results.recipe(found).startswith("imagenet: ")
    assert "crop resized crop_area 0.35 mirror" in results.recipe(found)


@pytest.mark.parametrize(
    ("words", "model", "recipe"),
    [
        ([*FOLDER, 64], "preactresnet18", "backdoorbench"),
        (["--dataset", "tiny"], "preactresnet18", "backdoorbench"),
        ([*FOLDER, 224, "--model", "resnet34"], "resnet34", "backdoorbench"),
        ([*FOLDER, 224, "--recipe", "fast"], "preactresnet18", "fast"),
        ([*FOLDER, 224, "--width", 16], "preactresnet18", "backdoorbench"),
        (["--image_size", 96], "resnet9", "backdoorbench"),  # config/dataset/digits.yaml names it
    ],
)
def test_what_is_named_stays(words, model, recipe):
    found = parse(*words)
    assert (found.model, found.recipe, found.crop) == (model, recipe, "shift")


def test_a_file_of_options_names_a_model_too(tmp_path):
    (tmp_path / "a.yaml").write_text("model: resnet34\n")
    assert parse(*FOLDER, 224, "--yaml_path", tmp_path / "a.yaml").recipe == "backdoorbench"
    (tmp_path / "a.yaml").write_text("image_size: 224\ndataset: folder\n")
    assert parse("--yaml_path", tmp_path / "a.yaml").model == "resnet18"


def test_a_script_says_what_was_chosen_for_large_images(capsys):
    def said(*words):
        parsing.parse(BadNet, [*map(str, FOLDER), *words], script="attack/badnet.py")
        return capsys.readouterr().err

    assert said("224") == (
        "note: above 64 pixels the network is resnet18 and the recipe is imagenet, unless --model "
        "or --recipe names another\n"
    )
    assert said("64") == said("224", "--model", "resnet18") == ""


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--model", "resnet18"],
        ["--recipe", "imagenet"],
        ["--model", "resnet18", "--recipe", "imagenet"],
        ["--recipe", "backdoorbench"],
        ["--crop", "shift"],
        ["--mirror", "null", "--crop_area", "0.08"],
        ["--width", "16"],
    ],
)
def test_a_run_on_large_images_runs_again(words, tmp_path):
    first = parse(*FOLDER, 224, *words)
    _, _, *again = shlex.split(parsing.command("attack/badnet.py", first))
    assert parse(*again) == first
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(first.plain()))
    assert parse("--yaml_path", tmp_path / "config.yaml") == first


def test_the_crop_is_part_of_a_run_and_older_runs_have_the_old_one():
    usual, resized = parse(*FOLDER, 48), parse(*FOLDER, 48, "--crop", "resized")
    assert not {"crop", "crop_area", "mirror"} & usual.identity().keys()
    assert resized.identity() == {**usual.identity(), "crop": "resized"}
    mirrored = parse(*FOLDER, 48, "--mirror", "true")
    assert mirrored.identity() == {**usual.identity(), "mirror": True}
    older = {
        name: value
        for name, value in parse(*FOLDER, 48, "--pad", 2).plain().items()
        if name not in ("crop", "crop_area", "mirror")
    }
    assert claim.identity_in(older, usual) == {**usual.identity(), "pad": 2}
    with pytest.raises(ConfigError, match="--pad has no effect with --crop resized"):
        parse(*FOLDER, 48, "--crop", "resized", "--pad", 2)
    with pytest.raises(ConfigError, match="--crop_area has no effect with --crop shift"):
        parse(*FOLDER, 48, "--crop_area", 0.5)


# ---------- crops ----------


@pytest.mark.parametrize("side", [17, 70])
def test_a_batch_is_cropped_as_torchvision_crops_each_image(side):
    images = torch.randint(0, 256, (12, 3, side, side), dtype=torch.uint8, generator=seeded())
    actual = loader.random_resized_crop(images, 0.08, seeded(1))
    again = seeded(1)
    boxes = loader.draw_boxes(
        side,
        side,
        (0.08, 1.0),
        (3 / 4, 4 / 3),
        lambda columns: torch.rand(len(images), columns, generator=again),
    )
    boxes = torch.stack(boxes, 1).long().tolist()
    assert len({tuple(box) for box in boxes}) > 8 and min(box[2] * box[3] for box in boxes) > 0
    expected = [
        tv.resized_crop(image.double(), *box, [side, side], antialias=True)
        for image, box in zip(images, boxes, strict=True)
    ]
    assert actual.dtype == torch.uint8
    assert (actual - torch.stack(expected)).abs().max() <= 0.5 + 1e-3  # rounded, and no more
    in_unit = loader.random_resized_crop(images / 255, 0.08, seeded(1))
    torch.testing.assert_close(in_unit, torch.stack(expected).float() / 255, atol=1e-5, rtol=0)


def test_the_whole_image_is_a_crop_too():
    images = torch.randint(0, 256, (5, 3, 20, 20), dtype=torch.uint8, generator=seeded())
    assert torch.equal(loader.resized_crops(
        images.float(), *(torch.full((5,), value) for value in (0.0, 0.0, 20.0, 20.0))
    ), images.float())  # fmt: skip
    found = loader.random_resized_crop(images.repeat(40, 1, 1, 1), 0.9, seeded(2))
    assert (found == images.repeat(40, 1, 1, 1)).flatten(1).all(1).any()


def test_training_crops_and_mirrors_as_its_options_say():
    spec = dataset.Spec("x", 2, 24, (0.5,) * 3, (0.5,) * 3, False, {})
    images = torch.zeros(200, 3, 24, 24, dtype=torch.uint8)
    images[..., :12] = 200  # bright on the left
    labels = torch.zeros(200, dtype=torch.long)
    split = dataset.Split(images, labels, labels)

    def shown(**changes):
        options = dataclasses.replace(parse(*FOLDER, 24), **changes)
        changed = train.augmentation_of(options, spec, split)(images, seeded())
        return (changed[..., :12].float().mean((1, 2, 3)) < 100).float().mean()

    assert shown() == 0
    assert 0.4 < shown(mirror=True) < 0.6
    assert shown(mirror=False) == 0
    crops = train.augmentation_of(parse(*FOLDER, 24, "--crop", "resized"), spec, split)
    bright = (crops(images, seeded()) > 100).float().mean((1, 2, 3))
    assert bright.min() < 0.1 and bright.max() == 1, "some crops show one half alone"


def test_mirror_says_it_for_the_defenses_of_a_victim_too(tmp_path):
    place = image_folders(tmp_path / "a")
    options = types.SimpleNamespace(
        dataset_path=None, cache_path=tmp_path / "cache", download=False, resident_gb=None
    )
    made = {"dataset": "folder", "dataset_path": str(place), "image_size": 16}
    for mirror in (None, True, False):
        found = dataset.load(options, CPU, victim={**made, "mirror": mirror})
        assert found.spec.flip is bool(mirror)


# ---------- what a run costs ----------


class Plain(nn.Module):
    """A network whose saved bytes are known."""

    def __init__(self, side, hidden=50, classes=4):
        super().__init__()
        self.first = nn.Linear(3 * side * side, hidden)
        self.last = nn.Linear(hidden, classes)

    def forward(self, images):
        return self.last(self.first(images.flatten(1)).relu())


def test_memory_grows_with_the_batch_by_what_is_saved_for_the_backward_pass():
    model = Plain(8)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # an image, the hidden layer, the log-probabilities, the label
    each = 4 * (3 * 8 * 8 + 50 + 4) + 8
    cost = estimate.of_step(model, 40, 4, 8, "fp32")
    assert cost.measured == 40 and not cost.is_least and cost.seconds > 0
    assert cost.memory == int(3 * weights + 1.25 * each * 40)
    assert all(parameter.grad is None for parameter in model.parameters())


class Slow(Plain):
    """A network that takes a hundredth of a second for every image."""

    def forward(self, images):
        time.sleep(0.01 * len(images))
        return super().forward(images)


def test_measuring_ends_in_time_and_is_extrapolated(monkeypatch):
    monkeypatch.setattr(estimate, "SECONDS", 0.5)
    begin = time.perf_counter()
    cost = estimate.of_step(Slow(8), 1000, 4, 8, "fp32")
    assert time.perf_counter() - begin < 3  # half a second on an idle machine
    assert cost.measured in (2, 8, 32) and 10 <= cost.seconds < 60


def test_a_step_that_takes_too_long_is_broken_off(monkeypatch):
    monkeypatch.setattr(estimate, "LONGEST", 0.05)

    class Endless(Plain):
        def forward(self, images):
            hidden = images.flatten(1)
            for _ in range(100):
                time.sleep(0.01)
                hidden = hidden.sin()
            return self.last(self.first(hidden))

    cost = estimate.of_step(Endless(8), 20, 4, 8, "fp32")
    assert cost.is_least and cost.measured == 2 and cost.seconds == pytest.approx(0.5)


def test_what_does_not_train_is_refused(tmp_path):
    normed = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    with pytest.raises(ConfigError, match="one image of 32 pixels at a time: --batch_size"):
        estimate.of_step(normed, 1, 3, 32, "fp32")
    with pytest.raises(ConfigError, match="--batch_size must be 2"):
        estimate.require_trainable(lambda: normed, 1, 32)
    estimate.require_trainable(lambda: 1 / 0, 2, 32)  # is not even built
    before = [value.clone() for value in normed.state_dict().values()]
    estimate.require_trainable(lambda: normed, 2, 8)
    assert all(map(torch.equal, before, normed.state_dict().values()))
    with pytest.raises(ConfigError, match=r"images of 4 pixels \(.*Kernel size.*--image_size"):
        estimate.of_step(nn.Conv2d(3, 3, 7), 2, 3, 4, "fp32")


def main(*words, of="attack.badnet"):
    """Run a script here, with these options."""
    script = importlib.import_module(f"antidote_bench.{of}")
    script.main(parse(*words, of=script.Config))


@pytest.fixture
def own(tmp_path):
    """The options of a short attack on own images of 16 pixels."""
    place = image_folders(tmp_path / "images")
    return [
        "--dataset", "folder", "--dataset_path", place, "--image_size", 16, "--model", "resnet9",
        "--width", 4, "--epochs", 1, "--pratio", 0.25, "--batch_size", 8, "--device", "cpu",
        "--record_path", tmp_path / "record", "--cache_path", tmp_path / "cache",
    ]  # fmt: skip


def test_a_dry_run_says_what_it_would_cost_and_does_nothing(own, tmp_path, capsys):
    main(*own, "--image_size", 72, "--dry_run")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert "for a step on 8 images" in lines["time"] and lines["time"].startswith("about")
    assert " on cpu, of which images take " in lines["memory"] and "GB are free" in lines["memory"]
    weights = 4 * sum(value.numel() for value in _resnet9().state_dict().values())
    # 6 poisoned and 24 tested images; 48 decoded ones
    assert f"{(30 * 3 * 72**2 + weights) / 1e6:.0f} MB for the record" in lines["disk"]
    assert f"{48 * 3 * 72**2 / 1e6:.0f} MB for decoded images" in lines["disk"]


def _resnet9():
    spec = dataset.Spec("x", 2, 72, (0.5,) * 3, (0.5,) * 3, False, {})
    labels = torch.zeros(2, dtype=torch.long)
    images = torch.zeros(2, 3, 72, 72, dtype=torch.uint8)
    return train.build_model("resnet9", 4, spec, dataset.Split(images, labels, labels))


def test_a_dry_run_of_a_defense_does_so_too(own, tmp_path, capsys):
    main(*own, "--save_folder_name", "v")
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    words = ["--result_file", "v", *own[-4:], "--device", "cpu", "--clean_count", 6]
    main(*words, "--dry_run", of="defense.ft")
    out = capsys.readouterr().out
    assert "for 100 epochs of plain training on 6 clean images" in out
    assert "memory   about" in out and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("dry", [["--dry_run"], []])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "vgg19_bn", "--image_size", 25], "at least 32 pixels, not 25"),
        (["--model", "airbench", "--image_size", 8], "at least 9 pixels, not 8"),
        (["--model", "mobilenet_v3_large", "--batch_size", 1], "--batch_size must be 2 or more"),
    ],
)
def test_a_network_that_cannot_train_is_refused_before_anything_is_made(
    words, sentence, dry, own, tmp_path
):
    words = [*own, "--width", "null", *words, *dry]
    with pytest.raises(ConfigError, match=sentence):
        main(*words)
    assert not list((tmp_path / "record").glob("*"))


def test_a_network_of_which_nothing_is_known_is_tried(own, tmp_path, monkeypatch):
    monkeypatch.delitem(models.SMALLEST, "airbench")
    with pytest.raises(ConfigError, match="does not train on images of 8 pixels"):
        main(*own, "--width", "null", "--model", "airbench", "--image_size", 8)
    assert not list((tmp_path / "record").glob("*"))


def test_times_and_sizes_in_words():
    words = [plan.duration(seconds) for seconds in (0.0123, 1.52, 80, 600, 7300, 1e5, 1e6)]
    assert words == ["12 ms", "1.5 s", "80 s", "10 min", "2.0 h", "28 h", "12 days"]
    assert [plan.size(count) for count in (4.5e7, 2.11e9)] == ["45 MB", "2.1 GB"]


# ---------- compressed images ----------


def various(count=6, side=20):
    """Smooth images, noise, and one colour."""
    line = torch.linspace(0, 255, side)
    images = torch.rand(count, 3, side, side, generator=seeded()) * 256
    images[::3] = line + 0.3 * line[:, None]
    images[1::3] = 77
    return images.clamp(0, 255).to(torch.uint8)


def as_tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def test_compressed_images_are_the_same_to_the_last_bit():
    for images in (various(), various(1, 9), various()[:0]):
        content, ends = compressed.encode(images)
        assert torch.equal(compressed.decode(content, ends, images.shape[-1]), images)
        assert content.dtype == torch.uint8 and len(content) == sum(ends[-1:])
    smooth = various(30, 64)[::3]
    assert len(compressed.encode(smooth)[0]) < 0.3 * smooth.numel()


def test_only_large_sets_of_images_are_compressed(monkeypatch):
    images = various()
    tensors = {"train_images": images, "train_index": torch.arange(6), "test_images": images}
    assert compressed.packed(tensors) is tensors
    monkeypatch.setattr(compressed, "ABOVE", 2 * images.nbytes)
    assert compressed.packed(tensors) is tensors
    monkeypatch.setattr(compressed, "ABOVE", 2 * images.nbytes - 1)
    packed = compressed.packed(tensors)
    assert packed.keys() == {
        "train_zlib", "train_zlib_ends", "train_index", "test_zlib", "test_zlib_ends",
    }  # fmt: skip
    packed["test_index"] = tensors["train_index"]
    found = compressed.unpacked(packed, 20, dict.fromkeys(compressed.PARTS, 6))
    assert torch.equal(found["train_images"], images) and torch.equal(found["test_images"], images)


def test_the_format_of_compressed_images():
    """Written out by hand: any program can read them."""
    images = various(4)
    content, ends = compressed.encode(images)
    start = 0
    for image, end in zip(images.int(), ends.tolist(), strict=True):
        colours = torch.stack([image[0] - image[1], image[1], image[2] - image[1]])
        above = torch.cat([torch.zeros_like(colours[:, :1]), colours[:, :-1]], 1)
        vertical = colours - above
        before = torch.cat([torch.zeros_like(vertical[..., :1]), vertical[..., :-1]], 2)
        expected = (vertical - before) % 256
        found = zlib.decompress(content[start:end].numpy().tobytes())
        assert list(found) == expected.flatten().tolist()
        start = end


IMAGE = bytes(3 * 20 * 20)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no stream",
        IMAGE,
        zlib.compress(IMAGE)[:-1],
        zlib.compress(IMAGE) + b"more",
        zlib.compress(IMAGE[:-1]),
        zlib.compress(IMAGE + b"0"),
        zlib.compress(IMAGE)[:-1] + b"!",  # a wrong checksum
    ],
)
def test_other_streams_are_refused(content):
    whole = as_tensor(zlib.compress(IMAGE) + content)
    ends = torch.tensor([len(zlib.compress(IMAGE)), len(whole)])
    with pytest.raises(ValueError, match="train_zlib: image 1 is damaged|must rise"):
        compressed.decode(whole, ends, 20, "train")


def test_a_bomb_does_not_fill_the_memory():
    """Of many zeros no more than the image has are unpacked."""
    bomb = zlib.compressobj()
    content = b"".join(bomb.compress(bytes(2**24)) for _ in range(4)) + bomb.flush()
    content = as_tensor(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match="image 0 is damaged"):
        compressed.decode(content, torch.tensor([len(content)]), 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """(a record with compressed images, the options of a defense on it, the same uncompressed)"""
    base = tmp_path_factory.mktemp("compressed")
    place = image_folders(base / "images")
    words = [
        "--dataset", "folder", "--dataset_path", place, "--image_size", 16, "--model", "resnet9",
        "--width", 4, "--epochs", 1, "--pratio", 0.25, "--batch_size", 8, "--device", "cpu",
        "--record_path", base / "record", "--cache_path", base / "cache", "--save_folder_name",
    ]  # fmt: skip
    main(*words, "raw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressed, "ABOVE", 0)
        main(*words, "small")
    Config = importlib.import_module("antidote_bench.defense.ft").Config
    options = Config(
        result_file=str(base / "record" / "small"), cache_path=str(base / "cache"), epochs=1
    )
    return base / "record" / "small", options, base / "record" / "raw"


def test_a_record_with_compressed_images_is_that_with_raw_ones(record):
    folder, options, raw = record
    read = [json.loads((place / "record.json").read_text())["format"] for place in (folder, raw)]
    assert read == [2, 1]
    stored = safetensors.torch.load_file(folder / "poison.safetensors")
    assert "train_zlib" in stored and "train_images" not in stored
    small, plain = (contents.load(place, options, CPU) for place in (folder, raw))
    assert torch.equal(small.train.images, plain.train.images)
    assert torch.equal(small.train.labels, plain.train.labels)
    assert (small.train.images != small.clean.images).any()
    for one, other in zip(small.test_sets, plain.test_sets, strict=True):
        if one is None:  # the images of other classes, which one2one alone has
            assert other is None
        else:
            assert torch.equal(one.images, other.images) and torch.equal(one.truth, other.truth)


def cut_off(tensors):
    return tensors | {"test_zlib": tensors["test_zlib"][:-3].clone()}


def too_many(tensors):
    """A million copies of a tiny image."""
    index = torch.arange(10**6)
    content, _ = compressed.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    ends = (index + 1) * len(content)
    return tensors | {"train_index": index, "train_zlib": content, "train_zlib_ends": ends}


def changed(name, function):
    return lambda tensors: tensors | {name: function(tensors[name])}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (cut_off, "test_zlib_ends must rise to"),
        (too_many, "train_zlib_ends must be as many as"),
        (changed("test_zlib", lambda t: t ^ 255), "test_zlib: image 0 is damaged"),
        (changed("test_zlib", lambda t: t.float()), "test_zlib must be bytes"),
        (changed("test_zlib_ends", lambda t: t.flip(0)), "test_zlib_ends must rise"),
        (changed("test_zlib_ends", lambda t: t - t[0]), "test_zlib_ends must rise"),
        (changed("test_zlib_ends", lambda t: t[:-1].clone()), "as many as test_index"),
        (changed("test_zlib_ends", lambda t: t.float()), "test_zlib_ends int64"),
        (changed("test_zlib_ends", lambda t: t * 2**60), "test_zlib_ends must rise"),
        (lambda t: {key: t[key] for key in t if key != "test_zlib_ends"}, "test_zlib_ends"),
        (lambda t: t | {"test_images": torch.zeros(1)}, "must not both be there"),
    ],
)
def test_damaged_compressed_images_are_refused(change, sentence, record):
    folder, options, _ = record
    tensors = safetensors.torch.load_file(folder / "poison.safetensors")
    with restored(folder):
        rewrite(folder, "poison.safetensors", safetensors.torch.save(change(tensors)))
        with pytest.raises(RefusedError, match=sentence):
            contents.load(folder, options, CPU)
    contents.load(folder, options, CPU)


@contextlib.contextmanager
def restored(folder):
    """The files of a record are afterwards as they were before."""
    kept = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    yield
    for path, content in kept.items():
        path.write_bytes(content)


def test_a_format_of_the_future_is_refused(record):
    folder, options, _ = record
    with restored(folder):
        info = json.loads((folder / "record.json").read_text())
        (folder / "record.json").write_text(json.dumps(info | {"format": 3}))
        with pytest.raises(RefusedError, match="has format 3; this version of Antidote reads the"):
            contents.load(folder, options, CPU)


def test_the_options_that_a_recipe_may_change_are_those_of_training_from_scratch():
    fields = {field.name for field in dataclasses.fields(config.FromScratch)}
    assert {"crop", "crop_area", "mirror"} <= set(config.RECIPE) <= fields
    assert math.isclose(config.default_of(BadNet, "crop_area"), 0.08)
