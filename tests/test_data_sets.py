"""Published data sets by name, in the layouts that torchvision, Kaggle and their archives leave."""

import gzip
import os
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from antidote_bench.attack.badnet import Config as BadNet
from antidote_bench.utils import config, parsing
from antidote_bench.utils.data import dataset, facts, mnist, published_sets, sources
from antidote_bench.utils.errors import MissingError
from antidote_bench.utils.report.tables import CLASSES

IDX_NAMES = [name for names in mnist.FILES.values() for name in names]


def load(name, root, tmp_path, **options):
    return dataset.open_dataset(name, root, cache=tmp_path / "cache", **options)


def picture(path, level):
    """A file with an image of one grey level, 8 pixels a side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level,) * 3).save(path)


def levels(split):
    """The red value in the middle of every image: the level of `picture`."""
    return split.images[:, 0, 4, 4].tolist()


# ---------- MNIST and FashionMNIST ----------


def idx(array):
    """The content of an IDX file."""
    head = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    return head + array.tobytes()


def mnist_files(folder, counts=(40, 20), pack=False, dot=False, seed=0):
    """Random IDX files of the training and the test images; returns their arrays."""
    folder.mkdir(parents=True)
    random, arrays = np.random.default_rng(seed), []
    for count, names in zip(counts, mnist.FILES.values(), strict=True):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) * 7 % 10).astype(np.uint8)
        for name, array in zip(names, (images, labels), strict=True):
            name = name.replace("-idx", ".idx") if dot else name
            content = gzip.compress(idx(array)) if pack else idx(array)
            (folder / (f"{name}.gz" if pack else name)).write_bytes(content)
            arrays.append(array)
    return arrays


PLACES = ["{name}/{raw}/raw", "{name}/raw", "{name}", "{raw}/raw"]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["mnist", "fashionmnist"])
def test_mnist_keeps_every_pixel(tmp_path, name, place, pack):
    folder = tmp_path / place.format(name=name, raw=mnist.FOLDERS[name])
    train_images, train_labels, test_images, test_labels = mnist_files(folder, pack=pack)
    spec, train, test = load(name, tmp_path, tmp_path, image_size=28)
    for split, images, labels in (
        (train, train_images, train_labels),
        (test, test_images, test_labels),
    ):
        assert split.images.shape == (len(images), 3, 28, 28)
        for channel in range(3):
            np.testing.assert_array_equal(split.images[:, channel], images)
        np.testing.assert_array_equal(split.labels, labels)
    assert spec.classes == 10 and not spec.flip and spec.class_names[9] in {"9", "Ankle boot"}
    assert spec.class_names == sources.class_names(name, tmp_path)


def test_mnist_is_enlarged_to_32_pixels(tmp_path):
    images, *_ = mnist_files(tmp_path / "mnist", dot=True)
    spec, train, _ = load("mnist", tmp_path, tmp_path)
    expected = [Image.fromarray(image).resize((32, 32), Image.BILINEAR) for image in images]
    np.testing.assert_array_equal(train.images[:, 1], np.stack(list(map(np.asarray, expected))))
    assert spec.size == 32 and spec.mean == (0.1307,) * 3 and spec.std == (0.3081,) * 3


def test_files_in_the_folder_of_all_sets_are_not_taken_for_either_of_the_two(tmp_path):
    mnist_files(tmp_path / "files")
    for name in ("mnist", "fashionmnist"):
        with pytest.raises(MissingError, match=f"data set {name} is not at"):
            load(name, tmp_path / "files", tmp_path)


def test_packed_and_unpacked_files_are_the_same_set(tmp_path):
    mnist_files(tmp_path / "a/mnist")
    mnist_files(tmp_path / "b/mnist", pack=True)
    mnist_files(tmp_path / "c/mnist", seed=1)
    found = [facts.known("mnist", tmp_path / place, None, tmp_path) for place in "abc"]
    assert found[0]["listing"] == found[1]["listing"] != found[2]["listing"]


IDX_DAMAGE = {
    "empty": lambda content: b"",
    "half a head": lambda content: content[:6],
    "too short": lambda content: content[:-1],
    "too long": lambda content: content + b"0",
    "other dimensions": lambda content: content[:3] + b"\2" + content[4:],
    "a huge count": lambda content: content[:4] + b"\xff" * 4 + content[8:],
    "no image": lambda content: content[:4] + bytes(4) + content[8:16],
}


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("damage", IDX_DAMAGE)
def test_a_damaged_idx_file_is_named(tmp_path, damage, number, pack):
    mnist_files(tmp_path / "mnist")
    path = tmp_path / "mnist" / IDX_NAMES[number]
    content = IDX_DAMAGE[damage](path.read_bytes())
    path.unlink()
    if pack:
        path = path.with_name(f"{path.name}.gz")
        content = gzip.compress(content)
    path.write_bytes(content)
    with pytest.raises(MissingError, match=f"{path.name} is damaged"):
        load("mnist", tmp_path, tmp_path)


def test_damaged_archives_and_labels_that_do_not_fit_are_named(tmp_path):
    mnist_files(tmp_path / "mnist", pack=True)
    path = tmp_path / "mnist" / f"{IDX_NAMES[1]}.gz"
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[:-9], whole[:12] + b"\0\0" + whole[14:]):
        path.write_bytes(content)
        with pytest.raises(MissingError, match=f"{path.name} is damaged"):
            load("mnist", tmp_path, tmp_path)
    for labels in (np.zeros(39, np.uint8), np.full(40, 10, np.uint8)):
        path.write_bytes(gzip.compress(idx(labels)))
        with pytest.raises(MissingError, match="needs a label from 0 to 9 for each of 40 images"):
            load("mnist", tmp_path, tmp_path)
    path.unlink()
    with pytest.raises(MissingError, match=f"lacks {IDX_NAMES[1]}"):
        load("mnist", tmp_path, tmp_path)


# ---------- Imagenette ----------


def imagenette(folder):
    """Two images of every class; the level tells class, split and number."""
    for label, name in enumerate(sorted(published_sets.IMAGENETTE, reverse=True)):
        label = 9 - label
        for offset, split in enumerate(("train", "val")):
            for number in range(2):
                path = folder / split / name / f"{name}_{number}.JPEG"
                picture(path, 20 * label + 5 * offset + number)


@pytest.mark.parametrize(
    "place",
    ["imagenette/imagenette2", "imagenette/imagenette2-160", "imagenette2-320", "imagenette"],
)
def test_imagenette(tmp_path, place):
    imagenette(tmp_path / place)
    spec, train, test = load("imagenette", tmp_path, tmp_path, image_size=8)
    names = "tench, English springer, cassette player, chain saw, church, French horn, "
    names += "garbage truck, gas pump, golf ball, parachute"
    assert ", ".join(spec.class_names) == names and spec.flip
    assert spec.class_names == sources.class_names("imagenette", tmp_path)
    assert train.labels.tolist() == test.labels.tolist() == sorted([*range(10)] * 2)
    assert levels(train) == [20 * label + number for label in range(10) for number in (0, 1)]
    assert levels(test) == [level + 5 for level in levels(train)]


def test_the_largest_imagenette_is_taken(tmp_path):
    for size in ("-160", "-320", ""):
        imagenette(tmp_path / f"imagenette/imagenette2{size}")
        paths, _ = sources.find("imagenette", tmp_path)["train"].read()
        assert f"/imagenette2{size}/train/n01440764/" in paths[0]


def test_imagenette_has_the_network_and_the_recipe_for_large_images():
    options = parsing.parse(BadNet, ["--dataset", "imagenette"])
    assert (options.model, options.recipe, options.mirror) == ("resnet18", "imagenet", True)
    assert dataset.side_of("imagenette", None) == 224
    digits = parsing.parse(BadNet, ["--dataset", "mnist", "--image_size", "224"])
    assert (digits.recipe, digits.mirror) == ("imagenet", False)


# ---------- CelebA ----------

ATTRIBUTES = ("Arched_Eyebrows", "Heavy_Makeup", "Male", "Mouth_Slightly_Open", "Smiling")
# class by class: Heavy_Makeup, Smiling, Mouth_Slightly_Open
BITS = [(number >> 2 & 1, number >> 1 & 1, number & 1) for number in range(8)]


def celeba_rows():
    """(file, attributes 1 or -1, partition, class) of 24 images, in the order of their files."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(24):
        label = number * 5 % 8
        makeup, smiling, is_open = BITS[label]
        values = dict.fromkeys(ATTRIBUTES, 0)
        values |= {"Heavy_Makeup": makeup, "Smiling": smiling, "Mouth_Slightly_Open": is_open}
        values |= {"Male": random.integers(2), "Arched_Eyebrows": random.integers(2)}
        rows.append(
            (f"{number + 1:06}.jpg", [2 * v - 1 for v in values.values()], number // 8, label)
        )
    return rows


def celeba(place, form="txt", images="img_align_celeba"):
    """CelebA's files; the level of an image is ten times its number."""
    rows = celeba_rows()
    for number, (name, *_) in enumerate(rows):
        picture(place / images / name, 10 * number)
    if form == "csv":
        head = f"image_id,{','.join(ATTRIBUTES)}\n"
        lines = [f"{name},{','.join(map(str, values))}\n" for name, values, *_ in rows]
        parts = ["image_id,partition\n"] + [f"{name},{part}\n" for name, _, part, _ in rows]
    else:
        head = f"{len(rows)}\n{' '.join(ATTRIBUTES)} \n"
        lines = [f"{name} {' '.join(f'{v:2}' for v in values)}\n" for name, values, *_ in rows]
        parts = [f"{name} {part}\n" for name, _, part, _ in rows]
    (place / f"list_attr_celeba.{form}").write_text(head + "".join(lines))
    (place / f"list_eval_partition.{form}").write_text("".join(parts))


@pytest.mark.parametrize(
    ("place", "form", "images"),
    [
        ("celeba", "txt", "img_align_celeba"),
        ("celeba/celeba", "txt", "img_align_celeba"),
        ("celeba", "csv", "img_align_celeba/img_align_celeba"),
        ("", "txt", "Img/img_align_celeba"),
    ],
)
def test_celeba(tmp_path, place, form, images):
    celeba(tmp_path / place, form, images)
    spec, train, test = load("celeba", tmp_path, tmp_path, image_size=8)
    labels = [label for *_, label in celeba_rows()]
    assert train.labels.tolist() == labels[:8] and test.labels.tolist() == labels[16:]
    for split, first in ((train, 0), (test, 16)):
        expected = [10 * number for number in range(first, first + 8)]
        assert np.abs(np.subtract(levels(split), expected)).max() <= 1, "JPEG"
    assert spec.classes == 8 and not spec.flip and spec.mean == (0, 0, 0)
    assert spec.class_names == sources.class_names("celeba", tmp_path)
    for name, (makeup, smiling, is_open) in zip(spec.class_names, BITS, strict=True):
        assert ("heavy makeup" in name, "smiling" in name, "mouth open" in name) == (
            makeup,
            smiling,
            is_open,
        )
    assert dataset.side_of("celeba", None) == 64


CELEBA_DAMAGE = {
    "a list cut short": ("attr", lambda text: text[: text.index("000020")], "attr.*is damaged"),
    "an attribute left out": ("attr", lambda text: text.replace("Smiling", "S"), "attr.*damaged"),
    "another value": ("attr", lambda text: text.replace(" 1", " 7"), "attr.*damaged"),
    "an empty list": ("attr", lambda text: "", "attr.*damaged"),
    "no number": ("eval", lambda text: text.replace("jpg 2", "jpg x", 1), "eval.*damaged"),
    "a fourth part": ("eval", lambda text: text.replace("jpg 2", "jpg 3", 1), "eval.*damaged"),
    "fewer images": ("eval", lambda text: text[: text.index("000020")], "not list the same images"),
    "no test image": ("eval", lambda text: text.replace("jpg 2", "jpg 0"), "eval.*lists no image"),
    "an image left out": ("000001", None, "000001.jpg is missing"),
    "no partition": ("eval", None, "lacks list_eval_partition.txt or .csv: put it there"),
    "no attributes": ("attr", None, "lacks list_attr_celeba.txt or .csv: put it there"),
}


@pytest.mark.parametrize("damage", CELEBA_DAMAGE)
def test_damaged_celeba(tmp_path, damage):
    celeba(tmp_path / "celeba")
    part, change, sentence = CELEBA_DAMAGE[damage]
    (path,) = (tmp_path / "celeba").rglob(f"*{part}*.*")
    if change is None:
        path.unlink()
    else:
        assert change(path.read_text()) != path.read_text()
        path.write_text(change(path.read_text()))
    with pytest.raises(MissingError, match=sentence):
        load("celeba", tmp_path, tmp_path)


def test_celeba_that_is_still_packed(tmp_path):
    celeba(tmp_path / "celeba")
    (tmp_path / "celeba/img_align_celeba").rename(tmp_path / "away")
    with zipfile.ZipFile(tmp_path / "celeba/img_align_celeba.zip", "w"):
        pass
    with pytest.raises(MissingError, match="lacks the folder img_align_celeba with the unpacked"):
        load("celeba", tmp_path, tmp_path)


# ---------- GTSRB as Kaggle has it ----------

TEST_CLASSES = [16, 1, 42, 0, 10, 2]


def kaggle(place, lower=False):
    """43 classes with an image each, six test images, and the images of Meta/."""

    def case(name):
        return name.lower() if lower else name

    for label in range(43):
        picture(place / case("Train") / str(label) / f"{label:05}_00000_00000.png", 5 * label)
        picture(place / "Meta" / f"{label}.png", 250)
    head = "Width,Height,Roi.X1,Roi.Y1,Roi.X2,Roi.Y2,ClassId,Path\n"
    for number, label in enumerate(TEST_CLASSES):
        picture(place / case("Test") / f"{number:05}.png", 100 + label)
        head += f"8,8,1,1,7,7,{label},Test/{number:05}.png\n"
    (place / "Test.csv").write_text(head)
    (place / "Train.csv").write_text("Width,Height,Roi.X1,Roi.Y1,Roi.X2,Roi.Y2,ClassId,Path\n")


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("place", ["gtsrb", ""])
def test_gtsrb_of_kaggle(tmp_path, place, lower):
    kaggle(tmp_path / place, lower)
    if lower and not place:
        (tmp_path / "gtsrb").mkdir()  # empty: the files lie in dataset_path itself
    spec, train, test = load("gtsrb", tmp_path, tmp_path, image_size=8)
    assert spec.class_names == tuple(map(str, range(43)))
    assert spec.class_names == sources.class_names("gtsrb", tmp_path)
    assert sorted(train.labels.tolist()) == list(range(43)) and len(train) == 43
    assert levels(train) == [5 * label for label in train.labels.tolist()]
    assert test.labels.tolist() == TEST_CLASSES
    assert levels(test) == [100 + label for label in TEST_CLASSES]


@pytest.mark.parametrize("lower", [False, True])
def test_gtsrb_of_kaggle_needs_its_list(tmp_path, lower):
    kaggle(tmp_path / "gtsrb", lower)
    table = tmp_path / "gtsrb/Test.csv"
    for text, sentence in (
        ("Path;ClassId\nTest/00000.png;1\n", "columns Path and ClassId, divided by commas"),
        ("Path,ClassId\nTest/00000.png,43\n", "a class beyond the 43"),
        ("Path,ClassId\n", "lists no image"),
        ("Path,ClassId\nTest/00000.png,1\nTest/9.png,2\n", "9.png is missing"),
    ):
        table.write_text(text)
        with pytest.raises(MissingError, match=sentence):
            load("gtsrb", tmp_path, tmp_path)
    table.unlink()
    with pytest.raises(MissingError, match="lacks Test.csv, which says of what classes"):
        load("gtsrb", tmp_path, tmp_path)


def test_image_folders_of_gtsrb_beside_a_list_stay_image_folders(tmp_path):
    kaggle(tmp_path / "gtsrb", lower=True)
    for label in range(43):
        picture(tmp_path / f"gtsrb/test/{label}/a.png", label)
    (tmp_path / "gtsrb/Test.csv").write_text("a table of something else")
    _, _, test = load("gtsrb", tmp_path, tmp_path, image_size=8)
    assert len(test) == 43


# ---------- what holds for all of them ----------

MAKE = {
    "mnist": lambda root: mnist_files(root / "MNIST/raw"),
    "fashionmnist": lambda root: mnist_files(root / "fashionmnist/FashionMNIST/raw", pack=True),
    "imagenette": lambda root: imagenette(root / "imagenette/imagenette2-320"),
    "celeba": lambda root: celeba(root / "celeba"),
    "gtsrb": lambda root: kaggle(root / "gtsrb"),
}


@pytest.mark.parametrize("name", MAKE)
def test_a_changed_file_changes_the_identity(tmp_path, name):
    MAKE[name](tmp_path)
    before = facts.known(name, tmp_path, 8, tmp_path / "cache")
    first = sources.find(name, tmp_path)
    assert before["classes"] == CLASSES[name] == len(set(before["class_names"]))
    assert facts.known(name, tmp_path, 8, tmp_path / "cache") == before
    files = [path for path in tmp_path.rglob("*") if path.suffix in {".gz", ".JPEG", ".jpg"}]
    files += [*tmp_path.rglob("Train/7/*.png"), *tmp_path.rglob("*images-idx3-ubyte")]
    path = sorted(files)[0]
    if path.suffix == ".gz":
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[20] ^= 1
        path.write_bytes(gzip.compress(content))
    elif name == "mnist":
        content = bytearray(path.read_bytes())
        content[20] ^= 1
        path.write_bytes(content)
    else:
        Image.new("RGB", (8, 8), (1, 2, 3)).save(path)
    os.utime(path, (1, 1))
    second = sources.find(name, tmp_path)
    assert first["train"].fingerprint != second["train"].fingerprint or (
        first["test"].fingerprint != second["test"].fingerprint
    )
    assert facts.known(name, tmp_path, 8, tmp_path / "cache")["listing"] != before["listing"]


@pytest.mark.parametrize("name", [*MAKE, "cifar10", "tiny"])
def test_a_set_that_is_not_there_says_where_it_was_looked_for(tmp_path, name):
    with pytest.raises(MissingError) as caught:
        load(name, tmp_path, tmp_path)
    words = [str(tmp_path / name), "train/<class>/*", "--download true"]
    words += {
        "mnist": ["mnist/train-images-idx3-ubyte.gz"],
        "imagenette": ["imagenette/imagenette2/"],
        "celeba": ["img_align_celeba/", "list_attr_celeba.txt", "list_eval_partition.txt"],
        "gtsrb": ["Train/", "Test/", "Test.csv"],
    }.get(name, [])
    for word in words:
        assert word in str(caught.value)


def test_every_set_with_a_name_has_a_side_and_known_classes():
    assert config.SIDES.keys() == CLASSES.keys()
    assert dataset.KNOWN.keys() == CLASSES.keys() - {"digits"}
    for name, classes in published_sets.CLASS_NAMES.items():
        assert len(set(classes)) == CLASSES[name]


# ---------- downloads, without a network ----------

LEFT = {  # what torchvision leaves in its root
    "MNIST": lambda root: mnist_files(root / "MNIST/raw"),
    "FashionMNIST": lambda root: mnist_files(root / "FashionMNIST/raw"),
    "Imagenette": lambda root: imagenette(root / "imagenette2-320"),
    "CelebA": lambda root: celeba(root / "celeba"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_torchvision_downloads_is_found(tmp_path, monkeypatch, kind):
    from torchvision import datasets

    asked = []

    def fetch(root, **options):
        asked.append(options)
        LEFT[kind](root)

    monkeypatch.setattr(datasets, kind, fetch)
    name = kind.lower()
    with pytest.raises(MissingError):
        load(name, tmp_path, tmp_path, image_size=8)
    assert not asked
    for _ in range(2):
        spec, _, _ = load(name, tmp_path, tmp_path, image_size=8, download=True)
        assert spec.classes == CLASSES[name]
    size = {"size": "320px"} if kind == "Imagenette" else {}
    assert asked == [{"download": True, **size}], "once"


def test_a_failed_download_says_what_to_put_where(tmp_path, monkeypatch):
    from torchvision import datasets

    class FileURLRetrievalError(Exception):
        pass

    def fetch(root, **options):
        raise FileURLRetrievalError("Failed to retrieve:\n\n\tToo many users have viewed it.")

    monkeypatch.setattr(datasets, "CelebA", fetch)
    with pytest.raises(MissingError) as caught:
        load("celeba", tmp_path, tmp_path, download=True)
    text = str(caught.value)
    assert text.startswith("could not download celeba to") and "\n" not in text
    for word in ("Too many users", "img_align_celeba/", "list_attr_celeba.txt"):
        assert word in text


# ---------- runs ----------


def test_an_attack_and_a_defense_on_fashionmnist(tmp_path, places, run):
    mnist_files(tmp_path / "FashionMNIST/raw", counts=(120, 40))
    small = ("--model", "resnet9", "--width", 4, "--batch_size", 32, "--epochs", 1)
    words = ("attack/badnet.py", "--dataset", "fashionmnist", "--dataset_path", tmp_path)
    words += (*small, *places, "--attack_target", "Ankle boot", "--save_folder_name", "fashion")
    said = run(*words, "--dry_run", "true").stdout
    assert "120 training and 40 test images of 10 classes: 0 (T-shirt/top), 1 (Trouser)" in said
    assert "target   9 (Ankle boot)" in said
    assert "ACC" in run(*words).stdout
    assert "ACC" in run("defense/ft.py", "--result_file", "fashion", *places, "--epochs", 1).stdout


def test_a_missing_set_ends_with_code_3(tmp_path, places, run):
    words = ("attack/badnet.py", "--dataset", "celeba", "--dataset_path", tmp_path)
    said = run(*words, *places, "--save_folder_name", "none", code=3)
    assert "data set celeba is not at" in said.first


def test_labels_and_pixels_belong_together_after_the_cache(tmp_path):
    kaggle(tmp_path / "gtsrb")
    first = load("gtsrb", tmp_path, tmp_path, image_size=8)
    again = load("gtsrb", tmp_path, tmp_path, image_size=8)
    assert first.spec == again.spec and torch.equal(first.test.labels, again.test.labels)
    assert torch.equal(first.test.images, again.test.images)
