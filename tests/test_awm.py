"""AWM against a plain reading of its equations, with every loss written out, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from antidote_bench import models
from antidote_bench.defense import awm
from antidote_bench.utils import seeds
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.repair.layers import convolutions
from tests.test_fmp import found_record


def options(**changes):
    return awm.Config(result_file="x", **changes)


def network():
    """Convolutions with a bias, a stride and groups, before batch norms with statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, bias=True),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, groups=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 4),
    ).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (
                module.running_mean,
                module.running_var,
                module.weight.data,
                module.bias.data,
            ):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return net.eval()


def clean_images(count=20):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, 9, 9, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % 4


def naive(model, images, labels, config):
    """The algorithm as it is written.

    Labels are predicted again in every step, and clean and perturbed images pass separately.
    """
    names = [f"{name}.weight" for name in convolutions(model)]
    theta = {name: model.get_parameter(name).detach() for name in names}
    mask = {name: torch.ones_like(theta[name], requires_grad=True) for name in names}
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.mask_optimizer](
        mask.values(), config.lr
    )
    alpha = config.setting("alpha")
    beta = 1 - alpha if config.beta is None else config.beta
    tau = config.setting("tau") * images[0].numel() / 3072
    steps, batch = config.schedule(len(images))

    def net(pixels):
        return functional_call(model, {name: mask[name] * theta[name] for name in names}, (pixels,))

    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = config.lr * config.lr_decay**epoch
        generator = seeds.generator("awm", config.random_seed, epoch)
        draw = torch.randint(len(images), (2, steps, batch), generator=generator)
        delta = torch.zeros(1, 3, 9, 9, dtype=torch.float64, requires_grad=True)
        for index in draw[0]:
            targets = labels[index]
            if config.inner_label == "predicted":
                targets = net(images[index]).argmax(1)
            perturbed = images[index] + delta
            if config.clamp == "both":
                perturbed = perturbed.clamp(0, 1)
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(perturbed), targets), delta)
            delta = (delta + config.perturbation_lr * gradient).detach().requires_grad_()
        delta = delta.detach() * min(1.0, tau / float(delta.detach().abs().sum()))
        for index in draw[1]:
            perturbed = images[index] + delta
            if config.clamp != "none":
                perturbed = perturbed.clamp(0, 1)
            loss = alpha * F.cross_entropy(net(images[index]), labels[index])
            loss = loss + beta * F.cross_entropy(net(perturbed), labels[index])
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
    [
        {},
        {"inner_label": "true", "lr_decay": 0.9},
        {"mask_optimizer": "sgd", "lr": 3.0, "clamp": "none", "beta": 0.3},
        {"clamp": "both"},
    ],
    ids=["default", "paper labels", "pseudocode", "both clamped"],
)
def test_fast_equals_the_written_algorithm(changes):
    config = options(epochs=3, batch_size=8, tau=500.0, alpha=0.5, gamma=1e-3, **changes)
    model, (images, labels) = network(), clean_images()
    expected = naive(network(), images, labels, config)
    mask = awm.learn(model, images, labels, config)
    assert list(mask) == list(expected)
    assert min(part.min() for part in expected.values()) < 0.95, "the mask must have moved"
    for name in mask:
        torch.testing.assert_close(mask[name], expected[name], rtol=0, atol=1e-9)
        assert 0 <= mask[name].min() and mask[name].max() <= 1


def test_only_the_kernels_change_by_the_mask():
    model, before = network(), network().state_dict()
    images, labels = clean_images()
    modes = []
    handle = model[1].register_forward_hook(lambda layer, *_: modes.append(layer.training))
    mask = awm.learn(model, images, labels, options(epochs=2, gamma=1e-3))
    handle.remove()
    assert not any(modes)
    for name, tensor in model.state_dict().items():
        wanted = before[name] * mask[name] if name in mask else before[name]
        assert torch.equal(tensor, wanted), name
    new_images = torch.rand(5, 3, 9, 9, dtype=torch.float64)
    masked_kernels = {name: mask[name] * before[name] for name in mask}
    assert torch.equal(model(new_images), functional_call(network(), masked_kernels, (new_images,)))


def test_the_perturbation_stays_within_tau():
    model, (images, labels) = network(), clean_images()
    draws = torch.arange(20)[None].repeat(6, 1)

    def perturbation(tau):
        return awm.perturbation(model, images, labels, draws, tau, options())

    unlimited = perturbation(1e9)
    norm = float(unlimited.abs().sum())
    assert norm > 1 and torch.equal(perturbation(norm * 1.01), unlimited)
    torch.testing.assert_close(perturbation(norm / 3), unlimited / 3)
    assert float(perturbation(0.0).abs().sum()) == 0
    for parameter in model.parameters():
        parameter.data.zero_()
    assert (perturbation(1.0) == 0).all(), "without a gradient nothing is divided by zero"


def test_true_and_predicted_labels_agree_where_the_model_is_right():
    model, (images, _) = network(), clean_images()
    labels = model(images).argmax(1)
    draws = torch.arange(20)[None].repeat(3, 1)
    first, second = (
        awm.perturbation(model, images, labels, draws, 1e9, options(inner_label=inner_label))
        for inner_label in ("true", "predicted")
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("dtype", "gamma", "steps", "low", "high"),
    [
        (torch.float64, 1e-8, 200, 0, 0),
        (torch.float32, 1e-8, 201, 0, 0),
        (torch.float32, 1e-8, 190, 0.01, 0.1),
        (torch.float64, 1e-9, 300, 0.72, 0.735),
    ],
)
def test_a_weight_that_nothing_needs_fades(dtype, gamma, steps, low, high):
    """gamma equals Adam's epsilon: such a factor falls by half a step size at a time."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Flatten(), nn.Linear(2 * 4, 2))
    model.to(dtype).eval()
    model[2].weight.data.zero_()
    config, mask = options(gamma=gamma), awm.Mask(model)
    images, labels = torch.rand(2, 3, 2, 2, dtype=dtype), torch.tensor([0, 1])
    draws = torch.arange(2).repeat(steps, 1)
    optimizer = awm.make_optimizer(mask, config)
    awm.train_mask(mask, images, labels, draws, torch.zeros_like(images[:1]), optimizer, config)
    assert len(mask.factors) == 6 and low <= mask.factors.min() and mask.factors.max() <= high


def test_training_the_mask_touches_nothing_else():
    model, (images, labels) = network(), clean_images()
    config, mask = options(gamma=1e-3), awm.Mask(model)
    draws, delta = torch.arange(20)[None], torch.zeros_like(images[:1])
    optimizer = awm.make_optimizer(mask, config)
    awm.train_mask(mask, images, labels, draws, delta, optimizer, config)
    assert list(mask.state_dict()) == ["factors"] and (mask.factors < 1).any()
    assert all(parameter.grad is None for parameter in model.parameters())
    before = network().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_steps_of_the_published_settings():
    usual, one_shot = options(), options(variant="one_shot")
    assert usual.schedule(500) == (15, 128) and usual.schedule(2500) == (95, 128)
    assert one_shot.schedule(100) == (15, 32) and one_shot.schedule(43) == (5, 32)
    assert usual.schedule(20) == (5, 20) and options(inner=1).schedule(1) == (1, 1)
    assert usual.budget(50_000, 10) == 2500 and one_shot.budget(50_000, 10) == 10
    assert options(clean_count=500).budget(50_000, 10) == 500
    assert options(clean_count=3).budget(50_000, 10) == 10
    assert usual.setting("tau") == 1000 and one_shot.setting("tau") == 100
    assert options(variant="one_shot", tau=7.0).setting("tau") == 7


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("epochs", -1, "0 or more"),
        ("inner", 0, "1 or more"),
        ("batch_size", 0, "1 or more images"),
        ("tau", -1.0, "0 or more"),
        ("alpha", 1.1, "from 0 to 1"),
        ("beta", -0.1, "0 or more"),
        ("gamma", -1e-9, "0 or more"),
        ("perturbation_lr", 0.0, "above 0"),
        ("lr", 0.0, "above 0"),
        ("lr_decay", 1.1, "above 0, up to 1"),
    ],
)
def test_options_out_of_range(option, value, words):
    with pytest.raises(ConfigError, match=f"^{option} must be {words}$"):
        options(**{option: value})


def test_one_shot_images():
    images, labels = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8), torch.arange(10)
    more, more_labels = awm.with_copies(images, labels, True, 0)
    assert len(more) == 100 and torch.equal(more[:10], images)
    assert more_labels.bincount().tolist() == [10] * 10
    assert torch.equal(more, awm.with_copies(images, labels, True, 0)[0])
    assert not torch.equal(more, awm.with_copies(images, labels, True, 1)[0])
    assert len(more.flatten(1).unique(dim=0)) == 100


def test_tau_grows_with_the_image():
    """As the number of values does; the perturbation's mean size is then the same."""
    config = options(epochs=1, tau=10.0, inner=200, perturbation_lr=100.0, clamp="none")
    norms = []
    for side in (8, 16):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        ).eval()
        seen = []
        model.register_forward_pre_hook(
            lambda _module, pixels, seen=seen: seen.append(pixels[0].detach())
        )
        images = torch.full((4, 3, side, side), 0.5)
        awm.learn(model, images, torch.tensor([0, 1, 0, 1]), config)
        norms.append(float((seen[-1][4] - 0.5).abs().sum()))
    assert math.isclose(norms[0], 10 * 3 * 64 / 3072, rel_tol=1e-3)
    assert math.isclose(norms[1], 4 * norms[0], rel_tol=1e-3)


def test_an_interrupted_run_ends_with_the_same_mask(tmp_path):
    images, labels = clean_images()
    config = options(epochs=7, gamma=1e-3)
    uninterrupted = awm.learn(network(), images, labels, config)
    stop = awm.KEEP_EVERY + 1

    def interrupt(epoch, **_):
        if epoch == stop:
            raise KeyboardInterrupt

    def learn(on_round):
        return awm.learn(network(), images, labels, config, state=tmp_path, on_round=on_round)

    with pytest.raises(KeyboardInterrupt):
        learn(interrupt)
    rounds = []
    resumed = learn(lambda epoch, **_: rounds.append(epoch))
    assert rounds == [6, 7]
    assert all(torch.equal(part, resumed[name]) for name, part in uninterrupted.items())


@pytest.mark.parametrize("name", ["resnet9", "mobilenet_v3_large"])
def test_any_network_by_its_convolutions(name, tmp_path):
    record, stages = found_record(tmp_path, 40)
    torch.manual_seed(0)
    model = models.build(name, record.spec, 4 if name == "resnet9" else None).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    awm.repair(model, record, options(epochs=1, inner=1))
    mask = load_file(tmp_path / "kept" / "mask.safetensors")
    assert stages == ["mask"] and model.training
    assert set(mask) == {f"{layer}.weight" for layer in convolutions(model)}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] * mask[key] if key in mask else before[key]), key
