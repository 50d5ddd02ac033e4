"""Antidote: backdoor attacks on image classifiers, and the defenses against them.

In a checkout the folders attack/, defense/, models/ and utils/ stand beside this one and are parts
of this package; in a wheel they lie in it.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "utils").is_dir():
    __path__.append(str(_here.parent))
