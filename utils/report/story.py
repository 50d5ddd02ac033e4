"""What happened, in one line for each cell: the head of a page of few runs."""

from typing import NamedTuple

from antidote_bench.utils.record import folder
from antidote_bench.utils.report.runs import METRICS, NONE
from antidote_bench.utils.report.summaries import missed
from antidote_bench.utils.report.tables import credited, spread

MOST = 16  # lines; a page of more cells has its tables alone


class Line(NamedTuple):
    """`kind` is victim, good, bad or plain, which the page shows as a colour."""

    kind: str
    name: str
    verdict: str
    text: str


def tell(tables, judged):
    """The lines of victims, repairs and detections; [] where they are more than MOST."""
    cells = [(table, key) for table in tables for key in table.cells]
    others = [(table, key) for table in judged for key in table.cells]
    if len(cells) + len(others) > MOST:
        return []
    told = [_of_cell(table, key)._asdict() for table, key in _ordered(cells)]
    return told + [_of_detector(table, key)._asdict() for table, key in _ordered(others)]


def _ordered(cells):
    """The cells of one attack together; the sort keeps the tables in their order."""
    numbers = {id(table): number for number, (table, _) in enumerate(cells)}

    def place(item):
        table, (column, row) = item
        return numbers[id(table)], list(table.columns).index(column), list(table.rows).index(row)

    return sorted(cells, key=place)


def _of_cell(table, key):
    column, row = key
    runs, attack = table.cells[key], table.columns[column]
    acc, asr, ra = (_percent(spread(runs, name)[0]) for name in METRICS)
    if row == NONE:
        if column in table.clean:
            return Line("plain", attack, "benign", f"nothing was poisoned; ACC {acc}")
        targets = {run.target for run in runs}
        label = f"class {targets.pop()}" if len(targets) == 1 and all(targets) else "its target"
        text = f"ACC {acc}, and the trigger leads {asr} of the images to {label} (ASR)"
        return Line("victim", attack, "attacked", text)
    name = f"{table.rows[row]} on {attack}"
    before = [run.victim for run in runs]
    was = [_percent(spread(before, measure)[0]) for measure in METRICS]
    text = f"ASR {was[1]} → {asr}, ACC {was[0]} → {acc}, RA {was[2]} → {ra}"
    if not any(credited(table, column, run) for run in runs):
        return Line("plain", name, "no verdict", text)
    lacks = [words for run in runs if (words := missed(run))]
    if not lacks:
        return Line("good", name, "repaired", text)
    count = f"{len(runs) - len(lacks)} of {len(runs)} repaired" if len(runs) > 1 else "not repaired"
    return Line("bad", name, f"{count}: {' or '.join(dict.fromkeys(lacks))}", text)


def _of_detector(table, key):
    column, row = key
    runs, name = table.cells[key], f"{table.rows[row]} on {table.columns[column]}"
    benign = column in table.clean
    if table.judges != "model":
        tpr, fpr = (_percent(spread(runs, measure)[0]) for measure in ("tpr", "fpr"))
        what = "training images" if table.judges == "data" else "inputs"
        text = f"flags {fpr} of the clean {what}"
        if not benign:
            kind = "poisoned" if table.judges == "data" else "triggered"
            text = f"flags {tpr} of the {kind} {what} and {fpr} of the clean ones"
        return Line("plain", name, "detection", text)
    verdicts = [run for run in runs if run.row.get("suspects")]
    score = spread(runs, "score")[0]
    text = "the method abstains" if score is None else f"score {score:.3g}"
    if len(runs) > 1 or not verdicts:
        return Line("plain", name, "detection", text)
    suspects = verdicts[0].row["suspects"]
    if suspects == folder.NO_CLASS:
        return Line("plain" if benign else "bad", name, "detection", f"suspects no class; {text}")
    named = f"suspects class {suspects}"
    if benign:
        return Line("bad", name, "detection", f"{named}, but nothing was poisoned; {text}")
    hit = verdicts[0].numbers["target_found"] == 1
    named += ", the attacker’s target" if hit else ", which does not hold the attacker’s target"
    return Line("good" if hit else "bad", name, "detection", f"{named}; {text}")


def _percent(value):
    return "–" if value is None else f"{100 * value:.1f} %"
