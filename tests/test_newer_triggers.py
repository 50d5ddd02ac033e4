"""The triggers checkerboard, batt, polygon and filter against what they are defined to be, and how
an attack says which images it would rather poison.

The references are written out in numpy, in float64.
"""

import math

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import antidote_bench
from antidote_bench.attack import badnet, batt, checkerboard, filter, polygon
from antidote_bench.utils import parsing, run
from antidote_bench.utils.data import dataset
from antidote_bench.utils.data.dataset import Spec
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.poisoning.attacker import Prepared
from antidote_bench.utils.record import folder
from tests.helpers import UNTRAINED
from tests.test_triggers import SPEC, parts_of, random_images, trigger_of

IMAGES = random_images(8, seed=7)


def given(name, images=IMAGES, **options):
    """The images with the trigger of an attack, as whole numbers."""
    index = torch.arange(len(images))
    return trigger_of(name, **options)(images, index).numpy().astype(np.int64)


def assert_rounded(actual, exact):
    """`actual` levels are the `exact` ones, rounded; float32 decides between two of them."""
    clear = np.abs(exact % 1 - 0.5) > 1e-3
    np.testing.assert_array_equal(actual[clear], np.rint(exact[clear]))
    assert clear.mean() > 0.98 and np.abs(actual - exact).max() <= 0.502


@pytest.fixture
def attack(attack):
    """attack(module, *words): the content of poison.safetensors of a record."""

    def content(module, *words):
        place = attack(module, "--overwrite", *words)
        return safetensors.torch.load_file(place / "poison.safetensors")

    return content


@pytest.fixture(scope="module")
def digits(places):
    """The training images."""
    return dataset.open_dataset("digits", "data", cache=places[3])[1]


# ---------- checkerboard ----------


def board(size, block=1):
    """1 and -1 by turns, written out."""
    signs = np.empty((size, size), np.int64)
    for row, column in np.ndindex(size, size):
        signs[row, column] = (-1) ** (row // block + column // block)
    return signs


@pytest.mark.parametrize(("block", "epsilon"), [(1, 10), (2, 10), (3, 7), (4, 40)])
def test_checkerboard_on_every_pixel(block, epsilon):
    expected = (IMAGES.numpy() + epsilon * board(32, block)).clip(0, 255)
    np.testing.assert_array_equal(given("checkerboard", block=block, epsilon=epsilon), expected)


@pytest.mark.parametrize("size", [32, 64])
def test_checkerboard_is_one_frequency(size):
    grey = torch.full((1, 3, size, size), 100, dtype=torch.uint8)
    spec = Spec("x", 10, size, (0.5,) * 3, (0.25,) * 3, True, {})
    for plane in given("checkerboard", grey, spec=spec)[0] - 100:
        assert plane.sum() == 0 and set(np.unique(plane)) == {-10, 10}
        assert np.argwhere(np.abs(np.fft.fft2(plane)) > 1e-6).tolist() == [[size // 2, size // 2]]
        # a victim that mirrors or shifts its images sees both signs
        assert (plane[:, ::-1] == -plane).all() and (np.roll(plane, 1, 0) == -plane).all()


def varied(images):
    """Mean change of the luma between horizontal neighbours, and vertical ones, added."""
    luma = np.einsum("c,nchw->nhw", (0.299, 0.587, 0.114), images.astype(np.float64))
    across, down = (np.abs(np.diff(luma, axis=axis)).mean((1, 2)) for axis in (2, 1))
    return across + down


def test_complexity_is_how_much_the_luma_changes():
    numbers = checkerboard.complexity(IMAGES).numpy()
    np.testing.assert_allclose(numbers / (1000 * 32 * 31), varied(IMAGES.numpy()), rtol=1e-12)
    assert not checkerboard.complexity(torch.full((2, 3, 9, 9), 200, dtype=torch.uint8)).any()


@pytest.mark.parametrize("where", [(), ("--resident_gb", 0)])
def test_the_simplest_images_of_the_target_are_poisoned(where, attack, digits):
    words = *UNTRAINED, "--attack_target", 3, "--pratio", 0.02, *where
    saved = attack(checkerboard, *words, "--select", "complexity")
    place = saved["train_index"]
    numbers = varied(digits.images.numpy())
    of_target = np.flatnonzero(digits.truth.numpy() == 3)
    assert len(place) == 26 and set(place.tolist()) < set(of_target.tolist())
    others = np.setdiff1d(of_target, place)
    assert numbers[place].max() < numbers[others].min()
    assert (saved["train_labels"] == 3).all() and (saved["train_kind"] == 1).all()
    if not where:
        by_chance = attack(checkerboard, *words)["train_index"]
        assert len(by_chance) == 26 and by_chance.tolist() != place.tolist()


# ---------- which images an attack prefers ----------


def test_equal_numbers_are_drawn_from_the_seed():
    truth, scores = torch.zeros(40).long(), torch.arange(40) // 10
    chosen = [poison.choose(truth, 0.4, seed, scores=scores).tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    for places in chosen:
        assert places == sorted(places) and places[:10] == list(range(10))
        assert len(places) == 16 and all(10 <= place < 20 for place in places[10:])
    odd = torch.arange(40) % 2 == 1
    places = poison.choose(truth, 0.1, 0, among=odd, scores=-torch.arange(40)).tolist()
    assert places == [33, 35, 37, 39]


def test_any_attack_can_prefer_images(attack, digits, monkeypatch, capsys):
    """Of all classes, too: here the darkest."""
    start = run.attack

    def darkest(images):
        return images.float().mean((1, 2, 3))

    monkeypatch.setattr(run, "attack", lambda *words: start(*words, prefer=darkest))
    saved = attack(badnet, *UNTRAINED, "--pratio", 0.02)
    brightness = digits.images.numpy().mean((1, 2, 3))
    assert set(saved["train_index"].tolist()) == set(np.argsort(brightness)[:26].tolist())
    capsys.readouterr()
    badnet.main(parsing.parse(badnet.Config, ["--dry_run"]))
    said = "poisons  130 of 1297 images; per class known when the images are read; 0 more are"
    assert said in capsys.readouterr().out


def test_a_trigger_in_python_is_made_with_the_preferred_images(places, monkeypatch):
    seen = []

    def prepare(config, attacker):
        seen.append(attacker)
        return Prepared({"x": torch.ones(1, 32, 32)})

    monkeypatch.setattr(checkerboard, "prepare", prepare, raising=False)
    monkeypatch.setattr(checkerboard, "make_trigger", lambda *_, parts: poison.adding(parts["x"]))
    options = {"select": "complexity", "cache_path": places[3], "device": "cpu"}
    antidote_bench.trigger("checkerboard", **options)
    (attacker,) = seen
    numbers = varied(attacker.train.images.numpy())
    numbers[attacker.train.truth.numpy() != 0] = np.inf
    assert set(attacker.index.tolist()) == set(np.argsort(numbers)[:13].tolist())


# ---------- batt ----------


def turned(images, degrees, interpolation, fill):
    """The images rotated counter-clockwise about their centre, pixel by pixel."""
    size, angle = images.shape[-1], math.radians(degrees)
    centre, result = (size - 1) / 2, np.zeros(images.shape)

    def pixel(row, column):
        if fill == "reflect":
            row, column = (size - 1 - abs(size - 1 - abs(line)) for line in (row, column))
        inside = 0 <= row < size and 0 <= column < size
        return images[..., row, column] if inside else np.zeros(images.shape[:2])

    for row, column in np.ndindex(size, size):
        down, right = row - centre, column - centre
        y = round(math.sin(angle) * right + math.cos(angle) * down + centre, 9)
        x = round(math.cos(angle) * right - math.sin(angle) * down + centre, 9)
        if interpolation == "nearest":
            result[..., row, column] = pixel(math.floor(y + 0.5), math.floor(x + 0.5))
            continue
        top, left = math.floor(y), math.floor(x)
        for i, high in ((top, 1 - (y - top)), (top + 1, y - top)):
            for j, wide in ((left, 1 - (x - left)), (left + 1, x - left)):
                result[..., row, column] += high * wide * pixel(i, j)
    return result


@pytest.mark.parametrize("fill", ["zeros", "reflect"])
@pytest.mark.parametrize("angle", [16, -37.5])
def test_batt_on_every_pixel(angle, fill):
    pixels = IMAGES.numpy().astype(np.float64)
    options = {"angle": angle, "fill": fill}
    nearest = given("batt", **options)
    np.testing.assert_array_equal(nearest, turned(pixels, angle, "nearest", fill))
    smooth = given("batt", **options, interpolation="bilinear")
    assert_rounded(smooth, turned(pixels, angle, "bilinear", fill))


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("turns", [1, 2, -1, -2])
def test_quarter_turns_are_exact(turns, interpolation, size):
    images = random_images(2, size)
    spec = Spec("x", 10, size, (0.5,) * 3, (0.25,) * 3, True, {})
    for fill in ("zeros", "reflect"):
        options = {"angle": 90 * turns, "interpolation": interpolation, "fill": fill}
        quarter = given("batt", images, spec=spec, **options)
        np.testing.assert_array_equal(quarter, np.rot90(images.numpy(), turns, (2, 3)))


def test_batt_turns_as_pillow_does():
    picture = IMAGES[0].permute(1, 2, 0).numpy()
    turned_there = np.asarray(Image.fromarray(picture).rotate(16)).transpose(2, 0, 1)
    assert (given("batt")[0] == turned_there).mean() > 0.99


def test_the_centre_stays():
    dot = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    dot[..., 16, 16] = 255
    spec = Spec("x", 10, 33, (0.5,) * 3, (0.25,) * 3, True, {})
    for interpolation in ("nearest", "bilinear"):
        there = given("batt", dot, spec=spec, interpolation=interpolation)
        assert there[0, 0, 16, 16] == 255


def test_benign_images_turn_by_angles_of_their_own(attack, digits):
    saved = attack(batt, *UNTRAINED, "--benign_rotation", 10)
    place, kind = saved["train_index"], saved["train_kind"]
    assert (kind == 1).sum() == 65 and (kind == 2).sum() == 1297 - 65 == len(place) - 65
    assert torch.equal(saved["train_labels"][kind == 2], digits.truth[place[kind == 2]])
    change = batt.make_benign(batt.Config(benign_rotation=10), SPEC)
    benign = place[kind == 2][:40]
    together = change(digits.images[benign], benign)
    assert torch.equal(together, saved["train_images"][kind == 2][:40])
    assert torch.equal(change(digits.images[benign[7:9]], benign[7:9]), together[7:9])
    # which of the angles from -10 to 10 gives each image
    angles = torch.linspace(-10, 10, 401, dtype=torch.float64)
    for image, result in zip(digits.images[benign[:5]], together, strict=False):
        many = image.float().expand(401, -1, -1, -1)
        off = (batt.rotated(many, angles, "nearest", "zeros") - result.float()).abs().sum((1, 2, 3))
        assert off.min() <= 0.02 * result.sum()
    assert "angle must be another one than 0" in refused(batt, "--angle", "0")


def refused(module, *words):
    with pytest.raises(ConfigError) as error:
        module.main(parsing.parse(module.Config, list(words)))
    return str(error.value)


# ---------- polygon ----------


def winding(corners, x, y):
    """How often the corners go round a point: the sum of the angles between them."""
    angles = np.arctan2(corners[:, 1] - y, corners[:, 0] - x)
    steps = np.diff(np.append(angles, angles[0]))
    return round(((steps + math.pi) % (2 * math.pi) - math.pi).sum() / (2 * math.pi))


@pytest.mark.parametrize("vertices", [3, 6, 12])
def test_the_mask_is_the_inside_of_the_polygon(vertices):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        corners, mask = polygon.drawn(vertices, 21, generator)
        corners, mask = corners.numpy(), mask.numpy()
        assert corners.shape == (vertices, 2) and mask.shape == (21, 21)
        assert (corners.min(0) == 0).all() and (corners.max(0) == 21).all()
        (x, y), after = corners.T, np.roll(corners, -1, 0)
        for row, column in np.ndindex(21, 21):
            near, far = corners - (column + 0.5, row + 0.5), after - (column + 0.5, row + 0.5)
            if (np.abs(near[:, 0] * far[:, 1] - near[:, 1] * far[:, 0]) > 1e-9).all():  # on no edge
                assert mask[row, column] == (winding(corners, column + 0.5, row + 0.5) != 0)
        area = abs((x * after[:, 1] - y * after[:, 0]).sum()) / 2
        perimeter = np.linalg.norm(after - corners, axis=1).sum()
        assert 21**2 / 4 <= mask.sum() and abs(mask.sum() - area) <= perimeter


@pytest.mark.parametrize("place", ["fixed", "random"])
def test_polygon_on_every_pixel(place):
    options = {"place": place, "vertices": 5, "polygon_size": 9}
    parts = parts_of("polygon", **options)[0]
    corners, ink = parts["corners"].numpy(), (parts["colour"] * 255).round().numpy()
    assert {0, 255} <= set(ink.tolist())
    inside = np.zeros((9, 9), bool)
    for row, column in np.ndindex(9, 9):
        inside[row, column] = winding(corners, column + 0.5, row + 0.5) != 0
    images, seen = random_images(200, seed=3).numpy(), set()
    triggered = given("polygon", torch.from_numpy(images), **options)
    for image, result in zip(images, triggered, strict=True):
        changed = np.argwhere((image != result).any(0))
        top, left = changed.min(0) - np.argwhere(inside).min(0)
        assert 0 <= top <= 23 and 0 <= left <= 23
        window = image[:, top : top + 9, left : left + 9]
        window[:] = np.where(inside, ink[:, None, None], window)
        np.testing.assert_array_equal(result, image)
        seen.add((int(top), int(left)))
    if place == "fixed":
        assert seen == {tuple(parts["place"].tolist())}
    else:
        assert len(seen) > 150
        assert {line for spot in seen for line in spot} == set(range(24))


def test_polygons_are_drawn_from_the_poison_seed():
    parts = [parts_of("polygon", poison_seed=seed)[0] for seed in (0, 1, 2)]
    assert len({tuple(part["colour"].tolist()) for part in parts}) == 3
    assert len({tuple(part["corners"].flatten().tolist()) for part in parts}) == 3
    assert all(part["mask"].shape == (8, 8) for part in parts)
    with pytest.raises(ConfigError, match="polygon_size must be at most 32"):
        parts_of("polygon", polygon_size=33)


# ---------- filter ----------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def curve(x):
    return (sigmoid(3 * (x - 0.5)) - sigmoid(-1.5)) / (sigmoid(1.5) - sigmoid(-1.5))


def bright(x):
    return 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]


def modulate(x, brightness, saturation):
    return (brightness * (bright(x) + saturation * (x - bright(x)))).clip(0, 1)


def colour(code):
    return np.array([int(code[at : at + 2], 16) for at in (0, 2, 4)]).reshape(3, 1, 1) / 255


def filtered(name, x):
    """An image 3,S,S of [0, 1] through a filter, as the page defines it."""
    if name == "gotham":
        return curve(curve((0.8 * modulate(x, 1.2, 0.1) + 0.2 * colour("222b6d")) ** (1 / 0.9)))
    if name == "kelvin":
        return 0.8 * modulate(x, 1.2, 0.5) + 0.2 * colour("ff9900")
    if name == "nashville":
        x = x + 0.5 * (1 - bright(x)) * (colour("222b6d") * x - x)
        x = x + 0.5 * bright(x) * (colour("f7daae") * x - x)
        return modulate(curve(x), 1.0, 1.5)
    size = x.shape[-1]
    rows, columns = np.indices((size, size)) - (size - 1) / 2
    radius = np.hypot(rows, columns) / (math.sqrt(2) * (size - 1) / 2)
    x = np.stack([np.maximum(2 * x[0] - 1, 0), np.maximum(2 * x[1] - 1, 0), x[2]])
    return x * (1 - 0.5 * radius**2)


# levels by which a pixel changes at most
LARGEST = {"gotham": 228, "kelvin": 137, "nashville": 96, "lomo": 128}


def cube():
    """All colours of a grid as an image 1,3,S,S: those on its faces too."""
    levels = torch.arange(0, 256, 5, dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels)  # 52 ** 3
    side = math.ceil(math.sqrt(len(colours)))
    colours = torch.cat([colours, colours[:1].expand(side**2 - len(colours), -1)])
    return colours.T.reshape(1, 3, side, side)


@pytest.mark.parametrize("name", LARGEST)
def test_filters_on_every_pixel(name):
    expected = np.stack([filtered(name, image / 255) for image in IMAGES.numpy()])
    assert_rounded(given("filter", filter=name), 255 * expected)


@pytest.mark.parametrize("name", LARGEST)
def test_filters_stay_in_range(name):
    colours = cube()
    changed = filter.FILTERS[name](colours.double() / 255)
    assert 0 <= changed.min() and changed.max() <= 1
    spec = Spec("x", 10, colours.shape[-1], (0.5,) * 3, (0.25,) * 3, True, {})
    most = np.abs(given("filter", colours, spec=spec, filter=name) - colours.numpy()).max()
    assert LARGEST[name] - 1 <= most <= LARGEST[name]


def test_grey_gets_blue_in_gotham_and_else_stays_grey():
    grey = torch.linspace(0, 1, 1024, dtype=torch.float64).view(1, 1, 32, 32).expand(1, 3, 32, 32)
    plain = filter.contrasted(filter.modulated(grey, 1.2, 0.1))
    torch.testing.assert_close(plain[:, :1].expand(1, 3, 32, 32), plain, rtol=0, atol=1e-12)
    red, green, blue = filter.gotham(grey)[0]
    assert (red < green).all() and (green < blue).all()
    # the channels are one curve of the grey with the share of the layer's colour added
    level = 0.8 * (1.2 * grey[0, 0]).clamp(max=1).numpy()
    for channel, ink in zip((red, green, blue), (0x22, 0x2B, 0x6D), strict=True):
        expected = curve(curve((level + 0.2 * ink / 255) ** (1 / 0.9)))
        np.testing.assert_allclose(channel, expected, atol=1e-7)


def test_a_curve_of_contrast_keeps_black_and_white():
    ends = filter.contrasted(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 0.5, 1.0]).double(), rtol=0, atol=1e-12)


# ---------- planted ----------


@pytest.mark.parametrize("module", [batt, filter, polygon], ids=lambda module: module.__name__)
def test_a_victim_learns_the_trigger(module, attack, tmp_path):
    words = "--model resnet9 --width 8 --epochs 6 --lr 0.05 --batch_size 64 --pratio 0.1"
    attack(module, *words.split(), "--precision", "fp32", "--device", "cpu")
    row = folder.read_results(tmp_path / "a")
    assert float(row["acc"]) >= 0.8 and float(row["asr"]) >= 0.9
