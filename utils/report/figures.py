"""Figures for a paper, each as PNG, PDF and SVG: heat maps, ACC against ASR, and curves.

Records may come from strangers: their texts are drawn as text only, and files have safe names.
"""

import math
import re
import textwrap
import warnings

from antidote_bench.utils.charts import figure_bytes, plotting
from antidote_bench.utils.report import palette
from antidote_bench.utils.report.curves import curve
from antidote_bench.utils.report.formats import about, footnotes, title
from antidote_bench.utils.report.runs import METRICS, NONE
from antidote_bench.utils.report.tables import FOOTNOTES, ORACLE, UNCREDITED, spread, victims

FORMS = ("png", "pdf", "svg")
PRINT_DPI = 200
LONGEST, LONGEST_ABOUT = 34, 240  # letters of a label, and of the line below a title
CELL, GAP = 0.62, 0.3  # inches: the width of a cell, and between two heat maps
SIDE = 60  # rows and columns of a heat map
PANELS = 24  # attacks of one table that are drawn one by one
POINTS = 400  # of one run's curve
HOLLOW = f"coloured ring: {FOOTNOTES[ORACLE]}"
COLUMNS = 3  # panels side by side
WORST_LOSS = 30  # points of ACC at which the colour of a heat map is full
LARGEST = 10**9  # a number beyond it is no loss and no epoch
INK, SOFT, LINE = "#14181d", "#59636e", "#e3e6ea"
INSIDE = {"ha": "center", "va": "center", "fontsize": 7}  # a number in a cell
FILLED = {"left": 0, "right": 1, "bottom": 0, "top": 1}  # what stands around is added when saving
VICTIM = {"marker": "o", "markersize": 4.5, "color": "white", "markeredgecolor": INK}


def save_all(tables, folder, save):
    """Write all figures into `folder` with save(path, bytes); returns a sentence for the user."""
    names, count = set(), 0
    with plotting("--figures") as Figure, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        for name, figure in drawn(tables, Figure):
            name = unique(name, names)
            for form in FORMS:
                content = figure_bytes(figure, form, dpi=PRINT_DPI, bbox_inches="tight")
                save(folder / f"{name}.{form}", content)
            count += 1
    if not count:
        return "no figure written: no run is one of a defense, and none has a log of its epochs"
    words = "1 figure, as" if count == 1 else f"{count} figures, each as"
    return f"{words} {', '.join(FORMS).upper()}, written to {folder}"


def drawn(tables, Figure):
    """(name, figure) of everything that there is to draw, one after the other."""
    for table in tables:
        name = f"{table.about['dataset']}-{table.about['model']}"
        heading = f"{shorten(title(table, [table]), 60)}\n{shorten(about(table), LONGEST_ABOUT)}"
        rows = [key for key in table.rows if key != NONE]
        if rows:
            yield f"heatmap-{name}", heat_map(table, heading, Figure)
        attacked = [column for column in table.columns if trade(table, column)]
        if attacked:
            yield f"tradeoff-{name}", trade_offs(table, attacked, heading, Figure)
        if lines := victim_lines(table):
            yield f"curves-{name}-victims", curves(lines, f"victims\n{heading}", Figure)
        for column in list(table.columns)[:PANELS]:
            label = table.columns[column] + table.marks[column]
            if lines := defense_lines(table, column, rows):
                head = f"defenses on {shorten(label)}\n{heading}"
                yield f"curves-{name}-{table.columns[column]}", curves(lines, head, Figure)


def unique(name, names):
    """A file name of plain letters that is not among `names`, to which it is added."""
    plain = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")[:80].rstrip("-")
    number = 1
    while (safe := plain if number == 1 else f"{plain}-{number}") in names:
        number += 1
    names.add(safe)
    return safe


def shorten(text, longest=LONGEST):
    """`text`, or its beginning and end."""
    if len(text) <= longest:
        return text
    tail = longest // 3
    return f"{text[: longest - tail - 1].rstrip()}…{text[-tail:].lstrip()}"


def labels_of(table, keys):
    """Labels with marks that are short and differ."""
    labels = []
    for key in keys:
        label = shorten({**table.columns, **table.rows}[key]) + table.marks[key]
        same = sum(other.partition(" #")[0] == label for other in labels)
        labels.append(f"{label} #{same + 1}" if same else label)
    return labels


# ---------- heat map ----------


def heat_map(table, heading, Figure):
    """Defenses down, attacks across: the mean ASR, and the points of ACC that were lost."""
    rows, columns = list(table.rows)[:SIDE], list(table.columns)[:SIDE]
    attacked = [column for column in columns if column not in table.clean]
    maps = [
        ("ASR, %", attacked, asr_percent, "Reds", 100),
        ("ACC lost, points", columns, points_lost, "Blues", WORST_LOSS),
    ]
    maps = [each for each in maps if each[1]]
    widths = [len(each[1]) for each in maps]
    gap = {"wspace": GAP * len(maps) / (CELL * sum(widths)), **FILLED}
    figure = Figure(figsize=(CELL * sum(widths) + GAP * (len(maps) - 1), 0.24 * len(rows)))
    panels = figure.subplots(1, len(maps), squeeze=False, width_ratios=widths, gridspec_kw=gap)[0]
    for panel, (_, across, value, colours, full) in zip(panels, maps, strict=True):
        values = [[value(table, column, row) for column in across] for row in rows]
        draw_map(panel, values, colours, full)
        labels = labels_of(table, across)
        panel.set_xticks(range(len(across)), labels, rotation=40, ha="left", rotation_mode="anchor")
        panel.set_yticks(range(len(rows)), labels_of(table, rows) if panel is panels[0] else [])
    for place, column in enumerate(columns if rows[0] == NONE else []):
        mean, _ = spread(victims(table, column), "acc")
        words = "–" if mean is None else f"{100 * mean:.1f}"
        panels[-1].text(place, 0, words, style="italic", **INSIDE, color=SOFT)
    top = figure.get_tightbbox().y1 + 0.06
    for panel, (name, *_) in zip(panels, maps, strict=True):
        place = panel.get_position().x0, top / figure.get_size_inches()[1]
        figure.text(*place, name, va="bottom", fontsize=8, weight="bold")
    notes = ["row none below ACC lost: the ACC of the victim, %"] if rows[0] == NONE else []
    if cut := len(table.rows) + len(table.columns) - len(rows) - len(columns):
        notes.append(f"{cut} more rows and columns are not drawn")
    around(figure, heading, [*notes, *footnotes(table)])
    return figure


def asr_percent(table, column, row):
    mean, _ = spread(table.cells.get((column, row), []), "asr")
    return None if mean is None else 100 * mean


def points_lost(table, column, row):
    """By how much the mean ACC is below that of the same runs' victims; None without a defense."""
    pairs = [
        (run.victim.numbers["acc"], run.numbers["acc"])
        for run in table.cells.get((column, row), [])
        if run.victim
    ]
    lost = [100 * (before - after) for before, after in pairs if None not in (before, after)]
    return sum(lost) / len(lost) if lost else None


def draw_map(panel, values, colours, full):
    """A number in each cell, on a colour that is darkest at `full`."""
    numbers = [[math.nan if value is None else value for value in line] for line in values]
    panel.imshow(numbers, cmap=colours, vmin=0, vmax=1.25 * full, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if value is not None:
                number = f"{round(value, 1) + 0.0:.1f}".replace("-", "−")
                panel.text(x, y, number, **INSIDE, color="white" if value > 0.8 * full else INK)
            elif y or full == 100:
                panel.text(x, y, "–", **INSIDE, color=SOFT)
    panel.set_xticks([place - 0.5 for place in range(1, len(values[0]))], minor=True)
    panel.set_yticks([place - 0.5 for place in range(1, len(values))], minor=True)
    panel.grid(which="minor", color="white", linewidth=1.2)
    panel.tick_params(which="both", length=0, top=False, labeltop=True, labelbottom=False)
    panel.spines[:].set_visible(False)


# ---------- ACC against ASR ----------


def trade(table, column):
    """[(row, [ASR, ACC] before, [ASR, ACC] after)], in percent, of the defenses on an attack."""
    points = []
    for row in table.rows:
        runs = table.cells.get((column, row), [])
        if row == NONE or column in table.clean or not runs:
            continue
        before, after = (
            [spread(each, name)[0] for name in ("asr", "acc")]
            for each in ([run.victim for run in runs], runs)
        )
        if None not in (*before, *after):
            points.append(
                (row, [100 * value for value in before], [100 * value for value in after])
            )
    return points


def trade_offs(table, attacked, heading, Figure):
    """A panel per attack: arrows from the victim to the repaired models."""
    cut, attacked = attacked[PANELS:], attacked[:PANELS]
    figure = Figure()
    panels = grid(figure, len(attacked), COLUMNS, 2.3, 2.0, sharex=True, sharey=True)
    points = {column: trade(table, column) for column in attacked}
    styles = {row: look_of(table, row) for column in attacked for row, *_ in points[column]}
    accs = [place[1] for each in points.values() for _, *both in each for place in both]
    low, high = max(0, 5 * math.floor(min(accs) / 5 - 0.2)), 5 * math.ceil(max(accs) / 5 + 0.2)
    edge = 0.03 * (min(high, 100) - low)
    for place, (panel, column) in enumerate(zip(panels, attacked, strict=True)):
        for row, before, after in points[column]:
            draw_arrow(panel, styles[row], before, after)
        panel.set_title(labels_of(table, [column])[0])
        panel.set(xlim=(-4, 104), ylim=(low - edge, min(high, 100) + edge))
        frame(panel)
        if place + COLUMNS >= len(attacked):
            panel.set_xlabel("ASR, %")
            panel.tick_params(labelbottom=True)
        if place % COLUMNS == 0:
            panel.set_ylabel("ACC, %")
    entries = {row[0]: style for row, style in styles.items()}
    entries = [(name, {**style, "linestyle": ""}) for name, style in entries.items()]
    legend(figure, [("victim", {**VICTIM, "linestyle": ""}), *entries])
    notes = ["a point is a mean over seeds; upper left is best"]
    notes += [HOLLOW] if any("markerfacecolor" in style for style in styles.values()) else []
    notes += [f"{len(cut)} more attacks are not drawn"] if cut else []
    around(figure, heading, [*notes, *(note for note in footnotes(table) if note[0] in UNCREDITED)])
    return figure


def draw_arrow(panel, style, before, after):
    """The way from the victim, which is a black ring, to the repaired model."""
    arrow = {
        "arrowstyle": "-|>,head_length=0.25,head_width=0.12",
        "color": style["color"],
        "linewidth": 0.7,
        "alpha": 0.6,
        "shrinkA": 2.5,
        "shrinkB": 3,
    }
    panel.annotate("", after, before, arrowprops=arrow)
    panel.plot(*before, **VICTIM, linestyle="", zorder=3)
    panel.plot(*after, **style, linestyle="", zorder=4)


def look_of(table, row):
    """The look of a defense; hollow where it was chosen with test data."""
    style = look(row[0])
    if ORACLE in table.marks[row]:
        style |= {"markerfacecolor": "white", "markeredgecolor": style["color"]}
    return style


# ---------- curves ----------


def victim_lines(table):
    """[(attack, look, curve)] of all victims, a curve per seed."""
    return [
        (column[0], look(column[0], palette.ATTACKS), line)
        for column in table.columns
        for line in curves_of(run for run in victims(table, column))
    ]


def defense_lines(table, column, rows):
    """[(defense, look, curve)] on one attack, a curve per seed."""
    return [
        (row[0], look(row[0]), line)
        for row in rows
        for line in curves_of(table.cells.get((column, row), []))
    ]


def curves_of(runs):
    return [line for run in runs if (line := curve(run, POINTS))]


def series(line, what):
    """([epoch], [value]) of a curve, without gaps; `what` is loss, acc, asr or ra."""
    if what == "loss":
        pairs = enumerate(line["loss"])
    else:
        column = 1 + METRICS.index(what)
        pairs = [(row[0], row[column]) for row in line["measured"]]
    scale = 1 if what == "loss" else 100
    epochs = through(line["epoch"])
    points = [
        (epochs[place], scale * value)
        for place, value in pairs
        if value is not None and abs(value) < LARGEST
    ]
    return [x for x, _ in points], [y for _, y in points]


def through(epochs):
    """The epochs counted through all stages, of which each may count from 1."""
    counted, before, last = [], 0, 0
    for epoch in epochs:
        epoch = min(epoch, LARGEST)
        before += last if epoch <= last else 0
        last = epoch
        counted.append(before + epoch)
    return counted


def curves(lines, heading, Figure):
    """A panel for each measure in the logs, a line per seed in the colour of its method."""
    titles = {"loss": "training loss", "acc": "ACC, %", "asr": "ASR, %", "ra": "RA, %"}
    points = {what: [series(line, what) for *_, line in lines] for what in titles}
    kinds = [what for what in titles if any(x for x, _ in points[what])]
    figure = Figure()
    panels = grid(figure, len(kinds), len(titles), 1.8, 1.6)
    for panel, what in zip(panels, kinds, strict=True):
        for (_, style, _), (x, y) in zip(lines, points[what], strict=True):
            every = max(1, len(x) // 5)
            panel.plot(x, y, **style, linewidth=0.9, markevery=(every // 2, every), alpha=0.9)
        panel.set_title(titles[what])
        if what != "loss":
            panel.set_ylim(-4, 104)
        frame(panel)
        panel.set_xlabel("epoch")
    legend(figure, list({name: (name, style) for name, style, _ in lines}.values()))
    around(figure, heading, ["a line per seed; the stages of a method follow one another"])
    return figure


# ---------- what all figures share ----------


def look(name, known=palette.DEFENSES):
    """The colour and marker of a method, as options of plot."""
    colour, marker = palette.look(name, known)
    return {
        "color": palette.COLOURS[colour][0],
        "marker": palette.MARKERS[marker],
        "markersize": 5.5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.4,
    }


def grid(figure, count, across, width, height, **shared):
    """`count` panels of so many inches, at most `across` of them side by side."""
    across = min(across, count)
    down = -(-count // across)
    figure.set_size_inches((width + 0.35) * across, (height + 0.45) * down)
    spaces = {"wspace": 0.35 / width, "hspace": 0.45 / height, **FILLED}
    panels = figure.subplots(down, across, squeeze=False, gridspec_kw=spaces, **shared).flat
    panels = list(panels)
    for panel in panels[count:]:
        panel.remove()
    return panels[:count]


def frame(panel):
    """A grid instead of a box."""
    panel.grid(color=LINE, linewidth=0.5)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(length=2)


def legend(figure, entries):
    """Names and looks below the panels, in as many columns as there is room for."""
    from matplotlib.lines import Line2D

    box = figure.get_tightbbox()
    names = [shorten(name, 24) for name, _ in entries]
    room = 0.3 + 0.062 * max(map(len, names))
    width, height = figure.get_size_inches()
    key = figure.legend(
        [Line2D([], [], **style) for _, style in entries],
        ["x" for _ in entries],  # an older matplotlib leaves out names that begin with _
        loc="upper left",
        bbox_to_anchor=(box.x0 / width, (box.y0 - 0.12) / height),
        ncols=max(1, min(len(names), int(box.width / room))),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.2,
        handletextpad=0.4,
        columnspacing=1,
    )
    for text, name in zip(key.get_texts(), names, strict=True):
        text.set_text(name)


def around(figure, heading, notes):
    """A heading above everything that is drawn, and notes below."""
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    left = box.x0 / width
    letters = int(max(box.width, 2.5) / 0.05)
    first, *rest = heading.split("\n")
    rest = [part for line in rest for part in textwrap.wrap(line, letters)]
    notes = [part for line in notes for part in textwrap.wrap(line, letters)]
    small = {"fontsize": 6.5, "color": SOFT, "linespacing": 1.25}
    figure.text(left, (box.y1 + 0.08) / height, "\n".join(rest), va="bottom", **small)
    top = box.y1 + 0.13 + 0.115 * len(rest)
    figure.text(left, top / height, first, va="bottom", fontsize=9, weight="bold", color=INK)
    figure.text(left, (box.y0 - 0.08) / height, "\n".join(notes), va="top", **small)
