"""Image folders on people's disks: odd names, odd formats, damaged and hostile files."""

import io
import os
import shutil
import struct
import zlib

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz import world
from tests.fuzz.records import script
from tests.helpers import image_folders

CODES = {0, 2, 3}
NAMES = [
    ".hidden.png", "._0.png", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/0.png", "x.PNG",
    "x.jpeg", "x.jfif", "x.tga", "x.ico", "x.eps", "x.ps", "x.pdf", "x.svg", "x.tif", "x.gif",
    "x.webp", "x.avif", "x.jp2", "x.bmp", "x.ppm", "x.npy", "x.txt", "x", "x.png.", ".png",
    "-x.png", "x\n.png", "x\x1b[31m.png", "x\u202e.png", "x" * 240 + ".png", "\udcff.png",
    "日本.png", " .png",
    "a/b/c/x.png", "a b.png", "%s.png", "{x}.png", "=1.png", "con.png", "x\\y.png", "e\u0301.png",
]  # fmt: skip
CLASSES = [
    "a", "b", "c", "0", "1", "10", "007", ".hidden", "__MACOSX", "\udcff", "x\n", "\x1b[31m", "=1",
    "\u202ex", "x" * 255, " ", "-x", "null", "1e5", "é", "e\u0301", "A", "..x", "%n", "<b>",
]  # fmt: skip


def png(array, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def bomb(side):
    """A PNG file that says it has side x side pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(2**16))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.stack([GREY] * 3, -1)
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print\nshowpage\n%%EOF\n"
)
CONTENTS = {
    "colour": png(COLOUR),
    "grey": png(GREY),
    "two levels": png(GREY > 100),
    "alpha": png(np.dstack([COLOUR, GREY])),
    "16 bits": png(GREY.astype(np.uint16) * 257),
    "palette": png(GREY),
    "float": png(GREY.astype(np.float32), format="TIFF"),
    "32 bits": png(GREY.astype(np.int32), format="TIFF"),
    "jpeg": png(COLOUR, format="JPEG"),
    "cmyk": png(np.dstack([COLOUR, GREY]), format="TIFF"),
    "gif": png(GREY, format="GIF"),
    "one pixel": png(COLOUR[:1, :1]),
    "wide": png(np.zeros((1, 3000, 3), np.uint8)),
    "webp": png(COLOUR, format="WEBP"),
    "bmp": png(COLOUR, format="BMP"),
    "ico": png(COLOUR, format="ICO"),
    "tga": png(COLOUR, format="TGA"),
    "eps": EPS,
    "bomb": bomb(100_000),
    "large": bomb(9000),
    "no side": bomb(0),
    "empty": b"",
    "text": b"hello",
    "html": b"<html>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
    "zeros": bytes(1000),
}
NODES = ["pipe", "folder", "link out", "link to itself", "link up", "device", "hole", "no rights"]


def cases():
    """([(split, class, name, content or node)], [(place, byte)] by which contents are spoilt, how
    it is used)"""
    split = st.sampled_from(["train", "test", "val", "."])
    name = st.sampled_from(NAMES) | st.text(min_size=1, max_size=8).map(lambda text: text + ".png")
    what = st.sampled_from([*CONTENTS, *CONTENTS, *NODES])
    folder = st.sampled_from(["a", "b", *CLASSES]) | st.text(min_size=1, max_size=5)
    entries = st.lists(st.tuples(split, folder, name, what), min_size=1, max_size=6)
    spoilt = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3)
    return st.tuples(entries, spoilt, st.sampled_from(["run", "run", "dry"]))


def check(case, place):
    """What is wrong when an attack is run on such a data set."""
    entries, spoilt, use = case
    data = place / "data"
    shutil.rmtree(data, ignore_errors=True)
    image_folders(data, count=4)
    for entry in entries:
        put(data, place, spoilt, *entry)
    shutil.rmtree(place / "record", ignore_errors=True)
    work = script("attack/badnet", *words(place), *(["--dry_run"] if use == "dry" else []))
    with world.inside(place):
        return world.run(work, codes=CODES, allowed=[place / "record", place / "cache"]).faults


def words(place):
    return [
        *("--record_path", place / "record", "--cache_path", place / "cache"),
        *("--dataset", "folder", "--dataset_path", place / "data", "--image_size", "16"),
        *("--model", "resnet9", "--width", "2", "--epochs", "1", "--pratio", "0.25"),
        *("--batch_size", "8", "--precision", "fp32"),
    ]


def put(data, place, spoilt, split, folder, name, what):
    """An entry of a data set; what no file system takes is left out."""
    try:
        path = data / split / folder.replace("/", "_") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if what in CONTENTS:
            path.write_bytes(spoil(CONTENTS[what], spoilt))
        elif what == "pipe":
            os.mkfifo(path)
        elif what == "folder":
            path.mkdir()
        elif what == "hole":
            with open(path, "wb") as file:
                file.truncate(2**36)
        elif what == "no rights":
            path.write_bytes(CONTENTS["colour"])
            path.chmod(0)
        else:
            targets = {"link out": place, "link to itself": path, "link up": path.parent.parent}
            path.symlink_to(targets.get(what, "/dev/zero"))
    except (OSError, ValueError):
        pass


def spoil(content, places):
    content = bytearray(content)
    for place, value in places:
        if content:
            content[int(place * (len(content) - 1))] = value
    return bytes(content)
