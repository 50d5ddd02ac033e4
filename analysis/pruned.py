"""Pruned: which channels a defense has removed, and whether they are those that know the trigger.

Every channel of the victim and of the repaired model is a dot: its strength before and after.
Those that are removed lie on the axis. The colour is the trigger activation change of the channel
in the victim, which analysis/tac.py explains (Zheng et al., ECCV 2022, arXiv 2208.03111).

    python analysis/pruned.py --result_file badnet_cifar10 --defense clp

See docs/analysis.md.
"""

from dataclasses import dataclass

from antidote_bench.utils.analysis.options import Analysis
from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Analysis):
    defense: str = option(identity=False)
    """finished defense of the record: the name of its folder, clp say"""
    images: int = option(500, at_least=1, unit="images")
    """test images that the trigger activation change is averaged over, at most"""
    threshold: float = option(0.01, at_least=0, below=1)
    """share of its strength in the victim up to which a channel counts as removed"""


if __name__ == "__main__":
    launch(Config)

import torch
from torch import nn

from antidote_bench.utils.channels import paired_norms, trigger_activation_change
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.protocol.analyse import Numbers, analyse
from antidote_bench.utils.report import figures

COLUMNS = ["layer", "channel", "tac", "strength", "strength_repaired", "removed"]
ACROSS, MOST = 4, 40  # panels side by side, and in all
LABEL = 28  # letters of a layer's name
SIDE, LINE = 1.5, 0.25  # inches of a panel, and of the second line of a title
COLOURS = "#c3d0df", "#c41e3a"  # of the least and of the largest change in a layer


def measure(subject, config):
    """A row for every channel of every layer that both models have."""
    victim, fixed = subject.loaded.model, subject.repaired
    found = units(victim)
    if not found:
        raise ConfigError(
            "the model has no convolution and no batch norm, whose channels one prunes"
        )
    changes = changes_of(subject, found, config)
    rows, missing = [], 0
    for layer, names in found.items():
        before, after = strengths(victim, names), strengths(fixed, names)
        if after is None or len(after) != len(before):
            missing += 1
            continue
        gone = (after <= config.threshold * before) & (before > 0)
        columns = {"strength": before, "strength_repaired": after, "removed": gone.long()}
        columns |= {"tac": changes[layer]} if layer in changes else {}
        rows += rows_of(layer, columns)
    if not rows:
        raise ConfigError(f"no layer of the victim is in the model of {subject.defense}")
    notes = [summary(rows)]
    notes += [f"layers of the victim that the repaired model has not: {missing}"] * bool(missing)
    return Numbers(COLUMNS, rows, notes)


def rows_of(layer, columns):
    """A row for every channel of a layer; `columns` are {name: values C}."""
    values = zip(*(part.tolist() for part in columns.values()), strict=True)
    return [
        {"layer": layer, "channel": channel, **dict(zip(columns, row, strict=True))}
        for channel, row in enumerate(values)
    ]


def units(model):
    """{layer whose output is the channels': the layers that make it}, by qualified names.

    A convolution and the batch norm that alone reads it are one, named after the batch norm.
    """
    pairs = paired_norms(model)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            found[pairs.get(name, name)] = [name, *([pairs[name]] if name in pairs else [])]
        elif isinstance(module, nn.BatchNorm2d) and name not in pairs.values():
            found[name] = [name]
    return found


@torch.no_grad()
def strengths(model, names):
    """float64 C: the factor by which the layers `names` scale each channel; None where one is
    missing.

    It is the norm of a filter, times what a batch norm multiplies by: |scale| / sqrt(variance).
    """
    modules = dict(model.named_modules())
    total = 1.0
    for name in names:
        layer = modules.get(name)
        if isinstance(layer, nn.Conv2d):
            total = total * layer.weight.double().flatten(1).norm(dim=1)
        elif isinstance(layer, nn.BatchNorm2d):
            scale = torch.ones(layer.num_features) if layer.weight is None else layer.weight
            variance = layer.running_var
            deviation = 1.0 if variance is None else (variance.double() + layer.eps).sqrt()
            total = total * (scale.double().abs() / deviation).to(scale.device)
        else:
            return None
    return total


def changes_of(subject, found, config):
    """{layer: float64 C}, the victim's trigger activation change; {} without triggered images."""
    if not len(subject.loaded.test_sets.backdoor):
        return {}
    clean, triggered, _ = subject.pairs(config.images)
    modules = dict(subject.loaded.model.named_modules())
    layers = {name: modules[name] for name in found}
    return trigger_activation_change(subject.loaded.model, clean, triggered, layers)


def summary(rows):
    """A sentence about how many channels are removed, and where they stand in their layers."""
    gone = [row for row in rows if row["removed"]]
    words = f"{len(gone)} of {len(rows)} channels are removed"
    places = [place for row in gone if (place := rank(row, rows)) is not None]
    if not places:
        return words
    mean = 100 * sum(places) / len(places)
    return (
        f"{words}; on average the trigger changes a removed one more than {mean:.0f} % of the "
        "others in its layer (chance: 50 %)"
    )


def rank(row, rows):
    """The share of the other channels of its layer that the trigger changes less; ties are half.

    None where it is alone, or nothing is known about the trigger.
    """
    others = [
        other["tac"]
        for other in rows
        if other["layer"] == row["layer"] and other is not row and "tac" in other
    ]
    if not others:
        return None
    less = sum((value < row["tac"]) + 0.5 * (value == row["tac"]) for value in others)
    return less / len(others)


def draw(numbers, subject, Figure):
    """A panel for every layer that loses channels, or for all where none does."""
    layers = {}
    for row in numbers.rows:
        layers.setdefault(row["layer"], []).append(row)
    cut = {name: rows for name, rows in layers.items() if any(row["removed"] for row in rows)}
    shown = dict(list((cut or layers).items())[:MOST])
    figure, colours = Figure(), scale()
    panels = figures.grid(figure, len(shown), ACROSS, SIDE, SIDE)
    rows_below = -(-len(shown) // ACROSS) - 1  # a title has two lines
    figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + LINE * rows_below)
    figure.subplots_adjust(hspace=(0.45 + LINE) / SIDE)
    for place, (panel, (layer, rows)) in enumerate(zip(panels, shown.items(), strict=True)):
        draw_layer(panel, rows, colours)
        count = sum(row["removed"] for row in rows)
        name = figures.shorten(layer.removeprefix("network."), LABEL)
        panel.set_title(f"{name}\n{count} of {len(rows)} removed")
        if place % ACROSS == 0:
            panel.set_ylabel(f"after {figures.shorten(subject.defense, 20)}")
        if place + ACROSS >= len(shown):
            panel.set_xlabel("strength in the victim")
    notes = [*numbers.notes, "line: unchanged strength; ring: removed"]
    if "tac" in numbers.rows[0]:
        add_bar(figure, panels, colours)
    if left_out := len(layers) - len(shown):
        notes.append(f"{left_out} more layers are in the CSV file only")
    figures.around(figure, subject.heading("Channels before and after a repair"), notes)
    return figure


def scale():
    """The colours of changes from 0 to 1."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("change", COLOURS)


def add_bar(figure, panels, colours):
    """What the colours mean, to the right of the first panels."""
    from matplotlib.cm import ScalarMappable

    width, height = figure.get_size_inches()
    right = max(panel.get_position().x1 for panel in panels)
    first = panels[0].get_position()
    place = right + 0.15 / width, first.y0, 0.08 / width, first.height
    bar = figure.colorbar(ScalarMappable(cmap=colours), cax=figure.add_axes(place))
    bar.set_ticks([0, 1], labels=["least", "most"])
    bar.set_label("change by the trigger,\nin its layer")
    bar.outline.set_visible(False)


def draw_layer(panel, rows, colours):
    rows = sorted(rows, key=lambda row: row.get("tac", 0))  # the largest changes on top
    before = [row["strength"] for row in rows]
    after = [row["strength_repaired"] for row in rows]
    most = max(*before, *after, 1e-12)
    changes = [row.get("tac", 0.0) for row in rows]
    low, high = min(changes), max(changes)
    shades = colours([(value - low) / ((high - low) or 1) for value in changes])
    edges = ["#14181d" if row["removed"] else "none" for row in rows]
    panel.plot([0, most], [0, most], color=figures.SOFT, linewidth=0.5, zorder=1)
    panel.scatter(
        before,
        after,
        s=[14 if row["removed"] else 9 for row in rows],
        color=shades,
        edgecolors=edges,
        linewidths=0.5,
        zorder=3,
        clip_on=False,
    )
    panel.set(xlim=(0, 1.05 * most), ylim=(0, 1.05 * most))
    for axis in (panel.xaxis, panel.yaxis):
        axis.get_major_locator().set_params(nbins=3)
    figures.frame(panel)


def main(config):
    analyse(__name__, config, measure, draw)
