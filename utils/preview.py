"""Pictures for people: a trigger on eight images; the scores of a network's feature maps; triggers that were found."""

import io

import numpy as np
from PIL import Image, ImageDraw

SIDE, GAP, MARGIN = 128, 6, 92  # pixels


def preview(clean, triggered, titles=("clean", "triggered")):
    """PNG bytes of two splits of the same up to eight images, true and told labels above them; `titles` of the two rows.

    The difference is drawn around mid-grey and stretched so that its largest value, which is stated, is full scale.
    """
    before, after = clean.images.cpu().numpy(), triggered.images.cpu().numpy()
    change = after.astype(np.int16) - before
    scale = max(int(np.abs(change).max(initial=0)), 1)
    shown = np.uint8(np.rint(127.5 + change / scale * 127.5))
    canvas = Image.new("RGB", (MARGIN + len(before) * (SIDE + GAP) + GAP, 24 + 3 * (SIDE + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    rows = [(titles[0], before), (titles[1], after), (f"difference\ngrey = 0\nwhite = +{scale}\nblack = -{scale}\n(of 255)", shown)]
    for row, (title, images) in enumerate(rows):
        top = 24 + row * (SIDE + GAP)
        draw.text((8, top + 8), title, "black")
        for column, image in enumerate(images):
            left = MARGIN + column * (SIDE + GAP)
            picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
            canvas.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
            if row == 0:
                draw.text((left, 6), f"class {int(triggered.truth[column])} -> {int(triggered.labels[column])}", "black")
    return png(canvas)


def score_chart(layers):
    """PNG bytes: a panel per layer with its maps as dots, sorted by score; the pruned ones are red.

    `layers` is {name: (scores C in 0..1, pruned channels)}; all panels share one scale, whose ends are stated.
    """
    wide, high, columns = 210, 120, 5
    scores = np.concatenate([values for values, _ in layers.values()])
    low, span = float(scores.min()), max(float(np.ptp(scores)), 1e-9)
    canvas = Image.new("RGB", (wide * columns + GAP, 30 + -(-len(layers) // columns) * high), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 8), f"accuracy on clean pictures pushed away in one feature map, {100 * low:.1f} % (bottom) to {100 * (low + span):.1f} % (top); "
                      "maps sorted, pruned ones red", "black")  # fmt: skip
    for number, (name, (values, pruned)) in enumerate(layers.items()):
        left, top = GAP + number % columns * wide, 30 + number // columns * high
        draw.text((left, top), f"{name.removeprefix('network.')}: {len(pruned)} of {len(values)}", "black")
        draw.rectangle((left, top + 14, left + wide - 12, top + high - 6), outline="#bbbbbb")
        gone = set(pruned)
        for place, channel in enumerate(sorted(range(len(values)), key=lambda channel: (values[channel], channel not in gone))):
            x = left + 4 + (wide - 20) * place / max(len(values) - 1, 1)
            y = top + high - 11 - (high - 30) * (values[channel] - low) / span
            radius = 2.5 if channel in gone else 1.5
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill="#d01c1c" if channel in gone else "#4a6fa5")
    return png(canvas)


def trigger_chart(masks, patterns, titles, marked):
    """PNG bytes: of every trigger its mask (1,S,S, white = 1) and its pattern (3,S,S) side by side, all in [0, 1].

    `titles` stand above them, red where `marked`.
    """
    side, columns = 96, 5
    wide, high = 2 * (side + GAP) + GAP, side + 24 + GAP
    canvas = Image.new("RGB", (wide * min(columns, len(titles)) + GAP, high * -(-len(titles) // columns) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    pairs = zip(masks.expand_as(patterns), patterns, strict=True)
    for number, (pair, title, red) in enumerate(zip(pairs, titles, marked, strict=True)):
        left, top = GAP + number % columns * wide, GAP + number // columns * high
        draw.text((left, top), title, "#d01c1c" if red else "black")
        for place, image in enumerate(pair):
            picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().cpu().contiguous().numpy())
            canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left + place * (side + GAP), top + 16))
    return png(canvas)


def png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
