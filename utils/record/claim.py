"""A folder claimed for a run: what may be resumed, what is done, and what is refused.

Imports no torch.
"""

import contextlib
import dataclasses
import hashlib
import json
import secrets
import shutil
import sys
from pathlib import Path

import safetensors

from antidote_bench.utils import files
from antidote_bench.utils.errors import ConfigError, RefusedError
from antidote_bench.utils.record.folder import (
    BEGUN,
    DEFENSES,
    DETECTIONS,
    FINISHED,
    OPTIONS,
    RECORD,
    SHARED,
    STATE,
    TRIGGER,
    commit,
    read_begun,
    read_options,
    verify,
)
from antidote_bench.utils.text import cut

QUICK = 60  # seconds within which a trigger is made again without regret
LONGEST = 60  # characters of a value in a message
COUNTS = ("train", "test", "classes", "size")  # facts about a data set that a message can name


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
        except (FileExistsError, NotADirectoryError) as error:
            raise RefusedError(
                f"{error.filename} is no folder, and the run would lie in it: move it away, or "
                "choose another folder with --record_path"
            ) from error
        yield


def begin(folder, config, *, kind, victim=None, data=None):
    """Claim `folder` for a run of `config`: True where there is work to do, False where it is done.

    `victim` is the checksum of the weights that a defense repairs or a detector judges, `data` what
    record.json says about the data set of an attack. An interrupted run with the same options,
    victim and data is resumed. Raises ConfigError (exit 2) where another run lies there, and
    RefusedError (exit 4) where a damaged one does. With config.overwrite both are replaced, but
    only when the new run is complete.
    """
    _refuse_links(folder, kind)
    state = folder / STATE
    shutil.rmtree(folder / FINISHED, ignore_errors=True)
    if (state / RECORD).exists():  # cut off in its very last step
        commit(folder)
    if (folder / RECORD).exists() and not (state / OPTIONS).exists():
        shutil.rmtree(state, ignore_errors=True)  # left by a run that was killed when it was done
    begun = {"victim": victim, "data": data}
    resumable = _same(read_options(state), config) and _same_input(read_begun(state), begun)
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
                f"{folder} worked on another victim than the one there now; --overwrite works on "
                "this one"
            )
    elif not config.overwrite and _has_progress(state):
        _refuse_other(read_options(state), config, folder)
        _refuse_other_data(read_begun(state), begun, folder)
    elif not config.overwrite and folder.is_dir() and _has_other_files(folder):
        raise RefusedError(
            f"{folder} holds files but no complete run; --overwrite starts again, "
            "--save_folder_name chooses another folder"
        )
    if resumable and _has_progress(state):
        _say_origin(folder, read_begun(state).get("origin"), config, "the interrupted run there")
    if not resumable:
        shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True, exist_ok=True)
    files.write_json(state / BEGUN, {**begun, "origin": origin(config)})
    files.write_yaml(state / OPTIONS, config.plain())
    return True


def _has_other_files(folder):
    own = {DEFENSES, DETECTIONS, STATE, FINISHED}
    return any(path.name not in own for path in folder.iterdir())


def _has_progress(state):
    """Whether an interrupted run has a checkpoint, which could be lost.

    A trigger that was made in no time is none; what waits there to be added to the record is made
    again in any case.
    """
    checkpoints = [path for path in state.glob("*.safetensors") if path.name != TRIGGER]
    return bool(checkpoints) or _seconds_of_trigger(state / TRIGGER) > QUICK


def _seconds_of_trigger(path):
    """How long it took to make the trigger of an interrupted attack; 0 where that is not known."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            seconds = json.loads(file.metadata()["facts"])["trigger_seconds"]
        return seconds if isinstance(seconds, float | int) else 0
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return 0


def _same_input(there, here):
    """Whether two runs work on the same victim or the same data, as far as both say it."""
    return there.get("victim") == here["victim"] and not _differences(there, here)


def _differences(there, here):
    """Words for what differs between the data of two runs."""
    there, here = (run.get("data") for run in (there, here))
    if not isinstance(there, dict) or not isinstance(here, dict):  # one of them does not say it
        return []
    keys = [key for key in here if key in there and there[key] != here[key]]
    counts = [
        f"{key} {cut(there[key], LONGEST)} there and {here[key]} here"
        for key in keys
        if key in COUNTS
    ]
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
    if kind != "attack":
        inside += [folder, folder.parent, folder.parent / SHARED]
    for path in inside:
        if path.is_symlink():
            raise RefusedError(f"{path} is a link, through which nothing is written: remove it")
    for path in (folder / STATE).glob("*.*"):
        if path.is_symlink() or not path.is_file():
            raise RefusedError(
                f"{path} is a link or no file, and a run keeps its state there: remove it"
            )


def _same(saved, config):
    return identity_in(saved, config) == config.identity()


def identity_in(saved, config):
    """The options in a config.yaml that make up the experiment.

    An option that did not exist yet when it was written has its default, or what it declares.
    """
    fields = dataclasses.fields(config) if saved else ()
    absent = {field.name: field.metadata.get("absent", field.default) for field in fields}
    return config.identity_of({**absent, **saved})


def _refuse_other(saved, config, folder):
    there, here = identity_in(saved, config), config.identity()
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if not keys:
        return
    difference = ", ".join(
        f"{key} {cut(there.get(key), LONGEST)} there and {here.get(key)} here" for key in keys
    )
    raise ConfigError(
        f"{folder} holds another configuration ({difference}); --overwrite starts again, "
        "--save_folder_name chooses another folder"
    )
