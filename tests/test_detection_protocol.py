"""The evaluator's part of a detection: what a detector is shown, the threshold, and the measures;
and what a defense and compare.py make of it."""

import csv
import dataclasses
import importlib
import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from antidote_bench import models
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.detection import charts, outliers, passes
from antidote_bench.utils.detection.inspector import Finding, Scored
from antidote_bench.utils.errors import ConfigError, UserError
from antidote_bench.utils.protocol import detect, roc
from antidote_bench.utils.record import contents
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.report import detections, runs
from compare import main as compare
from tests import inspecting
from tests.helpers import ROOT, names
from tests.test_fmp import SPEC

OVERVIEW = (ROOT / "docs" / "detection.md").read_text()

# The threshold and the measures


@pytest.mark.parametrize("count", [19, 20, 100, 125])
def test_a_further_clean_image_is_flagged_as_often_as_was_asked_for(count):
    """Exactly: the rank of a further score among n + 1 exchangeable ones is uniform."""
    scores = np.arange(count + 1.0)
    flagged = [
        scores[place] > roc.threshold(np.delete(scores, place), 0.05) for place in range(count + 1)
    ]
    share = np.mean(flagged)
    assert share <= 0.05 and share > 0.05 - 1 / (count + 1)


def test_the_threshold_of_equal_scores_flags_none_of_them():
    assert roc.threshold(np.ones(30), 0.05) == 1.0


def test_too_few_clean_images_for_a_threshold():
    with pytest.raises(ConfigError, match="it takes 19 that"):
        roc.threshold(np.arange(18.0), 0.05)
    assert [roc.least_calibration(rate) for rate in (0.01, 0.05, 0.1)] == [99, 19, 9]


@pytest.mark.parametrize("seed", range(3))
def test_measures_against_counting_pairs_and_thresholds(seed):
    generator = np.random.default_rng(seed)
    positive = generator.random(80) < 0.3
    scores = np.round(generator.normal(size=80) + positive, 1)  # with ties
    pairs = [
        (high > low) + (high == low) / 2 for high in scores[positive] for low in scores[~positive]
    ]
    found = roc.ranking(scores, positive)
    assert found["auroc"] == pytest.approx(np.mean(pairs))
    for name, rate in {"tpr_at_1": 0.01, "tpr_at_5": 0.05, "tpr_at_10": 0.1}.items():
        limits = [np.inf, *scores]
        reached = [
            (scores[positive] >= it).mean()
            for it in limits
            if (scores[~positive] >= it).mean() <= rate
        ]
        assert found[name] == max(reached)


def test_rates_of_a_decision():
    flagged = np.array([1, 1, 1, 0, 0, 0], bool)
    positive = np.array([1, 1, 0, 1, 0, 0], bool)
    two_thirds = pytest.approx(2 / 3)
    assert roc.rates(flagged, positive) == {
        "fpr": pytest.approx(1 / 3), "tpr": two_thirds, "ppv": two_thirds, "f1": two_thirds,
    }  # fmt: skip
    nothing = roc.rates(flagged, np.zeros(6, bool))
    assert nothing == {"fpr": 0.5, "tpr": None, "ppv": None, "f1": None}
    assert set(roc.ranking(np.arange(6.0), np.zeros(6, bool)).values()) == {None}


def test_outlyingness_is_that_of_scipy_without_the_value_itself():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 30.0], dtype=torch.float64)
    found = outliers.outlyingness(values)
    for place in range(5):
        others = np.delete(values.numpy(), place)
        spread = stats.median_abs_deviation(others, scale="normal")
        assert found[place] == pytest.approx((values[place] - np.median(others)) / spread)
    assert outliers.outlyingness(torch.ones(5)).tolist() == [0] * 5
    far = outliers.outlyingness(torch.tensor([1.0, 1, 1, 1, 2]))
    assert far.tolist() == [0, 0, 0, 0, outliers.FARTHEST]


# What a detector is shown


def clean_and_poisoned(count=300):
    """A `contents.Loaded` of random images: the first 40 are poison, and ten more covers."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    truth = torch.arange(count) % 10
    kinds = torch.zeros(count, dtype=torch.long)
    kinds[:40], kinds[40:50] = contents.POISON, contents.COVER
    changed, labels = images.clone(), truth.clone()
    changed[:50] = 255 - changed[:50]
    labels[:40] = 0
    backdoor = Split(255 - images[:60], torch.zeros(60).long(), truth[:60])
    tests = contents.TestSets(Split(images[:80], truth[:80], truth[:80]), backdoor)
    return contents.Loaded(
        model=models.build("resnet9", SPEC, 4).eval(),
        name="resnet9",
        width=4,
        train=Split(changed, labels, labels),
        clean=Split(images, truth, truth),
        test_sets=tests,
        spec=SPEC,
        kinds=kinds,
        backdoor_index=torch.arange(60),
    )


def of(name, **options):
    return importlib.import_module(f"antidote_bench.detection.{name}").Config(
        result_file="x", precision="fp32", **options
    )


def test_the_clean_images_of_a_detector_of_data_are_clean():
    loaded, config = clean_and_poisoned(), of("spectral")
    known = detect.choose_clean(loaded, config)
    clean = known.calibrating
    assert len(clean) == 125 and not len(known.reference), "spectral uses no reference"
    case = detect.case_of(config, loaded, known, {"n_poison": "40"})
    assert torch.equal(case.suspects.images[clean], loaded.clean.images[clean])
    assert torch.equal(case.suspects.labels[clean], loaded.clean.labels[clean])
    assert torch.equal(case.suspects.truth, case.suspects.labels)
    rest = torch.ones(300, dtype=torch.bool)
    rest[clean] = False
    assert torch.equal(case.suspects.images[rest], loaded.train.images[rest])
    assert torch.equal(case.positive, rest & (loaded.kinds == contents.POISON))
    assert torch.equal(case.cover, rest & (loaded.kinds == contents.COVER))
    assert torch.equal(case.role == detect.SUSPECT, rest)


def test_reference_and_calibration_are_apart_and_balanced():
    loaded, config = clean_and_poisoned(), of("agpd", data_seed=3)
    known = detect.choose_clean(loaded, config)
    assert (len(known.calibrating), len(known.reference)) == (100, 25)
    assert len(torch.cat(known).unique()) == 125
    counts = [loaded.clean.truth[part].bincount(minlength=10) for part in known]
    assert all(count.max() - count.min() <= 1 for count in counts)
    other = detect.choose_clean(loaded, of("agpd", data_seed=4))
    assert not torch.equal(torch.cat(known), torch.cat(other))
    many = detect.choose_clean(loaded, of("agpd", clean_count=300))
    assert (len(many.reference), len(many.calibrating)) == (200, 100)
    with pytest.raises(ConfigError, match="30 clean images are too few: nominal_fpr 0.05 needs 19"):
        detect.choose_clean(loaded, of("agpd", clean_count=30))


def test_unseen_images_set_the_threshold_of_a_detector_of_inputs():
    """They are test images, and are not judged: neither clean nor with the trigger."""
    loaded, config = clean_and_poisoned(), of("strip", data_seed=3)
    known = detect.choose_clean(loaded, config)
    assert (len(known.calibrating), len(known.reference)) == (40, 25), "at most half of the 80"
    counts = loaded.test_sets.test.truth[known.calibrating].bincount(minlength=10)
    assert counts.max() - counts.min() <= 1
    case = detect.case_of(config, loaded, known, {"n_poison": "40"})
    clean, triggered = (
        case.source[(case.role == detect.SUSPECT) & (case.positive == kind)]
        for kind in (False, True)
    )
    sources = torch.cat([clean, loaded.backdoor_index[triggered]])
    assert len(clean) == len(triggered) > 0
    assert not torch.isin(sources, known.calibrating).any()
    other = detect.choose_clean(loaded, of("strip", data_seed=4)).calibrating
    assert not torch.equal(known.calibrating, other)
    few = loaded._replace(test_sets=loaded.test_sets._replace(test=loaded.test_sets.test[:30]))
    with pytest.raises(ConfigError, match="here these are 15; raise"):
        detect.choose_clean(few, config)


def test_the_inputs_are_shuffled_and_have_no_labels():
    loaded, config = clean_and_poisoned(), of("strip", inputs=20)
    known = detect.choose_clean(loaded, config)
    case = detect.case_of(config, loaded, known, {"n_poison": "40"})
    assert len(case.suspects) == 80 and set(case.suspects.labels.tolist()) == {-1}
    assert set(case.suspects.truth.tolist()) == {-1}
    assert int(case.positive.sum()) == 20 == int((~case.positive & (case.role == 0)).sum())
    first = case.positive[case.role == 0][:10]
    assert 0 < int(first.sum()) < 10, "they are not shuffled"
    for place in range(0, 80, 7):
        source = int(case.source[place])
        tests = loaded.test_sets.backdoor if case.positive[place] else loaded.test_sets.test
        assert torch.equal(case.suspects.images[place], tests.images[source])
    benign = detect.case_of(config, loaded, known, {"n_poison": "0"})
    assert not benign.positive.any() and len(benign.suspects) == 60
    nothing = loaded.test_sets._replace(backdoor=loaded.test_sets.backdoor[:0])
    alone = loaded._replace(test_sets=nothing, backdoor_index=loaded.backdoor_index[:0])
    case = detect.case_of(config, alone, known, {"n_poison": "40"})
    assert not case.positive.any() and len(case.suspects) == 60


def test_a_detector_without_data_holds_no_image(small, places, run):
    loaded, config = clean_and_poisoned(), of("mm_bd")
    assert config.budget(300, 10) == 0
    assert [len(part) for part in detect.choose_clean(loaded, config)] == [0, 0]
    assert [len(part) for part in detect.choose_clean(loaded, of("nc"))] == [125, 0]
    done = run("detection/mm_bd.py", *places, "--result_file", "small", "--dry_run")
    assert "holds    no clean image and computes in fp32" in done.stdout


def test_the_results_say_what_was_computed_in():
    module = importlib.import_module("antidote_bench.detection.mm_bd")
    for asked in ("auto", "bf16", "fp32"):
        assert module.Config(result_file="x", precision=asked).precision == "fp32"
        computes_so = importlib.import_module("antidote_bench.detection.nc")
        assert computes_so.Config(result_file="x", precision=asked).precision == asked


# What a detector returns


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (torch.zeros(300), "one float64 score for each of 300"),
        (torch.zeros(299, dtype=torch.float64), "one float64 score for each of 300"),
        (torch.full((300,), torch.nan, dtype=torch.float64), "no.* a finite number"),
    ],
)
def test_scores_that_are_none(said, words):
    loaded, config = clean_and_poisoned(), of("spectral")
    known = detect.choose_clean(loaded, config)
    case = detect.case_of(config, loaded, known, {"n_poison": "40"})
    with pytest.raises(UserError, match=words):
        detect._judge_images("x", config, said, case)


def test_a_perfect_score_and_the_rule_of_the_paper():
    loaded, config = clean_and_poisoned(), of("spectral")
    known = detect.choose_clean(loaded, config)
    case = detect.case_of(config, loaded, known, {"n_poison": "40"})
    scores = case.positive.double() + torch.rand(300, dtype=torch.float64) / 10
    own = torch.ones(300, dtype=torch.bool)
    judged = detect._judge_images("x", config, Scored(scores, own), case)
    measured = judged.measured
    assert measured["auroc"] == measured["tpr"] == measured["own_tpr"] == measured["own_fpr"] == 1
    assert measured["n_positive"] == int(case.positive.sum()) > 0
    assert measured["n_negative"] + measured["n_positive"] == 175
    assert measured["n_cover"] == int(case.cover.sum()) > 0
    assert not judged.tensors["flagged"][known.calibrating].any(), "clean images are not evaluated"
    scores[case.cover] = 2.0  # covers are negatives, and left out in a column of their own
    measured = detect._judge_images("x", config, scores, case).measured
    assert measured["auroc"] < 1 == measured["auroc_no_cover"]


def test_a_finding_names_the_target_or_abstains():
    row = {"target": "3", "n_poison": "40"}
    per_class = torch.tensor([0.0, 5, 0, 4, 0, 0, 0, 0, 0, 0])
    measured = detect._judge_model("x", Finding(5.0, per_class, [1, 3]), SPEC, row).measured
    assert (measured["target_found"], measured["target_rank"]) == (1, 2)
    assert measured["suspects"] == "1 3"
    benign = detect._judge_model("x", Finding(5.0, per_class, [1]), SPEC, {**row, "n_poison": "0"})
    assert "target_found" not in benign.measured
    none = detect._judge_model("x", Finding(5.0, per_class, []), SPEC, row).measured
    assert (none["target_found"], none["suspects"]) == (0, "none")
    silent = detect._judge_model("x", Finding(5.0, per_class), SPEC, row).measured
    assert "target_found" not in silent and silent["suspects"] == ""
    assert silent["target_rank"] == 2, "a rank needs no verdict"
    silent = detect._judge_model("x", Finding(None, per_class, abstained="why"), SPEC, row)
    assert silent.measured["abstained"] == "why" and "target_found" not in silent.measured
    for wrong in (torch.zeros(10), Finding(None, per_class), Finding(1.0, per_class[:3])):
        with pytest.raises(UserError, match="must return"):
            detect._judge_model("x", wrong, SPEC, row)
    with pytest.raises(UserError, match="not a finite number"):
        detect._judge_model("x", Finding(float("nan"), per_class), SPEC, row)
    with pytest.raises(UserError, match="a score of a class that is not a finite number"):
        detect._judge_model("x", Finding(5.0, per_class.log()), SPEC, row)


@pytest.mark.parametrize(
    ("values", "target", "expected"),
    [([3, 1, 2, 0], 0, 1), ([3, 1, 2, 0], 1, 3), ([0, 0, 0, 0], 2, 2.5), ([5, 2, 2, 0], 1, 2.5)],
)
def test_the_rank_of_the_target_is_the_mean_over_ties(values, target, expected):
    assert roc.rank(np.array(values, float), target) == expected
    spec = dataclasses.replace(SPEC, classes=4)
    found = Finding(1.0, torch.tensor(values, dtype=torch.float64))
    row = {"target": str(target), "n_poison": "40"}
    assert detect._judge_model("x", found, spec, row).measured["target_rank"] == expected


def test_scores_without_a_limit_do_not_flatten_the_chart():
    far = outliers.FARTHEST
    shown, is_cut = charts.within(np.array([2.0, -far, 5.0, -1.0, far]))
    assert shown.tolist() == [2, -6, 5, -1, 6] and is_cut.tolist() == [0, 1, 0, 0, 1]
    shown, is_cut = charts.within(np.array([-far, 0.0, -far]))
    assert shown.tolist() == [-1.2, 0, -1.2] and is_cut.tolist() == [1, 0, 1]
    assert charts.class_chart(torch.tensor([2.0, -far, 5.0]), [2]).startswith(b"\x89PNG")


def test_a_detector_must_not_change_the_model(small, places, tmp_path):
    module = importlib.import_module("antidote_bench.detection.spectral")
    config = inspecting.options("spectral", small, places)
    model, _, _ = inspecting.opened(config, tmp_path)
    info = contents.open_record(config.record)
    loaded = contents.load(config.record, config, torch.device("cpu"), info)
    row, _ = contents.read_measures(config.record, info)

    def drifting(model, record, config):
        with torch.no_grad():
            next(model.buffers()).add_(1)
        return module.score(model, record, config)

    with pytest.raises(UserError, match="has changed the model"):
        detect.inspect("x", config, drifting, loaded, tmp_path, info, row, torch.device("cpu"))


# Shared passes


def test_gradients_of_the_maps_are_those_of_finite_differences(tmp_path):
    torch.manual_seed(0)
    model = models.build("resnet9", SPEC, 4).eval().requires_grad_(False).double()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([2, 0, 9])
    found = passes._map_gradients(model, images.double() / 255, labels)
    names = [name for name, it in model.named_modules() if isinstance(it, torch.nn.Conv2d)]
    assert list(found) == names
    step = 1e-6
    for name in (names[0], names[-1]):
        layer = model.get_submodule(name)
        for channel in (0, found[name].shape[1] - 1):

            def moved(sign, layer=layer, channel=channel):
                def shift(_layer, _inputs, output):
                    output = output.clone()
                    output[:, channel] += sign * step
                    return output

                hook = layer.register_forward_hook(shift)
                logits = model(images.double() / 255)
                hook.remove()
                return logits.gather(1, labels[:, None]).squeeze(1)

            slope = (moved(1) - moved(-1)) / (2 * step)  # the sum over the positions of the map
            with torch.no_grad():
                sizes = []
                hook = layer.register_forward_hook(lambda *it, s=sizes: s.append(it[2].shape))
                model(images.double() / 255)
                hook.remove()
            positions = sizes[0][2] * sizes[0][3]
            assert torch.allclose(found[name][:, channel], slope / positions, rtol=1e-4, atol=1e-9)


def test_a_pass_is_made_once_and_belongs_to_its_images(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = models.build("resnet9", SPEC, 4).eval().requires_grad_(False)
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(20) % 10
    record = inspecting.made_up(Split(images, labels, labels), tmp_path, spec=SPEC)
    config = of("spectral")
    features, logits = passes.penultimate(model, record, config)
    assert torch.allclose(logits, model(images / 255), atol=1e-4)
    last = [it for it in model.modules() if isinstance(it, torch.nn.Linear)][-1]
    assert features.shape == (20, last.in_features)
    with monkeypatch.context() as patch:
        patch.setattr(passes.loader, "forward_all", None)  # it would fail if it were called
        again = passes.penultimate(model, record, config)
    assert torch.equal(again[0], features) and torch.equal(again[1], logits)
    first = passes.gradients(model, record, config)
    assert all(len(value) == 20 and value.dtype == torch.float32 for value in first.values())
    monkeypatch.setattr(passes, "MOST_BYTES", 0)
    elsewhere = dataclasses.replace(record, shared=tmp_path / "elsewhere")
    passes.penultimate(model, elsewhere, config)
    assert not elsewhere.shared.exists(), "a pass that is too large is not kept"


# Flagged images, and the report


@pytest.fixture(scope="module")
def judged(small, places, run, tmp_path_factory):
    """A copy of the record `small`, which two detectors have judged."""
    folder = shutil.copytree(
        small,
        tmp_path_factory.mktemp("judged") / "small",
        ignore=shutil.ignore_patterns("defense", "detection"),
    )
    words = [*places, "--record_path", folder.parent, "--result_file", "small"]
    run("detection/spectral.py", *words)
    run("detection/strip.py", *words, "--inputs", 60)
    return folder


def test_a_defense_leaves_out_what_was_flagged(judged, places, run):
    words = [*places, "--record_path", judged.parent, "--result_file", "small", "--epochs", 1]
    run("defense/retrain.py", *words, "--flagged", "spectral")
    (row,) = csv.DictReader(open(judged / "defense/retrain/results.csv"))
    assert row["prior"] == "flagged=spectral" and row["stage"] == "in-training"
    flagged = int(load_file(judged / "detection/spectral/scores.safetensors")["flagged"].sum())
    done = run("defense/ac.py", *words, "--flagged", judged / "detection/spectral")
    assert 0 < flagged and f" of {1297 - flagged} images" in done.stderr
    info = json.loads((judged / "defense/retrain/record.json").read_text())
    scores = json.loads((judged / "detection/spectral/record.json").read_text())["files"]
    assert info["data"] == {"flagged": scores["scores.safetensors"]}
    done = run(
        "defense/retrain.py", *words, "--flagged", "strip", "--save_folder_name", "x", code=4
    )
    assert "did not judge the 1297 training images" in done.first
    done = run("defense/ft.py", *words, "--flagged", "spectral", code=2)
    assert "flagged must be left out here" in done.first
    assert (
        "no finished detection"
        in run(
            "defense/retrain.py", *words, "--flagged", "no", "--save_folder_name", "x", code=3
        ).first
    )
    # another detection of that name is another experiment
    detector = [*places, "--record_path", judged.parent, "--result_file", "small"]
    run("detection/spectral.py", *detector, "--nominal_fpr", 0.1, "--overwrite")
    assert (
        "holds a run on other data"
        in run("defense/retrain.py", *words, "--flagged", "spectral", code=2).first
    )


def test_detections_are_compared(judged, capsys, tmp_path):
    assert compare([str(judged), "--table", "detection"]) == 0
    shown = capsys.readouterr().out
    assert "digits, resnet9_w8: detectors of poisoned training images" in shown
    assert "detectors of triggered inputs" in shown and "left out" not in shown
    (row,) = csv.DictReader(open(judged / "detection/strip/results.csv"))
    line = next(line for line in shown.splitlines() if line.startswith("strip"))
    assert f"{100 * float(row['auroc']):.1f}" in line and f"{100 * float(row['fpr']):.1f}" in line
    assert compare([str(judged), "--table", "detection", "--format", "csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert {it["detection"]: it["judges"] for it in rows} == {"spectral": "data", "strip": "input"}
    assert float(rows[1]["auroc_mean"]) == pytest.approx(float(row["auroc"]), abs=1e-6)
    for form in ("markdown", "latex"):
        assert compare([str(judged), "--table", "detection", "--format", form]) == 0
        assert "strip" in capsys.readouterr().out
    assert compare([str(judged), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert '"detections":[{' in page and "strip on badnet" in page


def test_each_run_is_verified_once(judged, capsys, monkeypatch):
    opened, load = [], runs.load
    for module in (runs, detections):
        monkeypatch.setattr(module, "load", lambda *them: opened.append(them[:2]) or load(*them))
    assert compare([str(judged), "--table", "detection"]) == 0
    assert len(opened) == len(set(opened)) and (judged, layout.RESULTS) in opened


def test_a_method_without_a_verdict_has_neither_found_nor_missed():
    def result(suspects, found):
        numbers = {"score": 1.0, "target_found": found, "seconds": 2.0}
        return types.SimpleNamespace(row={"suspects": suspects}, numbers=numbers)

    cells = {
        ("badnet", "nc"): [result("3", 1.0), result("4", 0.0), result("none", 0.0)],
        ("badnet", "headstat"): [result("", None)],
        ("clean", "nc"): [result("none", None), result("3", None)],
        ("clean", "headstat"): [result("", None)],
    }
    about = dict.fromkeys(("dataset", "model", "recipe"), "x")
    columns, rows = ({name: name for name in names} for names in zip(*cells, strict=True))
    table = detections.Table(about, "model", columns, rows, cells, frozenset({"clean"}))
    grid = detections.to_grid(table)
    shown = {row[0]: dict(zip(grid.header, row, strict=True)) for row in grid.rows}
    assert shown["nc"]["badnet found"] == "1 of 3" and shown["nc"]["clean flagged"] == "1 of 2"
    assert shown["headstat"]["badnet found"] == shown["headstat"]["clean flagged"] == "–"


def test_a_damaged_detection_is_left_out(judged, capsys, tmp_path):
    folder = shutil.copytree(judged, tmp_path / "small")
    (folder / "detection/strip/results.csv").write_text("a,b\n1,2\n")
    assert compare([str(folder), "--table", "detection"]) == 0
    shown = capsys.readouterr().out
    assert "spectral" in shown and "1 run left out" in shown and "was changed" in shown


def test_a_record_without_detections(small, capsys, tmp_path):
    folder = shutil.copytree(
        small, tmp_path / "small", ignore=shutil.ignore_patterns("defense", "detection")
    )
    assert compare([str(folder), "--table", "detection"]) == 3
    assert "no detection found" in capsys.readouterr().err


def test_detections_in_a_sweep(places, run, tmp_path):
    grid = Path(tmp_path / "grid.yaml")
    grid.write_text("attack: badnet\nattack_options: {epochs: 1, width: 4}\ndetection: spectral\n")
    words = ["sweep.py", grid, "--engine", "serial", "--record_path", tmp_path / "record",
             "--results", tmp_path / "all.csv"]  # fmt: skip
    rest = ["--", "--cache_path", places[3]]
    assert "1 attacks and 0 defenses and 1 detections" in run(*words, "--dry_run", *rest).stdout
    run(*words, *rest)
    shutil.rmtree(tmp_path / "record")
    assert "2 recorded" in run(*words, *rest).stdout
    assert compare([str(tmp_path / "all.csv"), "--table", "detection"]) == 0


def test_the_columns_are_described():
    text = (ROOT / "record" / "README.md").read_text()
    listed = re.findall(r"^\| `([a-z0-9_,]+)` \|", text[text.index("## Detections") :], re.M)
    assert [name for names in listed for name in names.split(",")] == layout.DETECTION_COLUMNS


@pytest.mark.parametrize("name", names("detection"))
def test_every_detector_has_options_a_page_and_a_row(name):
    assert (ROOT / f"config/detection/{name}.yaml").is_file()
    assert (ROOT / f"docs/detection/{name}.md").is_file()
    kind = importlib.import_module(f"antidote_bench.detection.{name}").Config.judges
    rows = re.findall(rf"^\| \[{name}\]\(detection/{name}\.md\) \| (.*?) \|", OVERVIEW, re.M)
    assert len(rows) == 1 and kind in rows[0].split(", ")


def test_every_row_and_every_file_of_options_is_of_a_detector():
    listed = re.findall(r"^\| \[(\w+)\]\(detection/", OVERVIEW, re.M)
    files = [path.stem for path in (ROOT / "config/detection").glob("*.yaml")]
    assert sorted(listed) == sorted(files) == names("detection")


def test_a_sample_of_the_training_set_is_judged():
    """With all images that are known to be clean; each has its position in the training set."""
    loaded, whole = clean_and_poisoned(), of("cd", data_seed=3)
    known = detect.choose_clean(loaded, whole)
    every = detect.case_of(whole, loaded, known, {"n_poison": "40"})
    case = detect.case_of(of("cd", sample=50, data_seed=3), loaded, known, {"n_poison": "40"})
    assert len(case.suspects) == 50 + 125 and int((case.role == detect.SUSPECT).sum()) == 50
    assert (case.source.diff() > 0).all(), "in order"
    for part, all_of_it in zip(case, every, strict=True):
        if isinstance(part, Split):
            assert torch.equal(part.images, all_of_it.images[case.source])
            assert torch.equal(part.labels, all_of_it.labels[case.source])
        else:
            assert torch.equal(part, all_of_it[case.source])
    other = detect.case_of(of("cd", sample=50, data_seed=4), loaded, known, {"n_poison": "40"})
    assert not torch.equal(case.source, other.source)
    assert len(detect.case_of(of("cd", sample=10**6), loaded, known, {"n_poison": "40"})[1]) == 300
