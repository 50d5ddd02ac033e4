"""How much memory does every attack and every defense take on large images, on a CPU?

    python -m benchmarks.memory --output benchmarks/results/memory.csv
    python -m benchmarks.memory --output memory.csv --methods fmp awm --limit 4000

Each method runs in a process of its own, for one epoch of every stage, on image folders that are
made here: 60 training and 15 test images of three classes and 224 pixels, resnet18, and 50 clean
images for the defenses. `peak_mb` is the largest resident memory of the process, in MiB, as the
operating system counts it. A run above `--limit` is killed. One that takes longer than `--seconds`
is ended too, and its peak counts up to there: what scores every feature map or every class passes
its largest maps first.

A method whose row is in the table already, with the same options and within the limit, is not run
again. Exit code 1 where a method failed or took more than the limit.
"""

import argparse
import contextlib
import csv
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from antidote_bench.utils import files
from antidote_bench.utils.config import scripts
from antidote_bench.utils.errors import UserError
from antidote_bench.utils.launch import guard
from antidote_bench.utils.record import folder as layout

ROOT = Path(__file__).resolve().parents[1]
CLASSES, TRAIN, TEST = 3, 20, 5  # images of a class
COLUMNS = ["kind", "name", "peak_mb", "seconds", "verdict", "limit_mb", "command", "cpu", "torch"]
FINISHED, STOPPED = "finished", "stopped"  # both within the limit
POLL = 0.1  # seconds
# the most of what is not counted in epochs
LIMITS = {"steps": 2, "rounds": 1, "inner": 1, "start_batches": 2, "scenes": 20}
SHARE = 0.2  # of the training images that are poisoned, and that are changed with their label kept
FIXED_SHARE = {"clean", "blind", "lira"}  # attacks with a pratio of their own
# the batch belongs to the method, and its default takes more than the limit
OWN = {"inputaware": {"batch_size": 32}, "tact": {"cover_classes": CLASSES - 1}}


def main(words=None):
    options = parse(words)
    rows, bad = read(options.output), []
    make_images(options.work / f"images{options.image_size}", options.image_size)
    for kind, name in options.methods:
        words = short(kind, name, options)
        row = find(rows, kind, name)
        if (
            not row
            or row["command"] != command(kind, name, words)
            or not within(row, options.limit)
        ):
            row = measure(kind, name, words, options)
            rows = [other for other in rows if (other["kind"], other["name"]) != (kind, name)]
            rows.append(row)
            rows.sort(key=lambda row: (row["kind"], row["name"]))
            files.write(options.output, files.csv_text(rows, COLUMNS).encode())
        print(f"{name:17}{row['peak_mb']:>7} MB{row['seconds']:>8} s  {row['verdict']}", flush=True)
        if not within(row, options.limit):
            bad.append(name)
    if bad:
        raise UserError(f"failed, or above {options.limit} MB: {', '.join(bad)}")


def parse(words):
    known = [(kind, name) for kind in ("attack", "defense") for name in scripts(kind)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the table, a .csv file")
    parser.add_argument("--limit", type=int, default=6000, help="MiB above which a run is killed")
    parser.add_argument("--seconds", type=float, default=600, help="after which a run is ended")
    parser.add_argument("--image_size", type=int, default=224, help="side in pixels")
    parser.add_argument("--model", default="resnet18", help="architecture of the victim")
    parser.add_argument(
        "--methods", nargs="+", choices=[name for _, name in known], help="by default all"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "antidote-memory",
        help="folder for images and records, which stay there",
    )
    options = parser.parse_args(words)
    chosen = options.methods or [name for _, name in known]
    options.methods = [(kind, name) for kind, name in known if name in chosen]
    return options


def read(path):
    """The rows of an earlier table."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def find(rows, kind, name):
    return next((row for row in rows if (row["kind"], row["name"]) == (kind, name)), None)


def within(row, limit):
    """Whether a run went well and took no more memory than the limit."""
    return row["verdict"].startswith((FINISHED, STOPPED)) and int(row["peak_mb"]) <= limit


def make_images(place, side):
    """Image folders of three classes, each of noise in a colour of its own."""
    for split, count in (("train", TRAIN), ("test", TEST)):
        for label in range(CLASSES):
            folder = place / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                path = folder / f"{number}.png"
                if not path.is_file():
                    draw = np.random.default_rng([number, label, split == "test"])
                    pixels = draw.integers(0, 128, (side, side, 3))
                    pixels[..., label] += 100
                    Image.fromarray(pixels.astype(np.uint8)).save(path)


def short(kind, name, options):
    """The options of a short run."""
    Config = importlib.import_module(f"antidote_bench.{kind}.{name}").Config
    known = Config.__dataclass_fields__
    chosen = {option: 1 for option in known if option.endswith("epochs")}
    chosen |= {
        option: most
        for option, most in LIMITS.items()
        if option in known and known[option].default > most
    }
    if kind == "attack":
        chosen |= {"dataset": "folder", "image_size": options.image_size, "model": options.model}
        if name not in FIXED_SHARE:
            chosen["pratio"] = SHARE
        if "cover_ratio" in known:
            chosen["cover_ratio"] = SHARE
    elif Config.holds_clean:
        chosen["clean_count"] = 50
    chosen |= OWN.get(name, {})
    return [str(word) for option, value in chosen.items() for word in (f"--{option}", value)]


def command(kind, name, words):
    return " ".join([f"{kind}/{name}.py", *words])


def measure(kind, name, words, options):
    """The row of one method."""
    record = options.work / "record"
    if kind == "defense":
        require_victim(options)
        words = [*words, "--result_file", victim_name(options)]
        left = record / victim_name(options) / layout.DEFENSES
    else:
        words = [*words, "--save_folder_name", name]
        left = record / name
    shutil.rmtree(left, ignore_errors=True)  # a run that is resumed would do only a part
    seconds, peak, verdict = run([f"{kind}/{name}.py", *words], options)
    row = {"kind": kind, "name": name, "peak_mb": peak, "seconds": round(seconds, 1)}
    row |= {"verdict": verdict, "limit_mb": options.limit}
    row["command"] = command(kind, name, short(kind, name, options))
    return row | {"cpu": f"{os.cpu_count()} cores", "torch": version("torch")}


def victim_name(options):
    return f"victim_{options.model}_{options.image_size}"


def require_victim(options):
    """Train the victim of the defenses where it is not there yet."""
    if layout.state_of(options.work / "record" / victim_name(options)) == layout.DONE:
        return
    words = [*short("attack", "badnet", options), "--save_folder_name", victim_name(options)]
    _, peak, verdict = run(["attack/badnet.py", *words], options, seconds=float("inf"))
    if verdict != FINISHED:
        raise UserError(f"the victim of the defenses is not there: {verdict}, {peak} MB")


def run(script, options, seconds=None):
    """(seconds, peak memory in MiB, what became of it) of a script."""
    places = {
        "record_path": options.work / "record",
        "cache_path": options.work / "cache",
        "overwrite": "true",
    }
    if script[0].startswith("attack"):
        places["dataset_path"] = options.work / f"images{options.image_size}"
    words = [str(word) for pair in places.items() for word in (f"--{pair[0]}", pair[1])]
    begin, seconds = time.perf_counter(), options.seconds if seconds is None else seconds
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *script, *words], cwd=ROOT, stdout=said, stderr=said
        )
        try:
            code, peak, ended = watch(process, begin + seconds, options.limit)
        except BaseException:
            process.kill()
            raise
        said.seek(0)
        lines = said.read().strip().splitlines()
    if ended:
        verdict = ended
    elif code == 0:
        verdict = FINISHED
    else:
        verdict = f"failed: {next((line for line in lines if line.startswith('error')), code)}"
    return time.perf_counter() - begin, peak, verdict


def watch(process, deadline, limit):
    """(exit code, peak memory in MiB, why it was ended or "") of a running process."""
    ended, peak = "", 0
    while process.poll() is None:
        peak = max(peak, peak_of(process.pid))
        if peak > limit:
            ended = f"killed above {limit} MB"
            process.kill()
        elif time.perf_counter() > deadline:
            ended = f"{STOPPED} before its end"
            process.kill()
        time.sleep(POLL)
    return process.returncode, round(peak), ended


def peak_of(pid):
    """The largest resident memory of a process so far, in MiB; 0 where it has ended.

    Where the system does not tell, it is what the process holds now. What a parent learns of an
    ended process would count the parent's own memory too, which the child has for a moment.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
        return 0
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).memory_info().rss / 2**20
    return 0


if __name__ == "__main__":
    sys.exit(guard(main, debug="--debug" in sys.argv))
