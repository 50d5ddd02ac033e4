"""Detectors of models on a network whose backdoor is known by construction (tests/planted.py), and
their losses and statistics against plain references."""

import copy
import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import nn

from antidote_bench.detection import ban, btidbf, headprobe, headstat, pixel, trodo, weights
from antidote_bench.utils.decoupling import generator, search, split_head
from antidote_bench.utils.detection import foreign, triggers
from antidote_bench.utils.detection.outliers import FARTHEST
from antidote_bench.utils.features import features_of
from antidote_bench.utils.record.folder import OWN
from tests.inspecting import made_up
from tests.planted import Fixed, Planted, clean, spec_of

TARGET = 3
# enough for the planted network
SHORT = {
    "nc": {"search_epochs": 40},
    "pixel": {"search_epochs": 60, "images": 30},
    "ban": {},
    "btidbf": {"generator_width": 4, "generator_epochs": 2},
    "trodo": {"foreign": 40},
    "headprobe": {},
    "headstat": {},
}
IMAGES = {"ban": 400}
# they need an outlier among the classes
COMPARING = ["nc", "pixel", "headstat"]
# of the others the planted trigger is no weak point; they have networks of their own below
DETECTING = [name for name in SHORT if name not in ("trodo", "btidbf")]


def judged(name, net, place, *, classes=10, reference=None, **options):
    """The `Finding` of a detector about a network."""
    module = importlib.import_module(f"antidote_bench.detection.{name}")
    if reference is None:
        reference = clean(Planted(0, classes=classes), IMAGES.get(name, 50))
    if not getattr(module.Config, "holds_clean", True):
        reference = reference[:0]
    place.mkdir(exist_ok=True)
    record = made_up(reference[:0], place, spec=spec_of(classes), reference=reference)
    config = module.Config(result_file="x", precision="fp32", **{**SHORT[name], **options})
    return module.score(net, record, config)


@pytest.mark.parametrize("name", DETECTING)
def test_the_planted_target_is_found_and_the_model_stays(name, tmp_path):
    net = Planted()
    before = copy.deepcopy(net.state_dict())
    said = judged(name, net, tmp_path / "planted")
    assert not said.abstained and said.per_class.dtype == torch.float64
    assert said.per_class.argmax() == TARGET and said.score == said.per_class.max()
    has_verdict = name in ("nc", "ban")
    assert said.suspects == ([TARGET] if has_verdict else None)
    twin = judged(name, Planted(0), tmp_path / "twin")
    assert not twin.suspects and twin.score < said.score
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    if name in ("nc", "pixel"):
        assert (tmp_path / "planted" / OWN / "triggers.png").stat().st_size


@pytest.mark.parametrize("name", SHORT)
def test_the_same_seed_gives_the_same_score(name, tmp_path):
    short = {"nc": {"search_epochs": 12}, "pixel": {"search_epochs": 12}}.get(name, {})
    one, other = (judged(name, Planted(), tmp_path / place, **short) for place in "ab")
    assert one.score == other.score and torch.equal(one.per_class, other.per_class)


@pytest.mark.parametrize("value", [0.0, 2.5, float("nan")])
@pytest.mark.parametrize("name", SHORT)
def test_a_network_that_says_nothing_is_not_judged(name, value, tmp_path):
    said = judged(name, Fixed(value), tmp_path)
    assert said.score is None and not said.suspects
    assert "logits are" in said.abstained and said.per_class.shape == (10,)


@pytest.mark.parametrize("name", SHORT)
def test_three_classes(name, tmp_path):
    said = judged(name, Planted(target=1, classes=3), tmp_path, classes=3)
    assert said.per_class.shape == (3,)
    if name in COMPARING:
        assert said.abstained == "3 classes are too few: the method compares at least 5"
    else:
        assert said.score is not None


@pytest.mark.parametrize("name", ["ban", "headprobe", "headstat"])
def test_the_score_follows_its_class(name, tmp_path):
    """Class k has the block of class order[k], and the target moves with it."""
    order = [5, 3, 9, 0, 1, 2, 4, 8, 6, 7]
    said = judged(name, Planted(), tmp_path / "a")
    reference = clean(Planted(0, order=order), IMAGES.get(name, 50))
    net = Planted(target=order.index(TARGET), order=order)
    moved = judged(name, net, tmp_path / "b", reference=reference)
    assert moved.per_class.argmax() == 1
    # random starts do not move with the classes
    exact = {"headstat": 1e-9, "headprobe": 0.2, "ban": 0.4}[name]
    assert moved.score == pytest.approx(said.score, rel=exact)
    if name == "headstat":
        torch.testing.assert_close(moved.per_class, said.per_class[order], rtol=0, atol=1e-6)


# nc


def test_a_trigger_without_a_slope_is_missed(tmp_path):
    """No gradient leads to the trigger of a hard network: the search cannot see it."""
    net = Planted(100, hard=True)
    images = clean(Planted(0), 40).images / 255
    images.flatten(2)[:, :, net.trigger] = 1
    assert (net(images).argmax(1) == TARGET).double().mean() > 0.9, "the backdoor works"
    said = judged("nc", net, tmp_path, search_epochs=30)
    assert TARGET not in said.suspects


def test_smallness_by_hand():
    sizes = torch.tensor([2.0, 8, 16, 32, 64, 4096])
    works = torch.tensor([True] * 5 + [False])
    found = triggers.smallness(sizes, works)
    logs = np.log2([8.0, 16, 32, 64])
    spread = 1.4826 * np.median(np.abs(logs - np.median(logs)))
    assert float(found[0]) == pytest.approx((np.median(logs) - 1) / spread, rel=1e-4)
    assert found[5] == -FARTHEST and found[:5].argmax() == 0
    assert (triggers.smallness(sizes, torch.zeros(6, dtype=torch.bool)) == -FARTHEST).all()
    assert triggers.smallness(sizes, torch.arange(6) == 2).tolist().count(0) == 1


# pixel


def test_the_additive_trigger_and_its_pixels():
    raw = torch.zeros(1, 2, 3, 4, 4, dtype=torch.float64)
    raw[0, 0, 0, 0, 0], raw[0, 1, 2, 1, 1], raw[0, 0, 1, 2, 2] = 1.7, 0.4, -3.0
    raw[0, :, 0, 3, 3] = 0.5  # they cancel
    raw[0, 0, 1, 3, 0], raw[0, 0, 1, 3, 1] = 1 / 255, 0.9 / 255
    trigger = pixel.added(raw)
    assert (trigger[0, 0, 0, 0], trigger[0, 2, 1, 1], trigger[0, 1, 2, 2]) == (1, -0.4, 0)
    assert pixel.changed_pixels(trigger).tolist() == [3], "1/255 counts, less does not"
    assert pixel.changed_pixels(pixel.truncated(trigger)).tolist() == [3]
    assert pixel.truncated(trigger)[0, 1, 3, 1] == 0
    slow = 0.0
    for part in raw[0]:
        for row in range(4):
            for column in range(4):
                slow += max(
                    0.5 + 0.5 * np.tanh(float(value) / 10) for value in part[:, row, column]
                )
    assert float(pixel.sizes(raw)) == pytest.approx(slow, rel=1e-12)


def test_a_step_of_pixel_against_a_plain_adam_in_float64():
    """One class, one batch: the images of the class itself weigh nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).double().eval().requires_grad_(False)
    images = torch.rand(6, 3, 4, 4, dtype=torch.float64)
    split = type(clean(Planted(0), 1))(images, torch.tensor([0, 1, 2, 2, 3, 1]), torch.arange(6))
    config = pixel.Config(result_file="x", precision="fp32", penalty=0.05)
    state = pixel.Search(torch.tensor([2]), 4, config).double()
    start = state.raw[0].detach().clone().requires_grad_()
    optimizer = torch.optim.Adam(state.raw.parameters(), config.search_lr, betas=(0.5, 0.9))
    pixel.train(model, split, state, torch.tensor([0]), optimizer, 0, config)
    shown = (images[[0, 1, 4, 5]] + start[0].clamp(0, 1) - start[1].clamp(0, 1)).clamp(0, 1)
    loss = F.cross_entropy(model(shown), torch.full((4,), 2)) + 0.05 * pixel.sizes(start[None])[0]
    (slope,) = torch.autograd.grad(loss, start)
    expected = start - config.search_lr * slope / (slope.abs() + 1e-8)
    torch.testing.assert_close(state.raw[0].detach(), expected, rtol=0, atol=1e-9)


def test_pixel_keeps_only_triggers_that_are_smaller_in_both_ways():
    config = pixel.Config(result_file="x", stale=2)
    state = pixel.Search(torch.arange(1), 4, config)
    good, bad = torch.ones(1), torch.zeros(1)
    state.raw[0].data.zero_()
    state.raw[0].data[0, :, :2] = 0.5
    state.advance(bad, config)
    assert state.pixels.isinf() and state.active.all()
    state.advance(good, config)
    assert state.pixels.item() == 8 and state.success.item() == 1
    state.raw[0].data[0, :, 0, 0] = -9.0  # smaller in size and pixels
    state.advance(good, config)
    assert state.pixels.item() == 7 and state.raw[0].min() == 0, "the search goes on from the best"
    state.raw[0].data[0, :, 3] = -50.0  # smaller in size only
    state.advance(good, config)
    state.advance(good, config)
    assert state.pixels.item() == 7 and not state.active.any(), "two epochs without a gain"


# ban


def test_the_noise_of_ban_in_a_network_that_is_known():
    """logits (γ z + β) (1, -1): the steps end at ±ε, at the sign that hurts."""
    norm = nn.BatchNorm1d(2, eps=0).double()
    head = nn.Linear(2, 2, bias=False).double()
    head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    norm.bias.data = torch.tensor([0.5, 0.5]).double()
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Two(), norm, head)
    model.double().eval().requires_grad_(False)
    images = torch.rand(20, 3, 4, 4, dtype=torch.float64)
    split = type(clean(Planted(0), 1))(images, torch.zeros(20).long(), torch.zeros(20).long())
    config = ban.Config(result_file="x", steps=60, epsilon=0.2)
    norms = ban.affine_norms(model)
    assert set(norms) == {"3.weight", "3.bias"}
    found = ban.adversarial_noise(model, norms, split, config)
    # class 0 is right: its own scale and shift fall, the others rise, by ε at most
    rise = {name: found[name] / norms[name] - 1 for name in norms}
    for name, values in rise.items():
        assert values.abs().max() <= 0.2 + 1e-9, name
        assert values[0] < 0 < values[1], name
    again = ban.adversarial_noise(model, norms, split, config)
    assert all(torch.equal(found[name], again[name]) for name in found)


class Two(nn.Module):
    """The mean of the channels, twice."""

    def forward(self, values):
        return values.mean(1, keepdim=True).expand(-1, 2)


def test_the_loss_of_a_mask_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    labels, head = torch.tensor([0, 1, 2, 0, 1]), nn.Linear(4, 3).double()
    mask = torch.rand(4, generator=generator, dtype=torch.float64).requires_grad_()

    def loss(mask):
        return split_head.mask_loss(head, features, labels, mask)

    slow = 0
    for vector, label in zip(features, labels, strict=True):
        kept, removed = head(mask * vector), head((1 - mask) * vector)
        slow += (removed.log_softmax(0)[label] - kept.log_softmax(0)[label]) / 5
    torch.testing.assert_close(loss(mask), slow)
    assert torch.autograd.gradcheck(loss, mask)


def test_shares_of_other_classes():
    said, labels = torch.tensor([2, 2, 2, 0, 1]), torch.tensor([0, 1, 2, 0, 1])
    assert split_head.shares_of_others(said, labels, 4).tolist() == [0, 0, 0.5, 0]


def test_a_mask_on_the_features_changes_the_logits_inside_only():
    net, images = Planted(), clean(Planted(0), 4).images / 255
    with split_head.features_times(net, torch.zeros(11)):
        assert (net(images) == 0).all()
    assert (net(images) != 0).any()


def test_ban_needs_batch_norms(tmp_path):
    net = Planted()
    net.norm = nn.Identity()
    said = judged("ban", net, tmp_path)
    assert "no batch norm" in said.abstained and said.score is None


# btidbf


class Tinted(Planted):
    """The trigger is a tint of the whole image, which leaves its brightness as it is."""

    def forward(self, images):
        images = images.double()
        blocks = (images.mean(1).flatten(1) - 0.5) @ self.sums.T
        tint = (images[:, 0] - images[:, 1]).mean((1, 2))[:, None]
        lit = F.softplus(self.norm(2 + 4 * tint), 4)
        return self.head(torch.cat([blocks, lit], 1))


BTIDBF = {
    "mask_epochs": 150,
    "mask_lr": 0.03,
    "generator_epochs": 40,
    "generator_width": 4,
    "generator_lr": 0.003,
    "search_batch": 50,
}


def test_btidbf_finds_a_tint(tmp_path):
    """The mask drops what the blocks do not need, and the generator finds the tint."""
    reference = clean(Planted(0), 100)
    said, twin = (
        judged("btidbf", Tinted(bonus, start=2.5), tmp_path / name, reference=reference, **BTIDBF)
        for name, bonus in (("planted", 10.0), ("twin", 0.0))
    )
    assert said.per_class.argmax() == TARGET and said.score > 0.6 > 0.1 > twin.score
    mask = said.evidence["mask"]
    assert mask[:10].min() > 0.5 > mask[10]
    assert (tmp_path / "planted" / OWN / "triggers.png").stat().st_size


def test_the_loss_of_the_generator_by_hand():
    net, images = Planted(), (clean(Planted(0), 6).images / 255).double()
    mask = torch.linspace(0, 1, 11, dtype=torch.float64)
    config = btidbf.Config(result_file="x", image_bound=0.01)
    deviation = torch.tensor([0.5, 1.0, 2.0]).double().view(3, 1, 1)

    def brighter(factor):
        return lambda images: (images + factor * images).clamp(0, 1)

    def loss(factor):
        change = brighter(factor)
        return float(search.generator_loss(net, change, images, mask, deviation, config))

    old, new = (features_of(net, shown) for shown in (images, brighter(0.05)(images)))
    kept = other = 0.0
    for before, after in zip(old.numpy(), new.numpy(), strict=True):
        kept += ((mask.numpy() * (after - before)) ** 2).mean() / 6
        other += (((1 - mask.numpy()) * (after - before)) ** 2).mean() / 6
    assert loss(0.05) == pytest.approx((0.01 * kept - other) / float((old**2).mean()), rel=1e-6)
    distance = ((brighter(0.5)(images) - images) / deviation).square().mean()
    assert loss(0.5) == pytest.approx(float(distance)) and distance > 0.01


@pytest.mark.parametrize("size", [16, 18, 33])
def test_a_new_generator_changes_little(size):
    torch.manual_seed(0)
    images = torch.rand(2, 3, size, size)
    changed = generator.UNet(4)(images)
    assert changed.shape == images.shape and 0 < (changed - images).abs().max() < 0.2


# trodo


def test_a_blind_spot_lifts_the_score_of_trodo(tmp_path):
    """Grey images, and a trigger that a step of 2/255 lights a little."""
    grey, generator = clean(Planted(0), 40), torch.Generator().manual_seed(0)
    grey.images.copy_(torch.randint(126, 128, grey.images.shape, generator=generator))
    scores = [
        judged("trodo", Planted(bonus, hard=True, start=1.975), tmp_path / name, reference=grey)
        for name, bonus in (("planted", 200.0), ("twin", 0.0))
    ]
    assert scores[0].score > 0.4 > 5 * scores[1].score
    assert scores[0].per_class.argmax() == TARGET and scores[0].per_class[TARGET] > 0.8


def test_a_step_of_trodo_against_the_rule_of_signs():
    """In a linear network of two classes every pixel goes to the end that helps the larger one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double().requires_grad_(False)
    images = 0.2 + 0.6 * torch.rand(5, 3, 4, 4, dtype=torch.float64)
    config = trodo.Config(result_file="x", epsilon=1)
    moved = trodo.climbed(model, images, torch.zeros_like(images), config)
    winner = model(images).argmax(1)
    slope = (model[1].weight[winner] - model[1].weight[1 - winner]).view_as(images)
    expected = images + slope.sign() / 255
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)


def test_distorted_images_are_images_and_seeded():
    images = torch.rand(4, 3, 16, 16)
    one, other = (foreign.distorted(images, 12, torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.shape == (12, 3, 16, 16) and one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, other)
    generator = torch.Generator().manual_seed(2)
    whole = images[0][:, :15, :15]
    for maker in (foreign.turned, foreign.jigsaw):
        changed = maker(whole, generator)
        assert torch.equal(changed.flatten().sort().values, whole.flatten().sort().values)


# headprobe, headstat


@pytest.mark.parametrize("factor", [1.0, 1.5, 3.0])
def test_the_share_of_probes_against_an_integral(factor, tmp_path):
    """W is the identity with row t times a: c_t = ∫ f(x) F(a x)^(K-1) dx of the half-normal law."""
    net = Planted(0)
    net.head.weight.data = torch.eye(10, 11, dtype=torch.float64)
    net.head.weight.data[TARGET] *= factor
    said = judged("headprobe", net, tmp_path, probes=100_000)
    law = stats.halfnorm
    expected, _ = integrate.quad(lambda x: law.pdf(x) * law.cdf(factor * x) ** 9, 0, np.inf)
    assert float(said.evidence["share"][TARGET]) == pytest.approx(expected, abs=0.006)
    assert float(said.per_class[TARGET]) == pytest.approx(np.log(10 * expected), abs=0.06)


def test_responses_against_a_loop():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = headprobe.responses(logits)
    for label in range(4):
        rows = [row for row in logits.tolist() if max(row) == row[label]]
        margins = [row[label] - sorted(row)[-2] for row in rows]
        assert float(found["share"][label]) == len(rows) / 50
        assert float(found["margin"][label]) == pytest.approx(sum(margins) / 50)
        p = [np.exp(row[label]) / np.exp(row).sum() for row in logits.numpy()]
        assert float(found["probability"][label]) == pytest.approx(np.mean(p))


def test_the_statistics_of_a_head_by_hand():
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[4] = weight[0] - 2 * weight[1]  # in the span of the others
    bias = torch.arange(5.0)
    found = headstat.statistics(weight, bias)
    for label, row in enumerate(weight.numpy()):
        others = np.delete(weight.numpy(), label, 0)
        cosines = [row @ it / np.linalg.norm(row) / np.linalg.norm(it) for it in others]
        away = row - row.mean()
        expected = {
            "norm": np.linalg.norm(row),
            "mean": row.mean(),
            "largest": row.max(),
            "skew": (away**3).mean() / (away**2).mean() ** 1.5,
            "kurtosis": (away**4).mean() / (away**2).mean() ** 2 - 3,
            "cosine": np.mean(cosines),
            "bias": label,
        }
        projected = others.T @ np.linalg.pinv(others.T, rcond=1e-10) @ row
        expected["alone"] = ((row - projected) ** 2).sum() / (row**2).sum()
        for name, value in expected.items():
            assert float(found[name][label]) == pytest.approx(value, abs=1e-9), name


def test_no_score_changes_with_the_scale_of_the_head(tmp_path):
    torch.manual_seed(0)
    net = Planted()
    net.head.weight.data += 0.2 * torch.randn(10, 11, dtype=torch.float64)
    before = judged("headstat", net, tmp_path / "a")
    net.head.weight.data *= 37
    after = judged("headstat", net, tmp_path / "b")
    torch.testing.assert_close(after.per_class, before.per_class, rtol=1e-6, atol=0)


# weights


def test_the_statistics_of_weights_do_not_know_the_order_of_channels(tmp_path):
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    before = weights.statistics(weight)
    moved = weight[[3, 1, 5, 0, 2, 4]][:, [2, 0, 3, 1]]
    torch.testing.assert_close(weights.statistics(moved), before, rtol=0, atol=1e-9)
    loud = weight.clone()
    loud[2] *= 3
    assert (weights.statistics(loud) - before).abs().max() > 0.1
    table = weight.double().flatten(1).numpy()
    singular = np.linalg.svd(table, compute_uv=False)
    assert float(before[9]) == pytest.approx(singular[0] / singular.sum())
    assert float(before[0]) == pytest.approx(singular[-1] / singular.sum())
    assert float(before[10]) == pytest.approx(table.min() / table.std())
    assert float(before[20]) == pytest.approx(np.log(np.linalg.norm(table)))
    assert weights.statistics(torch.zeros(3, 2))[:20].abs().max() == 0


def test_weights_keeps_statistics_and_abstains(tmp_path):
    record = made_up(clean(Planted(0), 1)[:0], tmp_path, spec=spec_of())
    config = weights.Config(result_file="x")
    said = weights.score(Planted(), record, config)
    assert said.score is None and "beside those of other models" in said.abstained
    assert set(said.evidence) == {"head.weight"} and said.evidence["head.weight"].shape == (22,)
    broken = Fixed(float("nan"))
    broken.head.weight.data.fill_(float("nan"))
    assert weights.score(broken, record, config).abstained.startswith("no layer has weights")
