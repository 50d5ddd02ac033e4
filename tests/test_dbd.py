"""DBD: its losses in float64, which labels it believes, what each stage trains, and resuming."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from antidote_bench import models
from antidote_bench.defense import dbd
from antidote_bench.utils import features, files
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.errors import ConfigError
from tests.test_fmp import SPEC, found_record
from tests.test_scripts import results


def options(**changes):
    short = {
        "ssl_epochs": 1,
        "ssl_batch_size": 32,
        "ssl_lr": 0.1,
        "head_epochs": 1,
        "epochs": 1,
        "steps": 2,
        "batch_size": 8,
    }
    return dbd.Config(**{"result_file": "x", "precision": "fp32", **short, **changes})


def network(seed=0):
    torch.manual_seed(seed)
    return models.build("resnet9", SPEC, 4)


def differing(before, after):
    """The parts of the network whose tensors differ between two state dicts."""
    return {
        name.split(".")[1] for name, value in after.items() if not torch.equal(before[name], value)
    }


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_the_contrastive_loss_in_loops(temperature):
    count = 5
    codes = torch.randn(
        2 * count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )

    def similarity(one, other):
        dot, left, right = (
            sum(float(x) * float(y) for x, y in zip(*pair, strict=True))
            for pair in ((one, other), (one, one), (other, other))
        )
        return math.exp(dot / math.sqrt(left * right) / temperature)

    total = 0.0
    for anchor in range(2 * count):
        other = anchor + count if anchor < count else anchor - count
        everyone = sum(similarity(codes[anchor], codes[k]) for k in range(2 * count) if k != anchor)
        total -= math.log(similarity(codes[anchor], codes[other]) / everyone)
    assert dbd.nt_xent(codes, temperature).item() == pytest.approx(total / (2 * count), abs=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert dbd.nt_xent(codes, temperature).item() == pytest.approx(
            total / (2 * count), abs=1e-5
        )


def test_the_contrastive_loss_is_low_only_for_similar_views():
    far = torch.eye(6, 8)
    assert (
        dbd.nt_xent(torch.cat([far, far]), 0.1)
        < 0.01
        < 5
        < dbd.nt_xent(torch.cat([far, far.roll(1, 0)]), 0.1)
    )


def test_the_symmetric_cross_entropy_in_loops():
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(7) % 4
    for row, label, actual in zip(
        logits.tolist(),
        labels.tolist(),
        dbd.symmetric_cross_entropy(logits, labels, 0.3, 0.7).tolist(),
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
    known, unknown = dbd.split_by_loss(losses, alike, 0.5)
    assert known.tolist() == [1, 3, 6] and unknown.tolist() == [5, 0, 4, 2]
    assert [len(part) for part in dbd.split_by_loss(losses, alike, 0.01)] == [1, 6] and [
        len(part) for part in dbd.split_by_loss(losses, alike, 0.999)
    ] == [6, 1]


def test_among_label_takes_the_lowest_losses_of_every_label(tmp_path):
    """Label 2 has high losses only and keeps its share; a label without images does no harm."""
    labels = torch.tensor([0] * 10 + [2] * 6 + [4] * 4)[
        torch.randperm(20, generator=torch.Generator().manual_seed(0))
    ]
    losses = torch.rand(20, generator=torch.Generator().manual_seed(1)) + 5 * (labels == 2)
    known, unknown = dbd.split_by_loss(losses, labels, 0.5)
    expected = set()
    for label, count in ((0, 5), (2, 3), (4, 2)):
        members = [index for index in range(20) if labels[index] == label]
        expected |= set(sorted(members, key=lambda index: float(losses[index]))[:count])
    assert set(known.tolist()) == expected and set(unknown.tolist()) == set(range(20)) - expected
    assert not (labels[dbd.split_by_loss(losses, torch.zeros_like(labels), 0.5)[0]] == 2).any()
    record, _ = found_record(tmp_path, 40)
    for among in ("all", "label"):
        with pytest.MonkeyPatch.context() as patch:
            seen = []
            patch.setattr(
                dbd,
                "split_by_loss",
                lambda losses, labels, share, seen=seen: (
                    seen.append(labels) or (torch.arange(20), torch.arange(20, 40))
                ),
            )
            dbd.train_mixmatch(
                network(), replace(record, state=tmp_path / among), options(among=among)
            )
        assert torch.equal(
            seen[0], record.train.labels if among == "label" else torch.zeros(40, dtype=torch.long)
        )


def test_losses_are_those_of_images_without_augmentation_and_change_nothing(tmp_path):
    record, _ = found_record(tmp_path, 20)
    model = network().train()
    before, actual = state(model), dbd.losses_of(model, record.train, options())
    assert model.training and not differing(before, model.state_dict())
    logits = model.eval()(record.train.images / 255)
    torch.testing.assert_close(
        actual, dbd.symmetric_cross_entropy(logits, record.train.labels, 0.1, 1.0).detach()
    )


def test_every_step_has_known_images_and_twice_the_same_unknown_ones():
    known, unknown = torch.arange(0, 10), torch.arange(10, 13)
    actual = dbd.epoch_positions(known, unknown, 5, 4, torch.Generator().manual_seed(0)).view(
        5, 3, 4
    )
    assert torch.equal(actual[:, 1], actual[:, 2])
    first, second = actual[:, 0].flatten(), actual[:, 1].flatten()
    assert (
        sorted(first[:10].tolist()) == sorted(first[10:].tolist()) == known.tolist()
        and first[:10].tolist() != known.tolist()
    )
    assert all(sorted(part.tolist()) == unknown.tolist() for part in second[:18].split(3))


def test_guessed_labels_are_the_sharpened_mean():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    actual = dbd.guess_labels(logits, 0.5)
    for n in range(3):
        mean = [
            (float(logits[n].softmax(0)[k]) + float(logits[n + 3].softmax(0)[k])) / 2
            for k in range(4)
        ]
        squares = [value**2 for value in mean]
        assert actual[n].tolist() == pytest.approx([value / sum(squares) for value in squares])
    assert torch.equal(
        dbd.guess_labels(logits, 0.01).round(),
        torch.nn.functional.one_hot(actual.argmax(1), 4).double(),
    )


def test_images_keep_at_least_half_of_themselves():
    torch.manual_seed(0)
    shares, partners = dbd.draw_mixture(20_000, 0.75, "cpu")
    assert (
        0.5 <= shares.min() < 0.51
        and 0.99 < shares.max() <= 1
        and sorted(partners.tolist()) == list(range(20_000))
    )
    expected = torch.distributions.Beta(0.75, 0.75).sample((20_000,))
    assert abs(shares.mean() - torch.maximum(expected, 1 - expected).mean()) < 0.01
    one_sided, _ = dbd.draw_mixture(2000, 0.01, "cpu")
    assert one_sided.mean() > 0.97


def test_mixing_in_loops():
    values = torch.rand(3, 2, 2)
    shares = torch.tensor([0.5, 0.8, 1.0])
    partners = torch.tensor([2, 0, 1])
    expected = torch.stack(
        [shares[n] * values[n] + (1 - shares[n]) * values[partners[n]] for n in range(3)]
    )
    torch.testing.assert_close(dbd.mix(values, shares, partners), expected)


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
    assert dbd.semi_supervised(logits, aims, 3, 15.0).item() == pytest.approx(known + 15 * square)


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
    loss, model = dbd.MixMatch(options(epochs=2, steps=3), 10), Recording()
    images = torch.rand(12, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 10
    for step in range(6):
        model.seen.clear()
        torch.manual_seed(step)
        value = loss(model, images, labels, None)
        torch.manual_seed(step)
        shares, partners = dbd.draw_mixture(12, 0.75, "cpu")
        (guess, grad), (mixture, mixture_grad) = model.seen
        assert torch.equal(guess, images[4:]) and (grad, mixture_grad) == (False, True)
        torch.testing.assert_close(mixture, dbd.mix(images, shares, partners))
        probabilities = (images[4:].flatten(1) @ model.weight).softmax(1)
        sharp = ((probabilities[:4] + probabilities[4:]) / 2) ** 2
        sharp = (sharp / sharp.sum(1, keepdim=True)).detach()
        aims = dbd.mix(torch.cat([torch.eye(10)[labels[:4]], sharp, sharp]), shares, partners)
        logits = mixture.flatten(1) @ model.weight
        torch.testing.assert_close(value, dbd.semi_supervised(logits, aims, 4, 15 * step / 5))
    assert loss.state_dict().keys() == {"step"} and int(loss.step) == 6


@pytest.mark.parametrize("name", ["resnet9", "preactresnet18", "vgg19_bn", "mobilenet_v3_large"])
def test_codes_come_from_the_inputs_of_the_last_layer(name):
    torch.manual_seed(0)
    model = models.build(name, SPEC, 4 if name == "resnet9" else None)
    contrast, images = dbd.Contrast(model).eval(), torch.rand(3, 3, 32, 32)
    expected = features.last_features(
        model, Split((images * 255).round().to(torch.uint8), torch.zeros(3), None)
    )
    with torch.no_grad():
        actual = contrast((images * 255).round() / 255)
        torch.testing.assert_close(actual, contrast.projection(expected), rtol=1e-3, atol=1e-4)
    assert actual.shape == (3, 128) and not features.last_linear(model)._forward_pre_hooks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_stage_trains_its_own_part(precision, tmp_path):
    record, said = found_record(tmp_path, 64)
    model, short = network(), options(precision=precision)
    parts = set(dict(model.network.named_children())) - {"pool", "scale"}
    start = state(model)
    dbd.train_backbone(model, record, short)
    features = state(model)
    assert differing(start, features) == parts - {"linear"}
    dbd.train_head(model, record, short)
    headed = state(model)
    assert differing(features, headed) == {"linear"}
    assert all(
        weight.requires_grad for weight in dbd.train_mixmatch(model, record, short).parameters()
    )
    assert all(
        weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters()
    )
    assert differing(headed, state(model)) == parts and said == ["contrast", "head", "mixmatch"]


def test_labels_are_not_used_before_the_second_stage(tmp_path):
    record, _ = found_record(tmp_path, 40)
    other = replace(
        record,
        train=Split(record.train.images, record.train.labels.flip(0), record.train.truth),
        state=tmp_path / "other",
    )
    networks = []
    for given in (record, other):
        networks.append(network())
        dbd.train_backbone(networks[-1], given, options())
    assert not differing(*map(state, networks))


def test_the_cosine_ends_with_the_last_epoch(tmp_path):
    record, _ = found_record(tmp_path, 32)
    rows = []
    record = replace(record, report=lambda stage, model, **row: rows.append((stage, row["lr"])))
    dbd.train_backbone(network(), record, options(ssl_epochs=3))
    dbd.train_head(network(), record, options(head_epochs=2))
    dbd.train_mixmatch(network(), record, options(epochs=2))
    assert rows[:3] == [
        ("contrast", pytest.approx(0.1 * (1 + math.cos(math.pi * epoch / 3)) / 2))
        for epoch in range(3)
    ]
    assert rows[3:] == [("head", 0.002)] * 2 + [("mixmatch", 0.002)] * 2


def test_the_believed_labels_are_chosen_again_before_every_epoch(tmp_path):
    """The images of low loss come as labelled ones, and all the others come twice."""
    record, _ = found_record(tmp_path, 24)
    batches, chosen = [], []

    class Watched(dbd.MixMatch):
        def forward(self, model, images, labels, index):
            batches.append(index)
            return super().forward(model, images, labels, index)

    with pytest.MonkeyPatch.context() as patch:
        original = dbd.split_by_loss
        patch.setattr(dbd, "MixMatch", Watched)
        patch.setattr(
            dbd, "split_by_loss", lambda *parts: chosen.append(original(*parts)) or chosen[-1]
        )
        dbd.train_mixmatch(network(), record, options(epochs=2, steps=2, batch_size=6))
    assert len(batches) == 4 and len(chosen) == 2
    for epoch, (known, unknown) in enumerate(chosen):
        steps = torch.stack(batches[2 * epoch : 2 * epoch + 2]).view(2, 3, 6)
        assert sorted(steps[:, 0].flatten().tolist()) == sorted(known.tolist())
        assert sorted(steps[:, 1].flatten().tolist()) == sorted(unknown.tolist()) and torch.equal(
            steps[:, 1], steps[:, 2]
        )


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "last", [("contrast", 2), ("head", 1), ("mixmatch", 2)], ids=["contrast", "head", "mixmatch"]
)
def test_a_killed_run_ends_with_the_same_weights(last, tmp_path):
    record, _ = found_record(tmp_path, 40)
    short = options(ssl_epochs=3, head_epochs=2, epochs=3)

    def report(stage, model, epoch=None, **_):
        if (stage, epoch) == last:
            raise Killed

    quiet = replace(record, report=lambda *_, **__: None)
    uninterrupted = dbd.repair(None, replace(quiet, state=tmp_path / "uninterrupted"), short)
    with pytest.raises(Killed):
        dbd.repair(None, replace(record, report=report), short)
    torch.manual_seed(99)  # a new process is in another state
    resumed = dbd.repair(None, quiet, short)
    assert not differing(state(uninterrupted), state(resumed))
    other = dbd.repair(None, replace(quiet, state=tmp_path / "seed"), replace(short, random_seed=1))
    assert differing(state(uninterrupted), state(other))


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"labelled": 1.0}, "labelled"),
        ({"labelled": 0.0}, "labelled"),
        ({"temperature": 0.0}, "temperature"),
        ({"mixing": 0.0}, "mixing"),
        ({"ssl_epochs": -1}, "ssl_epochs"),
        ({"ssl_batch_size": 1}, "ssl_batch_size"),
        ({"steps": 0}, "steps"),
        ({"head_lr": 0.0}, "head_lr"),
        ({"mixmatch_lr": 0.0}, "mixmatch_lr"),
        ({"beta": -1.0}, "beta"),
        ({"unlabelled_weight": -1.0}, "unlabelled_weight"),
    ],
)
def test_options_out_of_range(changes, what):
    with pytest.raises(ConfigError, match=what):
        options(**changes)


def test_what_it_declares():
    config = options(labelled=0.25)
    assert config.prior == "labelled=0.25" and config.budget(1000, 10) == 0


SHORT = {
    "ssl_epochs": 4,
    "ssl_batch_size": 64,
    "ssl_lr": 0.1,
    "head_epochs": 5,
    "head_batch_size": 16,
    "head_lr": 0.02,
    "epochs": 2,
    "steps": 20,
}


def test_it_learns_the_digits_and_not_the_backdoor(victim, places, run):
    """After 4 epochs without labels, poisoned images have the features of their own class, and
    their labels are not believed."""
    run(
        "defense/dbd.py",
        *places,
        "--result_file",
        "victim",
        *(str(word) for key, value in SHORT.items() for word in (f"--{key}", value)),
    )
    folder = victim / "defense" / "dbd"
    row, log = results(folder), files.read_csv(folder / "log.csv")
    assert (row["stage"], row["prior"], row["selection"], row["clean_budget"]) == (
        "in-training",
        "labelled=0.5",
        "fixed",
        "0",
    )
    assert (
        float(row["asr_before"]) > 0.9 and float(row["asr"]) < 0.2 and float(row["acc"]) > 0.6
    )  # measured: 0.0 and 86.6
    (decoupled,) = (line for line in log if line["stage"] == "decoupled")
    assert float(decoupled["asr"]) < 0.2 and float(decoupled["acc"]) > 0.7  # measured: 0.9 and 92.2
    contrast = [float(line["loss"]) for line in log if line["stage"] == "contrast"]
    assert len(contrast) == 4 and contrast[-1] < contrast[0] - 0.3
