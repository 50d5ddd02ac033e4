"""Audit every model in a folder of records, and print which were found.

    python -m benchmarks.zoo record --calibration config/audit/digits_resnet9_w8_fast.json \
        --output audits.csv
    python -m benchmarks.zoo --output audits.csv

The first command writes one row for each model that is no reference model of the calibration; a
model that the file has already is not audited again. Both print a Markdown table of the models.
Where the calibration has backdoored models, a row has the learned probability too, unless the model
is one of them.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats
from sklearn.metrics import log_loss, roc_auc_score

from antidote_bench.utils import files, launch
from antidote_bench.utils.audit import calibration as known
from antidote_bench.utils.audit import options, verdict
from antidote_bench.utils.errors import MissingError, RefusedError
from antidote_bench.utils.record import folder as layout

WORKS, FAILED = 0.8, 0.3  # ASR from which on an attack works, and below which it has failed
BENIGN = "benign"
ALONE = 0.05  # largest p-value at which one detector alone finds a model


# ---------- audits ----------


def audit_all(folder, calibration, images, output):
    """Audit the records in `folder`, and write a row of each to the file `output`.

    Only those detectors run that the reference models were scored with.
    """
    from antidote_bench.utils.protocol import audit as protocol
    from antidote_bench.utils.protocol import audited  # heavy

    rows = read(output) if output.is_file() else []
    done = {row["sha256"] for row in rows}
    references = known.read(calibration)
    usable = options.ALL if images else options.DATA_FREE
    plan = options.Plan(tuple(name for name in usable if name in references.methods))
    said = options.Subject()
    for path in options.models_in(folder):
        if not (path / layout.RECORD).is_file():
            continue
        model = audited.open_model(path, said)
        if model.sha256 in done or model.sha256 in references.models:
            continue
        given = audited.open_images(images, model) if images else None
        judged = protocol.judge(model, given, plan, calibration)
        rows.append(row_of(path, model, judged, references.backdoored))
        files.write(output, files.csv_text(rows, list(rows[0])))
        print(f"{len(rows)}  {path.name}: {rows[-1]['outcome']}  p {rows[-1]['p']}", flush=True)
    return rows


def read(path):
    """The rows of a file that this module has written; RefusedError (exit 4) for another one."""
    rows = files.read_csv(path)
    if not rows or not {"sha256", "seconds", "outcome"} <= rows[0].keys():
        raise RefusedError(f"{path} is no table of audits that benchmarks.zoo has written")
    return rows


def row_of(path, model, judged, backdoored):
    """The row of an audited record; `backdoored` are models that a probability is learned from."""
    made = layout.read_results(path)
    found = judged.verdict
    row = {
        "model": path.name,
        "sha256": model.sha256,
        "attack": "clean" if model.benign else made["attack"],
        **{name: made[name] for name in ("label_mode", "target", "acc", "asr")},
        "references": found.references,
        "outcome": found.outcome,
        "p": "" if found.p is None else round(found.p, 6),
        "classes": " ".join(map(str, found.classes)),
        "seconds": round(sum(each.seconds for each in judged.detections), 2),
    }
    if backdoored:
        attacks = {each["attack"] for each in backdoored.values()}
        row["attack_known"] = "" if model.benign else int(made["attack"] in attacks)
        unseen = found.learned is not None and model.sha256 not in backdoored
        row["probability"] = f"{found.learned.value:.6g}" if unseen else ""
    for each in judged.detections:
        row[each.name] = "" if each.score is None else f"{each.score:.6g}"
        row[f"{each.name}_p"] = "" if each.p is None else round(each.p, 6)
    return row


# ---------- tables ----------


class Group(NamedTuple):
    """Models of one kind."""

    name: str
    rows: list


def groups(rows):
    """(the benign models, [a `Group` of every attack that works], [... of weak attacks], rows of
    attacks that have failed)."""
    benign, working, weak, failed = [], {}, {}, []
    for row in rows:
        if row["attack"] == "clean":
            benign.append(row)
        elif float(row["asr"]) < FAILED:
            failed.append(row)
        else:
            kind = working if float(row["asr"]) >= WORKS else weak
            kind.setdefault(name_of(row), []).append(row)
    as_groups = [[Group(*item) for item in sorted(kind.items())] for kind in (working, weak)]
    return Group(BENIGN, benign), *as_groups, failed


def name_of(row):
    return row["attack"] + (f", {row['label_mode']}" if row["label_mode"] != "all2one" else "")


def table(rows):
    """The Markdown table of the audited models."""
    benign, working, weak, failed = groups(rows)
    head = "| models | audited | suspicious | in percent | right class | AUROC | probability |"
    lines = [head, "|---|---:|---:|---|---:|---:|---:|", _line(benign, None)]
    lines += [_line(group, benign) for group in working]
    lines += [_line(group._replace(name=f"{group.name}, weak"), benign) for group in weak]
    everything = [row for group in working for row in group.rows]
    if everything:
        lines.append(_line(Group("all that work", everything), benign))
    if failed:
        names = sorted({name_of(row) for row in failed})
        lines += ["", f"Left out, because the attack failed: {len(failed)} of {', '.join(names)}."]
    return "\n".join(lines)


def _line(group, benign):
    """The row of a group; `benign` is None for the benign models themselves."""
    count, found = len(group.rows), sum(map(is_suspicious, group.rows))
    share = _share(found, count) if count else "–"
    right = area = ""
    if benign is not None:
        named = [row for row in group.rows if row["label_mode"] != "all2all"]
        right = sum(is_suspicious(row) and row["classes"] == row["target"] for row in named)
        right = right if named else ""
        area = f"{100 * auroc(group.rows, benign.rows):.1f}" if benign.rows else "–"
    values = probabilities(group.rows)
    mean = f"{np.mean(values):.2f}" if values else ""
    return f"| {group.name} | {count} | {found} | {share} | {right} | {area} | {mean} |"


def _share(found, count):
    """Percent, with the exact 95 % interval."""
    low, high = stats.binomtest(found, count).proportion_ci(0.95, "exact")
    return f"{100 * found / count:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def is_suspicious(row):
    return row["outcome"] == verdict.SUSPICIOUS


def auroc(backdoored, benign):
    """Of the p-values, a small one being suspicious; a model without one counts as p = 1."""
    p_values = [p_of(row) for row in (*backdoored, *benign)]
    truth = [1] * len(backdoored) + [0] * len(benign)
    return roc_auc_score(truth, [-p for p in p_values])


def p_of(row):
    return float(row["p"]) if row["p"] != "" else 1.0


def probabilities(rows):
    """The learned probabilities of those rows that have one."""
    return [float(row["probability"]) for row in rows if row.get("probability", "") != ""]


def probability(p):
    """The probability of a backdoor that a p-value allows at most, from even odds.

    No distribution of p-values that favours small ones gives more evidence than -1 / (e p log p)
    (Sellke, Bayarri, Berger, "Calibration of p Values for Testing Precise Null Hypotheses", The
    American Statistician 2001). From 1/e on it is 1/2.
    """
    if p >= 1 / math.e:
        return 0.5
    return 1 / (1 - math.e * p * math.log(p))


def sentences(rows):
    """What the table does not say, as lines of text."""
    benign, working, _, _ = groups(rows)
    backdoored = [row for group in working for row in group.rows]
    lines = []
    if benign.rows and backdoored:
        judged = [*backdoored, *benign.rows]
        truth = [1] * len(backdoored) + [0] * len(benign.rows)
        loss = log_loss(truth, [probability(p_of(row)) for row in judged], labels=[0, 1])
        lines.append(f"cross-entropy {loss:.4f}; saying 1/2 of every model gives {math.log(2):.4f}")
        lines += learned_sentences(benign.rows, backdoored)
    smallest, kinds = min(map(p_of, rows)), {"benign": benign.rows, "backdoored": backdoored}
    for kind, judged in kinds.items():
        if judged:
            share = _share(sum(p_of(row) <= smallest for row in judged), len(judged))
            lines.append(f"p at most {smallest:.4g}: {share} percent of the {kind} models")
    for key in (key for key in rows[0] if key.endswith("_p")):
        counts = [
            f"{sum(row[key] != '' and float(row[key]) <= ALONE for row in judged)} of "
            f"{len(judged)} {kind}"
            for kind, judged in kinds.items()
        ]
        name = key.removesuffix("_p")
        lines.append(f"`{name}` alone, p at most {ALONE}: {', '.join(counts)} models")
    seconds = np.array([float(row["seconds"]) for row in rows])
    lines.append(f"seconds per model: median {np.median(seconds):.2f}, most {seconds.max():.2f}")
    return lines


def learned_sentences(benign, backdoored):
    """What the learned probability is worth, on models that it was not learned from: of all attacks
    that work, and of those that it knows no model of."""
    unknown = [row for row in backdoored if row.get("attack_known") == "0"]
    kinds = {"": backdoored, " of attacks that it does not know": unknown}
    lines, below = [], probabilities(benign)
    for kind, rows in kinds.items():
        above = probabilities(rows)
        if not (above and below):
            continue
        loss = -(np.log1p(-np.array(below)).mean() + np.log(above).mean()) / 2
        area = roc_auc_score([0] * len(below) + [1] * len(above), below + above)
        limit = np.quantile(below, 1 - ALONE, method="higher")
        found = sum(value > limit for value in above)
        lines.append(
            f"probability: cross-entropy {loss:.4f}, both kinds counting as half, AUROC "
            f"{100 * area:.1f}, and {found} of {len(above)} found where at most 5 % of the benign "
            f"ones are, on {len(below)} benign and {len(above)} backdoored models{kind}"
        )
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", nargs="?", type=Path, help="of records; without it no audit runs")
    parser.add_argument("--calibration", metavar="FILE", help="reference models, from audit.py")
    parser.add_argument("--images", metavar="DIR", help="images of the task, as in audit.py")
    parser.add_argument("--output", metavar="CSV", type=Path, required=True)
    asked = parser.parse_args(argv)
    return launch.guard(lambda: run(asked))


def run(asked):
    if asked.folder is None:
        if not asked.output.is_file():
            raise MissingError(f"there is no file {asked.output}: name a folder of records too")
        rows = read(asked.output)
    else:
        if asked.calibration is None:
            raise MissingError("--calibration is missing: audit.py --calibrate makes the file")
        rows = audit_all(asked.folder, asked.calibration, asked.images, asked.output)
    if not rows:
        raise MissingError(f"{asked.folder} holds no record that is no reference model")
    print(table(rows), "", *sentences(rows), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
