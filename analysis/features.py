"""Features: what the network makes of images, in two dimensions, with the poisoned ones marked.

The input of the last layer is drawn by t-SNE, which keeps near images near. Poisoned images of a
patch are often an island beside their class. van der Maaten and Hinton, "Visualizing Data using
t-SNE", JMLR 2008; UMAP: McInnes, Healy, Melville, 2018 (arXiv 1802.03426), an optional extra.

    python analysis/features.py --result_file badnet_cifar10
    python analysis/features.py --result_file badnet_cifar10 --split test --defense ft

Distances between islands mean nothing; see docs/analysis.md.
"""

from dataclasses import dataclass
from typing import Literal

from antidote_bench.utils.analysis.options import Analysis
from antidote_bench.utils.config import option
from antidote_bench.utils.launch import launch


@dataclass(frozen=True, kw_only=True)
class Config(Analysis):
    split: Literal["train", "test"] = "train"
    """train: the training set as the victim saw it; test: clean and triggered test images"""
    images: int = option(1000, at_least=10, unit="images")
    """untouched images, drawn at random, at most"""
    marked_images: int = option(200, at_least=0, unit="images")
    """poisoned or triggered images beside them, and as many cover images, at most"""
    method: Literal["tsne", "umap"] = "tsne"
    """how features become two numbers; umap needs the package umap-learn"""
    perplexity: float = option(30.0, above=0, needs={"method": "tsne"})
    """about how many neighbours of an image count; less where there are few images"""
    neighbours: int = option(15, at_least=2, needs={"method": "umap"})
    """how many neighbours of an image count"""


if __name__ == "__main__":
    launch(Config)


import numpy as np
import torch

from antidote_bench.utils import seeds
from antidote_bench.utils.data.dataset import Split
from antidote_bench.utils.errors import RefusedError, UserError
from antidote_bench.utils.features import last_features
from antidote_bench.utils.protocol.analyse import Numbers, analyse
from antidote_bench.utils.record.contents import COVER, POISON
from antidote_bench.utils.report import figures, palette

COLUMNS = ["model", "position", "label", "class", "kind", "x", "y"]
DIMENSIONS = 50  # that the features are reduced to before t-SNE, as its authors do
NEAREST = 10  # neighbours that are counted
CLEAN, MARKS = "clean", {"poisoned": "x", "triggered": "x", "cover": "+"}
PANEL = 3.2  # inches
LETTERS = 14  # of the name of a class


def measure(subject, config):
    """A row for every image and model."""
    shown = of_training(subject, config) if config.split == "train" else of_test(subject, config)
    marked = np.isin(shown.kinds, ("poisoned", "triggered"))
    rows, alike = [], []
    for name, model in subject.models.items():
        features = last_features(model, shown.split, config.precision).double().cpu().numpy()
        places = zip(shown.facts(), embedded(features, config).tolist(), strict=True)
        rows += [{"model": name, **facts, "x": x, "y": y} for facts, (x, y) in places]
        if marked.sum() > 1:
            alike.append(f"{100 * neighbours_alike(features, marked):.0f} % ({name})")
    word = "poisoned" if config.split == "train" else "triggered"
    notes = [f"no image of these is {word}"] if not marked.any() else []
    if alike:
        chance = 100 * (marked.sum() - 1) / (len(marked) - 1)
        notes = [
            f"of the {NEAREST} images nearest to a {word} one in their features, "
            f"{', '.join(alike)} are {word} too (chance: {chance:.0f} %)"
        ]
    return Numbers(COLUMNS, rows, notes)


class Shown:
    """The images of a picture: a split, and of each its position, label, class and kind."""

    def __init__(self, split, positions, truth, kinds):
        self.split, self.positions, self.kinds = split, positions.tolist(), kinds
        self.labels, self.truth = split.labels.tolist(), truth.tolist()

    def facts(self):
        """What the CSV file says about each."""
        columns = ("position", "label", "class", "kind")
        values = zip(self.positions, self.labels, self.truth, self.kinds, strict=True)
        return [dict(zip(columns, row, strict=True)) for row in values]


def of_training(subject, config):
    """The `Shown` of the training set as the victim saw it."""
    loaded = subject.loaded
    if not subject.is_benign and not bool((loaded.kinds == POISON).any()):
        raise RefusedError(
            f"the record {subject.folder} stores no poisoned training image, because the attack "
            "poisons inside the training loop or the weights: --split test shows triggered images"
        )
    parts = [
        drawn(loaded.kinds == 0, config.images, "clean", config),
        drawn(loaded.kinds == COVER, config.marked_images, "cover", config),
        drawn(loaded.kinds == POISON, config.marked_images, "poisoned", config),
    ]
    words = [CLEAN] * len(parts[0]) + ["cover"] * len(parts[1]) + ["poisoned"] * len(parts[2])
    index = torch.cat(parts)
    return Shown(loaded.train[index], index, loaded.clean.labels[index], words)


def of_test(subject, config):
    """The `Shown` of test images: some as they are, and others with the trigger."""
    test, triggered = subject.loaded.test_sets.test, subject.loaded.test_sets.backdoor
    everything = torch.ones_like(test.labels, dtype=torch.bool)
    index = drawn(everything, config.images, "clean", config)
    some = drawn(
        torch.ones_like(triggered.labels, dtype=torch.bool), config.marked_images, "mark", config
    )
    first, second = test[index], triggered[some]
    both = zip(*((part.images, part.labels, part.truth) for part in (first, second)), strict=True)
    split = Split(*(torch.cat(pair) for pair in both))
    positions = torch.cat([index, subject.loaded.backdoor_index[some]])
    return Shown(split, positions, split.truth, [CLEAN] * len(first) + ["triggered"] * len(second))


def drawn(among, count, purpose, config):
    """Sorted positions of at most `count` of those that are true in `among`, at random."""
    positions = among.nonzero().flatten()
    generator = seeds.generator(f"features {purpose}", config.random_seed)
    order = torch.randperm(len(positions), generator=generator)[:count].sort().values
    return positions[order.to(positions.device)]


def embedded(features, config):
    """float64 N,2 of features N,D."""
    from sklearn.decomposition import PCA

    seed = seeds.number("features", config.random_seed) % 2**32
    dimensions = min(DIMENSIONS, *features.shape)
    reduced = PCA(dimensions, svd_solver="full").fit_transform(features)
    if config.method == "umap":
        return by_umap(reduced, config, seed)
    from sklearn.manifold import TSNE

    perplexity = min(config.perplexity, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)


def by_umap(features, config, seed):
    try:
        from umap import UMAP
    except ImportError as error:
        raise UserError(
            "--method umap needs the package umap-learn: pip install 'umap-learn>=0.5' brings it, "
            "and --method tsne needs none"
        ) from error
    neighbours = min(config.neighbours, len(features) - 1)
    return UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(features)


def neighbours_alike(features, marked):
    """The share of the NEAREST neighbours of marked images (bool N) that are marked too.

    By the Euclidean distance of features N,D; the image itself is no neighbour.
    """
    from sklearn.neighbors import NearestNeighbors

    count = min(NEAREST, len(features) - 1)
    near = NearestNeighbors(n_neighbors=count).fit(features)
    found = near.kneighbors(return_distance=False)[marked]  # of fitted points, without themselves
    return marked[found].mean()


def draw(numbers, subject, Figure):
    """A panel for each model: classes in colours, marked images in black."""
    models = list(subject.models)
    figure = Figure()
    panels = figures.grid(figure, len(models), len(models), PANEL, PANEL)
    for panel, name in zip(panels, models, strict=True):
        rows = [row for row in numbers.rows if row["model"] == name]
        draw_points(panel, rows, subject.loaded.spec)
        panel.set_title(name)
    kinds = [kind for kind in MARKS if any(row["kind"] == kind for row in numbers.rows)]
    entries = [
        (kind, {"color": figures.INK, "marker": MARKS[kind], "markersize": 5, "linestyle": ""})
        for kind in kinds
    ]
    dot = {"color": figures.SOFT, "marker": "o", "markersize": 4, "linestyle": ""}
    figures.legend(figure, [("clean, by class", dot), *entries])
    figures.around(figure, subject.heading("Features of images"), numbers.notes)
    return figure


def draw_points(panel, rows, spec):
    """Clean images as dots in the colour of their class, which stands at their median."""
    from matplotlib.patheffects import withStroke

    for number in sorted({row["class"] for row in rows}):
        own = [row for row in rows if row["class"] == number and row["kind"] == CLEAN]
        if not own:
            continue
        points = np.array([(row["x"], row["y"]) for row in own])
        colour = palette.COLOURS[number % len(palette.COLOURS)][0]
        panel.scatter(*points.T, s=5, color=colour, linewidths=0, alpha=0.7)
        word = panel.text(
            *middle(points), class_name(number, spec), ha="center", va="center", zorder=4
        )
        word.set(fontsize=8, weight="bold", color=colour)
        word.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    for kind, marker in MARKS.items():
        points = np.array([(row["x"], row["y"]) for row in rows if row["kind"] == kind])
        if len(points):
            panel.scatter(
                *points.T, s=12, marker=marker, color=figures.INK, linewidths=0.6, zorder=3
            )
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_color(figures.LINE)


def middle(points):
    """The point N,2 that is nearest to their median."""
    return points[np.linalg.norm(points - np.median(points, 0), axis=1).argmin()]


def class_name(number, spec):
    """The name of a class where there is room for names, else its number."""
    names = spec.class_names
    return figures.shorten(names[number], LETTERS) if len(names) <= 10 else str(number)


def main(config):
    analyse(__name__, config, measure, draw)
