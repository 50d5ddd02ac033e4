"""The judge: the only one that holds the exam. Measures models, keeps the log, and stops the clock while doing so."""

import time
from contextlib import contextmanager

import torch

from utils import files, metrics

COLUMNS = ["stage", "epoch", "loss", "lr", "acc", "asr", "ra", "seconds", "asr_all"]


class Clock:
    """Seconds of a run's own work; goes on from what the log of an interrupted run says."""

    def __init__(self, log):
        rows = files.read_csv(log) if log.exists() else []
        self._before = max((float(row["seconds"] or 0) for row in rows), default=0.0)
        self._start = time.perf_counter()

    @property
    def seconds(self):
        return self._before + time.perf_counter() - self._start

    @contextmanager
    def paused(self):
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin


class Judge:
    """Measures a stage when it ends, and an epoch as often as config.eval_every says; every call is a row of the log."""

    def __init__(self, exam, config, log):
        self._exam, self._config, self._log = exam, config, log
        self.clock = Clock(log)
        self._rows = {(row["stage"], row["epoch"]): row for row in files.read_csv(log)} if log.exists() else {}

    def measure(self, stage, model, *, epoch=None, **values):
        """Log a row, with ACC, ASR and RA where they are due; {acc, asr, ra} or {}."""
        if self._exam.test.labels.is_cuda:
            torch.cuda.synchronize()  # or the judge would be charged for work that is still under way
        with self.clock.paused():
            every = self._config.eval_every
            due = epoch is None or (every and epoch % every == 0)
            found = metrics.evaluate(model, self._exam, self._config.precision) if due else {}
            everything = metrics.asr_of_all(found.get("asr"), model, self._exam, self._config.precision)
            self.note(stage, {**values, **found, "asr_all": everything}, epoch)
        return found

    def answer(self, model):
        """{acc, asr, ra} of a candidate, not logged; for a method that is marked as choosing by it."""
        return metrics.evaluate(model, self._exam, self._config.precision)

    def note(self, stage, values, epoch=None):
        """Log a row; one of the same stage and epoch, from before an interruption, is replaced."""
        key = (stage, str(epoch or ""))
        self._rows[key] = {"stage": stage, "epoch": key[1], **values, "seconds": round(self.clock.seconds, 2)}
        files.write(self._log, files.csv_text(self._rows.values(), COLUMNS))
