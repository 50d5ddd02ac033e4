"""The folder of a run: file names, states, and how it is written and checked. Imports no torch.

A run under way lives in `state/`. When it ends, its files are renamed into the folder,
`record.json` last. A folder with a `record.json` is therefore complete, and a killed run has
damaged nothing.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import yaml

from utils import files
from utils.errors import ConfigError, MissingError, RefusedError

FORMAT = 1
RECORD = "record.json"
OPTIONS = "config.yaml"
RESULTS = "results.csv"
LOG = "log.csv"
WEIGHTS = "model.safetensors"
POISONED = "poison.safetensors"
TRIGGER = "trigger.safetensors"
PREVIEW = "preview.png"
SCORES_CHART = "scores.png"
STATE = "state"  # folder of a run under way
VICTIM = "victim"  # in it, the checksum of the weights that are being repaired
OWN = "kept"  # in it, the files that a defense adds to its record
DEFENSES = "defense"  # folder of a victim's defenses
SHARED = ".shared"  # in it, what several defenses on the same training set use
NEEDED = {"attack": (OPTIONS, WEIGHTS, POISONED, RESULTS), "defense": (OPTIONS, WEIGHTS, RESULTS)}
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
LOG_COLUMNS = ["stage", "epoch", "loss", "lr", "acc", "asr", "ra", "seconds", "asr_all"]


class Log:
    """A run's log.csv: a row for each stage and epoch, which may have been measured or not."""

    def __init__(self, folder):
        self._path = folder / LOG
        rows = files.read_csv(self._path) if self._path.exists() else []
        self._rows = {(row["stage"], row["epoch"]): row for row in rows}

    @property
    def seconds(self):
        """The largest time that a row states, 0 where there is none."""
        return max((float(row["seconds"] or 0) for row in self._rows.values()), default=0.0)

    def write(self, stage, epoch, values):
        """Add a row; one of the same stage and epoch, from before an interruption, is replaced."""
        key = stage, str(epoch or "")
        self._rows[key] = {"stage": stage, "epoch": key[1], **values}
        files.write(self._path, files.csv_text(self._rows.values(), LOG_COLUMNS))


def find(name, record_path):
    """Path of a record's folder, given as such or by its name below `record_path`.

    Raises MissingError (exit 3) where there is none.
    """
    places = [Path(name), Path(record_path) / name]
    for place in places:
        if place.is_dir():
            return place
    raise MissingError(
        f"there is no record {name!r}: looked at {places[0]} and {places[1]}; an attack script "
        "makes one, and --record_path says where records lie"
    )


def state(folder):
    """NEW, PARTIAL (a run was interrupted there and will go on) or DONE."""
    if (folder / RECORD).exists():
        return DONE
    return PARTIAL if (folder / STATE).exists() else NEW


def written(folder):
    """When the complete run in a folder was written, in nanoseconds; None where there is none."""
    record = folder / RECORD
    return record.stat().st_mtime_ns if record.exists() else None


def begin(folder, config, *, kind, victim=None):
    """Claim `folder` for a run of `config`: True where there is work to do, False where it is done.

    `victim` is the checksum of the weights that a defense repairs. An interrupted run with the same
    options and victim goes on. Raises ConfigError (exit 2) where a run with other options lies
    there, and RefusedError (exit 4) where a damaged one does. With config.overwrite both are
    replaced, but only when the new run is complete.
    """
    state = folder / STATE
    if (state / RECORD).exists():  # cut off in its very last step
        _commit(folder)
    same_victim = not state.exists() or _text(state / VICTIM) == str(victim)
    resumable = same_victim and _same(read_options(state), config)
    if not config.overwrite and (folder / RECORD).exists():
        info = verify(folder, kind)
        if _same(read_options(folder), config) and info.get("victim_sha256") == victim:
            return False
        if not resumable:
            _refuse_other(read_options(folder), config, folder)
            raise ConfigError(
                f"{folder} repaired another victim than the one there now; --overwrite repairs "
                "this one"
            )
    elif not config.overwrite and (state / LOG).exists():  # without a log nothing can be lost
        _refuse_other(read_options(state), config, folder)
    elif not config.overwrite and folder.is_dir() and _has_other_files(folder):
        raise RefusedError(
            f"{folder} holds files but no complete run; --overwrite starts again, "
            "--save_folder_name chooses another folder"
        )
    if not resumable:
        shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True, exist_ok=True)
    files.write(state / VICTIM, str(victim))
    files.write_yaml(state / OPTIONS, config.plain())
    return True


def finish(folder, contents, info, *, kind):
    """Put a complete run in place; `contents` is {file name: bytes or str}.

    Everything is written to state/ first, where a full disk does no harm; the rest is renaming.
    """
    state = folder / STATE
    for name, content in contents.items():
        files.write(state / name, content)
    sums = {name: files.sha256(state / name) for name in [*contents, OPTIONS, LOG]}
    files.write_json(state / RECORD, {"format": FORMAT, "kind": kind, **info, "files": sums})
    _commit(folder)


def own_files(state):
    """{name: bytes} of the files that a defense has added to its record."""
    return {path.name: path.read_bytes() for path in sorted((state / OWN).glob("[!.]*"))}


def verify(folder, kind):
    """What record.json says, after every file that it names was compared with its checksum.

    Raises RefusedError (exit 4), which says what is wrong.
    """
    try:
        info = json.loads((folder / RECORD).read_text())
        version, sums = info["format"], dict(info["files"])
    except FileNotFoundError:
        begun = (folder / STATE).is_dir()
        why = "the run that makes it has not finished" if begun else f"it has no {RECORD}"
        raise RefusedError(f"the record {folder} is not complete: {why}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"the record {folder} is damaged: {RECORD} cannot be read") from error
    if version != FORMAT:
        raise RefusedError(
            f"the record {folder} has format {version}; this version of Antidote reads format "
            f"{FORMAT}"
        )
    if info.get("kind") != kind:
        raise RefusedError(f"{folder} is not the record of an {kind} but of a {info.get('kind')}")
    for name in {*NEEDED[kind], *sums}:
        path = folder / name
        if Path(name).name != name or name not in sums or not path.is_file():
            raise RefusedError(f"the record {folder} is damaged: {name} is missing")
        if files.sha256(path) != sums[name]:
            raise RefusedError(
                f"the record {folder} is damaged: {name} is not the file that was saved"
            )
    return info


def read_checked(folder, name, info=None):
    """The bytes of one file, whose checksum must be the one in `info`, the content of record.json.

    For readers of many runs, who need a few small files of each. Raises RefusedError (exit 4).
    """
    path = folder / name
    try:
        if not path.is_file():  # a pipe would be waited for without end
            raise RefusedError(f"no {name}" if info else f"no {name}: unfinished")
        content = path.read_bytes()
    except OSError as error:
        raise RefusedError(f"{name} is unusable: {error}") from error
    if info and hashlib.sha256(content).hexdigest() != info["files"].get(name):
        raise RefusedError(f"{name} was changed after it was written")
    return content


def read_options(folder):
    """The options in config.yaml, {} where there is no such file or it holds no mapping.

    Raises RefusedError (exit 4) where it is not YAML.
    """
    path = folder / OPTIONS
    try:
        content = yaml.safe_load(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RefusedError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def read_results(folder):
    """The row of results.csv: {column: text}."""
    return files.read_csv(folder / RESULTS)[0]


def _commit(folder):
    """Rename the files that state/record.json lists into the folder, in place of the run before.

    It may be cut off and called again.
    """
    state = folder / STATE
    names, old = _listed(state), _listed(folder)
    (folder / RECORD).unlink(missing_ok=True)
    for name in old - names:  # left by a run with other options
        (folder / name).unlink(missing_ok=True)
    for name in names:
        if (state / name).exists():
            os.replace(state / name, folder / name)
    os.replace(state / RECORD, folder / RECORD)
    shutil.rmtree(state)


def _listed(folder):
    """The names of the files that record.json lists; none where it cannot be read."""
    try:
        return {Path(name).name for name in json.loads((folder / RECORD).read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _has_other_files(folder):
    return any(path.name not in (DEFENSES, STATE) for path in folder.iterdir())


def _text(path):
    return path.read_text() if path.is_file() else ""


def _same(saved, config):
    return _identity(saved, config) == config.identity()


def _identity(saved, config):
    """The options in a config.yaml that make up the experiment.

    An option that did not exist yet when it was written has its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)} if saved else {}
    return config.identity_of({**defaults, **saved})


def _refuse_other(saved, config, folder):
    there, here = _identity(saved, config), config.identity()
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if not keys:
        return
    difference = ", ".join(f"{key} {there.get(key)} there and {here.get(key)} here" for key in keys)
    raise ConfigError(
        f"{folder} holds another configuration ({difference}); --overwrite starts again, "
        "--save_folder_name chooses another folder"
    )
