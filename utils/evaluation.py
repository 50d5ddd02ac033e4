"""ACC, ASR and RA, and the evaluator: the only one that holds the test sets."""

import time
from contextlib import contextmanager
from typing import NamedTuple

import torch

from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.data.loader import forward_all


class TestSets(NamedTuple):
    """What a model is measured on: the clean test set, and the triggered one with attack labels."""

    __test__ = False  # pytest would take the name for a test

    test: Split
    backdoor: Split
    # triggered images of the target class; only `asr_of_all` counts them
    target: Split | None = None
    # where the trigger is for one class: triggered images of the classes that are neither this one
    # nor the target, with the target for a label; only `asr_of_others` counts them
    other: Split | None = None


def predict(model, split, precision="fp32"):
    """Predicted classes (int64 N) of every image of `split`, in order; the model stays as it
    was."""
    if not len(split):
        return split.labels
    return forward_all(model, split, lambda images, *_: model(images).argmax(1), precision)


def evaluate(model, test_sets, precision="fp32"):
    """{acc, asr, ra}, fractions.

    acc: share of the clean test images that are classified right. asr: share of the triggered
    images that get the attacker's label. ra: share of them that get their true label. asr and ra
    are None where no test image can be triggered.
    """
    clean = predict(model, test_sets.test, precision)
    triggered = predict(model, test_sets.backdoor, precision)
    return {
        "acc": _share(clean == test_sets.test.truth),
        "asr": _share(triggered == test_sets.backdoor.labels),
        "ra": _share(triggered == test_sets.backdoor.truth),
    }


def asr_of_all(asr, model, test_sets, precision="fp32"):
    """The ASR over all triggered test images, those of the target class included.

    Some papers count it so, AWM's for one. `asr` is the ordinary one of the same model, which need
    not be measured again. None where the record has no triggered images of the target class.
    """
    if asr is None or test_sets.target is None:
        return None
    hits = int((predict(model, test_sets.target, precision) == test_sets.target.labels).sum())
    count = len(test_sets.backdoor)
    return (asr * count + hits) / (count + len(test_sets.target))


def asr_of_others(model, test_sets, precision="fp32"):
    """The share of triggered images that become the target although the trigger is not for them.

    They are of the classes that are neither the source nor the target of an attack with one source
    class. None where the record has no such images.
    """
    if test_sets.other is None:
        return None
    return _share(predict(model, test_sets.other, precision) == test_sets.other.labels)


def defense_effectiveness(before, after):
    """DER in [0, 1]: 0.5 where nothing changed, 1 where ASR fell from 1 to 0 at no cost in ACC.

    None without an ASR. Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with
    Sharpness-Aware Minimization", ICCV 2023.
    """
    if before["asr"] is None or after["asr"] is None:
        return None
    fall, cost = before["asr"] - after["asr"], before["acc"] - after["acc"]
    return (max(0, fall) - max(0, cost) + 1) / 2


def _spaced(split, count):
    index = torch.arange(0, len(split), max(len(split) // count, 1), device=split.labels.device)
    return split[index]


def _share(hits):
    return hits.double().mean().item() if len(hits) else None


class Clock:
    """Seconds of a run's own work, on top of the `before` seconds of an interrupted run."""

    def __init__(self, before):
        self._before = before
        self._start = time.perf_counter()

    @property
    def seconds(self):
        return self._before + time.perf_counter() - self._start

    @contextmanager
    def paused(self):
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin


class Evaluator:
    """Measures models on the test sets and writes the log; its own time is not counted.

    `log` is a record.folder.Log. A stage is measured when it ends, and an epoch as often as
    config.eval_every says; every call adds a row.
    """

    def __init__(self, test_sets, config, log):
        self._test_sets, self._config, self._log = test_sets, config, log
        self.clock = Clock(log.seconds)

    def measure(self, stage, model, *, epoch=None, **values):
        """Log a row, with ACC, ASR and RA where they are due; {acc, asr, ra} or {}."""
        if self._test_sets.test.labels.is_cuda:
            torch.cuda.synchronize()  # work that is still under way belongs to the run's own time
        with self.clock.paused():
            every = self._config.eval_every
            due = epoch is None or (every and epoch % every == 0)
            measured = self.answer(model) if due else {}
            beside = self._beside(model, measured["asr"]) if due else {}
            self.note(stage, {**values, **measured, **beside}, epoch)
        return measured

    def _beside(self, model, asr):
        """What the log alone holds of a model with this ASR."""
        precision = self._config.precision
        return {
            "asr_all": asr_of_all(asr, model, self._test_sets, precision),
            "asr_other": asr_of_others(model, self._test_sets, precision),
        }

    def answer(self, model):
        """{acc, asr, ra} of a candidate, not logged; for a method that is marked as using them."""
        return evaluate(model, self._test_sets, self._config.precision)

    def sample(self, model, count):
        """{acc, asr, ra} on about `count` evenly spaced images of each test set, not logged."""
        with self.clock.paused():
            few = TestSets(*(_spaced(part, count) for part in self._test_sets[:2]))
            return evaluate(model, few, self._config.precision)

    def note(self, stage, values, epoch=None):
        """Log a row that was not measured here."""
        self._log.write(stage, epoch, {**values, "seconds": round(self.clock.seconds, 2)})
