"""Names that strangers chose, through everything that compare.py writes."""

import csv
import html.parser
import io
import json
import re
import shutil

import yaml
from hypothesis import strategies as st

import compare
from antidote_bench.utils import files
from antidote_bench.utils.record import folder as layout
from tests.fuzz import world

TEXTS = [
    "=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "＝1", "=cmd|' /C calc'!A0", " =1", "'=1", '"=1',
    "\x1b[31mx", "\x9b31m", "\x1b]0;x\x07", "\x1b]8;;http://a\x1b\\x", "\u202ex", "\u2066x",
    "\u200bx", "\u2028x", "\ufeffx", "\x00x", "\x7f", "\x85", "\ud800x", "\udcff", "x\u0300" * 50,
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "<!--", "-->", "]]>",
    "<img src=x onerror=alert(1)>", "javascript:alert(1)", '" onclick="alert(1)', "' x='", "&lt;",
    "${alert(1)}", "{{7*7}}", "{% raw %}", "`x`", "[x](javascript:alert(1))", "![x](http://a)",
    "[x][y]", "[x]: http://a", "<http://a>", "http://a.b", "x|y", "\\|", "\\", "\\\\", "*x*",
    "_x_", "~~x~~", "# x", "- x", "1. x", "> x", "---", "|", "||", "\n", "a\nb", "a\r\nb", "",
    " ", "x" * 300, "x" * 3999, "\\input{/etc/passwd}", "\\write18{id}", "$x$", "%x", "#1", "&",
    "{", "}", "^^5cinput", "~", "\\end{tabular}", "[2cm]", "*", "--", "\\\\[1cm]", "none", "clean",
    "clean_badnet", "nan", "inf", "1e5", "None", "__proto__", "constructor", "toString", "0",
    "../x", "/etc/passwd", "badnet", "ft", "digits", "a,b", 'a"b', "a;b", "é", "日本語", "🙂",
]  # fmt: skip
PLACES = ["dataset", "model", "recipe", "precision", "attack", "variant", "device", "label_mode"]
PLACES += ["defense", "stage", "selection", "prior", "clean_budget", "n_poison", "target"]
PLACES += ["pratio", "option", "option name", "command", "name", "folder", "version", "commit"]
PLACES += ["log stage", "file"]
USES = [
    (table, form)
    for table in compare.TABLES
    for form in ("text", "markdown", "csv", "latex", "page")
]
ROW = dict.fromkeys(layout.RESULT_COLUMNS, "") | {
    "dataset": "digits", "model": "resnet9_w16", "attack": "badnet", "label_mode": "all2one",
    "recipe": "sgd", "precision": "fp32", "defense": "none", "stage": "none", "selection": "none",
    "acc": "0.9", "asr": "0.95", "ra": "0.04", "n_test": "360", "seconds": "2.5", "pratio": "0.1",
    "n_poison": "10", "device": "cpu",
}  # fmt: skip


def cases():
    """([(place, text)] for a victim and its repair, (table, format))"""
    one = st.sampled_from(TEXTS)
    text = one | st.lists(one, min_size=2, max_size=3).map("".join) | st.text(max_size=30)
    pairs = st.lists(st.tuples(st.sampled_from(PLACES), text), min_size=8, max_size=24)
    return st.tuples(pairs, st.sampled_from(USES))


def check(case, place):
    """What is wrong with what compare.py makes of such a record."""
    pairs, (table, form) = case
    root = place / "texts"
    shutil.rmtree(root, ignore_errors=True)
    write(root, dict(pairs))
    words = [str(root), "--published", "--table", table]
    page = place / "page" / "page.html"
    words += ["--html", str(page)] if form == "page" else ["--format", form]
    done = world.run(lambda: compare.main(words), codes={0}, allowed=[page.parent], guarded=False)
    if done.code == 0:
        text = page.read_text(encoding="utf-8") if form == "page" else done.out
        done.faults += CHECKS[form](text)
    return done.faults


def write(root, told):
    """A victim and its repair in which some texts are others' choice."""
    name = told.get("folder", "victim").replace("/", "_").replace("\0", "_")
    name = name if name not in ("", ".", "..") else "victim"
    victim = root / name[:60]
    own = {key: value for key, value in told.items() if key in ROW}
    try:
        write_run(victim, "attack", {**ROW, **own, "defense": "none"}, told)
    except (UnicodeEncodeError, OSError):  # the system has no such name
        victim = root / "victim"
        write_run(victim, "attack", {**ROW, **own, "defense": "none"}, told)
    defense = {"defense": "ft", "stage": "repair", "selection": "fixed", "asr": "0.1", **own}
    write_run(victim / "defense" / "ft", "defense", {**ROW, **defense}, told)
    write_run(root / "other", "attack", {**ROW, "acc": "0.8"}, {})


def write_run(folder, kind, row, told):
    folder.mkdir(parents=True)
    options = {"lr": 0.1, "random_seed": 0, told.get("option name", "x"): told.get("option", "y")}
    log = {"stage": told.get("log stage", "train"), "epoch": 1, "loss": 0.5}
    contents = {
        layout.RESULTS: csv_of(row | {"variant": told.get("variant", "")}),
        layout.OPTIONS: yaml.safe_dump(options),
        layout.LOG: csv_of(log),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    sums = {name: files.sha256(folder / name) for name in contents}
    info = {
        "format": 1,
        "kind": kind,
        "name": told.get("name", "badnet"),
        "command": told.get("command", "python attack/badnet.py --lr 0.1"),
        "git_commit": told.get("commit"),
        "device": told.get("device"),
        "versions": {told.get("version", "torch"): told.get("version", "2")},
        "files": {**sums, layout.WEIGHTS: "0", told.get("file", layout.PREVIEW): "0"},
        "victim_sha256": "0",
    }
    (folder / layout.RECORD).write_text(json.dumps(info))


def csv_of(row):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([row.keys(), row.values()])
    return text.getvalue()


# ---------- what must hold of each format ----------


def wrong_text(text):
    return ()


def wrong_csv(text):
    rows = list(csv.reader(io.StringIO(text)))
    if len({len(row) for row in rows}) != 1:
        yield f"rows of different lengths: {text[:300]!r}"
    for cell in (cell for row in rows for cell in row):
        if cell.startswith(("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")):
            try:
                float(cell)
            except ValueError:
                yield f"a cell that a spreadsheet runs: {cell[:80]!r}"


def wrong_markdown(text):
    plain = re.sub(r"\\[!-/:-@\[-`{-~]", "", text)  # what is escaped is text
    for pattern in (r"!\[", r"\]\(", r"\]\[", r"\]:", "<", "`"):
        if re.search(pattern, plain):
            yield f"{pattern!r} is not escaped: {_line_with(pattern, plain)!r}"
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if len(lines) > 1 and re.fullmatch(r"[|\-: ]+", lines[1]):
            counts = {len(re.sub(r"\\.", "", line).split("|")) for line in lines if line}
            if len(counts) > 1:
                yield f"rows of a table with {sorted(counts)} cells"


def wrong_latex(text):
    for line in text.splitlines():
        plain = re.sub(r"\\text(backslash|asciitilde|asciicircum)\{\}|\\[&%$#_{}]", "", line)
        plain = re.sub(r"\$(<|>|\\pm|\^\\S|\^\\dagger|\^\\ddagger|\^\\circ)\$", "", plain)
        plain = re.sub(r" \\\\$", "", plain)
        plain = re.sub(OWN_LATEX, "", plain)
        rest = re.sub(r"[^\\{}$#^_~%]", "", plain)
        if rest not in ("", "{}", "}", "}}", "}}}") and not re.fullmatch(r"(\{\})*\}*", rest):
            yield f"{rest!r} is not escaped: {line[:200]!r}"


OWN_LATEX = (
    r"\\(begin|end)\{(table|tabular)\}|\\begin\{tabular\}\{lr*\}|\\centering|\\caption\{"
    r"|\\(top|mid|bottom)rule|\\cmidrule\(lr\)\{\d+-\d+\}|\\multicolumn\{3\}\{c\}\{"
    r"|\\par\\footnotesize"
)


class Tags(html.parser.HTMLParser):
    """The tags of a page, with the names of their attributes."""

    def __init__(self):
        super().__init__()
        self.found, self.data = [], {}

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, tuple(name for name, _ in attrs)))
        self.within = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data):
        if getattr(self, "within", None):
            self.data[self.within] = self.data.get(self.within, "") + data


def wrong_page(text):
    tags = Tags()
    tags.feed(text)
    scripts = [attributes for tag, attributes in tags.found if tag == "script"]
    if len(scripts) != 2:
        yield f"{len(scripts)} scripts"
    if handlers := [item for item in tags.found if any(name.startswith("on") for name in item[1])]:
        yield f"handlers: {handlers}"
    data = json.loads(tags.data["data"])
    texts = [data]
    while texts:
        value = texts.pop()
        if isinstance(value, dict):
            texts += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            texts += value
        elif isinstance(value, str) and not value.isprintable():
            yield f"data with control characters: {value[:80]!r}"


def _line_with(pattern, text):
    return next(line for line in text.splitlines() if re.search(pattern, line))[:200]


CHECKS = {
    "text": wrong_text,
    "csv": wrong_csv,
    "markdown": wrong_markdown,
    "latex": wrong_latex,
    "page": wrong_page,
}
