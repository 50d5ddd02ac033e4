"""Models in the folder layout of NIST's TrojAI rounds: one folder for each model, with example
images.

The layout is that of the image classification rounds, https://pages.nist.gov/trojai/docs/data.html.
A round stores whole pickled models; here model.pt is a state dict, which torch reads with
weights_only.
"""

import json
from typing import NamedTuple

from antidote_bench.utils import files
from antidote_bench.utils.exchange import image_folders

MODELS, TABLE, MANIFEST, README = "models", "METADATA.csv", "manifest.json", "README.md"
CLEAN, POISONED = "clean-example-data", "poisoned-example-data"
ABOUT = """# Models in the layout of a TrojAI round

`models/id-00000000/` and so on hold one model each:

* `model.pt`: a state dict, not a whole model. torch reads it with `weights_only=True`. Without the
  prefix `network.` its names are those of the architecture in `config.json`.
* `config.json`: the architecture, the number of classes, the side of an image in pixels, and the
  mean and std that are subtracted from pixels of [0, 1] and divided by before the network.
* `ground_truth.csv`: 1 for a backdoored model, 0 for a benign one.
* `clean-example-data/` and, of a backdoored model, `poisoned-example-data/`: test images
  `class_<class>_example_<number>.png`. The class is the true one.

`METADATA.csv` has a row for every model. `manifest.json` has the same with the sha256 of every
`model.pt`. The models are numbered in the order of a hash of their weights, which tells nothing.
"""


class Model(NamedTuple):
    """A model to write: bytes of model.pt, facts of config.json, what METADATA.csv says of it, and
    example images, each {true class: uint8 n,3,S,S}."""

    content: bytes
    config: dict
    truth: dict
    clean: dict
    poisoned: dict


def write_model(folder, model):
    """Write the folder of one model; `model.truth["poisoned"]` is its ground truth."""
    files.write(folder / "model.pt", model.content)
    files.write(folder / "config.json", json.dumps(model.config, indent=1) + "\n")
    files.write(folder / "ground_truth.csv", f"{int(model.truth['poisoned'])}\n")
    for name, examples in ((CLEAN, model.clean), (POISONED, model.poisoned)):
        for label, images in examples.items():
            paths = [
                folder / name / f"class_{label}_example_{number}.png"
                for number in range(len(images))
            ]
            image_folders.write_all(images, paths)


def write_index(folder, rows):
    """Write METADATA.csv, manifest.json and README.md about models; `rows` are dicts with the same
    keys, `model_name` first."""
    files.write(folder / TABLE, files.csv_text(rows, list(rows[0])))
    files.write(folder / MANIFEST, json.dumps({"format": 1, "models": rows}, indent=1) + "\n")
    files.write(folder / README, ABOUT)
