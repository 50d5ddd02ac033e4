"""One image of all triggers: a test image with each of them, and what they change.

    python -m benchmarks.gallery --record_path record

Shows the attack of every record of the data set, with the first seed that there is, and writes
benchmarks/results/triggers.png. Differences are drawn around mid-grey, each stretched to its own
largest change, which is stated in grey levels. `python sweep.py config/sweep/attacks_digits.yaml`
makes the records of the committed image.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image, ImageDraw

from antidote_bench.utils.data import dataset
from antidote_bench.utils.errors import MissingError
from antidote_bench.utils.launch import guard
from antidote_bench.utils.record import folder
from antidote_bench.utils.report.runs import NONE, find_runs, read_all
from antidote_bench.utils.report.tables import group

ROOT = Path(__file__).resolve().parents[1]
SIDE, GAP, TITLE, COLUMNS = 112, 8, 34, 8  # pixels; attacks in a row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--record_path", type=Path, default=Path("record"), help="folder that holds the records"
    )
    parser.add_argument("--dataset", default="digits", help="of the records (default: digits)")
    parser.add_argument("--image", type=int, default=5, help="which triggered test image")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "triggers.png"
    )
    options = parser.parse_args()
    return guard(lambda: draw(options))


def draw(options):
    """Write the image; MissingError if no record of an attack on the data set is there."""
    victims = attacks(options.record_path, options.dataset)
    if not victims:
        raise MissingError(
            f"no record of an attack on {options.dataset} at or below {options.record_path}: "
            "sweep.py config/sweep/attacks_digits.yaml makes some"
        )
    entries = [(label, *images(run.path, options.image)) for label, run in victims.items()]
    sheet(entries).save(options.output)
    print(f"{len(entries)} trigger{'s' * (len(entries) > 1)} in {options.output}")


def attacks(records, name):
    """{label: run} of the attacks on the data set `name`, each with its first seed."""
    runs, _ = read_all(find_runs([records]))
    victims = {}
    for table in group(run for run in runs if run.victim is None and run.row["dataset"] == name):
        for column, label in table.columns.items():
            if column not in table.clean:
                first = min(table.cells[column, NONE], key=lambda run: int(run.row["seed"]))
                victims.setdefault(label.partition(" [")[0], first)
    return dict(sorted(victims.items()))


def images(record, number):
    """(a clean test image H,W,3, the same with the trigger) of a record."""
    saved = folder.read_options(record)
    _, _, test = dataset.open_dataset(
        saved["dataset"],
        saved["dataset_path"],
        image_size=saved["image_size"],
        cache=saved["cache_path"],
    )
    poisoned = safetensors.numpy.load_file(record / folder.POISONED)
    clean = test.images[int(poisoned["test_index"][number])].numpy()
    return clean.transpose(1, 2, 0), poisoned["test_images"][number].transpose(1, 2, 0)


def sheet(entries):
    """Blocks of attacks side by side: name, triggered image, difference; the clean one is first."""
    entries = [("clean image", entries[0][1], entries[0][1]), *entries]
    block, blocks = TITLE + 2 * (SIDE + GAP), -(-len(entries) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, blocks * block + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (name, clean, triggered) in enumerate(entries):
        left, top = GAP + number % COLUMNS * (SIDE + GAP), GAP + number // COLUMNS * block
        change = triggered.astype(np.int16) - clean
        scale = int(np.abs(change).max())
        rows = [triggered, np.uint8(np.rint(127.5 + change / max(scale, 1) * 127.5))]
        draw.text((left, top), name, "black")
        draw.text((left, top + 14), f"± {scale} levels" if scale else "no change", "gray")
        for row, image in enumerate(rows):
            canvas.paste(
                Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST),
                (left, top + TITLE + row * (SIDE + GAP)),
            )
    return canvas


if __name__ == "__main__":
    sys.exit(main())
