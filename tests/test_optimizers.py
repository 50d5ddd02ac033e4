"""Muon and the learning rates of groups of parameters, against steps that are written out."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from antidote_bench.utils import optimizers

USUAL = {
    "lr": 0.1,
    "muon_lr": 0.2,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 0.01,
    "bias_lr_scale": 1.0,
}


def options(**changes):
    return SimpleNamespace(**{**USUAL, **changes})


def network():
    torch.manual_seed(0)
    parts = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    ]
    return nn.Sequential(*parts).to(memory_format=torch.channels_last)


def gradients(model, seed):
    """Random ones, which lie in memory as the parameters do: the fused step of SGD asks for
    that."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
        for parameter in model.parameters()
    ]


def orthogonal(matrix):
    """What three Newton-Schulz steps make of a matrix, in float64."""
    x = matrix.double() / matrix.norm().double()
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muon_steps_are_the_written_ones():
    """SGD's sum of gradients in place of torch's mean: the nearest orthogonal matrix does not
    depend on the length."""
    model, config = network(), options()
    optimizer = optimizers.muon(list(model.parameters()), config)
    expected = [
        parameter.detach().double().clone(memory_format=torch.contiguous_format)
        for parameter in model.parameters()
    ]
    speed = [torch.zeros_like(value) for value in expected]
    for step in range(3):
        rate = 0.1 * (1 - step / 3)
        optimizers.set_rate(optimizer, rate)
        for number, (parameter, gradient) in enumerate(
            zip(model.parameters(), gradients(model, step), strict=True)
        ):
            parameter.grad = gradient.clone()
            value, gradient = expected[number], gradient.double()
            if value.ndim == 4:
                bank = value.flatten(1)
                bank *= len(bank) ** 0.5 / bank.norm()
                speed[number] = 0.6 * speed[number] + gradient
                # torch takes longer steps with more rows than columns
                wide = max(1, bank.shape[0] / bank.shape[1]) ** 0.5
                bank -= wide * 2 * rate * orthogonal((gradient + 0.6 * speed[number]).flatten(1))
            else:
                slope = gradient + 0.01 * value
                speed[number] = slope if step == 0 else 0.9 * speed[number] + slope
                value -= rate * (slope + 0.9 * speed[number])
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(
            parameter.detach().double(), value, rtol=0, atol=0.02 if value.ndim == 4 else 1e-6
        )


def test_biases_have_a_rate_of_their_own_and_decay_as_the_others():
    model = network()
    optimizer = optimizers.sgd(
        list(model.parameters()), options(bias_lr_scale=64.0, momentum=0.0, nesterov=False)
    )
    optimizers.set_rate(optimizer, 0.05)
    before, slopes = (
        [parameter.detach().clone() for parameter in model.parameters()],
        gradients(model, 0),
    )
    for parameter, slope in zip(model.parameters(), slopes, strict=True):
        parameter.grad = slope.clone()
    optimizer.step()
    for parameter, old, slope in zip(model.parameters(), before, slopes, strict=True):
        scale = 64 if old.ndim == 1 else 1
        torch.testing.assert_close(
            parameter.detach(), old - 0.05 * (scale * slope + 0.01 * old), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", sorted(optimizers.OPTIMIZERS))
def test_parameters_without_a_gradient_stay(name):
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = optimizers.OPTIMIZERS[name](
        [parameter for parameter in model.parameters() if parameter.requires_grad], options()
    )
    model(torch.rand(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert not any(parameter is model[0].weight for parameter, _ in optimizers.states(optimizer))
