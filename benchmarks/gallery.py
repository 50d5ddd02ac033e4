"""One image of all triggers: a test image with each of them, and what they change.

    python -m benchmarks.gallery --record_path record

Shows the attack of every record of the data set, with the first seed that there is, and writes
benchmarks/results/triggers.png. All attacks have the same test image, but for those on images of
one class. Options below a name tell two records of the attack apart. Differences are drawn around
mid-grey, each stretched to its own largest change, which is stated in grey levels.
`python sweep.py config/sweep/attacks_digits.yaml` makes the records of the committed image.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from antidote_bench.utils.data import dataset
from antidote_bench.utils.errors import MissingError
from antidote_bench.utils.launch import guard
from antidote_bench.utils.record import folder
from antidote_bench.utils.report.runs import find_runs, keys, read_all
from antidote_bench.utils.report.tables import name_all

ROOT = Path(__file__).resolve().parents[1]
SIDE, GAP, LINE = 96, 8, 13  # pixels: of an image, between images, and of a line of text
COLUMNS = 10  # attacks in a row
SHOWN = "shown"  # the name of a text in the PNG file: the attacks, one a line


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
    about = PngInfo()
    about.add_text(SHOWN, "\n".join(victims))
    sheet(entries).save(options.output, optimize=True, pnginfo=about)
    print(f"{len(entries)} trigger{'s' * (len(entries) > 1)} in {options.output}")


def attacks(records, name):
    """{label: run} of the attacks on the data set `name`, each with its first seed."""
    runs, _ = read_all(find_runs([records]))
    found = {}
    for run in runs:
        if run.victim is None and run.row["dataset"] == name and not run.clean:
            _, attack, _ = keys(run)
            found.setdefault(attack, []).append(run)
    first = {
        label: min(found[attack], key=lambda run: int(run.row["seed"]))
        for attack, label in name_all(set(found)).items()
    }
    return dict(sorted(first.items()))


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
    """Rows of attacks, the clean image first; an entry is (label, clean H,W,3, triggered H,W,3)."""
    entries = [("clean image", entries[0][1], entries[0][1]), *entries]
    strips = [strip(entries[at : at + COLUMNS]) for at in range(0, len(entries), COLUMNS)]
    size = strips[0].width, sum(each.height for each in strips) + GAP
    canvas, top = Image.new("RGB", size, "white"), GAP
    for each in strips:
        canvas.paste(each, (0, top))
        top += each.height
    return canvas


def strip(entries):
    """One row of attacks: what each is called, the triggered image, the difference."""
    changes = [triggered.astype(np.int16) - clean for _, clean, triggered in entries]
    captions = [
        caption(label, int(np.abs(change).max()))
        for (label, *_), change in zip(entries, changes, strict=True)
    ]
    title = max(map(len, captions)) * LINE + GAP // 2
    canvas = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, title + 2 * (SIDE + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (_, _, triggered) in enumerate(entries):
        left, change = GAP + number * (SIDE + GAP), changes[number]
        for line, text in enumerate(captions[number]):
            draw.text((left, line * LINE), text, "gray" if line else "black")
        grey = np.uint8(np.rint(127.5 + change / max(np.abs(change).max(), 1) * 127.5))
        for row, image in enumerate((triggered, grey)):
            canvas.paste(
                Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST),
                (left, title + row * (SIDE + GAP)),
            )
    return canvas


def caption(label, largest):
    """Lines of text: the name, the options in brackets, and the largest change in grey levels."""
    name, _, options = label.removesuffix(")").partition(" (")
    lines = [name, *(options.split(", ") if options else [])]
    return [*lines, f"± {largest} levels" if largest else "no change"]


if __name__ == "__main__":
    sys.exit(main())
