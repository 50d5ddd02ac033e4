"""One picture of all triggers: a test picture with each of them, and what they change.

    python -m benchmarks.gallery --plan digits

Reads the records that `python -m benchmarks.attacks` has made (seed 0) and writes benchmarks/results/triggers.png. Differences
are drawn around mid-grey, each stretched to its own largest change, which is stated in grey levels.
"""

import argparse
from pathlib import Path

import numpy as np
import safetensors.numpy
import yaml
from PIL import Image, ImageDraw

from utils import data

ROOT = Path(__file__).resolve().parents[1]
SIDE, GAP, TITLE, COLUMNS = 112, 8, 34, 8  # pixels; attacks in a row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="digits")
    parser.add_argument("--record_path", type=Path, default=Path("record/attacks"))
    parser.add_argument("--picture", type=int, default=5, help="which of the triggered test pictures")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "triggers.png")
    options = parser.parse_args()
    found = [
        path.parent for path in sorted(options.record_path.glob(f"{options.plan}-*-0/record.json")) if "-clean-" not in path.parent.name
    ]
    sheet([(path.name.split("-")[1], *pictures(path, options.picture)) for path in found]).save(options.output)
    print(f"{len(found)} triggers in {options.output}")


def pictures(folder, number):
    """(a clean test picture H,W,3, the same with the trigger) of a record"""
    made = yaml.safe_load((folder / "config.yaml").read_text())
    _, _, test = data.load(made["dataset"], made["dataset_path"], image_size=made["image_size"], cache=made["cache_path"])
    held = safetensors.numpy.load_file(folder / "poison.safetensors")
    clean = test.images[int(held["test_index"][number])].numpy()
    return clean.transpose(1, 2, 0), held["test_images"][number].transpose(1, 2, 0)


def sheet(entries):
    """Blocks of attacks side by side, for each its name, the triggered picture and the difference; the clean one comes first."""
    entries = [("clean picture", entries[0][1], entries[0][1]), *entries]
    block, blocks = TITLE + 2 * (SIDE + GAP), -(-len(entries) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, blocks * block + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (name, clean, triggered) in enumerate(entries):
        left, top = GAP + number % COLUMNS * (SIDE + GAP), GAP + number // COLUMNS * block
        change = triggered.astype(np.int16) - clean
        scale = int(np.abs(change).max())
        shown = [triggered, np.uint8(np.rint(127.5 + change / max(scale, 1) * 127.5))]
        draw.text((left, top), name, "black")
        draw.text((left, top + 14), f"± {scale} levels" if scale else "no change", "gray")
        for row, picture in enumerate(shown):
            canvas.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top + TITLE + row * (SIDE + GAP)))
    return canvas


if __name__ == "__main__":
    main()
