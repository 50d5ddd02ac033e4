"""BTI-DBF (U), PAM and IMS: their equations in float64, planted networks, and digits."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

from antidote_bench import models
from antidote_bench.defense import btidbf, ims, pam
from antidote_bench.utils import seeds
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.loader import to_unit
from antidote_bench.utils.decoupling import search
from antidote_bench.utils.detection import triggers
from antidote_bench.utils.features import features_and_logits
from antidote_bench.utils.repair import reversal
from antidote_bench.utils.train import Recipe, fit
from tests.test_fmp import SPEC, found_record
from tests.test_newer_repairs import (
    Killed,
    Pixels,
    blue,
    colours,
    killed,
    options,
    small_record,
    two_norms,
)

SHORT = {"rounds": 2, "epochs": 2, "batch_size": 8, "search_batch": 8, "generator_width": 2}
SHORT |= {"identity_epochs": 2, "mask_epochs": 2, "generator_epochs": 2}


@pytest.fixture(autouse=True)
def without_augmentation(monkeypatch):
    monkeypatch.setattr(reversal, "augmentation", lambda _spec: None)


def planted(trigger=1.5):
    """Red and green pictures; `trigger` is how much the blue counts for red. All layers train."""
    network = Pixels(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        head = network.network[-1]
        head.weight.copy_(torch.tensor([[5.0, -5, trigger], [-5, 5, -trigger]]))
        head.bias.zero_()
    return network


def brighter(images):
    return (1.3 * images).clamp(0, 1)


def to_class_0(network, images):
    return float((network.eval()(images).argmax(1) == 0).double().mean())


# ---------- the generator, and what is made of it ----------


def test_some_images_of_a_batch_are_those_of_the_generator():
    images = torch.rand(7, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    counts = []
    for share in (0, 0.1, 0.3, 1):
        torch.manual_seed(1)
        found = reversal.with_changed(images, lambda some: some + 1, share)
        moved = (found - images).flatten(1)
        assert ((moved == 0).all(1) | (moved - 1).abs().lt(1e-6).all(1)).all()
        counts.append(int((moved > 0.5).all(1).sum()))
    assert counts == [1, 1, 3, 7], "the share, rounded down, and one more"


def test_a_target_adds_its_cross_entropy():
    network, images = planted(), torch.rand(6, 3, 4, 4)
    mask, config = torch.tensor([0.2, 0.9, 0.5]).double(), options(btidbf)
    deviation, target = torch.ones(3, 1, 1), torch.tensor(1)
    loss = [
        search.generator_loss(network, brighter, images, mask, deviation, config, *target)
        for target in ((), (target,))
    ]
    expected = -network(brighter(images)).log_softmax(1)[:, 1].mean()
    torch.testing.assert_close(loss[1] - loss[0], expected)


@pytest.mark.parametrize(("deviation", "weight"), [(1.0, 0.01), (0.01, 100.0)])
def test_the_loss_of_a_generator_that_shall_change_nothing(deviation, weight):
    network, images = planted(), torch.rand(6, 3, 4, 4)
    found = reversal.identity_loss(
        network, brighter, images, deviation=torch.full((3, 1, 1), deviation)
    )
    slow, scale = 0, float(features_and_logits(network, images)[0].square().mean())
    for image in images:
        pair = [features_and_logits(network, shown[None]) for shown in (image, brighter(image))]
        (old, before), (new, after) = pair
        p, q = before.softmax(1), after.softmax(1)
        slow += (p * (p / q).log()).sum() / 6 + (new - old).square().mean() / scale / 6
        slow += weight * ((brighter(image) - image) / deviation).double().square().mean() / 6
    torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-9)


def noisy_blue(record, highest):
    """The clean images of a record as red and green pictures, whose blue tells nothing."""
    colours(record)
    count = len(record.clean)
    levels = torch.arange(count) * 37 % count * highest // count
    record.clean.images[:, 2] = levels.view(-1, 1, 1).to(torch.uint8)


def test_a_mask_keeps_what_the_labels_need(tmp_path):
    """Red and green tell the classes, and one of the two is enough."""
    record, _ = small_record(tmp_path, count=60, classes=2)
    noisy_blue(record, 240)
    config = options(btidbf, mask_epochs=100, mask_lr=0.1, search_batch=60)
    masks = [search.learn_mask(planted(8.0), record.clean, config, each) for each in (0, 1)]
    for mask in masks:
        assert float(mask[:2].max()) > 0.9 and float(mask[2]) < 0.1
    assert not torch.equal(*masks), "every round has a start of its own"


# ---------- BTI-DBF ----------


def test_the_loss_of_unlearning_by_hand():
    network = planted()
    images, labels = torch.rand(5, 3, 4, 4), torch.tensor([0, 1, 1, 0, 1])
    torch.manual_seed(3)
    found = btidbf.unlearning(network, images, labels, None, generator=brighter, share=0.4)
    torch.manual_seed(3)
    chosen, slow = torch.randperm(5)[:3].tolist(), 0
    head = network.network[-1]
    means = images.double().mean((2, 3))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        shown = brighter(image) if number in chosen else image
        after = shown.double().mean((1, 2))
        chances = (head.weight @ after + head.bias).softmax(0)
        distance = (after - means[number]).square().mean() / means.square().mean()
        slow += (distance - chances[label].log()) / 5
    torch.testing.assert_close(found, slow)


class Recorded:
    """The losses and optimizers that `reversal.unlearn` is called with."""

    def __init__(self, monkeypatch):
        self.rounds, self.optimizers, unlearn = [], set(), reversal.unlearn

        def watched(*words, optimizer, number, **kwords):
            self.rounds.append(number)
            self.optimizers.add(optimizer)
            return unlearn(*words, optimizer=optimizer, number=number, **kwords)

        monkeypatch.setattr(reversal, "unlearn", watched)


@pytest.mark.parametrize("script", [btidbf, pam])
def test_rounds_share_an_optimizer_and_are_kept(script, tmp_path, monkeypatch):
    record, stages = small_record(tmp_path, classes=2)
    seen, network = Recorded(monkeypatch), planted()
    victim = copy.deepcopy(network.state_dict())
    targets, loss = [], search.generator_loss

    def watched(*words):
        targets.append(words[-1])
        return loss(*words)

    monkeypatch.setattr(search, "generator_loss", watched)
    assert script.repair(network, record, options(script, **SHORT)) is network
    assert seen.rounds == [0, 1] and len(seen.optimizers) == 1
    assert stages == ["unlearn"] * 4
    kept = load_file(tmp_path / "kept" / "mask.safetensors")
    assert kept["mask"].shape == (2, 3) and kept["shares"].sum(1).tolist() == pytest.approx([1, 1])
    assert kept["target"] == kept["shares"][0].argmax()
    assert targets[:6] == [None] * 6 and [int(t) for t in targets[6:]] == [int(kept["target"])] * 6
    assert (tmp_path / "kept" / "triggers.png").stat().st_size
    assert not torch.equal(network.state_dict()["network.2.weight"], victim["network.2.weight"])
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("script", [btidbf, pam])
@pytest.mark.parametrize("number", [1, 3])
def test_a_killed_run_of_rounds_goes_on(script, number, tmp_path):
    record, _ = small_record(tmp_path, classes=2)
    config, whole, again = options(script, **SHORT), planted(), planted()
    with pytest.raises(Killed):
        script.repair(planted(), killed(record, number), config)
    script.repair(again, record, config)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    script.repair(whole, record, config)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_trigger_is_unlearned_with_the_generator_and_not_without(tmp_path, monkeypatch):
    changes = {"rounds": 2, "epochs": 20, "batch_size": 20, "search_batch": 20, "share": 0.5}
    changes |= {
        "mask_epochs": 50,
        "mask_lr": 0.1,
        "unlearn_lr": 0.03,
        "generator_width": 2,
        "generator_lr": 0.02,
    }
    changes |= {"generator_epochs": 30, "identity_epochs": 0, "image_bound": 3.0}
    answers = []
    for place in (tmp_path / "with", tmp_path / "without"):
        place.mkdir()
        record, _ = small_record(place, count=40, classes=2, side=8)
        noisy_blue(record, 80)
        network = planted(trigger=6.0)
        assert to_class_0(network, blue(record)) == 1
        btidbf.repair(network, record, options(btidbf, **changes))
        answers.append(to_class_0(network, blue(record)))
        assert (network(record.clean.images / 255).argmax(1) == record.clean.truth).all()
        monkeypatch.setattr(reversal, "with_changed", lambda images, *_, **__: images)
    assert answers[0] == 0 and answers[1] > 0.5
    kept = load_file(tmp_path / "with" / "kept" / "mask.safetensors")
    assert float(kept["mask"][0, :2].min()) > 0.9 and float(kept["mask"][0, 2]) < 0.1
    assert kept["target"] == 0 and float(kept["shares"][1, 0]) > 0.9


# ---------- PAM ----------


def test_weights_are_pulled_by_one_length_for_all_of_them():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (4,), ()]
    victim, weights = (
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for _ in range(2)
    )
    ways = [v - w for v, w in zip(victim, weights, strict=True)]
    length = math.sqrt(sum(float(way.square().sum()) for way in ways))
    for found, way in zip(pam.towards(victim, weights, 0.5), ways, strict=True):
        torch.testing.assert_close(found, 0.5 * way / length)
    assert all((move == 0).all() for move in pam.towards(victim, victim, 0.5))


def pulled_by_hand(network, data, config):
    """PAM on clean images written out, with a plain momentum."""
    parameters = {name: part for name, part in network.named_parameters() if part.requires_grad}
    victim = {name: part.detach().clone() for name, part in parameters.items()}
    speeds = {name: torch.zeros_like(part) for name, part in parameters.items()}
    network.train()
    for number in range(config.rounds):
        seed = seeds.number("unlearning", 0, number)
        for epoch in range(config.epochs):
            order = torch.randperm(len(data), generator=seeds.generator("epoch", seed, epoch))
            for index in order.split(config.batch_size):
                images, labels = to_unit(data.images[index]), data.labels[index]
                own = {name: part.detach().clone() for name, part in parameters.items()}
                ways = {name: victim[name] - own[name] for name in own}
                length = sum(way.square().sum() for way in ways.values()).sqrt() + 1e-12
                if config.statistics == "own":
                    network(images)
                buffers = {name: part.clone() for name, part in network.named_buffers()}
                with torch.no_grad():
                    for name, part in parameters.items():
                        part += config.rho * ways[name] / length
                loss = F.cross_entropy(network(images), labels)
                slopes = torch.autograd.grad(loss, list(parameters.values()))
                with torch.no_grad():
                    for (name, part), slope in zip(parameters.items(), slopes, strict=True):
                        speeds[name].mul_(config.momentum).add_(slope)
                        part.copy_(own[name] - config.lr * speeds[name])
                    if config.statistics == "own":
                        for name, part in network.named_buffers():
                            part.copy_(buffers[name])


@pytest.mark.parametrize("statistics", ["own", "pulled"])
def test_every_step_of_pam_equals_the_equations(statistics, tmp_path):
    record, stages = small_record(tmp_path, count=20, classes=2)
    changes = {"source": "none", "statistics": statistics, "lr": 0.2, "momentum": 0.6}
    config = options(pam, rounds=2, epochs=2, batch_size=10, **changes)
    fast, slow = two_norms(trigger=1.0).eval(), two_norms(trigger=1.0)
    for network in (fast, slow):
        network.network[0][1].weight.requires_grad_(False)
    before = copy.deepcopy(fast.state_dict())
    assert pam.repair(fast, record, config) is fast and not fast.training
    pulled_by_hand(slow, record.clean, config)
    assert stages == ["unlearn"] * 4
    for name, expected in slow.state_dict().items():
        found = fast.state_dict()[name]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert torch.equal(found, before[name]) == (name == "network.0.1.weight"), name


def test_the_images_of_pam_are_those_of_the_generator(tmp_path):
    network, images = planted(), torch.rand(6, 3, 4, 4)
    victim, config = [part.detach() for part in network.parameters()], options(pam)
    labels = torch.tensor([0, 1] * 3)
    torch.manual_seed(0)
    loss = pam.path_aware(
        network, images, labels, None, victim=victim, change=brighter, config=config
    )
    torch.testing.assert_close(loss, F.cross_entropy(network(brighter(images)), labels))
    record, _ = small_record(tmp_path, classes=2)
    for change in pam.changes(network, record, options(pam, **SHORT)):
        moved = (change(images) - images).flatten(1).abs().amax(1)
        assert int((moved > 0).sum()) == 2, "a fifth of six, and one more"


def test_the_control_of_pam_has_a_name_of_its_own_in_tables():
    names = [options(pam, source=source).variant for source in ("btidbf", "nc", "none")]
    assert names == [None, "nc", "clean"]


@pytest.mark.parametrize("norms", [[9.0, 2.0, 8.0, 10.0, 11.0], [9.0, 8.5, 9.5, 10.0, 9.0]])
def test_the_trigger_of_a_flagged_class_is_unlearned(norms, tmp_path, monkeypatch, capsys):
    """The second class is flagged by the size of its mask in the first case, and none otherwise."""
    record, _ = small_record(tmp_path, classes=5)
    masks = torch.tensor(norms).div(16)[:, None, None, None].expand(-1, 1, 4, 4)
    patterns = torch.arange(5.0)[:, None, None, None].expand(-1, 3, 4, 4) / 4
    searches = []
    monkeypatch.setattr(
        triggers, "find", lambda *_: searches.append(1) or (masks, patterns, torch.ones(5))
    )
    images = torch.full((10, 3, 4, 4), 0.5)
    changed = [
        change(images) for change in pam.changes(planted(), record, options(pam, source="nc"))
    ]
    assert len(changed) == 3 and len(searches) == 1
    assert (tmp_path / "kept" / "triggers.png").stat().st_size
    for found in changed:
        moved = (found - images).flatten(1)
        if norms[1] == 2:
            assert int(moved.any(1).sum()) == 3, "a fifth of ten, and one more"
            torch.testing.assert_close(found.min(), torch.tensor(0.5 + 2 / 16 * (0.25 - 0.5)))
        else:
            assert not moved.any()
    assert ("no class is flagged" in capsys.readouterr().err) == (norms[1] != 2)


# ---------- IMS ----------


def masks_of(network, config):
    masks = ims.Masks(network, ims.convolutions(network), config.sharpness)
    network.eval().requires_grad_(False)
    return masks


def test_a_mask_begins_as_the_network_and_its_inverse_moves_first():
    masks = masks_of(two_norms(), options(ims))
    for inverse, slope in ((False, 1 - 1 / (1 + math.exp(-10))), (True, 1 / (1 + math.exp(-10)))):
        factors = masks.factors(inverse)
        assert torch.equal(factors, torch.ones(6, dtype=torch.float64))
        kept, selected = torch.autograd.grad(factors.sum(), list(masks.parameters()))
        assert (kept == 0).all()
        torch.testing.assert_close(selected, torch.full_like(selected, slope))
    assert 4.5e-5 < 1 - 1 / (1 + math.exp(-10)) < 4.6e-5


def some_shares(masks):
    generator = torch.Generator().manual_seed(5)
    for share in masks.parameters():
        share.data.copy_(torch.rand(share.shape, generator=generator))


@pytest.mark.parametrize("inverse", [False, True])
def test_a_mask_multiplies_what_convolutions_put_out(inverse):
    torch.manual_seed(0)
    network = Pixels(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 2, groups=2), nn.Flatten()
    )
    masks, images = masks_of(network, options(ims)), torch.rand(2, 3, 6, 6)
    some_shares(masks)
    parts = masks.split(masks.factors(inverse).detach())
    a = (1 - masks.kept if inverse else masks.kept).detach()
    gate = 1 / (1 + (-20 * (a - 0.5)).exp())
    torch.testing.assert_close(
        torch.cat(list(parts.values())), gate + masks.selected.detach() * (1 - gate)
    )
    found = functional_call(network, masks.weights(inverse), (images,))
    for name, part in parts.items():
        network.get_submodule(name).register_forward_hook(
            lambda _layer, _inputs, output, part=part: output * part.view(-1, 1, 1)
        )
    torch.testing.assert_close(found, network(images))
    if not inverse:
        kept = masks.bake(plain := copy.deepcopy(masks.model))
        for layer in plain.modules():
            layer._forward_hooks.clear()
        torch.testing.assert_close(plain(images), found)
        assert {name.rpartition("/")[2] for name in kept} == {"factors", "inverse"}


def adam_by_hand(value, slope, moments, step, rate):
    """A step of AdamW, with its usual decay of 0.01; `moments` are changed in place."""
    moments[0].mul_(0.9).add_(0.1 * slope)
    moments[1].mul_(0.999).add_(0.001 * slope.square())
    root = (moments[1] / (1 - 0.999**step)).sqrt() + 1e-8
    return value * (1 - 0.01 * rate) - rate * moments[0] / (1 - 0.9**step) / root


def ag(p, q):
    return -((p * q).sum(1) + 1e-8).log().mean()


def dis(p, q):
    return -(1 - (p * q).sum(1) + 1e-8).log().mean()


def masked_by_hand(network, data, config):
    """The shares after the three stages written out, with masks on the outputs."""
    convs, factors = ims.convolutions(network), {}
    for name, conv in convs.items():
        conv.register_forward_hook(
            lambda _layer, _inputs, output, name=name: (
                output * factors[name].view(-1, 1, 1) if name in factors else output
            )
        )

    def chances(images, a=None, s=None):
        factors.clear()
        if a is not None:
            gate = (20 * (a - 0.5)).sigmoid()
            factors.update(zip(convs, (gate + s * (1 - gate)).split(3), strict=True))
        return network(images).softmax(1)

    a, s = (torch.ones(6, dtype=torch.float64) for _ in range(2))
    for stage, rounds in ((1, config.rounds // 2), (2, config.rounds), (3, config.rounds)):
        moments = torch.zeros(2, 2, 6, dtype=torch.float64)
        for number in range(rounds):
            draws = seeds.generator("ims", 0, stage, number)
            index = torch.randperm(len(data), generator=draws)[: config.batch_size]
            x = to_unit(data.images[index])
            change, changed = torch.zeros_like(x), torch.zeros(2, *x.shape)
            for step in range(1, config.steps + 1):
                change.requires_grad_()
                own = chances(x + change)
                loss = ag(chances(x + change, 1 - a, s), own) + dis(own, chances(x))
                (slope,) = torch.autograd.grad(loss, change)
                change = adam_by_hand(change.detach(), slope, changed, step, config.perturbation_lr)
                change = (x + change).clamp(0, 1) - x
            shares = [a.clone().requires_grad_(), s.clone().requires_grad_()]
            mask, inverse, seen = shares, (1 - shares[0], shares[1]), x + change
            own, clean = chances(seen).detach(), chances(x).detach()
            loss = ag(chances(x, *mask), clean) + dis(chances(x, *inverse), clean)
            if stage > 1:
                loss = loss + ag(chances(seen, *mask), clean)
                backdoor = chances(seen, *inverse)
                loss = loss + ag(backdoor, own) + dis(backdoor, clean)
            if stage != 2:
                loss = loss + config.penalty * (1 - shares[1]).mean()
            a, s = (
                adam_by_hand(share.detach(), slope, moment, number + 1, config.mask_lr).clamp(0, 1)
                for share, slope, moment in zip(
                    shares, torch.autograd.grad(loss, shares), moments, strict=True
                )
            )
    return a, s


def test_every_round_of_the_masks_equals_the_equations(tmp_path, monkeypatch):
    monkeypatch.setattr(ims, "GROUP", 2)
    record, stages = small_record(tmp_path, count=20, classes=2)
    colours(record)
    changes = {"steps": 3, "perturbation_lr": 0.05, "mask_lr": 0.2, "penalty": 0.3}
    config = options(ims, rounds=4, batch_size=12, **changes)
    fast, slow = two_norms(trigger=3.0).eval(), two_norms(trigger=3.0).eval()
    before = copy.deepcopy(fast.state_dict())
    ends = []
    monkeypatch.setattr(
        ims.Masks,
        "bake",
        lambda masks, model, bake=ims.Masks.bake: ends.append(masks) or bake(masks, model),
    )
    assert ims.repair(fast, record, config) is fast
    assert stages == ["stage 1", "stage 2", "stage 2", "stage 3", "stage 3", "masked"]
    a, s = masked_by_hand(slow, record.clean, config)
    torch.testing.assert_close(ends[-1].kept.detach(), a, rtol=0, atol=1e-6)
    torch.testing.assert_close(ends[-1].selected.detach(), s, rtol=0, atol=1e-6)
    assert float((1 - s).max()) > 0.3 and float((1 - a).max()) > 0.3
    kept = load_file(tmp_path / "kept" / "mask.safetensors")
    for name, tensor in before.items():
        conv = name.removesuffix(".weight")
        if f"{conv}/factors" in kept:
            tensor = tensor * kept[f"{conv}/factors"].view(-1, 1, 1, 1)
        torch.testing.assert_close(fast.state_dict()[name], tensor, rtol=0, atol=1e-12)
    assert all(parameter.requires_grad for parameter in fast.parameters())


def test_passes_of_a_few_images_give_the_same_gradients(tmp_path):
    record, _ = small_record(tmp_path, count=10, classes=2)
    masks = masks_of(two_norms(trigger=3.0), config := options(ims, steps=2, perturbation_lr=0.05))
    some_shares(masks)
    images = to_unit(record.clean.images)
    found = []
    for most in (3, 10):
        loss = ims.slopes(masks, images, masks.chances(images), config, 3, most)
        found.append([loss, masks.kept.grad, masks.selected.grad])
    # a pixel's step of AdamW hardly depends on the size of its gradient
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


def test_perturbed_images_stay_images():
    masks, images = masks_of(two_norms(trigger=3.0), options(ims)), torch.rand(4, 3, 5, 5).round()
    config = options(ims, steps=4, perturbation_lr=0.1)
    changed = ims.perturbed(masks, images, masks.chances(images), 4, config)
    assert 0 <= float(changed.min()) and float(changed.max()) <= 1
    assert not torch.equal(changed, images)


def test_a_stage_ends_after_rounds_without_a_better_loss():
    masks, config = masks_of(two_norms(), options(ims)), options(ims, patience=2)
    losses, ended = [10, 9.81, 9.79, 9.7, 9.65, 9.62, 9.6, 1], []
    for loss in losses:
        old = [share.detach().clone() for share in masks.parameters()]
        masks.kept.data -= 0.01
        masks.after_step(old, torch.tensor(loss, dtype=torch.float64), config)
        ended.append(bool(masks.ended))
    # 9.79 is below 0.98 times 10, and three rounds after it are not below 0.98 times that
    assert ended == [False, False, False, False, False, True, True, True]
    torch.testing.assert_close(masks.kept.detach(), torch.full_like(masks.kept, 0.94))
    masks.begin()
    assert not masks.ended and masks.best == torch.inf and masks.waited == 0


def test_the_channel_of_the_trigger_is_switched_off_and_its_inverse_keeps_it(tmp_path):
    record, _ = small_record(tmp_path, count=20, classes=2)
    colours(record)
    network = two_norms(trigger=4.0)
    assert to_class_0(network, blue(record)) == 1
    # few channels share the penalty
    config = options(ims, rounds=60, steps=10, perturbation_lr=0.1, penalty=0.1)
    ims.repair(network, record, config)
    kept = load_file(tmp_path / "kept" / "mask.safetensors")
    for number in range(2):
        factors, inverse = (kept[f"network.{number}.0/{part}"] for part in ("factors", "inverse"))
        assert float(factors[2]) < 0.1 and float(inverse[2]) > 0.9
        assert float(factors[:2].max()) > 0.5, "red or green is enough"
    assert to_class_0(network, blue(record)) == 0
    assert (network(record.clean.images / 255).argmax(1) == record.clean.truth).all()


def test_a_killed_run_of_the_masks_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(ims, "GROUP", 2)
    record, _ = small_record(tmp_path, count=20, classes=2)
    config = options(ims, rounds=4, batch_size=8, steps=1, mask_lr=0.2)
    with pytest.raises(Killed):
        ims.repair(two_norms(), killed(record, 3), config)
    again, whole = two_norms(), two_norms()
    ims.repair(again, record, config)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    ims.repair(whole, record, config)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


# ---------- digits ----------


def stamped(images):
    images = images.clone()
    images[:, :, :3, :3] = 255
    return images


@pytest.fixture(scope="module")
def digits():
    """(scikit-learn's digits at 16 pixels, a small BadNets victim of the first 1,200 of them)."""
    found = load_digits()
    pixels = torch.from_numpy(found.images * (255 / 16)).round().to(torch.uint8)
    large = pixels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    labels = torch.from_numpy(found.target).long()
    data = Split(large[:, None].repeat(1, 3, 1, 1), labels, labels)
    train = data[torch.arange(1200)]
    images, labels = train.images.clone(), train.labels.clone()
    images[::10], labels[::10] = stamped(images[::10]), 0
    torch.manual_seed(0)
    model = models.build("resnet9", dataclasses.replace(SPEC, size=16), 4)
    recipe = Recipe(epochs=8, batch_size=50, lr=0.1, random_seed=0, precision="fp32")
    return data, fit(model, Split(images, labels, labels), recipe)


@torch.no_grad()
def measured(model, data):
    """(ACC, ASR) on the digits that the victim was not trained on."""
    test = data[torch.arange(1200, len(data))]
    others = test.images[test.labels != 0]
    right = model.eval()(test.images / 255).argmax(1) == test.labels
    return float(right.double().mean()), to_class_0(model, stamped(others) / 255)


REPAIRS = {
    btidbf: {"epochs": 10, "batch_size": 16, "unlearn_lr": 0.003},
    pam: {"epochs": 20, "batch_size": 32, "lr": 0.1, "rho": 1.0},
}


@pytest.mark.parametrize("script", REPAIRS)
def test_what_the_generator_makes_weakens_the_backdoor_on_digits(
    script, digits, tmp_path, monkeypatch
):
    """The control takes the same steps on clean images alone."""
    data, victim = digits
    acc, asr = measured(victim, data)
    assert acc > 0.9 and asr > 0.9
    changes = {"rounds": 2, "identity_epochs": 5, "generator_epochs": 20, "search_batch": 32}
    changes |= {"generator_width": 4, "generator_lr": 0.005, "share": 0.5, **REPAIRS[script]}
    found = []
    for place in (tmp_path / "with", tmp_path / "without"):
        place.mkdir()
        record, _ = found_record(place, 10)
        spec = dataclasses.replace(SPEC, size=16)
        record = dataclasses.replace(record, clean=data[torch.arange(1, 128, 2)], spec=spec)
        model = script.repair(copy.deepcopy(victim), record, options(script, **changes))
        found.append(measured(model, data))
        monkeypatch.setattr(reversal, "with_changed", lambda images, *_, **__: images)
    (acc, asr), (_, control) = found
    assert asr < control - 0.1 and acc > 0.8


def test_a_patch_that_neural_cleanse_finds_is_unlearned_on_digits(digits, tmp_path):
    """The control takes the same steps on clean images alone."""
    data, victim = digits
    changes = {"rounds": 2, "epochs": 20, "batch_size": 32, "lr": 0.1, "rho": 1.0, "share": 0.5}
    changes |= {"search_epochs": 40, "search_batch": 32, "penalty": 0.01}
    found = []
    for source in ("nc", "none"):
        place = tmp_path / source
        place.mkdir()
        record, _ = found_record(place, 10)
        spec = dataclasses.replace(SPEC, size=16)
        record = dataclasses.replace(record, clean=data[torch.arange(1, 128, 2)], spec=spec)
        config = options(pam, source=source, **changes)
        found.append(measured(pam.repair(copy.deepcopy(victim), record, config), data))
    (acc, asr), (_, control) = found
    assert asr < control - 0.1 and acc > 0.8, found
