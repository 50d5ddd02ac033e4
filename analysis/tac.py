"""TAC: by how much the trigger changes each channel of the network, before and after a repair.

Trigger activation change is the distance between the maps of a channel for an image with and
without the trigger. A backdoor is often in the few channels where it is large. Zheng, Tang, Li,
Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022 (arXiv 2208.03111).

    python analysis/tac.py --result_file badnet_cifar10
    python analysis/tac.py --result_file badnet_cifar10 --defense fmp

It looks at triggered test images, so that no defense may use it; see docs/analysis.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.analysis.options import Analysis
from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Analysis):
    images: int = option(500, at_least=1, unit="images")
    """test images that the change is averaged over, at most"""
    order: Literal["sorted", "channel"] = "sorted"
    """of the channels in a panel: by the victim's values, the largest first, or by their numbers"""


if __name__ == "__main__":
    launch(Config)

from antidote_bench.utils.channels import layers_of_channels, trigger_activation_change
from antidote_bench.utils.charts import MARKED, PLAIN
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.protocol.analyse import Numbers, analyse
from antidote_bench.utils.report import figures

COLUMNS = ["layer", "place", "channel", "tac", "tac_repaired"]
ACROSS, MOST = 4, 60  # panels side by side, and in all
LABEL = 28  # letters of a layer's name


def measure(subject, config):
    """A row for every channel of every layer, in the order of its panel."""
    clean, triggered, _ = subject.pairs(config.images)
    if not layers_of_channels(subject.loaded.model):
        raise ConfigError(
            "the model has no batch norm and no convolution, so that it has no channels"
        )
    before, *after = (
        trigger_activation_change(model, clean, triggered) for model in subject.models.values()
    )
    rows = []
    for layer, values in before.items():
        again = after[0].get(layer) if after else None
        again = again if again is not None and len(again) == len(values) else None
        order = range(len(values))
        if config.order == "sorted":
            order = values.argsort(descending=True, stable=True).tolist()
        for place, channel in enumerate(order):
            row = {
                "layer": layer,
                "place": place,
                "channel": channel,
                "tac": values[channel].item(),
            }
            rows.append(row | ({} if again is None else {"tac_repaired": again[channel].item()}))
    shown = "by their numbers"
    if config.order == "sorted":
        shown = f"by the values of the {subject.name}"
    notes = [
        f"root mean squared change of a map, mean over {len(clean)} test images; channels {shown}"
    ]
    return Numbers(COLUMNS, rows, notes)


def draw(numbers, subject, Figure):
    """A panel for every layer: the victim's values as an area, those after a repair as dots."""
    layers = {}
    for row in numbers.rows:
        layers.setdefault(row["layer"], []).append(row)
    left_out = list(layers)[:-MOST]
    figure = Figure()
    panels = figures.grid(figure, len(layers) - len(left_out), ACROSS, 1.75, 0.95)
    for place, (panel, (layer, rows)) in enumerate(
        zip(panels, list(layers.items())[len(left_out) :], strict=True)
    ):
        draw_layer(panel, rows)
        panel.set_title(f"{figures.shorten(layer.removeprefix('network.'), LABEL)}  ({len(rows)})")
        if place % ACROSS == 0:
            panel.set_ylabel("TAC")
    area = {"color": MARKED, "marker": "s", "alpha": 0.45, "linestyle": "", "linewidth": 0}
    entries = [(subject.name, area)]
    if subject.defense:
        dots = {"color": PLAIN, "marker": ".", "markersize": 6, "linestyle": ""}
        entries.append((f"after {subject.defense}", dots))
    figures.legend(figure, entries)
    more = [f"the first {len(left_out)} layers are in the CSV file only"] if left_out else []
    heading = subject.heading("Trigger activation change of every channel")
    figures.around(figure, heading, [*numbers.notes, *more])
    return figure


def draw_layer(panel, rows):
    places, values = [row["place"] for row in rows], [row["tac"] for row in rows]
    edges = [place - 0.5 for place in [*places, len(places)]]
    panel.stairs(values, edges, fill=True, color=MARKED, alpha=0.45, linewidth=0)
    again = [(row["place"], row["tac_repaired"]) for row in rows if "tac_repaired" in row]
    if again:
        size = 1.5 if len(again) > 100 else 3
        panel.scatter(
            *zip(*again, strict=True), s=size, color=PLAIN, linewidths=0, zorder=3, clip_on=False
        )
    panel.set_ylim(bottom=0)  # dots of channels that are switched off lie on the axis
    panel.set_xlim(-0.5, len(rows) - 0.5)
    panel.set_xticks([])
    panel.yaxis.get_major_locator().set_params(nbins=3)
    figures.frame(panel)


def main(config):
    analyse(__name__, config, measure, draw)
