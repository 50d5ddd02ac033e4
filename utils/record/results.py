"""The row of results.csv, and what record.json says about the origin of a run."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from antidote_bench import models
from antidote_bench.utils import VERSION, distributed, evaluation, files, parsing
from antidote_bench.utils import config as options
from antidote_bench.utils import device as devices
from antidote_bench.utils.record.folder import ATTACK_COLUMNS, RESULT_COLUMNS
from antidote_bench.utils.text import one_line

# options that `recipe` names where they differ from these values
USUAL_RECIPE = {
    "lr_min": 0,
    "momentum": 0.9,
    "nesterov": False,
    "label_smoothing": 0,
    "crop": "shift",
    "crop_area": 0.08,
    "pad": 4,
    "padding": "zeros",
    "mirror": None,
    "flip": "random",
    "bias_lr_scale": 1,
    "small_share": 0,
}


def of_attack(name, config, measured, test_sets, n_poison, n_train, seconds):
    """The row of a victim; `measured` is {acc, asr, ra}, and an unknown `n_poison` is None."""
    identity = config.identity(seeds=False)
    pratio = config.pratio if config.trained_here else config.poisoned_share
    return {
        "dataset": dataset_name(config),
        "model": models.label(config.model, config.width),
        "attack": name,
        "label_mode": config.label_mode,
        "target": "" if config.label_mode == "all2all" else config.attack_target,
        "pratio": "" if n_poison is None else pratio,
        "pratio_effective": "" if n_poison is None else n_poison / n_train,
        "n_poison": "" if n_poison is None else n_poison,
        "recipe": recipe(config),
        "precision": config.precision,
        "defense": "none",
        "stage": "none",
        "selection": "none",
        "seed": config.random_seed,
        "poison_seed": config.poison_seed,
        **measured,
        "n_test": len(test_sets.test),
        "n_backdoor": len(test_sets.backdoor),
        "seconds": round(seconds, 2),
        "version": VERSION,
        "lr": config.lr,
        "config_hash": options.digest({"attack": name, **identity}),
    }


def dataset_name(config):
    """The name of a data set in results: its own, or that of its folder."""
    if config.dataset_name or config.dataset != "folder":
        return config.dataset_name or config.dataset
    return Path(config.dataset_path).resolve().name or config.dataset


def of_defense(name, config, victim, measured, held, marked, seconds):
    """The row of a repaired model; `victim` is the attack's row as read from its file, `held` the
    clean images that the defender had, and `marked` a `Flagged` or None."""
    before = measures_of(victim)
    copied = [*ATTACK_COLUMNS, "seed", "poison_seed", "n_test", "n_backdoor"]
    identity = config.identity(seeds=False)
    hashed = {"defense": name, "victim": victim["config_hash"], **identity}
    prior = [config.prior]
    if held.mark:
        hashed["clean_images"] = held.mark
        prior.append(f"clean_from={one_line(Path(config.clean_from).resolve().name)}")
    if marked:
        hashed["flagged_images"] = marked.sha256
        prior.append(f"flagged={one_line(marked.path.name)}")
    return {
        **{key: victim[key] for key in copied},
        "precision": config.precision,
        "defense": name,
        "variant": getattr(config, "variant", ""),
        "stage": config.stage,
        "selection": config.selection,
        "prior": " ".join(filter(None, prior)),
        "lr": getattr(config, "lr", ""),
        "clean_budget": len(held.split),
        "data_seed": config.data_seed,
        "defense_seed": config.random_seed,
        **{f"{key}_before": before[key] for key in before},
        **measured,
        "der": evaluation.defense_effectiveness(before, measured),
        "seconds": round(seconds, 2),
        "version": VERSION,
        "config_hash": options.digest(hashed),
    }


def of_detection(name, config, victim, measured, seconds):
    """The row of a detector; `victim` is the attack's row, `measured` holds the other columns."""
    identity = config.identity(seeds=False)
    hashed = {"detection": name, "victim": victim["config_hash"], **identity}
    return {
        **{key: victim[key] for key in (*ATTACK_COLUMNS, "seed", "poison_seed", "acc", "asr")},
        "precision": config.precision,
        "detection": name,
        "variant": getattr(config, "variant", ""),
        "judges": config.judges,
        "prior": config.prior,
        "data_seed": config.data_seed,
        "detection_seed": config.random_seed,
        "nominal_fpr": getattr(config, "nominal_fpr", ""),
        **measured,
        "seconds": round(seconds, 2),
        "version": VERSION,
        "config_hash": options.digest(hashed),
    }


def measures_of(row):
    """{acc, asr, ra} of a row as it was read: floats, None where the column is empty."""
    return {key: float(row[key]) if row[key] else None for key in ("acc", "asr", "ra")}


def complete(row, config, device, workers=distributed.SINGLE, *, kind, columns=RESULT_COLUMNS):
    """(the text of results.csv, the facts for record.json) of a finished run.

    `kind` is attack, defense or detection, and `columns` are those of its results. Adds the device
    and the peak memory to `row`.
    """
    row["device"], row["peak_mb"] = devices.name_and_peak(device)
    if workers.size > 1:
        row["device"] = f"{workers.size} x {row['device']}"
    facts = {
        "name": row[kind],
        "command": parsing.command(parsing.script(kind, row[kind]), config),
        "antidote": VERSION,
        "seeds": {key: value for key, value in config.plain().items() if key in options.SEEDS},
        **{key: row[key] for key in ("recipe", "device", "seconds", "peak_mb", "config_hash")},
        "git_commit": _git_commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "torchvision", "numpy", *_extras(row))},
        },
    }
    return files.csv_text([row], columns), facts


def _extras(row):
    """The optional packages that a run needed."""
    return ["timm"] if row["model"].startswith("timm:") else []


def _git_commit():
    """The commit of this checkout; None where it is none, and another project's may lie around
    it."""
    if not (options.ROOT / ".git").exists():
        return None
    command = ["git", "rev-parse", "-q", "--verify", "HEAD"]
    run = subprocess.run(command, cwd=options.ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip() or None


def recipe(config):
    """How a victim was trained, in a few words: runs are only compared where it is the same."""
    if not config.trained_here:
        return "imported"
    text = (
        f"{config.recipe}: sgd lr {config.lr} epochs {config.epochs} batch {config.batch_size} "
        f"decay {config.weight_decay}"
    )
    if config.optimizer == "muon":
        text += f" muon {config.muon_lr}"
    if config.schedule == "one_cycle":
        text += f" one_cycle {config.warmup}"
    for key, value in USUAL_RECIPE.items():
        if (own := getattr(config, key)) != value:
            text += f" {key}" if own is True else f" {key} {own}"
    for key in ("mean", "std"):
        if value := getattr(config, key):
            text += f" {key} {value}"
    if config.pretrained:
        text += f" pretrained {config.pretrained_sha256[:8]}"
    if config.small_share:
        text += f" small_size {config.small_size}"
    return text


def line(measured, seconds):
    """The one line that a script ends with."""
    shown = (
        f"{key.upper()} {'n/a' if value is None else format(100 * value, '.1f')}"
        for key, value in measured.items()
    )
    return "  ".join(shown) + f"  ({seconds:.0f} s)"
