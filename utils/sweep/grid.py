"""The runs of a grid, attacks x defenses x data sets x seeds, each a command that you can type."""

import hashlib
import importlib
import itertools
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

import models
from utils import config
from utils.data import sources
from utils.errors import ConfigError, MissingError
from utils.record import folder
from utils.record.folder import DONE, NEW, PARTIAL

AXES = ("dataset", "model", "pratio", "seed", "attack", "defense")
OPTIONS = ("attack_options", "defense_options")
FAILED, OTHER, RECORDED = "failed", "other", "recorded"  # states beside those of a run's folder
STATES = (NEW, PARTIAL, FAILED, OTHER, RECORDED, DONE)
INTERRUPTED = (130, 143)  # exit codes of runs that go on with the same command
LONGEST = 120  # characters of a folder's name
LOGS = ".sweep"  # folder of the logs, below that of the records


@dataclass(frozen=True)
class Cell:
    """One run of `attack/<script>.py` or `defense/<script>.py` with `options`.

    `victim` is the run that a defense repairs, None for an attack.
    """

    kind: str
    script: str
    options: dict
    name: str
    victim: "Cell | None" = None

    @property
    def path(self):
        """The run's folder, below that of the records."""
        if self.victim is None:
            return Path(self.name)
        return Path(self.victim.name, folder.DEFENSES, self.name)

    @property
    def log(self):
        """The file for what the script prints, below the folder of the records."""
        parts = [self.victim.name, self.name] if self.victim else [self.name]
        return Path(LOGS, f"{'/'.join(parts)}.log")

    def words(self, record_path):
        """The command after `python`: the script and its options; null stands for the default."""
        given = {key: value for key, value in self.options.items() if value is not None}
        places = {
            "record_path": record_path,
            "save_folder_name": self.name,
            **({"result_file": self.victim.name} if self.victim else {}),
        }
        return [f"{self.kind}/{self.script}.py", *config.words({**given, **places})]

    def command(self, record_path):
        """The command as you type it."""
        return shlex.join(["python", *self.words(record_path)])


# ---------- the runs of a grid ----------


def read(path):
    """The grid in a YAML file.

    Raises MissingError (exit 3) if there is no such file, and ConfigError (exit 2) if it holds no
    grid.
    """
    try:
        grid = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError as error:
        raise MissingError(f"there is no grid {path}: config/sweep holds some") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"the grid {path} cannot be read: {why}") from error
    _check_keys(grid, path, {*AXES, *OPTIONS, "include", "exclude"})
    for part in _as_list(grid.get("include")):
        _check_keys(part, f"{path}, include", {*AXES, *OPTIONS})
    return grid


def cells(grid, extra=None):
    """Every run of a grid once, each victim before its defenses, and all of the first seed first.

    `extra` are options of all runs, which no name shows. `include` adds grids, which take from the
    whole grid what they do not say. A run that fits an entry of `exclude` is left out, and with a
    victim its defenses.
    """
    excludes = _as_list(grid.get("exclude"))
    used, runs = set(), {}
    for part in [{}, *_as_list(grid.get("include"))]:
        for cell in _product({**grid, **part}, extra or {}):
            fitting = [number for number, entry in enumerate(excludes) if _fits(cell, entry)]
            used.update(fitting)
            if not fitting and (cell.victim is None or cell.victim.path in runs):
                runs.setdefault(cell.path, cell)
    for number, entry in enumerate(excludes):
        if number not in used:
            raise ConfigError(f"exclude {entry} fits no run of the grid: correct or delete it")
    if not runs:
        raise ConfigError("the grid has no run: name at least one attack")
    return sorted(runs.values(), key=lambda cell: (cell.victim or cell).options["random_seed"])


def check(runs, record_path):
    """ConfigError if a script, or an option of one, does not exist or is out of range.

    It comes before anything runs. Only those runs are looked at that have a value of an option
    that no run of the same script before had.
    """
    seen = set()
    for cell in runs:
        facts = {
            (cell.kind, cell.script, key, repr(value))
            for key, value in cell.options.items()
            if key not in config.SEEDS
        }
        facts.add((cell.kind, cell.script))
        if not facts <= seen:
            _check_cell(cell, record_path)
            seen |= facts


def _check_cell(cell, record_path):
    """ConfigError unless the script of a run exists and takes its options."""
    names = sorted(path.stem for path in (config.ROOT / cell.kind).glob("[a-z]*.py"))
    if cell.script not in names:
        raise ConfigError(f"unknown {cell.kind} {cell.script!r}; there are {', '.join(names)}")
    Config = importlib.import_module(f"{cell.kind}.{cell.script}").Config
    try:
        options = config.parse(Config, cell.words(record_path)[1:])
        if cell.kind == "attack":
            models.check(options.model, options.width)
            sources.check(options.dataset)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {cell.command(record_path)})") from error


def _check_keys(part, where, known):
    """ConfigError unless `part` of a grid is a mapping with keys among `known`."""
    names = ", ".join(sorted(known))
    if not isinstance(part, dict):
        raise ConfigError(f"{where} must be a mapping with keys among {names}")
    if unknown := sorted(map(str, part.keys() - known)):
        raise ConfigError(f"{where} has an unknown key {unknown[0]!r}; there are {names}")
    for key in OPTIONS:
        if not isinstance(part.get(key) or {}, dict):
            raise ConfigError(f"{where}: {key} must be a mapping of options")


def _product(grid, extra):
    """The runs of one grid, without those of `include` and `exclude`."""
    axes = [list(_entries(grid, axis)) for axis in ("dataset", "model", "pratio", "attack")]
    choices = itertools.product(
        _variants(grid.get("attack_options")), _as_list(grid.get("seed", 0))
    )
    for (*entries, attack), (common, seed) in itertools.product(
        itertools.product(*axes), list(choices)
    ):
        if attack[0] is not None:
            victim = _victim(entries, attack, common, seed, extra)
            yield victim
            yield from _defenses(grid, victim, seed, extra)


def _victim(entries, attack, common, seed, extra):
    """The run of an attack; `entries` are those of the data set, the model and the ratio."""
    name, own = attack
    options = {
        axis: value for axis, (value, _) in zip(AXES, entries, strict=False) if value is not None
    }
    options |= common
    for _, more in entries:
        options |= more
    options |= own
    shown = [options.get("dataset"), options.get("model"), name, *_others(options)]
    shown += [_ratio(options), f"s{seed}"]
    seeds = {"random_seed": seed, "poison_seed": seed}
    return Cell("attack", str(name), _with_seeds(options, seeds, extra), _name(shown))


def _defenses(grid, victim, seed, extra):
    """The runs of all defenses on a victim."""
    entries = _entries(grid, "defense")
    common_options = _variants(grid.get("defense_options"))
    for (name, own), common in itertools.product(entries, common_options):
        if name is not None:
            options = {**common, **own}
            seeds = {"random_seed": seed, "data_seed": seed}
            options_of_run = _with_seeds(options, seeds, extra)
            yield Cell(
                "defense", str(name), options_of_run, _name([name, *_others(options)]), victim
            )


def _with_seeds(options, seeds, extra):
    """All options of a run; the seeds come last, but an entry's own option is stronger."""
    return {**options, **seeds, **options, **extra}


def _entries(grid, axis):
    """(name, options) of each entry of an axis, `name` or `name: {option: value}`.

    (None, {}) if the axis is not given.
    """
    for entry in _as_list(grid.get(axis)) or [None]:
        if not isinstance(entry, dict):
            yield entry, {}
            continue
        if len(entry) != 1 or not isinstance(options := next(iter(entry.values())) or {}, dict):
            raise ConfigError(
                f"an entry of {axis} must be a name or `name: {{option: value}}`, and this is "
                f"{entry}"
            )
        yield from ((next(iter(entry)), variant) for variant in _variants(options))


def _variants(options):
    """Every choice of one value for each option: a list offers several."""
    options = options or {}
    for values in itertools.product(*map(_as_list, options.values())):
        yield dict(zip(options, values, strict=True))


def _as_list(value):
    """A value of YAML as a list; null is the empty list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _fits(cell, entry):
    """Whether a run has all the values (one of each list) that an entry of `exclude` names."""
    if not isinstance(entry, dict) or not entry:
        raise ConfigError(
            "an entry of exclude must be a mapping such as {attack: sig, dataset: digits}, and "
            f"this is {entry}"
        )
    victim = cell.victim or cell
    facts = {**victim.options, "attack": victim.script, "seed": victim.options["random_seed"]}
    if cell.victim:
        facts |= {key: value for key, value in cell.options.items() if key not in config.SEEDS}
        facts["defense"] = cell.script
    return all(key in facts and facts[key] in _as_list(value) for key, value in entry.items())


# ---------- the name of a run ----------


def _name(parts):
    """A folder's name that follows from the run alone: a grid that grows finds its runs again."""
    text = "-".join(str(part) for part in parts if part is not None)
    plain = re.sub(r"[^\w.+-]+", "_", text)
    if plain == text and len(text) <= LONGEST:
        return text
    return f"{plain[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _others(options):
    """Words for the options that have no place of their own in a name."""
    return [
        f"{key}_{value}"
        for key, value in sorted(options.items())
        if key not in ("dataset", "model", "pratio") and value is not None
    ]


def _ratio(options):
    """The word for the poison ratio in a name."""
    return f"p{options['pratio']}" if "pratio" in options else None


# ---------- the state of a run ----------


def state(cell, record_path):
    """One of STATES but RECORDED, which only a table of results can say."""
    place = record_path / cell.path
    of_folder = folder.state(place)
    if of_folder == DONE:
        return DONE if _is_this(cell, place, record_path) else OTHER
    code = last_exit_code(record_path / cell.log)
    return FAILED if code not in (None, 0, *INTERRUPTED) else of_folder


def last_exit_code(log):
    """The exit code that the last run in a log ended with; None if it did not end by itself."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    ending = re.fullmatch(r"# exit (-?\d+) .*", lines[-1]) if lines else None
    return int(ending[1]) if ending else None


def _is_this(cell, place, record_path):
    """Whether the complete run in `place` has the options of the cell.

    A defense must also have repaired the victim that is there now.
    """
    try:
        saved = yaml.safe_load((place / folder.OPTIONS).read_text())
        compared = [key for key in cell.options if key in saved and key not in config.NOT_IDENTITY]
        same = all(str(saved[key]) == str(cell.options[key]) for key in compared)
        if cell.victim is None:
            return same
        repair, victim = (
            json.loads((each / folder.RECORD).read_text())
            for each in (place, record_path / cell.victim.path)
        )
        return same and repair["victim_sha256"] == victim["files"][folder.WEIGHTS]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False  # the script says what is wrong with it
