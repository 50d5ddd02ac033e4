"""Make every picture of the pages.

    python -m benchmarks.pictures                     # all: half an hour, most of it for triggers
    python -m benchmarks.pictures report defenses     # only these, from tables in the repository

report    the page of `compare.py --html` on the runs of benchmarks/results/defenses.csv that are on
          CIFAR-10, in Chromium: the first rows of the leaderboard, the heat map, ACC against ASR
defenses  the heat map of `compare.py benchmarks/results/baselines.csv --figures`
triggers  benchmarks.gallery, on the records of config/sweep/attacks_digits.yaml, which a sweep
          makes in build/pictures/record; it goes on where it was interrupted
analysis  analysis/gradcam.py, on a victim of BadNets on the digits and its repair by awm, which are
          made in the same place first

They are written into benchmarks/results. The first two carry a digest of what they were made from,
by which tests/test_site.py sees that one is older than its table or the code that draws it.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from antidote_bench.utils import files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECORDS = ROOT / "build" / "pictures" / "record"
MARK = "made-from"  # the name of the digest in a PNG file
BROWSERS = "chromium", "chromium-browser", "google-chrome"
WIDTH, ROWS = 900, 12  # pixels of the page, and rows of the leaderboard that are shown
# what a picture without a sweep is made from
SOURCES = {
    "report": ("benchmarks/results/defenses.csv", "utils/report/page.*", "utils/report/palette.py"),
    "defenses": (
        "benchmarks/results/baselines.csv",
        "utils/report/figures.py",
        "utils/report/palette.py",
    ),
}


def main(words=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="default: all")
    wanted = parser.parse_args(words).pictures or list(MAKERS)
    if unknown := [name for name in wanted if name not in MAKERS]:
        parser.error(f"there is no picture {unknown[0]!r}: choose from {', '.join(MAKERS)}")
    for name in wanted:
        MAKERS[name](RESULTS / f"{name}.png")
        print(f"{name}.png written in {RESULTS}")


def digest(name):
    """A digest of what a picture is made from: tables, and the code that draws it."""
    total = hashlib.sha256()
    for pattern in SOURCES[name]:
        for path in sorted(ROOT.glob(pattern)):
            total.update(path.read_bytes())
    return total.hexdigest()[:16]


def report(target):
    """A screenshot of the page; needs Chromium, and the package playwright."""
    from playwright.sync_api import sync_playwright

    browser_path = chromium()
    if browser_path is None:
        raise SystemExit("error: no Chromium is installed, and the page is shown in one")
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        page, shot, table = (Path(place, name) for name in ("a.html", "a.png", "a.csv"))
        rows = files.read_csv(RESULTS / "defenses.csv")
        shown = [row for row in rows if row["dataset"] == "cifar10"]
        files.write(table, files.csv_text(shown, list(shown[0])))
        compare(table, "--html", page)
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        size = {"width": WIDTH, "height": 900}
        view = browser.new_context(viewport=size, color_scheme="light").new_page()
        view.goto(page.as_uri())
        view.evaluate(
            "(rows) => [...document.querySelectorAll('#board tr.cell')].slice(rows)"
            ".forEach((row) => row.remove())",
            ROWS,
        )
        end = view.evaluate("document.getElementById('trade').getBoundingClientRect().bottom")
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": int(end)}
        view.screenshot(path=shot, full_page=True, clip=clip)
        browser.close()
        with Image.open(shot) as image:
            marked(image.convert("RGB").quantize(128), target, "report")


def chromium():
    """The path of a Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def defenses(target):
    """The heat map of all defenses on the digits."""
    with tempfile.TemporaryDirectory() as place:
        compare("benchmarks/results/baselines.csv", "--figures", place)
        (figure,) = Path(place).glob("heatmap-*.png")
        with Image.open(figure) as image:
            marked(image.convert("RGB").quantize(256), target, "defenses")


def compare(*words):
    command = [sys.executable, "compare.py", *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def marked(image, target, name):
    """Save an image with the digest of what it was made from."""
    about = PngInfo()
    about.add_text(MARK, digest(name))
    with tempfile.TemporaryDirectory() as place:
        image.save(Path(place, "image.png"), optimize=True, pnginfo=about)
        files.write(target, Path(place, "image.png").read_bytes())


def analysis(target):
    """Grad-CAM before and after a repair; both models are made first where they are missing."""
    places = ["--record_path", str(RECORDS)]
    script("attack/badnet.py", "--dataset", "digits", "--save_folder_name", "shown", *places)
    script("defense/awm.py", "--result_file", "shown", *places)
    with tempfile.TemporaryDirectory() as place:
        words = ["--result_file", "shown", "--defense", "awm", "--images", "6"]
        script("analysis/gradcam.py", *words, "--output", place, *places)
        with Image.open(Path(place, "gradcam-awm.png")) as image:
            small = image.convert("RGB").resize((WIDTH, round(image.height * WIDTH / image.width)))
        small.quantize(128).save(Path(place, "image.png"), optimize=True)
        files.write(target, Path(place, "image.png").read_bytes())


def script(*words):
    """Run a script of the checkout in its root."""
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def triggers(target):
    """The gallery of all attacks; their records are made first where they are missing."""
    places = ["--record_path", str(RECORDS)]
    sweep = ["sweep.py", "config/sweep/attacks_digits.yaml", "--engine", "serial", *places]
    subprocess.run([sys.executable, *sweep], cwd=ROOT, check=True)
    draw = ["-m", "benchmarks.gallery", *places, "--output", str(target)]
    subprocess.run([sys.executable, *draw], cwd=ROOT, check=True)


MAKERS = {"report": report, "defenses": defenses, "triggers": triggers, "analysis": analysis}


if __name__ == "__main__":
    main()
