"""Runs many commands: one after the other, or with Ray on all cores and GPUs of one machine or of many."""

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
from utils.errors import ConfigError

RETRIES = 10  # times that a run is started again after the machine it ran on has died


@dataclass(frozen=True)
class Job:
    """A command (words after `python`) that makes the complete run in `folder`; it starts when the job called `after` is done."""

    name: str
    words: list
    folder: Path
    log: Path
    place: Path  # the working directory
    after: str | None = None
    found: int | None = None  # what `written` said of the folder when the job was made


def written(folder):
    """When the complete run in a folder was written; None where there is none."""
    record = folder / "record.json"
    return record.stat().st_mtime_ns if record.exists() else None


def execute(job, before=0, threads=None):
    """The exit code of a job's command, whose output goes to its log; None where the job before it has failed.

    What was completed in the meantime is not run again. The lock lives as long as the command, so that another try,
    from wherever, waits for one that its own machine has given up.
    """
    if before != 0:
        return None
    with files.locked(job.log.with_suffix(".lock")) as lock, open(job.log, "a") as log:
        if written(job.folder) not in (None, job.found):
            return 0
        begin = time.monotonic()
        print(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} on {socket.gethostname()}: python {' '.join(job.words)}", file=log, flush=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        words = [sys.executable, str(ROOT / job.words[0]), *job.words[1:]]
        with subprocess.Popen(words, cwd=job.place, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                              pass_fds=[lock.fileno()], preexec_fn=_end_with_parent()) as command:  # fmt: skip
            try:
                while command.poll() is None:
                    time.sleep(0.1)  # not wait(): Ray could not interrupt that
            except BaseException:
                command.terminate()  # it leaves a checkpoint
                command.wait()
                raise
        print(f"# exit {command.returncode} after {time.monotonic() - begin:.0f} s", file=log)
        return command.returncode


def _end_with_parent():
    """What a new process does first, so that it ends (as by SIGTERM, with a checkpoint) when the one that started it is killed."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def in_order(jobs, **_):
    """Yield (job, exit code) of one job after the other."""
    codes = {}
    for job in jobs:
        codes[job.name] = execute(job, codes.get(job.after, 0))
        yield job, codes[job.name]


def with_ray(jobs, *, address=None, cpus=1, gpus=None):
    """Yield (job, exit code) as jobs end, many at once: each takes `cpus` cores and `gpus` GPUs (a fraction shares one).

    Without an `address` Ray is started here, for as long as this takes; with one the jobs go to a running cluster, whose
    machines see the same folders. A job whose machine dies is started again on another one.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("the engine ray is not installed: pip install 'ray>=2.40', or use --engine serial") from error
    with _connected(ray, address):
        have = ray.cluster_resources()
        gpus = min(1, have.get("GPU", 0)) if gpus is None else gpus
        for name, asked in (("CPU", cpus), ("GPU", gpus)):
            if not any(node["Resources"].get(name, 0) >= asked for node in ray.nodes() if node["Alive"]):
                raise ConfigError(f"no machine has {asked:g} {name}s for a run: lower --{name.lower()}s")
        task = ray.remote(execute).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)
        waiting, made = {}, {}
        for job in jobs:
            made[job.name] = task.remote(job, made.get(job.after, 0), max(1, int(cpus)))
            waiting[made[job.name]] = job
        try:
            while waiting:
                (ended, *_), _ = ray.wait(list(waiting))
                yield waiting.pop(ended), _outcome(ray, ended)
        except BaseException:
            for left in waiting:
                ray.cancel(left)
            ray.wait(list(waiting), num_returns=len(waiting), timeout=30)  # commands leave their checkpoints
            raise


@contextlib.contextmanager
def _connected(ray, address):
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # a run gets what it would get if it were typed
    # what passes through Ray are exit codes: a small store will do, and a small /dev/shm with it
    local = {} if address else {"object_store_memory": 100_000_000, "include_dashboard": False}
    ours = signal.getsignal(signal.SIGTERM)
    try:
        if address and re.fullmatch(r"[^:/]+:\d+", address):  # Ray itself asks for minutes before it gives up
            host, port = address.split(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level="error", **local)
        signal.signal(signal.SIGTERM, ours)  # Ray brings its own, which ends everything at once
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {' '.join(str(error).split())[:200]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _outcome(ray, ended):
    """A job's exit code; -9 where Ray has given it up, because machine after machine died under it."""
    try:
        return ray.get(ended)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # a full disk, say, which is no fault of the command's
    except ray.exceptions.RayError:
        return -signal.SIGKILL


ENGINES = {"ray": with_ray, "serial": in_order}
