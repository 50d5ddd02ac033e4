"""Attacks that optimise their trigger: Narcissus and COMBAT.

The references are written out in numpy, in float64.
"""

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from antidote_bench.attack import combat, narcissus
from antidote_bench.utils import seeds
from antidote_bench.utils.data import dataset
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.poisoning import generator, poison
from tests.helpers import UNTRAINED
from tests.test_triggers import SPEC


@pytest.fixture(scope="module")
def digits(places):
    """The training and the test images."""
    return dataset.open_dataset("digits", "data", cache=places[3])[1:]


def grey_images(count, size=8, seed=0, classes=2):
    """Images whose pixels are far from black and white, and classes by turns."""
    draws = torch.Generator().manual_seed(seed)
    images = torch.randint(60, 190, (count, 3, size, size), generator=draws, dtype=torch.uint8)
    truth = torch.arange(count) % classes
    return Split(images, truth, truth)


def linear_model(size=8, classes=2, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes))
    return model.eval().requires_grad_(False)


def softmax(logits):
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


# ---------- Narcissus ----------


def adam_on_noise(model, images, config):
    """The noise that projected Adam finds for a linear model, step by step in float64."""
    weights, offset = (part.double().numpy() for part in (model[1].weight, model[1].bias))
    pixels = images.images.double().numpy().reshape(len(images), -1) / 255
    draws = seeds.generator("pattern batches", config.poison_seed)
    noise, mean, square = (np.zeros(pixels.shape[1]) for _ in range(3))
    for step in range(1, config.steps + 1):
        batch = pixels[torch.randint(len(images), (len(images),), generator=draws).numpy()]
        shown = batch + noise
        errors = softmax(shown.clip(0, 1) @ weights.T + offset)
        errors[:, config.attack_target] -= 1
        gradient = ((errors @ weights) * ((shown >= 0) & (shown <= 1))).mean(0)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        upwards = np.sqrt(square / (1 - 0.999**step)) + 1e-8
        noise = noise - 0.01 / 2 * mean / (1 - 0.9**step) / upwards
        noise = noise.clip(-config.epsilon / 255, config.epsilon / 255)
    return noise.reshape(3, 8, 8)


@pytest.mark.parametrize("epsilon", [3, 16])
def test_noise_in_float64(epsilon):
    """With a bound of 3 levels every pixel is projected; some images are black or white."""
    images = grey_images(30, classes=3)
    images.images[:10] = images.images[:10] // 64 * 85
    config = narcissus.Config(steps=8, attack_target=1, epsilon=epsilon, precision="fp32")
    model = linear_model(classes=3)
    noise = narcissus.inward_noise(model, images, config).numpy()
    np.testing.assert_allclose(noise, adam_on_noise(model, images, config), atol=2e-6)
    assert (np.abs(noise) > (epsilon - 0.5) / 255).any() == (epsilon == 3)


def test_noise_for_a_linear_model_is_the_sign_of_its_weights():
    model, images = linear_model(), grey_images(40)
    towards = (model[1].weight[1] - model[1].weight[0]).view(3, 8, 8).sign()
    config = narcissus.Config(steps=20, attack_target=1, precision="fp32")
    noise = narcissus.inward_noise(model, images, config)
    torch.testing.assert_close(noise, 16 / 255 * towards)


def test_noise_is_made_with_the_target_class_alone():
    seen, images = [], grey_images(60, classes=3)
    images.images[images.truth != 2] = 255
    network = linear_model(classes=3)

    class Watched(nn.Module):
        def forward(self, shown):
            seen.append((self.training, float(shown.detach().amax())))
            return network(shown)

    attacker = SimpleNamespace(train=images, clean_model=lambda: Watched().eval())
    config = narcissus.Config(steps=5, attack_target=2, precision="fp32", epsilon=16.5)
    pattern = narcissus.prepare(config, attacker).parts["pattern"]
    assert len(seen) == 5 and not any(training for training, _ in seen)
    assert max(largest for _, largest in seen) < 0.9
    levels = pattern * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_test_images_carry_three_times_the_noise():
    levels = torch.randint(-16, 17, (3, 32, 32), generator=torch.Generator().manual_seed(0))
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    for scale, stage, times in ((3, "train", 1), (3, "test", 3), (2, "test", 2)):
        config, parts = narcissus.Config(test_scale=scale), {"pattern": levels / 255}
        trigger = narcissus.make_trigger(config, SPEC, stage, parts)
        assert torch.equal(trigger(grey, torch.arange(1))[0] - 100.0, times * levels.float())


def test_a_record_of_narcissus(attack, digits):
    train, test = digits
    words = "--attack_target", 3, "--pratio", 0.02, "--steps", 4
    place = attack(narcissus, *UNTRAINED, *words)
    saved = load_file(place / "poison.safetensors")
    noise = (load_file(place / "trigger.safetensors")["pattern"] * 255).round().long()
    index, shown = saved["train_index"], saved["test_index"]
    assert len(index) == 26 and (train.truth[index] == 3).all()
    assert (saved["train_labels"] == 3).all() and (test.truth[shown] != 3).all()
    assert torch.equal(saved["train_images"], (train.images[index] + noise).clamp(0, 255).byte())
    assert torch.equal(saved["test_images"], (test.images[shown] + 3 * noise).clamp(0, 255).byte())


def linear_network(size):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 10))


def fitted_to(split, rate=0.01, steps=40):
    """A linear classifier of images, trained quickly."""
    model = linear_network(split.images.shape[-1])
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(split.images / 255), split.truth).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def test_noise_leads_other_images_of_the_digits_to_the_target(digits):
    train, test = digits
    model = fitted_to(train)
    assert (model(test.images / 255).argmax(1) == test.truth).double().mean() > 0.85
    config = narcissus.Config(steps=60, attack_target=4, precision="fp32")
    noise = narcissus.inward_noise(model, train.view((train.truth == 4).nonzero()[:, 0]), config)
    others = test.images[test.truth != 4] / 255
    taken = [
        float((model((others + scale * noise).clamp(0, 1)).argmax(1) == 4).double().mean())
        for scale in (0, 1, 3)
    ]
    assert taken[0] < 0.02 and taken[1] < 0.3 and taken[2] > 0.6, taken


# ---------- COMBAT ----------


def low_passed(image, share):
    """A plane S,S without the rows and columns of its cosine transform from `share` of them on."""
    size = len(image)
    waves = np.empty((size, size))
    for number, place in np.ndindex(size, size):
        waves[number, place] = math.cos(math.pi * (2 * place + 1) * number / (2 * size))
        waves[number, place] *= math.sqrt((2 if number else 1) / size)
    spectrum = waves @ image @ waves.T
    kept = int(share * size)
    spectrum[kept:], spectrum[:, kept:] = 0, 0
    return waves.T @ spectrum @ waves


def blurred(image, sigma):
    """A plane S,S under a Gaussian of 3x3 pixels, mirrored at its border, pixel by pixel."""
    size, result = len(image), np.zeros(image.shape)
    offsets = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    weights = [math.exp(-(down**2 + right**2) / (2 * sigma**2)) for down, right in offsets]
    for row, column in np.ndindex(size, size):
        for (down, right), weight in zip(offsets, weights, strict=True):
            y, x = (size - 1 - abs(size - 1 - abs(line)) for line in (row + down, column + right))
            result[row, column] += weight / sum(weights) * image[y, x]
    return result


@pytest.mark.parametrize(("size", "share", "sigma"), [(9, 0.65, 0.5), (12, 0.3, 1.2), (8, 1, 0.1)])
def test_combat_stamp_in_float64(size, share, sigma):
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, size, size, generator=draws).round(decimals=1)
    noise = 3 * torch.randn(2, 3, size, size, generator=draws)
    config = combat.Config(low_pass=share, blur=sigma, strength=30)
    given = combat.make_stamp(config, size, "cpu")(images, noise).numpy()
    for number, channel in np.ndindex(2, 3):
        added = low_passed(np.tanh(noise[number, channel].double().numpy()), share)
        plane = (images[number, channel].double().numpy() + 30 / 255 * added).clip(0, 1)
        np.testing.assert_allclose(given[number, channel], blurred(plane, sigma), atol=1e-6)


def test_the_low_pass_is_a_projection_and_the_blur_keeps_grey():
    for size in (24, 32, 64):
        low, soft = combat.low_pass(size, 0.65), combat.blurring(size, 0.5)
        torch.testing.assert_close(low @ low, low, rtol=0, atol=1e-6)
        assert round(float(low.trace())) == int(0.65 * size)
        torch.testing.assert_close(soft.sum(1), torch.ones(size), rtol=0, atol=1e-6)
    # the share of grey that stays in its place, and the largest sum of the noise: the docstring's
    centre, gain = float(combat.blurring(32, 0.5).diagonal().min()) ** 2, combat.low_pass(32, 0.65)
    gain = float(gain.abs().sum(1).max()) ** 2
    assert 129 < 255 * (1 - centre) + centre * 10.2 * gain <= 130


def test_the_cost_of_a_trigger_in_float64():
    draws = torch.Generator().manual_seed(0)
    images, triggered = torch.rand(2, 4, 3, 5, 5, generator=draws)
    told, true = torch.randn(2, 4, 6, generator=draws)
    labels = torch.tensor([0, 3, 5, 2])
    for weight in (0.8, 0.0):
        config = combat.Config(attack_target=2, clean_weight=weight)
        cost = float(combat.cost_of_trigger(images, triggered, told, true, labels, config))
        wrong, right = (np.log(softmax(part.double().numpy())) for part in (told, true))
        change = 2 * triggered.double().numpy() - 2 * images.double().numpy()
        expected = -wrong[:, 2].mean() + 0.02 * (change**2).mean()
        expected -= weight * right[range(4), labels].mean()
        assert cost == pytest.approx(expected, rel=1e-6)


class Watched(nn.Module):
    """A linear classifier that remembers what it was shown, and in which mode."""

    def __init__(self, size, classes):
        super().__init__()
        self.layer, self.seen = nn.Linear(3 * size * size, classes), []

    def forward(self, images):
        self.seen.append((self.training, images.detach()))
        return self.layer(images.flatten(1))


def one_turn(pratio):
    """(images and labels of a batch, stamped ones, the networks after a turn and before it)"""
    torch.manual_seed(0)
    split, spec = grey_images(40, 16, classes=4), dataclasses.replace(SPEC, size=16, flip=False)
    config = combat.Config(pratio=pratio, pad=0, attack_target=1, precision="fp32", strength=40)
    surrogate, clean = Watched(16, 10), Watched(16, 10).eval().requires_grad_(False)
    drawing = generator.Autoencoder(3, 3, (4, 8), skip=True).train()
    attacker = SimpleNamespace(spec=spec, train=split, clean_model=lambda: clean)
    before = copy.deepcopy((surrogate, clean, drawing))
    descents, _ = combat.descents_of(config, surrogate, drawing)
    turn = combat.make_turn(config, attacker, surrogate, drawing, descents)
    images = split.images / 255
    turn(images, split.truth, torch.Generator().manual_seed(0))
    return config, images, split.truth, (surrogate, clean, drawing), before


def stepped(network, cost):
    """The parameters after one step of SGD with Nesterov momentum from rest, written out."""
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(cost, parameters)
    return [
        (value - 0.01 * 1.9 * (gradient + 5e-4 * value)).detach()
        for value, gradient in zip(parameters, gradients, strict=True)
    ]


def test_a_turn_is_a_step_of_each_network():
    config, images, labels, after, (surrogate, clean, drawing) = one_turn(1.0)
    stamp = combat.make_stamp(config, 16, "cpu")
    triggered = stamp(images, drawing(images))
    (taught, mixed), (judged, shown) = after[0].seen
    assert taught and not judged, "the surrogate judges in evaluation mode"
    assert torch.equal(mixed[labels != 1], images[labels != 1])
    torch.testing.assert_close(mixed[labels == 1], triggered[labels == 1])
    torch.testing.assert_close(shown, triggered)
    expected = stepped(surrogate, F.cross_entropy(surrogate(mixed), labels))
    torch.testing.assert_close(list(after[0].parameters()), expected)
    told, true = after[0](triggered), clean(triggered)
    cost = combat.cost_of_trigger(images, triggered, told, true, labels, config)
    torch.testing.assert_close(list(after[2].parameters()), stepped(drawing, cost))
    torch.testing.assert_close(list(after[1].parameters()), list(clean.parameters()))


def test_the_surrogate_sees_as_much_poison_as_the_victim():
    _, images, labels, after, _ = one_turn(0.125)  # half of a class of four
    mixed = after[0].seen[0][1]
    changed = (mixed != images).flatten(1).any(1)
    assert not changed[labels != 1].any() and 1 <= changed.sum() <= 9
    truth = torch.tensor([0] * 90 + [1] * 10)
    for pratio, share in ((0.05, 0.5), (0.4, 1)):
        config = combat.Config(pratio=pratio, attack_target=1)
        assert combat.poisoned_share(truth, config) == pytest.approx(share)


def test_a_victim_learns_the_trigger_of_combat_and_a_clean_model_does_not(places, monkeypatch):
    """Planted: linear networks and strong noise, on half of a class of the digits."""
    spec, train, test = dataset.open_dataset("digits", "data", image_size=16, cache=places[3])
    train = train.view(torch.arange(600))
    clean = fitted_to(train, steps=80)
    options = {"strength": 60.0, "joint_lr": 0.02, "generator_epochs": 8, "batch_size": 60}
    config = combat.Config(attack_target=4, pad=0, precision="fp32", **options)
    index = poison.to_poison(train.truth, config)
    monkeypatch.setattr(combat, "new_victim", lambda *_: linear_network(16))
    torch.manual_seed(0)
    attacker = SimpleNamespace(spec=spec, train=train, index=index, clean_model=lambda: clean)
    trigger = combat.make_trigger(config, spec, "test", combat.prepare(config, attacker).parts)
    victim = fitted_to(poison.poison(train, trigger, None, index), steps=80)
    others = (test.truth != 4).nonzero().flatten()
    shown = trigger(test.images[others], others) / 255
    taken = [float((model(shown).argmax(1) == 4).double().mean()) for model in (victim, clean)]
    right = (victim(test.images / 255).argmax(1) == test.truth).double().mean()
    assert right > 0.9 and taken[0] > 0.25 and taken[1] < 0.1, taken
