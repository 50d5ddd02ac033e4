"""The runs of a grid, attacks x defenses x data sets x seeds, each a command that you can type."""

import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

from antidote_bench import models
from antidote_bench.utils import config, parsing
from antidote_bench.utils.data import sources
from antidote_bench.utils.errors import ConfigError, MissingError, UserError
from antidote_bench.utils.record import claim, folder
from antidote_bench.utils.record.folder import DONE, NEW, PARTIAL
from antidote_bench.utils.sweep.launchers import INTERRUPTED, last_exit_code

AXES = ("dataset", "model", "pratio", "seed", "attack", "defense")
OPTIONS = ("attack_options", "defense_options")
FAILED, OTHER, RECORDED = "failed", "other", "recorded"  # states beside those of a run's folder
STATES = (NEW, PARTIAL, FAILED, OTHER, RECORDED, DONE)
LONGEST = 120  # characters of a folder's name
LOGS = ".sweep"  # folder of the logs, below that of the records
CHOSEN = {  # options that a sweep gives to its runs itself
    "record_path": "is the sweep's own: give it to sweep.py, before --",
    "save_folder_name": "is the sweep's own: it names the folder of a run after its options",
    "result_file": "is the sweep's own: a defense repairs the victims of the grid",
}
# facts about a victim, beside its seeds, that change no default of a defense
ONLY_VICTIMS = {"pratio", "attack_target", "label_mode"}


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
        return [f"{self.kind}/{self.script}.py", *parsing.words({**given, **places})]

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
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
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
    return sorted(runs.values(), key=_seed_of)


def _seed_of(cell):
    """The seed that a run belongs to; what is no number comes last, and `check` refuses it."""
    seed = _number((cell.victim or cell).options["random_seed"])
    return seed if isinstance(seed, float) else math.inf


def check(runs, record_path):
    """ConfigError if a script, or an option of one, does not exist or is out of range.

    It comes before anything runs. Only those runs are looked at that have a value of an option
    that no run of the same script before had; seeds are looked at unless they are plain numbers.
    """
    seen = set()
    for cell in runs:
        facts = {
            (cell.kind, cell.script, key, repr(value))
            for key, value in cell.options.items()
            if not (key in config.SEEDS and type(value) is int and value >= 0)
        }
        facts |= {(cell.kind, cell.script, key) for key in ("", *cell.options)}
        if not facts <= seen:
            _check_cell(cell, record_path)
            seen |= facts


def _check_cell(cell, record_path):
    """ConfigError unless the script of a run exists and takes its options."""
    names = sorted(path.stem for path in (config.ROOT / cell.kind).glob("[a-z]*.py"))
    if cell.script not in names:
        raise ConfigError(f"unknown {cell.kind} {cell.script!r}; there are {', '.join(names)}")
    for name, why in CHOSEN.items():
        if name in cell.options:
            raise ConfigError(f"the option {name} {why}")
    Config = _config_of(cell)
    try:
        options = parsing.parse(Config, cell.words(record_path)[1:])
        if cell.kind == "attack":
            models.check(options.model, options.width)
            sources.check(options.dataset)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {cell.command(record_path)})") from error


def _config_of(cell):
    """The class of a script's options."""
    return importlib.import_module(f"antidote_bench.{cell.kind}.{cell.script}").Config


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
    for name in options:
        if not isinstance(name, str):
            raise ConfigError(f"the name of an option must be text, and this is {name!r}: quote it")
    choices = [[None] if value is None else _as_list(value) for value in options.values()]
    for values in itertools.product(*choices):
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
    return all(
        key in facts and _number(facts[key]) in map(_number, _as_list(value))
        for key, value in entry.items()
    )


def _number(value):
    """The number that a value of YAML is or spells (1e-2 is text there), else the value."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


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


def states(runs, record_path):
    """{path of a run: its state}, one of STATES but RECORDED, which only a table can say."""
    reader = _Reader(record_path)
    return {cell.path: _state(cell, reader) for cell in runs}


def _state(cell, reader):
    of_folder = folder.state_of(reader.record_path / cell.path)
    if of_folder == DONE:
        return DONE if _is_this(cell, reader) else OTHER
    code = last_exit_code(reader.record_path / cell.log)
    return FAILED if code not in (None, 0, *INTERRUPTED) else of_folder


def _is_this(cell, reader):
    """Whether the complete run in a cell's folder is the one that its command makes.

    A defense must also have repaired the victim that is there now.
    """
    place = reader.record_path / cell.path
    try:
        if not _same(reader.saved(place), reader.parsed(cell), _config_of(cell)):
            return False
        if cell.victim is None:
            return True
        repair, victim = (
            json.loads((each / folder.RECORD).read_text())
            for each in (place, reader.record_path / cell.victim.path)
        )
        return repair["victim_sha256"] == victim["files"][folder.WEIGHTS]
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return False  # the script says what is wrong with it


def _same(saved, parsed, Config):
    """Whether the options in a config.yaml are, in all that makes up the experiment, those parsed.

    A run has decided what the precision auto is.
    """
    there, here = claim.identity_in(saved, Config), Config.identity_of(parsed)
    if here["precision"] == "auto":
        there["precision"] = "auto"
    return there == here


class _Reader:
    """The options of runs: each config.yaml is read once, each set of options is parsed once."""

    def __init__(self, record_path):
        self.record_path = record_path
        self._saved, self._parsed = {}, {}

    def saved(self, place):
        """The options in the config.yaml of a run."""
        if place not in self._saved:
            self._saved[place] = folder.read_options(place)
        return self._saved[place]

    def parsed(self, cell):
        """All options of a cell's command, those of the grid and the defaults.

        Seeds change no default: they are put in afterwards, and runs that differ in nothing else
        are parsed once. The defaults of a defense depend on how its victim was trained.
        """
        seeds = {
            key: value
            for key, value in cell.options.items()
            if key in config.SEEDS and type(value) is int
        }
        others = {key: value for key, value in cell.options.items() if key not in seeds}
        key = (cell.kind, cell.script, repr(sorted(others.items())), self._training_of(cell.victim))
        if key not in self._parsed:
            words = dataclasses.replace(cell, options=others).words(self.record_path)
            self._parsed[key] = parsing.parse(_config_of(cell), words[1:]).plain()
        return {**self._parsed[key], **seeds}

    def _training_of(self, victim):
        """The options of a victim, as text, on which defaults of its defenses may depend."""
        if victim is None:
            return ""
        saved = self.saved(self.record_path / victim.path)
        names = {field.name for field in dataclasses.fields(config.Attack)}
        names -= {*config.NOT_IDENTITY, *config.SEEDS, *ONLY_VICTIMS}
        return repr({name: saved.get(name) for name in sorted(names)})
