"""Records that a stranger has made, with right checksums: opened by defenses, attacks, compare.py
and sweep.py."""

import contextlib
import csv
import hashlib
import importlib
import io
import json
import math
import os
import shutil
import struct

import safetensors.torch
import torch
from hypothesis import strategies as st

import compare
import sweep
from antidote_bench.utils import parsing
from antidote_bench.utils.record import folder as layout
from tests.fuzz import world
from tests.helpers import image_folders

RUN = "victim"
STATES = {"attack": "begun", "defense": f"{RUN}/defense/ft_begun"}  # interrupted runs
FOLDERS = {
    "": [layout.RECORD, layout.OPTIONS, layout.RESULTS, layout.LOG, layout.WEIGHTS, layout.POISONED,
         layout.PREVIEW],
    "defense/ft": [layout.RECORD, layout.OPTIONS, layout.RESULTS, layout.LOG, layout.WEIGHTS],
    "defense/ft_begun/state": [layout.BEGUN, layout.OPTIONS, layout.LOG, "finetune.safetensors"],
    "../begun/state": [layout.BEGUN, layout.OPTIONS, layout.LOG, "train.safetensors"],
}  # fmt: skip
FILES = [f"{folder}/{name}".lstrip("/") for folder, names in FOLDERS.items() for name in names]
TEXTS = [name for name in FILES if not name.endswith((".safetensors", ".png"))]
TENSORS = [name for name in FILES if name.endswith(".safetensors")]
DEEP = "[" * 200_000 + "]" * 200_000


def nested(levels):
    value = 1
    for _ in range(levels):
        value = {"a": [value]}
    return value


# values in JSON, by a name that can be part of a case
VALUES = {
    "null": None, "true": True, "minus": -1, "zero": 0, "one": 1, "two": 2, "large": 10**9,
    "larger": 2**63, "huge": 10**400, "fraction": 1.5, "tiny": 5e-324, "nan": math.nan,
    "inf": math.inf, "list": [], "mapping": {}, "ones": [1, 1, 1], "mixed": [None, {"a": 1}, "b"],
    "nested": nested(15), "deep": nested(200), "long": "x" * 10**6, "empty": "",
    "escape": "\x1b[31m", "nul": "a\0b", "surrogate": "\ud800", "bidi": "\u202e",
    "path": "../../outside/secret", "absolute": "/etc/passwd", "line": "a\nb", "number": "7",
    "attack": "attack", "defense": "defense", "digits": "digits", "folder": "folder",
    "model": "vgg19_bn",
}  # fmt: skip
# values of an option, and cells of a table, as they stand in the file
TOKENS = [
    "", "0", "-1", "1", "2", "9", "1e30", "1" + "0" * 30, "nan", ".nan", "inf", ".inf", "-.inf",
    "1e400", "x", "null", "~", "true", "[1]", "[[1]]", "{a: 1}", "&a 1", "*a", "!!float x",
    "!!python/name:os.system ''", "x" * 10**6, '"a\\0b"', '"\\x1b[31m"', "../x", "/dev/zero",
    "digits", "cifar10", "folder", "resnet9", "vit_b_16", "airbench", "os.system", "4096", "0.5",
    '"\\ud800"', "\ud800", "\x1b[31m", "=1+1", '"', "1,2", "4", "7",
]  # fmt: skip
CONTENTS = {
    "empty": b"", "line": b"\n", "nul": b"\0" * 100, "latin-1": b"\xe4\xf6", "brace": b"{",
    "bracket": b"[1", "deep": DEEP.encode(), "deep objects": b'{"a":' * 10**5, "number": b"1",
    "text": b'"x"', "header": b"a,b,c\n", "one column": b"acc\n0.5\n", "quote": b'a,b\n"x,1\n',
    "field": b"a,b\n" + b"x" * 200_000 + b",1\n", "many rows": b"stage,epoch\n" * 200_000,
    "many columns": b"a," * 5000 + b"\n", "mark": b"\xef\xbb\xbf{}", "aliases": b"a: &a [1]\nb: *a",
    "utf-16": "{}".encode("utf-16"), "carriage": b"a\rb\rc", "document": b"a: 1\n---\nb: 2\n",
    "long header": struct.pack("<Q", 2**40) + b"{}", "odd header": struct.pack("<Q", 2) + b"[]",
    "negative": struct.pack("<q", -1), "pickle": b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R.",
}  # fmt: skip
CHANGES = {
    "gone": lambda tensor: None,
    "float32": lambda tensor: tensor.float(),
    "float64": lambda tensor: tensor.double(),
    "float16": lambda tensor: tensor.half(),
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "int32": lambda tensor: tensor.int(),
    "int64": lambda tensor: tensor.long(),
    "uint8": lambda tensor: tensor.byte(),
    "bool": lambda tensor: tensor.bool(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "empty": lambda tensor: tensor.flatten()[:0],
    "none of them": lambda tensor: tensor[:0] if tensor.dim() else tensor,
    "scalar": lambda tensor: tensor.flatten()[0].clone() if tensor.numel() else tensor,
    "one more rank": lambda tensor: tensor[None],
    "flat": lambda tensor: tensor.flatten(),
    "half": lambda tensor: tensor[: len(tensor) // 2] if tensor.dim() else tensor,
    "twice": lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor,
    "turned": lambda tensor: tensor.transpose(0, -1).contiguous() if tensor.dim() else tensor,
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "nan": lambda tensor: torch.full_like(tensor.float(), math.nan),
    "inf": lambda tensor: torch.full_like(tensor.float(), math.inf),
    "huge": lambda tensor: torch.full_like(tensor, 1e38 if tensor.is_floating_point() else 127),
    "minus": lambda tensor: -tensor if tensor.dtype != torch.bool else tensor,
    "99": lambda tensor: torch.full_like(tensor, 99),
    "far": lambda tensor: torch.full_like(tensor.long(), 2**40),
    "one channel": lambda tensor: tensor[:, :1].contiguous() if tensor.dim() > 1 else tensor,
    "large side": lambda tensor: tensor.repeat(1, 1, 2, 2) if tensor.dim() == 4 else tensor,
}
NODES = ["missing", "folder", "pipe", "link out", "link to itself", "link away", "hole", "device"]
USES = ["dry", "ft", "clp", "again", "resume", "attack", "resume attack", "clean record"]
USES += ["text", "markdown", "csv", "latex", "page", "overview", "attacks", "sweep"]


def cases():
    """([what is done to the record], how it is used, whether its cache is another's)"""
    return st.tuples(
        st.lists(changes(), min_size=1, max_size=3), st.sampled_from(USES), st.booleans()
    )


def changes():
    place = st.lists(st.integers(0, 40), min_size=1, max_size=4)
    jsons = [name for name in TEXTS if name.endswith(".json")]
    cells = [name for name in TEXTS if not name.endswith(".json")]
    value = st.sampled_from(sorted(VALUES))
    folders = ["", "defense", "defense/ft", "defense/ft_begun", "defense/ft_begun/state"]
    places = st.sampled_from([*FILES, *folders, "defense/.shared", ".finished"])
    numbers = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)
    return st.one_of(
        st.tuples(st.just("json"), st.sampled_from(jsons), place, value),
        st.tuples(st.just("json"), st.sampled_from(jsons), place, st.just("delete")),
        st.tuples(st.just("add"), st.sampled_from(jsons), st.text(max_size=5), value),
        st.tuples(st.just("cell"), st.sampled_from(cells), place, st.sampled_from(TOKENS)),
        st.tuples(st.just("cell"), st.sampled_from(cells), place, st.text(max_size=12)),
        st.tuples(st.just("column"), st.sampled_from(cells), place, st.just("")),
        st.tuples(
            st.just("tensor"), st.sampled_from(TENSORS), place, st.sampled_from(sorted(CHANGES))
        ),
        st.tuples(st.just("header"), st.sampled_from(TENSORS), place, value),
        st.tuples(st.just("content"), st.sampled_from(FILES), st.sampled_from(sorted(CONTENTS))),
        st.tuples(st.just("bytes"), st.sampled_from(FILES), numbers, st.floats(0.1, 1)),
        st.tuples(st.just("node"), places, st.sampled_from(NODES)),
    )


# ---------- the records that are changed ----------


def script(name, *words):
    """A function that does what `python NAME.py WORDS...` does."""
    module = importlib.import_module(f"antidote_bench.{name.replace('/', '.')}")

    def work():
        options = parsing.parse(module.Config, [str(word) for word in words], "", f"{name}.py")
        module.main(options)

    return work


def attack_words(place):
    return [
        *("--record_path", place / "record", "--cache_path", place / "cache"),
        *("--dataset", "folder", "--dataset_path", place / "data", "--image_size", "16"),
        *("--model", "resnet9", "--width", "4", "--epochs", "1", "--pratio", "0.25"),
        *("--batch_size", "8", "--precision", "fp32"),
    ]


def defense_words(place, name=None):
    words = ["--record_path", place / "record", "--cache_path", place / "cache"]
    words += ["--dataset_path", place / "data", "--result_file", RUN, "--precision", "fp32"]
    return [*words, *(["--save_folder_name", name] if name else [])]


def originals(place):
    """The folder of untouched records, made at the first call."""
    made = place / "original"
    if made.is_dir():
        return made
    shutil.rmtree(place / "data", ignore_errors=True)
    image_folders(place / "data")
    (place / "outside").mkdir(exist_ok=True)
    (place / "outside" / "secret").write_text("epochs: 1\n")
    attack = [*attack_words(place), "--save_folder_name"]
    ft = ["--epochs", "1", "--save_folder_name"]
    for work in (
        script("attack/badnet", *attack, RUN),
        interrupted(script("attack/badnet", *attack, "begun")),
        script("defense/ft", *defense_words(place), *ft, "ft"),
        interrupted(script("defense/ft", *defense_words(place), *ft, "ft_begun")),
    ):
        done = world.run(work, codes={0, 130}, allowed=[place])
        assert not done.faults, done.faults
    os.rename(place / "record", made)
    return made


def interrupted(work):
    """The same, cut off when everything has been computed."""

    def cut(*_, **__):
        raise KeyboardInterrupt

    def function():
        before, layout.finish = layout.finish, cut
        try:
            work()
        finally:
            layout.finish = before

    return function


# ---------- what is done to them ----------


def change(root, what, name, *rest):
    """Change the file `name` of the record in `root`."""
    path = root / RUN / name
    if what == "node":
        return put(path, rest[0], root.parent)
    if not path.is_file() or path.is_symlink():
        return None
    content = path.read_bytes()
    with contextlib.suppress(Exception):  # it may not fit what an earlier change has left
        path.write_bytes(HOW[what](content, *rest, name))
    return None


def put(path, node, outside):
    """Something else in the place of a file or folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if node == "folder":
        path.mkdir()
    elif node == "pipe":
        os.mkfifo(path)
    elif node == "hole":
        with open(path, "wb") as file:
            file.truncate(2**36)
    elif node != "missing":
        target = {"link out": outside / "outside" / "secret", "device": "/dev/zero"}
        target |= {"link to itself": path, "link away": outside / "outside"}
        path.symlink_to(target[node])


def slots(value):
    """(container, key) of every value in a value of JSON."""
    found, waiting = [], [value]
    while waiting:
        each = waiting.pop()
        keys = (
            each if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        )
        for key in keys:
            found.append((each, key))
            waiting.append(each[key])
    return found


def json_value(content, place, value, _):
    whole_value = json.loads(content)
    found = slots(whole_value)
    container, key = found[
        sum(number * 7**power for power, number in enumerate(place)) % len(found)
    ]
    if value == "delete":
        del container[key]
    else:
        container[key] = VALUES[value]
    return json.dumps(whole_value).encode()


def json_key(content, key, value, _):
    return json.dumps({**json.loads(content), key: VALUES[value]}).encode()


def cell(content, place, text, name):
    """One value of a config.yaml, or one cell of a table."""
    lines = content.decode().splitlines()
    if name.endswith(".yaml"):
        line = place[0] % len(lines)
        lines[line] = f"{lines[line].partition(':')[0]}: {text}"
        return as_bytes("\n".join(lines))
    rows = list(csv.reader(io.StringIO(content.decode())))
    row = rows[place[0] % len(rows)] if place[0] % 3 == 0 else rows[-1]
    row[place[-1] % len(row)] = text
    return table(rows)


def column(content, place, _, name):
    """The same without one of the lines or columns."""
    lines = content.decode().splitlines()
    if name.endswith(".yaml"):
        del lines[place[0] % len(lines)]
        return "\n".join(lines).encode()
    rows = list(csv.reader(io.StringIO(content.decode())))
    for row in rows if place[0] % 2 else rows[-1:]:
        del row[place[-1] % len(row)]
    return table(rows)


def table(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return as_bytes(text.getvalue())


def as_bytes(text):
    return text.encode("utf-8", "surrogatepass")


def tensor(content, place, how, _):
    tensors = safetensors.torch.load(content)
    key = sorted(tensors)[sum(place) % len(tensors)]
    changed = CHANGES[how](tensors[key])
    tensors = {name: value for name, value in tensors.items() if name != key}
    if changed is not None:
        tensors[key] = changed.contiguous()
    return safetensors.torch.save(tensors, {"epoch": "1"})


def header(content, place, value, name):
    (length,) = struct.unpack("<Q", content[:8])
    changed = json_value(content[8 : 8 + length], place, value, name)
    return struct.pack("<Q", len(changed)) + changed + content[8 + length :]


def whole(content, which, _):
    return CONTENTS[which]


def flipped(content, places, share, _):
    content = bytearray(content)
    for place, value in places:
        content[int(place * (len(content) - 1))] = value
    return bytes(content[: int(share * len(content))] if share < 0.5 else content)


HOW = {
    "json": json_value,
    "add": json_key,
    "cell": cell,
    "column": column,
    "tensor": tensor,
    "header": header,
    "content": whole,
    "bytes": flipped,
}


def recompute(folder):
    """Make the checksums in record.json those of the files, as an author of a bad record does."""
    path = folder / layout.RECORD
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 2**24:
        return
    try:
        info = json.loads(path.read_text())
        for name in info["files"]:
            if (folder / name).is_file() and (folder / name).stat().st_size < 2**24:
                content = (folder / name).read_bytes()
                info["files"][name] = hashlib.sha256(content).hexdigest()
        path.write_text(json.dumps(info))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # then it is the file that was changed


# ---------- how they are used ----------


def check(case, place):
    """What is wrong when such a record is used."""
    changes_, use, foreign = case
    original, record = originals(place), place / "record"
    shutil.rmtree(record, ignore_errors=True)
    shutil.copytree(original, record)
    for each in changes_:
        change(record, *each)
    for folder in (record / RUN, record / RUN / "defense" / "ft"):
        if folder.is_dir() and not folder.is_symlink():
            recompute(folder)
    cache = place / ("other" if foreign else "cache")
    results = place / "results"
    results.mkdir(exist_ok=True)
    work, codes, guarded = using(use, place, cache, results)
    with world.inside(place):
        done = world.run(
            work,
            codes=codes,
            allowed=[record, cache, results],
            secret=place / "outside",
            guarded=guarded,
        )
    return done.faults


def using(use, place, cache, results):
    """(work, the exit codes that may be, whether it needs the guard of a script)"""
    own = ["--cache_path", cache]
    defense, attack = [*defense_words(place), *own], [*attack_words(place), *own]
    epochs = ["--epochs", "1", "--save_folder_name"]
    scripts = {
        "dry": script("defense/ft", *defense, "--dry_run"),
        "ft": script("defense/ft", *defense, *epochs, "new"),
        "clp": script("defense/clp", *defense),
        "again": script("defense/ft", *defense, *epochs, "ft"),
        "resume": script("defense/ft", *defense, *epochs, "ft_begun"),
        "attack": script("attack/badnet", *attack, "--save_folder_name", RUN),
        "resume attack": script("attack/badnet", *attack, "--save_folder_name", "begun"),
        "clean record": script(
            "attack/trojannn", *attack, "--clean_record", RUN, "--save_folder_name", "new"
        ),
    }
    if use in scripts:
        return scripts[use], {0, 2, 3, 4}, True
    if use == "sweep":
        grid = place / "grid.yaml"
        grid.write_text("attack: badnet\n")
        words = [grid, "--dry_run", "--record_path", place / "record"]
        return lambda: sweep.main([str(word) for word in words]), {0, 2}, False
    words = [str(place / "record")]
    if use == "page":
        words += ["--html", str(results / "page.html")]
    elif use in ("overview", "attacks"):
        words += ["--table", use]
    else:
        words += ["--format", use]
    return lambda: compare.main(words), {0, 3, 4}, False
