"""Audit a model: is it backdoored?

    python audit.py badnet_cifar10
    python audit.py model.safetensors --model resnet9 --width 8 --num_classes 10 --image_size 32
        --dataset digits
    python audit.py model.pt --model nets.py:build --num_classes 43 --image_size 32 --images photos/
    python audit.py model.safetensors ... --format html --output report.html
    python audit.py badnet_cifar10 --images photos/ --references zoo/
    python audit.py --calibrate zoo/ --output zoo.json
    python audit.py --backdoored attacked/ --output zoo.json
    python audit.py model.safetensors ... --calibration zoo.json

MODEL is a record or a file of weights: .safetensors, or .pt with a state dict. Nothing in it is
executed. Detectors of models look at it, the quickest first, and what they find is compared with
what they find in benign reference models. The verdict is suspicious, nothing found, or not
assessable. No test can show that a model holds no backdoor.

--images: a folder of images of the task, best one folder for every class. More detectors need them.
--references: benign models of the same classes. A trigger that works on them too is a property of
the data.
--calibrate: score the benign models in a folder, which become reference models. Images that are
given here must be given in the audit too.
--backdoored: score the backdoored models in a folder and add them to such a file. An audit then
says how likely a backdoor is beside them; its verdict stays as it was.

Exit codes: 0 nothing found, 10 suspicious, 11 not assessable; 1 the audit failed, 2 usage, 3
something is missing, 4 the model is refused. See docs/audit.md.
"""

import argparse
import datetime
import sys
from pathlib import Path

from antidote_bench.utils import files, launch
from antidote_bench.utils.audit import options, page, sarif
from antidote_bench.utils.audit.report import as_json, as_text
from antidote_bench.utils.errors import ConfigError, UserError
from antidote_bench.utils.report.page import HERE as STYLE  # compare.py's page looks the same

FORMATS = ("text", "json", "sarif", "html")
DATA_FREE = ", ".join(options.DATA_FREE)
WITH_IMAGES = ", ".join(options.WITH_IMAGES)


def audit(asked, words):
    """Audit a model, write the report, and return the exit code; `words` are the command line."""
    subject, plan = _subject(asked), _plan(asked)
    options.check(subject, plan)
    if asked.references and not asked.images:
        raise ConfigError("--references needs --images: a trigger is tried on images")
    from antidote_bench.utils.protocol import audit as protocol  # heavy
    from antidote_bench.utils.protocol import audited

    launch.obey_signals()
    started = _now()
    model = audited.open_model(asked.model_to_audit, subject)
    given = audited.open_images(asked.images, model) if asked.images else None
    benign = ()
    if asked.references:
        benign = audited.open_references(asked.references, model, subject, _note)
    found = protocol.judge(model, given, plan, asked.calibration, benign)
    code = 0 if asked.exit_zero else found.verdict.exit_code
    report = protocol.report(model, given, found, (started, _now()), words, code)
    _put(_as(asked.format, report), asked.output)
    if asked.output:
        print(f"{report.verdict.line}; report written to {asked.output}")
    return code


def calibrate(asked):
    """Score models that are known to be benign or backdoored; returns the exit code."""
    subject, plan = _subject(asked), _plan(asked)
    options.check(subject, plan)
    if asked.most is not None and asked.most < 1:
        raise ConfigError("most must be at least 1")
    if asked.output is None:
        raise ConfigError(
            "--calibrate and --backdoored need --output: the file of scores to write, zoo.json say"
        )
    from antidote_bench.utils.protocol import audit as protocol  # heavy

    launch.obey_signals()
    if asked.calibrate:
        found = protocol.calibrate(
            asked.calibrate, subject, plan, asked.images, asked.output, print, asked.most
        )
        count = len(found.models)
        print(f"{asked.output} has {count} reference models: the smallest p is 1/{count + 1}")
    if asked.backdoored:
        found = protocol.learn(asked.backdoored, subject, asked.images, asked.output, print)
        print(f"{asked.output} has {len(found.backdoored)} backdoored models")
    return 0


def _as(form, report):
    """The text of a report in the format `form`."""
    if form == "html":
        return page.build(report, (STYLE / "page.css").read_text(encoding="utf-8"))
    return {"text": as_text, "json": as_json, "sarif": sarif.as_sarif}[form](report)


def _put(content, path):
    """Write a report to a plain file, or print it."""
    if path is None:
        print(content, end="")
        return
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is no plain file")
    files.write(path, content)


def _note(text):
    print(text, file=sys.stderr)


def _now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _subject(asked):
    known = options.Subject.__dataclass_fields__
    return options.Subject(**{name: value for name, value in vars(asked).items() if name in known})


def _plan(asked):
    names = options.chosen(asked.detectors, asked.images is not None)
    return options.Plan(names, asked.alpha, asked.budget)


def _parser():
    idea, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="audit.py",
        description=idea,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model_to_audit", nargs="?", metavar="MODEL", help="a record, or a file of weights")
    add("--images", metavar="DIR", help="images of the task that you trust")
    add(
        "--detectors",
        metavar="NAMES",
        help=f"with commas, or all; default: {DATA_FREE}, and with --images also {WITH_IMAGES}",
    )
    add("--budget", type=float, metavar="MINUTES", help="start no detector after so long")
    add(
        "--alpha",
        type=float,
        default=0.05,
        help="share of benign models that may be called suspicious; default: 0.05",
    )
    add("--calibration", metavar="FILE", help="reference models; by default those that fit")
    add("--references", metavar="ZOO", help="folder of benign models to try found triggers on")
    add("--calibrate", metavar="ZOO", help="folder of benign models that become reference models")
    add("--backdoored", metavar="ZOO", help="folder of backdoored models to learn from")
    add("--most", type=int, metavar="N", help="reference models to make at most; default: all")
    add("--format", choices=FORMATS, default="text", help="default: text")
    add("--output", type=Path, metavar="FILE", help="write to a file; do not print the report")
    add("--exit_zero", action="store_true", help="end with 0 whatever the verdict is")
    _add_subject(parser.add_argument_group("what a file of weights does not say").add_argument)
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...; default: the first GPU, or cpu")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_subject(add):
    add(
        "--model",
        metavar="NAME",
        help="the architecture: a name, timm:NAME, or path/to/file.py:function of your own, which "
        "is executed",
    )
    add("--width", type=int, help="channels of the first layer, where they can be chosen")
    add("--num_classes", type=int)
    add("--image_size", type=int, metavar="PIXELS")
    add("--mean", metavar="R,G,B", help="what the first layer subtracts from pixels of [0, 1]")
    add("--std", metavar="R,G,B", help="what it divides by")
    add("--dataset", metavar="NAME", help="that the model was trained on; reference models follow")
    add("--dataset_path", metavar="DIR", help="where that data set lies, if it must be looked at")
    add("--cache_path", metavar="DIR", default="data/cache", help="of decoded data sets")
    add("--record_path", metavar="DIR", default="record", help="folder of the records")


def main(argv=None):
    """Run with command line arguments; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    asked = _parser().parse_args(words)
    codes = []
    failed = launch.guard(lambda: codes.append(_run(asked, words)), debug=asked.debug)
    return failed or codes[0]


def _run(asked, words):
    """Do what the options say; returns the exit code. A SARIF report is left of a failure too."""
    is_calibration = bool(asked.calibrate or asked.backdoored)
    if (asked.model_to_audit is None) != is_calibration:
        raise ConfigError(
            "name one model to audit, or a folder of models with --calibrate or --backdoored"
        )
    if is_calibration:
        return calibrate(asked)
    try:
        return audit(asked, words)
    except Exception as error:
        if asked.format == "sarif":
            code = error.code if isinstance(error, UserError) else 1
            _put(sarif.failure(words, code, str(error)), asked.output)
        raise


if __name__ == "__main__":
    sys.exit(main())
