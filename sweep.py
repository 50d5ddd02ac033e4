"""Run a grid of attacks and defenses: what is done is skipped, what was interrupted goes on, what fails does not stop the rest.

    python sweep.py config/sweep/demo.yaml --dry_run
    python sweep.py config/sweep/demo.yaml
    python sweep.py config/sweep/demo.yaml --engine serial -- --dataset_path ~/data

Every run is the command that you would type, and leaves the record that it would leave; its output goes to record/.sweep/.
With --results FILE.csv the results of every run are added to a table of rows as soon as it is done, and a run that the table has
already is not repeated, even where its record is gone: the sweep can go on with an empty folder, or on another machine.
Options after -- are for every script. config/sweep/README.md says how a grid is written, and how to use a cluster.

Exit codes: 0 all runs are done, 1 some failed, 2 usage, 3 no such grid, 130 and 143 interrupted: the same command goes on.
"""

import argparse
import collections
import csv
import json
import os
import shlex
import sys
from pathlib import Path

from utils import engines, files, grid
from utils.errors import ConfigError, UserError
from utils.launch import guard

PLACES = {"cache_path", "dataset_path", "record_path"}  # options that no table of results keeps
TAIL = 5  # lines of a failed run's log that are shown


def sweep(options, rest):
    """Run the grid, or only say what would be run; UserError (exit 1) where not all of it is done in the end."""
    records = options.record_path
    cells = grid.cells(grid.read(options.grid), _pairs(rest))
    grid.check(cells, records)
    states = {cell.path: grid.state(cell, records) for cell in cells}
    if options.results:
        states = _with_results(options.results, cells, states)
    if options.dry_run:
        return _plan(cells, states, records)
    if options.results:
        _collect(options.results, [cell for cell in cells if states[cell.path] == "done"], records)
    jobs = _jobs(cells, states, options)
    print(f"{_count(states)}; {len(jobs)} to run", flush=True)
    by_name = {str(cell.path): cell for cell in cells}
    work = engines.ENGINES[options.engine](jobs, address=options.address, cpus=options.cpus, gpus=options.gpus)
    for number, (job, code) in enumerate(work, 1):
        print(f"[{number}/{len(jobs)}] {job.name}: {_outcome(job, code)}", flush=True)
        if options.results and code == 0:
            _collect(options.results, [by_name[job.name]], records)
    _report(cells, options)


def _with_results(path, cells, states):
    """`states`, in which a run that the table at `path` has is recorded; a victim only where none of its defenses is missing."""
    rows = {row["run"] for row in _rows(path)}
    lacking = {cell.victim.path for cell in cells if cell.victim and str(cell.path) not in rows and states[cell.path] != "done"}
    spared = {cell.path for cell in cells if str(cell.path) in rows and cell.path not in lacking}
    return {run: "recorded" if run in spared and state != "done" else state for run, state in states.items()}


def _rows(path):
    """The rows of a table of results, none where there is no table yet; ConfigError where it is another kind of file."""
    try:
        rows = files.read_csv(path) if path.exists() else []
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"--results {path} cannot be read: {' '.join(str(error).split())}") from error
    if not all(row.get("run") for row in rows):
        raise ConfigError(f"--results {path} is no table of a sweep's results: it has no column run; name another file")
    return rows


def _collect(path, cells, records):
    """Put the results of finished runs into the table at `path`, in place of older rows of the same runs."""
    found = {}
    for cell in cells:
        (row,) = files.read_csv(records / cell.path / "results.csv")
        told = json.loads((records / cell.path / "record.json").read_text())["command"]
        found[str(cell.path)] = {"run": str(cell.path), **row, "command": _anywhere(told)}
    with files.locked(path.with_suffix(".lock")):  # beside the table: another sweep may have other records
        kept = [row for row in _rows(path) if row["run"] not in found]
        rows = [*kept, *found.values()]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        if found:
            files.write(path, files.csv_text(rows, columns))


def _anywhere(command):
    """A command without the options that say where things lie on this machine."""
    words = shlex.split(command)
    pairs = [pair for pair in zip(words[2::2], words[3::2], strict=False) if pair[0][2:] not in PLACES]
    return shlex.join([*words[:2], *(word for pair in pairs for word in pair)])


def _jobs(cells, states, options):
    """What there is to run; not the defenses of a victim that failed before and is not tried again."""
    jobs, place = {}, Path.cwd()  # on other machines the paths start elsewhere
    for cell in cells:
        known, after = states[cell.path], cell.victim and str(cell.victim.path)
        lost = after and after not in jobs and states[cell.victim.path] not in ("done", "recorded")
        if known in ("done", "recorded") or lost or known == "failed" and not options.retry_failed:
            continue
        jobs[str(cell.path)] = engines.Job(
            str(cell.path), cell.words(options.record_path), place / options.record_path / cell.path, place / options.record_path / cell.log,
            place, after if after in jobs else None, engines.written(options.record_path / cell.path),
        )  # fmt: skip
    return list(jobs.values())


def _outcome(job, code):
    """A line on how a job ended."""
    if code is None:
        return "not run, because its victim is not done"
    if code:
        return f"failed with exit code {code}: {_last_lines(job.log)}"
    return "".join(_printed(job.log)[-1:])  # the line that every script ends with


def _printed(log):
    """The lines that the scripts have printed into a log."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return [line for line in lines if not line.startswith("# ")]


def _last_lines(log):
    """The end of what a script printed, indented, and where all of it is."""
    return "\n".join([os.path.relpath(log), *(f"    {line}" for line in _printed(log)[-TAIL:])])


def _report(cells, options):
    """Print the counts and, where not all is done, what failed before and what waits for it."""
    records = options.record_path
    states = {cell.path: grid.state(cell, records) for cell in cells}
    if options.results:
        states = _with_results(options.results, cells, states)
    print(_count(states))
    if all(state in ("done", "recorded") for state in states.values()):
        return
    for cell in cells:
        if states[cell.path] in ("failed", "other"):
            print(f"failed: {cell.path}: {_last_lines(records / cell.log)}")
    raise UserError("not all runs are done; --retry_failed tries the failed ones again, the others start with the same command")


def _plan(cells, states, records):
    for cell in cells:
        print(f"{states[cell.path]:8} {records / cell.path}  {cell.command(records)}")
    attacks = sum(cell.victim is None for cell in cells)
    print(f"{_count(states)}: {attacks} attacks and {len(cells) - attacks} defenses")


def _count(states):
    """How many runs there are, and in which state."""
    found = collections.Counter(states.values())
    return f"{len(states)} runs: " + ", ".join(f"{found[name]} {name}" for name in grid.STATES if found[name])


def _pairs(words):
    """The options after --, by name."""
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise ConfigError(f"after -- come pairs of --option and value, and this is {' '.join(words)!r}")
    return {word[2:]: value for word, value in zip(words[::2], words[1::2], strict=True)}


def main(argv):
    """Run with command line arguments; returns the exit code."""
    idea, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="sweep.py", description=idea, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", metavar="GRID.yaml", help="the grid, see config/sweep/README.md")
    parser.add_argument("--dry_run", action="store_true", help="list every run with its state, folder and command, and do nothing")
    parser.add_argument("--retry_failed", action="store_true", help="run again what failed before")
    parser.add_argument("--record_path", type=Path, default=Path("record"), help="folder that holds the records (default: record)")
    parser.add_argument("--results", type=Path, metavar="FILE.csv", help="add the results of every run to this table, and skip what it has")
    parser.add_argument("--engine", choices=list(engines.ENGINES), default="ray",
                        help="ray: many runs at once, here or on a cluster; serial: one after the other (default: ray)")  # fmt: skip
    parser.add_argument(
        "--address", help="of a running Ray cluster (auto: the one that this machine belongs to); by default one is started here"
    )
    parser.add_argument("--cpus", type=float, default=1, help="CPU cores per run (default: 1)")
    parser.add_argument("--gpus", type=float, help="GPUs per run, 0.5 lets two runs share one (default: 1 where there are GPUs)")
    words, rest = _split(argv)
    options = parser.parse_args(words)
    return guard(lambda: sweep(options, rest))


def _split(argv):
    """(words before --, words after it)"""
    place = argv.index("--") if "--" in argv else len(argv)
    return argv[:place], argv[place + 1 :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
