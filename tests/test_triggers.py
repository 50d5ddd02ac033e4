"""What every trigger promises, whichever attack it belongs to; then each attack's own formula, pixel by pixel."""

import importlib
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from attack import blended, wanet
from tests.conftest import ROOT, names
from utils import poison, seeds
from utils.data import Spec, Split
from utils.errors import ConfigError, MissingError

SPEC = Spec("cifar10", 10, 32, (0.5,) * 3, (0.25,) * 3, True, {})


def trigger_of(name, stage="test", spec=SPEC, **options):
    script = importlib.import_module(f"attack.{name}")
    return script.make_trigger(script.Config(**options), spec, stage)


def pictures(count=64, size=32, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("stage", ["train", "test"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("name", names("attack"))
def test_contract(name, dtype, stage):
    trigger, images, index = trigger_of(name, stage), pictures(), torch.arange(100, 164)
    images = images if dtype == torch.uint8 else images / 255
    before = images.clone()
    stamped = trigger(images, index)
    assert stamped.shape == images.shape and stamped.dtype == dtype and stamped.device == images.device
    assert torch.equal(images, before), "the argument was changed"
    assert torch.equal(stamped, trigger(images, index)), "not repeatable"
    assert torch.equal(stamped, trigger_of(name, stage)(images, index)), "not the same from the same seed"
    change = (stamped.double() - images.double()).abs().flatten(1).amax(1) * (1 if dtype == torch.uint8 else 255)
    assert (change >= 1 - 1e-4).all(), "an image is not changed"
    assert 0 <= stamped.min() and stamped.max() <= (255 if dtype == torch.uint8 else 1)
    shuffled = torch.tensor([40, 3, 17])
    part = trigger(images[shuffled], index[shuffled])
    torch.testing.assert_close(
        part, stamped[shuffled], rtol=0, atol=0 if dtype == torch.uint8 else 1e-6, msg="depends on the rest of the batch"
    )


@pytest.mark.parametrize("name", names("attack"))
def test_float_and_uint8_agree(name):
    trigger, images, index = trigger_of(name), pictures(), torch.arange(64)
    exact = trigger(images / 255, index) * 255
    assert (trigger(images, index).float() - exact).abs().max() <= 0.501, "rounded to nearest, nothing wraps around"


@pytest.mark.parametrize("name", names("attack"))
@pytest.mark.parametrize("size", [24, 64])
def test_other_sizes(name, size):
    spec = Spec("x", 10, size, (0.5,) * 3, (0.25,) * 3, False, {})
    assert trigger_of(name, spec=spec)(pictures(4, size), torch.arange(4)).shape == (4, 3, size, size)


def test_same_bytes_in_another_process():
    code = ("import torch, sys; from tests.test_triggers import *; "
            "sys.stdout.write(','.join(str(int(trigger_of(n)(pictures(), torch.arange(64)).long().sum())) for n in names('attack')))")  # fmt: skip
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert there == ",".join(str(int(trigger_of(name)(pictures(), torch.arange(64)).long().sum())) for name in names("attack"))


def assert_formula(trigger, images, formula):
    """The trigger equals formula(picture in [0, 1], row, column, channel), worked out pixel by pixel in float64."""
    pixels, index = images.double().numpy() / 255, torch.arange(len(images))
    expected = np.empty_like(pixels)
    for position, channel, row, column in np.ndindex(*pixels.shape):
        expected[position, channel, row, column] = formula(pixels[position], row, column, channel)
    np.testing.assert_allclose(trigger(images.double() / 255, index), expected, rtol=0, atol=1e-5)
    levels, found = expected * 255, trigger(images, index).double().numpy()
    clear = np.abs(levels % 1 - 0.5) > 3e-3  # not half-way between two grey levels, where float32 decides
    np.testing.assert_array_equal(found[clear], np.rint(levels)[clear])
    assert clear.mean() > 0.9 and np.abs(found - levels).max() < 0.502


def test_badnet_formula():
    assert_formula(
        trigger_of("badnet"), pictures(2), lambda x, row, column, channel: 1.0 if row >= 29 and column >= 29 else x[channel, row, column]
    )


def test_badnet_places_and_black_patches():
    trigger = trigger_of("badnet", patch_size=4, patch_value=0, patch_row=-5, patch_column=2)
    assert_formula(
        trigger, pictures(2), lambda x, row, column, channel: 0.0 if 27 <= row < 31 and 2 <= column < 6 else x[channel, row, column]
    )
    for options in ({"patch_size": 33}, {"patch_row": 30}, {"patch_column": -40}):
        with pytest.raises(ConfigError, match="does not fit"):
            trigger_of("badnet", **options)


def test_badnet_from_a_file(tmp_path):
    ink = np.random.default_rng(0).integers(0, 256, (5, 4, 4), dtype=np.uint8)
    Image.fromarray(ink, "RGBA").save(tmp_path / "p.png")
    np.save(tmp_path / "p.npy", ink)

    def expected(x, row, column, channel):
        if row < 27 or column < 28:
            return x[channel, row, column]
        opacity = ink[row - 27, column - 28, 3] / 255
        return (1 - opacity) * x[channel, row, column] + opacity * ink[row - 27, column - 28, channel] / 255

    for name in ("p.png", "p.npy"):
        assert_formula(trigger_of("badnet", trigger_path=str(tmp_path / name)), pictures(2), expected)
    Image.new("RGB", (32, 32)).save(tmp_path / "all.png")
    with pytest.raises(ConfigError, match="covers the whole"):
        trigger_of("badnet", trigger_path=str(tmp_path / "all.png"))


@pytest.mark.parametrize(("stage", "opacity"), [("train", 0.1), ("test", 0.4)])
def test_blended_formula(stage, opacity):
    trigger, images = trigger_of("blended", stage, train_opacity=0.1, test_opacity=0.4, poison_seed=5), pictures(2)
    pattern = blended.seeded_pattern(32, 5).double().numpy()
    assert_formula(
        trigger, images, lambda x, row, column, channel: (1 - opacity) * x[channel, row, column] + opacity * pattern[channel, row, column]
    )
    assert (trigger(images, torch.arange(2)).int() - images.int()).abs().max() <= math.ceil(255 * opacity)


def test_blended_pattern_is_like_the_usual_one():
    for seed in range(5):
        pattern = blended.seeded_pattern(32, seed)
        assert 0 <= pattern.min() and pattern.max() <= 1
        assert 150 < pattern.mean() * 255 < 215 and 45 < pattern.std() * 255 < 100
    assert not torch.equal(blended.seeded_pattern(32, 0), blended.seeded_pattern(32, 1))


def test_blended_from_a_file(tmp_path):
    ink = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "p.npy", ink)
    trigger = trigger_of("blended", trigger_path=str(tmp_path / "p.npy"))
    assert_formula(
        trigger, pictures(2), lambda x, row, column, channel: 0.8 * x[channel, row, column] + 0.2 * ink[row, column, channel] / 255
    )


def bilinear(picture, row, column):
    """The picture's value at a fractional place, written out."""
    top, left = min(int(row), 30), min(int(column), 30)
    down, right = row - top, column - left
    return ((1 - down) * (1 - right) * picture[top, left] + (1 - down) * right * picture[top, left + 1]
            + down * (1 - right) * picture[top + 1, left] + down * right * picture[top + 1, left + 1])  # fmt: skip


def test_wanet_formula():
    config = wanet.Config()
    grid = wanet.warp_grid(config, SPEC)[0].double().numpy()

    def expected(x, row, column, channel):
        across, down = (grid[row, column] + 1) / 2 * 31
        return bilinear(x[channel], down, across)

    assert_formula(wanet.make_trigger(config, SPEC, "test"), pictures(2), expected)


def test_wanet_warp_is_the_papers():
    grid = wanet.warp_grid(wanet.Config(strength=0.5), SPEC)[0]
    line = torch.linspace(-1, 1, 32)
    identity = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    moved = (grid - identity) * 32
    assert grid.abs().max() <= 1
    assert 0.15 < moved.abs().mean() < 0.6, "control points move by 0.5 / S on average"
    inner = moved[2:-2, 2:-2]  # at the border the grid is cut to the picture
    assert (inner[1:] - inner[:-1]).abs().max() < 0.35 and (inner[:, 1:] - inner[:, :-1]).abs().max() < 0.35, "the field is smooth"
    points = torch.rand(1, 2, 4, 4, generator=seeds.generator("warp", 0)) * 2 - 1
    points = points / points.abs().mean() * 0.5
    corner = (points[0, :, 0, 0] / 32 + identity[0, 0]).clamp(-1, 1)
    torch.testing.assert_close(grid[0, 0], corner)


def test_wanet_noise_is_its_own_for_every_position():
    config = wanet.Config()
    noise, warp, images = wanet.make_noise(config, SPEC), wanet.make_trigger(config, SPEC, "train"), pictures(4)
    found = noise(images, torch.tensor([7, 8, 9, 10]))
    assert torch.equal(found[2:], noise(images[2:], torch.tensor([9, 10])))
    same = images[:1].expand(4, -1, -1, -1)
    assert not torch.equal(noise(same, torch.arange(4))[0], noise(same, torch.arange(4))[1])
    assert not torch.equal(found, warp(images, torch.arange(4)))


def digits_like(count=200):
    truth = torch.arange(count) % 10
    return Split(pictures(count), truth, truth)


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
    found = poison.poison(split, trigger, relabel, index)
    rest = torch.ones(200, dtype=torch.bool)
    rest[index] = False
    assert torch.equal(split.images, before) and torch.equal(found.truth, split.truth)
    assert torch.equal(found.images[rest], split.images[rest]) and torch.equal(found.labels[rest], split.truth[rest])
    assert torch.equal(found.images[index], trigger(split.images[index], index))
    assert found.labels[index].tolist() == ([3] * 4 if mode == "all2one" else [2, 6, 4, 0])


def test_the_triggered_test_set_leaves_out_the_target_class():
    split, trigger = digits_like(), trigger_of("badnet")
    index, found = poison.backdoored(split, trigger, poison.relabelling("all2one", 3, 10))
    assert len(found) == 180 and 3 not in found.truth and (found.labels == 3).all()
    assert torch.equal(found.truth, split.truth[index]) and torch.equal(found.images, trigger(split.images[index], index))
    index, found = poison.backdoored(split, trigger, poison.relabelling("all2all", 3, 10))
    assert len(found) == 200 and torch.equal(found.labels, (split.truth + 1) % 10)


def test_materialised_in_chunks_equals_at_once(monkeypatch):
    split, trigger = digits_like(), trigger_of("wanet")
    whole = poison.stamp(split.images, trigger, torch.arange(200))
    monkeypatch.setattr(poison, "CHUNK", 7)
    assert torch.equal(poison.stamp(split.images, trigger, torch.arange(200)), whole)


def test_bad_pattern_files(tmp_path):
    with pytest.raises(MissingError, match="nowhere.png"):
        poison.pattern(tmp_path / "nowhere.png")
    (tmp_path / "x.png").write_bytes(b"no picture")
    np.save(tmp_path / "a.npy", np.zeros((2, 2, 7), np.uint8))
    np.save(tmp_path / "b.npy", np.full((2, 2, 3), 200.0))
    np.save(tmp_path / "c.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("x.png", "a.npy", "b.npy", "c.npy"):
        with pytest.raises(ConfigError, match=name):
            poison.pattern(tmp_path / name)


def test_original_pattern_is_reproduced():
    path = ROOT.parent / "shared" / "data" / "triggers" / "trojan_3x3.png"
    if not path.is_file():
        pytest.skip("the papers' pattern files are not beside this checkout (../shared/data/triggers)")
    expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    assert torch.equal((poison.pattern(path)[:3] * 255).round().to(torch.uint8), expected)
