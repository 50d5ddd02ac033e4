"""Draws cases and checks them, each round in a process of its own: a crash ends only that."""

import importlib
import json
import math
import re
import tempfile
import time
from pathlib import Path

from tests.start import SERVER

MODULES = {
    "config": "configs",
    "record": "records",
    "text": "texts",
    "image": "images",
    "grid": "grids",
}
KINDS = list(MODULES)
EXAMPLES, SECONDS = 300, 120  # of a round
PATIENCE = 120  # further seconds that its last case may take


def module_of(kind):
    """The module that draws and checks cases of a kind."""
    return importlib.import_module(f"tests.fuzz.{MODULES[kind]}")


def draw(kind, seed, examples, place, *, until=math.inf, say=lambda case: None):
    """Yield (case, [what is wrong with it]) for each of `examples` cases drawn from `seed`.

    `say` gets each case before it is checked. After the moment `until` (of time.monotonic) no more
    are checked.
    """
    import hypothesis

    module, found = module_of(kind), []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(module.cases())
    def test(case):
        if time.monotonic() < until:
            say(case)
            found.append((case, list(module.check(case, place))))

    test()
    return found


def mark(kind, fault):
    """What makes two findings one."""
    return kind, re.sub(r"\d+|'.*?'|\".*?\"", "", fault)[:80]


def _round(kind, seed, folder):
    """In a process of its own: the case at hand stands in folder/case, which outlives a crash."""
    place = Path(folder) / "place"
    place.mkdir()
    until = time.monotonic() + SECONDS
    found = draw(
        kind,
        seed,
        EXAMPLES,
        place,
        until=until,
        say=lambda case: (Path(folder) / "case").write_text(repr(case)),
    )
    lines = [(repr(case), faults) for case, faults in found]
    (Path(folder) / "found").write_text(json.dumps(lines))


def round_in_process(kind, seed):
    """[(case as text, [faults])] of a round; a crash and a hang are faults too."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
        process = SERVER.Process(target=_round, args=(kind, seed, folder))
        process.start()
        process.join(SECONDS + PATIENCE)
        case, found = Path(folder, "case"), Path(folder, "found")
        if found.exists():
            return json.loads(found.read_text())
        process.kill()
        process.join()
        if process.exitcode == 1:
            raise RuntimeError("the fuzzer itself failed; its traceback stands above")
        last = case.read_text() if case.exists() else "none"
        return [(last, [f"crash or hang: the process ended with {process.exitcode}"])]


def fuzz(kinds, minutes, seed):
    """Run rounds of all kinds in turn, and print each finding once; returns how many there are."""
    until, marks, count = time.monotonic() + 60 * minutes, set(), 0
    while time.monotonic() < until:
        for kind in kinds:
            if time.monotonic() > until:
                break
            for case, faults in round_in_process(kind, seed):
                count += 1
                for fault in faults:
                    if mark(kind, fault) not in marks:
                        marks.add(mark(kind, fault))
                        print(f"{kind}: {fault}\n    --kind {kind} --case {case!r}", flush=True)
        seed += 1
    print(f"{count} cases, seeds up to {seed - 1}: {len(marks)} findings")
    return len(marks)
