"""Detectors of data that look at statistics of features, maps and gradients: slow references,
planted cases with a known answer, and what they find on a small victim."""

import dataclasses
import importlib
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon
from torch import nn

from antidote_bench import models
from antidote_bench.detection import agpd, asset, beatrix, scan, spectre
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.detection import anomaly, decomposition, directions, gram, robust, skewed
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.protocol import roc
from tests import inspecting
from tests.test_fmp import SPEC


def planted(count=2000, shift=9.0, share=0.1):
    """(features N,16, labels, which are planted): a share of label 3 lies `shift` away."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    features = torch.randn(count, 16, generator=generator)
    features += 4 * torch.randn(10, 16, generator=generator)[labels]
    is_bad = torch.zeros(count, dtype=torch.bool)
    is_bad[(labels == 3).nonzero().flatten()[: int(share * count / 10)]] = True
    features[is_bad, 0] += shift
    return features, labels, is_bad


def with_features(module, monkeypatch, place, features, labels, known):
    """An Inspector whose suspects have these features."""
    logits = 9.0 * nn.functional.one_hot(labels, 10)
    monkeypatch.setattr(module, "penultimate", lambda *_: (features, logits))
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8).expand(len(labels), -1, -1, -1)
    split = Split(images, labels, labels)
    return inspecting.made_up(split, place, spec=SPEC, reference_index=known)


def clean_index(labels, is_bad, each):
    """The positions of `each` clean images of every label, sorted."""
    found = [((labels == k) & ~is_bad).nonzero().flatten()[-each:] for k in range(10)]
    return torch.cat(found).sort().values.tolist()


# The anomaly index


def test_the_anomaly_index_by_hand():
    values = np.array([1.0, 2.0, 3.0, 4.0, 100.0, np.nan])
    found = anomaly.anomaly_index(values)
    assert found[4] == pytest.approx(97 / (1.4826 * (1 + 1e-6))) and found[5] == 0
    assert found[2] == 0 and found[0] == -found[3] * 2
    assert not anomaly.anomaly_index(np.array([1.0, 2.0, 3.0, 100.0])).any(), "too few classes"
    assert np.isfinite(anomaly.anomaly_index(np.array([1.0, 1, 1, 1, 2]))).all()


# SCAn


def drawn(seed=0, classes=200, dimension=3):
    """(features, labels, between, within) of the model of class means and noise."""
    generator = np.random.default_rng(seed)
    roots = generator.normal(size=(2, dimension, dimension))
    between, within = 4 * roots[0] @ roots[0].T, roots[1] @ roots[1].T
    labels = np.repeat(np.arange(classes), generator.integers(2, 6, classes))
    means = generator.multivariate_normal(np.zeros(dimension), between, classes)
    noise = generator.multivariate_normal(np.zeros(dimension), within, len(labels))
    return means[labels] + noise, labels, between, within


def log_likelihood(features, labels, between, within):
    """Of the images of every class together, whose joint covariance is written out."""
    total = 0.0
    for label in np.unique(labels):
        own = features[labels == label]
        covariance = np.kron(np.ones((len(own), len(own))), between)
        covariance += np.kron(np.eye(len(own)), within)
        total += stats.multivariate_normal.logpdf(own.ravel(), np.zeros(own.size), covariance)
    return total


def test_no_step_of_em_lowers_the_likelihood_and_the_end_is_a_maximum():
    features, labels, *truth = drawn(classes=30)
    features = features - features.mean(0)
    groups = [features[labels == label] for label in np.unique(labels)]
    counts, means = [len(group) for group in groups], np.stack([it.mean(0) for it in groups])
    scatter = sum((it - it.mean(0)).T @ (it - it.mean(0)) for it in groups)
    model = [np.eye(3), np.eye(3)]
    values = [log_likelihood(features, labels, *model)]
    for _ in range(15):
        model = decomposition.em_step(*model, np.array(counts), means, scatter)
        values.append(log_likelihood(features, labels, *model))
    assert (np.diff(values) > -1e-6).all() and values[-1] > values[0] + 10
    found = decomposition.fit_model(features, labels)
    best = log_likelihood(features, labels, found.between, found.within)
    assert best >= values[-1] - 1e-3 and best >= log_likelihood(features, labels, *truth)
    for scale in (0.9, 1.1):
        for changed in ((scale, 1), (1, scale)):
            other = changed[0] * found.between, changed[1] * found.within
            assert log_likelihood(features, labels, *other) < best


def test_em_finds_the_covariances_that_were_drawn_from():
    features, labels, between, within = drawn(classes=3000)
    found = decomposition.fit_model(features, labels)
    for estimate, truth in ((found.between, between), (found.within, within)):
        assert np.abs(estimate - truth).max() < 0.1 * np.abs(truth).max()


def test_the_statistic_of_two_groups_by_hand():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(40, 2)) + 3
    features[:15] += [8, 0]
    within = np.array([[1.0, 0.3], [0.3, 2.0]])
    model = decomposition.Model(np.array([1.0, 0.0]), 5 * np.eye(2), within)
    found = decomposition.divide(features, model, seed=0)
    first = found.second == found.second[0]
    assert np.flatnonzero(first).tolist() == list(range(15))
    weight, prior = np.linalg.inv(within), np.linalg.inv(5 * np.eye(2))
    centred = features - model.mean
    one = np.linalg.inv(prior + 40 * weight) @ (40 * weight) @ centred.mean(0)
    total = 0.0
    for image, is_first in zip(centred, first, strict=True):
        own = centred[first == is_first].mean(0)
        total += (image - one) @ weight @ (image - one) - (image - own) @ weight @ (image - own)
    assert found.statistic == pytest.approx(total / 40)
    away = centred[0] - centred[~first].mean(0)
    assert found.distances[0].max() == pytest.approx(math.sqrt(away @ weight @ away))


def test_the_group_with_fewer_clean_images_is_suspected():
    second = np.array([1, 1, 1, 0, 0, 0, 0], bool)
    none, two = np.zeros(7, bool), np.array([0, 0, 0, 1, 1, 0, 0], bool)
    assert scan.suspect(second, none) == 1 == scan.suspect(~second, none) + 1
    assert scan.suspect(second, two) == 1 and scan.suspect(~second, two) == 0
    assert scan.suspect(~second, ~two & second) == 1, "the smaller group holds the clean images"


def test_a_label_that_cannot_be_divided_has_the_score_0(tmp_path, monkeypatch):
    features, labels, is_bad = planted(400)
    features[labels == 8] = features[8].clone()
    record = with_features(
        scan, monkeypatch, tmp_path, features, labels, clean_index(labels, is_bad, 5)
    )
    said = scan.score(None, record, scan.Config(result_file="x"))
    assert not said.scores[labels == 8].any() and said.evidence["statistic"][8].isnan()
    assert said.scores.isfinite().all()


# SPECTRE


def test_quantum_scores_against_an_eigendecomposition():
    generator = np.random.default_rng(0)
    white = generator.normal(size=(50, 4)) * [1, 2, 1, 1]
    scores, value = robust.quantum(white)
    covariance = np.cov(white.T, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    weights = np.exp(4 * (values - 1) / (values.max() - 1))
    weights /= weights.sum()
    for place, row in enumerate(white):
        assert scores[place] == pytest.approx(sum(weights * (vectors.T @ row) ** 2))
    assert value == pytest.approx((weights * values).sum())
    assert robust.quantum(white / 10)[1] <= 1, "no direction varies too much"


def test_the_largest_fourth_moment_against_the_whole_matrix():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(400, 4))
    features[:20, 1] += 6
    white = robust.white_by(features, features)
    assert np.allclose(white.T @ white / 400, np.eye(4))
    products = np.stack([np.outer(row, row).ravel() for row in white])
    largest = np.linalg.eigvalsh(np.cov(products.T, bias=True))[-1]
    direction, moment = robust.fourth_moment(white)
    assert moment == pytest.approx(largest, rel=1e-3)
    assert np.linalg.norm(direction) == pytest.approx(1)
    kept = robust.undisturbed(features, 0.05)
    assert not kept[:20].any() and kept.sum() >= 400 - 2 * 0.05 * 400
    assert robust.undisturbed(features[20:], 0.05).all(), "normal features lose none"
    assert robust.undisturbed(features, 0.0).all()


@pytest.mark.parametrize("seed", range(2))
def test_spectre_finds_poison_across_the_main_directions(seed):
    """Where spectral signatures see only what varies most."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(1000, 32))
    features[:, 1:3] *= [12, 8]
    is_bad = np.arange(1000) < 50
    features[is_bad, 0] += 6
    found = robust.entropy_scores(features, 0.05)
    assert roc.ranking(found.scores, is_bad)["auroc"] > 0.97
    assert robust.entropy_scores(features[~is_bad], 0.05).value < found.value


def test_the_numbers_of_components_are_squares():
    assert robust.sizes(64) == [1, 4, 9, 16, 25, 36, 49, 64]
    assert robust.sizes(3) == [1, 2, 3] and robust.sizes(1) == [1]
    wide = np.random.default_rng(0).normal(size=(40, 100))
    assert robust.principal(wide).shape == (40, 10)
    assert robust.principal(wide[:, :1] * np.ones(5)).shape == (40, 1), "one direction varies"


# Both, as detectors


@pytest.mark.parametrize(
    ("module", "least"), [(scan, 1.0), (spectre, 0.98)], ids=["scan", "spectre"]
)
def test_a_planted_group_of_features_has_high_scores(module, least, tmp_path, monkeypatch):
    features, labels, is_bad = planted()
    known = clean_index(labels, is_bad, 10)
    record = with_features(module, monkeypatch, tmp_path, features, labels, known)
    said = module.score(None, record, module.Config(result_file="x"))
    assert roc.ranking(said.scores.numpy(), is_bad.numpy())["auroc"] >= least
    assert said.flagged[is_bad].all() and not said.flagged[labels != 3].any()


# Beatrix


def test_gram_matrices_against_a_loop():
    maps = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    maps[0, 1] = 0  # a channel that is never active
    for order in (1, 2, 3, 8):
        found = gram.grams(maps, order)
        for image, entries in zip(maps.flatten(2).numpy(), found, strict=True):
            pairs = itertools.combinations_with_replacement(range(3), 2)
            for entry, (row, column) in zip(entries, pairs, strict=True):
                value = (image[row] ** order * image[column] ** order).sum()
                expected = math.copysign(abs(value) ** (1 / order), value)
                assert float(entry) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert gram.grams(1e4 * maps.float(), 8).isfinite().all()


def test_deviations_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(12, 3, 2, 2, generator=generator).double()
    predicted = torch.tensor([0] * 6 + [1] * 5 + [2])
    bounds = gram.bounds_of_classes(clean, predicted, 3, orders=2)
    shown = 8 * torch.rand(4, 3, 2, 2, generator=generator).double()
    classes = torch.tensor([1, 0, 2, 1])
    found = gram.deviations(shown, classes, bounds)
    for place, label in enumerate(classes.tolist()):
        own = clean if label == 2 else clean[predicted == label]  # one image sets no bounds
        total = 0.0
        for order in (1, 2):
            known, entries = gram.grams(own, order), gram.grams(shown[place][None], order)[0]
            median = known.median(0).values
            spread = 10 * (known - median).abs().median(0).values
            low, high = median - spread, median + spread
            floor = 0.01 * float(low.abs().mean() + high.abs().mean()) / 2
            for entry, least, most in zip(entries, low, high, strict=True):
                if entry < least:
                    total += float((least - entry) / max(abs(least), floor))
                elif entry > most:
                    total += float((entry - most) / max(abs(most), floor))
        assert found[place] == pytest.approx(total / (2 * 6))
    assert found.max() > 0 and gram.deviations(clean, predicted, bounds).max() < found.max()


def test_the_last_stage_of_a_network():
    images = torch.zeros(1, 3, 32, 32)
    network = models.build("resnet9", SPEC, 4)
    assert gram.last_stage(network, images) is network.network.layer3.residual.first.conv
    network = models.build("preactresnet18", SPEC, 4)
    assert gram.last_stage(network, images) is network.network.layer4[0].shortcut
    with pytest.raises(ConfigError, match="no stage of convolutions"):
        gram.last_stage(nn.Sequential(nn.Conv2d(3, 4, 3)), images)


def test_the_discrepancy_of_features_against_a_loop():
    generator = np.random.default_rng(0)
    some, others = generator.normal(size=(4, 3)) + 1, generator.normal(size=(5, 3))
    rows = np.concatenate([some, others])
    width = np.median([np.linalg.norm(a - b) for a, b in itertools.combinations(rows, 2)])

    def kernel(a, b):
        return math.exp(-np.square(a - b).sum() / (2 * width**2))

    expected = np.mean([kernel(a, b) for a, b in itertools.permutations(some, 2)])
    expected += np.mean([kernel(a, b) for a, b in itertools.permutations(others, 2)])
    expected -= 2 * np.mean([kernel(a, b) for a in some for b in others])
    assert beatrix.discrepancy(some, others) == pytest.approx(expected)


class Stages(nn.Module):
    """Eight maps, of which the first two are alike; a darker image has another prediction."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=4)

    def forward(self, images):
        out = self.second(self.first(images).relu()).mean((2, 3))
        return nn.functional.pad(out, (0, 2))


@pytest.mark.parametrize("apart", [5, 0], ids=["apart", "together"])
def test_beatrix_finds_maps_that_no_clean_image_has(apart, tmp_path, monkeypatch):
    """Of label 3, a part has a pattern over it that puts other channels together.

    The paper's own rule flags the outlying images of the label, and only if their features lie
    apart from those of its other images too.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(60, 120, (600, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(600) % 10
    is_bad = (labels == 3) & (torch.arange(600) < 300)
    images[is_bad, 0] = torch.randint(0, 2, (32, 32), generator=generator).byte() * 255
    logits = 9.0 * nn.functional.one_hot(labels, 10)
    features = torch.randn(600, 8, generator=generator) + apart * is_bad[:, None]
    monkeypatch.setattr(beatrix, "penultimate", lambda *_: (features, logits))
    known = clean_index(labels, is_bad, 20)
    record = inspecting.made_up(
        Split(images, labels, labels), tmp_path, spec=SPEC, reference_index=known
    )
    config = beatrix.Config(result_file="x", precision="fp32", orders=3)
    said = beatrix.score(Stages().eval(), record, config)
    assert said.scores[is_bad].min() > said.scores[~is_bad].max()
    is_target = said.evidence["index"] > anomaly.LIMIT
    if not apart:
        assert not is_target.any() and not said.flagged.any()
        return
    assert is_target.nonzero().flatten().tolist() == [3]
    assert said.flagged[is_bad].all() and not said.flagged[labels != 3].any()
    # the others of the label may be outlying too, as a twentieth of clean images is
    assert said.flagged[~is_bad & (labels == 3)].double().mean() < 0.3


# AGPD


def two_directions(count, bad, angle=90.0, noise=0.03):
    """(gradients n,5 of one label, direction of clean images, which are bad): the bad ones are
    turned by an angle, and all have noise."""
    generator = np.random.default_rng(0)
    turn = math.radians(angle)
    centre = np.tile([1.0, 0, 0, 0, 0], (count, 1))
    centre[:bad] = [math.cos(turn), math.sin(turn), 0, 0, 0]
    rows = centre + noise * generator.normal(size=(count, 5))
    rows *= generator.uniform(0.5, 2, (count, 1))  # lengths do not count
    return rows, np.array([1.0, 0, 0, 0, 0]), np.arange(count) < bad


def test_the_gap_against_a_loop():
    rows, known, _ = two_directions(12, 4)

    def cosine(a, b):
        return a @ b / math.sqrt((a @ a) * (b @ b))

    similar = [cosine(row, known) for row in rows]
    first = int(np.argmin(similar))
    total = sum((similar[i] - cosine(rows[i], rows[first])) ** 2 for i in range(12) if i != first)
    assert directions.gap(rows, known) == (pytest.approx(math.sqrt(total / 12)), first)
    assert directions.gap(rows[:1], known) == (0.0, 0)


def test_the_second_direction_is_grown_to_the_whole_group():
    rows, known, is_bad = two_directions(1000, 300, noise=0.1)
    found = directions.grow(rows, known, directions.gap(rows, known)[1], step=0.05)
    # every step takes the nearest image, so some clean ones join before the histogram is calm
    assert found.bad[is_bad].all() and found.bad[~is_bad].mean() < 0.05
    assert found.ratio[is_bad].max() < 0.2 < 0.8 < found.ratio[~is_bad].min()
    to_bad = 1 - directions.unit(rows)[-1] @ directions.unit(rows[found.bad].sum(0)[None])[0]
    to_known = 1 - directions.unit(rows)[-1] @ known
    assert found.ratio[-1] == pytest.approx(to_bad / (to_bad + to_known))


@pytest.mark.parametrize("angle", [90.0, 40.0])
def test_the_second_direction_is_grown_as_in_a_loop(angle):
    """Image by image in plain Python, with the window that is calmest."""
    rows, known, _ = two_directions(80, 20, angle, noise=0.15)
    rows, known = rows.tolist(), known.tolist()
    first = directions.gap(np.array(rows), np.array(known))[1]

    def distance(a, b):
        return 1 - math.fsum(x * y for x, y in zip(a, b, strict=True)) / (
            math.hypot(*a) * math.hypot(*b)
        )

    def histogram(values):
        return [sum(min(int(99 * value), 98) == k for value in values) for k in range(99)]

    groups, left, before, changes = [[first]], [i for i in range(80) if i != first], None, []
    while left:
        bad = [rows[i] for group in groups for i in group]
        mean = [sum(column) / len(bad) for column in zip(*bad, strict=True)]
        to_bad = {i: distance(rows[i], mean) for i in left}
        ratio = {i: to_bad[i] / (to_bad[i] + distance(rows[i], known)) for i in left}
        low, high = min(ratio.values()), max(ratio.values())
        groups.append([i for i in left if high == low or (ratio[i] - low) / (high - low) <= 0.05])
        before = histogram(ratio.values()) if before is None else before
        left = [i for i in left if i not in groups[-1]]
        after = histogram([ratio[i] for i in left])
        changes.append(jensenshannon(before, after) if left else 1.0)
        before = after
    expected = np.zeros(80, bool)
    expected[[i for group in groups[: max(directions.settled(changes), 1)] for i in group]] = True
    found = directions.grow(np.array(rows), np.array(known), first, step=0.05)
    assert len(changes) > 20 and (found.bad == expected).all()


def test_the_calmest_window_against_a_loop():
    generator = np.random.default_rng(0)
    changes = np.concatenate([generator.uniform(0.3, 0.9, 7), generator.uniform(0, 0.01, 20)])
    values = []
    for start in range(len(changes) - 9):
        window = changes[start : start + 10]
        values.append(sum(window) / 10 + 5 * np.std(window))
    assert directions.settled(changes.tolist()) == int(np.argmin(values)) >= 7
    assert directions.settled([]) == 0 == directions.settled([0.5])
    assert directions.settled([0.9, 0.1, 0.1]) == 1, "half of the changes are a window"
    assert jensenshannon([1, 0], [0, 1], 2) == pytest.approx(1), "scipy gives the distance"


def test_the_layer_and_the_targets_of_agpd():
    gaps = np.full((6, 10), 0.1)
    indices = np.zeros((6, 10))
    indices[1, 4], indices[3, 2] = 9.0, 8.0
    assert agpd.choose(gaps, indices)[0] == 1
    assert np.flatnonzero(agpd.choose(gaps, indices)[1]).tolist() == [4]
    assert not agpd.choose(gaps, 0 * indices)[1].any()
    gaps[3, 5], gaps[5] = 0.4, 0.9  # the last layer does not count
    row, targets = agpd.choose(gaps, 0 * indices)
    assert row == 3 and np.flatnonzero(targets).tolist() == [5]


def test_agpd_finds_a_planted_direction(tmp_path, monkeypatch):
    """In the second of three layers; the label has no other sign of it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(800) % 10
    is_bad = (labels == 3) & (torch.arange(800) < 300)
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(4)))
    found = {
        str(layer): 0.1 * torch.randn(800, 8, generator=generator)
        + nn.functional.one_hot(labels % 8, 8)
        for layer in range(1, 4)
    }
    found["2"][is_bad] += torch.tensor([0.0, 0, 0, -1, 0, 0, 1, 0])
    monkeypatch.setattr(agpd, "gradients", lambda *_: found)
    known = clean_index(labels, is_bad, 10)
    monkeypatch.setattr(agpd, "forward_all", lambda *_: labels[known])
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8).expand(len(labels), -1, -1, -1)
    split = Split(images, labels, labels)
    record = inspecting.made_up(split, tmp_path, spec=SPEC, reference_index=known)
    said = agpd.score(model, record, agpd.Config(result_file="x"))
    assert said.evidence["layer"].tolist() == [1]
    assert said.evidence["targets"].nonzero().flatten().tolist() == [3]
    assert said.scores[is_bad].min() > said.scores[~is_bad].max()
    assert said.flagged[is_bad].all() and not said.flagged[labels != 3].any()


def test_the_layers_of_agpd():
    names = agpd.layers_of(models.build("preactresnet18", SPEC, 4))
    assert len(names) == 16 and not any("shortcut" in name for name in names)
    with pytest.raises(ConfigError, match="at least two convolutions"):
        agpd.layers_of(nn.Sequential(nn.Conv2d(3, 4, 3)))


# ASSET


@pytest.mark.parametrize("power", [1, 2])
def test_the_adjusted_outlyingness_by_hand(power):
    values = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 100]) ** power
    median = np.median(values)
    kernel = [
        ((high - median) - (median - low)) / (high - low)
        for low, high in itertools.product(values[:5], values[5:])
    ]
    skewness = np.median(kernel)
    assert skewed.medcouple(values) == pytest.approx(skewness) and (skewness > 0) == (power > 1)
    lower, upper = np.percentile(values, [25, 75])
    found = skewed.adjusted_outlyingness(values)
    up, down = (3, -4) if power > 1 else (0, 0)
    above = upper + 1.5 * math.exp(up * skewness) * (upper - lower) - median
    below = median - (lower - 1.5 * math.exp(down * skewness) * (upper - lower))
    assert found[-1] == pytest.approx((values[-1] - median) / above)
    assert found[0] == pytest.approx((median - values[0]) / below)
    assert skewed.adjusted_outlyingness(-values) == pytest.approx(found), "mirrored"
    assert not skewed.adjusted_outlyingness(np.array([1.0, 1, 1, 1, 1, 5])).any()


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 2, 3, 4, 5], 0), ([1.0, 1, 1, 1, 1], 0), ([0.0, 1, 1, 1, 2], 0), ([2.0, 2, 2, 9], 0.5)],
)
def test_the_medcouple_of_values_that_equal_the_median(values, expected):
    assert skewed.medcouple(values) == expected
    assert skewed.medcouple(-np.array(values)) == -expected


def test_the_threshold_is_where_the_density_of_the_lower_half_has_fallen():
    generator = np.random.default_rng(0)
    scores = np.concatenate([generator.normal(2, 0.5, 500), generator.normal(9, 1, 400)])
    lower = np.sort(scores)[:450]
    limit = asset.own_threshold(scores)
    assert limit > lower.mean()
    assert stats.norm(lower.mean(), lower.std()).pdf(limit) == pytest.approx(1e-6)
    assert asset.own_threshold(np.full(9, 4.0)) == 4
    assert asset.own_threshold(np.array([0.0, 1e9, 2e9, 3e9])) == 5e8, "flat everywhere"


def test_the_small_network_tells_what_no_clean_image_has():
    generator = torch.Generator().manual_seed(0)
    suspects, clean = torch.randn(2, 100, 8, generator=generator).unbind()
    suspects[:15, 0] += 6
    config = asset.Config(result_file="x", steps=60, step_size=5e-3)
    torch.manual_seed(0)
    told = asset.tell_apart(suspects, clean, config)
    assert told[:15].min() > told[15:].median() and 0 <= told.min() and told.max() <= 1


def test_asset_raises_the_loss_of_what_stands_out(tmp_path, monkeypatch):
    """The small network is told which images are poisoned; these are black."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(100, 256, (160, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(160) % 10
    is_bad = torch.arange(160) < 24
    images[is_bad], labels[is_bad] = images[is_bad] // 8, 3
    features = is_bad[:, None].float() + torch.zeros(160, 4)
    monkeypatch.setattr(asset, "tell_apart", lambda shown, *_: shown[:, 0] + ramp(len(shown)))
    known = clean_index(labels, is_bad, 4)
    record = with_features(asset, monkeypatch, tmp_path, features, labels, known)
    shown = Split(images, labels, labels)
    record = dataclasses.replace(record, suspects=shown, reference=shown[known])
    config = asset.Config(
        result_file="x", precision="fp32", epochs=10, batch_size=40, step_size=0.01
    )
    said = asset.score(None, record, config)
    assert said.scores[is_bad].mean() > said.scores[~is_bad].mean() + 0.3
    assert roc.ranking(said.scores.numpy(), is_bad.numpy())["auroc"] > 0.8


def ramp(count):
    """Small different numbers, so that the quartiles of what the network says differ."""
    return torch.linspace(0, 0.05, count)


# On a small victim


@pytest.mark.parametrize(
    ("name", "least", "record"),
    [("scan", 0.9, "large_victim"), ("beatrix", 0.95, "victim"), ("agpd", 0.8, "victim")],
    ids=["scan", "beatrix", "agpd"],
)
def test_what_is_found_on_a_small_victim(name, least, record, places, tmp_path, request):
    module = importlib.import_module(f"antidote_bench.detection.{name}")
    config = inspecting.options(name, request.getfixturevalue(record), places)
    model, record, case = inspecting.opened(config, tmp_path)
    scores = inspecting.scores_of(module.score(model, record, config))
    judged = (case.role == 0).numpy()
    found = roc.ranking(scores.numpy()[judged], case.positive.numpy()[judged])
    assert found["auroc"] > least


def test_spectre_finds_few_poisoned_images_of_a_small_victim(victim, places, tmp_path):
    """Its label is half poison; SPECTRE is made for a tenth, so most of it is left out here."""
    config = inspecting.options("spectre", victim, places)
    model, record, case = inspecting.opened(config, tmp_path)
    features, _ = spectre.penultimate(model, record, config)
    own = (record.suspects.labels == 0) & (case.role == 0)
    few = (own & case.positive).nonzero().flatten()[:12]
    index = torch.cat([(own & ~case.positive).nonzero().flatten(), few])
    found = robust.entropy_scores(features[index].double().numpy(), config.epsilon)
    assert roc.ranking(found.scores, case.positive[index].numpy())["auroc"] > 0.95
