"""FST, MM-BD's mitigation, NFT and UNIT against their equations in float64 and on planted
networks."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from antidote_bench import models
from antidote_bench.defense import fst, mm_bm, nft, unit
from antidote_bench.utils import seeds
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.loader import to_unit
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.features import last_linear
from tests.test_fmp import SPEC, found_record


class Pixels(nn.Module):
    """A network in float64, which takes the float32 images of the training loop."""

    def __init__(self, *layers):
        super().__init__()
        self.network = nn.Sequential(*layers).double()

    def forward(self, images):
        return self.network(images.double())


def options(script, **changes):
    return script.Config(**{"result_file": "x", "precision": "fp32", **changes})


def small_record(tmp_path, count=24, classes=3, side=4):
    """(a record of images of a few pixels, the stages that were reported)."""
    record, stages = found_record(tmp_path, count)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % classes
    spec = dataclasses.replace(SPEC, classes=classes)
    clean = Split(images, labels, labels)
    return dataclasses.replace(record, clean=clean, spec=spec), stages


def without_augmentation(script, monkeypatch):
    monkeypatch.setattr(script, "augmentation", lambda _spec: None)


# ---------- FST ----------


def two_layers():
    torch.manual_seed(0)
    return Pixels(nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 3))


def shifted_by_hand(network, data, config):
    """Feature shift tuning written out, with a plain momentum; the norms of W after every step."""
    head, parameters = network.network[-1], list(network.parameters())
    old, norms = head.weight.detach().clone(), []
    draws = seeds.generator("fst head", 0)
    speeds = [torch.zeros_like(parameter) for parameter in parameters]
    with torch.no_grad():
        for part in (head.weight, head.bias):
            part.copy_((2 * torch.rand(part.shape, generator=draws) - 1) / math.sqrt(6))
        head.weight *= old.norm() / head.weight.norm()
    moved = parameters[:2] if config.mode == "fe_tuning" else parameters
    for epoch in range(config.epochs):
        rate = config.lr * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
        order = torch.randperm(len(data), generator=seeds.generator("epoch", 0, epoch))
        for index in order.split(config.batch_size):
            loss = F.cross_entropy(network(to_unit(data.images[index])), data.labels[index])
            if config.mode == "fst":
                loss = loss + config.alpha * sum(
                    a * b for a, b in zip(head.weight.flatten(), old.flatten(), strict=True)
                )
            slopes = torch.autograd.grad(loss, moved)
            with torch.no_grad():
                for parameter, slope, speed in zip(moved, slopes, speeds, strict=False):
                    speed.mul_(0.9).add_(slope)
                    parameter -= rate * speed
                head.weight *= old.norm() / head.weight.norm()
            norms.append(float(head.weight.detach().norm() / old.norm()))
    return norms


@pytest.mark.parametrize("mode", ["fst", "fe_tuning", "ft_init"])
def test_every_step_of_feature_shift_tuning_equals_the_equations(mode, tmp_path, monkeypatch):
    without_augmentation(fst, monkeypatch)
    record, stages = small_record(tmp_path)
    config = options(fst, mode=mode, epochs=3, batch_size=8, lr=0.1)
    fast, slow, victim = two_layers(), two_layers(), two_layers()
    norms, hold = [], fst.set_norm

    def watched(weight, norm):
        hold(weight, norm)
        norms.append(float(weight.detach().norm() / norm))

    monkeypatch.setattr(fst, "set_norm", watched)
    assert fst.repair(fast, record, config) is fast and stages == ["finetune"] * 3
    assert norms == pytest.approx([1] * 10, abs=1e-12), "before the first step too"
    assert shifted_by_hand(slow, record.clean, config) == pytest.approx([1] * 9, abs=1e-12)
    for one, other in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        assert one.requires_grad
    distance = (last_linear(fast).bias - last_linear(victim).bias).detach().abs().max()
    assert float(distance) > 0.01, "the bias is drawn anew as well"
    moved = fast.network[1].weight - victim.network[1].weight
    assert float(moved.detach().abs().max()) > 1e-3


def test_the_push_turns_the_last_layer_away_and_takes_the_planted_feature_along(
    tmp_path, monkeypatch
):
    """Features are the mean colours; the victim's last layer takes the third one for class 0."""
    without_augmentation(fst, monkeypatch)
    record, _ = small_record(tmp_path, count=40, classes=2)
    record.clean.images[:] = 0
    record.clean.images[record.clean.labels == 0, 0] = 200
    record.clean.images[record.clean.labels == 1, 1] = 200
    angles, answers = {}, {}
    for mode in ("fst", "ft_init"):
        network = Pixels(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        head = last_linear(network)
        with torch.no_grad():
            head.weight.copy_(torch.tensor([[2.0, -2, 9], [-2, 2, -9]]))
            head.bias.zero_()
        old = head.weight.detach().clone()
        config = options(fst, mode=mode, epochs=15, batch_size=10, lr=0.1)
        fst.repair(network, record, config)
        new = head.weight.detach().flatten()
        angles[mode] = float(F.cosine_similarity(new, old.flatten(), dim=0))
        triggered = record.clean.images[record.clean.labels == 1] / 255
        triggered[:, 2] = 1
        answers[mode] = float((network(triggered).argmax(1) == 0).double().mean())
        (tmp_path / "finetune.safetensors").unlink()
    assert angles["fst"] < -0.5 < angles["ft_init"]
    assert answers["fst"] == 0, "what nothing but the trigger lights points away from class 0"


def test_feature_shift_tuning_resumes_with_the_victims_norm(tmp_path, monkeypatch):
    without_augmentation(fst, monkeypatch)
    record, _ = small_record(tmp_path)
    config = options(fst, epochs=2, batch_size=8, lr=0.1)
    whole, again = two_layers(), two_layers()
    fst.repair(whole, record, config)
    fst.repair(again, record, config)  # from the checkpoint of the last epoch
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_form_of_fst_has_a_name_of_its_own_in_tables():
    names = [options(fst, mode=mode).variant for mode in ("fst", "fe_tuning", "ft_init")]
    assert names == [None, "fe_tuning", "ft_init"]


class Killed(Exception):
    pass


def killed(record, number):
    """The record, whose report number `number` (from 1) ends the run."""
    left = [number]

    def report(*_args, **_values):
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return dataclasses.replace(record, report=report)


# ---------- MM-BM ----------


def three_stages(trigger=10.0):
    """Classes are red and green pictures; `trigger` is how much the blue counts for red.

    All convolutions pass each colour on as it is.
    """
    stages = [nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU()) for _ in range(3)]
    network = Pixels(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        for stage in stages:
            stage[0].weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        last_linear(network).weight.copy_(torch.tensor([[5.0, -5, trigger], [-5, 5, -trigger]]))
        last_linear(network).bias.zero_()
    return network


def colours(record):
    """The clean images of a record as red and green pictures with a trace of blue."""
    images = record.clean.images.float() / 255
    other = (torch.arange(len(images)) + 1) % 2
    images[torch.arange(len(images)), record.clean.labels] *= 0.5
    images[torch.arange(len(images)), record.clean.labels] += 0.5
    images[torch.arange(len(images)), other] *= 0.1
    images[:, 2] *= 0.1
    record.clean.images[:] = (images * 255).to(torch.uint8)


def blue(record):
    """The green images with all blue pixels lit, the trigger of `three_stages`."""
    images = record.clean.images[record.clean.labels == 1] / 255
    images[:, 2] = 1
    return images


PLACES = {
    "resnet9": ["prep", "layer1", "layer2"],
    "preactresnet18": ["conv1", "layer1", "layer2", "layer3"],
    "resnet18": ["relu", "layer1", "layer2", "layer3"],
    "vgg19_bn": ["stage1", "stage2", "stage3", "stage4"],
    "airbench": ["activation", "group1", "group2"],
    "wrn16_1": ["conv1", "group1", "group2"],
}


@pytest.mark.parametrize("name", PLACES)
def test_bounds_are_behind_the_first_layers_and_every_stage_but_the_last(name):
    with torch.device("meta"):
        model = models.build(name, SPEC, 4 if name in models.DEFAULT_WIDTH else None)
    assert mm_bm.ends_of_stages(model) == [f"network.{place}" for place in PLACES[name]]


def test_places_can_be_named_and_wrong_ones_are_refused():
    network, images = three_stages(), torch.rand(1, 3, 4, 4)
    assert mm_bm.find_places(network, images) == ["network.0", "network.1"]
    assert mm_bm.find_places(network, images, "network.2, network.0.1,network.2") == [
        "network.2",
        "network.0.1",
    ]
    for names, words in (
        ("network.9", "'network.9' is none; those below network are 0, 1"),
        ("network.4", "'network.4' does not"),
    ):
        with pytest.raises(ConfigError, match=words):
            mm_bm.find_places(network, images, names)
    plain = Pixels(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    with pytest.raises(ConfigError, match="mm_bm does not apply: the model has no stages"):
        mm_bm.find_places(plain, images)
    assert not any(module._forward_hooks for module in network.modules())


def test_only_what_is_above_a_bound_moves_it():
    generator = torch.Generator().manual_seed(0)
    maps, weights = torch.randn(2, 5, 4, 3, 3, generator=generator, dtype=torch.float64).unbind()
    maps[0] = 0.25  # equal to the bound of the first channel
    layer = nn.Identity()
    values = {"a": torch.arange(1, 5, dtype=torch.float64) / 4}
    (bound,) = mm_bm.add_bounds(nn.ModuleDict({"a": layer}), values)
    inputs = maps.clone().requires_grad_()
    outputs = layer(inputs)
    (outputs * weights).sum().backward()
    above = maps > bound.detach().view(-1, 1, 1)
    assert torch.equal(outputs, torch.where(above, bound.view(-1, 1, 1), maps))
    torch.testing.assert_close(bound.grad, (weights * above).sum((0, 2, 3)))
    assert torch.equal(inputs.grad, weights * ~above)


def test_the_first_bounds_leave_one_value_in_a_thousand_above(tmp_path):
    record, _ = small_record(tmp_path, count=40, classes=2, side=16)
    network = three_stages()
    names = mm_bm.find_places(network, to_unit(record.clean.images[:1]))
    values = mm_bm.first_values(network, names, record.clean)
    pixels = (record.clean.images.double() / 255).transpose(0, 1).flatten(1)  # 10,240 a colour
    expected = torch.stack([row.sort(descending=True).values[10] for row in pixels])
    for name in names:
        torch.testing.assert_close(values[name], expected, rtol=0, atol=1e-7)
    given = mm_bm.first_values(network, names, record.clean, start=8.0)
    assert all((value == 8).all() for value in given.values())


def bounded_by_hand(network, data, config, adapted):
    """({place: its bounds}, the weights of their size): Adam and the clipping written out."""
    pixels = to_unit(data.images).double()
    with torch.no_grad():
        pixels, labels = (
            part[network(pixels).argmax(1) == data.truth] for part in (pixels, data.truth)
        )
        logits = network(pixels)
    bounds = [torch.full((3,), config.start, dtype=torch.float64) for _ in range(2)]
    moments, penalties, step = [torch.zeros(2, 3, dtype=torch.float64) for _ in bounds], [], 0
    stages, head = network.network[:3], network.network[3:]

    def clipped(x, values):
        for number, stage in enumerate(stages):
            x = stage(x)
            if number < 2:
                limit = values[number].view(-1, 1, 1)
                x = torch.where(x > limit, limit.expand_as(x), x)
        return head(x)

    penalty = config.penalty
    for epoch in range(config.epochs):
        order = torch.randperm(len(pixels), generator=seeds.generator("epoch", 0, epoch))
        for index in order.split(config.batch_size):
            free = [bound.clone().requires_grad_() for bound in bounds]
            gap = clipped(pixels[index], free) - logits[index]
            length = sum(bound.square().sum().sqrt() for bound in free)
            loss = gap.square().sum() / gap.numel() + penalty * length
            step += 1
            for bound, moment, slope in zip(
                bounds, moments, torch.autograd.grad(loss, free), strict=True
            ):
                moment[0].mul_(0.9).add_(0.1 * slope)
                moment[1].mul_(0.999).add_(0.001 * slope.square())
                root = (moment[1] / (1 - 0.999**step)).sqrt() + 1e-8
                bound -= config.bound_lr * moment[0] / (1 - 0.9**step) / root
        if epoch + 1 in adapted:
            right = (clipped(pixels, bounds).argmax(1) == labels).double().mean()
            penalty = penalty * 1.2 if right >= config.least_accuracy else penalty / 1.2
        penalties.append(penalty)
    return bounds, penalties


@pytest.mark.parametrize(("least", "last"), [(0.0, 0.5 * 1.2**2), (1.0, 0.5 / 1.2**2)])
def test_the_bounds_follow_adam_and_the_weight_of_their_size(least, last, tmp_path, monkeypatch):
    monkeypatch.setattr(mm_bm, "ADAPTED", (2, 3))
    record, stages = small_record(tmp_path, count=30, classes=2)
    colours(record)
    record.clean.truth[:3] = 1 - record.clean.truth[:3]  # which the network gets wrong
    network = three_stages()
    if least == 1:  # so low that no image is told from another
        monkeypatch.setattr(mm_bm.selection, "accuracy", lambda *_: 0.4)
    config = options(
        mm_bm, epochs=4, batch_size=10, start=0.79, least_accuracy=least, bound_lr=0.02
    )
    before = copy.deepcopy(network.state_dict())
    expected, penalties = bounded_by_hand(network, record.clean, config, (2, 3))
    if least == 0:
        assert penalties == pytest.approx([0.5, 0.6, 0.72, 0.72])
    assert mm_bm.repair(network, record, config) is network
    assert stages == ["bounded", *["bounds"] * 4]
    after = network.state_dict()
    found = [after.pop(f"network.{number}.upper_bound") for number in range(2)]
    if least == 0:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
            assert 0.02 < float((one - 0.79).abs().max())
    saved = load_file(tmp_path / "bounds.safetensors")
    assert float(saved["loss/penalty"]) == pytest.approx(last)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before), "byte for byte"


def test_a_channel_that_only_the_trigger_drives_is_clipped(tmp_path):
    """Also where the bounds begin far above all values, as in the released code."""
    record, _ = small_record(tmp_path, count=40, classes=2)
    colours(record)
    for start, epochs in ((None, 0), (2.0, 50)):
        network = three_stages()
        assert (network(blue(record)).argmax(1) == 0).all()
        config = options(mm_bm, epochs=epochs, start=start, batch_size=20, penalty=0.1)
        mm_bm.repair(network, record, config)
        assert (network(blue(record)).argmax(1) == 1).all()
        assert (network(record.clean.images / 255).argmax(1) == record.clean.truth).all()
        bound = network.network[1].upper_bound
        highest = float(record.clean.images[:, 2].max()) / 255
        assert not bound.requires_grad and float(bound[2]) < highest + 1e-6 < 0.11
        (tmp_path / "bounds.safetensors").unlink(missing_ok=True)


def test_a_model_with_bounds_is_made_again_from_its_weights(tmp_path):
    record, _ = found_record(tmp_path, 40)
    torch.manual_seed(0)
    model = models.build("resnet9", SPEC, 4).eval()
    names = {f"{name}.upper_bound" for name in mm_bm.ends_of_stages(model)}
    record.clean.truth[:] = model(record.clean.images / 255).argmax(1)
    before = model(record.clean.images / 255)
    mm_bm.repair(model, record, options(mm_bm, epochs=2, batch_size=20))
    weights = model.state_dict()
    again = mm_bm.rebuild(models.build("resnet9", SPEC, 4), weights).eval()
    logits = model(record.clean.images / 255)
    torch.testing.assert_close(again(record.clean.images / 255), logits)
    assert (logits - before).abs().max() > 1e-4
    assert {name for name, part in again.named_parameters() if not part.requires_grad} == names
    del weights["network.prep.upper_bound"]
    with pytest.raises((KeyError, RuntimeError)):
        mm_bm.rebuild(models.build("resnet9", SPEC, 4), {**weights, "x.upper_bound": torch.ones(3)})


def test_a_killed_run_of_bounds_goes_on_with_their_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(mm_bm, "ADAPTED", (1, 3))
    record, _ = small_record(tmp_path, count=20, classes=2)
    colours(record)
    config = options(mm_bm, epochs=4, start=0.79, bound_lr=0.02)
    with pytest.raises(Killed):
        mm_bm.repair(three_stages(), killed(record, 4), config)
    again, whole = three_stages(), three_stages()
    mm_bm.repair(again, record, config)
    (tmp_path / "bounds.safetensors").unlink()
    mm_bm.repair(whole, record, config)
    for one, other in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_victim_that_is_always_wrong_has_no_bounds(tmp_path):
    record, _ = small_record(tmp_path, count=10, classes=2)
    colours(record)
    record.clean.truth[:] = 1 - record.clean.truth
    with pytest.raises(ConfigError, match="classifies none of the 10 clean images right"):
        mm_bm.check(three_stages(), record, options(mm_bm))


# ---------- NFT ----------


def two_norms(trigger=0.0):
    """Two convolutions that pass each colour on, with batch norms that have statistics."""
    parts = [
        nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
        for _ in range(2)
    ]
    network = Pixels(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        for part in parts:
            part[0].weight.copy_(torch.eye(3).view(3, 3, 1, 1))
            part[1].running_var.fill_(1.5)
            part[1].weight.copy_(torch.tensor([1.0, 1.5, 2]))
        last_linear(network).weight.copy_(torch.tensor([[2.0, -2, trigger], [-2, 2, -trigger]]))
        last_linear(network).bias.zero_()
    return network


def masked_by_hand(network, data, config):
    """The factors of both batch norms after training written out, and their lower limits."""
    norms = [network.network[number][1] for number in range(2)]
    scales = [norm.weight.detach().clone() for norm in norms]
    limits = [0.8 * math.exp(-0.5), 0.8 * math.exp(-1.0)]
    masks = [torch.ones(3, dtype=torch.float64) for _ in norms]
    speeds = [torch.zeros(3, dtype=torch.float64) for _ in norms]
    network.train(config.statistics == "moving")
    for epoch in range(2):
        fall = (1 + math.cos(math.pi * epoch / 2)) / 2
        rate = config.mask_lr_min + (config.mask_lr - config.mask_lr_min) * fall
        draws = seeds.generator("epoch", 0, epoch)
        order = torch.randint(len(data), (config.steps // 2 * config.batch_size,), generator=draws)
        torch.manual_seed(seeds.number("dropout", 0, epoch))
        for index in order.split(config.batch_size):
            share, other = torch.rand(()), torch.randperm(len(index))
            x, y = to_unit(data.images[index]), data.labels[index]
            free = [mask.clone().requires_grad_() for mask in masks]
            weights = {
                f"network.{number}.1.weight": scales[number] * free[number] for number in range(2)
            }
            mixed = share * x + (1 - share) * x[other]
            chances = functional_call(network, weights, (mixed,)).log_softmax(1)
            rows = torch.arange(len(index))
            loss = -(share * chances[rows, y] + (1 - share) * chances[rows, y[other]]).mean()
            per_class = len(data) / 2
            loss = loss + config.penalty * sum((1 - mask).abs().sum() for mask in free) / per_class
            for mask, speed, limit, slope in zip(
                masks, speeds, limits, torch.autograd.grad(loss, free), strict=True
            ):
                speed.mul_(config.momentum).add_(slope)
                mask.sub_(rate * speed).clamp_(limit, 1)
    return masks


@pytest.mark.parametrize("statistics", ["moving", "frozen"])
def test_every_step_of_the_mask_equals_the_equations(statistics, tmp_path, monkeypatch):
    without_augmentation(nft, monkeypatch)
    monkeypatch.setattr(nft, "GROUP", 4)
    record, stages = small_record(tmp_path, count=20, classes=2)
    config = options(nft, statistics=statistics, steps=8, batch_size=6, penalty=0.05, mask_lr=0.4)
    fast, slow = two_norms(trigger=3.0).eval(), two_norms(trigger=3.0)
    victim = copy.deepcopy(fast.state_dict())
    assert nft.repair(fast, record, config) is fast and not fast.training
    assert stages == ["mask", "mask", "masked"]
    expected = masked_by_hand(slow, record.clean, config)
    kept = load_file(tmp_path / "kept" / "mask.safetensors")
    for number, factors in enumerate(expected):
        found = kept[f"network.{number}.1/factors"]
        torch.testing.assert_close(found, factors, rtol=0, atol=1e-6)
        # the batch norm behind it undoes a factor, unless its statistics stay
        assert (float((1 - factors).max()) > 0.05) == (number == 1 or statistics == "frozen")
        scale = fast.network[number][1].weight.detach()
        torch.testing.assert_close(scale, victim[f"network.{number}.1.weight"] * found)
    state, moved = fast.state_dict(), {"running_mean", "running_var", "num_batches_tracked"}
    for name, tensor in victim.items():
        kind = name.rpartition(".")[2]
        may_move = kind in moved and statistics == "moving"
        if may_move:
            torch.testing.assert_close(state[name], slow.state_dict()[name])
        if not name.endswith(".1.weight"):
            assert torch.equal(state[name], tensor) != may_move, name
    assert all(parameter.requires_grad for parameter in fast.parameters())


def test_deep_layers_may_change_more():
    torch.manual_seed(0)
    model = models.build("resnet9", SPEC, 4)
    masked = nft.Masked(model, nft.batch_norms(model), options(nft))
    masked.factors.data.fill_(-1)
    masked.clamp()
    least = [round(float(part.max()), 3) for part in masked.split(masked.factors.detach()).values()]
    assert least[:4] == [0.485, 0.294, 0.179, 0.108] and least[7] < 0.02
    assert all(len(part.unique()) == 1 for part in masked.split(masked.factors.detach()).values())
    masked.factors.data.fill_(2)
    masked.clamp()
    assert (masked.factors == 1).all()


@pytest.mark.parametrize(("steps", "groups", "each"), [(0, 0, 0), (2, 1, 2), (51, 2, 26)])
def test_steps_come_in_groups_of_equal_size(steps, groups, each):
    recipe = nft.recipe_of(options(nft, steps=steps))
    assert (recipe.epochs, recipe.epoch_steps) == (groups, each)
    assert (nft.recipe_of(options(nft)).epochs, nft.GROUP) == (20, 50)


def test_the_channel_that_misleads_has_the_lowest_factors(tmp_path, monkeypatch):
    """The blue is noise on clean images, and what leads to class 0 where all of it is lit."""
    without_augmentation(nft, monkeypatch)
    record, _ = small_record(tmp_path, count=40, classes=2)
    colours(record)
    network = two_norms(trigger=1.2)
    record.clean.images[:, 2] = torch.arange(40).view(-1, 1, 1) % 7 * 20
    assert (network.eval()(blue(record)).argmax(1) == 0).all()
    nft.repair(network, record, options(nft, statistics="frozen", steps=40, batch_size=20))
    kept = load_file(tmp_path / "kept" / "mask.safetensors")
    for number in range(2):
        factors = kept[f"network.{number}.1/factors"]
        assert float(factors[2]) < float(factors[:2].min()) - 0.05
    assert (network.eval()(blue(record)).argmax(1) == 1).all()


def test_a_killed_run_of_the_mask_goes_on(tmp_path, monkeypatch):
    without_augmentation(nft, monkeypatch)
    monkeypatch.setattr(nft, "GROUP", 2)
    record, _ = small_record(tmp_path, count=20, classes=2)
    config = options(nft, steps=6, batch_size=6)
    with pytest.raises(Killed):
        nft.repair(two_norms(), killed(record, 3), config)
    again, whole = two_norms(), two_norms()
    nft.repair(again, record, config)
    (tmp_path / "mask.safetensors").unlink()
    nft.repair(whole, record, config)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_control_of_nft_has_a_name_of_its_own_in_tables():
    names = [options(nft, statistics=each).variant for each in ("moving", "frozen")]
    assert names == [None, "frozen_bn"]


# ---------- UNIT ----------


def tightened_by_hand(network, work, held_out, needed, config):
    """(the bounds that are kept, those of the last step, the weights of their size): UNIT written
    out, for a network of two stages of a convolution and a ReLU, and a head."""
    stages, head = network.network[:2], network.network[2:]
    bounds, x = [], to_unit(work.images).double()
    for stage in stages:
        x = stage(x).detach()
        spread = (x - x.mean(0)).square().sum(0) / (len(x) - 1)
        bounds.append(x.mean(0) + config.deviations * spread.sqrt())

    def clipped(pixels, values):
        for stage, value in zip(stages, values, strict=True):
            pixels = stage(pixels)
            pixels = torch.where(pixels > value, value, pixels)
        return head(pixels)

    def accurate():
        logits = clipped(to_unit(held_out.images).double(), bounds)
        return int((logits.argmax(1) == held_out.truth).sum()) >= needed

    moments = [torch.zeros(2, *bound.shape, dtype=torch.float64) for bound in bounds]
    penalty, good, bad, penalties = config.penalty, 0, 0, []
    least, kept = math.inf, None
    if accurate():
        least, kept = sum(float(bound.mean()) for bound in bounds), [b.clone() for b in bounds]
    pixels, labels = to_unit(work.images).double(), work.truth
    for step in range(1, config.steps + 1):
        free = [bound.clone().requires_grad_() for bound in bounds]
        chances = clipped(pixels, free).log_softmax(1)[torch.arange(len(labels)), labels]
        loss = -chances.mean() + penalty * sum(bound.clamp(min=0).mean() for bound in free)
        for bound, moment, slope in zip(
            bounds, moments, torch.autograd.grad(loss, free), strict=True
        ):
            moment[0].mul_(0.5).add_(0.5 * slope)
            moment[1].mul_(0.9).add_(0.1 * slope.square())
            root = (moment[1] / (1 - 0.9**step)).sqrt() + 1e-8
            bound.sub_(config.bound_lr * moment[0] / (1 - 0.5**step) / root).clamp_(min=0)
        size = sum(float(bound.mean()) for bound in bounds)
        is_good = accurate()
        if is_good and size < least:
            least, kept = size, [bound.clone() for bound in bounds]
        good, bad = (good + 1, 0) if is_good else (0, bad + 1)
        if good == 5:
            good, penalty = 0, penalty * 2 if penalty >= config.penalty else config.penalty
        if bad == 5:
            bad, penalty = 0, penalty / 2**1.5
        penalties.append(penalty)
    return kept, bounds, penalties


def two_stages():
    """The first two stages of `three_stages` with a head, for which blue counts as red."""
    network = three_stages()
    return Pixels(*network.network[:2], *network.network[3:])


def test_every_step_of_the_tightening_equals_the_equations(tmp_path):
    record, stages = small_record(tmp_path, count=40, classes=2)
    colours(record)
    network, plain = two_stages(), two_stages()
    config = options(unit, steps=60, bound_lr=0.03, penalty=0.05, drop=0.25, deviations=1.0)
    work, held_out = unit.selection.hold_out(record.clean, config)
    assert (len(work), len(held_out)) == (32, 8)
    kept, last, penalties = tightened_by_hand(plain, work, held_out, 6, config)
    changes = [b / a for a, b in zip([0.05, *penalties], penalties, strict=False)]
    assert max(changes) == 2 and min(changes) == pytest.approx(2**-1.5), "it rises and falls"
    bounded = unit.repair(network, record, config)
    assert stages == ["bounded", "bounds"]
    for number, (found, expected, end) in enumerate(
        zip(bounded.bounds.children(), kept, last, strict=True)
    ):
        assert found.value.shape == (3, 4, 4) and not found.value.requires_grad, number
        torch.testing.assert_close(found.value.detach(), expected, rtol=0, atol=1e-6)
        assert float((found.value.detach() - end).abs().max()) > 1e-3, "not those of the end"
    saved = load_file(tmp_path / "bounds.safetensors")
    assert float(saved["model/penalty"]) == pytest.approx(penalties[49], rel=1e-6)
    state = bounded.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(state[name], tensor), "the victim, byte for byte"
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_weight_rises_after_five_good_steps_and_falls_after_five_bad_ones():
    search = unit.Search([nn.Parameter(torch.ones(2, dtype=torch.float64))], 1.0)
    steps, weights = "ggggg gggg b gggg ggggg bbbbb bbbbb bbbb ggggg", []
    for kind in steps.replace(" ", ""):
        search.adapt(torch.tensor(kind == "g"))
        weights.append(float(search.penalty))
    down = 2**-1.5
    expected = [1] * 4 + [2] * 5  # four good steps after five are not five again
    expected += [2]  # and a bad one breaks the row
    expected += [2] * 4 + [4] * 5
    expected += [4] * 4 + [4 * down] * 5 + [4 * down**2] * 5
    expected += [4 * down**2] * 4 + [1]  # one below the first weight goes back to it
    assert weights == pytest.approx(expected)


def test_the_smallest_accurate_bounds_are_remembered():
    (value,) = values = [nn.Parameter(torch.ones(2, dtype=torch.float64))]
    search = unit.Search(values, 1.0)
    for size, accurate in ((0.5, True), (0.3, False), (0.4, True), (0.45, True), (0.1, False)):
        value.data.fill_(size)
        search.look(torch.tensor(accurate))
    search.take()
    assert value.tolist() == [0.4, 0.4] and float(search.least) == pytest.approx(0.4)
    value.data.fill_(-1)
    search.after_step(lambda: torch.tensor(True))
    assert value.tolist() == [0, 0], "an activation is never cut below 0"


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_unit_that_only_the_trigger_drives_is_bounded(per_channel, tmp_path):
    record, _ = small_record(tmp_path, count=40, classes=2)
    colours(record)
    network = two_stages()
    assert (network(blue(record)).argmax(1) == 0).all()
    config = options(unit, steps=20, per_channel=per_channel)
    bounded = unit.repair(network, record, config)
    assert (bounded(blue(record)).argmax(1) == 1).all()
    assert (bounded(record.clean.images / 255).argmax(1) == record.clean.truth).all()
    for bound in bounded.bounds.children():
        assert bound.value.shape == ((3, 1, 1) if per_channel else (3, 4, 4))
        assert float(bound.value[2].max()) < 0.3, "the trigger drives it to 1"


ACTIVATED = {"resnet9": 8, "preactresnet18": 16, "resnet18": 17, "airbench": 7, "wrn16_1": 13}


@pytest.mark.parametrize("name", ACTIVATED)
def test_there_is_a_bound_behind_every_activation(name):
    with torch.device("meta"):
        model = models.build(name, SPEC, 4 if name in models.DEFAULT_WIDTH else None)
    network, places = unit.bounded(model)
    assert len(places) == ACTIVATED[name]
    assert network.state_dict().keys() == model.state_dict().keys()


def test_a_model_of_bounded_units_is_made_again_from_its_weights(tmp_path):
    record, _ = found_record(tmp_path, 40)
    torch.manual_seed(0)
    model = models.build("preactresnet18", SPEC, 4).eval()
    record.clean.truth[:] = model(record.clean.images / 255).argmax(1)
    before = model(record.clean.images / 255)
    config = options(unit, steps=2, deviations=1.0, step_images=8)
    bounded = unit.repair(model, record, config)
    weights = bounded.state_dict()
    again = unit.rebuild(models.build("preactresnet18", SPEC, 4), weights).eval()
    logits = bounded(record.clean.images / 255)
    torch.testing.assert_close(again(record.clean.images / 255), logits)
    assert (logits - before).abs().max() > 1e-4 and not bounded.training
    ends = {name for name, part in again.named_parameters() if not part.requires_grad}
    assert ends == {f"bounds.{number}.value" for number in range(16)}
    del weights["bounds.15.value"]
    with pytest.raises(KeyError):
        unit.rebuild(models.build("preactresnet18", SPEC, 4), weights)


def test_a_killed_run_of_the_tightening_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(unit, "KEEP_EVERY", 2)
    record, _ = small_record(tmp_path, count=20, classes=2)
    colours(record)
    config = options(unit, steps=8, bound_lr=0.03, step_images=10)
    with pytest.raises(Killed):
        unit.repair(two_stages(), killed(record, 4), config)
    again = unit.repair(two_stages(), record, config).state_dict()
    (tmp_path / "bounds.safetensors").unlink()
    whole = unit.repair(two_stages(), record, config).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_models_without_activations_or_a_graph_have_no_bounds():
    linear = Pixels(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(32, 2))
    with pytest.raises(ConfigError, match="torch.fx finds no activation in the model"):
        unit.bounded(linear)

    class Branching(nn.Module):
        def forward(self, images):
            return images if images.sum() > 0 else -images

    with pytest.raises(ConfigError, match="torch.fx cannot follow the model"):
        unit.bounded(Branching())
