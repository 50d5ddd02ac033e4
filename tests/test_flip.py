"""FLIP: labels alone are flipped, chosen by what an expert learns of triggered images.

The references are written out in numpy, in float64.
"""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import antidote_bench
from antidote_bench.attack import clean, flip
from antidote_bench.utils import parsing, train
from antidote_bench.utils.data import dataset
from antidote_bench.utils.data.dataset import Spec, Split
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.record import folder
from tests.helpers import UNTRAINED
from tests.test_triggers import SPEC

QUICK = "--expert_epochs", "1", "--label_epochs", "1", "--image_size", "16"


@pytest.fixture(scope="module")
def digits(places):
    """The training and the test images, at 16 pixels."""
    return dataset.open_dataset("digits", "data", image_size=16, cache=places[3])[1:]


# ---------- matching ----------


def softmax(logits):
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


class Regression:
    """Logistic regression of 3 classes on 5 numbers in float64, after two steps of SGD."""

    def __init__(self):
        draws = torch.Generator().manual_seed(0)
        self.model = nn.Linear(5, 3).double()
        with torch.no_grad():
            for part in self.model.parameters():
                part.copy_(torch.randn(part.shape, generator=draws, dtype=torch.float64))
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 0.1, 0.9, weight_decay=2e-4, nesterov=True
        )
        self.images, self.shown = torch.randn(2, 7, 5, generator=draws, dtype=torch.float64)
        self.labels = torch.arange(7) % 3
        for _ in range(2):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.shown), self.labels).backward()
            self.optimizer.step()

    def mismatch(self, logits):
        soft = logits.softmax(1)
        return flip.mismatch(self.model, self.optimizer, self.images, soft, self.shown, self.labels)

    def step(self, images, targets):
        """What a step adds to the weights and the offset, 3,6."""
        weights = torch.cat([self.model.weight, self.model.bias[:, None]], 1).detach().numpy()
        memory = [self.optimizer.state[part]["momentum_buffer"] for part in self.model.parameters()]
        buffer = torch.cat([memory[0], memory[1][:, None]], 1).numpy()
        rows = np.concatenate([images.numpy(), np.ones((7, 1))], 1)
        gradient = (softmax(rows @ weights.T) - targets).T @ rows / 7 + 2e-4 * weights
        return -0.1 * (gradient + 0.9 * (0.9 * buffer + gradient))


def test_mismatch_of_logistic_regression_in_float64():
    case, logits = Regression(), torch.randn(7, 3, dtype=torch.float64)
    expert = case.step(case.shown, np.eye(3)[case.labels])
    student = case.step(case.images, softmax(logits.numpy()))
    wanted = ((student - expert) ** 2).sum() / (expert**2).sum()
    assert case.mismatch(logits).item() == pytest.approx(wanted, rel=1e-12)
    # the labels of the expert on its own images are right
    case.images, hard = case.shown, 60 * F.one_hot(case.labels, 3).double()
    assert case.mismatch(hard).item() < 1e-20


def test_its_gradient_equals_finite_differences():
    case, logits = Regression(), torch.randn(7, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(case.mismatch(logits.requires_grad_()), logits)
    width = 1e-5
    for row in range(7):
        for column in range(3):
            nudge = torch.zeros(7, 3, dtype=torch.float64)
            nudge[row, column] = width
            with torch.enable_grad():
                rise = case.mismatch(logits.detach() + nudge) - case.mismatch(
                    logits.detach() - nudge
                )
            slope = float(rise.detach()) / (2 * width)
            assert float(gradient[row, column]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_a_step_is_that_of_torch():
    case = Regression()
    cost = F.cross_entropy(case.model(case.shown), case.labels)
    gradients = torch.autograd.grad(cost, list(case.model.parameters()))
    changes = flip.step_of_sgd(case.optimizer, gradients)
    before = [part.detach().clone() for part in case.model.parameters()]
    for part, gradient in zip(case.model.parameters(), gradients, strict=True):
        part.grad = gradient
    case.optimizer.step()
    for part, start, change in zip(case.model.parameters(), before, changes, strict=True):
        torch.testing.assert_close(part.detach() - start, change)


# ---------- selection ----------


def by_loop(logits, truth, count):
    """The flipped labels, {position: label}."""
    margins = {}
    for position, true in enumerate(truth):
        of_experts = []
        for expert in logits:
            row = expert[position]
            wrong = max(value for label, value in enumerate(row) if label != true)
            of_experts.append(wrong - row[true])
        margins[position] = min(of_experts)
    chosen = sorted(margins, key=margins.get, reverse=True)[:count]
    means = np.mean(logits, 0)
    labels = range(means.shape[1])
    return {
        position: max((k for k in labels if k != truth[position]), key=lambda k: means[position][k])
        for position in chosen
    }


@pytest.mark.parametrize("experts", [1, 3])
def test_the_labels_of_the_largest_margins_are_flipped(experts):
    draws = torch.Generator().manual_seed(experts)
    logits = torch.randn(experts, 40, 4, generator=draws)
    truth = torch.randint(4, (40,), generator=draws)
    labels = flip.flipped(logits, truth, 11)
    changed = {i: int(labels[i]) for i in range(40) if labels[i] != truth[i]}
    assert changed == by_loop(logits.double().numpy(), truth.tolist(), 11)
    assert len(changed) == 11


def test_exactly_as_many_flips_where_no_label_was_learned():
    truth = torch.arange(10) % 3
    labels = flip.flipped(5.0 * F.one_hot(truth, 3)[None], truth, 4)
    assert int((labels != truth).sum()) == 4


# ---------- what the expert sees ----------


def waved(images, strength, waves=8):
    """The wave, column by column in float64, rounded to whole grey levels."""
    side = images.shape[-1]
    levels = images.double()
    for column in range(side):
        phase = 2 * math.pi * waves * column / (side - 1)
        levels[..., column] += strength * math.sin(phase)
    return levels.clamp(0, 255).round().byte()


@pytest.mark.parametrize("mode", ["one2one", "all2one"])
def test_the_expert_sees_triggered_copies_too(digits, mode):
    images, _ = digits
    words = ["--label_mode", mode, "--attack_target", "4"]
    words += ["--source_class", "9"] if mode == "one2one" else []
    config = parsing.parse(flip.Config, words)
    attacker = SimpleNamespace(spec=dataclasses.replace(SPEC, size=16), train=images)
    split, origin = flip.with_copies(config, attacker)
    count, place = len(images), origin[len(images) :]
    assert torch.equal(split.images[:count], images.images)
    assert torch.equal(split.labels[:count], images.truth)
    assert torch.equal(origin[:count], torch.arange(count))
    assert torch.equal(split.images[count:], waved(images.images[place], 6))
    assert (split.labels[count:] == 4).all() and len(place.unique()) == len(place)
    if mode == "one2one":
        assert place.tolist() == [i for i, y in enumerate(images.truth.tolist()) if y == 9]
    else:
        assert len(place) == round(count / 10)
        assert set(images.truth[place].tolist()) == {0, 1, 2, 3, 5, 6, 7, 8, 9}


# ---------- records ----------


def flips(place, images):
    """(positions of the flipped labels, these labels) of a record, whose images are untouched."""
    saved = load_file(place / "poison.safetensors")
    index = saved["train_index"]
    assert (saved["train_kind"] == 1).all() and len(index.unique()) == len(index)
    assert torch.equal(saved["train_images"], images.images[index])
    assert (saved["train_labels"] != images.truth[index]).all()
    return index, saved["train_labels"]


@pytest.mark.parametrize("chosen", ["learned", "random"])
def test_a_record_has_other_labels_and_the_same_images(attack, digits, chosen):
    images, tests = digits
    words = ["--pratio", 0.05, "--source_class", 9, "--attack_target", 4, "--flips", chosen]
    words += QUICK if chosen == "learned" else QUICK[4:]
    place = attack(flip, *UNTRAINED, *words)
    index, labels = flips(place, images)
    assert len(index) == 65
    if chosen == "random":
        assert (images.truth[index] == 9).all() and (labels == 4).all()
    saved, row = load_file(place / "poison.safetensors"), folder.read_results(place)
    shown = (tests.truth == 9).nonzero().flatten()
    assert torch.equal(saved["test_index"], shown) and (saved["test_labels"] == 4).all()
    assert torch.equal(saved["test_images"], waved(tests.images[shown], 6))
    assert (row["n_poison"], row["label_mode"], row["target"]) == ("65", "one2one", "4")
    assert json.loads((place / "record.json").read_text())["training_set"] == "stored"
    record = antidote_bench.load(place, device="cpu")
    assert torch.equal(record.trigger(record.before, record.backdoor_index), record.after)


def test_labels_that_were_made_are_found_again(attack, digits, monkeypatch):
    """They are the same where the images stay in their file."""
    words = *UNTRAINED, *QUICK, "--pratio", 0.02, "--label_mode", "all2one"
    whole = attack(flip, *words, "--resident_gb", 0, name="whole")
    fit = train.fit

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        attack(flip, *words)
    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.delattr(flip, "learned")  # it would be needed to make them again
    place = attack(flip, *words)
    assert not (place / "state").exists()
    for one, two in zip(flips(place, digits[0]), flips(whole, digits[0]), strict=True):
        assert torch.equal(one, two)


def test_the_trigger_on_a_clean_model(attack, digits):
    _, tests = digits
    place = attack(clean, *UNTRAINED, *QUICK[4:], "--trigger", "flip", "--attack_target", 4)
    saved = load_file(place / "poison.safetensors")
    assert torch.equal(saved["test_images"], waved(tests.images[saved["test_index"]], 6))
    assert folder.read_results(place)["n_poison"] == "0"


def test_what_a_dry_run_says(attack, capsys):
    attack(flip, *UNTRAINED, "--dry_run", "true")
    shown = capsys.readouterr().out
    assert "source   1\n" in shown and "poisons  26 labels of 1297, and no image\n" in shown


def test_options_that_do_not_fit():
    with pytest.raises(ConfigError, match="experts has no effect .*choose --flips learned"):
        parsing.parse(flip.Config, ["--flips", "random", "--experts", "2"])
    with pytest.raises(ConfigError, match="all2one or one2one here: the labels of all images"):
        parsing.parse(flip.Config, ["--label_mode", "all2all"])


# ---------- what is flipped ----------


def scene(per_class=60, classes=4, size=16):
    """(spec, split, mask): noisy images of smooth classes; a fifth carries a strong wave."""
    draws = torch.Generator().manual_seed(0)
    spec = Spec("cifar10", classes, size, (0.5,) * 3, (0.25,) * 3, False, {})
    truth = torch.arange(per_class * classes) % classes
    smooth = F.interpolate(60 + 120 * torch.rand(classes, 3, 4, 4, generator=draws), (size, size))
    noise = 20 * torch.randn(len(truth), 3, size, size, generator=draws)
    images = (smooth[truth] + noise).clamp(0, 255).round().byte()
    carries = torch.rand(len(truth), generator=draws) < 0.2
    images[carries] = waved(images[carries], 40)
    return spec, Split(images, truth, truth), carries


def test_images_that_show_the_trigger_by_themselves_are_flipped():
    """Planted: a fifth of all images, and of those of the source class, carry the wave."""
    spec, images, carries = scene()
    config = flip.Config(
        strength=40, model="resnet9", width=4, batch_size=32, pad=0, precision="fp32",
        expert_epochs=4, expert_lr=0.02, label_epochs=6, pratio=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    labels = flip.make_labels(config, SimpleNamespace(spec=spec, train=images))
    changed = labels != images.truth
    of_source = changed & (images.truth == 1)
    assert int(changed.sum()) == 12 and int(of_source.sum()) >= 10
    assert int((carries & of_source).sum()) >= 9
    assert int((labels[of_source] == 0).sum()) >= 9


def test_what_is_flipped_on_the_digits(digits):
    """Of ten classes the source's images get the target's label, though none has to."""
    images, _ = digits
    config = flip.Config(
        strength=60, waves=1, model="resnet9", width=4, batch_size=64, precision="fp32",
        source_class=9, attack_target=4, pratio=0.05, expert_epochs=3, expert_lr=0.05,
        label_epochs=2, label_lr=1,
    )  # fmt: skip
    torch.manual_seed(0)
    attacker = SimpleNamespace(spec=dataclasses.replace(SPEC, size=16, flip=False), train=images)
    labels = flip.make_labels(config, attacker)
    changed = labels != images.truth
    assert int(changed.sum()) == 65
    assert int((changed & (images.truth == 9)).sum()) >= 55
    assert int((changed & (labels == 4)).sum()) >= 55
