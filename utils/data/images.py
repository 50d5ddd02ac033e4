"""Reads one image file of anybody's: safe formats and sizes only, upright, 8 bits a channel."""

import os
import stat
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image, features

from antidote_bench.utils.errors import MissingError
from antidote_bench.utils.text import printable

# Pillow recognises a file by its content, whatever its name is. These formats are decoded by Pillow
# itself. Left out are those that start another program (EPS: Ghostscript), leave it to Windows
# (WMF), have no decoder of their own (BUFR, GRIB, HDF5, MPEG) or open what they contain without a
# list of formats (IPTC), and some that hold no photographs.
FORMATS = (
    "PNG", "JPEG", "AVIF", "BMP", "CUR", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG2000", "MSP",
    "PCX", "PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM",
)  # fmt: skip
LIBRARIES = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "PNG": "zlib", "WEBP": "webp"}
NAMELESS = "TGA"  # its content has no mark: only the file's name says that it is one

LARGEST_FILE = 1 << 30  # bytes
LARGEST_IMAGE = 178_956_970  # pixels; Pillow refuses more, too

ORIENTATION = 0x0112  # EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF: bits per sample, kind of number, and the range of values where the file declares one
BITS, KIND, HIGHEST, LOWEST_NUMBER, HIGHEST_NUMBER = 258, 339, 281, 340, 341
SIGNED = 2

# what Pillow's decoders raise for damaged files
UNSOUND = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError,
    ArithmeticError, AssertionError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip


def shown(path):
    """A path or name as text for a message: of one line, whatever its bytes are."""
    return printable(os.fsencode(path).decode(errors="replace"))


@cache
def formats():
    """The names of FORMATS that the installed Pillow decodes."""
    Image.init()
    known = (name for name in FORMATS if name in Image.OPEN)
    return tuple(name for name in known if name not in LIBRARIES or features.check(LIBRARIES[name]))


@cache
def extensions(only=None):
    """How the names of image files end, in lower case: of all `formats`, or of one of them."""
    known = formats()  # it has Pillow load all formats, whose endings are not known before
    chosen = known if only is None else (only,)
    found = {ending for ending, name in Image.EXTENSION.items() if name in chosen}
    return frozenset(found | {".mpo"} if "JPEG" in chosen else found)


def open_regular(path, largest=LARGEST_FILE):
    """Open a file to read its bytes.

    Raises MissingError (exit 3) where it is not there, has more than `largest` bytes, or is a pipe,
    a socket or a device, which one could read for ever.
    """
    wait = getattr(os, "O_NONBLOCK", 0)  # opening a pipe waits for its writer
    try:
        require_regular(path, os.stat(path), largest)
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | wait))
    except (FileNotFoundError, ValueError) as error:  # ValueError: a NUL in its name
        raise MissingError(f"the file {shown(path)} is missing") from error
    except OSError as error:
        raise MissingError(f"cannot read {shown(path)}: {error.strerror}") from error
    try:
        require_regular(path, os.fstat(file.fileno()), largest)
    except MissingError:
        file.close()
        raise
    return file


def require_regular(path, status, largest=LARGEST_FILE):
    """MissingError (exit 3) where this `os.stat` is not of a file of at most `largest` bytes."""
    if not stat.S_ISREG(status.st_mode):
        raise MissingError(
            f"{shown(path)} is a folder, pipe, socket or device, not a file: move it away"
        )
    if status.st_size > largest:
        raise MissingError(
            f"the file {shown(path)} has {status.st_size >> 20} MB, more than the "
            f"{largest >> 20} MB that are read: make it smaller or delete it"
        )


def open_image(path):
    """The first image in a file, upright, with 8 bits a channel, in any of such modes of Pillow.

    Whole numbers of more bits are scaled from the range that the file declares, else from all
    values of their type, to 0..255. Raises MissingError (exit 3) for a file that is damaged, too
    large, of another format than `formats`, or whose range is unknown.
    """
    with open_regular(path) as file:
        try:
            image = Image.open(file, formats=_formats_of(path))
            if image.width * image.height > LARGEST_IMAGE:
                raise Image.DecompressionBombError
            image.load()
            if image.mode[0] in "IF":
                return _upright(image, _scaled(path, image))
            return _upright(image, image)
        except Image.DecompressionBombError as error:
            raise MissingError(
                f"the image {shown(path)} is too large to decode: it has more than "
                f"{LARGEST_IMAGE // 10**6} million pixels"
            ) from error
        except UNSOUND as error:
            raise MissingError(
                f"the image {shown(path)} is damaged, empty or of a format that is not read: mend "
                "or delete it"
            ) from error


def read_rgb(path):
    """The same in mode RGB; what is transparent is laid over white."""
    image = open_image(path)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _formats_of(path):
    ending = os.path.splitext(os.fspath(path))[1].lower()
    if ending in extensions(NAMELESS):
        return formats()
    return [name for name in formats() if name != NAMELESS]


def _upright(found, image):
    """`image` turned as the EXIF data of the file that was `found` say."""
    try:
        way = UPRIGHT.get(found.getexif().get(ORIENTATION))
    except UNSOUND:  # EXIF data that are damaged say nothing about the pixels
        way = None
    return image if way is None else image.transpose(way)


def _scaled(path, image):
    """An image of 16 or 32 bits a pixel as one of 8 bits, in mode L."""
    values, remedy = np.asarray(image), "save it with 8 or 16 bits a channel"
    low, high = _value_range(image)
    if high is None:
        raise MissingError(
            f"the image {shown(path)} holds numbers with a fraction, whose range is unknown: "
            f"{remedy}"
        )
    if values.dtype == np.int32 and high >= 2**31:
        values = values.view(np.uint32)
    if not (values.min() >= low and values.max() <= high):  # also where one is not a number
        raise MissingError(
            f"the image {shown(path)} holds values outside {low:g} to {high:g}: {remedy}"
        )
    levels = np.rint((values - np.float64(low)) * (255 / (high - low))).astype(np.uint8)
    if levels.max() <= 1 and values.min() < values.max():
        raise MissingError(
            f"the image {shown(path)} would be black: its values end at {values.max():g}, but its "
            f"type's at {high:g}; save it with 8 bits a channel, or use the whole range"
        )
    return Image.fromarray(levels)


def _value_range(image):
    """(lowest, highest) value that a pixel of such an image can have; highest None: unknown."""
    tags = getattr(image, "tag_v2", {})  # TIFF only
    high = _number(tags.get(HIGHEST_NUMBER))
    if high is not None:
        return _number(tags.get(LOWEST_NUMBER)) or 0, high
    if image.mode == "F":
        return 0, None
    bits = _number(tags.get(BITS)) or 16
    if _number(tags.get(KIND)) == SIGNED:
        bits -= 1
    return 0, _number(tags.get(HIGHEST)) or 2**bits - 1


def _number(value):
    """A TIFF tag of one value, which may come as a tuple."""
    return value[0] if isinstance(value, tuple) and value else value
