"""How fast is everything here, next to bare arithmetic and next to how the field does it?

    python -m benchmarks.speed --dataset_path data --save
    python -m benchmarks.speed --parts fit field --models preactresnet18 --precisions bf16

Every part times ours in turn with a reference, in one process with the same memory settings, and
prints the median ratio:

fit       an epoch of `utils.train.fit` over a bare loop of forward, backward and step on batches
          that lie ready as floats; on a GPU with and without --compile and CUDA graphs, on both
          sides
compile   forward, backward and step with --compile default over the same without, and how long the
          kernels take to be made
stream    the same as fit for images of 224 pixels in image folders that stay in their file
          (--resident_gb 0)
field     an epoch as the field writes it (benchmarks/plain.py) over one of ours
evaluate  ACC, ASR and RA over one bare forward pass of the same images
stamp     seconds to put each trigger on 10,000 images of 32x32 pixels, for triggers that are no
          network
fmp, awm, trap_and_replace
          plain references of their work (benchmarks/plain.py) over ours; `tensors` is one without
          PIL
baselines the other defenses at one epoch, round or step-wise pass of each stage, in bare passes
          (forward, backward, step) over the images that they work on: the clean ones, or the
          training set if they hold none; `target` says how many the equations have
start     seconds from `import torch` until the first batch is ready to be trained on, with an empty
          cache and with a filled one
memory    peak of an attack on --dataset (20 steps, the test, saving): the whole process on a CPU,
          allocated memory on a GPU

--save puts the rows in benchmarks/results/speed.csv, in place of older ones of the same part,
device and version of torch.
"""

import argparse
import copy
import dataclasses
import importlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

from antidote_bench import models
from antidote_bench.utils import device as devices
from antidote_bench.utils import evaluation, files, optimizers, train
from antidote_bench.utils.config import Attack, scripts
from antidote_bench.utils.data import dataset
from antidote_bench.utils.data.loader import EVALUATION_BATCH, augmentation, batches
from antidote_bench.utils.parsing import words
from antidote_bench.utils.poisoning import poison
from antidote_bench.utils.poisoning.attacker import Attacker
from benchmarks import plain
from benchmarks.plain import SPEC, random_images

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "speed.csv"
COLUMNS = [
    "part",
    "what",
    "value",
    "unit",
    "target",
    "seconds",
    "reference_seconds",
    "n",
    "device",
    "torch",
]
KEY = ("part", "what", "device", "torch")
TIMES, FASTER = "times the reference's time", "times faster than the reference"
NETWORKS = {"generator_epochs", "bits"}  # options of attacks whose trigger is a network


def main():
    options = parse()
    name = device_name(options.at)
    for part in options.parts:
        for row in PARTS[part](options):
            row = {"part": part, **row, "device": name, "torch": torch.__version__}
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if options.save:
                save(row)


def parse():
    """The options; `config` are those of a training, and `at` is the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument(
        "--models",
        nargs="+",
        default=["resnet9_w16", "resnet9", "preactresnet18"],
        help="resnet9_w16: of width 16",
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=["fp32", "bf16"],
        help="by default fp32, and bf16 where the device has it",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images")
    parser.add_argument("--pairs", type=int, default=3, help="measurements of ours and theirs")
    parser.add_argument("--dataset", default="cifar10", help="of start and memory")
    parser.add_argument("--dataset_path", default="data")
    parser.add_argument("--save", action="store_true", help="into benchmarks/results/speed.csv")
    options = parser.parse_args()
    options.config, options.at = devices.setup(
        Attack(device=options.device, batch_size=options.batch_size)
    )
    if not options.precisions:
        options.precisions = ["fp32", "bf16"][: 1 + devices.computes_bf16(options.at)]
    return options


def device_name(device):
    """The device as the rows name it."""
    name = devices.name_and_peak(device)[0]
    if device.type == "cpu":
        name += f", {torch.backends.cpu.get_cpu_capability()}"
        name += " with bf16" * devices.computes_bf16(device)
    return name


def save(row):
    old = files.read_csv(RESULTS) if RESULTS.exists() else []
    rows = [other for other in old if any(other[key] != str(row[key]) for key in KEY)]
    files.write(RESULTS, files.csv_text([*rows, row], COLUMNS))


def fit(options):
    modes = ["none", "default", "cuda_graphs"] if options.at.type == "cuda" else ["none"]
    for name, precision, compile in [
        (n, p, c) for n in options.models for p in options.precisions for c in modes
    ]:
        count = scaled(
            options, 50_000 if options.at.type == "cuda" else 5120 if name == "resnet9_w16" else 512
        )
        config = dataclasses.replace(options.config, epochs=1, precision=precision, compile=compile)
        model, split = network(name, options), random_images(count, options.at)
        row = compare(
            epoch_of_fit(model, split, config, SPEC), bare_epoch(model, split, config), options
        )
        compiled = "" if compile == "none" else f", compile {compile}"
        what = f"{name}, {precision}, batch {config.batch_size}{compiled}, {count} images"
        yield {
            "what": what,
            **row,
            "target": "at most " + ("1.10" if options.at.type == "cpu" else "1.15"),
        }


def epoch_of_fit(model, split, config, spec):
    """A function that trains for an epoch as users do, with augmentation and checkpoint."""

    def epoch():
        with tempfile.TemporaryDirectory() as folder:
            train.fit(
                model,
                split,
                train.Recipe.of(config),
                augment=augmentation(spec),
                checkpoint=Path(folder) / "state",
            )

    return epoch


def bare_epoch(model, split, config):
    """A function that does forward, backward and step over batches that lie ready, once each."""
    ready = [(images.clone(), labels) for images, labels, _ in batches(split, config.batch_size)]
    bare = (
        model
        if config.compile == "none"
        else torch.compile(model, mode=train.COMPILE[config.compile])
    )

    def epoch():
        model.to(memory_format=torch.channels_last).train()
        optimizer = optimizers.sgd(model.parameters(), config)
        for images, labels in ready:
            with torch.autocast(
                images.device.type, torch.bfloat16, enabled=config.precision == "bf16"
            ):
                loss = F.cross_entropy(bare(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return epoch


def compiled(options):
    for name in options.models:
        precision, count = (
            options.precisions[-1],
            scaled(options, 50_000 if options.at.type == "cuda" else 2048),
        )
        config = dataclasses.replace(options.config, epochs=1, precision=precision)
        model, split = network(name, options), random_images(count, options.at)
        kernels = bare_epoch(
            copy.deepcopy(model), split, dataclasses.replace(config, compile="default")
        )
        first = timed(kernels, options.at)
        row = compare(kernels, bare_epoch(model, split, config), options)
        what = f"{name}, {precision}, batch {config.batch_size}, {count} images"
        yield {"what": f"{what}, with --compile default over without", **row}
        yield {
            "what": f"{what}, making the kernels",
            "value": round(first - row["seconds"], 1),
            "unit": "seconds",
            "n": 1,
        }


def stream(options):
    count, size = scaled(options, 2048 if options.at.type == "cuda" else 96), 224
    config = dataclasses.replace(
        options.config, epochs=1, batch_size=min(32, count), precision=options.precisions[-1]
    )
    with tempfile.TemporaryDirectory() as folder:
        write_image_folders(Path(folder), count, size)
        spec, stored, _ = dataset.open_dataset(
            "folder",
            folder,
            image_size=size,
            device=options.at,
            cache=Path(folder) / "cache",
            resident_gb=0,
        )
        model = models.build("resnet18", spec).to(options.at)
        row = compare(
            epoch_of_fit(model, stored, config, spec), bare_epoch(model, stored, config), options
        )
    what = (
        f"resnet18, {config.precision}, batch {config.batch_size}, {count} images of {size} pixels"
    )
    yield {"what": what, **row, "target": "at most 1.3"}


def write_image_folders(folder, count, size):
    """A data set of `count` training images of two classes below `folder`."""
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", count), ("test", 10)):
        for position in range(number):
            place = folder / split / str(position % 2)
            place.mkdir(parents=True, exist_ok=True)
            small = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8, generator=generator)
            to_pil_image(small).resize((size, size)).save(place / f"{position}.jpg")


def field(options):
    for name in small_enough(options):
        count = scaled(
            options, 50_000 if options.at.type == "cuda" else 5120 if name == "resnet9_w16" else 512
        )
        precision = options.precisions[-1]
        config = dataclasses.replace(options.config, epochs=1, precision=precision)
        split, test_sets = (
            random_images(count, options.at),
            [
                random_images(max(count // 5 * share // 10, 1), options.at, share)
                for share in (10, 9)
            ],
        )
        ours = epoch_of_fit(network(name, options), split, config, SPEC)
        row = compare(
            ours,
            plain.of_epoch(network(name, options), split, test_sets, config),
            options,
            faster=True,
        )
        target = f"at least {3 if options.at.type == 'cpu' else 5}"
        yield {
            "what": f"{name}, {precision} against fp32, batch {config.batch_size}",
            **row,
            "target": target if name == "preactresnet18" else "",
        }


def evaluate(options):
    for name in options.models:
        count = scaled(
            options, 10_000 if options.at.type == "cuda" or name == "resnet9_w16" else 1000
        )
        for precision in options.precisions:
            model = network(name, options).to(memory_format=torch.channels_last).eval()
            test, backdoor = (
                random_images(count, options.at),
                random_images(count * 9 // 10, options.at),
            )
            ready = [
                images.clone()
                for split in (test, backdoor)
                for images, _, _ in batches(split, EVALUATION_BATCH)
            ]

            test_sets = evaluation.TestSets(test, backdoor)

            @torch.inference_mode()
            def reference(model=model, ready=ready, precision=precision):
                with torch.autocast(options.at.type, torch.bfloat16, enabled=precision == "bf16"):
                    for images in ready:
                        model(images)

            def ours(model=model, test_sets=test_sets, precision=precision):
                evaluation.evaluate(model, test_sets, precision)

            yield {
                "what": f"{name}, {precision}",
                **compare(ours, reference, options),
                "target": "at most 1.05",
            }


def stamp(options):
    split = random_images(scaled(options, 10_000), options.at)
    index = torch.arange(len(split), device=options.at)
    for name in scripts("attack"):
        trigger = closed_form(name, split)
        if trigger is None:
            continue
        work = partial(poison.apply_trigger, split.images, trigger, index)
        seconds = [timed(work, options.at) for _ in range(options.pairs)]
        yield {
            "what": name,
            "value": round(statistics.median(seconds), 3),
            "unit": f"seconds for {len(split)} images",
            "target": "at most 2",
            "n": options.pairs,
        }


def closed_form(name, split):
    """The attack's trigger on test images, None if it is a network.

    Its pattern comes from one step on an untrained network.
    """
    script = importlib.import_module(f"antidote_bench.attack.{name}")
    known = set(script.Config.__dataclass_fields__)
    if name == "clean" or NETWORKS & known:
        return None
    config = script.Config(**({"steps": 1} if "steps" in known else {}))
    if not hasattr(script, "prepare"):
        return script.make_trigger(config, SPEC, "test")
    untrained = models.build("resnet9", SPEC, 4).eval().requires_grad_(False)
    untrained = untrained.to(split.labels.device)
    index = torch.arange(10, device=split.labels.device)
    attacker = Attacker(SPEC, split, index, lambda: (untrained, {}))
    return script.make_trigger(config, SPEC, "test", script.prepare(config, attacker).parts)


def defense(options, method):
    for name in small_enough(options)[: 1 if options.at.type == "cpu" else None]:
        for kind, ours, reference in plain.METHODS[method](
            parts(name, SPEC), options.scale, options.config, options.at
        ):
            row = compare(ours, reference, options, faster=True)
            yield {
                "what": f"{kind}, {name}, {options.config.precision}",
                **row,
                "target": "" if kind == "tensors" else TARGETS[method],
            }


def baselines(options):
    counts = (2500, 50_000) if options.at.type == "cuda" else (500, 2000)
    # at least 100, so that there are some of every class to choose by
    clean, training = (
        random_images(max(scaled(options, count), 100), options.at) for count in counts
    )
    for label in small_enough(options)[: 1 if options.at.type == "cpu" else None]:
        model, precision = network(label, options), options.precisions[-1]
        for name, (passes, settings) in PASSES.items():
            script = importlib.import_module(f"antidote_bench.defense.{name}")
            config = script.Config(result_file="none", precision=precision, **settings)
            kind, split = ("clean", clean) if config.holds_clean else ("training", training)
            recipe = dataclasses.replace(options.config, precision=precision)
            bare = bare_epoch(copy.deepcopy(model), split, recipe)
            ours = repair_of(script, config, model, label, clean, training)
            yield {
                "what": f"{name}, {label}, {precision}, {len(split)} {kind} images",
                **compare(ours, bare, options),
                "unit": "passes",
                "target": f"{passes} in the equations",
            }


def repair_of(script, config, model, label, clean, training):
    """A function that does the method's whole work on a copy of `model`, its files included."""

    def repair():
        with tempfile.TemporaryDirectory() as folder:
            defender = plain.defender(training, clean, parts(label, SPEC), folder)
            script.repair(copy.deepcopy(model), defender, config)

    return repair


def start(options):
    with tempfile.TemporaryDirectory() as folder:
        for what in ("empty cache", "filled cache"):
            (seconds,) = probe("start", options, folder, options.models[-1])
            yield {
                "what": f"{options.dataset}, {options.models[-1]}, {what}",
                "value": round(seconds, 2),
                "unit": "seconds",
                "target": "at most 3" if what == "filled cache" else "",
                "n": 1,
            }


def memory(options):
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            of_process, on_gpu = probe("memory", options, folder, name)
            cpu = options.at.type == "cpu"
            yield {
                "what": f"{options.dataset}, badnet, {name}, batch 128",
                "value": round(of_process if cpu else on_gpu),
                "unit": "MiB",
                "target": "at most 1600" if cpu else "at most 2500",
                "n": 1,
            }


def probe(part, options, folder, name):
    """The numbers that a part of benchmarks.probe prints, in a process of its own."""
    model, _, width = parts(name, SPEC)
    given = {
        "dataset": options.dataset,
        "dataset_path": options.dataset_path,
        "model": model,
        "device": options.device,
        "batch_size": 128,
        "epochs": 1,
        "cache_path": f"{folder}/cache",
        "record_path": folder,
        **({"width": width} if width else {}),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.probe", part, *words(given), "--overwrite"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1]
        raise SystemExit(f"error: the attack that was to be measured failed: {why}")
    (numbers,) = re.findall(r"^(?:seconds|peaks) (.*)", done.stdout, re.M)
    return [float(number) for number in numbers.split()]


def compare(ours, reference, options, *, faster=False):
    """Times ours in turn with the reference, after one round that does not count."""
    pairs = [
        (timed(ours, options.at), timed(reference, options.at)) for _ in range(options.pairs + 1)
    ][1:]
    ratio = statistics.median(other / one if faster else one / other for one, other in pairs)
    seconds, others = (round(statistics.median(times), 3) for times in zip(*pairs, strict=True))
    unit = FASTER if faster else TIMES
    return {
        "value": round(ratio, 3),
        "unit": unit,
        "seconds": seconds,
        "reference_seconds": others,
        "n": options.pairs,
    }


def timed(work, device):
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def parts(label, spec):
    """What models.build takes for a name as result tables have it."""
    name, _, width = label.rpartition("_w")
    return (
        (name, spec, int(width))
        if name in models.DEFAULT_WIDTH and width.isdigit()
        else (label, spec, None)
    )


def network(label, options):
    return plain.network(parts(label, SPEC), options.at)


def small_enough(options):
    """The networks whose references take minutes at most: on a CPU all but the wide resnet9."""
    return [name for name in options.models if options.at.type == "cuda" or name != "resnet9"]


def scaled(options, count):
    return max(int(count * options.scale), 2)


# defense: (passes over its images that the equations have, at these options). A pass without a
# gradient counts as a third, and a gradient of a gradient as three. Fifths are the share of the
# images that is held out to choose by, of which one setting at least is tried.
PASSES = {
    "ft": (1, {"epochs": 1}),
    "fp": (1.3, {"epochs": 1}),
    "anp": (2.5, {"steps": 1}),
    "rnp": (1.7, {"epochs": 1, "mask_epochs": 1}),
    "bnp": (0.3, {}),
    "nad": (2.3, {"epochs": 1, "teacher_epochs": 1}),
    "ft_sam": (2, {"epochs": 1}),
    "i_bau": (17, {"rounds": 1}),
    "nc": (13.3, {"search_epochs": 1, "epochs": 1}),  # ten classes
    "sau": (12.3, {"epochs": 1}),
    "npd": (5.7, {"epochs": 1, "warmup_epochs": 1}),
    "mcr": (2.3, {"epochs": 1, "curve_epochs": 1}),
    "ep": (0.7, {}),
    "spectral": (1.2, {"epochs": 1}),
    "ac": (1.3, {"epochs": 1}),
    "abl": (4.3, {"isolate_epochs": 1, "epochs": 1, "unlearn_epochs": 1}),
    "nab": (2.6, {"isolate_epochs": 1, "pseudo_epochs": 1, "epochs": 1}),
    "dbd": (3.3, {"ssl_epochs": 1, "head_epochs": 1, "epochs": 1, "steps": 5}),
    "d_br": (2.9, {"feature_epochs": 1, "centre_epochs": 1, "epochs": 1}),
    "d_st": (4.8, {"feature_epochs": 1, "centre_epochs": 1, "epochs": 1, "head_epochs": 1}),
}
TARGETS = {"fmp": "", "awm": "", "trap_and_replace": "at least 3"}
PARTS = {
    "stamp": stamp,
    "fit": fit,
    "compile": compiled,
    "evaluate": evaluate,
    "field": field,
    "stream": stream,
    **{name: (lambda options, name=name: defense(options, name)) for name in TARGETS},
    "baselines": baselines,
    "start": start,
    "memory": memory,
}

if __name__ == "__main__":
    main()
