"""How a script starts and how it ends: options first, one sentence per error, and the exit codes.

0 done; 1 the run failed; 2 usage; 3 a data set or record is missing; 4 a record is refused; 130 and
143 interrupted.
"""

import errno
import importlib
import io
import os
import signal
import sys
import traceback
from pathlib import Path

from antidote_bench.utils import config, parsing
from antidote_bench.utils.errors import ConfigError, UserError, is_out_of_memory
from antidote_bench.utils.text import cut

LONGEST = 1500  # characters of a message


def launch(Config):
    """Parse the options of the running script and call its `main(options)`; never returns.

    It stands above the script's heavy imports: help and mistakes answer before torch is loaded. The
    script is then imported as a module, `attack.badnet` say, whichever way it was started.
    """
    script = Path(sys.modules["__main__"].__file__).resolve()
    description = sys.modules["__main__"].__doc__

    def work():
        if script.parents[1] != config.ROOT:
            raise ConfigError(
                f"{script} would run with the utils/ of another checkout, {config.ROOT}; "
                f"start it from its own root with python -m {script.parent.name}.{script.stem}"
            )
        options = parsing.parse(
            Config, sys.argv[1:], description, f"{script.parent.name}/{script.name}"
        )
        module = importlib.import_module(f"antidote_bench.{script.parent.name}.{script.stem}")
        obey_signals()
        module.main(options)

    leave(guard(work, debug="--debug" in sys.argv, Config=Config))


def leave(code):
    """End this process with the exit code; never returns."""
    # under torchrun threads of gloo may outlive the interpreter, which then aborts a finished run
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def guard(work, *, debug=False, Config=None):
    """Call work() and return the exit code; what went wrong is one sentence on stderr.

    `Config` is the class of the script's options, of which a message may name some.
    """
    outlive_readers()
    stopper = _listen()
    try:
        work()
    except KeyboardInterrupt:
        return _say(*_interrupted(signal.SIGINT))
    except Exception as error:  # the outermost frame: every error ends in one sentence and a code
        if debug:
            traceback.print_exc()
        # a signal that came while a library read a file may look like a damaged file
        return _say(*(_interrupted(stopper.number) if stopper.number else _explain(error, Config)))
    except SystemExit:
        if stopper.number:  # whatever the code: Ray puts another in place of ours
            return _say(*_interrupted(stopper.number))
        raise
    return 0


class _Stopper:
    """Ends the script when a signal comes, and remembers which one."""

    number = None

    def __call__(self, number, frame):
        self.number = number
        self.stop()

    def stop(self):
        """Raise what ends the script, if a signal has come."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number:
            sys.exit(143)


def _listen():
    """The new handler of SIGTERM, and of SIGINT (Ctrl-C) unless the script was started without it,
    as shells do in the background."""
    stopper = _Stopper()
    signal.signal(signal.SIGTERM, stopper)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stopper)
    elif sys.stderr.isatty():
        print(
            f"Ctrl-C is off, as the shell has asked for: kill {os.getpid()} ends this run",
            file=sys.stderr,
        )
    return stopper


def obey_signals():
    """End the script where a signal has come whose exception was swallowed, by an import say."""
    stopper = signal.getsignal(signal.SIGTERM)
    if isinstance(stopper, _Stopper):
        stopper.stop()


class _Pipe(io.FileIO):
    """An output whose reader may leave, as `head` does: what comes then is dropped."""

    def write(self, content):
        try:
            return super().write(content)
        except BrokenPipeError:
            return len(content)


def outlive_readers():
    """Go on when nobody reads stdout or stderr any more; the exit code stays what it would be."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # what a test or a notebook has put in its place is no pipe
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        pipe = _Pipe(stream.fileno(), "w", closefd=False)
        unbuffered = isinstance(stream.buffer, io.RawIOBase)  # python -u
        quiet = io.TextIOWrapper(
            pipe if unbuffered else io.BufferedWriter(pipe),
            encoding=stream.encoding,
            errors="backslashreplace" if stream.errors == "strict" else stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, quiet)


def _interrupted(number):
    word, code = ("interrupted", 130) if number == signal.SIGINT else ("terminated", 143)
    return f"{word}; the same command resumes after the last finished epoch", code


def _explain(error, Config=None):
    """(sentence, exit code) for an exception."""
    kind, text = type(error).__name__, str(error)
    if isinstance(error, UserError):
        return text, error.code
    if is_out_of_memory(error):
        return _out_of_memory(error, Config), 1
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        why = text.split(" Set TORCH")[0][:200]  # what follows are hints for those who debug torch
        return f"torch.compile failed and needs a C++ compiler ({why}); --compile none avoids it", 1
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        what = error.filename or "cannot write"
        return f"the disk is full: {what}; make room and run the same command again", 1
    if isinstance(error, OSError) and error.filename:
        where = "--record_path and --cache_path choose other places"
        return f"{error.filename}: {error.strerror}; {where}", 1
    return f"unexpected {kind}: {text}; --debug shows where", 1


def _out_of_memory(error, Config):
    """What helps: it depends on what was done when memory ran out."""
    modules = {
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    }
    if any(name.startswith("antidote_bench.utils.record.") for name in modules):
        return "out of memory while a record was read or written: this takes more free memory"
    known = getattr(Config, "__dataclass_fields__", ())
    if modules & {f"antidote_bench.utils.data.{name}" for name in ("dataset", "sources", "images")}:
        remedy = ": --resident_gb 0 leaves its images in a file" if "resident_gb" in known else ""
        return f"out of memory while the data set was read{remedy}"
    remedies = [f"lower --{name}" for name in known if "batch" in name]
    remedies += [f"choose a smaller --{name}" for name in ("model", "image_size") if name in known]
    if not remedies:
        return "out of memory: this takes more free memory"
    return f"out of memory: {' or '.join(remedies)}"


def _say(sentence, code):
    sentence = cut(sentence, LONGEST)  # it may quote a file or a name
    print(f"error: {sentence}" if code < 100 else sentence, file=sys.stderr)
    return code
