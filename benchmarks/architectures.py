"""Which defenses work on which kinds of networks? Every defense on some networks of timm.

    python -m benchmarks.architectures
    python -m benchmarks.architectures --methods ft clp --models timm:vit_tiny_patch16_224
    python -m benchmarks.architectures --table

Each network is trained by BadNets for one epoch on a few coloured images of 64 pixels, and then
each defense runs with one epoch of every stage: this says whether a defense works on an
architecture, and nothing about how well. The rows go to benchmarks/results/architectures.csv, in
place of older ones of the same network and defense: `outcome` is done, or the sentence with which
the defense says that it does not apply. A defense that ends in any other way makes the exit code 1.
`--table` runs nothing and prints the table of docs/models.md.
"""

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from antidote_bench.utils import files, parsing
from antidote_bench.utils.config import scripts
from antidote_bench.utils.errors import ConfigError, UserError
from antidote_bench.utils.launch import guard

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "architectures.csv"
COLUMNS = ["model", "defense", "variant", "outcome", "seconds", "timm", "torch"]
MODELS = ("timm:mobilenetv3_small_050", "timm:vit_tiny_patch16_224")
SIDE = 64  # pixels
CLASSES, TRAIN, TEST = 4, 60, 10  # images of every class
# the most of what is not counted in epochs
LIMITS = {"steps": 2, "rounds": 2, "scored_images": 16, "score_batch": 512, "batch_size": 32}
# further forms of defenses, which look at the network in another way
VARIANTS = {"fmp": ["released", "fmt"], "trap_and_replace": ["no_trap", "head_only"]}


def main(words=None):
    options = parse(words)
    if options.table:
        print(table(files.read_csv(RESULTS)))
        return
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as base:
        make_images(Path(base, "images"))
        for model in options.models:
            record = train_victim(model, base)
            for name in options.methods:
                for variant in ["", *VARIANTS.get(name, [])]:
                    row, right = defend(model, record, name, variant, base)
                    rows.append(row)
                    failed += [] if right else [f"{name} {variant}".strip() + f" on {model}"]
                    print(f"{model:28} {name:18} {variant:10} {row['outcome']}", flush=True)
    if not options.no_file:
        save(rows)
    if failed:
        raise SystemExit(f"error: {len(failed)} runs failed: {', '.join(failed)}")


def parse(words):
    names = scripts("defense")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--methods", nargs="+", default=names, metavar="DEFENSE")
    parser.add_argument("--no_file", action="store_true", help="write no results")
    parser.add_argument("--table", action="store_true", help="print the table of the results")
    options = parser.parse_args(words)
    if unknown := [name for name in options.methods if name not in names]:
        raise ConfigError(f"there is no defense {unknown[0]!r}; there are {', '.join(names)}")
    return options


def make_images(place):
    """Image folders of CLASSES classes: noise in a colour of its own for every class."""
    draws = np.random.default_rng(0)
    colours = draws.integers(60, 196, (CLASSES, 3))
    for split, count in (("train", TRAIN), ("test", TEST)):
        for label, colour in enumerate(colours):
            folder = place / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                noise = draws.integers(-40, 41, (SIDE, SIDE, 3))
                pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def train_victim(model, base):
    """The folder of a record of BadNets on `model`."""
    record = Path(base, model.replace(":", "-"))
    words = ["--dataset", "folder", "--dataset_path", f"{base}/images", "--model", model]
    words += ["--image_size", str(SIDE), "--epochs", "1", "--batch_size", "32", "--lr", "0.01"]
    start("attack", "badnet", [*words, "--save_folder_name", record.name], base)
    return record


def defend(model, record, name, variant, base):
    """(the row of one run, whether it ended as it should)."""
    folder = f"{name}_{variant}" if variant else name
    given = few(config_of("defense", name))
    given |= {"result_file": str(record), "save_folder_name": folder}
    given |= {"variant": variant} if variant else {}
    begin, outcome, right = time.perf_counter(), "done", True
    try:
        start("defense", name, parsing.words(given), base)
    except UserError as error:
        outcome = " ".join(str(error).split())
        right = isinstance(error, ConfigError) and not (record / "defense" / folder).exists()
    except Exception as error:  # what a user would see as an unexpected error
        outcome, right = f"unexpected {type(error).__name__}: {' '.join(str(error).split())}", False
    row = {
        "model": model,
        "defense": name,
        "variant": variant,
        "outcome": outcome,
        "seconds": round(time.perf_counter() - begin, 1),
        **{package: version(package) for package in ("timm", "torch")},
    }
    return row, right


def few(config):
    """The options that make a run of a defense short."""
    known = config.__dataclass_fields__
    short = {name: 1 for name in known if name.endswith("epochs")}
    return short | {name: value for name, value in LIMITS.items() if name in known}


def config_of(kind, name):
    """The options of a script."""
    return importlib.import_module(f"antidote_bench.{kind}.{name}").Config


def start(kind, name, words, base):
    """Run a script in this process, quietly."""
    places = ["--record_path", str(base), "--cache_path", f"{base}/cache", "--device", "cpu"]
    config = parsing.parse(config_of(kind, name), [*places, *words], script=f"{kind}/{name}.py")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        importlib.import_module(f"antidote_bench.{kind}.{name}").main(config)


def table(rows):
    """The rows as Markdown: a line for every defense and variant, a column for every network.

    Below it stand the sentences of the defenses that do not apply.
    """
    networks = list(dict.fromkeys(row["model"] for row in rows))
    outcomes = {(method(row), row["model"]): row["outcome"] for row in rows}
    sentences = list(dict.fromkeys(text for text in outcomes.values() if text != "done"))
    marks = {"done": "yes", None: "not run"}
    marks |= {text: f"no ({number})" for number, text in enumerate(sentences, 1)}
    lines = ["| | " + " | ".join(f"`{network}`" for network in networks) + " |"]
    lines.append("|---|" + "---|" * len(networks))
    for name in dict.fromkeys(method(row) for row in rows):
        cells = [marks[outcomes.get((name, network))] for network in networks]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    notes = [f"{number}. {text}" for number, text in enumerate(sentences, 1)]
    return "\n".join([*lines, "", *notes])


def method(row):
    """A defense as it is written in a command: its variant is an option."""
    return f"{row['defense']} --variant {row['variant']}" if row["variant"] else row["defense"]


def save(rows):
    """Write the rows, in place of older ones of the same network, defense and variant."""

    def key(row):
        return row["model"], row["defense"], row["variant"]

    old = files.read_csv(RESULTS) if RESULTS.exists() else []
    kept = {key(row): row for row in [*old, *rows]}
    files.write(RESULTS, files.csv_text([kept[name] for name in sorted(kept)], COLUMNS))


if __name__ == "__main__":
    sys.exit(guard(main))
