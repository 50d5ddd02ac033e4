"""How long does it take to put a trigger on 10,000 pictures of 32x32 pixels?

    python -m benchmarks.stamp

Times every attack whose trigger needs no trained network, on random pictures and on the device of --device; the median of
--repeats goes to the screen and, with --save, to benchmarks/results/stamp.csv.
"""

import argparse
import importlib
import statistics
import time
from pathlib import Path

import torch

import models
from utils import device as devices
from utils import files, poison
from utils.config import Attack
from utils.data import Spec, Split
from utils.workshop import Workshop

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ["attack", "images", "seconds", "device", "torch"]
NETWORKS = {"generator_epochs", "bits"}  # options of attacks whose trigger is a network


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    _, device = devices.setup(Attack(device=options.device))
    images = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8, device=device)
    truth = torch.arange(options.images, device=device) % 10
    split, rows = Split(images, truth, truth), []
    for name in sorted(path.stem for path in (ROOT / "attack").glob("[a-z]*.py")):
        trigger = closed_form(name, split)
        if trigger is None:
            continue
        seconds = statistics.median(timed(trigger, split) for _ in range(options.repeats))
        rows.append({"attack": name, "images": options.images, "seconds": round(seconds, 3),
                     "device": devices.name_and_peak(device)[0], "torch": torch.__version__})  # fmt: skip
        print(f"{name:16} {seconds:.3f} s for {options.images} pictures")
    if options.save:
        files.write(ROOT / "benchmarks" / "results" / "stamp.csv", files.csv_text(rows, COLUMNS))


def closed_form(name, split):
    """The attack's trigger on test pictures, None where it is a network; its pattern comes from one step on an untrained one."""
    script = importlib.import_module(f"attack.{name}")
    options = set(script.Config.__dataclass_fields__)
    if name == "clean" or NETWORKS & options:
        return None
    config = script.Config(**({"steps": 1} if "steps" in options else {}))
    spec = Spec("random", 10, 32, (0.5,) * 3, (0.25,) * 3, True, {})
    untrained = models.build("resnet9", spec, 4).eval().requires_grad_(False).to(split.images.device)
    index = torch.arange(10, device=split.images.device)
    parts = [script.prepare(config, Workshop(spec, split, index, lambda: (untrained, {})))] if hasattr(script, "prepare") else []
    return script.make_trigger(config, spec, "test", *parts)


def timed(trigger, split):
    index = torch.arange(len(split), device=split.images.device)
    begin = time.perf_counter()
    poison.stamp(split.images, trigger, index)
    if split.images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
