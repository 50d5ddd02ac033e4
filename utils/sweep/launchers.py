"""Run many commands: one after the other, or with Ray on all cores and GPUs of many machines."""

import contextlib
import ctypes
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from antidote_bench.utils import files, parsing
from antidote_bench.utils.config import IMPORT_PATH, ROOT
from antidote_bench.utils.errors import ConfigError, UserError
from antidote_bench.utils.record import claim, folder

RETRIES = 10  # times that a run is started again after the machine it ran on has died
LEAVE = 30  # seconds that cancelled runs have to leave their checkpoints
PAUSE = 1  # seconds between two looks at what other processes do
INTERRUPTED = (130, 143)  # exit codes of runs that go on with the same command
HELD = "a run is under way in"  # what a script says when another process owns its folder


class TimeIsUp(UserError):
    """The time that the user gave is over before all runs are done (exit 124, as by `timeout`)."""

    code = 124

    def __init__(self):
        super().__init__("time is up; the same command goes on after the last finished epoch")


class UnderWay(Exception):
    """Another process is at work on the same run."""


@dataclass(frozen=True)
class Job:
    """A command (`words` after `python`) that makes the complete run in `folder`.

    It starts in the working directory `place` when the job called `after` is done.
    `written_before` is what `written` said of the folder when the job was made, `log_before` the
    size of the log.
    """

    name: str
    words: list
    folder: Path
    log: Path
    place: Path
    after: str | None = None
    written_before: int | None = None
    log_before: int = 0


def execute(job, threads=None, until=None):
    """Run a job's command, with its output in its log; returns the exit code.

    While another process runs the job this one waits. After the moment `until` (of time.monotonic)
    the command gets SIGTERM, leaves a checkpoint, and TimeIsUp is raised.
    """
    while True:
        try:
            return attempt(job, threads=threads, until=until)
        except UnderWay:
            _check_time(until)
            time.sleep(PAUSE)


def attempt(job, *, threads=None, until=None, say=lambda line: None):
    """The exit code of a job that is run now; raises UnderWay where another process runs it.

    What another sweep has ended since the job was made is not run again. `say` gets a line when the
    command starts.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.owned(job.log.with_suffix(".lock")))
        except BlockingIOError:
            raise UnderWay from None
        log = stack.enter_context(open(job.log, "a"))
        if (code := _ended_elsewhere(job, log.tell())) is not None:
            return code
        _require_free(job.folder)
        say(started(job))
        return _logged(job, log, threads, until)


def started(job):
    """A line for the user on a job that runs now."""
    return f"started {job.name}: its output goes to {os.path.relpath(job.log)}"


def _ended_elsewhere(job, log_now):
    """The exit code of a job that another sweep has run since it was made here, else None.

    `log_now` is the size of its log. An interrupted run has not ended.
    """
    if folder.written(job.folder) not in (None, job.written_before):
        return 0
    code = last_exit_code(job.log) if log_now > job.log_before else None
    return None if code in (0, *INTERRUPTED) else code


def _require_free(place):
    """Raise UnderWay where a process owns the folder `place`."""
    try:
        with claim.owned(place):
            pass
    except ConfigError:
        raise UnderWay from None


def _logged(job, log, threads, until):
    """The exit code of a job's command, which the log states too."""
    begin, place = time.monotonic(), log.tell()
    now, host = time.strftime("%Y-%m-%d %H:%M:%S"), socket.gethostname()
    words = [*parsing.start(job.words[0]), *job.words[1:]]
    print(f"# {now} on {host}: {' '.join(words)}", file=log, flush=True)
    code = _run(job, log, threads, until)
    if code == ConfigError.code and HELD in job.log.read_bytes()[place:].decode(errors="replace"):
        print("# its end is waited for", file=log)
        raise UnderWay
    print(f"# exit {code} after {time.monotonic() - begin:.0f} s", file=log)
    return code


def last_exit_code(log):
    """The exit code that the last run in a log ended with; None if it did not end by itself."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    ending = re.fullmatch(r"# exit (-?\d+) .*", lines[-1]) if lines else None
    return int(ending[1]) if ending else None


def _run(job, log, threads, until):
    """The exit code of a job's command."""
    paths = filter(None, [str(IMPORT_PATH), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with subprocess.Popen(
        [sys.executable, str(ROOT / job.words[0]), *job.words[1:]],
        cwd=job.place,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
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


def in_order(jobs, *, until=None, say=lambda line: None, **_):
    """Yield (job, exit code) of one job after the other; TimeIsUp after the moment `until`.

    What another process is at work on is left for later. `say` gets a line when a job starts.
    """
    codes, left = {}, {job.name: job for job in jobs}
    while left:
        _check_time(until)
        job, codes[job.name] = _first_free(left, codes, until, say)
        del left[job.name]
        yield job, codes[job.name]


def _first_free(left, codes, until, say):
    """(job, exit code) of the first job in `left` that no other process is at work on.

    `codes` are those of the jobs that have ended. Where all are under way, one is waited for.
    """
    waits = False
    while True:
        for job in _startable(left, codes):
            if codes.get(job.after, 0) != 0:
                return job, None
            with contextlib.suppress(UnderWay):
                return job, attempt(job, until=until, say=say)
        if not waits:
            say("waiting: other processes are at work on what is left")
            waits = True
        _check_time(until)
        time.sleep(PAUSE)


def _startable(left, codes):
    """The jobs in `left`, in their order, that wait for no other one. `codes` are those of the jobs
    that have ended."""
    return [job for job in left.values() if job.after is None or job.after in codes]


def with_ray(jobs, *, until=None, say=lambda line: None, address=None, cpus=1, gpus=None):
    """Yield (job, exit code) as jobs end, many at once; TimeIsUp after the moment `until`.

    Each takes `cpus` cores and `gpus` GPUs (a fraction shares one). Without an `address`, and
    without RAY_ADDRESS, Ray is started here, for as long as this takes; with one the jobs go to
    a running cluster, whose machines see the same folders. A job whose machine dies is started
    again on another one. `say` gets a line when a job starts.
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
        asked = {"CPU": cpus, "GPU": gpus}
        _check_resources(ray, asked)
        task = ray.remote(_in_worker).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)
        start = functools.partial(task.remote, threads=max(1, int(cpus)))
        yield from _many_at_once(ray, jobs, start, asked, until, say)


def _in_worker(job, threads):
    """`execute` in a process of Ray's, which cancels by SIGINT.

    A shell that starts a sweep in the background has SIGINT ignored, here too.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return execute(job, threads)


def _many_at_once(ray, jobs, start, asked, until, say):
    """Yield (job, exit code) as jobs end. As many as the machines can run are handed to Ray.

    The others stay here, so that the first one in the order of `jobs` is next, also where its
    victim was not done before.
    """
    left, codes = {job.name: job for job in jobs}, {}
    running, silent = {}, {}  # by their results in Ray; the start of the silent was not told yet
    try:
        while left or running:
            _check_time(until)
            places = _places(ray, asked)
            for job in _startable(left, codes):
                if codes.get(job.after, 0) != 0:
                    del left[job.name]
                    codes[job.name] = None
                    yield job, None
                elif len(running) < places:
                    result = start(job)
                    running[result] = silent[result] = left.pop(job.name)
            for ended in _ended(ray, running, silent, until, say):
                job = running.pop(ended)
                codes[job.name] = _outcome(ray, ended)
                yield job, codes[job.name]
    except BaseException:
        for result in running:
            ray.cancel(result)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=LEAVE)
        raise


def _places(ray, asked):
    """How many runs that take what is `asked` fit on all machines at once; 1 at least."""
    asked = {name: count for name, count in asked.items() if count}
    fit = [
        min((int(machine.get(name, 0) / count) for name, count in asked.items()), default=1)
        for machine in _machines(ray)
    ]
    return max(1, sum(fit))


def _machines(ray):
    """The resources of every machine that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _check_resources(ray, asked):
    """ConfigError unless one machine has what a run needs."""
    for name, count in asked.items():
        if not any(machine.get(name, 0) >= count for machine in _machines(ray)):
            raise ConfigError(
                f"no machine has {count:g} {name}s for a run: lower --{name.lower()}s"
            )


def _ended(ray, running, silent, until, say):
    """At most one result of `running` that is ready, in a list, after a look of at most PAUSE.

    A line is said for each job that has started, and it leaves `silent`.
    """
    left = PAUSE if until is None else min(PAUSE, max(0, until - time.monotonic()))
    ready, _ = ray.wait(list(running), timeout=left) if running else ([], [])
    for result, job in list(silent.items()):
        if log_size(job.log) > job.log_before:
            say(started(silent.pop(result)))
    return ready


def log_size(log):
    """Bytes of a log, 0 where there is none."""
    return log.stat().st_size if log.exists() else 0


@contextlib.contextmanager
def _connected(ray, address):
    """Ray, started here or joined at an `address`.

    Without one Ray itself would join whatever cluster runs on this machine, another sweep's too.
    """
    address = address or os.environ.get("RAY_ADDRESS")
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
        ray.init(address or "local", log_to_driver=False, logging_level="error", **local)
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
        return -9  # as by SIGKILL, which Windows does not name


LAUNCHERS = {"ray": with_ray, "serial": in_order}
