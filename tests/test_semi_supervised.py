"""Semi-supervised training: its losses in float64, and the images of an epoch."""

import math

import pytest
import torch
from torch import nn

from antidote_bench.utils.repair import semi_supervised
from tests.test_dbd import differing, network, options, state
from tests.test_fmp import found_record


def test_the_symmetric_cross_entropy_in_loops():
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(7) % 4
    for row, label, actual in zip(
        logits.tolist(),
        labels.tolist(),
        semi_supervised.symmetric_cross_entropy(logits, labels, 0.3, 0.7).tolist(),
        strict=True,
    ):
        total = sum(math.exp(value) for value in row)
        p = [math.exp(value) / total for value in row]
        q = [1.0 if k == label else 1e-4 for k in range(4)]
        forward, reverse = -math.log(p[label]), -sum(p[k] * math.log(q[k]) for k in range(4))
        assert actual == pytest.approx(0.3 * forward + 0.7 * reverse, abs=1e-5)


def test_the_lowest_losses_are_believed():
    losses = torch.tensor([0.3, 0.1, 0.9, 0.1, 0.5, 0.2, 0.1])
    alike = torch.zeros(7, dtype=torch.long)
    known, unknown = semi_supervised.split_by_loss(losses, alike, 0.5)
    assert known.tolist() == [1, 3, 6] and unknown.tolist() == [5, 0, 4, 2]
    assert [len(part) for part in semi_supervised.split_by_loss(losses, alike, 0.01)] == [
        1,
        6,
    ] and [len(part) for part in semi_supervised.split_by_loss(losses, alike, 0.999)] == [6, 1]


def test_losses_are_those_of_images_without_augmentation_and_change_nothing(tmp_path):
    record, _ = found_record(tmp_path, 20)
    model = network().train()
    before, actual = state(model), semi_supervised.losses_of(model, record.train, options())
    assert model.training and not differing(before, model.state_dict())
    logits = model.eval()(record.train.images / 255)
    torch.testing.assert_close(
        actual,
        semi_supervised.symmetric_cross_entropy(logits, record.train.labels, 0.1, 1.0).detach(),
    )


def test_every_step_has_known_images_and_twice_the_same_unknown_ones():
    known, unknown = torch.arange(0, 10), torch.arange(10, 13)
    actual = semi_supervised.epoch_positions(
        known, unknown, 5, 4, torch.Generator().manual_seed(0)
    ).view(5, 3, 4)
    assert torch.equal(actual[:, 1], actual[:, 2])
    first, second = actual[:, 0].flatten(), actual[:, 1].flatten()
    assert (
        sorted(first[:10].tolist()) == sorted(first[10:].tolist()) == known.tolist()
        and first[:10].tolist() != known.tolist()
    )
    assert all(sorted(part.tolist()) == unknown.tolist() for part in second[:18].split(3))


def test_guessed_labels_are_the_sharpened_mean():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    actual = semi_supervised.guess_labels(logits, 0.5)
    for n in range(3):
        mean = [
            (float(logits[n].softmax(0)[k]) + float(logits[n + 3].softmax(0)[k])) / 2
            for k in range(4)
        ]
        squares = [value**2 for value in mean]
        assert actual[n].tolist() == pytest.approx([value / sum(squares) for value in squares])
    assert torch.equal(
        semi_supervised.guess_labels(logits, 0.01).round(),
        torch.nn.functional.one_hot(actual.argmax(1), 4).double(),
    )


def test_images_keep_at_least_half_of_themselves():
    torch.manual_seed(0)
    shares, partners = semi_supervised.draw_mixture(20_000, 0.75, "cpu")
    assert (
        0.5 <= shares.min() < 0.51
        and 0.99 < shares.max() <= 1
        and sorted(partners.tolist()) == list(range(20_000))
    )
    expected = torch.distributions.Beta(0.75, 0.75).sample((20_000,))
    assert abs(shares.mean() - torch.maximum(expected, 1 - expected).mean()) < 0.01
    one_sided, _ = semi_supervised.draw_mixture(2000, 0.01, "cpu")
    assert one_sided.mean() > 0.97


def test_mixing_in_loops():
    values = torch.rand(3, 2, 2)
    shares = torch.tensor([0.5, 0.8, 1.0])
    partners = torch.tensor([2, 0, 1])
    expected = torch.stack(
        [shares[n] * values[n] + (1 - shares[n]) * values[partners[n]] for n in range(3)]
    )
    torch.testing.assert_close(semi_supervised.mix(values, shares, partners), expected)


def test_the_two_parts_of_the_loss_in_loops():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 4, generator=generator).double()
    aims = torch.rand(9, 4, generator=generator).double()
    known = (
        -sum(float(aims[n, k] * logits[n].log_softmax(0)[k]) for n in range(3) for k in range(4))
        / 3
    )
    square = sum(
        float(aims[n, k] - logits[n].softmax(0)[k]) ** 2 for n in range(3, 9) for k in range(4)
    ) / (6 * 4)
    assert semi_supervised.semi_supervised(logits, aims, 3, 15.0).item() == pytest.approx(
        known + 15 * square
    )


class Recording(nn.Module):
    """A linear model that keeps its inputs, and whether gradients were on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 10, generator=torch.Generator().manual_seed(5)))
        self.seen = []

    def forward(self, images):
        self.seen.append((images, torch.is_grad_enabled()))
        return images.flatten(1) @ self.weight


def test_mixmatch_is_the_sum_of_its_parts():
    """Guesses come from the second and last third, without a gradient; the weight rises by step."""
    loss, model = semi_supervised.MixMatch(options(steps=3), 10, 2), Recording()
    images = torch.rand(12, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 10
    for step in range(6):
        model.seen.clear()
        torch.manual_seed(step)
        value = loss(model, images, labels, None)
        torch.manual_seed(step)
        shares, partners = semi_supervised.draw_mixture(12, 0.75, "cpu")
        (guess, grad), (mixture, mixture_grad) = model.seen
        assert torch.equal(guess, images[4:]) and (grad, mixture_grad) == (False, True)
        torch.testing.assert_close(mixture, semi_supervised.mix(images, shares, partners))
        probabilities = (images[4:].flatten(1) @ model.weight).softmax(1)
        sharp = ((probabilities[:4] + probabilities[4:]) / 2) ** 2
        sharp = (sharp / sharp.sum(1, keepdim=True)).detach()
        aims = semi_supervised.mix(
            torch.cat([torch.eye(10)[labels[:4]], sharp, sharp]), shares, partners
        )
        logits = mixture.flatten(1) @ model.weight
        torch.testing.assert_close(
            value, semi_supervised.semi_supervised(logits, aims, 4, 15 * step / 5)
        )
    assert loss.state_dict().keys() == {"step"} and int(loss.step) == 6
