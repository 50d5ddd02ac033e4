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

from utils import device as devices
from utils import files, poison
from utils.config import Attack, CleanModel
from utils.data import Spec, Split
from utils.workshop import Workshop

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ["attack", "images", "seconds", "device", "torch"]
DRAWN = {"trojan_sq", "trojan_wm", "l0_inv", "l2_inv"}  # their patterns can be drawn without a clean model
STEPS = {"generator_epochs", "bits"}  # options of attacks whose trigger is a network


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
    """The attack's trigger on test pictures, None where it needs a network or a clean model."""
    script = importlib.import_module(f"attack.{name}")
    if name == "clean" or STEPS & set(script.Config.__dataclass_fields__):
        return None
    config = script.Config(**({"pattern": "drawn"} if name in DRAWN else {}))
    spec = Spec("random", 10, 32, (0.5,) * 3, (0.25,) * 3, True, {})
    if not hasattr(script, "prepare"):
        return script.make_trigger(config, spec, "test")
    if name in ("lf", "smooth"):
        parts = {"pattern": torch.rand(3, 32, 32) * 0.2}
    elif name == "trojannn":
        parts = {"pattern": torch.rand(3, 32, 32), "mask": torch.ones(1, 32, 32)}
    elif isinstance(config, CleanModel) and name not in DRAWN:
        parts = {"row": torch.empty(1), "perturbations": torch.empty(0)}
    else:
        parts = script.prepare(config, Workshop(spec, split, torch.arange(10), None))
    return script.make_trigger(config, spec, "test", parts)


def timed(trigger, split):
    index = torch.arange(len(split), device=split.images.device)
    begin = time.perf_counter()
    poison.stamp(split.images, trigger, index)
    if split.images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
