"""Further detectors of inputs: slow references, planted cases with a known answer, and what they
find on a small victim."""

import colorsys
import importlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial import distance
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import nn

from antidote_bench import models
from antidote_bench.detection import badexpert, ibd_psc, sentinet, teco, ted
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.detection import corruptions
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.protocol import roc
from tests import inspecting
from tests.test_fmp import SPEC


def smooth(count, size=32, seed=0):
    """Images float32 n,3,S,S of a few smooth colours."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.rand(count, 3, 5, 5, generator=generator)
    return nn.functional.interpolate(grid, (size, size), mode="bicubic").clamp(0.05, 0.95)


def split(images, labels=None):
    images = (255 * images).round().byte()
    labels = torch.full((len(images),), -1) if labels is None else labels
    return Split(images, labels, labels)


def scored(name, places, tmp_path, *words, record="victim"):
    """(scores of the suspects, which are triggered, what the detector said) on a record."""
    module = importlib.import_module(f"antidote_bench.detection.{name}")
    config = inspecting.options(name, record, places, *words)
    model, record, case = inspecting.opened(config, tmp_path)
    said = module.score(model, record, config)
    judged = case.role == 0
    return said.scores[judged].numpy(), case.positive[judged].numpy(), said


# Corruptions


@pytest.mark.parametrize("kind", corruptions.KINDS)
def test_a_corruption_grows_with_its_severity_and_sees_one_image(kind):
    images = smooth(6)
    found = [corruptions.corrupt(kind, images, severity, 0) for severity in range(1, 6)]
    for shown in found:
        assert shown.shape == images.shape and 0 <= shown.min() and shown.max() <= 1
    change = [float((shown - images).abs().mean()) for shown in found]
    assert change[1:] == sorted(change[1:]) and 0.001 < change[0] < change[4]
    alone = corruptions.corrupt(kind, images[4:5], 5, 0)
    torch.testing.assert_close(alone, found[4][4:5], rtol=0, atol=1e-5)
    assert torch.equal(corruptions.corrupt(kind, images, 5, 0), found[4])


def test_shot_noise_counts_like_a_poisson_distribution():
    images = torch.full((1, 3, 48, 48), 0.5)
    found = corruptions.shot_noise(images, 3, 0).flatten() * corruptions.PHOTONS[3]
    counts = np.bincount(found.round().int().numpy(), minlength=10)[:10]
    expected = stats.poisson.pmf(np.arange(10), 2.5) * len(found)
    expected[-1] += len(found) - expected.sum()
    counts[-1] += len(found) - counts.sum()
    assert stats.chisquare(counts, expected).pvalue > 0.001


def test_impulse_noise_replaces_its_share():
    found = corruptions.impulse_noise(torch.full((1, 3, 64, 64), 0.5), 4, 0)
    share = [float((found == value).double().mean()) for value in (0, 1)]
    assert share == pytest.approx([0.135, 0.135], abs=0.015)


def test_brightness_raises_the_value_of_hsv():
    images = smooth(1, size=4)
    images[0, :, 0, 0] = 0
    found = corruptions.brightness(images, 1, 0)
    for row in range(4):
        for column in range(4):
            hue, saturation, value = colorsys.rgb_to_hsv(*images[0, :, row, column].tolist())
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.2, 1))
            assert found[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-5)


# TeCo


class Level(nn.Module):
    """Logits of the brightness and the roughness: ten classes with close borders."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images):
        roughness = images.diff(dim=3).abs().mean((1, 2, 3))
        level = 12 * images.mean((1, 2, 3)) + 20 * roughness
        return -self.scale * (level[:, None] - torch.arange(10.0)).abs()


def test_teco_against_a_loop(tmp_path):
    suspects, model = split(smooth(5)), Level().requires_grad_(False)
    record = inspecting.made_up(suspects, tmp_path, spec=SPEC)
    said = teco.score(model, record, teco.Config(result_file="x", precision="fp32"))
    for place, image in enumerate(suspects.images.float() / 255):
        own, onsets = int(model(image[None]).argmax()), []
        for kind in corruptions.KINDS:
            labels = [
                int(model(corruptions.corrupt(kind, image[None], severity, 0)).argmax())
                for severity in range(1, 6)
            ]
            changed = [severity for severity in range(1, 6) if labels[severity - 1] != own]
            onsets.append(changed[0] if changed else 6)
            assert said.evidence[f"onset.{kind}"][place] == onsets[-1]
        assert said.scores[place] == pytest.approx(np.std(onsets))
    assert len({*said.scores.tolist()}) > 1


# IBD-PSC


class Reversed(nn.Module):
    """Two batch norms, of which the one that runs first is held last."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.second = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.first = nn.BatchNorm2d(3)

    def forward(self, images):
        maps = self.second(self.conv(self.first(images)).relu())
        return self.linear(maps.mean((2, 3)))


def reversed_net():
    torch.manual_seed(3)
    model = Reversed()
    for norm in (model.first, model.second):
        nn.init.uniform_(norm.weight, 0.5, 4)
        nn.init.normal_(norm.bias)
        nn.init.uniform_(norm.running_var, 0.01, 0.1)
    return model.double().eval().requires_grad_(False)


def test_ibd_psc_amplifies_the_last_norms_of_the_data_flow():
    model, images = reversed_net(), smooth(3, size=8).double()
    names = ibd_psc.norms_in_order(model.float(), split(smooth(1, size=8)))
    assert names == ["first", "second"]
    model.double()

    def normalised(maps, norm, factor):
        view = (-1, 1, 1)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        centred = maps - norm.running_mean.view(view)
        return factor * (centred * scale.view(view) + norm.bias.view(view))

    for count, (early, late) in enumerate([(1, 1), (1, 1.5), (1.5, 1.5)]):
        maps = model.conv(normalised(images, model.first, early)).relu()
        expected = model.linear(normalised(maps, model.second, late).mean((2, 3)))
        found = ibd_psc.amplified(model, names, count, 1.5)(images)
        torch.testing.assert_close(found, expected)


def test_ibd_psc_against_a_loop(tmp_path):
    model, suspects = reversed_net().float(), split(smooth(6, size=8))
    labels = model(suspects.images.float() / 255).argmax(1)
    wrong = torch.where(torch.arange(6) < 2, labels, (labels + 1) % 3)
    record = inspecting.made_up(
        suspects, tmp_path, spec=SPEC, reference=split(smooth(6, size=8), wrong)
    )
    config = ibd_psc.Config(result_file="x", precision="fp32")
    said = ibd_psc.score(model, record, config)
    first = len(said.evidence["error"])
    assert said.evidence["amplified"].tolist() == list(range(first, 3)), "the search's own count"
    total = 0
    for count in range(first, 3):
        network = ibd_psc.amplified(model, ["first", "second"], count, 1.5)
        p = network(suspects.images.float() / 255).double().softmax(1)
        total = total + p[torch.arange(6), labels] / (3 - first)
    torch.testing.assert_close(said.scores, total, rtol=1e-5, atol=1e-7)
    assert torch.equal(said.flagged, said.scores > 0.9)


@pytest.mark.parametrize(
    ("errors", "most", "counts"),
    [
        ([0.1, 0.7], 8, [2, 3, 4, 5, 6]),
        ([0.0] * 5 + [0.61], 8, [6, 7, 8]),
        ([0.1] * 8, 8, [4, 5, 6, 7, 8]),  # never
        ([0.1] * 3, 3, [1, 2, 3]),
    ],
)
def test_ibd_psc_counts_from_the_first_large_error(errors, most, counts, capsys):
    assert ibd_psc.chosen_counts(errors, most, ibd_psc.Config(result_file="x")) == counts
    assert ("warning" in capsys.readouterr().err) == (errors[-1] <= 0.6)


def test_ibd_psc_says_that_it_needs_batch_norms():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ConfigError, match="ibd_psc does not apply"):
        ibd_psc.norms_in_order(model, split(smooth(1)))


# BaDExpert


def test_the_score_of_badexpert_at_known_places():
    pairs = [(0.1, 0.9), (0.95, 0.05), (0.5, 0.5), (1.0, 0.0), (0.0, 0.2)]
    expert, finetuned = torch.tensor(pairs, dtype=torch.float64).T
    found = badexpert.combined(expert, finetuned, 2.0)
    assert found[0] == pytest.approx(-18) and found[1] == pytest.approx(-2 / 19)
    assert found[2] == -2 and found[3] == 0
    assert found[4] == pytest.approx(-1 / 0.3)
    assert badexpert.combined(expert, finetuned, 5.0)[1] == pytest.approx(-5 / 19)


def test_the_expert_forgets_the_task_and_keeps_the_backdoor(victim, places, tmp_path):
    words = ["--clean_count", 300, "--expert_epochs", 40, "--expert_lr", 3e-4]
    scores, is_triggered, said = scored("badexpert", places, tmp_path, *words)
    assert said.evidence["accuracy"] <= 0.2
    assert roc.ranking(scores, is_triggered)["auroc"] > 0.9


# TED


def test_counts_of_points_on_a_line():
    layer = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [13.0]])
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    inputs = torch.tensor([[0.4], [2.2], [12.2], [12.2], [5.0]])
    predicted = torch.tensor([0, 0, 0, 1, 3])
    distances = torch.cdist(inputs, layer)
    # 12.2 is 0.8 from 13, 1.2 from 11, 2.2 from 10, of class 1, and 11.2 from 1, of class 0
    assert ted.ranks(distances, predicted, labels).tolist() == [0, 1, 4, 2, 6]
    own = ted.reference_ranks([layer], labels, [None])
    assert own[:, 0].tolist() == [0, 0, 2, 2, 1, 0]


def test_the_width_of_a_class():
    """With m = 3 images, the second smallest distance to a mate; an input beyond is outside."""
    layer = torch.tensor([[0.0], [1.0], [3.0], [20.0]])
    labels = torch.tensor([0, 0, 0, 1])
    widths = ted.class_widths(layer, labels)
    assert widths.tolist() == [3, 2, 3, float("inf")]
    inputs = torch.tensor([[3.5], [6.5], [-3.5], [90.0]])
    distances = torch.cdist(inputs, layer)
    predicted = torch.tensor([0, 0, 0, 1])
    assert ted.ranks(distances, predicted, labels).tolist() == [0, 0, 0, 0]
    assert ted.ranks(distances, predicted, labels, widths).tolist() == [0, 3, 3, 0]


def test_the_distance_of_counts_against_scipy_and_sklearn():
    generator = np.random.default_rng(0)
    known = generator.integers(0, 30, (60, 4)) + generator.integers(0, 40, (60, 1))
    counts = generator.integers(0, 90, (7, 4))
    both = torch.from_numpy(counts), torch.from_numpy(known)
    found = ted.outlier_distance(*both, ted.Config(result_file="x"))
    inverse = np.linalg.inv(np.cov(known, rowvar=False) * 59 / 60)
    for place, row in enumerate(counts):
        expected = distance.mahalanobis(row, known.mean(0), inverse) ** 2 * 59 / 60
        assert found[place] == pytest.approx(expected)
    scaler = StandardScaler().fit(known)
    pca = PCA(2).fit(scaler.transform(known))
    config = ted.Config(result_file="x", components=2, distance="eigenvectors")
    # the sign of an eigenvector is arbitrary
    for signs in np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]):
        flipped = distance.cdist(scaler.transform(counts), signs[:, None] * pca.components_)
        expected = (flipped / pca.explained_variance_ratio_).sum(1)
        if np.allclose(ted.outlier_distance(*both, config), expected):
            return
    pytest.fail("no choice of signs gives the distances")


def test_ted_looks_at_batch_norms_where_relus_are_no_modules():
    for name, kind in {"resnet9": nn.ReLU, "preactresnet18": nn.BatchNorm2d}.items():
        torch.manual_seed(0)
        model = models.build(name, SPEC, 4).eval()
        layers = ted.watched_layers(model)
        assert {type(layer) for layer in layers} == {nn.Conv2d, nn.Linear, kind}
        outputs, predicted = ted.layer_outputs(model, smooth(2))
        assert len(outputs) == len(layers) and outputs[-1].shape == (2, 10)
        assert predicted.shape == (2,) and {len(output) for output in outputs} == {2}


@pytest.mark.parametrize("variant", ["ted", "tedpp"])
def test_ted_finds_the_trigger_of_a_small_victim(variant, victim, places, tmp_path):
    words = ["--clean_count", 300, "--variant", variant, "--components", 2 * (variant == "tedpp")]
    scores, is_triggered, _ = scored("ted", places, tmp_path, *words)
    assert roc.ranking(scores, is_triggered)["auroc"] > 0.9


# SentiNet


def test_grad_cam_against_the_gradient_by_hand():
    torch.manual_seed(0)
    parts = OrderedDict(conv=nn.Conv2d(3, 4, 5, 4, 2), pool=nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(OrderedDict(**parts, flatten=nn.Flatten(), linear=nn.Linear(4, 10)))
    model = model.double().requires_grad_(False)
    images = smooth(3).double()
    found = sentinet.grad_cam(model, images)
    maps, predicted = model.conv(images), model(images).argmax(1)
    for place in range(3):
        weights = model.linear.weight[predicted[place]] / 64  # 8 x 8 places
        cam = sum(weights[channel] * maps[place, channel] for channel in range(4)).clamp(min=0)
        expected = nn.functional.interpolate(cam[None, None], (32, 32), mode="bilinear")[0]
        torch.testing.assert_close(found[place].double(), expected, rtol=1e-4, atol=1e-7)


def test_parts_laid_over_against_a_loop():
    model = Level().requires_grad_(False)
    images, carriers = smooth(4), smooth(5, seed=1)
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(2))
    parts = torch.zeros(4, 1, 32, 32, dtype=torch.bool)
    parts[:2, :, 4:28] = True
    parts[2, :, :, :16] = True  # and the last one has no part
    predicted = model(images).argmax(1)
    found = sentinet.laid_over(model, images, predicted, parts, carriers, noise)
    for place in range(4):
        fooled, confidence = [], []
        for carrier in carriers:
            shown, hidden = carrier.clone(), carrier.clone()
            mask = parts[place].expand(3, -1, -1)
            shown[mask], hidden[mask] = images[place][mask], noise[mask]
            fooled.append(int(model(shown[None]).argmax()) == int(predicted[place]))
            confidence.append(float(model(hidden[None]).double().softmax(1).max()))
        assert found[place].tolist() == pytest.approx([np.mean(fooled), np.mean(confidence)])


def test_the_boundary_runs_through_the_largest_shares():
    """Of two images in every tenth of the confidences, the larger one lies on a parabola."""
    x = torch.linspace(0, 1, 10, dtype=torch.float64)
    top = 0.2 + 0.5 * x - 0.4 * x**2
    curve = sentinet.boundary(torch.cat([x, x]), torch.cat([top, top / 3]))
    places = torch.tensor([-1, 0, 0.35, 1, 2], dtype=torch.float64)
    expected = 0.2 + 0.5 * places.clamp(0, 1) - 0.4 * places.clamp(0, 1) ** 2
    torch.testing.assert_close(curve(places), expected)
    alone = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert sentinet.boundary(alone, alone / 5)(places).tolist() == pytest.approx([0.1] * 5)


def test_sentinet_finds_the_trigger_of_a_small_victim(large_victim, places, tmp_path):
    words = ["--part", 0.5, "--carriers", 6]
    scores, is_triggered, said = scored("sentinet", places, tmp_path, *words, record=large_victim)
    assert roc.ranking(scores, is_triggered)["auroc"] > 0.9
    assert said.evidence["area"].mean() < 0.5


def test_ibd_psc_finds_the_trigger_of_a_small_victim(victim, places, tmp_path):
    scores, is_triggered, _ = scored("ibd_psc", places, tmp_path)
    assert roc.ranking(scores, is_triggered)["auroc"] > 0.9
