"""How well do the defenses do, and what do they cost? Runs them on the same victims, each as a user would, and writes one table.

    python -m benchmarks.defenses --plan cifar10 --seeds 0 1 2
    python -m benchmarks.defenses --plan published --seeds 0 --minutes 9

The plan `cifar10` is the small network for a CPU; `published` is PreAct-ResNet18 under the protocol of the field (100 epochs,
10 % poisoned, 5 % clean), for a GPU. Finished runs are not repeated, interrupted ones go on: with --minutes the script stops
in time, run under way included, and the same command goes on from there. The seed is that of everything: the poison, the
victim, the clean pictures, the defense. With --save the rows of all records found go to benchmarks/results/defenses.csv, and the
tables to defense/README.md.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import attacks
from utils import files

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/defenses.csv", ROOT / "defense/README.md"
COLUMNS = ["plan", "attack", "row", "options", "model", "recipe", "precision", "defense", "variant", "stage", "clean_budget", "seed", "acc", "asr", "ra",
           "seconds", "device", "version"]  # fmt: skip
VICTIMS = {
    "digits": {"badnet": [], "blended": [], "wanet": attacks.DIGITS["wanet"].split()},
    "cifar10": {name: attacks.SMALL for name in ("badnet", "blended", "wanet")}
    | {"sig": [*attacks.SMALL, *attacks.CIFAR10["sig"].split()]},
    "published": {name: ["--yaml_path", f"config/attack/{name}.yaml"] for name in ("badnet", "blended", "wanet", "sig")},
}
ROWS = {"ft": "", "fmp": "", "fmp_no_pruning": "--variant no_pruning", "fmp_random": "--variant random", "awm": "",
        "awm_one_shot": "--variant one_shot", "trap_and_replace": "", "trap_and_replace_no_trap": "--variant no_trap"}  # fmt: skip
# AWM's published budget, where there are that many to spare; less training where a CPU has no time for the published one
SETTINGS = {
    "digits": {"trap_and_replace": "--epochs 30", "trap_and_replace_no_trap": "--epochs 30"},
    "cifar10": {
        "awm": "--clean_count 500",
        "trap_and_replace": "--epochs 5 --head_epochs 30",
        "trap_and_replace_no_trap": "--epochs 5 --head_epochs 30",
    },
    "published": {"awm": "--clean_count 500"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=sorted(VICTIMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--attacks", nargs="+", help="these alone")
    parser.add_argument("--rows", nargs="+", help="these alone")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--record_path", default="record/attacks")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="after --: options for every script, --cache_path say")
    options = parser.parse_args()
    failed, late = [], time.monotonic() + 60 * options.minutes
    for title, command in commands(options) if options.plan else []:
        if time.monotonic() > late:
            sys.exit(f"time is up before {title}; the same command goes on from there")
        print(title, flush=True)
        code = run(command, late)
        if code == 143:
            sys.exit(f"time is up in {title}; the same command goes on from there")
        failed += [title] if code else []
    rows = collect(Path(options.record_path))
    print(tables(rows))
    if options.save:
        attacks.publish(RESULTS, files.csv_text(rows, COLUMNS), PAGE, tables(rows))
    sys.exit(f"error: these runs failed: {', '.join(failed)}" if failed else 0)


def script_of(row):
    return next(name for name in ("fmp", "ft", "awm", "trap_and_replace") if row.startswith(name))


def words_of(plan, row):
    return f"{ROWS[row]} {SETTINGS[plan].get(row, '')}".split()


def commands(options):
    """(title, the words of a command) of every run, victims before their defenses."""
    common = [word for word in options.rest if word != "--"] + ["--record_path", options.record_path]
    for seed in options.seeds:
        for attack, words in VICTIMS[options.plan].items():
            if options.attacks and attack not in options.attacks:
                continue
            record = f"{options.plan}-{attack}-{seed}"  # the names that benchmarks.attacks gives, too
            seeds = ["--random_seed", seed, "--poison_seed", seed]
            yield f"{record} victim", ["-m", f"attack.{attack}", *words, *common, *seeds, "--save_folder_name", record]
            for row in options.rows or ROWS:
                yield f"{record} {row}", ["-m", f"defense.{script_of(row)}", *words_of(options.plan, row), *common, "--random_seed", seed,
                                         "--data_seed", seed, "--result_file", record, "--save_folder_name", row]  # fmt: skip


def run(command, late):
    """The exit code of a script, which is asked to stop when it is late; it then leaves a checkpoint and returns 143."""
    script = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    try:
        return script.wait(None if late == float("inf") else max(1, late - time.monotonic()))
    except subprocess.TimeoutExpired:
        script.send_signal(signal.SIGTERM)
        return script.wait()


def collect(records):
    """A row for every repaired model that a plan has made, and for every victim that has one."""
    rows = []
    for place in sorted([*records.glob("*/record.json"), *records.glob("*/defense/*/record.json")]):
        defended = place.parent.parent.name == "defense"
        record, row = (place.parents[2], place.parent.name) if defended else (place.parent, "none")
        which, attack, _ = record.name.split("-")
        if attack not in VICTIMS.get(which, ()) or (defended and row not in ROWS):
            continue
        if not defended and not any((record / "defense").glob("*/record.json")):
            continue  # or `none` would be a mean over other victims than the rows below it
        (found,) = files.read_csv(place.parent / "results.csv")
        told = {"plan": which, "attack": attack, "row": row, "options": " ".join(words_of(which, row)) if defended else ""}
        rows.append({column: {**found, **told}[column] for column in COLUMNS})
    return rows


def tables(rows):
    """Markdown: a table for every plan and attack; mean and sample standard deviation over the seeds, in percent."""
    parts = []
    for which, attack in sorted({(row["plan"], row["attack"]) for row in rows}):
        here = [row for row in rows if (row["plan"], row["attack"]) == (which, attack)]
        parts += [f"### {attack}, {which}", f"{here[0]['model']}, {here[0]['recipe']}, {here[0]['precision']}, {here[0]['device']}"]
        lines = ["| defense | clean pictures | ACC | ASR | RA | seconds | n |", "|---|---:|---:|---:|---:|---:|---:|"]
        for name in ["none", *ROWS]:
            same = [row for row in here if row["row"] == name]
            if same:
                shown = [attacks.spread([100 * float(row[key]) for row in same]) for key in ("acc", "asr", "ra")]
                label = f"`{name}`" + (f" `{same[0]['options']}`" if same[0]["options"] else "")
                cells = [
                    label,
                    same[0]["clean_budget"] or "–",
                    *shown,
                    attacks.spread([float(row["seconds"]) for row in same], digits=0),
                    str(len(same)),
                ]
                lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
