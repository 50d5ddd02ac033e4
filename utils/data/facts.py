"""What can be said about a data set before any image is decoded; imports no torch."""

import hashlib
import json
from pathlib import Path

from antidote_bench.utils.data import images as image_files
from antidote_bench.utils.data import sources
from antidote_bench.utils.errors import MissingError

DECODING = 2  # counts up when an image file is decoded to other pixels than before
LARGEST_META = 1 << 20  # bytes
COUNTED = ("train", "test", "classes", "size", "class_names")


# ---------- two data sets told apart ----------


def known(name, root, image_size, cache):
    """Facts about the data set `name` below `root`, {} where nothing is found there.

    They are those of COUNTED, as far as they are known without decoding, the digest `listing`, and
    the `fingerprint` of its pixels where it lies decoded in the folder `cache`.
    """
    try:
        found = sources.find(name, root)
    except MissingError:
        return {}
    side = image_size or sources.SIDES.get(name)
    facts = {
        "classes": len(found["train"].classes),
        "class_names": list(found["train"].classes),
        "size": side,
        "listing": listing_of(found),
    }
    facts |= {split: source.count for split, source in found.items() if source.count is not None}
    try:
        facts["fingerprint"] = read_meta(cache_folder(name, side, found, cache))["fingerprint"]
    except (MissingError, OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # not decoded yet, or damaged, which the run says
    return facts


def is_other(there, listing, here):
    """Whether a data set is another one than that of a record; None where nothing tells it.

    `there` is what record.json says about the data, and `listing` the digest that it holds, or
    None. `here` is what `known` has returned. Pixels decide; where they are not known, the image
    files do.
    """
    if any(key in there and key in here and there[key] != here[key] for key in COUNTED):
        return True
    if here.get("fingerprint"):
        return there["fingerprint"] != here["fingerprint"]
    if listing and here.get("listing"):
        return listing != here["listing"]
    return None


def listing_of(found):
    """A digest of the image files of all splits, wherever they lie."""
    return hashlib.sha256("".join(found[split].listing for split in found).encode()).hexdigest()


# ---------- the cache ----------


def cache_folder(name, side, found, cache):
    """The folder of a decoded data set; `found` are the sources of its splits."""
    mark = f"{DECODING}|{side}|{found['train'].fingerprint}|{found['test'].fingerprint}"
    return Path(cache) / f"{name}-{side}-{hashlib.sha256(mark.encode()).hexdigest()[:12]}"


def read_meta(folder):
    """What meta.json of a cache says; ValueError where it was changed after it was written."""
    with image_files.open_regular(folder / "meta.json", LARGEST_META) as file:
        meta = json.load(file)
    if not isinstance(meta, dict) or meta.pop("sha256") != mark_of(meta):
        raise ValueError("meta.json was changed")
    return meta


def mark_of(meta):
    """The digest by which a change of meta.json is noticed."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
