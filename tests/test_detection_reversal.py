"""UMD, FeatureRE and the comparison of weights: planted networks with a known answer, plain
references in float64, and what they find on a small victim."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from antidote_bench.detection import featurere, umd, weights
from antidote_bench.utils import checkpoint
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.loader import Passes
from antidote_bench.utils.detection import pairs as pairing
from antidote_bench.utils.detection import references
from antidote_bench.utils.detection.outliers import FARTHEST
from antidote_bench.utils.errors import ConfigError, MissingError
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.record.folder import OWN
from tests.inspecting import made_up, opened, options
from tests.planted import Fixed, Planted, clean, spec_of

TARGET = 3


def judged(module, net, place, *, classes=10, reference=None, **changes):
    """The `Finding` of a detector about a network."""
    reference = clean(Planted(0, classes=classes), 60) if reference is None else reference
    place.mkdir(exist_ok=True)
    record = made_up(reference[:0], place, spec=spec_of(classes), reference=reference)
    return module.score(net, record, module.Config(result_file="x", **changes))


# umd


def marked(classes, count=6):
    """`count` images of each class, dark but for the block of the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat(count)
    pixels = torch.randint(0, 60, (len(labels), 3, 256), generator=generator)
    pixels += 170 * Planted(0, classes=classes).sums[labels].long()[:, None]
    return Split(pixels.byte().unflatten(2, (16, 16)), labels, labels)


class AllToAll(Planted):
    """The trigger leads the images of each class to the next one."""

    def forward(self, images):
        pixels = images.double().mean(1).flatten(1)
        blocks = (pixels - 0.5) @ self.sums.T
        lit = F.softplus(pixels[:, self.trigger].sum(1) + self.norm.bias, 4)
        classes = blocks.shape[1]
        own = self.head(torch.cat([blocks, torch.zeros_like(lit[:, None])], 1))
        following = F.one_hot((own.argmax(1) + 1) % classes, classes)
        return own + self.head.weight[TARGET % classes, classes] * lit[:, None] * following


@pytest.mark.parametrize("trigger", ["patch", "additive"])
def test_the_mapping_of_an_all_to_all_attack_is_found(trigger, tmp_path):
    changes = {"classes": 4, "trigger": trigger, "steps": 50, "reference": marked(4)}
    said = judged(umd, AllToAll(60.0, classes=4, start=1.0), tmp_path / "planted", **changes)
    assert said.evidence["core"].tolist() == [[0, 1], [1, 2], [2, 3], [3, 0]]
    assert said.published and said.suspects == [0, 1, 2, 3]
    assert (said.per_class > umd.limit(8, 0.95)).all()
    assert (tmp_path / "planted" / OWN / "triggers.png").stat().st_size
    twin = judged(umd, AllToAll(0.0, classes=4, start=1.0), tmp_path / "twin", **changes)
    assert twin.score < said.score / 3


def test_the_target_of_an_all_to_one_attack_is_found(tmp_path):
    changes = {"classes": 6, "steps": 50, "reference": marked(6)}
    net = Planted(60.0, classes=6, start=1.0)
    said = judged(umd, net, tmp_path / "a", **changes)
    assert said.suspects == [TARGET] and said.per_class.argmax() == TARGET
    assert set(said.evidence["core"][:, 1].tolist()) == {TARGET}
    assert said.evidence["mask"].shape == (len(said.evidence["core"]), 1, 16, 16)
    again = judged(umd, net, tmp_path / "b", together=7, **changes)
    assert again.score == pytest.approx(said.score, rel=1e-3)


def random_transfer(classes, seed):
    pairs = pairing.ordered(classes, "cpu")
    generator = torch.Generator().manual_seed(seed)
    count = len(pairs.source)
    transfer = torch.rand(count, count, generator=generator, dtype=torch.float64)
    return pairs, transfer.masked_fill(pairs.source[:, None] == pairs.source, 0)


def slow_objective(transfer, core):
    both = (transfer + transfer.T) / 2
    inner = min(np.mean([both[i, j] for j in core if j != i]) for i in core)
    outside = [k for k in range(len(transfer)) if k not in core]
    return inner - max(np.mean([transfer[i, k] for i in core]) for k in outside)


def all_cores(pairs):
    for size in range(2, int(pairs.source.max()) + 2):
        for core in itertools.combinations(range(len(pairs.source)), size):
            if len(pairs.source[list(core)].unique()) == size:
                yield core


@pytest.mark.parametrize("seed", range(5))
def test_the_objective_of_a_group_against_a_loop(seed):
    pairs, transfer = random_transfer(3, seed)
    both = (transfer + transfer.T) / 2
    slow = {core: slow_objective(transfer.numpy(), core) for core in all_cores(pairs)}
    for core, value in slow.items():
        found = pairing.objectives(transfer, both, list(core[:-1]), [core[-1]])
        assert float(found) == pytest.approx(value, abs=1e-12)
    core, value = pairing.best_core(transfer, pairs.source)
    assert value == pytest.approx(slow[tuple(core)]) and value <= max(slow.values()) + 1e-12


def test_the_planted_group_is_the_best_of_all():
    pairs, transfer = random_transfer(4, 0)
    planted = [place for place in range(12) if pairs.target[place] == (pairs.source[place] + 1) % 4]
    apart = pairs.source[:, None] != pairs.source
    transfer = transfer / 4
    transfer[np.ix_(planted, planted)] = 0.9 * apart[planted][:, planted].double()
    core, value = pairing.best_core(transfer, pairs.source)
    assert core == planted
    assert value == pytest.approx(max(slow_objective(transfer, core) for core in all_cores(pairs)))
    alone = pairing.best_core(transfer[:1, :1], pairs.source[:1])
    assert alone == pairing.best_core(transfer[:0, :0], pairs.source[:0]) == ([], float("-inf"))


def test_transfers_against_a_loop():
    """Some rows of images are filled up, and count for nothing."""
    net, split = Planted(classes=4), clean(Planted(0, classes=4), 12)
    shown = pairing.right_images(net, split, 4, 3, "fp32")
    right = net(split.images / 255).argmax(1) == split.labels
    kept = [min(3, int((right & (split.labels == label)).sum())) for label in range(4)]
    assert shown.weight.sum(1).tolist() == kept and min(kept) < 3
    pairs = pairing.ordered(4, "cpu")
    trigger = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = pairing.transfers(net, shown, pairs, trigger)
    for i, j in itertools.product(range(12), range(12)):
        images = shown.images[pairs.source[j]][: kept[pairs.source[j]]]
        said = net((images + trigger[i]).clamp(0, 1)).argmax(1)
        expected = (said == pairs.target[j]).double().mean() if len(said) else 0
        expected = 0 if pairs.source[i] == pairs.source[j] else expected
        assert float(found[i, j]) == pytest.approx(float(expected))


def linear(classes=4, size=16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes))
    model[1].bias.data[1:3] -= 9  # no image is taken for these
    return model.eval().requires_grad_(False)


def test_a_step_of_an_additive_trigger(tmp_path):
    """In a linear network the first step goes along the mean slope of the loss."""
    model = linear()
    images = 0.2 + 0.6 * torch.rand(4, 3, 3, 16, 16)
    weight = torch.ones(4, 3)
    weight[2, 2] = 0
    shown, pairs = pairing.Shown(images, weight), pairing.ordered(4, "cpu")
    config = umd.Config(result_file="x", trigger="additive", steps=1, step_size=0.3, goal=1.0)
    rows = torch.tensor([1, 7])  # 0 to 2, and 2 to 1
    found, size, _ = pairing.search_additive(model, shown, pairs, rows, config, tmp_path)
    for place, (source, target, count) in enumerate([(0, 2, 3), (2, 1, 2)]):
        trigger = torch.zeros(3, 16, 16, requires_grad=True)
        logits = model((images[source][:count] + trigger).clamp(0, 1))
        loss = F.cross_entropy(logits, torch.full((count,), target))
        (slope,) = torch.autograd.grad(loss, trigger)
        torch.testing.assert_close(found[place], -0.3 * slope / slope.norm(), rtol=0, atol=1e-6)
    assert size.isinf().all(), "one step does not reach the goal"


def test_the_gradients_do_not_depend_on_the_passes():
    net, split = Planted(classes=4), clean(Planted(0, classes=4), 40)
    shown, pairs = pairing.right_images(net, split, 4, 5, "fp32"), pairing.ordered(4, "cpu")
    raw = nn.Parameter(torch.rand(12, 4, 16, 16, dtype=torch.float64))
    optimizer, found = torch.optim.SGD([raw]), []
    for size in (3, 256):
        success = pairing.add_gradients(
            net, shown, pairs, torch.arange(12), lambda some: raw[some], Passes(size), optimizer
        )
        found.append((success, raw.grad.clone()))
    torch.testing.assert_close(found[0], found[1])


def test_how_far_a_group_lies_from_the_others():
    size = torch.tensor([1.0, 2.0, 10, 20, 25, 40, torch.inf, 50])
    null = torch.tensor([0, 0, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
    u = 1 / size.numpy().astype(float)
    spread = stats.median_abs_deviation(u[null.numpy()], scale="normal")
    groups = [torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([], dtype=torch.long)]
    found = umd.deviations(size, null, groups)
    assert float(found[0]) == pytest.approx((0.75 - 0.04) / spread)
    assert float(found[1]) == pytest.approx((1 - 0.04) / spread)
    assert found[2] == -FARTHEST
    assert umd.deviations(torch.ones(8), null, groups[:1]).tolist() == [0]
    assert umd.limit(80, 0.95) == pytest.approx(3.22, abs=0.005)


@pytest.mark.parametrize(
    ("net", "classes", "changes", "why"),
    [
        (Planted(classes=3, target=1), 3, {}, "3 classes are too few"),
        (Planted(), 10, {"most_classes": 9}, "10 classes have 90 pairs"),
        (Planted(classes=4), 4, {"steps": 1}, "no two sources have a trigger"),
        (Fixed(float("nan")), 10, {}, "not finite"),
        (Fixed(1.0), 10, {}, "the same for every image"),
    ],
)
def test_umd_abstains(net, classes, changes, why, tmp_path):
    said = judged(umd, net, tmp_path, classes=classes, **changes)
    assert said.score is None and why in said.abstained and said.suspects is None
    assert said.per_class.shape == (classes,)


# featurere


class Tinted(Planted):
    """The trigger is a tint of the whole image, which leaves its brightness as it is."""

    def forward(self, images):
        images = images.double()
        blocks = (images.mean(1).flatten(1) - 0.5) @ self.sums.T
        tint = (images[:, 0] - images[:, 1]).mean((1, 2))[:, None]
        lit = F.softplus(self.norm(2 + 4 * tint), 4)
        return self.head(torch.cat([blocks, lit], 1))


SHORT = {"blocks": 0, "generator_width": 4, "mask_bound": 0.1, "generator_lr": 0.003}
SHORT |= {"warmup_epochs": 15, "search_epochs": 15, "images": 40}


def test_a_tint_is_found_by_its_feature(tmp_path):
    said, twin = (
        judged(featurere, Tinted(bonus, classes=4, start=2.5), tmp_path / name, classes=4, **SHORT)
        for name, bonus in (("planted", 10.0), ("twin", 0.0))
    )
    assert said.per_class.argmax() == TARGET and said.score > twin.score
    assert said.score == -float(said.evidence["value"][TARGET])
    assert said.evidence["mask"].argmax() == 4, "the feature of the tint"
    assert (tmp_path / "planted" / OWN / "triggers.png").stat().st_size


def parts(seed=0):
    """`Parts` of a linear head, and made-up numbers, in float64."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(5, 3).double().requires_grad_(False)
    features = torch.rand(7, 5, generator=generator, dtype=torch.float64)
    pixels = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1)
    deviation = features.std(0, correction=0).mean()
    weight = torch.rand(48, 5, generator=generator, dtype=torch.float64)
    return featurere.Parts(
        lambda images: images.flatten(1) @ weight, head, features, deviation, pixels
    )


def test_the_measures_of_featurere_against_a_loop():
    known, generator = parts(), torch.Generator().manual_seed(1)
    images, changed = torch.rand(2, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    features, partners = known.stem(changed), known.features[[0, 2, 4, 6, 1, 1]]
    mask, wanted = torch.linspace(0.1, 0.9, 5).double(), known.features[:3].mean(0)
    found = featurere.measures_of(known, images, changed, features, partners, mask, wanted, 1)
    m, f, p = mask.numpy(), features.numpy(), partners.numpy()
    mixed = [m * one + (1 - m) * other for one, other in zip(f, p, strict=True)]
    logits = [known.head(torch.from_numpy(row)).numpy() for row in mixed]
    mean = f.mean(0)
    expected = {
        "cosine": mean @ wanted.numpy() / np.linalg.norm(mean) / np.linalg.norm(wanted),
        "success": np.mean([row.argmax() == 1 for row in logits]),
        "change": np.mean(((changed - images) / known.pixels).numpy() ** 2),
        "share": m.mean(),
        "spread": sum(np.std(m[i] * f[:, i]) for i in range(5)) / m.sum() / known.deviation,
        "loss": np.mean([np.log(np.exp(row).sum()) - row[1] for row in logits]),
    }
    for name, value in expected.items():
        assert float(getattr(found, name)) == pytest.approx(float(value)), name


def test_the_value_of_featurere():
    config = featurere.Config(result_file="x")
    numbers = {"cosine": 0.1, "success": 0.95, "change": 0.15, "share": 0.03, "spread": 1.0}
    at_bounds = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    at_bounds["loss"] = torch.tensor(2.0)
    found = featurere.Measures(**at_bounds)
    assert all(float(value) == 0 for value in found.excess(config))
    assert float(found.value(config)) == pytest.approx(0.1 - 0.95)
    worse = found._replace(
        change=torch.tensor(0.45), share=torch.tensor(0.06), success=torch.tensor(0.45)
    )
    assert [float(value) for value in worse.excess(config)] == pytest.approx([2, 1, 0, 0.5])
    assert float(worse.value(config)) == pytest.approx(0.1 - 0.45 + 3)


def test_the_gradient_of_a_batch_in_several_passes():
    known = parts()
    images = torch.rand(7, 3, 4, 4, dtype=torch.float64)
    state = featurere.Inversion(4, (5,), seed=0).double()
    optimizer, found = torch.optim.SGD(state.parameters()), []

    def loss(changed, features):
        return (changed - images).square().mean() + features.std(0).sum()

    for size in (2, 7):
        said = featurere.backward(known, state, images, loss, optimizer, Passes(size))
        found.append((*said, *(it.grad for it in state.generator.parameters())))
    torch.testing.assert_close(found[0], found[1])


def test_the_epoch_of_the_least_value_is_kept():
    config = featurere.Config(result_file="x")
    state = featurere.Inversion(4, (5,), seed=0)
    numbers = dict.fromkeys(featurere.Measures._fields, torch.tensor(0.0))
    for success, raw in ((0.5, 1.0), (0.8, 2.0), (0.6, 3.0)):
        state.raw.data.fill_(raw)
        state.generator.last.bias.data.fill_(raw)
        measured = featurere.Measures(**{**numbers, "success": torch.tensor(success)})
        state.advance(measured, config)
    assert float(state.value) == pytest.approx(-0.8) and float(state.success) == pytest.approx(0.8)
    assert (state.best.last.bias == 2).all() and state.best_mask[0] == torch.tensor(
        2.0
    ).tanh() / 2 + 0.5
    assert float(state.excess[3]) == pytest.approx(1 / 3), "of the last epoch"


def test_featurere_abstains(tmp_path):
    said = judged(featurere, Fixed(float("nan")), tmp_path, blocks=0)
    assert said.score is None and "not finite" in said.abstained
    split = clean(Planted(0), 60)
    some = split[(split.labels != 2).nonzero().flatten()]
    said = judged(featurere, Planted(), tmp_path, reference=some, blocks=0)
    assert said.abstained == "there is no clean image of class 2"
    record = made_up(split[:0], tmp_path, spec=spec_of(), reference=split)
    record = type(record)(**{**vars(record), "model": "vgg19_bn"})
    said = featurere.score(Planted(), record, featurere.Config(result_file="x"))
    assert "no split into stem and head for vgg19_bn" in said.abstained
    assert "--blocks 0" in said.abstained


# on a small victim, of which class 0 is the target


def test_the_triggers_of_a_victim_are_small_and_work_for_each_other(victim, places, tmp_path):
    """A few pairs of the digits: three sources, to the target and to another class."""
    config = options("umd", victim, places, "--steps", 60)
    model, record, _ = opened(config, tmp_path)
    shown = pairing.right_images(model, record.reference, 10, 6, "fp32")
    source, target = torch.tensor([[1, 2, 3, 1, 2, 3], [0, 0, 0, 5, 5, 5]])
    pairs, rows = pairing.Pairs(source, target), torch.arange(6)
    raw, size, _ = pairing.search_patches(model, shown, pairs, rows, config, tmp_path)
    assert 3 * size[:3].max() < size[3:].min()
    core, objective = pairing.best_core(pairing.transfers(model, shown, pairs, raw), source)
    assert core == [0, 1, 2] and objective > 0


def test_the_features_of_a_victim_lead_to_its_target(large_victim, places, tmp_path):
    words = {"warmup_epochs": 20, "search_epochs": 25, "generator_width": 4, "images": 40}
    words |= {"generator_lr": 0.003, "search_batch": 12}
    words = [word for name, value in words.items() for word in (f"--{name}", value)]
    config = options("featurere", large_victim, places, *words)
    model, record, _ = opened(config, tmp_path)
    split = featurere.some_images(record.reference, config)
    known = featurere.parts_of(model, split, record, config)
    found = featurere.invert(known, model, split, 0, record, config)
    assert found.value < -0.3 and found.success > 0.8
    assert found.share < 0.04 and found.change < 0.2


# weights beside references


def test_the_deviation_of_each_model_from_the_others():
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[0] += 4
    rows[:, 4] = 1.0
    rows[2, 4] = 2.0  # the others are equal
    found = weights.deviations(rows)
    for place in range(7):
        others = np.delete(rows.numpy(), place, 0)
        total = 0.0
        for column in range(5):
            spread = stats.median_abs_deviation(others[:, column], scale="normal")
            away = abs(float(rows[place, column]) - np.median(others[:, column]))
            total += min(away / spread, 10) if spread else (10 if away else 0)
        assert float(found[place]) == pytest.approx(total / 5)
    assert found.argmax() == 0


def benign(place, net, poisoned=0):
    """A folder with what the comparison reads of a record."""
    place.mkdir(parents=True)
    (place / layout.RECORD).write_text("{}")
    (place / layout.RESULTS).write_text(f"attack,n_poison\nclean,{poisoned}\n")
    (place / layout.WEIGHTS).write_bytes(checkpoint.to_bytes(net.state_dict()))
    return place


def network(seed, factor=1.0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 10))
    net[3].weight.data[0] *= factor
    return net.requires_grad_(False)


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """Six benign records in tmp_path/zoo, and the folder of a judged one."""
    monkeypatch.setattr(layout, "verify", lambda folder, kind: {})
    for seed in range(6):
        benign(tmp_path / "zoo" / f"benign_{seed}", network(seed))
    return benign(tmp_path / "judged", network(99)).parent


def compare(place, net, reference):
    config = weights.Config(result_file="judged", record_path=str(place), reference=reference)
    record = made_up(clean(Planted(0), 1)[:0], place, spec=spec_of())
    return weights.score(net, record, config)


def test_weights_beside_references(zoo):
    said, odd = (compare(zoo, network(99, factor), "zoo") for factor in (1, 8))
    assert odd.score > 2 > said.score and odd.suspects is None and odd.published is None
    assert float(odd.evidence["p_value"]) == pytest.approx(1 / 7)
    assert odd.evidence["reference_scores"].shape == (6,)
    names = ",".join(str(zoo / "zoo" / f"benign_{seed}") for seed in (3, 1, 0, 2, 5, 4))
    assert compare(zoo, network(99), names).score == pytest.approx(said.score)


def test_references_that_are_none(zoo):
    def refused(reference, error=ConfigError):
        with pytest.raises(error) as caught:
            compare(zoo, network(99), reference)
        return str(caught.value)

    assert "no record 'nowhere'" in refused("nowhere", MissingError)
    assert "at least 5 other records, not 2" in refused("zoo/benign_0, zoo/benign_1, judged")
    (zoo / "empty").mkdir()
    assert "holds none" in refused("empty", MissingError)
    benign(zoo / "zoo" / "other", nn.Linear(3, 3))
    assert "of the same network: " in refused("zoo")
    shutil.rmtree(zoo / "zoo" / "other")
    broken = network(7)
    broken[1].weight.data[0] = float("nan")
    benign(zoo / "zoo" / "broken", broken)
    assert "not finite numbers" in refused("zoo")
    benign(zoo / "zoo" / "badnet", network(8), poisoned=90)
    assert "trained on poisoned images" in refused("zoo")
    config = SimpleNamespace(reference="zoo", record_path=str(zoo), record=Path(zoo / "judged"))
    with pytest.raises(ConfigError, match="poisoned"):
        references.places(config, 5)
