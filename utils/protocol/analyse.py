"""An analysis of a record: the record is opened, something in it is measured and drawn, and the
picture is saved beside its numbers."""

import warnings
from pathlib import Path
from typing import NamedTuple

from torch import nn

from antidote_bench import models
from antidote_bench.utils import files
from antidote_bench.utils.charts import figure_bytes, plotting
from antidote_bench.utils.device import setup
from antidote_bench.utils.errors import ConfigError, RefusedError
from antidote_bench.utils.protocol import repaired
from antidote_bench.utils.record import contents, results
from antidote_bench.utils.record import folder as layout
from antidote_bench.utils.report.figures import FORMS, PRINT_DPI, shorten
from antidote_bench.utils.text import one_line

LONGEST = 100  # letters of a line in a heading


class Subject(NamedTuple):
    """A record, as an analysis gets it."""

    folder: Path
    loaded: contents.Loaded
    row: dict  # of the victim's results.csv
    defense: str | None  # the folder of the defense, None without one
    repaired: nn.Module | None  # the model that it has made
    repaired_row: dict | None

    @property
    def name(self):
        """What the model of the attack is called in a picture."""
        return "benign model" if self.is_benign else "victim"

    @property
    def models(self):
        """{name: model}: the victim, and the repaired model where a defense was named."""
        found = {self.name: self.loaded.model}
        return found | ({f"after {self.defense}": self.repaired} if self.defense else {})

    @property
    def is_benign(self):
        return self.row["n_poison"] == "0"

    def pairs(self, count=None):
        """(the clean test images, the same with the trigger, their positions in the test set).

        About `count` evenly spaced ones, by default all. Raises RefusedError (exit 4) where the
        record has none.
        """
        triggered, index = self.loaded.test_sets.backdoor, self.loaded.backdoor_index
        if not len(triggered):
            raise RefusedError(
                f"the record {self.folder} has no triggered test image, because its trigger is not "
                "known, and this analysis compares images with and without it"
            )
        step = max(len(triggered) // (count or len(triggered)), 1)
        chosen = index.new_tensor(range(0, len(triggered), step)[: count or None])
        return self.loaded.test_sets.test.view(index[chosen]), triggered[chosen], index[chosen]

    def heading(self, what):
        """A title, and below it what the models are, and how good."""
        kind = "a benign model with the trigger of" if self.is_benign else "a victim of"
        attack = one_line(self.row["attack"]).removeprefix("clean_")
        data = f"{one_line(self.row['dataset'])}, {one_line(self.row['model'])}"
        rows = [(self.name, self.row)]
        if self.defense:
            rows.append((f"after {self.defense}", self.repaired_row))
        measured = (f"{shorten(name)}: {_percent(row)}" for name, row in rows)
        about = shorten(f"{kind} {attack}, {data}", LONGEST)
        return f"{what}\n{about}\n{';  '.join(measured)}"


class Numbers(NamedTuple):
    """What an analysis has measured: the content of its CSV file, and sentences below its picture.

    `images` is for what the picture shows beside the numbers.
    """

    columns: list[str]
    rows: list[dict]
    notes: list[str]
    images: dict | None = None


def analyse(script, config, measure, draw):
    """Open a record, measure, draw, and save the picture as PNG, PDF and SVG beside a CSV file.

    `script` is the module name of the analysis. `measure(subject, config)` gets a `Subject` and
    returns `Numbers`; `draw(numbers, subject, Figure)` returns a figure of them. Files of an
    earlier run with the same defense are replaced.
    """
    config, device = setup(config)
    folder = config.record
    info = contents.open_record(folder)
    found = repaired.find(folder, config.defense, info) if config.defense else None
    name = "-".join(filter(None, [script.rpartition(".")[2], config.defense]))
    place = _place(config, folder)
    names = [f"{name}.{form}" for form in (*FORMS, "csv")]
    if config.dry_run:
        print(
            "\n".join([f"would read {path}" for path in filter(None, (folder, found and found[0]))])
        )
        print(f"would write {', '.join(names)} to {place}")
        return
    subject = _opened(config, folder, info, found, device)
    with plotting("an analysis") as Figure, warnings.catch_warnings():
        numbers = measure(subject, config)
        warnings.simplefilter("ignore")  # of letters that the font lacks
        figure = draw(numbers, subject, Figure)
        for form in FORMS:
            content = figure_bytes(figure, form, dpi=PRINT_DPI, bbox_inches="tight")
            files.write(place / f"{name}.{form}", content)
    files.write(place / f"{name}.csv", files.csv_text(numbers.rows, numbers.columns))
    for note in numbers.notes:
        print(note)
    print(f"{', '.join(names)} written to {place}")


def _place(config, folder):
    """The folder for the picture; nothing is written through a link that lies in a record."""
    if config.output:
        place = Path(config.output)
        if place.exists() and not place.is_dir():
            raise ConfigError(f"output must be a folder, and {place} is a file")
        return place
    place = folder / layout.ANALYSES
    if place.is_symlink() or place.exists() and not place.is_dir():
        raise RefusedError(
            f"{place} is a link or a file, and the picture would lie there: remove it, or choose "
            "another folder with --output"
        )
    return place


def _opened(config, folder, info, found, device):
    loaded = contents.load(folder, config, device, info)
    row, _ = contents.read_measures(folder, info)
    loaded.model.eval()
    if not found:
        return Subject(folder, loaded, row, None, None, None)
    path, facts = found
    model = repaired.rebuilt(path, facts, models.build(loaded.name, loaded.spec, loaded.width))
    return Subject(
        folder, loaded, row, config.defense, model.to(device).eval(), layout.read_results(path)
    )


def _percent(row):
    """ACC, ASR and RA of a row of results.csv in words."""
    measured = results.measures_of(row)
    shown = ("n/a" if value is None else f"{100 * value:.1f}" for value in measured.values())
    return ", ".join(f"{key.upper()} {value}" for key, value in zip(measured, shown, strict=True))
