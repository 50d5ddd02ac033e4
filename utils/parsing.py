"""Options from the command line, YAML files and a victim's record: merged, checked, explained.

Nothing here imports torch, so that `--help` and every mistake in the options answer at once.
"""

import argparse
import dataclasses
import difflib
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import jsonargparse
import yaml

from antidote_bench import models
from antidote_bench.utils import backdoorbench, config
from antidote_bench.utils.config import SWITCHES, OnRecord, declared, idle
from antidote_bench.utils.defaults import (
    FOR_LARGE,
    NULL,
    SMALL,
    VICTIM,
    defaults_for,
    for_large_images,
    read_nodes,
    scalar,
    victim_options,
)
from antidote_bench.utils.errors import ConfigError, RefusedError
from antidote_bench.utils.text import printable, quoted

EXECUTED = ("model", "model_file")  # options that can name a Python file


class Word(NamedTuple):
    """An option as it was written: its name, its text (None: null), and where that was."""

    name: str
    text: str | None
    where: str  # the beginning of a message; empty for a flag


def parse(Config, argv, description="", script=None):
    """The merged options as a `Config`.

    Later ones win: defaults, config/recipe/<recipe>.yaml, config/dataset/<dataset>.yaml, the files
    of --yaml_path, flags. `script` is the path of the script, attack/badnet.py say. Raises
    ConfigError (exit 2) for an unknown option or YAML key, for a value of the wrong type or out of
    range, and for a flag without effect.
    """
    own = Path(script).stem if script else Config.__module__.rpartition(".")[2]
    flags, rest = _flags(Config, own, argv)
    paths = [
        word.text
        for word in flags
        if backdoorbench.ALIASES.get(word.name, word.name) == "yaml_path"
    ]
    flags = [
        word for word in flags if backdoorbench.ALIASES.get(word.name, word.name) != "yaml_path"
    ]
    written = [*(word for path in paths for word in _words_of(Path(path))), *flags]
    found = [_translated(Config, own, word) for word in written]
    _refuse_files(found)
    ignored = [word for word, name in zip(written, found, strict=True) if name is None]
    given = {word.name: word for word in found if word}
    asks_for_help = bool({"-h", "--help"} & set(rest))
    # reading them takes longer than all other parsing
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=asks_for_help)
    parser = _parser(Config, description, script)
    texts = {name: word.text for name, word in given.items()}
    defaults = defaults_for(Config, texts, own)
    if asks_for_help:
        parser.set_defaults({name: value for name, (value, _) in defaults.items()})
        parser.parse_args(["--help"])
    _check_record(Config, given, ignored)
    _warn(ignored)
    if script:
        _say_for_large(for_large_images(Config, texts, own))
    words = {name: _word(name, *default) for name, default in defaults.items()} | given
    # a later one wins, but an earlier one must be right too
    all_words = [*words.values(), *filter(None, found)]
    options = _converted(Config, parser, all_words, rest)
    built = _built(Config, options, words)
    _refuse_idle(Config, options, {word.name for word in found if word and not word.where})
    without_effect = {name: config.default_of(Config, name) for name in idle(Config, options)}
    return dataclasses.replace(built, **without_effect)


def _built(Config, options, words):
    """Config(**options); a victim's option that is out of range is its record's fault."""
    try:
        return Config(**options)
    except ConfigError as error:
        word = words.get(str(error).split()[0])
        if word and word.where == VICTIM:
            raise RefusedError(f"{VICTIM}{error}") from error
        raise


def script(kind, name):
    """The script behind runs called `name`.

    The runs of attack/clean.py are called after their trigger too, clean_badnet say.
    """
    own = name.startswith("clean_") and not (config.ROOT / kind / f"{name}.py").is_file()
    return f"{kind}/{'clean' if own else name}.py"


def command(script, config):
    """The command line that gives `config`: its options other than the defaults for its recipe and
    data set."""
    given, own = config.plain(), Path(script).stem
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    defaults = defaults_for(type(config), given, own)
    usual |= {name: value for name, (value, _) in defaults.items()}
    unnamed = {name: value for name, value in given.items() if name not in FOR_LARGE}
    large = for_large_images(type(config), unnamed, own)
    # where one of them is another, both are written: one alone would not choose the other
    usual |= large if large.items() <= given.items() else dict.fromkeys(large)
    changed = {name: value for name, value in given.items() if value != usual[name]}
    changed = {name: changed[name] for name in changed if name not in idle(type(config), given)}
    return shlex.join([*start(script), *words(changed)])


def start(script, installed=config.INSTALLED):
    """The words that start a script, attack/badnet.py say: its file in a checkout, else its
    module."""
    if not installed:
        return ["python", script]
    module = script.removesuffix(".py").replace("/", ".")
    return ["python", "-m", f"{config.PACKAGE}.{module}"]


def taken_apart(command):
    """(the words that start the script, {option: value}) of a command that a record holds.

    Raises ValueError where it is none.
    """
    found = shlex.split(command)
    first = next((place for place, word in enumerate(found) if word.startswith("--")), len(found))
    return found[:first], pairs(found[first:])


def pairs(found):
    """{option: value} of words such as --option value or --option=value; ValueError for others."""
    given, left = {}, iter(found)
    for word in left:
        name, equals, value = word.partition("=")
        value = value if equals else next(left, None)
        if not name.startswith("--") or value is None:
            raise ValueError(f"no pairs of --option and value: {' '.join(found)!r}")
        given[name[2:]] = value
    return given


def words(given):
    """Options as the words of a command."""
    written = []
    for name, value in given.items():
        text = _text(value)
        written += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return written


class _Help(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of a script's docstring."""


def _parser(Config, description, script):
    parser = jsonargparse.ArgumentParser(
        prog=shlex.join(start(script)) if script and config.INSTALLED else script,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_Help,
        parser_mode="scalar",
    )
    parser.add_argument(
        "--yaml_path", action="config", help="YAML file of options; a flag overrides what it says"
    )
    parser.add_class_arguments(Config, as_group=False, skip=set(SWITCHES))
    for action in parser._actions:
        if bounds := declared(Config, action.dest, "bounds"):
            action.help = f"{action.help}; {bounds}" if action.help else str(bounds)
    for name, text in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser


class _Words(argparse.ArgumentParser):
    """Splits a command line into options and their texts."""

    def error(self, message):
        raise ConfigError(" ".join(message.split()))


class _Collect(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        text = " ".join(values) if isinstance(values, list) else values
        namespace.found.append(Word(option_string[2:], text, ""))


def _flags(Config, own, argv):
    """(the options of a command line in their order, the words for help and --print_config)"""
    parser = _Words(add_help=False, allow_abbrev=False)
    hints = get_type_hints(Config)
    bare = {name for name, hint in hints.items() if hint is bool} | {"amp", "dithering"}
    for name in dict.fromkeys([*_known(Config), *_foreign(Config, own)]):
        count = None if name in {*_known(Config), *_aliases(Config, own)} else "*"
        count = "?" if name in bare else count
        parser.add_argument(f"--{name}", action=_Collect, nargs=count, const="true")
    found, rest = parser.parse_known_args(argv, argparse.Namespace(found=[]))
    for word in rest:
        name = word.lstrip("-").split("=")[0]
        if word in ("-h", "--help") or (name == "print_config" and word.startswith("--")):
            continue
        if not word.startswith("--"):
            raise ConfigError(
                f"{quoted(word)} is no option: options begin with --; --help lists all"
            )
        raise ConfigError(_unknown(Config, own, name))
    return found.found, rest


def _known(Config):
    return [*(field.name for field in dataclasses.fields(Config)), "yaml_path"]


def _foreign(Config, own):
    """BackdoorBench's names for options of this script, and those that change nothing."""
    return [
        *_aliases(Config, own),
        *backdoorbench.names(own),
        *(backdoorbench.OF_THE_RECORD if issubclass(Config, OnRecord) else []),
    ]


def _aliases(Config, own):
    aliases = {**backdoorbench.ALIASES, **backdoorbench.OWN_ALIASES.get(own, {})}
    known = _known(Config)
    return {name: here for name, here in aliases.items() if here in known and name not in known}


def _is_ignored(Config, own, name):
    of_record = issubclass(Config, OnRecord) and name in backdoorbench.OF_THE_RECORD
    ignored = name in backdoorbench.IGNORED or name in backdoorbench.OWN_IGNORED.get(own, ())
    return (of_record or ignored) and name not in _aliases(Config, own)


def _translated(Config, own, word):
    """The option with the name and the value that it has here; None where it changes nothing."""
    name, text, where = word
    if name not in _known(Config):
        here = _aliases(Config, own).get(name)
        nothing = not text and name in backdoorbench.names(own)
        if here is None and (nothing or _is_ignored(Config, own, name)):
            return None
        if here is None and name in backdoorbench.FIXED.get(own, ()):
            if backdoorbench.is_fixed(own, name, text):
                return None
        if here is None:
            raise ConfigError(f"{where}{_unknown(Config, own, name)}")
        name, text = here, backdoorbench.VALUES.get(name, {}).get(text, text)
    if name == "yaml_path":
        raise ConfigError(f"{where}yaml_path is a flag: a file of options names no other file")
    if "\0" in (text or ""):
        raise ConfigError(f"{where}{name} must be text without the character NUL")
    return Word(name, text, where)


def _refuse_files(words):
    """ConfigError where a file of options, which may come from others, names a file to execute."""
    for word in filter(None, words):
        if word.where and word.name in EXECUTED and models.is_file(word.text or ""):
            raise ConfigError(
                f"{word.where}{word.name} names a Python file, and only the flag --{word.name} may "
                "do that, because the file is executed"
            )


def _unknown(Config, own, name):
    """A sentence for an unknown option, with the nearest known ones."""
    if meaning := backdoorbench.explain(own, name):
        return f"{name} is an option of BackdoorBench: here {meaning}"
    near = difflib.get_close_matches(name[:100], _known(Config), 3, 0.5)
    hint = f"the nearest are {', '.join(near)}" if near else "--help lists all"
    return f"unknown option {quoted(name)}; {hint}"


def _check_record(Config, given, ignored):
    """ConfigError where a script is told of another data set or model than its record's."""
    if not issubclass(Config, OnRecord):
        return
    made = victim_options({name: word.text for name, word in given.items()})
    for word in ignored:
        there = made.get(word.name)
        if word.name in ("dataset", "model") and there and word.text not in (None, str(there)):
            raise ConfigError(
                f"{word.where}the {word.name} of the record is {quoted(there)}, not "
                f"{quoted(word.text)}: leave {word.name} out"
            )


def _warn(ignored):
    if ignored:
        names = ", ".join(dict.fromkeys(word.name for word in ignored))
        print(f"warning: ignored, because they change nothing here: {names}", file=sys.stderr)


def _say_for_large(chosen):
    if chosen and os.environ.get("RANK", "0") == "0":  # of torchrun's processes, the first
        print(
            f"note: above {SMALL} pixels the network is {chosen['model']} and the recipe is "
            f"{chosen['recipe']}, unless --model or --recipe names another",
            file=sys.stderr,
        )


def _words_of(path):
    """The options in a user's YAML file; ConfigError names the file and says what is wrong."""
    if not path.exists() and (instead := backdoorbench.place_of(path)):
        raise ConfigError(f"there is no file {printable(path)}: {instead}")
    return [
        Word(name, _text_of(node), f"{printable(path)}: ")
        for name, node in read_nodes(path, backdoorbench.LISTS).items()
    ]


def _text_of(node):
    """The text of a YAML value, the words of a list in a row; None for null."""
    if isinstance(node.value, list):
        return " ".join(part.value for part in node.value)
    return None if node.tag.endswith(":null") else node.value


jsonargparse.set_loader("scalar", scalar, (ValueError,))
jsonargparse.set_dumper("scalar", lambda options: yaml.safe_dump(options, sort_keys=False))


def _text(value):
    """A value as a word of a command."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: NULL}[value]
    return str(value)


def _word(name, value, where):
    if not isinstance(value, str | int | float | None):
        raise _type_error(where)(f"{where}{name} must have one value, no list or mapping")
    return Word(name, None if value is None else _text(value), where)


def _type_error(where):
    return RefusedError if where == VICTIM else ConfigError


def _converted(Config, parser, words, rest):
    """{option: value} with values of the declared types."""
    hints = get_type_hints(Config)
    switches = dict.fromkeys(SWITCHES, False)
    written = []
    for name, text, where in words:
        if text is None and type(None) not in get_args(hints[name]):
            raise _type_error(where)(f"{where}{name} must be {_kinds(hints[name])}")
        if name not in SWITCHES:
            written.append(f"--{name}={NULL if text is None else text}")
        elif text.lower() not in ("true", "false"):
            raise ConfigError(f"{where}{name} must be true or false")
        else:
            switches[name] = text.lower() == "true"
    try:
        options = parser.parse_args([*written, *rest])
    except jsonargparse.ArgumentError as error:
        found = re.search(r'Parser key "(\w+)"', str(error))
        wrong = [word for word in words if found and word.name == found[1]]
        if not wrong:
            raise ConfigError(" ".join(str(error).split())[:300]) from error
        shown = [word for word in wrong if f"value: {word.text}" in str(error)]
        name, text, where = [*shown, wrong[-1]][0]
        raise _type_error(where)(
            f"{where}{name} must be {_kinds(hints[name])}, not {quoted(text)}"
        ) from error
    except (AttributeError, LookupError, TypeError, ArithmeticError) as error:
        # the parser reads numbers as YAML, where a tag names a type that the value may not have
        tagged = [word for word in words if (word.text or "").lstrip().startswith("!")]
        if not tagged:
            raise
        name, text, where = tagged[-1]
        raise _type_error(where)(
            f"{where}{name} must be {_kinds(hints[name])}, not {quoted(text)}"
        ) from error
    return {field.name: options[field.name] for field in dataclasses.fields(Config)} | switches


def _kinds(hint):
    """Words for the type of an option."""
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): NULL,
    }
    if hint in names:
        return names[hint]
    return " or ".join(part if isinstance(part, str) else _kinds(part) for part in get_args(hint))


def _refuse_idle(Config, options, flags):
    """ConfigError where a flag that is no default has no effect."""
    for name, (other, value) in idle(Config, options).items():
        if name not in flags or options[name] == config.default_of(Config, name):
            continue
        beside = f"with --{other} {options[other]}"
        values = " or ".join(map(str, value)) if isinstance(value, tuple) else value
        remedy = f"choose --{other} {values}"
        if value is None:
            beside, remedy = f"with --{other}", f"leave --{other} out"
        elif value is True:
            beside, remedy = f"without --{other}", f"give --{other} too"
        raise ConfigError(f"--{name} has no effect {beside}: leave it out, or {remedy}")
