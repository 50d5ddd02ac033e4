"""Run many commands: one after the other, or with Ray on all cores and GPUs of many machines."""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from utils import files
from utils.config import ROOT
from utils.errors import ConfigError, UserError
from utils.record.folder import written

RETRIES = 10  # times that a run is started again after the machine it ran on has died
LEAVE = 30  # seconds that cancelled runs have to leave their checkpoints


class TimeIsUp(UserError):
    """The time that the user gave is over before all runs are done (exit 124, as by `timeout`)."""

    code = 124

    def __init__(self):
        super().__init__("time is up; the same command goes on after the last finished epoch")


@dataclass(frozen=True)
class Job:
    """A command (`words` after `python`) that makes the complete run in `folder`.

    It starts in the working directory `place` when the job called `after` is done.
    `written_before` is what `written` said of the folder when the job was made.
    """

    name: str
    words: list
    folder: Path
    log: Path
    place: Path
    after: str | None = None
    written_before: int | None = None


def execute(job, before=0, threads=None, until=None):
    """Run a job's command, with its output in its log; returns the exit code.

    `before` is the exit code of the job that this one waits for: unless that is 0, nothing is run
    and the result is None. What was completed in the meantime is not run again. The lock lives as
    long as the command: a second try, from wherever, waits for one that its own machine has given
    up. After the moment `until` (of time.monotonic) the command gets SIGTERM, leaves a checkpoint,
    and TimeIsUp is raised.
    """
    if before != 0:
        return None
    with files.locked(job.log.with_suffix(".lock")) as lock, open(job.log, "a") as log:
        if written(job.folder) not in (None, job.written_before):
            return 0
        begin = time.monotonic()
        now, host = time.strftime("%Y-%m-%d %H:%M:%S"), socket.gethostname()
        print(f"# {now} on {host}: python {' '.join(job.words)}", file=log, flush=True)
        code = _run(job, lock, log, threads, until)
        print(f"# exit {code} after {time.monotonic() - begin:.0f} s", file=log)
        return code


def _run(job, lock, log, threads, until):
    """The exit code of a job's command, which inherits the `lock`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with subprocess.Popen(
        [sys.executable, str(ROOT / job.words[0]), *job.words[1:]],
        cwd=job.place,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=[lock.fileno()],
        preexec_fn=_end_with_parent(),
    ) as command:
        try:
            while command.poll() is None:
                _check_time(until)
                time.sleep(0.1)  # not wait(): Ray could not interrupt that
        except BaseException:
            command.terminate()  # it leaves a checkpoint
            command.wait()
            raise
    return command.returncode


def _check_time(until):
    """Raise TimeIsUp after the moment `until`; None is never."""
    if until is not None and time.monotonic() >= until:
        raise TimeIsUp


def _end_with_parent():
    """What a new process does first, so that it ends when the one that started it is killed.

    It ends as by SIGTERM, with a checkpoint.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def in_order(jobs, *, until=None, **_):
    """Yield (job, exit code) of one job after the other; TimeIsUp after the moment `until`."""
    codes = {}
    for job in jobs:
        _check_time(until)
        codes[job.name] = execute(job, codes.get(job.after, 0), until=until)
        yield job, codes[job.name]


def with_ray(jobs, *, until=None, address=None, cpus=1, gpus=None):
    """Yield (job, exit code) as jobs end, many at once; TimeIsUp after the moment `until`.

    Each takes `cpus` cores and `gpus` GPUs (a fraction shares one). Without an `address` Ray is
    started here, for as long as this takes; with one the jobs go to a running cluster, whose
    machines see the same folders. A job whose machine dies is started again on another one.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "the engine ray is not installed: pip install 'ray>=2.40', or use --engine serial"
        ) from error
    with _connected(ray, address):
        if gpus is None:
            gpus = min(1, ray.cluster_resources().get("GPU", 0))
        _check_resources(ray, CPU=cpus, GPU=gpus)
        task = ray.remote(execute).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)
        results, waiting = {}, {}
        for job in jobs:
            _check_time(until)
            results[job.name] = task.remote(job, results.get(job.after, 0), max(1, int(cpus)))
            waiting[results[job.name]] = job
        try:
            while waiting:
                ended = _next(ray, waiting, until)
                yield waiting.pop(ended), _outcome(ray, ended)
        except BaseException:
            for result in waiting:
                ray.cancel(result)
            ray.wait(list(waiting), num_returns=len(waiting), timeout=LEAVE)
            raise


def _check_resources(ray, **asked):
    """ConfigError unless one machine has what a run needs."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, count in asked.items():
        if not any(resources.get(name, 0) >= count for resources in machines):
            raise ConfigError(
                f"no machine has {count:g} {name}s for a run: lower --{name.lower()}s"
            )


def _next(ray, waiting, until):
    """The result that is ready next; TimeIsUp if none is before the moment `until`."""
    left = None if until is None else max(0, until - time.monotonic())
    ready, _ = ray.wait(list(waiting), timeout=left)
    if not ready:
        raise TimeIsUp
    return ready[0]


@contextlib.contextmanager
def _connected(ray, address):
    """Ray, started here or joined at an `address`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # a run gets the priority that it would get if you typed it
    os.environ.setdefault("RAY_worker_niceness", "0")
    # What passes through Ray are exit codes: a small store will do, and a small /dev/shm with it.
    local = {} if address else {"object_store_memory": 100_000_000, "include_dashboard": False}
    own_handler = signal.getsignal(signal.SIGTERM)
    try:
        # Ray itself asks for minutes before it gives up.
        if address and re.fullmatch(r"[^:/]+:\d+", address):
            host, port = address.split(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level="error", **local)
        signal.signal(signal.SIGTERM, own_handler)  # that of Ray ends everything at once
    except (OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"no Ray cluster answers at {address}: {why}; ray start --head starts one there"
            if address
            else f"Ray does not start: {why}; --engine serial does without it"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _outcome(ray, ended):
    """A job's exit code; -9 if Ray has given it up, because machine after machine died under it."""
    try:
        return ray.get(ended)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # a full disk, say, which is no fault of the command's
    except ray.exceptions.RayError:
        return -signal.SIGKILL


LAUNCHERS = {"ray": with_ray, "serial": in_order}
