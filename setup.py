"""What pyproject.toml cannot say: where the parts of the package lie in a checkout.

There the folders and the scripts below stand beside antidote_bench/, so that they can be started as
`python attack/badnet.py`. In a wheel they lie in it, and nothing else is installed.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "antidote_bench"
FOLDERS = ("analysis", "attack", "defense", "detection", "models", "utils", "config")
FILES = ("benchmarks/published.csv",)
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def dependencies():
    """The first paragraph of requirements.txt, without its comment."""
    needed, _, _ = (ROOT / "requirements.txt").read_text().partition("\n\n")
    return needed.splitlines()[1:]


def scripts():
    """The scripts in the root, compare.py for one."""
    return sorted(path.name for path in ROOT.glob("*.py") if path.name != "setup.py")


class Build(build_py):
    """Copies the folders and the scripts into the package; an editable installation has them."""

    def run(self):
        target = Path(self.build_lib) / PACKAGE
        if not self.editable_mode:
            shutil.rmtree(target, ignore_errors=True)  # of a build before: a file may be gone since
        super().run()
        if self.editable_mode:
            return
        for name in FOLDERS:
            shutil.copytree(ROOT / name, target / name, ignore=LEFT_OUT)
        for name in (*scripts(), *FILES):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)

    def get_source_files(self):
        """What a source distribution holds, beside what setuptools puts there by itself."""
        inside = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
        wanted = [path for path in inside if "__pycache__" not in path.parts]
        copied = [str(path.relative_to(ROOT)) for path in wanted]
        return [*super().get_source_files(), *copied, *scripts(), *FILES, "requirements.txt"]


setup(cmdclass={"build_py": Build}, install_requires=dependencies())
