"""Choose how strongly a defense acts: as strongly as held-out clean images allow.

Settings are ordered from weak to strong. A setting is allowed where the accuracy on those images is
at least 1 - tolerance times that of the victim; the ASR plays no part. Published tables often chose
by the test set instead, which is `--selection oracle` here.
"""

import torch

from antidote_bench.utils import files, seeds
from antidote_bench.utils.data.dataset import balanced_subset
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.evaluation import predict

HELD_OUT = 0.2  # share of the clean images
FILE = "choice.csv"
COLUMNS = ["setting", "acc", "asr", "ra", "chosen"]


def hold_out(clean, config):
    """(images to work with, images to choose by) of the split `clean`, both with every class.

    (All of them, None) unless config.selection is val. Raises ConfigError (exit 2) where the images
    are too few.
    """
    if config.selection != "val":
        return clean, None
    index = balanced_subset(
        clean.truth, round(HELD_OUT * len(clean)), seeds.number("hold back", config.data_seed)
    )
    is_rest = torch.ones(len(clean), dtype=torch.bool)
    is_rest[index] = False
    device, rest = clean.labels.device, is_rest.nonzero().flatten()
    work, held_out = clean[rest.to(device)], clean[index.to(device)]
    classes = len(clean.truth.unique())
    if len(work.truth.unique()) < classes:
        raise ConfigError(
            f"{len(clean)} clean images of {classes} classes are too few to hold some of every "
            f"class out for the choice: --clean_count {2 * classes} or more will do"
        )
    return work, held_out


def select(settings, apply, model, record, config, held_out):
    """The setting to take, None where none is allowed; `model` is left in the state of it.

    `settings` are ordered from weak to strong. `apply(setting)` brings `model` into the state that
    belongs to a setting, and `apply(None)` into that of the victim, in which it comes. choice.csv
    says what was measured.
    """
    if config.selection == "oracle":
        before, rows, chosen = _least_asr(settings, apply, model, record, config)
    else:
        before, rows, chosen = _strongest(settings, apply, model, config, held_out)
    if not rows or chosen != rows[-1]["setting"]:
        apply(chosen)
    save_choices([{"setting": "none", **before}, *rows], chosen, record)
    return chosen


def _strongest(settings, apply, model, config, held_out):
    """(measures of the victim, rows, the strongest setting that the held-out images allow)."""
    before, rows = {"acc": accuracy(model, held_out, config)}, []
    for setting in reversed(settings):
        apply(setting)
        rows.append({"setting": setting, "acc": accuracy(model, held_out, config)})
        if allows(rows[-1]["acc"], before["acc"], config):
            return before, rows, setting
    return before, rows, None


def _least_asr(settings, apply, model, record, config):
    """(measures of the victim, rows, the allowed setting of least test ASR, the weakest of equals).

    Of all settings the test sets are asked, as published tables did.
    """
    before, rows = record.measure(model), []
    for setting in settings:
        apply(setting)
        rows.append({"setting": setting, **record.measure(model)})
    allowed = [row for row in rows if allows(row["acc"], before["acc"], config)]
    best = min(allowed, key=lambda row: row["asr"] or 0, default=None)
    return before, rows, best and best["setting"]


def allows(accuracy, before, config):
    """Whether a setting is allowed that leaves `accuracy` of the victim's accuracy `before`."""
    return accuracy >= (1 - config.tolerance) * before - 1e-9


def accuracy(model, held_out, config):
    """Share of the held-out images that the model classifies right."""
    return (predict(model, held_out, config.precision) == held_out.truth).double().mean().item()


def save_choices(rows, chosen, record):
    """Keep a file of the settings that were measured: {setting, acc} or {setting, acc, asr, ra}."""
    rows = [{**row, "chosen": int(row["setting"] == chosen)} for row in rows]
    record.keep(FILE, files.csv_text(rows, COLUMNS).encode())
