"""What several test files share, and no fixture can be."""

import importlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def names(folder):
    """The scripts of attack/ or defense/, found as the project finds them."""
    return sorted(path.stem for path in (ROOT / folder).glob("[a-z]*.py"))


def few(script):
    """The options that make a script's run short; `script` is a module's name."""
    known = importlib.import_module(script).Config.__dataclass_fields__
    short = {name: 1 for name in known if name.endswith("epochs")}
    if "steps" in known:
        short["steps"] = 2
    if script.startswith("attack"):
        short["width"] = 8
    return [str(word) for name, value in short.items() for word in (f"--{name}", value)]
