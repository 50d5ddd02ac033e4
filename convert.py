"""Make records of what was trained or poisoned elsewhere, and write records for other programs.

    python convert.py from-weights model.pt --dataset cifar10 --model resnet18 --trigger badnet
    python convert.py from-backdoorbench ../BackdoorBench/record/badnet_0_1 --dataset_path data
    python convert.py from-images poisoned/ --dataset cifar10 --epochs 20
    python convert.py to-images badnet_cifar10 --output poisoned/
    python convert.py to-backdoorbench badnet_cifar10 --output ../BackdoorBench/record/badnet_here
    python convert.py to-trojai record/ --output zoo/

from-weights: a state dict, .safetensors or a file of torch.save, becomes a record that defenses and
compare.py work on. Without --trigger or --triggered_path its ASR and RA are empty.
from-backdoorbench: a folder of BackdoorBench's record/ with attack_result.pt becomes a record, or
one of a defense below it with defense_result.pt.
from-images: a victim is trained on the poisoned set in a folder with images.csv.
to-images: the poisoned training set and the test sets of a record as image folders, with a list.
to-backdoorbench: a record as BackdoorBench's defenses load it.
to-trojai: records in the layout of a TrojAI round, for detectors of backdoored models.

Nothing in a file is executed. python convert.py COMMAND --help lists the options of a command; see
docs/from_backdoorbench.md.
"""

import dataclasses
import importlib
import inspect
import shlex
import sys
from typing import get_type_hints

from antidote_bench.utils import parsing
from antidote_bench.utils.config import Attack, scripts
from antidote_bench.utils.errors import ConfigError
from antidote_bench.utils.exchange.options import (
    Export,
    FromBackdoorBench,
    FromImages,
    FromWeights,
    ToBackdoorBench,
    ToImages,
    ToTrojai,
)
from antidote_bench.utils.launch import guard, obey_signals
from antidote_bench.utils.text import quoted

SCRIPT = "convert.py"
# command: its options; a function of its name does it
COMMANDS = {
    "from-weights": FromWeights,
    "from-backdoorbench": FromBackdoorBench,
    "from-images": FromImages,
    "to-images": ToImages,
    "to-backdoorbench": ToBackdoorBench,
    "to-trojai": ToTrojai,
}


def convert(argv):
    """Do what a command line says; `argv` are its words after the script."""
    if not argv or argv[0] in ("-h", "--help"):
        print(inspect.cleandoc(__doc__))
        return
    command, *words = argv
    if command not in COMMANDS:
        raise ConfigError(
            f"there is no command {quoted(command)}: the commands are {', '.join(COMMANDS)}"
        )
    Config = COMMANDS[command]
    leaves = issubclass(Config, Export)
    if words and not words[0].startswith("-"):
        words = ["--result_file" if leaves else "--source", *words]
    attack = _attack(words) if Config is FromWeights else None
    if attack:
        Config = _with_options(Config, attack)
    config = parsing.parse(Config, words, _description(command), SCRIPT)
    from antidote_bench.utils.protocol import exports, imports  # heavy

    obey_signals()
    function = command.replace("-", "_")
    if leaves and config.dry_run:
        exports.plan(config)
    elif leaves:
        getattr(exports, function)(config)
    else:
        typed = shlex.join([*parsing.start(SCRIPT), *argv])
        getattr(imports, function)(typed, config)


def _description(command):
    """The sentences of this file's docstring about a command."""
    text = inspect.cleandoc(__doc__)
    start = text.index(f"\n{command}: ") + 1
    end = min(
        place
        for place in (
            text.find("\nfrom-", start),
            text.find("\nto-", start),
            text.find("\n\n", start),
        )
        if place > 0
    )
    return text[start:end]


def _attack(words):
    """The module of the attack whose trigger --trigger names, None where it names none."""
    given = [word.partition("=") for word in words]
    names = [value for flag, _, value in given if flag == "--trigger" and value]
    names += [after for flag, after in zip(words, words[1:], strict=False) if flag == "--trigger"]
    if not names:
        return None
    known = [name for name in scripts("attack") if name != "clean"]
    if names[-1] not in known:
        raise ConfigError(f"unknown trigger {quoted(names[-1])}; there are {', '.join(known)}")
    return importlib.import_module(f"antidote_bench.attack.{names[-1]}")


def _with_options(Config, attack):
    """`Config` with the options of an attack, also where it has its own default for one of all.

    The attack's share of poisoned images, which it may check, is its default: what is known of the
    model stands in `poisoned_share`.
    """
    parents = [each for each in attack.Config.__mro__ if issubclass(each, Attack)]
    names = {name for each in parents[:-1] for name in inspect.get_annotations(each)}
    hints, fields = get_type_hints(attack.Config), attack.Config.__dataclass_fields__
    kept = {field.name for field in dataclasses.fields(Config)}
    changed = sorted(name for name in names if name in kept)
    return dataclasses.make_dataclass(
        "Config",
        [(name, hints[name], _copy(fields[name])) for name in changed],
        bases=(Config, attack.Config),
        frozen=True,
        kw_only=True,
        namespace={
            "__module__": attack.__name__,
            "__doc__": Config.__doc__,
            "attack_module": attack,
            "pratio": fields["pratio"].default,
        },
    )


def _copy(field):
    """A field with the same default and facts."""
    return dataclasses.field(default=field.default, metadata=field.metadata)


def main(argv):
    """Run with command line arguments; returns the exit code."""
    return guard(lambda: convert(argv), debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
