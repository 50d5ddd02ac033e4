"""Shared fixtures: a way to run scripts as users do, and small real records to work on."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from antidote_bench.utils import files, parsing
from tests.helpers import ROOT
from tests.start import start

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell has started the tests in the background; their scripts must obey Ctrl-C all the same
    signal.signal(signal.SIGINT, signal.default_int_handler)

QUICK = ("--epochs", "1")
SMALL = (*QUICK, "--width", "8", "--image_size", "16")


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """Options that keep a script's records and caches out of the checkout."""
    base = tmp_path_factory.mktemp("antidote")
    return ["--record_path", str(base / "record"), "--cache_path", str(base / "cache")]


@pytest.fixture(scope="session")
def run():
    """run(*arguments, code=0): start Python as a user would, check the exit code, return what it
    printed. With forks=True a sweep forks its runs."""

    def run(*arguments, code=0, env=None, cwd=ROOT, forks=False):
        done = start(list(map(str, arguments)), cwd=cwd, env=env or {}, forks=forks)
        assert done.returncode == code, (
            f"exit {done.returncode} instead of {code}\n{done.stdout}\n{done.stderr}"
        )
        done.first = (done.stderr.strip() or "\n").splitlines()[0]
        return done

    return run


@pytest.fixture(scope="session")
def victim(places, run, tmp_path_factory):
    """The folder of a BadNets record on the digits at 16 pixels, trained until it works."""
    return trained("victim", ["--image_size", "16"], places, run, tmp_path_factory)


@pytest.fixture(scope="session")
def large_victim(places, run, tmp_path_factory):
    """The same at the usual 32 pixels, for methods that do not work at 16."""
    return trained("large_victim", [], places, run, tmp_path_factory)


def trained(name, words, places, run, tmp_path_factory):
    """The folder of a record of attack/badnet.py, which is made once for all processes of the
    tests: each has a copy."""
    base = tmp_path_factory.getbasetemp()
    common = base.parent / "common" if "PYTEST_XDIST_WORKER" in os.environ else base / "common"
    place = ["--record_path", common, "--save_folder_name", name]
    with files.locked(common / f"{name}.lock"):
        run("attack/badnet.py", *places, *words, *place)
    return shutil.copytree(common / name, Path(places[1]) / name)


@pytest.fixture(scope="session")
def small(places, run):
    """A record of a narrow network, trained for one epoch: enough to run a defense on, quickly."""
    run("attack/badnet.py", *places, *QUICK, "--width", "8", "--save_folder_name", "small")
    return Path(places[1]) / "small"


@pytest.fixture(scope="session")
def smaller(places, run):
    """The same with images of 16 pixels, for tests that judge no figure."""
    run("attack/badnet.py", *places, *SMALL, "--save_folder_name", "smaller")
    return Path(places[1]) / "smaller"


@pytest.fixture(scope="session")
def cifar():
    """Folder that holds the CIFAR-10 images as image folders; skips where they are not beside the
    checkout."""
    archive = ROOT.parent / "shared" / "data" / "unpack_cifar10.sh"
    if not archive.is_file():
        pytest.skip("the CIFAR-10 images are not beside this checkout (../shared/data)")
    place = Path(os.environ.get("TMPDIR", "/tmp")) / "antidote-cifar10"
    with files.locked(place.with_suffix(".lock")):  # the tests run in several processes
        subprocess.run([archive, place], check=True, stdout=subprocess.DEVNULL)
    return place


@pytest.fixture
def attack(places, tmp_path):
    """attack(module, *words): the folder of the record that the script in this process makes."""

    def attack(module, *words, name="a"):
        where = *places, "--record_path", tmp_path, "--save_folder_name", name
        module.main(parsing.parse(module.Config, [*map(str, (*where, *words))]))
        return tmp_path / name

    return attack
