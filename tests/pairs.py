"""Pairs of commands that are started within three seconds of each other and want the same folder.

    python -m tests.pairs --count 100 --seed 0

Of each pair one finishes. The other finishes too, or says in one sentence why not, and exits with
2. What lies there in the end is the result of an undisturbed run, and nothing is left over.
"""

import argparse
import concurrent.futures
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import yaml

from antidote_bench.utils import files
from antidote_bench.utils.record import folder as layout
from tests.helpers import ROOT, image_folders
from tests.start import start

LONGEST_DELAY = 3  # seconds
RUN = "victim"
SMALL = {
    "dataset": "folder",
    "image_size": 16,
    "model": "resnet9",
    "width": 4,
    "pratio": 0.25,
    "batch_size": 8,
}
EPOCHS = 30  # a few seconds
ATTACK = ["attack/badnet.py", "--save_folder_name", RUN, "--epochs", str(EPOCHS)]
ATTACK += [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
FT = ["defense/ft.py", "--result_file", RUN, "--epochs", str(EPOCHS)]
CLP = ["defense/clp.py", "--result_file", RUN]
GRID = {"attack": "badnet", "attack_options": {**SMALL, "epochs": EPOCHS}}
OTHER_SEED = ["--random_seed", "1"]
# what two commands are, whether a victim is there before, and the exit codes that the second of
# them to come may have
PAIRS = {
    "the same attack": (ATTACK, ATTACK, False, {0, 2}),
    "an attack with another seed": (ATTACK, [*ATTACK, *OTHER_SEED], False, {2}),
    "the same defense": (FT, FT, True, {0, 2}),
    "a defense with other options": (FT, [*FT, *OTHER_SEED], True, {2}),
    "two defenses": (FT, CLP, True, {0}),
    "an attack over one": (ATTACK, [*ATTACK, *OTHER_SEED, "--overwrite"], False, {0, 2}),
    "two attacks over one": (
        [*ATTACK, *OTHER_SEED, "--overwrite"],
        [*ATTACK, *OTHER_SEED, "--overwrite"],
        True,
        {0, 2},
    ),
    "an attack over a victim under repair": (
        [*ATTACK, *OTHER_SEED, "--overwrite"],
        FT,
        True,
        {0, 2, 4},
    ),
    "an attack and the repair of its victim": (ATTACK, FT, False, {0, 3, 4}),
    "a sweep and its own command": ("sweep", "sweep's", False, {0, 2}),
    "two sweeps": ("sweep", "sweep", False, {0}),
}


def run(words, place):
    """What a command prints and how it ends, with its records and its cache below `place`."""
    if not (place / "data").is_dir():
        image_folders(place / "data")
    words = [*words, "--record_path", str(place / "record")]
    words += ["--"] if words[0] == "sweep.py" else []
    words += ["--cache_path", str(place / "cache"), "--dataset_path", str(place / "data")]
    return start(words, cwd=ROOT, env={"OMP_NUM_THREADS": "1"})


def commands(pair, place):
    """The words of the two commands of a pair."""
    grid = place / "grid.yaml"
    grid.write_text(yaml.safe_dump(GRID))
    sweep = ["sweep.py", str(grid), "--engine", "serial"]
    found = []
    for words in PAIRS[pair][:2]:
        if words == "sweep's":
            listed = run([*sweep, "--dry_run"], place).stdout.splitlines()[0]
            words = listed.partition("python ")[2].split()
            words = (
                words[: words.index("--record_path")] + words[words.index("--record_path") + 2 :]
            )
        found.append(sweep if words == "sweep" else words)
    return found


def together(pair, delay, place):
    """The two commands as they ended; the second one was started `delay` seconds after the
    first."""
    first, second = commands(pair, place)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        one = pool.submit(run, first, place)
        time.sleep(delay)
        other = pool.submit(run, second, place)
        return one.result(), other.result()


class Undisturbed:
    """The `mark` of each run that the pairs can make, made without disturbance."""

    def __init__(self, place, defenses=(FT, [*FT, *OTHER_SEED], CLP)):
        self.place = place
        self._known = set()
        for seed in (0, 1):
            folder = place / str(seed) / "record" / RUN
            self._make(seed, [*ATTACK, "--random_seed", str(seed)], folder)
            for words in defenses:
                name = Path(words[0]).stem
                self._make(seed, [*words, "--overwrite"], folder / layout.DEFENSES / name)

    def _make(self, seed, words, folder):
        done = run(words, self.place / str(seed))
        assert done.returncode == 0, done.stderr
        self._known.add(mark(folder))

    def __contains__(self, folder):
        return mark(folder) in self._known

    def victim(self, place):
        """A copy of the victim with seed 0 in `place`, without defenses."""
        ignored = shutil.ignore_patterns(layout.DEFENSES)
        shutil.copytree(self.place / "0" / "record" / RUN, place / "record" / RUN, ignore=ignored)
        for name in ("cache", "data"):
            shutil.copytree(self.place / "0" / name, place / name)


def mark(folder):
    """What tells a run from others: seeds, the victim of a defense, weights."""
    info = json.loads((folder / layout.RECORD).read_text())
    seeds = sorted(info["seeds"].items())
    return repr((seeds, info.get("victim_sha256"), files.sha256(folder / layout.WEIGHTS)))


def faults(pair, delay, undisturbed, place):
    """Yield what is wrong with how a pair ends."""
    _, _, has_victim, codes = PAIRS[pair]
    if has_victim:
        undisturbed.victim(place)
    ended = together(pair, delay, place)
    if 0 not in [done.returncode for done in ended]:
        yield "none of the two finished"
    for done in ended:
        if done.returncode not in {0, *codes}:
            yield f"exit code {done.returncode}: {done.stderr[-500:]}"
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if done.returncode and len(errors) != 1:
            yield f"{len(errors)} sentences: {done.stderr[-500:]}"
        for word in ("unexpected", "Traceback"):
            if word in done.stdout + done.stderr:
                yield f"says {word}: {done.stderr[-500:]}"
    record = place / "record"
    for path in record.rglob(layout.RECORD):
        kind = "defense" if path.parent.parent.name == layout.DEFENSES else "attack"
        try:
            layout.verify(path.parent, kind)
        except Exception as error:  # whatever it is, the run is not what was saved
            yield f"{path.parent}: {error}"
        if path.parent not in undisturbed:
            yield f"{path.parent} is not the result of an undisturbed run"
    yield from left_over(record)


def left_over(record):
    """Yield the paths that no complete run leaves."""
    for path in record.rglob("*"):
        parts = path.relative_to(record).parts
        hidden = path.name.startswith(".") and not {".sweep", layout.SHARED} & set(parts)
        if hidden or path.name == layout.STATE:
            yield f"left over: {path}"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.pairs", description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    draw, bad = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory(prefix="pairs-") as folder:
        undisturbed = Undisturbed(Path(folder) / "undisturbed")
        for number in range(options.count):
            pair, delay = draw.choice(sorted(PAIRS)), draw.uniform(0, LONGEST_DELAY)
            place = Path(folder) / str(number)
            place.mkdir()
            wrong = list(faults(pair, delay, undisturbed, place))
            bad += bool(wrong)
            shown = "; ".join(wrong) if wrong else "right"
            print(f"{number + 1}/{options.count} {pair}, {delay:.2f} s: {shown}", flush=True)
            shutil.rmtree(place)
    print(f"{options.count} pairs, {bad} of them wrong")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
