"""Write the tables of the pages anew from the committed results.

    python -m benchmarks.tables

A page names the command that prints a table in a comment above it, such as
<!-- python compare.py benchmarks/results/attacks.csv --table attacks --format markdown -->, and
ends the table with <!-- end of table -->. tests/test_docs.py has the same tables compared.
"""

import contextlib
import functools
import importlib
import io
import re
import shlex
from pathlib import Path

from antidote_bench.utils import files

ROOT = Path(__file__).resolve().parents[1]
COMMAND = r"(?:compare\.py|-m benchmarks\.(?:detection_tables|leaderboard))"
TABLE = re.compile(
    rf"(?P<begin><!-- python (?P<words>{COMMAND} .*?) -->\n\n)"
    r".*?"
    r"(?P<end>\n\n<!-- end of table -->)",
    re.S,
)


def main():
    for path in pages():
        text = path.read_text()
        if (new := rewritten(text)) != text:
            files.write(path, new)
            print(f"tables written in {path.relative_to(ROOT)}")


def pages():
    """The Markdown files that hold tables of results."""
    names = ("README.md", "attack/README.md", "defense/README.md")
    return [*(ROOT / name for name in names), *sorted((ROOT / "docs").rglob("*.md"))]


def rewritten(text):
    """The text of a page with every table as its command prints it now."""
    return TABLE.sub(lambda match: match["begin"] + printed(match["words"]) + match["end"], text)


@functools.cache  # a table may stand on several pages
def printed(words):
    """What a command prints when it is given in the root of the checkout: one of compare.py, or of
    a module of benchmarks."""
    script, *options = shlex.split(words)
    name = options.pop(0) if script == "-m" else script.removesuffix(".py")
    options = [str(ROOT / word) if (ROOT / word).is_file() else word for word in options]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = importlib.import_module(name).main(options)
    if code:
        raise SystemExit(f"error: python {words} failed with exit code {code}")
    return said.getvalue().strip()


if __name__ == "__main__":
    main()
