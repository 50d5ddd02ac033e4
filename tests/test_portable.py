"""What Windows lacks is not needed: modules of Unix are hidden, and scripts start all the same."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT

# msvcrt as far as it is used, with the lock of this system behind it; what comes with Python and
# torch's own modules may go on using what is hidden from ours
HIDDEN = """
import builtins, fcntl, subprocess, sys, types
real, msvcrt, usual = fcntl, types.ModuleType("msvcrt"), builtins.__import__
msvcrt.LK_NBLCK = 2
def locking(number, mode, count):
    assert (mode, count) == (2, 1)
    real.flock(number, real.LOCK_EX | real.LOCK_NB)
msvcrt.locking = locking
sys.modules["msvcrt"] = msvcrt
def imported(name, globals=None, *rest, **named):
    by = str((globals or {}).get("__name__"))
    if name in ("fcntl", "resource") and by.startswith("antidote_"):
        raise ImportError(name)
    return usual(name, globals, *rest, **named)
builtins.__import__ = imported
"""


def python(code, *arguments):
    command = [sys.executable, "-c", HIDDEN + code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_scripts_start_and_know_their_memory():
    code = """
import runpy, torch
sys.argv = ["attack/badnet.py", "--dry_run"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
from antidote_bench.utils import device
assert 10 < device.name_and_peak(torch.device("cpu"))[1] < 10**5
"""
    done = python(code)
    assert done.returncode == 0 and "poisons  130 of 1297" in done.stdout, done.stderr


def test_compare_and_sweep_start():
    done = python("import compare, sweep\ncompare.main(['nowhere'])\n")
    assert done.returncode == 0 and "error: no run at or below nowhere" in done.stderr


@pytest.mark.parametrize("function", ["owned", "locked"])
def test_a_lock_holds_and_dies_with_its_process(function, tmp_path):
    code = f"""
import os, subprocess, threading, time
from antidote_bench.utils import files
path = sys.argv[1]
child = \"\"\"
import sys, time
from antidote_bench.utils import files
with files.{function}(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
\"\"\"
holder = subprocess.Popen([sys.executable, "-c", child, path], stdout=subprocess.PIPE, text=True)
assert holder.stdout.readline() == "held\\n"
begun = time.monotonic()
if {function!r} == "owned":
    try:
        with files.owned(path):
            raise SystemExit("it was held")
    except BlockingIOError:
        pass
    holder.kill()
    holder.wait()
else:
    threading.Timer(0.5, holder.kill).start()
with files.{function}(path):
    assert {function!r} == "owned" or time.monotonic() - begun > 0.4
assert os.path.exists(path) == ({function!r} == "locked")
"""
    done = python(code, tmp_path / "lock")
    assert done.returncode == 0, done.stderr
