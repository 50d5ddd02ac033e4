"""AWM against the plain reading of its equations: every loss written out, autograd through the masked kernels, float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

import models
from defense import awm
from tests.test_fmp import found_record
from utils import seeds
from utils.channels import convolutions


def options(**changes):
    return awm.Config(result_file="x", **changes)


def network():
    """Convolutions with a bias, a stride and groups, behind batch norms with statistics of their own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, bias=True), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2, bias=False),
                        nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)).double()  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return net.eval()


def pictures(count=20):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 9, 9, generator=generator, dtype=torch.float64), torch.arange(count) % 4


def naive(model, images, labels, config):
    """The algorithm as it is written: labels predicted anew in every step, two forward passes, autograd to mask and D."""
    names = [f"{name}.weight" for name in convolutions(model)]
    theta = {name: model.get_parameter(name).detach() for name in names}
    mask = {name: torch.ones_like(theta[name], requires_grad=True) for name in names}
    optimizer = torch.optim.Adam(mask.values(), config.lr) if config.mask_optimizer == "adam" else torch.optim.SGD(mask.values(), config.lr)
    alpha, beta = config.setting("alpha"), 1 - config.setting("alpha") if config.beta is None else config.beta
    tau = config.setting("tau") * images[0].numel() / 3072
    steps, batch = config.schedule(len(images))

    def net(pixels):
        return functional_call(model, {name: mask[name] * theta[name] for name in names}, (pixels,))

    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = config.lr * config.lr_decay**epoch
        draw = torch.randint(len(images), (2, steps, batch), generator=seeds.generator("awm", config.random_seed, epoch))
        delta = torch.zeros(1, 3, 9, 9, dtype=torch.float64, requires_grad=True)
        for index in draw[0]:
            wanted = labels[index] if config.inner_label == "true" else net(images[index]).argmax(1)
            shown = images[index] + delta
            if config.clamp == "both":
                shown = shown.clamp(0, 1)
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(shown), wanted), delta)
            delta = (delta + config.perturbation_lr * gradient).detach().requires_grad_()
        delta = delta.detach() * min(1.0, tau / float(delta.detach().abs().sum()))
        for index in draw[1]:
            shown = images[index] + delta
            if config.clamp != "none":
                shown = shown.clamp(0, 1)
            loss = alpha * F.cross_entropy(net(images[index]), labels[index]) + beta * F.cross_entropy(net(shown), labels[index])
            loss = loss + config.gamma * sum(part.abs().sum() for part in mask.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for part in mask.values():
                    part.clamp_(0, 1)
    return {name: part.detach() for name, part in mask.items()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"inner_label": "true", "lr_decay": 0.9}, {"mask_optimizer": "sgd", "lr": 3.0, "clamp": "none", "beta": 0.3}, {"clamp": "both"}],
    ids=["default", "paper labels", "pseudocode", "both clamped"],
)
def test_fast_equals_the_written_algorithm(changes):
    config = options(epochs=3, batch_size=8, tau=500.0, alpha=0.5, gamma=1e-3, **changes)
    model, (images, labels) = network(), pictures()
    expected = naive(network(), images, labels, config)
    found = awm.learn(model, images, labels, config)
    assert list(found) == list(expected) and min(part.min() for part in expected.values()) < 0.95, "the masks must have moved"
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-9)
        assert 0 <= found[name].min() and found[name].max() <= 1


def test_only_the_kernels_change_and_the_mask_is_in_them():
    model, before = network(), network().state_dict()
    images, labels = pictures()
    modes = []
    handle = model[1].register_forward_hook(lambda layer, *_: modes.append(layer.training))
    mask = awm.learn(model, images, labels, options(epochs=2, gamma=1e-3))
    handle.remove()
    assert not any(modes)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] * mask[name] if name in mask else before[name]), name
    fresh = torch.rand(5, 3, 9, 9, dtype=torch.float64)
    masked = functional_call(network(), {name: mask[name] * before[name] for name in mask}, (fresh,))
    assert torch.equal(model(fresh), masked)


def test_the_perturbation_stays_within_tau():
    model, (images, labels) = network(), pictures()
    draws = torch.arange(20)[None].repeat(6, 1)
    free = awm.perturbation(model, images, labels, draws, 1e9, options())
    norm = float(free.abs().sum())
    assert norm > 1 and torch.equal(awm.perturbation(model, images, labels, draws, norm * 1.01, options()), free)
    cut = awm.perturbation(model, images, labels, draws, norm / 3, options())
    torch.testing.assert_close(cut, free / 3)
    assert float(awm.perturbation(model, images, labels, draws, 0.0, options()).abs().sum()) == 0
    for parameter in model.parameters():
        parameter.data.zero_()
    still = awm.perturbation(model, images, labels, draws, 1.0, options())
    assert (still == 0).all(), "without a gradient nothing is divided by zero"


def test_true_and_predicted_labels_agree_where_the_model_is_right():
    model, (images, _) = network(), pictures()
    labels = model(images).argmax(1)
    draws = torch.arange(20)[None].repeat(3, 1)
    assert torch.equal(
        *(awm.perturbation(model, images, labels, draws, 1e9, options(inner_label=which)) for which in ("true", "predicted"))
    )


@pytest.mark.parametrize(("dtype", "gamma", "steps", "low", "high"), [
    (torch.float64, 1e-8, 200, 0, 0), (torch.float32, 1e-8, 201, 0, 0), (torch.float32, 1e-8, 190, 0.01, 0.1), (torch.float64, 1e-9, 300, 0.72, 0.735),
])  # fmt: skip
def test_a_weight_that_nothing_needs_fades(dtype, gamma, steps, low, high):
    """gamma equals Adam's epsilon: such a factor falls by half a step size at a time."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Flatten(), nn.Linear(2 * 4, 2)).to(dtype).eval()
    model[2].weight.data.zero_()
    config = options(gamma=gamma)
    theta, flat = {"0.weight": model[0].weight.detach().clone()}, torch.ones(6, dtype=dtype)
    images = torch.rand(2, 3, 2, 2, dtype=dtype)
    awm.train_mask(model, images, torch.tensor([0, 1]), torch.arange(2).repeat(steps, 1), torch.zeros(1, 3, 2, 2, dtype=dtype), theta, flat,
                   awm._optimizer(flat, config), config)  # fmt: skip
    assert low <= flat.min() and flat.max() <= high


def test_steps_of_the_published_settings():
    assert options().schedule(500) == (15, 128) and options().schedule(2500) == (95, 128)
    assert options(variant="one_shot").schedule(100) == (15, 32) and options(variant="one_shot").schedule(43) == (5, 32)
    assert options().schedule(20) == (5, 20) and options(inner=1).schedule(1) == (1, 1)
    assert options(variant="one_shot").budget(50_000, 10) == 10 and options().budget(50_000, 10) == 2500
    assert options(clean_count=500).budget(50_000, 10) == 500 and options(clean_count=3).budget(50_000, 10) == 10
    assert (options().setting("tau"), options(variant="one_shot").setting("tau"), options(variant="one_shot", tau=7.0).setting("tau")) == (
        1000,
        100,
        7,
    )


def test_one_shot_pictures():
    images, labels = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8), torch.arange(10)
    more, told = awm.with_copies(images, labels, True, 0)
    assert torch.equal(more[:10], images) and len(more) == 100 and told.bincount().tolist() == [10] * 10
    assert torch.equal(more, awm.with_copies(images, labels, True, 0)[0]) and not torch.equal(
        more, awm.with_copies(images, labels, True, 1)[0]
    )
    assert len(more.flatten(1).unique(dim=0)) == 100


def test_tau_grows_with_the_picture():
    """As the number of values does; the perturbation's mean size is then the same."""
    config, norms = options(epochs=1, tau=10.0), []
    for side in (8, 16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
        seen = []
        model.register_forward_pre_hook(lambda _module, pixels, seen=seen: seen.append(pixels[0].detach()))
        images = torch.full((4, 3, side, side), 0.5)
        awm.learn(model, images, torch.tensor([0, 1, 0, 1]), options(epochs=1, tau=10.0, inner=200, perturbation_lr=100.0, clamp="none"))
        norms.append(float((seen[-1][4] - 0.5).abs().sum()))
    assert math.isclose(norms[0], 10 * 3 * 64 / 3072, rel_tol=1e-3) and math.isclose(norms[1], 4 * norms[0], rel_tol=1e-3), config


def test_an_interrupted_run_ends_with_the_same_mask(tmp_path):
    images, labels = pictures()
    whole = awm.learn(network(), images, labels, options(epochs=7, gamma=1e-3))
    stop = awm.KEEP_EVERY + 1

    def killed(epoch, **_):
        if epoch == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        awm.learn(network(), images, labels, options(epochs=7, gamma=1e-3), state=tmp_path, on_round=killed)
    rounds = []
    again = awm.learn(
        network(), images, labels, options(epochs=7, gamma=1e-3), state=tmp_path, on_round=lambda epoch, **_: rounds.append(epoch)
    )
    assert rounds == [6, 7] and all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("name", ["resnet9", "mobilenet_v3_large"])
def test_any_network_by_its_convolutions(name, tmp_path):
    record, said = found_record(tmp_path, 40)
    torch.manual_seed(0)
    model = models.build(name, record.spec, 4 if name == "resnet9" else None).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    awm.repair(model, record, options(epochs=1, inner=1))
    mask = load_file(tmp_path / "kept" / "mask.safetensors")
    assert said == ["mask"] and model.training and set(mask) == {f"{layer}.weight" for layer in convolutions(model)}
    assert all(torch.equal(value, before[key] * mask[key] if key in mask else before[key]) for key, value in model.state_dict().items())
