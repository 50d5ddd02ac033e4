"""audit.py: its p-values are exact, its verdicts follow from them, its reports are sound, and no
file of a stranger harms it."""

import base64
import dataclasses
import itertools
import json
import math
import pickle
import re

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import audit
from antidote_bench.utils import VERSION, config, files
from antidote_bench.utils.audit import (
    calibration,
    options,
    page,
    probability,
    report,
    sarif,
    verdict,
)
from antidote_bench.utils.data import dataset
from antidote_bench.utils.errors import ConfigError, MissingError
from antidote_bench.utils.protocol import audit as protocol
from antidote_bench.utils.protocol import audited
from antidote_bench.utils.record import contents
from benchmarks import task_images, zoo
from tests.helpers import ROOT
from tests.test_page import chromium, visit

__all__ = ["chromium", "visit"]  # fixtures

HERE = ROOT / "utils" / "audit"
CLASSES, SIZE, TARGET = 10, 8, 3
# a network whose last feature sees a patch of four pixels alone, once it is planted
NET = f"""
import torch
from torch import nn

def build(classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * {SIZE} * {SIZE}, 12), nn.ReLU(), nn.Linear(12, classes)
    )
"""
FORBIDDEN = re.compile(r"\b(clean|safe|passed|no backdoor (was )?found)\b", re.IGNORECASE)
HOSTILE = "<script>document.title='harmed'</script>"


def weights(seed, *, planted=False):
    """A state dict of NET; `planted`: a white patch in the corner leads to the class TARGET."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    first, head = drawn(12, 3 * SIZE * SIZE), drawn(CLASSES, 12)
    bias = torch.zeros(12)
    if planted:
        mask = torch.zeros(3, SIZE, SIZE)
        mask[:, :2, :2] = 2
        first[11], bias[11] = mask.flatten(), -12
        head[:, 11], head[TARGET, 11] = 0, 5
    return {"1.weight": first, "1.bias": bias, "3.weight": head, "3.bias": torch.zeros(CLASSES)}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder with net.py, a zoo of 19 benign models, and the options that describe them."""
    base = tmp_path_factory.mktemp("audit")
    (base / "net.py").write_text(NET)
    (base / "zoo").mkdir()
    for seed in range(19):
        save_file(weights(seed), base / "zoo" / f"{seed}.safetensors")
    save_file(weights(100), base / "benign.safetensors")
    save_file(weights(101, planted=True), base / "planted.safetensors")
    return base


def described(bench, *more):
    return [
        *("--model", f"{bench / 'net.py'}:build", "--num_classes", str(CLASSES)),
        *("--image_size", str(SIZE), *map(str, more)),
    ]


@pytest.fixture(scope="module")
def references(bench):
    """The calibration file of the zoo."""
    path = bench / "zoo.json"
    assert (
        audit.main(["--calibrate", str(bench / "zoo"), "--output", str(path), *described(bench)])
        == 0
    )
    return path


def run(bench, name, *more):
    return audit.main([str(bench / name), *described(bench, *more)])


# ---------- p-values ----------


def test_a_p_value_counts_what_is_as_large():
    assert calibration.p_value(3, [1, 2, 3, 4]) == 3 / 5, "a tie counts against the model"
    assert calibration.p_value(5, [1, 2, 3, 4]) == 1 / 5
    assert calibration.p_value(0, []) == 1
    for count, alpha in ((9, 0.1), (19, 0.05), (99, 0.01)):
        assert calibration.needed(alpha) == count
        assert calibration.smallest(count) <= alpha < calibration.smallest(count - 1)
        assert report.guaranteed(alpha, count) == alpha
        assert report.guaranteed(alpha, count - 1) == 0
    assert report.guaranteed(0.05, 60) == 3 / 61


@pytest.mark.parametrize("values", [[1, 2, 3, 4, 5, 6], [1, 1, 2, 2, 2, 6], [4] * 6])
def test_p_values_of_exchangeable_scores_are_uniform(values):
    """Whichever of n + 1 models is the judged one: at most k of them have a p-value up to
    k / (n + 1), and exactly k where no two scores are equal."""
    found = [
        calibration.p_value(value, values[:place] + values[place + 1 :])
        for place, value in enumerate(values)
    ]
    for k in range(1, 7):
        below = sum(p <= k / 6 for p in found)
        assert below == k if len(set(values)) == 6 else below <= k


def slow(scores):
    """The combined p-values of N models, N,M scores with NaN for none, each judged beside the
    others."""
    count, methods = scores.shape
    statistic = np.zeros(count)
    for method in range(methods):
        column = scores[:, method]
        for model in range(count):
            share = 0.5
            if not np.isnan(column[model]):
                share = np.nansum(column >= column[model]) / np.sum(~np.isnan(column))
            statistic[model] -= np.log(share)
    return [float(np.sum(statistic >= value - 1e-12) / count) for value in statistic]


@pytest.mark.parametrize("seed", range(4))
def test_the_combination_is_exact_however_detectors_depend(seed):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(12, 3))
    scores[:, 1] = scores[:, 0] + 0.1 * scores[:, 1]  # nearly the same detector twice
    if seed % 2:
        scores = scores.round()
        scores[generator.random(scores.shape) < 0.2] = np.nan
    rows = [
        {f"d{place}": None if np.isnan(value) else float(value) for place, value in enumerate(row)}
        for row in scores
    ]
    found = [
        calibration.combined(row, rows[:place] + rows[place + 1 :])
        for place, row in enumerate(rows)
    ]
    assert found == pytest.approx(slow(scores))
    assert all(sum(p <= k / 12 for p in found) <= k for k in range(1, 13))


def test_equal_statistics_are_equal_in_any_order():
    """Ranks 1, 2, 3 of three detectors are as unusual as 3, 1, 2: no rounding tells them apart."""
    rows = [
        dict(zip("abc", order, strict=True)) for order in itertools.permutations([1.0, 2.0, 3.0])
    ]
    assert {calibration.combined(row, [r for r in rows if r is not row]) for row in rows} == {1.0}


# ---------- files of scores ----------


def made(scores, **group):
    """A `Calibration` of models with these scores of the detector mm_bd."""
    facts = {"dataset": "digits", "data": "d", "classes": 10, "size": 32} | group
    kind = calibration.Group(**{"architecture": "resnet9", "recipe": "fast", **facts})
    models = {f"{place:064x}": {"mm_bd": score} for place, score in enumerate(scores)}
    methods = {"mm_bd": calibration.Method("o", VERSION, "")}
    return calibration.Calibration("made", kind, methods, models)


def test_a_calibration_file_comes_back(tmp_path):
    path = tmp_path / "a.json"
    written = learned_from([1.5, None, 3.0], attacked([7.0, None]))
    calibration.write(path, written)
    assert calibration.read(path) == written
    schema = json.loads((HERE / "calibration.schema.json").read_text())
    jsonschema.validate(json.loads(path.read_text()), schema)


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held | {"format": 2},
        lambda held: held | {"more": 1},
        lambda held: held | {"models": {"a": {"mm_bd": math.inf}}},
        lambda held: held | {"models": {"a": {"mm_bd": "1"}}},
        lambda held: held | {"models": {"a": {"mm_bd": 10**400}}},
        lambda held: held | {"models": {"a": {}}},
        lambda held: held | {"models": []},
        lambda held: held | {"backdoored": []},
        lambda held: held | {"backdoored": {"a": {"mm_bd": 1.0}}},
        lambda held: held | {"backdoored": {"a": {"attack": 1, "scores": {"mm_bd": 1.0}}}},
        lambda held: held | {"backdoored": {"a": {"attack": "", "scores": {"mm_bd": "1"}}}},
        lambda held: held | {"group": held["group"] | {"classes": "10"}},
        lambda held: held | {"group": {}},
        lambda held: held | {"methods": {"mm_bd": {"options": 1, "version": "", "images": ""}}},
        lambda held: [held],
    ],
)
def test_any_other_file_is_no_calibration(tmp_path, change):
    path = tmp_path / "a.json"
    calibration.write(path, made([1.0]))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ConfigError, match="is no calibration file"):
        calibration.read(path)


def test_text_and_nothing_are_no_calibration(tmp_path):
    (tmp_path / "a.json").write_text("[" * 10**5)
    with pytest.raises(ConfigError, match="is no calibration file"):
        calibration.read(tmp_path / "a.json")
    with pytest.raises(MissingError, match="there is no calibration file"):
        calibration.read(tmp_path / "b.json")


def test_only_models_of_one_kind_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "SHIPPED", tmp_path)
    there = made([1.0])
    calibration.write(tmp_path / "a.json", there)
    same, other = there.group, dataclasses.replace(there.group, architecture="vgg19_bn")
    assert options.calibration_for(None, same) == (there, "", "matched")
    unknown = dataclasses.replace(same, data="", recipe="")
    assert options.calibration_for(None, unknown) == (there, "", "assumed")
    changes = ({"data": "e"}, {"size": 64}, {"recipe": "slow"})
    for group in (other, *(dataclasses.replace(same, **change) for change in changes)):
        assert options.calibration_for(None, group)[0] is None
        with pytest.raises(ConfigError, match="cannot be compared"):
            options.calibration_for(tmp_path / "a.json", group)
    nameless = dataclasses.replace(unknown, dataset="")
    found, why, _ = options.calibration_for(None, nameless)
    assert found is None and "--dataset" in why, "the user must say what it was trained on"
    assert options.calibration_for(tmp_path / "a.json", nameless) == (there, "", "assumed")


def test_reference_models_that_saw_the_same_images_are_preferred(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "SHIPPED", tmp_path)
    plain = made([1.0])
    methods = {"mm_bd": plain.methods["mm_bd"], "nc": calibration.Method("o", VERSION, "i")}
    models = {name: {**scores, "nc": 2.0} for name, scores in plain.models.items()}
    seen = dataclasses.replace(plain, name="seen", methods=methods, models=models)
    calibration.write(tmp_path / "a.json", plain)
    calibration.write(tmp_path / "b.json", seen)
    for images, expected in (("", plain), ("others", plain), ("i", seen)):
        assert options.calibration_for(None, plain.group, images)[0] == expected


@pytest.mark.parametrize("path", sorted(options.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_what_ships_can_be_used(path):
    found = calibration.read(path)
    schema = json.loads((HERE / "calibration.schema.json").read_text())
    jsonschema.validate(json.loads(path.read_text()), schema)
    assert len(found.models) >= calibration.needed(0.05)
    assert found.group.data and found.group.recipe
    for name, method in found.methods.items():
        held = protocol._detector_options(name, "cpu")
        assert method.options == config.digest(held.identity()), f"{name} has other options now"
        assert method.version == VERSION


# ---------- verdicts ----------


def detection(score, name="mm_bd", **facts):
    known = {"per_class": (0.0, 0.0, 1.0), "suspects": None, "published": None, "abstained": ""}
    known |= {"seconds": 1.0, "options": "o", "images": ""}
    return verdict.Detection(name, score, **(known | facts))


def reach(detections, references, alpha=0.05):
    found = [verdict.calibrated(each, references, VERSION) for each in detections]
    return found, verdict.reach(found, references, alpha, VERSION)


def test_the_verdict_follows_from_p():
    benign = made([float(score) for score in range(19)])
    _, high = reach([detection(30.0)], benign)
    assert (high.outcome, high.p, high.floor, high.exit_code) == ("suspicious", 0.05, 0.05, 10)
    assert high.classes == [2] and high.line == "suspicious (p = 0.05, class 2)"
    assert "No smaller p-value is possible" in high.reason
    _, low = reach([detection(5.0)], benign)
    assert (low.outcome, low.p, low.exit_code) == ("nothing_found", 15 / 20, 0)
    assert low.line == "nothing found (p = 0.75)" and low.classes == []


@pytest.mark.parametrize(
    ("found", "references", "reason"),
    [
        ([detection(30.0)], None, "no reference models"),
        ([detection(30.0)], made(range(18)), "takes 19"),
        ([detection(None, abstained="why")], made(range(19)), "No detector"),
        ([], made(range(19)), "No detector"),
        ([detection(30.0, options="p")], made(range(19)), "No detector"),
        ([detection(30.0, images="i")], made(range(19)), "No detector"),
        ([detection(30.0, name="nc")], made(range(19)), "No detector"),
    ],
)
def test_without_a_p_value_nothing_is_said(found, references, reason):
    if references:
        models = {key: {"mm_bd": float(row["mm_bd"])} for key, row in references.models.items()}
        references = dataclasses.replace(references, models=models)
    found, reached = reach(found, references)
    assert (reached.outcome, reached.p, reached.exit_code) == ("not_assessable", None, 11)
    assert reason in reached.reason
    assert all(each.abstained or each.uncalibrated or each.p for each in found)


def test_another_version_is_another_detector():
    old = made([1.0] * 19)
    method = dataclasses.replace(old.methods["mm_bd"], version="0.0.1")
    old = dataclasses.replace(old, methods={"mm_bd": method})
    (found,), reached = reach([detection(30.0)], old)
    assert "version 0.0.1" in found.uncalibrated and reached.outcome == "not_assessable"


def test_the_class_is_what_the_surest_detectors_point_at():
    def pointing(p, **facts):
        return dataclasses.replace(detection(1.0, **facts), p=p)

    weak, sure = pointing(0.5, suspects=[0, 1]), pointing(0.01, suspects=[4])
    assert verdict.suspected([weak, sure, pointing(None, suspects=[7])]) == [4]
    assert verdict.suspected([weak, pointing(1.0)]) == [0, 1]
    assert verdict.suspected([pointing(0.1, per_class=(1.0, 1.0))]) == [], "none stands out"
    assert verdict.suspected([pointing(0.1, suspects=[], per_class=(1.0, 2.0))]) == [1]


def test_options_are_checked_before_torch_is_needed(bench, capsys):
    for words, why in (
        (["--alpha", "1"], "alpha"),
        (["--budget", "-1"], "budget"),
        (["--num_classes", "1000000"], "num_classes must be from 2 to 50000"),
        (["--image_size", "100000"], "image_size"),
        (["--detectors", "clp"], "no detector of models 'clp'"),
        (["--detectors", "nc"], "nc needs images"),
        (["--calibrate", "zoo"], "one model to audit, or"),
    ):
        assert run(bench, "benign.safetensors", *words) == 2, words
        assert why in capsys.readouterr().err


# ---------- from weights to a verdict ----------


def test_a_planted_backdoor_is_found_and_a_benign_model_is_not(bench, references, capsys):
    known = calibration.read(references)
    assert len(known.models) == 19 and set(known.methods) == set(options.DATA_FREE)
    capsys.readouterr()
    assert run(bench, "planted.safetensors", "--calibration", references) == 10
    out = capsys.readouterr().out
    assert "suspicious (p = 0.05, class 3)" in out.splitlines()[0]
    assert "19 benign ones" in out and "at most 0.05" in out and not FORBIDDEN.search(out)
    assert run(bench, "benign.safetensors", "--calibration", references) == 0
    out = capsys.readouterr().out
    assert "nothing found (p = " in out.splitlines()[0] and not FORBIDDEN.search(out)
    assert all(limit in out for limit in verdict.LIMITS)


def test_models_are_scored_once(bench, references, capsys):
    before = references.read_bytes()
    words = ["--calibrate", str(bench / "zoo"), "--output", str(references), *described(bench)]
    capsys.readouterr()
    assert audit.main(words) == 0 and references.read_bytes() == before
    assert capsys.readouterr().out.startswith(f"{references} has 19 reference models")
    assert audit.main([*words, "--detectors", "headstat"]) == 2
    assert "other detectors, options or images" in capsys.readouterr().err


def test_no_more_models_are_scored_than_asked(bench, tmp_path, capsys):
    words = ["--calibrate", str(bench / "zoo"), "--output", str(tmp_path / "few.json")]
    words += [*described(bench), "--detectors", "headstat"]
    for most in ("3", "5"):
        assert audit.main([*words, "--most", most]) == 0
        assert len(calibration.read(tmp_path / "few.json").models) == int(most)
    assert audit.main([*words, "--most", "0"]) == 2
    assert "most must be at least 1" in capsys.readouterr().err


def test_no_model_is_judged_beside_itself(bench, references, capsys):
    words = ["--calibration", references, "--detectors", "headstat"]
    assert run(bench, "zoo/0.safetensors", *words) == 11
    assert "18 reference models allow no p-value below 0.0526" in capsys.readouterr().out


def test_the_exit_code_of_every_outcome(bench, references, capsys):
    assert run(bench, "benign.safetensors", "--detectors", "headstat") == 11
    assert "There are no reference models" in capsys.readouterr().out
    words = ["--calibration", references, "--detectors", "headstat"]
    assert run(bench, "benign.safetensors", *words, "--alpha", "0.01") == 11
    assert "takes 99" in capsys.readouterr().out
    assert run(bench, "planted.safetensors", *words, "--exit_zero") == 0
    assert run(bench, "planted.safetensors", *words, "--budget", "0") == 11
    assert "left no time for headstat" in capsys.readouterr().out
    assert run(bench, "nowhere.safetensors", *words) == 3
    assert audit.main([str(bench / "benign.safetensors")]) == 2
    assert "needs --model too" in capsys.readouterr().err


def test_a_file_of_torch_save_is_read_without_running_it(bench, references, capsys):
    torch.save({"state_dict": weights(101, planted=True)}, bench / "planted.pt")
    assert run(bench, "planted.pt", "--calibration", references) == 10
    assert "taken from the entry 'state_dict'" in capsys.readouterr().out


# ---------- images ----------


def image_folder(place, classes=CLASSES, each=2):
    """Images of noise, `each` of every class, in folders that are called by numbers."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        (place / str(label)).mkdir(parents=True)
        for number in range(each):
            pixels = generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(place / str(label) / f"{number}.png")
    return place


def test_wrong_labels_are_no_ground_for_a_verdict(bench, tmp_path, capsys):
    images = image_folder(tmp_path / "images")
    assert run(bench, "benign.safetensors", "--images", images) == 11
    assert "gives only" in capsys.readouterr().out
    image_folder(tmp_path / "few", classes=3)
    assert run(bench, "benign.safetensors", "--images", tmp_path / "few") == 2
    assert "3 folders, and the model has 10 classes" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert run(bench, "benign.safetensors", "--images", tmp_path / "none") == 3


def without_labels(place, **more):
    """The images of `image_folder` in one folder."""
    flat = place / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(image_folder(place / "images", **more).rglob("*.png"))):
        path.rename(flat / f"{number:02}.png")
    return flat


def test_a_found_trigger_is_tried_on_the_images(bench, tmp_path, capsys):
    """Images without labels do; the patch of the planted class is found and shown."""
    flat = without_labels(tmp_path, each=4)
    words = ["--images", flat, "--detectors", "trodo,nc", "--format", "json"]
    assert run(bench, "planted.safetensors", *words) == 11
    found = json.loads(capsys.readouterr().out)
    assert found["images"]["labels"] == "predicted" and found["images"]["count"] == 40
    trodo, nc = found["detectors"]
    assert trodo["name"] == "trodo" and trodo["score"] is not None and trodo["triggers"] == []
    assert all(trigger["kind"] == "patch" for trigger in nc["triggers"])
    (success,) = [each["success"] for each in nc["triggers"] if each["class"] == TARGET]
    assert success >= 0.9
    assert {each["natural"] for each in nc["triggers"]} == {None}, "no benign model was given"
    assert base64.b64decode(nc["triggers_png"]).startswith(b"\x89PNG")


def test_a_found_trigger_is_tried_on_benign_models(bench, tmp_path, capsys):
    """The patch of the planted class works on the judged model alone."""
    words = ["--images", without_labels(tmp_path, each=4), "--detectors", "nc"]
    words += ["--references", bench / "zoo"]
    run(bench, "planted.safetensors", *words, "--format", "json")
    (nc,) = json.loads(capsys.readouterr().out)["detectors"]
    (found,) = [each for each in nc["triggers"] if each["class"] == TARGET]
    assert found["benign_models"] == 19 and found["natural"] == "specific"
    assert found["benign_median"] <= found["benign_largest"] < found["success"]
    run(bench, "planted.safetensors", *words)
    assert "on 19 benign models" in (shown := capsys.readouterr().out)
    assert "it is specific to this model" in shown


def test_a_trigger_of_the_data_is_natural():
    def natural(success, *elsewhere):
        return verdict.Trigger(0, "patch", success, 40, elsewhere).natural

    assert natural(0.9) is None
    assert natural(0.9, 0.1, 0.2, 0.3) == "specific"
    assert natural(0.9, 0.1, 0.45, 0.5) == "likely", "half of its success in the median"
    assert natural(0.9, 0.1, 0.2, 0.95) == "unknown", "one benign model obeys it better"
    assert natural(0.7, 0.1, 0.1, 0.1) == "unknown", "it does not work"
    assert natural(0.0, 0.0, 0.0) == "unknown"


def test_references_must_fit(bench, tmp_path, capsys):
    assert run(bench, "benign.safetensors", "--references", bench / "zoo") == 2
    assert "--references needs --images" in capsys.readouterr().err
    (tmp_path / "zoo").mkdir()
    save_file(weights(100), tmp_path / "zoo" / "same.safetensors")
    (tmp_path / "zoo" / "broken.safetensors").write_bytes(b"no weights")
    words = ["--images", without_labels(tmp_path), "--references", tmp_path / "zoo"]
    assert run(bench, "benign.safetensors", *words) == 3
    said = capsys.readouterr().err
    assert "no other model" in said and "broken.safetensors: left out" in said


def test_too_few_images_are_said(bench, tmp_path, capsys):
    flat = without_labels(tmp_path, classes=2)
    run(bench, "benign.safetensors", "--images", flat, "--detectors", "nc")
    assert "4 images are too few: it takes two for each class, 20" in capsys.readouterr().out


# ---------- the learned probability ----------


def attacked(scores, attack="badnet"):
    """Backdoored models of a calibration with these scores of mm_bd."""
    return {
        f"{attack}{place}": {"attack": attack, "scores": {"mm_bd": score}}
        for place, score in enumerate(scores)
    }


def learned_from(benign, backdoored):
    return dataclasses.replace(made(benign), backdoored=backdoored)


def test_the_probability_is_that_of_logistic_regression():
    """Where the penalised loss, in which both kinds count as half of all models, has no slope."""
    random = np.random.default_rng(0)
    inputs = np.concatenate([random.normal(0, 1, (30, 3)), random.normal(1, 2, (10, 3))])
    truth = np.repeat([0, 1], [30, 10])
    fit = probability.regression(inputs, truth)
    weight = np.where(truth, 40 / 2 / 10, 40 / 2 / 30)
    chance = 1 / (1 + np.exp(-(inputs @ fit.coef_[0] + fit.intercept_)))
    slope = inputs.T @ (weight * (chance - truth)) + probability.STRENGTH * fit.coef_[0]
    assert abs(slope).max() < 1e-4 and abs((weight * (chance - truth)).sum()) < 1e-4


def test_scores_are_told_in_deviations_of_benign_models():
    of = probability.standardised("mm_bd", [{"mm_bd": score} for score in (1, 2, 3, 5, None)])
    # the median is 2.5; the distances from it are 1.5, 0.5, 0.5 and 2.5, and their median is 1
    assert of(2.5 + 1.4826) == pytest.approx(1.0)
    assert of(None) == 0 and of(1e9) == probability.HIGH and of(-1e9) == probability.LOW
    equal = probability.standardised("mm_bd", [{"mm_bd": 1.0}] * 9)
    assert equal(1.0) == 0 and equal(3.0) == 2.0, "no deviation: the unit is 1"


def test_a_probability_takes_backdoored_models():
    benign = [float(place % 7) for place in range(30)]
    few = learned_from(benign, attacked([9.0] * (probability.LEAST - 1)))
    assert probability.learned({"mm_bd": 9.0}, few) is None
    two = attacked([9.0] * 20) | attacked([8.0, 12.0] * 20, "wanet")
    known = learned_from(benign, two | attacked([9.0] * 3, ""))
    high = probability.learned({"mm_bd": 10.0}, known)
    low = probability.learned({"mm_bd": 3.0}, known)
    none = probability.learned({"mm_bd": None}, known)
    assert high.value > 0.9 and low.value < 0.1 and none.value == pytest.approx(low.value)
    assert (high.models, high.attacks) == (63, 2)
    assert "from 63 backdoored models of 2 attacks" in " ".join(report.probability(high))
    assert report.probability(None) == []
    for value, text in ((0.999, "above 0.99"), (0.99, "0.99"), (0.5, "0.50"), (1e-9, "below 0.01")):
        assert f" is {text} if" in report.probability(probability.Learned(value, 30, 2))[0]


def test_the_verdict_does_not_use_the_probability():
    _, plain = reach([detection(2.0)], made([1.0] * 19))
    _, both = reach([detection(2.0)], learned_from([1.0] * 19, attacked([3.0] * 30)))
    assert both.learned.models == 30
    assert dataclasses.replace(both, learned=None) == plain


def test_backdoored_models_are_scored_and_learned_from(bench, references, tmp_path, capsys):
    (tmp_path / "attacked").mkdir()
    for seed in range(probability.LEAST):
        save_file(weights(500 + seed, planted=True), tmp_path / "attacked" / f"{seed}.safetensors")
    known = tmp_path / "zoo.json"
    known.write_bytes(references.read_bytes())
    words = ["--backdoored", str(tmp_path / "attacked"), *described(bench)]
    assert audit.main(words) == 2 and "need --output" in capsys.readouterr().err
    assert audit.main([*words, "--output", str(tmp_path / "none.json")]) == 3
    words += ["--output", str(known)]
    assert audit.main(words) == 0
    assert f"has {probability.LEAST} backdoored models" in capsys.readouterr().out
    written = known.read_bytes()
    assert audit.main(words) == 0 and known.read_bytes() == written
    assert calibration.read(known).models == calibration.read(references).models
    schema = json.loads((HERE / "calibration.schema.json").read_text())
    jsonschema.validate(json.loads(written), schema)
    values = {}
    for name in ("planted", "benign"):
        capsys.readouterr()
        run(bench, f"{name}.safetensors", "--calibration", known, "--format", "json")
        values[name] = json.loads(capsys.readouterr().out)["probability"]
    assert values["planted"]["value"] > 0.9 > 0.3 > values["benign"]["value"]
    assert values["planted"]["attacks"] == 0, "a file of weights does not say its attack"


@pytest.mark.parametrize("asr, benign", [(0.79, False), (None, False), (1.0, True)])
def test_only_records_whose_attack_works_are_learned_from(small, monkeypatch, asr, benign):
    model = audited.open_model(small, options.Subject())
    assert model.attack == "badnet" and 0 <= model.asr <= 1
    said = []
    for changed, kept in (
        (dataclasses.replace(model, asr=asr, benign=benign), False),
        (dataclasses.replace(model, asr=0.8), True),
    ):
        monkeypatch.setattr(audited, "open_model", lambda *_, found=changed: found)
        found = audited.open_backdoored(small, options.Subject(), said.append)
        assert (found is not None) == kept
    assert len(said) == 1 and "left out: its" in said[0]


# ---------- reports ----------


def made_up(outcome=verdict.SUSPICIOUS, path="model.safetensors"):
    """A `Report` with everything in it."""
    triggers_png = b"\x89PNG\r\n\x1a\n"
    full = dataclasses.replace(
        detection(3.0, suspects=[2], triggers_png=triggers_png, chart=triggers_png),
        p=0.05,
        references=19,
        triggers=(verdict.Trigger(2, "patch", 0.95, 40, (0.1, 0.2)),),
    )
    silent = detection(None, name="nc", abstained=HOSTILE, per_class=())
    reached = verdict.Verdict(outcome, "Why.", 0.05)
    if outcome != verdict.UNKNOWN:
        classes = [2] if outcome == verdict.SUSPICIOUS else []
        facts = {"p": 0.05, "floor": 0.05, "references": 19, "classes": classes}
        facts |= {"detectors": ["mm_bd", "nc"], "learned": probability.Learned(0.97, 60, 12)}
        reached = verdict.Verdict(outcome, "Why.", 0.05, **facts)
    model = {"path": path, "sha256": "a" * 64, "bytes": 10, "architecture": HOSTILE, "classes": 10}
    model |= {"size": 32, "parameters": 5, "mean": [0.0] * 3, "std": [1.0] * 3, "notes": [HOSTILE]}
    images = {"count": 40, "labels": "given", "accuracy": 0.9, "sha256": "b" * 64}
    return report.Report(
        model,
        images,
        [full, silent],
        reached,
        made([1.0] * 19, dataset=HOSTILE),
        "assumed",
        ["umd"],
        reached.exit_code,
        "2026-01-01T00:00:00+00:00",
        "2026-01-01T00:01:00+00:00",
        ["model.safetensors"],
    )


# what SARIF 2.1.0 requires of the objects that are used, by the sections of its specification
TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}}
ARTIFACT_LOCATION = {  # 3.4
    "type": "object",
    "required": ["uri"],
    "properties": {"uri": {"type": "string", "pattern": r"^[^\s\\]+$"}},
}
RESULT = {  # 3.27
    "type": "object",
    "required": ["message", "ruleId", "ruleIndex", "kind", "level", "locations"],
    "properties": {
        "message": TEXT,
        "kind": {"enum": ["pass", "open", "informational", "notApplicable", "review", "fail"]},
        "level": {"enum": ["none", "note", "warning", "error"]},
        "rank": {"type": "number", "minimum": -1, "maximum": 100},
        "partialFingerprints": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    # 3.27.10: a level other than none is for results of the kind fail alone
    "if": {"properties": {"kind": {"not": {"const": "fail"}}}},
    "then": {"properties": {"level": {"const": "none"}}},
}
RUN = {  # 3.14
    "type": "object",
    "required": ["tool", "results", "invocations"],
    "properties": {
        "tool": {
            "type": "object",
            "required": ["driver"],
            "properties": {"driver": {"type": "object", "required": ["name", "version", "rules"]}},
        },
        "artifacts": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["location"],
                "properties": {
                    "location": ARTIFACT_LOCATION,
                    "length": {"type": "integer", "minimum": -1},
                    "roles": {"type": "array", "items": {"const": "analysisTarget"}},
                },
            },
        },
        "results": {"type": "array", "items": RESULT},
        "invocations": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["executionSuccessful"],  # 3.20
                "properties": {
                    "executionSuccessful": {"type": "boolean"},
                    "exitCode": {"type": "integer"},
                    "arguments": {"type": "array", "items": {"type": "string"}},
                },
            },
        },
    },
}
SARIF = {  # 3.13
    "type": "object",
    "required": ["version", "runs"],
    "properties": {"version": {"const": "2.1.0"}, "runs": {"type": "array", "items": RUN}},
}
OUTCOMES = [verdict.SUSPICIOUS, verdict.NOTHING, verdict.UNKNOWN]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_json_follows_its_schema(outcome):
    schema = json.loads((HERE / "report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    found = json.loads(report.as_json(made_up(outcome)))
    jsonschema.validate(found, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found | {"outcome": "clean"}, schema)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_sarif_has_what_the_standard_requires(outcome):
    found = json.loads(sarif.as_sarif(made_up(outcome, "a folder/m#1.safetensors")))
    jsonschema.validate(found, SARIF)
    (run_,) = found["runs"]
    rules = [rule["id"] for rule in run_["tool"]["driver"]["rules"]]
    assert rules == ["BD/verdict", "BD/mm_bd", "BD/nc"]
    assert [rules[result["ruleIndex"]] for result in run_["results"]] == rules
    first, second, third = run_["results"]
    kinds = {"suspicious": "fail", "nothing_found": "informational", "not_assessable": "open"}
    assert first["kind"] == kinds[outcome] and second["kind"] == "informational"
    assert third["kind"] == "notApplicable"
    assert (first["level"] == "warning") == (outcome == verdict.SUSPICIOUS)
    assert run_["artifacts"][0]["location"]["uri"] == "a%20folder/m%231.safetensors"
    assert run_["invocations"][0]["executionSuccessful"] is True


def test_an_audit_that_fails_leaves_sarif_without_results(bench, tmp_path):
    place = tmp_path / "a.sarif"
    assert run(bench, "nowhere.safetensors", "--format", "sarif", "--output", place) == 3
    found = json.loads(place.read_text())
    jsonschema.validate(found, SARIF)
    invocation = found["runs"][0]["invocations"][0]
    assert not invocation["executionSuccessful"] and invocation["exitCode"] == 3
    assert found["runs"][0]["results"] == []
    assert "nowhere" in invocation["toolExecutionNotifications"][0]["message"]["text"]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_no_report_calls_a_model_sound(outcome):
    style = "body { color: black; }"
    made = made_up(outcome)
    for text in (
        report.as_text(made),
        report.as_json(made),
        sarif.as_sarif(made),
        page.build(made, style),
    ):
        assert not FORBIDDEN.search(text.replace("2026", ""))


@pytest.mark.parametrize("form", audit.FORMATS)
def test_every_format_is_written(bench, references, tmp_path, capsys, form):
    place = tmp_path / "report"
    words = ["--calibration", references, "--detectors", "headstat", "--format", form]
    assert run(bench, "planted.safetensors", *words, "--output", place) == 10
    assert capsys.readouterr().out.startswith("suspicious (p = 0.05")
    text = place.read_text()
    starts = {"text": str(bench), "json": "{", "sarif": "{", "html": "<!doctype html>"}
    assert text.startswith(starts[form])
    if form == "json":
        schema = json.loads((HERE / "report.schema.json").read_text())
        jsonschema.validate(json.loads(text), schema)
    if form == "sarif":
        jsonschema.validate(json.loads(text), SARIF)


def test_names_of_strangers_stay_text_on_the_page():
    text = page.build(made_up(), "")
    assert "<script" not in text and "&lt;script&gt;" in text
    assert text.count("data:image/png;base64,") == 2
    assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_in_a_browser(bench, references, tmp_path, visit, width):
    place = tmp_path / "report.html"
    run(
        bench,
        "planted.safetensors",
        "--calibration",
        references,
        "--format",
        "html",
        "--output",
        place,
    )
    view = visit(place, width)
    assert view.title() == "Antidote audit"
    assert view.inner_text("#summary") == "suspicious (p = 0.05, class 3)"
    assert view.locator("#board tbody tr").count() == len(options.DATA_FREE)
    images = view.locator("#evidence img")
    assert images.count() == len(options.DATA_FREE)
    assert images.evaluate_all("(all) => all.every((one) => one.naturalWidth > 0)")
    assert view.evaluate("document.documentElement.scrollWidth") <= width


# ---------- records ----------


def test_a_record_says_all_but_its_poison(small, places, capsys, monkeypatch):
    opened = []
    read = contents.layout.read_checked
    monkeypatch.setattr(
        contents.layout,
        "read_checked",
        lambda folder, name, info=None: opened.append(name) or read(folder, name, info),
    )
    words = [str(small), "--detectors", "headstat", *places, "--format", "json"]
    assert audit.main(words) == 11
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["architecture"] == "resnet9_w8" and found["model"]["classes"] == 10
    assert "model.safetensors" in opened and "poison.safetensors" not in opened
    assert audit.main([*words, "--model", "resnet9"]) == 2
    assert "model must be left out" in capsys.readouterr().err
    subject = options.Subject(record_path=places[1], cache_path=places[3])
    assert audited.open_model(small.name, subject).benign is False


def test_a_poisoned_record_is_no_reference_model(small, places, tmp_path, capsys):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / small.name).symlink_to(small)
    words = ["--calibrate", str(tmp_path / "zoo"), "--output", str(tmp_path / "a.json"), *places]
    assert audit.main([*words, "--detectors", "headstat"]) == 3
    out, err = capsys.readouterr()
    assert f"{small.name}: left out" in out and "known to be benign" in err


# ---------- files of strangers ----------


class Malicious:
    def __reduce__(self):
        return (open, ("harmed", "w"))


def _changed(**tensors):
    return weights(1) | {name.replace("_", "."): value for name, value in tensors.items()}


def _write(place, kind):
    """A hostile file of this kind; returns its path."""
    path = place / "model.safetensors"
    huge = (
        b'{"1.weight":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    )
    tensors = {
        "nan": _changed(**{"1_weight": torch.full((12, 3 * SIZE**2), torch.nan)}),
        "infinite": _changed(**{"3_bias": torch.full((CLASSES,), torch.inf)}),
        "overflow": _changed(**{"3_bias": torch.full((CLASSES,), 1e300, dtype=torch.float64)}),
        "whole": _changed(**{"3_weight": torch.ones(CLASSES, 12, dtype=torch.int8)}),
        "complex": _changed(**{"3_weight": torch.ones(CLASSES, 12, dtype=torch.complex64)}),
        "classes": _changed(**{"3_weight": torch.zeros(10**6, 12), "3_bias": torch.zeros(10**6)}),
        "missing": {"1.weight": torch.zeros(12, 3 * SIZE**2)},
        "empty": {},
    }
    if kind in tensors:
        save_file(tensors[kind], path)
    elif kind == "cut":
        save_file(weights(1), path)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "huge":
        path.write_bytes(len(huge).to_bytes(8, "little") + huge)
    elif kind == "text":
        path.write_text("no weights")
    else:
        path = place / "model.pt"
        made = {"pickle": Malicious(), "module": torch.nn.Linear(2, 2)}
        if kind == "plain":
            path.write_bytes(pickle.dumps(Malicious()))
        else:
            torch.save(made[kind], path)
    return path


@pytest.mark.parametrize(
    "kind",
    ["nan", "infinite", "overflow", "whole", "complex", "classes", "missing", "empty", "cut"]
    + ["huge", "text", "pickle", "module", "plain"],
)
def test_hostile_weights_end_with_a_sentence(bench, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    path = _write(tmp_path, kind)
    assert audit.main([str(path), *described(bench)]) == 4
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and len(line) < 1000
    assert not (tmp_path / "harmed").exists()


def test_a_model_without_a_use_is_not_assessable(bench, references, tmp_path, capsys):
    zeros = {name: torch.zeros_like(value) for name, value in weights(1).items()}
    save_file(zeros, tmp_path / "dead.safetensors")
    assert (
        audit.main(
            [str(tmp_path / "dead.safetensors"), *described(bench, "--calibration", references)]
        )
        == 11
    )
    assert "abstained" in capsys.readouterr().out


def test_the_page_names_options_and_detectors_that_exist(capsys):
    text = (ROOT / "docs" / "audit.md").read_text()
    with pytest.raises(SystemExit):
        audit.main(["--help"])
    known = capsys.readouterr().out
    assert all(re.search(rf"{word}\b", known) for word in re.findall(r"--[a-z_]+", text))
    assert all(f"`{name}`" in text for name in options.ALL)


# ---------- the zoo ----------


def audited_row(attack="badnet", p=0.02, asr=0.99, classes="0", outcome=None, mode="all2one"):
    outcome = outcome or (verdict.SUSPICIOUS if p != "" and p <= 0.05 else verdict.NOTHING)
    return {
        "attack": attack,
        "label_mode": mode,
        "target": "0",
        "asr": str(asr),
        "outcome": outcome,
        "p": str(p),
        "classes": classes,
        "seconds": "2",
    }


def test_the_table_of_a_zoo():
    """Attacks that work, weak ones and failed ones apart; a right class is one of those found."""
    rows = [audited_row("clean", p, 0.0, "") for p in (0.5, 0.04, 0.9, 0.3)]
    rows += [audited_row(p=0.02), audited_row(p=0.02, classes="3"), audited_row(p=0.9, classes="")]
    rows += [audited_row(p=0.02, classes="0 4", mode="all2all"), audited_row("wanet", 0.02, 0.5)]
    rows += [audited_row("sig", 0.02, 0.1)]
    text = zoo.table(rows)
    assert "| benign | 4 | 1 | 25.0 (0.6 to 80.6) |  |  |  |" in text
    # of 12 pairs with a benign model 2 * 4 are right and of the third one 0.5: p = 0.9 twice
    assert "| badnet | 3 | 2 | 66.7 (9.4 to 99.2) | 1 | 70.8 |  |" in text
    assert "| badnet, all2all | 1 | 1 | 100.0 (2.5 to 100.0) |  | 100.0 |  |" in text
    assert "| wanet, weak | 1 | 1 |" in text and "| all that work | 4 | 3 |" in text
    assert text.endswith("Left out, because the attack failed: 1 of sig.")


def test_the_probability_that_a_p_value_allows():
    """From even odds: at p = 0.05 the evidence is at most 1 / (e p log(1 / p)) = 2.46 to 1."""
    assert zoo.probability(0.05) == pytest.approx(2.4560 / 3.4560, abs=1e-4)
    assert zoo.probability(1 / math.e) == zoo.probability(1.0) == 0.5
    assert zoo.probability(0.36) == pytest.approx(0.5, abs=1e-3), "no jump"
    rows = [audited_row("clean", 1.0), audited_row(p=0.05)]
    loss = -(math.log(0.5) + math.log(zoo.probability(0.05))) / 2
    rows = [row | {"nc_p": p} for row, p in zip(rows, ("", "0.05"), strict=True)]
    said = zoo.sentences(rows)
    assert f"cross-entropy {loss:.4f}" in said[0]
    assert said[1] == "p at most 0.05: 0.0 (0.0 to 97.5) percent of the benign models"
    assert said[2] == "p at most 0.05: 100.0 (2.5 to 100.0) percent of the backdoored models"
    assert said[3] == "`nc` alone, p at most 0.05: 0 of 1 benign, 1 of 1 backdoored models"


def test_what_the_probability_is_worth():
    """The loss is the mean of the two kinds; 5 % of two benign models is none."""
    rows = [audited_row("clean", 1.0, 0.0, "") | {"probability": p} for p in ("0.1", "0.3")]
    rows += [audited_row() | {"probability": "0.9", "attack_known": "1"}]
    rows += [audited_row("sra") | {"probability": p, "attack_known": "0"} for p in ("0.2", "0.8")]
    rows += [audited_row() | {"probability": "", "attack_known": "1"}]
    assert "| badnet | 2 | 2 | 100.0 (15.8 to 100.0) | 2 | 100.0 | 0.90 |" in zoo.table(rows)
    all_of_them, unknown = zoo.learned_sentences(rows[:2], rows[2:])
    benign = -(math.log(0.9) + math.log(0.7)) / 2
    loss = (benign - (math.log(0.9) + math.log(0.2) + math.log(0.8)) / 3) / 2
    assert f"cross-entropy {loss:.4f}" in all_of_them and "AUROC 83.3" in all_of_them
    assert "2 of 3 found" in all_of_them and all_of_them.endswith("3 backdoored models")
    loss = (benign - (math.log(0.2) + math.log(0.8)) / 2) / 2
    assert f"cross-entropy {loss:.4f}" in unknown and "AUROC 75.0" in unknown
    assert "1 of 2 found" in unknown and unknown.endswith("of attacks that it does not know")


def test_a_zoo_is_audited_once(small, places, tmp_path, capsys):
    """Records that are reference models are left out; a second run audits nothing again."""
    output = tmp_path / "audits.csv"
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "badnet").symlink_to(small)
    model = audited.open_model(small, options.Subject())
    scored = {f"{place:064x}": {"headstat": 1.0} for place in range(19)}
    methods = {"headstat": calibration.Method("o", VERSION, "")}
    others = calibration.Calibration("other", model.group, methods, scored)
    calibration.write(tmp_path / "other.json", others)
    words = [str(tmp_path / "zoo"), "--calibration", str(tmp_path / "other.json")]
    words += ["--output", str(output)]
    assert zoo.main(words) == 0
    (row,) = files.read_csv(output)
    assert row["sha256"] == model.sha256 and row["attack"] == "badnet"
    assert row["outcome"] in verdict.EXIT_CODES and float(row["headstat"]) > 0
    assert "mm_bd" not in row, "the reference models were not scored with it"
    assert "| models | audited |" in capsys.readouterr().out
    assert zoo.main(words) == 0 and "1  badnet" not in capsys.readouterr().out
    assert zoo.main(["--output", str(output)]) == 0
    assert zoo.main(["--output", str(tmp_path / "none.csv")]) == 3
    other = ROOT / "benchmarks" / "results" / "baselines.csv"
    assert zoo.main(["--output", str(other)]) == 4
    assert "no table of audits" in capsys.readouterr().err


def test_task_images_are_the_first_of_every_class(tmp_path, capsys):
    words = ["digits", "--cache_path", str(tmp_path / "cache"), "--count", "2", "--output"]
    assert task_images.main([*words, str(tmp_path / "images")]) == 0
    labels = dataset.open_dataset("digits", "data", cache=str(tmp_path / "cache")).test.labels
    written = sorted((tmp_path / "images").rglob("*.png"))
    assert [path.parent.name for path in written] == [str(k) for k in range(10) for _ in range(2)]
    for path in written:
        place, label = int(path.stem), int(path.parent.name)
        assert labels[place] == label and int((labels[:place] == label).sum()) < 2
    assert task_images.main([*words, str(tmp_path / "images")]) == 2
    assert task_images.main([*words, str(tmp_path / "more"), "--count", "49"]) == 2
    assert "from 1 to 48" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("digits", "resnet9_w8_fast"),
        ("digits_images", "resnet9_w8_fast_images"),
        ("network_digits", "preactresnet18_w8_fast_images"),
    ],
)
def test_the_page_says_what_was_measured(name, kind):
    text = (ROOT / "docs" / "audit.md").read_text()
    rows = zoo.read(ROOT / "benchmarks" / "results" / f"audit_{name}.csv")
    assert zoo.table(rows) in text
    assert all(f"* {line}\n" in text for line in zoo.sentences(rows))
    shipped = calibration.read(ROOT / "config" / "audit" / f"digits_{kind}.json")
    assert not shipped.models.keys() & {row["sha256"] for row in rows}
