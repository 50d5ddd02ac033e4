"""Images of what a detector says."""

import numpy as np

from antidote_bench.utils.charts import MARKED, PLAIN, figure_bytes, plotting

BINS = 60
SHOWN = 0.5  # percent of the scores at each end that share the outermost bins
COVERS = "#b8860b"


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
    """PNG bytes: the score of every class; suspected classes red."""
    per_class = np.nan_to_num(np.asarray(per_class, np.float64), posinf=0, neginf=0)
    colors = [MARKED if label in suspects else PLAIN for label in range(len(per_class))]
    with plotting("the chart of the scores") as Figure:
        figure = Figure(figsize=(5.6, 2.6), layout="constrained")
        panel = figure.subplots()
        panel.bar(range(len(per_class)), per_class, color=colors)
        panel.set_xlabel("class")
        panel.set_ylabel("score")
        return figure_bytes(figure)
