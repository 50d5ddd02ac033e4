"""How strongly a defense acts: as strongly as clean pictures allow that are held back to choose by.

Settings are ordered from weak to strong. One is allowed where the accuracy on those pictures is at least 1 - tolerance
times that of the victim; the ASR plays no part. Published tables often chose by the test set instead: selection oracle.
"""

import torch

from utils import files, seeds
from utils.data import balanced_subset
from utils.errors import ConfigError
from utils.metrics import predict

HELD = 0.2  # share of the clean pictures that is held back
FILE = "choice.csv"
COLUMNS = ["setting", "acc", "asr", "ra", "chosen"]


def divide(clean, config):
    """(pictures to work with, pictures to choose by) of a split, both with every class; (all, None) unless selection is val."""
    if config.selection != "val":
        return clean, None
    index = balanced_subset(clean.truth, round(HELD * len(clean)), seeds.number("hold back", config.data_seed))
    rest = torch.ones(len(clean), dtype=torch.bool)
    rest[index] = False
    work, held = (clean[part.to(clean.labels.device)] for part in (rest.nonzero().flatten(), index))
    classes = len(clean.truth.unique())
    if len(work.truth.unique()) < classes:
        raise ConfigError(f"{len(clean)} clean pictures of {classes} classes are too few to hold some of every class back for the choice: "
                          f"--clean_count {2 * classes} or more will do")  # fmt: skip
    return work, held


def allows(accuracy, before, config):
    """Whether a setting may be taken that leaves `accuracy` of the accuracy `before`."""
    return accuracy >= (1 - config.tolerance) * before - 1e-9


def choose(settings, show, model, record, config, held):
    """The setting to take, None where none is allowed; `model` is left as it makes it, and choice.csv says what was seen.

    `settings` are ordered from weak to strong; `show(setting)` brings `model` into the state that belongs to one,
    `show(None)` into the victim's, in which it comes. By clean pictures the strongest one that is allowed is taken, by the
    exam the one of least ASR among those allowed (of equals the weakest).
    """
    if config.selection == "oracle":
        before, rows = record.measure(model), []
        for setting in settings:
            show(setting)
            rows.append({"setting": setting, **record.measure(model)})
        good = [row for row in rows if allows(row["acc"], before["acc"], config)]
        best = min(good, key=lambda row: row["asr"] or 0, default=None)
    else:
        before, rows, best = {"acc": accuracy(model, held, config)}, [], None
        for setting in reversed(settings):  # the first one allowed is the strongest
            show(setting)
            rows.append({"setting": setting, "acc": accuracy(model, held, config)})
            if allows(rows[-1]["acc"], before["acc"], config):
                best = rows[-1]
                break
    chosen = best and best["setting"]
    if not rows or chosen != rows[-1]["setting"]:
        show(chosen)
    note([{"setting": "none", **before}, *rows], chosen, record)
    return chosen


def accuracy(model, held, config):
    """Share of the pictures held back that the model classifies right."""
    return (predict(model, held, config.precision) == held.truth).double().mean().item()


def note(rows, chosen, record):
    """Keep the settings that were looked at, {setting, acc} or {setting, acc, asr, ra}, as a file."""
    rows = [{**row, "chosen": int(row["setting"] == chosen)} for row in rows]
    record.keep(FILE, files.csv_text(rows, COLUMNS).encode())
