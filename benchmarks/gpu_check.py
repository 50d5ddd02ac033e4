"""Does a GPU compute what a CPU computes? Every attack and every defense on the digits, on both.

    make gpu
    python -m benchmarks.gpu_check --methods badnet ft

Each method runs for one epoch of every stage, in float32 without TF32, on a narrow resnet9; the
defenses repair one BadNets victim, which is trained on the CPU first. Random numbers are drawn on
the CPU for both, so that both do the same work and differ by rounding only. ACC, ASR and RA may
differ by TOLERANCE, and `weights`, the distance of the two networks' weights as a share of their
length, by WEIGHTS for an attack. That of a defense is reported and not compared, because choices by
rank magnify what rounding does. Rows that differ more or that failed make the exit code 1.

The rows go to benchmarks/results/gpu_check.csv, in place of older ones of the same device. Without
a GPU the exit code is 2. `--device cpu` compares the CPU with itself on other kernels (without
oneDNN) and writes no file: that checks this script, and shows what rounding alone does.
"""

import argparse
import contextlib
import csv
import importlib
import io
import sys
import tempfile
import time
import warnings
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F

from antidote_bench.utils import files, parsing
from antidote_bench.utils.config import scripts
from antidote_bench.utils.errors import ConfigError, UserError
from antidote_bench.utils.launch import guard
from antidote_bench.utils.record import folder as layout

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_check.csv"
TOLERANCE = 0.03  # of ACC, ASR and RA, which are shares of 450 to 500 images
WEIGHTS = 0.02  # of an attack's victim; rounding alone came to 5e-4 on a CPU
MINUTES = 8.5  # after these no further method is begun
MEASURES = ("acc", "asr", "ra")
COLUMNS = [
    "kind", "name", "seconds", "cpu_seconds", "peak_mb", "acc", "cpu_acc", "asr", "cpu_asr",
    "ra", "cpu_ra", "weights", "verdict", "device", "cpu", "torch",
]  # fmt: skip
SHOWN = ["name", "seconds", "cpu_seconds", "peak_mb", *COLUMNS[5:13]]
VICTIM_EPOCHS = 5
# the most of what is not counted in epochs
LIMITS = {"steps": 3, "rounds": 1, "start_batches": 2, "scenes": 20}
# few steps in an epoch: within thirty, a network trained from scratch magnifies rounding until its
# answers differ
BATCH = 512


def main(words=None):
    options = parse(words)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(
            "there is no CUDA GPU here: run this where torch.cuda.is_available() is True, or with "
            "--device cpu"
        )
    device, begin = torch.device(options.device), time.perf_counter()
    rows, left = [], []
    print_row(dict(zip(SHOWN, SHOWN, strict=True)))
    with tempfile.TemporaryDirectory() as base, same_draws():
        train_victim(base)
        for kind, name in options.methods:
            if time.perf_counter() - begin > 60 * options.minutes:
                left.append(name)
                continue
            rows.append(compare(kind, name, device, base))
            print_row(rows[-1])
    if options.results:
        save(options.results, rows)
    print(f"{len(rows)} methods in {time.perf_counter() - begin:.0f} s on {rows[0]['device']}")
    bad = [row["name"] for row in rows if row["verdict"] != "equal"]
    if bad or left:
        late = f"not run after {options.minutes:g} minutes: {', '.join(left)}" if left else ""
        wrong = f"not equal: {', '.join(bad)}" if bad else ""
        raise UserError("; ".join(filter(None, [wrong, late])))


def parse(words):
    known = [(kind, name) for kind in ("attack", "defense") for name in scripts(kind)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 ... or cpu")
    parser.add_argument(
        "--methods", nargs="+", choices=[name for _, name in known], help="by default all"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="begin no method after that")
    parser.add_argument("--results", type=Path, help=f"by default {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args(words)
    if options.results is None and options.device != "cpu":
        options.results = RESULTS
    chosen = options.methods or [name for _, name in known]
    options.methods = [(kind, name) for kind, name in known if name in chosen]
    return options


def compare(kind, name, device, base):
    """The row of one method."""
    row = {"kind": kind, "name": name, "cpu": f"{torch.get_num_threads()} threads"}
    row |= {"device": name_of(device), "torch": torch.__version__, "verdict": "equal"}
    try:
        here, row["cpu_seconds"], _ = run(kind, name, torch.device("cpu"), base, "cpu")
        with other_kernels(device):
            there, row["seconds"], row["peak_mb"] = run(kind, name, device, base, "device")
    except Exception as error:  # one method that fails must not hide what the others do
        what = " ".join(str(error).split())[:200]
        return row | {"verdict": f"failed: {type(error).__name__}: {what}"}
    ours, theirs = (measures(folder) for folder in (there, here))
    for name in MEASURES:
        row |= {name: ours[name], f"cpu_{name}": theirs[name]}
    far = distance(there, here)
    verdict = "equal" if equal(kind, ours, theirs, far) else "differs"
    return row | {"weights": f"{far:.1e}", "verdict": verdict}


def equal(kind, ours, theirs, far):
    """Whether two runs agree in ACC, ASR and RA, and those of an attack in their weights too."""
    measured = all(near(ours[name], theirs[name]) for name in MEASURES)
    return measured and (kind == "defense" or far <= WEIGHTS)


def near(one, other):
    if one == "" or other == "":
        return one == other
    return abs(float(one) - float(other)) <= TOLERANCE


def run(kind, name, device, base, label):
    """(the record's folder, seconds, peak memory in MB or "" on a CPU) of a run on `device`."""
    script = importlib.import_module(f"antidote_bench.{kind}.{name}")
    folder = f"{name}-{label}"
    words = few(kind, script.Config, device, base) + ["--save_folder_name", folder]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    call(script, words)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = round(time.perf_counter() - begin, 2)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    where = Path(base) / "record"
    where = where / folder if kind == "attack" else where / "victim" / layout.DEFENSES / folder
    return where, seconds, "" if peak is None else round(peak)


def train_victim(base):
    """The record that every defense repairs."""
    script = importlib.import_module("antidote_bench.attack.badnet")
    words = few("attack", script.Config, torch.device("cpu"), base)
    trained = {"epochs": VICTIM_EPOCHS, "batch_size": 32, "save_folder_name": "victim"}
    call(
        script,
        words + [str(word) for pair in trained.items() for word in ("--" + pair[0], pair[1])],
    )


def call(script, words):
    """What a script does with these options; what it prints is not shown."""
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        script.main(parsing.parse(script.Config, words))


def few(kind, Config, device, base):
    """The options of a short run on the digits."""
    known = Config.__dataclass_fields__
    chosen = {name: 1 for name in known if name.endswith("epochs")}
    for name, most in LIMITS.items():
        if name in known and known[name].default > most:
            chosen[name] = most
    chosen |= {"device": device, "precision": "fp32", "record_path": Path(base) / "record"}
    chosen |= {"cache_path": Path(base) / "cache"}
    chosen |= {option: BATCH for option in known if option in ("batch_size", "ssl_batch_size")}
    if kind == "attack":
        chosen |= {"dataset": "digits", "model": "resnet9", "width": 8}
    else:
        chosen["result_file"] = "victim"
    return [str(word) for name, value in chosen.items() for word in (f"--{name}", value)]


def measures(folder):
    """{acc, asr, ra} of a record, as text."""
    with open(folder / layout.RESULTS, newline="") as file:
        return next(csv.DictReader(file))


def distance(one, other):
    """The distance of two records' weights, as a share of the length of the second's."""
    pair = [safetensors.torch.load_file(folder / layout.WEIGHTS) for folder in (one, other)]
    flat = [
        torch.cat([tensor.double().flatten() for _, tensor in sorted(weights.items())])
        for weights in pair
    ]
    if flat[0].shape != flat[1].shape:
        return float("nan")
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu without oneDNN"


@contextlib.contextmanager
def other_kernels(device):
    """Full float32 on a GPU; on a CPU the kernels that do not come from oneDNN."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            flags = torch.backends.cudnn.flags
            stack.enter_context(flags(enabled=True, deterministic=True, allow_tf32=False))
        else:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", UserWarning)  # of oneDNN, about GPUs of Intel
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


@contextlib.contextmanager
def same_draws():
    """Have torch draw all random numbers on the CPU, and then move them.

    Otherwise a seed means other numbers on each device, and other batches.
    """

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu")

    def drawn(function):
        def draw(*args, device=None, **kwargs):
            return function(*args, **kwargs).to(device or "cpu")

        return draw

    def dropout(values, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return values
        kept = torch.rand(values.shape).to(values.device) >= p
        return values * kept / (1 - p)

    def dirichlet(concentration, generator=None):
        return real[torch, "_sample_dirichlet"](concentration.cpu()).to(concentration.device)

    new = {(torch, "Generator"): Generator, (torch, "_sample_dirichlet"): dirichlet}
    new |= {(F, "dropout"): dropout}
    for name in ("rand", "randn", "randint", "randperm"):
        new[torch, name] = drawn(getattr(torch, name))
    real = {(owner, name): getattr(owner, name) for owner, name in new}
    try:
        for (owner, name), function in new.items():
            setattr(owner, name, function)
        yield
    finally:
        for (owner, name), function in real.items():
            setattr(owner, name, function)


def print_row(row):
    cells = [f"{row.get(column, '')!s:.8}" for column in SHOWN[1:-1]]
    line = f"{row['name']:17}" + "".join(f"{cell:>12}" for cell in cells)
    print(f"{line}  {row['verdict']}", flush=True)


def save(path, rows):
    """Put the rows into the table, in place of older ones of the same device."""
    kept = []
    if path.is_file():
        with open(path, newline="") as file:
            new = {(row["kind"], row["name"], row["device"]) for row in rows}
            kept = [
                row
                for row in csv.DictReader(file)
                if (row["kind"], row["name"], row["device"]) not in new
            ]
    files.write(path, files.csv_text([*kept, *rows], COLUMNS).encode())


if __name__ == "__main__":
    sys.exit(guard(main, debug="--debug" in sys.argv))
