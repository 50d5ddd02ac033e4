"""The folder of a run: file names, states, and how it is written and checked. Imports no torch.

A run under way lives in `state/`. When it ends, its files are renamed into the folder,
`record.json` last. A folder with a `record.json` is therefore complete, and a killed run has
damaged nothing.
"""

import csv
import hashlib
import json
import os
import shutil
from pathlib import Path

import yaml

from antidote_bench.utils import files
from antidote_bench.utils.errors import MissingError, RefusedError
from antidote_bench.utils.text import cut, printable

FORMAT = 1
FORMAT_COMPRESSED = 2  # of an attack whose images are compressed; all else is as in FORMAT
FORMATS = FORMAT, FORMAT_COMPRESSED
RECORD = "record.json"
OPTIONS = "config.yaml"
RESULTS = "results.csv"
LOG = "log.csv"
WEIGHTS = "model.safetensors"
POISONED = "poison.safetensors"
TRIGGER = "trigger.safetensors"
PREVIEW = "preview.png"
SCORES_CHART = "scores.png"
TRIGGERS = "triggers.png"  # of detectors that search for one
STATE = "state"  # folder of a run under way
BEGUN = "begun.json"  # in it, what the run works on: data set or victim, and who began it
FINISHED = ".finished"  # what is left of state/ when a run is complete, to be deleted
OWN = "kept"  # in it, the files that a defense adds to its record
DEFENSES = "defense"  # folder of a victim's defenses
DETECTIONS = "detection"  # folder of what detectors say about a victim
MEASURES = "measure"  # folder of what was measured later of a victim or of a repaired model
ANALYSES = "analysis"  # folder of the pictures that are made of it
SHARED = ".shared"  # in both, what several runs on the same training set use
SCORES = "scores.safetensors"
EVIDENCE = "evidence.safetensors"
NEEDED = {
    "attack": (OPTIONS, WEIGHTS, POISONED, RESULTS),
    "defense": (OPTIONS, WEIGHTS, RESULTS),
    "detection": (OPTIONS, SCORES, RESULTS),
    "measure": (OPTIONS, RESULTS),
}
# bytes of a file; real ones of text have a few thousand
LARGEST = {RECORD: 2**22, BEGUN: 2**22, OPTIONS: 2**18, RESULTS: 2**20, LOG: 2**24}
LARGEST_TENSORS, LARGEST_OTHER = 2**37, 2**26
# what a file with wrong content can raise
UNUSABLE = (ValueError, RecursionError, yaml.YAMLError)
MOST_EPOCHS = 100_000  # rows of a log.csv
NEW, PARTIAL, DONE = "new", "partial", "done"  # states of a run

ATTACK_COLUMNS = [
    "dataset", "model", "attack", "label_mode", "target", "pratio", "pratio_effective", "n_poison",
    "recipe", "precision",
]  # fmt: skip
RESULT_COLUMNS = [
    *ATTACK_COLUMNS, "defense", "variant", "stage", "selection", "prior", "clean_budget", "seed",
    "poison_seed", "data_seed", "acc_before", "asr_before", "ra_before", "acc", "asr", "ra", "der",
    "n_test", "n_backdoor", "seconds", "peak_mb", "device", "version", "config_hash",
    "defense_seed", "lr",
]  # fmt: skip
DETECTION_COLUMNS = [
    *ATTACK_COLUMNS, "detection", "variant", "judges", "prior", "clean_budget", "n_calibration",
    "seed", "poison_seed", "data_seed", "detection_seed", "acc", "asr", "n_negative", "n_cover",
    "n_positive", "auroc", "auroc_no_cover", "auroc_fooled", "tpr_at_1", "tpr_at_5", "tpr_at_10",
    "nominal_fpr", "threshold", "fpr", "tpr", "ppv", "f1", "own_fpr", "own_tpr", "own_ppv",
    "own_f1", "score", "suspects", "target_found", "target_rank", "published", "abstained",
    "seconds", "peak_mb", "device", "version", "config_hash",
]  # fmt: skip
# of results.csv in the folder of a measure, by its name
MEASURE_COLUMNS = {
    "relearn": [
        *ATTACK_COLUMNS, "defense", "variant", "seed", "poison_seed", "data_seed", "defense_seed",
        "measure", "control", "acc", "asr", "acc_relearn", "asr_relearn", "asr_relearn_std",
        "poisons", "poisons_from", "n_images", "lr", "repeats", "relearn_seed", "seconds",
        "peak_mb", "device", "version", "config_hash",
    ],
    "cut": [
        *ATTACK_COLUMNS, "defense", "variant", "seed", "poison_seed", "data_seed", "defense_seed",
        "measure", "control", "acc", "asr", "cut_precision", "cut_recall", "cut_lift", "cut_p",
        "truth", "n_channels", "n_cut", "n_unjudged", "n_truth", "n_hits", "n_chance", "asr_hits",
        "asr_misses", "seconds", "peak_mb", "device", "version", "config_hash",
    ],
}  # fmt: skip
NO_CLASS = "none"  # in the column suspects: the method takes no class for a target
LOG_COLUMNS = [
    "stage", "epoch", "loss", "lr", "acc", "asr", "ra", "seconds", "asr_all", "asr_other",
]  # fmt: skip


class Log:
    """A run's log.csv: a row for each stage and epoch, which may have been measured or not."""

    def __init__(self, folder):
        self._path = folder / LOG
        self._rows = {(row["stage"], row["epoch"]): row for row in _read_log(self._path)}

    @property
    def seconds(self):
        """The largest time that a row states, 0 where there is none."""
        return max((float(row["seconds"] or 0) for row in self._rows.values()), default=0.0)

    def write(self, stage, epoch, values):
        """Add a row; one of the same stage and epoch, from before an interruption, is replaced."""
        key = stage, str(epoch or "")
        self._rows[key] = {"stage": stage, "epoch": key[1], **values}
        files.write(self._path, files.csv_text(self._rows.values(), LOG_COLUMNS))


def _read_log(path):
    """The rows of the log of an interrupted run, none where there is no log yet.

    Raises RefusedError (exit 4) where it is no such log.
    """
    if not os.path.lexists(path):
        return []
    try:
        if refusal := _refusal(path):
            raise ValueError(f"it {refusal}")
        with open(path, newline="", encoding="utf-8") as file:
            rows = files.read_rows(file, MOST_EPOCHS)
        for row in rows:
            if row.keys() - set(LOG_COLUMNS) or not {"stage", "epoch", "seconds"} <= row.keys():
                raise ValueError("its columns are not those of a log")
            if None in row.values():
                raise ValueError("a row has another number of columns than the header")
            float(row["seconds"] or 0)
    except (OSError, ValueError, csv.Error) as error:
        raise RefusedError(
            f"{path} is damaged ({cut(error, 200)}): delete the folder {path.parent} to start again"
        ) from error
    return rows


def find(name, record_path):
    """Path of a record's folder, given as such or by its name below `record_path`.

    Raises MissingError (exit 3) where there is none.
    """
    places = list(dict.fromkeys([Path(name), Path(record_path) / name]))
    for place in places:
        if place.is_dir():
            return place
    for place in places:
        if place.exists():
            raise MissingError(
                f"{printable(place)} is a file, and a record is a folder, which holds {RECORD}: an "
                "attack script makes one, and convert.py makes one of weights from elsewhere"
            )
    looked = " and ".join(printable(place) for place in places)
    raise MissingError(
        f"there is no record {cut(name, 200)!r}: looked at {looked}; an attack script makes one, "
        "and --record_path says where records lie"
    )


def state_of(folder):
    """NEW, PARTIAL (a run was interrupted there and will go on) or DONE."""
    if (folder / RECORD).exists():
        return DONE
    return PARTIAL if (folder / STATE).exists() else NEW


def written(folder):
    """When the complete run in a folder was written, in nanoseconds; None where there is none."""
    record = folder / RECORD
    return record.stat().st_mtime_ns if record.exists() else None


def finish(folder, contents, info, *, kind):
    """Put a complete run in place; `contents` is {file name: bytes or str}, `info` its facts.

    Everything is written to state/ first, where a full disk does no harm; the rest is renaming.
    """
    state = folder / STATE
    for name, content in contents.items():
        files.write(state / name, content)
    log = [LOG] * (state / LOG).exists()  # detectors that train nothing have none
    sums = {name: files.sha256(state / name) for name in [*contents, OPTIONS, *log]}
    info = {"format": FORMAT, "kind": kind, **info, "origin": read_begun(state).get("origin")}
    files.write_json(state / RECORD, {**info, "files": sums})
    commit(folder)


def own_files(state):
    """{name: bytes} of the files that a defense or a detector has added to its record."""
    return {path.name: path.read_bytes() for path in sorted((state / OWN).glob("[!.]*"))}


def verify(folder, kind):
    """What record.json says, after every file that it names was compared with its checksum.

    Raises RefusedError (exit 4), which says what is wrong.
    """
    info = _read_record(folder)
    if info["format"] not in FORMATS:
        raise RefusedError(
            f"the record {folder} has format {str(info['format'])[:20]}; this version of Antidote "
            f"reads the formats {' and '.join(map(str, FORMATS))}"
        )
    if info.get("kind") != kind:
        raise RefusedError(
            f"{folder} is not the record of {_article(kind)} but of a {str(info.get('kind'))[:20]}"
        )
    sums = info["files"]
    for name in {*NEEDED[kind], *sums}:
        path = folder / name
        if Path(name).name != name or name not in sums or not path.is_file():
            raise RefusedError(f"the record {folder} is damaged: {name[:100]} is missing")
        if refusal := _refusal(path):
            raise RefusedError(f"the record {folder} is refused: {name} {refusal}")
        if files.sha256(path) != sums[name]:
            raise RefusedError(
                f"the record {folder} is damaged: {name} is not the file that was saved"
            )
    return info


def _article(kind):
    return f"an {kind}" if kind == "attack" else f"a {kind}"


def _read_record(folder):
    """The content of record.json: a mapping with `format`, and `files`, {name: checksum}."""
    path = folder / RECORD
    if not os.path.lexists(path):
        begun = (folder / STATE).is_dir()
        why = "the run that makes it has not finished" if begun else f"it has no {RECORD}"
        raise RefusedError(f"the record {folder} is not complete: {why}")
    if refusal := _refusal(path):
        raise RefusedError(f"the record {folder} is refused: {RECORD} {refusal}")
    try:
        info = json.loads(path.read_text())
        right = {"format", "files"} <= info.keys()
        right &= all(isinstance(sum_, str) for sum_ in info["files"].values())
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise RefusedError(f"the record {folder} is damaged: {RECORD} cannot be read") from error
    if not right:
        raise RefusedError(f"the record {folder} is damaged: {RECORD} cannot be read")
    return info


def _refusal(path):
    """Why a file of a record is not read, None where it may be."""
    if path.is_symlink():
        return "is a link, and a record holds its own files"
    if not path.is_file():
        return "is no regular file"
    other = LARGEST_TENSORS if path.suffix == ".safetensors" else LARGEST_OTHER
    limit = LARGEST.get(path.name, other)
    if path.stat().st_size > limit:
        return f"is larger than {limit >> 10} KB"
    return None


def read_checked(folder, name, info=None):
    """The bytes of one file, whose checksum must be the one in `info`, the content of record.json.

    Raises RefusedError (exit 4).
    """
    path = folder / name
    try:
        if not os.path.lexists(path):
            raise RefusedError(f"no {name}" if info else f"no {name}: unfinished")
        if refusal := _refusal(path):
            raise RefusedError(f"{name} {refusal}")
        content = path.read_bytes()
    except OSError as error:
        raise RefusedError(f"{name} is unusable: {error}") from error
    if info and hashlib.sha256(content).hexdigest() != info["files"].get(name):
        raise RefusedError(f"{name} was changed after it was written")
    return content


def read_options(folder):
    """The options in config.yaml, {} where there is no such file.

    Raises RefusedError (exit 4) where it is no file of options.
    """
    path = folder / OPTIONS
    if not os.path.lexists(path):
        return {}
    if refusal := _refusal(path):
        raise RefusedError(f"the file {path} {refusal}")
    try:
        return parse_options(path.read_bytes())
    except UNUSABLE as error:
        raise RefusedError(f"{path} is damaged: {cut(error, 200)}") from error


def parse_options(content):
    """{option: value} of a config.yaml, which is a mapping of single values; else one of UNUSABLE.

    Lists, aliases and tags are refused before anything is constructed: what is loaded cannot be
    nested deeply, and no part of it can be repeated.
    """
    depth = 0
    for event in yaml.parse(content, files.YAML_LOADER):
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise ValueError("it holds an alias or a tag, and options have none")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > 1:
            raise ValueError("it holds a list or a mapping where an option has a single value")
    options = yaml.load(content, files.YAML_LOADER)
    if not isinstance(options, dict):
        raise ValueError("it holds no options")
    return options


def read_results(folder):
    """The row of results.csv: {column: text}; RefusedError (exit 4) where it holds no such row."""
    try:
        with open(folder / RESULTS, newline="", encoding="utf-8") as file:
            rows = files.read_rows(file, most=1)
        if not rows:
            raise ValueError("it has no row")
        if None in rows[0] or None in rows[0].values():
            raise ValueError("its row has another number of columns than the header")
    except (OSError, ValueError, csv.Error) as error:
        raise RefusedError(f"{folder / RESULTS} is damaged: {cut(error, 200)}") from error
    return rows[0]


def commit(folder):
    """Rename the files that state/record.json lists into the folder, in place of the run before.

    It may be cut off and called again.
    """
    state = folder / STATE
    names, old = _listed(state), _listed(folder)
    (folder / RECORD).unlink(missing_ok=True)
    for name in old - names:  # left by a run with other options
        if (folder / name).is_symlink() or not (folder / name).is_dir():
            (folder / name).unlink(missing_ok=True)
    for name in names:
        if (state / name).is_file():
            os.replace(state / name, folder / name)
    os.replace(state / RECORD, folder / RECORD)
    os.replace(state, folder / FINISHED)  # at once: a killed clean-up leaves no state/ behind
    shutil.rmtree(folder / FINISHED)


def _listed(folder):
    """The names of the files that record.json lists; none where it cannot be read."""
    try:
        names = _read_json(folder / RECORD)["files"]
        return {name for name in names if Path(name).name == name not in ("", "..")}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _read_json(path):
    """The content of a JSON file within the limits of a record's; OSError or ValueError where it is
    none."""
    if refusal := _refusal(path):
        raise ValueError(refusal)
    try:
        return json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_begun(state):
    """What an interrupted run works on; {} where nothing says it."""
    try:
        begun = _read_json(state / BEGUN)
    except (OSError, ValueError):
        return {}
    return begun if isinstance(begun, dict) else {}
