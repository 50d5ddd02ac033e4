"""The package in Python: records, triggers, measures, runs and lists; the page and the notebook."""

import inspect
import json
import re
import shutil
import signal
import subprocess
import sys

import pandas
import pytest
import torch
from torch import nn

import antidote_bench
from antidote_bench import ConfigError, MissingError, RefusedError, Split, TestSets
from antidote_bench.defense import ft
from antidote_bench.utils import files
from antidote_bench.utils.record import folder
from antidote_bench.utils.repair.defender import Defender
from tests.helpers import ROOT, names

PAGE = (ROOT / "docs" / "python.md").read_text()


@pytest.fixture(scope="module")
def cache(places):
    return {"cache_path": places[3]}


@pytest.fixture(scope="module")
def mine(small, tmp_path_factory):
    """A copy of the narrow record, to run defenses on."""
    return shutil.copytree(small, tmp_path_factory.mktemp("python") / "mine")


@pytest.fixture(scope="module")
def record(mine, cache):
    return antidote_bench.load(mine, **cache)


def rewritten(path, name, change):
    """Change the text of a file of a record, and its checksum with it."""
    (path / name).write_text(change((path / name).read_text()))
    info = json.loads((path / folder.RECORD).read_text())
    info["files"][name] = files.sha256(path / name)
    files.write_json(path / folder.RECORD, info)


class Table(nn.Module):
    """Takes the class of an image from its first pixel, in tenths."""

    def forward(self, images):
        return nn.functional.one_hot((images[:, 0, 0, 0] * 10).round().long(), 10).float()


def images_of(classes):
    return (torch.tensor(classes) / 10).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()


def test_importing_the_package_loads_nothing():
    code = (
        "import sys, antidote_bench; antidote_bench.__version__; dir(antidote_bench); "
        "assert not {'torch', 'numpy', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_the_package_offers_is_explained():
    for name in antidote_bench.__all__:
        thing = getattr(antidote_bench, name)
        assert thing.__doc__, name
        assert re.search(rf"\b{name}\b", PAGE) or name in (
            "Measures",
            "Record",
            "Repaired",
            "Trigger",
        )
        if inspect.isfunction(thing):
            signature = inspect.signature(thing)
            typed = [signature.return_annotation] + [
                each.annotation
                for each in signature.parameters.values()
                if each.kind != each.VAR_KEYWORD
            ]
            assert inspect.Parameter.empty not in typed, name
    with pytest.raises(AttributeError):
        antidote_bench.nothing  # noqa: B018


def test_a_record_holds_what_its_files_say(record, mine):
    row = files.read_csv(mine / folder.RESULTS)[0]
    assert record.measures == tuple(float(row[name]) for name in ("acc", "asr", "ra"))
    assert len(record.poison_index) == int(row["n_poison"]) and not len(record.cover_index)
    assert record.options["width"] == 8 and record.attack == "badnet"
    poisoned = record.train.images[record.poison_index]
    clean = record.clean_train.images[record.poison_index]
    assert torch.equal(poisoned[..., :29, :29], clean[..., :29, :29])
    assert (poisoned[..., 29:, 29:] == 255).all() and not torch.equal(poisoned, clean)
    assert (record.train.labels[record.poison_index] == 0).all()
    assert len(record.before) == len(record.after) == int(row["n_backdoor"])
    assert torch.equal(record.before[..., :29, :29], record.after[..., :29, :29])
    assert not record.model.training


def test_any_network_is_measured(record):
    assert antidote_bench.evaluate(record.model, record) == record.measures
    always_zero = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    nn.init.zeros_(always_zero[1].weight)
    always_zero[1].bias.data = torch.eye(10)[0]
    acc, asr, ra = antidote_bench.evaluate(always_zero, record)
    assert (asr, ra) == (1, 0)
    assert acc == (record.test_sets.test.truth == 0).double().mean()


def test_own_images_are_measured_without_a_record():
    truth = torch.tensor([1, 2, 3, 4])
    clean = Split(images_of([1, 2, 3, 9]), truth, truth)
    triggered = Split(images_of([0, 0, 3, 9]), torch.zeros_like(truth), truth)
    measures = antidote_bench.evaluate(Table(), TestSets(clean, triggered))
    assert measures == (0.75, 0.5, 0.25)
    assert str(measures) == "ACC 75.0  ASR 50.0  RA 25.0"
    nothing = Split(images_of([]), truth[:0], truth[:0])
    assert antidote_bench.evaluate(Table(), TestSets(clean, nothing)) == (0.75, None, None)
    with pytest.raises(ConfigError, match="precision must be"):
        antidote_bench.evaluate(Table(), TestSets(clean, triggered), "fp64")
    elsewhere = nn.Linear(1, 1, device="meta")
    with pytest.raises(ConfigError, match="move the model there with .to"):
        antidote_bench.evaluate(elsewhere, TestSets(clean, triggered))


def test_what_cannot_be_measured_is_said(record):
    def refused(model, on, sentence):
        with pytest.raises(ConfigError, match=sentence):
            antidote_bench.evaluate(model, on)

    labels = torch.tensor([1, 2])
    good = Split(images_of([1, 2]), labels, labels)
    model = Table()
    refused("model", record, "must be a torch.nn.Module, not an object of the class str")
    refused(model, "record", "on a Record or TestSets, not an object of the class str")
    refused(nn.Flatten(), record, r"logits of shape \(2, 10\), and returns \(2, 3072\)")
    few = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
    refused(few, TestSets(good, good), "of shape .2, 3 or more., and returns")
    refused(model, TestSets([1], good), "test of the test sets must be a Split")
    refused(model, TestSets(good, None), "backdoor of the test sets must be a Split")
    short = Split(good.images, labels[:1], labels)
    refused(model, TestSets(good, short), "backdoor must have a label and a true class for every")
    loud = Split(255 * good.images, labels, labels)
    refused(model, TestSets(loud, good), r"test must have images of uint8, or float in \[0, 1\]")


def test_the_trigger_of_a_record_gives_its_images(record):
    assert torch.equal(record.trigger(record.before, record.backdoor_index), record.after)
    kept = record.before / 255
    given = record.trigger(kept)
    assert given.dtype == torch.float32 and torch.equal(kept, record.before / 255)
    assert torch.allclose(given, record.after / 255)
    assert record.trigger(record.before[:0]).shape == (0, 3, 32, 32)
    for wrong in (record.before[0], record.before[..., 1:], record.before.int(), "image"):
        with pytest.raises(ConfigError, match="images must be"):
            record.trigger(wrong)
    with pytest.raises(ConfigError, match="float in .0, 1."):
        record.trigger(record.before.float())
    few = record.trigger(record.before[:3], index=record.backdoor_index[:3].tolist())
    assert torch.equal(few, record.after[:3])
    with pytest.raises(ConfigError, match="index must have"):
        record.trigger(record.before, record.backdoor_index[:3])


def test_a_trigger_that_does_not_fit_its_record_is_refused(mine, cache, tmp_path):
    other = shutil.copytree(mine, tmp_path / "other", ignore=shutil.ignore_patterns("defense"))
    rewritten(
        other, folder.OPTIONS, lambda text: text.replace("patch_value: 255", "patch_value: 9")
    )
    with pytest.raises(RefusedError, match="do not give the triggered images"):
        _ = antidote_bench.load(other, **cache).trigger
    rewritten(
        other, folder.OPTIONS, lambda text: text.replace("r_path: null", "r_path: /etc/hostname")
    )
    info = json.loads((other / folder.RECORD).read_text())
    files.write_json(other / folder.RECORD, {**info, "origin": None})
    with pytest.raises(RefusedError, match="trigger_path names a file, and the record was not"):
        _ = antidote_bench.load(other, **cache).trigger
    files.write_json(other / folder.RECORD, {**info, "name": "os"})
    with pytest.raises(ConfigError, match="names no attack that is known here"):
        _ = antidote_bench.load(other, **cache).trigger


def test_a_trigger_needs_no_record(cache):
    images = torch.full((4, 3, 32, 32), 100, dtype=torch.uint8)
    black = antidote_bench.trigger("badnet", patch_value=0, patch_size=5, **cache)(images)
    assert (black[..., 27:, 27:] == 0).all() and (black == 0).sum() == 4 * 3 * 25
    blended = antidote_bench.trigger("blended", **cache)
    assert torch.equal(blended(images), antidote_bench.trigger("blended", **cache)(images))
    other = antidote_bench.trigger("blended", poison_seed=1, **cache)(images)
    assert not torch.equal(blended(images), other) and not torch.equal(blended(images), images)
    with pytest.raises(ConfigError, match="name that one"):
        antidote_bench.trigger("clean")


def test_a_defense_is_the_one_of_the_script(record, mine, places, run, monkeypatch):
    run("defense/ft.py", "--result_file", mine, *places, "--epochs", "1", "--lr", "0.02")
    monkeypatch.setattr(ft, "repair", None)  # it is done: nothing is run again
    repaired = antidote_bench.run_defense(record, "ft", epochs=1, lr=0.02)
    assert repaired.path == mine / "defense" / "ft"
    assert repaired.before == record.measures and repaired.options["lr"] == 0.02
    assert antidote_bench.evaluate(repaired.model, record) == repaired.after
    assert repaired.row["defense"] == "ft" and repaired.row["lr"] == 0.02
    assert record.repaired("ft").row.equals(repaired.row)
    with pytest.raises(MissingError, match="run_defense runs one"):
        record.repaired("fmp")


def test_a_network_with_more_layers_is_built_again(record):
    repaired = antidote_bench.run_defense(record, "npd", epochs=1, clean_count=20)
    assert antidote_bench.evaluate(repaired.model, record) == repaired.after
    assert len(repaired.model.state_dict()) > len(record.model.state_dict())


def test_a_defense_sees_no_test_image_and_no_handler_is_set(record, mine, cache, monkeypatch):
    seen = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]

    def repair(model, known, config):
        seen.append((known, known.report("spy", model)))
        assert [signal.getsignal(number) for number in numbers] == handlers
        return model

    monkeypatch.setattr(ft, "repair", repair)
    options = {"save_folder_name": "spy", "clean_count": 20}
    repaired = antidote_bench.run_defense(str(mine), "ft", **options, **cache)
    (known, reported) = seen[0]
    assert type(known) is Defender and reported is None and known.measure is None
    tests = {bytes(image.numpy()) for image in (*record.test_sets.test.images, *record.after)}
    held = [value for value in vars(known).values() if isinstance(value, Split)]
    trained = {bytes(image.numpy()) for image in record.clean_train.images}
    assert len(held) == 2 and len(known.clean) == 20
    for split in held:
        own = {bytes(image.numpy()) for image in split.images}
        assert not own & (tests - trained - {bytes(image.numpy()) for image in record.train.images})
    assert repaired.after == record.measures


def test_a_detector_is_the_one_of_the_script(record, mine, places, run):
    row = antidote_bench.run_detector(record, "spectral")
    words = ("--result_file", mine, *places)
    assert run("detection/spectral.py", *words).stdout.startswith("already done")
    assert row["run"] == str(mine / "detection" / "spectral") and 0 <= row["auroc"] <= 1
    assert "spectral" in set(record.detections["detection"])
    assert "spectral" not in set(record.results["defense"])


def test_a_file_of_options_counts_as_for_the_script(record, tmp_path):
    (tmp_path / "options.yaml").write_text("precision: fp32\nu: 2.5\n")
    repaired = antidote_bench.run_defense(
        record, "clp", yaml_path=tmp_path / "options.yaml", save_folder_name="from_file"
    )
    assert (repaired.options["precision"], repaired.options["u"]) == ("fp32", 2.5)


def test_detectors_of_two_kinds_are_listed_under_both():
    for kind in ("data", "input"):
        assert "cd" in antidote_bench.list_detectors(judges=kind).index
    assert "cd" not in antidote_bench.list_detectors(judges="model").index


def test_results_are_a_frame_of_numbers(record, mine, tmp_path):
    frame = record.results
    assert set(frame["defense"]) >= {"none"} and frame["run"].iloc[0] == str(mine)
    assert frame["acc"].dtype == "float64" and frame["n_test"].dtype == "int64"
    assert all(isinstance(value, str) for value in frame["config_hash"])
    victim = frame[frame["defense"] == "none"].iloc[0]
    assert pandas.isna(victim["acc_before"]) and victim["acc"] == record.measures.acc
    copy = shutil.copytree(mine, tmp_path / "damaged", ignore=shutil.ignore_patterns("defense"))
    (copy / folder.RESULTS).write_text("nothing\n")
    with pytest.warns(UserWarning, match="damaged is left out: results.csv was changed"):
        assert not len(antidote_bench.results(tmp_path))
    with pytest.raises(MissingError, match="there is no folder"):
        antidote_bench.results(tmp_path / "none")


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: antidote_bench.run_attack("badnt"), ConfigError, "did you mean badnet"),
        (lambda: antidote_bench.run_attack("badnet", pratio=2), ConfigError, "pratio must be"),
        (lambda: antidote_bench.run_attack("badnet", ratio=1), ConfigError, "unknown option"),
        (lambda: antidote_bench.run_attack("badnet", help=True), ConfigError, "command line"),
        (lambda: antidote_bench.run_attack("badnet", dry_run=True), ConfigError, "command line"),
        (lambda: antidote_bench.load("no_such_record"), MissingError, "there is no record"),
        (lambda: antidote_bench.load(None), ConfigError, "not an object of the class NoneType"),
        (lambda: antidote_bench.run_defense(nn.ReLU(), "ft"), ConfigError, "the class ReLU"),
        (lambda: antidote_bench.run_detector("x", "nope"), MissingError, "there is no record"),
        (lambda: antidote_bench.results(), ConfigError, "name one folder"),
        (
            lambda: antidote_bench.results(["record"]),
            ConfigError,
            "not an object of the class list",
        ),
        (
            lambda: antidote_bench.list_models(size=1),
            ConfigError,
            "there are source, default_width",
        ),
    ],
)
def test_mistakes_are_exceptions(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_lists_know_everything_with_its_facts():
    for kind, listed in (
        ("attack", antidote_bench.list_attacks),
        ("defense", antidote_bench.list_defenses),
        ("detection", antidote_bench.list_detectors),
    ):
        frame = listed()
        assert list(frame.index) == names(kind) and frame["idea"].str.len().min() > 20
    free = antidote_bench.list_defenses(needs_clean_images=False)
    assert {"clp", "ep"} <= set(free.index) and "ft" not in free.index
    assert set(antidote_bench.list_defenses(needs_clean_images=False, stage="repair").index) < set(
        free.index
    )
    clean_label = set(antidote_bench.list_attacks(clean_label=True).index)
    assert clean_label == {"checkerboard", "combat", "ctrl", "grond", "lc", "narcissus", "sig"}
    assert antidote_bench.list_defenses().loc["fmp", "arxiv"] == "2307.11565"
    assert antidote_bench.list_models().loc["resnet9", "default_width"] == 64


def test_the_page_is_true(tmp_path, monkeypatch):
    """Its blocks run one after the other, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    known = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(compile(block, "docs/python.md", "exec"), known)
    assert known["record"].path.is_dir() and known["repaired"].after.acc > 0.5


def test_the_tour_runs(tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    images = sum("image/png" in output.get("data", {}) for output in outputs)
    assert images == 4  # triggers twice, the scores of spectral, the triggers that nc found
    assert not any(output.output_type == "error" for output in outputs)
