"""The pictures of finished runs, checked, drawn anew and small enough to stand in a page."""

import base64
import dataclasses
import io
import struct
import zlib

from utils.config import Training
from utils.errors import RefusedError, UserError
from utils.finished import content, printable
from utils.tables import name_all

LARGEST_FILE, LARGEST_PICTURE = 2**24, 2**23  # bytes, pixels
WIDEST, FEW = 1200, 24  # pixels on the page; half as many where there are more than a few pictures
MOST, ROOM = 60, 3 * 2**20  # pictures of one kind, and characters for them: the page stays below 10 MB
LOOKS_THE_SAME = {field.name for field in dataclasses.fields(Training)} | {"recipe", "label_smoothing", "pad", "n_test", "model", "width"}


class Album:
    """`triggers`: one picture per data set and trigger; `scores`: one per cell of a defense that has made one.

    `unshown` counts the pictures that are not on the page; `refused` says which files are unusable: [(path, why)].
    """

    def __init__(self, tables):
        self.refused, self.unshown = [], 0
        self.triggers = self._embed("preview.png", triggers(tables))
        self.scores = self._embed("scores.png", scores(tables))

    def _embed(self, name, wanted):
        """The facts of [(facts, runs)] with {path, source, size}: the first sound picture `name` among the runs."""
        wanted = [(facts, [run for run in runs if name in run.record["files"]]) for facts, runs in wanted]
        wanted = [(facts, runs) for facts, runs in wanted if runs]
        shown, room = [], ROOM
        for facts, runs in wanted[:MOST]:
            picture = self._first(name, runs, WIDEST if len(wanted) <= FEW else WIDEST // 2) if room > 0 else None
            if picture:
                room -= len(picture["source"])
                shown.append({**facts, **picture})
        self.unshown += len(wanted) - len(shown)
        return shown

    def _first(self, name, runs, widest):
        for run in runs:
            try:
                return {"path": printable(run.path), **redraw(run, name, widest)}
            except RefusedError as error:
                self.refused.append((run.path / name, error))
        return None


def triggers(tables):
    """[({dataset, attack, caption}, runs)] of all victims, those together whose trigger looks the same."""
    groups = {}
    for table in tables:
        for (column, _), runs in table.cells.items():
            name, settings = column
            key = name, tuple((option, value) for option, value in settings if option not in LOOKS_THE_SAME)
            groups.setdefault(table.about["dataset"], {}).setdefault(key, []).extend(run for run in runs if run.victim is None)
    wanted = []
    for dataset, attacks in sorted(groups.items()):
        labels = name_all(set(attacks))
        for key in sorted(attacks, key=labels.get):
            wanted.append(({"dataset": dataset, "attack": key[0], "caption": f"{labels[key]}, {dataset}"}, attacks[key]))
    return wanted


def scores(tables):
    """[({dataset, model, recipe, precision, attack, defense, caption}, runs)] of all cells of defenses."""
    wanted = []
    for table in tables:
        for (column, row), runs in table.cells.items():
            facts = {"attack": column[0], "defense": row[0], "caption": f"{table.rows[row]} on {table.columns[column]}"}
            wanted.append(({**table.about, **facts}, [run for run in runs if run.victim]))
    return wanted


def redraw(run, name, widest):
    """{source: a data URI, size} of a PNG file of a run; RefusedError where it is none, or too large."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(f"--html needs the package {error.name}: pip install -r requirements.txt brings it") from error
    try:
        if (run.path / name).stat().st_size > LARGEST_FILE:
            raise RefusedError(f"{name} is larger than {LARGEST_FILE >> 20} MB: not shown")
        picture = Image.open(io.BytesIO(content(run.path, name, run.record)), formats=["PNG"])
        if picture.width * picture.height > LARGEST_PICTURE:
            raise RefusedError(f"{name} has {picture.width} x {picture.height} pixels: not shown")
        picture = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise RefusedError(f"{name} is no sound PNG file: not shown ({printable(error)})") from error
    picture.thumbnail((widest, widest))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80, method=2)
    return {"source": "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode(), "size": picture.size}
