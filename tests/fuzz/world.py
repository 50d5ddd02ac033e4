"""Runs code of a script in this process and reports all that a user must never see."""

import contextlib
import io
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from antidote_bench.utils.launch import guard

SECONDS = 60  # after which a call counts as hanging
LONGEST = 2000  # characters of an error message
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# audit events of file operations, and which of their arguments are paths that change
CHANGES = {
    "os.mkdir": [0],
    "os.rename": [0, 1],
    "os.remove": [0],
    "os.rmdir": [0],
    "os.link": [1],
    "os.symlink": [1],
    "os.truncate": [0],
    "os.chmod": [0],
    "os.utime": [0],
}
FOLDERS = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1}  # where they name the folder's descriptor
PROGRAMS = {"os.system", "os.exec", "os.posix_spawn", "os.startfile", "subprocess.Popen"}
OTHER = {"socket.connect", "webbrowser.open", "pickle.find_class", "urllib.Request"}
USED = {"git"}  # programs that the scripts themselves start


class Hang(BaseException):
    """A call took longer than SECONDS; no `except Exception` swallows it."""


class Watch:
    """Remembers what happened outside of the folders in which something may be written."""

    def __init__(self, allowed, secret=None):
        self.allowed = [os.path.realpath(path) for path in allowed]
        self.secret = secret and os.path.realpath(secret)
        self.seen = []
        self.thread = threading.get_ident()

    def see(self, event, args):
        if event == "open":
            self._see_open(*args)
        elif event in CHANGES:
            descriptor = args[FOLDERS[event]] if event in FOLDERS else -1
            for number in CHANGES[event]:
                self._require_inside(event, args[number], descriptor)
        elif event in PROGRAMS:
            program = args[0][0] if isinstance(args[0], list | tuple) else args[0]
            if os.fsdecode(program) not in USED:
                self.seen.append(f"{event} {os.fsdecode(program)[:100]!r}")
        elif event in OTHER:
            self.seen.append(f"{event} {str(args)[:200]}")

    def _see_open(self, path, mode, flags):
        if not isinstance(path, str | bytes) or threading.get_ident() != self.thread:
            return
        if flags & WRITING:
            self._require_inside("open", path)
        elif self.secret and os.path.realpath(os.fsdecode(path)).startswith(self.secret):
            self.seen.append(f"reads {os.fsdecode(path)!r}, which lies outside")

    def _require_inside(self, event, path, descriptor=-1):
        if isinstance(path, int):
            return
        path = os.fsdecode(path)
        if descriptor is not None and descriptor >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
        folder, name = os.path.split(os.path.abspath(path))
        real = os.path.join(os.path.realpath(folder), name)
        ours = real.startswith(
            os.path.join(tempfile.gettempdir(), "torchinductor_")
        )  # torch itself
        inside = ours or any(real == top or real.startswith(top + os.sep) for top in self.allowed)
        if not inside and "__pycache__" not in real and not real.startswith(("/dev/", "/proc/")):
            self.seen.append(f"{event} changes {real!r}, which lies outside")


_watches = []  # the one that is on, if any: a hook cannot be taken away again


def _hook(event, args):
    if _watches and (event == "open" or event in CHANGES or event in PROGRAMS or event in OTHER):
        watch = _watches.pop()  # what it does itself is not seen
        try:
            watch.see(event, args)
        finally:
            _watches.append(watch)


@contextlib.contextmanager
def watching(allowed, secret=None):
    if not getattr(sys, "_antidote_watched", False):
        sys.addaudithook(_hook)
        sys._antidote_watched = True
    watch = Watch(allowed, secret)
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)


@contextlib.contextmanager
def limited(seconds):
    """Raise Hang where the body takes longer; it must run in the main thread."""

    def ring(number, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Done:
    """How a call ended: its exit code (None: it did not end) and what it printed."""

    def __init__(self):
        self.code = None
        self.out = self.err = ""
        self.faults = []


def run(work, *, allowed, codes, secret=None, guarded=True):
    """Call work() as a script would, and return the `Done`, whose `faults` say what is wrong.

    `codes` are the exit codes that may be, `allowed` the folders in which files may change, and
    nothing below `secret` may be read.
    """
    done, handlers = Done(), {number: signal.getsignal(number) for number in (2, 15)}
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for _ in range(2)]
    begun = time.monotonic()
    try:
        with (
            watching(allowed, secret) as watch,
            contextlib.redirect_stdout(streams[0]),
            contextlib.redirect_stderr(streams[1]),
            limited(SECONDS),
        ):
            done.code = guard(work) if guarded else work()
    except Hang:
        done.faults.append(f"hangs: not done after {SECONDS} s")
    except SystemExit as end:
        done.code = end.code
    except Exception as error:  # whatever it is, it would have been a traceback
        done.faults.append(f"traceback: {type(error).__name__}: {str(error)[:200]}")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    done.out, done.err = (stream.buffer.getvalue() for stream in map(_flushed, streams))
    done.out, done.err = done.out.decode("utf-8"), done.err.decode("utf-8")
    done.seconds = time.monotonic() - begun
    done.faults += [*watch.seen, *wrong_ending(done, codes)]
    return done


def _flushed(stream):
    stream.flush()
    return stream


def wrong_ending(done, codes):
    """What is wrong with the exit code and the messages of a call."""
    if done.code is not None and done.code not in codes:
        yield f"exit code {done.code}: {done.err[-300:]!r}"
    for word in ("unexpected", "Traceback", "out of memory", "jsonargparse"):
        if word in done.err:
            yield f"says {word!r}: {done.err[-300:]!r}"
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    if done.code and done.code < 100 and len(errors) != 1:
        yield f"{len(errors)} lines begin with error: {done.err[-300:]!r}"
    if max(map(len, errors), default=0) > LONGEST:
        yield f"an error of {max(map(len, errors))} characters: {errors[0][:200]!r}"
    for text in (done.out, done.err):
        if letters := {letter for letter in text if not letter.isprintable()} - {"\n"}:
            yield f"prints {sorted(letters)!r}: {_around(text, letters)!r}"


def _around(text, letters):
    place = next(number for number, letter in enumerate(text) if letter in letters)
    return text[max(place - 60, 0) : place + 20]


@contextlib.contextmanager
def inside(folder):
    """The current folder is `folder` inside."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield Path(folder)
    finally:
        os.chdir(before)
