"""Published numbers to compare with: benchmarks/published.csv, as fractions, each with its source.

Column `usable` says how a number was made: yes (no known fault that would change it), care (a known
deviation), no (it is not what its name says); `note` says why. Each is of one seed, and its recipe
may differ from that of a run here.
"""

from antidote_bench.utils.config import ROOT
from antidote_bench.utils.files import read_csv
from antidote_bench.utils.report.runs import METRICS

FILE = ROOT / "benchmarks" / "published.csv"
KEY = ("dataset", "model", "attack", "pratio", "defense")
MARKS = {"yes": "", "care": "(?)", "no": "(!)"}
FOOTNOTES = {
    "(?)": "published with a known deviation: read with care",
    "(!)": "published, but not what its name says: do not compare",
}


def read():
    """{(data set, model, attack, poison ratio, defense): row}.

    The numbers are floats, None where nothing was published.
    """
    rows = {}
    for row in read_csv(FILE):
        row |= {name: float(row[name]) if row[name] else None for name in (*METRICS, "pratio")}
        rows[tuple(row[name] for name in KEY)] = row
    return rows


def find(reported, table, column, row):
    """What was published for a cell of a table, None where nothing was.

    The data set must be the one of that name, and not another that is called like it. Of the
    settings only the poison ratio counts. `reported` is what `read` returns, or {}.
    """
    attack, options = column[0], dict(column[1])
    try:
        pratio = float(options.get("pratio", "nan"))
    except ValueError:
        return None
    key = (table.dataset, table.about["model"], attack, pratio, row[0])
    return reported.get(key) if options.get("label_mode") == "all2one" else None
