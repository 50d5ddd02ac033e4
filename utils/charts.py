"""Images for people: triggers, the scores of a network's feature maps, and recovered triggers."""

import io
import logging
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageDraw, features

from antidote_bench.utils.errors import UserError
from antidote_bench.utils.text import cut, name_of_class

SIDE, GAP, MARGIN, TOP = 128, 8, 92, 36  # pixels
LONGEST_LABEL = 22  # characters above an image
FRAME = "#8a929b"  # without it, a white patch in a corner would look like a missing corner
DPI = 100
MARKED, PLAIN = "#c41e3a", "#3a6ea5"
STYLE = {
    "axes.edgecolor": "#8a929b",
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.titlesize": 8,
    "figure.dpi": DPI,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8,
    "legend.fontsize": 8,
    "pdf.fonttype": 42,  # TrueType: publishers refuse Type 3 fonts
    "savefig.dpi": DPI,
    "svg.hashsalt": "antidote",  # the same runs give the same file
    "text.parse_math": False,  # a $ in a name is a $
    "xtick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.labelsize": 7,
    "ytick.major.width": 0.6,
}


@contextmanager
def plotting(need="a chart"):
    """Import matplotlib, and draw in one style, whatever the user's own settings are.

    Yields its class Figure, which needs no screen. UserError where the package is missing; `need`
    says what for.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of the font cache it makes once
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f"{need} needs the package {error.name}: pip install -r requirements.txt brings it"
        ) from error
    with style.context(["default", STYLE]):
        yield Figure


def preview(clean, triggered, titles=("clean", "triggered"), names=()):
    """PNG bytes of two splits of the same up to eight images, with true class and label above them.

    `titles` are those of the two rows, `names` those of the classes. The difference of the images
    is drawn around mid-grey and stretched, so that its largest value, which is stated, is full
    scale.
    """
    before, after = clean.images.cpu().numpy(), triggered.images.cpu().numpy()
    change = after.astype(np.int16) - before
    scale = max(int(np.abs(change).max(initial=0)), 1)
    stretched = np.uint8(np.rint(127.5 + change / scale * 127.5))
    canvas = Image.new(
        "RGB", (MARGIN + len(before) * (SIDE + GAP) + GAP, TOP + 3 * (SIDE + GAP)), "white"
    )
    draw = ImageDraw.Draw(canvas)
    legend = f"difference\ngrey = 0\nwhite = +{scale}\nblack = -{scale}\n(of 255)"
    rows = [(titles[0], before), (titles[1], after), (legend, stretched)]
    for row, (title, images) in enumerate(rows):
        top = TOP + row * (SIDE + GAP)
        draw.text((8, top + 8), title, "black")
        for column, image in enumerate(images):
            left = MARGIN + column * (SIDE + GAP)
            tile = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
            canvas.paste(tile.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
            draw.rectangle((left - 1, top - 1, left + SIDE, top + SIDE), outline=FRAME)
    for column, classes in enumerate(zip(triggered.truth, triggered.labels, strict=True)):
        left = MARGIN + column * (SIDE + GAP)
        truth, label = (class_title(number, names, LONGEST_LABEL) for number in classes)
        draw.text((left, 4), drawable(f"class {truth}"), "black")
        draw.text((left, 18), drawable(f"-> {label}"), "black")
    return png(canvas)


def class_title(number, names, length):
    """The number of a class with its name, of at most `length` characters."""
    return cut(name_of_class(number, names), length)


def drawable(text):
    """The text as the font of Pillow can draw it: without FreeType that font has few letters."""
    whole = features.check("freetype2")
    return text if whole else text.encode("latin-1", "replace").decode("latin-1")


def score_chart(layers):
    """PNG bytes: a panel per layer with its feature maps as dots, sorted by score; pruned ones red.

    `layers` is {name: (scores C in 0..1, pruned channels)}; all panels share one scale.
    """
    columns = min(5, len(layers))
    rows = -(-len(layers) // columns)
    with plotting("the chart of the scores") as Figure:
        size = (max(1 + 2.1 * columns, 5.6), 0.6 + 1.35 * rows)
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(
            "accuracy on clean images perturbed against one feature map\n"
            "red: pruned maps, whose number stands above each panel",
            fontsize=9,
        )
        axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
        for panel, (name, (scores, pruned)) in zip(axes, layers.items(), strict=False):
            draw_scores(panel, 100 * np.asarray(scores), set(pruned))
            panel.set_title(f"{name.removeprefix('network.')}: {len(pruned)} of {len(scores)}")
        for panel in axes[len(layers) :]:
            panel.remove()
        figure.supxlabel("feature maps, sorted", fontsize=8)
        figure.supylabel("accuracy, %", fontsize=8)
        return figure_bytes(figure)


def draw_scores(panel, scores, pruned):
    """The scores of one layer; of equal ones the pruned come first."""
    order = sorted(range(len(scores)), key=lambda channel: (scores[channel], channel not in pruned))
    for marked in (False, True):
        places = [place for place, channel in enumerate(order) if (channel in pruned) == marked]
        panel.scatter(
            places,
            [scores[order[place]] for place in places],
            s=9 if marked else 4,
            color=MARKED if marked else PLAIN,
            linewidths=0,
        )
    panel.set_xticks([])
    panel.grid(axis="y", color="#e3e6ea", linewidth=0.5)
    panel.set_axisbelow(True)


def trigger_chart(masks, patterns, titles, marked):
    """PNG bytes: of every trigger its mask (1,S,S, white = 1) and its pattern (3,S,S), in [0, 1].

    `titles` stand above them, red where `marked`.
    """
    side, columns = 96, 5
    wide, high = 2 * (side + GAP) + 2 * GAP, side + 24 + GAP
    width = wide * min(columns, len(titles)) + GAP
    height = high * -(-len(titles) // columns) + GAP
    pairs = zip(masks.expand_as(patterns), patterns, strict=True)
    with plotting("the chart of the triggers") as Figure:
        figure = Figure(figsize=(width / DPI, height / DPI))
        panel = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        panel.set_axis_off()
        for number, (pair, title, red) in enumerate(zip(pairs, titles, marked, strict=True)):
            left, top = GAP + number % columns * wide, GAP + number // columns * high
            color = MARKED if red else "black"
            panel.text(left, top + 12, title, va="baseline", color=color)
            for place, image in enumerate(pair):
                start = left + place * (side + GAP)
                panel.imshow(
                    (image.permute(1, 2, 0) * 255).round().byte().cpu().numpy(),
                    extent=(start, start + side, top + 18 + side, top + 18),
                    interpolation="nearest",
                    aspect="auto",
                )
        panel.set(xlim=(0, width), ylim=(height, 0))  # which imshow has changed
        return figure_bytes(figure)


def figure_bytes(figure, form="png", **options):
    """A figure of matplotlib as the bytes of a file, without the time at which it was made."""
    dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    file = io.BytesIO()
    figure.savefig(file, format=form, metadata=dates.get(form), **options)
    return file.getvalue()


def png(image):
    """A Pillow image as PNG bytes."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
