"""The runs of a grid, attacks x defenses and detectors x data sets x seeds, each a command that you
can type."""

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from antidote_bench import models
from antidote_bench.utils import config, files, parsing
from antidote_bench.utils.data import facts, sources, target
from antidote_bench.utils.errors import ConfigError, MissingError, UserError
from antidote_bench.utils.record import claim, folder
from antidote_bench.utils.record.folder import DONE, NEW, PARTIAL
from antidote_bench.utils.sweep.launchers import INTERRUPTED, last_exit_code
from antidote_bench.utils.text import cut

ON_VICTIMS = {
    "defense": folder.DEFENSES,
    "detection": folder.DETECTIONS,
}  # kinds, and their folders
AXES = ("dataset", "model", "pratio", "seed", "attack", *ON_VICTIMS)
OPTIONS = ("attack_options", *(f"{kind}_options" for kind in ON_VICTIMS))
FAILED, OTHER, RECORDED = "failed", "other", "recorded"  # states beside those of a run's folder
STATES = (NEW, PARTIAL, FAILED, OTHER, RECORDED, DONE)
LONGEST = 120  # characters of a folder's name
LOGS = ".sweep"  # folder of the logs, below that of the records
CHOSEN = {  # options that a sweep gives to its runs itself
    "record_path": "is the sweep's own: give it to sweep.py, before --",
    "save_folder_name": "is the sweep's own: it names the folder of a run after its options",
    "result_file": "is the sweep's own: the victims of the grid are what is repaired or judged",
}
# facts about a victim, beside its seeds, that change no default of a defense
ONLY_VICTIMS = {"pratio", "attack_target", "label_mode", "source_class"}
CLASSES = "attack_target", "source_class"  # options that may name a class


@dataclass(frozen=True)
class Cell:
    """One run of `attack/<script>.py`, `defense/<script>.py` or `detection/<script>.py` with
    `options`.

    `victim` is the run that a defense repairs or a detector judges, None for an attack.
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
        return Path(self.victim.name, ON_VICTIMS[self.kind], self.name)

    @property
    def log(self):
        """The file for what the script prints, below the folder of the records."""
        # a detector may be called like a defense
        kind = [self.kind] if self.kind == "detection" else []
        parts = [self.victim.name, *kind, self.name] if self.victim else [self.name]
        return Path(LOGS, f"{'/'.join(parts)}.log")

    def words(self, record_path):
        """The command after `python`: the script and its options; null stands for the default."""
        given = {key: value for key, value in self.options.items() if value is not None}
        places = {
            "record_path": record_path,
            "save_folder_name": self.name,
            **({"result_file": self.victim.name} if self.victim else {}),
        }
        own = str(self.victim.options.get("model")) if self.victim else ""
        if models.is_file(own):  # the grid names the file, and so may its defenses
            places["model_file"] = own
        return [f"{self.kind}/{self.script}.py", *parsing.words({**given, **places})]

    def command(self, record_path):
        """The command as you type it."""
        script, *words = self.words(record_path)
        return shlex.join([*parsing.start(script), *words])


# ---------- the runs of a grid ----------


class _Loader(files.YAML_LOADER):
    """Reads 00014, the name of a class say, as the options do: as 14, and not to the base 8."""

    def construct_yaml_int(self, node):
        digits = self.construct_scalar(node)
        decimal = digits.isascii() and digits.isdecimal()
        return int(digits) if decimal else super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read(path):
    """The grid in a YAML file.

    Raises MissingError (exit 3) if there is no such file, and ConfigError (exit 2) if it holds no
    grid.
    """
    try:
        grid = files.read_yaml(path, _Loader)
    except FileNotFoundError as error:
        raise MissingError(f"there is no grid {path}: config/sweep holds some") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"the grid {path} cannot be read: {cut(error, 200)}") from error
    _check_keys(grid, path, {*AXES, *OPTIONS, "include", "exclude"})
    for part in _as_list(grid.get("include")):
        _check_keys(part, f"{path}, include", {*AXES, *OPTIONS})
    return grid


def cells(grid, extra=None):
    """Every run of a grid once, each victim before what works on it, and all of the first seed
    first.

    `extra` are options of all runs, which no name shows. `include` adds grids, which take from the
    whole grid what they do not say. A run that fits an entry of `exclude` is left out, and with a
    victim what works on it.
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
    names = config.scripts(cell.kind)
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
            _check_target(options)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {cell.command(record_path)})") from error


def _check_target(options):
    """ConfigError if an attack names a class that the data set has not; where the data set is not
    there yet, the attack says so."""
    wanted = {option: getattr(options, option) for option in CLASSES}
    named = {option: value for option, value in wanted.items() if isinstance(value, str)}
    if named:
        with contextlib.suppress(MissingError):
            names = sources.class_names(options.dataset, options.dataset_path)
            for option, value in named.items():
                target.class_number(value, names, options.dataset, option)


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
            for kind in ON_VICTIMS:
                yield from _on_victim(kind, grid, victim, seed, extra)


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


def _on_victim(kind, grid, victim, seed, extra):
    """The runs of all defenses or detectors on a victim."""
    entries = _entries(grid, kind)
    common_options = _variants(grid.get(f"{kind}_options"))
    for (name, own), common in itertools.product(entries, common_options):
        if name is not None:
            options = {**common, **own}
            seeds = {"random_seed": seed, "data_seed": seed}
            options_of_run = _with_seeds(options, seeds, extra)
            yield Cell(kind, str(name), options_of_run, _name([name, *_others(options)]), victim)


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
        facts[cell.kind] = cell.script
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


def fingerprints(runs, record_path):
    """{path of an attack: the fingerprint of the data set that its command names}, without those
    that nothing tells: nothing is decoded for it."""
    reader, found = _Reader(record_path), {}
    for cell in runs:
        options = reader.parsed(cell) if cell.kind == "attack" else {}
        if options.get("dataset", "digits") != "digits":
            names = ("dataset", "dataset_path", "image_size", "cache_path")
            found[cell.path] = reader.data(*(options[name] for name in names)).get("fingerprint")
    return {path: prints for path, prints in found.items() if prints}


def _state(cell, reader):
    of_folder = folder.state_of(reader.record_path / cell.path)
    if of_folder == DONE:
        return DONE if _is_this(cell, reader) else OTHER
    code = last_exit_code(reader.record_path / cell.log)
    return FAILED if code not in (None, 0, *INTERRUPTED) else of_folder


def _is_this(cell, reader):
    """Whether the complete run in a cell's folder is the one that its command makes.

    It must be on the data set that the command names, and a defense must have repaired the victim
    that is there now.
    """
    place = reader.record_path / cell.path
    try:
        run, victim = reader.record(place), reader.record(reader.place_of_victim(cell))
        options = reader.parsed(cell)
        for option in CLASSES:
            if isinstance(options.get(option), str):
                names = victim["data"]["class_names"]
                number = target.class_number(options[option], names, options["dataset"], option)
                options = {**options, option: number}
        if not _same(reader.saved(place), options, _config_of(cell)):
            return False
        if _is_on_other_data(cell, options, victim, reader):
            return False
        return cell.victim is None or run["victim_sha256"] == victim["files"][folder.WEIGHTS]
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return False  # the script says what is wrong with it


def _is_on_other_data(cell, options, victim, reader):
    """Whether the data set that a command names is not the one of the record `victim`.

    Nothing is decoded for it. Where neither the cache nor the image files tell it, the set is the
    same if it lies where the record says; otherwise it has to be compared, as the script does.
    """
    made, root = reader.saved(reader.place_of_victim(cell)), options["dataset_path"]
    if root is None or made["dataset"] == "digits" or options.get("allow_other_data"):
        return False
    here = reader.data(made["dataset"], root, made["image_size"], options["cache_path"])
    if not here:  # elsewhere, on another machine say, the run was made
        return False
    other = facts.is_other(victim["data"], victim.get("data_listing"), here)
    moved = os.path.realpath(root) != os.path.realpath(made["dataset_path"])
    return moved if other is None else other


def _same(saved, parsed, Config):
    """Whether the options in a config.yaml are, in all that makes up the experiment, those parsed.

    A run has decided what the precision auto is.
    """
    there, here = claim.identity_in(saved, Config), Config.identity_of(parsed)
    if here["precision"] == "auto":
        there["precision"] = "auto"
    return there == here


class _Reader:
    """What is known of runs and data sets: each file is read once, each set of options is parsed
    once, and each data set is listed once."""

    def __init__(self, record_path):
        self.record_path = record_path
        self._saved, self._parsed, self._records, self._data = {}, {}, {}, {}

    def place_of_victim(self, cell):
        """The folder of the attack of a cell, which may be the cell itself."""
        return self.record_path / (cell.victim or cell).path

    def record(self, place):
        """The content of the record.json of a run."""
        if place not in self._records:
            self._records[place] = json.loads((place / folder.RECORD).read_text())
        return self._records[place]

    def data(self, *where):
        """What is known of a data set without decoding it; `where` is what `facts.known` takes."""
        if where not in self._data:
            self._data[where] = facts.known(*where)
        return self._data[where]

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
