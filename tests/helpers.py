"""What several test files share, and no fixture can be."""

import importlib
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# options of an attack whose victim stays as it was drawn
UNTRAINED = "--epochs", "0", "--model", "resnet9", "--width", "4", "--device", "cpu"
# options that make a script's run long, beside its epochs
SHORT = {"steps": 2, "rounds": 1, "scored_images": 10, "start_batches": 2}


def names(folder):
    """The scripts of attack/ or defense/, found as the project finds them."""
    return sorted(path.stem for path in (ROOT / folder).glob("[a-z]*.py"))


def few(script):
    """The options that make a script's run short; `script` is a module's name."""
    known = importlib.import_module(f"antidote_bench.{script}").Config.__dataclass_fields__
    short = {name: 1 for name in known if name.endswith("epochs")}
    short |= {name: value for name, value in SHORT.items() if name in known}
    if script.startswith("attack"):
        short["width"] = 4
    return [str(word) for name, value in short.items() for word in (f"--{name}", value)]


def image_folders(place, offset=0, classes=("a", "b"), count=12):
    """A data set of 16 pixels: `count` images a class and split; `offset` changes all pixels."""
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            (place / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((16, 16, 3), 40 * label + number + offset, np.uint8)
                pixels[number, :8] = 255
                Image.fromarray(pixels).save(place / split / name / f"{number}.png")
    return place
