"""FT-SAM: its core step against the equations written out, and what it does to a backdoor."""

import copy
import csv

import pytest
import torch
import torch.nn.functional as F

from defense import ft_sam
from tests.test_train import Double, model, options, split, weights
from utils import seeds, train
from utils.batch import mixed_precision


def done(folder):
    (row,) = csv.DictReader(open(folder / "results.csv"))
    return {name: float(row[name]) for name in ("acc_before", "asr_before", "acc", "asr")}


def sam_by_hand(network, data, config, rho, smoothing):
    """Weights moved uphill in place and back, one tensor after the other; the second pass by a model of its own."""
    speed = {}
    network.train()
    for epoch in range(config.epochs):
        rate = config.lr / 2 * (1 + torch.cos(torch.tensor(torch.pi * epoch / config.epochs, dtype=torch.float64)))
        for index in torch.randperm(len(data), generator=seeds.generator("epoch", 0, epoch)).split(config.batch_size):
            images, labels = data.images[index].float() / 255, data.labels[index]
            told = F.one_hot(labels, 4) * (1 - smoothing) + smoothing / 4
            other = copy.deepcopy(network)
            network.zero_grad()
            (-(told * network(images).log_softmax(1)).sum(1).mean()).backward()
            norm = sum(float((weight.detach() * weight.grad).square().sum()) for weight in network.parameters()) ** 0.5
            with torch.no_grad():
                for weight, moved in zip(network.parameters(), other.parameters(), strict=True):
                    moved += rho * weight.square() * weight.grad / norm
            other.zero_grad()
            (-(told * other(images).log_softmax(1)).sum(1).mean()).backward()
            with torch.no_grad():
                for (name, weight), moved in zip(network.named_parameters(), other.parameters(), strict=True):
                    slope = moved.grad + config.weight_decay * weight
                    speed[name] = config.momentum * speed.get(name, 0) + slope
                    weight -= rate * speed[name]
    return network


def test_sharpness_aware_steps_equal_the_equations_in_float64():
    data, config = split(), options(epochs=3)
    fast = train.fit(Double(model()), data, config, loss=lambda *batch: ft_sam.sharpness_aware(*batch, rho=2.0, label_smoothing=0.1))
    slow = sam_by_hand(Double(model()), data, config, 2.0, 0.1)
    torch.testing.assert_close(weights(fast), weights(slow), rtol=0, atol=1e-6)
    plain = sam_by_hand(Double(model()), data, config, 0.0, 0.1)
    assert (weights(fast) - weights(plain)).abs().max() > 0.01, "the push must matter"


def test_without_a_radius_it_is_fine_tuning():
    data, config = split(), options(epochs=2)
    one = train.fit(model(), data, config, loss=lambda *batch: ft_sam.sharpness_aware(*batch, rho=0.0))
    assert torch.equal(weights(one), weights(train.fit(model(), data, config)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_second_pass_is_at_the_moved_weights_and_leaves_everything(precision):
    network, images, labels = model().train(), torch.rand(16, 3, 32, 32), torch.arange(16) % 4
    first, second = copy.deepcopy(network), copy.deepcopy(network)
    before = [weight.detach().clone() for weight in network.parameters()]
    with mixed_precision(images.device, precision):
        loss = ft_sam.sharpness_aware(network, images, labels, None, rho=2.0)
        value = train.cross_entropy(first, images, labels, None)
    assert all(torch.equal(*pair) for pair in zip(network.parameters(), before, strict=True))
    assert all(torch.equal(*pair) for pair in zip(network.buffers(), first.buffers(), strict=True)), "one pass counts"
    pushes = ft_sam.uphill(before, torch.autograd.grad(value, list(first.parameters())), 2.0)
    with torch.no_grad():
        for weight, push in zip(second.parameters(), pushes, strict=True):
            weight += push
    with mixed_precision(images.device, precision):
        expected = train.cross_entropy(second, images, labels, None)
    torch.testing.assert_close(loss, expected)
    assert abs(float((loss - value).detach())) > 1e-3
    loss.backward(), expected.backward()
    for one, other in zip(network.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_larger_weight_is_moved_further_and_a_flat_loss_moves_nothing():
    (push,) = ft_sam.uphill([torch.tensor([1.0, -2.0, 0.0, 3.0])], [torch.tensor([1.0, 1.0, 5.0, 0.0])], 2.0)
    torch.testing.assert_close(push, torch.tensor([1.0, 4.0, 0.0, 0.0]) * 2 / 5**0.5)
    assert all(torch.equal(part, torch.zeros(3)) for part in ft_sam.uphill([torch.ones(3)] * 2, [torch.zeros(3)] * 2, 2.0))


def test_ft_sam_removes_the_backdoor_that_fine_tuning_leaves(places, run, victim):
    """Measured with 64 clean pictures and 100 epochs: ACC 98.8, ASR 0.0; `ft` leaves 96.7."""
    run("defense/ft_sam.py", *places, "--result_file", "victim", "--precision", "fp32")
    row = done(victim / "defense" / "ft_sam")
    assert row["asr_before"] > 0.9 and row["asr"] < 0.1 and row["acc"] > 0.95
