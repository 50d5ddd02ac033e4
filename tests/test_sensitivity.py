"""D-BR and D-ST: their steps against loops in float64, and what they do to a backdoor."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as tv
from safetensors.torch import load_file
from torch import nn

from antidote_bench import models
from antidote_bench.defense import d_br, d_st
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.errors import ConfigError, UserError
from antidote_bench.utils.features import last_linear
from antidote_bench.utils.repair import sensitivity
from antidote_bench.utils.repair.sensitivity import CLEAN, POISONED, UNKNOWN
from antidote_bench.utils.train import victim_architecture
from tests.test_fmp import SPEC, found_record
from tests.test_scripts import results

BOTH = pytest.mark.parametrize("method", [d_br, d_st], ids=["d_br", "d_st"])


class Stop(Exception):
    """What a test kills a run with."""


def options(method=d_br, **changes):
    few = {
        "epochs": 2,
        "feature_epochs": 1,
        "centre_epochs": 1,
        "batch_size": 64,
        "precision": "fp32",
    }
    return method.Config(result_file="x", **few | changes)


def network(name="resnet9", width=8):
    torch.manual_seed(0)
    return models.build(name, SPEC, width if name == "resnet9" else None)


# the sensitivity of an image


@pytest.mark.parametrize("size", [32, 33])
def test_rotations_and_translations_are_those_of_torchvision(size):
    images = torch.rand(40, 3, size, size, generator=torch.Generator().manual_seed(0))
    change = sensitivity.draw(40, size, seed=1)
    for actual, image, (angle, right, down) in zip(
        sensitivity.transformed(images, change), images, change.tolist(), strict=True
    ):
        expected = tv.affine(tv.rotate(image, angle), 0.0, [int(right), int(down)], 1.0, [0.0])
        assert (actual != expected).float().mean() < 0.005, (
            "of two pixels that are equally near, either may be taken"
        )
    assert torch.equal(sensitivity.transformed(images, torch.zeros(40, 3)), images)


def test_draws_are_uniform_and_the_same_for_a_seed():
    change = sensitivity.draw(4000, 32, seed=0)
    assert torch.equal(change, sensitivity.draw(4000, 32, seed=0)) and not torch.equal(
        change, sensitivity.draw(4000, 32, seed=1)
    )
    assert (
        change[:, 0].abs().max() <= 180 and change[:, 0].min() < -170 and change[:, 0].max() > 170
    )
    assert (
        set(change[:, 1:].flatten().tolist()) == set(range(-6, 7))
        and abs(float(change[:, 0].mean())) < 6
    )


@pytest.mark.parametrize("name", ["resnet9", "vgg19_bn"])
def test_sensitivity_is_the_mean_square_of_the_features(name):
    model = network(name, 4).train()
    before = copy.deepcopy(model.state_dict())
    images = torch.randint(
        0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    change = sensitivity.draw(3, 32, seed=3)
    scores = sensitivity.sensitivity(model, Split(images, torch.arange(3), torch.arange(3)), change)
    assert scores.shape == (3,) and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    slow, features = copy.deepcopy(model).double().eval(), []
    last_linear(slow).register_forward_pre_hook(
        lambda _layer, inputs: features.append(inputs[0][0].detach())
    )
    for image, row, score in zip(images / 255, change, scores.tolist(), strict=True):
        for version in (image, sensitivity.transformed(image[None], row[None])[0]):
            slow(version.double()[None])
        still, moved = features[-2:]
        total = sum((float(a) - float(b)) ** 2 for a, b in zip(still, moved, strict=True))
        assert score == pytest.approx(total / len(still), rel=1e-3)


def test_the_centre_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(30, 5, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 2, 3] * 10)  # of 6: 1, 4 and 5 have no image
    centres = [
        sum(features[index] for index in range(30) if labels[index] == label) / 10
        for label in (0, 2, 3)
    ]
    pairs = [
        (a @ b) / (a @ a).sqrt() / (b @ b).sqrt() for a in centres for b in centres if a is not b
    ]
    expected = sum(pairs) / len(pairs)
    actual = sensitivity.centre_similarity(features, labels, 6)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, features)[0] for value in (actual, expected))
    )
    one = sensitivity.centre_similarity(features, torch.full((30,), 4), 6)
    assert one == 0 and not torch.autograd.grad(one, features)[0].any()
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            sensitivity.centre_similarity(features.bfloat16().float(), labels, 6).dtype
            == torch.float32
        )


# which images are taken for clean or poisoned


def test_the_lowest_and_the_highest_scores():
    scores = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float()
    kinds = sensitivity.assign(scores, 0.2, 0.05, seed=0)
    for score, kind in zip(scores.tolist(), kinds.tolist(), strict=True):
        assert kind == (CLEAN if score < 200 else POISONED if score >= 950 else UNKNOWN)


def test_among_equal_scores_chance_decides():
    scores = torch.tensor([1.0] * 100 + [0.0] * 5 + [2.0] * 5)
    kinds = sensitivity.assign(scores, 0.5, 0.25, seed=0)  # 110 images: 55 and 27
    assert kinds.bincount(minlength=3).tolist() == [55, 28, 27]
    assert (kinds[100:105] == CLEAN).all() and (kinds[105:] == POISONED).all()
    assert 15 < int((kinds[:50] == CLEAN).sum()) < 35, (
        "not the first ones: a training set may be sorted by class"
    )
    assert torch.equal(kinds, sensitivity.assign(scores, 0.5, 0.25, seed=0))
    assert not torch.equal(kinds, sensitivity.assign(scores, 0.5, 0.25, seed=1))


@pytest.mark.parametrize(
    ("alpha_c", "alpha_p", "counts"),
    [
        (0, 0, [0, 9, 0]),
        (1, 0, [9, 0, 0]),
        (0, 1, [0, 0, 9]),
        (0.1, 0.1, [0, 9, 0]),
        (1 / 3, 2 / 3, [3, 0, 6]),
    ],
)
def test_shares_of_no_image_and_of_all_images(alpha_c, alpha_p, counts):
    assert (
        sensitivity.assign(torch.arange(9.0), alpha_c, alpha_p, 0).bincount(minlength=3).tolist()
        == counts
    )


def test_images_that_a_rotation_changes_are_found():
    """In a disc on black, a rotation changes stripes and no rings; nothing is translated."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(32) - 15.5
    radius = (place[:, None] ** 2 + place**2).sqrt()
    rings, stripes = (radius / 3).sin().expand(3, 32, 32), (place / 1.5).sin().expand(3, 32, 32)
    striped = torch.rand(200, generator=generator) < 0.3
    patterns = torch.where(striped[:, None, None, None], stripes, rings) + 0.1 * torch.randn(
        200, 3, 32, 32, generator=generator
    )
    images = ((128 + 60 * patterns) * (radius < 14)).clamp(0, 255).to(torch.uint8)
    change = sensitivity.draw(200, 32, seed=0)
    change = torch.stack(
        [60 + change[:, 0] / 6, torch.zeros(200), torch.zeros(200)], 1
    )  # 30 to 90 degrees
    scores = sensitivity.sensitivity(
        network().eval(), Split(images, striped.long(), striped.long()), change
    )
    kinds = sensitivity.assign(scores, 0.5, float(striped.float().mean()) / 2, seed=0)
    assert (
        striped[kinds == POISONED].float().mean() > 0.9
        and striped[kinds == CLEAN].float().mean() < 0.1
    )


@BOTH
@pytest.mark.parametrize(
    "changes",
    [
        {"alpha_c": -0.1},
        {"alpha_c": 0.7, "alpha_p": 0.4},
        {"feature_lr": 0},
        {"centre_epochs": -1},
        {"bound": 0},
        {"epochs": -1},
        {"batch_size": 0},
    ],
)
def test_options_out_of_range(method, changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        options(method, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha_c": 0.0},
        {"head_epochs": -1},
        {"contrastive_batch": 0},
        {"classifier_lr": 0},
        {"temperature": 0},
        {"poison_weight": -1},
        {"warm_share": 1.5},
    ],
)
def test_options_of_d_st_out_of_range(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        options(d_st, **changes)


def test_what_both_declare():
    with pytest.raises(ConfigError, match="repair_lr"):
        options(repair_lr=0)
    assert (
        options().prior == options(d_st).prior == "clean=0.2 poison=0.05"
        and options().budget(1000, 10) == 0
    )


# D-BR


def test_unlearning_ends_at_its_bound_for_each_image():
    logits = torch.tensor([[4.0, 0, 0], [0, 1, 0], [-9, 5, 0], [0, 0, -7]], requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2])  # the last two are unlearned
    value = d_br.unlearning(lambda images: logits, None, labels, None, bound=2.0)
    losses = [
        math.log(sum(math.exp(v) for v in row)) - row[label]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    assert losses[1] < 2 * math.log(3) < min(losses[2:])
    assert value.item() == pytest.approx(
        -sum(min(loss, 2 * math.log(3)) for loss in losses) / 4, abs=1e-6
    )
    value.backward()
    assert logits.grad[:2].abs().sum(1).min() > 1e-3 and not logits.grad[2:].any()
    assert logits.grad[0, 0] > 0, "a step of descent raises the loss of the label"


def test_many_rounds_of_unlearning_do_not_collapse(tmp_path):
    record, _ = found_record(tmp_path, 20)

    def unlearned(bound):
        return d_br.alternate(
            network(width=4),
            [(record.train, partial(d_br.unlearning, bound=bound))],
            replace(record, state=tmp_path / str(bound)),
            options(epochs=30, repair_lr=0.05),
        )

    free, held = (unlearned(bound)(record.train.images / 255) for bound in (1e9, 2.0))
    assert held.abs().max() < 100 < free.abs().max()


def test_rounds_equal_plain_steps_in_float64(tmp_path, monkeypatch):
    monkeypatch.setattr(d_br, "augmentation", lambda spec: lambda images, generator, **_: images)
    record, said = found_record(tmp_path, 24)
    # one batch each, in which the order does not matter
    bad = record.train[torch.arange(8)]
    good = record.train[torch.arange(8, 24)]
    config = options(epochs=3, repair_lr=0.02)
    start = network(width=4).train()
    fast = d_br.alternate(
        copy.deepcopy(start),
        [(bad, lambda *batch: d_br.unlearning(*batch, bound=1.05)), (good, d_br.cross_entropy)],
        record,
        config,
    )
    slow, speed, stopped = copy.deepcopy(start).double(), {}, 0
    slow.normalize.double()
    for _ in range(3):
        for part, sign in ((bad, -1), (good, 1)):
            shares = slow(part.images.double() / 255).log_softmax(1)
            losses = [-shares[row, label] for row, label in enumerate(part.labels.tolist())]
            used = [loss for loss in losses if sign == 1 or loss.item() < 1.05 * math.log(10)]
            stopped += len(losses) - len(used)
            slow.zero_grad()
            (sign * sum(used) / len(losses)).backward()
            with torch.no_grad():
                for name, weight in slow.named_parameters():
                    speed[name] = 0.9 * speed.get(name, 0) + weight.grad + 5e-4 * weight
                    weight -= 0.02 * speed[name]
    assert said == ["repair"] * 3 and 0 < stopped < 24
    for name, weight in fast.named_parameters():
        torch.testing.assert_close(weight.double(), slow.get_parameter(name), rtol=0, atol=2e-4)
    assert (
        max(
            (weight - start.get_parameter(name)).abs().max().item()
            for name, weight in fast.named_parameters()
        )
        > 0.01
    )


def test_a_part_without_images_is_left_out(tmp_path):
    record, said = found_record(tmp_path, 15)  # a twentieth of them is none
    model = d_br.repair(network(), record, options(epochs=1))
    assert (
        said[-1] == "repair"
        and (load_file(tmp_path / "kept/sensitivity.safetensors")["kind"] != POISONED).all()
        and [path.name for path in (tmp_path / "kept").iterdir()] == list(d_br.Config.adds)
    )
    before = copy.deepcopy(model.state_dict())
    d_br.repair(
        model, replace(record, state=tmp_path / "other"), options(epochs=1, alpha_c=0, alpha_p=0)
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_that_is_not_a_number_is_an_error(tmp_path):
    record, _ = found_record(tmp_path, 20)
    with pytest.raises(UserError, match="lower --repair_lr"):
        d_br.alternate(
            network(),
            [(record.train, lambda model, *_: model.network.linear.weight.sum() * torch.nan)],
            record,
            options(),
        )


# D-ST


def test_the_contrastive_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    count, labels = 9, torch.tensor([0, 0, 0, 1, 1, 1, 2, 0, 1])
    clean = torch.tensor([True, True, False, True, True, False, True, False, True])
    vectors = F.normalize(
        torch.randn(2 * count, 6, generator=generator, dtype=torch.float64)
    ).requires_grad_()
    total = 0
    for a in range(2 * count):
        i = a % count
        others = [b for b in range(2 * count) if b != a]
        below = sum((vectors[a] @ vectors[b] / 0.1).exp() for b in others)
        positives = [
            b
            for b in others
            if b % count == i or (clean[i] and clean[b % count] and labels[i] == labels[b % count])
        ]
        assert (
            len(positives) == {True: {0: 3, 1: 5, 2: 1}[int(labels[i])], False: 1}[bool(clean[i])]
        )
        total = total + sum(
            -((vectors[a] @ vectors[b] / 0.1).exp() / below).log() for b in positives
        ) / len(positives)
    expected, actual = total / (2 * count), d_st.contrastive(vectors, labels, clean, 0.1)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, vectors)[0] for value in (actual, expected))
    )
    relabelled = torch.where(clean, labels, 7)
    assert torch.equal(actual, d_st.contrastive(vectors, relabelled, clean, 0.1)), (
        "the labels of images that are not clean do not matter"
    )
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            d_st.contrastive(vectors.float(), labels, clean, 0.1), expected.float()
        )


def test_the_loss_of_the_classifier_by_hand():
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    labels, index = torch.arange(12) % 4, torch.arange(12).flip(0)
    clean = torch.arange(12) < 5  # of the whole split: the last images of this batch
    shares = logits.log_softmax(1)
    losses = [-float(shares[row, label]) for row, label in enumerate(labels.tolist())]
    assert any(loss > 2 * math.log(4) for loss in losses[:7])
    good = sum(losses[7:]) / 5
    bad = sum(min(loss, 2 * math.log(4)) for loss in losses[:7]) / 7
    actual = d_st.mixed_loss(
        lambda images: logits, None, labels, index, clean=clean, weight=0.1, bound=2.0
    )
    assert float(actual) == pytest.approx(good - 0.1 * bad)
    alone = d_st.mixed_loss(
        lambda images: logits,
        None,
        labels,
        index,
        clean=torch.ones_like(clean),
        weight=0.1,
        bound=2.0,
    )
    assert float(alone) == pytest.approx(sum(losses) / 12), "a batch without images to unlearn"


def test_each_stage_trains_its_own_layers(tmp_path, monkeypatch):
    record, said = found_record(tmp_path, 60)
    kinds = torch.tensor([CLEAN, CLEAN, UNKNOWN, POISONED]).repeat(15)
    monkeypatch.setattr(d_st, "distinguish", lambda record, config: kinds)
    config = options(
        d_st, epochs=1, head_epochs=1, contrastive_batch=24, contrastive_lr=0.01, classifier_lr=0.1
    )
    nets = {
        name: victim_architecture(record, "extractor", config) for name in ("fresh", "extracted")
    }
    d_st.extract(nets["extracted"], kinds, replace(record, state=tmp_path / "one"), config)
    victim = network()
    repaired = d_st.repair(victim.eval(), record, config)
    assert not repaired.training
    assert all(parameter.requires_grad for parameter in repaired.parameters())
    states = {name: net.state_dict() for name, net in nets.items()} | {
        "after": repaired.state_dict()
    }
    for name, value in states["after"].items():
        last = name.startswith("network.linear")
        assert torch.equal(value, states["extracted"][name]) != last, name
        assert torch.equal(states["fresh"][name], states["extracted"][name]) == last, name
    assert {"extractor", "extracted", "classifier"} <= set(said) and list(states["after"]) == list(
        victim.state_dict()
    )


# both


@BOTH
def test_a_killed_run_ends_with_the_same_weights(method, tmp_path):
    extra = {
        d_br: {"repair_lr": 0.01},
        d_st: {
            "epochs": 2,
            "warm_share": 0.5,
            "head_epochs": 1,
            "contrastive_batch": 16,
            "contrastive_lr": 0.01,
            "classifier_lr": 0.1,
        },
    }[method]
    config = options(method, alpha_p=0.2, batch_size=16, **extra)
    said = []

    def run(folder, kill_at=None):
        record, _ = found_record(tmp_path / folder, 30)
        (tmp_path / folder).mkdir(exist_ok=True)

        def report(stage, model, epoch=None, **values):
            said.append((stage, epoch))
            if (stage, epoch) == kill_at:
                raise Stop

        return method.repair(network(width=4), replace(record, report=report, width=4), config)

    uninterrupted = run("uninterrupted").state_dict()
    stages = list(dict.fromkeys(said))
    assert len(stages) >= 5
    for number, kill_at in enumerate(stages):
        with pytest.raises(Stop):
            run(str(number), kill_at)
        again = run(str(number)).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in uninterrupted.items()), (
            kill_at
        )


@BOTH
def test_a_model_without_a_linear_layer_is_refused(method, tmp_path, monkeypatch):
    record, _ = found_record(tmp_path, 20)
    monkeypatch.setattr(
        sensitivity,
        "victim_architecture",
        lambda *_: nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten()),
    )
    with pytest.raises(ConfigError, match="no linear layer"):
        method.repair(network(), record, options(method))


# on a real record


def poison_shares(folder, victim):
    """(share of poisoned images among those taken for poisoned, the same among those taken for
    clean)"""
    kinds = load_file(folder / "sensitivity.safetensors")["kind"]
    truth = load_file(victim / "poison.safetensors")["train_index"]
    return tuple(
        float(torch.isin((kinds == kind).nonzero().flatten(), truth).float().mean())
        for kind in (POISONED, CLEAN)
    )


def test_unlearning_removes_the_backdoor(places, run, victim):
    done = run(
        "defense/d_br.py",
        *places,
        "--result_file",
        "victim",
        "--save_folder_name",
        "d_br",
        "--centre_epochs",
        2,
    )
    folder = victim / "defense" / "d_br"
    poisoned, clean = poison_shares(folder, victim)
    row = results(folder)
    assert (
        "taking 259 of 1297 images for clean and 64 for poisoned" in done.stderr
        and poisoned > 0.7
        and clean < 0.05
    )
    assert (row["stage"], row["prior"], row["selection"]) == (
        "repair",
        "clean=0.2 poison=0.05",
        "fixed",
    )
    assert float(row["asr"]) < 0.2 < 0.8 < float(row["asr_before"]) and float(row["acc"]) > 0.9
