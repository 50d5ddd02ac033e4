"""What does `fit` cost beyond the network's arithmetic?

    python -m benchmarks.fit --model resnet9 --width 16 --precision bf16

Times epochs of `utils.train.fit` (shuffling, crop and mirror, loss, checkpoint) in turn with epochs of a bare loop of
forward, backward and step over batches that lie ready as floats: same network, precision, optimiser and memory
settings. Prints the median of the per-pair ratios, and appends it to benchmarks/results/fit.csv with --save.
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import models
from utils import device as devices
from utils import train
from utils.batch import augmentation, batches
from utils.config import Attack
from utils.data import Spec, Split


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet9")
    parser.add_argument("--width", type=int)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=5120, help="per epoch")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    ratio, seconds = measure(options)
    row = {
        "model": models.label(options.model, options.width), "precision": options.precision, "batch_size": options.batch_size,
        "images": options.images, "pairs": options.pairs, "ratio": round(ratio, 3), "images_per_second": round(options.images / seconds),
        "device": options.device_name, "torch": torch.__version__,
    }  # fmt: skip
    print("  ".join(f"{key} {value}" for key, value in row.items()))
    if options.save:
        append(Path(__file__).parent / "results" / "fit.csv", row)


def measure(options):
    """(median of fit's time over the bare loop's, median seconds of an epoch of fit)"""
    asked = Attack(device=options.device, precision=options.precision, epochs=1, batch_size=options.batch_size)
    config, device = devices.setup(asked)
    options.precision, options.device_name = config.precision, devices.name_and_peak(device)[0]
    spec = Spec("random", 10, 32, (0.5,) * 3, (0.25,) * 3, True, {})
    labels = torch.randint(0, 10, (options.images,), device=device)
    split = Split(torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8, device=device), labels, labels)
    ready = [(images.clone(), labels) for images, labels, _ in batches(split, options.batch_size)]
    model = models.build(options.model, spec, options.width).to(device)

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            train.fit(model, split, config, augment=augmentation(spec), checkpoint=Path(folder) / "state")

    pairs = [(timed(ours, device), timed(lambda: bare_epoch(model, ready, config), device)) for _ in range(options.pairs + 1)][1:]
    return statistics.median(one / other for one, other in pairs), statistics.median(one for one, _ in pairs)


def bare_epoch(model, ready, config):
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)
    for images, labels in ready:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def append(path, row):
    """Add a row to a CSV of results; the header is written with the first."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            table.writeheader()
        table.writerow(row)


def timed(work, device):
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
