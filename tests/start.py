"""Start a script as `python FILE ...` or `python -m MODULE ...` does, in a process forked from one
that has torch loaded already.

Loading it takes two seconds, and the tests start hundreds of scripts.
"""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",  # the first optimizer of a process loads it
        "torchvision",
        "torchvision.transforms.v2",
        "pandas",
        "jsonargparse",
        "docstring_parser",
        "attrs",
        "safetensors.torch",
        "sklearn.cluster",
        "sklearn.datasets",
        "sklearn.decomposition",
        "sklearn.metrics",
        "scipy.stats",
        "matplotlib.backends.backend_agg",
        "matplotlib.pyplot",
        "yaml",
        "tests.start",
    ]
)


def start(words, *, cwd, env, forks=False):
    """What subprocess.run would return for `python WORDS...`, output captured as text; `env` is
    added to the environment. With `forks` a sweep forks its runs, and torch is loaded there too."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("out", "err")]
        process = _process(words, cwd, env, said, forks)
        process.join()
        return subprocess.CompletedProcess(
            words, process.exitcode, *(path.read_text() for path in said)
        )


@contextlib.contextmanager
def running(words, *, cwd, env):
    """(process, file) of `python WORDS...` that has just been started, with what it says on stderr
    in the file; what is left of it at the end is killed."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("out", "err")]
        process = _process(words, cwd, env, said)
        try:
            yield process, said[1]
        finally:
            process.kill()
            process.join()


def _process(words, cwd, env, said, forks=False):
    for path in said:
        path.touch()
    process = SERVER.Process(target=_run, args=(words, str(cwd), env, said, forks))
    process.start()
    return process


def _run(words, cwd, env, said, forks):
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    run_script(words, cwd, env, forks)


def run_script(words, cwd, env, forks=False):
    """Do in this process what `python WORDS...` does."""
    os.chdir(cwd)
    os.environ.update(env)
    module = words[0] == "-m"
    sys.argv = words[1:] if module else words
    sys.path[0] = cwd if module else str(Path(words[0]).resolve().parent)
    if forks:
        from antidote_bench.utils.sweep import launchers

        launchers.subprocess = SimpleNamespace(Popen=Fork, DEVNULL=subprocess.DEVNULL)
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Fork:
    """Takes the place of subprocess.Popen where a sweep starts a run: a fork of the sweep."""

    def __init__(self, words, *, cwd, env, stdin, stdout, stderr, preexec_fn):
        assert (words[0], stdin, stdout) == (sys.executable, subprocess.DEVNULL, stderr)
        task = (words[1:], str(cwd), env, stdout, preexec_fn)
        self._process = multiprocessing.get_context("fork").Process(target=self._work, args=task)
        self._process.start()

    @staticmethod
    def _work(words, cwd, env, log, preexec_fn):
        preexec_fn()
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        os.environ.clear()
        run_script(words, cwd, env)

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self):
        self._process.join()

    def terminate(self):
        self._process.terminate()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()
