"""Published figures to lay beside one's own: benchmarks/published.csv, in fractions, each with its source.

Column `usable` says what is known of a figure's making: yes (no fault that would change it), care (a known deviation), no (not
what its name says); `note` says why. They are of one seed, and the recipe may differ from that of a run here.
"""

from utils.config import ROOT
from utils.files import read_csv
from utils.finished import METRICS

FILE = ROOT / "benchmarks" / "published.csv"
KEY = ("dataset", "model", "attack", "pratio", "defense")
MARKS = {"yes": "", "care": "(?)", "no": "(!)"}
FOOTNOTES = {
    "(?)": "published with a known deviation: read with care",
    "(!)": "published, but not what its name says: do not compare",
}


def read():
    """{(data set, model, attack, poison ratio, defense): row}; the numbers are floats, None where nothing was published."""
    rows = {}
    for row in read_csv(FILE):
        row |= {name: float(row[name]) if row[name] else None for name in (*METRICS, "pratio")}
        rows[tuple(row[name] for name in KEY)] = row
    return rows


def find(figures, about, column, row):
    """What was published for a cell of a table, None where nothing was; settings besides the poison ratio do not count."""
    attack, options = column[0], dict(column[1])
    try:
        pratio = float(options.get("pratio", "nan"))
    except ValueError:
        return None
    key = (about["dataset"], about["model"], attack, pratio, row[0])
    return figures.get(key) if options.get("label_mode") == "all2one" else None
