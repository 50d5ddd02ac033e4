"""The picture of a trigger: eight images clean, triggered, and their difference, enlarged."""

import io

import numpy as np
from PIL import Image, ImageDraw

SIDE, GAP, MARGIN = 128, 6, 92  # pixels


def preview(clean, triggered):
    """PNG bytes of two splits of the same up to eight images, true and attacker's labels above them.

    The difference is drawn around mid-grey and stretched so that its largest value, which is stated, is full scale.
    """
    before, after = clean.images.cpu().numpy(), triggered.images.cpu().numpy()
    change = after.astype(np.int16) - before
    scale = max(int(np.abs(change).max(initial=0)), 1)
    shown = np.uint8(np.rint(127.5 + change / scale * 127.5))
    canvas = Image.new("RGB", (MARGIN + len(before) * (SIDE + GAP) + GAP, 24 + 3 * (SIDE + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    rows = [("clean", before), ("triggered", after), (f"difference\ngrey = 0\nwhite = +{scale}\nblack = -{scale}\n(of 255)", shown)]
    for row, (title, images) in enumerate(rows):
        top = 24 + row * (SIDE + GAP)
        draw.text((8, top + 8), title, "black")
        for column, image in enumerate(images):
            left = MARGIN + column * (SIDE + GAP)
            picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
            canvas.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
            if row == 0:
                draw.text((left, 6), f"class {int(triggered.truth[column])} -> {int(triggered.labels[column])}", "black")
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()
