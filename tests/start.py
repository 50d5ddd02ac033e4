"""Start a script as `python FILE ...` or `python -m MODULE ...` does, in a process forked from one
that has torch loaded already.

Loading it takes two seconds, and the tests start hundreds of scripts.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",  # the first optimizer of a process loads it
        "torchvision",
        "pandas",
        "jsonargparse",
        "safetensors.torch",
        "sklearn.datasets",
        "sklearn.metrics",
        "scipy.stats",
        "matplotlib.pyplot",
        "yaml",
        "tests.start",
    ]
)


def start(words, *, cwd, env):
    """What subprocess.run would return for `python WORDS...`, output captured as text; `env` is
    added to the environment."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("out", "err")]
        process = SERVER.Process(target=_run, args=(words, str(cwd), env, said))
        process.start()
        process.join()
        return subprocess.CompletedProcess(
            words, process.exitcode, *(path.read_text() if path.exists() else "" for path in said)
        )


def _run(words, cwd, env, said):
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    run_script(words, cwd, env)


def run_script(words, cwd, env):
    """Do in this process what `python WORDS...` does."""
    os.chdir(cwd)
    os.environ.update(env)
    module = words[0] == "-m"
    sys.argv = words[1:] if module else words
    sys.path[0] = cwd if module else str(Path(words[0]).resolve().parent)
    try:
        if module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
