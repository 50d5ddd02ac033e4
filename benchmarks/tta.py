"""How much does test-time augmentation add to a victim's accuracy?

    python -m benchmarks.tta --result_file strong_clean

Published numbers of fast training have it; no table here does. Prints the ACC of a record's victim
on the clean test set as everywhere here, and the ACC of the mean of its logits over six views of
every image: as it is (half of the weight), shifted by a pixel up and left, and down and right (a
quarter each), each with its mirror image. That is the evaluation of Jordan 2024 (arXiv 2404.00498).
"""

import argparse
import sys

import torch
import torch.nn.functional as F

from antidote_bench.utils.config import Defense
from antidote_bench.utils.data.loader import forward_all
from antidote_bench.utils.device import setup
from antidote_bench.utils.launch import guard
from antidote_bench.utils.record import contents


def averaged(model, images):
    """The mean logits N,classes over the six views of images N,3,S,S."""
    padded = F.pad(images, (1,) * 4, "reflect")
    views = {images: 1 / 2, padded[..., :-2, :-2]: 1 / 4, padded[..., 2:, 2:]: 1 / 4}
    return sum(weight * (model(view) + model(view.flip(-1))) / 2 for view, weight in views.items())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--result_file", required=True, help="the record: a folder, or its name below record_path"
    )
    for name in ("record_path", "dataset_path", "cache_path", "device"):
        parser.add_argument(f"--{name}")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    return guard(lambda: show(Defense(**given)))


@torch.inference_mode()
def show(config):
    config, device = setup(config)
    loaded = contents.load(config.record, config, device)
    model, test = loaded.model, loaded.test_sets.test
    for name, predict in (
        ("ACC", model),
        ("with test-time augmentation", lambda images: averaged(model, images)),
    ):
        hits = forward_all(
            model,
            test,
            lambda images, labels, _, predict=predict: predict(images).argmax(1) == labels,
            config.precision,
        )
        print(f"{name} {100 * hits.float().mean():.2f}")


if __name__ == "__main__":
    sys.exit(main())
