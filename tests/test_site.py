"""The site: every page is in it, its links work, it loads nothing from elsewhere, and shows what
the docstrings say."""

import html
import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

import antidote_bench
from antidote_bench.utils import VERSION, files
from benchmarks import gallery, pictures, site
from tests.helpers import names

RESULTS = site.ROOT / "benchmarks" / "results"
KINDS = {"attacks": "attack", "defenses": "defense", "detection": "detection"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the HTML. The build itself fails on a warning and on a dead link."""
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("zensical makes the site, and needs Python 3.11: see [docs] in pyproject.toml")
    place = tmp_path_factory.mktemp("site")
    site.build(place)
    return place / "html"


def pages_of(folder):
    """The methods that have a page: other tests ask for one for each script."""
    return sorted(path.stem for path in (site.ROOT / "docs" / folder).glob("[!R]*.md"))


def test_every_method_has_a_page(built):
    menu = site.Links((built / "index.html").read_text()).links
    for folder, kind in KINDS.items():
        assert len(pages_of(folder)) > 20
        for name in pages_of(folder):
            assert f"./{folder}/{name}.html" in menu
            page = (built / folder / f"{name}.html").read_text()
            assert f'href="../source/{kind}/{name}.py.html"' in page
            assert (built / f"source/{kind}/{name}.py.html").is_file()


def test_every_function_is_described(built):
    page = (built / "api.html").read_text()
    for name in antidote_bench.__all__:
        assert f'<h2 id="{name.lower()}">' in page, name
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "run_attack(name: str, **options) -> Record\n" in text
    for line in antidote_bench.run_attack.__doc__.splitlines():
        assert line.strip().replace("`", "") in text


def test_pages_show_tables_pictures_and_cells(built):
    start = (built / "index.html").read_text()
    assert start.count("<table") >= 2 and 'src="source/benchmarks/results/report.png"' in start
    tour = (built / "tour.html").read_text()
    assert tour.count('src="tour_') >= 2 and "evaluate" in tour


def test_the_leaderboard_is_in_the_menu(built):
    page = (built / "leaderboard.html").read_text()
    assert page == (site.ROOT / "docs" / "leaderboard.html").read_text()
    for name in ("index.html", "results.html", "comparing.html"):
        links = site.Links((built / name).read_text()).links
        assert {"leaderboard.html", "./leaderboard.html"} & set(links), name


def test_what_is_wrong_with_links_is_said(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h2 id="one"></h2><a href="#one"></a><a href="b.html#two"></a><a href="b.html#three"></a>'
        '<a href="c.html"></a><a href="https://x.org"></a><img src="https://x.org/y.png">'
    )
    (tmp_path / "b.html").write_text('<h2 id="two"></h2><a href="a.html"></a>')
    assert site.dead_links(tmp_path) == [
        "a.html to b.html#three, which has no such heading",
        "a.html to c.html",
        "a.html loads https://x.org/y.png",
    ]


def test_links_of_a_page_lead_to_the_same_file_in_the_site():
    waiting = []
    text = (
        "[a](../attack/lf.py) `[b](no.md)` [c](models.md#x) [d](https://x.org) [e](#f) ![g]"
        "(../benchmarks/results/triggers.png) [h](../README.md) [i](tour.ipynb)\n"
        "```\n[j](no.md)\n```\n[k](../config/dataset)"
    )
    assert site.with_links(text, "docs/x.md", waiting) == (
        "[a](source/attack/lf.py.md) `[b](no.md)` [c](models.md#x) [d](https://x.org) [e](#f) ![g]"
        "(source/benchmarks/results/triggers.png) [h](index.md) [i](tour.md)\n"
        "```\n[j](no.md)\n```\n[k](source/config/dataset/index.md)"
    )
    assert waiting == [
        "attack/lf.py",
        "docs/models.md",
        "benchmarks/results/triggers.png",
        "README.md",
        "docs/tour.ipynb",
        "config/dataset",
    ]
    for wrong in ("no.md", "../../x.md"):
        with pytest.raises(site.SiteError, match=f"docs/x.md: there is no {wrong}"):
            site.with_links(f"[a]({wrong})", "docs/x.md", [])


def test_lists_are_widened():
    text = "* a\n  b\n\n  c\n* d\n  * e\n\n1. f\n\n       g\nh\n```\n  i\n```\n"
    wide = "* a\n    b\n\n    c\n\n* d\n    * e\n\n1. f\n\n        g\nh\n```\n  i\n```\n"
    assert site.widened(text) == wide


def test_stars_and_forgotten_pages(monkeypatch, tmp_path):
    nav = [{"All": "docs/attacks/README.md"}, "docs/attacks/*.md"]
    first, *others = site.expanded([{"Attacks": nav}])[0]["Attacks"]
    assert first == nav[0] and others == [
        {name: f"docs/attacks/{name}.md"} for name in pages_of("attacks")
    ]
    known = site.documents()
    monkeypatch.setattr(site, "documents", lambda: [*known, "docs/new.md"])
    with pytest.raises(site.SiteError, match="no entry in its nav for docs/new.md"):
        site.build(tmp_path / "site")


# ---------- what the pages say ----------


def test_the_figures_of_the_page_on_installing_are_measured_ones():
    text = (site.ROOT / "docs" / "install.md").read_text()
    for column, shown in zip(("peak_mb", "seconds"), text.split("## How long")[:2], strict=True):
        found = re.findall(r"^\| `(\S+/?\S*)` \| (\d+) \| \[(\w+\.csv)\]", shown, re.M)
        assert len(found) >= 4
        for name, value, table in found:
            rows = {row["run"]: row for row in files.read_csv(RESULTS / table)}
            assert f"{float(rows[name][column]):.0f}" == value, (name, column)
    rows = files.read_csv(RESULTS / "memory.csv")
    for kind in ("attack", "defense"):
        most = max(
            (row for row in rows if row["kind"] == kind), key=lambda row: int(row["peak_mb"])
        )
        said = rf"{int(most['peak_mb']):,} MiB for an? {kind} (`{most['name']}`)"
        assert re.search(re.escape(said).replace("an\\?", "an?").replace("\\ ", r"\s+"), text)


def test_the_page_of_results_names_every_table():
    text = (site.ROOT / "docs" / "results.md").read_text()
    for path in [*RESULTS.glob("*.csv"), site.ROOT / "benchmarks" / "published.csv"]:
        assert f"]({Path('..', path.relative_to(site.ROOT))})" in text, path.name


def test_one_version_everywhere():
    assert antidote_bench.__version__ == VERSION
    project = (site.ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "utils.VERSION" }' in project
    cited = yaml.safe_load((site.ROOT / "CITATION.cff").read_text())
    assert cited["version"] == VERSION
    heads = re.findall(r"^## \[(.+?)\]", (site.ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heads[0] == "Unreleased" and heads[1] == VERSION and len(heads) == len(set(heads))


# ---------- pictures ----------


def test_every_picture_is_made_by_one_command():
    """`make pictures` makes the pictures that are there, and those that a page shows."""
    made = {f"benchmarks/results/{name}.png" for name in pictures.MAKERS}
    there = {path.relative_to(site.ROOT).as_posix() for path in RESULTS.glob("*.png")}
    assert made == there
    pages = [
        *site.ROOT.glob("*.md"),
        *site.ROOT.glob("*/README.md"),
        *site.ROOT.glob("docs/**/*.md"),
    ]
    shown = {
        site.in_repository(page.relative_to(site.ROOT).as_posix(), target)
        for page in pages
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", page.read_text())
    }
    assert shown == made
    makefile = (site.ROOT / "Makefile").read_text()
    assert re.search(r"^pictures: .*\n\t.* -m benchmarks\.pictures$", makefile, re.M)


@pytest.mark.parametrize("name", pictures.SOURCES)
def test_no_picture_is_older_than_what_it_shows(name):
    with Image.open(RESULTS / f"{name}.png") as image:
        found = image.text[pictures.MARK]
    assert found == pictures.digest(name), f"run python -m benchmarks.pictures {name}"


def test_the_gallery_shows_every_attack_measured_on_the_digits():
    rows = files.read_csv(RESULTS / "attacks.csv")
    measured = {
        row["attack"] for row in rows if row["dataset"] == "digits" and int(row["n_poison"])
    }
    with Image.open(RESULTS / "triggers.png") as image:
        shown = image.text.get(gallery.SHOWN, "").splitlines()
    assert {label.partition(" (")[0] for label in shown} == measured, "run benchmarks.pictures"


def test_the_gallery_has_room_for_names_and_options():
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    assert all(draw.textlength(name) <= gallery.SIDE for name in names("attack"))
    lines = gallery.caption("combat (image_size 16, strength 80)", 9)
    assert lines == ["combat", "image_size 16", "strength 80", "± 9 levels"]
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    few, many = ([("a", black, white)] * count for count in (1, gallery.COLUMNS))
    assert gallery.sheet(many).height - gallery.GAP == 2 * gallery.strip(few).height
    assert gallery.strip([("a (b 1)", black, white)]).height == (
        gallery.strip(few).height + gallery.LINE
    )


def test_the_page_is_photographed(tmp_path):
    pytest.importorskip("playwright", reason="the page is not tried in a browser")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no Chromium: the page is not tried in a browser")
    pictures.report(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as new:
        assert new.width == pictures.WIDTH and new.height > 1000 and len(new.getcolors()) > 50
        assert new.text[pictures.MARK] == pictures.digest("report")


def test_a_picture_is_saved_with_a_digest(tmp_path, monkeypatch):
    def compare(table, option, folder):
        assert option == "--figures" and table.endswith("baselines.csv")
        Image.new("RGB", (9, 7), "red").save(Path(folder, "heatmap-a.png"))

    monkeypatch.setattr(pictures, "compare", compare)
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    pictures.main(["defenses"])
    with Image.open(tmp_path / "defenses.png") as new:
        assert new.size == (9, 7) and new.convert("RGB").getpixel((4, 4)) == (255, 0, 0)
        assert new.text == {pictures.MARK: pictures.digest("defenses")}
    with pytest.raises(SystemExit):
        pictures.main(["no"])
