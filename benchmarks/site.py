"""The site: the pages of the repository as HTML, with links that work and a page for the functions.

    python -m benchmarks.site

Writes build/site/html, which can be opened from a disk or put on any web server, and loads nothing
from elsewhere. mkdocs.yml says which pages there are and in what order. What they link to comes
along: source files are shown as pages of their own, other files are copied. A page that mkdocs.yml
forgets, a link that leads nowhere, and a warning of the generator end the build with exit code 1.
"""

import argparse
import base64
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

import antidote_bench

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "site"
FUNCTIONS = "antidote_bench"  # the entry of the nav that is made from docstrings
NAMES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "rules.md"}
NAMES |= {FUNCTIONS: "api.md", "docs/leaderboard.html": "leaderboard.html"}
HEAD = (
    "Everything here is a name of the package `antidote_bench`, and is loaded on first use. "
    "[Antidote in Python](python.md) has examples."
)
# what is shown as a page, and its language; other files are copied
CODE = {
    ".py": "python",
    ".yaml": "yaml",
    ".toml": "toml",
    ".json": "json",
    ".sh": "bash",
    ".cff": "yaml",
    ".txt": "text",
    "": "text",
}
FENCE = "~~~~~~"
LONGEST = 84  # characters of a line of code
LINK = re.compile(r"(?P<code>```.*?```|`[^`]*`)|(?P<open>\]\()(?P<target>[^)\s]+)(?=\))", re.S)


class SiteError(Exception):
    """Something about the pages has to be mended."""


def main(words=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder that is written anew")
    options = parser.parse_args(words)
    try:
        pages = build(options.output)
    except SiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{pages} pages in {options.output / 'html'}")
    return 0


def build(output):
    """Build the site in the folder `output`; returns the number of pages.

    SiteError if a page is not in the nav, the generator warns, or a link leads nowhere.
    """
    shutil.rmtree(output, ignore_errors=True)
    (output / "pages").mkdir(parents=True)
    head, _, listed = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")
    nav = expanded(yaml.safe_load(listed))
    if left_out := sorted(set(documents()) - set(entries(nav))):
        raise SiteError(f"mkdocs.yml has no entry in its nav for {', '.join(left_out)}")
    write_pages(entries(nav), output / "pages")
    places = {"docs_dir": "pages", "site_dir": "html", "nav": placed(nav)}
    (output / "mkdocs.yml").write_text(head + "\n" + yaml.safe_dump(places, sort_keys=False))
    generate(output)
    if dead := dead_links(output / "html"):
        raise SiteError("links that lead nowhere: " + "; ".join(dead))
    return len(list((output / "html").rglob("*.html")))


def generate(output):
    """Have Zensical make HTML of the pages; SiteError with what it says if it warns."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", "mkdocs.yml"]
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=output, env=environment, capture_output=True, text=True)
    said = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
    if done.returncode:
        if "No module named" in said:
            said = 'the package zensical is missing: pip install -e ".[docs]" brings it'
        raise SiteError(said.strip())


# ---------- the nav ----------


def documents():
    """The pages that must be in the nav, as paths in the repository."""
    found = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/*.ipynb")]
    return [path.relative_to(ROOT).as_posix() for path in found]


def expanded(nav):
    """The nav with every entry that has a star as the pages that match, but for those named."""
    named = set(entries(nav))

    def matching(pattern):
        found = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))
        return [{Path(path).stem: path} for path in found if path not in named]

    def walk(items):
        for item in items:
            if isinstance(item, str):
                yield from matching(item)
            else:
                ((title, value),) = item.items()
                yield {title: list(walk(value)) if isinstance(value, list) else value}

    return list(walk(nav))


def entries(nav):
    """All paths of a nav, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [path for part in parts for path in entries(part)]


def placed(nav):
    """The nav with the places in the site instead of the paths in the repository."""
    if isinstance(nav, str):
        return place(nav)
    if isinstance(nav, dict):
        return {title: placed(part) for title, part in nav.items()}
    return [placed(part) for part in nav]


def place(path):
    """Where a file or folder of the repository is in the site; both are relative paths."""
    if path in NAMES:
        return NAMES[path]
    suffix = Path(path).suffix
    if suffix == ".ipynb":
        return path.removeprefix("docs/").removesuffix(suffix) + ".md"
    if suffix == ".md":
        return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}.md" if suffix in CODE else f"source/{path}"


# ---------- the pages ----------


def write_pages(paths, folder):
    """Write the pages, and everything that they link to, into the folder."""
    waiting, seen = list(paths), set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        target = folder / place(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path == FUNCTIONS:
            target.write_text(functions_page())
        elif path.endswith((".md", ".ipynb")):
            text = (ROOT / path).read_text()
            if path.endswith(".ipynb"):
                text = notebook_page(json.loads(text), target)
            target.write_text(widened(with_links(text, path, waiting)))
        elif (ROOT / path).is_dir():
            target.write_text(folder_page(path, waiting))
        elif Path(path).suffix in CODE:
            target.write_text(code_page(path))
        else:
            shutil.copyfile(ROOT / path, target)


def with_links(text, path, waiting):
    """The text of the page `path` with links as the site needs them; adds what they lead to."""

    def changed(match):
        if match["code"] or (found := in_repository(path, match["target"])) is None:
            return match[0]
        waiting.append(found)
        anchor = match["target"].partition("#")[1:]
        return match["open"] + relative(found, path) + "".join(anchor)

    return LINK.sub(changed, text)


def in_repository(path, target):
    """The path in the repository that a link of the page `path` leads to; None if to none."""
    parts = urlsplit(target)
    if parts.scheme or not parts.path:
        return None
    found = (ROOT / path).parent / unquote(parts.path)
    found = Path(os.path.normpath(found))
    if not found.exists() or ROOT not in found.parents:
        raise SiteError(f"{path}: there is no {target}")
    return found.relative_to(ROOT).as_posix()


def relative(found, path):
    return Path(os.path.relpath(place(found), Path(place(path)).parent)).as_posix()


def widened(text):
    """The text with lists as Zensical wants them, which GitHub does not need.

    Every level of a list is four spaces deep, and an item has an empty line above it if the item
    before has several paragraphs.
    """
    lines, levels, fenced, parted = [], [], False, False
    for line in text.split("\n"):
        bare = line.lstrip(" ")
        spaces = len(line) - len(bare)
        while levels and bare and not fenced and spaces < levels[-1][0]:
            levels.pop()
        begin, wide = levels[-1] if levels else (0, 0)  # of the text of the item, there and here
        shift = wide - min(begin, spaces)
        if bare.startswith("```"):
            fenced = not fenced
        elif not fenced and (item := re.match(r"([*+-]|\d+\.) +", bare)):
            levels.append((spaces + len(item[0]), spaces + shift + 4))
            lines += [""] * bool(parted and lines[-1])
            parted = False
        parted = parted or not bare
        lines.append(" " * (spaces + shift) + bare if bare else "")
    return "\n".join(lines)


def code_page(path):
    """A page that shows a file; the search leaves it out."""
    language = CODE[Path(path).suffix]
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{FENCE} {language}\n"
    return head + (ROOT / path).read_text().rstrip("\n") + f"\n{FENCE}\n"


def folder_page(path, waiting):
    """A page that lists the files of a folder."""
    files = sorted(each for each in (ROOT / path).iterdir() if each.is_file())
    lines = [f"# {path}/", ""]
    for each in files:
        if each.name.startswith(".") or each.suffix == ".lock":
            continue
        found = each.relative_to(ROOT).as_posix()
        waiting.append(found)
        lines.append(f"* [{each.name}]({relative(found, path + '/index.md')})")
    return "\n".join([*lines, ""])


def notebook_page(notebook, target):
    """The cells of a notebook as Markdown; its pictures are written beside the page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{target.stem}_{len(parts)}.png"
                (target.parent / name).write_bytes(base64.b64decode(data["image/png"]))
                parts.append(f'<img src="{name}" alt="What the cell above shows">')
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                if output.get("name") != "stderr":
                    parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


# ---------- functions and classes ----------


def functions_page():
    """What antidote_bench offers, from its docstrings."""
    parts = ["# Functions and classes", HEAD]
    for name in antidote_bench.__all__:
        value = getattr(antidote_bench, name)
        if inspect.ismodule(value):
            parts += [f"## {name}", prose(value)]
            for each, member in own_members(value):
                parts += described(f"{name}.{each}", member, level=3)
        else:
            parts += described(name, value, level=2)
            if inspect.isclass(value) and not issubclass(value, Exception):
                for each, member in own_members(value):
                    parts += described(f"{name}.{each}", member, level=3)
    return "\n\n".join(parts) + "\n"


def own_members(value):
    """(name, value) of what a class or module defines itself and has a docstring for."""
    home = value.__name__ if inspect.ismodule(value) else value.__module__
    for name, member in vars(value).items():
        member = getattr(member, "func", member)  # of a cached property
        member = getattr(member, "__func__", member)  # of a class method
        inner = member.fget if isinstance(member, property) else member
        known = inspect.isfunction(inner) or inspect.isclass(inner)
        hidden = name.startswith("_") or name == "main"
        if known and not hidden and inner.__module__ == home and inner.__doc__:
            yield name, member


def described(name, value, level):
    """The heading of a function, class or property, how it is called, and its docstring."""
    heading = f"{'#' * level} {name}"
    if isinstance(value, property) or inspect.isclass(value) and issubclass(value, Exception):
        return [heading, prose(value)]
    return [heading, f"```python\n{called(name, value)}\n```", prose(value)]


def called(name, value):
    """How a function or class is called: in one line, or with a line for every parameter."""
    signature = inspect.signature(value)
    given = [str(each) for each in signature.parameters.values() if each.name != "self"]
    returned = str(signature).rpartition(") -> ")[1:] if " -> " in str(signature) else ("", "")
    tail = "".join(returned) or ")"
    text = f"{name}({', '.join(given)}{tail}"
    if len(text) > LONGEST:
        text = f"{name}(\n" + "".join(f"    {each},\n" for each in given) + tail
    return re.sub(r"\b(antidote_bench|pathlib)\.([a-z_]+\.)*", "", text)


def prose(value):
    return inspect.cleandoc(value.__doc__ or "")


# ---------- links ----------


class Links(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.loaded = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        loads = tag in ("script", "img", "iframe") or "stylesheet" in (values.get("rel") or "")
        for key in ("href", "src"):
            if values.get(key):
                self.links.append(values[key])
                self.loaded += [values[key]] * loads


def dead_links(folder):
    """What is wrong with the links of the HTML files below a folder, a sentence for each."""
    pages = {path: Links(path.read_text()) for path in folder.rglob("*.html")}
    found = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or name.name == "404.html":
                continue
            target = Path(os.path.normpath(path.parent / unquote(parts.path)))
            target = path if not parts.path else target
            if not target.is_file():
                found.append(f"{name} to {link}")
            elif parts.fragment and target in pages:
                if unquote(parts.fragment) not in pages[target].anchors | {"__skip"}:
                    found.append(f"{name} to {link}, which has no such heading")
        found += [f"{name} loads {link}" for link in page.loaded if urlsplit(link).netloc]
    return found


if __name__ == "__main__":
    sys.exit(main())
