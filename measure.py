"""Measure finished runs once more, in ways that take longer than ACC, ASR and RA.

    python measure.py relearn record/
    python measure.py relearn badnet_cifar10 clean_cifar10
    python measure.py relearn badnet_cifar10 --retrained
    python measure.py relearn record/badnet_cifar10/defense/ft --poisons 0
    python measure.py cut record/

FOLDER is a record with all its defenses, one defense, or any folder above them. Every finished
victim and repaired model there is measured, and what was measured before is skipped. The result is
a folder measure/ in that of the run, in which nothing else changes. compare.py and sweep.py
--results show what it holds.

relearn: fine-tune a copy of the model for 5 epochs on 2 % of the training set, 5 poisoned images
among them, and measure its ASR again (Min et al., NeurIPS 2024, arXiv 2410.09838). A backdoor that
was only silenced comes back. A benign model of the same recipe, named too, is the control. Another
one is the victim, retrained without what the attack has changed: --retrained makes it.

cut: of the channels that a defense has pruned, how many carry the backdoor, and how many of those
that carry it were pruned. The evaluator ranks the channels by their trigger activation change
(Zheng et al., ECCV 2022, arXiv 2208.03111), and switches them off until the backdoor is gone.

Exit codes: 0 all is measured, 1 some runs could not be, 2 usage, 3 no victim or no data set is
there, 4 a record is refused. See docs/comparing.md.
"""

import argparse
import sys

from antidote_bench.utils import launch, parsing
from antidote_bench.utils.protocol.options import Cut, Relearn

MEASURES = {"relearn": Relearn, "cut": Cut}


def work(argv):
    """Do what the command line says."""
    Config, places, words = taken_apart(argv)
    config = parsing.parse(Config, words, __doc__, "measure.py")
    from antidote_bench.utils.protocol import measure  # heavy

    launch.obey_signals()
    measure.measure(config, places)


def taken_apart(argv):
    """(the options' class, the folders, the words of options) of a command line."""
    parser = argparse.ArgumentParser(prog="measure.py", add_help=False)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    first = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    if not {"-h", "--help"} & set(argv):
        found = parser.parse_args(argv[:first])
        return MEASURES[found.measure], found.folders, argv[first:]
    name = argv[0] if argv[0] in MEASURES else next(iter(MEASURES))
    return MEASURES[name], [], ["--help"]


def main(argv):
    """Run with command line arguments; returns the exit code."""
    return launch.guard(lambda: work(argv), debug="--debug" in argv)


if __name__ == "__main__":
    launch.leave(main(sys.argv[1:]))
