"""Data sets: every layout, the cache, and what is said when something is missing or damaged."""

import os
import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image

from utils.data import dataset, sources
from utils.data.memmap import MemmapImages
from utils.errors import ConfigError, MissingError


def folders(place, splits=("train", "test"), classes=("ant", "bee"), count=3, size=(20, 14)):
    """Random images in place/<split>/<class>/; returns {path: array}."""
    random, written = np.random.default_rng(0), {}
    for split in splits:
        for name in classes:
            (place / split / name).mkdir(parents=True)
            for number in range(count):
                path = place / split / name / f"{number}.png"
                written[path] = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(written[path]).save(path)
    return written


def load(name, root, tmp_path, **options):
    return dataset.open_dataset(name, root, cache=tmp_path / "cache", **options)


def test_digits(tmp_path):
    spec, train, test = load("digits", tmp_path, tmp_path)
    assert (spec.classes, spec.size, spec.flip) == (10, 32, False)
    assert train.images.shape == (1297, 3, 32, 32) and test.images.shape == (500, 3, 32, 32)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    counts = torch.bincount(test.labels)
    assert counts.min() >= 48 and counts.max() <= 51  # stratified
    pixels = train.images.double() / 255
    torch.testing.assert_close(
        pixels.mean((0, 2, 3)), torch.tensor(spec.mean).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        pixels.std((0, 2, 3), correction=0), torch.tensor(spec.std).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("split", ["test", "val"])
def test_image_folders_keep_every_pixel(tmp_path, split):
    written = folders(tmp_path / "set", ("train", split), size=(16, 16))
    spec, train, test = load("folder", tmp_path / "set", tmp_path, image_size=16)
    assert spec.classes == 2 and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for found, part in ((train, "train"), (test, split)):
        expected = [array for path, array in sorted(written.items()) if part in path.parts]
        np.testing.assert_array_equal(found.images.permute(0, 2, 3, 1), np.stack(expected))


def test_pictures_of_any_size_and_mode_are_resized(tmp_path):
    folders(tmp_path / "set", size=(40, 25))
    Image.new("L", (9, 70), 128).save(tmp_path / "set/train/ant/grey.jpg")
    Image.new("RGBA", (9, 7), (255, 0, 0, 255)).save(tmp_path / "set/train/bee/alpha.png")
    _, train, _ = load("folder", tmp_path / "set", tmp_path, image_size=24)
    assert train.images.shape == (8, 3, 24, 24)
    assert (train.images[3] - 128).abs().max() <= 1


def test_named_set_from_image_folders(tmp_path):
    folders(tmp_path / "cifar10", classes=[f"c{number}" for number in range(10)], size=(32, 32))
    spec, train, _ = load("cifar10", tmp_path, tmp_path)
    assert spec.mean == (0.4914, 0.4822, 0.4465) and spec.flip and len(train) == 30


def test_torchvision_layout(tmp_path, monkeypatch):
    from torchvision import datasets

    place = tmp_path / "cifar10" / "cifar-10-batches-py"
    place.mkdir(parents=True)
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (10, 3072), dtype=np.uint8)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        (place / name).write_bytes(pickle.dumps({"data": pictures, "labels": list(range(10))}))
    (place / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [str(number) for number in range(10)]})
    )
    # torchvision checks the archive before it unpickles anything
    with pytest.raises(MissingError, match="damaged"):
        load("cifar10", tmp_path, tmp_path)
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    _, train, test = load("cifar10", tmp_path, tmp_path)
    assert len(train) == 50 and len(test) == 10
    np.testing.assert_array_equal(test.images.flatten(1), pictures)


def test_gtsrb_prefers_the_full_training_set(tmp_path):
    base = tmp_path / "gtsrb" / "gtsrb"
    for part, count in (("Training", 1), ("Final_Training/Images", 2)):
        for label in ("00000", "00001"):
            (base / "GTSRB" / part / label).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (30, 33), (number, 0, 0)).save(
                    base / "GTSRB" / part / label / f"{number}.ppm"
                )
    (base / "GTSRB/Final_Test/Images").mkdir(parents=True)
    Image.new("RGB", (30, 33)).save(base / "GTSRB/Final_Test/Images/00000.ppm")
    (base / "GT-final_test.csv").write_text("Filename;Width;ClassId\n00000.ppm;30;1\n")
    _, train, test = load("gtsrb", tmp_path, tmp_path)
    assert len(train) == 4 and test.labels.tolist() == [1]


def test_tiny_imagenet_as_published(tmp_path):
    place = tmp_path / "tiny" / "tiny-imagenet-200"
    for name in ("n01", "n02"):
        (place / "train" / name / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(place / "train" / name / "images" / "a.JPEG")
    (place / "val/images").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(place / "val/images/v.JPEG")
    (place / "val/val_annotations.txt").write_text("v.JPEG\tn02\t0\t0\t1\t1\n")
    spec, train, test = load("tiny", tmp_path, tmp_path)
    assert spec.size == 64 and train.labels.tolist() == [0, 1] and test.labels.tolist() == [1]


def test_second_start_reads_the_cache(tmp_path, monkeypatch):
    folders(tmp_path / "set")
    first = load("folder", tmp_path / "set", tmp_path, image_size=16)
    monkeypatch.setattr(sources, "decode", lambda *_: pytest.fail("decoded twice"))
    second = load("folder", tmp_path / "set", tmp_path, image_size=16)
    assert first[0] == second[0] and torch.equal(first[1].images, second[1].images)
    second[1].images.zero_()  # writing to the tensor must not reach the file
    assert torch.equal(
        first[1].images, load("folder", tmp_path / "set", tmp_path, image_size=16)[1].images
    )


def test_damaged_cache(tmp_path):
    folders(tmp_path / "set")
    load("folder", tmp_path / "set", tmp_path, image_size=16)
    (cache,) = (tmp_path / "cache").iterdir()
    for name in ("train.npy", "meta.json"):
        (cache / name).write_bytes((cache / name).read_bytes()[:20])
        with pytest.raises(MissingError, match=f"{cache.name} is damaged"):
            load("folder", tmp_path / "set", tmp_path, image_size=16)


def test_a_changed_picture_is_read_again(tmp_path):
    folders(tmp_path / "set")
    before = load("folder", tmp_path / "set", tmp_path, image_size=16)
    Image.new("RGB", (16, 16), "white").save(tmp_path / "set/train/ant/0.png")
    after = load("folder", tmp_path / "set", tmp_path, image_size=16)
    assert (after[1].images[0] == 255).all() and before[0].fingerprint != after[0].fingerprint


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n rubbish", None], ids=["zero bytes", "rubbish", "truncated"]
)
def test_damaged_picture_is_named(tmp_path, content):
    folders(tmp_path / "set")
    path = tmp_path / "set/train/bee/1.png"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(MissingError, match=str(path)):
        load("folder", tmp_path / "set", tmp_path, image_size=16)
    assert not list((tmp_path / "cache").iterdir()), "nothing half-decoded is left"


def test_damaged_picture_is_named_by_the_pool(tmp_path, monkeypatch):
    folders(tmp_path / "set", count=8)
    (tmp_path / "set/train/bee/7.png").write_bytes(b"")
    monkeypatch.setattr(sources, "CHUNK", 4)
    with pytest.raises(MissingError, match="bee/7.png"):
        load("folder", tmp_path / "set", tmp_path, image_size=16)


def test_pool_and_single_process_agree(tmp_path, monkeypatch):
    folders(tmp_path / "set", count=8)
    alone = load("folder", tmp_path / "set", tmp_path, image_size=16)
    monkeypatch.setattr(sources, "CHUNK", 3)
    pooled = dataset.open_dataset(
        "folder", tmp_path / "set", image_size=16, cache=tmp_path / "other"
    )
    assert torch.equal(alone[1].images, pooled[1].images) and alone[0] == pooled[0]


def test_missing_set_names_the_place_and_both_remedies(tmp_path):
    with pytest.raises(MissingError) as caught:
        load("cifar10", tmp_path, tmp_path)
    for word in (str(tmp_path / "cifar10"), "train/<class>", "--download true"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda place: folders(place, ("train",)), "neither test/ nor val/"),
        (lambda place: folders(place, classes=("one",)), "at least two class folders"),
        (lambda place: (folders(place), (place / "test/wasp").mkdir()), "wasp"),
        (lambda place: folders(place, count=0), "no images below"),
        (lambda place: None, "no images at"),
    ],
)
def test_incomplete_folders(tmp_path, build, sentence):
    build(tmp_path / "set")
    with pytest.raises(MissingError, match=sentence):
        load("folder", tmp_path / "set", tmp_path, image_size=16)


def test_folder_needs_a_size_and_names_must_be_known(tmp_path):
    folders(tmp_path / "set")
    with pytest.raises(ConfigError, match="--image_size"):
        load("folder", tmp_path / "set", tmp_path)
    with pytest.raises(ConfigError, match="cifar11.*cifar10"):
        load("cifar11", tmp_path, tmp_path)


def test_balanced_subset():
    labels = torch.tensor([0] * 50 + [1] * 50 + [2] * 3)
    for count in (3, 10, 31, 60, 103):
        index = dataset.balanced_subset(labels, count, 0)
        counts = torch.bincount(labels[index], minlength=3).tolist()
        assert len(index) == count == len(set(index.tolist())) and index.tolist() == sorted(
            index.tolist()
        )
        assert counts[2] == min(3, -(-count // 3)) or counts[2] == count // 3
        assert abs(counts[0] - counts[1]) <= 1
    assert len(dataset.balanced_subset(labels, 0, 0)) == 3, "at least one of every class"
    assert (
        dataset.balanced_subset(labels, 10, 0).tolist()
        == dataset.balanced_subset(labels, 10, 0).tolist()
    )
    assert (
        dataset.balanced_subset(labels, 10, 0).tolist()
        != dataset.balanced_subset(labels, 10, 1).tolist()
    )


def test_all_of_cifar10_and_a_warm_start(cifar, tmp_path):
    cache = tmp_path / "cache"
    spec, train, test = dataset.open_dataset("cifar10", cifar, cache=cache)
    assert len(train) == 50_000 and len(test) == 10_000 and spec.classes == 10
    assert torch.bincount(train.labels).tolist() == [5000] * 10
    begin = time.perf_counter()
    _, again, _ = dataset.open_dataset("cifar10", cifar, cache=cache)
    assert time.perf_counter() - begin < 3
    assert torch.equal(again.images[::1000], train.images[::1000])
    names = sorted(os.listdir(cifar / "cifar10" / "train"))
    picture = np.asarray(
        Image.open(
            cifar
            / "cifar10"
            / "train"
            / names[9]
            / sorted(os.listdir(cifar / "cifar10/train" / names[9]))[-1]
        )
    )
    np.testing.assert_array_equal(train.images[-1].permute(1, 2, 0), picture)


def test_a_set_above_the_budget_stays_in_its_file(tmp_path):
    options = {"cache": tmp_path}
    spec, train, test = dataset.open_dataset("digits", "data", **options)
    same, stored, test_sets = dataset.open_dataset("digits", "data", **options, resident_gb=0)
    assert (
        spec == same
        and isinstance(stored.images, MemmapImages)
        and isinstance(test_sets.images, MemmapImages)
    )
    assert torch.equal(stored.images[:], train.images) and torch.equal(
        test_sets.images[:], test.images
    )
    assert torch.is_tensor(
        dataset.open_dataset("digits", "data", **options, resident_gb=1)[1].images
    )
    # with the headers of the two files
    size = (train.images.numel() + test.images.numel() + 256) / 1e9
    assert torch.is_tensor(
        dataset.open_dataset("digits", "data", **options, resident_gb=size)[1].images
    )
    assert not torch.is_tensor(
        dataset.open_dataset("digits", "data", **options, resident_gb=size - 1e-6)[1].images
    )


def test_channel_statistics_are_counted_in_parts():
    images = np.random.default_rng(0).integers(0, 256, (2500, 3, 5, 4), dtype=np.uint8)
    found = dataset._statistics(images)
    np.testing.assert_allclose(found["mean"], images.mean((0, 2, 3)) / 255)
    np.testing.assert_allclose(found["std"], images.std((0, 2, 3)) / 255)
