"""The row of results.csv and what record.json tells of a run's origin."""

import platform
import subprocess
from importlib.metadata import version

import models
from utils import config as options
from utils import crew, files, metrics
from utils import device as devices

VERSION = "0.1.0"
FILE = "results.csv"
ATTACK_COLUMNS = [
    "dataset", "model", "attack", "label_mode", "target", "pratio", "pratio_effective", "n_poison", "recipe", "precision",
]  # fmt: skip
COLUMNS = [
    *ATTACK_COLUMNS, "defense", "variant", "stage", "selection", "prior", "clean_budget", "seed", "poison_seed", "data_seed",
    "acc_before", "asr_before", "ra_before", "acc", "asr", "ra", "der", "n_test", "n_backdoor", "seconds", "peak_mb", "device",
    "version", "config_hash", "defense_seed", "lr",
]  # fmt: skip


def of_attack(name, config, found, exam, n_poison, n_train, seconds):
    """The row of a victim, not repaired; `found` is {acc, asr, ra}."""
    return {
        "dataset": config.dataset, "model": models.label(config.model, config.width), "attack": name, "label_mode": config.label_mode,
        "target": config.attack_target if config.label_mode == "all2one" else "", "pratio": config.pratio,
        "pratio_effective": n_poison / n_train, "n_poison": n_poison, "recipe": recipe(config), "precision": config.precision,
        "defense": "none", "stage": "none", "selection": "none", "seed": config.random_seed, "poison_seed": config.poison_seed,
        **found, "n_test": len(exam.test), "n_backdoor": len(exam.backdoor), "seconds": round(seconds, 2), "version": VERSION, "lr": config.lr,
        "config_hash": options.digest({"attack": name, **options.identity(config, seeds=False)}),
    }  # fmt: skip


def of_defense(name, config, victim, found, budget, seconds, *, stage, selection):
    """The row of a repaired model; `victim` is the attack's row as read from its file."""
    before = measured(victim)
    return {
        **{key: victim[key] for key in [*ATTACK_COLUMNS, "seed", "poison_seed", "n_test", "n_backdoor"]}, "precision": config.precision,
        "defense": name, "variant": getattr(config, "variant", ""), "stage": stage, "selection": selection,
        "prior": getattr(config, "prior", ""), "lr": getattr(config, "lr", ""), "clean_budget": budget, "data_seed": config.data_seed, "defense_seed": config.random_seed,
        **{f"{key}_before": before[key] for key in before}, **found,
        "der": metrics.defense_effectiveness(before, found), "seconds": round(seconds, 2), "version": VERSION,
        "config_hash": options.digest({"defense": name, "victim": victim["config_hash"], **options.identity(config, seeds=False)}),
    }  # fmt: skip


def measured(row):
    """{acc, asr, ra} of a row as it was read: floats, None where the column is empty."""
    return {key: float(row[key]) if row[key] else None for key in ("acc", "asr", "ra")}


def seal(row, config, device, workers=crew.ALONE):
    """(the bytes of results.csv, what record.json says of origin and cost) for a finished run."""
    row["device"], row["peak_mb"] = devices.name_and_peak(device)
    if workers.size > 1:
        row["device"] = f"{workers.size} x {row['device']}"
    commit = subprocess.run(["git", "rev-parse", "-q", "--verify", "HEAD"], cwd=options.ROOT, capture_output=True, text=True, check=False)
    kind = "attack" if row["defense"] == "none" else "defense"
    facts = {
        "name": row[kind], "command": options.command(options.script(kind, row[kind]), config), "antidote": VERSION,
        "seeds": {key: value for key, value in options.plain(config).items() if key in options.SEEDS},
        **{key: row[key] for key in ("recipe", "device", "seconds", "peak_mb", "config_hash")}, "git_commit": commit.stdout.strip() or None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "torchvision", "numpy")}},
    }  # fmt: skip
    return files.csv_text([row], COLUMNS), facts


def recipe(config):
    """How a victim was trained, in a few words: runs are only compared where it is the same."""
    text = f"{config.recipe}: sgd lr {config.lr} epochs {config.epochs} batch {config.batch_size} decay {config.weight_decay}"
    if config.optimizer == "muon":
        text += f" muon {config.muon_lr}"
    if config.schedule == "one_cycle":
        text += f" one_cycle {config.warmup}"
    usual = {"lr_min": 0, "momentum": 0.9, "nesterov": False, "label_smoothing": 0, "pad": 4, "padding": "zeros", "flip": "random",
             "bias_lr_scale": 1, "small_share": 0}  # fmt: skip
    for key, value in usual.items():
        if (own := getattr(config, key)) != value:
            text += f" {key}" if own is True else f" {key} {own}"
    if config.small_share:
        text += f" small_size {config.small_size}"
    return text


def line(found, seconds):
    """The one line a script ends with."""
    shown = (f"{key.upper()} {'n/a' if value is None else format(100 * value, '.1f')}" for key, value in found.items())
    return "  ".join(shown) + f"  ({seconds:.0f} s)"
