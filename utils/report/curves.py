"""The curves of a run, from its log.csv."""

import io
import math

from antidote_bench.utils.errors import RefusedError
from antidote_bench.utils.files import read_rows
from antidote_bench.utils.record import folder
from antidote_bench.utils.report.content import MOST_EPOCHS, load
from antidote_bench.utils.report.runs import METRICS
from antidote_bench.utils.text import one_line


def curve(run, points):
    """{stages: [[name, how many epochs]], epoch, loss, measured: [[position, ACC, ASR, RA]]}.

    Of a long log every n-th epoch counts, the last one always, so that at most `points` are left.
    None where no log can be read.
    """
    try:
        rows = load(run.path, folder.LOG, parse_log, run.record)
    except RefusedError:
        return None
    step = max(math.ceil(len(rows) / points), 1)
    rows = [row for place, row in enumerate(rows) if (len(rows) - 1 - place) % step == 0]
    if not rows:
        return None
    stages = []
    for stage, *_ in rows:
        if not stages or stages[-1][0] != stage:
            stages.append([stage, 0])
        stages[-1][1] += 1
    measured = [
        [place, *values]
        for place, (_, _, _, *values) in enumerate(rows)
        if any(value is not None for value in values)
    ]
    return {
        "stages": stages,
        "epoch": [row[1] for row in rows],
        "loss": [row[2] for row in rows],
        "measured": measured,
    }


def parse_log(text):
    """[(stage, epoch, loss, ACC, ASR, RA)] of the epochs in a log.csv."""
    rows = [row for row in read_rows(io.StringIO(text), MOST_EPOCHS) if row.get("epoch")]
    return [
        (
            one_line(row.get("stage")),
            int(row["epoch"]),
            *(finite(row.get(name), 4) for name in ("loss", *METRICS)),
        )
        for row in rows
    ]


def finite(value, digits=6):
    """A number with as many significant digits as a page needs.

    None for none, an empty text, and what JSON cannot hold.
    """
    number = math.nan if value in (None, "") else float(value)
    return float(f"{number:.{digits}g}") if math.isfinite(number) else None
