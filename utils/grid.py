"""The runs of a grid, attacks x defenses x data sets x seeds: each is exactly the command that a user would type."""

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
from utils import config, sources
from utils.errors import ConfigError, MissingError

AXES = ("dataset", "model", "pratio", "seed", "attack", "defense")
OPTIONS = ("attack_options", "defense_options")
STATES = ("new", "partial", "failed", "other", "recorded", "done")
LONGEST = 120  # characters of a folder's name
LOGS = ".sweep"  # folder of the logs, below that of the records


@dataclass(frozen=True)
class Cell:
    """One run of `attack/<script>.py` or `defense/<script>.py` with `options`; `victim` is the run that a defense repairs."""

    kind: str
    script: str
    options: dict
    name: str
    victim: "Cell | None" = None

    @property
    def path(self):
        """Of the run's folder, below that of the records."""
        return Path(self.victim.name, "defense", self.name) if self.victim else Path(self.name)

    @property
    def log(self):
        """Of what the script prints, below the folder of the records."""
        return Path(LOGS, f"{'/'.join([self.victim.name, self.name]) if self.victim else self.name}.log")

    def words(self, record_path):
        """The command after `python`: the script and its options."""
        given = {key: value for key, value in self.options.items() if value is not None}  # null stands for the default
        places = {"record_path": record_path, "save_folder_name": self.name, **({"result_file": self.victim.name} if self.victim else {})}
        return [f"{self.kind}/{self.script}.py", *config.words({**given, **places})]

    def command(self, record_path):
        """The same as one types it."""
        return shlex.join(["python", *self.words(record_path)])


def read(path):
    """The grid in a YAML file; MissingError (exit 3) where there is none, ConfigError (exit 2) where it is not a grid."""
    try:
        grid = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError as error:
        raise MissingError(f"there is no grid {path}: config/sweep holds some") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the grid {path} cannot be read: {' '.join(str(error).split())}") from error
    _check(grid, path, {*AXES, *OPTIONS, "include", "exclude"})
    for part in _listed(grid.get("include")):
        _check(part, f"{path}, include", {*AXES, *OPTIONS})
    return grid


def cells(grid, extra=None):
    """Every run of a grid once, each victim before its defenses. `extra` are options of all of them that no name shows.

    `include` adds grids, which take from the whole grid what they do not say; a run that fits an entry of `exclude` is left out, and
    the defenses of a victim that is left out with it.
    """
    excludes, found = _listed(grid.get("exclude")), {}
    used = set()
    for part in [{}, *_listed(grid.get("include"))]:
        for cell in _product({**grid, **part}, extra or {}):
            hits = [number for number, entry in enumerate(excludes) if _fits(cell, entry)]
            used.update(hits)
            if not hits and (cell.victim is None or cell.victim.path in found):
                found.setdefault(cell.path, cell)
    for number, entry in enumerate(excludes):
        if number not in used:
            raise ConfigError(f"exclude {entry} fits no run of the grid: correct or delete it")
    if not found:
        raise ConfigError("the grid has no run: name at least one attack")
    return sorted(found.values(), key=lambda cell: (cell.victim or cell).options["random_seed"])  # all of the first seed come first


def check(found, record_path):
    """ConfigError where a script, or an option of one, does not exist or is out of range, before anything runs.

    A run is looked at where it has a value of an option that no run of its script before had.
    """
    seen = set()
    for cell in found:
        told = {(cell.kind, cell.script, key, repr(value)) for key, value in cell.options.items() if key not in config.SEEDS}
        if told <= seen and (cell.kind, cell.script) in seen:
            continue
        seen |= told | {(cell.kind, cell.script)}
        names = sorted(path.stem for path in (config.ROOT / cell.kind).glob("[a-z]*.py"))
        if cell.script not in names:
            raise ConfigError(f"unknown {cell.kind} {cell.script!r}; there are {', '.join(names)}")
        try:
            options = config.parse(importlib.import_module(f"{cell.kind}.{cell.script}").Config, cell.words(record_path)[1:])
            if cell.kind == "attack":
                models.check(options.model, options.width)
                sources.check(options.dataset)
        except ConfigError as error:
            raise ConfigError(f"{error} (in {cell.command(record_path)})") from error


def state(cell, record_path):
    """new, partial (it was interrupted and will go on), failed, done, or other: a run with other options lies there."""
    folder, log = record_path / cell.path, record_path / cell.log
    if (folder / "record.json").exists():
        return "done" if _is_this(cell, folder, record_path) else "other"
    code = ending(log)
    if code not in (None, 0, 130, 143):
        return "failed"
    return "partial" if (folder / "state").exists() else "new"


def ending(log):
    """The exit code that the last run in a log ended with; None where it did not end by itself."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    found = re.fullmatch(r"# exit (-?\d+) .*", lines[-1]) if lines else None
    return int(found[1]) if found else None


def _is_this(cell, folder, record_path):
    """Whether the complete run in `folder` has the options of the cell and, for a defense, repaired the victim that is there now."""
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        same = all(str(saved[key]) == str(value) for key, value in cell.options.items() if key in saved and key not in config.NOT_IDENTITY)
        if cell.victim is None:
            return same
        made, victim = (json.loads((place / "record.json").read_text()) for place in (folder, record_path / cell.victim.path))
        return same and made["victim_sha256"] == victim["files"]["model.safetensors"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False  # the script says what is wrong with it


def _check(part, where, known):
    if not isinstance(part, dict):
        raise ConfigError(f"{where} must be a mapping with keys among {', '.join(sorted(known))}")
    if wrong := sorted(map(str, part.keys() - known)):
        raise ConfigError(f"{where} has an unknown key {wrong[0]!r}; there are {', '.join(sorted(known))}")
    for key in OPTIONS:
        if not isinstance(part.get(key) or {}, dict):
            raise ConfigError(f"{where}: {key} must be a mapping of options")


def _product(grid, extra):
    """The cells of one grid, those of `include` and `exclude` apart."""
    axes = [list(_entries(grid, axis)) for axis in ("dataset", "model", "pratio", "attack")]
    for dataset, model, pratio, attack in itertools.product(*axes):
        named = {axis: value for axis, (value, _) in zip(AXES, (dataset, model, pratio), strict=False) if value is not None}
        for common, seed in itertools.product(_variants(grid.get("attack_options")), _listed(grid.get("seed", 0))):
            options = {**named, **common, **dataset[1], **model[1], **attack[1]}
            shown = [options.get("dataset"), options.get("model"), attack[0], *_others(options), _share(options), f"s{seed}"]
            seeds = {"random_seed": seed, "poison_seed": seed}
            if attack[0] is None:
                continue
            victim = Cell("attack", str(attack[0]), {**options, **seeds, **options, **extra}, _name(shown))  # seeds last, but weaker
            yield victim
            yield from _defenses(grid, victim, seed, extra)


def _defenses(grid, victim, seed, extra):
    for (name, own), common in itertools.product(_entries(grid, "defense"), _variants(grid.get("defense_options"))):
        options = {**common, **own}
        if name is not None:
            seeds = {"random_seed": seed, "data_seed": seed}
            yield Cell("defense", str(name), {**options, **seeds, **options, **extra}, _name([name, *_others(options)]), victim)


def _entries(grid, axis):
    """(name, options) of each entry of an axis, `name` or `name: {option: value}`; (None, {}) where the axis is not given."""
    for entry in _listed(grid.get(axis)) or [None]:
        if isinstance(entry, dict):
            if len(entry) != 1 or not isinstance(options := next(iter(entry.values())) or {}, dict):
                raise ConfigError(f"an entry of {axis} must be a name or `name: {{option: value}}`, and this is {entry}")
            yield from ((next(iter(entry)), variant) for variant in _variants(options))
        else:
            yield entry, {}


def _variants(options):
    """Every choice of one value for each option: a list offers several."""
    options = options or {}
    for values in itertools.product(*map(_listed, options.values())):
        yield dict(zip(options, values, strict=True))


def _listed(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def _fits(cell, entry):
    """Whether a run has all the values (one of each list) that an entry of `exclude` names."""
    if not isinstance(entry, dict) or not entry:
        raise ConfigError(f"an entry of exclude must be a mapping such as {{attack: sig, dataset: digits}}, and this is {entry}")
    victim = cell.victim or cell
    facts = {**victim.options, "attack": victim.script, "seed": victim.options["random_seed"]}
    if cell.victim:
        facts |= {key: value for key, value in cell.options.items() if key not in config.SEEDS} | {"defense": cell.script}
    return all(key in facts and facts[key] in _listed(value) for key, value in entry.items())


def _others(options):
    """Words for the options that have no place of their own in a name."""
    return [f"{key}_{value}" for key, value in sorted(options.items()) if key not in ("dataset", "model", "pratio") and value is not None]


def _share(options):
    return f"p{options['pratio']}" if "pratio" in options else None


def _name(parts):
    """A folder's name that follows from the run alone: a grid that grows finds its runs again."""
    text = "-".join(str(part) for part in parts if part is not None)
    plain = re.sub(r"[^\w.+-]+", "_", text)
    if plain == text and len(text) <= LONGEST:
        return text
    return f"{plain[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
