"""Write some test images of a data set as folders, one for each class, for audit.py --images.

    python -m benchmarks.task_images digits --output images

Audits are compared with reference models that were scored with the same images, so they must be
written in the same way: the first test images of every class.
"""

import argparse
import sys
from pathlib import Path

import torch

from antidote_bench.utils.data import dataset
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.exchange import image_folders
from antidote_bench.utils.launch import guard


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.task_images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("dataset", help="digits, cifar10 or another one")
    parser.add_argument("--count", type=int, default=10, help="images of a class (default: 10)")
    parser.add_argument("--dataset_path", default="data", help="where the data set lies")
    parser.add_argument("--cache_path", default="data/cache", help="of decoded data sets")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    asked = parser.parse_args(argv)
    return guard(lambda: write(asked))


def write(asked):
    """Write the images; ConfigError (exit 2) where a class has fewer."""
    data = dataset.open_dataset(asked.dataset, asked.dataset_path, cache=asked.cache_path)
    chosen = first_of_each_class(data.test.labels, data.spec.classes, asked.count)
    names = image_folders.class_folders(data.spec.class_names, data.spec.classes)
    with image_folders.new_folder(asked.output) as folder:
        paths = [
            folder / names[label] / f"{place:05d}.png"
            for place, label in zip(chosen.tolist(), data.test.labels[chosen].tolist(), strict=True)
        ]
        image_folders.write_all(data.test.view(chosen).images, paths)
    print(f"{len(paths)} images written to {asked.output}")


def first_of_each_class(labels, classes, count):
    """The positions of the first `count` images of every class, in ascending order."""
    places = [(labels == label).nonzero().flatten() for label in range(classes)]
    least = min(map(len, places))
    if not 1 <= count <= least:
        raise ConfigError(f"--count must be from 1 to {least}, the images of the smallest class")
    return torch.cat([each[:count] for each in places]).sort().values


if __name__ == "__main__":
    sys.exit(main())
