"""The report on an audit as a page: one file without scripts, for any browser. Imports no torch."""

import base64
import hashlib
from pathlib import Path

from antidote_bench.utils import VERSION
from antidote_bench.utils.audit import report as reports
from antidote_bench.utils.audit import verdict as reached
from antidote_bench.utils.errors import UserError
from antidote_bench.utils.text import cut, one_line

HERE = Path(__file__).parent


def build(report, style):
    """The page as text; `style` is the style sheet that it shares with the page of compare.py."""
    try:
        import jinja2
    except ImportError as error:
        raise UserError(
            f"--format html needs the package {error.name}: pip install -r requirements.txt brings "
            "it"
        ) from error
    style += (HERE / "page.css").read_text(encoding="utf-8")
    mark = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    template = (HERE / "page.html").read_text(encoding="utf-8")
    return (
        jinja2.Environment(autoescape=True)
        .from_string(template)
        .render(
            style=style,
            style_hash=mark,
            verdict=report.verdict,
            compared=reports.compared(report),
            facts=facts(report),
            rows=[reports.row(each) for each in report.detections],
            left_out=report.left_out,
            charts=charts(report),
            limits=reached.LIMITS,
            version=VERSION,
        )
    )


def facts(report):
    """[(name, text)] about the model and the given images."""
    model, images = report.model, report.images
    found = [
        ("file", one_line(model["path"])),
        ("sha256", model["sha256"]),
        ("network", f"{model['architecture']}, {model['parameters']} parameters"),
        ("classes", model["classes"]),
        ("image size", f"{model['size']} pixels"),
        ("seen by the detectors", _seen(images)),
        ("audited", f"{report.started} to {report.ended}"),
    ]
    return found + [("note", cut(note, 300)) for note in model["notes"]]


def _seen(images):
    if images is None:
        return "the weights alone"
    if images["labels"] == "predicted":
        return f"{images['count']} images without labels"
    return (
        f"{images['count']} images with labels, of which the model gets "
        f"{100 * images['accuracy']:.1f} % right"
    )


def charts(report):
    """The images of all detectors: {source, caption, wide}."""
    return [
        {
            "source": f"data:image/png;base64,{base64.b64encode(content).decode()}",
            "caption": f"{found.name}: {what}",
            "wide": wide,
        }
        for found in report.detections
        for content, what, wide in (
            (found.chart, "scores of the classes", False),
            (found.triggers_png, "triggers", True),
        )
        if content
    ]
