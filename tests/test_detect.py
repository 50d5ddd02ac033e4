"""Defenses that look for poison in the training set.

On planted cases, against plain references in float64, and on one small real record.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from antidote_bench import models
from antidote_bench.defense import ac, spectral
from antidote_bench.utils import config, files, parsing, train
from antidote_bench.utils.config import Defense
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.detection import signatures
from antidote_bench.utils.errors import ConfigError, RefusedError
from antidote_bench.utils.features import last_features
from antidote_bench.utils.repair.options import RetrainingOptions
from tests.test_fmp import SPEC, found_record
from tests.test_scripts import results

BOTH = pytest.mark.parametrize("method", [ac, spectral], ids=["ac", "spectral"])


def planted(share=0.2, label=3, count=3000, wide=16):
    """(features, labels in mixed order, which images are planted).

    There are ten labels; of one, a share of the images lies apart.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count)[torch.randperm(count, generator=generator)] % 10
    features = (
        torch.randn(count, wide, generator=generator, dtype=torch.float64)
        + 10 * torch.eye(10, wide, dtype=torch.float64)[labels]
    )
    members = (labels == label).nonzero().flatten()
    bad = torch.zeros(count, dtype=torch.bool)
    bad[members[: round(share * len(members))]] = True
    features[bad, -1] += 12
    return features, labels, bad


def flagged_by(method, features, labels, monkeypatch, tmp_path, **changes):
    """(what `repair` removes for these features, the tensors that it keeps)."""
    record, _ = found_record(tmp_path, len(labels))
    record = replace(record, train=Split(record.train.images, labels, labels))
    retrained_without = []
    monkeypatch.setattr(method, "last_features", lambda *_: features.float())
    monkeypatch.setattr(
        method, "retrain", lambda record, flagged, config: retrained_without.append(flagged)
    )
    method.repair(None, record, method.Config(result_file="x", **changes))
    (kept,) = (tmp_path / "kept").glob("*.safetensors")
    return retrained_without[0], load_file(kept)


# what both share


@pytest.mark.parametrize("name", ["resnet9", "vgg19_bn", "mobilenet_v3_large"])
def test_last_features_are_what_the_last_linear_layer_gets(name):
    torch.manual_seed(0)
    model = models.build(name, SPEC, 4 if name == "resnet9" else None).train()
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    features = last_features(model, Split(images, torch.arange(7), torch.arange(7)))
    assert model.training and all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    assert not last._forward_pre_hooks
    with torch.no_grad():
        logits = model.eval()(images / 255)
        again = last(features) * (0.125 if name == "resnet9" else 1)
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="no linear layer"):
        last_features(nn.Flatten(), Split(images, torch.arange(7), torch.arange(7)))


def test_retraining_leaves_out_what_is_flagged(tmp_path, monkeypatch):
    record, reported = found_record(tmp_path, 40)
    seen = []

    def loss(model, images, labels, index, label_smoothing):
        seen.append(images)
        return nn.functional.cross_entropy(model(images), labels, label_smoothing=label_smoothing)

    monkeypatch.setattr(train, "cross_entropy", loss)
    monkeypatch.setattr(
        train, "augmentation", lambda spec, *_, **__: lambda images, generator, **_: images
    )
    flagged = torch.arange(40) % 5 == 2
    options = RetrainingOptions(result_file="x", epochs=1, batch_size=8, precision="fp32")
    model = train.retrain(record, flagged, options)
    assert reported == ["retrain"] and list(model.state_dict()) == list(
        models.build("resnet9", SPEC, 8).state_dict()
    )
    pixels = (torch.cat(seen) * 255).round().to(torch.uint8).flatten(1)
    assert len(pixels) == 32 and set(map(tuple, pixels.tolist())) == set(
        map(tuple, record.train.images[~flagged].flatten(1).tolist())
    )
    again, other = (
        train.retrain(
            replace(record, state=tmp_path / str(seed)), flagged, replace(options, random_seed=seed)
        )
        for seed in (0, 1)
    )
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items()
    )
    assert not torch.equal(model.network.linear.weight, other.network.linear.weight)


@BOTH
def test_the_recipe_is_the_victims_unless_options_say_otherwise(method, tmp_path):
    victim = {
        "dataset": "digits",
        "epochs": 7,
        "lr": 0.3,
        "batch_size": 32,
        "schedule": "one_cycle",
        "nesterov": True,
        "pad": 2,
        "label_smoothing": 0.1,
        "pratio": 0.3,
        "precision": "bf16",
        "random_seed": 5,
        "compile": "default",
    }
    files.write_yaml(tmp_path / "config.yaml", victim)
    words = ["--result_file", str(tmp_path)]
    options = parsing.parse(method.Config, words)
    assert all(getattr(options, key) == victim[key] for key in config.RECIPE if key in victim)
    assert (options.precision, options.random_seed, options.compile) == (
        "auto",
        0,
        "none",
    ) and not hasattr(options, "pratio")
    assert parsing.parse(method.Config, [*words, "--epochs", "9"]).epochs == 9
    assert f"python defense/x.py --result_file {tmp_path}" == parsing.command(
        "defense/x.py", options
    )
    files.write_yaml(tmp_path / "config.yaml", {**victim, "epochs": "seven"})
    with pytest.raises(RefusedError, match="wrong type"):
        parsing.parse(method.Config, words)


def test_a_recipe_is_all_that_trains_an_attack():
    ours = set(RetrainingOptions.__dataclass_fields__) - set(Defense.__dataclass_fields__)
    assert ours - {"compile"} == set(config.RECIPE)


@BOTH
def test_planted_images_are_removed_by_their_position(method, monkeypatch, tmp_path):
    features, labels, bad = planted()
    changes = {"classes": "outlying", "epsilon": 2 / 15} if method is spectral else {}
    flagged, kept = flagged_by(method, features, labels, monkeypatch, tmp_path, **changes)
    assert torch.equal(flagged, bad) and torch.equal(kept["removed"], bad.nonzero().flatten())
    if method is spectral:
        everywhere, _ = flagged_by(method, features, labels, monkeypatch, tmp_path, epsilon=0.1)
        assert (
            torch.bincount(labels[everywhere], minlength=10).tolist() == [45] * 10
            and (everywhere & bad).sum() == 45
        )


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_removed_where_nothing_is_planted(method, seed, monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(seed)
    labels, features = torch.arange(3000) % 10, torch.randn(3000, 16, generator=generator)
    changes = {"classes": "outlying"} if method is spectral else {}
    assert not flagged_by(method, features, labels, monkeypatch, tmp_path, **changes)[0].any()


@pytest.mark.parametrize(
    ("method", "changes", "bounds"),
    [
        (ac, {"components": 0}, "1 or more"),
        (ac, {"size": 0.6}, "from 0 to 0.5"),
        (ac, {"silhouette": -1.5}, "from -1 to 1"),
        (spectral, {"epsilon": 0.7}, "from 0 to 0.66"),
        (spectral, {"outlier": 0.9}, "1 or more"),
    ],
    ids=str,
)
def test_options_out_of_range(method, changes, bounds):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))} must be {bounds}"):
        method.Config(result_file="x", **changes)


# Spectral Signatures


@pytest.mark.parametrize("wide", [6, 90], ids=["more images than features", "fewer"])
def test_spectral_scores_are_those_of_the_singular_vector(wide):
    generator = torch.Generator().manual_seed(0)
    labels = (
        torch.randint(0, 22, (500,), generator=generator) ** 2 // 21
    )  # of very unequal size, some without an image
    labels[labels == 20] = 19
    features = torch.rand(500, wide, generator=generator, dtype=torch.float64) * torch.arange(
        1, wide + 1
    )
    scores, tops = signatures.signatures(features, labels, 22)
    assert len(tops) == 22 > signatures.TOGETHER and 0 in labels.bincount(minlength=22)
    for label in range(22):
        mine = features[labels == label].numpy()
        if not len(mine):
            assert tops[label] == 0
            continue
        centred = mine - np.mean(mine, 0)
        _, values, vectors = np.linalg.svd(centred, full_matrices=False)
        np.testing.assert_allclose(
            scores[labels == label], [np.dot(row, vectors[0]) ** 2 for row in centred], atol=1e-8
        )
        assert float(tops[label]) == pytest.approx(values[0] / len(mine) ** 0.5, abs=1e-8)


def test_the_highest_scores_of_every_label_are_flagged():
    generator = torch.Generator().manual_seed(1)
    labels, scores = (
        torch.randint(0, 5, (203,), generator=generator),
        torch.rand(203, generator=generator),
    )
    scores[::3] = 0.5  # ties
    flagged = set(spectral.highest(scores, labels, 6, 0.15).nonzero().flatten().tolist())
    expected = set()
    for label in range(5):
        ranked = sorted(
            (index for index in range(203) if labels[index] == label),
            key=lambda index: (-float(scores[index]), index),
        )
        expected |= set(ranked[: int(0.15 * len(ranked))])
    assert flagged == expected and not spectral.highest(scores, labels, 6, 0.0).any()


# Activation Clustering


@pytest.mark.parametrize("reduction", ["ica", "pca"])
def test_clusters_do_not_depend_on_the_order_of_the_images(reduction):
    features, labels, bad = planted()
    options = ac.Config(result_file="x", reduction=reduction)
    smaller, share, silhouette, _ = ac.clusters(features.numpy(), labels.numpy(), 11, options)
    assert (
        (smaller & (labels == 3).numpy() == bad.numpy()).all()
        and share[3] == 0.2
        and np.nanargmax(silhouette) == 3
    )
    assert np.isnan([share[10], silhouette[10]]).all(), "a label without images"
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(4))
    again = ac.clusters(features[order].numpy(), labels[order].numpy(), 11, options)[:3]
    assert (again[0] & (labels[order] == 3).numpy() == bad[order].numpy()).all()


def two_kinds(count=300):
    """(features of one label, which images are planted): half of the images differ from the other
    half a little and sharply, and a planted quarter differs from the rest much and widely."""
    draws, bad = np.random.default_rng(0), np.arange(count) < count // 4
    features = draws.normal(size=(count, 16)) * 0.5
    features[:, 0] = 4 * (draws.permutation(count) % 2) + 0.1 * draws.normal(size=count)
    features[:, 1] = draws.uniform(-4, 4, count) + 20 * bad
    return features, bad


def test_principal_components_find_a_planted_quarter_that_independent_ones_miss():
    """The table of docs/defenses/ac.md."""
    features, bad = two_kinds()
    rows = {}
    for reduction in ("ica", "pca"):
        options = ac.Config(result_file="x", reduction=reduction)
        smaller, share, *_ = ac.clusters(features, np.zeros(300, int), 1, options)
        rows[reduction] = int(100 * share[0]), int((smaller & bad).sum()), share[0] < options.size
    assert rows == {"ica": (50, 40, False), "pca": (25, 75, True)}


def test_a_cluster_is_poison_by_its_size_or_by_its_distance(monkeypatch, tmp_path):
    features, labels, bad = planted(share=0.4)
    assert not (
        flagged_by(ac, features, labels, monkeypatch, tmp_path, reduction="pca")[0] & bad
    ).any()
    flagged, _ = flagged_by(
        ac,
        features,
        labels,
        monkeypatch,
        tmp_path,
        reduction="pca",
        criterion="silhouette",
        silhouette=0.3,
    )
    assert torch.equal(flagged, bad)


def test_labels_that_cannot_be_clustered_lose_nothing():
    labels = np.repeat([0, 1, 2], [3, 40, 40])
    features = np.random.default_rng(0).normal(size=(83, 5))
    features[labels == 1] = 1.0  # one image, many times
    features[:, 4] = 0  # a feature that is dead
    smaller, share, *_ = ac.clusters(features, labels, 3, ac.Config(result_file="x"))
    assert np.isnan(share[:2]).all() and not smaller[:43].any() and 0 < share[2] <= 0.5


# on a small real record


@pytest.fixture(scope="module")
def few(places, run):
    """The folder of a BadNets record in which 3 % are poisoned: a quarter of the target class."""
    run("attack/badnet.py", *places, "--width", 8, "--pratio", 0.03, "--save_folder_name", "few")
    return Path(places[1]) / "few"


def hits(folder, record):
    """(images removed, poisoned ones among them)."""
    (evidence,) = (
        path for path in folder.glob("*.safetensors") if path.name != "model.safetensors"
    )
    removed = load_file(evidence)["removed"]
    return len(removed), int(
        torch.isin(removed, load_file(record / "poison.safetensors")["train_index"]).sum()
    )


def test_spectral_removes_the_backdoor(few, places, run):
    done = run("defense/spectral.py", *places, "--result_file", "few")
    folder = few / "defense" / "spectral"
    removed, poisoned = hits(folder, few)
    row = results(folder)
    assert removed == 189 and poisoned >= 15 and "removing 189 of 1297 images" in done.stderr
    assert (row["stage"], row["prior"], row["selection"]) == ("in-training", "rate=0.1", "fixed")
    assert float(row["asr"]) < 0.25 < 0.8 < float(row["asr_before"]) and float(row["acc"]) > 0.95


def test_activation_clustering_finds_the_poison(few, places, run):
    run(
        "defense/ac.py",
        *places,
        "--result_file",
        "few",
        "--epochs",
        1,
        "--reduction",
        "pca",
        "--save_folder_name",
        "pca",
    )
    removed, poisoned = hits(few / "defense" / "pca", few)
    assert poisoned >= 35 and removed < 250 and results(few / "defense" / "pca")["prior"] == ""
