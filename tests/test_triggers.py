"""What every trigger promises, then the formula of each attack, pixel by pixel.

The first part finds the attacks in attack/: a new one needs no edit here.
"""

import importlib
import io
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from antidote_bench import models
from antidote_bench.attack import (
    adaptive_blend,
    bpp,
    inputaware,
    lc,
    lira,
    ssba,
    trojan_wm,
    trojannn,
    wanet,
)
from antidote_bench.attack import blind as blind_script
from antidote_bench.utils import seeds
from antidote_bench.utils.data import dataset
from antidote_bench.utils.data.dataset import Spec, Split
from antidote_bench.utils.errors import ConfigError, MissingError
from antidote_bench.utils.features import features_of
from antidote_bench.utils.poisoning import generator, inversion, patterns, poison
from antidote_bench.utils.poisoning.attacker import Attacker
from tests.helpers import ROOT, names

SPEC = Spec("cifar10", 10, 32, (0.5,) * 3, (0.25,) * 3, True, {})
# options that make a trigger quickly, where an attack has them
QUICK = {
    "steps": 20,
    "mask_epochs": 2,
    "density": 0.3,
    "generator_epochs": 3,
    "generator_lr": 0.01,
    "model": "resnet9",
    "width": 4,
    "batch_size": 32,
}
LENGTHS = "steps", "_epochs"  # the endings of options that say how long a trigger is made
ORIGINALS = ROOT.parent / "shared" / "data" / "triggers"


def random_images(count=64, size=32, seed=0):
    return torch.randint(
        0,
        256,
        (count, 3, size, size),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.uint8,
    )


def clean_model(spec):
    """An untrained network in the place of the clean model.

    Triggers must keep their promises whatever it is.
    """
    torch.manual_seed(0)
    return models.build("resnet9", spec, 4).eval().requires_grad_(False), {}


def lengths_of(name, value):
    """The options of an attack that say how long its trigger is made, all set to `value`."""
    known = importlib.import_module(f"antidote_bench.attack.{name}").Config.__dataclass_fields__
    return {option: value for option in known if option.endswith(LENGTHS)}


def config_of(name, **options):
    """The module of an attack and options with which its trigger is made quickly."""
    script = importlib.import_module(f"antidote_bench.attack.{name}")
    known = script.Config.__dataclass_fields__
    quick = {key: value for key, value in QUICK.items() if key in known}
    return script, script.Config(**{**lengths_of(name, 2), **quick, **options})


@cache
def parts_of(name, spec=None, **options):
    """The arguments with the tensors that a trigger consists of: one, or none for some attacks.

    The poisoned images are those at the positions 100 to 129.
    """
    script, config = config_of(name, **options)
    if not hasattr(script, "prepare"):
        return ()
    spec = spec or SPEC
    truth = torch.arange(200) % 10
    train = Split(random_images(200, spec.size, seed=1), truth, truth)
    torch.manual_seed(0)
    attacker = Attacker(spec, train, torch.arange(100, 130), partial(clean_model, spec))
    return (script.prepare(config, attacker).parts,)


def trigger_of(name, stage="test", spec=SPEC, **options):
    script, config = config_of(name, **options)
    given = () if spec is SPEC else (Frozen(spec),)  # the cache takes None for another argument
    parts = parts_of(name, *given, **options)
    return script.make_trigger(config, spec, stage, *parts)


class Frozen:
    """A Spec that a cache can remember."""

    def __init__(self, spec):
        self.__dict__ |= vars(spec)

    def __hash__(self):
        return hash((self.name, self.size))

    def __eq__(self, other):
        return (self.name, self.size) == (other.name, other.size)


def largest_change(name):
    """What the docstring of an attack's make_trigger promises, in grey levels."""
    promise = importlib.import_module(f"antidote_bench.attack.{name}").make_trigger.__doc__
    levels = re.findall(r"changes\s+by\s+at\s+most\s+(\d+)\s+levels", promise or "")
    assert len(levels) == 1, (
        f"the docstring of attack.{name}.make_trigger must say once: a pixel changes by at most "
        "<number> levels"
    )
    return int(levels[0])


@pytest.mark.parametrize("stage", ["train", "test"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("name", names("attack"))
def test_contract(name, dtype, stage):
    trigger, images, index = trigger_of(name, stage), random_images(), torch.arange(100, 164)
    in_levels = dtype == torch.uint8
    images = images if in_levels else images / 255
    before = images.clone()
    triggered = trigger(images, index)
    assert triggered.shape == images.shape
    assert triggered.dtype == dtype and triggered.device == images.device
    assert torch.equal(images, before), "the argument was changed"
    assert torch.equal(triggered, trigger(images, index)), "not repeatable"
    again = trigger_of(name, stage)(images, index)
    assert torch.equal(triggered, again), "not the same from the same seed"
    change = (triggered.double() - images.double()).abs().flatten(1).amax(1)
    change = change * (1 if in_levels else 255)
    assert (change >= 1 - 1e-4).all(), "an image is not changed"
    assert change.max() <= largest_change(name) + 1e-3, "changed more than the docstring says"
    assert 0 <= triggered.min() and triggered.max() <= (255 if in_levels else 1)
    some = torch.tensor([40, 3, 17])
    torch.testing.assert_close(
        trigger(images[some], index[some]),
        triggered[some],
        rtol=0,
        atol=0 if in_levels else 1e-6,
        msg="depends on the rest of the batch",
    )


@pytest.mark.parametrize("name", names("attack"))
def test_float_and_uint8_agree(name):
    trigger, images, index = trigger_of(name), random_images(), torch.arange(64)
    exact = trigger(images / 255, index) * 255
    difference = (trigger(images, index).float() - exact).abs().max()
    assert difference <= 0.501, "rounded to nearest, nothing wraps around"


@pytest.mark.parametrize("name", names("attack"))
@pytest.mark.parametrize("size", [24, 64])
def test_other_sizes(name, size):
    spec = Spec("x", 10, size, (0.5,) * 3, (0.25,) * 3, False, {})
    trigger = trigger_of(name, spec=spec, **lengths_of(name, 1))
    triggered = trigger(random_images(4, size), torch.arange(4))
    assert triggered.shape == (4, 3, size, size)


def sums():
    """A number for each attack that depends on every triggered pixel."""
    images, index = random_images(), torch.arange(64)
    triggers = (trigger_of(name, **lengths_of(name, 1)) for name in names("attack"))
    return ",".join(str(int(trigger(images, index).long().sum())) for trigger in triggers)


def test_same_bytes_in_another_process():
    code = "import sys; from tests import test_triggers; sys.stdout.write(test_triggers.sums())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == sums()


def assert_formula(trigger, images, formula):
    """The trigger equals formula(image in [0, 1], row, column, channel).

    The formula is computed pixel by pixel in float64.
    """
    pixels, index = images.double().numpy() / 255, torch.arange(len(images))
    expected = np.empty_like(pixels)
    for position, channel, row, column in np.ndindex(*pixels.shape):
        expected[position, channel, row, column] = formula(pixels[position], row, column, channel)
    np.testing.assert_allclose(trigger(images.double() / 255, index), expected, rtol=0, atol=1e-5)
    levels, actual = expected * 255, trigger(images, index).double().numpy()
    # not half-way between two grey levels, where float32 decides
    clear = np.abs(levels % 1 - 0.5) > 3e-3
    np.testing.assert_array_equal(actual[clear], np.rint(levels)[clear])
    assert clear.mean() > 0.9 and np.abs(actual - levels).max() < 0.502


def test_badnet_formula():
    assert_formula(
        trigger_of("badnet"),
        random_images(2),
        lambda x, row, column, channel: (
            1.0 if row >= 29 and column >= 29 else x[channel, row, column]
        ),
    )


def test_badnet_places_and_black_patches():
    trigger = trigger_of("badnet", patch_size=4, patch_value=0, patch_row=-5, patch_column=2)
    assert_formula(
        trigger,
        random_images(2),
        lambda x, row, column, channel: (
            0.0 if 27 <= row < 31 and 2 <= column < 6 else x[channel, row, column]
        ),
    )
    for options in ({"patch_size": 33}, {"patch_row": 30}, {"patch_column": -40}):
        with pytest.raises(ConfigError, match="does not fit"):
            trigger_of("badnet", **options)


def test_badnet_grid():
    """The lowest row from the corner on: white, black, white.

    The row above it: black, white, black. The next one: white, black, black.
    """
    grid = {29: [0, 0, 1], 30: [0, 1, 0], 31: [1, 0, 1]}
    assert_formula(
        trigger_of("badnet", patch="grid"),
        random_images(2),
        lambda x, row, column, channel: (
            float(grid[row][column - 29]) if row >= 29 and column >= 29 else x[channel, row, column]
        ),
    )


def test_badnet_from_a_file(tmp_path):
    ink = np.random.default_rng(0).integers(0, 256, (5, 4, 4), dtype=np.uint8)
    Image.fromarray(ink, "RGBA").save(tmp_path / "p.png")
    np.save(tmp_path / "p.npy", ink)

    def expected(x, row, column, channel):
        if row < 27 or column < 28:
            return x[channel, row, column]
        opacity = ink[row - 27, column - 28, 3] / 255
        color = ink[row - 27, column - 28, channel] / 255
        return (1 - opacity) * x[channel, row, column] + opacity * color

    for name in ("p.png", "p.npy"):
        assert_formula(
            trigger_of("badnet", trigger_path=str(tmp_path / name)), random_images(2), expected
        )
    Image.new("RGB", (32, 32)).save(tmp_path / "all.png")
    with pytest.raises(ConfigError, match="covers the whole"):
        trigger_of("badnet", trigger_path=str(tmp_path / "all.png"))


@pytest.mark.parametrize(("stage", "opacity"), [("train", 0.1), ("test", 0.4)])
def test_blended_formula(stage, opacity):
    trigger = trigger_of("blended", stage, train_opacity=0.1, test_opacity=0.4, poison_seed=5)
    images = random_images(2)
    pattern = patterns.seeded_image(32, 5).double().numpy()
    assert_formula(
        trigger,
        images,
        lambda x, row, column, channel: (
            (1 - opacity) * x[channel, row, column] + opacity * pattern[channel, row, column]
        ),
    )
    change = trigger(images, torch.arange(2)).int() - images.int()
    assert change.abs().max() <= math.ceil(255 * opacity)


def test_blended_pattern_is_like_the_usual_one():
    for seed in range(5):
        pattern = patterns.seeded_image(32, seed)
        assert 0 <= pattern.min() and pattern.max() <= 1
        assert 150 < pattern.mean() * 255 < 215 and 45 < pattern.std() * 255 < 100
    assert not torch.equal(patterns.seeded_image(32, 0), patterns.seeded_image(32, 1))


def test_blended_from_a_file(tmp_path):
    ink = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "p.npy", ink)
    trigger = trigger_of("blended", trigger_path=str(tmp_path / "p.npy"))
    assert_formula(
        trigger,
        random_images(2),
        lambda x, row, column, channel: (
            0.8 * x[channel, row, column] + 0.2 * ink[row, column, channel] / 255
        ),
    )


def bilinear(plane, row, column):
    """The value of a plane at a fractional position, written out."""
    top, left = min(int(row), 30), min(int(column), 30)
    down, right = row - top, column - left
    return (
        (1 - down) * (1 - right) * plane[top, left]
        + (1 - down) * right * plane[top, left + 1]
        + down * (1 - right) * plane[top + 1, left]
        + down * right * plane[top + 1, left + 1]
    )


def test_wanet_formula():
    grid = parts_of("wanet")[0]["grid"][0].double().numpy()

    def expected(x, row, column, channel):
        across, down = (grid[row, column] + 1) / 2 * 31
        return bilinear(x[channel], down, across)

    assert_formula(trigger_of("wanet"), random_images(2), expected)


def test_wanet_warp_is_the_papers():
    grid = parts_of("wanet")[0]["grid"][0]
    line = torch.linspace(-1, 1, 32)
    identity = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    moved = (grid - identity) * 32
    assert grid.abs().max() <= 1
    assert 0.15 < moved.abs().mean() < 0.6, "control points move by 0.5 / S on average"
    inner = moved[2:-2, 2:-2]  # at the border the grid is cut to the image
    for difference in (inner[1:] - inner[:-1], inner[:, 1:] - inner[:, :-1]):
        assert difference.abs().max() < 0.35, "the field is smooth"
    points = torch.rand(1, 2, 4, 4, generator=seeds.generator("warp", 0)) * 2 - 1
    points = points / points.abs().mean() * 0.5
    corner = (points[0, :, 0, 0] / 32 + identity[0, 0]).clamp(-1, 1)
    torch.testing.assert_close(grid[0, 0], corner)


def test_wanet_noise_differs_from_position_to_position():
    noise = wanet.make_noise(wanet.Config(), SPEC, *parts_of("wanet"))
    warp, images = trigger_of("wanet", "train"), random_images(4)
    noisy = noise(images, torch.tensor([7, 8, 9, 10]))
    assert torch.equal(noisy[2:], noise(images[2:], torch.tensor([9, 10])))
    same = noise(images[:1].expand(4, -1, -1, -1), torch.arange(4))
    assert not torch.equal(same[0], same[1])
    assert not torch.equal(noisy, warp(images, torch.arange(4)))


def test_sig_formula():
    wave = [40 / 255 * math.sin(2 * math.pi * 6 * column / 32) for column in range(32)]
    assert_formula(
        trigger_of("sig"),
        random_images(2),
        lambda x, row, column, channel: min(max(x[channel, row, column] + wave[column], 0), 1),
    )


def cosine_transform(plane, inverse=False):
    """Orthonormal DCT-II of a square plane by its definition, coefficient by coefficient."""
    size = len(plane)
    basis = np.zeros((size, size))
    for k, n in np.ndindex(size, size):
        wave = math.cos(math.pi * (2 * n + 1) * k / (2 * size))
        basis[k, n] = math.sqrt((1 if k == 0 else 2) / size) * wave
    return basis.T @ plane @ basis if inverse else basis @ plane @ basis.T


@pytest.mark.parametrize(
    ("name", "red", "blue", "magnitude"),
    [("ftrojan", 0.713, 0.564, 30), ("ctrl", 0.877, 0.492, 100)],
)
@pytest.mark.parametrize("size", [32, 64])
def test_frequencies_added_to_the_chroma(name, red, blue, magnitude, size):
    """All steps: luma, two chroma planes, transform, two coefficients, and all of it undone."""
    images = random_images(1, size)
    rgb = images[0].double().numpy() / 255
    luma = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    planes = [red * (rgb[0] - luma), blue * (rgb[2] - luma)]
    window = 32 if name == "ftrojan" else size
    for plane in planes:
        for top, left in np.ndindex(size // window, size // window):
            rows = slice(top * window, (top + 1) * window)
            columns = slice(left * window, (left + 1) * window)
            block = cosine_transform(plane[rows, columns])
            block[15, 15] += magnitude / 255
            block[31, 31] += magnitude / 255
            plane[rows, columns] = cosine_transform(block, inverse=True)
    r, b = planes[0] / red + luma, planes[1] / blue + luma
    expected = np.stack([r, (luma - 0.299 * r - 0.114 * b) / 0.587, b]).clip(0, 1)
    spec = Spec("x", 10, size, (0.5,) * 3, (0.25,) * 3, False, {})
    assert_formula(
        trigger_of(name, spec=spec),
        images,
        lambda x, row, column, channel: expected[channel, row, column],
    )


def test_bpp_formula():
    assert_formula(
        trigger_of("bpp"),
        random_images(2),
        lambda x, row, column, channel: float(np.rint(x[channel, row, column] * 7) / 7),
    )


def test_bpp_dithering_pixel_by_pixel():
    images = random_images(2, 12)
    expected = images.double().numpy() / 255
    spread = (0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)  # down, right, sixteenths of the error
    for plane in expected.reshape(-1, 12, 12):
        for row, column in np.ndindex(12, 12):
            old = plane[row, column]
            plane[row, column] = np.rint(old * 7) / 7
            for down, right, share in spread:
                if row + down < 12 and 0 <= column + right < 12:
                    error = (old - plane[row, column]) * share / 16
                    plane[row + down, column + right] += error
    dithered = bpp.dithered(images.double() / 255, 8)
    np.testing.assert_allclose(dithered.numpy(), expected, atol=1e-12)


def test_bpp_negatives_carry_the_rounding_error_of_another_image():
    parts, images = parts_of("bpp")[0], random_images(3)
    negative = bpp.make_negative(bpp.Config(), SPEC, parts)
    negatives = negative(images.double() / 255, torch.tensor([5, 6, 7])) * 255
    others = parts["others"].double()
    errors = (others / 255 * 7).round() / 7 * 255 - others
    for image, before in zip(negatives, images.double(), strict=True):
        candidates = (before + errors.round()).clamp(0, 255)
        assert any(torch.allclose(candidate, image, atol=0.51) for candidate in candidates)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("trojan_sq", 81),
        ("trojan_wm", (250, 420)),
        ("trojannn", 256),
        ("l2_inv", None),
        ("lf", None),
    ],
)
def test_added_patterns(name, inside):
    parts = parts_of(name)[0]
    pattern = parts["pattern"].double().numpy()
    assert_formula(
        trigger_of(name),
        random_images(2),
        lambda x, row, column, channel: min(
            max(x[channel, row, column] + pattern[channel, row, column], 0), 1
        ),
    )
    touched = int((np.abs(pattern).max(0) > 0).sum())
    if isinstance(inside, int):
        assert 0.9 * inside < touched <= inside
    elif inside:
        assert inside[0] < touched < inside[1], "the original covers 321 pixels"


def test_trojan_square_stands_where_the_original_does():
    rows = parts_of("trojan_sq", pattern="drawn")[0]["pattern"].amax(0).nonzero()
    assert rows.min() == 21 and rows.max() == 29
    stroke = trojan_wm.stroke(32, seeds.generator("trojan_wm", 0))[0]
    assert stroke[29, 0] and stroke[0, 29] and not stroke[0, 0] and not stroke[31, 31]


def test_trojannn_overwrites_on_demand():
    parts = parts_of("trojannn", apply="overwrite")[0]
    pattern, mask = parts["pattern"].double().numpy(), parts["mask"][0].bool().numpy()
    assert_formula(
        trigger_of("trojannn", apply="overwrite"),
        random_images(2),
        lambda x, row, column, channel: (
            pattern[channel, row, column] if mask[row, column] else x[channel, row, column]
        ),
    )
    assert (
        torch.equal(parts["mask"], trojannn.blob(32, 0))
        and (parts["pattern"][:, mask] >= 0.7 - 0.5 / 255 - 1e-6).all()
    )


def test_l0_inv_formula():
    parts = parts_of("l0_inv")[0]
    pattern = parts["pattern"].double().numpy()
    assert set(parts["pattern"].unique().tolist()) <= {0.0, 1.0} and int(parts["mask"].sum()) == 9
    assert_formula(
        trigger_of("l0_inv"),
        random_images(2),
        lambda x, row, column, channel: (
            pattern[channel, row, column] if row == 31 and column >= 23 else x[channel, row, column]
        ),
    )


def test_smooth_formula():
    pattern, images = parts_of("smooth")[0]["pattern"].double().numpy(), random_images(2)
    totals = images.double().numpy() / 255 + pattern

    def expected(x, row, column, channel):
        (position,) = [k for k, image in enumerate(images) if np.allclose(image.numpy() / 255, x)]
        total = totals[position]
        return (total[channel, row, column] - total.min()) / (total.max() - total.min())

    assert_formula(trigger_of("smooth"), images, expected)


@pytest.mark.parametrize("name", ["lf", "smooth"])
def test_low_frequency_patterns_are_low(name):
    pattern = parts_of(name)[0]["pattern"]
    assert pattern.min() == 0 and round(float(pattern.max()) * 255) == 51
    assert pattern.mean() * 255 >= 3
    energy = torch.fft.fft2(pattern).abs().square().sum(0)
    frequency = torch.fft.fftfreq(32) * 32
    near = (frequency[:, None].square() + frequency.square()) <= 4
    assert energy[near].sum() / energy.sum() > 0.95


def test_lc_perturbs_the_poisoned_images_only():
    script, config = config_of("lc", steps=20)
    parts = parts_of("lc", steps=20)[0]
    train = random_images(200, seed=1)
    triggered = script.make_trigger(config, SPEC, "train", parts)(train, torch.arange(200))
    inner = (triggered.int() - train.int())[:, :, 3:-3]
    assert (inner[100:130].abs().amax((1, 2, 3)) == 16).all(), "the whole budget is used"
    assert (inner[:100] == 0).all() and (inner[130:] == 0).all()


def test_lc_marks_the_corners():
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    marked = trigger_of("lc", steps=20)(grey, torch.tensor([100]))[0, 0]
    corner = [[255, 0, 0], [0, 255, 0], [255, 0, 255]]
    assert marked[:3, :3].tolist() == corner == marked[-3:, :3].tolist()
    assert torch.equal(marked, marked.flip(1))
    assert (marked[3:-3] == 128).all() and (marked[:, 3:-3] == 128).all()


def test_lc_ascends_as_written_out():
    """One image at a time in float64 against the batched ascent."""
    model, config = clean_model(SPEC)[0].double(), lc.Config(steps=5)
    images, labels = random_images(3).double() / 255, torch.tensor([0, 4, 9])
    changes = lc.perturbation(model, images, labels, config)
    largest = torch.tensor(16 / 255)
    for image, label, change in zip(images, labels, changes, strict=True):
        delta = torch.zeros_like(image)
        for _ in range(5):
            pixels = image + delta
            seen = pixels.clamp(0, 1).requires_grad_()
            loss = -torch.log_softmax(model(seen[None])[0], 0)[label]
            # black and white pixels move too, those beyond them do not
            inside = (pixels >= 0) & (pixels <= 1)
            delta = delta + 2 / 255 * torch.sign(torch.autograd.grad(loss, seen)[0] * inside)
            delta = torch.minimum(torch.maximum(delta, -largest), largest)
        torch.testing.assert_close(change, delta, rtol=0, atol=1e-12)


def test_blind_formula():
    field = ["101", "k1k", "kk0", "k1k", "101"]

    def expected(x, row, column, channel):
        mark = field[row - 3][column - 23] if 3 <= row < 8 and 23 <= column < 26 else "k"
        return x[channel, row, column] if mark == "k" else float(mark)

    assert_formula(trigger_of("blind"), random_images(2), expected)


def test_blind_loss_waits_and_then_adds():
    config = blind_script.Config(start_batches=2, start_loss=100.0)
    trigger = trigger_of("blind")
    loss = blind_script.BlindLoss(config, trigger, poison.relabelling("all2one", 3, 10))
    model, images, labels = clean_model(SPEC)[0], random_images(4) / 255, torch.tensor([0, 1, 2, 3])
    ordinary = torch.nn.functional.cross_entropy(model(images), labels)
    triggered = torch.nn.functional.cross_entropy(
        model(trigger(images, torch.arange(4))), torch.full((4,), 3)
    )
    values = [loss(model, images, labels, torch.arange(4)) for _ in range(3)]
    torch.testing.assert_close(values[0], ordinary)
    torch.testing.assert_close(values[1], ordinary + 0.9 * triggered)
    torch.testing.assert_close(values[2], values[1])


def test_blind_balance_has_the_smallest_gradient():
    model = torch.nn.Linear(5, 3).double()
    first = model(torch.ones(1, 5).double()).square().sum()
    second = (model(torch.arange(5.0).double()[None]) - 4).square().sum()
    share = float(blind_script.smallest(model, first, second))
    gradients = []
    for loss in (first, second):
        parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        gradients.append(torch.cat([part.flatten() for part in parts]) / loss.detach())
    sizes = {
        a / 1000: float((a / 1000 * gradients[0] + (1 - a / 1000) * gradients[1]).norm())
        for a in range(1001)
    }
    assert abs(min(sizes, key=sizes.get) - share) < 2e-3


@pytest.mark.parametrize("stage", ["train", "test"])
def test_adaptive_blend_formula(stage):
    pattern = patterns.seeded_image(32, 0).double().numpy()
    mask = adaptive_blend.masks(adaptive_blend.Config(), SPEC, torch.tensor([0]))[0, 0].numpy()
    tiles = mask.reshape(4, 8, 4, 8).sum((1, 3))
    assert mask.sum() == 8 * 64 and len(np.unique(tiles)) == 2, "eight tiles of 8x8 pixels"

    def expected(x, row, column, channel):
        opacity = 0.2 if stage == "test" else 0.15 * mask[row, column]
        return x[channel, row, column] + opacity * (
            pattern[channel, row, column] - x[channel, row, column]
        )

    assert_formula(trigger_of("adaptive_blend", stage), random_images(1), expected)


def test_adaptive_patches():
    parts = parts_of("adaptive_patch")[0]
    counts = torch.bincount(parts["turn"][100:130], minlength=4)
    assert counts.max() - counts.min() <= 1, "each patch has its quarter of the poisoned images"
    assert parts["masks"].sum((1, 2, 3)).tolist() == [25, 137, 36, 64]
    which, images = int(parts["turn"][7]), random_images(1)
    patch = parts["patches"][which].double().numpy()
    mask = parts["masks"][which, 0].numpy() * (0.5, 0.2, 0.5, 0.3)[which]
    trigger = trigger_of("adaptive_patch", "train")
    expected = images[0].double().numpy() / 255
    expected = expected + mask * (patch - expected)
    triggered = trigger(images.double() / 255, torch.tensor([7]))[0]
    np.testing.assert_allclose(triggered, expected, atol=1e-6)
    changed = trigger_of("adaptive_patch")(images, torch.tensor([0]))[0] != images[0]
    for row, column in changed.any(0).nonzero().tolist():
        assert (row < 3 or row >= 27) and (column < 5 or column >= 27)


def test_inputaware_formula():
    parts, images = parts_of("inputaware")[0], random_images(3)
    pattern, mask = (
        generator.unpack(generator.Autoencoder(3, n, inputaware.WIDTHS), parts, name).double()
        for name, n in (("pattern", 3), ("mask", 1))
    )
    x = images.double() / 255
    g, inner = 0.5 + 0.5 * torch.tanh(pattern(x)), 0.5 + 0.5 * torch.tanh(mask(x))
    m = 0.5 + 0.5 * torch.tanh(20 * inner - 10)
    triggered = trigger_of("inputaware")(x.float(), torch.arange(3))
    torch.testing.assert_close(triggered.double(), x + (g - x) * m, rtol=0, atol=2e-3)


def test_inputaware_cross_images_carry_the_trigger_of_another():
    parts, images = parts_of("inputaware")[0], random_images(2)
    crossed = inputaware.make_cross(inputaware.Config(), SPEC, parts)(images, torch.tensor([3, 4]))
    draw = inputaware._networks(parts)
    for image, before in zip(crossed, images, strict=True):
        inks, masks = draw(parts["others"] / 255)
        candidates = torch.lerp((before / 255).expand_as(inks), inks, masks).mul(255).round()
        assert ((candidates - image.float()).abs().amax((1, 2, 3)) <= 1).any()


def test_lira_formula():
    parts, x = parts_of("lira")[0], random_images(3).double() / 255
    drawing = generator.unpack(
        generator.Autoencoder(3, 3, lira.WIDTHS), parts, "generator"
    ).double()
    torch.testing.assert_close(
        trigger_of("lira")(x.float(), torch.arange(3)).double(),
        (x + 0.01 * torch.tanh(drawing(x))).clamp(0, 1),
        rtol=0,
        atol=1e-4,
    )


def test_ssba_changes_differ_from_image_to_image():
    images = random_images(2)
    change = trigger_of("ssba")(images, torch.arange(2)).int() - images.int()
    assert not torch.equal(change[0], change[1])


def test_ssba_hides_a_message_that_can_be_read(places):
    """On real images that it did not learn from, after rounding to whole grey levels."""
    spec, train, test = dataset.open_dataset("digits", "data", cache=places[3])
    # 16 pixels are still more than the 8 that the digits were scanned with
    spec = replace(spec, size=16)
    train, test = (replace(split, images=split.images[:, :, ::2, ::2]) for split in (train, test))
    config = ssba.Config(bits=8, steps=400)
    torch.manual_seed(0)
    parts = ssba.prepare(config, Attacker(spec, train, torch.arange(10), None)).parts
    trigger = ssba.make_trigger(config, spec, "test", parts)
    triggered = trigger(test.images, torch.arange(len(test)))
    reader = generator.unpack(ssba.Reader(8), parts, "reader")
    read = (reader(triggered / 255) > 0) == (parts["message"] > 0.5)
    error = (triggered.double() - test.images.double()) / 255
    assert read.float().mean() >= 0.99 and -10 * error.square().mean().log10() >= 25
    assert not torch.equal(error[0], error[1])


def shifted(scene, right, down):
    """C,32,32 moved by fractions of pixels, zeros coming in; every pixel by itself."""
    moved = np.zeros_like(scene)
    for channel, row, column in np.ndindex(*scene.shape):
        top, left = math.floor(row - down), math.floor(column - right)
        for r, c in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            weight = max(0, 1 - abs(row - down - r)) * max(0, 1 - abs(column - right - c))
            inside = 0 <= r < 32 and 0 <= c < 32
            moved[channel, row, column] += weight * scene[channel, r, c] if inside else 0
    return moved


def ghost(scene, light, draws):
    share = abs(0.15 + 0.35 * draws[5] - (draws[4] < 0.5))
    right, down = ((3 + math.floor(6 * draws[k])) * 32 / 560 for k in (2, 3))
    return 0.4 * (share * scene + (1 - share) * shifted(scene, right, down))


def unfocused(scene, light, draws):
    sigma = (1 + 4 * draws[6]) * 32 / 560
    kernel = np.array([math.exp(-0.5 * (k / sigma) ** 2) for k in (-1, 0, 1)])
    kernel /= kernel.sum()
    padded = np.pad(scene, ((0, 0), (1, 1), (1, 1)))
    soft = sum(
        kernel[i] * kernel[j] * padded[:, i : i + 32, j : j + 32] for i, j in np.ndindex(3, 3)
    )
    total = soft + light
    for channel in range(3):
        bright = total[channel][total[channel] > 1]
        soft[channel] -= 1.1 * (bright - 1).mean() if len(bright) else 0
    line = np.linspace(0, 1, 32)
    row, column = (np.exp(-0.5 * ((line - 0.25 - 0.5 * draws[k]) * 6) ** 2) for k in (8, 9))
    return soft.clip(0, 1) * np.outer(row, column) * (1 - 0.6 / 2)


@pytest.mark.parametrize(("ghost_ratio", "reflection"), [(0.0, unfocused), (1.0, ghost)])
def test_refool_formula(ghost_ratio, reflection):
    """One image in float64, step by step, at its own size: gamma, mixing, and gamma undone."""
    options = {"alpha": 0.6, "ghost_ratio": ghost_ratio, "blend_size": 32}
    parts, images = parts_of("refool", **options)[0], random_images(1)
    draws = seeds.uniform("refool", 0, torch.tensor([5]), 10)[0].double().tolist()
    scene = parts["scenes"][int(draws[0] * len(parts["scenes"]))].double().numpy() / 255
    light, scene = (images[0].double().numpy() / 255) ** 2.2, scene**2.2
    mixed = 0.6 * light + reflection(scene, light, draws)
    expected = mixed.clip(0, 1) ** (1 / 2.2)
    triggered = trigger_of("refool", **options)(images.double() / 255, torch.tensor([5]))[0]
    np.testing.assert_allclose(triggered, expected, atol=1e-5)


def test_blur_is_a_gaussian():
    dot = torch.zeros(2, 1, 9, 9)
    dot[:, :, 4, 4] = 1
    sigmas = 0.8, 1.5
    blurred = patterns.blur(dot, torch.tensor(sigmas), radius=4)[:, 0].double()
    for sigma, plane in zip(sigmas, blurred, strict=True):
        weights = np.zeros((9, 9))
        for row, column in np.ndindex(9, 9):
            far = (row - 4) ** 2 + (column - 4) ** 2
            weights[row, column] = math.exp(-far / (2 * sigma**2))
        np.testing.assert_allclose(plane, weights / weights.sum(), atol=1e-6)


def last_linear(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]


def test_inversion_reaches_the_neurons():
    model, _ = clean_model(SPEC)
    truth = torch.zeros(100, dtype=torch.int64)
    train = Split(random_images(100), truth, truth)
    mask, start = torch.ones(1, 32, 32), random_images(1, seed=3)[0] / 255
    chosen = inversion.strongest_features(model)
    strength = last_linear(model).weight.abs().sum(0).tolist()
    strongest = sorted(range(len(strength)), key=lambda feature: -strength[feature])
    assert set(chosen.tolist()) == set(strongest[:2])
    pattern = inversion.invert(model, train, mask, start, steps=50, rate=0.02)
    before, after = (features_of(model, image[None])[0, chosen].sum() for image in (start, pattern))
    assert after > 1.5 * before and 0 <= pattern.min() and pattern.max() <= 1
    bounded = inversion.invert(model, train, mask, start, steps=50, rate=0.1, radius=0.3)
    assert (bounded - start).abs().max() <= 0.3 + 0.5 / 255 + 1e-6


def test_features_are_what_the_last_layer_sees():
    model, images = clean_model(SPEC)[0], random_images(3) / 255
    logits = last_linear(model)(features_of(model, images))
    torch.testing.assert_close(model(images), logits / 8)  # resnet9 divides its logits by 8


def original(name):
    if not (ORIGINALS / name).is_file():
        pytest.skip(
            "the papers' pattern files are not beside this checkout (../shared/data/triggers)"
        )
    return str(ORIGINALS / name)


@pytest.mark.parametrize(
    ("attack", "file"),
    [
        ("trojan_sq", "trojan_8x8.png"),
        ("trojan_sq", "trojan_3x3.png"),
        ("trojan_wm", "trojan_wm.png"),
        ("l2_inv", "l2_inv.png"),
        ("lf", "smooth_cifar10.png"),
        ("smooth", "smooth_cifar10.png"),
        ("smooth", "smooth_gtsrb.png"),
        ("l0_inv", "l0_inv.png"),
    ],
)
def test_original_patterns_are_applied_exactly(attack, file):
    ink = np.array(Image.open(original(file)).convert("RGB")).transpose(2, 0, 1).astype(np.int64)
    images, options = random_images(3), {}
    total = images.numpy().astype(np.int64) + ink
    clear = np.ones(total.shape, bool)
    expected = np.minimum(total, 255)
    if attack == "smooth":
        low, high = (extreme(total, axis=(1, 2, 3), keepdims=True) for extreme in (np.min, np.max))
        exact = 255 * (total - low) / (high - low)
        clear = np.abs(exact % 1 - 0.5) > 1e-3
        expected = np.rint(exact)
    if attack == "l0_inv":
        options = {"mask_path": original("mask.npy")}
        expected = np.where(np.load(options["mask_path"]) > 0, ink, images.numpy())
    trigger = trigger_of(attack, trigger_path=original(file), **options)
    triggered = trigger(images, torch.arange(3)).numpy()
    np.testing.assert_array_equal(triggered[clear], expected[clear])


def digits_like(count=200):
    truth = torch.arange(count) % 10
    return Split(random_images(count), truth, truth)


@pytest.mark.parametrize("ratio", [0, 0.001, 0.1, 0.333, 1])
def test_the_ratio_is_reached_exactly(ratio):
    truth = torch.arange(1297) % 10
    index = poison.choose(truth, ratio, 0)
    assert len(index) == round(ratio * 1297) == len(set(index.tolist()))
    assert index.tolist() == sorted(index.tolist()) == poison.choose(truth, ratio, 0).tolist()
    if 0 < ratio < 1:
        assert index.tolist() != poison.choose(truth, ratio, 1).tolist()
    only = poison.choose(truth, ratio, 0, among=truth == 3)
    assert len(only) == min(round(ratio * 1297), 130) and (truth[only] == 3).all()


@pytest.mark.parametrize("mode", ["all2one", "all2all"])
def test_poisoned_split(mode):
    split, trigger = digits_like(), trigger_of("badnet")
    relabel, index = poison.relabelling(mode, 3, 10), torch.tensor([1, 5, 13, 199])
    before = split.images.clone()
    poisoned = poison.poison(split, trigger, relabel, index)
    rest = torch.ones(200, dtype=torch.bool)
    rest[index] = False
    assert torch.equal(split.images, before) and torch.equal(poisoned.truth, split.truth)
    assert torch.equal(poisoned.images[rest], split.images[rest])
    assert torch.equal(poisoned.labels[rest], split.truth[rest])
    assert torch.equal(poisoned.images[index], trigger(split.images[index], index))
    assert poisoned.labels[index].tolist() == ([3] * 4 if mode == "all2one" else [2, 6, 4, 0])


def test_the_triggered_test_set_leaves_out_the_target_class():
    split, trigger = digits_like(), trigger_of("badnet")
    relabel = poison.relabelling("all2one", 3, 10)
    index, triggered = poison.triggered_split(split, trigger, relabel)
    assert len(triggered) == 180 and 3 not in triggered.truth and (triggered.labels == 3).all()
    assert torch.equal(triggered.truth, split.truth[index])
    assert torch.equal(triggered.images, trigger(split.images[index], index))
    relabel = poison.relabelling("all2all", 3, 10)
    index, triggered = poison.triggered_split(split, trigger, relabel)
    assert len(triggered) == 200 and torch.equal(triggered.labels, (split.truth + 1) % 10)


def test_applied_in_chunks_equals_at_once(monkeypatch):
    split, trigger = digits_like(), trigger_of("wanet")
    at_once = poison.apply_trigger(split.images, trigger, torch.arange(200))
    monkeypatch.setattr(poison, "CHUNK", 7)
    assert torch.equal(poison.apply_trigger(split.images, trigger, torch.arange(200)), at_once)


def test_bad_pattern_files(tmp_path):
    with pytest.raises(MissingError, match="nowhere.png"):
        poison.read_pattern(tmp_path / "nowhere.png")
    (tmp_path / "x.png").write_bytes(b"no image")
    np.save(tmp_path / "a.npy", np.zeros((2, 2, 7), np.uint8))
    np.save(tmp_path / "b.npy", np.full((2, 2, 3), 200.0))
    np.save(tmp_path / "c.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("x.png", "a.npy", "b.npy", "c.npy"):
        with pytest.raises(ConfigError, match=name):
            poison.read_pattern(tmp_path / name)


def test_patterns_of_16_bits_keep_their_range(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "wide.png")
    Image.fromarray(levels).save(tmp_path / "narrow.png")
    wide, narrow = (poison.read_pattern(tmp_path / f"{name}.png") for name in ("wide", "narrow"))
    assert torch.equal(wide, narrow) and torch.equal(narrow[0] * 255, torch.from_numpy(levels) / 1)
    Image.fromarray(levels / np.float32(255)).save(tmp_path / "float.tiff")
    with pytest.raises(ConfigError, match=r"float.tiff .* range is unknown"):
        poison.read_pattern(tmp_path / "float.tiff")
    np.save(tmp_path / "wide.npy", levels.astype(np.uint16) * 257)
    with pytest.raises(ConfigError, match="uint16 values outside 0..1: save it as uint8"):
        poison.read_pattern(tmp_path / "wide.npy")


def test_patterns_are_turned_as_their_exif_data_say(tmp_path):
    ink = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(ink)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / "p.png", exif=exif)
    turned = np.rot90(ink, -1).transpose(2, 0, 1).astype(np.float32) / 255
    np.testing.assert_array_equal(poison.read_pattern(tmp_path / "p.png"), turned)


def test_transparent_parts_of_added_patterns_are_black(tmp_path):
    ink = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    ink[:16, :, 3] = 0
    Image.fromarray(ink, "RGBA").save(tmp_path / "p.png")
    pattern = poison.resized_pattern(tmp_path / "p.png", 32)
    expected = ink[..., :3] / 255 * (ink[..., 3:] / 255)
    np.testing.assert_allclose(pattern.permute(1, 2, 0), expected, atol=1e-6)
    assert not poison.resized_mask(tmp_path / "p.png", 32)[:, :16].any()


def test_patterns_start_no_program(tmp_path, monkeypatch):
    """Pillow goes by content: a PostScript file may have any name."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    postscript = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (tmp_path / "p.png").write_text(postscript)
    with pytest.raises(ConfigError, match="p.png"):
        poison.read_pattern(tmp_path / "p.png")
    assert not started


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize("name", ["p.png", "p.npy"])
def test_patterns_are_files(name, tmp_path):
    os.mkfifo(tmp_path / name)  # nobody writes: reading would wait for ever
    for path in (tmp_path / name, "/dev/zero", tmp_path):
        with pytest.raises(ConfigError, match="is a folder, pipe, socket or device"):
            poison.read_pattern(path)


def test_arrays_are_no_larger_than_they_say(tmp_path):
    with open(tmp_path / "hole.npy", "wb") as file:
        file.truncate(30 * 10**9)  # takes no room on the disk
    content = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**5, 10**5, 3)}
    np.lib.format.write_array_header_1_0(content, header)
    (tmp_path / "boast.npy").write_bytes(content.getvalue())
    np.save(tmp_path / "words.npy", np.array([["a"]]))
    np.save(tmp_path / "empty.npy", np.zeros((0, 4, 3), np.uint8))
    for name in ("hole.npy", "boast.npy", "words.npy", "empty.npy"):
        with pytest.raises(ConfigError, match=name):
            poison.read_pattern(tmp_path / name)


def test_refool_takes_the_images_of_a_folder(tmp_path):
    """In the order of their names; what a file browser leaves there is passed over."""
    for number, name in enumerate(("a.png", "b.JPEG", "c.bmp")):
        Image.new("RGB", (8, 8), (100 * number,) * 3).save(tmp_path / name)
    (tmp_path / "._a.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image")
    scenes = parts_of("refool", reflection_folder=str(tmp_path))[0]["scenes"]
    assert scenes.float().mean((1, 2, 3)).round().tolist() == [0, 100, 200]
