"""The images of finished runs: checked, encoded again, and small enough for a page."""

import base64
import dataclasses
import io
import struct
import zlib
from pathlib import Path

from antidote_bench.utils.config import FromScratch
from antidote_bench.utils.errors import RefusedError, UserError
from antidote_bench.utils.record import folder
from antidote_bench.utils.report.tables import name_all
from antidote_bench.utils.text import one_line

LARGEST_FILE, LARGEST_IMAGE = 2**24, 2**23  # bytes, pixels
OWN = {folder.PREVIEW, folder.SCORES_CHART}  # images with a place of their own on the page
MOST_ADDED = 3  # images that one run adds
WIDEST, FEW = 1200, 24  # pixels on the page; half as many where there are more than a few images
MOST, ROOM = 60, 3 * 2**20  # images of one kind, and characters for them: below 10 MB on the page
LOOKS_THE_SAME = {field.name for field in dataclasses.fields(FromScratch)} | {
    "recipe", "n_test", "model", "width",
}  # fmt: skip


class Album:
    """`triggers`: an image per data set and trigger; `scores`: one per cell of a defense with one;
    `added`: the other images that runs have added to their records, each of one run.

    `judged`: the scores of each cell of a detector, `found` the triggers that it has found.
    `unshown` counts the images that are not on
    the page; `refused` is [(path, why)] of the files that cannot be used.
    """

    def __init__(self, tables, detections=()):
        self.refused, self.unshown = [], 0
        self.triggers = self._embed(one_name(folder.PREVIEW, triggers(tables)))
        self.scores = self._embed(one_name(folder.SCORES_CHART, scores(tables)))
        self.added = self._embed(added(tables))
        self.judged = self._embed(one_name(folder.SCORES_CHART, judged(detections)))
        self.found = self._embed(one_name(folder.TRIGGERS, judged(detections, "found by ")))

    def _embed(self, wanted):
        """The facts of [(facts, name, runs)] with {path, source, size} of the first sound image."""
        widest = WIDEST if len(wanted) <= FEW else WIDEST // 2
        embedded, room = [], ROOM
        for facts, name, runs in wanted[:MOST]:
            image = self._first(name, runs, widest) if room > 0 else None
            if image:
                room -= len(image["source"])
                embedded.append({**facts, **image})
        self.unshown += len(wanted) - len(embedded)
        return embedded

    def _first(self, name, runs, widest):
        for run in runs:
            try:
                return {"path": one_line(run.path), **encode(run, name, widest)}
            except RefusedError as error:
                self.refused.append((run.path / name, error))
        return None


def one_name(name, wanted):
    """[(facts, name, runs)] of [(facts, runs)], only the runs that have a file of that name."""
    having = [
        (facts, name, [run for run in runs if name in run.record["files"]])
        for facts, runs in wanted
    ]
    return [(facts, name, runs) for facts, name, runs in having if runs]


def added(tables):
    """[({file, caption}, name, [run])] of the images that defenses have added to their records."""
    wanted = []
    for table in tables:
        for (column, row), runs in table.cells.items():
            for run in runs:
                names = sorted(name for name in run.record["files"] if is_added_image(name))
                for name in names[: MOST_ADDED if run.victim else 0]:
                    caption = f"{name} of {table.rows[row]} on {table.columns[column]}"
                    wanted.append(({"file": name, "caption": caption}, name, [run]))
    return wanted


def is_added_image(name):
    """Whether a file that a record lists is an image without a place of its own on the page."""
    return Path(name).name == name and name.endswith(".png") and name not in OWN


def triggers(tables):
    """[({dataset, attack, caption}, runs)] of all victims, those with the same trigger together."""
    groups = {}
    for table in tables:
        for (column, _), runs in table.cells.items():
            name, settings = column
            visible = tuple(pair for pair in settings if pair[0] not in LOOKS_THE_SAME)
            attacks, _ = groups.setdefault(table.about["dataset"], ({}, runs[0].class_names))
            attacks.setdefault((name, visible), []).extend(
                run for run in runs if run.victim is None
            )
    wanted = []
    for dataset, (attacks, names) in sorted(groups.items()):
        labels = name_all(set(attacks), names)
        for key in sorted(attacks, key=labels.get):
            caption = f"{labels[key]}, {dataset}"
            for run in attacks[key][:1]:
                caption += f", target {run.target}" if run.target else ""
                caption += f", source {run.source}" if run.source else ""
            facts = {"dataset": dataset, "attack": key[0], "caption": caption}
            wanted.append((facts, attacks[key]))
    return wanted


def scores(tables):
    """[({dataset, model, recipe, precision, attack, defense, caption}, runs)] of the defenses."""
    wanted = []
    for table in tables:
        for (column, row), runs in table.cells.items():
            facts = {
                "attack": column[0],
                "defense": row[0],
                "caption": f"{table.rows[row]} on {table.columns[column]}",
            }
            wanted.append(({**table.about, **facts}, [run for run in runs if run.victim]))
    return wanted


def judged(tables, before=""):
    """[({dataset, model, attack, caption}, runs)] of the cells of detectors."""
    return [
        (
            {
                "dataset": table.about["dataset"],
                "model": table.about["model"],
                "attack": column[0],
                "caption": f"{before}{table.rows[row]} on {table.columns[column]}",
            },
            runs,
        )
        for table in tables
        for (column, row), runs in table.cells.items()
    ]


def encode(run, name, widest):
    """{source: a data URI, size} of a PNG file of a run; RefusedError where it cannot be used."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(
            f"--html needs the package {error.name}: pip install -r requirements.txt brings it"
        ) from error
    # what a damaged or malicious file can raise
    unsound = (
        OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error,
        Image.DecompressionBombError,
    )  # fmt: skip
    try:
        if (run.path / name).stat().st_size > LARGEST_FILE:
            raise RefusedError(f"{name} is larger than {LARGEST_FILE >> 20} MB: not shown")
        content = folder.read_checked(run.path, name, run.record)
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        if image.width * image.height > LARGEST_IMAGE:
            raise RefusedError(f"{name} has {image.width} x {image.height} pixels: not shown")
        image = image.convert("RGB")
    except unsound as error:
        raise RefusedError(f"{name} is no sound PNG file: not shown ({one_line(error)})") from error
    image.thumbnail((widest, widest))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80, method=2)
    source = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return {"source": source, "size": image.size}
