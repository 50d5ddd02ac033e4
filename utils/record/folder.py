"""The folder of a run: file names, states, and how it is written and checked. Imports no torch.

A run under way lives in `state/`. When it ends, its files are renamed into the folder,
`record.json` last. A folder with a `record.json` is therefore complete, and a killed run has
damaged nothing.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import sys
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
BEGUN = "begun.json"  # in it, what the run works on: data set or victim, and who began it
FINISHED = ".finished"  # what is left of state/ when a run is complete, to be deleted
OWN = "kept"  # in it, the files that a defense adds to its record
DEFENSES = "defense"  # folder of a victim's defenses
SHARED = ".shared"  # in it, what several defenses on the same training set use
NEEDED = {"attack": (OPTIONS, WEIGHTS, POISONED, RESULTS), "defense": (OPTIONS, WEIGHTS, RESULTS)}
LARGEST, LARGEST_TEXT = 2**37, 2**26  # bytes of a file of tensors, and of any other file
NEW, PARTIAL, DONE = "new", "partial", "done"  # states of a run
COUNTS = ("train", "test", "classes", "size")  # facts about a data set that a message can name

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


@contextlib.contextmanager
def owned(folder):
    """`folder` belongs to this process inside; a killed process owns nothing.

    Raises ConfigError (exit 2) where another run is under way there.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.owned(folder.with_name(f".{folder.name}.lock")))
        except BlockingIOError:
            raise ConfigError(
                f"a run is under way in {folder}: wait for its end, or choose another folder with "
                "--save_folder_name"
            ) from None
        yield


def begin(folder, config, *, kind, victim=None, data=None):
    """Claim `folder` for a run of `config`: True where there is work to do, False where it is done.

    `victim` is the checksum of the weights that a defense repairs, `data` what record.json says
    about the data set of an attack. An interrupted run with the same options, victim and data is
    resumed. Raises ConfigError (exit 2) where another run lies there, and RefusedError (exit 4)
    where a damaged one does. With config.overwrite both are replaced, but only when the new run is
    complete.
    """
    _refuse_links(folder, kind)
    state, finished = folder / STATE, folder / FINISHED
    shutil.rmtree(finished, ignore_errors=True)
    if (state / RECORD).exists():  # cut off in its very last step
        _commit(folder)
    if (folder / RECORD).exists() and not (state / OPTIONS).exists():
        shutil.rmtree(state, ignore_errors=True)  # left by a run that was killed when it was done
    begun = {"victim": victim, "data": data}
    resumable = _same(read_options(state), config) and _same_input(_begun(state), begun)
    if not config.overwrite and (folder / RECORD).exists():
        info = verify(folder, kind)
        there = {"victim": info.get("victim_sha256"), "data": info.get("data")}
        if _same(read_options(folder), config) and _same_input(there, begun):
            _say_origin(folder, info.get("origin"), config, "the result there")
            return False
        if not resumable:
            _refuse_other(read_options(folder), config, folder)
            _refuse_other_data(there, begun, folder)
            raise ConfigError(
                f"{folder} repaired another victim than the one there now; --overwrite repairs "
                "this one"
            )
    elif not config.overwrite and _has_progress(state):
        _refuse_other(read_options(state), config, folder)
        _refuse_other_data(_begun(state), begun, folder)
    elif not config.overwrite and folder.is_dir() and _has_other_files(folder):
        raise RefusedError(
            f"{folder} holds files but no complete run; --overwrite starts again, "
            "--save_folder_name chooses another folder"
        )
    if resumable and _has_progress(state):
        _say_origin(folder, _begun(state).get("origin"), config, "the interrupted run there")
    if not resumable:
        shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True, exist_ok=True)
    files.write_json(state / BEGUN, {**begun, "origin": origin(config)})
    files.write_yaml(state / OPTIONS, config.plain())
    return True


def finish(folder, contents, info, *, kind):
    """Put a complete run in place; `contents` is {file name: bytes or str}, `info` its facts.

    Everything is written to state/ first, where a full disk does no harm; the rest is renaming.
    """
    state = folder / STATE
    for name, content in contents.items():
        files.write(state / name, content)
    sums = {name: files.sha256(state / name) for name in [*contents, OPTIONS, LOG]}
    info = {"format": FORMAT, "kind": kind, **info, "origin": _begun(state).get("origin")}
    files.write_json(state / RECORD, {**info, "files": sums})
    _commit(folder)


def own_files(state):
    """{name: bytes} of the files that a defense has added to its record."""
    return {path.name: path.read_bytes() for path in sorted((state / OWN).glob("[!.]*"))}


def verify(folder, kind):
    """What record.json says, after every file that it names was compared with its checksum.

    Raises RefusedError (exit 4), which says what is wrong.
    """
    info = _read_record(folder)
    if info["format"] != FORMAT:
        raise RefusedError(
            f"the record {folder} has format {str(info['format'])[:20]}; this version of Antidote "
            f"reads format {FORMAT}"
        )
    if info.get("kind") != kind:
        raise RefusedError(
            f"{folder} is not the record of an {kind} but of a {str(info.get('kind'))[:20]}"
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
    limit = LARGEST if path.suffix == ".safetensors" else LARGEST_TEXT
    if path.stat().st_size > limit:
        return f"is larger than {limit >> 20} MiB"
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
    os.replace(state, folder / FINISHED)  # at once: a killed clean-up leaves no state/ behind
    shutil.rmtree(folder / FINISHED)


def _listed(folder):
    """The names of the files that record.json lists; none where it cannot be read."""
    try:
        return {Path(name).name for name in json.loads((folder / RECORD).read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _has_other_files(folder):
    return any(path.name not in (DEFENSES, STATE, FINISHED) for path in folder.iterdir())


def _has_progress(state):
    """Whether an interrupted run has a checkpoint, which could be lost."""
    return any(state.rglob("*.safetensors"))


def _begun(state):
    """What an interrupted run works on; {} where nothing says it."""
    try:
        begun = json.loads((state / BEGUN).read_text())
    except (OSError, ValueError):
        return {}
    return begun if isinstance(begun, dict) else {}


def _same_input(there, here):
    """Whether two runs work on the same victim or the same data, as far as both say it."""
    return there.get("victim") == here["victim"] and not _differences(there, here)


def _differences(there, here):
    """Words for what differs between the data of two runs."""
    there, here = (run.get("data") or {} for run in (there, here))
    keys = [key for key in here if key in there and there[key] != here[key]]
    counts = [f"{key} {there[key]} there and {here[key]} here" for key in keys if key in COUNTS]
    return counts or ["other images or labels"] * bool(keys)


def _refuse_other_data(there, here, folder):
    if difference := _differences(there, here):
        raise ConfigError(
            f"{folder} holds a run on other data ({', '.join(difference)}); --overwrite starts "
            "again, --save_folder_name chooses another folder"
        )


def origin(config):
    """A mark of those who share the cache folder: a digest of a random number kept there."""
    path = Path(config.cache_path) / "origin"
    if not path.exists():
        files.write_once(path, secrets.token_hex(32))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _say_origin(folder, made_by, config, what):
    if made_by != origin(config):
        print(
            f"warning: {what} was not made with the cache folder {config.cache_path}: if "
            f"{folder} comes from others, --overwrite makes it again",
            file=sys.stderr,
        )


def _refuse_links(folder, kind):
    """Nothing is written through a link that lies in a record, which may come from others."""
    inside = [folder / STATE, folder / FINISHED]
    if kind == "defense":
        inside += [folder, folder.parent, folder.parent / SHARED]
    for path in inside:
        if path.is_symlink():
            raise RefusedError(f"{path} is a link, through which nothing is written: remove it")


def _same(saved, config):
    return _identity(saved, config) == config.identity()


def _identity(saved, config):
    """The options in a config.yaml that make up the experiment.

    An option that did not exist yet when it was written has its default, or what it declares.
    """
    fields = dataclasses.fields(config) if saved else ()
    absent = {field.name: field.metadata.get("absent", field.default) for field in fields}
    return config.identity_of({**absent, **saved})


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
