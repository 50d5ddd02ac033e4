"""The command: rounds of all kinds until the minutes are over, or one case once more."""

import argparse
import ast
import sys
import tempfile
from pathlib import Path

from tests.fuzz.rounds import KINDS, fuzz, module_of


def again(kind, case):
    """Check one case, given as text; the number of faults."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
        faults = list(module_of(kind).check(ast.literal_eval(case), Path(folder)))
    for fault in faults:
        print(fault)
    return len(faults)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="only cases of this kind")
    parser.add_argument("--case", help="check this case only, as a line of findings shows it")
    options = parser.parse_args(argv)
    if options.case:
        return bool(again(options.kind, options.case))
    return bool(fuzz([options.kind] if options.kind else KINDS, options.minutes, options.seed))


if __name__ == "__main__":
    sys.exit(main())
