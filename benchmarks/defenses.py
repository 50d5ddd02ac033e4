"""How well do the defenses do, and what do they cost? Runs them on the same victims, each as a user would, and writes one table.

    python -m benchmarks.defenses --plan cifar10 --seeds 0 1 2
    python -m benchmarks.defenses --plan baselines --seeds 0 1 --save
    python -m benchmarks.defenses --plan published --seeds 0 --minutes 9

The plans `cifar10` and `digits` hold the first four defenses and their controls, on the small network for a CPU; `baselines` is every
defense on five attacks and on a clean model, on the digits; `published` the same with PreAct-ResNet18 under the protocol of the field
(100 epochs, 10 % poisoned, 5 % clean), for a GPU. Finished runs are not repeated, interrupted ones go on: with --minutes the script stops
in time, run under way included, and the same command goes on from there. The seed is that of everything: the poison, the
victim, the clean pictures, the defense. With --save the rows of all records found go to benchmarks/results/defenses.csv, in place
of older ones of the same plan, the tables to defense/README.md, and a picture of `baselines` to benchmarks/results/defenses.png.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw

from benchmarks import attacks
from utils import files
from utils.preview import GAP, png

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, PICTURE = ROOT / "benchmarks/results/defenses.csv", ROOT / "defense/README.md", ROOT / "benchmarks/results/defenses.png"
COLUMNS = ["plan", "attack", "row", "options", "model", "recipe", "precision", "defense", "variant", "stage", "clean_budget", "seed", "acc", "asr", "ra",
           "seconds", "device", "version"]  # fmt: skip
VICTIMS = {
    "digits": {"badnet": [], "blended": [], "wanet": attacks.DIGITS["wanet"].split()},
    "cifar10": {name: attacks.SMALL for name in ("badnet", "blended", "wanet")}
    | {"sig": [*attacks.SMALL, *attacks.CIFAR10["sig"].split()]},
    # on the digits the wave of sig must be strong, and half of the target class left as it is
    "baselines": {"clean": [], "badnet": [], "blended": [], "sig": ["--amplitude", "160", "--pratio", "0.05"]}
    | {name: attacks.DIGITS[name].split() for name in ("wanet", "inputaware")},
    "published": {name: ["--yaml_path", f"config/attack/{name}.yaml"] for name in ("badnet", "blended", "sig", "wanet", "inputaware")}
    | {"clean": ["--dataset", "cifar10"]},
}
ROWS = {"ft": "", "fmp": "", "fmp_no_pruning": "--variant no_pruning", "fmp_random": "--variant random", "awm": "",
        "awm_one_shot": "--variant one_shot", "trap_and_replace": "", "trap_and_replace_no_trap": "--variant no_trap"}  # fmt: skip
NAMES = sorted(path.stem for path in (ROOT / "defense").glob("[a-z]*.py"))
# AWM's published budget, where there are that many to spare; less training where a CPU has no time for the published one
SETTINGS = {
    "digits": {"trap_and_replace": "--epochs 30", "trap_and_replace_no_trap": "--epochs 30"},
    "cifar10": {
        "ft": "--lr 0.01",  # the published rates, which are no longer the default for these victims, trained at 0.1
        **dict.fromkeys(("fmp", "fmp_no_pruning", "fmp_random"), "--lr 0.01 --lr_min 0.0001"),
        "awm": "--clean_count 500",
        "trap_and_replace": "--epochs 5 --head_epochs 30",
        "trap_and_replace_no_trap": "--epochs 5 --head_epochs 30",
    },
    "baselines": {
        "abl": "--isolate_epochs 5",
        "anp": "--steps 200",
        "d_st": "--epochs 5",
        "nab": "--isolate_epochs 5",
        "nc": "--search_epochs 30 --search_batch 16",
        "sau": "--epochs 15",
        "trap_and_replace": "--epochs 30",
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
    if options.save:
        made = {row["plan"] for row in rows}
        rows = sorted([row for row in files.read_csv(RESULTS) if row["plan"] not in made] + rows, key=lambda row: row["plan"])
    print(tables(rows))
    if options.save:
        attacks.publish(RESULTS, files.csv_text(rows, COLUMNS), PAGE, tables(rows))
        if shown := [row for row in rows if row["plan"] == "baselines"]:
            files.write(PICTURE, heat_map(shown))
    sys.exit(f"error: these runs failed: {', '.join(failed)}" if failed else 0)


def rows_of(plan):
    """{name of a row: the options that make it another than its script's default}"""
    return ROWS if plan in ("digits", "cifar10") else dict.fromkeys(NAMES, "")


def script_of(row):
    return max((name for name in NAMES if row.startswith(name)), key=len)


def words_of(plan, row):
    return f"{rows_of(plan)[row]} {SETTINGS[plan].get(row, '')}".split()


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
            for row in options.rows or rows_of(options.plan):
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
        if attack not in VICTIMS.get(which, ()) or (defended and row not in rows_of(which)):
            continue
        if not defended and not any((record / "defense").glob("*/record.json")):
            continue  # or `none` would be a mean over other victims than the rows below it
        (found,) = files.read_csv(place.parent / "results.csv")
        told = {"plan": which, "attack": attack, "row": row, "options": " ".join(words_of(which, row)) if defended else ""}
        rows.append({column: {**found, **told}[column] for column in COLUMNS})
    return rows


def tables(rows):
    """Markdown: one table for a plan of all defenses, a table for every attack of the others; in percent."""
    parts = []
    for which, attack in sorted({(row["plan"], row["attack"] if rows_of(row["plan"]) is ROWS else "") for row in rows}):
        here = [row for row in rows if row["plan"] == which and attack in (row["attack"], "")]
        if not attack:
            parts += overview(which, here)
            continue
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


def overview(which, rows):
    """A heading, what the rows share, and a table of means over the seeds: defenses down, attacks across."""
    across = [name for name in VICTIMS[which] if any(row["attack"] == name for row in rows)]
    flags = [
        f"`{name} {' '.join(words)}`" for name, words in VICTIMS[which].items() if words and "--yaml_path" not in words and name in across
    ]
    facts = [*dict.fromkeys(f"{row['model']}, {row['recipe']}" for row in rows), " and ".join(sorted({row["precision"] for row in rows})),
             " or ".join(sorted({row["device"] for row in rows})), *flags, "ACC / ASR / RA"]  # fmt: skip
    lines = ["| defense | clean pictures | " + " | ".join(f"{name} ACC" if name == "clean" else name for name in across)
             + " | repaired | seconds | n |", "|---|---:|" + "---:|" * (len(across) + 3)]  # fmt: skip
    unharmed = {(row["attack"], row["seed"]): row for row in rows if row["row"] == "none"}
    for name in ["none", *rows_of(which)]:
        same = [row for row in rows if row["row"] == name]
        if same:
            shown = [[row for row in same if row["attack"] == attack] for attack in across]
            counts = {len(group) for group in shown if group}
            attacked = [row for row in same if row["attack"] != "clean"]
            good = sum(repaired(row, unharmed[row["attack"], row["seed"]]) for row in attacked)
            cells = [f"`{name}`" + (f" `{same[0]['options']}`" if same[0]["options"] else ""), same[0]["clean_budget"] or "–",
                     *(means(group, ("acc",) if attack == "clean" else ("acc", "asr", "ra")) for attack, group in zip(across, shown, strict=True)),
                     f"{good} of {len(attacked)}", f"{statistics.mean(float(row['seconds']) for row in same):.0f}", " to ".join(map(str, sorted(counts)))]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return [f"### all defenses, {which}", "; ".join(facts), "\n".join(lines)]


def repaired(row, victim):
    """Whether a row counts as repaired: ASR at most 10 %, no more than 5 points of ACC lost, and an RA of at least 0.8 ACC."""
    acc, asr, ra = (float(row[key]) for key in ("acc", "asr", "ra"))
    return asr <= 0.1 and acc >= float(victim["acc"]) - 0.05 and ra >= 0.8 * acc


def means(rows, keys):
    return " / ".join(f"{statistics.mean(100 * float(row[key]) for row in rows):.1f}" for key in keys) if rows else "–"


def heat_map(rows):
    """PNG bytes: for every defense the mean ASR on each attack in red, and in blue the ACC that it costs on each victim, in percent."""
    names = ["none", *rows_of(rows[0]["plan"])]
    victims = [name for name in VICTIMS[rows[0]["plan"]] if any(row["attack"] == name for row in rows)]
    columns = [("asr", name) for name in victims if name != "clean"] + [("acc", name) for name in victims]
    wide, high, left, top = 76, 22, 140, 56
    canvas = Image.new("RGB", (left + wide * len(columns) + GAP, top + high * len(names) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    found = {}
    for row in rows:
        for key in ("asr", "acc"):
            found.setdefault((row["row"], key, row["attack"]), []).append(100 * float(row[key]))
    for place, (key, attack) in enumerate(columns):
        x = left + place * wide + (GAP if key == "acc" else 0)
        draw.text((x + 4, 8), "ASR on" if key == "asr" else "ACC lost on", "black", font_size=12)
        draw.text((x + 4, 26), attack, "black", font_size=12)
        for line, name in enumerate(names):
            values = found.get((name, key, attack))
            if values:
                value = statistics.mean(values) - (statistics.mean(found["none", "acc", attack]) if key == "acc" else 0)
                value, full = (value, 100) if key == "asr" else (-value, 30)
                fade = 255 - round(255 * min(max(value / full, 0), 1) * 0.8)
                y = top + line * high
                draw.rectangle((x, y, x + wide - 2, y + high - 2), (255, fade, fade) if key == "asr" else (fade, fade, 255))
                draw.text((x + 22, y + 3), f"{round(value, 1) + 0.0:.1f}", "black", font_size=12)
    for line, name in enumerate(names):
        draw.text((8, top + line * high + 3), name, "black", font_size=12)
    return png(canvas)


if __name__ == "__main__":
    main()
