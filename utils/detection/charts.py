"""Images of what a detector says."""

import numpy as np

from antidote_bench.utils.charts import MARKED, PLAIN, figure_bytes, plotting
from antidote_bench.utils.detection.outliers import FARTHEST

BINS = 60
SHOWN = 0.5  # percent of the scores at each end that share the outermost bins
COVERS = "#b8860b"
BEYOND = 1.2  # height of a score that is cut off, in units of the largest other one


def histogram(scores, groups, threshold):
    """PNG bytes: the share of the images of each group by score, and the threshold.

    `scores` are float64 N, `groups` {name: bool N}; the groups clean, cover and poisoned or
    triggered have a colour each, and an empty one is not drawn.
    """
    low, high = np.percentile(scores, [SHOWN, 100 - SHOWN])
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    with plotting("the chart of the scores") as Figure:
        figure = Figure(figsize=(5.6, 2.6), layout="constrained")
        panel = figure.subplots()
        colors = {"clean": PLAIN, "cover": COVERS}
        for name, chosen in groups.items():
            if not chosen.any():
                continue
            panel.hist(
                scores[chosen].clip(edges[0], edges[-1]),
                edges,
                weights=np.full(chosen.sum(), 100 / chosen.sum()),
                color=colors.get(name, MARKED),
                alpha=0.6,
                label=f"{name}, {chosen.sum()}",
            )
        panel.axvline(
            np.clip(threshold, edges[0], edges[-1]),
            color="black",
            linestyle="--",
            linewidth=0.8,
            label="threshold",
        )
        panel.set_xlabel("score; the higher, the more suspicious")
        panel.set_ylabel("% of the images")
        panel.legend(frameon=False)
        return figure_bytes(figure)


def class_chart(per_class, suspects):
    """PNG bytes: the finite score of every class; suspected classes red.

    Scores of FARTHEST or minus that, which stand for an unlimited distance, are cut off where the
    others end, and hatched.
    """
    shown, is_cut = within(np.asarray(per_class, np.float64))
    labels = np.arange(len(shown))
    colors = np.where(np.isin(labels, suspects), MARKED, PLAIN)
    hatched = {"hatch": "////", "fill": False, "label": "beyond the axis"}
    with plotting("the chart of the scores") as Figure:
        figure = Figure(figsize=(5.6, 2.6), layout="constrained")
        panel = figure.subplots()
        panel.bar(labels[~is_cut], shown[~is_cut], color=colors[~is_cut])
        if is_cut.any():
            panel.bar(labels[is_cut], shown[is_cut], edgecolor=colors[is_cut], **hatched)
            panel.legend(frameon=False)
        panel.set_xlabel("class")
        panel.set_ylabel("score")
        panel.xaxis.get_major_locator().set_params(integer=True)
        return figure_bytes(figure)


def within(scores):
    """(scores K to show, which of them are cut off, bool K)."""
    is_cut = np.abs(scores) >= FARTHEST
    most = max(np.abs(scores[~is_cut]).max(initial=0), 1)
    return np.where(is_cut, np.copysign(BEYOND * most, scores), scores), is_cut
