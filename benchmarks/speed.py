"""How fast is everything here, against the least that the arithmetic allows and against how the field does it?

    python -m benchmarks.speed --dataset_path data --save
    python -m benchmarks.speed --parts fit field --models preactresnet18 --precisions bf16

Every part times ours in turn with a reference, in one process with the same memory settings, and prints the median ratio:

fit       an epoch of `utils.train.fit` over a bare loop of forward, backward and step on batches that lie ready as floats;
          on a GPU with and without --compile and CUDA graphs, on both sides
compile   forward, backward and step with --compile default over the same without, and how long the kernels take to be made
stream    the same for pictures of 224 pixels in image folders that stay in their file (--resident_gb 0)
field     an epoch as the field writes it (benchmarks/plain.py) over one of ours
evaluate  ACC, ASR and RA over one bare forward pass of the same pictures
stamp     seconds to put each trigger on 10,000 pictures of 32x32 pixels, for triggers that are no network
fmp, awm, trap_and_replace   plain references of their work (benchmarks/plain.py) over ours; `tensors` is one without PIL
baselines the other defenses at one epoch, round or step-wise pass of each stage, in bare passes (forward, backward, step) over the pictures that
          they work on: the clean ones, or the found training set where they hold none; `target` says how many the equations have
start     seconds from `import torch` until the first batch is ready to be trained on, with an empty cache and with a filled one
memory    peak of an attack on --dataset (20 steps, the test, saving): the whole process on a CPU, allocated memory on a GPU

--save puts the rows in benchmarks/results/speed.csv, in place of older ones of the same part, device and version of torch.
"""

import argparse
import copy
import dataclasses
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

import models
from benchmarks import plain
from benchmarks.plain import SPEC, pictures
from utils import data, files, metrics, optimizers, poison, train
from utils import device as devices
from utils.batch import BATCH, augmentation, batches
from utils.config import Attack
from utils.record import Record
from utils.workshop import Workshop

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "speed.csv"
COLUMNS = ["part", "what", "value", "unit", "target", "seconds", "reference_seconds", "n", "device", "torch"]
KEY = ("part", "what", "device", "torch")
TIMES, FASTER = "times the reference's time", "times faster than the reference"
NETWORKS = {"generator_epochs", "bits"}  # options of attacks whose trigger is a network

# A process that measures one attack: it ends when the first batch lies ready, or trains for 20 steps, judges, saves, and says what
# that took.
PROBE = """
import itertools, resource, sys, time
import torch
begin = time.perf_counter()
from attack import badnet
from utils import config, train

def epoch(network, order, rates, weights, *rest):
    if {start}:
        next(order)
        print("first", time.perf_counter() - begin, flush=True)
        sys.exit(0)
    return whole(network, itertools.islice(order, 20), rates[:20], weights[:20], *rest)

whole, train.one_pass = train.one_pass, epoch
badnet.main(config.parse(badnet.Config, sys.argv[1:]))
allocated = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, allocated)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--models", nargs="+", default=["resnet9_w16", "resnet9", "preactresnet18"], help="resnet9_w16: of width 16")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], help="by default fp32, and bf16 where the device has it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of pictures")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dataset", default="cifar10", help="of start and memory")
    parser.add_argument("--dataset_path", default="data")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    options.config, options.at = devices.setup(Attack(device=options.device, batch_size=options.batch_size))
    options.precisions = options.precisions or (["fp32", "bf16"] if devices.computes_bf16(options.at) else ["fp32"])
    name = devices.name_and_peak(options.at)[0]
    if options.at.type == "cpu":
        name = f"{name}, {torch.backends.cpu.get_cpu_capability()}{' with bf16' if devices.computes_bf16(options.at) else ''}"
    for part in options.parts:
        for row in PARTS[part](options):
            row = {"part": part, **row, "device": name, "torch": torch.__version__}
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if options.save:
                save(row)


def save(row):
    old = files.read_csv(RESULTS) if RESULTS.exists() else []
    rows = [other for other in old if any(other[key] != str(row[key]) for key in KEY)]
    files.write(RESULTS, files.csv_text([*rows, row], COLUMNS))


def fit(options):
    modes = ["none", "default", "cuda_graphs"] if options.at.type == "cuda" else ["none"]
    for name, precision, compile in [(n, p, c) for n in options.models for p in options.precisions for c in modes]:
        count = scaled(options, 50_000 if options.at.type == "cuda" else 5120 if name == "resnet9_w16" else 512)
        config = dataclasses.replace(options.config, epochs=1, precision=precision, compile=compile)
        model, split = network(name, options), pictures(count, options.at)
        row = compare(epoch_of_fit(model, split, config, SPEC), bare_epoch(model, split, config), options)
        compiled = "" if compile == "none" else f", compile {compile}"
        what = f"{name}, {precision}, batch {config.batch_size}{compiled}, {count} pictures"
        yield {"what": what, **row, "target": "at most " + ("1.10" if options.at.type == "cpu" else "1.15")}


def epoch_of_fit(model, split, config, spec):
    """One as users have it, with augmentation and checkpoint; to be called."""

    def epoch():
        with tempfile.TemporaryDirectory() as folder:
            train.fit(model, split, config, augment=augmentation(spec), checkpoint=Path(folder) / "state")

    return epoch


def bare_epoch(model, split, config):
    """One of forward, backward and step over batches that lie ready; to be called."""
    ready = [(images.clone(), labels) for images, labels, _ in batches(split, config.batch_size)]
    bare = model if config.compile == "none" else torch.compile(model, mode=train.COMPILE[config.compile])

    def epoch():
        model.to(memory_format=torch.channels_last).train()
        optimizer = optimizers.sgd(model.parameters(), config)
        for images, labels in ready:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = F.cross_entropy(bare(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return epoch


def compiled(options):
    for name in options.models:
        precision, count = options.precisions[-1], scaled(options, 50_000 if options.at.type == "cuda" else 2048)
        config = dataclasses.replace(options.config, epochs=1, precision=precision)
        model, split = network(name, options), pictures(count, options.at)
        kernels = bare_epoch(copy.deepcopy(model), split, dataclasses.replace(config, compile="default"))
        first = timed(kernels, options.at)
        row = compare(kernels, bare_epoch(model, split, config), options)
        what = f"{name}, {precision}, batch {config.batch_size}, {count} pictures"
        yield {"what": f"{what}, with --compile default over without", **row}
        yield {"what": f"{what}, making the kernels", "value": round(first - row["seconds"], 1), "unit": "seconds", "n": 1}


def stream(options):
    count, size = scaled(options, 2048 if options.at.type == "cuda" else 96), 224
    config = dataclasses.replace(options.config, epochs=1, batch_size=min(32, count), precision=options.precisions[-1])
    with tempfile.TemporaryDirectory() as folder:
        generator = torch.Generator().manual_seed(0)
        for split, number in (("train", count), ("test", 10)):
            for position in range(number):
                place = Path(folder) / split / str(position % 2)
                place.mkdir(parents=True, exist_ok=True)
                small = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8, generator=generator)
                to_pil_image(small).resize((size, size)).save(place / f"{position}.jpg")
        spec, stored, _ = data.load("folder", folder, image_size=size, device=options.at, cache=Path(folder) / "cache", resident_gb=0)
        model = models.build("resnet18", spec).to(options.at)
        row = compare(epoch_of_fit(model, stored, config, spec), bare_epoch(model, stored, config), options)
    what = f"resnet18, {config.precision}, batch {config.batch_size}, {count} pictures of {size} pixels"
    yield {"what": what, **row, "target": "at most 1.3"}


def field(options):
    for name in small_enough(options):
        count = scaled(options, 50_000 if options.at.type == "cuda" else 5120 if name == "resnet9_w16" else 512)
        precision = options.precisions[-1]
        config = dataclasses.replace(options.config, epochs=1, precision=precision)
        split, exam = pictures(count, options.at), [pictures(max(count // 5 * share // 10, 1), options.at, share) for share in (10, 9)]
        ours = epoch_of_fit(network(name, options), split, config, SPEC)
        row = compare(ours, plain.of_epoch(network(name, options), split, exam, config), options, faster=True)
        target = "" if name != "preactresnet18" else "at least 3" if options.at.type == "cpu" else "at least 5"
        yield {"what": f"{name}, {precision} against fp32, batch {config.batch_size}", **row, "target": target}


def evaluate(options):
    for name in options.models:
        count = scaled(options, 10_000 if options.at.type == "cuda" or name == "resnet9_w16" else 1000)
        for precision in options.precisions:
            model = network(name, options).to(memory_format=torch.channels_last).eval()
            test, backdoor = pictures(count, options.at), pictures(count * 9 // 10, options.at)
            ready = [images.clone() for split in (test, backdoor) for images, _, _ in batches(split, BATCH)]

            exam = metrics.Exam(test, backdoor)

            @torch.inference_mode()
            def reference(model=model, ready=ready, precision=precision):
                with torch.autocast(options.at.type, torch.bfloat16, enabled=precision == "bf16"):
                    for images in ready:
                        model(images)

            def ours(model=model, exam=exam, precision=precision):
                metrics.evaluate(model, exam, precision)

            yield {"what": f"{name}, {precision}", **compare(ours, reference, options), "target": "at most 1.05"}


def stamp(options):
    split = pictures(scaled(options, 10_000), options.at)
    index = torch.arange(len(split), device=options.at)
    for name in sorted(path.stem for path in (ROOT / "attack").glob("[a-z]*.py")):
        trigger = closed_form(name, split)
        if trigger is not None:
            seconds = [timed(lambda use=trigger: poison.stamp(split.images, use, index), options.at) for _ in range(options.pairs)]
            value = {"value": round(statistics.median(seconds), 3), "unit": f"seconds for {len(split)} pictures"}
            yield {"what": name, **value, "target": "at most 2", "n": options.pairs}


def closed_form(name, split):
    """The attack's trigger on test pictures, None where it is a network; its pattern comes from one step on an untrained one."""
    script = importlib.import_module(f"attack.{name}")
    known = set(script.Config.__dataclass_fields__)
    if name == "clean" or NETWORKS & known:
        return None
    config = script.Config(**({"steps": 1} if "steps" in known else {}))
    untrained = models.build("resnet9", SPEC, 4).eval().requires_grad_(False).to(split.labels.device)
    index = torch.arange(10, device=split.labels.device)
    made = [script.prepare(config, Workshop(SPEC, split, index, lambda: (untrained, {})))] if hasattr(script, "prepare") else []
    return script.make_trigger(config, SPEC, "test", *made)


def defense(options, method):
    for name in small_enough(options)[: 1 if options.at.type == "cpu" else None]:
        for kind, ours, reference in plain.METHODS[method](parts(name, SPEC), options.scale, options.config, options.at):
            row = compare(ours, reference, options, faster=True)
            yield {"what": f"{kind}, {name}, {options.config.precision}", **row, "target": "" if kind == "tensors" else TARGETS[method]}


def baselines(options):
    counts = (2500, 50_000) if options.at.type == "cuda" else (500, 2000)
    clean, found = (pictures(max(scaled(options, count), 100), options.at) for count in counts)  # some of every class to choose by
    for label in small_enough(options)[: 1 if options.at.type == "cpu" else None]:
        model, precision = network(label, options), options.precisions[-1]
        for name, (passes, settings) in PASSES.items():
            script = importlib.import_module(f"defense.{name}")
            config = script.Config(result_file="none", precision=precision, **settings)
            split = clean if config.holds_clean else found
            bare = bare_epoch(copy.deepcopy(model), split, dataclasses.replace(options.config, precision=precision))
            row = compare(repaired(script, config, model, label, clean, found), bare, options)
            what = f"{name}, {label}, {precision}, {len(split)} {'clean' if config.holds_clean else 'found'} pictures"
            yield {"what": what, **row, "unit": "passes", "target": f"{passes} in the equations"}


def repaired(script, config, model, label, clean, found):
    """The method's whole work on a copy of `model`, its files included; to be called."""

    def repair():
        with tempfile.TemporaryDirectory() as folder:
            index = torch.arange(len(clean), device=clean.labels.device)
            name, _, width = parts(label, SPEC)
            script.repair(copy.deepcopy(model), Record(SPEC, found, clean, index, name, width, Path(folder) / "state", Path(folder) / "shared",
                                                       lambda *_, **__: None), config)  # fmt: skip

    return repair


def start(options):
    with tempfile.TemporaryDirectory() as folder:
        for what in ("empty cache", "filled cache"):
            found = probe(options, folder, options.models[-1], start=True)
            yield {"what": f"{options.dataset}, {options.models[-1]}, {what}", "value": round(found["first"][0], 2), "unit": "seconds",
                   "target": "at most 3" if what == "filled cache" else "", "n": 1}  # fmt: skip


def memory(options):
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            cpu = options.at.type == "cpu"
            found = probe(options, folder, name, start=False)
            yield {"what": f"{options.dataset}, badnet, {name}, batch 128", "value": round(found["peak"][0 if cpu else 1]), "unit": "MiB",
                   "target": "at most 1600" if cpu else "at most 2500", "n": 1}  # fmt: skip


def probe(options, folder, name, *, start):
    """{what: numbers} that a run of BadNets in a process of its own reports."""
    model, _, width = parts(name, SPEC)
    words = ["--dataset", options.dataset, "--dataset_path", options.dataset_path, "--model", model, "--device", options.device,
             "--batch_size", "128", "--epochs", "1", "--cache_path", f"{folder}/cache", "--record_path", folder, "--overwrite",
             *(["--width", str(width)] if width else [])]  # fmt: skip
    place = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROBE.format(start=start), *words], capture_output=True, text=True, env=place, check=False)
    if done.returncode:
        raise SystemExit(f"error: the attack that was to be measured failed: {done.stderr.strip().splitlines()[-1]}")
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: [float(number) for number in numbers] for name, *numbers in lines if name in ("first", "peak")}


def compare(ours, reference, options, *, faster=False):
    """Ours in turn with the reference, after one round that does not count."""
    pairs = [(timed(ours, options.at), timed(reference, options.at)) for _ in range(options.pairs + 1)][1:]
    ratio = statistics.median(other / one if faster else one / other for one, other in pairs)
    seconds, others = (round(statistics.median(times), 3) for times in zip(*pairs, strict=True))
    unit = FASTER if faster else TIMES
    return {"value": round(ratio, 3), "unit": unit, "seconds": seconds, "reference_seconds": others, "n": options.pairs}


def timed(work, device):
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def parts(label, spec):
    """What models.build takes for a name as result tables have it."""
    name, _, width = label.rpartition("_w")
    return (name, spec, int(width)) if name in models.DEFAULT_WIDTH and width.isdigit() else (label, spec, None)


def network(label, options):
    return plain.network(parts(label, SPEC), options.at)


def small_enough(options):
    """The networks whose references end within minutes: on a CPU all but the wide resnet9."""
    return [name for name in options.models if options.at.type == "cuda" or name != "resnet9"]


def scaled(options, count):
    return max(int(count * options.scale), 2)


# defense: (passes over its pictures that the equations have, at these options). A look without a gradient is a third of a pass, and a
# gradient of a gradient three. Fifths are those of the pictures held back to choose by, of which one setting at least is tried.
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
    "stamp": stamp, "fit": fit, "compile": compiled, "evaluate": evaluate, "field": field, "stream": stream,
    **{name: (lambda options, name=name: defense(options, name)) for name in TARGETS},
    "baselines": baselines, "start": start, "memory": memory,
}  # fmt: skip

if __name__ == "__main__":
    main()
