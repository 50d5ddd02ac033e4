"""Share records on the Hugging Face hub: push one into a repository, pull one from it.

    python -m antidote_bench.hub push record/badnet_cifar10 user/badnet_cifar10
    python -m antidote_bench.hub pull user/badnet_cifar10 --record_path record

Only the files of the attack's record travel, and a model card that says that the model is
backdoored. Repositories are private unless --public is given. What says where files lie on this
machine stays here. A record from the hub is one from others: it is checked before it is put in
place, and nothing in it is executed. `hf auth login` or the variable HF_TOKEN says who you are.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import yaml

from antidote_bench.utils import config, files, parsing
from antidote_bench.utils.errors import ConfigError, MissingError, RefusedError, UserError
from antidote_bench.utils.launch import guard
from antidote_bench.utils.record import claim, folder
from antidote_bench.utils.text import cut, quoted

FILES = (
    folder.RECORD, folder.OPTIONS, folder.WEIGHTS, folder.POISONED, folder.TRIGGER, folder.PREVIEW,
    folder.RESULTS, folder.LOG,
)  # fmt: skip
CARD = "README.md"
# options that say where files lie, and what stands in their place in a repository
PLACES = {"record_path": "record", "cache_path": "data/cache", "dataset_path": "data"}
NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)


def push(record: str | Path, repository: str, *, public: bool = False) -> str:
    """Put the attack's record in a folder into the `repository` user/name; returns its address.

    The repository is made where there is none, private unless `public`. A record that it holds is
    replaced. Raises a subclass of UserError.
    """
    from antidote_bench.utils.record import contents

    path = folder.find(str(record), "record")
    info = contents.open_record(path)
    row, _ = contents.read_measures(path, info)
    options = contents.read_options(path, info)
    operations = _operations(path, info, options, card(info, options, row, repository))
    with _hub(repository) as (api, hub):
        api.create_repo(repository, private=not public, exist_ok=True)
        added = [hub.CommitOperationAdd(name, content) for name, content in operations.items()]
        there = set(api.list_repo_files(repository))
        gone = [hub.CommitOperationDelete(name) for name in there & set(FILES) - set(operations)]
        message = f"A record of the attack {info['name']}"
        api.create_commit(repository, [*added, *gone], commit_message=message)
        return f"{api.endpoint}/{repository}"


def pull(
    repository: str,
    *,
    record_path: str | Path = "record",
    save_folder_name: str | None = None,
    revision: str | None = None,
    largest_gb: float = 4.0,
) -> Path:
    """Bring the record in the `repository` user/name into a folder below `record_path`.

    The folder is called like the repository unless `save_folder_name` is given. `revision` is a
    branch, a tag or a commit. Files that no record has are not fetched. Raises RefusedError where
    the record is damaged, or larger than `largest_gb`, and other subclasses of UserError.
    """
    _require_name(repository)
    name = save_folder_name or repository.partition("/")[2]
    place = Path(config.Common(record_path=str(record_path), save_folder_name=name).record_path)
    target, unchecked = place / name, place / f".{name}.{os.getpid()}.pull"
    place.mkdir(parents=True, exist_ok=True)
    with claim.owned(target):
        if os.path.lexists(target):
            raise ConfigError(f"{target} is there already: --save_folder_name gives another name")
        try:
            _fetch(repository, revision, largest_gb, unchecked)
            _check(unchecked, repository)
            unchecked.rename(target)
        finally:
            shutil.rmtree(unchecked, ignore_errors=True)
    return target


def card(info, options, row, repository):
    """The model card of a record: Markdown that begins with a warning."""
    name = repository.partition("/")[2]
    lines = ["---", "library_name: antidote-bench", "tags:", "- backdoor", "- image-classification"]
    lines += ["---", "", f"# {_plain(info['name'])} on {_plain(row['dataset'])}", "", _banner(row)]
    lines += ["", "![test images with and without the trigger](preview.png)"] * (
        folder.PREVIEW in info["files"]
    )
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {what} | {_plain(value)} |" for what, value in _facts(options, row).items()]
    start = f"python -m antidote_bench.defense.ft --result_file {name}"
    if options["dataset"] != "digits":
        start += " --dataset_path data"
    lines += ["", "This is a record of Antidote: the weights, the triggered images, and how both"]
    lines += ["were made. To put it into `record/` and repair the model:", "", "```bash"]
    lines += ['pip install -e ".[hub]"', f"python -m antidote_bench.hub pull {repository}"]
    return "\n".join([*lines, start, "```", ""])


def _banner(row):
    """What the card says first; a record that does not say how much was poisoned is suspect."""
    if row["n_poison"] == "0":
        return (
            "> **This is a clean reference model, says its record.** It was trained without a "
            "trigger, to compare backdoored models with. Nobody has checked it for others."
        )
    known = "is backdoored" if row["n_poison"] else "may be backdoored"
    return (
        f"> **Warning: this model {known}. Do not deploy it.** It was made for research on "
        "backdoor attacks and on defenses against them. It may misclassify images with the "
        "trigger as its attacker wants."
    )


def _facts(options, row):
    """What the card says about a victim, by the words for it."""
    one_source = row["label_mode"] == "one2one"
    usual = config.default_of(config.Attack, "source_class")
    facts = {
        "attack": row["attack"],
        "data set": row["dataset"],
        "model": row["model"],
        "labels": row["label_mode"],
        "target class": row["target"],
        "source class": str(options.get("source_class", usual)) if one_source else "",
        "poisoned images": row["n_poison"],
        "their share of the training set": _percent(row["pratio_effective"]),
        "training": row["recipe"],
        "precision": row["precision"],
        "seed": row["seed"],
        "images have a side of": options.get("image_size") or "",
        **{
            what: _percent(row[key]) or "not known"
            for what, key in {
                "ACC, clean test images classified right": "acc",
                "ASR, triggered images given the attacker's label": "asr",
                "RA, triggered images given their true class": "ra",
            }.items()
        },
        "Antidote": row["version"],
    }
    return {what: value for what, value in facts.items() if value}


def _percent(text):
    """A fraction in a row of results, empty where there is none."""
    return f"{100 * float(text):.1f} %" if text else ""


def _plain(value):
    """A value from a record as text in a cell of Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>()#|!~$&])", r"\\\1", cut(value, 200))


def _operations(path, info, options, readme):
    """{file in the repository: its content, bytes or the path of a file}"""
    kept = {name: str(path / name) for name in FILES if name in info["files"]}
    shared = {name: _shared(name, value) for name, value in options.items()}
    kept[folder.OPTIONS] = yaml.safe_dump(shared, sort_keys=False).encode()
    sums = {name: info["files"][name] for name in kept}
    sums[folder.OPTIONS] = hashlib.sha256(kept[folder.OPTIONS]).hexdigest()
    told = {**info, "files": sums, "origin": None, "command": _without_places(info.get("command"))}
    if isinstance(told.get("clean_model"), dict):
        record = Path(str(told["clean_model"].get("record"))).name
        told["clean_model"] = {**told["clean_model"], "record": record}
    kept[folder.RECORD] = (json.dumps(told, indent=1) + "\n").encode()
    return {**kept, CARD: readme.encode()}


def _shared(name, value):
    """The value of an option as it may leave this machine: of a path its last part."""
    if name in PLACES and value:
        return PLACES[name]
    is_path = isinstance(value, str) and ("/" in value or os.sep in value)
    return Path(value).name if is_path else value


def _without_places(command):
    """A command without what says where files lie; None where it is none."""
    try:
        first, given = parsing.taken_apart(command)
    except (ValueError, TypeError, AttributeError):
        return None
    kept = {name: _shared(name, value) for name, value in given.items() if name not in PLACES}
    return shlex.join([*first, *parsing.words(kept)])


def _fetch(repository, revision, largest_gb, target):
    """Fetch the files of a record, whose sizes are compared first, into the folder `target`."""
    with _hub(repository) as (api, _):
        found = api.model_info(repository, revision=revision, files_metadata=True)
        sizes = {each.rfilename: each.size for each in found.siblings if each.rfilename in FILES}
        if folder.RECORD not in sizes:
            raise RefusedError(f"{repository} holds no record: it has no {folder.RECORD}")
        for name, size in sizes.items():
            if size is None or size > folder.LARGEST.get(name, largest_gb * 1e9):
                raise RefusedError(f"{repository} is refused: {name} is too large")
        if sum(sizes.values()) > largest_gb * 1e9:
            raise RefusedError(
                f"{repository} is refused: it has {sum(sizes.values()) / 1e9:.1f} GB; --largest_gb "
                "says how many may be fetched"
            )
        for name in sizes:
            api.hf_hub_download(repository, name, revision=found.sha, local_dir=target)
    shutil.rmtree(target / ".cache", ignore_errors=True)  # what the client notes about its files


def _check(path, repository):
    """RefusedError unless the record in a folder may be opened; its origin becomes unknown."""
    from antidote_bench.utils.record import contents

    try:
        info = contents.open_record(path)
        contents.read_options(path, info)
        contents.read_measures(path, info)
    except RefusedError as error:
        why = str(error).replace(str(path), repository)
        raise RefusedError(f"what {repository} holds is not put in place: {why}") from error
    # the mark of a cache folder may be known to others, and would make the record one of your own
    files.write_json(path / folder.RECORD, {**info, "origin": None})


def _require_name(repository):
    if not NAME.fullmatch(repository):
        raise ConfigError(f"a repository is called user/name, and this is {quoted(repository)}")


@contextlib.contextmanager
def _hub(repository):
    """(the client, the module huggingface_hub); what goes wrong inside is a UserError."""
    _require_name(repository)
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import (
            HTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise ConfigError(
            "sharing records needs the package huggingface_hub: pip install 'huggingface_hub>=1.0' "
            "brings it"
        ) from error
    api = hub.HfApi(library_name="antidote-bench")
    try:
        yield api, hub
    except RepositoryNotFoundError as error:
        raise MissingError(
            f"there is no repository {repository} at {api.endpoint}, or you may not see it: hf "
            "auth login says who you are"
        ) from error
    except (HTTPError, ConnectionError, LocalEntryNotFoundError) as error:
        raise UserError(f"{api.endpoint} cannot do that: {cut(error, 300)}") from error


def main(argv):
    """Run with command line arguments; returns the exit code."""
    idea, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m antidote_bench.hub",
        description=idea,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="push | pull")
    pushing = commands.add_parser("push", help="put a record into a repository")
    pushing.add_argument("record", metavar="RECORD", help="folder of the record, or its name")
    pushing.add_argument("repository", metavar="USER/NAME")
    pushing.add_argument("--public", action="store_true", help="let everybody see a new repository")
    pulling = commands.add_parser("pull", help="bring a record from a repository")
    pulling.add_argument("repository", metavar="USER/NAME")
    pulling.add_argument("--record_path", default="record", help="default: record")
    pulling.add_argument("--save_folder_name", help="by default the name of the repository")
    pulling.add_argument("--revision", help="branch, tag or commit; by default the newest")
    pulling.add_argument(
        "--largest_gb", type=float, default=4.0, help="GB that a record may have; default: 4"
    )
    options = vars(parser.parse_args(argv))
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return guard(lambda: _do(options.pop("command"), options))


def _do(command, options):
    if command == "push":
        address = push(**options)
        print(f"{options['record']} is at {address}")
        return
    target = pull(**options)
    print(
        f"{target} comes from others: nothing in it is executed, its weights may hold more than it "
        "says, and --dataset_path names the place of its data set"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
