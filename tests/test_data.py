"""Data sets: every layout, the cache, and what is said when something is missing or damaged."""

import os
import pickle
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from antidote_bench.utils.data import dataset, images, published_sets, sources
from antidote_bench.utils.data.loader import clipped
from antidote_bench.utils.data.memmap import MemmapImages
from antidote_bench.utils.errors import ConfigError, MissingError, UserError
from tests.helpers import ROOT


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
    assert spec.class_names == tuple("0123456789")
    assert spec.fingerprint["test"].startswith("8b34604e7e86"), "records of the digits fit no more"
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


def test_images_of_any_size_and_mode_are_resized(tmp_path):
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
    assert sources.find("cifar10", tmp_path)["train"].classes == published_sets.CIFAR10


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
    for name in ("00000.ppm", "00001.ppm"):
        Image.new("RGB", (30, 33)).save(base / "GTSRB/Final_Test/Images" / name)
    table = base / "GT-final_test.csv"
    table.write_text("Filename;Width;ClassId\n00000.ppm;30;1\n00001.ppm;30;0\n")
    spec, train, test = load("gtsrb", tmp_path, tmp_path)
    assert len(train) == 4 and test.labels.tolist() == [1, 0]
    assert spec.class_names == ("00000", "00001")
    for text, sentence in (
        ("Filename,ClassId\n00000.ppm,1\n", "is damaged: it needs the columns"),
        ("Filename;ClassId\n00000.ppm;2\n", "a class beyond the 2"),
        ("Filename;ClassId\n00000.ppm;x\n", "is damaged: it needs the columns"),
        ("Filename;ClassId\n", "lists no image"),
        ("Filename;ClassId\nnone.ppm;1\n00000.ppm;0\n", "none.ppm is missing"),
        ("Filename;ClassId\na\0.ppm;1\n00000.ppm;0\n", "damaged|cannot be read"),
    ):
        table.write_text(text)
        with pytest.raises(MissingError, match=sentence):
            load("gtsrb", tmp_path, tmp_path)


def test_tiny_imagenet_as_published(tmp_path):
    place = tmp_path / "tiny" / "tiny-imagenet-200"
    for name in ("n01", "n02"):
        (place / "train" / name / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(place / "train" / name / "images" / "a.JPEG")
    (place / "val/images").mkdir(parents=True)
    for name in "vw":
        Image.new("RGB", (64, 64)).save(place / f"val/images/{name}.JPEG")
    table = place / "val/val_annotations.txt"
    table.write_text("v.JPEG\tn02\t0\t0\t1\t1\nw.JPEG\tn01\t0\t0\t1\t1\n")
    spec, train, test = load("tiny", tmp_path, tmp_path)
    assert spec.size == 64 and train.labels.tolist() == [0, 1] and test.labels.tolist() == [1, 0]
    assert spec.class_names == ("n01", "n02")
    for line in ("v.JPEG\tn03\n", "v.JPEG\n", "\n"):
        table.write_text(line)
        with pytest.raises(MissingError, match="val_annotations.txt is damaged"):
            load("tiny", tmp_path, tmp_path)


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


def test_another_run_that_decodes_the_same_set_may_be_quicker(tmp_path, monkeypatch):
    folders(tmp_path / "set")
    rename = Path.rename

    def be_late(unfinished, folder):
        shutil.copytree(unfinished, folder)
        return rename(unfinished, folder)

    monkeypatch.setattr(Path, "rename", be_late)
    first = load("folder", tmp_path / "set", tmp_path / "cache", image_size=16)
    assert first[0] == load("folder", tmp_path / "set", tmp_path / "cache", image_size=16)[0]
    assert len(list((tmp_path / "cache").iterdir())) == 1  # nothing unfinished stays


def test_clipped_pixels_have_a_slope_at_black_and_white():
    pixels = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5], requires_grad=True)
    shown = clipped(pixels)
    shown.sum().backward()
    assert shown.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert pixels.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


CACHE_DAMAGE = {
    "short images": ("train.npy", lambda content: content[:200]),
    "long images": ("train.npy", lambda content: content + b"0"),
    "one flipped bit of an image": ("test.npy", lambda content: content[:-1] + b"~"),
    "another label": ("train_labels.npy", lambda content: content[:-8] + b"\0" * 8),
    "another shape": ("train.npy", lambda content: content.replace(b"(6, 3, 16,", b"(3, 6, 16,")),
    "an archive": ("test_labels.npy", lambda content: b"PK\3\4" + content[4:]),
    "half of meta.json": ("meta.json", lambda content: content[:20]),
    "another mean": ("meta.json", lambda content: content.replace(b"0.", b"1.", 1)),
    "a list": ("meta.json", lambda content: b"[]"),
    "a number": ("meta.json", lambda content: b"7"),
    "no text": ("meta.json", lambda content: b"\xff\xfe"),
    "brackets": ("meta.json", lambda content: b"[" * 100_000),
}


@pytest.mark.parametrize("damage", CACHE_DAMAGE)
def test_damaged_cache(tmp_path, damage):
    folders(tmp_path / "set")
    load("folder", tmp_path / "set", tmp_path, image_size=16)
    (cache,) = (tmp_path / "cache").iterdir()
    name, change = CACHE_DAMAGE[damage]
    content = (cache / name).read_bytes()
    assert change(content) != content
    (cache / name).write_bytes(change(content))
    with pytest.raises(MissingError, match=f"{cache.name} is damaged: delete that folder"):
        load("folder", tmp_path / "set", tmp_path, image_size=16)


def test_a_pipe_in_the_cache_is_not_read(tmp_path):
    folders(tmp_path / "set")
    load("folder", tmp_path / "set", tmp_path, image_size=16)
    (cache,) = (tmp_path / "cache").iterdir()
    (cache / "train.npy").unlink()
    os.mkfifo(cache / "train.npy")
    with pytest.raises(MissingError, match="is damaged: delete that folder"):
        load("folder", tmp_path / "set", tmp_path, image_size=16)


def test_a_large_cache_is_read_again_only_where_a_file_is_newer(tmp_path, monkeypatch):
    folders(tmp_path / "set")
    load("folder", tmp_path / "set", tmp_path, image_size=16)
    monkeypatch.setattr(dataset, "ALWAYS_CHECKED", 0)
    (cache,) = (tmp_path / "cache").iterdir()
    checked, check = [], dataset._fingerprint
    monkeypatch.setattr(dataset, "_fingerprint", lambda *a: checked.append(a) or check(*a))
    load("folder", tmp_path / "set", tmp_path, image_size=16)
    assert not checked
    os.utime(cache / "meta.json", (1, 1))  # a copy that did not keep the order of the files
    load("folder", tmp_path / "set", tmp_path, image_size=16)
    load("folder", tmp_path / "set", tmp_path, image_size=16)
    assert len(checked) == 2, "both splits, once"
    os.utime(cache / "meta.json", (1, 1))
    with open(cache / "train.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(MissingError, match="is damaged"):
        load("folder", tmp_path / "set", tmp_path, image_size=16)


def test_a_changed_image_is_read_again(tmp_path):
    folders(tmp_path / "set")
    before = load("folder", tmp_path / "set", tmp_path, image_size=16)
    Image.new("RGB", (16, 16), "white").save(tmp_path / "set/train/ant/0.png")
    after = load("folder", tmp_path / "set", tmp_path, image_size=16)
    assert (after[1].images[0] == 255).all() and before[0].fingerprint != after[0].fingerprint


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n rubbish", None], ids=["zero bytes", "rubbish", "truncated"]
)
def test_damaged_image_is_named(tmp_path, content):
    folders(tmp_path / "set")
    path = tmp_path / "set/train/bee/1.png"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(MissingError, match=str(path)):
        load("folder", tmp_path / "set", tmp_path, image_size=16)
    assert not list((tmp_path / "cache").iterdir()), "nothing half-decoded is left"


def test_damaged_image_is_named_by_the_pool(tmp_path, monkeypatch):
    folders(tmp_path / "set", count=8)
    (tmp_path / "set/train/bee/7.png").write_bytes(b"")
    monkeypatch.setattr(sources, "CHUNK", 4)
    with pytest.raises(MissingError, match="bee/7.png"):
        load("folder", tmp_path / "set", tmp_path, image_size=16)


def test_a_process_that_dies_while_it_decodes_is_one_sentence(tmp_path, monkeypatch):
    folders(tmp_path / "set", count=8)
    monkeypatch.setattr(sources, "CHUNK", 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(images, "read_rgb", lambda path: os._exit(9))  # out of memory, say
    with pytest.raises(UserError, match="a process that decodes images has died"):
        load("folder", tmp_path / "set", tmp_path, image_size=16)


def test_pool_and_single_process_agree(tmp_path, monkeypatch):
    folders(tmp_path / "set", count=8)
    alone = load("folder", tmp_path / "set", tmp_path, image_size=16)
    monkeypatch.setattr(sources, "CHUNK", 3)
    pooled = dataset.open_dataset(
        "folder", tmp_path / "set", image_size=16, cache=tmp_path / "other"
    )
    assert torch.equal(alone[1].images, pooled[1].images) and alone[0] == pooled[0]


@pytest.mark.parametrize("name", ["0.png", "0.gif", "0.eps"])
def test_no_postscript_is_run(tmp_path, monkeypatch, name):
    """Pillow goes by content: an EPS file of any name would start Ghostscript."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("PostScript was run")
    )
    path = tmp_path / name
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(MissingError, match=f"{name} is damaged, empty or of a format"):
        images.read_rgb(path)
    assert not {"EPS", "WMF", "IPTC", "HDF5", "GRIB", "BUFR"} & set(images.formats())
    assert not {".eps", ".ps", ".wmf", ".emf"} & images.extensions()


ENDINGS = ["jfif", "jpe", "JPG", "avif", "jp2", "tga", "ico", "webp", "bmp", "pcx", "qoi", "gif"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_of_the_installed_pillow_is_read(tmp_path, ending):
    if f".{ending.lower()}" not in images.extensions():
        pytest.skip("this Pillow does not read it")
    ramp = np.linspace(0, 255, 32).astype(np.uint8).repeat(32).reshape(32, 32)
    Image.fromarray(ramp).convert("RGB").save(tmp_path / f"a.{ending}")
    found = np.asarray(images.read_rgb(tmp_path / f"a.{ending}")).astype(int)
    assert found.shape == (32, 32, 3) and abs(found - ramp[..., None]).max() < 16


def test_the_first_image_of_a_process_may_have_any_format(tmp_path):
    Image.new("RGB", (4, 4), (10, 20, 30)).save(tmp_path / "a.tga")
    code = (
        "import sys; from antidote_bench.utils.data import images;"
        "print(images.read_rgb(sys.argv[1]).getpixel((0, 0)))"
    )
    command = [sys.executable, "-c", code, tmp_path / "a.tga"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "(10, 20, 30)\n", done.stderr


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "tif", "gif", "webp"])
def test_ordinary_images_are_decoded_as_pillow_does(tmp_path, mode, ending):
    """Also inside the fingerprints of records that were made before formats were limited."""
    if (mode, ending) in {("P", "jpg"), ("1", "jpg"), ("1", "webp")}:
        pytest.skip("Pillow does not write it")
    pixels = np.random.default_rng(0).integers(0, 256, (21, 17, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / f"a.{ending}")
    with Image.open(tmp_path / f"a.{ending}") as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(images.read_rgb(tmp_path / f"a.{ending}"), expected)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm", "jp2"])
def test_16_bit_images_are_scaled(tmp_path, ending):
    if f".{ending}" not in images.extensions():
        pytest.skip("this Pillow does not read it")
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    path = tmp_path / f"a.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 16 16 65535\n" + (levels * 257).astype(">u2").tobytes())
    else:
        options = {"irreversible": False} if ending == "jp2" else {}
        Image.fromarray(levels * 257).save(path, **options)
    np.testing.assert_array_equal(np.asarray(images.read_rgb(path))[..., 1], levels)


def test_images_of_32_bits_are_scaled_by_their_range_or_refused(tmp_path):
    levels, path = np.arange(256).reshape(16, 16), tmp_path / "a.tif"
    Image.fromarray((levels * (2**31 - 1) // 255).astype(np.int32)).save(path)
    np.testing.assert_array_equal(np.asarray(images.read_rgb(path))[..., 0], levels)
    declared = {341: 100.0, 340: -155.0}  # SMaxSampleValue, SMinSampleValue
    Image.fromarray((levels - 155).astype(np.float32)).save(path, tiffinfo=declared)
    np.testing.assert_array_equal(np.asarray(images.read_rgb(path))[..., 0], levels)
    Image.fromarray((levels - 255).astype(np.float32)).save(path, tiffinfo=declared)
    with pytest.raises(MissingError, match="a.tif holds values outside -155 to 100"):
        images.read_rgb(path)
    for values, sentence in (
        ((levels / 255).astype(np.float32), "a.tif holds numbers with a fraction, whose range"),
        ((levels - 1).astype(np.int32), "a.tif holds values outside 0 to"),
        (levels.astype(np.int32), "a.tif would be black: its values end at 255"),
        (levels.astype(np.uint16), "a.tif would be black: its values end at 255"),
    ):
        Image.fromarray(values).save(path)
        with pytest.raises(MissingError, match=sentence):
            images.read_rgb(path)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_applied_once(tmp_path, ending):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = 200  # right half bright
    for orientation, bright in ((1, np.s_[:, 16:]), (3, np.s_[:, :16]), (6, np.s_[16:])):
        exif = Image.Exif()
        exif[images.ORIENTATION] = orientation
        path = tmp_path / f"{orientation}.{ending}"
        options = {"lossless": True} if ending == "webp" else {}
        Image.fromarray(pixels).save(path, exif=exif, **options)
        found = np.asarray(images.read_rgb(path)).astype(int)
        assert found.shape[:2] == ((32, 16) if orientation == 6 else (16, 32))
        assert found[bright].min() > 190 and (found > 100).mean() == 0.5


def test_transparent_images_are_laid_over_white(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 3] = [[0, 255], [128, 0]]
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    found = np.asarray(images.read_rgb(tmp_path / "rgba.png"))
    np.testing.assert_array_equal(found[..., 0], [[255, 0], [127, 255]])
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=0)
    found = np.asarray(images.read_rgb(tmp_path / "p.png"))
    assert found.tolist() == [[[255] * 3, [40, 50, 60]]]
    opaque = np.random.default_rng(0).integers(0, 256, (9, 9, 4), dtype=np.uint8)
    opaque[..., 3] = 255
    Image.fromarray(opaque).save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "opaque.png"), opaque[..., :3])


def test_files_that_never_end_or_are_too_large_are_refused_by_name(tmp_path, monkeypatch):
    folders(tmp_path / "set")
    path = tmp_path / "set/train/ant/0.png"
    picture = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    for _ in range(2):
        with pytest.raises(MissingError, match="ant/0.png is a folder, pipe, socket or device"):
            load("folder", tmp_path / "set", tmp_path, image_size=16)
        with pytest.raises(MissingError, match="ant/0.png is a folder, pipe, socket or device"):
            images.read_rgb(path)
        path.unlink()
        path.symlink_to("/dev/zero")
    path.unlink()
    with open(path, "wb") as file:  # a hole, which takes no space
        file.truncate(images.LARGEST_FILE + 1)
    with pytest.raises(MissingError, match="ant/0.png has 1024 MB"):
        load("folder", tmp_path / "set", tmp_path, image_size=16)
    path.write_bytes(picture)
    monkeypatch.setattr(images, "LARGEST_IMAGE", 20 * 14 - 1)
    with pytest.raises(MissingError, match="0.png is too large to decode"):
        images.read_rgb(path)


def test_a_decompression_bomb_is_refused(tmp_path):
    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return len(content).to_bytes(4, "big") + kind + content + crc.to_bytes(4, "big")

    head = (20_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) * 2
    )
    with pytest.raises(MissingError, match="a.png is too large to decode"):
        images.read_rgb(tmp_path / "a.png")


def test_hidden_and_system_entries_are_ignored_and_said_once(tmp_path, capsys):
    place = tmp_path / "set"
    folders(place)
    plain = load("folder", place, tmp_path, image_size=16)
    for name in ("train/.ipynb_checkpoints", "train/ant/.thumbnails", "test/__MACOSX"):
        (place / name).mkdir()
        shutil.copy(place / "train/ant/0.png", place / name / "9.png")
    for name in ("train/ant/._0.png", "train/bee/Thumbs.db", "train/.DS_Store", "test/desktop.ini"):
        (place / name).write_bytes(b"\0\5\x16\7")
    for name in ("train/labels.csv", "train/ant/a.txt", "test/bee/b.txt", "test/bee/c.EPS"):
        (place / name).write_text("no image")
    capsys.readouterr()
    for _ in range(2):
        spec, train, test = load("folder", place, tmp_path, image_size=16)
        assert spec == plain.spec and torch.equal(train.images, plain.train.images)
    (line,) = capsys.readouterr().err.splitlines()
    assert "hidden or system entries: 7 (" in line and ".ipynb_checkpoints" in line
    assert "files of other formats: 4 (2 .txt, 1 .csv, 1 .eps)" in line


def test_a_class_without_an_image_is_named(tmp_path, capsys):
    place = tmp_path / "set"
    folders(place, classes=("ant", "bee", "cat"))
    for number in range(3):
        (place / f"test/bee/{number}.png").unlink()
    load("folder", place, tmp_path, image_size=16)
    assert "has no image of 1 of 3 classes (bee)" in capsys.readouterr().err
    for number in range(3):
        (place / f"test/cat/{number}.png").unlink()
    with pytest.raises(MissingError, match="all of class ant"):
        load("folder", place, tmp_path, image_size=16)
    for number in range(3):
        (place / f"train/bee/{number}.png").rename(place / f"train/bee/{number}.eps")
    with pytest.raises(MissingError, match=r"class bee in .*train has no image.*3 \(3 .eps\)"):
        load("folder", place, tmp_path, image_size=16)


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path):
    folders(tmp_path / "set")
    plain = load("folder", tmp_path / "set", tmp_path, image_size=16)
    (tmp_path / "set/train").rename(tmp_path / "elsewhere")
    (tmp_path / "set/train").mkdir()
    (tmp_path / "set/train/ant").symlink_to(tmp_path / "elsewhere/ant")  # a class
    (tmp_path / "set/train/bee").mkdir()
    (tmp_path / "set/train/bee/more").symlink_to(tmp_path / "elsewhere/bee")  # a folder in it
    (tmp_path / "elsewhere/bee/2.png").rename(tmp_path / "loose.png")
    (tmp_path / "elsewhere/bee/2.png").symlink_to(tmp_path / "loose.png")  # a file
    (tmp_path / "elsewhere/bee/again").symlink_to(tmp_path / "elsewhere/bee")
    (tmp_path / "elsewhere/ant/up").symlink_to(tmp_path / "set/train")
    (tmp_path / "elsewhere/ant/itself").symlink_to("itself")
    (tmp_path / "elsewhere/bee/all").symlink_to(tmp_path / "set")
    spec, train, _ = load("folder", tmp_path / "set", tmp_path, image_size=16)
    assert spec == plain.spec and torch.equal(train.images, plain.train.images)
    (tmp_path / "loose.png").unlink()
    with pytest.raises(MissingError, match="2.png links to a file that is not there"):
        load("folder", tmp_path / "set", tmp_path, image_size=16)


def test_names_that_are_no_utf8(tmp_path):
    folders(tmp_path / "set", classes=("ant", os.fsdecode(b"b\xffe")))
    name = tmp_path / "set/train" / os.fsdecode(b"ant/\xe9.png")
    shutil.copy(tmp_path / "set/train/ant/0.png", name)
    spec, train, _ = load("folder", tmp_path / "set", tmp_path, image_size=16)
    assert len(train) == 7 and spec.class_names == ("ant", "b\N{REPLACEMENT CHARACTER}e")
    name.write_bytes(b"")
    with pytest.raises(
        MissingError, match="ant/\N{REPLACEMENT CHARACTER}.png is damaged"
    ) as caught:
        load("folder", tmp_path / "set", tmp_path, image_size=16)
    str(caught.value).encode()  # can be printed


def test_numeric_class_names_are_in_the_order_of_their_values(tmp_path):
    names = [str(number) for number in range(11)]
    folders(tmp_path / "set", classes=names, count=1)
    spec, train, _ = load("folder", tmp_path / "set", tmp_path, image_size=16)
    assert spec.class_names == tuple(names)
    assert train.labels.tolist() == [0, 1, 10, *range(2, 10)], "the images stay in order of paths"
    folders(tmp_path / "mixed", classes=["2", "10", "a"], count=1)
    assert sources.find("folder", tmp_path / "mixed")["train"].classes == ("10", "2", "a")


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
