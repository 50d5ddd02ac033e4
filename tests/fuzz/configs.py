"""Options of every script: flags, YAML files, and the project's own files of defaults."""

import contextlib
import dataclasses
import functools
import importlib
import shutil
from pathlib import Path

from hypothesis import strategies as st

from antidote_bench.utils import backdoorbench, config, parsing
from tests.fuzz import world
from tests.helpers import ROOT, names

KINDS = [kind for kind in ("attack", "defense", "detection") if (ROOT / kind).is_dir()]
SCRIPTS = [f"{kind}.{name}" for kind in KINDS for name in names(kind)]
CODES = {0, 2, 3, 4}
# texts as they stand in a YAML file or behind a flag
VALUES = [
    "", " ", "0", "-1", "1", "3", "1.5", "1e3", "1e-9", "1e400", "-1e400", "nan", ".nan", ".inf",
    "-.inf", "inf", "1" + "0" * 30, "1" * 5000, "0x10", "0o7", "1_000", "1:30", "+1", "true",
    "True", "yes", "no", "on", "off", "null", "~", "None", "a", "#x", "&x", "*x", "&x y", "!x",
    "!!float x", "!!python/object/apply:os.system [id]", "!!binary aGk=", "!!timestamp x",
    "!!set {a}", "2024-01-01", "[1]", "[]", "[[1]]", "{a: 1}", "{}", "[a, b", "{a: ", "'", '"',
    '"\\0"', '"\\ud800"', '"\\x1b[31m"', "\x1b[31m", "\u202eabc", "\u2028", "a: b", "- 1", "|\n  x",
    ">\n  x", "? x", "%", "@", "`", "../x", "/etc/passwd", "/dev/zero", "state", ".", "..", "a/b",
    "a\\b", "C:\\x", "con", "cpu", "cuda", "cuda:99", "meta", "mps", "auto", "digits", "folder",
    "cifar10", "resnet9", "vgg19_bn", "airbench", "all2all", "one_cycle", "muon", "x" * 300,
    "x" * 70_000, "${x}", "$(id)", "<<", "<<: *x", "=", "\ufeff", "\ud800", "\udcff", "\0", "é",
]  # fmt: skip
KEYS = [
    "yaml_path", "help", "print_config", "config", "", " ", "0", "1.5", "null", "true", "[a]",
    "{a: b}", "? a", "<<", "epochs.x", "x" * 300, "__class__", "self", "-", "lr ", "LR",
    "\x1b[31m", "!!binary YQ==", "&a epochs", "*a", "attack", "defense", "all", "é",
]  # fmt: skip
FORMS = ["flags", "words", "yaml", "dataset", "recipe"]
# what is done to the bytes of a file
SPOILT = {
    "as it is": lambda content: content,
    "latin-1": lambda content: content.decode("utf-8", "replace").encode("latin-1", "replace"),
    "utf-16": lambda content: content.decode("utf-8", "replace").encode("utf-16"),
    "mark": lambda content: b"\xef\xbb\xbf" + content,
    "cut": lambda content: content[: len(content) // 2],
    "twice": lambda content: content * 2,
    "two documents": lambda content: content + b"---\n" + content,
    "tabs": lambda content: content.replace(b" ", b"\t"),
    "carriage returns": lambda content: content.replace(b"\n", b"\r"),
    "nul": lambda content: content + b"\0",
    "high": lambda content: content + b"\xff\xfe",
    "deep": lambda content: content + b"epochs: " + b"[" * 50_000,
    "deep mapping": lambda content: b"".join(b" " * n + b"a:\n" for n in range(400)),
    "powers": lambda content: _powers() + b"\n" + content,
    "itself": lambda content: content + b"epochs: &a [*a]\n",
    "list": lambda content: b"- " + content,
    "empty": lambda content: b"",
    "large": lambda content: content + b"# " + b"x" * 2**21,
}


def _powers():
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    return "\n".join(lines).encode()


@functools.cache
def options_of(script):
    """The class of a script's options."""
    return importlib.import_module(f"antidote_bench.{script}").Config


def cases():
    """(script, form, [(key, value)], what the file suffers)"""
    return st.sampled_from(SCRIPTS).flatmap(cases_of)


def cases_of(script):
    pairs = st.lists(st.tuples(keys(script), values()), min_size=0, max_size=4)
    files = st.just("as it is") | st.sampled_from(sorted(SPOILT))
    return st.tuples(st.just(script), st.sampled_from(FORMS), pairs, files)


def keys(script):
    """Mostly the script's own options: one that is unknown ends the parsing."""
    own = st.sampled_from([field.name for field in dataclasses.fields(options_of(script))])
    foreign = [*backdoorbench.ALIASES, *backdoorbench.IGNORED, *backdoorbench.OTHERWISE]
    other = st.sampled_from([*KEYS, *foreign]) | st.text(max_size=12)
    return st.integers(0, 9).flatmap(lambda number: other if number == 0 else own)


def values():
    numbers = st.floats().map(str) | st.integers().map(str)
    return st.sampled_from(VALUES) | st.text(max_size=20) | numbers


def check(case, place):
    """What is wrong when a script is started with such options."""
    script, form, pairs, spoilt = case
    Config, kind = options_of(script), script.partition(".")[0]
    file, root = place / "options.yaml", None
    words = [] if kind == "attack" else ["--result_file", "nowhere"]
    words += ["--record_path", str(place / "record"), "--cache_path", str(place / "cache")]
    if form in ("flags", "words"):
        for key, value in pairs:
            words += [f"--{key}={value}"] if form == "flags" else [f"--{key}", value]
    else:
        content = "".join(f"{key}: {value}\n" for key, value in pairs)
        content = SPOILT[spoilt](as_bytes(content))
        if form == "yaml":
            file.write_bytes(content)
            words += ["--yaml_path", str(file)]
        else:
            root = place / "root"
            words += own_files(root, form, kind, content)
    words = [word for word in words if word not in ("-h", "--help")]

    def work():
        options = parsing.parse(Config, words, "", f"{script.replace('.', '/')}.py")
        plan(script, options)

    with other_root(root), world.inside(place):
        done = world.run(work, codes=CODES, allowed=[place / "record", place / "cache"])
    return done.faults


def as_bytes(text):
    """A text as UTF-8; halves of surrogate pairs as the bytes that a careless program writes."""
    return text.encode("utf-8", "surrogatepass")


def plan(script, options):
    """What --dry_run prints, for an attack on the digits."""
    if script.startswith("attack") and options.dataset == "digits" and options.dry_run:
        importlib.import_module(f"antidote_bench.{script}").main(options)


def own_files(root, form, kind, content):
    """Files of config/ below `root`, one of which is `content`; the flags that make it be read."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(ROOT / "config", root / "config")
    for folder in (*KINDS, "models", "utils"):
        (root / folder).symlink_to(ROOT / folder)
    if form == "recipe":
        section = b"all:\n" + b"".join(b"  " + line for line in content.splitlines(True))
        (root / "config" / "recipe" / "mine.yaml").write_bytes(section)
        return ["--recipe", "mine"] if kind == "attack" else []
    section = f"{kind}:\n".encode() + b"".join(b"  " + line for line in content.splitlines(True))
    (root / "config" / "dataset" / "digits.yaml").write_bytes(section)
    return []


@contextlib.contextmanager
def other_root(root):
    """The project's files of defaults are those below `root`."""
    before = config.ROOT
    config.ROOT = Path(root) if root else before
    try:
        yield
    finally:
        config.ROOT = before
