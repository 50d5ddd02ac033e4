"""Does every attack work, and what does it cost? Runs them all, each as a user would, and writes one table.

    python -m benchmarks.attacks --plan digits --seeds 0
    python -m benchmarks.attacks --plan cifar10 --seeds 0
    python -m benchmarks.attacks --plan published --only badnet --seeds 0

The plan `digits` takes seconds a run on a CPU, `cifar10` (for what the digits are too simple for) minutes; `published` is
PreAct-ResNet18 for 100 epochs, for a GPU, and --only cuts it into pieces. Finished runs are not repeated, interrupted ones go
on. With --save the rows of all records found go to benchmarks/results/attacks.csv, and the table to attack/README.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from utils import files, published

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, MARKS = ROOT / "benchmarks/results/attacks.csv", ROOT / "attack/README.md", ("<!-- table -->", "<!-- end of table -->")
COLUMNS = ["plan", "attack", "options", "model", "recipe", "precision", "n_poison", "pratio_effective", "seed", "acc", "asr", "ra",
           "seconds", "trigger_seconds", "device", "version"]  # fmt: skip
SMALL = ["--dataset", "cifar10", "--model", "resnet9", "--width", "16", "--epochs", "10", "--lr", "0.1"]
NAMES = sorted(path.stem for path in (ROOT / "attack").glob("[a-z]*.py"))
DIGITS = {
    "badnet_grid": "--patch grid", "wanet": "--strength 2 --pratio 0.2", "inputaware": "--pratio 0.2 --generator_epochs 40",
    "refool": "--blend_size 160",  # as it was measured
    "adaptive_blend": "--pratio 0.02 --cover_ratio 0.02", "adaptive_patch": "--pratio 0.1 --cover_ratio 0.05",
}  # fmt: skip
CIFAR10 = {
    **{name: "" for name in ("badnet", "blended", "wanet", "ctrl", "clean")},
    "sig": "--pratio 0.05", "ftrojan": "--magnitude 60",
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=["digits", "cifar10", "published"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of attacks")
    parser.add_argument("--record_path", default="record/attacks")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="after --: options for every script, --dataset_path say")
    options = parser.parse_args()
    failed = []
    for seed in options.seeds if options.plan else []:
        for name, words in plan(options.plan).items():
            if not options.only or name in options.only:
                failed += run(options, name, words, seed)
    rows = collect(Path(options.record_path))
    print(table(rows))
    if options.save:
        publish(RESULTS, files.csv_text(rows, COLUMNS), PAGE, table(rows))
    sys.exit(f"error: these runs failed: {', '.join(failed)}" if failed else 0)


def publish(results, rows, page, shown):
    """Write the rows to a CSV file and what is shown of them between the marks of a page."""
    files.write(results, rows)
    before, rest = page.read_text().split(MARKS[0])
    files.write(page, f"{before}{MARKS[0]}\n\n{shown}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def plan(which):
    """name -> the words that follow the script's"""
    if which == "digits":
        return {name: DIGITS.get(name, "").split() for name in sorted({*NAMES, "badnet_grid"})}
    if which == "cifar10":
        return {name: SMALL + words.split() for name, words in CIFAR10.items()}
    return {name: ["--yaml_path", f"config/attack/{name}.yaml"] for name in NAMES}


def run(options, name, words, seed):
    script = "badnet" if name == "badnet_grid" else name
    command = ["-m", f"attack.{script}", *words, *[word for word in options.rest if word != "--"], "--random_seed", seed, "--poison_seed", seed,
               "--record_path", options.record_path, "--save_folder_name", f"{options.plan}-{name}-{seed}"]  # fmt: skip
    print(f"{options.plan} {name} {' '.join(words)} seed {seed}", flush=True)
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT)
    return [f"{name} seed {seed}"] if done.returncode else []


def collect(records):
    """A row for every complete record that a plan has made."""
    rows = []
    for place in sorted(records.glob("*/record.json")):
        which, name, _ = place.parent.name.split("-")
        info, (row,) = json.loads(place.read_text()), files.read_csv(place.parent / "results.csv")
        told = {
            "plan": which,
            "attack": name,
            "options": " ".join(plan(which)[name]),
            "trigger_seconds": str(info.get("trigger_seconds", "")),
        }
        rows.append({column: {**row, **told}[column] for column in COLUMNS})
    return rows


def table(rows):
    """Markdown: a line for every attack of every plan; mean and sample standard deviation over the seeds, in percent."""
    lines = ["| attack | run | poisoned | ACC | ASR | RA | training s | trigger s | n | published |",
             "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    figures = published.read()
    for name, which in sorted({(row["attack"], row["plan"]) for row in rows}, key=lambda pair: (pair[0], -len(pair[1]))):
        same = [row for row in rows if (row["attack"], row["plan"]) == (name, which)]
        flags = same[0]["options"].removeprefix(" ".join(SMALL)).strip()
        shown = [spread([100 * float(row[key]) for row in same]) for key in ("acc", "asr", "ra")]
        cost = [spread([float(row[key]) for row in same if row[key]], digits=0) for key in ("seconds", "trigger_seconds")]
        figure = figures.get(("cifar10", "preactresnet18", name, 0.1, "none"))
        cells = [f"`{name}`", f"{which} `{flags}`" if flags else which, f"{100 * float(same[0]['pratio_effective']):.1f} %", *shown, *cost,
                 str(len(same)), " / ".join(f"{100 * figure[key]:.1f}" for key in ("acc", "asr", "ra")) if figure else "–"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values, digits=1):
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and digits else mean


if __name__ == "__main__":
    main()
