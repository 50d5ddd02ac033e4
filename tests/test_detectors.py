"""Single detectors: slow references, planted cases with a known answer, and what they find on a
small victim."""

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from antidote_bench import models
from antidote_bench.detection import (
    abl,
    ac,
    ban,
    cd,
    mm_bd,
    scale_up,
    sentinet,
    spectral,
    strip,
    trodo,
)
from antidote_bench.utils.data import loader
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.protocol import roc
from tests import inspecting
from tests.test_fmp import SPEC


def split(images, labels=None):
    labels = torch.full((len(images),), -1) if labels is None else labels
    return Split(images, labels, labels)


def noise(count, seed=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


class Corner(nn.Module):
    """Logits of brightness, unless the corner is white: then class 7, for certain."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, images):
        level = images.mean((1, 2, 3))[:, None] * 10
        logits = -self.scale * (level - torch.arange(10.0, device=images.device)).abs()
        lit = images[:, :, :4, :4].amin((1, 2, 3)) > 0.99
        target = nn.functional.one_hot(torch.tensor(7), 10) * 100.0
        return torch.where(lit[:, None], target, logits)


def triggered(images):
    images = images.clone()
    images[:, :, :4, :4] = 255
    return images


# Detectors of inputs


@pytest.mark.parametrize("blend", ["add", "mean"])
def test_strip_against_a_loop(blend, tmp_path):
    inputs, overlays = noise(5), noise(4, seed=1, high=100)
    model = Corner().requires_grad_(False).double()
    found = strip.mean_entropy(model, inputs.double() / 255, overlays.double() / 255, blend)
    for place, image in enumerate(inputs.double() / 255):
        entropies = []
        for overlay in overlays.double() / 255:
            mixed = (image + overlay).clamp(max=1) if blend == "add" else (image + overlay) / 2
            p = model(mixed[None]).softmax(1).numpy()[0]
            entropies.append(stats.entropy(p))
        assert found[place] == pytest.approx(np.mean(entropies), abs=1e-9)


@pytest.mark.parametrize("module", [strip, scale_up], ids=["strip", "scale_up"])
def test_a_planted_trigger_has_the_highest_scores(module, tmp_path):
    clean, reference = noise(30, high=120), noise(40, seed=2, high=120)
    shown = torch.cat([clean, triggered(clean)])
    labels = torch.arange(40) % 10
    record = inspecting.made_up(
        split(shown), tmp_path, spec=SPEC, reference=split(reference, labels)
    )
    config = module.Config(result_file="x", precision="fp32")
    scores = inspecting.scores_of(module.score(Corner().requires_grad_(False), record, config))
    assert scores[30:].min() > scores[:30].max()


def test_scale_up_against_a_loop():
    images, model = noise(6, high=60), Corner().requires_grad_(False)
    found = scale_up.consistency(model, split(images), "fp32")
    for place, image in enumerate(images.float() / 255):
        own = int(model(image[None]).argmax())
        p = [model((image * s).clamp(max=1)[None]).softmax(1)[0] for s in (3, 5, 7, 9, 11)]
        assert found[place, 0] == np.mean([int(it.argmax()) == own for it in p])
        assert found[place, 1] == pytest.approx(np.mean([float(it[own]) for it in p]), abs=1e-6)
        assert found[place, 2] == own


def test_scale_up_standardises_by_predicted_class():
    values = torch.tensor([0.2, 0.4, 0.9, 0.5, 0.5], dtype=torch.float64)
    mean, deviation = scale_up.statistics(values, torch.tensor([0, 0, 1, 2, 2]), 4)
    assert mean[0] == pytest.approx(0.3) and deviation[0] == pytest.approx(values[:2].std())
    for label in (1, 2, 3):  # one image, equal images, none
        assert (mean[label], deviation[label]) == (values.mean(), values.std())


def test_scale_up_standardises_the_share_alone(tmp_path, monkeypatch):
    """The mean probability, which breaks ties, has no part in the statistics."""
    # the share, the mean probability and the prediction of each image
    reference = [[0.2, 0.9, 0], [0.6, 0.1, 0], [0.4, 0.3, 1], [1.0, 0.2, 1]]
    suspects = [[0.4, 0.0, 0], [0.4, 1.0, 0], [0.7, 0.5, 1]]
    shown = {3: suspects, 4: reference}

    def consistency(_model, split, _precision):
        return torch.tensor(shown[len(split)], dtype=torch.float64)

    monkeypatch.setattr(scale_up, "consistency", consistency)
    record = inspecting.made_up(split(noise(3)), tmp_path, spec=SPEC, reference=split(noise(4)))
    config = scale_up.Config(result_file="x", variant="data_limited")
    scores = scale_up.score(None, record, config).scores
    expected = torch.zeros(3, dtype=torch.float64)  # 0.4 and 0.7 are the means of their classes
    assert torch.allclose(scores, expected, atol=2e-6) and scores[1] > scores[0]


def test_the_objective_of_a_mask_against_a_loop():
    torch.manual_seed(0)
    logits, wanted = torch.randn(2, 10).double(), torch.randn(2, 10).double()
    mask = torch.rand(2, 1, 5, 5).double()
    config = cd.Config(result_file="x", gamma=0.03, beta=7.0)
    found = cd.objective(logits, wanted, mask, config)
    for place in range(2):
        variation = 0.0
        values = mask[place, 0].tolist()
        for row in range(5):
            for column in range(5):
                if row:
                    variation += (values[row][column] - values[row - 1][column]) ** 2
                if column:
                    variation += (values[row][column] - values[row][column - 1]) ** 2
        change = (logits[place] - wanted[place]).abs().sum() / 10
        expected = change + 0.03 * sum(map(sum, values)) + 7 * variation / 25
        assert found[place] == pytest.approx(float(expected))


class Bright(nn.Module):
    """Logits of the brightness of ten parts of the image, or of the corner alone where that is
    bright."""

    def forward(self, images):
        level = images[:, :, :4, :4].mean((1, 2, 3))[:, None]
        is_bright = torch.sigmoid(20 * (level - 0.6))
        corner = level * torch.linspace(-20, 20, 10)
        parts = nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), (2, 5)).flatten(1)
        return is_bright * corner + (1 - is_bright) * 100 * parts


def blocks(count, seed):
    """Images of ten grey blocks."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 150, (count, 1, 2, 5), generator=generator).float()
    return nn.functional.interpolate(levels, (32, 32)).byte().expand(-1, 3, -1, -1).clone()


def test_a_small_mask_explains_a_planted_trigger(tmp_path):
    clean = blocks(6, seed=0)
    record = inspecting.made_up(
        split(torch.cat([clean, triggered(clean)])),
        tmp_path,
        spec=SPEC,
        reference=split(blocks(6, seed=1)),
    )
    config = cd.Config(result_file="x", judges="input", precision="fp32", steps=40)
    said = cd.score(Bright(), record, config)
    assert said.scores[6:].min() > said.scores[:6].max() and said.flagged[6:].all()


# Detectors of data


def planted(count=2000):
    """(features N,16, labels, which are planted): a tenth of label 3 lies 9 deviations away."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    features = torch.randn(count, 16, generator=generator)
    is_bad = torch.zeros(count, dtype=torch.bool)
    is_bad[(labels == 3).nonzero().flatten()[: count // 100]] = True
    features[is_bad, 0] += 9
    return features, labels, is_bad


@pytest.mark.parametrize(
    ("module", "changes"), [(spectral, {}), (ac, {"reduction": "pca"})], ids=["spectral", "ac"]
)
def test_a_planted_group_of_features_has_the_highest_scores(module, changes, tmp_path, monkeypatch):
    features, labels, is_bad = planted()
    monkeypatch.setattr(module, "penultimate", lambda *_: (features, None))
    images = noise(1).expand(2000, -1, -1, -1)
    record = inspecting.made_up(split(images, labels), tmp_path, spec=SPEC)
    said = module.score(None, record, module.Config(result_file="x", **changes))
    assert said.scores[is_bad].min() > said.scores[~is_bad].max()
    assert said.flagged[is_bad].all()


def test_the_score_of_abl_is_minus_the_loss(tmp_path, monkeypatch):
    losses = torch.tensor([3.0, 0.1, 2.0, 0.2])
    monkeypatch.setattr(abl, "isolate", lambda *_: (None, torch.tensor([1]), losses))
    said = abl.score(None, None, abl.Config(result_file="x"))
    assert torch.equal(said.scores, -losses.double())
    assert said.flagged.tolist() == [False, True, False, False]


# A detector of models


class Linear(nn.Module):
    """logit_k = the mean brightness of block k, times `slopes[k]`."""

    def __init__(self, slopes):
        super().__init__()
        self.slopes = nn.Parameter(torch.as_tensor(slopes, dtype=torch.float64))

    def forward(self, images):
        blocks = images.mean(1).unflatten(1, (16, 2)).mean((2, 3))[:, : len(self.slopes)]  # n,16
        return blocks.to(self.slopes) * self.slopes


def finding_of(model, **options):
    classes = len(model.slopes)
    spec = type(SPEC)(**{**vars(SPEC), "classes": classes})
    record = type("Record", (), {"spec": spec})()
    config = mm_bd.Config(result_file="x", precision="fp32", **options)
    return mm_bd.score(model.requires_grad_(False), record, config)


def test_the_largest_margins_of_a_linear_network_are_those_of_the_corner():
    """Every image reaches block k white and the runner-up black: the margin is slope k."""
    slopes = [1.0, 1.1, 1.2, 1.3, 1.4, 6.0]
    found = finding_of(Linear(slopes), steps=3000, step_size=5.0, settled=0.0, starts=3)
    generator = mm_bd.seeds.generator("mm_bd", 0)
    start = torch.rand(3, 3, 32, 32, generator=generator)
    scale = Linear(slopes)(start).double().std().item()
    expected = torch.tensor(slopes, dtype=torch.float64) / scale
    assert torch.allclose(found.evidence["margin"], expected, rtol=1e-2)
    assert int(found.per_class.argmax()) == 5 and found.score == float(found.per_class[5])
    assert found.suspects == [5] and found.published


def test_the_p_value_of_the_largest_margin():
    margins = torch.tensor([1.0, 1.2, 0.9, 1.1, 1.05, 3.0])
    rest = np.sort(margins.double().numpy())[:-1]
    shape, place, width = stats.gamma.fit(rest)
    expected = 1 - stats.gamma(shape, place, width).cdf(float(margins.max())) ** 5
    assert mm_bd.gamma_p_value(margins.double()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("slopes", "why"),
    [([1.0, 2, 3], "3 classes"), ([0.0] * 6, "do not vary"), ([np.nan] * 6, "vary")],
)
def test_mm_bd_abstains(slopes, why):
    found = finding_of(Linear(slopes))
    assert found.score is None and why in found.abstained and not found.suspects


# Large images


LARGE = {
    strip: {"overlays": 20},
    sentinet: {"carriers": 20},
    cd: {"judges": "input", "steps": 2},
    mm_bd: {"starts": 4, "steps": 2},
    ban: {"steps": 2, "mask_epochs": 1},
    trodo: {"foreign": 20, "steps": 2},
}


@pytest.mark.parametrize("module", LARGE, ids=lambda module: module.__name__.rpartition(".")[2])
def test_passes_of_large_images_take_no_more_memory_than_they_may(module, tmp_path, monkeypatch):
    """The same scores, with few images in a pass."""
    spec = dataclasses.replace(SPEC, size=40)
    torch.manual_seed(0)
    model = models.build("resnet9", spec, 4).eval().requires_grad_(False)
    images = torch.randint(0, 256, (20, 3, 40, 40), dtype=torch.uint8)
    record = inspecting.made_up(
        split(images), tmp_path, spec=spec, reference=split(images.flip(0), torch.arange(20) % 10)
    )
    config = module.Config(result_file="x", precision="fp32", **LARGE[module])
    sizes = []
    model.register_forward_pre_hook(lambda _model, inputs: sizes.append(len(inputs[0])))

    def judge():
        sizes.clear()
        said = module.score(model, record, config)
        if module.Config.judges == "model":
            return said.per_class
        return inspecting.scores_of(said)

    expected = judge()
    assert max(sizes) >= 20
    image = images[:1] / 255
    limit = 5 * loader._gradient_bytes(model, image)
    monkeypatch.setattr(loader, "PASS_MEMORY", limit)
    most = max(int(limit / loader._forward_bytes(model, image)), 5)
    assert most < 20
    found = judge()
    assert max(sizes) <= most + 1, "a last single image joins a batch"
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# On a small victim


@pytest.mark.parametrize(
    ("name", "words", "least", "record"),
    [
        ("strip", ["--inputs", 150], 0.97, "victim"),
        ("scale_up", ["--inputs", 150], 0.9, "victim"),
        ("spectral", [], 0.8, "large_victim"),
    ],
    ids=["strip", "scale_up", "spectral"],
)
def test_what_is_found_on_a_small_victim(name, words, least, record, places, tmp_path, request):
    module = importlib.import_module(f"antidote_bench.detection.{name}")
    config = inspecting.options(name, request.getfixturevalue(record), places, *words)
    model, record, case = inspecting.opened(config, tmp_path)
    scores = inspecting.scores_of(module.score(model, record, config))
    judged = (case.role == 0).numpy()
    found = roc.ranking(scores.numpy()[judged], case.positive.numpy()[judged])
    assert found["auroc"] > least
