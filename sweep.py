"""Run a grid of attacks, defenses and detectors: skip what is done, resume what was interrupted.

    python sweep.py config/sweep/demo.yaml --dry_run
    python sweep.py config/sweep/demo.yaml
    python sweep.py config/sweep/demo.yaml --engine serial --minutes 50 -- --dataset_path ~/data

Every run is the command that you would type, and leaves the record that it would leave. What it
prints goes to record/.sweep/. A run that fails stops nothing but its own defenses.

With --results FILE.csv the row of every run goes into a table as soon as the run is done. A run
that the table has is not repeated, even if its record is gone: the sweep can go on with an empty
folder, or on another machine. With --minutes the sweep stops in time; runs under way leave a
checkpoint, and the same command goes on.

Options after -- are for every script. docs/sweeps.md says how to write a grid and how to use a
cluster.

Exit codes: 0 all runs are done, 1 some failed, 2 usage, 3 no such grid, 124 the --minutes are over,
130 and 143 interrupted. After 124, 130 and 143 the same command goes on.
"""

import argparse
import collections
import contextlib
import csv
import functools
import hashlib
import json
import os
import shlex
import sys
import time
from pathlib import Path

from antidote_bench.utils import files, parsing
from antidote_bench.utils.errors import ConfigError, UserError
from antidote_bench.utils.launch import guard
from antidote_bench.utils.record import folder, measures
from antidote_bench.utils.sweep import grid, launchers
from antidote_bench.utils.text import printable

UNREADABLE = (  # what damaged results of a run raise
    UserError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    csv.Error,
)
FINISHED = (folder.DONE, grid.RECORDED)
PLACES = {"cache_path", "dataset_path", "record_path"}  # options that no table of results keeps
FACTS = ("trigger_seconds",)  # what a table keeps of record.json, beside the command
TAIL = 5  # lines of a failed run's log that are shown


def sweep(options, rest):
    """Run the grid, or only list its runs.

    Raises UserError (exit 1) if some runs are not done in the end or results cannot be read, and
    TimeIsUp (exit 124) if the minutes are over before that.
    """
    until = _deadline(options.minutes)
    records = options.record_path
    cells = grid.cells(grid.read(options.grid), _for_all(rest))
    grid.check(cells, records)
    states = _states(cells, options)
    if options.dry_run:
        return _plan(cells, states, records)
    damaged = []
    if options.results:
        done = [cell for cell in cells if states[cell.path] == folder.DONE]
        damaged += _collect(options.results, done, records)
    jobs = _jobs(cells, states, options)
    print(f"{_count(states)}; {len(jobs)} to run", flush=True)
    try:
        damaged += _run(jobs, cells, options, until)
    except launchers.TimeIsUp:
        print(_count(_states(cells, options)))
        raise
    _report(cells, options)
    if damaged:
        raise UserError(
            f"the results of {len(damaged)} runs cannot be read: delete the folders named above, "
            "and the same command makes them again"
        )


def _run(jobs, cells, options, until):
    """Run all jobs; print a line for each, and put its results into the table.

    Returns the names of the runs whose results cannot be read.
    """
    damaged = []
    by_name = {str(cell.path): cell for cell in cells}
    launcher = launchers.LAUNCHERS[options.engine]
    say = functools.partial(print, flush=True)
    where = {"address": options.address, "cpus": options.cpus, "gpus": options.gpus}
    # closing: an error here stops the runs under way at once
    with contextlib.closing(launcher(jobs, until=until, say=say, **where)) as ended:
        for number, (job, code) in enumerate(ended, 1):
            say(f"[{number}/{len(jobs)}] {job.name}: {_outcome(job, code)}")
            if options.results and code == 0:
                damaged += _collect_done(by_name[job.name], options)
    return damaged


def _deadline(minutes):
    """When to stop, on the clock of time.monotonic; None if `minutes` is None."""
    if minutes is None:
        return None
    if not minutes >= 0:
        raise ConfigError("--minutes must be 0 or more")
    return time.monotonic() + 60 * minutes


def _states(cells, options):
    """{path of a run: its state}."""
    states = grid.states(cells, options.record_path)
    if not options.results:
        return states
    return _with_results(options.results, cells, states, options.record_path)


def _with_results(path, cells, states, records):
    """`states`, where the runs that the table at `path` has are RECORDED.

    A victim is RECORDED only if the table has all of its defenses.
    """
    rows = {row["run"]: row for row in _rows(path)}
    needed = {
        cell.victim.path
        for cell in cells
        if cell.victim and str(cell.path) not in rows and states[cell.path] != folder.DONE
    }
    recorded = {cell.path for cell in cells if str(cell.path) in rows and cell.path not in needed}
    _refuse_other_data(path, rows, [cell for cell in cells if cell.path in recorded], records)
    return {
        run: grid.RECORDED if run in recorded and state != folder.DONE else state
        for run, state in states.items()
    }


def _refuse_other_data(path, rows, cells, records):
    """ConfigError if a row of the table is of other data than the command of its run names."""
    for run, prints in grid.fingerprints(cells, records).items():
        mark = rows[str(run)].get("data_fingerprint")
        if mark and mark != _mark(prints):
            raise ConfigError(
                f"--results {path} has the results of {run} on other data than --dataset_path "
                "names now: name another file"
            )


def _rows(path):
    """The rows of a table of results, none if there is no table yet.

    Raises ConfigError if it is another kind of file.
    """
    try:
        rows = files.read_csv(path) if path.exists() else []
    except (OSError, ValueError, csv.Error) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"--results {path} cannot be read: {why}; name another file") from error
    if not all(row.get("run") for row in rows):
        raise ConfigError(
            f"--results {path} is no table of a sweep's results: it has no column run; "
            "name another file"
        )
    return rows


def _collect_done(cell, options):
    """`_collect` for a run that has just ended; one with other options is not taken for it."""
    records = options.record_path
    is_done = grid.states([cell], records)[cell.path] == folder.DONE
    return _collect(options.results, [cell], records) if is_done else []


def _collect(path, cells, records):
    """Put the results of finished runs into the table at `path`, in place of their older rows.

    Returns the names of those whose results cannot be read, after a sentence on each.
    """
    new, damaged = {}, []
    for cell in cells:
        try:
            new[str(cell.path)] = _row(cell, records)
        except UNREADABLE as error:
            damaged.append((cell, error))
    for cell, error in damaged:
        print(f"warning: {_why_damaged(records / cell.path, error)}", file=sys.stderr)
    # The lock is beside the table: another sweep may have other records.
    with files.locked(path.with_suffix(".lock")):
        kept = [row for row in _rows(path) if row["run"] not in new]
        rows = [*kept, *new.values()]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        if new:
            files.write(path, files.csv_text(rows, columns))
    return [str(cell.path) for cell, _ in damaged]


def _why_damaged(place, error):
    """A sentence on the run in `place`, whose results raised `error`."""
    why = f"{type(error).__name__}: " if not isinstance(error, UserError) else ""
    text = " ".join(str(error).split())[:200]
    return f"the results of {place} cannot be read ({why}{text}); the table does not get them"


def _row(cell, records):
    """The row of a finished run: its name, its results, its command and what its trigger took."""
    place = records / cell.path
    info = json.loads((place / folder.RECORD).read_text())
    folder.read_checked(place, folder.RESULTS, info)
    results = folder.read_results(place)
    float(results["acc"])  # a ValueError where it is none
    return {
        "run": str(cell.path),
        **results,
        **measures.read(place, info["files"].get(folder.WEIGHTS))[0],
        "command": _without_places(info["command"]),
        **{name: info[name] for name in FACTS if name in info},
        **_data_fingerprint(info),
    }


def _data_fingerprint(info):
    """The mark of a victim's data set, by which compare.py tells two of one name apart."""
    facts = info.get("data")
    prints = facts.get("fingerprint") if isinstance(facts, dict) else None
    if not prints:
        return {}
    return {"data_fingerprint": _mark(prints)}


def _mark(prints):
    return hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()[:12]


def _without_places(command):
    """A command without the options that say where files lie on this machine."""
    first, given = parsing.taken_apart(command)
    kept = {name: value for name, value in given.items() if name not in PLACES}
    return shlex.join([*first, *parsing.words(kept)])


def _jobs(cells, states, options):
    """What there is to run.

    The defenses of a victim that failed before, and is not tried again, are left out.
    """
    jobs = {}
    place = Path.cwd()  # on other machines the paths start elsewhere
    for cell in cells:
        state = states[cell.path]
        after = cell.victim and str(cell.victim.path)
        has_victim = not after or after in jobs or states[cell.victim.path] in FINISHED
        skipped = state == grid.FAILED and not options.retry_failed
        if state in FINISHED or skipped or not has_victim:
            continue
        log = place / options.record_path / cell.log
        jobs[str(cell.path)] = launchers.Job(
            name=str(cell.path),
            words=cell.words(options.record_path),
            folder=place / options.record_path / cell.path,
            log=log,
            place=place,
            after=after if after in jobs else None,
            written_before=folder.written(options.record_path / cell.path),
            log_before=launchers.log_size(log),
        )
    return list(jobs.values())


def _outcome(job, code):
    """A line on how a job ended."""
    if code is None:
        return "not run, because its victim is not done"
    if code:
        return f"failed with exit code {code}: {_last_lines(job.log)}"
    # the line that every script ends with
    return "".join(_printed(job.log)[-1:]) or "done by another process"


def _printed(log):
    """The lines that the scripts have printed into a log."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return [printable(line) for line in lines if not line.startswith("# ")]


def _last_lines(log):
    """The path of a log, and the end of what the script printed, indented."""
    return "\n".join([os.path.relpath(log), *(f"    {line}" for line in _printed(log)[-TAIL:])])


def _report(cells, options):
    """Print the counts; if not all is done, print what failed and raise UserError."""
    states = _states(cells, options)
    print(_count(states))
    if all(state in FINISHED for state in states.values()):
        return
    for cell in cells:
        if states[cell.path] in (grid.FAILED, grid.OTHER):
            print(f"failed: {cell.path}: {_last_lines(options.record_path / cell.log)}")
    raise UserError(
        "not all runs are done; --retry_failed tries the failed ones again, the others start with "
        "the same command"
    )


def _plan(cells, states, records):
    """Print the state, the folder and the command of every run."""
    for cell in cells:
        run = f"{records / cell.path}  {cell.command(records)}"
        print(f"{states[cell.path]:8} {printable(run)}")
    count = collections.Counter(cell.kind for cell in cells)
    repairs = f"{count['defense']} defenses"
    if count["detection"]:
        repairs = f"{repairs} and {count['detection']} detections"
    print(f"{_count(states)}: {count['attack']} attacks and {repairs}")


def _count(states):
    """How many runs there are in each state."""
    counts = collections.Counter(states.values())
    words = ", ".join(f"{counts[name]} {name}" for name in grid.STATES if counts[name])
    return f"{len(states)} runs: {words}"


def _for_all(words):
    """{option: value} of the words after --, which are options of every script."""
    try:
        return parsing.pairs(words)
    except ValueError as error:
        raise ConfigError(
            f"after -- come pairs of --option and value, and this is {' '.join(words)!r}"
        ) from error


def _parser():
    idea, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        description=idea,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("grid", metavar="GRID.yaml", help="the grid; config/sweep holds some")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="list every run with its state, folder and command, and do nothing",
    )
    parser.add_argument("--retry_failed", action="store_true", help="run again what failed before")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="stop after M minutes; the same command goes on"
    )
    parser.add_argument(
        "--record_path",
        type=Path,
        default=Path("record"),
        help="folder that holds the records (default: record)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE.csv",
        help="add the results of every run to this table, and skip what it has",
    )
    _add_launcher_options(parser)
    return parser


def _add_launcher_options(parser):
    parser.add_argument(
        "--engine",
        choices=list(launchers.LAUNCHERS),
        default="ray",
        help="ray: many runs at once, here or on a cluster; serial: one after the other "
        "(default: ray)",
    )
    parser.add_argument(
        "--address",
        help="of a running Ray cluster (auto: the one that this machine belongs to); by default, "
        "and without RAY_ADDRESS, one is started here",
    )
    parser.add_argument("--cpus", type=float, default=1, help="CPU cores per run (default: 1)")
    parser.add_argument(
        "--gpus",
        type=float,
        help="GPUs per run, 0.5 lets two runs share one (default: 1 where there are GPUs)",
    )


def main(argv):
    """Run with command line arguments; returns the exit code."""
    words, rest = _split(argv)
    options = _parser().parse_args(words)
    return guard(lambda: sweep(options, rest))


def _split(argv):
    """(words before --, words after it)."""
    place = argv.index("--") if "--" in argv else len(argv)
    return argv[:place], argv[place + 1 :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
