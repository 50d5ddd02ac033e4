"""Passes fit the memory: they choose their batch by it, and halve it where it runs out.

`python -m benchmarks.memory` measures what every attack and every defense takes on large images.
"""

import copy
import csv
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from antidote_bench import models
from antidote_bench.attack import badnet
from antidote_bench.defense import awm, bnp, fmp, i_bau, mcr, nc
from antidote_bench.utils import launch
from antidote_bench.utils.data import loader
from antidote_bench.utils.detection import triggers
from antidote_bench.utils.errors import ConfigError, UserError
from antidote_bench.utils.poisoning import inversion
from antidote_bench.utils.record import claim, contents
from antidote_bench.utils.repair.layers import batch_norms
from benchmarks import memory
from tests.test_fmp import SPEC, STEP, found_record, images_and_labels, network

CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
ERRORS = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_ALLOCATOR)]
SIDE = 64
MAP = 8 * SIDE * SIDE * 4  # bytes of what the convolution of `small` puts out
IMAGE = 3 * SIDE * SIDE * 4  # bytes


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())


def large_images(count=300):
    return torch.zeros(1, dtype=torch.uint8).expand(count, 3, SIDE, SIDE)


@pytest.fixture
def limited(monkeypatch):
    """limited(bytes): no pass takes more, whatever the size of the images."""

    def limit(size):
        monkeypatch.setattr(loader, "SMALL", 0)
        monkeypatch.setattr(loader, "PASS_MEMORY", size)

    return limit


def test_images_of_cifar_pass_as_ever_and_nothing_is_measured():
    unusable = nn.Module()  # has no forward
    images = torch.zeros(1000, 3, 32, 32, dtype=torch.uint8)
    assert loader.evaluation_batch(unusable, images) == loader.EVALUATION_BATCH == 250
    assert loader.gradient_batch(unusable, images, 128) == 128
    assert loader.evaluation_batch(unusable, images[:7]) == 7


def test_the_batch_follows_network_size_and_free_memory(monkeypatch):
    model = small()
    assert loader.evaluation_batch(model, large_images()) == 250, "a gigabyte is enough"
    monkeypatch.setattr(loader, "PASS_MEMORY", 20 * loader.MAPS_AT_ONCE * MAP)
    assert loader.evaluation_batch(model, large_images()) == 16  # 250, 125, 63, 32, 16
    assert loader.evaluation_batch(model, large_images(5)) == 5
    monkeypatch.setattr(loader, "free_memory", lambda _: 8 * loader.MAPS_AT_ONCE * MAP)
    assert loader.evaluation_batch(model, large_images()) == 4, "half of it stays free"
    monkeypatch.setattr(loader, "free_memory", lambda _: 0)
    assert loader.evaluation_batch(model, large_images()) == 1


def test_what_a_backward_pass_keeps_is_counted(monkeypatch):
    """The convolution keeps the image, the ReLU what it has put out; weights do not count."""
    model = small().train()
    monkeypatch.setattr(loader, "PASS_MEMORY", 10 * loader.BACKWARD * (IMAGE + MAP))
    assert loader.gradient_batch(model, large_images(), 40) == 10
    monkeypatch.setattr(loader, "PASS_MEMORY", 10 * loader.BACKWARD * (IMAGE + MAP) - 1)
    assert loader.gradient_batch(model, large_images(), 40) == 5
    assert model.training and not model[1]._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_batch_is_halved_until_it_fits(error, capsys):
    tried = []

    def work(size):
        tried.append(size)
        if size > 3:
            raise error
        return size

    assert loader.halving(work, 10) == 3
    assert tried == [10, 5, 3]
    assert "from 10 to 5 images" in capsys.readouterr().err


def test_where_one_image_does_not_fit_the_message_says_so():
    def work(_size):
        raise MemoryError

    with pytest.raises(UserError, match="single image.*--image_size"):
        loader.halving(work, 4)


def test_other_errors_are_not_retried():
    with pytest.raises(RuntimeError, match="shape"):
        loader.halving(lambda size: torch.zeros(size).view(7, 7), 100)


class Narrow(nn.Module):
    """A network for whose passes memory runs out above `most` images."""

    def __init__(self, network, most):
        super().__init__()
        self.network, self.most = network, most

    def forward(self, images):
        logits = self.network(images)
        if len(images) > self.most:
            raise RuntimeError(CPU_ALLOCATOR)
        return logits


def found_split(count):
    record, _ = found_record(None, count)
    return record.clean


def resnet9():
    torch.manual_seed(0)
    return models.build("resnet9", SPEC, 4).eval()


def test_a_pass_goes_on_after_memory_has_run_out():
    """The results are those of one pass, and what a failed pass has begun does not count twice."""
    split, net = found_split(20), resnet9()
    with torch.no_grad():
        expected = net(split.images / 255)
    found = loader.forward_all(narrow := Narrow(net, 6), split, lambda images, *_: narrow(images))
    torch.testing.assert_close(found, expected)
    scores, whole = bnp.divergences(Narrow(net, 6), split), bnp.divergences(net, split)
    for name, values in whole.items():
        torch.testing.assert_close(scores[f"network.{name}"], values)
    one, two = copy.deepcopy(net), copy.deepcopy(net)
    mcr.estimate_norms(Narrow(one, 6), split, "fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "EVALUATION_BATCH", 5)
        mcr.estimate_norms(two, split, "fp32")
    for first, second in zip(batch_norms(one).values(), batch_norms(two).values(), strict=True):
        torch.testing.assert_close(first.running_var, second.running_var)


def test_fmp_scores_the_same_in_parts(limited):
    model, (images, labels) = network(True, True), images_and_labels(12)

    def score():
        return fmp.score_maps(model, images, labels, **STEP, batch=64, steps=fmp.fmp_step)

    whole = score()
    limited(6 * loader._gradient_bytes(model, images[:1]))
    assert fmp.pass_sizes(model, images, 64) == (3, 4), "it is scored in four parts"
    for name, values in score().items():
        assert (values[0] == whole[name][0]).all(), "accuracies are counts: ties stay ties"
        torch.testing.assert_close(torch.tensor(values[1]), torch.tensor(whole[name][1]))


def test_awm_learns_the_same_in_parts(limited):
    images, labels = images_and_labels(12)
    config = awm.Config(result_file="x", epochs=2, inner=1, gamma=1e-4)
    whole = awm.learn(network(True, True), images, labels, config)
    limited(5 * loader._gradient_bytes(network(True, True), images[:1]))
    for name, factors in awm.learn(network(True, True), images, labels, config).items():
        torch.testing.assert_close(factors, whole[name])


def test_i_bau_unlearns_the_same_in_parts(limited):
    images, labels = images_and_labels(12)
    config = i_bau.Config(result_file="x", rounds=2, batch_size=12, portion=0.5)

    def unlearned():
        model = network(True, True)
        return i_bau.unlearn(model, images, labels, config), model.state_dict()

    whole, weights = unlearned()
    limited(5 * loader._gradient_bytes(network(True, True), images[:1]))
    delta, parts = unlearned()
    torch.testing.assert_close(delta, whole)
    for name, values in parts.items():
        torch.testing.assert_close(values, weights[name], rtol=1e-6, atol=1e-9)


def test_nc_searches_the_same_in_parts(limited, tmp_path):
    split, model = found_split(12), resnet9()
    record = SimpleNamespace(spec=SPEC, clean=split, state=tmp_path)
    config = nc.Config(result_file="x", search_epochs=1, search_batch=12, precision="fp32")
    whole = nc.find_triggers(model, record, config)
    for file in tmp_path.iterdir():
        file.unlink()
    limited(5 * loader._gradient_bytes(model, split.images[:1] / 255))
    for one, other in zip(nc.find_triggers(model, record, config), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_nc_passes_have_every_image_with_every_trigger_once():
    for size in (1, 3, 7, 14, 100):
        seen = []
        for some, part in triggers.pass_parts(4, 7, size):
            pairs = [(k, n) for k in range(4)[some] for n in range(7)[part]]
            assert len(pairs) <= size
            seen += pairs
        assert sorted(seen) == [(k, n) for k in range(4) for n in range(7)]


def test_a_pattern_is_made_the_same_in_parts(limited):
    split, model = found_split(20), resnet9()
    make = dict(steps=1, seed=0)
    whole = inversion.low_frequency(model, split, 0, **make)
    limited(5 * loader._gradient_bytes(model, split.images[:1] / 255))
    assert loader.gradient_batch(model, split.images, 128) == 4
    torch.testing.assert_close(inversion.low_frequency(model, split, 0, **make), whole)


# messages


def told(work, Config, capsys):
    assert launch.guard(work, Config=Config) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_message_names_the_options_that_help(error, capsys):
    def work():
        raise error

    said = told(work, nc.Config, capsys)
    assert "--batch_size" in said and "--search_batch" in said and "--model" not in said
    said = told(work, badnet.Config, capsys)
    assert "--batch_size" in said and "--model" in said and "--image_size" in said
    said = told(work, bnp.Config, capsys)
    assert "--" not in said and "out of memory" in said


def test_while_a_record_is_read_a_smaller_batch_is_no_help(monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(contents.layout, "verify", fail)
    said = told(lambda: contents.open_record(tmp_path), nc.Config, capsys)
    assert "batch" not in said and "record" in said


# a run that failed early


def begun(folder, **changes):
    config = badnet.Config(dataset="digits", **changes)
    return claim.begin(folder, config, kind="attack", data={"classes": 10})


def test_a_run_that_failed_before_its_first_checkpoint_blocks_nothing(tmp_path):
    folder = tmp_path / "x"
    assert begun(folder, batch_size=128)
    state = folder / "state"
    (state / "kept").mkdir()
    save_file({"rank": torch.zeros(1)}, state / "kept" / "scores.safetensors")
    trigger = {"grid": torch.zeros(1)}
    save_file(trigger, state / "trigger.safetensors", {"facts": '{"trigger_seconds": 0.1}'})
    assert begun(folder, batch_size=32)
    assert not (state / "kept").exists() and not (state / "trigger.safetensors").exists()


@pytest.mark.parametrize("name", ["train.safetensors", "trigger.safetensors"])
def test_a_checkpoint_and_a_trigger_that_took_long_are_not_thrown_away(name, tmp_path):
    folder = tmp_path / "x"
    assert begun(folder, batch_size=128)
    state = folder / "state" / name
    save_file({"x": torch.zeros(1)}, state, {"facts": '{"trigger_seconds": 3600}'})
    with pytest.raises(ConfigError, match="batch_size"):
        begun(folder, batch_size=32)


# the measurement


def watched(code, limit, seconds=20):
    process = subprocess.Popen([sys.executable, "-c", code])
    return memory.watch(process, time.perf_counter() + seconds, limit)


def test_the_peak_of_a_process_is_measured():
    code, peak, ended = watched(
        "import time; x = b'1' * (150 << 20); del x; time.sleep(1)", limit=1000
    )
    assert code == 0 and not ended and 150 <= peak < 300


def test_a_process_above_the_limit_is_killed():
    code, peak, ended = watched("import time; x = b'1' * (150 << 20); time.sleep(60)", limit=100)
    assert code != 0 and "100 MB" in ended and peak > 100
    assert not memory.within({"verdict": ended, "peak_mb": peak}, 1000)


def test_a_process_that_takes_long_is_ended():
    code, _, ended = watched("import time; time.sleep(60)", limit=1000, seconds=0.1)
    assert code != 0 and ended.startswith(memory.STOPPED)


def test_what_was_measured_is_not_run_again(tmp_path, monkeypatch):
    runs, peaks = [], iter([7000, 3000])

    def measure(kind, name, words, options):
        runs.append(name)
        row = dict.fromkeys(memory.COLUMNS, "") | {"kind": kind, "name": name, "seconds": 1}
        return row | {
            "peak_mb": next(peaks),
            "verdict": "finished",
            "command": memory.command(kind, name, words),
        }

    monkeypatch.setattr(memory, "measure", measure)
    table = tmp_path / "memory.csv"
    words = ["--output", str(table), "--work", str(tmp_path), "--methods", "ft"]
    words += ["--image_size", "8"]
    with pytest.raises(UserError, match="ft"):
        memory.main(words)
    memory.main(words)  # once more, because it was above the limit
    memory.main(words)
    assert runs == ["ft", "ft"]
    with open(table, newline="") as file:
        assert [row["peak_mb"] for row in csv.DictReader(file)] == ["3000"]
